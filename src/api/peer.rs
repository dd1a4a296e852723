//! Who is at the other end of a socket, as the kernel says at accept: nothing that the peer sends counts.
//!
//! Receives a connected Unix socket; returns its peer's ids and a descriptor of its process. Looks at no
//! file, so that it works under the broker's landlock rules.
#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{getsockopt, sockopt};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// The process that connected.
#[derive(Debug)]
pub struct Peer {
    /// In the broker's user namespace, at the moment of connect(2).
    pub uid: u32,
    pub gid: u32,
    /// `None` if it is in no pid namespace that is seen from here.
    pub pid: Option<i32>,
    /// `None` if the process is gone already, or has no pid here; its connection may live on in a child.
    pub process: Option<OwnedFd>,
}

impl Peer {
    /// SO_PEERCRED and SO_PEERPIDFD (Linux 6.5; earlier, pidfd_open(2) of the pid). unix(7), socket(7).
    ///
    /// # Errors
    /// The kernel's, if the socket has no peer.
    pub fn of(socket: &impl AsFd) -> io::Result<Self> {
        let credentials = getsockopt(socket, sockopt::PeerCredentials)?;
        let pid = Some(credentials.pid()).filter(|&pid| pid > 0);
        let process = match getsockopt(socket, sockopt::PeerPidfd) {
            Ok(pidfd) => Some(pidfd),
            Err(Errno::ENOPROTOOPT) => pid.and_then(|pid| opened(pid, socket)),
            // The process is gone (ESRCH, EINVAL), or was never to be seen from here (ENODATA).
            Err(_) => None,
        };
        Ok(Self { uid: credentials.uid(), gid: credentials.gid(), pid, process })
    }
}

/// The process of this number. Between accept and here it may have ended and its number been given to
/// another: only if neither the process nor the connection has ended after the opening is it taken for
/// the peer. A peer that left its connection to a child can still deceive this; it then watches a wrong
/// process for its own exec, which ends with the connection as well.
fn opened(pid: i32, socket: &impl AsFd) -> Option<OwnedFd> {
    let pidfd = pidfd_open(Pid::from_raw(pid)?, PidfdFlags::empty()).ok()?;
    let has_process_ended = is_ready(&pidfd, PollFlags::IN);
    let has_peer_left = is_ready(socket, PollFlags::HUP);
    (!has_process_ended && !has_peer_left).then_some(pidfd)
}

fn is_ready(fd: &impl AsFd, events: PollFlags) -> bool {
    let mut fds = [PollFd::new(fd, events)];
    // What cannot be asked is taken for ended.
    poll(&mut fds, Some(&Timespec::default())).map_or(true, |_| fds[0].revents().intersects(events))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn the_peer_is_this_process() {
        let (a, _b) = UnixStream::pair().unwrap();
        let peer = Peer::of(&a).unwrap();
        assert_eq!(peer.uid, rustix::process::geteuid().as_raw());
        assert_eq!(peer.gid, rustix::process::getegid().as_raw());
        assert_eq!(peer.pid, Some(std::process::id() as i32));
        assert!(peer.process.is_some_and(|p| !is_ready(&p, PollFlags::IN)));
    }

    #[test]
    fn without_so_peerpidfd_the_process_is_opened_by_its_number() {
        let (a, b) = UnixStream::pair().unwrap();
        let me = std::process::id() as i32;
        assert!(opened(me, &a).is_some());
        drop(b);
        assert!(opened(me, &a).is_none(), "the peer has left");
    }

    #[test]
    fn a_process_that_has_ended_is_not_taken_for_the_peer() {
        let (a, _b) = UnixStream::pair().unwrap();
        let mut child = Command::new("true").stdin(Stdio::null()).spawn().unwrap();
        let pid = child.id() as i32;
        // Not reaped: the number is still its own, and its pidfd says that it has ended.
        let pidfd = pidfd_open(Pid::from_raw(pid).unwrap(), PidfdFlags::empty()).unwrap();
        poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], None).unwrap();
        assert!(opened(pid, &a).is_none());
        child.wait().unwrap();
        assert!(opened(pid, &a).is_none());
    }
}
