//! One connection to the database: opened for us, settled, its log moved.
//!
//! Receives a place that was checked; returns a connection that neither checkpoints by itself nor runs what
//! it finds in the file. Touches the database's files only.
#![forbid(unsafe_code)]

use std::time::Duration;

use rusqlite::config::DbConfig;
use rusqlite::{Connection, OpenFlags};

use crate::store::error::{PATIENCE_SECONDS, StoreError, sorted};
use crate::store::owner::Owner;
use crate::store::place::{Identity, Place, sync};
use crate::store::schema;

/// The database at `place`, in WAL mode, and the files that it is. `before`: those that were there before it
/// was opened.
pub(super) fn attach(
    place: &Place,
    owner: &Owner,
    before: Identity,
) -> Result<(Connection, Identity), StoreError> {
    let conn = connect(place, OpenFlags::SQLITE_OPEN_READ_WRITE)?;
    schema::upgrade(&conn, place, owner)?;
    let mut files = place.identity();
    if !files.has_log() {
        // A stranger's tool set another journal mode, or closed as the last and tidied up.
        conn.pragma_update_and_check(None, "journal_mode", "wal", |_| Ok(()))
            .map_err(|e| sorted(&place.db, e))?;
        schema::check(&conn, place)?;
        files = place.identity();
    }
    if !before.has_log() {
        // A new log's entry in the directory must be as durable as what is to be written to it.
        sync(&place.dir)?;
    }
    if files.database() != before.database() || !files.has_log() {
        return Err(StoreError::Lost { path: place.db.clone() });
    }
    Ok((conn, files))
}

/// Moves the log into the database as far as readers allow. Whether that was all.
pub(super) fn move_log(conn: &Connection, place: &Place, how: &str) -> Result<bool, StoreError> {
    place.check_index()?;
    conn.query_row(&format!("PRAGMA wal_checkpoint({how})"), [], |row| {
        let (busy, pages, moved): (i64, i64, i64) = (row.get(0)?, row.get(1)?, row.get(2)?);
        Ok(busy == 0 && pages == moved)
    })
    .map_err(|e| sorted(&place.db, e))
}

pub(super) fn connect(place: &Place, access: OpenFlags) -> Result<Connection, StoreError> {
    let flags = access | OpenFlags::SQLITE_OPEN_NO_MUTEX | OpenFlags::SQLITE_OPEN_NOFOLLOW;
    let configured = || {
        let conn = Connection::open_with_flags(&place.db, flags)?;
        conn.busy_handler(Some(wait_a_little))?;
        conn.set_prepared_statement_cache_capacity(128);
        conn.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
        // Savepoints and sorting keep what they need in memory: a temporary file costs a dozen writes a
        // step, and lies where a confined process may not make one.
        conn.pragma_update(None, "temp_store", "memory")?;
        // The file is data, not code: no trigger or view in it can call a function with effects.
        conn.set_db_config(DbConfig::SQLITE_DBCONFIG_TRUSTED_SCHEMA, false)?;
        conn.set_db_config(DbConfig::SQLITE_DBCONFIG_DEFENSIVE, true)?;
        if access == OpenFlags::SQLITE_OPEN_READ_WRITE {
            conn.pragma_update_and_check(None, "wal_autocheckpoint", 0, |_| Ok(()))?;
        }
        Ok(conn)
    };
    configured().map_err(|e| sorted(&place.db, e))
}

/// A durable step takes well under a millisecond, where SQLite's own handler sleeps up to 100: start
/// at 50 µs and grow to 4 ms, and give up after [`PATIENCE_SECONDS`].
pub(super) fn wait_a_little(count: i32) -> bool {
    const LONGEST: u64 = 4_000;
    let tries = u64::try_from(count).unwrap_or(u64::MAX);
    let microseconds = if tries < 60 { 50 + tries * tries } else { LONGEST };
    // Two processes that began together must not meet again and again.
    let jitter = u64::from(std::process::id()).wrapping_mul(tries + 1).wrapping_mul(2_654_435_761);
    std::thread::sleep(Duration::from_micros(microseconds + jitter % (microseconds / 2)));
    tries < PATIENCE_SECONDS * 1_000_000 / LONGEST
}
