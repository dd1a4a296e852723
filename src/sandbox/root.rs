//! Builds the exec's root in the launcher: one detached tmpfs with every directory, file, link and
//! device of the layout, and one detached tree for each bind. Interprets the layout in two loops: what is
//! sublet's own (`ground`), which may have been laid before, and what is shown of the host. Touches nothing
//! that is visible on the host.
//!
//! Directories of the tmpfs belong to the host's root (rootless: to the caller) and are not writable
//! for the exec but where the layout says `Scratch`; landlock says the same once more.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, OpenTreeFlags};

use super::ground::{Ground, Wanted, relative};
use super::layout::{Access, Entry, Layout};
use crate::sys::mount::{self, MountAttributes};

/// A detached mount tree and where the child attaches it.
pub struct Attachment {
    pub tree: OwnedFd,
    pub at: CString,
}

/// What the child attaches, and what landlock makes rules for.
pub struct Root {
    /// Relative to the root, parents first.
    pub attachments: Vec<Attachment>,
    /// From the new root.
    pub attachments_in_workspace: Vec<Attachment>,
    /// Places of the tmpfs that exist, with what landlock allows there.
    pub places: Vec<Place>,
}

/// A place for a landlock rule.
pub struct Place {
    pub fd: OwnedFd,
    pub kind: PlaceKind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PlaceKind {
    /// Listing directories, everywhere.
    TopDirectory,
    /// Files of sublet's own making: read.
    Synthesised,
    /// A tree of the host: read and execute.
    ReadOnlyTree,
    ReadOnlyFile,
    /// Read, write, make, remove, execute.
    WritableTree,
    WritableFile,
    /// `/dev`: nodes of our own, and of the host where they had to be bound.
    DeviceDirectory,
}

#[derive(Debug, thiserror::Error)]
pub enum RootError {
    #[error("could not {doing} for the exec's root")]
    Tmpfs { doing: &'static str, source: io::Error },
    #[error("could not make {path} in the exec's root")]
    Make { path: PathBuf, source: io::Error },
    #[error("the host has no {path}, which the profile shows read-only or read-write")]
    Missing { path: PathBuf },
    #[error("could not open {path} to show it inside")]
    Open { path: PathBuf, source: io::Error },
    #[error("could not make {path} read-only inside")]
    Restrict { path: PathBuf, source: io::Error },
}

/// Builds the root for this in its tmpfs. `ground`: what was laid there before, for whatever was expected then;
/// `container` has the trees of [`Entry::OfContainer`].
pub fn build(
    tmpfs: BorrowedFd<'_>,
    ground: Option<Ground>,
    wanted: &Wanted<'_>,
    container: &BTreeMap<PathBuf, OwnedFd>,
) -> Result<Root, RootError> {
    let ground = match ground {
        Some(ground) if ground.is_for(wanted) => ground,
        Some(ground) => {
            ground.clear(tmpfs)?;
            Ground::lay(tmpfs, wanted)?
        }
        None => Ground::lay(tmpfs, wanted)?,
    };
    let mut builder = Builder {
        layout: wanted.layout,
        container,
        tmpfs,
        ground,
        attachments: Vec::new(),
        attachments_in_workspace: Vec::new(),
        places: Vec::new(),
    };
    for (at, entry) in &wanted.layout.entries {
        builder.show(at, entry)?;
    }
    let Builder { mut ground, attachments, attachments_in_workspace, mut places, .. } = builder;
    // Some of them may be in a tree of the host.
    for (at, kind) in [
        ("/etc", PlaceKind::Synthesised),
        ("/run/sublet", PlaceKind::Synthesised),
        ("/dev", PlaceKind::DeviceDirectory),
    ] {
        ground.place(tmpfs, Path::new(at), kind)?;
    }
    places.extend(ground.places);
    Ok(Root { attachments, attachments_in_workspace, places })
}

/// The root's own file system, empty and not yet bounded.
pub fn make_tmpfs() -> Result<OwnedFd, RootError> {
    let failed = |doing| move |e: Errno| RootError::Tmpfs { doing, source: e.into() };
    let tmpfs = rustix::mount::fsopen(c"tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)
        .map_err(failed("open a tmpfs"))?;
    rustix::mount::fsconfig_set_string(&tmpfs, c"mode", c"0755")
        .and_then(|()| rustix::mount::fsconfig_create(&tmpfs))
        .map_err(failed("configure a tmpfs"))?;
    // Devices work on it (it holds /dev/null); making one is refused to the exec thrice over: it has no
    // CAP_MKNOD in the host's user namespace, no landlock right, and a filter.
    rustix::mount::fsmount(&tmpfs, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::MOUNT_ATTR_NOSUID)
        .map_err(failed("mount a tmpfs"))
}

struct Builder<'a> {
    layout: &'a Layout,
    container: &'a BTreeMap<PathBuf, OwnedFd>,
    tmpfs: BorrowedFd<'a>,
    ground: Ground,
    attachments: Vec<Attachment>,
    attachments_in_workspace: Vec<Attachment>,
    places: Vec<Place>,
}

impl Builder<'_> {
    fn show(&mut self, at: &Path, entry: &Entry) -> Result<(), RootError> {
        // What lies in a tree of the host must be there already; its owner decides, not we.
        let is_inside = at.parent().and_then(|p| self.layout.covering(p)).is_some();
        if is_inside && !matches!(entry, Entry::Bind { .. }) {
            return Ok(());
        }
        let make = !is_inside;
        match entry {
            Entry::Directory
            | Entry::Inner
            | Entry::Secrets
            | Entry::Workspace { .. }
            | Entry::Scratch { .. }
            | Entry::File { .. }
            | Entry::Probe
            | Entry::Symlink { .. } => Ok(()),
            Entry::Device { .. } => self.device(at),
            Entry::Bind { source, optional, access } => {
                self.bind(at, source, *optional, *access, make)
            }
            Entry::OfContainer { is_directory } => {
                let failed = |source: io::Error| RootError::Open { path: at.to_owned(), source };
                let tree = self.container.get(at);
                let tree = tree.ok_or_else(|| failed(Errno::NOENT.into()))?;
                let tree = tree.try_clone().map_err(failed)?;
                let kind = if *is_directory {
                    self.ground.directory(self.tmpfs, at)?;
                    PlaceKind::ReadOnlyTree
                } else {
                    self.ground.file(self.tmpfs, at, b"")?;
                    PlaceKind::ReadOnlyFile
                };
                let attributes = MountAttributes {
                    set: mount::RDONLY | mount::NOSUID | mount::NODEV,
                    recursive: true,
                    idmap: None,
                };
                self.attach(at, tree, &attributes, Some(kind))
            }
            Entry::Binary => {
                let exe = std::fs::read_link("/proc/self/exe")
                    .map_err(|source| RootError::Open { path: "/proc/self/exe".into(), source })?;
                self.bind(at, &exe, false, Access::ReadOnly, make)
            }
            Entry::Agent { source } => {
                // It is the broker's: no link that it put there leads elsewhere.
                let failed = |e: Errno| RootError::Open { path: source.clone(), source: e.into() };
                let directory = open_without_links(source).map_err(failed)?;
                let found = rustix::fs::fstat(&directory).map_err(failed)?;
                if FileType::from_raw_mode(found.st_mode) != FileType::Directory {
                    return Err(failed(Errno::NOTDIR));
                }
                if make {
                    self.ground.directory(self.tmpfs, at)?;
                }
                let attributes = MountAttributes {
                    set: mount::RDONLY | mount::NOSUID | mount::NODEV | mount::NOEXEC,
                    recursive: true,
                    idmap: None,
                };
                let tree = clone_tree(directory.as_fd()).map_err(failed)?;
                self.attach(at, tree, &attributes, None)
            }
        }
    }

    /// The host's, where one of our own is not allowed.
    fn device(&mut self, at: &Path) -> Result<(), RootError> {
        if !self.ground.lacks(at) {
            return Ok(());
        }
        let tree =
            open_tree(at).map_err(|e| RootError::Open { path: at.to_owned(), source: e.into() })?;
        let attributes = MountAttributes { set: mount::NOSUID, ..MountAttributes::default() };
        self.attach(at, tree, &attributes, None)
    }

    fn bind(
        &mut self,
        at: &Path,
        source: &Path,
        optional: bool,
        access: Access,
        make: bool,
    ) -> Result<(), RootError> {
        let found = match rustix::fs::lstat(source) {
            Ok(found) => FileType::from_raw_mode(found.st_mode),
            Err(Errno::NOENT | Errno::NOTDIR | Errno::ACCESS) if optional => return Ok(()),
            Err(Errno::NOENT) => return Err(RootError::Missing { path: source.to_owned() }),
            Err(e) => return Err(RootError::Open { path: source.to_owned(), source: e.into() }),
        };
        let failed = |e: Errno| RootError::Open { path: source.to_owned(), source: e.into() };
        // An earlier exec may have put links there, so that this one would show another place of the host.
        let in_workspace = at
            .parent()
            .and_then(|p| self.layout.covering(p))
            .is_some_and(|(_, entry)| matches!(entry, Entry::Workspace { .. }));
        if found == FileType::Symlink && in_workspace {
            return Err(failed(Errno::LOOP));
        }
        if found == FileType::Symlink {
            // As on the host: /bin is a link to usr/bin, /etc/localtime one into /usr/share.
            if make {
                let target = rustix::fs::readlink(source, Vec::new()).map_err(failed)?;
                self.ground.symlink(self.tmpfs, at, target.as_c_str())?;
            }
            return Ok(());
        }
        let is_directory = found == FileType::Directory;
        if make && is_directory {
            self.ground.directory(self.tmpfs, at)?;
        } else if make {
            self.ground.file(self.tmpfs, at, b"")?;
        }
        let tree = open_tree_without_links(source).map_err(failed)?;
        let (set, kind) = match (access, is_directory) {
            (Access::ReadOnly, true) => (mount::RDONLY, PlaceKind::ReadOnlyTree),
            (Access::ReadOnly, false) => (mount::RDONLY, PlaceKind::ReadOnlyFile),
            (Access::ReadWrite, true) => (0, PlaceKind::WritableTree),
            (Access::ReadWrite, false) => (0, PlaceKind::WritableFile),
        };
        let attributes = MountAttributes {
            set: set | mount::NOSUID | mount::NODEV,
            recursive: true,
            idmap: None,
        };
        self.attach(at, tree, &attributes, Some(kind))
    }

    fn attach(
        &mut self,
        at: &Path,
        tree: OwnedFd,
        attributes: &MountAttributes<'_>,
        kind: Option<PlaceKind>,
    ) -> Result<(), RootError> {
        mount::set_attributes(&tree, attributes)
            .map_err(|e| RootError::Restrict { path: at.to_owned(), source: e.into() })?;
        if let Some(kind) = kind {
            let fd = rustix::io::fcntl_dupfd_cloexec(&tree, 0)
                .map_err(|e| RootError::Open { path: at.to_owned(), source: e.into() })?;
            self.places.push(Place { fd, kind });
        }
        let in_workspace = at.parent().and_then(|p| self.layout.covering(p));
        match in_workspace {
            Some((_, Entry::Workspace { .. })) => {
                // After the pivot: from the new root.
                let at = c_path(at)?;
                self.attachments_in_workspace.push(Attachment { tree, at });
            }
            _ => {
                self.attachments.push(Attachment { tree, at: c_path(relative(at))? });
            }
        }
        Ok(())
    }
}

/// A detached, private copy of the mount tree at `path`. open_tree(2), Linux 5.2.
pub fn open_tree(path: &Path) -> Result<OwnedFd, Errno> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_RECURSIVE
        | OpenTreeFlags::AT_SYMLINK_NOFOLLOW;
    rustix::mount::open_tree(CWD, path, flags)
}

/// The same, where no part of the path may be a symbolic link.
fn open_tree_without_links(path: &Path) -> Result<OwnedFd, Errno> {
    clone_tree(open_without_links(path)?.as_fd())
}

fn open_without_links(path: &Path) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    rustix::fs::openat2(CWD, path, flags, Mode::empty(), resolve)
}

/// The same of an open directory, which no rename or symlink can swap any more.
pub fn clone_tree(directory: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_RECURSIVE
        | OpenTreeFlags::AT_EMPTY_PATH;
    rustix::mount::open_tree(directory, c"", flags)
}

/// A path as the child will hand it to the kernel.
pub fn c_path(path: &Path) -> Result<CString, RootError> {
    CString::new(path.as_os_str().as_bytes()).map_err(|e| RootError::Make {
        path: path.to_owned(),
        source: io::Error::new(io::ErrorKind::InvalidInput, e),
    })
}
