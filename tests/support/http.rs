//! HTTP over a Unix socket, byte by byte: what a test sends is what goes over, right or wrong.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;

/// Longer than any answer of these tests takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    pub head: String,
    pub body: Vec<u8>,
}

impl Reply {
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {self}"))
    }

    /// The body, after this status.
    #[track_caller]
    pub fn ok(&self, status: u16) -> Value {
        assert_eq!(self.status, status, "{self}");
        self.json()
    }

    /// An error of this status and reason, in the form that all errors have.
    #[track_caller]
    pub fn fails(&self, status: u16, reason: &str) -> Value {
        let error = self.ok(status)["error"].clone();
        assert_eq!(error["reason"], reason, "{self}");
        assert!(self.head.contains("content-type: application/json"), "{self}");
        for member in ["stage", "message", "hint"] {
            assert!(error[member].is_string(), "{self}");
        }
        error
    }
}

impl std::fmt::Display for Reply {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}{}", self.head, String::from_utf8_lossy(&self.body))
    }
}

pub fn connect(socket: &Path) -> UnixStream {
    let stream = UnixStream::connect(socket)
        .unwrap_or_else(|e| panic!("cannot connect to {}: {e}", socket.display()));
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// One request on a connection of its own.
#[track_caller]
pub fn ask(socket: &Path, method: &str, path: &str, body: Option<&Value>) -> Reply {
    raw(socket, request(method, path, body))
}

pub fn request(method: &str, path: &str, body: Option<&Value>) -> String {
    let close = "Host: sublet\r\nConnection: close\r\n";
    match body.map(Value::to_string) {
        Some(text) => format!(
            "{method} {path} HTTP/1.1\r\n{close}Content-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n{text}",
            text.len()
        ),
        None => format!("{method} {path} HTTP/1.1\r\n{close}\r\n"),
    }
}

/// Sends these bytes, and reads until the server closes.
#[track_caller]
pub fn raw(socket: &Path, bytes: impl AsRef<[u8]>) -> Reply {
    let mut stream = connect(socket);
    // A server that has heard enough closes before all is sent.
    drop(stream.write_all(bytes.as_ref()));
    whole(stream)
}

/// Everything until the end, as one answer.
#[track_caller]
pub fn whole(mut stream: UnixStream) -> Reply {
    let mut bytes = Vec::new();
    match stream.read_to_end(&mut bytes) {
        Ok(_) => {}
        Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => {}
        Err(e) => panic!("{e} after {}", String::from_utf8_lossy(&bytes)),
    }
    let end = bytes.windows(4).position(|w| w == b"\r\n\r\n");
    let end = end.unwrap_or_else(|| panic!("no head: {:?}", String::from_utf8_lossy(&bytes))) + 4;
    let body = bytes.split_off(end);
    let head = String::from_utf8(bytes).unwrap();
    let body = if head.contains("transfer-encoding: chunked") { unchunked(&body) } else { body };
    Reply { status: status_of(&head), head, body }
}

/// The head of an answer whose connection goes on.
#[track_caller]
pub fn head(stream: &mut UnixStream) -> String {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte).unwrap_or_else(|e| {
            panic!("{e} after {:?}", String::from_utf8_lossy(&head));
        });
        head.push(byte[0]);
    }
    String::from_utf8(head).unwrap()
}

fn status_of(head: &str) -> u16 {
    head.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or_else(|| panic!("{head}"))
}

fn unchunked(mut bytes: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    while let Some(line) = bytes.windows(2).position(|w| w == b"\r\n") {
        let size = std::str::from_utf8(&bytes[..line]).unwrap();
        let size = usize::from_str_radix(size, 16).unwrap();
        bytes = &bytes[line + 2..];
        body.extend_from_slice(&bytes[..size]);
        bytes = &bytes[size + 2..];
    }
    body
}
