//! Why a request was not answered, or answered with no. A server's own words are kept whole.
#![forbid(unsafe_code)]

use std::io;
use std::path::PathBuf;

use crate::api::wire::ErrorObject;
use crate::relay::frames::{FrameError, Kind};

/// What went wrong between client and broker.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// `source` tells which it is: `NotFound` (no socket there), `ConnectionRefused` (nothing listens on
    /// it), `PermissionDenied`, `WouldBlock` (it listens, and has not taken the connection in time).
    #[error("no broker answers at {}", path.display())]
    Connect { path: PathBuf, source: io::Error },
    #[error("could not send the request to the broker")]
    Send(#[source] io::Error),
    #[error("could not read the broker's answer")]
    Receive(#[source] io::Error),
    #[error("the broker did not answer in time")]
    Silent,
    #[error("the broker closed the connection in the middle of its answer")]
    Cut,
    #[error("the broker's answer is no HTTP/1.1")]
    Http(#[source] httparse::Error),
    #[error("the broker's answer is wrongly framed: {0}")]
    Framing(&'static str),
    #[error("{what} of the broker is larger than {limit} bytes")]
    TooLarge { what: &'static str, limit: usize },
    #[error("could not make JSON of the request")]
    Encode(#[source] serde_json::Error),
    #[error("could not read {what} in the broker's answer")]
    Json { what: &'static str, source: serde_json::Error },
    /// The broker's answer is no: 403 for a denial, whose name `error.reason` is.
    #[error("{}", error.message)]
    Refused { status: u16, error: ErrorObject },
    #[error("the broker answered with status {status} and did not say why")]
    Unexplained { status: u16 },
    #[error("could not read a frame of the exec's stream")]
    Frame(#[from] FrameError),
    #[error("the broker sent a frame of kind {0:?}, which only clients send")]
    Misplaced(Kind),
    /// The stream ended without the exec's end: the broker died, or cut this client off. It kills what it
    /// cannot account for.
    #[error("the exec was lost: the broker closed the stream before it told the exec's end")]
    Lost,
}

impl ClientError {
    /// The broker's own error, if this is one.
    pub fn refusal(&self) -> Option<&ErrorObject> {
        match self {
            ClientError::Refused { error, .. } => Some(error),
            _ => None,
        }
    }

    pub(super) fn receive(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => ClientError::Silent,
            // A broker that closes with our bytes unread resets the connection. unix(7).
            io::ErrorKind::ConnectionReset | io::ErrorKind::UnexpectedEof => ClientError::Cut,
            _ => ClientError::Receive(error),
        }
    }
}
