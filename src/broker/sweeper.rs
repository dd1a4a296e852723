//! The thread for what no one waits for: leases whose time is over are told in the trail (they ended by
//! themselves: expiry is checked at use, and the launcher wipes), the log is kept short, checkpoints are
//! signed.
#![forbid(unsafe_code)]

use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::broker::{Broker, BrokerError};
use crate::model::event::EventType;
use crate::run::entries;
use crate::store::Durability;

/// Between two looks.
const PERIOD: Duration = Duration::from_millis(500);
/// Leases told in one transaction, so that no grant waits long for it.
const BATCH: u32 = 64;
/// Looks between two searches for what other processes left open (each asks the kernel for every owner).
const LOOKS_PER_ADOPTION: u64 = 120;
/// Events between two signed checkpoints.
const EVENTS_PER_CHECKPOINT: u64 = 1000;

impl Broker {
    /// Sweeps until the broker stops.
    pub fn sweep(&self) {
        let mut looks = 0_u64;
        let mut trouble = false;
        while !self.stopped.load(Ordering::Acquire) {
            std::thread::park_timeout(PERIOD);
            looks += 1;
            // Before anything that may wait for the disk: what is over is wiped.
            let tended = self.tend_projections();
            let late = self.tell_late_revocations().and_then(|()| self.tell_late_ends());
            let swept = late.and_then(|()| self.tell_expired()).and_then(|()| {
                if trouble || looks.is_multiple_of(LOOKS_PER_ADOPTION) {
                    self.close_left_execs()?;
                    self.adopt()?;
                }
                Ok(())
            });
            let swept = tended.and(swept).and_then(|()| {
                self.store.tidy()?;
                self.checkpoint(EVENTS_PER_CHECKPOINT)?;
                self.count()
            });
            // Told when it begins and when it ends, not at every look.
            match (swept, trouble) {
                (Err(e), false) => {
                    trouble = true;
                    tracing::error!(error = %e.message(), "the store cannot be written");
                }
                (Ok(()), true) => {
                    trouble = false;
                    tracing::info!("the store can be written again");
                }
                (Ok(()), false) | (Err(_), true) => {}
            }
        }
    }

    fn tell_expired(&self) -> Result<(), BrokerError> {
        loop {
            let now = self.now()?;
            let owner = self.store.owner();
            let next = self.store.read(|view| view.next_expiry(owner))?;
            if next.is_none_or(|at| at > now.boot) {
                return Ok(());
            }
            let told = self.transaction(Durability::Relaxed, |tx| {
                let due = tx.expire_due(&now, BATCH)?;
                Self::tell_ends(tx, &self.hostname, &now, EventType::LeaseExpired, "", due)
            })?;
            if told.len() < BATCH as usize {
                return Ok(());
            }
        }
    }

    fn adopt(&self) -> Result<(), BrokerError> {
        let now = self.now()?;
        self.transaction(Durability::Relaxed, |tx| entries::close_orphans(tx, &self.hostname, &now))
    }

    fn count(&self) -> Result<(), BrokerError> {
        let counts = self.store.read(|view| view.counts())?;
        self.metrics.leases_open(counts.open_leases);
        self.metrics.runs_active(self.active().len() as u64);
        self.metrics.trail(counts.events, self.checkpointed.load(Ordering::Relaxed));
        Ok(())
    }
}
