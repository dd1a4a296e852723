//! Builds the exec's root in the launcher: one detached tmpfs with every directory, file, link and
//! device of the layout, and one detached tree for each bind. Interprets the layout in one loop;
//! touches nothing that is visible on the host.
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

use rustix::fs::{CWD, FileType, Gid, Mode, OFlags, ResolveFlags, Uid};
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, FsPickFlags, MountAttrFlags, OpenTreeFlags};

use super::identity::{self, Identity};
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

/// Builds the root for `layout` in this tmpfs. `size` bounds all that the exec writes outside of its
/// workspace; `container` has the trees of [`Entry::OfContainer`].
pub fn build(
    tmpfs: BorrowedFd<'_>,
    layout: &Layout,
    container: &BTreeMap<PathBuf, OwnedFd>,
    size: u64,
    mode: identity::Mode,
    identity: &Identity,
) -> Result<Root, RootError> {
    bound(tmpfs, size)?;
    let mut builder = Builder {
        layout,
        container,
        mode,
        owner: (Uid::from_raw(identity.outside_uid), Gid::from_raw(identity.outside_gid)),
        tmpfs,
        made: BTreeMap::new(),
        attachments: Vec::new(),
        attachments_in_workspace: Vec::new(),
        places: Vec::new(),
    };
    builder.place(Path::new("/"), PlaceKind::TopDirectory)?;
    for (at, entry) in &layout.entries {
        builder.add(at, entry)?;
    }
    let Builder { attachments, attachments_in_workspace, mut places, .. } = builder;
    for (path, kind) in [
        ("etc", PlaceKind::Synthesised),
        ("run/sublet", PlaceKind::Synthesised),
        ("dev", PlaceKind::DeviceDirectory),
    ] {
        let fd = open_path(tmpfs, Path::new(path))
            .map_err(|e| RootError::Make { path: Path::new("/").join(path), source: e.into() })?;
        places.push(Place { fd, kind });
    }
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

fn bound(tmpfs: BorrowedFd<'_>, size: u64) -> Result<(), RootError> {
    let failed = |e: Errno| RootError::Tmpfs { doing: "bound a tmpfs", source: e.into() };
    let flags = FsPickFlags::FSPICK_CLOEXEC | FsPickFlags::FSPICK_EMPTY_PATH;
    let picked = rustix::mount::fspick(tmpfs, c"", flags).map_err(failed)?;
    rustix::mount::fsconfig_set_string(&picked, c"size", size.to_string())
        .and_then(|()| rustix::mount::fsconfig_reconfigure(&picked))
        .map_err(failed)
}

struct Builder<'a> {
    layout: &'a Layout,
    container: &'a BTreeMap<PathBuf, OwnedFd>,
    mode: identity::Mode,
    owner: (Uid, Gid),
    tmpfs: BorrowedFd<'a>,
    /// Directories that stand already.
    made: BTreeMap<PathBuf, ()>,
    attachments: Vec<Attachment>,
    attachments_in_workspace: Vec<Attachment>,
    places: Vec<Place>,
}

impl Builder<'_> {
    fn add(&mut self, at: &Path, entry: &Entry) -> Result<(), RootError> {
        // What lies in a tree of the host must be there already; its owner decides, not we.
        let above = at.parent().and_then(|p| self.layout.covering(p));
        if above.is_some() && !matches!(entry, Entry::Bind { .. } | Entry::Workspace { .. }) {
            return Ok(());
        }
        let make = above.is_none();
        let failed = |e: Errno| RootError::Make { path: at.to_owned(), source: e.into() };
        match entry {
            Entry::Directory | Entry::Inner | Entry::Secrets => self.directory(at),
            Entry::Workspace { .. } => {
                if make {
                    self.directory(at)
                } else {
                    Ok(())
                }
            }
            Entry::Scratch { sticky } => {
                let mode = if *sticky { 0o1777 } else { 0o700 };
                self.directory_of_mode(at, mode)?;
                if !sticky && self.mode == identity::Mode::Privileged {
                    self.give(relative(at)).map_err(failed)?;
                }
                self.place(at, PlaceKind::WritableTree)
            }
            Entry::File { content } => self.file(at, content),
            Entry::Probe => self.file(at, b""),
            Entry::Symlink { target } => {
                self.parents(at)?;
                rustix::fs::symlinkat(target, self.tmpfs, relative(at)).map_err(failed)
            }
            Entry::Device { major, minor } => self.device(at, *major, *minor),
            Entry::Bind { source, optional, access } => {
                self.bind(at, source, *optional, *access, make)
            }
            Entry::OfContainer { is_directory } => {
                let failed = |source: io::Error| RootError::Open { path: at.to_owned(), source };
                let tree = self.container.get(at);
                let tree = tree.ok_or_else(|| failed(Errno::NOENT.into()))?;
                let tree = tree.try_clone().map_err(failed)?;
                let kind = if *is_directory {
                    self.directory(at)?;
                    PlaceKind::ReadOnlyTree
                } else {
                    self.file(at, b"")?;
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
                    self.directory(at)?;
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

    fn parents(&mut self, at: &Path) -> Result<(), RootError> {
        match at.parent() {
            Some(parent) if parent != Path::new("/") => self.directory(parent),
            _ => Ok(()),
        }
    }

    fn directory(&mut self, at: &Path) -> Result<(), RootError> {
        self.directory_of_mode(at, 0o755)
    }

    fn directory_of_mode(&mut self, at: &Path, mode: u32) -> Result<(), RootError> {
        if self.made.contains_key(at) {
            return Ok(());
        }
        self.parents(at)?;
        match rustix::fs::mkdirat(self.tmpfs, relative(at), Mode::from(mode)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(e) => return Err(RootError::Make { path: at.to_owned(), source: e.into() }),
        }
        // A mount's parents below the exec's home are the exec's, as the rest of its home is.
        if self.mode == identity::Mode::Privileged && self.lies_in_home(at) {
            self.give(relative(at))
                .map_err(|e| RootError::Make { path: at.to_owned(), source: e.into() })?;
        }
        self.made.insert(at.to_owned(), ());
        Ok(())
    }

    fn lies_in_home(&self, at: &Path) -> bool {
        at.ancestors().skip(1).any(|above| {
            matches!(self.layout.entries.get(above), Some(Entry::Scratch { sticky: false }))
        })
    }

    fn file(&mut self, at: &Path, content: &[u8]) -> Result<(), RootError> {
        self.parents(at)?;
        self.create(at)
            .and_then(|file| write_all(file.as_fd(), content))
            .map_err(|e| RootError::Make { path: at.to_owned(), source: e.into() })
    }

    fn create(&self, at: &Path) -> Result<OwnedFd, Errno> {
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
        rustix::fs::openat(self.tmpfs, relative(at), flags, Mode::from(0o644))
    }

    fn give(&self, path: &Path) -> Result<(), Errno> {
        let (uid, gid) = self.owner;
        let flags = rustix::fs::AtFlags::SYMLINK_NOFOLLOW;
        rustix::fs::chownat(self.tmpfs, path, Some(uid), Some(gid), flags)
    }

    /// A node of our own where that is allowed, else the host's, shown at its place.
    fn device(&mut self, at: &Path, major: u32, minor: u32) -> Result<(), RootError> {
        self.parents(at)?;
        if self.mode == identity::Mode::Privileged {
            let device = rustix::fs::makedev(major, minor);
            let mode = Mode::from(0o666);
            let made = rustix::fs::mknodat(
                self.tmpfs,
                relative(at),
                FileType::CharacterDevice,
                mode,
                device,
            );
            match made {
                Ok(()) => return Ok(()),
                // A container's device cgroup or bounding set.
                Err(Errno::PERM) => {}
                Err(e) => return Err(RootError::Make { path: at.to_owned(), source: e.into() }),
            }
        }
        self.create(at).map_err(|e| RootError::Make { path: at.to_owned(), source: e.into() })?;
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
                self.parents(at)?;
                let target = rustix::fs::readlink(source, Vec::new()).map_err(failed)?;
                rustix::fs::symlinkat(target.as_c_str(), self.tmpfs, relative(at))
                    .map_err(|e| RootError::Make { path: at.to_owned(), source: e.into() })?;
            }
            return Ok(());
        }
        let is_directory = found == FileType::Directory;
        if make && is_directory {
            self.directory(at)?;
        } else if make {
            self.file(at, b"")?;
        }
        let tree = if in_workspace { open_tree_without_links(source) } else { open_tree(source) };
        let tree = tree.map_err(failed)?;
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

    fn place(&mut self, at: &Path, kind: PlaceKind) -> Result<(), RootError> {
        let fd = open_path(self.tmpfs, relative(at))
            .map_err(|e| RootError::Make { path: at.to_owned(), source: e.into() })?;
        self.places.push(Place { fd, kind });
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

fn open_path(base: BorrowedFd<'_>, path: &Path) -> Result<OwnedFd, Errno> {
    rustix::fs::openat(base, path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
}

/// Relative to the new root.
fn relative(at: &Path) -> &Path {
    match at.strip_prefix("/") {
        Ok(path) if path.as_os_str().is_empty() => Path::new("."),
        Ok(path) => path,
        Err(_) => at,
    }
}

/// A path as the child will hand it to the kernel.
pub fn c_path(path: &Path) -> Result<CString, RootError> {
    CString::new(path.as_os_str().as_bytes()).map_err(|e| RootError::Make {
        path: path.to_owned(),
        source: io::Error::new(io::ErrorKind::InvalidInput, e),
    })
}

fn write_all(fd: BorrowedFd<'_>, mut bytes: &[u8]) -> Result<(), Errno> {
    while !bytes.is_empty() {
        let written = rustix::io::write(fd, bytes)?;
        bytes = &bytes[written..];
    }
    Ok(())
}
