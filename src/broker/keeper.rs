//! The thread that holds the launcher: it gives it the trail's head to keep outside the database, and is
//! the first to know when it dies.
#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;

use crate::launcher::client::Launcher;
use crate::launcher::wire::{Notice, Order, WireError};
use crate::model::event::KeptHead;
use crate::store::Heads;

/// Where threads leave the heads that they have committed. The last one counts.
#[derive(Clone)]
pub struct Heard(Arc<Inbox>);

struct Inbox {
    heads: Mutex<Option<Heads>>,
    event: OwnedFd,
}

impl Heard {
    pub fn new() -> io::Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self(Arc::new(Inbox { heads: Mutex::default(), event })))
    }

    /// A commit has come to these.
    pub fn committed(&self, heads: Heads) {
        let mut slot = self.0.heads.lock().unwrap_or_else(PoisonError::into_inner);
        // Threads may come here in another order than they committed.
        if slot.as_ref().is_none_or(|told| told.latest.seq < heads.latest.seq) {
            *slot = Some(heads);
        }
        drop(slot);
        if let Err(e) = rustix::io::write(&self.0.event, &1_u64.to_ne_bytes())
            // Full counts: it wakes all the same.
            && e != Errno::AGAIN
        {
            tracing::error!(error = %e, "could not wake the keeper of the trail's head");
        }
    }

    fn take(&self) -> Option<Heads> {
        // Emptied before the slot is, so that what comes in between wakes again.
        match rustix::io::read(&self.0.event, &mut [0; 8]) {
            Ok(_) | Err(_) => {}
        }
        self.0.heads.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Keeps heads until the launcher is gone, and says why it is.
pub fn keep(launcher: &Launcher, heard: &Heard, boot_id: &str) -> WireError {
    loop {
        let mut fds = [
            PollFd::from_borrowed_fd(launcher.root().socket(), PollFlags::IN),
            PollFd::from_borrowed_fd(heard.0.event.as_fd(), PollFlags::IN),
        ];
        match poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(e) => return WireError::Receive(e.into()),
        }
        if !fds[0].revents().is_empty() {
            match launcher.root().notice() {
                Ok((Notice::HeadKept { refusal: Some(refusal) }, _)) => {
                    // The trail itself stands; what is weaker is the proof against its truncation.
                    tracing::warn!(reason = %refusal.message, "the trail's head was not kept");
                }
                Ok(_) => {}
                Err(e) => return e,
            }
        }
        if let Some(heads) = heard.take() {
            let Heads { latest, durable } = heads;
            let head = KeptHead { latest, durable, boot_id: boot_id.to_owned() };
            let order = Order::KeepHead { head: head.encode().into_bytes() };
            if let Err(e) = launcher.root().order(&order) {
                return e;
            }
        }
    }
}
