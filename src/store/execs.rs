//! Execs: begun, and ended once.
#![forbid(unsafe_code)]

use rusqlite::types::Type;
use rusqlite::{OptionalExtension, Row};
use serde::de::DeserializeOwned;

use crate::model::exec::{ExecRecord, ExecState};
use crate::model::id::{ExecId, RunId};
use crate::store::error::StoreError;
use crate::store::owner::OwnerId;
use crate::store::runs::{all_of, one_of, parsed};
use crate::store::{Tx, View};

/// Which execs to list. The default is all.
#[derive(Debug, Clone, Default)]
pub struct ExecFilter {
    pub run: Option<RunId>,
    pub state: Option<ExecState>,
    /// At most so many: the newest.
    pub limit: Option<u32>,
}

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
        self.execs_that(&ExecFilter { run: run.cloned(), ..Default::default() })
    }

    /// Oldest first.
    pub fn execs_that(&self, filter: &ExecFilter) -> Result<Vec<ExecRecord>, StoreError> {
        let by_index = filter.run.is_none() && filter.state == Some(ExecState::Running);
        let conditions = [
            filter.run.is_some().then_some("run_id = ?1"),
            filter.state.is_some().then_some("state = ?2"),
            by_index.then_some("state = 'running'"),
        ];
        let sql = format!(
            "{} {} WHERE {} ORDER BY exec_id DESC LIMIT ?3",
            select!(""),
            if by_index { "INDEXED BY exec_live" } else { "" },
            all_of(&conditions),
        );
        let mut found: Vec<ExecRecord> = self
            .prepare(&sql)?
            .query_map(
                (
                    filter.run.as_ref().map(RunId::as_str),
                    filter.state.map(ExecState::as_str),
                    filter.limit.map_or(-1, i64::from),
                ),
                read_exec,
            )
            .and_then(Iterator::collect)
            .map_err(self.error())?;
        found.reverse();
        Ok(found)
    }

    pub(super) fn running_execs_of(&self, owner: OwnerId) -> Result<Vec<ExecRecord>, StoreError> {
        self.prepare(select!("WHERE owner = ?1 AND state = 'running'"))?
            .query_map([owner.0], read_exec)
            .and_then(Iterator::collect)
            .map_err(self.error())
    }
}

impl Tx<'_> {
    /// What this process has begun and not ended.
    pub fn own_running_execs(&self) -> Result<Vec<ExecRecord>, StoreError> {
        self.running_execs_of(self.owner.id())
    }

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
