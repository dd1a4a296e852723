//! The two landlock calls that happen in the child, on a ruleset that the launcher made with the
//! `landlock` crate. landlock(7). Child-side: no allocation.

use std::os::fd::{AsFd, AsRawFd};

use rustix::io::Errno;

use super::process::last_errno;

#[repr(C, packed)]
struct PathBeneathAttr {
    allowed_access: u64,
    parent_fd: i32,
}

/// Adds a rule for what lies beneath `parent`: for places that exist only in the child's namespaces.
pub fn allow_beneath(
    ruleset: impl AsFd,
    parent: impl AsFd,
    allowed_access: u64,
) -> Result<(), Errno> {
    const LANDLOCK_RULE_PATH_BENEATH: libc::c_int = 1;
    let attr = PathBeneathAttr { allowed_access, parent_fd: parent.as_fd().as_raw_fd() };
    // SAFETY: `attr` has the layout of struct landlock_path_beneath_attr and lives across the call.
    let done = unsafe {
        libc::syscall(
            libc::SYS_landlock_add_rule,
            ruleset.as_fd().as_raw_fd(),
            LANDLOCK_RULE_PATH_BENEATH,
            &raw const attr,
            0,
        )
    };
    if done < 0 { Err(last_errno()) } else { Ok(()) }
}

/// Enforces the ruleset on this thread and all that it starts. Needs no_new_privs.
pub fn restrict_self(ruleset: impl AsFd) -> Result<(), Errno> {
    // SAFETY: the call takes a descriptor and a flag word, no memory.
    let done =
        unsafe { libc::syscall(libc::SYS_landlock_restrict_self, ruleset.as_fd().as_raw_fd(), 0) };
    if done < 0 { Err(last_errno()) } else { Ok(()) }
}

/// The kernel's Landlock ABI, 0 if there is none.
pub fn abi_version() -> u32 {
    const LANDLOCK_CREATE_RULESET_VERSION: u32 = 1;
    // SAFETY: with the VERSION flag the call takes a null attribute of size 0 (landlock_create_ruleset(2)).
    let version = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<u8>(),
            0,
            LANDLOCK_CREATE_RULESET_VERSION,
        )
    };
    u32::try_from(version).unwrap_or(0)
}
