//! The decision, and the rules for a command's environment. Pure: what a profile and the host's
//! configuration say, what is asked, by which run, how often so far, for which command → a verdict.
//! Nothing is read, resolved or counted here.
//!
//! - [`request`]: what is asked, parsed at the edge
//! - [`decide`]: the decision; the only maker of a [`Grant`]
//! - [`command`]: whether a command may carry a capability's value
//! - [`environment`]: who may set which variable; `--env` and `--env-file`
//! - `denial`: the words of every denial
#![forbid(unsafe_code)]

pub mod command;
mod decide;
mod denial;
pub mod environment;
pub mod request;

pub use command::{ResolvedCommand, check_command};
pub use decide::{Grant, Policy, Verdict, decide, decide_all};
pub use request::{LeaseFlag, Reason, Request};

#[cfg(test)]
mod tests;
