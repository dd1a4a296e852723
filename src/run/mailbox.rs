//! What the broker tells a living exec from another thread: a revocation, an order to end. An
//! eventfd wakes the exec's poll.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;

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
}

/// Both ends are one and the same: whoever has it can send, the exec's thread takes.
#[derive(Debug, Clone)]
pub struct Mailbox(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    queue: Mutex<VecDeque<Mail>>,
    event: OwnedFd,
}

impl Mailbox {
    pub fn new() -> io::Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self(Arc::new(Shared { queue: Mutex::default(), event })))
    }

    pub fn send(&self, mail: Mail) -> io::Result<()> {
        self.0.queue.lock().unwrap_or_else(PoisonError::into_inner).push_back(mail);
        match rustix::io::write(&self.0.event, &1_u64.to_ne_bytes()) {
            // Full counts: it wakes all the same.
            Ok(_) | Err(Errno::AGAIN) => Ok(()),
            Err(e) => Err(e.into()),
        }
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
        let mut queue = self.0.queue.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(std::mem::take(&mut queue))
    }

    /// Why the exec shall end, if it shall. Takes nothing.
    pub fn killed(&self) -> Option<&'static str> {
        let queue = self.0.queue.lock().unwrap_or_else(PoisonError::into_inner);
        queue.iter().find_map(|mail| match mail {
            Mail::Kill(why) => Some(*why),
            Mail::Revoke(_) | Mail::RevokeAll => Some("a lease of it was revoked"),
            Mail::Renewed { .. } => None,
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
        assert_eq!(mailbox.killed(), None);
        let id = LeaseId::fresh();
        mailbox.clone().send(Mail::Kill("draining")).unwrap();
        mailbox.send(Mail::Revoke(id.clone())).unwrap();
        assert_eq!(mailbox.killed(), Some("draining"));
        assert_eq!(mailbox.take().unwrap(), [Mail::Kill("draining"), Mail::Revoke(id)]);
        assert!(mailbox.take().unwrap().is_empty());
    }
}
