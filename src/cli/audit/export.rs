//! `sublet audit export`: events for other tools, as they are recorded or as OCSF.
#![forbid(unsafe_code)]

use std::io::Write;
use std::path::PathBuf;

use super::fresh::{self, Place};
use crate::audit::{AuditError, ocsf};
use crate::cli::fail::{Answer, Failure, YES};
use crate::cli::output::Output;
use crate::cli::{Globals, load};
use crate::model::event::RecordedEvent;
use crate::store::{Reader, StoreError};

#[derive(Debug, clap::Args)]
#[command(after_long_help = EXPORT_HELP)]
pub struct ExportArgs {
    /// As recorded, so that the lines alone can be verified; or in the words of OCSF 1.8
    #[arg(long, value_enum, default_value_t = Format::Jsonl)]
    pub format: Format,
    /// From this event on
    #[arg(long, value_name = "SEQ")]
    pub since: Option<u64>,
    /// Into a new file of mode 0600, whole or not at all [default: standard output]
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// JSON lines as they are hashed
    Jsonl,
    /// Authorize Session (3003) and API Activity (6003), JSON lines
    Ocsf,
}

const EXPORT_HELP: &str = "\
Examples:
  sublet audit export --out trail.jsonl && sublet audit verify --file trail.jsonl
  sublet audit export --format ocsf --since 1200 | my-siem-forwarder

Exit status:
  0    all that is recorded was written
  2    the trail could not be read, or the file not written";

pub(super) fn execute(globals: &Globals, args: &ExportArgs) -> Answer {
    let place = args.out.as_deref().map(|path| Place::take(path).map(|place| (path, place)));
    let fresh = match place.transpose()? {
        Some((path, Place::Free(fresh))) => Some((path, fresh)),
        Some((path, Place::Taken(_))) => return Err(fresh::exists(path)),
        None => None,
    };
    let reader = super::recorded(&load::host_of_state(globals)?)?;
    let Some((path, fresh)) = fresh else {
        let mut output = Output::new(globals.json);
        write(&reader, args, |line| output.bytes(line.as_bytes()))?;
        output.finish()?;
        return Ok(YES);
    };
    let (count, _) = fresh.fill(|out| {
        write(&reader, args, |line| {
            out.write_all(line.as_bytes()).map_err(|e| fresh::not_written(path).because(&e))
        })
    })?;
    let mut output = Output::new(globals.json);
    if globals.json {
        output.object(&serde_json::json!({ "file": path, "events": count }))?;
    } else {
        output.line(format_args!("{count} events are in {}", path.display()))?;
    }
    output.finish()?;
    Ok(YES)
}

fn write(
    reader: &Reader,
    args: &ExportArgs,
    mut put: impl FnMut(&str) -> Result<(), Failure>,
) -> Result<u64, Failure> {
    let before = args.since.unwrap_or(0).saturating_sub(1);
    let written = reader.read(|view| {
        let mut count = 0;
        for event in view.events_since(before) {
            let event = event?;
            match line(&event, args.format).and_then(|line| put(&line)) {
                Ok(()) => count += 1,
                Err(failure) => return Ok(Err(failure)),
            }
        }
        Ok(Ok(count))
    });
    written.map_err(|e| Failure::from(&e))?
}

/// One line, whatever was done to the event: what is no event any more ends the export.
fn line(event: &RecordedEvent, format: Format) -> Result<String, Failure> {
    let understood = event.event().map_err(|source| {
        super::unreadable(&AuditError::<StoreError>::Unknown { seq: event.seq, source })
    })?;
    Ok(match format {
        Format::Jsonl => format!("{}\n", event.line()),
        Format::Ocsf => format!("{}\n", ocsf::event(&understood)),
    })
}
