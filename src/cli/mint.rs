//! `sublet mint`: the minter's process, which the launcher starts and nobody else. Hidden.
#![forbid(unsafe_code)]

use super::fail::{Answer, Failure, YES};
use crate::minter;

#[derive(Debug, clap::Args)]
#[command(after_long_help = HELP)]
pub struct MintArgs {}

pub const HELP: &str = "\
Examples:
  sublet mint    never by hand: the launcher starts it, with the memory of a question and its answer

Exit status:
  0    there is an answer, be it a failure
  2    this was not started by the launcher";

pub fn execute(_args: &MintArgs) -> Answer {
    minter::run().map(|()| YES).map_err(|e| {
        Failure::new("mint", "not_a_minter", e.to_string())
            .hint("the launcher starts this for sources that mint; see docs/sources.md")
    })
}
