//! One connection: a Unix socket that waits no longer than it is told, and the bytes of one request.
//! Touches sockets only.
#![forbid(unsafe_code)]

use std::io::{self, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::error::ClientError;
use crate::api::wire::UPGRADE;

/// Connects to what listens at `path`, which may be longer than the 107 bytes that an address holds.
///
/// # Errors
/// connect(2). `EAGAIN`: it listens, and its queue stayed full for `patience`.
pub fn connect(path: &Path, patience: Duration) -> io::Result<UnixStream> {
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    // connect(2) waits while the queue is full, as long as it may wait for sending. unix(7).
    set_socket_timeout(&socket, Timeout::Send, Some(patience))?;
    set_socket_timeout(&socket, Timeout::Recv, Some(patience))?;
    let (address, _directory) = address(path)?;
    loop {
        match rustix::net::connect(&socket, &address) {
            Ok(()) => return Ok(UnixStream::from(socket)),
            Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// The address, and what must stay open while it is used.
fn address(path: &Path) -> Result<(SocketAddrUnix, Option<OwnedFd>), Errno> {
    match (SocketAddrUnix::new(path), path.parent(), path.file_name()) {
        (Err(Errno::NAMETOOLONG), Some(parent), Some(name)) => {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let directory = rustix::fs::open(parent, flags, Mode::empty())?;
            let short: PathBuf =
                [Path::new(&format!("/proc/self/fd/{}", directory.as_raw_fd())), Path::new(name)]
                    .iter()
                    .collect();
            Ok((SocketAddrUnix::new(short)?, Some(directory)))
        }
        (address, ..) => Ok((address?, None)),
    }
}

/// Nothing has come on it and its other end is there: fit for a request.
pub fn is_quiet(socket: &UnixStream) -> bool {
    let mut fds = [PollFd::new(socket, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec::default())) == Ok(0)
}

/// Waits until there is something to read.
pub fn wait_readable(socket: &UnixStream, patience: Duration) -> Result<(), ClientError> {
    let limit = Timespec::try_from(patience).ok();
    let mut fds = [PollFd::new(socket, PollFlags::IN)];
    match poll(&mut fds, limit.as_ref()) {
        Ok(0) => Err(ClientError::Silent),
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(e) => Err(ClientError::Receive(e.into())),
    }
}

/// What is asked. `target` is made of ids and numbers: nothing in it needs to be escaped.
pub struct Ask<'a> {
    pub method: &'static str,
    pub target: &'a str,
    /// JSON.
    pub body: Option<&'a [u8]>,
    pub upgrades: bool,
}

impl Ask<'_> {
    /// Head and body, for one write.
    pub fn bytes(&self) -> Vec<u8> {
        let Self { method, target, body, upgrades } = self;
        let mut text = format!("{method} {target} HTTP/1.1\r\nhost: sublet\r\n");
        if *upgrades {
            text.push_str(&format!("connection: upgrade\r\nupgrade: {UPGRADE}\r\n"));
        } else {
            text.push_str("connection: close\r\n");
        }
        if let Some(body) = body {
            let length = body.len();
            text.push_str(&format!(
                "content-type: application/json\r\ncontent-length: {length}\r\n"
            ));
        }
        text.push_str("\r\n");
        let mut bytes = text.into_bytes();
        bytes.extend_from_slice(body.unwrap_or_default());
        bytes
    }

    /// Sends it. A broker that has heard enough (413) may have stopped reading and answered: then the
    /// answer tells more than the pipe.
    pub fn send(&self, socket: &UnixStream) -> Result<(), ClientError> {
        match (&*socket).write_all(&self.bytes()) {
            Ok(()) => Ok(()),
            Err(_) if !is_quiet(socket) => Ok(()),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Err(ClientError::Silent),
            Err(e) => Err(ClientError::Send(e)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    const SHORT: Duration = Duration::from_millis(50);

    #[test]
    fn a_path_that_no_address_holds_is_reached_all_the_same() {
        let base = tempfile::tempdir().unwrap();
        let deep = base.path().join("d".repeat(60)).join("e".repeat(60));
        std::fs::create_dir_all(&deep).unwrap();
        let short = base.path().join("short");
        let _listener = UnixListener::bind(&short).unwrap();
        std::fs::rename(&short, deep.join("agent.sock")).unwrap();
        assert!(connect(&deep.join("agent.sock"), SHORT).is_ok());
        let absent = connect(&deep.join("none"), SHORT).unwrap_err();
        assert_eq!(absent.kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn a_queue_that_stays_full_is_not_waited_for_without_end() {
        let base = tempfile::tempdir().unwrap();
        let path = base.path().join("s");
        let socket = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
        rustix::net::bind(&socket, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        rustix::net::listen(&socket, 0).unwrap();
        let _first = connect(&path, SHORT).unwrap();
        let full = connect(&path, SHORT).unwrap_err();
        assert_eq!(full.kind(), io::ErrorKind::WouldBlock, "{full}");
    }

    #[test]
    fn a_request_is_one_head_and_its_body() {
        let ask = Ask { method: "POST", target: "/v1/execs", body: Some(b"{}"), upgrades: true };
        assert_eq!(
            String::from_utf8(ask.bytes()).unwrap(),
            "POST /v1/execs HTTP/1.1\r\nhost: sublet\r\nconnection: upgrade\r\n\
             upgrade: sublet-exec\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"
        );
        let ask = Ask { method: "GET", target: "/v1/run", body: None, upgrades: false };
        assert_eq!(
            String::from_utf8(ask.bytes()).unwrap(),
            "GET /v1/run HTTP/1.1\r\nhost: sublet\r\nconnection: close\r\n\r\n"
        );
    }
}
