//! The broker's side: forks the launcher, gives orders, reads notices.
#![forbid(unsafe_code)]

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
            Forked::Parent { pid } => Ok(Self { socket: ours, pid }),
        }
    }

    pub fn order(&self, order: &Order) -> Result<(), WireError> {
        wire::send(self.socket.as_fd(), order, &[])
    }

    /// The next notice, however long it takes.
    pub fn notice(&self) -> Result<(Notice, Vec<OwnedFd>), WireError> {
        wire::receive(self.socket.as_fd())
    }

    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    pub fn pid(&self) -> i32 {
        self.pid
    }
}
