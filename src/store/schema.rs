//! The tables, and how the database comes to be: made whole beside its place, then moved there, so that
//! a database that lacks anything was damaged and is never taken for a new one.
#![forbid(unsafe_code)]

use std::io;
use std::path::Path;

use rusqlite::{Connection, OpenFlags, Transaction, TransactionBehavior};

use crate::store::error::{StoreError, sorted};
use crate::store::owner::Owner;
use crate::store::place::{Place, sync, unusable};

/// `PRAGMA user_version`. A later one adds its list of statements to [`STEPS`].
pub(super) const VERSION: i64 = 3;

/// What a reader still understands: it cannot take the steps itself.
const OLDEST: i64 = 1;

/// `PRAGMA application_id`: "subl".
const APPLICATION: i64 = 0x7375_626c;

/// Keys are texts that sort by time, so that tables without rowid grow at their end and need no second
/// index. Each index is a page more in every durable write: the only ones are of what is open.
const TABLES: &str = "
    CREATE TABLE event (
        seq INTEGER PRIMARY KEY,
        hash TEXT NOT NULL,
        body TEXT NOT NULL
    ) STRICT;
    CREATE TABLE run (
        run_id TEXT PRIMARY KEY,
        agent TEXT NOT NULL,
        principal TEXT NOT NULL,
        profile TEXT NOT NULL,
        workspace BLOB NOT NULL,
        state TEXT NOT NULL,
        started_at TEXT NOT NULL,
        requests INTEGER NOT NULL DEFAULT 0
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE request (
        run_id TEXT NOT NULL,
        boot_id TEXT NOT NULL,
        boot_ns INTEGER NOT NULL,
        number INTEGER NOT NULL,
        PRIMARY KEY (run_id, boot_id, boot_ns, number)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE lease (
        lease_id TEXT PRIMARY KEY,
        run_id TEXT NOT NULL,
        request_id TEXT NOT NULL,
        capability TEXT NOT NULL,
        audience TEXT NOT NULL,
        channel TEXT NOT NULL,
        secret TEXT NOT NULL,
        issued_at TEXT NOT NULL,
        expires_at TEXT NOT NULL,
        expires_boot_ns INTEGER NOT NULL,
        boot_id TEXT NOT NULL,
        uses INTEGER NOT NULL,
        uses_left INTEGER NOT NULL CHECK (uses_left BETWEEN 0 AND uses),
        state TEXT NOT NULL,
        owner INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX lease_open ON lease (owner) WHERE state IN ('granted', 'consumed');
    CREATE TABLE exec (
        exec_id TEXT PRIMARY KEY,
        run_id TEXT NOT NULL,
        lease_ids TEXT NOT NULL,
        command TEXT NOT NULL,
        state TEXT NOT NULL,
        exit_status INTEGER,
        started_at TEXT NOT NULL,
        owner INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX exec_running ON exec (owner) WHERE state = 'running';
    CREATE TABLE secret (
        name TEXT PRIMARY KEY,
        version INTEGER NOT NULL,
        sealed BLOB NOT NULL,
        digest BLOB NOT NULL,
        set_at TEXT NOT NULL
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE rate_denial (
        run_id TEXT PRIMARY KEY,
        boot_id TEXT NOT NULL,
        boot_ns INTEGER NOT NULL,
        untold INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE tidied (seq INTEGER NOT NULL) STRICT;
    INSERT INTO tidied VALUES (0);
";

/// From version 1 to 2. Statements that change nothing when they run again.
///
/// `lease_due` finds what expires next among what a process holds; `exec_live` what a run still runs. The
/// two others are what lists a run's own leases and execs without a walk over those of all runs.
const STEP_2: &[&str] = &[
    "DROP INDEX IF EXISTS lease_open",
    "CREATE INDEX IF NOT EXISTS lease_due ON lease (owner, expires_boot_ns)
         WHERE state IN ('granted', 'consumed')",
    "CREATE INDEX IF NOT EXISTS lease_of_run ON lease (run_id)",
    "DROP INDEX IF EXISTS exec_running",
    "CREATE INDEX IF NOT EXISTS exec_live ON exec (owner, run_id) WHERE state = 'running'",
    "CREATE INDEX IF NOT EXISTS exec_of_run ON exec (run_id)",
    // Signed notes about the event `seq`. After a rotation the first says where the trail begins.
    "CREATE TABLE IF NOT EXISTS checkpoint (seq INTEGER PRIMARY KEY, note TEXT NOT NULL) STRICT",
];

/// From version 2 to 3: values that others minted and that have not ended. `due_ms` is the wall clock's
/// time of the next try to end one; without it its exec lives.
const STEP_3: &[&str] = &["CREATE TABLE IF NOT EXISTS mint (
         mint_id TEXT PRIMARY KEY,
         lease_id TEXT NOT NULL,
         exec_id TEXT NOT NULL,
         secret TEXT NOT NULL,
         issuer TEXT NOT NULL,
         scope TEXT,
         principal TEXT,
         far_id TEXT,
         expires_ms INTEGER,
         handle BLOB,
         attempts INTEGER NOT NULL,
         due_ms INTEGER,
         owner INTEGER NOT NULL
     ) STRICT, WITHOUT ROWID"];

/// What leads from each version to the next, and the version after it.
const STEPS: &[(i64, &[&str])] = &[(2, STEP_2), (3, STEP_3)];

/// Makes the database if no other process was first.
pub(super) fn create(place: &Place, owner: &Owner) -> Result<(), StoreError> {
    let making = owner.making(place)?;
    if !place.has_database(&place.identity())? {
        let fresh = place.dir.join("sublet.db.new");
        // What a process that died at this point left.
        for left in ["sublet.db.new", "sublet.db.new-wal", "sublet.db.new-shm"] {
            remove(&place.dir.join(left))?;
        }
        fill(&fresh).map_err(|e| sorted(&place.db, e))?;
        use std::os::unix::fs::PermissionsExt;
        // The log and the index take the database's mode.
        std::fs::set_permissions(&fresh, std::fs::Permissions::from_mode(0o600))
            .and_then(|()| std::fs::rename(&fresh, &place.db))
            .map_err(|e| unusable(&place.db, "created", e))?;
        sync(&place.dir)?;
    }
    making.done()
}

fn remove(path: &Path) -> Result<(), StoreError> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(unusable(path, "removed", e)),
        _ => Ok(()),
    }
}

fn fill(path: &Path) -> rusqlite::Result<()> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE
        | OpenFlags::SQLITE_OPEN_CREATE
        | OpenFlags::SQLITE_OPEN_NO_MUTEX
        | OpenFlags::SQLITE_OPEN_NOFOLLOW;
    let conn = Connection::open_with_flags(path, flags)?;
    conn.execute_batch(&format!(
        "PRAGMA synchronous = FULL;
         BEGIN IMMEDIATE;
         {TABLES}
         PRAGMA application_id = {APPLICATION};"
    ))?;
    take_steps(&conn, OLDEST)?;
    conn.execute_batch("COMMIT")?;
    // Written into the header, for every later connection. sqlite.org/wal.html
    conn.pragma_update_and_check(None, "journal_mode", "wal", |_| Ok(()))?;
    conn.close().map_err(|(_, e)| e)
}

/// Reads the schema's version: the first touch of the file, so that damage shows here. A reader may meet
/// an older one, without what later steps made.
pub(super) fn check(conn: &Connection, place: &Place) -> Result<i64, StoreError> {
    let found = version(conn).map_err(|e| sorted(&place.db, e))?;
    match found {
        OLDEST..=VERSION => Ok(found),
        _ if found > VERSION => {
            Err(StoreError::Newer { path: place.db.clone(), found, known: VERSION })
        }
        _ => Err(StoreError::Corrupt {
            path: place.db.clone(),
            found: "it is empty, or no database of sublet".to_owned(),
            source: None,
        }),
    }
}

/// Brings an older database to this version, durably and whole, if no other process was first. One that
/// an older sublet has open goes on: no step takes away what it uses.
pub(super) fn upgrade(conn: &Connection, place: &Place, owner: &Owner) -> Result<(), StoreError> {
    if check(conn, place)? == VERSION {
        return Ok(());
    }
    let making = owner.making(place)?;
    let taken = || {
        let sql = Transaction::new_unchecked(conn, TransactionBehavior::Immediate)?;
        take_steps(&sql, version(&sql)?)?;
        sql.commit()
    };
    taken().map_err(|e| sorted(&place.db, e))?;
    making.done()
}

fn take_steps(conn: &Connection, from: i64) -> rusqlite::Result<()> {
    for (to, statements) in STEPS.iter().filter(|(to, _)| *to > from) {
        statements.iter().try_for_each(|statement| conn.execute_batch(statement))?;
        conn.pragma_update(None, "user_version", to)?;
    }
    Ok(())
}

pub(super) fn version(conn: &Connection) -> rusqlite::Result<i64> {
    conn.query_row("PRAGMA user_version", [], |row| row.get(0))
}
