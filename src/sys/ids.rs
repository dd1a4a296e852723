//! Who a process is: uids, gids, capabilities, limits. credentials(7), capabilities(7), setrlimit(2).
//! Everything here but the readers is child-side: raw system calls of the calling thread, no allocation.

use rustix::io::Errno;

use super::process::last_errno;

/// The last capability number that is tried: the kernel refuses those that it does not know.
const LAST_CAPABILITY: libc::c_ulong = 63;

/// Becomes `uid` and `gid`, with no supplementary groups, and keeps capabilities across the change.
///
/// The raw calls are used because libc's wrappers signal other threads; there are none here.
pub fn become_user(uid: u32, gid: u32, drop_groups: bool) -> Result<(), Errno> {
    keep_capabilities()?;
    // SAFETY: these calls take integers (a null list of zero groups) and touch no memory of ours.
    unsafe {
        if drop_groups {
            check(libc::syscall(libc::SYS_setgroups, 0, std::ptr::null::<u32>()))?;
        }
        check(libc::syscall(libc::SYS_setresgid, gid, gid, gid))?;
        check(libc::syscall(libc::SYS_setresuid, uid, uid, uid))
    }
}

/// `SECBIT_NO_SETUID_FIXUP`: leaving uid 0 does not clear the capability sets. prctl(2).
fn keep_capabilities() -> Result<(), Errno> {
    const SECBIT_NO_SETUID_FIXUP: libc::c_ulong = 1 << 2;
    // SAFETY: prctl with integer arguments touches no memory.
    check(unsafe { libc::prctl(libc::PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP, 0, 0, 0) }.into())
}

/// Empties the bounding set: whatever this process or a child executes can give it no capability.
pub fn drop_bounding_set() -> Result<(), Errno> {
    for capability in 0..=LAST_CAPABILITY {
        // SAFETY: prctl with integer arguments touches no memory.
        match check(unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) }.into()) {
            Ok(()) => {}
            // Past the kernel's last capability.
            Err(Errno::INVAL) => break,
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Empties the ambient set, and then permitted, effective and inheritable, and locks the securebits so
/// that uid 0 is nothing special. The bounding set is [`drop_bounding_set`]'s.
pub fn drop_all_capabilities() -> Result<(), Errno> {
    // SECBIT_NOROOT, NO_SETUID_FIXUP, KEEP_CAPS off, NO_CAP_AMBIENT_RAISE, each with its lock.
    const SECUREBITS: libc::c_ulong = 0b1110_1111;
    // SAFETY: prctl with integer arguments touches no memory.
    unsafe {
        check(libc::prctl(libc::PR_SET_SECUREBITS, SECUREBITS, 0, 0, 0).into())?;
        check(libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0).into())?;
    }
    set_capabilities(0)
}

#[repr(C)]
struct CapHeader {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct CapData {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

fn set_capabilities(set: u64) -> Result<(), Errno> {
    const LINUX_CAPABILITY_VERSION_3: u32 = 0x2008_0522;
    let mut header = CapHeader { version: LINUX_CAPABILITY_VERSION_3, pid: 0 };
    let word = |shift: u32| CapData {
        effective: (set >> shift) as u32,
        permitted: (set >> shift) as u32,
        inheritable: 0,
    };
    let data = [word(0), word(32)];
    // SAFETY: version 3 reads one header and two data structs (capget(2)), which live across the call.
    check(unsafe { libc::syscall(libc::SYS_capset, &raw mut header, data.as_ptr()) })
}

/// Sets soft and hard limit, lowered to the present hard limit: raising it needs a capability.
pub fn limit(resource: u32, soft: u64, hard: u64) -> Result<(), Errno> {
    // SAFETY: `present` and `wanted` are live structs of the type that prlimit(2) reads and writes;
    // pid 0 is this process.
    unsafe {
        let mut present: libc::rlimit64 = std::mem::zeroed();
        check(libc::syscall(
            libc::SYS_prlimit64,
            0,
            resource,
            std::ptr::null::<libc::rlimit64>(),
            &raw mut present,
        ))?;
        let hard = hard.min(present.rlim_max);
        let wanted = libc::rlimit64 { rlim_cur: soft.min(hard), rlim_max: hard };
        check(libc::syscall(
            libc::SYS_prlimit64,
            0,
            resource,
            &raw const wanted,
            std::ptr::null_mut::<libc::rlimit64>(),
        ))
    }
}

fn check(result: libc::c_long) -> Result<(), Errno> {
    if result < 0 { Err(last_errno()) } else { Ok(()) }
}
