//! The service manager: told how the broker is, asked for a socket and a watchdog. sd_notify(3),
//! sd_listen_fds(3).
//!
//! Its socket is opened before the process gives up connecting to sockets; afterwards only this one is
//! left. Without systemd everything here does nothing.
#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::fmt::Write as _;
use std::io;
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener};
use std::time::Duration;

use rustix::net::sockopt::{socket_acceptconn, socket_domain, socket_type};
use rustix::net::{AddressFamily, SocketType};
use sd_notify::NotifyState;

use super::SettleError;
use crate::sys::process;

/// A connection to systemd, if this process is a service of `Type=notify`.
#[derive(Debug)]
pub struct ServiceManager {
    socket: Option<UnixDatagram>,
    watchdog: Option<Duration>,
}

impl ServiceManager {
    /// From `NOTIFY_SOCKET` and `WATCHDOG_USEC`.
    pub(super) fn of_environment() -> Result<Self, SettleError> {
        let socket = std::env::var_os("NOTIFY_SOCKET").filter(|name| !name.is_empty());
        let watchdog = sd_notify::watchdog_enabled();
        Ok(Self { socket: socket.map(connect).transpose()?, watchdog })
    }

    /// The broker serves: to be said once, when the first client could be answered.
    ///
    /// # Errors
    /// Of send(2), as of the others here.
    pub fn ready(&self) -> io::Result<()> {
        self.tell(&[NotifyState::Ready])
    }

    /// No new grants from now on.
    pub fn stopping(&self) -> io::Result<()> {
        self.tell(&[NotifyState::Stopping])
    }

    /// One line for `systemctl status`.
    pub fn status(&self, text: &str) -> io::Result<()> {
        self.tell(&[NotifyState::Status(text)])
    }

    /// The broker lives: to be said at least every [`ServiceManager::watchdog`], by what would no longer
    /// say so if it hung.
    pub fn alive(&self) -> io::Result<()> {
        self.tell(&[NotifyState::Watchdog])
    }

    /// How often to say [`ServiceManager::alive`]: half of `WatchdogSec=`, as sd_watchdog_enabled(3) advises.
    pub fn watchdog(&self) -> Option<Duration> {
        self.socket.as_ref().and(self.watchdog).map(|whole| whole / 2)
    }

    fn tell(&self, states: &[NotifyState]) -> io::Result<()> {
        let Some(socket) = &self.socket else { return Ok(()) };
        let mut text = String::new();
        for state in states {
            writeln!(text, "{state}").map_err(io::Error::other)?;
        }
        socket.send(text.as_bytes()).map(drop)
    }
}

fn connect(name: OsString) -> Result<UnixDatagram, SettleError> {
    let connected = || -> io::Result<UnixDatagram> {
        let socket = UnixDatagram::unbound()?;
        match name.as_bytes() {
            [b'@', name @ ..] => socket.connect_addr(&SocketAddr::from_abstract_name(name)?)?,
            [b'/', ..] => socket.connect(&name)?,
            // A vsock address, where systemd runs in a virtual machine for another.
            _ => return Err(io::ErrorKind::Unsupported.into()),
        }
        // A manager that reads no more must not stop the broker.
        socket.set_nonblocking(true)?;
        Ok(socket)
    };
    connected().map_err(|source| {
        let socket = name.to_string_lossy().into_owned();
        SettleError::Manager { socket, source }
    })
}

/// The control socket, where a socket unit has it: exactly one descriptor, which is what it should be.
pub(super) fn handed_over() -> Result<Option<UnixListener>, SettleError> {
    let activation = |found: String| SettleError::Activation { found };
    let mut numbers = sd_notify::listen_fds().map_err(|e| activation(e.to_string()))?;
    let number = match (numbers.next(), numbers.len()) {
        (None, _) => return Ok(None),
        (Some(number), 0) => number,
        (Some(_), more) => return Err(activation(format!("{} descriptors", more + 1))),
    };
    let fd = process::copy_of_descriptor(number).map_err(|e| activation(e.to_string()))?;
    let fault = fault_of(&fd).map_err(|e| activation(e.to_string()))?;
    match fault {
        Some(fault) => Err(activation(fault)),
        None => Ok(Some(UnixListener::from(fd))),
    }
}

fn fault_of(fd: &OwnedFd) -> io::Result<Option<String>> {
    let (domain, kind) = (socket_domain(fd)?, socket_type(fd)?);
    Ok(if domain != AddressFamily::UNIX {
        Some(format!("a socket of {domain:?}"))
    } else if kind != SocketType::STREAM {
        Some(format!("a socket of {kind:?}"))
    } else if !socket_acceptconn(fd)? {
        Some("a socket that does not listen (Accept=yes?)".to_owned())
    } else {
        None
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_listening_unix_stream_is_a_control_socket() {
        #[track_caller]
        fn check(fd: impl Into<OwnedFd>, fits: bool) {
            assert_eq!(fault_of(&fd.into()).unwrap().is_none(), fits);
        }
        let dir = tempfile::tempdir().unwrap();
        check(UnixListener::bind(dir.path().join("s")).unwrap(), true);
        check(UnixDatagram::unbound().unwrap(), false);
        let (connected, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        check(connected, false);
        check(std::net::TcpListener::bind("127.0.0.1:0").unwrap(), false);
        assert!(fault_of(&std::fs::File::open("/dev/null").unwrap().into()).is_err());
    }

    #[test]
    fn the_manager_hears_what_it_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let heard = UnixDatagram::bind(&path).unwrap();
        let socket = Some(connect(path.into_os_string()).unwrap());
        let manager = ServiceManager { socket, watchdog: Some(Duration::from_secs(30)) };
        manager.ready().unwrap();
        manager.alive().unwrap();
        let mut buffer = [0; 64];
        for expected in ["READY=1\n", "WATCHDOG=1\n"] {
            let length = heard.recv(&mut buffer).unwrap();
            assert_eq!(&buffer[..length], expected.as_bytes());
        }
        assert_eq!(manager.watchdog(), Some(Duration::from_secs(15)));
        let alone = ServiceManager { socket: None, watchdog: Some(Duration::from_secs(30)) };
        alone.ready().unwrap();
        assert_eq!(alone.watchdog(), None);
    }
}
