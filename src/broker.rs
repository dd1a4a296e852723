//! The broker as a service: many runs, one process without rights.
//!
//! - [`settle`]: gives up what the process started with, and shows that it is gone
#![forbid(unsafe_code)]

pub mod settle;
