//! Leases: granted, used up one use at a time, closed once.
#![forbid(unsafe_code)]

use std::time::Duration;

use rusqlite::{OptionalExtension, Row};

use crate::model::exec::ExecRecord;
use crate::model::id::{LeaseId, RunId};
use crate::model::lease::{LeaseRecord, LeaseState};
use crate::model::moment::Moment;
use crate::model::name::IdentityName;
use crate::store::error::StoreError;
use crate::store::owner::OwnerId;
use crate::store::place::unusable;
use crate::store::runs::{all_of, nanoseconds, one_of, parsed};
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

/// Why a lease was not given more time. It is as it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RenewRefused {
    #[error("there is no such lease")]
    NotFound,
    #[error("the lease has expired")]
    Expired,
    #[error("the lease is {}", .0.as_str())]
    NotOpen(LeaseState),
    #[error("the lease was granted before the last reboot")]
    OtherBoot,
    #[error("the lease already lasts as long")]
    NoLonger,
}

/// Which leases to list. The default is all.
#[derive(Debug, Clone, Default)]
pub struct LeaseFilter {
    pub run: Option<RunId>,
    pub principal: Option<IdentityName>,
    pub state: Option<LeaseState>,
    pub open_only: bool,
    /// Opened by this process.
    pub owner: Option<OwnerId>,
    /// At most so many: the newest.
    pub limit: Option<u32>,
}

/// Which open leases to revoke.
#[derive(Debug, Clone, Copy)]
pub enum Revoke<'a> {
    Lease(&'a LeaseId),
    Run(&'a RunId),
    Principal(&'a IdentityName),
    All,
}

/// What processes that are gone left open; adopted by this one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Orphans {
    pub leases: Vec<LeaseRecord>,
    pub execs: Vec<ExecRecord>,
}

macro_rules! columns {
    () => {
        "lease_id, run_id, request_id, capability, audience, channel, secret, issued_at, expires_at,
         expires_boot_ns, boot_id, uses, uses_left, state"
    };
}

macro_rules! select {
    ($rest:literal) => {
        concat!("SELECT ", columns!(), " FROM lease ", $rest)
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
        // Spelled out for each filter, so that what there is an index for is found by it.
        let by_index = filter.open_only && filter.run.is_none();
        let conditions = [
            filter.run.is_some().then_some("run_id = ?1"),
            filter
                .principal
                .is_some()
                .then_some("run_id IN (SELECT run_id FROM run WHERE principal = ?2)"),
            filter.state.is_some().then_some("state = ?3"),
            filter.open_only.then_some("state IN ('granted', 'consumed')"),
            filter.owner.is_some().then_some("owner = ?4"),
        ];
        let sql = format!(
            "{} {} WHERE {} ORDER BY lease_id DESC LIMIT ?5",
            select!(""),
            if by_index { "INDEXED BY lease_due" } else { "" },
            all_of(&conditions),
        );
        let mut found: Vec<LeaseRecord> = self
            .prepare(&sql)?
            .query_map(
                (
                    filter.run.as_ref().map(RunId::as_str),
                    filter.principal.as_ref().map(IdentityName::as_str),
                    filter.state.map(LeaseState::as_str),
                    filter.owner.map(|owner| owner.0),
                    filter.limit.map_or(-1, i64::from),
                ),
                read_lease,
            )
            .and_then(Iterator::collect)
            .map_err(self.error())?;
        found.reverse();
        Ok(found)
    }

    /// When the next of the open leases of `owner` expires, on `CLOCK_BOOTTIME`.
    pub fn next_expiry(&self, owner: OwnerId) -> Result<Option<Duration>, StoreError> {
        let next: Option<u64> = self
            .prepare(
                "SELECT min(expires_boot_ns) FROM lease
                 WHERE owner = ?1 AND state IN ('granted', 'consumed')",
            )?
            .query_row([owner.0], |row| row.get(0))
            .map_err(self.error())?;
        Ok(next.map(Duration::from_nanos))
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

    /// Lets an open lease of this boot that has not expired last until `expires_boot`, which is later than it
    /// was to. Returns it as it is then. `expires_at` is what people are shown.
    pub fn renew(
        &mut self,
        id: &LeaseId,
        expires_at: jiff::Timestamp,
        expires_boot: Duration,
        now: &Moment,
    ) -> Result<Result<LeaseRecord, RenewRefused>, StoreError> {
        let changed = self
            .prepare(
                "UPDATE lease SET expires_at = ?2, expires_boot_ns = ?3
                 WHERE lease_id = ?1 AND state IN ('granted', 'consumed')
                   AND boot_id = ?4 AND expires_boot_ns > ?5 AND expires_boot_ns < ?3",
            )?
            .execute((
                id.as_str(),
                expires_at.to_string(),
                nanoseconds(expires_boot),
                &now.boot_id,
                nanoseconds(now.boot),
            ))
            .map_err(self.error())?;
        Ok(match self.lease(id)? {
            Some(lease) if changed == 1 => Ok(lease),
            None => Err(RenewRefused::NotFound),
            Some(lease) if !lease.state.is_open() => Err(RenewRefused::NotOpen(lease.state)),
            Some(lease) if lease.boot_id != now.boot_id => Err(RenewRefused::OtherBoot),
            Some(lease) if lease.expires_boot <= now.boot => Err(RenewRefused::Expired),
            Some(_) => Err(RenewRefused::NoLonger),
        })
    }

    /// Completes a lease that was used and has no use left, unless an exec of this process still runs under
    /// it. Returns it if it was completed now. To be asked after [`Tx::finish_exec`].
    pub fn complete_if_spent(&mut self, id: &LeaseId) -> Result<Option<LeaseRecord>, StoreError> {
        // Ids are letters, digits and `_`, so that they stand in the list as they are.
        self.prepare(concat!(
            "UPDATE lease SET state = 'completed'
             WHERE lease_id = ?1 AND state = 'consumed' AND uses_left = 0
               AND NOT EXISTS (
                   SELECT 1 FROM exec INDEXED BY exec_live
                   WHERE exec.owner = ?2 AND exec.run_id = lease.run_id AND exec.state = 'running'
                     AND instr(exec.lease_ids, '\"' || ?1 || '\"'))
             RETURNING ",
            columns!()
        ))?
        .query_row((id.as_str(), self.owner.id().0), read_lease)
        .optional()
        .map_err(self.error())
    }

    /// Revokes what is open of these and was opened by this process: what another one delivers, only that
    /// one can wipe. Returns each as it was: a consumed one may be in use.
    pub fn revoke(&mut self, which: Revoke<'_>) -> Result<Vec<LeaseRecord>, StoreError> {
        let owner = Some(self.owner.id());
        let ours = LeaseFilter { open_only: true, owner, ..Default::default() };
        let filter = match which {
            Revoke::Lease(id) => match self.lease(id)? {
                Some(lease) => LeaseFilter { run: Some(lease.run_id), ..ours },
                None => return Ok(Vec::new()),
            },
            Revoke::Run(run) => LeaseFilter { run: Some(run.clone()), ..ours },
            Revoke::Principal(principal) => {
                LeaseFilter { principal: Some(principal.clone()), ..ours }
            }
            Revoke::All => ours,
        };
        let mut open = self.leases(&filter)?;
        if let Revoke::Lease(id) = which {
            open.retain(|lease| lease.lease_id == *id);
        }
        self.close_all(open, LeaseState::Revoked)
    }

    /// Marks as expired what this process opened and whose time is over: at most `limit`, the longest
    /// overdue first. Returns each as it was.
    pub fn expire_due(&mut self, now: &Moment, limit: u32) -> Result<Vec<LeaseRecord>, StoreError> {
        let due = self
            .prepare(select!(
                "INDEXED BY lease_due
                 WHERE owner = ?1 AND state IN ('granted', 'consumed') AND expires_boot_ns <= ?2
                   AND boot_id = ?3
                 ORDER BY expires_boot_ns LIMIT ?4"
            ))?
            .query_map((self.owner.id().0, nanoseconds(now.boot), &now.boot_id, limit), read_lease)
            .and_then(Iterator::collect)
            .map_err(self.error())?;
        self.close_all(due, LeaseState::Expired)
    }

    fn close_all(
        &mut self,
        open: Vec<LeaseRecord>,
        state: LeaseState,
    ) -> Result<Vec<LeaseRecord>, StoreError> {
        let mut closed = Vec::with_capacity(open.len());
        for lease in open {
            if self.set_lease_state(&lease.lease_id, state)? {
                closed.push(lease);
            }
        }
        Ok(closed)
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
