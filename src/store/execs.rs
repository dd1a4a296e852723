//! Execs: begun, and ended once.
#![forbid(unsafe_code)]

use rusqlite::types::Type;
use rusqlite::{OptionalExtension, Row};
use serde::de::DeserializeOwned;

use crate::model::exec::{ExecRecord, ExecState};
use crate::model::id::{ExecId, RunId};
use crate::store::error::StoreError;
use crate::store::owner::OwnerId;
use crate::store::runs::{one_of, parsed};
use crate::store::{Tx, View};

macro_rules! select {
    ($rest:literal) => {
        concat!(
            "SELECT exec_id, run_id, lease_ids, command, state, exit_status, started_at FROM exec ",
            $rest
        )
    };
}

impl View<'_> {
    pub fn exec(&self, id: &ExecId) -> Result<Option<ExecRecord>, StoreError> {
        self.prepare(select!("WHERE exec_id = ?1"))?
            .query_row([id.as_str()], read_exec)
            .optional()
            .map_err(self.error())
    }

    /// Of one run, or of all; oldest first.
    pub fn execs(&self, run: Option<&RunId>) -> Result<Vec<ExecRecord>, StoreError> {
        self.prepare(select!("WHERE ?1 IS NULL OR run_id = ?1 ORDER BY exec_id"))?
            .query_map([run.map(RunId::as_str)], read_exec)
            .and_then(Iterator::collect)
            .map_err(self.error())
    }

    pub(super) fn running_execs_of(&self, owner: OwnerId) -> Result<Vec<ExecRecord>, StoreError> {
        self.prepare(select!("WHERE owner = ?1 AND state = 'running'"))?
            .query_map([owner.0], read_exec)
            .and_then(Iterator::collect)
            .map_err(self.error())
    }
}

impl Tx<'_> {
    /// Records an exec, owned by this process.
    pub fn put_exec(&mut self, exec: &ExecRecord) -> Result<(), StoreError> {
        self.prepare(
            "INSERT INTO exec (exec_id, run_id, lease_ids, command, state, exit_status, started_at,
                 owner)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
        )?
        .execute((
            exec.exec_id.as_str(),
            exec.run_id.as_str(),
            json(&exec.lease_ids),
            json(&exec.command),
            exec.state.as_str(),
            exec.exit_status,
            exec.started_at.to_string(),
            self.owner.id().0,
        ))
        .map(drop)
        .map_err(self.error())
    }

    /// Ends a running exec. Returns whether it was running: one that has ended stays as it ended.
    #[must_use = "the exec may have been ended before"]
    pub fn finish_exec(
        &mut self,
        id: &ExecId,
        state: ExecState,
        exit_status: Option<i32>,
    ) -> Result<bool, StoreError> {
        let changed = self
            .prepare(
                "UPDATE exec SET state = ?2, exit_status = ?3
                 WHERE exec_id = ?1 AND state = 'running'",
            )?
            .execute((id.as_str(), state.as_str(), exit_status))
            .map_err(self.error())?;
        Ok(changed == 1)
    }
}

fn json<T: serde::Serialize>(list: &[T]) -> String {
    serde_json::Value::from_iter(list.iter().map(|item| serde_json::json!(item))).to_string()
}

fn read_exec(row: &Row<'_>) -> rusqlite::Result<ExecRecord> {
    Ok(ExecRecord {
        exec_id: parsed(row, 0)?,
        run_id: parsed(row, 1)?,
        lease_ids: listed(row, 2)?,
        command: listed(row, 3)?,
        state: one_of(row, 4, &ExecState::ALL, ExecState::as_str)?,
        exit_status: row.get(5)?,
        started_at: parsed(row, 6)?,
    })
}

fn listed<T: DeserializeOwned>(row: &Row<'_>, column: usize) -> rusqlite::Result<Vec<T>> {
    serde_json::from_str(&row.get::<_, String>(column)?)
        .map_err(|e| rusqlite::Error::FromSqlConversionFailure(column, Type::Text, Box::new(e)))
}
