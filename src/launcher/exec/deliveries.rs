//! The deliveries of one exec in the launcher: their containers, which the broker fills, when each expires,
//! and their wiping. Never reads a value.
#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Duration;

use super::make::delivery_unavailable;
use super::refuse;
use super::sandbox::Sandbox;
use crate::delivery::container::{ContainerError, Empty, Filled, Owner, SecretsMount};
use crate::delivery::{git, ssh};
use crate::launcher::compile;
use crate::launcher::wire::{DeliverySpec, FilledSpec, Refusal, RefusalKind};
use crate::model::name::Channel;
use crate::profile::identity::IdentityKind;

/// In the order of their leases.
pub struct Deliveries {
    each: Vec<Delivery>,
    owner: Owner,
    /// Where the next version of a token is made.
    tokens: Option<SecretsMount>,
    /// Of their memory.
    never_swaps: bool,
}

enum Delivery {
    /// Of a token, whose libraries read it.
    Empty(Empty, Option<IdentityKind>),
    Filled {
        filled: Filled,
        expires: Duration,
        kill: bool,
        token: Option<Versions>,
    },
    /// The value stays with the broker, which answers on the socket of git's helper or of an SSH agent.
    Socket {
        expires: Option<Duration>,
        kill: bool,
    },
    Gone,
}

/// Of a token that is replaced while the exec lives.
struct Versions {
    kind: IdentityKind,
    /// What the broker is filling.
    next: Option<Empty>,
    /// What stood there before: whoever was reading it may go on until the one after it comes.
    previous: Option<Filled>,
}

impl Versions {
    /// Those beside the one that stands there.
    fn wipe_others(&mut self) {
        if let Some(previous) = &mut self.previous {
            previous.wipe();
        }
        if let Some(next) = &self.next {
            next.wipe();
        }
    }
}

impl Delivery {
    /// Its value, if it has one that is not wiped, or has begun to get one.
    fn wipe(&mut self) {
        match self {
            Delivery::Empty(empty, _) => empty.wipe(),
            Delivery::Filled { filled, token, .. } => {
                filled.wipe();
                if let Some(token) = token {
                    token.wipe_others();
                }
            }
            Delivery::Socket { .. } | Delivery::Gone => {}
        }
    }

    /// When what it still gives away expires.
    fn expiry(&self) -> Option<Duration> {
        match self {
            Delivery::Filled { filled, expires, .. } => (!filled.is_wiped()).then_some(*expires),
            Delivery::Socket { expires, .. } => *expires,
            Delivery::Empty(..) | Delivery::Gone => None,
        }
    }
}

impl Deliveries {
    /// Containers for a sandbox that stands, and the broker's ends of them.
    pub(super) fn make(
        specs: &[DeliverySpec],
        sandbox: &Sandbox,
    ) -> Result<(Self, Vec<OwnedFd>), Refusal> {
        let (owner, root, secrets) = (sandbox.owner(), sandbox.root()?, sandbox.secrets.as_ref());
        let (mut git_socket, mut ssh_socket): (Option<OwnedFd>, Option<OwnedFd>) = (None, None);
        let mut each = Vec::new();
        let mut ends = Vec::new();
        for spec in specs {
            let empty = match (spec.channel, secrets) {
                (Channel::Memfd | Channel::Env, _) => Empty::memfd(owner),
                (Channel::File, Some(secrets)) => secrets.file(&spec.variable, owner),
                (Channel::File, None) => {
                    return Err(refuse(
                        "no capability of the profile has the channel `file`".into(),
                        "name it in `channels`",
                    ));
                }
                (Channel::Token, secrets) => {
                    let (Some(secrets), Some(token)) = (secrets, &spec.token) else {
                        return Err(refuse(
                            "no capability of the profile has the channel `token`".into(),
                            "name it in `channels`",
                        ));
                    };
                    secrets.token(token.kind, token.document.as_deref(), owner)
                }
                (Channel::Git | Channel::Ssh, _) => {
                    let (socket, listen): (_, fn(BorrowedFd<'_>, _) -> _) = match spec.channel {
                        Channel::Ssh => (&mut ssh_socket, ssh::listen),
                        _ => (&mut git_socket, git::listen),
                    };
                    let listener = match &*socket {
                        Some(socket) => socket.try_clone(),
                        None => listen(root, (owner.uid, owner.gid)),
                    }
                    .map_err(|e: io::Error| delivery_unavailable(&e))?;
                    ends.push(listener.try_clone().map_err(|e| delivery_unavailable(&e))?);
                    *socket = Some(listener);
                    each.push(Delivery::Socket { expires: None, kill: false });
                    continue;
                }
            }
            .map_err(|e| delivery_unavailable(&e))?;
            ends.push(empty.fd().try_clone_to_owned().map_err(|e| delivery_unavailable(&e))?);
            each.push(Delivery::Empty(empty, spec.token.as_ref().map(|token| token.kind)));
        }
        let tokens = match secrets {
            Some(secrets) if specs.iter().any(|spec| spec.token.is_some()) => {
                Some(secrets.again().map_err(|e| delivery_unavailable(&e))?)
            }
            _ => None,
        };
        let is_file = |spec: &DeliverySpec| matches!(spec.channel, Channel::File | Channel::Token);
        let swaps = secrets.is_some_and(|s| !s.never_swaps) && specs.iter().any(is_file);
        Ok((Self { each, owner, tokens, never_swaps: !swaps }, ends))
    }

    /// Whether no memory of theirs is ever swapped out; none where there are no deliveries.
    pub fn never_swaps(&self) -> Option<bool> {
        (!self.each.is_empty()).then_some(self.never_swaps)
    }

    pub(super) fn len(&self) -> usize {
        self.each.len()
    }

    /// The broker has filled them: locks and seals each. What the command gets of those that are
    /// descriptors, read-only.
    pub(super) fn close(&mut self, specs: &[FilledSpec]) -> Result<Vec<OwnedFd>, Refusal> {
        let mut readers = Vec::new();
        for (delivery, spec) in self.each.iter_mut().zip(specs) {
            *delivery = match std::mem::replace(delivery, Delivery::Gone) {
                Delivery::Empty(empty, kind) => {
                    let (filled, reader) =
                        empty.close(spec.bytes as usize).map_err(|e| Refusal {
                            kind: RefusalKind::DeliveryUnavailable,
                            message: compile::chain(&e),
                            hint: "free locked memory (RLIMIT_MEMLOCK) or lease less in one exec"
                                .to_owned(),
                        })?;
                    readers.extend(reader);
                    let token = kind.map(|kind| Versions { kind, next: None, previous: None });
                    Delivery::Filled { filled, expires: spec.expires, kill: spec.kill, token }
                }
                Delivery::Socket { .. } => {
                    Delivery::Socket { expires: Some(spec.expires), kill: spec.kill }
                }
                other => other,
            };
        }
        Ok(readers)
    }

    /// A renewed lease: its delivery stays for longer. One that was wiped stays wiped.
    pub fn extend(&mut self, delivery: usize, until: Duration) {
        match self.each.get_mut(delivery) {
            Some(Delivery::Filled { filled, expires, .. }) if !filled.is_wiped() => {
                *expires = until.max(*expires);
            }
            Some(Delivery::Socket { expires: Some(expires), .. }) => *expires = until.max(*expires),
            Some(_) | None => {}
        }
    }

    /// Wipes one. Whether its lease was granted so that the exec is killed then.
    #[must_use]
    pub(super) fn revoke(&mut self, delivery: usize) -> bool {
        let Some(delivery) = self.each.get_mut(delivery) else { return false };
        delivery.wipe();
        match delivery {
            Delivery::Filled { kill, .. } => *kill,
            Delivery::Socket { kill, expires } => {
                *expires = None;
                *kill
            }
            Delivery::Empty(..) | Delivery::Gone => false,
        }
    }

    pub(super) fn wipe(&mut self) {
        self.each.iter_mut().for_each(Delivery::wipe);
    }

    /// Of each: its bytes, and whether they were wiped.
    pub(super) fn scrubbed(&self) -> Vec<(u64, bool)> {
        let told = |delivery: &Delivery| match delivery {
            Delivery::Filled { filled, .. } => (filled.bytes(), filled.is_wiped()),
            Delivery::Empty(..) | Delivery::Socket { .. } | Delivery::Gone => (0, true),
        };
        self.each.iter().map(told).collect()
    }

    /// When the next one expires.
    pub(super) fn next_expiry(&self) -> Option<Duration> {
        self.each.iter().filter_map(Delivery::expiry).min()
    }

    /// Those that have expired.
    pub(super) fn due(&self, now: Duration) -> Vec<usize> {
        let is_due = |delivery: &Delivery| delivery.expiry().is_some_and(|at| at <= now);
        let due = self.each.iter().enumerate().filter(|(_, delivery)| is_due(delivery));
        due.map(|(index, _)| index).collect()
    }

    /// An empty file for the next version of a token; its descriptor is the broker's to fill.
    pub fn replace(&mut self, delivery: usize) -> Result<OwnedFd, Refusal> {
        match (self.each.get_mut(delivery), &self.tokens) {
            (Some(Delivery::Filled { filled, token: Some(token), .. }), Some(mount))
                if !filled.is_wiped() =>
            {
                let next = mount
                    .next_token(token.kind, self.owner)
                    .map_err(|e| delivery_unavailable(&e))?;
                let fd = next.fd().try_clone_to_owned().map_err(|e| delivery_unavailable(&e))?;
                if let Some(given_up) = token.next.replace(next) {
                    given_up.wipe();
                }
                Ok(fd)
            }
            _ => Err(Refusal {
                kind: RefusalKind::DeliveryUnavailable,
                message: "there is no token to replace any more".to_owned(),
                hint: String::new(),
            }),
        }
    }

    /// The next version is filled: it takes the token's place. Where that cannot be, the one that stands
    /// there stays, and the new one is wiped.
    pub fn put_replacement(&mut self, delivery: usize, bytes: usize) -> Result<(), ContainerError> {
        let Some(Delivery::Filled { filled, token: Some(token), .. }) = self.each.get_mut(delivery)
        else {
            return Ok(());
        };
        let (Some(next), Some(mount)) = (token.next.take(), &self.tokens) else { return Ok(()) };
        let (mut next, _) = next.close(bytes)?;
        // It may have been revoked, or have expired, while the broker filled.
        if filled.is_wiped() {
            next.wipe();
            return Ok(());
        }
        if let Err(e) = mount.put_token(token.kind) {
            next.wipe();
            return Err(e);
        }
        let mut before = token.previous.replace(std::mem::replace(filled, next));
        if let Some(before) = &mut before {
            before.wipe();
        }
        Ok(())
    }
}
