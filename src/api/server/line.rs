//! One connection's clocks, and the stream under HTTP that keeps them.
//!
//! hyper bounds the size of a head; time is bounded here, because its own timer cannot tell a connection
//! that is idle from one that sends a byte a second. hyper's own answers to what is no HTTP have no body:
//! they are held back, and the connection's task says it in the contract's words.
#![forbid(unsafe_code)]

use std::io;
use std::os::unix::net::UnixStream;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep_until};

use crate::api::server::bounds::Bounds;
use crate::api::server::socket::{Copied, Gone, Socket};
use crate::broker::streams::ReadAhead;

/// What is known of one connection. Shared by its stream and its requests.
pub(super) struct Line {
    bounds: Bounds,
    copied: Copied,
    /// Whether an exec speaks on it from now on, and nobody here. Held while something is written.
    is_taken: Mutex<bool>,
    state: Mutex<State>,
}

struct State {
    phase: Phase,
    /// Requests that are being answered: clocks stand still.
    busy: usize,
    /// Since when one is.
    busy_since: Instant,
    /// The exec that has taken it, which is to hear what was read ahead.
    upgrade: Option<ReadAhead>,
}

#[derive(Clone, Copy)]
enum Phase {
    /// A head is due since then.
    Head(Instant),
    /// Between requests since then.
    Idle(Instant),
}

/// While it lives, a request is being answered.
pub(super) struct Busy(Arc<Line>);

impl Line {
    pub(super) fn new(bounds: Bounds, copied: Copied) -> Self {
        let phase = Phase::Head(Instant::now());
        let busy_since = Instant::now();
        let state = Mutex::new(State { phase, busy: 0, busy_since, upgrade: None });
        Self { bounds, copied, is_taken: Mutex::new(false), state }
    }

    /// For an exec to speak on, once it has taken it.
    pub(super) fn copy(&self) -> io::Result<UnixStream> {
        self.copied.copy()
    }

    /// From now on nothing more is read here or written.
    pub(super) fn take(&self) {
        *self.taken() = true;
    }

    pub(super) fn is_taken(&self) -> bool {
        *self.taken()
    }

    fn taken(&self) -> MutexGuard<'_, bool> {
        self.is_taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere left no half-changed state: every change is one assignment.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn busy(self: &Arc<Self>) -> Busy {
        let mut state = self.state();
        if state.busy == 0 {
            state.busy_since = Instant::now();
        }
        state.busy += 1;
        drop(state);
        Busy(self.clone())
    }

    /// Since when a request is being answered, if one is.
    pub(super) fn busy_since(&self) -> Option<Instant> {
        let state = self.state();
        (state.busy > 0).then_some(state.busy_since)
    }

    /// Whether the client has left: to be asked while it is answered, when nothing is read.
    pub(super) fn gone(&self) -> io::Result<Gone> {
        self.copied.gone()
    }

    fn heard(&self) {
        let mut state = self.state();
        if let (0, Phase::Idle(_)) = (state.busy, state.phase) {
            state.phase = Phase::Head(Instant::now());
        }
    }

    /// When the connection is to be given up, as things stand. It changes only while the connection is
    /// polled.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let state = self.state();
        match (state.busy, state.phase) {
            (0, Phase::Head(since)) => Some(since + self.bounds.head_time),
            (0, Phase::Idle(since)) => Some(since + self.bounds.idle_time),
            _ => None,
        }
    }

    /// Whether a request has begun, or was never made.
    pub(super) fn is_head_due(&self) -> bool {
        matches!(self.state().phase, Phase::Head(_))
    }

    pub(super) fn upgrade_to(&self, taker: ReadAhead) {
        self.state().upgrade = Some(taker);
    }

    pub(super) fn take_upgrade(&self) -> Option<ReadAhead> {
        self.state().upgrade.take()
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.busy = state.busy.saturating_sub(1);
        state.phase = Phase::Idle(Instant::now());
    }
}

/// The socket under HTTP.
pub(super) struct Guarded {
    socket: Socket,
    line: Arc<Line>,
    /// Runs while an answer waits for its reader.
    stall: Option<Pin<Box<Sleep>>>,
}

impl Guarded {
    pub(super) fn new(socket: Socket, line: Arc<Line>) -> Self {
        Self { socket, line, stall: None }
    }

    pub(super) fn into_socket(self) -> Socket {
        self.socket
    }
}

impl AsyncRead for Guarded {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.line.is_taken() {
            // What comes now is for the exec. The answer to the request is still to come, and wakes this task.
            return Poll::Pending;
        }
        let before = buffer.filled().len();
        let done = ready!(Pin::new(&mut this.socket).poll_read(cx, buffer));
        if buffer.filled().len() > before {
            this.line.heard();
        }
        Poll::Ready(done)
    }
}

impl AsyncWrite for Guarded {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let taken = this.line.taken();
        // The exec has answered in our stead.
        if *taken || is_hypers_own(bytes) {
            return Poll::Ready(Ok(bytes.len()));
        }
        if let Poll::Ready(written) = Pin::new(&mut this.socket).poll_write(cx, bytes) {
            this.stall = None;
            return Poll::Ready(written);
        }
        let Some(patience) = this.line.bounds.write_time else { return Poll::Pending };
        let stall =
            this.stall.get_or_insert_with(|| Box::pin(sleep_until(Instant::now() + patience)));
        ready!(stall.as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().socket).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.line.is_taken() {
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut this.socket).poll_shutdown(cx)
    }
}

/// The whole head of an error without a body. Ours have one always; and within a body such bytes cannot
/// stand, because JSON and OpenMetrics text hold no carriage return.
fn is_hypers_own(bytes: &[u8]) -> bool {
    const EMPTY: &[u8] = b"content-length: 0\r\n";
    bytes.starts_with(b"HTTP/1.1 4")
        && bytes.ends_with(b"\r\n\r\n")
        && bytes.windows(EMPTY.len()).any(|part| part == EMPTY)
}
