//! `sublet audit rotate`: older events go to a signed archive, and only then out of the store.
//!
//! In this order, so that a crash at any point loses nothing: verify the trail; write the archive, sync it,
//! name it; read it back and verify it as a stranger would; then, in one durable transaction, remove what it
//! holds, keep its checkpoint as the trail's beginning, and record that this was done. The same command
//! again, after a crash before the last step, takes the archive that is there and does that step.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};

use serde_json::json;

use super::fresh::{self, Fresh, Place};
use super::{Since, since};
use crate::audit::archive::{self, ArchiveError, Ending};
use crate::audit::{self, Item, Known};
use crate::cli::fail::{Answer, Failure, NO, YES};
use crate::cli::output::Output;
use crate::cli::{Globals, load, principal};
use crate::envelope::{Checkpoint, Cut, NoteKey, SignedCheckpoint, SigningKey};
use crate::model::event::{Draft, EventType, Head};
use crate::store::{Durability, Store, StoreError, View};

#[derive(Debug, clap::Args)]
#[command(after_long_help = ROTATE_HELP)]
pub struct RotateArgs {
    /// Where to write the archive: a new file, made with mode 0600
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// Keep the last N events here [default: 0]
    #[arg(long, value_name = "N", conflicts_with = "before")]
    pub keep: Option<u64>,
    /// Move away what is older than this time (2026-11-22T10:00:00Z), or than so long ago (30d)
    #[arg(long, value_name = "TIME", value_parser = since)]
    pub before: Option<Since>,
    /// A verifier key that signed earlier checkpoints, beside this host's own; may be repeated
    #[arg(long = "key", value_name = "KEY")]
    pub keys: Vec<NoteKey>,
}

const ROTATE_HELP: &str = "\
Examples:
  sublet audit rotate --out /var/backups/trail-1.jsonl
  sublet audit rotate --before 30d --out /var/backups/trail-2.jsonl
  sublet audit verify --archive /var/backups/trail-1.jsonl /var/backups/trail-2.jsonl

Exit status:
  0    what is older is in the file, on disk and signed, and no longer here; or nothing is older
  1    the trail is not whole: nothing was moved
  2    sublet could not do it: no event was removed that is not in the file

After a crash:
  Give the same command again. A whole archive that is there already is taken as it is.";

pub(super) fn execute(globals: &Globals, args: &RotateArgs) -> Answer {
    let place = Place::take(&args.out)?;
    let host = load::host_of_state(globals)?;
    let Some(reader) = super::reader(&host)? else {
        return nothing(globals);
    };
    let own = super::signing_key(&host)?.map(|key| key.public().trail_key());
    let keys: Vec<NoteKey> = args.keys.iter().cloned().chain(own).collect();
    let report = super::verify::trail(&host, Some(&reader), Known::trail(&keys), &[])?;
    if let Some(finding) = &report.finding {
        return Err(Failure::new("audit", "trail_not_whole", "the trail is not whole")
            .why(finding.to_string())
            .hint("nothing was moved; an archive would hide what was done to it")
            .exit(NO));
    }
    drop(reader);
    let mut store = Store::open(&host.state_dir).map_err(|e| Failure::from(&e))?;
    let key = super::signing_key_or_new(&host)?;
    let archived = match place {
        Place::Free(fresh) => match write(&store, &key, args, fresh)? {
            Some(file) => read_back(&store, &key, args, file)?,
            None => return nothing(globals),
        },
        // Someone's own file, most likely.
        Place::Taken(file) => read_back(&store, &key, args, file).map_err(|failure| {
            fresh::exists(&args.out).why(failure.message).why(failure.causes.join(": "))
        })?,
    };
    let head = remove(&mut store, &archived, &args.out)?;
    // What was removed still lies in the log; that it stays longer there hurts no one.
    if let Err(e) = store.tidy() {
        Failure::new("state", "not_tidied", "the store's log could not be begun anew")
            .because(&e)
            .note();
    }
    let Checkpoint { head: last, cut, .. } = archived.checkpoint();
    let first = cut.map_or(1, |cut| cut.first);
    let mut output = Output::new(globals.json);
    if globals.json {
        output.object(&json!({
            "file": args.out, "first": first, "last": last.seq, "events": last.seq + 1 - first,
            "head": head.to_string(),
        }))?;
    } else {
        output.line(format_args!(
            "events {first} to {} are now in {}",
            last.seq,
            args.out.display()
        ))?;
        output.line(format_args!("the trail goes on from event {}; head: {head}", last.seq + 1))?;
    }
    output.finish()?;
    Ok(YES)
}

fn nothing(globals: &Globals) -> Answer {
    let mut output = Output::new(globals.json);
    if globals.json {
        output.object(&json!({
            "file": null, "first": null, "last": null, "events": 0, "head": null,
        }))?;
    } else {
        output.line("nothing is older: no event was moved, and no file made")?;
    }
    output.finish()?;
    Ok(YES)
}

/// Writes the archive, if there is anything for it.
fn write(
    store: &Store,
    key: &SigningKey,
    args: &RotateArgs,
    fresh: Fresh,
) -> Result<Option<File>, Failure> {
    let now = load::now()?;
    store
        .read(|view| {
            let base = base_of(view)?;
            let last = match last_to_move(view, args, &base)? {
                Ok(last) if last > base.seq => last,
                Ok(_) => return Ok(Ok(None)),
                Err(failure) => return Ok(Err(failure)),
            };
            let checkpoints = view.checkpoints()?.into_iter().map(|row| (row.seq, row.note));
            let written = fresh.fill(|out| {
                let head = archive::write(out, &base, last, view.events(), checkpoints)
                    .map_err(|e| unwritten(&args.out, &e))?;
                let cut = Some(Cut { first: base.seq + 1 });
                let checkpoint =
                    Checkpoint { head, time: now.wall, host: super::hostname(), cut }.sign(key);
                archive::seal(out, &checkpoint)
                    .map_err(|e| fresh::not_written(&args.out).because(&e))
            });
            Ok(written.map(|((), file)| Some(file)))
        })
        .map_err(|e| Failure::from(&e))?
}

fn base_of(view: &View<'_>) -> Result<Head, StoreError> {
    let note = view.base()?.map(|row| row.note);
    Ok(note.and_then(|note| Checkpoint::unproven(&note)).map_or(Head::EMPTY, |c| c.head))
}

fn last_to_move(
    view: &View<'_>,
    args: &RotateArgs,
    base: &Head,
) -> Result<Result<u64, Failure>, StoreError> {
    let Some(before) = args.before.map(Since::time) else {
        let head = view.head()?;
        return Ok(Ok(head.seq.saturating_sub(args.keep.unwrap_or(0))));
    };
    // The wall clock may have been set back in between: what was recorded after a kept event is kept.
    let mut last = base.seq;
    for event in view.events() {
        let event = event?;
        match event.event() {
            Ok(event) if event.time < before => last = event.seq,
            Ok(_) => break,
            Err(source) => {
                let seq = event.seq;
                let unknown = audit::AuditError::<StoreError>::Unknown { seq, source };
                return Ok(Err(super::unreadable(&unknown)));
            }
        }
    }
    Ok(Ok(last))
}

/// The archive as it lies on disk, proven: whole, signed by this host, and begun where the trail begins.
fn read_back(
    store: &Store,
    key: &SigningKey,
    args: &RotateArgs,
    file: File,
) -> Result<SignedCheckpoint, Failure> {
    let path = &args.out;
    let unfit = || {
        let message = format!("{} is no archive of this trail's oldest events", path.display());
        Failure::new("audit", "archive_unfit", message).hint("no event was removed")
    };
    let base = store.read(base_of).map_err(|e| Failure::from(&e))?;
    let own = key.public().trail_key();
    let keys: Vec<NoteKey> = args.keys.iter().cloned().chain([own.clone()]).collect();
    let name = path.display().to_string();
    let mut last = None;
    let items = archive::read(BufReader::new(file), &name, Ending::Rotation).inspect(|item| {
        if let Ok(Item::Checkpoint(note)) = item {
            last = Some(note.clone());
        }
    });
    let report =
        audit::verify(items, Known::part(&keys).head(&base)).map_err(|e| unfit().because(&e))?;
    if let Some(finding) = report.finding {
        return Err(unfit().why(finding.to_string()));
    }
    if report.from != base.seq + 1 {
        let (found, begins) = (report.from, base.seq + 1);
        return Err(
            unfit().why(format!("it begins with event {found} and the trail with {begins}"))
        );
    }
    let note = last.ok_or_else(unfit)?;
    // The cut itself must be ours.
    Checkpoint::open(&note, &[own]).map_err(|e| unfit().because(&e))
}

/// The one step that removes: whole and durable, or not at all.
fn remove(store: &mut Store, archived: &SignedCheckpoint, path: &Path) -> Result<Head, Failure> {
    let now = load::now()?;
    let Checkpoint { head: last, cut, .. } = archived.checkpoint();
    let first = cut.map_or(1, |cut| cut.first);
    let file = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let mut draft = Draft::new(EventType::TrailRotated, now.wall, &super::hostname())
        .with("first", first)
        .with("last", last.seq)
        .with("archive", file.display().to_string());
    draft.principal = Some(principal::invoking_user());
    store
        .transaction(Durability::Durable, |tx| {
            tx.cut(archived)?;
            tx.append(draft)
        })
        .map(|(_, head)| head)
        .map_err(|e| Failure::from(&e))
}

fn unwritten(path: &Path, error: &ArchiveError<StoreError>) -> Failure {
    match error {
        ArchiveError::Read(e) => Failure::from(e),
        ArchiveError::Write(_) => fresh::not_written(path).because_of_source(error),
        ArchiveError::Broken(_) | ArchiveError::Short { .. } => {
            Failure::new("audit", "trail_not_whole", "the trail is not whole")
                .because(error)
                .hint("nothing was moved; sublet audit verify tells more")
                .exit(NO)
        }
    }
}
