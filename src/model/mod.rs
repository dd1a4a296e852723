//! The words: what every other room talks about. No decisions, no effects.
//!
//! - [`id`]: prefixed identifiers of runs, leases, execs, events, requests
//! - [`name`]: capability, audience, channel, secret and variable names, parsed once
//! - [`event`]: one line of the audit trail, sealed and linked; the trail's head
//! - [`digest`]: the keyed digest of a managed value
//! - [`mint`]: what a minter is asked for and what it answers
//! - [`moment`]: the two clocks, durations and sizes as users write them
//! - [`run`], [`lease`], [`exec`]: as they are recorded
//! - [`secret`]: a value in locked memory
//! - [`verdict`]: granted or denied, and why
//! - [`report`]: what was enforced, scrubbed and how long it took
#![forbid(unsafe_code)]

pub mod digest;
pub mod event;
pub mod exec;
pub mod id;
pub mod lease;
pub mod mint;
pub mod moment;
pub mod name;
pub mod path_bytes;
pub mod report;
pub mod run;
pub mod secret;
pub mod ssh;
pub mod user;
pub mod verdict;
