//! `sublet git-credential`: the helper that git calls inside an exec with a `git` lease (gitcredentials(7)).
//!
//! Receives git's request on standard input and hands it to [`helper::ask`]; decides nothing, keeps nothing.
#![forbid(unsafe_code)]

use std::io::{self, Write};

use clap::ValueEnum;

use super::Globals;
use super::fail::{Answer, Failure, NO, YES};
use super::prompt::RawStdin;
use crate::delivery::helper::{self, HelperError};
use crate::model::secret::Secret;

#[derive(Debug, clap::Args)]
#[command(after_long_help = HELP)]
pub struct GitCredentialArgs {
    /// What git wants
    pub operation: Operation,
}

pub const HELP: &str = "\
Examples:
  git config credential.https://github.com.helper '/run/sublet/bin/sublet git-credential'

Exit status:
  0    answered; store and erase are swallowed, since nothing is kept
  1    refused: git is told to stop asking
  2    there is no lease socket here, or it did not answer";

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Operation {
    Get,
    Store,
    Erase,
}

pub fn execute(_globals: &Globals, args: &GitCredentialArgs) -> Answer {
    crate::sys::memory::set_dumpable(false).map_err(|e| {
        Failure::new("deliver", "helper_unprotected", "cannot make the helper undumpable")
            .because(&e)
    })?;
    match args.operation {
        Operation::Store | Operation::Erase => {
            // `store` brings the value back to us: read it where it is wiped, and forget it. A git that
            // sends more than a value can be is not our concern either.
            drop(Secret::read_from(RawStdin));
            Ok(YES)
        }
        Operation::Get => match helper::ask("get", io::stdin().lock(), RawStdout) {
            Ok(()) => Ok(YES),
            Err(error) => {
                // Else git would go on to ask other helpers. If git is gone, so is its question.
                drop(RawStdout.write_all(b"quit=1\n"));
                Err(failure(&error))
            }
        },
    }
}

fn failure(error: &HelperError) -> Failure {
    match error {
        HelperError::Refused(why) => {
            Failure::new("decide", "credential_refused", "no credential for git")
                .why(why)
                .hint("the trail tells more: sublet audit list --last 5")
                .exit(NO)
        }
        HelperError::Socket(_) => {
            Failure::new("deliver", "no_lease_socket", "cannot reach the lease of this exec")
                .because(error)
                .hint("sublet run --profile P --lease CAPABILITY@HOST,channel=git -- git …")
        }
        HelperError::Request(_) | HelperError::Answer(_) => {
            Failure::new("deliver", "helper_failed", "the exchange with git failed").because(error)
        }
    }
}

/// Standard output past std's buffer, which is never wiped.
struct RawStdout;

impl Write for RawStdout {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(rustix::io::write(rustix::stdio::stdout(), bytes)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
