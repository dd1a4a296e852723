//! The life of a lease: `granted → consumed → completed | expired | revoked`, `interrupted` when its host
//! died. A grant and a moment go in, a [`LeaseRecord`] comes out and is changed only by the steps here.
//!
//! Pure: the store makes a step durable, and does so before its effect. Expiry is `CLOCK_BOOTTIME` under
//! one boot id; the wall clock is for people and never compared.
//!
//! - [`view`]: a lease as JSON, for the agent
#![forbid(unsafe_code)]

pub mod view;

pub use view::{DeliveryView, LeaseView};

use std::time::Duration;

use crate::model::id::LeaseId;
use crate::model::lease::{LeaseRecord, LeaseState};
use crate::model::moment::Moment;
use crate::policy::Grant;

/// A lease, as far as it has come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    record: LeaseRecord,
}

/// The lease cannot be used now. Nothing was taken from it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UseError {
    #[error("lease {lease_id} expired {} s ago", late.as_secs())]
    Expired { lease_id: LeaseId, late: Duration },
    #[error("lease {lease_id} has been used as often as was granted ({uses})")]
    Exhausted { lease_id: LeaseId, uses: u32 },
    #[error("lease {lease_id} is {}", state.as_str())]
    WrongState { lease_id: LeaseId, state: LeaseState },
    #[error("lease {lease_id} was granted before this machine was started")]
    OtherBoot { lease_id: LeaseId },
}

/// The lease cannot end so.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EndError {
    #[error("lease {lease_id} is {} and cannot become {}", from.as_str(), to.as_str())]
    WrongState { lease_id: LeaseId, from: LeaseState, to: LeaseState },
    #[error("lease {lease_id} has not expired: {} s are left", left.as_secs())]
    NotExpired { lease_id: LeaseId, left: Duration },
}

/// The lease gets no more time. It lasts as long as it did.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RenewError {
    #[error("lease {lease_id} is {}", state.as_str())]
    WrongState { lease_id: LeaseId, state: LeaseState },
    #[error("lease {lease_id} was granted before this machine was started")]
    OtherBoot { lease_id: LeaseId },
    #[error("lease {lease_id} expired {} s ago", late.as_secs())]
    Expired { lease_id: LeaseId, late: Duration },
    #[error("lease {lease_id} already lasts the {} s that it may last in all", max_ttl.as_secs())]
    AtMaximum { lease_id: LeaseId, max_ttl: Duration },
    #[error("lease {lease_id} lasts {} s more, which is no less than asked for", left.as_secs())]
    NoLonger { lease_id: LeaseId, left: Duration },
}

impl Lease {
    /// What was granted, from `now` on.
    pub fn granted(grant: &Grant, lease_id: LeaseId, now: &Moment) -> Self {
        let request = grant.request();
        let ttl = grant.ttl().0;
        Self {
            record: LeaseRecord {
                lease_id,
                run_id: request.run_id.clone(),
                request_id: request.request_id.clone(),
                capability: request.capability.clone(),
                audience: request.audience.clone(),
                channel: grant.channel(),
                secret: grant.secret().clone(),
                issued_at: now.wall,
                // Only shown: a wall clock near the end of time must not refuse a lease.
                expires_at: now.wall.saturating_add(ttl).unwrap_or(jiff::Timestamp::MAX),
                expires_boot: now.boot.saturating_add(ttl),
                boot_id: now.boot_id.clone(),
                uses: grant.uses().get(),
                uses_left: grant.uses().get(),
                state: LeaseState::Granted,
            },
        }
    }

    /// A lease as the store has it.
    pub fn recorded(record: LeaseRecord) -> Self {
        Self { record }
    }

    pub fn record(&self) -> &LeaseRecord {
        &self.record
    }

    pub fn into_record(self) -> LeaseRecord {
        self.record
    }

    /// Takes one use. The caller makes it durable before the value moves.
    ///
    /// # Errors
    /// If the lease has ended, was granted under another boot, is past its time (which is decided here,
    /// whether or not a sweeper has marked it), or has no use left. It is then unchanged.
    pub fn consume(&mut self, now: &Moment) -> Result<(), UseError> {
        let record = &mut self.record;
        let lease_id = || record.lease_id.clone();
        let is_of_this_boot = record.boot_id == now.boot_id;
        let has_expired = || {
            let late = now.boot.saturating_sub(record.expires_boot);
            Err(UseError::Expired { lease_id: lease_id(), late })
        };
        // The same words whether or not the sweeper was here before.
        if record.state == LeaseState::Expired && is_of_this_boot {
            return has_expired();
        }
        if !record.state.is_open() {
            return Err(UseError::WrongState { lease_id: lease_id(), state: record.state });
        }
        if !is_of_this_boot {
            return Err(UseError::OtherBoot { lease_id: lease_id() });
        }
        if is_expired(record, now) {
            return has_expired();
        }
        let Some(left) = record.uses_left.checked_sub(1) else {
            return Err(UseError::Exhausted { lease_id: lease_id(), uses: record.uses });
        };
        record.uses_left = left;
        record.state = LeaseState::Consumed;
        Ok(())
    }

    /// Gives it `ttl` from `now` on, but no more than `max_ttl` from its grant. The caller makes it durable.
    /// That the capability is renewable is the caller's to know.
    ///
    /// # Errors
    /// If the lease has ended, is past its time or of another boot, or would not last longer than it does.
    /// It is then unchanged.
    pub fn renew(
        &mut self,
        ttl: Duration,
        max_ttl: Duration,
        now: &Moment,
    ) -> Result<(), RenewError> {
        let record = &mut self.record;
        let lease_id = || record.lease_id.clone();
        if !record.state.is_open() {
            return Err(RenewError::WrongState { lease_id: lease_id(), state: record.state });
        }
        if record.boot_id != now.boot_id {
            return Err(RenewError::OtherBoot { lease_id: lease_id() });
        }
        if is_expired(record, now) {
            let late = now.boot.saturating_sub(record.expires_boot);
            return Err(RenewError::Expired { lease_id: lease_id(), late });
        }
        // Both clocks were read once, at the grant, and both ends are moved alike.
        let lifetime = record.expires_at.duration_since(record.issued_at).unsigned_abs();
        let issued_boot = record.expires_boot.saturating_sub(lifetime);
        let latest = issued_boot.saturating_add(max_ttl);
        // What is shown has come to the end of time, and no longer says when the grant was.
        let is_endless = record.expires_at == jiff::Timestamp::MAX;
        if latest <= record.expires_boot || is_endless {
            return Err(RenewError::AtMaximum { lease_id: lease_id(), max_ttl });
        }
        let expires_boot = now.boot.saturating_add(ttl).min(latest);
        if expires_boot <= record.expires_boot {
            let left = remaining(record, now);
            return Err(RenewError::NoLonger { lease_id: lease_id(), left });
        }
        record.expires_boot = expires_boot;
        record.expires_at = record
            .issued_at
            .saturating_add(expires_boot.saturating_sub(issued_boot))
            .unwrap_or(jiff::Timestamp::MAX);
        Ok(())
    }

    /// Its exec is over, or its uses are spent.
    ///
    /// # Errors
    /// Unless it is consumed.
    pub fn complete(&mut self) -> Result<(), EndError> {
        self.end(LeaseState::Completed, |from| from == LeaseState::Consumed)
    }

    /// Its time is over.
    ///
    /// # Errors
    /// If it is not, or the lease has ended.
    pub fn expire(&mut self, now: &Moment) -> Result<(), EndError> {
        if self.record.state.is_open() && !is_expired(&self.record, now) {
            let left = remaining(&self.record, now);
            return Err(EndError::NotExpired { lease_id: self.record.lease_id.clone(), left });
        }
        self.end(LeaseState::Expired, LeaseState::is_open)
    }

    /// Someone took it back.
    ///
    /// # Errors
    /// If it has ended.
    pub fn revoke(&mut self) -> Result<(), EndError> {
        self.end(LeaseState::Revoked, LeaseState::is_open)
    }

    /// The host, or the whole of sublet, died under it.
    ///
    /// # Errors
    /// If it has ended.
    pub fn interrupt(&mut self) -> Result<(), EndError> {
        self.end(LeaseState::Interrupted, LeaseState::is_open)
    }

    fn end(&mut self, to: LeaseState, from: fn(LeaseState) -> bool) -> Result<(), EndError> {
        let record = &mut self.record;
        if !from(record.state) {
            let lease_id = record.lease_id.clone();
            return Err(EndError::WrongState { lease_id, from: record.state, to });
        }
        record.state = to;
        Ok(())
    }
}

/// Past its time, or granted under another boot, whose clock means nothing now. Says nothing of the state.
pub fn is_expired(record: &LeaseRecord, now: &Moment) -> bool {
    remaining(record, now).is_zero()
}

/// What is left of its time: zero once expired and under another boot. Says nothing of the state.
pub fn remaining(record: &LeaseRecord, now: &Moment) -> Duration {
    if record.boot_id == now.boot_id {
        record.expires_boot.saturating_sub(now.boot)
    } else {
        Duration::ZERO
    }
}

/// Whether a lease that is in use should be renewed now: open, in time, and with no more than
/// `renew_before_expiry` left. That must be less than a renewal gives, or it is due again at once.
pub fn renewal_due(record: &LeaseRecord, now: &Moment, renew_before_expiry: Duration) -> bool {
    record.state.is_open()
        && !is_expired(record, now)
        && remaining(record, now) <= renew_before_expiry
}

#[cfg(test)]
mod tests;
