//! The audit trail as it grows: one event a line, as it was hashed.
#![forbid(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use super::answer::Body;
use super::error::ClientError;

/// Bytes of one event. What users say in it is bounded far below: [`crate::model::event::MAX_DETAIL`].
const MAX_EVENT: usize = 1 << 20;

/// Events, oldest first. Waits for the next one where it follows the trail; ends with the first error.
///
/// Each is the line as it is hashed and exported, without its line feed; [`crate::model::event::Event`]
/// reads it.
pub struct EventStream {
    body: Body<UnixStream>,
    buffer: Vec<u8>,
    at: usize,
    is_over: bool,
}

impl EventStream {
    pub(super) fn new(body: Body<UnixStream>) -> Self {
        Self { body, buffer: Vec::new(), at: 0, is_over: false }
    }

    fn line(&mut self) -> Result<Option<String>, ClientError> {
        let mut searched = self.at;
        loop {
            if let Some(end) = self.buffer[searched..].iter().position(|&b| b == b'\n') {
                let line = &self.buffer[self.at..searched + end];
                self.at = searched + end + 1;
                // A line feed by itself says no more than that the connection is alive.
                if line.is_empty() {
                    searched = self.at;
                    continue;
                }
                let text = std::str::from_utf8(line);
                return match text {
                    Ok(text) => Ok(Some(text.to_owned())),
                    Err(_) => Err(ClientError::Framing("an event is no UTF-8")),
                };
            }
            self.buffer.drain(..self.at);
            self.at = 0;
            searched = self.buffer.len();
            if searched > MAX_EVENT {
                return Err(ClientError::TooLarge { what: "an event", limit: MAX_EVENT });
            }
            if !self.body.read(&mut self.buffer)? {
                return if self.buffer.is_empty() { Ok(None) } else { Err(ClientError::Cut) };
            }
        }
    }
}

impl Iterator for EventStream {
    type Item = Result<String, ClientError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.is_over {
            return None;
        }
        let next = self.line().transpose();
        self.is_over = !matches!(next, Some(Ok(_)));
        next
    }
}

impl AsFd for EventStream {
    /// To be waited on beside other things. Events that were read with an earlier one do not show on it.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.body.source().as_fd()
    }
}
