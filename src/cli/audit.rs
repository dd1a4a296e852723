//! `sublet audit`: the trail, read, signed and moved away. Nothing in it is believed before `verify`, and no
//! event is changed or lost.
//!
//! - here: [`list`], [`show`]; `line`: an event for people
//! - `verify`, `tail`, `export`: reading only; `checkpoint`: signs; `rotate`: the one that removes
//! - `fresh`: a file that is written whole or not at all
#![forbid(unsafe_code)]

mod checkpoint;
mod export;
mod fresh;
mod line;
mod rotate;
mod tail;
mod verify;

use std::time::Duration;

use clap::Subcommand;

use super::fail::{Answer, Failure, NO, YES};
use super::output::Output;
use super::{Globals, load};
use crate::audit::{self, AuditError, Filter};
use crate::host::Host;
use crate::model::event::EventType;
use crate::model::id::{ExecId, LeaseId, RunId};
use crate::model::moment::Span;
use crate::store::{Reader, StoreError};
use line::tell;

#[derive(Debug, clap::Args)]
#[command(after_long_help = HELP, arg_required_else_help = true)]
pub struct AuditArgs {
    #[command(subcommand)]
    pub action: Action,
}

pub const HELP: &str = "\
Examples:
  sublet audit list --since 1h
  sublet audit show lse_0199…
  sublet audit tail --follow
  sublet audit verify
  sublet audit checkpoint > /mnt/elsewhere/checkpoint
  sublet audit rotate --keep 10000 --out /var/backups/sublet-trail-1.jsonl

Exit status:
  0    done; the trail is whole
  1    the trail was changed, or does not know the lease
  2    sublet could not do it";

const LIST_HELP: &str = "\
Examples:
  sublet audit list
  sublet audit list --run ci-1234 --type lease.denied
  sublet audit list --since 2026-11-22T10:00:00Z --json > trail.jsonl

Exit status:
  0    listed, be it nothing
  2    the trail could not be read";

const SHOW_HELP: &str = "\
Examples:
  sublet audit show lse_0199…

Exit status:
  0    shown
  1    the trail does not know this lease
  2    the trail could not be read";

#[derive(Debug, Subcommand)]
#[command(defer = true)]
pub enum Action {
    /// List events, oldest first
    List(ListArgs),
    /// Tell the whole life of a lease
    Show(ShowArgs),
    /// Print the last events, and with --follow those to come
    Tail(tail::TailArgs),
    /// Check that no event was changed, removed or reordered
    Verify(verify::VerifyArgs),
    /// Sign the trail's head and print it, to be kept elsewhere
    Checkpoint(checkpoint::CheckpointArgs),
    /// Print the public half of the key that signs checkpoints and envelopes
    Key(checkpoint::KeyArgs),
    /// Move older events to a signed archive; the chain goes on
    Rotate(rotate::RotateArgs),
    /// Write events for other tools
    Export(export::ExportArgs),
}

#[derive(Debug, clap::Args)]
#[command(after_long_help = LIST_HELP)]
pub struct ListArgs {
    /// Of this agent run
    #[arg(long, value_name = "ID")]
    pub run: Option<RunId>,
    /// Of this lease, and of the execs that held it
    #[arg(long, value_name = "ID")]
    pub lease: Option<LeaseId>,
    /// Of this exec
    #[arg(long, value_name = "ID")]
    pub exec: Option<ExecId>,
    /// Of this type, such as lease.denied; may be repeated
    #[arg(long = "type", value_name = "TYPE")]
    pub types: Vec<EventType>,
    /// Since this time (2026-11-22T10:00:00Z), or so long ago (1h)
    #[arg(long, value_name = "TIME", value_parser = since)]
    pub since: Option<Since>,
    /// The last N that fit
    #[arg(long, value_name = "N")]
    pub last: Option<usize>,
}

#[derive(Debug, clap::Args)]
#[command(after_long_help = SHOW_HELP)]
pub struct ShowArgs {
    /// The lease
    pub lease: LeaseId,
}

/// A point on the wall clock, or a distance back from now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Since {
    Time(jiff::Timestamp),
    Ago(Duration),
}

fn since(text: &str) -> Result<Since, String> {
    if let Ok(time) = text.parse() {
        return Ok(Since::Time(time));
    }
    let span: Span = text.parse().map_err(|_| {
        format!("`{text}` is no time such as 2026-11-22T10:00:00Z and no duration such as 1h")
    })?;
    Ok(Since::Ago(span.0))
}

impl Since {
    fn time(self) -> jiff::Timestamp {
        match self {
            Since::Time(time) => time,
            // What lies before the calendar's beginning is since ever.
            Since::Ago(ago) => {
                jiff::Timestamp::now().checked_sub(ago).unwrap_or(jiff::Timestamp::MIN)
            }
        }
    }
}

pub fn execute(globals: &Globals, args: &AuditArgs) -> Answer {
    let state = || load::host_of_state(globals);
    match &args.action {
        Action::List(args) => match reader_or_note(&state()?)? {
            Some(reader) => list(globals, &reader, args),
            None => Ok(YES),
        },
        Action::Show(args) => show(globals, &recorded(&state()?)?, &args.lease),
        Action::Tail(args) => tail::execute(globals, &state()?, args),
        Action::Checkpoint(args) => checkpoint::execute(globals, &state()?, args),
        Action::Key(args) => checkpoint::key(globals, &state()?, args),
        // These look at the caller's files first.
        Action::Verify(args) => verify::execute(globals, args),
        Action::Rotate(args) => rotate::execute(globals, args),
        Action::Export(args) => export::execute(globals, args),
    }
}

/// The trail. That there is none proves nothing: the state may be another's than was meant.
fn recorded(host: &Host) -> Result<Reader, Failure> {
    Reader::open(&host.state_dir).map_err(|e| Failure::from(&e))
}

/// The trail, if there is one; to look at one before anything was recorded is no failure.
fn reader_or_note(host: &Host) -> Result<Option<Reader>, Failure> {
    let reader = reader(host)?;
    if reader.is_none() {
        let message = format!("nothing is recorded in {}", host.state_dir.display());
        Failure::new("audit", "state_not_found", message).note();
    }
    Ok(reader)
}

/// The trail, if there is one.
fn reader(host: &Host) -> Result<Option<Reader>, Failure> {
    match Reader::open(&host.state_dir) {
        Ok(reader) => Ok(Some(reader)),
        Err(StoreError::NotFound { .. }) => Ok(None),
        Err(e) => Err(Failure::from(&e)),
    }
}

/// The host's signing key, if it has signed anything yet.
fn signing_key(host: &Host) -> Result<Option<crate::envelope::SigningKey>, Failure> {
    let credentials = load::credentials_directory();
    audit::key::load(&host.state_dir, credentials.as_deref()).map_err(|e| key_failure(&e))
}

/// The same, made on first use. The state directory exists.
fn signing_key_or_new(host: &Host) -> Result<crate::envelope::SigningKey, Failure> {
    let credentials = load::credentials_directory();
    audit::key::load_or_create(&host.state_dir, credentials.as_deref()).map_err(|e| key_failure(&e))
}

fn key_failure(error: &audit::key::SigningKeyError) -> Failure {
    Failure::new("audit", "signing_key_unusable", "the signing key of this host cannot be used")
        .because(error)
        .hint("to verify without it: --key and the verifier key that `sublet audit key` printed")
}

pub(super) fn hostname() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

fn list(globals: &Globals, reader: &Reader, args: &ListArgs) -> Answer {
    let filter = Filter {
        run: args.run.clone(),
        lease: args.lease.clone(),
        exec: args.exec.clone(),
        types: args.types.clone(),
        since: args.since.map(Since::time),
    };
    let mut output = Output::new(globals.json);
    // The store's own error cannot carry a failure to write, so what is read and what was told are apart.
    let told = reader
        .read(|view| {
            let mut last = std::collections::VecDeque::new();
            for event in audit::list(view.events(), &filter) {
                let event = match event {
                    Ok(event) => event,
                    Err(e) => return Ok(Err(unreadable(&e))),
                };
                match args.last {
                    None => {
                        if let Err(failure) = tell(&mut output, &event) {
                            return Ok(Err(failure));
                        }
                    }
                    Some(most) => {
                        last.push_back(event);
                        if last.len() > most {
                            last.pop_front();
                        }
                    }
                }
            }
            Ok(last.iter().try_for_each(|event| tell(&mut output, event)))
        })
        .map_err(|e| Failure::from(&e))?;
    told?;
    output.finish()?;
    Ok(YES)
}

fn show(globals: &Globals, reader: &Reader, lease: &LeaseId) -> Answer {
    let life = reader
        .read(|view| Ok(audit::show(|| view.events(), lease).map_err(|e| unreadable(&e))))
        .map_err(|e| Failure::from(&e))??;
    if life.is_empty() {
        return Err(Failure::new(
            "audit",
            "lease_unknown",
            format!("the trail does not know {lease}"),
        )
        .hint("see the leases with: sublet audit list --type lease.granted")
        .exit(NO));
    }
    let mut output = Output::new(globals.json);
    for event in &life {
        tell(&mut output, event)?;
    }
    output.finish()?;
    Ok(YES)
}

fn unreadable(error: &AuditError<StoreError>) -> Failure {
    Failure::new("audit", "trail_unreadable", "the trail cannot be shown")
        .because(error)
        .hint("sublet audit verify names the first event that is not as it was")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn since_is_a_time_or_a_distance() {
        assert_eq!(since("90m"), Ok(Since::Ago(Duration::from_secs(5400))));
        assert!(matches!(since("2026-11-22T10:00:00Z"), Ok(Since::Time(_))));
        assert!(since("yesterday").unwrap_err().contains("`yesterday` is no time"));
    }
}
