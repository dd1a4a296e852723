//! Packets with descriptors over a Unix socket pair. unix(7). Child-side: fixed buffers, no allocation.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};

/// The most descriptors that one packet carries.
pub const MAX_FDS: usize = 64;

/// A pair of connected packet sockets, closed on exec.
pub fn packet_pair() -> Result<(OwnedFd, OwnedFd), Errno> {
    socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
}

/// Sends one packet whole, or fails.
pub fn send(socket: impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(Errno::NOBUFS);
    }
    loop {
        match sendmsg(&socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL) {
            Ok(n) if n == bytes.len() => return Ok(()),
            Ok(_) => return Err(Errno::MSGSIZE),
            Err(Errno::INTR) => {}
            Err(e) => return Err(e),
        }
    }
}

/// Receives one packet into `buffer`; gives each descriptor that came with it to `take`.
/// `Ok(0)` without descriptors is the end: the other side is gone.
///
/// # Errors
/// `MSGSIZE` if the packet or its descriptors did not fit: nothing is used of it.
pub fn receive(
    socket: impl AsFd,
    buffer: &mut [u8],
    mut take: impl FnMut(OwnedFd),
) -> Result<usize, Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut reset = false;
    let received = loop {
        let mut slices = [IoSliceMut::new(buffer)];
        match recvmsg(&socket, &mut slices, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(Errno::INTR) => {}
            // The other side left something unread. That is told once, and before its last words, which
            // are still there.
            Err(Errno::CONNRESET) if !reset => reset = true,
            other => break other?,
        }
    };
    let cut = rustix::net::ReturnFlags::TRUNC | rustix::net::ReturnFlags::CTRUNC;
    if received.flags.intersects(cut) {
        return Err(Errno::MSGSIZE);
    }
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            fds.for_each(&mut take);
        }
    }
    Ok(received.bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_words_are_heard_though_something_was_left_unread() {
        let (a, b) = packet_pair().unwrap();
        send(&a, b"unread", &[]).unwrap();
        send(&b, b"last", &[]).unwrap();
        drop(b);
        let mut buffer = [0; 16];
        assert_eq!(receive(&a, &mut buffer, |_| ()), Ok(4));
        assert_eq!(&buffer[..4], b"last");
        assert_eq!(receive(&a, &mut buffer, |_| ()), Ok(0));
    }

    #[test]
    fn packets_keep_their_borders_and_their_descriptors() {
        let (a, b) = packet_pair().unwrap();
        send(&a, b"one", &[a.as_fd()]).unwrap();
        send(&a, b"two", &[]).unwrap();
        let mut buffer = [0; 16];
        let mut fds = Vec::new();
        assert_eq!(receive(&b, &mut buffer, |fd| fds.push(fd)), Ok(3));
        assert_eq!((&buffer[..3], fds.len()), (&b"one"[..], 1));
        assert_eq!(receive(&b, &mut buffer, |fd| fds.push(fd)), Ok(3));
        drop((a, fds));
        assert_eq!(receive(&b, &mut buffer, |_| ()), Ok(0));
    }
}
