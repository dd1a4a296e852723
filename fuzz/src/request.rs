//! Connections of strangers to the broker's sockets: the first byte says which socket, the second how large
//! the pieces are in which the rest is sent.
//!
//! It forks, so it must be the only thread of its process when it is called first.
//!
//! The broker is the real one: in this process, with its store, and with a launcher that it forked. Nothing
//! that is sent ends it or makes it fail (500), and what it answers has the documented form. The run's
//! profile shows no file of the host, so that no command can be executed.
#![forbid(unsafe_code)]

use std::cell::OnceCell;
use std::fs::{self, DirBuilder};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;
use sublet::api::server::bounds::Bounds;
use sublet::api::server::{Server, serve};
use sublet::broker::metrics::Metrics;
use sublet::broker::{Beginning, Broker, RunAsk, listeners};
use sublet::host::{Host, Places, Trust};
use sublet::identity::IssuerKeys;
use sublet::launcher::client::Launcher;
use sublet::run::ledger::Keys;
use sublet::source::vault::KeySource;

/// What is still open then has nothing more to say: a followed event stream.
const PATIENCE: Duration = Duration::from_secs(8);
const HEALTH: &[u8] = b"GET /v1/health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";

const CONFIG: &str = r#"
[ceilings]
requests_per_minute = 1000000
requests_per_run = 1000
[secrets.s]
source = "vault"
allow = ["test.use@svc.test"]
"#;
const PROFILE: &str = r#"
[[capability]]
name = "test.use"
channels = ["memfd", "env", "file"]
uses = 5
renewable = true
command = [["**"]]
[[capability.audience]]
host = "svc.test"
secret = "s"
variable = "TOKEN"
"#;

thread_local! {
    static SERVICE: OnceCell<Service> = const { OnceCell::new() };
}

struct Service {
    control: PathBuf,
    agent: PathBuf,
    _directory: tempfile::TempDir,
}

impl Service {
    fn start() -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let at = |name: &str| directory.path().join(name);
        for name in ["state", "run", "work", "profiles"] {
            DirBuilder::new().mode(0o700).create(at(name)).expect("a new directory");
        }
        let host = format!("[host]\nworkspaces = [{:?}]\n", at("work"));
        fs::write(at("sublet.toml"), host + CONFIG).expect("a new file");
        fs::write(at("profiles/bare.toml"), PROFILE).expect("a new file");
        let places = Places {
            config: Some(at("sublet.toml")),
            state_dir: Some(at("state")),
            runtime_dir: Some(at("run")),
        };
        let mut host = Host::load(&places).expect("the configuration at hand is good");
        host.trust(Trust::Host);
        let launcher = Launcher::fork(&places, Trust::Host).expect("a launcher");
        let (added, changes) = listeners::listeners();
        let metrics = Arc::new(Metrics::new());
        let beginning = Beginning {
            keys: Keys {
                vault: KeySource::open(&host.state_dir, None).expect("no credential"),
                issuer: IssuerKeys::open(&host.state_dir, None).expect("no credential"),
            },
            signing: sublet::audit::key::open(&host.state_dir, None).expect("no credential"),
            host,
            listeners: added,
            metrics: Arc::clone(&metrics),
            posture: Value::Null,
        };
        let broker = Broker::begin(beginning, &launcher).unwrap_or_else(|e| panic!("{e}"));
        let broker = Arc::new(broker);
        let control = at("run/control.sock");
        let listener = UnixListener::bind(&control).expect("a new path");
        let mut server = Server::new(Arc::clone(&broker), listener, changes, metrics);
        server.agent_bounds = hasty(server.agent_bounds);
        server.control_bounds = hasty(server.control_bounds);
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.expect("a runtime").block_on(serve(server, std::future::pending()))
        });
        let keeper = Arc::clone(&broker);
        std::thread::spawn(move || keeper.hold(&launcher));
        let run = broker.start_run(RunAsk {
            agent: "agent".parse().expect("a name"),
            principal: "alice".parse().expect("a name"),
            profile: "bare".to_owned(),
            workspace: at("work"),
            run_id: None,
            uid: rustix::process::geteuid().as_raw(),
        });
        let agent = run.unwrap_or_else(|e| panic!("{e}")).socket;
        Self { control, agent, _directory: directory }
    }
}

/// Who sends half a request is soon given up.
fn hasty(bounds: Bounds) -> Bounds {
    let soon = Duration::from_millis(40);
    Bounds { head_time: soon, body_time: soon, idle_time: soon, ..bounds }
}

pub fn run(input: &[u8]) {
    let [socket, piece, bytes @ ..] = input else { return };
    SERVICE.with(|cell| {
        let service = cell.get_or_init(Service::start);
        let path = if socket % 2 == 0 { &service.agent } else { &service.control };
        let follows = bytes.windows(6).any(|part| part.eq_ignore_ascii_case(b"follow"));
        let (answer, is_closed) = say(path, bytes, usize::from(*piece) + 1, follows);
        assert!(is_closed || follows, "it neither answers nor closes");
        check(&answer, bytes.trim_ascii_start().starts_with(b"HEAD"));
        // It lives, and speaks with the next one. On a busy machine we may be too slow for it ourselves.
        let end = Instant::now() + PATIENCE;
        loop {
            let (answer, _) = say(path, HEALTH, HEALTH.len(), false);
            if answer.starts_with(b"HTTP/1.1 200 OK\r\n") {
                break;
            }
            let late = answer.starts_with(b"HTTP/1.1 408 ") && Instant::now() < end;
            assert!(late, "{}", answer.escape_ascii());
        }
    });
}

/// All that is answered, and whether the other side closed.
fn say(path: &Path, bytes: &[u8], piece: usize, follows: bool) -> (Vec<u8>, bool) {
    let mut stream = UnixStream::connect(path).unwrap_or_else(|e| panic!("nobody listens: {e}"));
    stream.set_write_timeout(Some(PATIENCE)).expect("not zero");
    for piece in bytes.chunks(piece.max(bytes.len() / 64 + 1)) {
        // It may have heard enough.
        if stream.write_all(piece).is_err() {
            break;
        }
    }
    let patience = if follows { Duration::from_millis(50) } else { PATIENCE };
    let (mut answer, mut chunk) = (Vec::new(), vec![0; 64 << 10]);
    let end = Instant::now() + patience;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return (answer, false);
        }
        stream.set_read_timeout(Some(left)).expect("not zero");
        match stream.read(&mut chunk) {
            Ok(0) => return (answer, true),
            Ok(n) => answer.extend_from_slice(&chunk[..n]),
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) if e.kind() == ErrorKind::WouldBlock => return (answer, false),
            Err(e) if e.kind() == ErrorKind::ConnectionReset => return (answer, true),
            Err(e) => panic!("{e}"),
        }
    }
}

/// The first answer. What is no success says why, as JSON.
fn check(answer: &[u8], has_no_body: bool) {
    if answer.is_empty() {
        return;
    }
    let shown = || answer[..answer.len().min(2000)].escape_ascii().to_string();
    let end = answer.windows(4).position(|part| part == b"\r\n\r\n");
    let Some(end) = end else { panic!("no head: {}", shown()) };
    let head = std::str::from_utf8(&answer[..end]).unwrap_or_else(|_| panic!("{}", shown()));
    let status: u16 = head
        .strip_prefix("HTTP/1.1 ")
        .or(head.strip_prefix("HTTP/1.0 "))
        .and_then(|rest| rest.get(..3)?.parse().ok())
        .unwrap_or_else(|| panic!("{}", shown()));
    assert!(status != 500, "it failed: {}", shown());
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
    let length: Option<usize> = length.and_then(|length| length.parse().ok());
    let body = length.and_then(|length| answer.get(end + 4..end + 4 + length));
    if status >= 400 && !has_no_body {
        let object: Value = serde_json::from_slice(body.unwrap_or_default())
            .unwrap_or_else(|e| panic!("{e}: {}", shown()));
        for key in ["stage", "reason", "message", "hint"] {
            assert!(object["error"][key].is_string(), "{}", shown());
        }
    }
}
