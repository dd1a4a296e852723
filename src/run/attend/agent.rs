//! The `ssh` channel while the command lives: certificates are listed, logins are signed, one signature a use.
#![forbid(unsafe_code)]

use super::{Attendant, TOLD_REFUSALS};
use crate::config::SecretSource;
use crate::delivery::ssh::{self, Asked, Connection};
use crate::run::error::RunError;
use crate::run::mint;
use crate::run::ssh::issue;
use crate::store::UseRefused;

impl Attendant<'_> {
    pub(super) fn accept_ssh(&mut self) -> Result<(), RunError> {
        if let Some(listener) = &self.ssh
            && let Some(client) = Connection::accept(listener, self.uid).map_err(RunError::Relay)?
        {
            self.ssh_clients.push(client);
        }
        Ok(())
    }

    /// One of the clients has said something, or is gone.
    pub(super) fn answer_ssh(&mut self, which: usize) -> Result<(), RunError> {
        if which >= self.ssh_clients.len() {
            return Ok(());
        }
        let mut client = self.ssh_clients.swap_remove(which);
        let stays = client.receive();
        loop {
            match client.next() {
                Ok(None) if stays => {
                    self.ssh_clients.push(client);
                    return Ok(());
                }
                // It is gone, or speaks no sense: it is not spoken with any more.
                Ok(None) | Err(()) => return Ok(()),
                Ok(Some(message)) => {
                    let answer = self.ssh_answer(&message)?;
                    if !client.send(&answer) {
                        return Ok(());
                    }
                }
            }
        }
    }

    fn ssh_answer(&mut self, message: &[u8]) -> Result<Vec<u8>, RunError> {
        match ssh::parse(message) {
            Some(Asked::Identities) => {
                self.renew_certificates()?;
                let live = self.identities.iter().filter(|(index, _)| !self.is_over(**index));
                let all: Vec<(&[u8], &str)> = live
                    .map(|(index, identity)| {
                        let id = &self.leased[*index].record.lease_id;
                        (identity.identity.certificate(), id.as_str())
                    })
                    .collect();
                Ok(ssh::identities(all.into_iter()))
            }
            Some(Asked::Sign { key, data }) => self.ssh_sign(key, data),
            // What extends or changes an agent, this one has not.
            Some(Asked::Else) | None => Ok(ssh::refused()),
        }
    }

    fn ssh_sign(&mut self, key: &[u8], data: &[u8]) -> Result<Vec<u8>, RunError> {
        let of_key =
            |identity: &crate::run::ssh::SshIdentity| identity.identity.certificate() == key;
        let Some(index) = self.identities.iter().find(|(_, i)| of_key(i)).map(|(index, _)| *index)
        else {
            return self.refuse_ssh(None, "no certificate of this exec is asked for");
        };
        if self.is_over(index) {
            return self.refuse_ssh(Some(index), "lease_not_active: the lease is over");
        }
        let identity = &self.identities[&index];
        let Some(login) = ssh::login(data, identity.identity.certificate()) else {
            return self.refuse_ssh(Some(index), "what is to be signed is no login over SSH");
        };
        if let Some(why) = identity.objection(login.host_key) {
            return self.refuse_ssh(Some(index), why);
        }
        match self.ledger.take(self.scene, &self.leased[index]) {
            Ok(Ok(())) => *self.uses.entry(index as u32).or_default() += 1,
            Ok(Err(refused)) => {
                let name = match refused {
                    UseRefused::Exhausted => "uses_exhausted",
                    UseRefused::Expired => "lease_expired",
                    UseRefused::NotFound | UseRefused::NotOpen(_) | UseRefused::OtherBoot => {
                        "lease_not_active"
                    }
                };
                let id = &self.leased[index].record.lease_id;
                let why = format!("{name}: lease {id}: {refused}");
                return self.refuse_ssh(Some(index), &why);
            }
            Err(e @ RunError::Trail(_)) => {
                let why = format!("{}: {e}", e.reason());
                return self.refuse_ssh(Some(index), &why);
            }
            Err(e) => return Err(e),
        }
        // While the use was written down.
        if self.is_over(index) {
            return self.refuse_ssh(Some(index), "lease_not_active: it was revoked");
        }
        Ok(self.identities[&index]
            .identity
            .sign(data)
            .map_or_else(ssh::refused, |s| ssh::signed(&s)))
    }

    /// The client hears only that it failed; the trail hears why, a few times.
    fn refuse_ssh(&mut self, index: Option<usize>, why: &str) -> Result<Vec<u8>, RunError> {
        self.refused += 1;
        if self.refused <= TOLD_REFUSALS {
            let lease = index.map(|index| &self.leased[index]);
            match self.ledger.refuse_git(self.scene, lease, why) {
                // Nothing was given.
                Ok(()) | Err(RunError::Trail(_)) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(ssh::refused())
    }

    /// For who lists them: certificates that are soon over, of leases that are not.
    fn renew_certificates(&mut self) -> Result<(), RunError> {
        let now = crate::host::now().map_err(RunError::Clock)?;
        for index in 0..self.leased.len() {
            let lease = &self.leased[index];
            let is_due = self.identities.get(&index).is_some_and(|i| i.is_too_old(lease, now.boot));
            let SecretSource::SshCa(source) = lease.grant.source() else { continue };
            if !is_due || self.is_over(index) {
                continue;
            }
            match issue(self.ledger, self.scene, self.session, lease, source, &now) {
                Ok((identity, fresh)) => {
                    match mint::record(self.ledger, self.scene, self.session, vec![fresh]) {
                        Ok(()) => drop(self.identities.insert(index, identity)),
                        Err(e) => eprintln!("sublet: {e}\r"),
                    }
                }
                Err(e @ RunError::LauncherDied) => return Err(e),
                // The one that is there may still do.
                Err(e) => eprintln!("sublet: {e}\r"),
            }
        }
        Ok(())
    }
}
