//! Ends and revocations that could not be recorded when they came, because the trail could not be written then. An
//! exec is over and scrubbed, and its client was told; what a revoked lease delivered is wiped. The trail is told
//! when it can be, and before it takes anything new.
#![forbid(unsafe_code)]

use std::sync::{MutexGuard, PoisonError};

use crate::broker::{Broker, BrokerError, Selection};
use crate::model::event::{Draft, EventType};
use crate::model::exec::ExecState;
use crate::model::id::{ExecId, LeaseId};
use crate::model::lease::{LeaseRecord, LeaseState};
use crate::model::moment::{Moment, timestamp_text};
use crate::model::report::ScrubbedDelivery;
use crate::model::run::Run;
use crate::run::Outcome;
use crate::run::ledger::of_scrubbed;
use crate::store::{Durability, StoreError, Tx};

/// What an end says, kept until it is recorded.
#[derive(Debug, Clone)]
pub(super) struct LateEnd {
    run: Run,
    exec_id: ExecId,
    lease_ids: Vec<LeaseId>,
    exit_status: u8,
    word: &'static str,
    scrubbed: Vec<ScrubbedDelivery>,
    at: jiff::Timestamp,
}

impl LateEnd {
    pub fn of(run: Run, exec_id: ExecId, lease_ids: Vec<LeaseId>, outcome: &Outcome) -> Self {
        Self {
            run,
            exec_id,
            lease_ids,
            exit_status: outcome.exit_status,
            word: outcome.word,
            scrubbed: outcome.report.scrubbed.clone(),
            at: jiff::Timestamp::now(),
        }
    }
}

/// A revocation, kept until it is recorded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct LateRevocation {
    pub which: Selection,
    pub reason: String,
}

impl Broker {
    pub(super) fn keep_revocation(&self, late: LateRevocation) {
        let mut kept = self.late_revocations();
        if !kept.contains(&late) {
            kept.push(late);
        }
    }

    /// Records the revocations that were kept, if any were. Before anything is granted, used or prolonged: when the
    /// trail can be written again, that is the first to be written, once, by whoever comes first.
    ///
    /// # Errors
    /// While the trail still cannot be written. Nothing is lost then.
    pub(super) fn tell_late_revocations(&self) -> Result<(), BrokerError> {
        let mut kept = self.late_revocations();
        if kept.is_empty() {
            return Ok(());
        }
        let now = self.now()?;
        let revoked = self.transaction(Durability::Durable, |tx| {
            kept.iter().try_fold(0, |count, LateRevocation { which, reason }| {
                let revoked = Self::record_revocation(tx, &self.hostname, &now, which, reason)?;
                Ok(count + revoked.len() as u64)
            })
        })?;
        // An exec that had begun before they were kept may have taken its use since.
        kept.iter().for_each(|late| self.take_back(&late.which));
        kept.clear();
        self.metrics.revoked(revoked);
        Ok(())
    }

    /// The lease as it will be once what is kept is recorded: nobody is told otherwise until then.
    pub(super) fn as_revoked(&self, record: LeaseRecord) -> LeaseRecord {
        let kept = self.late_revocations();
        if kept.is_empty() || !record.state.is_open() {
            return record;
        }
        let principal = || self.active().get(&record.run_id).map(|run| run.run.principal.clone());
        let is_meant = kept.iter().any(|late| match &late.which {
            Selection::Lease(id) => *id == record.lease_id,
            Selection::Run(id) => *id == record.run_id,
            Selection::Principal(whose) => principal().as_ref() == Some(whose),
            Selection::All => true,
        });
        match is_meant {
            true => LeaseRecord { state: LeaseState::Revoked, ..record },
            false => record,
        }
    }

    fn late_revocations(&self) -> MutexGuard<'_, Vec<LateRevocation>> {
        self.late_revocations.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn keep_end(&self, end: LateEnd) {
        self.late.lock().unwrap_or_else(PoisonError::into_inner).push(end);
    }

    /// Records what was kept, if anything was.
    ///
    /// # Errors
    /// While the trail still cannot be written. Nothing is lost then.
    pub(super) fn tell_late_ends(&self) -> Result<(), BrokerError> {
        let ends = self.late.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if ends.is_empty() {
            return Ok(());
        }
        let now = self.now()?;
        self.transaction(Durability::Durable, |tx| {
            ends.iter().try_for_each(|end| record(tx, end, &self.hostname, &now))
        })?;
        // Others may have come meanwhile, behind these.
        self.late.lock().unwrap_or_else(PoisonError::into_inner).drain(..ends.len());
        Ok(())
    }

    /// Closes what is recorded as running, and is neither alive nor kept: its thread could not even say that
    /// it did not begin.
    pub(super) fn close_left_execs(&self) -> Result<(), BrokerError> {
        let now = self.now()?;
        self.transaction(Durability::Relaxed, |tx| {
            for exec in tx.own_running_execs()? {
                // Its thread stands among the living until its end is recorded or kept.
                if self.live().contains_key(&exec.exec_id)
                    || !tx.finish_exec(&exec.exec_id, ExecState::Interrupted, None)?
                {
                    continue;
                }
                let mut draft = Draft::new(EventType::ExecExited, now.wall, &self.hostname);
                if let Some(run) = tx.run(&exec.run_id)? {
                    draft = draft.of_run(&run);
                }
                let draft = draft.of_exec(&exec.exec_id, &exec.lease_ids);
                tx.append(draft.because("audit_unavailable").outcome("interrupted"))?;
            }
            Ok(())
        })
    }
}

fn record(tx: &mut Tx<'_>, end: &LateEnd, hostname: &str, now: &Moment) -> Result<(), StoreError> {
    if !tx.finish_exec(&end.exec_id, ExecState::Exited, Some(end.exit_status.into()))? {
        return Ok(());
    }
    let draft = |kind| {
        let draft = Draft::new(kind, now.wall, hostname).of_run(&end.run);
        draft.of_exec(&end.exec_id, &end.lease_ids).with("ended_at", timestamp_text(end.at))
    };
    let exited = draft(EventType::ExecExited).outcome(end.word);
    tx.append(exited.with("exit_status", end.exit_status))?;
    if end.lease_ids.is_empty() {
        return Ok(());
    }
    tx.append(of_scrubbed(draft(EventType::ExecScrubbed), &end.scrubbed))?;
    for id in &end.lease_ids {
        if let Some(lease) = tx.complete_if_spent(id)? {
            let draft = Draft::new(EventType::LeaseCompleted, now.wall, hostname);
            tx.append(draft.of_run(&end.run).of_lease(&lease).outcome("completed"))?;
        }
    }
    Ok(())
}
