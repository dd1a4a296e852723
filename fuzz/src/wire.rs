//! The sockets of the launcher: broker ↔ launcher (postcard, descriptors, messages in a memfd) and
//! launcher ↔ init (words of 12 bytes). Whoever holds the other end may be in an attacker's hands.
#![forbid(unsafe_code)]

use std::fmt::Debug;
use std::fs::File;
use std::io::{PipeReader, Read, Seek, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::EventfdFlags;
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use serde::Serialize;
use serde::de::DeserializeOwned;
use sublet::launcher::wire::{self, Notice, Order};
use sublet::sandbox::step;
use sublet::sys::socket;

use super::feed::Feed;

pub fn run(input: &[u8]) {
    let mut feed = Feed::new(input);
    match feed.below(6) {
        0 => drop(decoded::<Order>(feed.rest())),
        1 => drop(decoded::<Notice>(feed.rest())),
        2 => received::<Order>(feed),
        3 => received::<Notice>(feed),
        4 => there_and_back(feed),
        _ => words(feed),
    }
}

/// What decodes means one thing: encoded and decoded again it is the same.
fn decoded<T: Serialize + DeserializeOwned + Debug>(bytes: &[u8]) -> Option<T> {
    let message: T = wire::decode(bytes).ok()?;
    let canonical = encoded(&message);
    let again: T = wire::decode(&canonical).expect("what was encoded decodes");
    assert_eq!(encoded(&again), canonical);
    assert_eq!(format!("{again:?}"), format!("{message:?}"));
    Some(message)
}

fn encoded<T: Serialize>(message: &T) -> Vec<u8> {
    postcard::to_stdvec(message).expect("a message encodes")
}

/// A packet of the attacker's with descriptors of the attacker's: answered at once, and no descriptor
/// stays open.
fn received<T: DeserializeOwned>(mut feed: Feed<'_>) {
    let (theirs, ours) = socket::packet_pair().expect("a socket pair");
    let mut witness = Witness::new();
    let kinds = feed.chunk();
    let packet = match feed.byte() {
        0 => feed.chunk().to_vec(),
        tag => vec![tag],
    };
    let mut fds: Vec<OwnedFd> =
        kinds.iter().take(socket::MAX_FDS - 1).map(|kind| made(*kind, &mut feed)).collect();
    fds.push(witness.end());
    let borrowed: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
    if socket::send(&theirs, &packet, &borrowed).is_err() {
        return;
    }
    drop(fds);
    if let Ok((_, fds)) = wire::receive::<T>(ours.as_fd()) {
        assert!(fds.len() <= kinds.len() + 1);
    }
    assert!(witness.is_alone(), "a descriptor of the packet is still open");
    drop(theirs);
    assert!(matches!(wire::receive::<T>(ours.as_fd()), Err(wire::WireError::Gone)));
}

/// One of the things that a descriptor may be. `feed` is what is in those that hold something.
fn made(kind: u8, feed: &mut Feed<'_>) -> OwnedFd {
    let memfd = || memfd_create(c"fuzz", MemfdFlags::CLOEXEC).expect("a memfd");
    let pair = |kind| {
        socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).expect("a socket pair").0
    };
    match kind % 8 {
        0 | 1 => {
            let mut file = File::from(memfd());
            file.write_all(feed.rest()).expect("a memfd takes it");
            if kind.is_multiple_of(8) {
                file.rewind().expect("a memfd rewinds");
            }
            file.into()
        }
        2 => {
            let file = File::from(memfd());
            file.set_len(u64::from(feed.byte()) << 20).expect("a memfd grows");
            file.into()
        }
        // These three take lseek(2), and a read of them would wait for ever.
        3 => rustix::event::eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd"),
        4 => rustix::time::timerfd_create(
            rustix::time::TimerfdClockId::Monotonic,
            rustix::time::TimerfdFlags::CLOEXEC,
        )
        .expect("a timerfd"),
        5 => pair(SocketType::STREAM),
        6 => File::open("/").expect("a directory").into(),
        _ => File::open("/dev/null").expect("/dev/null").into(),
    }
}

/// Tells whether any copy of a descriptor is still open.
struct Witness {
    reader: PipeReader,
    end: Option<OwnedFd>,
}

impl Witness {
    fn new() -> Self {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        Self { reader, end: Some(writer.into()) }
    }

    fn end(&mut self) -> OwnedFd {
        self.end.take().expect("taken once")
    }

    fn is_alone(&mut self) -> bool {
        rustix::io::ioctl_fionbio(&self.reader, true).expect("a pipe takes O_NONBLOCK");
        matches!(self.reader.read(&mut [0]), Ok(0))
    }
}

/// A message that decodes also crosses the socket, in a packet or in a memfd, with its descriptor.
fn there_and_back(mut feed: Feed<'_>) {
    let padding = usize::from(feed.byte()) << feed.below(16);
    let Some(order) = decoded::<Order>(feed.rest()) else { return };
    let order = match order {
        Order::KeepHead { mut head } => {
            head.resize(head.len() + padding, 7);
            Order::KeepHead { head }
        }
        other => other,
    };
    let (theirs, ours) = socket::packet_pair().expect("a socket pair");
    let mut witness = Witness::new();
    let end = witness.end();
    wire::send(theirs.as_fd(), &order, &[end.as_fd()]).expect("it fits");
    drop(end);
    let (arrived, fds) = wire::receive::<Order>(ours.as_fd()).expect("it arrives");
    assert_eq!(encoded(&arrived), encoded(&order));
    assert_eq!(fds.len(), 1);
    drop(fds);
    assert!(witness.is_alone());
}

/// Between launcher and init: each side hears a word, or an error, whatever comes.
fn words(mut feed: Feed<'_>) {
    let (theirs, ours) = socket::packet_pair().expect("a socket pair");
    let mut witness = Witness::new();
    let end = witness.end();
    while !feed.is_empty() {
        let packet: Vec<u8> = match feed.byte() {
            0 => feed.chunk().to_vec(),
            tag => (0..12).map(|i| if i == 0 { tag } else { feed.byte() }).collect(),
        };
        for side in 0..2 {
            if socket::send(&theirs, &packet, &[end.as_fd()]).is_err() {
                return;
            }
            let mut fds = Vec::new();
            // An empty packet reads as the end, and that is an end of the exec.
            let told = if side == 0 {
                step::hear(ours.as_fd(), |fd| fds.push(fd)).map(|said| said.is_some())
            } else {
                step::listen(ours.as_fd(), |fd| fds.push(fd)).map(|told| told.is_some())
            };
            assert!(told.is_err() || packet.len() == 12 || told == Ok(false), "{packet:?}");
            assert!(fds.len() <= 1);
        }
    }
    drop(end);
    assert!(witness.is_alone(), "a descriptor of a word is still open");
}
