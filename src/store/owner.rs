//! Who holds a lease or an exec, so that what a dead process left open is found.
//!
//! Every process that writes claims one byte of the file `owners`, at a random offset, with an open file
//! description lock (fcntl(2), `F_OFD_SETLK`, Linux 3.15), and writes the offset beside what it opens.
//! The kernel drops the lock with the process, `kill -9` included, so that a byte which nobody holds
//! names an owner who is gone. The file stays empty.
#![forbid(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

use crate::store::error::StoreError;
use crate::store::place::{Place, unusable};

/// A byte of the file `owners`. In the database a number; below 2^62, so that it is positive there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct OwnerId(pub(super) i64);

/// The byte that a process locks while it makes the database. Beyond every owner's.
const MAKING: i64 = 1 << 62;

/// This process's claim, held until it is dropped.
pub(super) struct Owner {
    file: File,
    id: OwnerId,
}

/// While this lives no other process makes the database.
pub(super) struct Making<'a> {
    owner: &'a Owner,
    place: &'a Place,
}

impl Owner {
    pub fn claim(place: &Place) -> Result<Self, StoreError> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC)
            .open(&place.owners)
            .map_err(|e| unusable(&place.owners, "opened", e))?;
        loop {
            let random =
                crate::sys::random::random_u64().map_err(|source| StoreError::Random { source })?;
            let id = OwnerId((random >> 2) as i64);
            match fcntl(&file, FcntlArg::F_OFD_SETLK(&byte(id.0, libc::F_WRLCK))) {
                Ok(_) => return Ok(Self { file, id }),
                Err(Errno::EAGAIN | Errno::EACCES) => {}
                Err(e) => return Err(unusable(&place.owners, "locked", e.into())),
            }
        }
    }

    pub fn id(&self) -> OwnerId {
        self.id
    }

    /// Whether the file with our claim in it is the one that others ask.
    pub fn is_at(&self, place: &Place) -> bool {
        let inode = |found: std::fs::Metadata| (found.dev(), found.ino());
        let ours = self.file.metadata().map(inode);
        let theirs = std::fs::symlink_metadata(&place.owners).map(inode);
        matches!((ours, theirs), (Ok(ours), Ok(theirs)) if ours == theirs)
    }

    /// Whether the process that claimed `id` still runs. Our own lock does not conflict with us.
    pub fn is_alive(&self, id: OwnerId) -> io::Result<bool> {
        if id == self.id {
            return Ok(true);
        }
        let mut probe = byte(id.0, libc::F_WRLCK);
        fcntl(&self.file, FcntlArg::F_OFD_GETLK(&mut probe))?;
        Ok(i32::from(probe.l_type) != libc::F_UNLCK)
    }

    /// Waits for the right to make the database.
    pub fn making<'a>(&'a self, place: &'a Place) -> Result<Making<'a>, StoreError> {
        loop {
            match fcntl(&self.file, FcntlArg::F_OFD_SETLKW(&byte(MAKING, libc::F_WRLCK))) {
                Ok(_) => return Ok(Making { owner: self, place }),
                Err(Errno::EINTR) => {}
                Err(e) => return Err(unusable(&place.owners, "locked", e.into())),
            }
        }
    }
}

impl Making<'_> {
    pub fn done(self) -> Result<(), StoreError> {
        fcntl(&self.owner.file, FcntlArg::F_OFD_SETLK(&byte(MAKING, libc::F_UNLCK)))
            .map(drop)
            .map_err(|e| unusable(&self.place.owners, "unlocked", e.into()))
    }
}

fn byte(offset: i64, kind: i32) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: offset,
        l_len: 1,
        // Must be 0 for open file description locks.
        l_pid: 0,
    }
}
