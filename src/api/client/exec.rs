//! One exec of the broker, seen from its client: asked for, accepted, then a stream of frames both ways.
//!
//! Never waits unless it is told to, so that one `poll` loop can serve it beside a terminal. Closing it
//! kills the exec.
#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::buffer::spare_capacity;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};
use serde::Deserialize;

use super::answer::{Answer, Body, take_final_head};
use super::connection::wait_readable;
use super::error::ClientError;
use crate::api::wire::{ErrorBody, ErrorObject, StartedObject};
use crate::model::id::ExecId;
use crate::relay::frames::{self, HEADER, Kind, MAX_PAYLOAD};

/// Bytes that one read takes at most.
const CHUNK: usize = MAX_PAYLOAD + HEADER;
/// Bytes of a report or an error, over all of its frames.
const MAX_JSON: usize = 8 << 20;

/// An exec that was asked for; the broker has not said yet whether it may be.
pub struct ExecRequest {
    socket: UnixStream,
    incoming: Vec<u8>,
    patience: Duration,
}

impl ExecRequest {
    pub(super) fn new(socket: UnixStream, patience: Duration) -> Self {
        Self { socket, incoming: Vec::new(), patience }
    }

    /// Reads what has come of the answer. `None`: it is not all there; wait until the descriptor is
    /// readable.
    ///
    /// # Errors
    /// [`ClientError::Refused`] if the broker says no: nothing ran.
    pub fn answer(mut self) -> Result<Result<ExecStream, Self>, ClientError> {
        loop {
            if let Some(head) = take_final_head(&mut self.incoming)? {
                if head.status == 101 && head.is_upgraded {
                    let exec_id = head.exec_id.and_then(|id| id.parse().ok());
                    return Ok(Ok(ExecStream::new(self.socket, exec_id, self.incoming)));
                }
                let body = Body::new(self.socket, self.incoming, head.framing);
                let answer = Answer { head, body };
                if answer.is_success() || answer.head.status == 101 {
                    return Err(ClientError::Framing("it did not become an exec's stream"));
                }
                return Err(answer.refusal());
            }
            match receive(&self.socket, &mut self.incoming)? {
                Received::Bytes => {}
                Received::Nothing => return Ok(Err(self)),
                Received::End => return Err(ClientError::Cut),
            }
        }
    }

    /// Waits for the answer, for each part of it as long as the client has patience.
    ///
    /// # Errors
    /// As [`ExecRequest::answer`]; [`ClientError::Silent`].
    pub fn wait(self) -> Result<ExecStream, ClientError> {
        let mut asked = self;
        loop {
            asked = match asked.answer()? {
                Ok(stream) => return Ok(stream),
                Err(waiting) => waiting,
            };
            wait_readable(&asked.socket, asked.patience)?;
        }
    }
}

impl AsFd for ExecRequest {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// What the broker says of an exec.
#[derive(Debug, Clone, PartialEq)]
pub enum Frame<'a> {
    /// The command was executed.
    Started(ExecId),
    Stdout(&'a [u8]),
    Stderr(&'a [u8]),
    /// Its end, and the last frame.
    Exit(Box<ExecExit>),
    /// Nothing ran, or the exec was lost. The last frame.
    Failed(ErrorObject),
}

/// How an exec ended.
#[derive(Debug, Clone, PartialEq)]
pub struct ExecExit {
    /// The command's own, 128 and its signal, or 124 for a timeout.
    pub exit_status: u8,
    pub signal: Option<i32>,
    pub timed_out: bool,
    /// Leased values too short to be masked in the output.
    pub unmasked_values: u64,
    /// The whole report, as `sublet run --report` writes it.
    pub report: serde_json::Value,
}

impl ExecExit {
    fn parse(text: &[u8]) -> Result<Self, serde_json::Error> {
        #[derive(Deserialize)]
        struct Facts {
            exit_status: u8,
            #[serde(default)]
            signal: Option<i32>,
            #[serde(default)]
            timed_out: bool,
            #[serde(default)]
            unmasked_values: u64,
        }
        let report: serde_json::Value = serde_json::from_slice(text)?;
        let Facts { exit_status, signal, timed_out, unmasked_values } =
            Facts::deserialize(&report)?;
        Ok(Self { exit_status, signal, timed_out, unmasked_values, report })
    }
}

/// What a read gave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Received {
    Bytes,
    Nothing,
    End,
}

/// The stream of a running exec.
///
/// In a `poll` loop: wait for [`AsFd`] (readable; writable while [`ExecStream::unsent`] is not 0), then
/// [`ExecStream::receive`], [`ExecStream::take`] until there is nothing, [`ExecStream::flush`]. Or, where
/// nothing else is to be served, [`ExecStream::next_frame`] alone.
pub struct ExecStream {
    socket: UnixStream,
    exec_id: Option<ExecId>,
    incoming: Vec<u8>,
    at: usize,
    outgoing: Vec<u8>,
    sent: usize,
    /// Of a report or an error that takes several frames.
    json: Vec<u8>,
    is_over: bool,
    is_closed: bool,
    is_heard: bool,
}

impl ExecStream {
    /// `incoming`: what was read behind the answer's head.
    pub(super) fn new(socket: UnixStream, exec_id: Option<ExecId>, incoming: Vec<u8>) -> Self {
        Self {
            socket,
            exec_id,
            incoming,
            at: 0,
            outgoing: Vec::new(),
            sent: 0,
            json: Vec::new(),
            is_over: false,
            is_closed: false,
            is_heard: true,
        }
    }

    /// As the broker named it when it accepted the request.
    pub fn exec_id(&self) -> Option<&ExecId> {
        self.exec_id.as_ref()
    }

    /// Whether the last frame has been taken.
    pub fn is_over(&self) -> bool {
        self.is_over
    }

    /// Whether the broker has closed the stream: nothing more can be received.
    pub fn is_closed(&self) -> bool {
        self.is_closed
    }

    /// Whether the broker still takes what is sent, as far as is known.
    pub fn is_heard(&self) -> bool {
        self.is_heard
    }

    /// Bytes for the command's standard input. An empty slice is nothing, not the end.
    pub fn stdin(&mut self, bytes: &[u8]) {
        if !bytes.is_empty() {
            frames::push(Kind::Stdin, bytes, &mut self.outgoing);
        }
    }

    /// Nothing more comes on standard input.
    pub fn end_stdin(&mut self) {
        frames::push(Kind::Stdin, &[], &mut self.outgoing);
    }

    /// Nobody reads the command's standard output any more: it shall meet a closed pipe (EPIPE).
    pub fn close_stdout(&mut self) {
        frames::push(Kind::Stdout, &[], &mut self.outgoing);
    }

    /// As [`ExecStream::close_stdout`], for standard error.
    pub fn close_stderr(&mut self) {
        frames::push(Kind::Stderr, &[], &mut self.outgoing);
    }

    /// Sends the command a signal, by its number. signal(7).
    pub fn signal(&mut self, number: u8) {
        frames::push(Kind::Signal, &[number], &mut self.outgoing);
    }

    /// The size of the terminal that the command's is shown on.
    pub fn window(&mut self, rows: u16, columns: u16) {
        let [[a, b], [c, d]] = [rows.to_be_bytes(), columns.to_be_bytes()];
        frames::push(Kind::Window, &[a, b, c, d], &mut self.outgoing);
    }

    /// Bytes that wait to be sent.
    pub fn unsent(&self) -> usize {
        self.outgoing.len() - self.sent
    }

    /// Sends what can be sent without waiting. What is left then is [`ExecStream::unsent`].
    pub fn flush(&mut self) -> Result<(), ClientError> {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        while self.unsent() > 0 {
            match send(&self.socket, &self.outgoing[self.sent..], flags) {
                Ok(n) => self.sent += n,
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                // The broker listens no more. What it said last still comes: the exec's end, or nothing.
                Err(Errno::PIPE | Errno::CONNRESET) => {
                    self.is_heard = false;
                    break;
                }
                Err(e) => return Err(ClientError::Send(e.into())),
            }
        }
        self.outgoing.clear();
        self.sent = 0;
        Ok(())
    }

    /// Reads what is there, without waiting.
    pub fn receive(&mut self) -> Result<(), ClientError> {
        self.incoming.drain(..self.at);
        self.at = 0;
        self.is_closed |= receive(&self.socket, &mut self.incoming)? == Received::End;
        Ok(())
    }

    /// The next frame of what was received. `None`: more must be received, or the exec is over.
    ///
    /// # Errors
    /// [`ClientError::Lost`] if the stream ended before the exec did; what is no frame of a broker. Then
    /// the stream is of no further use.
    pub fn take(&mut self) -> Result<Option<Frame<'_>>, ClientError> {
        while !self.is_over {
            let next = frames::take(&self.incoming[self.at..])?;
            let Some((kind, taken)) = next.map(|(kind, _, taken)| (kind, taken)) else { break };
            let payload = self.at + HEADER..self.at + taken;
            self.at += taken;
            match kind {
                Kind::Stdout => return Ok(Some(Frame::Stdout(&self.incoming[payload]))),
                Kind::Stderr => return Ok(Some(Frame::Stderr(&self.incoming[payload]))),
                Kind::Started => {
                    let started = serde_json::from_slice(&self.incoming[payload]);
                    let StartedObject { exec_id } = started.map_err(json("an exec's id"))?;
                    self.exec_id = Some(exec_id.clone());
                    return Ok(Some(Frame::Started(exec_id)));
                }
                Kind::Exit | Kind::Error => {
                    let is_whole = payload.len() < MAX_PAYLOAD;
                    self.json.extend_from_slice(&self.incoming[payload]);
                    if self.json.len() > MAX_JSON {
                        return Err(ClientError::TooLarge { what: "a report", limit: MAX_JSON });
                    }
                    if is_whole {
                        self.is_over = true;
                        return self.last(kind).map(Some);
                    }
                }
                Kind::Stdin | Kind::Signal | Kind::Window => {
                    return Err(ClientError::Misplaced(kind));
                }
            }
        }
        if self.is_closed && !self.is_over { Err(ClientError::Lost) } else { Ok(None) }
    }

    fn last(&self, kind: Kind) -> Result<Frame<'static>, ClientError> {
        if kind == Kind::Exit {
            let exit = ExecExit::parse(&self.json).map_err(json("an exec's report"))?;
            return Ok(Frame::Exit(Box::new(exit)));
        }
        let ErrorBody { error } =
            serde_json::from_slice(&self.json).map_err(json("an exec's error"))?;
        Ok(Frame::Failed(error))
    }

    /// Sends what is unsent and waits for the next frame. `None` after the last one.
    ///
    /// # Errors
    /// As [`ExecStream::receive`] and [`ExecStream::take`].
    pub fn next_frame(&mut self) -> Result<Option<Frame<'_>>, ClientError> {
        while !self.is_over && !self.is_closed && !self.holds_a_frame()? {
            self.flush()?;
            let out = if self.unsent() > 0 { PollFlags::OUT } else { PollFlags::empty() };
            let mut fds = [PollFd::new(&self.socket, PollFlags::IN | out)];
            match poll(&mut fds, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(e) => return Err(ClientError::Receive(e.into())),
            }
            if fds[0].revents().intersects(!PollFlags::OUT) {
                self.receive()?;
            }
        }
        self.take()
    }

    /// A frame that [`ExecStream::take`] would give. Pieces of a longer text are none.
    fn holds_a_frame(&mut self) -> Result<bool, ClientError> {
        while let Some((kind, payload, taken)) = frames::take(&self.incoming[self.at..])? {
            if !matches!(kind, Kind::Exit | Kind::Error) || payload.len() < MAX_PAYLOAD {
                return Ok(true);
            }
            self.json.extend_from_slice(payload);
            self.at += taken;
            if self.json.len() > MAX_JSON {
                return Err(ClientError::TooLarge { what: "a report", limit: MAX_JSON });
            }
        }
        Ok(false)
    }
}

impl AsFd for ExecStream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn json(what: &'static str) -> impl Fn(serde_json::Error) -> ClientError {
    move |source| ClientError::Json { what, source }
}

fn receive(socket: &UnixStream, buffer: &mut Vec<u8>) -> Result<Received, ClientError> {
    buffer.reserve(CHUNK);
    loop {
        match recv(socket, spare_capacity(buffer), RecvFlags::DONTWAIT) {
            Ok((_, 0)) => return Ok(Received::End),
            Ok(_) => return Ok(Received::Bytes),
            Err(Errno::AGAIN) => return Ok(Received::Nothing),
            Err(Errno::INTR) => {}
            // A broker that closes with our bytes unread resets the connection; all that it said was read
            // before. unix(7).
            Err(Errno::CONNRESET) => return Ok(Received::End),
            Err(e) => return Err(ClientError::receive(io::Error::from(e))),
        }
    }
}
