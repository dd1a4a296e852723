//! A client's connection while its exec lives: frames in, frames out, neither waiting for the other. A
//! client that reads nothing stops its own command, through [`Connection::is_full`], and no one else's.
#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::buffer::spare_capacity;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown};

use super::frames::{self, FrameError, Kind};
use super::queue::Queue;
use super::room::Room;

/// Bytes that wait for a slow client, before the command has to.
const MOST_UNSENT: usize = 256 << 10;
/// How long a client has to leave once its exec is over. Below a second.
const LINGER: Duration = Duration::from_millis(500);

/// What the client says.
#[derive(Debug, PartialEq, Eq)]
pub enum Said<'a> {
    Stdin(&'a [u8]),
    EndOfInput,
    Signal(i32),
    Window {
        rows: u16,
        columns: u16,
    },
    /// Nobody reads this stream any more.
    ReaderGone(Kind),
}

#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    #[error("the client has closed the connection")]
    Gone,
    #[error("the client sent what is no frame of a client: {0}")]
    Frame(#[from] FrameError),
    #[error(
        "the client sent a frame of kind {0:?}, which does not come from clients, or a wrong one"
    )]
    Unexpected(Kind),
    #[error("could not speak with the client")]
    Socket(#[source] io::Error),
}

pub struct Connection {
    socket: UnixStream,
    /// Someone else may still read from the socket.
    is_deaf: bool,
    received: Vec<u8>,
    room: Room,
    /// Read ahead, and not yet looked at: the socket wakes nobody for it.
    is_unheard: bool,
    unsent: Queue,
}

impl Connection {
    /// Of a socket that does not block. Deaf until [`Connection::hear`].
    pub fn new(socket: UnixStream) -> Self {
        Self {
            socket,
            is_deaf: true,
            received: Vec::new(),
            room: Room::default(),
            is_unheard: false,
            unsent: Queue::default(),
        }
    }

    /// Sends what is no frame, before the first of them.
    pub fn greet(&mut self, words: &[u8]) {
        self.unsent.push(words);
        // A client that is gone is seen by who waits for it.
        match self.flush() {
            Ok(()) | Err(_) => {}
        }
    }

    /// What is sent from now on may hold values.
    pub fn expect_values(&mut self) {
        self.unsent.expect_values();
    }

    /// Nobody else reads from the socket any more. `read_ahead`: what was.
    pub fn hear(&mut self, read_ahead: &[u8]) {
        self.is_deaf = false;
        self.is_unheard = !read_ahead.is_empty();
        self.received.extend_from_slice(read_ahead);
    }

    /// Whether the client has closed it. Takes nothing.
    pub fn is_hung_up(&self) -> bool {
        let mut fds = [PollFd::new(&self.socket, PollFlags::RDHUP)];
        poll(&mut fds, Some(&Timespec::default())).is_ok() && !fds[0].revents().is_empty()
    }

    pub fn is_deaf(&self) -> bool {
        self.is_deaf
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Whether [`Connection::receive`] should be called although the socket is not readable.
    pub fn is_unheard(&self) -> bool {
        self.is_unheard
    }

    /// Reads once if something is there, and gives every whole frame to `hear`.
    ///
    /// # Errors
    /// [`ConnectionError`]: the exec has lost its caller.
    pub fn receive(&mut self, mut hear: impl FnMut(Said<'_>)) -> Result<(), ConnectionError> {
        self.is_unheard = false;
        // Not zeroed: of a client that says little, little of it is ever touched.
        self.received.reserve(self.room.bytes());
        let read = recv(&self.socket, spare_capacity(&mut self.received), RecvFlags::DONTWAIT);
        let end = match read {
            Ok((0, _)) | Err(Errno::CONNRESET) => Some(ConnectionError::Gone),
            Ok((count, _)) => {
                self.room.heard(count);
                None
            }
            Err(Errno::INTR | Errno::AGAIN) => None,
            Err(e) => Some(ConnectionError::Socket(e.into())),
        };
        let mut at = 0;
        while let Some((kind, payload, taken)) = frames::take(&self.received[at..])? {
            hear(said(kind, payload)?);
            at += taken;
        }
        self.received.drain(..at);
        end.map_or(Ok(()), Err)
    }

    /// Whether so much is unsent that nothing more should be read from the command.
    pub fn is_full(&self) -> bool {
        self.unsent.rest().len() >= MOST_UNSENT
    }

    pub fn has_unsent(&self) -> bool {
        !self.unsent.is_empty()
    }

    /// Sends a frame, now or when the client takes it.
    pub fn push(&mut self, kind: Kind, payload: &[u8]) -> Result<(), ConnectionError> {
        frames::push(kind, payload, self.unsent.room_for(frames::room(payload.len())));
        self.flush()
    }

    /// Sends what can be sent without waiting.
    pub fn flush(&mut self) -> Result<(), ConnectionError> {
        while !self.unsent.is_empty() {
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match send(&self.socket, self.unsent.rest(), flags) {
                Ok(count) => self.unsent.take(count),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(ConnectionError::Gone),
                Err(e) => return Err(ConnectionError::Socket(e.into())),
            }
        }
        Ok(())
    }

    /// Sends the last frame, and waits for the client to take all, but no longer than `patience`. What it still
    /// has to say, such as the end of an input that a short command never read, meets no broken pipe for a while.
    pub fn finish(
        mut self,
        kind: Kind,
        payload: &[u8],
        patience: Duration,
    ) -> Result<(), ConnectionError> {
        let until = Instant::now() + patience;
        self.push(kind, payload)?;
        // A frame that is full is continued; the last one never is.
        if !payload.is_empty() && payload.len().is_multiple_of(frames::MAX_PAYLOAD) {
            self.push(kind, &[])?;
        }
        while self.has_unsent() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ConnectionError::Socket(io::ErrorKind::TimedOut.into()));
            }
            let timeout =
                Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
            match poll(&mut [PollFd::new(&self.socket, PollFlags::OUT)], Some(&timeout)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(e) => return Err(ConnectionError::Socket(e.into())),
            }
            self.flush()?;
        }
        self.linger();
        Ok(())
    }

    /// Says that nothing more comes, and hears the client out until it leaves, or [`LINGER`] is over.
    fn linger(&self) {
        let until = Instant::now() + LINGER;
        let mut said = Ok(1);
        if shutdown(&self.socket, Shutdown::Write).is_err() {
            return;
        }
        while matches!(said, Ok(1..)) {
            let left = until.saturating_duration_since(Instant::now());
            let timeout = Timespec { tv_sec: 0, tv_nsec: left.subsec_nanos().into() };
            let mut fds = [PollFd::new(&self.socket, PollFlags::IN)];
            said = match poll(&mut fds, Some(&timeout)) {
                Ok(1..) if !left.is_zero() => {
                    recv(&self.socket, &mut [0; 512], RecvFlags::DONTWAIT).map(|(count, _)| count)
                }
                Ok(_) => Ok(0),
                Err(e) => Err(e),
            };
        }
    }
}

fn said(kind: Kind, payload: &[u8]) -> Result<Said<'_>, ConnectionError> {
    match (kind, payload) {
        (Kind::Stdin, []) => Ok(Said::EndOfInput),
        (Kind::Stdin, bytes) => Ok(Said::Stdin(bytes)),
        (Kind::Signal, &[number @ 1..=64]) => Ok(Said::Signal(number.into())),
        (Kind::Window, &[a, b, c, d]) => Ok(Said::Window {
            rows: u16::from_be_bytes([a, b]),
            columns: u16::from_be_bytes([c, d]),
        }),
        (kind @ (Kind::Stdout | Kind::Stderr), []) => Ok(Said::ReaderGone(kind)),
        (kind, _) => Err(ConnectionError::Unexpected(kind)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    fn connection(socket: UnixStream, read_ahead: &[u8]) -> Connection {
        socket.set_nonblocking(true).unwrap();
        let mut connection = Connection::new(socket);
        connection.hear(read_ahead);
        connection
    }

    #[test]
    fn a_client_that_speaks_after_the_end_meets_no_broken_pipe() {
        let (mut client, ours) = UnixStream::pair().unwrap();
        let connection = connection(ours, b"");
        let finished = std::thread::spawn(move || {
            connection.finish(Kind::Exit, b"{}", Duration::from_secs(20)).unwrap();
        });
        let mut said = Vec::new();
        client.read_to_end(&mut said).unwrap();
        assert_eq!(said, b"\x06\0\0\0\0\0\0\x02{}");
        client.write_all(&frames::header(Kind::Stdin, 0)).unwrap();
        drop(client);
        finished.join().unwrap();
    }

    #[test]
    fn a_client_that_stays_is_left() {
        let (mut client, ours) = UnixStream::pair().unwrap();
        let connection = connection(ours, b"");
        let talks = std::thread::spawn(move || while client.write_all(&[0; 512]).is_ok() {});
        connection.finish(Kind::Exit, b"{}", Duration::from_secs(20)).unwrap();
        talks.join().unwrap();
    }

    #[test]
    fn frames_are_heard_however_they_are_cut() {
        let (mut client, ours) = UnixStream::pair().unwrap();
        let mut connection = connection(ours, b"\0\0\0\0\0\0\0\x02a");
        let mut bytes = b"b".to_vec();
        frames::push(Kind::Signal, &[15], &mut bytes);
        frames::push(Kind::Window, &[0, 24, 0, 80], &mut bytes);
        frames::push(Kind::Stdin, &[], &mut bytes);
        let mut heard = Vec::new();
        for byte in bytes {
            client.write_all(&[byte]).unwrap();
            connection.receive(|said| heard.push(format!("{said:?}"))).unwrap();
        }
        assert_eq!(
            heard,
            ["Stdin([97, 98])", "Signal(15)", "Window { rows: 24, columns: 80 }", "EndOfInput"]
        );
        drop(client);
        assert!(matches!(connection.receive(|_| ()), Err(ConnectionError::Gone)));
    }

    #[test]
    fn what_no_client_says_ends_the_connection() {
        #[track_caller]
        fn check(kind: Kind, payload: &[u8]) {
            let (mut client, ours) = UnixStream::pair().unwrap();
            let mut connection = connection(ours, b"");
            let mut bytes = Vec::new();
            frames::push(kind, payload, &mut bytes);
            client.write_all(&bytes).unwrap();
            assert!(matches!(connection.receive(|_| ()), Err(ConnectionError::Unexpected(_))));
        }
        check(Kind::Stdout, b"x");
        check(Kind::Exit, b"{}");
        check(Kind::Signal, &[0]);
        check(Kind::Signal, &[65]);
        check(Kind::Signal, &[1, 2]);
        check(Kind::Window, &[0, 24]);
    }

    #[test]
    fn a_client_that_reads_nothing_fills_only_its_own_connection() {
        let (mut client, ours) = UnixStream::pair().unwrap();
        let mut connection = connection(ours, b"");
        let mut pushed = 0;
        while !connection.is_full() {
            connection.push(Kind::Stdout, &[b'x'; 10_000]).unwrap();
            pushed += 10_000;
        }
        let reader = std::thread::spawn(move || {
            let mut all = Vec::new();
            client.read_to_end(&mut all).unwrap();
            all.len()
        });
        connection.finish(Kind::Exit, b"{}", Duration::from_secs(10)).unwrap();
        let frames = pushed / 10_000 + 1;
        assert_eq!(reader.join().unwrap(), pushed + 2 + frames * frames::HEADER);
    }
}
