//! `sublet completions`: what a shell needs to complete our command line.
#![forbid(unsafe_code)]

use clap_complete::Shell;

use super::Globals;
use super::fail::{Answer, YES};
use super::output::Output;

#[derive(Debug, clap::Args)]
#[command(after_long_help = HELP)]
pub struct CompletionsArgs {
    /// The shell to print for
    pub shell: Shell,
}

pub const HELP: &str = "\
Examples:
  sublet completions bash > /etc/bash_completion.d/sublet
  sublet completions zsh > ~/.zfunc/_sublet
  sublet completions fish > ~/.config/fish/completions/sublet.fish

Exit status:
  0    printed
  2    bad usage, or standard output could not be written";

pub fn execute(globals: &Globals, args: &CompletionsArgs) -> Answer {
    // Into memory first: the generator panics where its stream fails.
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut super::definitions(), "sublet", &mut script);
    let mut output = Output::new(globals.json);
    output.bytes(&script)?;
    output.finish()?;
    Ok(YES)
}
