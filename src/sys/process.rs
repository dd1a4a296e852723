//! Making processes, and what a process says of itself. clone(2), prctl(2), pidfd_open(2), keyctl(2).

use std::cell::UnsafeCell;
use std::ffi::c_void;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::io::Errno;

/// `CLONE_INTO_CGROUP` of Linux 5.7: the libc crate has it as 0, by overflow of its type.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// What clone3 is asked for.
#[derive(Debug, Default)]
pub struct CloneArgs<'a> {
    /// `CLONE_NEW*` flags of clone(2).
    pub namespaces: u64,
    /// Start the child in this cgroup (v2): there is no moment in which it is outside.
    pub cgroup: Option<BorrowedFd<'a>>,
    /// The child begins with this process's own table of descriptors, and is to leave it at once.
    pub shares_descriptors: bool,
}

/// Which side of the clone this is.
#[derive(Debug)]
pub enum Cloned {
    Parent { pid: i32, pidfd: OwnedFd },
    Child,
}

/// A fork with namespaces, a pidfd and a cgroup: clone3(2), Linux 5.7.
///
/// The child has a copy of the caller's memory. Only a single-threaded process may call this: another
/// thread could hold the allocator's lock in the moment of the copy.
pub fn clone3(args: &CloneArgs<'_>) -> io::Result<Cloned> {
    debug_assert_eq!(threads(), 1);
    let mut pidfd: i32 = -1;
    // SAFETY: an all-zero clone_args is a valid value of this plain C struct (clone(2)).
    let mut raw: libc::clone_args = unsafe { std::mem::zeroed() };
    raw.flags = args.namespaces | libc::CLONE_PIDFD as u64;
    raw.pidfd = &raw mut pidfd as u64;
    raw.exit_signal = libc::SIGCHLD as u64;
    if args.shares_descriptors {
        raw.flags |= libc::CLONE_FILES as u64;
    }
    if let Some(cgroup) = args.cgroup {
        raw.flags |= CLONE_INTO_CGROUP;
        raw.cgroup = cgroup.as_raw_fd() as u64;
    }
    // SAFETY: `raw` and `pidfd` live across the call and are sized as told. Without CLONE_VM the child
    // runs on a copy of this stack, so returning from here in the child is like returning from fork.
    // The process is single-threaded (asserted above), so no lock is held by a thread that is gone.
    let pid = unsafe {
        libc::syscall(libc::SYS_clone3, &raw mut raw, std::mem::size_of::<libc::clone_args>())
    };
    match pid {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(Cloned::Child),
        pid => {
            // SAFETY: with CLONE_PIDFD the kernel stored a new descriptor there that nothing else owns.
            let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
            Ok(Cloned::Parent { pid: pid as i32, pidfd })
        }
    }
}

/// Runs `entry` in a child that shares this memory, and calls `wait` until the child has called execve or
/// exited: vfork with a stack of its own (clone(2), CLONE_VM). Saves the copy of the page tables.
///
/// Not with CLONE_VFORK, whose wait is an uninterruptible one: it may be long, would count as load, and
/// could watch nothing else. `wait` gets a descriptor that reaches its end of file with the child's exec or
/// exit; `entry` gets the other end, which it must keep open under whatever number.
///
/// While the child is in this memory, `wait` must not touch errno, allocate, lock or write to what the
/// argument holds, but to an atomic: no libc, only calls that go straight to the kernel. `entry` must not allocate, lock or
/// panic, and must end in exec or `exit_now`. What it writes for the caller to read goes into cells: a
/// write through `&mut` just before a call that does not return is one that nobody sees, for the compiler.
///
/// # Errors
/// Those of clone, and of `wait`: then this process must end, for the child may still use its memory.
///
/// One child at a time: they all use the same stack, which is this function's.
pub fn spawn_until_exec<T>(
    entry: fn(&T, BorrowedFd<'_>) -> i32,
    argument: &T,
    wait: impl FnOnce(BorrowedFd<'_>) -> Result<(), Errno>,
) -> Result<i32, Errno> {
    struct Start<'a, T> {
        entry: fn(&T, BorrowedFd<'_>) -> i32,
        argument: &'a T,
        writer: BorrowedFd<'a>,
    }
    extern "C" fn start<T>(start: *mut c_void) -> i32 {
        // SAFETY: the only caller is the clone below, with a pointer to a `Start<T>` of the same T that
        // its owner keeps alive and untouched until this child has left the memory.
        let start = unsafe { &*start.cast::<Start<'_, T>>() };
        (start.entry)(start.argument, start.writer)
    }
    let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    let mut argument = Start { entry, argument, writer: writer.as_fd() };
    /// In the program's image: nothing is allocated or zeroed for it, and only what is touched costs.
    #[repr(align(16))]
    struct Stack(UnsafeCell<[u8; 64 << 10]>);
    // SAFETY: only its address is taken here; what is in it belongs to the one child that runs on it.
    unsafe impl Sync for Stack {}
    static STACK: Stack = Stack(UnsafeCell::new([0; 64 << 10]));
    // SAFETY: one past the end of the array is a valid address to compute; clone wants the top of a
    // downward-growing stack, 16-byte aligned (System V ABI), as its type and its size are.
    let top = unsafe { STACK.0.get().add(1) }.cast::<c_void>();
    let flags = libc::CLONE_VM | libc::SIGCHLD;
    // SAFETY: `start` alone runs on the stack: this function is called in a process of one thread, and
    // returns after the child has left this memory, or with an error that ends the process. `argument`
    // lives as long.
    let pid = unsafe { libc::clone(start::<T>, top, flags, (&raw mut argument).cast()) };
    if pid < 0 {
        return Err(last_errno());
    }
    // This process's own copy, which would keep the pipe open; the child has one of its own.
    close_range(writer.as_raw_fd() as u32, writer.as_raw_fd() as u32)?;
    std::mem::forget(writer);
    wait(reader.as_fd())?;
    Ok(pid)
}

/// Ends this process at once: no destructors, no flush. Child-side.
pub fn exit_now(status: i32) -> ! {
    // SAFETY: _exit(2) has no preconditions and does not return.
    unsafe { libc::_exit(status) }
}

/// Kernel result of the last libc call.
pub fn last_errno() -> Errno {
    // SAFETY: errno is a thread-local integer of the C library; reading it has no preconditions.
    Errno::from_raw_os_error(unsafe { *libc::__errno_location() })
}

/// What `ps` shows of this process, at most 15 bytes. prctl(2) `PR_SET_NAME`.
pub fn set_name(name: &std::ffi::CStr) -> Result<(), Errno> {
    rustix::thread::set_name(name)
}

/// Orphans of this process's descendants become its children. prctl(2) `PR_SET_CHILD_SUBREAPER`.
pub fn adopt_orphans() -> Result<(), Errno> {
    // SAFETY: prctl with integer arguments touches no memory.
    if unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) } < 0 {
        Err(last_errno())
    } else {
        Ok(())
    }
}

/// Waits until no child is left, or `patience` is over. True if none is left.
pub fn reap_all_within(patience: std::time::Duration) -> bool {
    let until = std::time::Instant::now() + patience;
    loop {
        match reap() {
            Err(Errno::CHILD) => return true,
            Ok(Some(_)) => {}
            Ok(None) | Err(_) => {
                if std::time::Instant::now() >= until {
                    return false;
                }
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
        }
    }
}

/// The other process of a fork.
#[derive(Debug)]
pub enum Forked {
    Parent { pid: i32 },
    Child,
}

/// fork(2), in a single-threaded process.
pub fn fork() -> io::Result<Forked> {
    debug_assert_eq!(threads(), 1);
    // SAFETY: the process is single-threaded (asserted above), so the child may do whatever the parent
    // may: no lock is held by a thread that is gone.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(Forked::Child),
        pid => Ok(Forked::Parent { pid }),
    }
}

/// SIGKILL for this process when the thread that made it ends. Child-side; cleared by changes of
/// credentials, so it comes after them.
pub fn die_with_parent() -> Result<(), Errno> {
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
}

/// No execve will ever grant more than this process has. Child-side.
pub fn set_no_new_privileges() -> Result<(), Errno> {
    rustix::thread::set_no_new_privs(true)
}

/// A new, empty session keyring (keyctl(2) `KEYCTL_JOIN_SESSION_KEYRING`). Child-side.
pub fn join_new_session_keyring() -> Result<(), Errno> {
    const KEYCTL_JOIN_SESSION_KEYRING: libc::c_long = 1;
    // SAFETY: with a null name the call reads no memory of ours.
    let done = unsafe {
        libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, std::ptr::null::<u8>())
    };
    if done < 0 { Err(last_errno()) } else { Ok(()) }
}

/// Sends `signal` to every process that this one may signal but itself: inside a pid namespace, from
/// its init, the whole tree. kill(2) with -1.
pub fn signal_everyone(signal: i32) -> Result<(), Errno> {
    // SAFETY: kill(2) touches no memory.
    if unsafe { libc::kill(-1, signal) } < 0 { Err(last_errno()) } else { Ok(()) }
}

/// Sends `signal` to the process group of `leader`.
pub fn signal_group(leader: i32, signal: i32) -> Result<(), Errno> {
    // SAFETY: kill(2) touches no memory; `leader` is above 1, so that `-leader` names one group.
    if leader > 1 && unsafe { libc::kill(-leader, signal) } == 0 {
        Ok(())
    } else {
        Err(last_errno())
    }
}

/// Sends `signal` through a pidfd: never to a process that took over the number.
/// pidfd_send_signal(2), Linux 5.1.
pub fn signal_pidfd(pidfd: impl AsFd, signal: i32) -> Result<(), Errno> {
    // SAFETY: a null siginfo means the defaults of kill(2); no memory of ours is touched.
    let done = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_fd().as_raw_fd(),
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    if done < 0 { Err(last_errno()) } else { Ok(()) }
}

/// How a child ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WaitStatus(pub i32);

impl WaitStatus {
    pub fn code(self) -> Option<i32> {
        libc::WIFEXITED(self.0).then(|| libc::WEXITSTATUS(self.0))
    }

    pub fn signal(self) -> Option<i32> {
        libc::WIFSIGNALED(self.0).then(|| libc::WTERMSIG(self.0))
    }
}

/// Reaps one ended child if there is one. Child-side.
pub fn reap() -> Result<Option<(i32, WaitStatus)>, Errno> {
    reap_with(-1, libc::WNOHANG)
}

/// Waits for this child to end.
pub fn wait_for(pid: i32) -> Result<WaitStatus, Errno> {
    match reap_with(pid, 0)? {
        Some((_, status)) => Ok(status),
        None => Err(Errno::CHILD),
    }
}

fn reap_with(pid: i32, flags: i32) -> Result<Option<(i32, WaitStatus)>, Errno> {
    loop {
        let mut status = 0;
        // SAFETY: `status` is a live integer for the kernel to write.
        let reaped = unsafe { libc::waitpid(pid, &raw mut status, flags | libc::__WALL) };
        match reaped {
            0 => return Ok(None),
            reaped if reaped > 0 => return Ok(Some((reaped, WaitStatus(status)))),
            _ => match last_errno() {
                Errno::INTR => {}
                e => return Err(e),
            },
        }
    }
}

/// Closes every descriptor from `first` to `last`. close_range(2), Linux 5.9. Child-side.
pub fn close_range(first: u32, last: u32) -> Result<(), Errno> {
    // SAFETY: closing descriptors touches no memory; the caller gives up all it owned in the range and
    // never drops an owner of one (it execs or exits).
    let done = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
    if done < 0 { Err(last_errno()) } else { Ok(()) }
}

/// Leaves a table of descriptors that is shared with others, and takes along a copy of those below `first`.
/// close_range(2) `CLOSE_RANGE_UNSHARE`, Linux 5.9. Child-side.
pub fn leave_shared_descriptors(first: u32) -> Result<(), Errno> {
    const CLOSE_RANGE_UNSHARE: u32 = 1 << 1;
    // SAFETY: as `close_range`; the others keep theirs.
    let done =
        unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, CLOSE_RANGE_UNSHARE) };
    if done < 0 { Err(last_errno()) } else { Ok(()) }
}

/// Marks every descriptor from `first` on as closed by exec. Linux 5.11. Child-side.
pub fn close_on_exec_from(first: u32) -> Result<(), Errno> {
    const CLOSE_RANGE_CLOEXEC: u32 = 1 << 2;
    // SAFETY: sets a flag on descriptors; no memory is touched and no owner is invalidated.
    let done =
        unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, CLOSE_RANGE_CLOEXEC) };
    if done < 0 { Err(last_errno()) } else { Ok(()) }
}

/// dup2(2), which leaves the copy open across exec. Child-side.
pub fn duplicate_to(from: i32, to: i32) -> Result<(), Errno> {
    // SAFETY: replaces the descriptor `to` of a process that is about to execute and never uses an
    // earlier owner of that number again.
    if unsafe { libc::dup2(from, to) } < 0 { Err(last_errno()) } else { Ok(()) }
}

/// A copy of a descriptor that is known by its number alone, closed on exec: what a service manager hands
/// over (sd_listen_fds(3)). The one behind the number stays as it is, whoever it belongs to.
///
/// # Errors
/// `EBADF` if there is none.
pub fn copy_of_descriptor(number: i32) -> io::Result<OwnedFd> {
    // SAFETY: fcntl(2) with F_DUPFD_CLOEXEC touches no memory and closes nothing.
    let copy = unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 3) };
    if copy < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call returned a new descriptor that nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

/// Enters new namespaces (`CLONE_NEW*`). unshare(2). Child-side, in a single-threaded process.
pub fn unshare(namespaces: u64) -> Result<(), Errno> {
    // SAFETY: namespace flags do not touch this process's memory or descriptors.
    if unsafe { libc::unshare(namespaces as i32) } < 0 { Err(last_errno()) } else { Ok(()) }
}

/// Enters a namespace of another process: what its descriptor is of, which must be one of `kinds`
/// (`CLONE_NEW*`). setns(2). Child-side, in a single-threaded process.
pub fn enter_namespace(namespace: BorrowedFd<'_>, kinds: libc::c_int) -> Result<(), Errno> {
    // SAFETY: touches no memory of this process; its descriptors stay what they are.
    if unsafe { libc::setns(namespace.as_raw_fd(), kinds) } < 0 {
        Err(last_errno())
    } else {
        Ok(())
    }
}

/// Blocks every signal. Child-side.
pub fn block_all_signals() -> Result<(), Errno> {
    // SAFETY: `all` is filled by sigfillset before it is read; a null old set is allowed.
    let done = unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const all, std::ptr::null_mut())
    };
    if done < 0 { Err(last_errno()) } else { Ok(()) }
}

/// Gives every signal its default action, for this process and what it starts: std ignores SIGPIPE, and
/// the caller may have ignored others.
pub fn reset_signals() {
    for signal in 1..=64 {
        // SAFETY: SIG_DFL runs no code of ours. SIGKILL, SIGSTOP and the two that libc keeps for itself
        // (32, 33) are refused with EINVAL, which is right.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
}

/// Unblocks every signal: what a command expects to start with. Child-side.
pub fn unblock_signals() -> Result<(), Errno> {
    // SAFETY: `none` is filled by sigemptyset before it is read; a null old set is allowed.
    let done = unsafe {
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut())
    };
    if done < 0 { Err(last_errno()) } else { Ok(()) }
}

/// A signalfd(2) for `signals`, which are blocked.
pub fn signalfd(signals: &[i32]) -> io::Result<OwnedFd> {
    // SAFETY: the set is initialised by sigemptyset before use; signalfd with -1 makes a new
    // descriptor, checked, that nothing else owns.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        for &signal in signals {
            libc::sigaddset(&raw mut set, signal);
        }
        if libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) < 0 {
            return Err(io::Error::last_os_error());
        }
        let fd = libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
        if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(OwnedFd::from_raw_fd(fd)) }
    }
}

/// Whether this process was started with `signal` ignored, as nohup(1) does. sigaction(2).
pub fn is_ignored(signal: i32) -> io::Result<bool> {
    // SAFETY: an all-zero sigaction is a valid value of this plain C struct; with a null new action the
    // call only writes the present one to it.
    let present = unsafe {
        let mut present: libc::sigaction = std::mem::zeroed();
        if libc::sigaction(signal, std::ptr::null(), &raw mut present) < 0 {
            return Err(io::Error::last_os_error());
        }
        present
    };
    Ok(present.sa_sigaction == libc::SIG_IGN)
}

/// The next signal of a signalfd, if one is pending.
pub fn read_signal(signalfd: impl AsFd) -> io::Result<Option<i32>> {
    // SAFETY: an all-zero signalfd_siginfo is a valid value of this plain C struct.
    let mut info: libc::signalfd_siginfo = unsafe { std::mem::zeroed() };
    let size = std::mem::size_of::<libc::signalfd_siginfo>();
    // SAFETY: `info` has room for exactly the `size` bytes that the kernel writes (signalfd(2)).
    let n = unsafe { libc::read(signalfd.as_fd().as_raw_fd(), (&raw mut info).cast(), size) };
    if n == size as isize {
        return Ok(Some(info.ssi_signo as i32));
    }
    match io::Error::last_os_error() {
        e if e.kind() == io::ErrorKind::WouldBlock || e.kind() == io::ErrorKind::Interrupted => {
            Ok(None)
        }
        e => Err(e),
    }
}

/// Empties this process's argv and environ where /proc shows them (proc(5) cmdline, environ), so that
/// neither it nor a child discloses what the caller's environment held.
///
/// Must run while this process is single-threaded and after everything needed was copied out: `std`'s
/// arguments and variables are gone afterwards.
pub fn wipe_argv_and_environ() -> io::Result<()> {
    debug_assert_eq!(threads(), 1);
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    // After the command in parentheses, which may hold anything: fields 3 and on, proc(5).
    let fields: Vec<&str> =
        stat.rsplit(')').next().unwrap_or("").split_ascii_whitespace().collect();
    let address = |number: usize| fields.get(number - 3).and_then(|f| f.parse::<usize>().ok());
    let (Some(arg_start), Some(env_end)) = (address(48), address(51)) else {
        return Err(io::Error::other("/proc/self/stat does not show arg_start and env_end"));
    };
    if arg_start == 0 || env_end < arg_start {
        return Err(io::Error::other("/proc/self/stat shows no argument area"));
    }
    // SAFETY: [arg_start, env_end) is the argument and environment area that the kernel laid on this
    // process's own stack (proc(5)): mapped and writable. `environ` is emptied first, so that nothing
    // follows pointers into it; zeroes keep every remaining C string there terminated.
    unsafe {
        libc::clearenv();
        std::ptr::write_bytes(arg_start as *mut u8, 0, env_end - arg_start);
    }
    Ok(())
}

fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").map_or(1, Iterator::count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_is_read_from_its_descriptor() {
        let fd = signalfd(&[libc::SIGWINCH]).unwrap();
        assert_eq!(read_signal(&fd).unwrap(), None);
        // SAFETY: raise(3) with a blocked signal only makes it pending for this thread.
        unsafe { libc::raise(libc::SIGWINCH) };
        assert_eq!(read_signal(&fd).unwrap(), Some(libc::SIGWINCH));
    }

    #[test]
    fn wait_status_tells_exit_from_signal() {
        assert_eq!(WaitStatus(3 << 8).code(), Some(3));
        assert_eq!(WaitStatus(9).signal(), Some(9));
        assert_eq!(WaitStatus(9).code(), None);
    }
}
