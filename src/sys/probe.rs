//! Questions to the kernel, for `sublet doctor`: is this there, and is it permitted to us?
//!
//! Every probe is harmless. What needs namespaces happens in a forked child, in fresh ones with private
//! propagation, and ends with it; mounts stay detached and are dropped with their descriptor.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;

use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, OpenTreeFlags,
};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, Signal, WaitOptions, waitpid};
use rustix::thread::UnshareFlags;

/// The highest Landlock ABI that the kernel offers. landlock_create_ruleset(2), Linux 5.13.
///
/// # Errors
/// `ENOSYS` if it is not built in, `EOPNOTSUPP` if it was not enabled at boot.
pub fn landlock_abi() -> io::Result<u32> {
    const LANDLOCK_CREATE_RULESET_VERSION: u32 = 1;
    // SAFETY: with this flag landlock_create_ruleset(2) wants a null attribute of size 0, touches no
    // memory and returns a number, not a descriptor.
    let abi = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<libc::c_void>(),
            0_usize,
            LANDLOCK_CREATE_RULESET_VERSION,
        )
    };
    u32::try_from(abi).map_err(|_| io::Error::last_os_error())
}

/// What a seccomp filter may answer. seccomp(2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SeccompAction {
    KillProcess,
    Errno,
    Log,
    UserNotification,
}

/// Whether filters may use `action`. `SECCOMP_GET_ACTION_AVAIL`, Linux 4.14.
pub fn seccomp_has(action: SeccompAction) -> bool {
    let action: u32 = match action {
        SeccompAction::KillProcess => libc::SECCOMP_RET_KILL_PROCESS,
        SeccompAction::Errno => libc::SECCOMP_RET_ERRNO,
        SeccompAction::Log => libc::SECCOMP_RET_LOG,
        SeccompAction::UserNotification => libc::SECCOMP_RET_USER_NOTIF,
    };
    // SAFETY: this operation only reads one u32, which lives until the call returns; no filter is set.
    let answer = unsafe {
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_GET_ACTION_AVAIL, 0_u32, &raw const action)
    };
    answer == 0
}

/// Whether clone3(2) reaches the kernel. Linux 5.3; some container filters answer `ENOSYS`.
pub fn has_clone3() -> bool {
    // SAFETY: a size of 0 is refused with EINVAL before the argument is looked at: nothing is cloned.
    let answer =
        unsafe { libc::syscall(libc::SYS_clone3, std::ptr::null::<libc::c_void>(), 0_usize) };
    answer < 0 && io::Error::last_os_error().raw_os_error() == Some(libc::EINVAL)
}

/// Makes one secret memory area and drops it. memfd_secret(2), Linux 5.14.
///
/// # Errors
/// `ENOSYS` if the kernel lacks it or was booted without `secretmem.enable=1` (needed before 6.5).
pub fn memfd_secret() -> io::Result<()> {
    // SAFETY: memfd_secret(2) takes one flag word and touches no memory of ours.
    let raw = unsafe { libc::syscall(libc::SYS_memfd_secret, libc::O_CLOEXEC) };
    if raw < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call returned a new descriptor that nothing else owns.
    drop(unsafe { OwnedFd::from_raw_fd(raw as i32) });
    Ok(())
}

/// Makes one memfd that can never be executed and drops it. `MFD_NOEXEC_SEAL`, Linux 6.3.
///
/// # Errors
/// `EINVAL` if the kernel does not know the flag.
pub fn noexec_memfd() -> io::Result<()> {
    use rustix::fs::MemfdFlags;
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | MemfdFlags::NOEXEC_SEAL;
    rustix::fs::memfd_create("sublet-doctor", flags)?;
    Ok(())
}

/// One rung of the ladder that every exec climbs. The order is that of [`namespaces`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Step {
    UserNamespace,
    IdMaps,
    OtherNamespaces,
    PrivateMounts,
    FirstProcess,
    Tmpfs,
    Proc,
}

impl Step {
    const ALL: [Step; 7] = [
        Step::UserNamespace,
        Step::IdMaps,
        Step::OtherNamespaces,
        Step::PrivateMounts,
        Step::FirstProcess,
        Step::Tmpfs,
        Step::Proc,
    ];

    /// What was tried, as a person would say it.
    pub fn tried(self) -> &'static str {
        match self {
            Step::UserNamespace => "make a user namespace",
            Step::IdMaps => "map this user in it",
            Step::OtherNamespaces => "make mount, pid, ipc, uts, cgroup and net namespaces",
            Step::PrivateMounts => "make its mounts private",
            Step::FirstProcess => "start its first process",
            Step::Tmpfs => "make a detached tmpfs",
            Step::Proc => "mount a /proc of its own",
        }
    }
}

/// In which user namespace the others are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Within {
    /// A fresh one, as every exec has.
    FreshUserNamespace,
    /// This process's own: needs CAP_SYS_ADMIN.
    OwnUserNamespace,
}

/// What became of each step: absent if an earlier one stopped the climb.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Climb(pub Vec<(Step, Result<(), Errno>)>);

impl Climb {
    pub fn outcome(&self, step: Step) -> Option<Result<(), Errno>> {
        self.0.iter().find(|(s, _)| *s == step).map(|(_, outcome)| *outcome)
    }

    /// Whether `step` was reached and done.
    pub fn reached(&self, step: Step) -> bool {
        self.outcome(step) == Some(Ok(()))
    }

    pub fn first_refusal(&self) -> Option<(Step, Errno)> {
        self.0.iter().find_map(|(step, outcome)| outcome.err().map(|e| (*step, e)))
    }
}

/// Climbs the ladder in a forked child and reports each rung.
///
/// # Errors
/// If the child cannot be made or heard.
pub fn namespaces(within: Within) -> io::Result<Climb> {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
    // All that needs memory is made before the fork.
    let maps = IdMaps::of_this_process();
    // SAFETY: the child calls only `climb`, which makes raw system calls on what was prepared here: it
    // neither allocates nor locks nor unwinds, and leaves by _exit(2). Thus a lock that another thread
    // held at the fork is never waited for.
    let child = unsafe { libc::fork() };
    match child {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            climb(within, &maps, writer.as_fd());
            // SAFETY: _exit(2) ends the process without running anything of ours.
            unsafe { libc::_exit(0) }
        }
        pid => {
            drop(writer);
            let told = read_to_end(&reader);
            reap(pid)?;
            Ok(Climb(told?.chunks_exact(5).filter_map(decode).collect()))
        }
    }
}

/// The child's side. Stops at the first rung without which the next cannot be tried.
fn climb(within: Within, maps: &IdMaps, report: BorrowedFd<'_>) {
    let tell = |step: Step, outcome: Result<(), Errno>| {
        let errno = outcome.err().map_or(0, Errno::raw_os_error);
        let mut line = [step as u8, 0, 0, 0, 0];
        line[1..].copy_from_slice(&errno.to_ne_bytes());
        // If the parent is gone there is no one to tell.
        let _ = rustix::io::write(report, &line);
        outcome.is_ok()
    };
    if rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).is_err() {
        return;
    }
    if within == Within::FreshUserNamespace
        && !(tell(Step::UserNamespace, unshare(UnshareFlags::NEWUSER))
            && tell(Step::IdMaps, maps.write()))
    {
        return;
    }
    let others = UnshareFlags::NEWNS
        | UnshareFlags::NEWPID
        | UnshareFlags::NEWIPC
        | UnshareFlags::NEWUTS
        | UnshareFlags::NEWCGROUP
        | UnshareFlags::NEWNET;
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    if !(tell(Step::OtherNamespaces, unshare(others))
        && tell(Step::PrivateMounts, rustix::mount::mount_change(c"/", private)))
    {
        return;
    }
    // SAFETY: as in `namespaces`; this child is single-threaded.
    let first = unsafe { libc::fork() };
    if first != 0 {
        tell(Step::FirstProcess, if first > 0 { Ok(()) } else { Err(last_errno()) });
        if let Some(pid) = Pid::from_raw(first) {
            while matches!(waitpid(Some(pid), WaitOptions::empty()), Err(Errno::INTR)) {}
        }
        return;
    }
    tell(Step::Tmpfs, detached(c"tmpfs"));
    tell(Step::Proc, detached(c"proc"));
    // SAFETY: as in `namespaces`.
    unsafe { libc::_exit(0) }
}

fn unshare(namespaces: UnshareFlags) -> Result<(), Errno> {
    // SAFETY: no CLONE_FILES, FS or SYSVSEM among them: nothing that Rust code relies on is unshared.
    unsafe { rustix::thread::unshare_unsafe(namespaces) }
}

/// A mount that is attached nowhere and dropped at once.
fn detached(kind: &CStr) -> Result<(), Errno> {
    let context = rustix::mount::fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    rustix::mount::fsconfig_create(context.as_fd())?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
    rustix::mount::fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    Ok(())
}

/// This user mapped to itself and nothing else: all that user_namespaces(7) permits without privilege.
struct IdMaps {
    uid: Vec<u8>,
    gid: Vec<u8>,
}

impl IdMaps {
    fn of_this_process() -> Self {
        let uid = rustix::process::geteuid().as_raw();
        let gid = rustix::process::getegid().as_raw();
        Self { uid: format!("{uid} {uid} 1").into(), gid: format!("{gid} {gid} 1").into() }
    }

    fn write(&self) -> Result<(), Errno> {
        write_file(c"/proc/self/setgroups", b"deny")?;
        write_file(c"/proc/self/uid_map", &self.uid)?;
        write_file(c"/proc/self/gid_map", &self.gid)
    }
}

fn write_file(path: &CStr, content: &[u8]) -> Result<(), Errno> {
    use rustix::fs::{Mode, OFlags};
    let file = rustix::fs::open(path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
    rustix::io::write(&file, content)?;
    Ok(())
}

/// Maps a detached clone of the mount at `directory` to other ids, and drops it.
/// mount_setattr(2) with `MOUNT_ATTR_IDMAP`, Linux 5.12.
///
/// # Errors
/// `EPERM` without CAP_SYS_ADMIN over that filesystem, `EINVAL` if the filesystem cannot be idmapped,
/// `ENOSYS` before 5.12.
pub fn idmapped_mount(directory: &Path) -> io::Result<()> {
    let tree = rustix::mount::open_tree(
        rustix::fs::CWD,
        directory,
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC,
    )?;
    let namespace = mapped_user_namespace()?;
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP,
        attr_clr: 0,
        propagation: 0,
        userns_fd: u64::from(namespace.as_raw_fd().unsigned_abs()),
    };
    // SAFETY: the path is a NUL-terminated constant, `attributes` is a whole mount_attr of the size given
    // and outlives the call, and both descriptors are open. Only the detached clone is changed.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if answer == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A user namespace that maps this user, kept by its descriptor alone.
fn mapped_user_namespace() -> io::Result<OwnedFd> {
    let (ready, told) = pipe_with(PipeFlags::CLOEXEC)?;
    let (wait, release) = pipe_with(PipeFlags::CLOEXEC)?;
    let maps = IdMaps::of_this_process();
    // SAFETY: as in `namespaces`: raw system calls on prepared memory, then _exit(2).
    let child = unsafe { libc::fork() };
    match child {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            let made = unshare(UnshareFlags::NEWUSER).and_then(|()| maps.write());
            let errno = made.err().map_or(0, Errno::raw_os_error);
            // The parent's end of `release` is ours too until it is closed: `wait` would never end.
            drop(release);
            let _ = rustix::io::write(&told, &errno.to_ne_bytes());
            let _ = rustix::io::read(&wait, &mut [0; 1]);
            // SAFETY: _exit(2) ends the process without running anything of ours.
            unsafe { libc::_exit(0) }
        }
        pid => {
            drop(told);
            let mut errno = [0; 4];
            let heard = rustix::io::read(&ready, &mut errno);
            let namespace = match (heard, i32::from_ne_bytes(errno)) {
                (Ok(4), 0) => std::fs::File::open(format!("/proc/{pid}/ns/user")),
                (Ok(4), errno) => Err(io::Error::from_raw_os_error(errno)),
                (Ok(_), _) => Err(io::ErrorKind::UnexpectedEof.into()),
                (Err(e), _) => Err(e.into()),
            };
            drop(release);
            reap(pid)?;
            Ok(namespace?.into())
        }
    }
}

fn decode(line: &[u8]) -> Option<(Step, Result<(), Errno>)> {
    let step = *Step::ALL.get(usize::from(line[0]))?;
    let errno = i32::from_ne_bytes(line[1..5].try_into().ok()?);
    Some((step, if errno == 0 { Ok(()) } else { Err(Errno::from_raw_os_error(errno)) }))
}

fn read_to_end(fd: &OwnedFd) -> Result<Vec<u8>, Errno> {
    let mut all = Vec::new();
    let mut buffer = [0; 64];
    loop {
        match rustix::io::read(fd, &mut buffer) {
            Ok(0) => return Ok(all),
            Ok(n) => all.extend_from_slice(&buffer[..n]),
            Err(Errno::INTR) => {}
            Err(e) => return Err(e),
        }
    }
}

fn reap(child: i32) -> io::Result<()> {
    loop {
        match waitpid(Pid::from_raw(child), WaitOptions::empty()) {
            Err(Errno::INTR) => {}
            other => return Ok(other.map(|_| ())?),
        }
    }
}

fn last_errno() -> Errno {
    Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_climb_is_told_rung_by_rung_and_in_order() {
        let climb = namespaces(Within::FreshUserNamespace).unwrap();
        let steps: Vec<Step> = climb.0.iter().map(|(step, _)| *step).collect();
        assert_eq!(steps.first(), Some(&Step::UserNamespace));
        assert_eq!(climb.first_refusal().is_none(), climb.reached(Step::Proc));
    }

    #[test]
    fn the_probes_leave_this_process_as_it_was() {
        let before = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let namespace = std::fs::read_link("/proc/self/ns/user").unwrap();
        drop(idmapped_mount(Path::new("/")));
        drop(namespaces(Within::OwnUserNamespace).unwrap());
        assert_eq!(std::fs::read_to_string("/proc/self/mountinfo").unwrap(), before);
        assert_eq!(std::fs::read_link("/proc/self/ns/user").unwrap(), namespace);
    }
}
