//! Noticing that someone wrote, without reading what.
#![forbid(unsafe_code)]

use crate::store::error::{StoreError, sorted};
use crate::store::{Reader, place};

impl Reader {
    /// A number that changes with every commit of another connection. Some microseconds: it looks at the
    /// log's shared index. sqlite.org/pragma.html#pragma_data_version
    pub fn data_version(&self) -> Result<i64, StoreError> {
        self.conn
            .query_row("PRAGMA data_version", [], |row| row.get(0))
            .map_err(|e| sorted(&self.place.db, e))
    }

    /// Whether the database that was opened still lies at its path.
    pub fn is_in_place(&self) -> bool {
        self.opened == self.place.identity().database()
    }
}

pub(super) type Opened = Option<(u64, u64)>;

pub(super) fn opened(place: &place::Place) -> Opened {
    place.identity().database()
}
