//! The far side of a source, as a test wants it to behave: answers each request by a function, keeps what it
//! was asked, and can misbehave in ways that no real server lends itself to.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// One request, as it came.
#[derive(Debug, Clone)]
pub struct Asked {
    pub method: String,
    pub path: String,
    pub headers: Vec<(String, String)>,
    pub body: String,
}

impl Asked {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, v)| v.as_str())
    }

    /// All values of a field of a form.
    pub fn fields(&self, name: &str) -> Vec<String> {
        let decoded = |text: &str| {
            let bytes = text.replace('+', " ").into_bytes();
            let mut out = Vec::new();
            let mut rest = &bytes[..];
            while let Some((&b, behind)) = rest.split_first() {
                rest = behind;
                if b == b'%' {
                    let hex = std::str::from_utf8(&rest[..2]).unwrap();
                    out.push(u8::from_str_radix(hex, 16).unwrap());
                    rest = &rest[2..];
                } else {
                    out.push(b);
                }
            }
            String::from_utf8(out).unwrap()
        };
        let pairs = self.body.split('&').filter_map(|pair| pair.split_once('='));
        pairs.filter(|(n, _)| decoded(n) == name).map(|(_, v)| decoded(v)).collect()
    }
}

/// What it does with a request.
pub enum Does {
    /// A status, a content type and a body.
    Answers(u16, &'static str, String),
    /// These bytes, and the end.
    Says(Vec<u8>),
    /// Nothing, for so long.
    Hangs(Duration),
}

pub fn json(status: u16, body: serde_json::Value) -> Does {
    Does::Answers(status, "application/json", body.to_string())
}

pub struct Far {
    pub port: u16,
    asked: Arc<Mutex<Vec<Asked>>>,
}

impl Far {
    /// Serves on a port of its own until the test's process ends.
    pub fn serve(does: impl Fn(&Asked) -> Does + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (log, does) = (Arc::clone(&asked), Arc::new(does));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (log, does) = (Arc::clone(&log), Arc::clone(&does));
                // A client that leaves is none of its business.
                std::thread::spawn(move || drop(answer(stream, &log, &*does)));
            }
        });
        Self { port, asked }
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.port)
    }

    /// What it was asked so far.
    pub fn asked(&self) -> Vec<Asked> {
        self.asked.lock().unwrap().clone()
    }

    /// The requests to one path.
    pub fn asked_at(&self, path: &str) -> Vec<Asked> {
        self.asked().into_iter().filter(|asked| asked.path == path).collect()
    }
}

fn answer(
    stream: TcpStream,
    log: &Mutex<Vec<Asked>>,
    does: &dyn Fn(&Asked) -> Does,
) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let mut words = line.split_ascii_whitespace().map(str::to_owned);
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let mut headers = Vec::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let Some((name, value)) = line.trim_end().split_once(':') else { break };
        headers.push((name.to_owned(), value.trim().to_owned()));
    }
    let mut asked = Asked { method, path, headers, body: String::new() };
    let length = asked.header("content-length").and_then(|l| l.parse().ok()).unwrap_or(0);
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    asked.body = String::from_utf8_lossy(&body).into_owned();
    log.lock().unwrap().push(asked.clone());
    let mut stream = stream;
    match does(&asked) {
        Does::Answers(status, kind, body) => write!(
            stream,
            "HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        ),
        Does::Says(bytes) => stream.write_all(&bytes),
        Does::Hangs(time) => {
            std::thread::sleep(time);
            Ok(())
        }
    }
}
