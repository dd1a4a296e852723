//! The `git` channel: git asks a helper, the helper asks the socket of this exec, and the broker
//! answers one `get` a use, for one protocol, host and path. gitcredentials(7), git-credential(1).
//!
//! Parses hostile input: the command may write anything to the socket. A value is written to nothing
//! but the answer of a permitted `get`: for our helper a memfd, which is wiped under whoever kept it and
//! leaves nothing in the socket's buffers.
#![forbid(unsafe_code)]

use std::fs::Permissions;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::container::{self, ContainerError};
use super::fill::Held;
use crate::sys::socket;

/// Where the socket and the helper are inside.
pub const SOCKET: &str = "/run/sublet/git.sock";
const HELPER: &str = "/run/sublet/bin/sublet git-credential";

/// What our helper adds to a request, as one of git's own `capability[]` lines.
pub(super) const TAKES_MEMFD: &str = "capability[]=sublet-memfd";
/// The answer's own bytes, where the memfd beside them is the answer.
pub(super) const MEMFD: &[u8] = b"sublet-memfd\n";

/// A request is small; what is longer is no request.
const MAX_REQUEST: usize = 16 << 10;
/// How long a client may take over its whole request, and over reading the whole answer: the broker does
/// nothing else meanwhile.
const PATIENCE: Duration = Duration::from_secs(2);

/// The environment of a git-leased exec: every other helper is reset, ours is named for the audiences
/// alone, hooks are off, and git never prompts.
pub fn environment(urls: impl IntoIterator<Item = String>) -> Vec<(String, String)> {
    let mut entries: Vec<(String, String)> = vec![
        // An empty value empties the list that other configuration made.
        ("credential.helper".into(), String::new()),
        ("credential.useHttpPath".into(), "true".into()),
        ("core.hooksPath".into(), "/dev/null".into()),
        ("core.askPass".into(), String::new()),
    ];
    for url in urls {
        entries.push((format!("credential.{url}.helper"), String::new()));
        entries.push((format!("credential.{url}.helper"), HELPER.into()));
    }
    let mut variables = vec![
        ("GIT_CONFIG_COUNT".to_owned(), entries.len().to_string()),
        ("GIT_TERMINAL_PROMPT".to_owned(), "0".to_owned()),
    ];
    for (index, (key, value)) in entries.into_iter().enumerate() {
        variables.push((format!("GIT_CONFIG_KEY_{index}"), key));
        variables.push((format!("GIT_CONFIG_VALUE_{index}"), value));
    }
    variables
}

/// Launcher's side: binds the socket in the exec's detached root, for the exec's user alone.
pub fn listen(root: BorrowedFd<'_>, owner: (u32, u32)) -> io::Result<OwnedFd> {
    listen_at(root, SOCKET, owner)
}

/// The same for a socket at another place of the root.
pub(super) fn listen_at(
    root: BorrowedFd<'_>,
    socket: &str,
    owner: (u32, u32),
) -> io::Result<OwnedFd> {
    // Through the descriptor: the root is not attached anywhere.
    let inside = socket.trim_start_matches('/');
    let path = PathBuf::from(format!("/proc/self/fd/{}/{inside}", root.as_raw_fd()));
    let listener = UnixListener::bind(&path)?;
    std::fs::set_permissions(&path, Permissions::from_mode(0o600))?;
    if owner.0 != rustix::process::geteuid().as_raw() {
        std::os::unix::fs::chown(&path, Some(owner.0), Some(owner.1))?;
    }
    listener.set_nonblocking(true)?;
    Ok(listener.into())
}

/// What git asks. Attributes that it sent and we do not know are skipped, as the protocol says.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Request {
    pub operation: Operation,
    pub protocol: String,
    pub host: String,
    pub path: Option<String>,
    pub username: Option<String>,
    /// Whether the answer may come as a descriptor.
    pub takes_memfd: bool,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    #[default]
    Get,
    Store,
    Erase,
}

/// The request is not of the protocol.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    #[error("the operation is none of get, store, erase")]
    Operation,
    #[error("a line has a NUL or carriage return in it")]
    ControlByte,
    #[error("a line is not `key=value`, or not UTF-8")]
    Line,
    #[error("the request does not end in an empty line")]
    Unfinished,
    #[error("`{0}` is given twice")]
    Twice(&'static str),
    #[error("protocol or host is missing or empty")]
    NoDestination,
}

/// Parses the operation's line and the attributes, up to the empty line. LF ends a line; NUL and CR
/// are refused wherever they stand (CVE-2020-5260, CVE-2024-52006 smuggled newlines and returns).
pub fn parse(bytes: &[u8]) -> Result<Request, Malformed> {
    if bytes.iter().any(|b| matches!(b, 0 | b'\r')) {
        return Err(Malformed::ControlByte);
    }
    let text = std::str::from_utf8(bytes).map_err(|_| Malformed::Line)?;
    let text = text.strip_suffix("\n\n").ok_or(Malformed::Unfinished)?;
    let mut lines = text.split('\n');
    let operation = match lines.next() {
        Some("get") => Operation::Get,
        Some("store") => Operation::Store,
        Some("erase") => Operation::Erase,
        _ => return Err(Malformed::Operation),
    };
    let (mut protocol, mut host, mut path, mut username) = (None, None, None, None);
    let mut takes_memfd = false;
    for line in lines {
        takes_memfd |= line == TAKES_MEMFD;
        let (key, value) = line.split_once('=').ok_or(Malformed::Line)?;
        let (slot, name) = match key {
            "protocol" => (&mut protocol, "protocol"),
            "host" => (&mut host, "host"),
            "path" => (&mut path, "path"),
            "username" => (&mut username, "username"),
            _ => continue,
        };
        if slot.replace(value.to_owned()).is_some() {
            return Err(Malformed::Twice(name));
        }
    }
    let present = |text: Option<String>| text.filter(|t| !t.is_empty());
    match (present(protocol), present(host)) {
        (Some(protocol), Some(host)) => {
            let path = present(path);
            Ok(Request { operation, protocol, host, path, username, takes_memfd })
        }
        _ => Err(Malformed::NoDestination),
    }
}

/// The one destination that an answer is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Destination {
    pub protocol: String,
    pub host: String,
    /// Without one, any repository of the host.
    pub path: Option<String>,
    pub username: String,
}

impl Destination {
    pub fn matches(&self, request: &Request) -> bool {
        let same_path =
            |own: &str| request.path.as_deref().is_some_and(|asked| bare(asked) == bare(own));
        request.protocol == self.protocol
            && request.host == self.host
            && self.path.as_deref().is_none_or(same_path)
            && request.username.as_ref().is_none_or(|name| *name == self.username)
    }
}

/// `acme/insights.git`, `/acme/insights.git/` and what git appends to it on the wire are one repository.
fn bare(path: &str) -> &str {
    path.trim_matches('/')
}

/// One connection of a helper, its request read. Dropping it answers nothing, which git takes as "this
/// helper does not know".
pub struct Asked {
    stream: UnixStream,
    pub request: Result<Request, Malformed>,
}

/// Accepts one connection, if one waits, and reads its request.
///
/// # Errors
/// Of the listener. A client that is slow, gone or of another user is dropped and is `Ok(None)`.
pub fn accept(listener: &UnixListener, expected_uid: u32) -> io::Result<Option<Asked>> {
    let stream = match listener.accept() {
        Ok((stream, _)) => stream,
        Err(e)
            if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionAborted) =>
        {
            return Ok(None);
        }
        Err(e) => return Err(e),
    };
    // Only the exec's own user, whoever else the socket was passed to.
    let peer = rustix::net::sockopt::socket_peercred(stream.as_fd())?;
    if peer.uid.as_raw() != expected_uid {
        return Ok(None);
    }
    stream.set_nonblocking(false)?;
    let until = Instant::now() + PATIENCE;
    let mut bytes = Vec::with_capacity(512);
    let mut chunk = [0; 1024];
    let mut reader = &stream;
    while !bytes.ends_with(b"\n\n") && bytes.len() <= MAX_REQUEST {
        // A timeout of the socket's begins anew with every byte.
        let Some(left) = left(until) else { break };
        stream.set_read_timeout(Some(left))?;
        match reader.read(&mut chunk) {
            Ok(0) | Err(_) => break,
            Ok(n) => bytes.extend_from_slice(&chunk[..n]),
        }
    }
    let request = parse(&bytes);
    Ok(Some(Asked { stream, request }))
}

/// The time until then; none is left where it is over.
fn left(until: Instant) -> Option<Duration> {
    Some(until.saturating_duration_since(Instant::now())).filter(|left| !left.is_zero())
}

fn write_within(mut stream: &UnixStream, parts: &[&[u8]]) -> io::Result<()> {
    let until = Instant::now() + PATIENCE;
    for part in parts {
        let mut rest = *part;
        while !rest.is_empty() {
            stream.set_write_timeout(Some(left(until).ok_or(io::ErrorKind::TimedOut)?))?;
            match stream.write(rest) {
                Ok(n) => rest = &rest[n..],
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }
    Ok(())
}

/// The answer of a permitted `get`, in parts: with the time at which the value ends, where that is known, in
/// seconds since 1970. gitcredentials(7).
pub struct Answer<'a> {
    username: &'a str,
    password: &'a [u8],
    expires: String,
}

impl<'a> Answer<'a> {
    pub fn new(username: &'a str, password: &'a [u8], expires: Option<i64>) -> Self {
        let expires = expires.map(|at| format!("password_expiry_utc={at}\n")).unwrap_or_default();
        Self { username, password, expires }
    }

    fn parts(&self) -> [&[u8]; 6] {
        let (username, expires) = (self.username.as_bytes(), self.expires.as_bytes());
        [b"username=", username, b"\npassword=", self.password, b"\n", expires]
    }
}

impl Asked {
    /// The answer in a memfd, where the helper takes one: what holds it, and what it is read by.
    pub fn lend(&self, answer: &Answer<'_>) -> Result<Option<(Held, OwnedFd)>, ContainerError> {
        match &self.request {
            Ok(request) if request.takes_memfd => container::lend(&answer.parts()).map(Some),
            Ok(_) | Err(_) => Ok(None),
        }
    }

    /// Hands the value over.
    pub fn answer(&self, answer: &Answer<'_>, lent: Option<OwnedFd>) -> io::Result<()> {
        match lent {
            None => write_within(&self.stream, &answer.parts()),
            Some(memfd) => {
                self.stream.set_write_timeout(Some(PATIENCE))?;
                Ok(socket::send(&self.stream, MEMFD, &[memfd.as_fd()])?)
            }
        }
    }

    /// Says why not; the helper shows it on standard error.
    pub fn refuse(self, why: &str) -> io::Result<()> {
        let line: String = why.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        write_within(&self.stream, &[b"sublet-refused=", line.as_bytes(), b"\n"])
    }

    /// `store` and `erase`: nothing to do.
    pub fn swallow(self) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(text: &str) -> Result<Request, Malformed> {
        parse(text.as_bytes())
    }

    #[test]
    fn a_get_is_parsed_and_unknown_attributes_are_skipped() {
        let text =
            "get\ncapability[]=authtype\nprotocol=https\nhost=github.com\npath=acme/x.git\n\n";
        let parsed = request(text).unwrap();
        assert_eq!(parsed.operation, Operation::Get);
        assert_eq!(
            (parsed.host.as_str(), parsed.path.as_deref()),
            ("github.com", Some("acme/x.git"))
        );
        assert!(!parsed.takes_memfd);
        let text = format!("get\nprotocol=https\nhost=github.com\n{TAKES_MEMFD}\n\n");
        assert!(request(&text).unwrap().takes_memfd);
    }

    #[test]
    fn smuggled_lines_are_refused() {
        #[track_caller]
        fn check(text: &str, expected: Malformed) {
            assert_eq!(request(text), Err(expected), "{text:?}");
        }
        check("get\nprotocol=https\nhost=a\r\n\n", Malformed::ControlByte);
        check("get\nprotocol=https\nhost=a\0b\n\n", Malformed::ControlByte);
        check("get\nprotocol=https\nhost=evil\nhost=github.com\n\n", Malformed::Twice("host"));
        check("get\nprotocol=https\nhost=\n\n", Malformed::NoDestination);
        check("get\nprotocol=https\n\n", Malformed::NoDestination);
        check("get\nprotocol\n\n", Malformed::Line);
        check("steal\nprotocol=https\nhost=a\n\n", Malformed::Operation);
        check("get\nprotocol=https\nhost=a\n", Malformed::Unfinished);
    }

    #[test]
    fn only_the_one_destination_matches() {
        let destination = Destination {
            protocol: "https".into(),
            host: "github.com".into(),
            path: Some("acme/insights.git".into()),
            username: "x-access-token".into(),
        };
        #[track_caller]
        fn check(destination: &Destination, attributes: &str, expected: bool) {
            let asked = request(&format!("get\n{attributes}\n\n")).unwrap();
            assert_eq!(destination.matches(&asked), expected, "{attributes:?}");
        }
        let d = &destination;
        check(d, "protocol=https\nhost=github.com\npath=acme/insights.git", true);
        check(
            d,
            "protocol=https\nhost=github.com\npath=acme/insights.git\nusername=x-access-token",
            true,
        );
        check(d, "protocol=https\nhost=github.com\npath=acme/other.git", false);
        check(d, "protocol=https\nhost=github.com", false);
        check(d, "protocol=http\nhost=github.com\npath=acme/insights.git", false);
        check(d, "protocol=https\nhost=github.com:8443\npath=acme/insights.git", false);
        check(d, "protocol=https\nhost=github.com.evil.com\npath=acme/insights.git", false);
        check(d, "protocol=https\nhost=github.com\npath=acme/insights.git\nusername=me", false);
    }
}
