//! An HTTP server that demands the value of the row at hand: in a bearer header, or as git's password,
//! and then is `git http-backend`. It keeps nothing of what it was sent.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use super::residue::wipe;

#[derive(Default)]
struct Shared {
    /// Masked, as it lies in `/vm/masked`.
    expected: Mutex<Vec<u8>>,
    admitted: AtomicUsize,
}

pub struct Server(Arc<Shared>);

impl Server {
    pub fn start(port: u16, repositories: &'static str) -> std::io::Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", port))?;
        let shared = Arc::new(Shared::default());
        let server = Self(Arc::clone(&shared));
        std::thread::spawn(move || {
            // One buffer for all that is read: nothing of it moves.
            let mut buffer = vec![0; 1 << 20];
            for stream in listener.incoming().flatten() {
                // A client that hangs up is no failure of the server.
                let _ = answer(stream, &mut buffer, &shared, repositories);
                wipe(&mut buffer);
            }
        });
        Ok(server)
    }

    pub fn expect(&self, masked: Vec<u8>) {
        *self.0.expected.lock().expect("the server panicked") = masked;
    }

    pub fn admitted(&self) -> usize {
        self.0.admitted.load(Ordering::SeqCst)
    }
}

fn answer(
    mut stream: TcpStream,
    buffer: &mut [u8],
    shared: &Shared,
    root: &str,
) -> std::io::Result<()> {
    let (mut have, mut head) = (0, None);
    let body = loop {
        if let Some(end) = head {
            let length = header(&buffer[..end], "content-length")
                .and_then(|range| std::str::from_utf8(&buffer[range]).ok()?.trim().parse().ok())
                .unwrap_or(0_usize);
            if have >= end + length {
                break end..end + length;
            }
        }
        let read = stream.read(&mut buffer[have..])?;
        if read == 0 {
            return Ok(());
        }
        have += read;
        head = head
            .or_else(|| buffer[..have].windows(4).position(|w| w == b"\r\n\r\n").map(|at| at + 4));
    };
    let head = &buffer[..body.start];
    let given = header(head, "authorization").map(|range| &head[range]);
    let admitted = given.is_some_and(|given| shared.admits(given));
    if !admitted {
        return stream.write_all(
            b"HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: Basic realm=\"git\"\r\n\
              Content-Length: 0\r\nConnection: close\r\n\r\n",
        );
    }
    shared.admitted.fetch_add(1, Ordering::SeqCst);
    let line_end = head.iter().position(|b| *b == b'\r').unwrap_or(0);
    let line = String::from_utf8_lossy(&head[..line_end]).into_owned();
    if line.contains(" /header ") {
        return stream.write_all(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n");
    }
    let kind = header(head, "content-type").map(|r| String::from_utf8_lossy(&head[r]).into_owned());
    backend(&mut stream, &line, kind.as_deref().unwrap_or_default().trim(), &buffer[body], root)
}

fn backend(
    stream: &mut TcpStream,
    line: &str,
    kind: &str,
    body: &[u8],
    root: &str,
) -> std::io::Result<()> {
    let mut words = line.split(' ');
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let mut backend = Command::new("git")
        .arg("http-backend")
        .envs([
            ("GIT_PROJECT_ROOT", root),
            ("GIT_HTTP_EXPORT_ALL", "1"),
            ("REQUEST_METHOD", method),
        ])
        .envs([
            ("PATH_INFO", path),
            ("QUERY_STRING", query),
            ("CONTENT_TYPE", kind),
            ("REMOTE_USER", "x"),
        ])
        .env("CONTENT_LENGTH", body.len().to_string())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    if let Some(mut stdin) = backend.stdin.take() {
        stdin.write_all(body)?;
    }
    let output = backend.wait_with_output()?.stdout;
    let text = String::from_utf8_lossy(&output);
    let status = text.lines().find_map(|l| l.strip_prefix("Status: ")).unwrap_or("200 OK").trim();
    stream.write_all(format!("HTTP/1.1 {status}\r\nConnection: close\r\n").as_bytes())?;
    stream.write_all(&output)
}

/// Where a header's value lies.
fn header(head: &[u8], name: &str) -> Option<std::ops::Range<usize>> {
    let mut at = 0;
    for line in head.split(|b| *b == b'\n') {
        let colon = line.iter().position(|b| *b == b':');
        if let Some(colon) = colon
            && line[..colon].eq_ignore_ascii_case(name.as_bytes())
        {
            return Some(at + colon + 1..at + line.len().saturating_sub(1));
        }
        at += line.len() + 1;
    }
    None
}

impl Shared {
    fn admits(&self, given: &[u8]) -> bool {
        let given = given.trim_ascii();
        let masked = self.expected.lock().expect("the server panicked");
        let is_it = |value: &[u8]| {
            !masked.is_empty()
                && value.len() == masked.len()
                && value.iter().zip(masked.iter()).all(|(a, b)| a ^ 0x5a == *b)
        };
        if let Some(value) = given.strip_prefix(b"Bearer ") {
            return is_it(value);
        }
        let Some(text) = given.strip_prefix(b"Basic ") else { return false };
        let mut decoded = [0; 512];
        let len = decode(text, &mut decoded);
        let found = decoded[..len]
            .iter()
            .position(|b| *b == b':')
            .is_some_and(|colon| is_it(&decoded[colon + 1..len]));
        wipe(&mut decoded);
        found
    }
}

/// Base64, into a buffer that is wiped.
fn decode(text: &[u8], out: &mut [u8]) -> usize {
    let (mut bits, mut count, mut len) = (0_u32, 0, 0);
    for letter in text {
        let six = match letter {
            b'A'..=b'Z' => letter - b'A',
            b'a'..=b'z' => letter - b'a' + 26,
            b'0'..=b'9' => letter - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => break,
        };
        bits = bits << 6 | u32::from(six);
        count += 6;
        if count >= 8 && len < out.len() {
            count -= 8;
            out[len] = (bits >> count) as u8;
            len += 1;
        }
    }
    len
}
