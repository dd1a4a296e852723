//! Delivery containers, launcher's side: it creates and owns them, the broker only fills them, and
//! either can wipe them: each keeps a writable mapping that sealing does not take away.
//!
//! Never reads a value. [`lend`] is the broker's: what git asks for while the command lives.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use rustix::fs::{AtFlags, CWD, FallocateFlags, Gid, MemfdFlags, Mode, OFlags, Uid};
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};

use super::fill::{self, Held};
use crate::model::name::VariableName;
use crate::model::secret::MAX_VALUE;
use crate::profile::identity::IdentityKind;
use crate::sys::memory::SharedMapping;

/// A token as it is read, and its next version, in the directory of its kind.
const TOKEN: &str = "token";
const NEXT: &str = ".next";

/// The largest content of a container: a value, and on `env` its name, `=` and NUL.
pub const MAX_CONTENT: usize = MAX_VALUE + 256;

/// The host ids that may read a container.
#[derive(Debug, Clone, Copy)]
pub struct Owner {
    pub uid: u32,
    pub gid: u32,
}

#[derive(Debug, thiserror::Error)]
pub enum ContainerError {
    #[error("could not make a memfd for a delivery")]
    Memfd(#[source] io::Error),
    #[error("could not make the tmpfs for file deliveries")]
    Tmpfs(#[source] io::Error),
    #[error("could not make the delivery file {name}")]
    File { name: VariableName, source: io::Error },
    #[error("could not make the token of kind `{kind}`")]
    Token { kind: &'static str, source: io::Error },
    #[error("the delivery was said to hold {said} bytes and holds {found}")]
    Size { said: usize, found: u64 },
    #[error("could not lock {bytes} bytes of delivery memory")]
    Lock { bytes: usize, source: io::Error },
    #[error("could not seal a delivery's memfd")]
    Seal(#[source] memfd::Error),
    #[error("could not reopen a delivery read-only")]
    Reopen(#[source] io::Error),
}

/// A container that the broker has not filled yet.
pub struct Empty {
    kind: Kind,
    fd: OwnedFd,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Memfd,
    TmpfsFile,
}

/// A filled container: sealed, locked, mapped for the wipe.
pub struct Filled {
    mapping: Option<SharedMapping>,
    wiped: bool,
}

impl Empty {
    /// A memfd of the exec's uid, mode 0400. memfd_create(2); `MFD_NOEXEC_SEAL` since Linux 6.3.
    pub fn memfd(owner: Owner) -> Result<Self, ContainerError> {
        let failed = |e: Errno| ContainerError::Memfd(e.into());
        let base = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let fd = match rustix::fs::memfd_create(c"sublet", base | MemfdFlags::NOEXEC_SEAL) {
            Err(Errno::INVAL) => rustix::fs::memfd_create(c"sublet", base),
            other => other,
        }
        .map_err(failed)?;
        give(fd.as_fd(), owner).map_err(failed)?;
        Ok(Self { kind: Kind::Memfd, fd })
    }

    /// For the broker to fill.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Takes over what the broker wrote: maps and locks it, seals it, and gives the read-only
    /// descriptor for the command (for a file, the path inside is the way and there is none).
    ///
    /// `F_SEAL_WRITE` would forbid the wipe: with `F_SEAL_FUTURE_WRITE` only mappings that exist
    /// already can write (fcntl(2), Linux 5.1).
    ///
    /// # Errors
    /// Then what was written is wiped.
    pub fn close(self, size: usize) -> Result<(Filled, Option<OwnedFd>), ContainerError> {
        let mut filled = self.take_over(size).inspect_err(|_| self.wipe())?;
        match self.kind {
            Kind::TmpfsFile => Ok((filled, None)),
            Kind::Memfd => match seal(self.fd) {
                Ok(reader) => Ok((filled, Some(reader))),
                Err(e) => {
                    filled.wipe();
                    Err(e)
                }
            },
        }
    }

    /// Zeroes what was written so far: whoever was to fill it, and to say so, is gone or has said something else.
    pub fn wipe(&self) {
        const ZEROES: [u8; 4096] = [0; 4096];
        let wiped = rustix::fs::fstat(&self.fd).and_then(|found| {
            let size = found.st_size.unsigned_abs();
            // No value is as long, and what has no pages yet would get them by being written.
            if size > MAX_CONTENT as u64 {
                return Err(Errno::FBIG);
            }
            (0..size).step_by(ZEROES.len()).try_for_each(|at| {
                let left = usize::try_from(size - at).unwrap_or(usize::MAX).min(ZEROES.len());
                rustix::io::pwrite(&self.fd, &ZEROES[..left], at).map(drop)
            })
        });
        // What cannot be written over is let go: a page that nobody has is the kernel's to hand on empty.
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let wiped = wiped.or_else(|_| rustix::fs::fallocate(&self.fd, hole, 0, i64::MAX as u64));
        if let Err(why) = wiped {
            eprintln!("sublet: an unfinished delivery could not be wiped: {why}");
        }
    }

    fn take_over(&self, size: usize) -> Result<Filled, ContainerError> {
        let found = rustix::fs::fstat(&self.fd)
            .map_err(|e| ContainerError::Reopen(e.into()))?
            .st_size
            .unsigned_abs();
        if size > MAX_CONTENT || found != size as u64 {
            return Err(ContainerError::Size { said: size, found });
        }
        let mapping = match size {
            0 => None,
            bytes => Some(
                SharedMapping::new(&self.fd, bytes)
                    .map_err(|source| ContainerError::Lock { bytes, source })?,
            ),
        };
        Ok(Filled { mapping, wiped: false })
    }
}

/// A memfd of the caller's own that holds these parts: the hold that wipes it under its readers, and what they
/// read it by.
pub fn lend(parts: &[&[u8]]) -> Result<(Held, OwnedFd), ContainerError> {
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    let Empty { fd, .. } = Empty::memfd(Owner { uid, gid })?;
    let held =
        fill::write(fd.try_clone().map_err(ContainerError::Memfd)?, parts).map_err(|source| {
            ContainerError::Lock { bytes: parts.iter().map(|p| p.len()).sum(), source }
        })?;
    Ok((held, seal(fd)?))
}

/// Nobody maps or writes it anew; opened again, for reading alone.
fn seal(memfd: OwnedFd) -> Result<OwnedFd, ContainerError> {
    use memfd::FileSeal::{SealFutureWrite, SealGrow, SealSeal, SealShrink};
    let memfd = memfd::Memfd::try_from_file(File::from(memfd))
        .map_err(|_| ContainerError::Memfd(io::ErrorKind::InvalidData.into()))?;
    for seal in [SealShrink, SealGrow, SealFutureWrite, SealSeal] {
        memfd.add_seal(seal).map_err(ContainerError::Seal)?;
    }
    let path = format!("/proc/self/fd/{}", memfd.as_file().as_raw_fd());
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    // Not open(2), which the broker's filter does not know.
    rustix::fs::openat(CWD, path, flags, Mode::empty())
        .map_err(|e| ContainerError::Reopen(e.into()))
}

impl Filled {
    /// Zeroes what every holder sees.
    pub fn wipe(&mut self) {
        if let Some(mapping) = &mut self.mapping {
            mapping.wipe();
        }
        self.wiped = true;
    }

    pub fn is_wiped(&self) -> bool {
        self.wiped
    }

    pub fn bytes(&self) -> u64 {
        self.mapping.as_ref().map_or(0, |m| m.len() as u64)
    }
}

/// The detached tmpfs of one exec's file deliveries. No mount table ever shows it on the host.
pub struct SecretsMount {
    mount: OwnedFd,
    /// False where the kernel or the mode does not allow `noswap` (Linux 6.4, privileged).
    pub never_swaps: bool,
}

impl SecretsMount {
    /// Room for `files` values.
    pub fn new(files: usize) -> Result<Self, ContainerError> {
        let failed = |e: Errno| ContainerError::Tmpfs(e.into());
        let page = rustix::param::page_size();
        let size = (files * (MAX_CONTENT + page) + 4 * page).to_string();
        let open = || -> Result<OwnedFd, Errno> {
            let tmpfs = rustix::mount::fsopen(c"tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
            rustix::mount::fsconfig_set_string(&tmpfs, c"size", &*size)?;
            rustix::mount::fsconfig_set_string(&tmpfs, c"mode", c"0755")?;
            Ok(tmpfs)
        };
        let tmpfs = open().map_err(failed)?;
        let never_swaps = rustix::mount::fsconfig_set_flag(&tmpfs, c"noswap").is_ok();
        rustix::mount::fsconfig_create(&tmpfs).map_err(failed)?;
        let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOEXEC;
        let mount = rustix::mount::fsmount(&tmpfs, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
            .map_err(failed)?;
        Ok(Self { mount, never_swaps })
    }

    /// An empty file of the exec's user, mode 0400.
    pub fn file(&self, name: &VariableName, owner: Owner) -> Result<Empty, ContainerError> {
        let failed = |e: Errno| ContainerError::File { name: name.clone(), source: e.into() };
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&self.mount, name.as_str(), flags, Mode::from(0o400))
            .map_err(failed)?;
        give(fd.as_fd(), owner).map_err(failed)?;
        Ok(Empty { kind: Kind::TmpfsFile, fd })
    }

    /// The same mount, for tokens that are replaced while the exec lives.
    pub fn again(&self) -> Result<Self, ContainerError> {
        let mount = self.mount.try_clone().map_err(ContainerError::Tmpfs)?;
        Ok(Self { mount, never_swaps: self.never_swaps })
    }

    /// The first version of a token, empty, and the document beside it.
    pub fn token(
        &self,
        kind: IdentityKind,
        document: Option<&str>,
        owner: Owner,
    ) -> Result<Empty, ContainerError> {
        let failed = |e: Errno| ContainerError::Token { kind: kind.as_str(), source: e.into() };
        let directory = kind.directory();
        rustix::fs::mkdirat(&self.mount, directory, Mode::from(0o755)).map_err(failed)?;
        if let (Some(content), Some(name)) = (document, kind.document()) {
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
            let at = format!("{directory}/{name}");
            let mode = Mode::from(0o444);
            let fd = rustix::fs::openat(&self.mount, at, flags, mode).map_err(failed)?;
            let mut file = File::from(fd);
            io::Write::write_all(&mut file, content.as_bytes())
                .map_err(|source| ContainerError::Token { kind: kind.as_str(), source })?;
        }
        self.version(&format!("{directory}/{TOKEN}"), owner).map_err(failed)
    }

    /// The next version, empty, under a name that no one reads.
    pub fn next_token(&self, kind: IdentityKind, owner: Owner) -> Result<Empty, ContainerError> {
        let failed = |e: Errno| ContainerError::Token { kind: kind.as_str(), source: e.into() };
        let at = format!("{}/{NEXT}", kind.directory());
        match rustix::fs::unlinkat(&self.mount, at.as_str(), AtFlags::empty()) {
            // One that was never filled.
            Ok(()) | Err(Errno::NOENT) => {}
            Err(e) => return Err(failed(e)),
        }
        self.version(&at, owner).map_err(failed)
    }

    /// Puts the next version in the token's place, in one step: who opens the token has one or the other.
    pub fn put_token(&self, kind: IdentityKind) -> Result<(), ContainerError> {
        let at = |name: &str| format!("{}/{name}", kind.directory());
        rustix::fs::renameat(&self.mount, at(NEXT), &self.mount, at(TOKEN))
            .map_err(|e| ContainerError::Token { kind: kind.as_str(), source: e.into() })
    }

    fn version(&self, at: &str, owner: Owner) -> Result<Empty, Errno> {
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&self.mount, at, flags, Mode::from(0o400))?;
        give(fd.as_fd(), owner)?;
        Ok(Empty { kind: Kind::TmpfsFile, fd })
    }

    /// The writable mount, for the child to attach and clone.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.mount.as_fd()
    }

    /// Where a file appears inside.
    pub fn path_inside(name: &VariableName) -> PathBuf {
        PathBuf::from(format!("/run/sublet/secrets/{name}"))
    }
}

fn give(fd: BorrowedFd<'_>, owner: Owner) -> Result<(), Errno> {
    rustix::fs::fchmod(fd, Mode::from(0o400))?;
    if owner.uid == rustix::process::geteuid().as_raw() {
        return Ok(());
    }
    rustix::fs::fchown(fd, Some(Uid::from_raw(owner.uid)), Some(Gid::from_raw(owner.gid)))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    fn own() -> Owner {
        Owner { uid: rustix::process::geteuid().as_raw(), gid: rustix::process::getegid().as_raw() }
    }

    #[test]
    fn a_closed_memfd_is_wiped_under_its_readers_and_written_by_none() {
        let empty = Empty::memfd(own()).unwrap();
        let broker = empty.fd().try_clone_to_owned().unwrap();
        let held = fill::write(broker.try_clone().unwrap(), &[b"the value"]).unwrap();
        let (mut filled, reader) = empty.close(9).unwrap();
        let reader = File::from(reader.unwrap());

        let mut seen = [0; 9];
        reader.read_exact_at(&mut seen, 0).unwrap();
        assert_eq!(&seen, b"the value");
        // The descriptor that the broker filled through is sealed like every other.
        assert_eq!(
            File::from(broker.try_clone().unwrap()).write_at(b"x", 0).unwrap_err().raw_os_error(),
            Some(libc::EPERM)
        );
        assert!(SharedMapping::new(&broker, 9).is_err());

        filled.wipe();
        reader.read_exact_at(&mut seen, 0).unwrap();
        assert_eq!(seen, [0; 9]);
        held.wipe();
    }

    #[test]
    fn what_was_begun_and_not_closed_is_wiped() {
        let empty = Empty::memfd(own()).unwrap();
        let broker = File::from(empty.fd().try_clone_to_owned().unwrap());
        let read = || {
            let mut seen = [1; 5];
            broker.read_exact_at(&mut seen, 0).unwrap();
            seen
        };
        broker.write_at(b"value", 0).unwrap();
        empty.wipe();
        assert_eq!(read(), [0; 5]);
        // Said to be larger than the machine: nothing is allocated for that.
        broker.write_at(b"value", 0).unwrap();
        broker.set_len(1 << 40).unwrap();
        empty.wipe();
        assert_eq!(read(), [0; 5]);
        assert!(rustix::fs::fstat(&broker).unwrap().st_blocks < 1000);
        broker.set_len(5).unwrap();
        broker.write_at(b"value", 0).unwrap();
        assert!(matches!(empty.close(4), Err(ContainerError::Size { said: 4, found: 5 })));
        assert_eq!(read(), [0; 5]);
    }

    #[test]
    fn either_holder_alone_can_wipe() {
        let empty = Empty::memfd(own()).unwrap();
        let held = fill::write(empty.fd().try_clone_to_owned().unwrap(), &[b"value"]).unwrap();
        let (filled, reader) = empty.close(5).unwrap();
        held.wipe();
        let mut seen = [1; 5];
        File::from(reader.unwrap()).read_exact_at(&mut seen, 0).unwrap();
        assert_eq!(seen, [0; 5]);
        assert!(!filled.is_wiped());
    }

    #[test]
    fn a_size_that_is_not_true_is_refused() {
        let empty = Empty::memfd(own()).unwrap();
        let _held = fill::write(empty.fd().try_clone_to_owned().unwrap(), &[b"value"]).unwrap();
        assert!(matches!(empty.close(6), Err(ContainerError::Size { said: 6, found: 5 })));
    }

    #[test]
    fn an_empty_value_is_a_file_of_no_bytes() {
        let empty = Empty::memfd(own()).unwrap();
        let _held = fill::write(empty.fd().try_clone_to_owned().unwrap(), &[b""]).unwrap();
        let (filled, reader) = empty.close(0).unwrap();
        assert_eq!((filled.bytes(), reader.unwrap().as_raw_fd() > 2), (0, true));
    }
}
