//! One stream from the command to the outside. Reads only when everything before has been written, so
//! that a slow reader slows the command and never us; masks what leased values it knows, and wipes what it
//! read wherever that may hold one.
#![forbid(unsafe_code)]

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::time::{Duration, Instant};

use rustix::buffer::spare_capacity;
use rustix::event::PollFlags;
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use zeroize::Zeroize;

use super::connection::{Connection, ConnectionError};
use super::frames::Kind;
use super::queue::Queue;
use super::room::{self, Room};
use crate::redact::{Masks, Redactor};

/// How long a stream pauses until a tail that could begin a value is shown: a prompt without a newline shows
/// at once, and a value that is written byte by byte is still one.
const HOLD: Duration = Duration::from_millis(100);
/// What a pipe takes without blocking once it is writable. pipe(7) PIPE_BUF.
const WRITE_AT_ONCE: usize = 4096;
/// The pages that a pipe keeps for its next writes once they have been read: one, and two since Linux 6.15.
const KEPT_BY_A_PIPE: usize = 2 * 4096;

/// Where a stream goes.
enum Sink<'a> {
    /// `at_once`: how much is written at a time. A regular file never blocks: all.
    Descriptor {
        fd: BorrowedFd<'a>,
        at_once: usize,
    },
    Frames {
        connection: Rc<RefCell<Connection>>,
        kind: Kind,
    },
}

/// A stream of the command's output.
pub struct Output<'a> {
    from: Option<OwnedFd>,
    to: Sink<'a>,
    pending: Queue,
    /// Of a command that has values.
    masks: Option<Rc<Masks>>,
    /// Once something was read that it is to look at.
    redactor: Option<Redactor>,
    masked_before: u64,
    held_since: Option<Instant>,
    buffer: Vec<u8>,
    room: Room,
    reader_gone: bool,
    has_spoken: bool,
    /// Once every process of the exec is dead: the most that can still lie in the pipe.
    left: Option<usize>,
}

impl<'a> Output<'a> {
    pub fn new(from: OwnedFd, to: BorrowedFd<'a>) -> io::Result<Self> {
        let kind = rustix::fs::FileType::from_raw_mode(rustix::fs::fstat(to)?.st_mode);
        let at_once =
            if kind == rustix::fs::FileType::RegularFile { usize::MAX } else { WRITE_AT_ONCE };
        Ok(Self::into_sink(from, Sink::Descriptor { fd: to, at_once }))
    }

    /// To a client, as frames of this kind. Whoever polls sends what is left unsent.
    pub fn framed(from: OwnedFd, connection: &Rc<RefCell<Connection>>, kind: Kind) -> Self {
        Self::into_sink(from, Sink::Frames { connection: Rc::clone(connection), kind })
    }

    fn into_sink(from: OwnedFd, to: Sink<'a>) -> Self {
        Self {
            from: Some(from),
            to,
            pending: Queue::default(),
            masks: None,
            redactor: None,
            masked_before: 0,
            held_since: None,
            buffer: Vec::new(),
            room: Room::default(),
            reader_gone: false,
            has_spoken: false,
            left: None,
        }
    }

    /// Whether these are frames of this kind.
    pub fn is_framed_as(&self, asked: Kind) -> bool {
        matches!(&self.to, Sink::Frames { kind, .. } if *kind == asked)
    }

    /// The command has these values: from now on they are masked where they may be, and of what it says nothing is
    /// left in our memory, nor in its pipe, where that can be. What was held for the old ones goes out.
    pub fn mask(&mut self, masks: &Rc<Masks>) {
        self.pending.expect_values();
        if let Sink::Frames { connection, .. } = &self.to {
            connection.borrow_mut().expect_values();
        }
        if let Some(mut old) = self.redactor.take() {
            old.flush(self.pending.room_for(old.most_shown(0)));
            self.masked_before += old.masked();
        }
        self.masks = Some(Rc::clone(masks));
    }

    pub fn masked(&self) -> u64 {
        self.masked_before + self.redactor.as_ref().map_or(0, Redactor::masked)
    }

    /// Nothing will come any more, and all that came is written.
    pub fn is_done(&self) -> bool {
        self.from.is_none() && self.pending.is_empty()
    }

    /// What to wait for.
    pub fn interest(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        match &self.to {
            Sink::Descriptor { fd, .. } if !self.pending.is_empty() => Some((*fd, PollFlags::OUT)),
            Sink::Frames { connection, .. } if connection.borrow().is_full() => None,
            Sink::Descriptor { .. } | Sink::Frames { .. } => {
                self.from.as_ref().map(|from| (from.as_fd(), PollFlags::IN))
            }
        }
    }

    /// Every process of the exec is dead. What lies in the pipe still comes; what a stranger writes to
    /// whom the command has passed its end on (unix(7)) is not waited for.
    pub fn last_words(&mut self) -> io::Result<()> {
        if let Some(from) = &self.from {
            rustix::io::ioctl_fionbio(from, true)?;
            // A terminal is no pipe: its buffers hold 64 KiB and one line.
            self.left = Some(rustix::pipe::fcntl_getpipe_size(from).unwrap_or(2 * room::MOST));
        }
        Ok(())
    }

    /// Gives up what is not written yet: nobody takes it, and the caller has asked for the end.
    pub fn give_up(&mut self) {
        self.close();
        self.held_since = None;
        self.pending.clear();
    }

    fn has_last_words(&self) -> bool {
        let is_full = match &self.to {
            Sink::Descriptor { .. } => false,
            Sink::Frames { connection, .. } => connection.borrow().is_full(),
        };
        self.left.is_some() && self.from.is_some() && self.pending.is_empty() && !is_full
    }

    /// How long until there is something to do that no descriptor tells of.
    pub fn patience(&self) -> Option<Duration> {
        if self.has_last_words() {
            return Some(Duration::ZERO);
        }
        self.held_since.map(|since| HOLD.saturating_sub(since.elapsed()))
    }

    /// The descriptor of [`Output::interest`] is ready.
    pub fn ready(&mut self) -> io::Result<()> {
        if self.pending.is_empty() { self.read() } else { self.write() }
    }

    /// The held tail has waited long enough, or the last words wait to be read.
    pub fn on_time(&mut self) -> io::Result<()> {
        if self.has_last_words() {
            self.read()?;
        }
        if self.held_since.is_some_and(|since| since.elapsed() >= HOLD) {
            self.flush()?;
        }
        Ok(())
    }

    fn read(&mut self) -> io::Result<()> {
        let Some(from) = &self.from else { return Ok(()) };
        let most = self.left.unwrap_or(usize::MAX).min(self.room.bytes());
        if most == 0 {
            return self.finish();
        }
        // Not zeroed: of a command that says little, little of it is ever touched.
        self.buffer.clear();
        if self.buffer.capacity() != most {
            self.buffer = Vec::with_capacity(most);
        }
        match rustix::io::read(from, spare_capacity(&mut self.buffer)) {
            Err(Errno::AGAIN) if self.left.is_some() => return self.finish(),
            // A terminal's master says EIO when its last slave is closed. pty(7).
            Ok(0) | Err(Errno::IO) => return self.finish(),
            Ok(n) => {
                self.has_spoken = true;
                self.room.heard(n);
                if let (None, Some(masks)) = (&self.redactor, &self.masks) {
                    match masks.redactor() {
                        Ok(redactor) => self.redactor = redactor,
                        // Nothing is shown, and nothing left.
                        Err(e) => {
                            self.buffer.zeroize();
                            self.close();
                            return Err(e);
                        }
                    }
                }
                let chunk = &mut self.buffer[..n];
                self.left = self.left.map(|left| left.saturating_sub(n));
                match &mut self.redactor {
                    None => self.pending.push(chunk),
                    Some(redactor) => {
                        let shown = self.pending.room_for(redactor.most_shown(n));
                        redactor.push(chunk, shown);
                        redactor.pass_line(shown);
                    }
                }
                // Masked or not, what comes may hold a value.
                if self.masks.is_some() {
                    chunk.zeroize();
                }
                // From the last bytes on: with those of an earlier tail, one that has just come would be shown.
                let holds = self.redactor.as_ref().is_some_and(|r| r.held() > 0);
                self.held_since = holds.then(Instant::now);
            }
            Err(Errno::INTR | Errno::AGAIN) => {}
            Err(e) => return Err(e.into()),
        }
        // Most writes go through at once: no need to ask first whether a short one would.
        if self.pending.is_empty() { Ok(()) } else { self.write_if_writable() }
    }

    /// Nothing more comes.
    fn finish(&mut self) -> io::Result<()> {
        self.close();
        self.flush()
    }

    /// Nothing more is read.
    fn close(&mut self) {
        if let Some(from) = self.from.take()
            && self.masks.is_some()
            && self.has_spoken
        {
            overwrite(&from);
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.held_since = None;
        if let Some(redactor) = &mut self.redactor {
            redactor.flush(self.pending.room_for(redactor.most_shown(0)));
        }
        if self.pending.is_empty() { Ok(()) } else { self.write_if_writable() }
    }

    fn write_if_writable(&mut self) -> io::Result<()> {
        let Sink::Descriptor { fd, .. } = self.to else { return self.write() };
        let mut fds = [rustix::event::PollFd::from_borrowed_fd(fd, PollFlags::OUT)];
        match rustix::event::poll(&mut fds, Some(&rustix::event::Timespec::default())) {
            Ok(0) | Err(Errno::INTR) => Ok(()),
            Ok(_) => self.write(),
            Err(e) => Err(e.into()),
        }
    }

    fn write(&mut self) -> io::Result<()> {
        let rest = self.pending.rest();
        let result = match &self.to {
            _ if self.reader_gone => Ok(rest.len()),
            Sink::Descriptor { fd, at_once } => {
                rustix::io::write(fd, &rest[..rest.len().min(*at_once)])
            }
            Sink::Frames { connection, kind } => match connection.borrow_mut().push(*kind, rest) {
                Ok(()) => Ok(rest.len()),
                Err(ConnectionError::Gone) => Err(Errno::PIPE),
                Err(e) => return Err(io::Error::other(e)),
            },
        };
        match result {
            Ok(n) => self.pending.take(n),
            Err(Errno::INTR | Errno::AGAIN) => {}
            // Our reader is gone: the command learns it as it would have without us.
            Err(Errno::PIPE) => {
                self.reader_gone = true;
                self.pending.clear();
                self.close();
                self.held_since = None;
            }
            Err(e) => return Err(e.into()),
        }
        Ok(())
    }
}

/// A value may have gone through this pipe: the kernel frees the pages that it keeps as they are (without
/// `init_on_free`). Written over, as far as they are still the pipe's and no one is to read them: what was freed
/// in between, and the buffers of a terminal, cannot be reached.
fn overwrite(pipe: &OwnedFd) {
    let again = format!("/proc/self/fd/{}", pipe.as_raw_fd());
    let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    if rustix::pipe::fcntl_getpipe_size(pipe).is_ok()
        && let Ok(writer) = rustix::fs::openat(CWD, again, flags, Mode::empty())
    {
        // The command may have changed the pipe's mode, or its size; then it is as without this.
        match rustix::io::write(&writer, &[0; KEPT_BY_A_PIPE]) {
            Ok(_) | Err(_) => {}
        }
    }
}

#[cfg(test)]
#[path = "output_tests.rs"]
mod tests;
