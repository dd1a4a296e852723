//! `sublet audit`: the trail, read. Nothing is written, and nothing in it is believed before `verify`.
#![forbid(unsafe_code)]

use std::time::Duration;

use clap::Subcommand;
use serde_json::{Value, json};

use super::fail::{Answer, Failure, NO, YES};
use super::output::Output;
use super::{Globals, load};
use crate::audit::{self, AuditError, Filter};
use crate::host::Host;
use crate::launcher::serve::HEAD_FILE;
use crate::model::event::{Event, EventType, Head, KeptHead};
use crate::model::id::{ExecId, LeaseId, RunId};
use crate::model::moment::{Span, timestamp_text};
use crate::store::{Reader, StoreError};

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
  sublet audit verify

Exit status:
  0    shown; the trail is whole
  1    the trail was changed, or does not know the lease
  2    sublet could not read it";

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

const VERIFY_HELP: &str = "\
Examples:
  sublet audit verify
  sublet audit verify --head 120:4f1d…

Exit status:
  0    every event is unchanged and in its place, up to the head that is known
  1    an event was changed, removed or reordered: the first one is named
  2    the trail could not be read";

#[derive(Debug, Subcommand)]
#[command(defer = true)]
pub enum Action {
    /// List events, oldest first
    List(ListArgs),
    /// Tell the whole life of a lease
    Show(ShowArgs),
    /// Check that no event was changed, removed or reordered
    Verify(VerifyArgs),
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

#[derive(Debug, clap::Args)]
#[command(after_long_help = VERIFY_HELP)]
pub struct VerifyArgs {
    /// A head that was kept elsewhere: what an earlier `verify` printed
    #[arg(long, value_name = "SEQ:HASH")]
    pub head: Option<Head>,
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

pub fn execute(globals: &Globals, args: &AuditArgs) -> Answer {
    let host = load::host_of_state(globals)?;
    let reader = match Reader::open(&host.state_dir) {
        Ok(reader) => Some(reader),
        Err(StoreError::NotFound { .. }) => None,
        Err(e) => return Err(Failure::from(&e)),
    };
    match &args.action {
        Action::List(args) => list(globals, reader.as_ref(), args),
        Action::Show(args) => show(globals, reader.as_ref(), &args.lease),
        Action::Verify(args) => verify(globals, &host, reader.as_ref(), args.head.as_ref()),
    }
}

fn list(globals: &Globals, reader: Option<&Reader>, args: &ListArgs) -> Answer {
    let filter = Filter {
        run: args.run.clone(),
        lease: args.lease.clone(),
        exec: args.exec.clone(),
        types: args.types.clone(),
        since: args.since.map(|since| match since {
            Since::Time(time) => time,
            // What lies before the calendar's beginning is since ever.
            Since::Ago(ago) => {
                jiff::Timestamp::now().checked_sub(ago).unwrap_or(jiff::Timestamp::MIN)
            }
        }),
    };
    let mut output = Output::new(globals.json);
    let Some(reader) = reader else { return Ok(YES) };
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

fn show(globals: &Globals, reader: Option<&Reader>, lease: &LeaseId) -> Answer {
    let life = match reader {
        None => Vec::new(),
        Some(reader) => reader
            .read(|view| Ok(audit::show(|| view.events(), lease).map_err(|e| unreadable(&e))))
            .map_err(|e| Failure::from(&e))??,
    };
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

fn verify(globals: &Globals, host: &Host, reader: Option<&Reader>, given: Option<&Head>) -> Answer {
    let kept = kept_head(host)?;
    let boot_id = load::now()?.boot_id;
    let report = match reader {
        Some(reader) => reader
            .read(|view| audit::verify(view.events(), kept.as_ref(), &boot_id, given))
            .map_err(|e| Failure::from(&e))?,
        // A head that is known and a trail that is gone are a removal.
        None => audit::verify(std::iter::empty::<Result<_, StoreError>>(), None, &boot_id, given)
            .map_err(|e| Failure::from(&e))?,
    };
    let mut output = Output::new(globals.json);
    let finding = report.finding.as_ref().map(|f| (f.seq(), f.to_string()));
    if globals.json {
        output.object(&json!({
            "whole": finding.is_none(),
            "events": report.events,
            "head": report.head.to_string(),
            "finding": finding.as_ref().map(|(seq, what)| json!({ "seq": seq, "message": what })),
            "lost_with_power": report.lost_with_power,
        }))?;
    } else {
        match &finding {
            None => output.line(format_args!("the trail is whole: {} events", report.events))?,
            Some((_, what)) => {
                output.line(format_args!("the trail is not whole: {what}"))?;
                output.line(format_args!("events before that are proven: {}", report.events))?;
            }
        }
        if report.lost_with_power > 0 {
            let lost = report.lost_with_power;
            output.line(format_args!("lost in a power cut before they were on disk: {lost}"))?;
        }
        output.line(format_args!("head: {}", report.head))?;
    }
    output.finish()?;
    Ok(if finding.is_none() { YES } else { NO })
}

/// What the launcher keeps outside the database; nothing before the first exec.
fn kept_head(host: &Host) -> Result<Option<KeptHead>, Failure> {
    let path = host.state_dir.join(HEAD_FILE);
    let unusable = || {
        let message = format!("the record of the trail's head, {}, cannot be used", path.display());
        Failure::new("audit", "head_unusable", message)
            .hint("verify with --head and a head kept elsewhere, after moving the record away")
    };
    match std::fs::read(&path) {
        Ok(record) => KeptHead::decode(&record).map(Some).map_err(|e| unusable().because(&e)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(unusable().because(&e)),
    }
}

/// With `--json` the line as it is hashed; else when, what, whose, and the rest as `key=value`.
fn tell(output: &mut Output, event: &Event) -> Result<(), Failure> {
    if output.json {
        return output.bytes(format!("{}\n", event.line()).as_bytes());
    }
    let mut words = vec![
        format!("{:>5}", event.seq),
        timestamp_text(event.time),
        format!("{:<17}", event.kind.as_str()),
    ];
    let mut say = |key: &str, value: Option<String>| {
        words.extend(value.map(|value| format!("{key}={}", quoted(&value))));
    };
    let asked = match (&event.capability, &event.audience) {
        (Some(capability), Some(audience)) => Some(format!("{capability}@{audience}")),
        (capability, _) => capability.as_ref().map(ToString::to_string),
    };
    say("asked", asked);
    say("outcome", event.outcome.clone());
    say("reason", event.reason.clone());
    say("channel", event.channel.map(|channel| channel.to_string()));
    say("ttl", event.ttl_seconds.map(|ttl| format!("{ttl}s")));
    say("uses", event.uses.map(|uses| uses.to_string()));
    say("lease", event.lease_id.as_ref().map(ToString::to_string));
    say("exec", event.exec_id.as_ref().map(ToString::to_string));
    say("run", event.run_id.as_ref().map(ToString::to_string));
    say("agent", event.agent.as_ref().map(ToString::to_string));
    say("principal", event.principal.as_ref().map(ToString::to_string));
    for (key, value) in &event.detail {
        let value = match value {
            Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        say(key, Some(value));
    }
    output.line(words.join(" ").replace('\n', "\\n"))
}

/// Words with spaces are told apart from the next key.
fn quoted(text: &str) -> String {
    let is_plain = !text.is_empty() && !text.contains(|c: char| c.is_whitespace() || c == '"');
    if is_plain { text.to_owned() } else { format!("{text:?}") }
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

    #[test]
    fn words_with_spaces_are_quoted() {
        assert_eq!(quoted("plain"), "plain");
        assert_eq!(quoted("two words"), "\"two words\"");
        assert_eq!(quoted(""), "\"\"");
    }
}
