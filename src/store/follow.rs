//! Noticing that someone wrote, without reading what.
#![forbid(unsafe_code)]

use crate::store::Reader;
use crate::store::error::{StoreError, sorted};

/// The file that a database is: device and inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DatabaseFile(Option<(u64, u64)>);

impl Reader {
    /// A number that changes with every commit of another connection. Reads no page: it looks at the
    /// log's shared index. sqlite.org/pragma.html#pragma_data_version
    ///
    /// # Errors
    /// As any read.
    pub fn data_version(&self) -> Result<i64, StoreError> {
        self.check_index()?;
        self.conn
            .query_row("PRAGMA data_version", [], |row| row.get(0))
            .map_err(|e| sorted(&self.place.db, e))
    }

    /// What lies at the database's path now: to be compared with what lay there when it was opened.
    pub fn file_in_place(&self) -> DatabaseFile {
        DatabaseFile(self.place.identity().database())
    }
}
