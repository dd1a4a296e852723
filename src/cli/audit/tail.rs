//! `sublet audit tail`: the end of the trail, and with `--follow` what comes after it.
//!
//! Reads only, and wakes ten times a second for a look at the log's shared index. Ends when it is
//! interrupted, or when no one reads any more.
#![forbid(unsafe_code)]

use std::os::fd::AsFd;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::line::tell;
use crate::audit::AuditError;
use crate::cli::Globals;
use crate::cli::fail::{Answer, Failure, YES};
use crate::cli::output::Output;
use crate::host::Host;
use crate::store::{DatabaseFile, Reader, StoreError};
use crate::sys::process;

#[derive(Debug, clap::Args)]
#[command(after_long_help = TAIL_HELP)]
pub struct TailArgs {
    /// How many events to begin with
    #[arg(short = 'n', long = "lines", value_name = "N", default_value_t = 10)]
    pub lines: u64,
    /// Go on with those to come
    #[arg(short, long)]
    pub follow: bool,
}

const TAIL_HELP: &str = "\
Examples:
  sublet audit tail
  sublet audit tail -n 0 --follow --json | jq -r .type

Exit status:
  0    printed; with --follow, interrupted
  2    the trail could not be read";

/// Between two looks.
const PAUSE: Duration = Duration::from_millis(100);

/// A trail that is being followed.
struct Followed {
    reader: Reader,
    file: DatabaseFile,
    version: i64,
}

pub(super) fn execute(globals: &Globals, host: &Host, args: &TailArgs) -> Answer {
    // Before the first line is printed: from then on, being interrupted is how it ends.
    let signals = match args.follow {
        true => Some(process::signalfd(&[libc::SIGINT, libc::SIGTERM]).map_err(|e| unwatched(&e))?),
        false => None,
    };
    let mut trail = match args.follow {
        // It may be made yet.
        true => open(host)?,
        false => super::reader_or_note(host)?.map(followed).transpose()?,
    };
    let mut last = None;
    if let Some(trail) = &trail {
        last = Some(print(globals, &trail.reader, None, args.lines)?);
    }
    let Some(signals) = signals else { return Ok(YES) };
    while !is_over(signals.as_fd())? {
        let is_gone = trail.as_ref().is_none_or(|t| t.reader.file_in_place() != t.file);
        if is_gone {
            // Not made yet, or another one was put in its place: that one from its beginning.
            last = last.filter(|_| trail.is_none());
            trail = open(host)?;
            if let Some(trail) = &trail {
                last = Some(print(globals, &trail.reader, last.or(Some(0)), 0)?);
            }
            continue;
        }
        if let Some(trail) = &mut trail {
            let version = trail.reader.data_version().map_err(|e| Failure::from(&e))?;
            if version != trail.version {
                trail.version = version;
                last = Some(print(globals, &trail.reader, last, 0)?);
            }
        }
    }
    Ok(YES)
}

fn open(host: &Host) -> Result<Option<Followed>, Failure> {
    super::reader(host)?.map(followed).transpose()
}

fn followed(reader: Reader) -> Result<Followed, Failure> {
    let file = reader.file_in_place();
    let version = reader.data_version().map_err(|e| Failure::from(&e))?;
    Ok(Followed { reader, file, version })
}

/// Prints what comes after event `last`, or the last `lines`. Returns the last event's number.
fn print(
    globals: &Globals,
    reader: &Reader,
    last: Option<u64>,
    lines: u64,
) -> Result<u64, Failure> {
    let mut output = Output::new(globals.json);
    let printed = reader
        .read(|view| {
            let mut last = match last {
                Some(last) => last,
                None => view.head()?.seq.saturating_sub(lines),
            };
            for event in view.events_since(last) {
                let event = event?;
                let told = match event.event() {
                    Ok(event) => tell(&mut output, &event),
                    Err(source) => {
                        let seq = event.seq;
                        Err(super::unreadable(&AuditError::<StoreError>::Unknown { seq, source }))
                    }
                };
                if let Err(failure) = told {
                    return Ok(Err(failure));
                }
                last = event.seq;
            }
            Ok(Ok(last))
        })
        .map_err(|e| Failure::from(&e))??;
    output.finish()?;
    Ok(printed)
}

/// Waits for the next look. Whether a signal came, or standard output has lost its reader.
fn is_over(signals: std::os::fd::BorrowedFd<'_>) -> Result<bool, Failure> {
    let stdout = std::io::stdout();
    // No events asked for: an error shows by itself. poll(2), POLLERR.
    let mut waited = [
        PollFd::from_borrowed_fd(signals, PollFlags::IN),
        PollFd::from_borrowed_fd(stdout.as_fd(), PollFlags::empty()),
    ];
    let pause = Timespec { tv_sec: 0, tv_nsec: PAUSE.subsec_nanos().into() };
    match poll(&mut waited, Some(&pause)) {
        Ok(_) => {}
        Err(rustix::io::Errno::INTR) => return Ok(false),
        Err(e) => return Err(unwatched(&e.into())),
    }
    if waited[1].revents().intersects(PollFlags::ERR | PollFlags::NVAL) {
        return Err(Failure::stdout(&std::io::ErrorKind::BrokenPipe.into()));
    }
    Ok(!waited[0].revents().is_empty())
}

fn unwatched(error: &std::io::Error) -> Failure {
    Failure::new("audit", "trail_unreadable", "the trail cannot be followed").because(error)
}
