//! Where the descriptors of a child lie that is cloned beside many execs. A child with a table of its own copies
//! those of all and closes them again, half a microsecond each, and a thousand execs have thousands. This one
//! shares the launcher's table, and leaves it with no more than what has a low number (close_range(2),
//! `CLOSE_RANGE_UNSHARE`, Linux 5.9): its own are put there first, in places that were kept since there were few.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use rustix::io::{DupFlags, dup3};

/// A child's socket, lifeline, root and network.
const PLACES: usize = 4;

pub struct Cots {
    nobody: OwnedFd,
    places: [Option<OwnedFd>; PLACES],
}

impl Cots {
    /// Keeps the lowest numbers that are free.
    pub fn keep() -> io::Result<Self> {
        let nobody: OwnedFd = File::open("/dev/null")?.into();
        let mut places = [const { None }; PLACES];
        for place in &mut places {
            *place = Some(nobody.try_clone()?);
        }
        Ok(Self { nobody, places })
    }

    /// Puts the descriptor there. One whose place was lost stays where it is, which only costs time.
    pub fn lay(&mut self, place: usize, fd: OwnedFd) -> io::Result<OwnedFd> {
        let Some(mut low) = self.places[place].take() else { return Ok(fd) };
        match dup3(&fd, &mut low, DupFlags::CLOEXEC) {
            Ok(()) => Ok(low),
            Err(e) => {
                self.places[place] = Some(low);
                Err(e.into())
            }
        }
    }

    /// The child has it: the place is kept for the next.
    pub fn take_back(&mut self, place: usize, mut low: OwnedFd) -> io::Result<()> {
        dup3(&self.nobody, &mut low, DupFlags::CLOEXEC)?;
        self.places[place] = Some(low);
        Ok(())
    }
}
