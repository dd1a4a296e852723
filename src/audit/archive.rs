//! Events outside of the store: one line each, as they are hashed, so that they can be verified alone.
//!
//! Receives lines or events; returns items for `verify`, or writes lines. Touches only the reader or writer
//! that it is given. Must never write an event that does not follow the one before it.
//!
//! A file is JSON lines. A line is an event as it is exported, or `{"checkpoint":NOTE}` after the event that
//! the note is about. An archive, made by a rotation, ends in the checkpoint that says which events it holds.
#![forbid(unsafe_code)]

use std::io::{self, BufRead, Read as _, Write};

use serde::{Deserialize, Serialize};

use crate::audit::finding::Finding;
use crate::audit::verify::Item;
use crate::envelope::{Checkpoint, SignedCheckpoint};
use crate::model::event::{Head, LinkFault, RecordedEvent};

/// The longest line that is read, in bytes. Events are some 30 KiB at most.
const MAX_LINE: u64 = 1 << 20;

/// What stands at the end of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// Whatever was exported.
    Any,
    /// The checkpoint of a rotation.
    Rotation,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct CheckpointLine {
    checkpoint: String,
}

/// Takes a file apart. What cannot be one is an [`Item::Fault`]; nothing comes after it.
pub fn read<'a>(
    file: impl BufRead + 'a,
    name: &'a str,
    ending: Ending,
) -> impl Iterator<Item = io::Result<Item>> + 'a {
    let mut lines =
        Lines { file, name, ending, line: 0, first: 0, last: 0, cut: None, over: false };
    std::iter::from_fn(move || {
        if lines.over {
            return None;
        }
        let item = lines.next().transpose();
        lines.over = !matches!(item, Some(Ok(Item::Event(_) | Item::Checkpoint(_))));
        item
    })
}

struct Lines<'a, R> {
    file: R,
    name: &'a str,
    ending: Ending,
    line: u64,
    /// The first and the last event; 0 before there is one.
    first: u64,
    last: u64,
    /// The checkpoint that the last line is.
    cut: Option<Checkpoint>,
    over: bool,
}

impl<R: BufRead> Lines<'_, R> {
    fn next(&mut self) -> io::Result<Option<Item>> {
        let mut line = Vec::new();
        (&mut self.file).take(MAX_LINE).read_until(b'\n', &mut line)?;
        if line.is_empty() {
            return Ok(self.end());
        }
        self.line += 1;
        let text = std::str::from_utf8(line.strip_suffix(b"\n").unwrap_or(&line)).ok();
        if let Some(note) = text.and_then(note_of) {
            self.cut = Checkpoint::unproven(&note);
            return Ok(Some(Item::Checkpoint(note)));
        }
        self.cut = None;
        let Some(mut event) = text.and_then(RecordedEvent::from_line) else {
            let (file, line) = (self.name.to_owned(), self.line);
            let seq = self.due();
            return Ok(Some(Item::Fault(Finding::NotAnEvent { seq, line, file })));
        };
        if self.first == 0 {
            self.first = event.seq;
        } else if !event.fits_its_hash() {
            // What it says of its number was changed with the rest, perhaps: its place is what is known.
            event.seq = self.due();
        }
        self.last = event.seq;
        Ok(Some(Item::Event(event)))
    }

    /// The number of the event that is to come. The last one's is whatever its line says.
    fn due(&self) -> u64 {
        self.last.saturating_add(1)
    }

    fn end(&self) -> Option<Item> {
        let is_whole = match self.ending {
            Ending::Any => true,
            Ending::Rotation => self.cut.as_ref().is_some_and(|checkpoint| {
                let first = checkpoint.cut.map(|cut| cut.first);
                checkpoint.head.seq == self.last && first == Some(self.first)
            }),
        };
        let (seq, file) = (self.last, self.name.to_owned());
        (!is_whole).then_some(Item::Fault(Finding::CutOff { seq, file }))
    }
}

fn note_of(line: &str) -> Option<String> {
    serde_json::from_str(line).ok().map(|CheckpointLine { checkpoint }| checkpoint)
}

/// Why events could not be written out; `E` is their keeper's own error.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError<E: std::error::Error + 'static> {
    #[error("cannot read the trail")]
    Read(#[source] E),
    #[error("cannot write the archive")]
    Write(#[from] io::Error),
    #[error("the trail is not whole")]
    Broken(#[from] LinkFault),
    #[error("event {last} is not in the trail")]
    Short { last: u64 },
}

/// Writes the events that follow `base` up to number `last`, with the `checkpoints` (number and note, in
/// order) among them. Returns the last one's head. The rotation's own checkpoint is still to be written:
/// [`seal`].
///
/// # Errors
/// [`ArchiveError`]. What was written then is no archive.
pub fn write<E: std::error::Error + 'static>(
    out: &mut impl Write,
    base: &Head,
    last: u64,
    events: impl IntoIterator<Item = Result<RecordedEvent, E>>,
    checkpoints: impl IntoIterator<Item = (u64, String)>,
) -> Result<Head, ArchiveError<E>> {
    let mut checkpoints =
        checkpoints.into_iter().skip_while(|(seq, _)| *seq <= base.seq).peekable();
    let mut head = *base;
    for event in events {
        if head.seq == last {
            break;
        }
        let event = event.map_err(ArchiveError::Read)?;
        head = event.verify_link(&head)?;
        writeln!(out, "{}", event.line())?;
        while let Some((_, note)) = checkpoints.next_if(|(seq, _)| *seq <= head.seq) {
            write_checkpoint(out, &note)?;
        }
    }
    if head.seq == last { Ok(head) } else { Err(ArchiveError::Short { last }) }
}

/// Ends an archive.
///
/// # Errors
/// Those of writing.
pub fn seal(out: &mut impl Write, cut: &SignedCheckpoint) -> io::Result<()> {
    write_checkpoint(out, cut.note())
}

fn write_checkpoint(out: &mut impl Write, note: &str) -> io::Result<()> {
    let line = CheckpointLine { checkpoint: note.to_owned() };
    let text = serde_json::to_string(&line)?;
    writeln!(out, "{text}")
}
