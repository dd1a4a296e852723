//! The broker's side: forks the launcher, gives orders, reads notices.
#![forbid(unsafe_code)]

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use super::serve;
use super::wire::{self, Notice, Order, WireError};
use crate::host::Places;
use crate::sys::process::{self, Forked};
use crate::sys::socket;

/// The launcher as the broker has it. Dropping it ends the launcher, and every exec with it.
pub struct Launcher {
    socket: OwnedFd,
    pid: i32,
    passed_over: RefCell<VecDeque<(Notice, Vec<OwnedFd>)>>,
}

#[derive(Debug, thiserror::Error)]
#[error("could not fork the launcher")]
pub struct ForkError(#[from] io::Error);

impl Launcher {
    /// Forks the launcher: before any secret is loaded, and before any thread exists.
    pub fn fork(places: &Places) -> Result<Self, ForkError> {
        let (ours, theirs) = socket::packet_pair().map_err(io::Error::from)?;
        match process::fork()? {
            Forked::Child => {
                drop(ours);
                process::exit_now(serve::run(theirs, places))
            }
            Forked::Parent { pid } => {
                Ok(Self { socket: ours, pid, passed_over: RefCell::default() })
            }
        }
    }

    pub fn order(&self, order: &Order) -> Result<(), WireError> {
        wire::send(self.socket.as_fd(), order, &[])
    }

    /// The next notice, however long it takes: an earlier one that was passed over, else a new one.
    pub fn notice(&self) -> Result<(Notice, Vec<OwnedFd>), WireError> {
        if let Some(passed) = self.passed_over.borrow_mut().pop_front() {
            return Ok(passed);
        }
        wire::receive(self.socket.as_fd())
    }

    /// The next notice that is wanted; others wait for [`Launcher::notice`].
    pub fn notice_of(
        &self,
        wanted: impl Fn(&Notice) -> bool,
    ) -> Result<(Notice, Vec<OwnedFd>), WireError> {
        let mut passed_over = self.passed_over.borrow_mut();
        if let Some(index) = passed_over.iter().position(|(notice, _)| wanted(notice))
            && let Some(found) = passed_over.remove(index)
        {
            return Ok(found);
        }
        loop {
            let received: (Notice, Vec<OwnedFd>) = wire::receive(self.socket.as_fd())?;
            // An exec that is refused ends every wait for it.
            if wanted(&received.0) {
                return Ok(received);
            }
            passed_over.push_back(received);
        }
    }

    /// Whether [`Launcher::notice`] has something without waiting for the socket.
    pub fn has_passed_over(&self) -> bool {
        !self.passed_over.borrow().is_empty()
    }

    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    pub fn pid(&self) -> i32 {
        self.pid
    }
}
