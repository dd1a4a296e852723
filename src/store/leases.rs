//! Leases: granted, used up one use at a time, closed once.
#![forbid(unsafe_code)]

use std::time::Duration;

use rusqlite::{OptionalExtension, Row};

use crate::model::exec::ExecRecord;
use crate::model::id::{LeaseId, RunId};
use crate::model::lease::{LeaseRecord, LeaseState};
use crate::model::moment::Moment;
use crate::store::error::StoreError;
use crate::store::owner::OwnerId;
use crate::store::place::unusable;
use crate::store::runs::{nanoseconds, one_of, parsed};
use crate::store::{Tx, View};

/// Why a use was not given. The lease is as it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum UseRefused {
    /// There is none of this id in this run. Of other runs' leases no more is said.
    #[error("this run has no such lease")]
    NotFound,
    #[error("the lease has no uses left")]
    Exhausted,
    #[error("the lease has expired")]
    Expired,
    #[error("the lease is {}", .0.as_str())]
    NotOpen(LeaseState),
    #[error("the lease was granted before the last reboot")]
    OtherBoot,
}

/// Which leases to list. The default is all.
#[derive(Debug, Clone, Default)]
pub struct LeaseFilter {
    pub run: Option<RunId>,
    pub open_only: bool,
}

/// What processes that are gone left open; adopted by this one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Orphans {
    pub leases: Vec<LeaseRecord>,
    pub execs: Vec<ExecRecord>,
}

macro_rules! select {
    ($rest:literal) => {
        concat!(
            "SELECT lease_id, run_id, request_id, capability, audience, channel, secret, issued_at,
                    expires_at, expires_boot_ns, boot_id, uses, uses_left, state FROM lease ",
            $rest
        )
    };
}

impl View<'_> {
    /// Any run's lease: for the host. Whoever serves a run compares `run_id`.
    pub fn lease(&self, id: &LeaseId) -> Result<Option<LeaseRecord>, StoreError> {
        self.prepare(select!("WHERE lease_id = ?1"))?
            .query_row([id.as_str()], read_lease)
            .optional()
            .map_err(self.error())
    }

    /// Oldest first.
    pub fn leases(&self, filter: &LeaseFilter) -> Result<Vec<LeaseRecord>, StoreError> {
        let run = filter.run.as_ref().map(RunId::as_str);
        self.prepare(select!(
            "WHERE (?1 IS NULL OR run_id = ?1)
               AND (?2 = 0 OR state IN ('granted', 'consumed'))
             ORDER BY lease_id"
        ))?
        .query_map((run, filter.open_only), read_lease)
        .and_then(Iterator::collect)
        .map_err(self.error())
    }
}

impl Tx<'_> {
    /// Records a lease, owned by this process.
    pub fn put_lease(&mut self, lease: &LeaseRecord) -> Result<(), StoreError> {
        self.prepare(
            "INSERT INTO lease (lease_id, run_id, request_id, capability, audience, channel, secret,
                 issued_at, expires_at, expires_boot_ns, boot_id, uses, uses_left, state, owner)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15)",
        )?
        .execute((
            lease.lease_id.as_str(),
            lease.run_id.as_str(),
            lease.request_id.as_str(),
            lease.capability.as_str(),
            lease.audience.as_str(),
            lease.channel.as_str(),
            lease.secret.as_str(),
            lease.issued_at.to_string(),
            lease.expires_at.to_string(),
            nanoseconds(lease.expires_boot),
            &lease.boot_id,
            lease.uses,
            lease.uses_left,
            lease.state.as_str(),
            self.owner.id().0,
        ))
        .map(drop)
        .map_err(self.error())
    }

    /// Takes one use of this run's lease, if it is open, in time and of this boot; returns how many are
    /// left. Of any number of racers for the last use, in any number of processes, one gets it.
    ///
    /// The value may move only after the transaction is committed, durably.
    pub fn consume(
        &mut self,
        run: &RunId,
        id: &LeaseId,
        now: &Moment,
    ) -> Result<Result<u32, UseRefused>, StoreError> {
        let left: Option<u32> = self
            .prepare(
                "UPDATE lease SET uses_left = uses_left - 1, state = 'consumed'
                 WHERE lease_id = ?1 AND run_id = ?2 AND uses_left > 0
                   AND state IN ('granted', 'consumed')
                   AND boot_id = ?3 AND expires_boot_ns > ?4
                 RETURNING uses_left",
            )?
            .query_row((id.as_str(), run.as_str(), &now.boot_id, nanoseconds(now.boot)), |row| {
                row.get(0)
            })
            .optional()
            .map_err(self.error())?;
        Ok(match left {
            Some(left) => Ok(left),
            None => Err(self.why_refused(run, id, now)?),
        })
    }

    fn why_refused(
        &self,
        run: &RunId,
        id: &LeaseId,
        now: &Moment,
    ) -> Result<UseRefused, StoreError> {
        Ok(match self.lease(id)? {
            None => UseRefused::NotFound,
            Some(lease) if lease.run_id != *run => UseRefused::NotFound,
            Some(lease) if !lease.state.is_open() => UseRefused::NotOpen(lease.state),
            Some(lease) if lease.boot_id != now.boot_id => UseRefused::OtherBoot,
            Some(lease) if lease.expires_boot <= now.boot => UseRefused::Expired,
            Some(_) => UseRefused::Exhausted,
        })
    }

    /// Moves an open lease to `state`. Returns whether it was open: a lease that is closed stays as it
    /// was closed.
    #[must_use = "the lease may have been closed before"]
    pub fn set_lease_state(&mut self, id: &LeaseId, state: LeaseState) -> Result<bool, StoreError> {
        let changed = self
            .prepare(
                "UPDATE lease SET state = ?2
                 WHERE lease_id = ?1 AND state IN ('granted', 'consumed')",
            )?
            .execute((id.as_str(), state.as_str()))
            .map_err(self.error())?;
        Ok(changed == 1)
    }

    /// Takes over the open leases and running execs of processes that are gone, killed or cut off by a
    /// reboot. They are this process's from the end of this transaction, so that no other one takes
    /// them too, and are found again if this one dies before it has revoked them at their sources and
    /// closed them with [`Tx::set_lease_state`] and [`Tx::finish_exec`] as interrupted.
    pub fn adopt_orphans(&mut self) -> Result<Orphans, StoreError> {
        let owners: Vec<i64> = self
            .prepare(
                "SELECT owner FROM lease WHERE state IN ('granted', 'consumed')
                 UNION SELECT owner FROM exec WHERE state = 'running'",
            )?
            .query_map([], |row| row.get(0))
            .and_then(Iterator::collect)
            .map_err(self.error())?;
        let mut orphans = Orphans::default();
        for owner in owners {
            let alive = self
                .owner
                .is_alive(OwnerId(owner))
                .map_err(|e| unusable(&self.place.owners, "asked who is alive", e))?;
            if alive {
                continue;
            }
            let leases = self
                .prepare(select!("WHERE owner = ?1 AND state IN ('granted', 'consumed')"))?
                .query_map([owner], read_lease)
                .and_then(Iterator::collect::<rusqlite::Result<Vec<_>>>)
                .map_err(self.error())?;
            orphans.leases.extend(leases);
            orphans.execs.extend(self.running_execs_of(OwnerId(owner))?);
            for adopt in [
                "UPDATE lease SET owner = ?2 WHERE owner = ?1 AND state IN ('granted', 'consumed')",
                "UPDATE exec SET owner = ?2 WHERE owner = ?1 AND state = 'running'",
            ] {
                self.prepare(adopt)?.execute((owner, self.owner.id().0)).map_err(self.error())?;
            }
        }
        Ok(orphans)
    }
}

fn read_lease(row: &Row<'_>) -> rusqlite::Result<LeaseRecord> {
    Ok(LeaseRecord {
        lease_id: parsed(row, 0)?,
        run_id: parsed(row, 1)?,
        request_id: parsed(row, 2)?,
        capability: parsed(row, 3)?,
        audience: parsed(row, 4)?,
        channel: parsed(row, 5)?,
        secret: parsed(row, 6)?,
        issued_at: parsed(row, 7)?,
        expires_at: parsed(row, 8)?,
        expires_boot: Duration::from_nanos(row.get(9)?),
        boot_id: row.get(10)?,
        uses: row.get(11)?,
        uses_left: row.get(12)?,
        state: one_of(row, 13, &LeaseState::ALL, LeaseState::as_str)?,
    })
}
