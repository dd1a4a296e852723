//! What ended a command, where it was not its own exit: 124 and 137 may be the command's own statuses too.
#![forbid(unsafe_code)]

use super::Globals;
use super::fail::Failure;

pub(super) enum Ending {
    Exit,
    Timeout,
    LeaseExpired,
    LeaseRevoked,
    Signal(i32),
}

impl Ending {
    /// `word` is what the trail says of the end, where it is known: a broker's client hears of its lease's end from
    /// whoever ended it.
    pub fn of(word: Option<&str>, timed_out: bool, signal: Option<i32>) -> Self {
        match (word, timed_out, signal) {
            (_, true, _) => Ending::Timeout,
            (Some("expired"), ..) => Ending::LeaseExpired,
            (Some("revoked"), ..) => Ending::LeaseRevoked,
            (_, _, Some(signal)) => Ending::Signal(signal),
            (_, _, None) => Ending::Exit,
        }
    }

    /// To people what sublet did, and to programs (`--json`) also what a shell's status hides.
    pub fn tell(&self, globals: &Globals) {
        let failure = match self {
            Ending::Exit => return,
            Ending::Timeout => {
                Failure::new("run", "timed_out", "the command was ended: its time was over")
                    .hint("give it more with --timeout")
            }
            Ending::LeaseExpired => Failure::new(
                "run",
                "lease_expired",
                "the command was killed: a lease expired under it",
            )
            .hint("ask for a longer one (ttl), or let its capability say on_revoke = \"wipe\""),
            Ending::LeaseRevoked => Failure::new(
                "run",
                "lease_revoked",
                "the command was killed: a lease was revoked under it",
            )
            .hint("`sublet audit show LEASE` tells by whom and why"),
            Ending::Signal(_) if !globals.json => return,
            Ending::Signal(signal) => {
                Failure::new("run", "killed", format!("the command was ended by signal {signal}"))
            }
        };
        if globals.json {
            // The exit status is the command's.
            let _: u8 = failure.report(true);
        } else {
            failure.note();
        }
    }
}
