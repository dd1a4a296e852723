//! The issuer's documents over HTTP: two paths, GET and HEAD, one request a connection, nothing else. A
//! proxy in front speaks TLS. The process that answers needs no file and no key: what it answers with is
//! handed to it by another, which reads the issuer.
#![forbid(unsafe_code)]

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::issuer::Issuer;
use super::publish::{DISCOVERY, JWKS};

/// Connections at once; what comes beyond waits in the kernel's queue.
const MOST: usize = 64;
/// A request's head; longer is none of ours.
const MAX_HEAD: usize = 8 << 10;
/// For the whole request, and again for the whole answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// The largest hand-over.
const MAX_HANDED: u32 = 1 << 20;

/// What is answered with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Published {
    /// The path of the issuer's URL.
    below: String,
    discovery: String,
    jwks: String,
}

impl Published {
    pub fn of(issuer: &Issuer, now: Timestamp) -> Self {
        Self {
            below: issuer.url.path().to_owned(),
            discovery: format!("{}\n", issuer.discovery()),
            jwks: format!("{}\n", issuer.jwks(now)),
        }
    }

    /// Hands it over: its length, then its JSON.
    pub fn send(&self, mut to: impl Write) -> io::Result<()> {
        let text = serde_json::to_vec(self)?;
        let len = u32::try_from(text.len()).map_err(io::Error::other)?;
        to.write_all(&len.to_le_bytes())?;
        to.write_all(&text)
    }

    /// Takes what was handed over; waits for it.
    pub fn receive(mut from: impl Read) -> io::Result<Self> {
        let mut len = [0; 4];
        from.read_exact(&mut len)?;
        let len = u32::from_le_bytes(len);
        if len > MAX_HANDED {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let mut text = vec![0; len as usize];
        from.read_exact(&mut text)?;
        Ok(serde_json::from_slice(&text)?)
    }
}

/// Answers until the process ends, with what `published` holds at the time.
pub fn serve(listener: &TcpListener, published: &Arc<RwLock<Published>>) -> ! {
    let live = Arc::new(AtomicUsize::new(0));
    loop {
        while live.load(Ordering::Acquire) >= MOST {
            std::thread::sleep(Duration::from_millis(5));
        }
        let Ok((stream, _)) = listener.accept() else {
            // Of one connection, or for a moment: EMFILE too.
            std::thread::sleep(Duration::from_millis(20));
            continue;
        };
        live.fetch_add(1, Ordering::AcqRel);
        let seat = Seat(Arc::clone(&live));
        let published = Arc::clone(published);
        let answering = std::thread::Builder::new().stack_size(256 << 10).spawn(move || {
            let _seat = seat;
            // A client that is slow or gone gets nothing, and nobody waits for it.
            drop(answer(&stream, &published));
        });
        // Without a thread the connection is closed, and its seat free.
        drop(answering);
    }
}

struct Seat(Arc<AtomicUsize>);

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// What a request comes to: a status with its reason, and a document.
struct Response {
    status: &'static str,
    more: &'static str,
    body: Vec<u8>,
    with_body: bool,
}

fn answer(stream: &TcpStream, published: &RwLock<Published>) -> io::Result<()> {
    let response = match read_head(stream)? {
        Some(head) => respond(&head, &published.read().unwrap_or_else(PoisonError::into_inner)),
        None => refused("400 Bad Request", ""),
    };
    let head = format!(
        "HTTP/1.1 {}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\
         Cache-Control: public, max-age=300\r\nX-Content-Type-Options: nosniff\r\n{}Connection: close\r\n\r\n",
        response.status,
        response.body.len(),
        response.more,
    );
    let until = Instant::now() + PATIENCE;
    write_until(stream, head.as_bytes(), until)?;
    if response.with_body {
        write_until(stream, &response.body, until)?;
    }
    stream.shutdown(std::net::Shutdown::Write)?;
    // Closed with unread bytes, the connection would be reset under the client's answer.
    stream.set_read_timeout(Some(Duration::from_millis(200)))?;
    let mut rest = stream;
    drop(rest.read(&mut [0; 1024]));
    Ok(())
}

fn refused(status: &'static str, more: &'static str) -> Response {
    Response { status, more, body: b"{}\n".to_vec(), with_body: true }
}

fn respond(head: &[u8], published: &Published) -> Response {
    let mut headers = [httparse::EMPTY_HEADER; 64];
    let mut request = httparse::Request::new(&mut headers);
    if !matches!(request.parse(head), Ok(httparse::Status::Complete(_))) {
        return refused("400 Bad Request", "");
    }
    let with_body = match request.method {
        Some("GET") => true,
        Some("HEAD") => false,
        _ => return refused("405 Method Not Allowed", "Allow: GET, HEAD\r\n"),
    };
    let path = request.path.unwrap_or_default();
    let path = path.split('?').next().unwrap_or_default();
    match path.strip_prefix(published.below.as_str()) {
        Some(DISCOVERY) => found(&published.discovery, with_body),
        Some(JWKS) => found(&published.jwks, with_body),
        _ => refused("404 Not Found", ""),
    }
}

fn found(document: &str, with_body: bool) -> Response {
    Response { status: "200 OK", more: "", body: document.into(), with_body }
}

/// The head of one request; nothing if it is none.
fn read_head(stream: &TcpStream) -> io::Result<Option<Vec<u8>>> {
    let until = Instant::now() + PATIENCE;
    let (mut head, mut chunk) = (Vec::with_capacity(1024), [0; 1024]);
    let mut reader = stream;
    while !head.windows(4).any(|w| w == b"\r\n\r\n") {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() || head.len() > MAX_HEAD {
            return Ok(None);
        }
        stream.set_read_timeout(Some(left))?;
        match reader.read(&mut chunk)? {
            0 => return Ok(None),
            n => head.extend_from_slice(&chunk[..n]),
        }
    }
    Ok(Some(head))
}

fn write_until(mut stream: &TcpStream, mut bytes: &[u8], until: Instant) -> io::Result<()> {
    while !bytes.is_empty() {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_write_timeout(Some(left))?;
        let n = stream.write(bytes)?;
        bytes = &bytes[n..];
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn published() -> Published {
        Published { below: "/hosts/one".into(), discovery: "D".into(), jwks: "J".into() }
    }

    #[test]
    fn two_paths_are_answered_and_nothing_else() {
        #[track_caller]
        fn check(head: &str, status: &str, body: &str) {
            let response = respond(head.as_bytes(), &published());
            let sent = if response.with_body { response.body } else { Vec::new() };
            assert!(response.status.starts_with(status), "{head:?}: {}", response.status);
            assert_eq!(String::from_utf8(sent).unwrap().trim_end(), body, "{head:?}");
        }
        let ask = |line: &str| format!("{line} HTTP/1.1\r\nHost: x\r\n\r\n");
        check(&ask("GET /hosts/one/.well-known/jwks.json"), "200", "J");
        check(&ask("GET /hosts/one/.well-known/openid-configuration?x=1"), "200", "D");
        check(&ask("HEAD /hosts/one/.well-known/jwks.json"), "200", "");
        check(&ask("GET /.well-known/jwks.json"), "404", "{}");
        check(&ask("GET /hosts/one/.well-known/../../../etc/passwd"), "404", "{}");
        check(&ask("GET /hosts/one/.well-known/%6awks.json"), "404", "{}");
        check(&ask("POST /hosts/one/.well-known/jwks.json"), "405", "{}");
        check("nonsense\r\n\r\n", "400", "{}");
    }

    #[test]
    fn what_is_handed_over_arrives_whole_or_not() {
        let mut bytes = Vec::new();
        published().send(&mut bytes).unwrap();
        assert_eq!(Published::receive(&bytes[..]).unwrap(), published());
        assert!(Published::receive(&bytes[..bytes.len() - 1]).is_err());
        assert!(Published::receive(&u32::MAX.to_le_bytes()[..]).is_err());
    }
}
