//! Our standard input to the command. Reads only when the command takes it, so that nothing is swallowed
//! that the next program of a script would have read.
#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::buffer::spare_capacity;
use rustix::event::PollFlags;
use rustix::io::Errno;

use super::room::Room;

/// Bytes that wait for a command that reads nothing, before the client has to.
const MOST_WAITING: usize = 256 << 10;

/// The command's standard input.
pub struct Input<'a> {
    /// Nothing: it is fed.
    from: Option<BorrowedFd<'a>>,
    /// A fed one ends when what waits is written.
    is_ending: bool,
    to: Option<OwnedFd>,
    pending: Vec<u8>,
    written: usize,
    room: Room,
    /// A terminal's master is not closed at the end of our input: its output still comes.
    keep_open: bool,
}

impl<'a> Input<'a> {
    /// `to` is made non-blocking: a command that reads nothing must not stop us. It is ours alone (a
    /// terminal's master with [`super::output::Output`], which takes it so).
    pub fn new(from: BorrowedFd<'a>, to: OwnedFd, keep_open: bool) -> io::Result<Self> {
        Ok(Self { from: Some(from), ..Self::fed(to, keep_open)? })
    }

    /// Takes what [`Input::feed`] is given, until [`Input::end_feed`].
    pub fn fed(to: OwnedFd, keep_open: bool) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&to, true)?;
        Ok(Self {
            from: None,
            is_ending: false,
            to: Some(to),
            pending: Vec::new(),
            written: 0,
            room: Room::default(),
            keep_open,
        })
    }

    pub fn feed(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.to.is_some() && !self.is_ending {
            self.pending.extend_from_slice(bytes);
        }
        self.write()
    }

    pub fn end_feed(&mut self) -> io::Result<()> {
        if !self.is_ending {
            self.is_ending = true;
            self.end();
        }
        self.write()
    }

    /// Whether more may be fed.
    pub fn has_room(&self) -> bool {
        self.to.is_none() || self.pending.len() - self.written < MOST_WAITING
    }

    /// What to wait for. `POLLERR` on the command's end says that it closed it.
    pub fn interest(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        let to = self.to.as_ref()?;
        if !self.pending.is_empty() {
            return Some((to.as_fd(), PollFlags::OUT));
        }
        self.from.map(|from| (from, PollFlags::IN))
    }

    pub fn ready(&mut self) -> io::Result<()> {
        if self.pending.is_empty() {
            self.read()?
        }
        self.write()
    }

    fn read(&mut self) -> io::Result<()> {
        let Some(from) = self.from else { return Ok(()) };
        // Not zeroed: where there is little input, little of it is ever touched.
        self.pending.reserve(self.room.bytes());
        match rustix::io::read(from, spare_capacity(&mut self.pending)) {
            Ok(0) => self.end(),
            Ok(count) => self.room.heard(count),
            Err(Errno::INTR | Errno::AGAIN) => {}
            // What cannot be read has no input: nohup(1) leaves a stdin that is open for writing only.
            Err(_) => self.end(),
        }
        Ok(())
    }

    fn end(&mut self) {
        self.from = None;
        if self.keep_open {
            // What Ctrl-D is for a terminal's reader.
            self.pending.push(4);
        } else if self.pending.is_empty() {
            self.to = None;
        }
    }

    fn write(&mut self) -> io::Result<()> {
        let Some(to) = &self.to else { return Ok(()) };
        if self.pending.is_empty() {
            return Ok(());
        }
        match rustix::io::write(to, &self.pending[self.written..]) {
            Ok(n) => {
                self.written += n;
                if self.written == self.pending.len() {
                    self.pending.clear();
                    self.written = 0;
                    if self.is_ending && !self.keep_open {
                        self.to = None;
                    }
                }
            }
            Err(Errno::INTR | Errno::AGAIN) => {}
            // The command reads no more.
            Err(Errno::PIPE | Errno::IO) => {
                self.to = None;
                self.from = None;
                self.pending.clear();
            }
            Err(e) => return Err(e.into()),
        }
        Ok(())
    }
}
