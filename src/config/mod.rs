//! The host's configuration.
#![forbid(unsafe_code)]
pub mod place;
