//! The exec's leases while the command lives: taken back, renewed, masked in what it prints.
#![forbid(unsafe_code)]

use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;

use super::Attendant;
use crate::launcher::wire::{Notice, Order};
use crate::model::id::{LeaseId, MintId};
use crate::redact::Masks;
use crate::run::error::RunError;
use crate::run::mint;
use crate::run::mint::renew::{self, Renewal};
use crate::run::scene::EXEC;
use crate::sys::clock;

impl Attendant<'_> {
    pub(super) fn index_of(&self, id: &LeaseId) -> Option<usize> {
        self.leased.iter().position(|lease| lease.record.lease_id == *id)
    }

    /// Wiped by us at once, and by the launcher, which kills the exec if the capability says so.
    pub(super) fn revoke(&mut self, index: usize) -> Result<(), RunError> {
        self.wipe(index);
        self.close_endpoint(index);
        self.revoked.insert(index as u32);
        self.session.order(&Order::Revoke { exec: EXEC, delivery: index as u32 })?;
        Ok(())
    }

    /// When the next lease of this exec shall be renewed by itself.
    pub(super) fn next_renewal(&self) -> Option<Duration> {
        if self.ended.is_some() || !self.started {
            return None;
        }
        let of_leases = self.leased.iter().filter_map(|lease| lease.renew_at).min();
        of_leases.into_iter().chain(renew::next(self.ledger)).min()
    }

    pub(super) fn renew_what_is_due(&mut self) -> Result<(), RunError> {
        if self.next_renewal().is_none_or(|at| at > clock::boottime()) {
            return Ok(());
        }
        let asked = renew::ask(self.ledger, self.scene, self.session, self.leased)?;
        for renewal in asked {
            match renewal.question.is_over() {
                true => self.end_renewal(renewal)?,
                false => self.renewing.push(renewal),
            }
        }
        let now = clock::boottime();
        for index in 0..self.leased.len() {
            if self.leased[index].renew_at.is_none_or(|at| at > now) {
                continue;
            }
            if self.ledger.renew(self.scene, &mut self.leased[index])? {
                self.renewed(index)?;
            }
        }
        Ok(())
    }

    /// The launcher speaks of a source: of a renewal, or of a question that was given up.
    pub(super) fn hear_of_renewal(
        &mut self,
        notice: Notice,
        fds: Vec<OwnedFd>,
    ) -> Result<(), RunError> {
        let (Notice::SourceEnded { ticket, .. } | Notice::SourceRefused { ticket, .. }) = notice
        else {
            return Ok(());
        };
        let Some(index) = self.renewing.iter().position(|r| r.question.ticket() == ticket) else {
            return Ok(());
        };
        self.renewing[index].question.hear(notice, fds);
        match self.renewing[index].question.is_over() {
            true => {
                let renewal = self.renewing.swap_remove(index);
                self.end_renewal(renewal)
            }
            false => Ok(()),
        }
    }

    fn end_renewal(&mut self, renewal: Renewal) -> Result<(), RunError> {
        let done = renew::done(self.ledger, self.scene, renewal)?;
        if let Some((lease, until)) = done
            && let Some(index) = self.index_of(&lease)
        {
            self.leased[index].value_until = Some(until);
            self.extend(index)?;
        }
        Ok(())
    }

    /// A lease has more time, and what was minted for it shall have.
    pub(super) fn renewed(&mut self, index: usize) -> Result<(), RunError> {
        let lease = &self.leased[index].record.lease_id;
        renew::follow(self.ledger, &self.scene.host.config, lease)?;
        self.extend(index)
    }

    /// What was minted and has ended by itself is told when it has, not when the exec is over.
    pub(super) fn tell_what_expired(&mut self) {
        if self.expiry_is_untold || self.next_expiry().is_none_or(|at| at > clock::boottime()) {
            return;
        }
        let renewing = &self.renewing;
        let is_renewing = |id: &MintId| renewing.iter().any(|renewal| renewal.mint == *id);
        if let Err(e) = mint::tell_expired(self.ledger, self.scene, is_renewing) {
            // The exec's end tells it.
            self.expiry_is_untold = true;
            eprintln!("sublet: {e}\r");
        }
    }

    /// When the next minted value ends by itself.
    pub(super) fn next_expiry(&self) -> Option<Duration> {
        if self.ended.is_some() || self.expiry_is_untold {
            return None;
        }
        let config = &self.scene.host.config;
        let is_renewing = |id: &MintId| self.renewing.iter().any(|renewal| renewal.mint == *id);
        mint::next_expiry(self.ledger, config, is_renewing)
    }

    /// The delivery of a renewed lease stays for longer.
    fn extend(&self, index: usize) -> Result<(), RunError> {
        let expires = self.leased[index].until();
        let order = Order::Extend { exec: EXEC, delivery: index as u32, expires };
        Ok(self.session.order(&order)?)
    }

    /// Masks every value that this exec was given so far.
    pub(super) fn mask(&mut self) {
        if self.leased.is_empty() {
            return;
        }
        let values = self.given.iter().filter(|g| g.redact).map(|g| Rc::clone(&g.secret));
        let masks = Rc::new(Masks::new(values.collect()));
        self.unmasked = masks.unmasked() as u64;
        for output in &mut self.outputs {
            output.mask(&masks);
        }
    }
}
