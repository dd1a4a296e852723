//! What can go wrong with the store, told so that the caller can act: nothing there, not safe to use,
//! not writable (then nothing may be granted), damaged, gone, or of a later version.
#![forbid(unsafe_code)]

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rusqlite::ErrorCode;

#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("nothing is recorded at {path} yet")]
    NotFound { path: PathBuf },
    #[error("refused to keep state in {path}: it {fault}; {mend}")]
    Unsafe { path: PathBuf, fault: String, mend: &'static str },
    #[error(
        "the database {path} is damaged: {found}; restore it from a backup, or move the `db` directory and `trail.head` beside it away, both, to start anew (what it recorded is then no longer counted)"
    )]
    Corrupt { path: PathBuf, found: String, source: Option<rusqlite::Error> },
    #[error(
        "the database {path} cannot be {doing}, so nothing can be recorded or granted; check free space, permissions, and that the file system is not read-only"
    )]
    Unwritable { path: PathBuf, doing: &'static str, source: Cause },
    #[error(
        "the database {path} has been locked by another process for {seconds} seconds; look for a stopped sublet that holds it (fuser {path})"
    )]
    Busy { path: PathBuf, seconds: u64 },
    #[error(
        "the database {path} was removed or replaced while it was open, so what is written is lost; restart sublet on the right file"
    )]
    Lost { path: PathBuf },
    #[error(
        "the database {path} has schema {found}, written by a later sublet; this one knows up to {known}: upgrade it"
    )]
    Newer { path: PathBuf, found: i64, known: i64 },
    #[error("{what} is not recorded")]
    Missing { what: String },
    #[error("the database {path} refused a step")]
    Failed { path: PathBuf, source: rusqlite::Error },
    #[error("the kernel gave no random bytes (getrandom(2))")]
    Random { source: std::io::Error },
    /// One commit failed for all whose steps were in it. [`StoreError::cause`] looks through it.
    #[error(transparent)]
    Shared(Arc<StoreError>),
}

impl StoreError {
    /// What happened, whether to one caller or to many at once.
    pub fn cause(&self) -> &StoreError {
        match self {
            StoreError::Shared(cause) => cause.cause(),
            cause => cause,
        }
    }

    /// Whether another connection to the same file may fare better.
    pub(super) fn is_of_the_connection(&self) -> bool {
        match self {
            Self::Unwritable { source: Cause::Sqlite(e), .. } => {
                e.sqlite_error_code() != Some(ErrorCode::DiskFull)
            }
            Self::Corrupt { .. } | Self::Lost { .. } => true,
            _ => false,
        }
    }

    pub(super) fn is_failed_io(&self) -> bool {
        let Self::Unwritable { source: Cause::Sqlite(e), .. } = self else { return false };
        e.sqlite_error_code() == Some(ErrorCode::SystemIoFailure)
    }
}

/// What the system or SQLite said.
#[derive(Debug, thiserror::Error)]
pub enum Cause {
    #[error(transparent)]
    System(#[from] io::Error),
    #[error(transparent)]
    Sqlite(#[from] rusqlite::Error),
}

/// How long a step waits for other processes that write.
pub(super) const PATIENCE_SECONDS: u64 = 10;

/// Sorts what SQLite says by what its reader should do. sqlite.org/rescode.html
pub(super) fn sorted(path: &Path, source: rusqlite::Error) -> StoreError {
    use rusqlite::ffi;
    let path = path.to_owned();
    let (code, extended) = match &source {
        rusqlite::Error::SqliteFailure(e, _) => (e.code, e.extended_code),
        // A column that holds another type than the schema says: no version of ours wrote it.
        rusqlite::Error::FromSqlConversionFailure(..)
        | rusqlite::Error::IntegralValueOutOfRange(..)
        | rusqlite::Error::InvalidColumnType(..)
        | rusqlite::Error::Utf8Error(..) => {
            let found = source.to_string();
            return StoreError::Corrupt { path, found, source: Some(source) };
        }
        _ => return StoreError::Failed { path, source },
    };
    match (code, extended) {
        (_, ffi::SQLITE_READONLY_DBMOVED) => StoreError::Lost { path },
        (_, ffi::SQLITE_CANTOPEN_SYMLINK) => StoreError::Unsafe {
            path,
            fault: "is a symbolic link".to_owned(),
            mend: "put the file itself there",
        },
        (ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase, _)
        | (
            _,
            ffi::SQLITE_IOERR_READ | ffi::SQLITE_IOERR_SHORT_READ | ffi::SQLITE_IOERR_CORRUPTFS,
        ) => {
            let found = source.to_string();
            StoreError::Corrupt { path, found, source: Some(source) }
        }
        (
            ErrorCode::DatabaseBusy
            | ErrorCode::DatabaseLocked
            | ErrorCode::FileLockingProtocolFailed,
            _,
        ) => StoreError::Busy { path, seconds: PATIENCE_SECONDS },
        (ErrorCode::CannotOpen, _) => {
            StoreError::Unwritable { path, doing: "opened", source: source.into() }
        }
        (
            ErrorCode::ReadOnly
            | ErrorCode::DiskFull
            | ErrorCode::SystemIoFailure
            | ErrorCode::PermissionDenied,
            _,
        ) => StoreError::Unwritable { path, doing: "written", source: source.into() },
        // A table or column that is not there, in a database that says it has our schema.
        (ErrorCode::Unknown, ffi::SQLITE_ERROR) => {
            let found = source.to_string();
            StoreError::Corrupt { path, found, source: Some(source) }
        }
        _ => StoreError::Failed { path, source },
    }
}
