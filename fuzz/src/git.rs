//! What a command writes to git's socket: the whole input is one connection's bytes.
//!
//! An answer goes out only for a destination that the bytes name, in lines of their own.
#![forbid(unsafe_code)]

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::atomic::{AtomicU64, Ordering};

use sublet::delivery::git::{self, Answer, Asked, Destination, Malformed, Operation, Request};

pub fn run(input: &[u8]) {
    let parsed = git::parse(input);
    if let Ok(request) = &parsed {
        check(request, input);
    } else if let Err(e) = &parsed {
        assert!(!e.to_string().is_empty());
    }
    // What is longer would not fit the socket before it is read.
    if input.len() <= 64 << 10 {
        asked(input, &parsed);
    }
}

fn destinations() -> [Destination; 3] {
    let destination = |host: &str, path: Option<&str>| Destination {
        protocol: "https".to_owned(),
        host: host.to_owned(),
        path: path.map(str::to_owned),
        username: "x-access-token".to_owned(),
    };
    [
        destination("github.com", Some("acme/insights.git")),
        destination("github.com", None),
        destination("git.internal:8443", None),
    ]
}

/// A request is what the bytes say, once each; nothing in it can end a line.
fn check(request: &Request, bytes: &[u8]) {
    assert!(bytes.ends_with(b"\n\n") && !bytes.contains(&0) && !bytes.contains(&b'\r'));
    let lines: Vec<&[u8]> = bytes.split(|b| *b == b'\n').collect();
    let operation = match request.operation {
        Operation::Get => &b"get"[..],
        Operation::Store => b"store",
        Operation::Erase => b"erase",
    };
    assert_eq!(lines[0], operation);
    let said = |key: &str, value: &str| {
        let whole = format!("{key}={value}");
        let prefix = format!("{key}=");
        let of_key = lines.iter().filter(|line| line.starts_with(prefix.as_bytes()));
        assert_eq!(of_key.count(), 1, "{key} is said once");
        assert!(lines.contains(&whole.as_bytes()), "{whole:?} was not said");
        assert!(!value.contains(['\n', '\r', '\0']));
    };
    said("protocol", &request.protocol);
    said("host", &request.host);
    assert!(!request.protocol.is_empty() && !request.host.is_empty());
    for (key, value) in [("path", &request.path), ("username", &request.username)] {
        if let Some(value) = value {
            said(key, value);
        }
    }
    for destination in destinations() {
        if destination.matches(request) {
            said("protocol", &destination.protocol);
            said("host", &destination.host);
            if let Some(path) = &destination.path {
                let asked = request.path.as_deref().unwrap_or_default();
                assert_eq!(asked.trim_matches('/'), path);
            }
            let name = request.username.as_deref().unwrap_or(&destination.username);
            assert_eq!(name, destination.username);
        }
    }
}

/// The same through the socket, as the broker answers.
fn asked(input: &[u8], parsed: &Result<Request, Malformed>) {
    let (mut client, asked) = connect(input);
    let asked = asked.expect("a client of our own uid is heard");
    match &asked.request {
        // A request whose end falls on the end of a read is taken; what follows it is not read.
        Ok(request) => {
            let whole = parsed.as_ref().is_ok_and(|whole| whole == request);
            let ends = (0..=input.len()).filter(|end| input[..*end].ends_with(b"\n\n"));
            let prefix = || {
                ends.into_iter()
                    .any(|end| git::parse(&input[..end]).is_ok_and(|part| part == *request))
            };
            assert!(whole || prefix(), "{request:?} was not asked");
            let destination = destinations().into_iter().find(|d| d.matches(request));
            let why = format!(
                "no lease of this exec is for {}://{}/{}",
                request.protocol,
                request.host,
                request.path.as_deref().unwrap_or_default()
            );
            match (request.operation, destination) {
                (Operation::Get, Some(destination)) => {
                    let answer = Answer::new(&destination.username, b"the-value", None);
                    let lines = "username=x-access-token\npassword=the-value\n";
                    let lent = asked.lend(&answer).expect("there is memory");
                    assert_eq!(lent.is_some(), request.takes_memfd);
                    let in_memfd = lent.is_some();
                    if let Some((held, _)) = &lent {
                        assert_eq!(held.expose().bytes(), lines.as_bytes());
                    }
                    asked.answer(&answer, lent.map(|(_, memfd)| memfd)).expect("it is written");
                    drop(asked);
                    assert_eq!(heard(&mut client), if in_memfd { "sublet-memfd\n" } else { lines });
                }
                (Operation::Get, None) => {
                    asked.refuse(&why).expect("it is written");
                    refused(&heard(&mut client));
                }
                (Operation::Store | Operation::Erase, _) => {
                    asked.swallow();
                    assert_eq!(heard(&mut client), "");
                }
            }
        }
        Err(malformed) => {
            let why = malformed.to_string();
            asked.refuse(&why).expect("it is written");
            refused(&heard(&mut client));
        }
    }
}

/// One line, which git's helper does not pass on.
fn refused(answer: &str) {
    assert!(answer.starts_with("sublet-refused=") && answer.ends_with('\n'), "{answer:?}");
    assert_eq!(answer.matches('\n').count(), 1, "{answer:?}");
    assert!(!answer.trim_end_matches('\n').contains(char::is_control), "{answer:?}");
}

fn heard(client: &mut UnixStream) -> String {
    let mut answer = Vec::new();
    // Closed before it had read all, the other side resets: what it wrote is there all the same. unix(7).
    match client.read_to_end(&mut answer) {
        Ok(_) => {}
        Err(e) if e.kind() == ErrorKind::ConnectionReset => {}
        Err(e) => panic!("{e}"),
    }
    String::from_utf8(answer).expect("the answer is UTF-8")
}

fn connect(input: &[u8]) -> (UnixStream, Option<Asked>) {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let nth = NEXT.fetch_add(1, Ordering::Relaxed);
    let name = format!("sublet-fuzz-git-{}-{nth}", std::process::id());
    let address = SocketAddr::from_abstract_name(name).expect("a short name");
    let listener = UnixListener::bind_addr(&address).expect("a name of our own");
    let mut client = UnixStream::connect_addr(&address).expect("we listen");
    client.write_all(input).expect("it fits the socket");
    client.shutdown(Shutdown::Write).expect("it is connected");
    let uid = rustix::process::geteuid().as_raw();
    let peer = rustix::net::sockopt::socket_peercred(client.as_fd()).expect("it is a Unix socket");
    assert_eq!(peer.uid.as_raw(), uid);
    (client, git::accept(&listener, uid).expect("the listener works"))
}
