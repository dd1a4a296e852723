//! The mount calls that rustix lacks. mount_setattr(2), Linux 5.12.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use rustix::io::Errno;

use super::process::last_errno;

pub const RDONLY: u64 = libc::MOUNT_ATTR_RDONLY;
pub const NOSUID: u64 = libc::MOUNT_ATTR_NOSUID;
pub const NODEV: u64 = libc::MOUNT_ATTR_NODEV;
pub const NOEXEC: u64 = libc::MOUNT_ATTR_NOEXEC;

/// What to set on a mount and, with `recursive`, all below it.
#[derive(Debug, Default)]
pub struct MountAttributes<'a> {
    pub set: u64,
    pub recursive: bool,
    /// Map ownership through this user namespace (an idmapped mount).
    pub idmap: Option<BorrowedFd<'a>>,
}

/// Changes a (detached) mount. Its propagation becomes private, so that nothing crosses to the host.
/// Child-side: no allocation.
pub fn set_attributes(mount: impl AsFd, attributes: &MountAttributes<'_>) -> Result<(), Errno> {
    let mut attr = libc::mount_attr {
        attr_set: attributes.set,
        attr_clr: 0,
        propagation: libc::MS_PRIVATE,
        userns_fd: 0,
    };
    if let Some(user_namespace) = attributes.idmap {
        attr.attr_set |= libc::MOUNT_ATTR_IDMAP;
        attr.userns_fd = user_namespace.as_raw_fd() as u64;
    }
    let mut flags = libc::AT_EMPTY_PATH;
    if attributes.recursive {
        flags |= libc::AT_RECURSIVE;
    }
    // SAFETY: the path is a static empty C string; `attr` has the size that is told and lives across.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_fd().as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attr,
            std::mem::size_of::<libc::mount_attr>(),
        )
    };
    if done < 0 { Err(last_errno()) } else { Ok(()) }
}

/// Makes `new_root` (the current directory) the root and drops the old one: pivot_root(".", "."),
/// then a lazy unmount of what lies beneath. pivot_root(2). Child-side: no allocation.
pub fn pivot_to_current_directory() -> Result<(), Errno> {
    rustix::process::pivot_root(c".", c".")?;
    rustix::mount::unmount(c".", rustix::mount::UnmountFlags::DETACH)?;
    rustix::process::chdir(c"/")
}
