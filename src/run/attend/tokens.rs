//! Workload identities while the command lives: each token is replaced before it is too old, for as long as
//! its lease lasts.
#![forbid(unsafe_code)]

use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;

use super::{Attendant, Given};
use crate::config::SecretSource;
use crate::delivery::fill::{self, Held};
use crate::launcher::wire::{Order, Refusal};
use crate::model::secret::Secret;
use crate::run::deliver::Delivery;
use crate::run::error::RunError;
use crate::run::identity::{self, Minted, Workload};
use crate::run::mint;
use crate::run::scene::EXEC;
use crate::sys::clock;

/// Between two attempts where a token could not be minted or put in place.
const AGAIN: Duration = Duration::from_secs(15);

/// A token that lives longer than this one by less is not worth the while.
const WORTH: Duration = Duration::from_secs(1);

/// A token that stands in a delivery.
pub struct Token {
    /// Of its lease and delivery.
    pub index: usize,
    expires: Duration,
    due: Duration,
    /// The one before it, which the launcher keeps for as long.
    previous: Option<Held>,
    /// Minted, and waiting for its file.
    next: Option<Minted>,
}

impl Token {
    pub fn new(index: usize, minted: &Minted) -> Self {
        let due = minted.replace_at();
        Self { index, expires: minted.expires, due, previous: None, next: None }
    }

    pub(super) fn wipe_previous(&self) {
        if let Some(previous) = &self.previous {
            previous.wipe();
        }
    }
}

/// How many versions of a token can be read: who opened the one before may go on.
const VERSIONS: usize = 2;

impl Attendant<'_> {
    /// When the next token shall be replaced. One that its lease would not outlive stays as it is.
    pub(super) fn next_replacement(&self) -> Option<Duration> {
        if self.ended.is_some() || !self.started {
            return None;
        }
        let is_due = |token: &&Token| {
            let lease = &self.leased[token.index];
            token.next.is_none()
                && lease.record.expires_boot > token.expires + WORTH
                && !self.is_over(token.index)
        };
        self.tokens.iter().filter(is_due).map(|token| token.due).min()
    }

    pub(super) fn is_over(&self, index: usize) -> bool {
        let delivery = index as u32;
        self.ended.is_some()
            || self.expired.contains(&delivery)
            || self.revoked.contains(&delivery)
            || self.caller.is_revoked(&self.leased[index].record.lease_id)
    }

    pub(super) fn replace_what_is_due(&mut self) -> Result<(), RunError> {
        while let Some(at) = self.next_replacement().filter(|at| *at <= clock::boottime()) {
            let Some(which) = self.tokens.iter().position(|t| t.due == at && t.next.is_none())
            else {
                return Ok(());
            };
            self.replace(which)?;
        }
        Ok(())
    }

    fn replace(&mut self, which: usize) -> Result<(), RunError> {
        let now = crate::host::now().map_err(RunError::Clock)?;
        let index = self.tokens[which].index;
        // Whatever comes of it: it is not tried again at once.
        self.tokens[which].due = now.boot + AGAIN;
        let lease = &self.leased[index];
        let SecretSource::Jwt(jwt) = lease.grant.source() else { return Ok(()) };
        match identity::mint(&Workload::of(self.scene, self.ledger), lease, jwt, &now) {
            Ok((minted, fresh)) => {
                if let Err(e) = mint::record(self.ledger, self.scene, self.session, vec![fresh]) {
                    // Without its record it goes nowhere.
                    eprintln!("sublet: {e}\r");
                    return Ok(());
                }
                self.tokens[which].next = Some(minted);
                let order = Order::Replace { exec: EXEC, delivery: index as u32 };
                Ok(self.session.order(&order)?)
            }
            // The one that stands there is good for some minutes.
            Err(e) => {
                eprintln!("sublet: {e}\r");
                Ok(())
            }
        }
    }

    /// The launcher has made the file for it, or has not.
    pub(super) fn take_replacement(
        &mut self,
        delivery: u32,
        refusal: Option<Refusal>,
        file: Option<OwnedFd>,
    ) -> Result<(), RunError> {
        let index = delivery as usize;
        let Some(which) = self.tokens.iter().position(|token| token.index == index) else {
            return Ok(());
        };
        let (Some(minted), Some(file)) = (self.tokens[which].next.take(), file) else {
            if let Some(refusal) = refusal.filter(|_| !self.is_over(index)) {
                eprintln!("sublet: {refusal}\r");
            }
            return Ok(());
        };
        if self.is_over(index) {
            return Ok(());
        }
        let text = &minted.token;
        let copy = Secret::copy_of(text.expose()).map_err(RunError::Delivery)?;
        let held = fill::with(file, text.len(), |bytes| {
            bytes.copy_from_slice(text.expose());
            Ok::<_, RunError>(())
        })?;
        let lease = &self.leased[index];
        // Masked before anyone can have read it, and wiped by a revocation from now on.
        self.given.push(Given { secret: Rc::new(copy), redact: lease.grant.redact() });
        self.mask();
        self.caller.guard_also(index, &held, VERSIONS);
        let bytes = held.len() as u32;
        let previous = std::mem::replace(&mut self.deliveries[index], Delivery::Held(held));
        let token = &mut self.tokens[which];
        token.previous = match previous {
            Delivery::Held(previous) => Some(previous),
            Delivery::Git { .. } | Delivery::Ssh(_) => None,
        };
        (token.expires, token.due) = (minted.expires, minted.replace_at());
        Ok(self.session.order(&Order::Replaced { exec: EXEC, delivery, bytes })?)
    }
}
