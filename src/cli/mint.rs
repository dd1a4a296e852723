//! `sublet mint`: the minter's process, which the launcher starts and nobody else. Hidden.
#![forbid(unsafe_code)]

use super::fail::{Answer, Failure, YES};
use crate::minter;

pub fn execute() -> Answer {
    minter::run().map(|()| YES).map_err(|e| {
        Failure::new("mint", "not_a_minter", e.to_string())
            .hint("the launcher starts this for sources that mint; see docs/sources.md")
    })
}
