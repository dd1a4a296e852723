//! What a container is given: a small tmpfs at `/run/sublet` with the run's socket and this sublet, all
//! read-only. Made in the container's own mount namespace, before its root is the root.
//!
//! No link of the image is followed, and nothing is mounted anywhere but on a directory that was opened
//! below the root file system.
#![forbid(unsafe_code)]

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, mkdirat, openat, openat2, symlinkat};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, fsconfig_create,
    fsconfig_set_string, fsmount, fsopen, move_mount, open_tree,
};

use crate::sys::mount::{self, MountAttributes};
use crate::sys::process;

/// Where it is, relative to the root file system.
pub const PLACE: [&str; 2] = ["run", "sublet"];

#[derive(Debug, thiserror::Error)]
#[error("could not {doing} for the container")]
pub struct MountError {
    doing: String,
    source: io::Error,
}

trait For<T> {
    fn to(self, doing: &str) -> Result<T, MountError>;
}

impl<T> For<T> for Result<T, Errno> {
    fn to(self, doing: &str) -> Result<T, MountError> {
        self.map_err(|e| MountError { doing: doing.to_owned(), source: e.into() })
    }
}

/// Gives the container its socket, out of the run's directory of the broker, and the binary.
pub fn give(root: BorrowedFd<'_>, runs: &Path, binary: Option<&Path>) -> Result<(), MountError> {
    let place = make_directories(root)?;
    let shelf = fsopen(c"tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).to("open a tmpfs")?;
    for (key, value) in [(c"size", c"65536"), (c"nr_inodes", c"16"), (c"mode", c"0755")] {
        fsconfig_set_string(&shelf, key, value).to("configure a tmpfs")?;
    }
    fsconfig_create(&shelf).to("configure a tmpfs")?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let shelf = fsmount(&shelf, FsMountFlags::FSMOUNT_CLOEXEC, attributes).to("mount a tmpfs")?;
    attach(&shelf, &place).to("attach /run/sublet")?;

    let mode = Mode::from(0o755);
    mkdirat(&shelf, "bin", mode).to("make /run/sublet/bin")?;
    mkdirat(&shelf, "agent", mode).to("make /run/sublet/agent")?;
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
    openat(&shelf, "bin/sublet", flags, mode).to("make /run/sublet/bin/sublet")?;
    symlinkat("agent/agent.sock", &shelf, "agent.sock").to("make /run/sublet/agent.sock")?;

    let fixed = mount::RDONLY | mount::NOSUID | mount::NODEV;
    let file = binary_file(binary)?;
    show(file.as_fd(), shelf.as_fd(), c"bin/sublet", fixed).to("show /run/sublet/bin/sublet")?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let real = runs.parent().and_then(|above| above.canonicalize().ok());
    let runs = match (real, runs.file_name()) {
        // The way there may have links; what the broker made may not.
        (Some(above), Some(name)) => above.join(name),
        _ => runs.to_owned(),
    };
    let directory = openat2(CWD, &runs, flags, Mode::empty(), resolve)
        .to(&format!("open the run's directory {}", runs.display()))?;
    show(directory.as_fd(), shelf.as_fd(), c"agent", fixed | mount::NOEXEC)
        .to("show the run's socket")?;
    // Where root's hook has made the directory for them, there are tokens.
    if opened_beneath(directory.as_fd(), Path::new("identity")).is_ok() {
        symlinkat("agent/identity", &shelf, "identity").to("make /run/sublet/identity")?;
    }
    let attributes = MountAttributes { set: fixed | mount::NOEXEC, ..MountAttributes::default() };
    mount::set_attributes(&shelf, &attributes).to("make /run/sublet read-only")
}

/// The same from outside, where what runs inside is not the host's root and cannot reach the run's directory:
/// in the mount namespace of the container's process, which has its mounts by then. This process stays there,
/// and has nothing else to do.
pub fn give_from_outside(
    mounts: BorrowedFd<'_>,
    rootfs: &Path,
    runs: &Path,
    binary: Option<&Path>,
) -> Result<(), MountError> {
    // Of this namespace none is shown there: by its path it is there too, before the root is another.
    let own = std::fs::read_link("/proc/self/exe")
        .map_err(|source| MountError { doing: "find this program's file".to_owned(), source })?;
    process::enter_namespace(mounts, libc::CLONE_NEWNS).to("enter the mount namespace")?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let root = openat(CWD, rootfs, flags, Mode::empty()).to("open its root file system")?;
    give(root.as_fd(), runs, Some(binary.unwrap_or(&own)))
}

/// Whether the container has what it was to be given.
pub fn is_given(root: BorrowedFd<'_>) -> bool {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    openat2(root, "run/sublet/bin/sublet", flags, Mode::empty(), resolve).is_ok()
}

/// The file that the container shall have: the one that the host names, or this very one.
fn binary_file(named: Option<&Path>) -> Result<OwnedFd, MountError> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let path = named.map_or_else(|| PathBuf::from("/proc/self/exe"), Path::to_owned);
    openat(CWD, &path, flags, Mode::empty()).to(&format!("open {}", path.display()))
}

/// Which of the directories are not there yet, outermost first. Looked at from outside.
pub fn missing(root: BorrowedFd<'_>) -> Vec<PathBuf> {
    let paths = (1..=PLACE.len()).map(|count| PLACE[..count].iter().collect::<PathBuf>());
    paths.filter(|path| open_beneath(root, path) == Err(Errno::NOENT)).collect()
}

/// Removes those that are empty and that were missing before, innermost first.
pub fn remove(root: BorrowedFd<'_>, made: &[PathBuf]) {
    for path in made.iter().rev() {
        let (Some(above), Some(name)) = (path.parent(), path.file_name()) else { continue };
        let above = if above.as_os_str().is_empty() { Path::new(".") } else { above };
        if let Ok(above) = opened_beneath(root, above) {
            // One that is in use by now is not ours any more.
            match rustix::fs::unlinkat(above, name, rustix::fs::AtFlags::REMOVEDIR) {
                Ok(()) | Err(_) => {}
            }
        }
    }
}

fn make_directories(root: BorrowedFd<'_>) -> Result<OwnedFd, MountError> {
    let mut at = root
        .try_clone_to_owned()
        .map_err(|source| MountError { doing: "open its root file system".to_owned(), source })?;
    for name in PLACE {
        match mkdirat(&at, name, Mode::from(0o755)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(e) => {
                let doing = "make the mount point /run/sublet (an image that cannot be written \
                             needs that directory)";
                return Err(e).to(doing);
            }
        }
        at = opened_beneath(at.as_fd(), Path::new(name))
            .to("open /run/sublet, which may be no symbolic link,")?;
    }
    Ok(at)
}

fn opened_beneath(root: BorrowedFd<'_>, path: &Path) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    openat2(root, path, flags, Mode::empty(), resolve)
}

fn open_beneath(root: BorrowedFd<'_>, path: &Path) -> Result<(), Errno> {
    opened_beneath(root, path).map(drop)
}

fn attach(tree: &OwnedFd, place: &OwnedFd) -> Result<(), Errno> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(tree, c"", place, c"", flags)
}

fn show(
    what: BorrowedFd<'_>,
    shelf: BorrowedFd<'_>,
    at: &CStr,
    attributes: u64,
) -> Result<(), Errno> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    let tree = open_tree(what, c"", flags)?;
    mount::set_attributes(
        &tree,
        &MountAttributes { set: attributes, ..MountAttributes::default() },
    )?;
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    attach(&tree, &openat(shelf, at, flags, Mode::empty())?)
}
