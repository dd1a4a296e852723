//! What the broker gives up: being looked at, root's identity, capabilities, keyrings, new privileges, and
//! every system call that it does not need. Landlock has its own file.
//!
//! The raw calls change the calling thread alone, which is the only one.
#![forbid(unsafe_code)]

use std::io;
use std::os::unix::net::UnixStream;

use caps::CapSet;
use nix::sched::CloneFlags;
use nix::unistd::{Gid, Uid};
use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketType};
use rustix::process::Resource;

use super::SettleError;
use super::attempt::Attempt;
use crate::host::{Account, limit};
use crate::sandbox::seccomp as filters;
use crate::sys::{ids, memory, process, seccomp};

/// Descriptors: a thousand execs have some twenty each, ten thousand runs one.
const OPEN_FILES: u64 = 262_144;

/// The id that setresuid(2) leaves as it is.
const UNCHANGED: u32 = u32::MAX;

pub(super) fn failed<E: Into<io::Error>>(doing: &'static str) -> impl FnOnce(E) -> SettleError {
    move |e| SettleError::Step { doing, source: e.into() }
}

/// Each thread would have to give up the same, and one that is not ours could hold a lock for ever.
pub(super) fn refuse_threads() -> Result<(), SettleError> {
    let tasks = std::fs::read_dir("/proc/self/task").map_err(failed("count threads"))?;
    match tasks.count() {
        1 => Ok(()),
        threads => Err(SettleError::Threads { threads }),
    }
}

/// Before the vault's key is in reach: no tracer, no core file, no /proc entry for another process of the
/// same user.
pub(super) fn close_to_others() -> Result<(), SettleError> {
    memory::set_dumpable(false).map_err(failed("become undumpable"))?;
    memory::forbid_core_dumps().map_err(failed("forbid core files"))?;
    // For the directories that are made now, through which others pass; the caller's may be anything.
    rustix::process::umask(Mode::WGRP | Mode::WOTH);
    Ok(())
}

pub(super) fn raise_limits() -> Result<(), SettleError> {
    limit::raise(Resource::Nofile, OPEN_FILES).map_err(failed("raise the limit of descriptors"))?;
    limit::raise(Resource::Memlock, limit::LOCKED_MEMORY)
        .map_err(failed("raise the limit of locked memory"))
}

pub(super) fn become_account(account: Account) -> Result<(), SettleError> {
    // What the broker makes is its own, but for the sockets that it opens to others by name.
    rustix::process::umask(Mode::RWXG | Mode::RWXO);
    if rustix::process::geteuid().as_raw() == account.uid {
        return Ok(());
    }
    ids::become_user(account.uid, account.gid, true).map_err(failed("become the broker's user"))?;
    // A change of credentials sets it as /proc/sys/fs/suid_dumpable says (prctl(2)).
    memory::set_dumpable(false).map_err(failed("stay undumpable"))
}

pub(super) fn drop_capabilities() -> Result<(), SettleError> {
    let capabilities = |doing| move |e| SettleError::Step { doing, source: io::Error::other(e) };
    let reading = "read the capabilities";
    let may_bound = caps::has_cap(None, CapSet::Effective, caps::Capability::CAP_SETPCAP)
        .map_err(capabilities(reading))?;
    let mut sets = vec![CapSet::Ambient, CapSet::Effective, CapSet::Permitted, CapSet::Inheritable];
    if may_bound {
        ids::drop_bounding_set().map_err(failed("empty the bounding set"))?;
        ids::drop_all_capabilities().map_err(failed("drop all capabilities"))?;
        sets.push(CapSet::Bounding);
    } else {
        // The bounding set stays: without new privileges nothing is ever taken from it.
        for &set in &sets {
            caps::clear(None, set).map_err(capabilities("drop all capabilities"))?;
        }
    }
    for set in sets {
        let left = caps::read(None, set).map_err(capabilities(reading))?;
        if !left.is_empty() {
            let outcome = format!("{set:?} holds {left:?}");
            let (wall, attempt) = ("capabilities", "have some");
            return Err(SettleError::StillPossible { wall, attempt, outcome });
        }
    }
    let refusals = &[libc::EPERM];
    Attempt { wall: "capabilities", what: "set its groups", refusals }
        .must_fail(nix::unistd::setgroups(&[Gid::from_raw(0)]))?;
    if rustix::process::getuid().is_root() {
        return Ok(());
    }
    let (keep, root) = (Uid::from_raw(UNCHANGED), Uid::from_raw(0));
    Attempt { wall: "its user", what: "become root", refusals }
        .must_fail(nix::unistd::setresuid(keep, root, keep))?;
    let (keep, root) = (Gid::from_raw(UNCHANGED), Gid::from_raw(0));
    if rustix::process::getgid().is_root() {
        return Ok(());
    }
    Attempt { wall: "its user", what: "join root's group", refusals }
        .must_fail(nix::unistd::setresgid(keep, root, keep))
}

/// A session keyring of its own: that of whoever started the service may hold keys.
pub(super) fn forget_keyrings() -> Result<(), SettleError> {
    match process::join_new_session_keyring() {
        // A kernel without keyrings, or a container that forbids them. The filter does so in any case.
        Ok(()) | Err(Errno::NOSYS | Errno::PERM) => Ok(()),
        Err(e) => Err(failed("join a new session keyring")(e)),
    }
}

pub(super) fn refuse_new_privileges() -> Result<(), SettleError> {
    process::set_no_new_privileges().map_err(failed("set no_new_privs"))?;
    match rustix::thread::no_new_privs().map_err(failed("read no_new_privs"))? {
        true => Ok(()),
        false => Err(SettleError::StillPossible {
            wall: "new privileges",
            attempt: "gain some by an execve",
            outcome: "no_new_privs reads as 0".to_owned(),
        }),
    }
}

/// Installs `seccomp/broker.json`. All threads that come inherit it.
pub(super) fn filter_system_calls() -> Result<(), SettleError> {
    let filter = filters::builtin("broker").ok_or(SettleError::NoFilter)?;
    seccomp::install(filter.as_slice()).map_err(failed("install the system-call filter"))?;
    seccomp::see_it_refused().map_err(failed("see the system-call filter refuse clone3"))?;
    let refused = |what| Attempt { wall: "system calls", what, refusals: &[libc::EPERM] };
    // The empty path would be ENOENT.
    refused("execute a program").must_fail(nix::unistd::execve(c"", NOTHING, NOTHING))?;
    refused("make an Internet socket").must_fail(rustix::net::socket(
        AddressFamily::INET,
        SocketType::STREAM,
        None,
    ))?;
    refused("connect to a socket").must_fail(UnixStream::connect("/nonexistent"))?;
    refused("enter namespaces").must_fail(nix::sched::unshare(CloneFlags::empty()))?;
    refused("signal a process")
        .must_fail(rustix::process::test_kill_process(rustix::process::getpid()))?;
    let unchanged = Uid::from_raw(UNCHANGED);
    refused("change its user").must_fail(nix::unistd::setresuid(unchanged, unchanged, unchanged))
}

const NOTHING: &[&std::ffi::CStr] = &[];
