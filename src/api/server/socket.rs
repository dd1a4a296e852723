//! A connection's socket: HTTP speaks on it, until an exec takes it over for its frames.
#![forbid(unsafe_code)]

use std::io::{self, ErrorKind::WouldBlock};
use std::os::fd::AsFd;
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, ready};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{Shutdown, shutdown};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::UnixStream;

/// The runtime watches it for as long as this lives.
pub(super) struct Socket(Arc<UnixStream>);

/// What a copy of the socket is made from, while it is spoken on.
pub(super) struct Copied(Weak<UnixStream>);

impl Socket {
    pub(super) fn new(stream: UnixStream) -> Self {
        Self(Arc::new(stream))
    }

    pub(super) fn copied(&self) -> Copied {
        Copied(Arc::downgrade(&self.0))
    }
}

impl Copied {
    /// Another descriptor of it, which does not block either.
    pub(super) fn copy(&self) -> io::Result<std::os::unix::net::UnixStream> {
        let stream = self.0.upgrade().ok_or(io::ErrorKind::NotConnected)?;
        stream.as_fd().try_clone_to_owned().map(Into::into)
    }

    /// In a runtime.
    pub(super) fn gone(&self) -> io::Result<Gone> {
        UnixStream::from_std(self.copy()?).map(Gone)
    }
}

/// Whether the other side has closed both directions. That it has closed its own the runtime tells for ever
/// after, and nothing that comes later; so this is a descriptor, and a registration, apart.
pub(super) struct Gone(UnixStream);

impl Gone {
    /// Ready when it has, or when that cannot be told.
    pub(super) fn poll(&self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            let is_woken = ready!(self.0.poll_write_ready(cx)).is_ok();
            if !is_woken || has_hung_up(&self.0) {
                return Poll::Ready(());
            }
            // Until it is woken again: this descriptor is not written to.
            let waits = self.0.try_io(Interest::WRITABLE, || Err::<(), _>(WouldBlock.into()));
            if waits.is_err_and(|e| e.kind() != WouldBlock) {
                return Poll::Ready(());
            }
        }
    }
}

fn has_hung_up(socket: &UnixStream) -> bool {
    let mut asked = PollFd::new(socket, PollFlags::empty());
    // These two are told unasked.
    let told = PollFlags::HUP | PollFlags::ERR;
    let polled = poll(std::slice::from_mut(&mut asked), Some(&Timespec::default()));
    polled.is_err() || asked.revents().intersects(told)
}

impl AsyncRead for Socket {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            ready!(self.0.poll_read_ready(cx))?;
            match self.0.try_read(buffer.initialize_unfilled()) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                read => return Poll::Ready(read.map(|count| buffer.advance(count))),
            }
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.0.poll_write_ready(cx))?;
            match self.0.try_write(bytes) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                written => return Poll::Ready(written),
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(shutdown(&self.0, Shutdown::Write).map_err(Into::into))
    }
}
