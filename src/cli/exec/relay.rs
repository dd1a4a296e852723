//! While an exec of the broker lives: its stream, our streams, signals. One loop, one poll, no thread.
//!
//! Standard input is read only when the broker takes it; the exec's stream only when what came before is
//! written. Whatever ends this drops the stream, and with it the exec.
#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::stdio::{stderr, stdin, stdout};

use crate::api::client::{ClientError, ExecExit, ExecRequest, ExecStream, Frame, PATIENCE};
use crate::api::wire::ErrorObject;
use crate::relay::FORWARDED;
use crate::relay::frames::MAX_PAYLOAD;
use crate::relay::terminal::{self, RawMode};
use crate::sys::process;

/// What a pipe takes without blocking once it is writable. pipe(7) PIPE_BUF.
const WRITE_AT_ONCE: usize = 4096;

/// The exec's end, as the broker told it.
pub enum Ended {
    Exit(Box<ExecExit>),
    /// Nothing ran, or the broker lost the exec.
    Failed(ErrorObject),
}

#[derive(Debug, thiserror::Error)]
pub enum RelayError {
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error("could not relay the command's streams")]
    Streams(#[source] io::Error),
    #[error("interrupted by signal {0} before the command ran")]
    Interrupted(i32),
    #[error("the process that called this is gone, and the exec with it")]
    CallerGone,
    #[error("the reader of the command's output is gone, and the exec with it")]
    ReaderGone,
}

fn streams(e: Errno) -> RelayError {
    RelayError::Streams(e.into())
}

/// Signals of this process, read from a descriptor from now on.
pub struct Signals(OwnedFd);

impl Signals {
    pub fn take() -> io::Result<Self> {
        let mut signals = vec![libc::SIGWINCH];
        for signal in FORWARDED {
            // A blocked signal reaches its descriptor even where nohup(1) has it ignored.
            if !process::is_ignored(signal)? {
                signals.push(signal);
            }
        }
        Ok(Self(process::signalfd(&signals)?))
    }

    fn next(&self) -> Result<Option<i32>, RelayError> {
        process::read_signal(&self.0).map_err(RelayError::Streams)
    }
}

/// Waits until the broker accepts the exec. A signal ends the wait, and the exec before it began.
pub fn accept(asked: ExecRequest, signals: &Signals) -> Result<ExecStream, RelayError> {
    let deadline = Instant::now() + PATIENCE;
    let mut asked = asked;
    loop {
        asked = match asked.answer()? {
            Ok(stream) => return Ok(stream),
            Err(waiting) => waiting,
        };
        let left = deadline.saturating_duration_since(Instant::now());
        if left == Duration::ZERO {
            return Err(ClientError::Silent.into());
        }
        let mut fds = [
            PollFd::from_borrowed_fd(asked.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(signals.0.as_fd(), PollFlags::IN),
        ];
        match poll(&mut fds, Timespec::try_from(left).ok().as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(e) => return Err(streams(e)),
        }
        // The size that was asked for is from before; what it is now is told first thing.
        while let Some(signal) = signals.next()? {
            if signal != libc::SIGWINCH {
                return Err(RelayError::Interrupted(signal));
            }
        }
    }
}

/// Relays until the broker has told the exec's end and all that the command wrote is written.
pub fn relay(
    stream: ExecStream,
    signals: &Signals,
    has_terminal: bool,
) -> Result<Ended, RelayError> {
    let raw_mode = if has_terminal { RawMode::enter(stdin()).map_err(streams)? } else { None };
    let mut relay = Relay {
        stream,
        input: Input::Waiting,
        out: Sink::new(stdout()).map_err(streams)?,
        err: Sink::new(stderr()).map_err(streams)?,
        ended: None,
        _raw_mode: raw_mode,
    };
    if has_terminal {
        relay.tell_size();
    }
    relay.stay(signals)
}

/// Our standard input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Input {
    Waiting,
    /// There is something; it is read when the broker takes it.
    Ready,
    Over,
}

struct Relay<'a> {
    stream: ExecStream,
    input: Input,
    out: Sink<'a>,
    err: Sink<'a>,
    ended: Option<Ended>,
    _raw_mode: Option<RawMode<'a>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Of {
    Stream,
    Signals,
    Caller,
    Input,
    Out,
    Err,
}

impl Relay<'_> {
    fn stay(mut self, signals: &Signals) -> Result<Ended, RelayError> {
        let caller = caller();
        loop {
            match self.take_frames() {
                // A broker that ends an exec nobody listens to: no one is left to be told of a loss.
                Err(RelayError::Client(ClientError::Lost)) if self.is_unheard() => {
                    return Err(RelayError::ReaderGone);
                }
                taken => taken?,
            }
            self.stream.flush()?;
            if self.out.is_idle()
                && self.err.is_idle()
                && let Some(ended) = self.ended.take()
            {
                return Ok(ended);
            }
            for (owner, events) in self.wait(signals, caller.as_ref())? {
                match owner {
                    Of::Signals => self.forward(signals)?,
                    // Whoever asked for it is gone: so is the exec (kill -9 of the caller included).
                    Of::Caller => return Err(RelayError::CallerGone),
                    Of::Input => self.input = Input::Ready,
                    Of::Out => self.out.write().map_err(streams)?,
                    Of::Err => self.err.write().map_err(streams)?,
                    Of::Stream => {
                        // A broker that has closed takes nothing, though it would let us write.
                        let takes =
                            events.contains(PollFlags::OUT) && !events.contains(PollFlags::HUP);
                        if takes && self.input == Input::Ready {
                            self.read_input();
                        }
                        if events.intersects(!PollFlags::OUT) {
                            self.stream.receive()?;
                        }
                    }
                }
            }
        }
    }

    fn is_unheard(&self) -> bool {
        self.out.reader == Reader::Gone || self.err.reader == Reader::Gone
    }

    /// Passes on what was read, as far as our readers take it.
    fn take_frames(&mut self) -> Result<(), RelayError> {
        while self.out.has_room() && self.err.has_room() {
            match self.stream.take()? {
                None => break,
                Some(Frame::Started(_)) => {}
                Some(Frame::Stdout(bytes)) => self.out.put(bytes).map_err(streams)?,
                Some(Frame::Stderr(bytes)) => self.err.put(bytes).map_err(streams)?,
                Some(Frame::Exit(exit)) => self.ended = Some(Ended::Exit(exit)),
                Some(Frame::Failed(error)) => self.ended = Some(Ended::Failed(error)),
            }
        }
        // The command learns that its reader is gone as it would have without us: by a closed pipe.
        if self.out.is_newly_closed() {
            self.stream.close_stdout();
        }
        if self.err.is_newly_closed() {
            self.stream.close_stderr();
        }
        Ok(())
    }

    fn wait(
        &self,
        signals: &Signals,
        caller: Option<&OwnedFd>,
    ) -> Result<Vec<(Of, PollFlags)>, RelayError> {
        let mut watched = vec![(signals.0.as_fd(), PollFlags::IN, Of::Signals)];
        if let Some(caller) = caller {
            watched.push((caller.as_fd(), PollFlags::IN, Of::Caller));
        }
        if self.ended.is_none() && !self.stream.is_closed() {
            let mut of_stream = PollFlags::empty();
            if self.out.has_room() && self.err.has_room() {
                of_stream |= PollFlags::IN;
            }
            let unsent = self.stream.unsent() > 0;
            if unsent || (self.input == Input::Ready && self.stream.is_heard()) {
                of_stream |= PollFlags::OUT;
            }
            if !of_stream.is_empty() {
                watched.push((self.stream.as_fd(), of_stream, Of::Stream));
            }
            if self.input == Input::Waiting && !unsent && self.stream.is_heard() {
                watched.push((stdin(), PollFlags::IN, Of::Input));
            }
        }
        if !self.out.is_idle() {
            watched.push((self.out.to, PollFlags::OUT, Of::Out));
        }
        if !self.err.is_idle() {
            watched.push((self.err.to, PollFlags::OUT, Of::Err));
        }
        let mut fds: Vec<PollFd<'_>> =
            watched.iter().map(|&(fd, flags, _)| PollFd::from_borrowed_fd(fd, flags)).collect();
        match poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(e) => return Err(streams(e)),
        }
        Ok(fds
            .iter()
            .zip(&watched)
            .map(|(fd, &(_, _, owner))| (owner, fd.revents()))
            .filter(|(_, events)| !events.is_empty())
            .collect())
    }

    /// Once, now that the broker takes it.
    fn read_input(&mut self) {
        if self.stream.unsent() > 0 {
            return;
        }
        let mut buffer = [0; MAX_PAYLOAD];
        self.input = Input::Waiting;
        match rustix::io::read(stdin(), &mut buffer) {
            Ok(n) if n > 0 => self.stream.stdin(&buffer[..n]),
            Err(Errno::INTR | Errno::AGAIN) => {}
            // What cannot be read has no input: nohup(1) leaves a stdin that is open for writing only.
            Ok(_) | Err(_) => {
                self.stream.end_stdin();
                self.input = Input::Over;
            }
        }
    }

    fn forward(&mut self, signals: &Signals) -> Result<(), RelayError> {
        while let Some(signal) = signals.next()? {
            match u8::try_from(signal) {
                _ if signal == libc::SIGWINCH => self.tell_size(),
                _ if self.ended.is_some() => {
                    // Only a reader of ours that takes nothing keeps us.
                    self.out.give_up();
                    self.err.give_up();
                }
                Ok(number) => self.stream.signal(number),
                // No signal of signal(7) is that large.
                Err(_) => {}
            }
        }
        Ok(())
    }

    fn tell_size(&mut self) {
        let (rows, columns) = terminal::size(&[stdin(), stdout(), stderr()]);
        self.stream.window(rows, columns);
    }
}

/// One of our own streams: takes bytes without making anyone wait.
struct Sink<'a> {
    to: BorrowedFd<'a>,
    pending: Vec<u8>,
    written: usize,
    /// A regular file never blocks: written whole.
    at_once: usize,
    reader: Reader,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reader {
    There,
    /// The command has not been told yet.
    NewlyGone,
    Gone,
}

impl<'a> Sink<'a> {
    fn new(to: BorrowedFd<'a>) -> Result<Self, Errno> {
        let kind = rustix::fs::FileType::from_raw_mode(rustix::fs::fstat(to)?.st_mode);
        let is_file = kind == rustix::fs::FileType::RegularFile;
        let at_once = if is_file { usize::MAX } else { WRITE_AT_ONCE };
        Ok(Self { to, pending: Vec::new(), written: 0, at_once, reader: Reader::There })
    }

    fn is_idle(&self) -> bool {
        self.pending.is_empty()
    }

    /// One of the two streams may lag behind by a frame before it holds up the other.
    fn has_room(&self) -> bool {
        self.pending.len() - self.written < MAX_PAYLOAD
    }

    fn is_newly_closed(&mut self) -> bool {
        let is_new = self.reader == Reader::NewlyGone;
        if is_new {
            self.reader = Reader::Gone;
        }
        is_new
    }

    fn give_up(&mut self) {
        self.pending.clear();
        self.written = 0;
    }

    /// Writes what can be written at once, and keeps the rest.
    fn put(&mut self, bytes: &[u8]) -> Result<(), Errno> {
        let mut rest = bytes;
        while self.is_idle() && !rest.is_empty() && self.reader == Reader::There {
            if !self.is_writable()? {
                break;
            }
            let taken = self.write_some(rest)?;
            rest = &rest[taken..];
        }
        if self.reader == Reader::There && !rest.is_empty() {
            self.pending.drain(..std::mem::take(&mut self.written));
            self.pending.extend_from_slice(rest);
        }
        Ok(())
    }

    /// The descriptor is ready: writes a part of what is kept.
    fn write(&mut self) -> Result<(), Errno> {
        let pending = std::mem::take(&mut self.pending);
        let taken = self.write_some(&pending[self.written..]);
        self.pending = pending;
        self.written += taken?;
        if self.written == self.pending.len() || self.reader != Reader::There {
            self.give_up();
        }
        Ok(())
    }

    fn is_writable(&self) -> Result<bool, Errno> {
        let mut fds = [PollFd::from_borrowed_fd(self.to, PollFlags::OUT)];
        match poll(&mut fds, Some(&Timespec::default())) {
            Ok(0) | Err(Errno::INTR) => Ok(false),
            Ok(_) => Ok(true),
            Err(e) => Err(e),
        }
    }

    fn write_some(&mut self, bytes: &[u8]) -> Result<usize, Errno> {
        match rustix::io::write(self.to, &bytes[..bytes.len().min(self.at_once)]) {
            Ok(n) => Ok(n),
            Err(Errno::INTR | Errno::AGAIN) => Ok(0),
            Err(Errno::PIPE) => {
                self.reader = Reader::NewlyGone;
                Ok(0)
            }
            Err(e) => Err(e),
        }
    }
}

/// The process that asked for this, to end with it. None where it is outside of our pid namespace.
fn caller() -> Option<OwnedFd> {
    let parent = rustix::process::getppid()?;
    let pidfd = rustix::process::pidfd_open(parent, rustix::process::PidfdFlags::empty()).ok()?;
    // It may have ended between the two calls, and its number been given away.
    (rustix::process::getppid() == Some(parent)).then_some(pidfd)
}
