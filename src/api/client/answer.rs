//! An answer: the bytes of HTTP/1.1 in; a status and a body of known length out. RFC 9112.
//!
//! Every size is bounded. What is framed in two ways, or in none, is refused: where such an answer ends is
//! a guess.
#![forbid(unsafe_code)]

use std::io::{self, Read};

use serde::de::DeserializeOwned;

use super::error::ClientError;
use crate::api::wire::{ErrorBody, UPGRADE};

/// Bytes of a status line and its headers.
pub const MAX_HEAD: usize = 16 << 10;
/// Bytes of a body that is read whole: a list of some hundred thousand leases.
pub const MAX_BODY: usize = 64 << 20;
const MAX_HEADERS: usize = 64;
/// Bytes of a chunk's own line, or of all trailers.
const MAX_LINE: usize = 4 << 10;
/// `100 Continue` and its kin before the answer.
const MAX_INTERIM: usize = 8;
const CHUNK: usize = 16 << 10;

/// Where a body ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framing {
    Length(u64),
    Chunked,
}

/// What stands before a body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Head {
    pub status: u16,
    pub framing: Framing,
    /// It goes on as [`UPGRADE`].
    pub is_upgraded: bool,
    /// `Sublet-Exec-Id`.
    pub exec_id: Option<String>,
}

/// Takes a head off the front of `bytes`: with it, how many bytes it took. `None`: more must be read.
///
/// # Errors
/// As soon as it can be told that this is no head, or too large a one.
pub fn take_head(bytes: &[u8]) -> Result<Option<(Head, usize)>, ClientError> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut response = httparse::Response::new(&mut headers);
    let taken = match response.parse(bytes).map_err(ClientError::Http)? {
        httparse::Status::Complete(taken) if taken <= MAX_HEAD => taken,
        httparse::Status::Partial if bytes.len() <= MAX_HEAD => return Ok(None),
        _ => return Err(ClientError::TooLarge { what: "the head", limit: MAX_HEAD }),
    };
    let status = response.code.unwrap_or_default();
    let (mut length, mut is_chunked, mut is_upgraded, mut exec_id) = (None, false, false, None);
    for header in response.headers.iter() {
        let value = header.value.trim_ascii();
        if header.name.eq_ignore_ascii_case("content-length") {
            let said = decimal(value).ok_or(ClientError::Framing("its length is no number"))?;
            if length.replace(said).is_some_and(|earlier| earlier != said) {
                return Err(ClientError::Framing("it has two lengths"));
            }
        } else if header.name.eq_ignore_ascii_case("transfer-encoding") {
            if is_chunked || !value.eq_ignore_ascii_case(b"chunked") {
                return Err(ClientError::Framing("it is encoded in a way that was not asked for"));
            }
            is_chunked = true;
        } else if header.name.eq_ignore_ascii_case("upgrade") {
            is_upgraded = value.eq_ignore_ascii_case(UPGRADE.as_bytes());
        } else if header.name.eq_ignore_ascii_case("sublet-exec-id") {
            exec_id = std::str::from_utf8(value).ok().map(str::to_owned);
        }
    }
    let has_no_body = matches!(status, 100..=199 | 204 | 304);
    let framing = match (length, is_chunked) {
        _ if has_no_body => Framing::Length(0),
        (Some(length), false) => Framing::Length(length),
        (None, true) => Framing::Chunked,
        (Some(_), true) => return Err(ClientError::Framing("it has a length and is chunked")),
        (None, false) => return Err(ClientError::Framing("it has no length")),
    };
    Ok(Some((Head { status, framing, is_upgraded, exec_id }, taken)))
}

/// Digits only: `+5` and `0x5` are lengths to some readers and none to others.
fn decimal(text: &[u8]) -> Option<u64> {
    let is_plain = !text.is_empty() && text.iter().all(u8::is_ascii_digit);
    std::str::from_utf8(text).ok().filter(|_| is_plain)?.parse().ok()
}

/// Takes heads off `buffer` until one is final.
///
/// # Errors
/// As [`take_head`]; more than a few interim answers.
pub fn take_final_head(buffer: &mut Vec<u8>) -> Result<Option<Head>, ClientError> {
    for _ in 0..MAX_INTERIM {
        let Some((head, taken)) = take_head(buffer)? else { return Ok(None) };
        buffer.drain(..taken);
        if !matches!(head.status, 100 | 102..=199) {
            return Ok(Some(head));
        }
    }
    Err(ClientError::Framing("interim answers without end"))
}

/// A status, and the body that goes with it.
pub struct Answer<R> {
    pub head: Head,
    pub body: Body<R>,
}

impl<R: Read> Answer<R> {
    /// Reads the head; the body is still to be read.
    pub fn read(mut source: R) -> Result<Self, ClientError> {
        let mut buffer = Vec::new();
        loop {
            if let Some(head) = take_final_head(&mut buffer)? {
                let body = Body::new(source, buffer, head.framing);
                return Ok(Self { head, body });
            }
            if read_more(&mut source, &mut buffer, CHUNK)? == 0 {
                return Err(ClientError::Cut);
            }
        }
    }

    pub fn is_success(&self) -> bool {
        matches!(self.head.status, 200..=299)
    }

    /// The whole body of a success.
    ///
    /// # Errors
    /// [`ClientError::Refused`] with the broker's own words for everything else.
    pub fn success(self) -> Result<Vec<u8>, ClientError> {
        if !self.is_success() {
            return Err(self.refusal());
        }
        self.body.whole(MAX_BODY)
    }

    /// The same, parsed. `what` it is, for an error.
    pub fn json<T: DeserializeOwned>(self, what: &'static str) -> Result<T, ClientError> {
        serde_json::from_slice(&self.success()?)
            .map_err(|source| ClientError::Json { what, source })
    }

    /// Why it is no success.
    pub fn refusal(self) -> ClientError {
        let status = self.head.status;
        match self.body.whole(MAX_BODY).map(|body| serde_json::from_slice::<ErrorBody>(&body)) {
            Ok(Ok(ErrorBody { error })) => ClientError::Refused { status, error },
            Ok(Err(_)) => ClientError::Unexplained { status },
            Err(e) => e,
        }
    }
}

/// A body, read as it comes.
pub struct Body<R> {
    source: R,
    /// Read and not yet given out, from `at` on.
    buffer: Vec<u8>,
    at: usize,
    place: Place,
}

/// What comes next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// So many bytes, and then the end.
    Plain(u64),
    ChunkLine,
    Chunk(u64),
    /// The line's end behind a chunk.
    ChunkEnd,
    Trailers(usize),
    End,
}

impl<R: Read> Body<R> {
    /// `buffer`: what was read behind the head.
    pub fn new(source: R, buffer: Vec<u8>, framing: Framing) -> Self {
        let place = match framing {
            Framing::Length(0) => Place::End,
            Framing::Length(length) => Place::Plain(length),
            Framing::Chunked => Place::ChunkLine,
        };
        Self { source, buffer, at: 0, place }
    }

    pub fn source(&self) -> &R {
        &self.source
    }

    /// Appends what comes next to `out`, waiting for it where needed. `false` at the body's end.
    pub fn read(&mut self, out: &mut Vec<u8>) -> Result<bool, ClientError> {
        loop {
            match self.place {
                Place::End => return Ok(false),
                Place::Plain(left) => {
                    let left = self.give(left, out)?;
                    self.place = if left == 0 { Place::End } else { Place::Plain(left) };
                    return Ok(true);
                }
                Place::Chunk(left) => {
                    let left = self.give(left, out)?;
                    self.place = if left == 0 { Place::ChunkEnd } else { Place::Chunk(left) };
                    return Ok(true);
                }
                Place::ChunkLine => {
                    let line = self.line(MAX_LINE)?;
                    let size = match httparse::parse_chunk_size(&line) {
                        Ok(httparse::Status::Complete((_, size))) => size,
                        _ => return Err(ClientError::Framing("a chunk's size is no number")),
                    };
                    self.place = if size == 0 { Place::Trailers(0) } else { Place::Chunk(size) };
                }
                Place::ChunkEnd => {
                    if self.line(MAX_LINE)? != b"\r\n" {
                        return Err(ClientError::Framing("a chunk is longer than it says"));
                    }
                    self.place = Place::ChunkLine;
                }
                Place::Trailers(so_far) => {
                    let line = self.line(MAX_LINE - so_far)?;
                    self.place = match line.len() {
                        2 => Place::End,
                        more => Place::Trailers(so_far + more),
                    };
                }
            }
        }
    }

    /// All of it.
    pub fn whole(mut self, limit: usize) -> Result<Vec<u8>, ClientError> {
        let too_large = ClientError::TooLarge { what: "an answer", limit };
        let mut out = Vec::new();
        if let Place::Plain(length) = self.place {
            if length > limit as u64 {
                return Err(too_large);
            }
            out.reserve(length as usize);
        }
        while self.read(&mut out)? {
            if out.len() > limit {
                return Err(too_large);
            }
        }
        Ok(out)
    }

    /// Moves at most `left` bytes to `out`, at least one; returns what is left then.
    fn give(&mut self, left: u64, out: &mut Vec<u8>) -> Result<u64, ClientError> {
        if self.at == self.buffer.len() {
            self.fill()?;
        }
        let here = &self.buffer[self.at..];
        let n = here.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        out.extend_from_slice(&here[..n]);
        self.at += n;
        Ok(left - n as u64)
    }

    /// A line with its CRLF.
    fn line(&mut self, limit: usize) -> Result<Vec<u8>, ClientError> {
        loop {
            let here = &self.buffer[self.at..];
            if let Some(end) = here.iter().position(|&b| b == b'\n').filter(|&end| end < limit) {
                let line = here[..=end].to_vec();
                self.at += line.len();
                return match line.ends_with(b"\r\n") {
                    true => Ok(line),
                    false => Err(ClientError::Framing("a line of a chunk does not end as one")),
                };
            }
            if here.len() >= limit {
                return Err(ClientError::TooLarge { what: "a chunk's line", limit });
            }
            self.fill()?;
        }
    }

    fn fill(&mut self) -> Result<(), ClientError> {
        self.buffer.drain(..self.at);
        self.at = 0;
        match read_more(&mut self.source, &mut self.buffer, CHUNK)? {
            0 => Err(ClientError::Cut),
            _ => Ok(()),
        }
    }
}

/// Appends what one read gives; 0 at the end.
fn read_more(
    source: &mut impl Read,
    buffer: &mut Vec<u8>,
    most: usize,
) -> Result<usize, ClientError> {
    let before = buffer.len();
    buffer.resize(before + most, 0);
    let read = loop {
        match source.read(&mut buffer[before..]) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            other => break other,
        }
    };
    buffer.truncate(before + *read.as_ref().unwrap_or(&0));
    read.map_err(ClientError::receive)
}
