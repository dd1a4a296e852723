//! The container-credentials address of an exec: whoever in it has the token gets the credential, as the SDKs of
//! AWS ask for it (docs.aws.amazon.com/sdkref, "Container credential provider").
//!
//! Listens in the exec's own network namespace; the broker answers. Parses hostile input: the command may write
//! anything to the socket. A value is written to nothing but the answer of a request with the token.
#![forbid(unsafe_code)]

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use subtle::ConstantTimeEq;

use crate::model::secret::Secret;

/// What is asked for there.
pub const PATH: &str = "/credentials";
const MAX_REQUEST: usize = 8 << 10;
/// How long a client may take over its request, and over reading the answer: the broker does nothing else for
/// this exec meanwhile.
const PATIENCE: Duration = Duration::from_secs(2);

/// What is answered, and to whom.
pub struct Endpoint {
    token: Secret,
    /// The JSON object. Nothing, once its lease is over.
    body: Option<Secret>,
}

impl Endpoint {
    pub fn new(token: Secret, body: Secret) -> Self {
        Self { token, body: Some(body) }
    }

    /// Its lease is over: nothing more is given.
    pub fn close(&mut self) {
        self.body = None;
    }

    /// Answers one that has connected, if one has.
    ///
    /// # Errors
    /// Only of the listener. A client that leaves or says nonsense is answered or not, and that is all.
    pub fn serve(&self, listener: &TcpListener) -> io::Result<()> {
        use io::ErrorKind::{ConnectionAborted, WouldBlock};
        match listener.accept() {
            Ok((stream, _)) => {
                drop(self.answer(stream));
                Ok(())
            }
            Err(e) if matches!(e.kind(), WouldBlock | ConnectionAborted) => Ok(()),
            Err(e) => Err(e),
        }
    }

    fn answer(&self, mut stream: TcpStream) -> io::Result<()> {
        stream.set_nonblocking(false)?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let request = read_within(&mut stream)?;
        let (status, body) = match (self.judge(&request), &self.body) {
            (Ok(()), Some(body)) => ("200 OK", Some(body)),
            (Ok(()), None) => ("410 Gone", None),
            (Err(status), _) => (status, None),
        };
        let body = body.map_or(&b"{}"[..], Secret::expose);
        let head = format!(
            "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\
             Cache-Control: no-store\r\nConnection: close\r\n\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes())?;
        stream.write_all(body)
    }

    fn judge(&self, request: &[u8]) -> Result<(), &'static str> {
        let mut headers = [httparse::EMPTY_HEADER; 32];
        let mut parsed = httparse::Request::new(&mut headers);
        if !parsed.parse(request).is_ok_and(|status| status.is_complete()) {
            return Err("400 Bad Request");
        }
        let mut given =
            parsed.headers.iter().filter(|h| h.name.eq_ignore_ascii_case("authorization"));
        let (Some(given), None) = (given.next(), given.next()) else {
            return Err("401 Unauthorized");
        };
        if !bool::from(given.value.ct_eq(self.token.expose())) {
            return Err("401 Unauthorized");
        }
        match (parsed.method, parsed.path) {
            (Some("GET"), Some(PATH)) => Ok(()),
            _ => Err("404 Not Found"),
        }
    }
}

/// Up to the empty line, in bounded time and size: there is no body.
fn read_within(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let until = Instant::now() + PATIENCE;
    let mut request = Vec::new();
    let mut chunk = [0; 1024];
    while !request.windows(4).any(|end| end == b"\r\n\r\n") {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() || request.len() > MAX_REQUEST {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut chunk)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            n => request.extend_from_slice(&chunk[..n]),
        }
    }
    Ok(request)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_who_has_the_token_is_given_it_and_only_while_it_lasts() {
        let secret = |text: &str| Secret::copy_of(text.as_bytes()).unwrap();
        let mut endpoint = Endpoint::new(secret("right"), secret("{\"Token\":\"x\"}"));
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let ask = |endpoint: &Endpoint, request: &str| {
            let mut stream = TcpStream::connect(address).unwrap();
            stream.write_all(request.as_bytes()).unwrap();
            endpoint.serve(&listener).unwrap();
            let mut answer = String::new();
            drop(stream.read_to_string(&mut answer));
            answer
        };
        let get = |path: &str, with: &str| format!("GET {path} HTTP/1.1\r\nHost: x\r\n{with}\r\n");
        let right = get(PATH, "Authorization: right\r\n");
        let answer = ask(&endpoint, &right);
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        assert!(answer.ends_with("{\"Token\":\"x\"}"), "{answer}");
        for (request, status) in [
            (get(PATH, ""), "401"),
            (get(PATH, "Authorization: wrong\r\n"), "401"),
            (get(PATH, "Authorization: right\r\nAuthorization: right\r\n"), "401"),
            (get("/", "Authorization: right\r\n"), "404"),
            (right.replace("GET", "PUT"), "404"),
            ("nonsense\r\n\r\n".to_owned(), "400"),
        ] {
            let answer = ask(&endpoint, &request);
            assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{request}: {answer}");
            assert!(!answer.contains("Token"), "{answer}");
        }
        endpoint.close();
        assert!(ask(&endpoint, &right).starts_with("HTTP/1.1 410"));
    }
}
