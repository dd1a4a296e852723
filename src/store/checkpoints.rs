//! Signed checkpoints of the trail, and its beginning after older events were moved to an archive.
//!
//! A row is a signed note and the number of the event that it is about. After a rotation the first row is
//! the one that says so: the first event that is kept must follow it. Nothing here is believed for lying in
//! a row; `audit::verify` proves each note.
#![forbid(unsafe_code)]

use rusqlite::OptionalExtension;

use crate::envelope::{Checkpoint, SignedCheckpoint, SigningKey};
use crate::model::event::Head;
use crate::store::error::StoreError;
use crate::store::trail::as_it_lies;
use crate::store::{Durability, Store, Tx, View};

/// How many events go between two checkpoints, if nothing else asks for one.
pub const EVENTS_BETWEEN_CHECKPOINTS: u64 = 1024;

/// A checkpoint as it lies there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckpointRow {
    /// The row's own number.
    pub seq: u64,
    pub note: String,
}

impl View<'_> {
    /// All that are kept, oldest first.
    pub fn checkpoints(&self) -> Result<Vec<CheckpointRow>, StoreError> {
        if !self.has_step(2)? {
            return Ok(Vec::new());
        }
        self.prepare("SELECT seq, note FROM checkpoint ORDER BY seq")?
            .query_map([], read_row)
            .and_then(Iterator::collect)
            .map_err(self.error())
    }

    pub fn latest_checkpoint(&self) -> Result<Option<CheckpointRow>, StoreError> {
        self.one_checkpoint("SELECT seq, note FROM checkpoint ORDER BY seq DESC LIMIT 1")
    }

    /// The checkpoint after which the trail begins, if a rotation has moved its older events away.
    pub fn base(&self) -> Result<Option<CheckpointRow>, StoreError> {
        let first = self.one_checkpoint("SELECT seq, note FROM checkpoint ORDER BY seq LIMIT 1")?;
        Ok(first.filter(|row| Checkpoint::unproven(&row.note).is_some_and(|c| c.cut.is_some())))
    }

    fn one_checkpoint(&self, sql: &str) -> Result<Option<CheckpointRow>, StoreError> {
        if !self.has_step(2)? {
            return Ok(None);
        }
        self.prepare(sql)?.query_row([], read_row).optional().map_err(self.error())
    }

    /// Signs the head, if at least `every` events have come since the last checkpoint (1: if any has). The
    /// events since then are followed first, so that nothing is vouched for that was changed behind our
    /// back: to be done in a reader, off the writer's way.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] if the events do not follow the last checkpoint.
    pub fn due_checkpoint(
        &self,
        every: u64,
        key: &SigningKey,
        host: &str,
        now: jiff::Timestamp,
    ) -> Result<Option<SignedCheckpoint>, StoreError> {
        let head = self.head()?;
        let latest = self.latest_checkpoint()?;
        let last = latest.as_ref().map_or(0, |row| row.seq);
        if head.seq == 0 || (head.seq >= last && head.seq - last < every.max(1)) {
            return Ok(None);
        }
        let corrupt =
            |found| StoreError::Corrupt { path: self.place.db.clone(), found, source: None };
        let ours = [key.public().trail_key()];
        let proven = latest.and_then(|row| Checkpoint::open(&row.note, &ours).ok());
        let mut followed = match (proven, self.base()?) {
            (Some(proven), _) => proven.checkpoint().head,
            // Under a new key the old one's notes prove nothing: all of the trail is followed.
            (None, Some(base)) => Checkpoint::unproven(&base.note).map_or(Head::EMPTY, |c| c.head),
            (None, None) => Head::EMPTY,
        };
        for event in self.events_since(followed.seq) {
            followed = event?.verify_link(&followed).map_err(|e| corrupt(e.to_string()))?;
        }
        if followed != head {
            let found = format!("events after {} were removed at the end of the trail", head.seq);
            return Err(corrupt(found));
        }
        let checkpoint = Checkpoint { head, time: now, host: host.to_owned(), cut: None };
        Ok(Some(checkpoint.sign(key)))
    }
}

impl Tx<'_> {
    /// Keeps a checkpoint, unless there is one for this event.
    ///
    /// # Errors
    /// [`StoreError::Missing`] if its event is not here, or not the one that it is about.
    pub fn put_checkpoint(&mut self, signed: &SignedCheckpoint) -> Result<(), StoreError> {
        let Head { seq, .. } = signed.checkpoint().head;
        self.must_hold(&signed.checkpoint().head)?;
        self.prepare("INSERT OR IGNORE INTO checkpoint (seq, note) VALUES (?1, ?2)")?
            .execute((seq, signed.note()))
            .map(drop)
            .map_err(self.error())
    }

    /// Removes the events that `archived` says were moved away, and lets the trail begin after them.
    /// Returns how many there were. To be called durably, when the archive is on disk.
    ///
    /// # Errors
    /// [`StoreError::Missing`] if it is no rotation's checkpoint, or the events are not those that are here.
    pub fn cut(&mut self, archived: &SignedCheckpoint) -> Result<u64, StoreError> {
        let checkpoint = archived.checkpoint();
        let Head { seq, .. } = checkpoint.head;
        let Some(cut) = checkpoint.cut else {
            return Err(StoreError::Missing { what: format!("a rotation up to event {seq}") });
        };
        let first: Option<u64> = self
            .prepare("SELECT min(seq) FROM event")?
            .query_row([], |row| row.get(0))
            .map_err(self.error())?;
        if first != Some(cut.first) {
            let what = format!("event {} as the first of the trail", cut.first);
            return Err(StoreError::Missing { what });
        }
        self.must_hold(&checkpoint.head)?;
        self.large = true;
        let removed = self
            .prepare("DELETE FROM event WHERE seq <= ?1")?
            .execute([seq])
            .map_err(self.error())?;
        self.prepare("DELETE FROM checkpoint WHERE seq <= ?1")?
            .execute([seq])
            .map_err(self.error())?;
        self.prepare("INSERT INTO checkpoint (seq, note) VALUES (?1, ?2)")?
            .execute((seq, archived.note()))
            .map_err(self.error())?;
        Ok(removed as u64)
    }

    fn must_hold(&self, head: &Head) -> Result<(), StoreError> {
        let found: Option<String> = self
            .prepare("SELECT hash FROM event WHERE seq = ?1")?
            .query_row([head.seq], |row| row.get(0))
            .optional()
            .map_err(self.error())?;
        if found.as_deref() == Some(head.hash.to_string().as_str()) {
            return Ok(());
        }
        Err(StoreError::Missing { what: format!("event {head}") })
    }
}

impl Store {
    /// Writes a checkpoint if one is due: [`View::due_checkpoint`], then [`Tx::put_checkpoint`]. With
    /// [`Durability::Durable`] it and all events before are on disk when it returns, so that it may be kept
    /// elsewhere.
    ///
    /// # Errors
    /// As those two.
    pub fn checkpoint(
        &mut self,
        every: u64,
        durability: Durability,
        key: &SigningKey,
        host: &str,
        now: jiff::Timestamp,
    ) -> Result<Option<SignedCheckpoint>, StoreError> {
        let due = self.read(|view| view.due_checkpoint(every, key, host, now))?;
        if let Some(signed) = &due {
            self.transaction(durability, |tx| tx.put_checkpoint(signed))?;
        }
        Ok(due)
    }
}

fn read_row(row: &rusqlite::Row<'_>) -> rusqlite::Result<CheckpointRow> {
    let seq: i64 = row.get(0)?;
    Ok(CheckpointRow { seq: u64::try_from(seq).unwrap_or(0), note: as_it_lies(row.get_ref(1)?) })
}
