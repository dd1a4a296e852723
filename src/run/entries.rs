//! What is written into the trail and beside it, one step a function: the same words for `sublet run` and
//! for the broker. Each runs within the caller's transaction.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::time::Duration;

use super::scene::Scene;
use crate::lease::Lease;
use crate::model::event::{Draft, EventType};
use crate::model::exec::ExecState;
use crate::model::id::{ExecId, LeaseId, RunId};
use crate::model::lease::{LeaseRecord, LeaseState};
use crate::model::moment::Moment;
use crate::model::run::Run;
use crate::model::verdict::{Denial, DenyReason};
use crate::policy::{Grant, Request};
use crate::sandbox::cgroup;
use crate::store::{SealedSecret, StoreError, Tx, UseRefused};

/// Whose doing it is, where and when.
#[derive(Clone, Copy)]
pub struct Who<'a> {
    pub run: &'a Run,
    pub hostname: &'a str,
    pub now: &'a Moment,
}

/// One granted lease: what was granted, and its record.
pub struct Leased {
    pub grant: Grant,
    pub record: LeaseRecord,
    /// For how long it is renewed at a time: as long as it was granted for.
    pub ttl: Duration,
    /// `CLOCK_BOOTTIME` at which it is renewed by itself while its exec lives.
    pub renew_at: Option<Duration>,
    /// `CLOCK_BOOTTIME` at which the value itself ends, where its source has said: no renewal of the lease
    /// changes that.
    pub value_until: Option<Duration>,
    /// Its sealed value as the vault had it when its use was taken, until it is delivered.
    pub at_hand: Option<SealedSecret>,
}

impl Leased {
    pub fn of(grant: Grant, record: LeaseRecord) -> Self {
        // Both clocks were read once, at the grant.
        let ttl = record.expires_at.duration_since(record.issued_at).unsigned_abs();
        Self { grant, record, ttl, renew_at: None, value_until: None, at_hand: None }
    }

    /// `CLOCK_BOOTTIME` at which what was delivered is wiped: the lease's end, or the value's own before.
    pub fn until(&self) -> Duration {
        let expires = self.record.expires_boot;
        self.value_until.map_or(expires, |until| until.min(expires))
    }

    /// The wall clock's time at which the value ends at its source, where that is known.
    pub fn value_expires(&self) -> Option<jiff::Timestamp> {
        let now = crate::host::now().ok()?;
        let left = self.value_until?.saturating_sub(now.boot);
        now.wall.checked_add(jiff::SignedDuration::try_from(left).ok()?).ok()
    }

    /// It was given more time.
    pub fn extend(&mut self, expires_at: jiff::Timestamp, expires_boot: Duration, scene: &Scene) {
        // At the most that it may ever be, there is no next time.
        let has_grown = expires_boot > self.record.expires_boot;
        self.record.expires_at = expires_at;
        self.record.expires_boot = expires_boot;
        self.renew_at = scene.renewal_of(self).filter(|_| has_grown);
    }
}

impl<'a> Who<'a> {
    pub fn draft(&self, kind: EventType) -> Draft {
        Draft::new(kind, self.now.wall, self.hostname).of_run(self.run)
    }

    pub fn of_lease(&self, kind: EventType, lease: &LeaseRecord) -> Draft {
        self.draft(kind).of_lease(lease)
    }

    /// The same at another time.
    pub fn at(self, now: &'a Moment) -> Self {
        Self { now, ..self }
    }
}

/// A denial, before it is told. A run that hammers would fill the disk: past a ceiling one line a minute
/// tells of all.
pub fn record_denial(
    tx: &mut Tx<'_>,
    who: Who<'_>,
    requests: &[Request],
    denial: &Denial,
) -> Result<(), StoreError> {
    let past_ceiling =
        matches!(denial.reason, DenyReason::RateExceededMinute | DenyReason::RateExceededRun);
    let mut aggregated = 0;
    if past_ceiling {
        match tx.note_rate_denial(&who.run.run_id, who.now)? {
            Some(since_the_last) => aggregated = since_the_last,
            None => return Ok(()),
        }
    }
    for request in requests {
        if !past_ceiling {
            tx.count_request(&who.run.run_id, who.now)?;
        }
        tx.append(requested(who, request))?;
        let draft = who
            .draft(EventType::LeaseDenied)
            .because(denial.reason.as_str())
            .outcome("denied")
            .with("message", denial.message.clone());
        let mut draft = of_request(draft, request);
        if request.asked() != denial.asked {
            draft = draft.with("denied_with", denial.asked.clone());
        }
        if aggregated > 0 {
            draft = draft.with("aggregated", aggregated);
        }
        tx.append(draft)?;
    }
    Ok(())
}

/// Requests counted, leases made, under these ids.
pub fn record_grants(
    tx: &mut Tx<'_>,
    who: Who<'_>,
    grants: Vec<Grant>,
    ids: &[LeaseId],
) -> Result<Vec<Leased>, StoreError> {
    for _ in &grants {
        tx.count_request(&who.run.run_id, who.now)?;
    }
    record_grants_of_host(tx, who, grants, ids)
}

/// The same of what the host asks for by itself: a run's ceilings are for what its agent asks.
pub fn record_grants_of_host(
    tx: &mut Tx<'_>,
    who: Who<'_>,
    grants: Vec<Grant>,
    ids: &[LeaseId],
) -> Result<Vec<Leased>, StoreError> {
    let mut leased = Vec::with_capacity(grants.len());
    for (grant, id) in grants.into_iter().zip(ids) {
        let record = Lease::granted(&grant, id.clone(), who.now).into_record();
        tx.append(requested(who, grant.request()))?;
        tx.put_lease(&record)?;
        tx.append(who.of_lease(EventType::LeaseGranted, &record).outcome("granted"))?;
        leased.push(Leased::of(grant, record));
    }
    Ok(leased)
}

/// Takes one use for an exec.
pub fn take_use(
    tx: &mut Tx<'_>,
    who: Who<'_>,
    exec_id: &ExecId,
    lease: &LeaseRecord,
) -> Result<Result<(), UseRefused>, StoreError> {
    match tx.consume(&who.run.run_id, &lease.lease_id, who.now)? {
        Err(refused) => Ok(Err(refused)),
        Ok(left) => {
            let ids = [lease.lease_id.clone()];
            let draft = who.of_lease(EventType::LeaseConsumed, lease).of_exec(exec_id, &ids);
            tx.append(draft.with("uses_left", left))?;
            Ok(Ok(()))
        }
    }
}

/// What processes that are dead left open is closed as interrupted.
pub fn close_orphans(tx: &mut Tx<'_>, hostname: &str, now: &Moment) -> Result<(), StoreError> {
    let orphans = tx.adopt_orphans()?;
    let mut runs: BTreeMap<RunId, Option<Run>> = BTreeMap::new();
    let mut draft = |tx: &Tx<'_>, kind, run_id: &RunId| -> Result<Draft, StoreError> {
        let run = match runs.get(run_id) {
            Some(run) => run,
            None => runs.entry(run_id.clone()).or_insert(tx.run(run_id)?),
        };
        let draft = Draft::new(kind, now.wall, hostname).outcome("interrupted");
        Ok(match run {
            Some(run) => draft.of_run(run),
            None => draft,
        })
    };
    for exec in &orphans.execs {
        // Both of its keepers were killed; the directory outlived its last process.
        cgroup::remove_left(&exec.exec_id);
        if tx.finish_exec(&exec.exec_id, ExecState::Interrupted, None)? {
            let draft = draft(tx, EventType::ExecExited, &exec.run_id)?;
            tx.append(draft.of_exec(&exec.exec_id, &exec.lease_ids))?;
        }
    }
    for lease in &orphans.leases {
        if tx.set_lease_state(&lease.lease_id, LeaseState::Interrupted)? {
            let draft = draft(tx, EventType::LeaseInterrupted, &lease.run_id)?;
            tx.append(draft.of_lease(lease))?;
        }
    }
    Ok(())
}

pub fn start_run(tx: &mut Tx<'_>, who: Who<'_>) -> Result<(), StoreError> {
    tx.put_run(who.run)?;
    let draft = who
        .draft(EventType::RunStarted)
        .with("profile", who.run.profile.clone())
        .with("workspace", who.run.workspace.display().to_string());
    tx.append(draft).map(drop)
}

/// Returns whether it was active until now.
pub fn end_run(tx: &mut Tx<'_>, who: Who<'_>) -> Result<bool, StoreError> {
    let ended = tx.end_run(&who.run.run_id)?;
    if ended {
        tx.append(who.draft(EventType::RunEnded))?;
    }
    Ok(ended)
}

fn requested(who: Who<'_>, request: &Request) -> Draft {
    of_request(who.draft(EventType::LeaseRequested), request)
}

fn of_request(draft: Draft, request: &Request) -> Draft {
    let mut draft = draft.of_request(&request.request_id);
    draft.capability = Some(request.capability.clone());
    draft.audience = Some(request.audience.clone());
    draft.channel = request.channel;
    if draft.reason.is_none()
        && let Some(reason) = &request.reason
    {
        draft = draft.because(reason.as_str());
    }
    draft
}
