//! A checkpoint: the trail's head at one moment, signed, to be kept where no one who may write the trail can
//! reach it.
//!
//! The note's text has the form of c2sp.org/tlog-checkpoint, so that its tools read it:
//!
//! ```text
//! sublet/trail/KID                               origin, and the name of the key that signs
//! 1024                                           the last event's seq
//! CsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=   its hash, base64
//! time 2026-11-22T10:00:00.000Z
//! host build-7
//! rotated 513                                    only where a rotation cut: the first event it moved away
//! ```
//!
//! The hash is that of a chain and not of an RFC 6962 tree: a checkpoint proves the events up to it to
//! whoever has them all, and has no inclusion proofs.
#![forbid(unsafe_code)]

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use crate::envelope::key::SigningKey;
use crate::envelope::note::{self, NoteError, NoteKey};
use crate::envelope::text::to_the_millisecond;
use crate::model::event::{EventHash, Head};
use crate::model::moment::timestamp_text;

/// The trail up to `head`, as it was at `time`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoint {
    /// Never empty: `head.seq` is at least 1.
    pub head: Head,
    pub time: jiff::Timestamp,
    pub host: String,
    pub cut: Option<Cut>,
}

/// Says that the events from `first` to the checkpoint's own were moved to an archive, so that the trail may
/// begin after it. Without this no checkpoint is a beginning: else whoever removes the oldest events could
/// pass any checkpoint off as one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cut {
    pub first: u64,
}

/// A checkpoint and its note. Made by [`Checkpoint::sign`] or proven by [`Checkpoint::open`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SignedCheckpoint {
    checkpoint: Checkpoint,
    note: String,
}

impl SignedCheckpoint {
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// The whole text, signature included, ending with a line feed.
    pub fn note(&self) -> &str {
        &self.note
    }
}

/// Why a text is no checkpoint of this trail.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CheckpointError {
    #[error(transparent)]
    Note(#[from] NoteError),
    #[error("is signed, but is no checkpoint of a trail: {0}")]
    Malformed(&'static str),
}

impl Checkpoint {
    pub fn sign(mut self, key: &SigningKey) -> SignedCheckpoint {
        let name = key.public().trail_key();
        let hash = STANDARD.encode(self.head.hash.as_bytes());
        self.host = told(&self.host);
        self.time = to_the_millisecond(self.time);
        let host = &self.host;
        let mut text = format!("{}\n{}\n{hash}\n", name.name(), self.head.seq);
        text += &format!("time {}\nhost {host}\n", timestamp_text(self.time));
        if let Some(Cut { first }) = self.cut {
            text += &format!("rotated {first}\n");
        }
        let note = note::sign(&text, name, key);
        SignedCheckpoint { checkpoint: self, note }
    }

    /// What a note says, once one of `keys` vouches for it.
    ///
    /// # Errors
    /// [`CheckpointError`].
    pub fn open(note: &str, keys: &[NoteKey]) -> Result<SignedCheckpoint, CheckpointError> {
        let (text, key) = note::open(note, keys)?;
        let checkpoint = Self::read(text)?;
        // A key that signs for several logs signs each under its origin.
        if text.split('\n').next() != Some(key.name()) {
            return Err(CheckpointError::Malformed("its origin is not the name of its key"));
        }
        Ok(SignedCheckpoint { checkpoint, note: note.to_owned() })
    }

    /// What a note says, proven by nothing: for telling which event it is about.
    pub fn unproven(note: &str) -> Option<Self> {
        let end = note.rfind("\n\n")?;
        Self::read(&note[..=end]).ok()
    }

    fn read(text: &str) -> Result<Self, CheckpointError> {
        let malformed = CheckpointError::Malformed;
        let mut lines = text.strip_suffix('\n').unwrap_or(text).split('\n').skip(1);
        let seq = lines
            .next()
            .filter(|seq| !seq.starts_with('0') && seq.bytes().all(|b| b.is_ascii_digit()))
            .and_then(|seq| seq.parse().ok())
            .ok_or(malformed("its second line is no event's number"))?;
        let hash = lines
            .next()
            .and_then(|hash| STANDARD.decode(hash).ok()?.try_into().ok())
            .map(EventHash::from_bytes)
            .ok_or(malformed("its third line is no hash"))?;
        let time = lines
            .next()
            .and_then(|line| line.strip_prefix("time ")?.parse().ok())
            .ok_or(malformed("its fourth line is no time"))?;
        let host = lines
            .next()
            .and_then(|line| line.strip_prefix("host "))
            .ok_or(malformed("its fifth line names no host"))?
            .to_owned();
        let mut cut = None;
        // Lines of a later version add to what is said here and do not change it.
        for first in lines.filter_map(|line| line.strip_prefix("rotated ")) {
            let first = first.parse().ok().filter(|&first| first >= 1 && first <= seq);
            cut = Some(Cut { first: first.ok_or(malformed("it moved no events away"))? });
        }
        Ok(Self { head: Head { seq, hash }, time, host, cut })
    }
}

/// One line of a note, whatever the host is called.
fn told(host: &str) -> String {
    let host: String = host.chars().take(255).filter(|c| !c.is_control()).collect();
    if host.trim().is_empty() { "-".to_owned() } else { host }
}
