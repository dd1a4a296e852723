//! The words: what every other room talks about. No decisions, no effects.
//!
//! - [`id`]: prefixed identifiers of runs, leases, execs, events, requests
//! - [`name`]: capability, audience, channel, secret and variable names, parsed once
//! - [`moment`]: the two clocks, durations and sizes as users write them
//! - [`secret`]: a value in locked memory
//! - [`verdict`]: granted or denied, and why
#![forbid(unsafe_code)]

pub mod id;
pub mod moment;
pub mod name;
pub mod secret;
pub mod verdict;
