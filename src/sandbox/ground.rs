//! The ground of a root: its directories, files, links and devices that are of sublet's own making, which hang on
//! nothing that is on the host. It may be laid before there is an exec, as the last one wanted it.
#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Uid};
use rustix::io::Errno;
use rustix::mount::FsPickFlags;

use super::identity;
use super::layout::{Entry, Layout};
use super::root::{Place, PlaceKind, RootError};

/// What a root is to be.
pub struct Wanted<'a> {
    pub layout: &'a Layout,
    /// Bounds all that the exec writes outside of its workspace.
    pub size: u64,
    pub mode: identity::Mode,
    /// The exec's uid and gid on this host.
    pub owner: (u32, u32),
}

/// What was laid, and for what.
pub struct Ground {
    layout: Layout,
    size: u64,
    mode: identity::Mode,
    owner: (u32, u32),
    directories: BTreeSet<PathBuf>,
    others: BTreeSet<PathBuf>,
    /// Devices that could not be made: the host's take their places.
    lacking: BTreeSet<PathBuf>,
    /// What landlock makes rules for.
    pub places: Vec<Place>,
}

impl Ground {
    /// Lays it in an empty tmpfs.
    pub fn lay(tmpfs: BorrowedFd<'_>, wanted: &Wanted<'_>) -> Result<Self, RootError> {
        bound(tmpfs, wanted.size)?;
        let mut ground = Self {
            layout: wanted.layout.clone(),
            size: wanted.size,
            mode: wanted.mode,
            owner: wanted.owner,
            directories: BTreeSet::new(),
            others: BTreeSet::new(),
            lacking: BTreeSet::new(),
            places: Vec::new(),
        };
        ground.place(tmpfs, Path::new("/"), PlaceKind::TopDirectory)?;
        for (at, entry) in &wanted.layout.entries {
            // What lies in a tree of the host must be there already; its owner decides, not we.
            if at.parent().and_then(|p| wanted.layout.covering(p)).is_none() {
                ground.add(tmpfs, at, entry)?;
            }
        }
        Ok(ground)
    }

    /// Whether it is what would be laid for this.
    pub fn is_for(&self, wanted: &Wanted<'_>) -> bool {
        self.layout == *wanted.layout
            && self.size == wanted.size
            && self.mode == wanted.mode
            && self.owner == wanted.owner
    }

    /// Takes it away again.
    pub fn clear(self, tmpfs: BorrowedFd<'_>) -> Result<(), RootError> {
        let others = self.others.iter().map(|at| (at, AtFlags::empty()));
        // What lies in a directory comes behind it.
        let directories = self.directories.iter().rev().map(|at| (at, AtFlags::REMOVEDIR));
        for (at, flags) in others.chain(directories) {
            match rustix::fs::unlinkat(tmpfs, relative(at), flags) {
                // By another name of it.
                Ok(()) | Err(Errno::NOENT) => {}
                Err(e) => return Err(failed(at, e)),
            }
        }
        Ok(())
    }

    /// Whether this device could not be made.
    pub fn lacks(&self, at: &Path) -> bool {
        self.lacking.contains(at)
    }

    fn add(&mut self, tmpfs: BorrowedFd<'_>, at: &Path, entry: &Entry) -> Result<(), RootError> {
        match entry {
            Entry::Directory | Entry::Inner | Entry::Secrets | Entry::Workspace { .. } => {
                self.directory(tmpfs, at)
            }
            Entry::Scratch { sticky } => {
                let mode = if *sticky { 0o1777 } else { 0o700 };
                self.directory_of_mode(tmpfs, at, mode)?;
                if !sticky && self.mode == identity::Mode::Privileged {
                    self.give(tmpfs, at)?;
                }
                self.place(tmpfs, at, PlaceKind::WritableTree)
            }
            Entry::File { content } => self.file(tmpfs, at, content),
            Entry::Probe => self.file(tmpfs, at, b""),
            Entry::Symlink { target } => self.symlink(tmpfs, at, target),
            Entry::Device { major, minor } => self.device(tmpfs, at, *major, *minor),
            // The host's.
            Entry::Bind { .. }
            | Entry::OfContainer { .. }
            | Entry::Binary
            | Entry::Agent { .. } => Ok(()),
        }
    }

    fn parents(&mut self, tmpfs: BorrowedFd<'_>, at: &Path) -> Result<(), RootError> {
        match at.parent() {
            Some(parent) if parent != Path::new("/") => self.directory(tmpfs, parent),
            _ => Ok(()),
        }
    }

    pub fn directory(&mut self, tmpfs: BorrowedFd<'_>, at: &Path) -> Result<(), RootError> {
        self.directory_of_mode(tmpfs, at, 0o755)
    }

    fn directory_of_mode(
        &mut self,
        tmpfs: BorrowedFd<'_>,
        at: &Path,
        mode: u32,
    ) -> Result<(), RootError> {
        if self.directories.contains(at) {
            return Ok(());
        }
        self.parents(tmpfs, at)?;
        match rustix::fs::mkdirat(tmpfs, relative(at), Mode::from(mode)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(e) => return Err(failed(at, e)),
        }
        // A mount's parents below the exec's home are the exec's, as the rest of its home is.
        if self.mode == identity::Mode::Privileged && self.lies_in_home(at) {
            self.give(tmpfs, at)?;
        }
        self.directories.insert(at.to_owned());
        Ok(())
    }

    fn lies_in_home(&self, at: &Path) -> bool {
        at.ancestors().skip(1).any(|above| {
            matches!(self.layout.entries.get(above), Some(Entry::Scratch { sticky: false }))
        })
    }

    pub fn file(
        &mut self,
        tmpfs: BorrowedFd<'_>,
        at: &Path,
        content: &[u8],
    ) -> Result<(), RootError> {
        self.parents(tmpfs, at)?;
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
        rustix::fs::openat(tmpfs, relative(at), flags, Mode::from(0o644))
            .and_then(|file: OwnedFd| write_all(file.as_fd(), content))
            .map_err(|e| failed(at, e))?;
        self.others.insert(at.to_owned());
        Ok(())
    }

    pub fn symlink(
        &mut self,
        tmpfs: BorrowedFd<'_>,
        at: &Path,
        target: impl rustix::path::Arg,
    ) -> Result<(), RootError> {
        self.parents(tmpfs, at)?;
        rustix::fs::symlinkat(target, tmpfs, relative(at)).map_err(|e| failed(at, e))?;
        self.others.insert(at.to_owned());
        Ok(())
    }

    fn give(&self, tmpfs: BorrowedFd<'_>, at: &Path) -> Result<(), RootError> {
        let (uid, gid) = (Uid::from_raw(self.owner.0), Gid::from_raw(self.owner.1));
        let flags = AtFlags::SYMLINK_NOFOLLOW;
        rustix::fs::chownat(tmpfs, relative(at), Some(uid), Some(gid), flags)
            .map_err(|e| failed(at, e))
    }

    /// A node of our own where that is allowed, else a place for the host's.
    fn device(
        &mut self,
        tmpfs: BorrowedFd<'_>,
        at: &Path,
        major: u32,
        minor: u32,
    ) -> Result<(), RootError> {
        self.parents(tmpfs, at)?;
        if self.mode == identity::Mode::Privileged {
            let device = rustix::fs::makedev(major, minor);
            let (kind, mode) = (FileType::CharacterDevice, Mode::from(0o666));
            match rustix::fs::mknodat(tmpfs, relative(at), kind, mode, device) {
                Ok(()) => {
                    self.others.insert(at.to_owned());
                    return Ok(());
                }
                // A container's device cgroup or bounding set.
                Err(Errno::PERM) => {}
                Err(e) => return Err(failed(at, e)),
            }
        }
        self.lacking.insert(at.to_owned());
        self.file(tmpfs, at, b"")
    }

    pub fn place(
        &mut self,
        tmpfs: BorrowedFd<'_>,
        at: &Path,
        kind: PlaceKind,
    ) -> Result<(), RootError> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(tmpfs, relative(at), flags, Mode::empty())
            .map_err(|e| failed(at, e))?;
        self.places.push(Place { fd, kind });
        Ok(())
    }
}

fn failed(at: &Path, e: Errno) -> RootError {
    RootError::Make { path: at.to_owned(), source: e.into() }
}

fn bound(tmpfs: BorrowedFd<'_>, size: u64) -> Result<(), RootError> {
    let failed = |e: Errno| RootError::Tmpfs { doing: "bound a tmpfs", source: e.into() };
    let flags = FsPickFlags::FSPICK_CLOEXEC | FsPickFlags::FSPICK_EMPTY_PATH;
    let picked = rustix::mount::fspick(tmpfs, c"", flags).map_err(failed)?;
    rustix::mount::fsconfig_set_string(&picked, c"size", size.to_string())
        .and_then(|()| rustix::mount::fsconfig_reconfigure(&picked))
        .map_err(failed)
}

/// Relative to the new root.
pub(super) fn relative(at: &Path) -> &Path {
    match at.strip_prefix("/") {
        Ok(path) if path.as_os_str().is_empty() => Path::new("."),
        Ok(path) => path,
        Err(_) => at,
    }
}

fn write_all(fd: BorrowedFd<'_>, mut bytes: &[u8]) -> Result<(), Errno> {
    while !bytes.is_empty() {
        let written = rustix::io::write(fd, bytes)?;
        bytes = &bytes[written..];
    }
    Ok(())
}
