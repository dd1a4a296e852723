//! What the broker tells a living exec from another thread: a revocation, an order to end. An
//! eventfd wakes the exec's poll. What a revocation wipes is wiped by who sends it: when it is sent, nothing
//! is readable, whatever the exec's thread is waiting for.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;

use super::error::RunError;
use super::scene::EXEC;
use crate::delivery::fill::Wiper;
use crate::launcher::client::Hand;
use crate::launcher::wire::Order;
use crate::model::id::LeaseId;

/// One message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mail {
    /// The lease was taken back: wipe its delivery now.
    Revoke(LeaseId),
    /// All of them.
    RevokeAll,
    /// The lease was given more time.
    Renewed { lease: LeaseId, expires_at: jiff::Timestamp, expires_boot: Duration },
    /// End the exec, for this reason.
    Kill(&'static str),
    /// The launcher is gone, and with it the exec.
    LauncherDied,
    /// The exec may read from its client, which has said this already.
    ReadAhead(Vec<u8>),
    /// The client left before that.
    ClientGone,
}

/// Both ends are one and the same: whoever has it can send, the exec's thread takes.
#[derive(Debug, Clone)]
pub struct Mailbox(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    inbox: Mutex<Inbox>,
    event: OwnedFd,
}

#[derive(Debug, Default)]
struct Inbox {
    queue: VecDeque<Mail>,
    guarded: Option<Guarded>,
    revoked: Revoked,
}

/// What a revocation does at once, from the thread that sends it: the exec's own may be busy.
#[derive(Debug)]
pub struct Guarded {
    pub launcher: Hand,
    /// In the order of the deliveries; nothing to wipe on `git` before its first answer.
    pub leases: Vec<(LeaseId, Vec<Wiper>)>,
}

impl Guarded {
    fn revoke(&self, revoked: &Revoked) {
        for ((id, wipers), delivery) in self.leases.iter().zip(0..) {
            if revoked.has(id) {
                wipers.iter().for_each(Wiper::wipe);
                self.order(&Order::Revoke { exec: EXEC, delivery });
            }
        }
    }

    /// A launcher that is gone has ended the exec; the exec's thread gives the order again.
    fn order(&self, order: &Order) {
        if let Err(e) = self.launcher.order(order) {
            tracing::debug!(error = %e, "could not order the launcher at once");
        }
    }
}

/// Kept after the mail was taken.
#[derive(Debug, Default)]
struct Revoked {
    some: Vec<LeaseId>,
    all: bool,
}

impl Revoked {
    fn note(&mut self, mail: &Mail) {
        match mail {
            Mail::Revoke(id) => self.some.push(id.clone()),
            Mail::RevokeAll => self.all = true,
            Mail::Renewed { .. }
            | Mail::Kill(_)
            | Mail::LauncherDied
            | Mail::ReadAhead(_)
            | Mail::ClientGone => {}
        }
    }

    fn has(&self, id: &LeaseId) -> bool {
        self.all || self.some.contains(id)
    }
}

impl Mailbox {
    pub fn new() -> io::Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self(Arc::new(Shared { inbox: Mutex::default(), event })))
    }

    pub fn send(&self, mail: Mail) -> io::Result<()> {
        let mut inbox = self.inbox();
        inbox.revoked.note(&mail);
        match (&inbox.guarded, &mail) {
            (Some(guarded), Mail::Revoke(_) | Mail::RevokeAll) => guarded.revoke(&inbox.revoked),
            (Some(guarded), Mail::Kill(_) | Mail::ClientGone) => {
                guarded.order(&Order::Kill { exec: EXEC });
            }
            (Some(_), Mail::Renewed { .. } | Mail::LauncherDied | Mail::ReadAhead(_))
            | (None, _) => {}
        }
        inbox.queue.push_back(mail);
        drop(inbox);
        match rustix::io::write(&self.0.event, &1_u64.to_ne_bytes()) {
            // Full counts: it wakes all the same.
            Ok(_) | Err(Errno::AGAIN) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    /// From now on a revocation of one of these wipes it. One that came before has done so when this returns.
    pub fn guard(&self, guarded: Guarded) {
        let mut inbox = self.inbox();
        guarded.revoke(&inbox.revoked);
        inbox.guarded = Some(guarded);
    }

    /// A delivery has a further version, before anyone can read it: a revocation wipes it too, and those before
    /// it, `most` in all: the earlier ones are gone by then. One that has come already has done so when this
    /// returns.
    pub fn guard_also(&self, delivery: usize, wiper: Wiper, most: usize) {
        let mut inbox = self.inbox();
        let Inbox { guarded, revoked, .. } = &mut *inbox;
        let Some((id, wipers)) = guarded.as_mut().and_then(|g| g.leases.get_mut(delivery)) else {
            return;
        };
        if revoked.has(id) {
            wiper.wipe();
        }
        wipers.push(wiper);
        let gone = wipers.len().saturating_sub(most);
        wipers.drain(..gone);
    }

    /// Whether the lease was taken back, whether or not its mail was taken.
    pub fn is_revoked(&self, id: &LeaseId) -> bool {
        self.inbox().revoked.has(id)
    }

    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.0.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Readable while there is mail.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.0.event.as_fd()
    }

    /// Everything that has come.
    pub fn take(&self) -> io::Result<VecDeque<Mail>> {
        match rustix::io::read(&self.0.event, &mut [0; 8]) {
            Ok(_) | Err(Errno::AGAIN | Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
        Ok(std::mem::take(&mut self.inbox().queue))
    }

    /// Why the exec shall end, if it shall. Takes nothing.
    pub fn killed(&self) -> Option<RunError> {
        self.inbox().queue.iter().find_map(|mail| match mail {
            Mail::Kill(why) => Some(RunError::Stopped(why)),
            Mail::Revoke(_) | Mail::RevokeAll => {
                Some(RunError::Stopped("a lease of it was revoked"))
            }
            Mail::LauncherDied => Some(RunError::LauncherDied),
            Mail::ClientGone => Some(RunError::CallerGone),
            Mail::Renewed { .. } | Mail::ReadAhead(_) => None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mail_wakes_and_is_taken_once() {
        let mailbox = Mailbox::new().unwrap();
        assert!(mailbox.take().unwrap().is_empty());
        assert!(mailbox.killed().is_none());
        let id = LeaseId::fresh();
        mailbox.clone().send(Mail::Kill("draining")).unwrap();
        mailbox.send(Mail::Revoke(id.clone())).unwrap();
        assert!(matches!(mailbox.killed(), Some(RunError::Stopped("draining"))));
        assert_eq!(mailbox.take().unwrap(), [Mail::Kill("draining"), Mail::Revoke(id)]);
        assert!(mailbox.take().unwrap().is_empty());
    }

    #[test]
    fn a_revocation_wipes_before_it_is_read_and_whatever_comes_later() {
        use crate::delivery::fill;
        use crate::launcher::wire;
        let held = || {
            let fd = rustix::fs::memfd_create(c"t", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
            fill::write(fd, &[b"value"]).unwrap()
        };
        let mailbox = Mailbox::new().unwrap();
        let [a, b] = [LeaseId::fresh(), LeaseId::fresh()];
        let [first, second, late] = [held(), held(), held()];
        let (launcher, ours) = crate::sys::socket::packet_pair().unwrap();
        let guard = |leases: Vec<(LeaseId, Option<Wiper>)>| {
            let launcher = Hand::from(ours.try_clone().unwrap());
            let leases = leases
                .into_iter()
                .map(|(id, wiper): (LeaseId, Option<Wiper>)| (id, wiper.into_iter().collect()));
            mailbox.guard(Guarded { launcher, leases: leases.collect() });
        };
        let told = || wire::receive::<Order>(launcher.as_fd()).unwrap().0;
        guard(vec![(a.clone(), first.wiper()), (b.clone(), second.wiper())]);
        mailbox.send(Mail::Revoke(a.clone())).unwrap();
        assert!(matches!(told(), Order::Revoke { exec: EXEC, delivery: 0 }));
        assert_eq!(first.expose().bytes(), [0; 5]);
        assert_eq!(second.expose().bytes(), b"value");
        assert!(mailbox.is_revoked(&a) && !mailbox.is_revoked(&b));
        mailbox.take().unwrap();
        guard(vec![(b.clone(), second.wiper()), (a.clone(), late.wiper())]);
        assert_eq!(late.expose().bytes(), [0; 5]);
        assert!(matches!(told(), Order::Revoke { exec: EXEC, delivery: 1 }));
        // A token's next version, before and after a revocation.
        let [third, fourth] = [held(), held()];
        mailbox.guard_also(1, fourth.wiper().unwrap(), 2);
        assert_eq!(fourth.expose().bytes(), [0; 5], "its lease was revoked");
        mailbox.guard_also(0, third.wiper().unwrap(), 2);
        assert_eq!(third.expose().bytes(), b"value");
        mailbox.send(Mail::RevokeAll).unwrap();
        assert_eq!(third.expose().bytes(), [0; 5]);
        assert_eq!(second.expose().bytes(), [0; 5]);
        mailbox.send(Mail::Kill("x")).unwrap();
        assert!(matches!((told(), told(), told()), (_, _, Order::Kill { exec: EXEC })));
    }
}
