//! How much a client may send, hold and wait. Numbers only.
#![forbid(unsafe_code)]

use std::time::Duration;

/// The bounds of one socket; `connections` and what follows are counted a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// Bytes of request line and headers. There are at most 100 headers.
    pub head: usize,
    /// From the first byte of a head, or from accept, to its last.
    pub head_time: Duration,
    /// Bytes of a body. JSON in it nests 127 levels deep at most (serde_json's own bound).
    pub body: usize,
    pub body_time: Duration,
    /// Between an answer and the next request.
    pub idle_time: Duration,
    /// How long an answer may wait for the client to read. `None`: as long as it likes.
    pub write_time: Option<Duration>,
    pub connections: usize,
    /// New connections that are taken in a second. Further ones wait in the socket's queue.
    pub connections_a_second: u32,
    /// Requests that are being answered. Further ones wait, at most `queue_time`.
    pub in_flight: usize,
    pub queue_time: Duration,
    /// Requests of which a thread is busy, also after the client has gone.
    pub blocking: usize,
}

impl Bounds {
    /// A run's socket.
    pub const fn agent() -> Self {
        Self {
            head: 16 << 10,
            head_time: Duration::from_secs(5),
            body: 1 << 20,
            body_time: Duration::from_secs(10),
            idle_time: Duration::from_secs(30),
            write_time: Some(Duration::from_secs(30)),
            connections: 32,
            connections_a_second: 500,
            in_flight: 16,
            queue_time: Duration::from_secs(5),
            blocking: 16,
        }
    }

    /// The control socket. A reader of its events may be slow.
    pub const fn control() -> Self {
        Self {
            write_time: None,
            connections: 256,
            connections_a_second: 5000,
            in_flight: 128,
            blocking: 64,
            ..Self::agent()
        }
    }
}
