//! The directory of a container's identity tokens: made by root, written by the broker, read by the
//! container's user and nobody else, on a tmpfs. The broker, which has no privilege, can neither make nor
//! widen it; where it is not there, nothing is projected.
#![forbid(unsafe_code)]

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{
    AtFlags, CWD, Mode, OFlags, XattrFlags, fchown, fsetxattr, fstat, fstatfs, mkdirat, openat,
    unlinkat,
};
use rustix::io::Errno;

use crate::host::{agent_socket, identity_directory};
use crate::model::id::RunId;

/// statfs(2).
const TMPFS_MAGIC: i64 = 0x0102_1994;

#[derive(Debug, thiserror::Error)]
#[error("could not {doing} for the container's identity tokens")]
pub struct DirectoryError {
    doing: &'static str,
    source: io::Error,
}

trait For<T> {
    fn to(self, doing: &'static str) -> Result<T, DirectoryError>;
}

impl<T> For<T> for Result<T, Errno> {
    fn to(self, doing: &'static str) -> Result<T, DirectoryError> {
        self.map_err(|e| DirectoryError { doing, source: e.into() })
    }
}

/// Makes it, in the directory that the broker has made for the run. `reader`: the container's user, as the
/// host numbers it.
pub fn make(runtime_dir: &Path, run: &RunId, reader: u32) -> Result<(), DirectoryError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let socket = agent_socket(runtime_dir, run);
    let above = openat(CWD, socket.parent().unwrap_or(&socket), flags, Mode::empty())
        .to("open the run's directory")?;
    if fstatfs(&above).to("look at the run's directory")?.f_type != TMPFS_MAGIC {
        return Err(DirectoryError {
            doing: "use the directory of the sockets, which is on a disk (`[host] runtime_dir` on a tmpfs),",
            source: io::ErrorKind::Unsupported.into(),
        });
    }
    let owner = fstat(&above).to("look at the run's directory")?.st_uid;
    mkdirat(&above, "identity", Mode::RWXU).to("make the directory")?;
    let opened = open_to(above.as_fd(), owner, reader);
    if opened.is_err() {
        // Still root's own: the broker could not remove it.
        unlinkat(&above, "identity", AtFlags::REMOVEDIR).to("remove the directory again")?;
    }
    opened
}

fn open_to(above: BorrowedFd<'_>, owner: u32, reader: u32) -> Result<(), DirectoryError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let directory = openat(above, "identity", flags, Mode::empty()).to("open the directory")?;
    let list = access_list(reader);
    for name in [c"system.posix_acl_access", c"system.posix_acl_default"] {
        fsetxattr(&directory, name, &list, XattrFlags::empty()).to("set the access list")?;
    }
    let owner = rustix::fs::Uid::from_raw(owner);
    fchown(directory.as_fd(), Some(owner), None).to("give the directory to the broker")
}

/// Its owner everything, `reader` to read and to pass, others nothing. acl(5); the layout is the kernel's
/// `struct posix_acl_xattr_header` and `_entry`.
fn access_list(reader: u32) -> Vec<u8> {
    const VERSION: u32 = 2;
    const NO_ONE: u32 = u32::MAX;
    const ENTRIES: [(u16, u16); 5] = [
        (0x01, 7), // user::rwx
        (0x02, 5), // user:READER:r-x
        (0x04, 0), // group::---
        (0x10, 5), // mask::r-x
        (0x20, 0), // other::---
    ];
    let mut list = VERSION.to_le_bytes().to_vec();
    for (tag, permissions) in ENTRIES {
        let id = if tag == 0x02 { reader } else { NO_ONE };
        list.extend(tag.to_le_bytes());
        list.extend(permissions.to_le_bytes());
        list.extend(id.to_le_bytes());
    }
    list
}

/// Zeroes and removes what stands there; the broker has done so, unless it was down. Of what is not a plain
/// file of the directory's owner, only the name goes.
pub fn wipe(runtime_dir: &Path, run: &RunId) -> io::Result<()> {
    let directory = identity_directory(runtime_dir, run);
    let found = match directory.symlink_metadata() {
        Ok(found) => found,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e),
    };
    if !found.is_dir() {
        return Ok(());
    }
    for entry in std::fs::read_dir(&directory)? {
        let path = entry?.path();
        if path.symlink_metadata()?.is_dir() {
            for inner in std::fs::read_dir(&path)? {
                wipe_file(&inner?.path(), found.uid())?;
            }
            std::fs::remove_dir(&path)?;
        } else {
            wipe_file(&path, found.uid())?;
        }
    }
    std::fs::remove_dir(&directory)
}

fn wipe_file(path: &Path, owner: u32) -> io::Result<()> {
    // Not waiting: it may be a pipe.
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    if let Ok(file) = OpenOptions::new().write(true).custom_flags(flags).open(path) {
        let found = file.metadata()?;
        if found.is_file() && found.uid() == owner && found.nlink() == 1 {
            file.write_all_at(&vec![0; found.len() as usize], 0)?;
        }
    }
    std::fs::remove_file(path)
}
