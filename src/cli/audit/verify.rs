//! `sublet audit verify`: the trail of this host, archives of it, or exported lines alone.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{self, BufReader, Read as _};
use std::path::{Path, PathBuf};

use serde_json::json;

use crate::audit::archive::{self, Ending};
use crate::audit::{self, Item, Known, Report};
use crate::cli::fail::{Answer, Failure, NO, YES};
use crate::cli::output::Output;
use crate::cli::{Globals, load};
use crate::envelope::note::MAX_NOTE;
use crate::envelope::{Checkpoint, CheckpointError, NoteError, NoteKey};
use crate::host::Host;
use crate::launcher::serve::HEAD_FILE;
use crate::model::event::{Head, KeptHead};
use crate::store::{Reader, StoreError, View};

#[derive(Debug, clap::Args)]
#[command(after_long_help = VERIFY_HELP)]
pub struct VerifyArgs {
    /// A head that was kept elsewhere: what an earlier `verify` printed
    #[arg(long, value_name = "SEQ:HASH")]
    pub head: Option<Head>,
    /// A checkpoint that was kept elsewhere: what `checkpoint` printed. It shows even that the whole state was
    /// set back
    #[arg(long, value_name = "FILE")]
    pub checkpoint: Option<PathBuf>,
    /// A verifier key that was kept elsewhere, in the place of this host's own; may be repeated
    #[arg(long = "key", value_name = "KEY")]
    pub keys: Vec<NoteKey>,
    /// Archives, oldest first: that each is whole, that they join, and that the trail goes on from the last
    #[arg(long = "archive", value_name = "FILE", num_args = 1..)]
    pub archives: Vec<PathBuf>,
    /// Exported lines, or one archive, alone: nothing else of this host is read
    #[arg(long, value_name = "FILE", conflicts_with = "archives")]
    pub file: Option<PathBuf>,
}

const VERIFY_HELP: &str = "\
Examples:
  sublet audit verify
  sublet audit verify --head 120:4f1d…
  sublet audit verify --checkpoint /mnt/elsewhere/checkpoint
  sublet audit verify --archive trail-1.jsonl trail-2.jsonl
  sublet audit verify --file exported.jsonl

Exit status:
  0    every event is unchanged and in its place, up to every head and checkpoint that is known
  1    an event was changed, removed or reordered, or a checkpoint contradicts: the first is named
  2    the trail, a file or the key could not be read";

/// What could not be read.
#[derive(Debug, thiserror::Error)]
enum Unreadable {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("cannot read {path}")]
    File { path: PathBuf, source: io::Error },
}

impl From<Unreadable> for Failure {
    fn from(unreadable: Unreadable) -> Self {
        match unreadable {
            Unreadable::Store(e) => Failure::from(&e),
            Unreadable::File { ref path, ref source } => {
                let message = format!("cannot read {}", path.display());
                Failure::new("audit", "file_unreadable", message).because(source)
            }
        }
    }
}

/// A file, its name, and what is in it.
pub(super) struct Named {
    path: PathBuf,
    name: String,
    file: File,
}

pub(super) fn execute(globals: &Globals, args: &VerifyArgs) -> Answer {
    // Whoever asks may read what root becomes may not: files first, then the state.
    let note = args.checkpoint.as_deref().map(note_of).transpose()?;
    let archives = args.archives.iter().map(|path| open(path)).collect::<Result<Vec<_>, _>>()?;
    let file = args.file.as_deref().map(open).transpose()?;
    let report = match &file {
        Some(file) => {
            // Lines alone can be checked where there is no configuration and no state.
            let host = load::host_of_state(globals).ok();
            let keys = keys(host.as_ref(), args)?;
            lines(file, given(Known::part(&keys), &keys, args, note.as_ref())?)?
        }
        None => {
            let host = load::host_of_state(globals)?;
            let reader = super::reader(&host)?;
            let is_known = args.head.is_some() || note.is_some() || !archives.is_empty();
            if reader.is_none() && !is_known && kept_head(&host)?.is_none() {
                // Nothing tells that there ever was one.
                return super::recorded(&host).map(|_| NO);
            }
            let keys = keys(Some(&host), args)?;
            let known = match archives.is_empty() {
                true => Known::trail(&keys),
                false => Known::part(&keys),
            };
            let known = given(known, &keys, args, note.as_ref())?;
            trail(&host, reader.as_ref(), known, &archives)?
        }
    };
    tell(globals, &report)
}

/// What this host has, after what was archived of it.
pub(super) fn trail(
    host: &Host,
    reader: Option<&Reader>,
    known: Known<'_>,
    archives: &[Named],
) -> Result<Report, Failure> {
    let boot_id = load::now()?.boot_id;
    let known = match kept_head(host)? {
        Some(kept) => known.kept(&kept, &boot_id),
        None => known,
    };
    let archived = archives.iter().flat_map(|archive| items(archive, Ending::Rotation));
    let whole = |view: Option<&View<'_>>| -> Result<Report, Unreadable> {
        let Some(view) = view else { return audit::verify(archived, known) };
        let rows = view.checkpoints()?.into_iter().map(|row| (row.seq, row.note));
        let events = view.events().map(|event| Ok(event.map(Item::Event)?));
        audit::verify(archived.chain(events), known.rows(rows))
    };
    match reader {
        Some(reader) => reader.read(|view| Ok(whole(Some(view)))).map_err(|e| Failure::from(&e))?,
        // What is known of a trail that is gone shows its removal.
        None => whole(None),
    }
    .map_err(Failure::from)
}

fn lines(file: &Named, known: Known<'_>) -> Result<Report, Failure> {
    audit::verify(items(file, Ending::Any), known).map_err(Failure::from)
}

fn items(named: &Named, ending: Ending) -> impl Iterator<Item = Result<Item, Unreadable>> {
    archive::read(BufReader::new(&named.file), &named.name, ending)
        .map(|item| item.map_err(|source| Unreadable::File { path: named.path.clone(), source }))
}

fn given<'k>(
    mut known: Known<'k>,
    keys: &[NoteKey],
    args: &VerifyArgs,
    note: Option<&(PathBuf, String)>,
) -> Result<Known<'k>, Failure> {
    if let Some(head) = &args.head {
        known = known.head(head);
    }
    let Some((path, note)) = note else { return Ok(known) };
    match Checkpoint::open(note, keys) {
        Ok(signed) => Ok(known.checkpoint(&signed)),
        // One that is signed, and not by who should: perhaps it is the key that was put in place of ours.
        Err(CheckpointError::Note(e @ (NoteError::UnknownKey(_) | NoteError::BadSignature(_)))) => {
            let seq = Checkpoint::unproven(note).map_or(0, |c| c.head.seq);
            Ok(known.forged(seq, format!("that was given {e}")))
        }
        Err(e) => {
            let message = format!("{} {e}", path.display());
            Err(Failure::new("audit", "checkpoint_unusable", message)
                .hint("give a file as `sublet audit checkpoint` printed it"))
        }
    }
}

fn note_of(path: &Path) -> Result<(PathBuf, String), Failure> {
    let mut note = String::new();
    // One byte more than a note can have is enough to refuse it.
    open(path)?
        .file
        .take(MAX_NOTE as u64 + 1)
        .read_to_string(&mut note)
        .map_err(|source| Failure::from(Unreadable::File { path: path.to_owned(), source }))?;
    Ok((path.to_owned(), note))
}

fn open(path: &Path) -> Result<Named, Failure> {
    match File::open(path) {
        Ok(file) => Ok(Named { path: path.to_owned(), name: path.display().to_string(), file }),
        Err(source) => Err(Failure::from(Unreadable::File { path: path.to_owned(), source })),
    }
}

fn keys(host: Option<&Host>, args: &VerifyArgs) -> Result<Vec<NoteKey>, Failure> {
    let (true, Some(host)) = (args.keys.is_empty(), host) else {
        return Ok(args.keys.clone());
    };
    let own = super::signing_key(host)?;
    Ok(own.iter().map(|key| key.public().trail_key()).collect())
}

fn tell(globals: &Globals, report: &Report) -> Answer {
    let Report { events, from, head, checkpoints, finding, lost_with_power } = report;
    let mut output = Output::new(globals.json);
    if globals.json {
        output.object(&json!({
            "whole": finding.is_none(),
            "from": from,
            "events": events,
            "head": head.to_string(),
            "checkpoints": checkpoints,
            "finding": finding.as_ref().map(|finding| json!({
                "name": finding.name(), "seq": finding.seq(), "message": finding.to_string(),
            })),
            "lost_with_power": lost_with_power,
        }))?;
    } else {
        match finding {
            None => output.line(format_args!("the trail is whole: {events} events"))?,
            Some(what) => {
                output.line(format_args!("the trail is not whole: {what}"))?;
                output.line(format_args!("events before that are proven: {events}"))?;
            }
        }
        if *from > 1 {
            output.line(format_args!("from event {from} on; those before are in archives"))?;
        }
        if *checkpoints > 0 {
            output.line(format_args!("signed checkpoints that agree: {checkpoints}"))?;
        }
        if *lost_with_power > 0 {
            let lost = lost_with_power;
            output.line(format_args!("lost in a power cut before they were on disk: {lost}"))?;
        }
        output.line(format_args!("head: {head}"))?;
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
