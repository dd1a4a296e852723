//! PID 1 of the exec: reaps, forwards signals, reports, and ends the tree.
//!
//! Runs without capabilities, undumpable, with an empty argv and environment, under its own small
//! filter. Everything it knows comes from two descriptors of the launcher: a packet socket (signals to
//! forward) and the lifeline (end of file: the launcher is gone). When it ends, the kernel kills what
//! is left in its pid namespace (pid_namespaces(7)). Allocates nothing.
#![forbid(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::child::{close_all_but, errno};
use super::plan::Plan;
use super::step::{Said, Told, listen, say};
use crate::sys::{cpu, process, seccomp};

/// What `timeout` and the shell make of SIGKILL.
const KILLED: i32 = 128 + libc::SIGKILL;

/// `Ok` while somebody holds the other end.
pub fn check_lifeline(lifeline: BorrowedFd<'_>) -> Result<(), Errno> {
    let mut fds = [PollFd::from_borrowed_fd(lifeline, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))?;
    if fds[0].revents().is_empty() { Ok(()) } else { Err(Errno::PIPE) }
}

/// Waits until there is something to read, or its end. Goes straight to the kernel.
///
/// # Errors
/// `PIPE` when the launcher is gone.
pub fn wait_for_either(awaited: BorrowedFd<'_>, lifeline: BorrowedFd<'_>) -> Result<(), Errno> {
    loop {
        let mut fds = [
            PollFd::from_borrowed_fd(awaited, PollFlags::IN),
            PollFd::from_borrowed_fd(lifeline, PollFlags::IN),
        ];
        match poll(&mut fds, None) {
            Err(Errno::INTR) => continue,
            other => other?,
        };
        let [ready, lifeline] = fds.map(|fd| !fd.revents().is_empty());
        if lifeline {
            return Err(Errno::PIPE);
        }
        if ready {
            return Ok(());
        }
    }
}

/// Where the ends of children are heard of, by an init behind its own filter: only [`prepare`] makes one.
pub struct Children(OwnedFd);

/// Makes an init of this process: nothing open but what it needs and these, and under its own filter.
pub fn prepare(plan: &Plan, also: [Option<BorrowedFd<'_>>; 2]) -> Result<Children, Errno> {
    close_all_but(plan, also)?;
    cpu::go_anywhere();
    let children = errno(process::signalfd(&[libc::SIGCHLD]))?;
    errno(seccomp::install(plan.init_filter.program()))?;
    Ok(Children(children))
}

/// Stays until the command has ended, or the launcher has; returns the status to exit with.
pub fn run(plan: &Plan, command: i32, children: &Children) -> Result<i32, Errno> {
    let Children(children) = children;
    let socket = plan.socket.as_fd();
    loop {
        let mut fds = [
            PollFd::new(children, PollFlags::IN),
            PollFd::from_borrowed_fd(socket, PollFlags::IN),
            PollFd::new(&plan.lifeline, PollFlags::IN),
        ];
        match poll(&mut fds, None) {
            Err(Errno::INTR) => continue,
            other => other?,
        };
        let [child, told, lifeline] = fds.map(|fd| !fd.revents().is_empty());
        if lifeline {
            return Ok(KILLED);
        }
        if child && let Some(status) = reap_until(children, command)? {
            // The launcher waits for this process's own end, by when nothing of the exec is left.
            say(socket, Said::Ended { wait_status: status }, &[])?;
            return Ok(0);
        }
        if told && !obey(socket, command)? {
            return Ok(KILLED);
        }
    }
}

/// Reaps everything that has ended; the command's wait status, if it is among it.
fn reap_until(children: impl AsFd, command: i32) -> Result<Option<i32>, Errno> {
    while let Ok(Some(_)) = process::read_signal(&children) {}
    let mut ended = None;
    loop {
        match process::reap() {
            Ok(Some((pid, status))) if pid == command => ended = Some(status.0),
            Ok(Some(_)) => {}
            Ok(None) | Err(Errno::CHILD) => return Ok(ended),
            Err(e) => return Err(e),
        }
    }
}

/// False when the launcher is gone.
fn obey(socket: BorrowedFd<'_>, command: i32) -> Result<bool, Errno> {
    let sent = match listen(socket, drop)? {
        Some(Told::Signal { signal }) => process::signal_group(command, signal),
        Some(Told::SignalAll { signal }) => process::signal_everyone(signal),
        Some(
            Told::Maps { .. } | Told::Trees | Told::Places { .. } | Told::Command { .. } | Told::Go,
        ) => return Err(Errno::PROTO),
        None => return Ok(false),
    };
    match sent {
        // The group may be gone already.
        Ok(()) | Err(Errno::SRCH) => Ok(true),
        Err(e) => Err(e),
    }
}
