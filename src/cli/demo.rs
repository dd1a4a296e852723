//! `sublet demo`: the main job end to end, with a demonstration secret and no configuration.
#![forbid(unsafe_code)]

use super::Globals;
use super::fail::{Answer, Failure};

#[derive(Debug, clap::Args)]
#[command(after_long_help = HELP)]
pub struct DemoArgs {}

pub const HELP: &str = "\
Examples:
  sublet demo

Exit status:
  0      every promise shown was kept
  125    sublet failed, or a promise was not kept: sublet doctor says what this machine lacks";

pub fn execute(_globals: &Globals, _args: DemoArgs) -> Answer {
    Err(Failure::new("launch", "unavailable", "this build has no launcher"))
}
