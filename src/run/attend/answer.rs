//! The `git` channel while the command lives: one `get` a use, for the one destination of a lease.
#![forbid(unsafe_code)]

use std::io;
use std::rc::Rc;

use super::{Attendant, Given, TOLD_REFUSALS};
use crate::delivery::git::{self, Answer, Asked, Destination, Operation, Request};
use crate::launcher::compile::chain;
use crate::run::caller::Caller;
use crate::run::deliver::Delivery;
use crate::run::entries::Leased;
use crate::run::error::RunError;
use crate::run::value;
use crate::store::UseRefused;

/// How many answers of a lease can still be read: git reads each at once. Of earlier ones nothing is left.
const ANSWERS: usize = 16;

impl Attendant<'_> {
    pub(super) fn answer_git(&mut self) -> Result<(), RunError> {
        let Some(listener) = &self.git else { return Ok(()) };
        let Some(asked) = git::accept(listener, self.uid).map_err(RunError::Relay)? else {
            return Ok(());
        };
        let why = match &asked.request {
            Err(malformed) => malformed.to_string(),
            Ok(request) => match request.operation {
                Operation::Store | Operation::Erase => {
                    asked.swallow();
                    return Ok(());
                }
                Operation::Get => match self.lease_for(request) {
                    None => format!(
                        "no lease of this exec is for {}://{}/{}",
                        request.protocol,
                        request.host,
                        request.path.as_deref().unwrap_or_default()
                    ),
                    Some(index) => match self.take_git_value(index)? {
                        // While it was fetched.
                        Ok(()) if self.caller.is_revoked(&self.leased[index].record.lease_id) => {
                            "lease_not_active: it was revoked".to_owned()
                        }
                        Ok(()) => {
                            self.give(asked, index);
                            return Ok(());
                        }
                        Err(why) => why,
                    },
                },
            },
        };
        self.refused += 1;
        if self.refused <= TOLD_REFUSALS {
            let index = asked.request.as_ref().ok().and_then(|r| self.lease_for(r));
            let lease = index.map(|index| &self.leased[index]);
            match self.ledger.refuse_git(self.scene, lease, &why) {
                // Nothing was given.
                Ok(()) | Err(RunError::Trail(_)) => {}
                Err(e) => return Err(e),
            }
        }
        // A helper that left without waiting for its answer has none.
        drop(asked.refuse(&why));
        Ok(())
    }

    /// Somebody in the exec asks for its AWS credential.
    pub(super) fn answer_endpoint(&mut self) -> Result<(), RunError> {
        let (Some(listener), Some((index, endpoint))) = (&self.asked_at, &mut self.endpoint) else {
            return Ok(());
        };
        // Wiped by whoever revoked it, perhaps while this thread was busy.
        if self.caller.is_revoked(&self.leased[*index].record.lease_id) {
            endpoint.close();
        }
        endpoint.serve(listener).map_err(RunError::Relay)
    }

    /// The lease of this index is over.
    pub(super) fn close_endpoint(&mut self, index: usize) {
        if let Some((of, endpoint)) = &mut self.endpoint
            && *of == index
        {
            endpoint.close();
        }
    }

    /// The use is taken: a helper that left without waiting has spent it.
    fn give(&mut self, asked: Asked, index: usize) {
        let lease = &self.leased[index];
        let username = lease.grant.audience().git_username();
        let value = self.given.last().map(|g| g.secret.expose()).unwrap_or_default();
        let answer = Answer::new(username, value, lease.value_expires().map(|at| at.as_second()));
        let given = asked.lend(&answer).map_err(|e| chain(&e)).and_then(|lent| {
            let memfd = lent.map(|(held, memfd)| {
                // Before anyone can read it.
                self.caller.guard_also(index, &held, ANSWERS);
                if let Delivery::Git { answers, .. } = &mut self.deliveries[index] {
                    answers.push(held);
                    let gone = answers.len().saturating_sub(ANSWERS);
                    answers.drain(..gone);
                }
                memfd
            });
            if self.caller.is_revoked(&lease.record.lease_id) {
                return Err("the lease was revoked".to_owned());
            }
            match asked.answer(&answer, memfd) {
                Err(e) if !has_left(&e) => Err(e.to_string()),
                Ok(()) | Err(_) => Ok(()),
            }
        });
        if let Err(why) = given {
            drop(asked.refuse(&format!("delivery_unavailable: {why}")));
        }
    }

    fn lease_for(&self, request: &Request) -> Option<usize> {
        let is_for = |lease: &Leased| {
            let audience = lease.grant.audience();
            Destination {
                protocol: audience.protocol.as_ref().map_or("https", |p| p.as_str()).to_owned(),
                host: audience.host.to_string(),
                path: audience.path.as_ref().map(|p| p.as_str().to_owned()),
                username: audience.git_username().to_owned(),
            }
            .matches(request)
        };
        self.leased
            .iter()
            .zip(&self.deliveries)
            .position(|(lease, d)| matches!(d, Delivery::Git { .. }) && is_for(lease))
    }

    /// Takes a use, resolves the value and masks it, in this order. `Err` says why there is none.
    fn take_git_value(&mut self, index: usize) -> Result<Result<(), String>, RunError> {
        let lease = &self.leased[index];
        let id = &lease.record.lease_id;
        if self.expired.contains(&(index as u32)) {
            return Ok(Err(format!("lease_expired: lease {id} has expired")));
        }
        if self.revoked.contains(&(index as u32)) {
            return Ok(Err(format!("lease_not_active: lease {id} was revoked")));
        }
        match self.ledger.take(self.scene, lease) {
            Ok(Ok(())) => *self.uses.entry(index as u32).or_default() += 1,
            Ok(Err(refused)) => {
                let name = match refused {
                    UseRefused::Exhausted => "uses_exhausted",
                    UseRefused::Expired => "lease_expired",
                    UseRefused::NotFound | UseRefused::NotOpen(_) | UseRefused::OtherBoot => {
                        "lease_not_active"
                    }
                };
                return Ok(Err(format!("{name}: lease {id}: {refused}")));
            }
            Err(e @ RunError::Trail(_)) => return Ok(Err(format!("{}: {e}", e.reason()))),
            Err(e) => return Err(e),
        }
        // Signals of a process go to the command; a client's exec hears of its end also while it waits here.
        let ear = matches!(self.caller, Caller::Client(_)).then_some(self.caller);
        let resolved = value::resolve(self.ledger, self.scene, self.session, ear, &[lease])
            .and_then(|materials| match materials.into_iter().next() {
                Some(material) => Ok((material.value.into_secret()?, material.until)),
                None => Err(RunError::LauncherDied),
            });
        let mut secret = match resolved {
            Ok((secret, until)) => {
                self.leased[index].value_until = until;
                secret
            }
            Err(e @ RunError::LauncherDied) => return Err(e),
            // The use is spent; what it was revoked for is not waited for.
            Err(RunError::Stopped(why)) => return Ok(Err(format!("lease_not_active: {why}"))),
            Err(e) => return Ok(Err(format!("{}: {e}", e.reason()))),
        };
        // Files end in a newline; a line of the protocol cannot hold one.
        if secret.expose().ends_with(b"\n") {
            secret.truncate(secret.len() - 1);
        }
        if secret.expose().iter().any(|b| matches!(b, 0 | b'\n' | b'\r')) {
            return Ok(Err(
                "delivery_unavailable: the value has a line break or NUL in it".to_owned()
            ));
        }
        let redact = self.leased[index].grant.redact();
        self.given.push(Given { secret: Rc::new(secret), redact });
        if redact {
            self.mask();
        }
        Ok(Ok(()))
    }
}

/// Whether it is the helper that is gone, or takes its time, and no lack of ours.
fn has_left(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, TimedOut, WouldBlock};
    matches!(error.kind(), BrokenPipe | ConnectionReset | TimedOut | WouldBlock)
}
