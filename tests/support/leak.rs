//! A host-side accomplice of a command: it takes the descriptors that are passed out of the sandbox through
//! a socket in the shared workspace, and keeps them.

use std::fs::{self, File};
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, PermissionsExt, chown};
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use super::host::eventually;
use super::world::{ORDINARY, World};

pub struct Accomplice {
    listener: UnixListener,
    name: String,
}

impl Accomplice {
    /// In the world's workspace, under this name.
    pub fn at(world: &World, name: &str) -> Self {
        let path = world.workspace.join(name);
        let listener = UnixListener::bind(&path).unwrap();
        listener.set_nonblocking(true).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).unwrap();
        chown(&path, Some(ORDINARY), Some(ORDINARY)).unwrap();
        Self { listener, name: name.to_owned() }
    }

    /// What a command says to pass its memfd out. Needs `./probe`.
    pub fn pass_memfd(&self) -> String {
        format!("./probe leak-fd $TOKEN_FD {}", self.name)
    }

    /// The same for its file.
    pub fn pass_file(&self) -> String {
        format!("./probe leak-fd 4 {} 4<$TOKEN_FILE", self.name)
    }

    /// The next descriptor, if one has been passed.
    pub fn poll(&self) -> Option<File> {
        let peer = match self.listener.accept() {
            Ok((peer, _)) => peer,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return None,
            Err(e) => panic!("{e}"),
        };
        // Whoever connected may have been killed before it sent.
        peer.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut byte = [0];
        recvmsg(&peer, &mut [IoSliceMut::new(&mut byte)], &mut control, RecvFlags::empty()).ok()?;
        let fd: Option<OwnedFd> = control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        fd.map(File::from)
    }

    /// The next descriptor.
    #[track_caller]
    pub fn take(&self) -> File {
        let mut taken = None;
        eventually("a descriptor is passed out", || {
            taken = self.poll();
            taken.is_some()
        });
        taken.unwrap()
    }

    /// All that have been passed.
    pub fn drain(&self) -> Vec<File> {
        std::iter::from_fn(|| self.poll()).collect()
    }
}

/// What the holder of a descriptor reads now: the first bytes.
pub fn shown(file: &File, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    match file.read_at(&mut bytes, 0) {
        Ok(n) => {
            bytes.truncate(n);
            bytes
        }
        // A tmpfs that is gone answers with an error: nothing is read either.
        Err(_) => Vec::new(),
    }
}

pub fn shows(file: &File, value: &[u8]) -> bool {
    shown(file, value.len()) == value
}

/// Zeros, or nothing.
pub fn is_wiped(file: &File) -> bool {
    shown(file, 4096).iter().all(|b| *b == 0)
}

/// Looks without a pause until the descriptor reads zeros, for at most ten seconds. When that was.
#[track_caller]
pub fn wiped_at(file: &File) -> Instant {
    let start = Instant::now();
    while !is_wiped(file) {
        assert!(start.elapsed() < Duration::from_secs(10), "the descriptor still shows the value");
    }
    Instant::now()
}
