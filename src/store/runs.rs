//! Runs, and what they have asked for.
#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::str::FromStr;
use std::time::Duration;

use rusqlite::types::Type;
use rusqlite::{OptionalExtension, Row};

use crate::model::id::RunId;
use crate::model::moment::Moment;
use crate::model::name::IdentityName;
use crate::model::run::{Counters, Run, RunState};
use crate::store::error::StoreError;
use crate::store::{Tx, View};

/// What `requests_per_minute` counts over.
const WINDOW: Duration = Duration::from_secs(60);

/// How often what has left the window is deleted.
const REQUESTS_PER_SWEEP: u32 = 64;

/// Which runs to list. The default is all.
#[derive(Debug, Clone, Copy, Default)]
pub struct RunFilter<'a> {
    pub state: Option<RunState>,
    pub principal: Option<&'a IdentityName>,
    /// At most so many: the newest.
    pub limit: Option<u32>,
}

/// How much there is, for metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Counts {
    pub open_leases: u64,
    pub running_execs: u64,
    /// The length of the trail: the number of its last event.
    pub events: u64,
}

impl View<'_> {
    /// Costs a walk over what is open, not over what was.
    pub fn counts(&self) -> Result<Counts, StoreError> {
        let count = |sql| self.prepare(sql)?.query_row([], |row| row.get(0)).map_err(self.error());
        Ok(Counts {
            open_leases: count(
                "SELECT count(*) FROM lease INDEXED BY lease_due
                 WHERE state IN ('granted', 'consumed')",
            )?,
            running_execs: count(
                "SELECT count(*) FROM exec INDEXED BY exec_live WHERE state = 'running'",
            )?,
            events: self.head()?.seq,
        })
    }

    /// A run as it is recorded; without its principal's permissions, which are configuration.
    pub fn run(&self, id: &RunId) -> Result<Option<Run>, StoreError> {
        self.prepare(
            "SELECT run_id, agent, principal, profile, workspace, state, started_at
             FROM run WHERE run_id = ?1",
        )?
        .query_row([id.as_str()], read_run)
        .optional()
        .map_err(self.error())
    }

    /// All runs, the oldest first.
    pub fn runs(&self) -> Result<Vec<Run>, StoreError> {
        self.runs_that(RunFilter::default())
    }

    /// The oldest first.
    pub fn runs_that(&self, filter: RunFilter<'_>) -> Result<Vec<Run>, StoreError> {
        let mut found: Vec<Run> = self
            .prepare(
                "SELECT run_id, agent, principal, profile, workspace, state, started_at
                 FROM run WHERE (?1 IS NULL OR state = ?1) AND (?2 IS NULL OR principal = ?2)
                 ORDER BY started_at DESC, run_id DESC LIMIT ?3",
            )?
            .query_map(
                (
                    filter.state.map(state_text),
                    filter.principal.map(IdentityName::as_str),
                    filter.limit.map_or(-1, i64::from),
                ),
                read_run,
            )
            .and_then(Iterator::collect)
            .map_err(self.error())?;
        found.reverse();
        Ok(found)
    }

    /// What has been counted for the run, as of `now`. Zeros for a run that is not recorded.
    ///
    /// The minute is the last sixty seconds of `CLOCK_BOOTTIME`, sliding; requests before a reboot are
    /// outside it.
    pub fn requests_counted(&self, id: &RunId, now: &Moment) -> Result<Counters, StoreError> {
        // Requests are numbered, so that the first one in the window says how many are.
        let counted: Option<(u32, Option<u32>)> = self
            .prepare(
                "SELECT requests, (
                     SELECT number FROM request WHERE run_id = ?1 AND boot_id = ?2 AND boot_ns > ?3
                     ORDER BY boot_ns, number LIMIT 1)
                 FROM run WHERE run_id = ?1",
            )?
            .query_row((id.as_str(), &now.boot_id, window_start(now)), |row| {
                Ok((row.get(0)?, row.get(1)?))
            })
            .optional()
            .map_err(self.error())?;
        let Some((run, first)) = counted else { return Ok(Counters::default()) };
        let minute = first.map_or(0, |number| run.saturating_sub(number).saturating_add(1));
        Ok(Counters { minute, run })
    }
}

impl Tx<'_> {
    /// Records a new run.
    pub fn put_run(&mut self, run: &Run) -> Result<(), StoreError> {
        self.prepare(
            "INSERT INTO run (run_id, agent, principal, profile, workspace, state, started_at)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
        )?
        .execute((
            run.run_id.as_str(),
            run.agent.as_str(),
            run.principal.as_str(),
            &run.profile,
            run.workspace.as_os_str().as_bytes(),
            state_text(run.state),
            run.started_at.to_string(),
        ))
        .map(drop)
        .map_err(self.error())
    }

    /// Ends a run and forgets the times of its requests; their number stays. Returns whether it was
    /// active until now.
    pub fn end_run(&mut self, id: &RunId) -> Result<bool, StoreError> {
        self.prepare("DELETE FROM request WHERE run_id = ?1")?
            .execute([id.as_str()])
            .map_err(self.error())?;
        let ended = self
            .prepare("UPDATE run SET state = 'ended' WHERE run_id = ?1 AND state = 'active'")?
            .execute([id.as_str()])
            .map_err(self.error())?;
        Ok(ended == 1)
    }

    /// Notes a denial past a ceiling. One a minute is told in the trail: then this gives how many there
    /// were since the last one told. The others are only counted.
    pub fn note_rate_denial(
        &mut self,
        id: &RunId,
        now: &Moment,
    ) -> Result<Option<u64>, StoreError> {
        let told: Option<(i64, u64)> = self
            .prepare("SELECT boot_ns, untold FROM rate_denial WHERE run_id = ?1 AND boot_id = ?2")?
            .query_row((id.as_str(), &now.boot_id), |row| Ok((row.get(0)?, row.get(1)?)))
            .optional()
            .map_err(self.error())?;
        if told.is_some_and(|(at, _)| at > window_start(now)) {
            self.prepare("UPDATE rate_denial SET untold = untold + 1 WHERE run_id = ?1")?
                .execute([id.as_str()])
                .map_err(self.error())?;
            return Ok(None);
        }
        self.prepare("INSERT OR REPLACE INTO rate_denial VALUES (?1, ?2, ?3, 0)")?
            .execute((id.as_str(), &now.boot_id, nanoseconds(now.boot)))
            .map_err(self.error())?;
        Ok(Some(told.map_or(0, |(_, untold)| untold)))
    }

    /// Counts one request, and returns its number in the run: what [`View::requests_counted`] gives as
    /// `run` from now on. Exact across processes: it happens within this transaction, which alone may
    /// write.
    ///
    /// # Errors
    /// [`StoreError::Missing`] if the run is not recorded.
    pub fn count_request(&mut self, id: &RunId, now: &Moment) -> Result<u32, StoreError> {
        // In three plain statements: one that returns what it changed, or inserts what it selects, opens a
        // journal of its own, which costs more than they do.
        let before: Option<(u32, Option<i64>)> = self
            .prepare(
                "SELECT requests, (
                     SELECT max(boot_ns) FROM request WHERE run_id = ?1 AND boot_id = ?2)
                 FROM run WHERE run_id = ?1",
            )?
            .query_row((id.as_str(), &now.boot_id), |row| Ok((row.get(0)?, row.get(1)?)))
            .optional()
            .map_err(self.error())?;
        let Some((before, latest)) = before else {
            return Err(StoreError::Missing { what: format!("run {id}") });
        };
        let number = before.saturating_add(1);
        self.prepare("UPDATE run SET requests = ?2 WHERE run_id = ?1")?
            .execute((id.as_str(), number))
            .map_err(self.error())?;
        // Two readings of the clock may come here in the other order; numbers follow times.
        let time = nanoseconds(now.boot).max(latest.unwrap_or(0));
        self.prepare(
            "INSERT INTO request (run_id, boot_id, boot_ns, number) VALUES (?1, ?2, ?3, ?4)",
        )?
        .execute((id.as_str(), &now.boot_id, time, number))
        .map_err(self.error())?;
        if number.is_multiple_of(REQUESTS_PER_SWEEP) {
            self.prepare(
                "DELETE FROM request WHERE run_id = ?1 AND (boot_id <> ?2 OR boot_ns <= ?3)",
            )?
            .execute((id.as_str(), &now.boot_id, window_start(now)))
            .map_err(self.error())?;
        }
        Ok(number)
    }
}

fn window_start(now: &Moment) -> i64 {
    // Before the first minute of a boot is over, the window reaches back to its start.
    now.boot.checked_sub(WINDOW).map_or(-1, nanoseconds)
}

/// 292 years of a boot fit.
pub(super) fn nanoseconds(time: Duration) -> i64 {
    i64::try_from(time.as_nanos()).unwrap_or(i64::MAX)
}

fn state_text(state: RunState) -> &'static str {
    match state {
        RunState::Active => "active",
        RunState::Ended => "ended",
    }
}

fn read_run(row: &Row<'_>) -> rusqlite::Result<Run> {
    Ok(Run {
        run_id: parsed(row, 0)?,
        agent: parsed(row, 1)?,
        principal: parsed(row, 2)?,
        permissions: Vec::new(),
        profile: row.get(3)?,
        workspace: OsString::from_vec(row.get(4)?).into(),
        state: one_of(row, 5, &[RunState::Active, RunState::Ended], state_text)?,
        started_at: parsed(row, 6)?,
    })
}

/// A condition for those that hold.
pub(super) fn all_of(conditions: &[Option<&'static str>]) -> String {
    let named: Vec<&str> = conditions.iter().flatten().copied().collect();
    if named.is_empty() { "true".to_owned() } else { named.join(" AND ") }
}

/// A text column, as what it says.
pub(super) fn parsed<T>(row: &Row<'_>, column: usize) -> rusqlite::Result<T>
where
    T: FromStr<Err: std::error::Error + Send + Sync + 'static>,
{
    row.get::<_, String>(column)?
        .parse()
        .map_err(|e| rusqlite::Error::FromSqlConversionFailure(column, Type::Text, Box::new(e)))
}

/// A text column, as one of a few words.
pub(super) fn one_of<T: Copy>(
    row: &Row<'_>,
    column: usize,
    all: &[T],
    text: fn(T) -> &'static str,
) -> rusqlite::Result<T> {
    let found: String = row.get(column)?;
    all.iter().copied().find(|&one| text(one) == found).ok_or_else(|| {
        let message = format!("`{found}` is none of the words expected there");
        rusqlite::Error::FromSqlConversionFailure(column, Type::Text, message.into())
    })
}
