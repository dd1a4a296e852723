//! A Git server that demands a token: `git http-backend` (a CGI program, RFC 3875) behind a small HTTP
//! server. It answers 401 without the right credential, and remembers what it was asked.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};

use base64::Engine;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};

/// One request, as the server saw it.
#[derive(Debug, Clone)]
pub struct Seen {
    pub line: String,
    /// The decoded `user:password`, if the client sent one.
    pub credential: Option<String>,
    pub status: u16,
}

pub struct GitServer {
    pub port: u16,
    seen: Arc<Mutex<Vec<Seen>>>,
}

impl GitServer {
    /// Serves the bare repositories below `root`, as the user who runs the test.
    pub fn start(root: &Path, username: &str, token: &str) -> Self {
        super::needs("git", "git");
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let port = listener.local_addr().unwrap().port();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let expected = format!("{username}:{token}");
        let (root, log) = (root.to_owned(), Arc::clone(&seen));
        std::thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let listener = TcpListener::from_std(listener).unwrap();
                while let Ok((stream, _)) = listener.accept().await {
                    let (root, expected, log) = (root.clone(), expected.clone(), Arc::clone(&log));
                    tokio::spawn(async move {
                        // A client that hangs up is no failure of the server.
                        let _ = answer(stream, &root, &expected, &log).await;
                    });
                }
            });
        });
        Self { port, seen }
    }

    pub fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}/{path}", self.host())
    }

    pub fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }

    /// Every credential that any client showed, good or bad.
    pub fn credentials(&self) -> Vec<String> {
        self.seen().into_iter().filter_map(|s| s.credential).collect()
    }
}

/// A bare repository that takes pushes over HTTP.
pub fn bare_repository(path: &Path) -> PathBuf {
    let git = |args: &[&str]| {
        let done = Command::new("git").args(args).output().unwrap();
        assert!(done.status.success(), "git {args:?}: {}", String::from_utf8_lossy(&done.stderr));
    };
    let place = path.to_str().unwrap();
    git(&["init", "--quiet", "--bare", "--initial-branch=main", place]);
    git(&["-C", place, "config", "http.receivepack", "true"]);
    path.to_owned()
}

struct Request {
    line: String,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
}

impl Request {
    fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, v)| v.as_str())
    }
}

async fn answer(
    mut stream: TcpStream,
    root: &Path,
    expected: &str,
    log: &Mutex<Vec<Seen>>,
) -> std::io::Result<()> {
    let request = read_request(&mut stream).await?;
    let credential = request
        .header("authorization")
        .and_then(|v| v.strip_prefix("Basic "))
        .and_then(|b| base64::engine::general_purpose::STANDARD.decode(b).ok())
        .map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    let admitted = credential.as_deref() == Some(expected);
    let reply = if admitted { run_backend(&request, root).await? } else { demand() };
    log.lock().unwrap().push(Seen {
        line: request.line,
        credential,
        status: if admitted { 200 } else { 401 },
    });
    stream.write_all(&reply).await
}

fn demand() -> Vec<u8> {
    b"HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: Basic realm=\"git\"\r\n\
      Content-Length: 0\r\nConnection: close\r\n\r\n"
        .to_vec()
}

async fn read_request(stream: &mut TcpStream) -> std::io::Result<Request> {
    let (reader, mut writer) = stream.split();
    let mut reader = BufReader::new(reader);
    let mut line = String::new();
    reader.read_line(&mut line).await?;
    let mut headers = Vec::new();
    loop {
        let mut header = String::new();
        reader.read_line(&mut header).await?;
        let Some((name, value)) = header.trim_end().split_once(':') else { break };
        headers.push((name.to_owned(), value.trim().to_owned()));
    }
    let mut request = Request { line: line.trim_end().to_owned(), headers, body: Vec::new() };
    if request.header("expect").is_some_and(|v| v.eq_ignore_ascii_case("100-continue")) {
        writer.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").await?;
    }
    if request.header("transfer-encoding").is_some_and(|v| v.eq_ignore_ascii_case("chunked")) {
        loop {
            let mut size = String::new();
            reader.read_line(&mut size).await?;
            let size = usize::from_str_radix(size.trim(), 16).unwrap_or(0);
            let mut chunk = vec![0; size + 2];
            reader.read_exact(&mut chunk).await?;
            if size == 0 {
                break;
            }
            request.body.extend_from_slice(&chunk[..size]);
        }
    } else if let Some(length) = request.header("content-length").and_then(|v| v.parse().ok()) {
        request.body = vec![0; length];
        reader.read_exact(&mut request.body).await?;
    }
    Ok(request)
}

async fn run_backend(request: &Request, root: &Path) -> std::io::Result<Vec<u8>> {
    let mut words = request.line.split(' ');
    let method = words.next().unwrap_or_default();
    let target = words.next().unwrap_or_default();
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let mut backend = tokio::process::Command::new("git");
    backend
        .arg("http-backend")
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .env("GIT_PROJECT_ROOT", root)
        .env("GIT_HTTP_EXPORT_ALL", "1")
        .env("GIT_CONFIG_COUNT", "1")
        .env("GIT_CONFIG_KEY_0", "safe.directory")
        .env("GIT_CONFIG_VALUE_0", "*")
        .env("REQUEST_METHOD", method)
        .env("PATH_INFO", path)
        .env("QUERY_STRING", query)
        .env("CONTENT_TYPE", request.header("content-type").unwrap_or(""))
        .env("CONTENT_LENGTH", request.body.len().to_string())
        .env("REMOTE_USER", "test")
        .env("REMOTE_ADDR", "127.0.0.1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    if let Some(encoding) = request.header("content-encoding") {
        backend.env("HTTP_CONTENT_ENCODING", encoding);
    }
    if let Some(protocol) = request.header("git-protocol") {
        backend.env("GIT_PROTOCOL", protocol);
    }
    let mut backend = backend.spawn()?;
    let mut stdin = backend.stdin.take().expect("piped");
    let body = request.body.clone();
    // The backend may answer without having read everything: what is left over is dropped with it.
    let feeder = tokio::spawn(async move { stdin.write_all(&body).await });
    let output = backend.wait_with_output().await?.stdout;
    feeder.abort();
    let split = output.windows(4).position(|w| w == b"\r\n\r\n").unwrap_or(output.len());
    let (head, body) = output.split_at(split);
    let head = String::from_utf8_lossy(head);
    let status =
        head.lines().find_map(|l| l.strip_prefix("Status: ")).unwrap_or("200 OK").to_owned();
    let body = body.get(4..).unwrap_or_default();
    let mut reply = format!("HTTP/1.1 {status}\r\n");
    for line in head.lines().filter(|l| !l.is_empty() && !l.starts_with("Status: ")) {
        reply.push_str(line);
        reply.push_str("\r\n");
    }
    reply.push_str(&format!("Content-Length: {}\r\nConnection: close\r\n\r\n", body.len()));
    let mut reply = reply.into_bytes();
    reply.extend_from_slice(body);
    Ok(reply)
}
