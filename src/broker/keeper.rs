//! The thread that holds the launcher: it gives it the trail's head to keep outside the database, and is
//! the first to know when it dies.
#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;

use crate::launcher::client::Launcher;
use crate::launcher::wire::{Notice, Order, WireError};
use crate::model::event::KeptHead;
use crate::store::Heads;

/// How long after a commit its head is kept at the latest. Several commits of one exec are told as one, and
/// when it has begun: the launcher has better things to do before.
const PAUSE: Duration = Duration::from_millis(10);

/// How long the last head of a service that ends may take.
const LAST_WAIT: Duration = Duration::from_secs(1);

/// Where threads leave the heads that they have committed. The last one counts.
#[derive(Clone)]
pub struct Heard(Arc<Inbox>);

struct Inbox {
    waiting: Mutex<Waiting>,
    told: Condvar,
    event: OwnedFd,
}

#[derive(Default)]
struct Waiting {
    /// Not yet given to the launcher.
    heads: Option<Heads>,
    /// Nothing is put off any more.
    at_once: bool,
}

impl Heard {
    pub fn new() -> io::Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self(Arc::new(Inbox { waiting: Mutex::default(), told: Condvar::new(), event })))
    }

    /// A commit has come to these.
    pub fn committed(&self, heads: Heads) {
        let mut waiting = self.lock();
        let is_first = waiting.heads.is_none();
        // Threads may come here in another order than they committed.
        if waiting.heads.is_none_or(|waits| waits.latest.seq < heads.latest.seq) {
            waiting.heads = Some(heads);
        }
        drop(waiting);
        if is_first {
            self.wake();
        }
    }

    /// Has what was committed told at once, and waits for that: nothing comes after it.
    pub fn tell_the_last(&self) {
        self.lock().at_once = true;
        self.wake();
        let is_untold = |waiting: &mut Waiting| waiting.heads.is_some();
        match self.0.told.wait_timeout_while(self.lock(), LAST_WAIT, is_untold) {
            // The trail itself stands: what is told too late is weaker proof against its truncation.
            Ok(_) | Err(_) => {}
        }
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.0.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        if let Err(e) = rustix::io::write(&self.0.event, &1_u64.to_ne_bytes())
            // Full counts: it wakes all the same.
            && e != Errno::AGAIN
        {
            tracing::error!(error = %e, "could not wake the keeper of the trail's head");
        }
    }

    /// When to tell what was heard, just now at the earliest.
    fn due(&self) -> Instant {
        match rustix::io::read(&self.0.event, &mut [0; 8]) {
            Ok(_) | Err(_) => {}
        }
        let pause = if self.lock().at_once { Duration::ZERO } else { PAUSE };
        Instant::now() + pause
    }

    /// Tells what waits.
    fn tell(&self, order: impl FnOnce(Heads) -> Result<(), WireError>) -> Result<(), WireError> {
        let Some(heads) = self.lock().heads else { return Ok(()) };
        order(heads)?;
        let mut waiting = self.lock();
        if waiting.heads == Some(heads) {
            waiting.heads = None;
            drop(waiting);
            self.0.told.notify_all();
        } else {
            // What was committed meanwhile is told the next time.
            drop(waiting);
            self.wake();
        }
        Ok(())
    }
}

/// Keeps heads until the launcher is gone, and says why it is.
pub fn keep(launcher: &Launcher, heard: &Heard, boot_id: &str) -> WireError {
    let mut due: Option<Instant> = None;
    loop {
        let mut fds = [
            PollFd::from_borrowed_fd(launcher.root().socket(), PollFlags::IN),
            PollFd::from_borrowed_fd(heard.0.event.as_fd(), PollFlags::IN),
        ];
        let left = due.map(|due| due.saturating_duration_since(Instant::now()));
        let left = left.map(|left| Timespec {
            tv_sec: left.as_secs() as i64,
            tv_nsec: left.subsec_nanos().into(),
        });
        match poll(&mut fds, left.as_ref()) {
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
        if !fds[1].revents().is_empty() {
            let heard = heard.due();
            due = Some(due.map_or(heard, |due| due.min(heard)));
        }
        if due.is_some_and(|due| due <= Instant::now()) {
            due = None;
            let order = |Heads { latest, durable }| {
                let head = KeptHead { latest, durable, boot_id: boot_id.to_owned() };
                launcher.root().order(&Order::KeepHead { head: head.encode().into_bytes() })
            };
            if let Err(e) = heard.tell(order) {
                return e;
            }
        }
    }
}
