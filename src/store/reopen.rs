//! How a store comes back after a failure: it is opened anew once its files are there and can be written,
//! and goes on only if they still hold what it has vouched for.
//!
//! A page that the kernel could not write is no longer marked as to be written, so that the next sync says
//! yes to it (fsync(2), "EIO"; lwn.net/Articles/752063). Reading it back proves nothing: it may come from the
//! same cache. Therefore the whole log is written once more, byte for byte, before anything is added to it.
#![forbid(unsafe_code)]

use std::fs::OpenOptions;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use rusqlite::{Connection, OptionalExtension, Transaction, TransactionBehavior};
use rustix::fs::Access;

use crate::model::event::EventHash;
use crate::store::connection::{attach, move_log, wait_a_little};
use crate::store::error::sorted;
use crate::store::place::{Place, unusable};
use crate::store::{Durability, Failure, Store, StoreError};

impl Store {
    pub(super) fn needs_reopening(&self) -> bool {
        self.failed.is_some() || self.stale
    }

    /// Takes note of what an error says of this connection.
    pub(super) fn note(&mut self, error: &StoreError) {
        self.stale |= error.is_of_the_connection();
    }

    /// Takes an error of another connection of ours as one of this.
    pub(super) fn distrust(&mut self, error: &StoreError) {
        if error.is_failed_io() {
            self.failed = Some(Failure::Sync);
        }
    }

    /// Whether there is something to open anew: the database and our claim at their paths, writable.
    pub(super) fn is_back(&self) -> Result<(), StoreError> {
        let lost = || StoreError::Lost { path: self.place.db.clone() };
        let place = Place::for_reading(root(&self.place)).map_err(|e| match e {
            StoreError::NotFound { .. } => lost(),
            other => other,
        })?;
        // In another file our claim says nothing, and what we hold would be taken for a dead process's.
        if !self.owner.is_at(&place) {
            return Err(lost());
        }
        for path in [&place.dir, &place.db, &place.wal] {
            match rustix::fs::access(path, Access::WRITE_OK) {
                Ok(()) => {}
                Err(rustix::io::Errno::NOENT) if *path == place.wal => {}
                Err(e) => return Err(unusable(path, "written", e.into())),
            }
        }
        place.check_index()
    }

    /// Closes the connection and opens a new one.
    ///
    /// # Errors
    /// Then nothing is open, and the next attempt may do better.
    pub(super) fn reopen(&mut self) -> Result<(), StoreError> {
        let path = self.place.db.clone();
        let none = Connection::open_in_memory().map_err(|e| sorted(&path, e))?;
        let cause = self.failed.get_or_insert(Failure::Closed);
        let rewrite = *cause == Failure::Sync || self.unsynced;
        self.unsynced = rewrite;
        *cause = Failure::Closed;
        drop(std::mem::replace(&mut self.conn, none));
        self.durability = Durability::Durable;

        let place = Place::for_reading(root(&self.place))?;
        let (conn, files) = attach(&place, &self.owner, place.identity())?;
        let sql = Transaction::new_unchecked(&conn, TransactionBehavior::Immediate)
            .map_err(|e| sorted(&path, e))?;
        self.refuse_another_past(&sql)?;
        if rewrite {
            write_again(&place)?;
        }
        sql.rollback().map_err(|e| sorted(&path, e))?;
        (self.conn, self.place, self.files) = (conn, place, files);
        (self.failed, self.stale, self.unsynced) = (None, false, false);
        Ok(())
    }

    /// Moves the log and lets the next write begin it anew, or returns false at once if someone reads.
    /// A log that is merely moved begins anew only if no one reads at the next write either; under load
    /// that may never be.
    pub(super) fn begin_log_anew_at_once(&mut self) -> Result<bool, StoreError> {
        self.refuse_after_failure()?;
        let failed = |e| sorted(&self.place.db, e);
        self.conn.busy_handler(None).map_err(failed)?;
        let moved = move_log(&self.conn, &self.place, "RESTART");
        self.conn.busy_handler(Some(wait_a_little)).map_err(failed)?;
        if let Err(e) = &moved {
            self.distrust(e);
        }
        match moved {
            // Another process writes, moves the log or reads an older state.
            Ok(false) | Err(StoreError::Busy { .. }) => Ok(false),
            Ok(true) => self.note_tidied().map(|()| true),
            Err(e) => Err(e),
        }
    }

    /// A database that lacks what was reported as recorded is not the one that was lost.
    fn refuse_another_past(&self, conn: &Connection) -> Result<(), StoreError> {
        let vouched = self.vouched;
        if vouched.seq == 0 {
            return Ok(());
        }
        let found: Option<String> = conn
            .query_row("SELECT hash FROM event WHERE seq = ?1", [vouched.seq], |row| row.get(0))
            .optional()
            .map_err(|e| sorted(&self.place.db, e))?;
        let holds = match found {
            Some(hash) => hash.parse::<EventHash>().ok() == Some(vouched.hash),
            // Another process may have moved old events out of the trail.
            None => conn
                .query_row("SELECT coalesce(max(seq), 0) > ?1 FROM event", [vouched.seq], |row| {
                    row.get(0)
                })
                .map_err(|e| sorted(&self.place.db, e))?,
        };
        if holds { Ok(()) } else { Err(StoreError::Lost { path: self.place.db.clone() }) }
    }
}

/// The state directory, as it was found first: links resolved.
pub(super) fn root(place: &Place) -> &Path {
    place.dir.parent().unwrap_or(&place.dir)
}

/// Writes the log's own bytes in its place once more, and waits for the disk. Under the right to write, so
/// that no one else changes them. SQLite keeps no lock on this file, which closing it here could drop.
fn write_again(place: &Place) -> Result<(), StoreError> {
    const PIECE: usize = 1 << 20;
    let again = || {
        let log = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC)
            .open(&place.wal)?;
        let mut piece = vec![0; PIECE];
        let length = log.metadata()?.size();
        let mut at = 0;
        while at < length {
            let size = PIECE.min(usize::try_from(length - at).unwrap_or(PIECE));
            log.read_exact_at(&mut piece[..size], at)?;
            log.write_all_at(&piece[..size], at)?;
            at += size as u64;
        }
        log.sync_all()
    };
    again().map_err(|e| unusable(&place.wal, "made durable", e))
}
