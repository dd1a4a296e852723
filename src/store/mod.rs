//! The store: runs, leases, execs, sealed secrets and the audit trail, in one embedded SQLite database.
//!
//! Receives the state directory and typed records; returns typed records. Touches `STATE/db/` and
//! nothing else. Must never see a plain value, and never report a grant as recorded before it is.
//!
//! - [`Store`]: open for writing, one transaction a step; [`Reader`]: open for looking
//! - [`SharedStore`]: the store of many threads, whose transactions share a sync of the disk; `reopen`: how it
//!   comes back after a failure
//! - [`View`]: what can be read; [`Tx`]: a view that can also write, until its end
//! - `trail`, `runs`, `leases`, `execs`, `secrets`: reading and writing of each
//! - `checkpoints`: what vouches for the trail, and where it begins; `follow`: noticing that others wrote
//! - `connection`: one connection; `place`: whose files these are; `owner`: who is alive; `schema`: the tables
//!
//! # Durability
//! The database is in WAL mode. A [`Durability::Durable`] transaction is on disk when it returns: one
//! sync of the log. A [`Durability::Relaxed`] one survives the death of the process, but perhaps not a
//! power cut; the next durable transaction makes it durable too. Nothing is checkpointed on close: that
//! is left to [`Store::tidy`], off the hot path.
#![forbid(unsafe_code)]

mod checkpoints;
mod connection;
mod error;
mod execs;
mod follow;
mod leases;
mod mints;
mod owner;
mod place;
mod reopen;
mod runs;
mod schema;
mod secrets;
mod shared;
mod trail;

use std::ops::Deref;
use std::path::Path;

use rusqlite::{Connection, ErrorCode, OpenFlags};

use crate::model::event::Head;
use crate::store::connection::{attach, connect, move_log};
use crate::store::error::sorted;
use crate::store::owner::Owner;
use crate::store::place::{Identity, Place};

pub use checkpoints::{CheckpointRow, EVENTS_BETWEEN_CHECKPOINTS};
pub use error::{Cause, StoreError};
pub use execs::ExecFilter;
pub use follow::DatabaseFile;
pub use leases::{LeaseFilter, Orphans, RenewRefused, Revoke, UseRefused};
pub use mints::MintRecord;
pub use owner::OwnerId;
pub use runs::{Counts, RunFilter};
pub use secrets::{SealedSecret, SecretEntry};
pub use shared::{Heads, SharedStore};
pub use trail::{Events, Held};

/// Whether a transaction waits for the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// On disk before it returns: `PRAGMA synchronous = FULL`. For all that permits something.
    Durable,
    /// In the kernel's hands when it returns: `PRAGMA synchronous = NORMAL`. For what says afterwards
    /// what has been done.
    Relaxed,
}

/// How many events go between two checkpoints. The first process to open the database reads the whole
/// log, at some 4 µs a page, so that it has to stay short.
const EVENTS_PER_CHECKPOINT: u64 = 32;

/// Why nothing more may be written through a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Failure {
    /// The kernel forgets pages that it could not write, so that a later sync would say yes to lost
    /// data. fsync(2), "EIO".
    Sync,
    Lost,
    /// It was closed to be opened anew, which has not succeeded yet.
    Closed,
}

/// The database, open for reading and writing by this process, which owns what it grants.
///
/// Open it after the last fork: SQLite's locks and the claim belong to one process.
pub struct Store {
    conn: Connection,
    place: Place,
    owner: Owner,
    files: Identity,
    durability: Durability,
    /// The trail's length after the last transaction, and whether more than the trail has grown.
    seq: u64,
    large: bool,
    /// The last head that was reported as recorded.
    vouched: Head,
    failed: Option<Failure>,
    /// What the log holds may not be on disk, whatever a sync says.
    unsynced: bool,
    /// A write was refused in a way that this connection may not get over: a file that was opened while
    /// the file system was read-only stays so.
    stale: bool,
}

impl Store {
    /// Opens the database under `state_dir`, and makes both if they are not there.
    ///
    /// # Errors
    /// [`StoreError::Unsafe`] if others could change it, [`StoreError::Unwritable`] if it cannot be
    /// written, [`StoreError::Corrupt`], [`StoreError::Newer`].
    pub fn open(state_dir: &Path) -> Result<Self, StoreError> {
        let place = Place::for_writing(state_dir)?;
        let owner = Owner::claim(&place)?;
        let mut before = place.identity();
        if !place.has_database(&before)? {
            schema::create(&place, &owner)?;
            before = place.identity();
        }
        let (conn, files) = attach(&place, &owner, before)?;
        Ok(Self {
            conn,
            place,
            owner,
            files,
            durability: Durability::Durable,
            seq: 0,
            large: false,
            vouched: Head::EMPTY,
            failed: None,
            unsynced: false,
            stale: false,
        })
    }

    /// Runs `step` with the only right to write, and commits it whole or not at all. Returns what it
    /// returns, and the trail's head after it.
    ///
    /// # Errors
    /// Those of `step`, which are rolled back; [`StoreError::Unwritable`] or [`StoreError::Lost`] mean
    /// that nothing which depends on the step may happen.
    pub fn transaction<T>(
        &mut self,
        durability: Durability,
        step: impl FnOnce(&mut Tx<'_>) -> Result<T, StoreError>,
    ) -> Result<(T, Head), StoreError> {
        let head = self.begin(durability)?;
        let unfinished = Unfinished { conn: &self.conn };
        let mut tx = self.tx(head);
        let value = step(&mut tx)?;
        let (head, large) = (tx.head, tx.large);
        std::mem::forget(unfinished);
        self.commit(head, large)?;
        Ok((value, head))
    }

    /// Takes the only right to write. Returns the trail's head.
    fn begin(&mut self, durability: Durability) -> Result<Head, StoreError> {
        self.refuse_after_failure()?;
        let begun = self
            .place
            .check_index()
            .and_then(|()| self.wait_for_disk(durability))
            .and_then(|()| self.act("BEGIN IMMEDIATE").map_err(|e| sorted(&self.place.db, e)));
        begun.inspect_err(|e| self.note(e))?;
        let head = View { conn: &self.conn, place: &self.place }.head();
        if head.is_err() {
            self.roll_back();
        }
        head
    }

    fn tx(&self, head: Head) -> Tx<'_> {
        let view = View { conn: &self.conn, place: &self.place };
        Tx { view, owner: &self.owner, head, large: false }
    }

    /// Commits what was begun, with the trail's head as it is then, or rolls it back.
    fn commit(&mut self, head: Head, large: bool) -> Result<(), StoreError> {
        // What is refused must not stand in a file that somebody puts back.
        if let Err(lost) = self.see_files() {
            self.roll_back();
            return Err(lost);
        }
        if let Err(e) = self.act("COMMIT") {
            if e.sqlite_error_code() == Some(ErrorCode::SystemIoFailure) {
                self.failed = Some(Failure::Sync);
            }
            self.roll_back();
            let e = sorted(&self.place.db, e);
            self.note(&e);
            return Err(e);
        }
        // After the commit, so that it vouches for the commit: what was written lies at the path.
        self.see_files()?;
        self.seq = head.seq;
        self.vouched = head;
        self.large |= large;
        Ok(())
    }

    /// Whether the files that are open are those at the path.
    fn see_files(&mut self) -> Result<(), StoreError> {
        if self.place.identity() != self.files {
            self.failed = Some(Failure::Lost);
        }
        match self.failed {
            Some(Failure::Lost) => self.refuse_after_failure(),
            _ => Ok(()),
        }
    }

    fn roll_back(&mut self) {
        if !self.conn.is_autocommit() && self.act("ROLLBACK").is_err() {
            // Then only closing the connection ends the transaction.
            self.stale = true;
        }
    }

    fn act(&self, sql: &'static str) -> rusqlite::Result<()> {
        self.conn.prepare_cached(sql)?.execute([]).map(drop)
    }

    /// Reads at one point in time.
    pub fn read<T>(
        &self,
        look: impl FnOnce(&View<'_>) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        if self.failed == Some(Failure::Closed) {
            self.refuse_after_failure()?;
        }
        self.place.check_index()?;
        snapshot(&self.conn, &self.place, look)
    }

    /// What names this process in the rows that it opens.
    pub fn owner(&self) -> OwnerId {
        self.owner.id()
    }

    /// Moves the log into the database if it is time to, without waiting for anyone: to be called while
    /// the command runs, or after it. Returns whether the log starts anew. Costs two or three syncs about
    /// every fourth exec, and else nothing.
    ///
    /// # Errors
    /// As any write. Nothing is lost by one.
    pub fn tidy(&mut self) -> Result<bool, StoreError> {
        self.refuse_after_failure()?;
        self.place.check_index()?;
        let path = &self.place.db;
        let tidied: u64 = self
            .conn
            .query_row("SELECT seq FROM tidied", [], |row| row.get(0))
            .map_err(|e| sorted(path, e))?;
        if !self.large && self.seq.saturating_sub(tidied) < EVENTS_PER_CHECKPOINT {
            return Ok(false);
        }
        self.begin_log_anew()
    }

    fn begin_log_anew(&mut self) -> Result<bool, StoreError> {
        let moved_all = move_log(&self.conn, &self.place, "PASSIVE").inspect_err(|e| {
            if e.is_failed_io() {
                self.failed = Some(Failure::Sync);
            }
        })?;
        if moved_all {
            self.note_tidied()?;
        }
        Ok(moved_all)
    }

    /// The next write begins the log anew, in the space it has on disk. That it may is known only while
    /// someone has the database open, so it is done at once.
    fn note_tidied(&mut self) -> Result<(), StoreError> {
        self.wait_for_disk(Durability::Relaxed)?;
        self.conn
            .execute("UPDATE tidied SET seq = ?1", [self.seq])
            .map_err(|e| sorted(&self.place.db, e))?;
        self.large = false;
        Ok(())
    }

    fn refuse_after_failure(&self) -> Result<(), StoreError> {
        let path = self.place.db.clone();
        match self.failed {
            None => Ok(()),
            Some(Failure::Lost) => Err(StoreError::Lost { path }),
            Some(Failure::Closed) => Err(StoreError::Unwritable {
                path,
                doing: "used before it is opened again",
                source: std::io::Error::from_raw_os_error(libc::EBADF).into(),
            }),
            Some(Failure::Sync) => Err(StoreError::Unwritable {
                path,
                doing: "trusted after a write of it failed",
                source: std::io::Error::from_raw_os_error(libc::EIO).into(),
            }),
        }
    }

    fn wait_for_disk(&mut self, durability: Durability) -> Result<(), StoreError> {
        if self.durability != durability {
            // Has no effect within a transaction, so it is set before. sqlite.org/pragma.html
            self.conn
                .execute_batch(match durability {
                    Durability::Durable => "PRAGMA synchronous = FULL",
                    Durability::Relaxed => "PRAGMA synchronous = NORMAL",
                })
                .map_err(|e| sorted(&self.place.db, e))?;
            self.durability = durability;
        }
        Ok(())
    }
}

/// Rolls back what a step that failed or panicked has begun.
struct Unfinished<'a> {
    conn: &'a Connection,
}

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        // What cannot be rolled back cannot be committed either: the next BEGIN fails on it.
        if let Err(e) = self.conn.execute_batch("ROLLBACK") {
            debug_assert!(self.conn.is_autocommit(), "{e}");
        }
    }
}

/// The database, open for looking. Creates nothing, claims nothing.
pub struct Reader {
    conn: Connection,
    place: Place,
    /// SQLite has mapped the log's index for writing.
    writes_index: bool,
}

impl Reader {
    /// # Errors
    /// [`StoreError::NotFound`] if nothing has been recorded there; else as [`Store::open`].
    pub fn open(state_dir: &Path) -> Result<Self, StoreError> {
        let place = Place::for_reading(state_dir)?;
        // One that can only be read is mapped so: a state that was put away.
        let writes_index = place.check_index().is_ok();
        Self::at(place, writes_index)
    }

    /// In the process of a [`Store`], whose mapping of the log's index all its connections have.
    ///
    /// # Errors
    /// As [`Reader::open`], and [`StoreError::Unwritable`].
    fn beside_store(state_dir: &Path) -> Result<Self, StoreError> {
        let place = Place::for_reading(state_dir)?;
        place.check_index()?;
        Self::at(place, true)
    }

    fn at(place: Place, writes_index: bool) -> Result<Self, StoreError> {
        let conn = connect(&place, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
        schema::check(&conn, &place)?;
        Ok(Self { conn, place, writes_index })
    }

    fn check_index(&self) -> Result<(), StoreError> {
        if self.writes_index { self.place.check_index() } else { Ok(()) }
    }

    /// Reads at one point in time.
    pub fn read<T>(
        &self,
        look: impl FnOnce(&View<'_>) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        self.check_index()?;
        snapshot(&self.conn, &self.place, look)
    }
}

/// What can be read, at one point in time.
pub struct View<'a> {
    conn: &'a Connection,
    place: &'a Place,
}

/// One transaction: a view of its own writes, not yet seen by others.
pub struct Tx<'a> {
    view: View<'a>,
    owner: &'a Owner,
    head: Head,
    large: bool,
}

impl<'a> Deref for Tx<'a> {
    type Target = View<'a>;
    fn deref(&self) -> &View<'a> {
        &self.view
    }
}

impl View<'_> {
    fn error(&self) -> impl Fn(rusqlite::Error) -> StoreError {
        |e| sorted(&self.place.db, e)
    }

    /// What a reader of an older database must ask before it reads what a later step made. The writer's
    /// database has all of them.
    fn has_step(&self, version: i64) -> Result<bool, StoreError> {
        Ok(schema::version(self.conn).map_err(self.error())? >= version)
    }

    fn prepare(&self, sql: &str) -> Result<rusqlite::CachedStatement<'_>, StoreError> {
        self.conn.prepare_cached(sql).map_err(self.error())
    }
}

fn snapshot<T>(
    conn: &Connection,
    place: &Place,
    look: impl FnOnce(&View<'_>) -> Result<T, StoreError>,
) -> Result<T, StoreError> {
    let sql = conn.unchecked_transaction().map_err(|e| sorted(&place.db, e))?;
    let value = look(&View { conn: &sql, place })?;
    sql.rollback().map_err(|e| sorted(&place.db, e))?;
    Ok(value)
}

#[cfg(test)]
mod tests;
