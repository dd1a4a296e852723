//! Network namespaces: the loopback interface of a new one (netdevice(7); child-side: no allocation), and a socket
//! that listens in another's (network_namespaces(7)).

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use super::process::{self, Forked, last_errno};
use super::socket;

/// Brings `lo` up; the kernel then gives it 127.0.0.1/8 and ::1 by itself.
pub fn bring_loopback_up() -> Result<(), Errno> {
    let socket = rustix::net::socket_with(
        AddressFamily::INET,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    // SAFETY: an all-zero ifreq is a valid value of this plain C struct.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[0] = b'l' as libc::c_char;
    request.ifr_name[1] = b'o' as libc::c_char;
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: SIOCSIFFLAGS reads one ifreq, which lives across the call.
    let done = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) };
    if done < 0 { Err(last_errno()) } else { Ok(()) }
}

/// A socket that listens on this port of the loopback of the process's network namespace, made by a child of
/// this process that enters it: the way back would need rights over the namespace that we are in. In a
/// process of one thread.
///
/// # Errors
/// The child could not make it, and has no more to say.
pub fn listen_in(pid: i32, port: u16) -> io::Result<OwnedFd> {
    let namespace = std::fs::File::open(format!("/proc/{pid}/ns/net"))?;
    let (ours, theirs) = socket::packet_pair()?;
    match process::fork()? {
        Forked::Child => {
            let step = || -> io::Result<()> {
                rustix::thread::move_into_link_name_space(
                    namespace.as_fd(),
                    Some(rustix::thread::LinkNameSpaceType::Network),
                )?;
                let listener = std::net::TcpListener::bind(("127.0.0.1", port))?;
                listener.set_nonblocking(true)?;
                Ok(socket::send(&theirs, &[1], &[listener.as_fd()])?)
            };
            process::exit_now(i32::from(step().is_err()))
        }
        Forked::Parent { pid } => {
            drop(theirs);
            let mut listener = None;
            let received = socket::receive(&ours, &mut [0; 8], |fd| listener = Some(fd));
            process::wait_for(pid)?;
            received?;
            listener.ok_or_else(|| io::Error::other("nothing could be made to listen there"))
        }
    }
}
