//! Execs over HTTP, as curl and as a client of the stream see them: what is read ahead is not lost, and
//! whoever leaves takes the exec along.
#![forbid(unsafe_code)]

mod support;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sublet::relay::frames::{self, Kind};
use support::World;
use support::broker::{leasing_host, serve};
use support::http::{self, ask};

const VALUE: &[u8] = b"never-shown-by-an-exec-1";
const PATIENCE: Duration = Duration::from_secs(30);

fn upgrade(body: &Value) -> String {
    let text = body.to_string();
    format!(
        "POST /v1/execs HTTP/1.1\r\nHost: sublet\r\nConnection: Upgrade\r\nUpgrade: sublet-exec\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{text}",
        text.len()
    )
}

/// A client of the stream, after its 101.
struct Stream {
    socket: UnixStream,
    head: String,
    unread: Vec<u8>,
    /// Read while waiting for another: output may overtake the word that the command was started.
    seen: Vec<(Kind, Vec<u8>)>,
}

impl Stream {
    /// `ahead` goes with the request, before anything is answered.
    #[track_caller]
    fn open(socket: &Path, body: &Value, ahead: &[u8]) -> Self {
        let mut socket = http::connect(socket);
        socket.write_all(&[upgrade(body).as_bytes(), ahead].concat()).unwrap();
        let head = http::head(&mut socket);
        assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
        Self { socket, head, unread: Vec::new(), seen: Vec::new() }
    }

    fn send(&mut self, kind: Kind, payload: &[u8]) {
        self.socket.write_all(&framed(kind, payload)).unwrap();
    }

    /// `None` at the end.
    fn next(&mut self) -> Option<(Kind, Vec<u8>)> {
        loop {
            if let Some((kind, payload, taken)) = frames::take(&self.unread).unwrap() {
                let frame = (kind, payload.to_vec());
                self.unread.drain(..taken);
                return Some(frame);
            }
            let mut bytes = [0; 4096];
            match self.socket.read(&mut bytes) {
                Ok(0) => return None,
                Ok(n) => self.unread.extend_from_slice(&bytes[..n]),
                Err(e) => panic!("{e}"),
            }
        }
    }

    #[track_caller]
    fn wait_for(&mut self, wanted: Kind) -> Vec<u8> {
        loop {
            if let Some(at) = self.seen.iter().position(|(kind, _)| *kind == wanted) {
                return self.seen.remove(at).1;
            }
            let Some(frame) = self.next() else { panic!("the stream ended before {wanted:?}") };
            self.seen.push(frame);
        }
    }

    /// All of stdout, and the report.
    fn finish(mut self) -> (String, Value) {
        let (mut out, mut exit) = (Vec::new(), Vec::new());
        while let Some((kind, payload)) = self.seen.pop().or_else(|| self.next()) {
            match kind {
                Kind::Stdout => out.extend(payload),
                Kind::Exit => exit.extend(payload),
                Kind::Error => panic!("{}", String::from_utf8_lossy(&payload)),
                _ => {}
            }
        }
        (String::from_utf8(out).unwrap(), serde_json::from_slice(&exit).unwrap())
    }
}

fn framed(kind: Kind, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    frames::push(kind, payload, &mut bytes);
    bytes
}

/// Waits until the exec has this state.
#[track_caller]
fn becomes(socket: &Path, exec: &str, state: &str) -> Value {
    let start = Instant::now();
    loop {
        let found = ask(socket, "GET", &format!("/v1/execs/{exec}"), None).ok(200);
        if found["state"] == state {
            return found;
        }
        assert!(start.elapsed() < PATIENCE, "not {state}: {found}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn what_is_sent_ahead_of_the_101_reaches_the_command() {
    let world = World::host();
    let profile = leasing_host(&world, VALUE, "");
    let broker = serve(&world);
    let run = broker.start_run(&profile);
    let body = json!({"command": ["cat"]});
    let ahead = [framed(Kind::Stdin, b"sent ahead, "), framed(Kind::Stdin, b"twice, ")].concat();
    let mut stream = Stream::open(&run.socket, &body, &ahead);
    let head = stream.head.clone();
    let started: Value = serde_json::from_slice(&stream.wait_for(Kind::Started)).unwrap();
    let exec = started["exec_id"].as_str().unwrap();
    assert!(head.contains(&format!("sublet-exec-id: {exec}\r\n")), "{head}");
    assert!(head.to_lowercase().contains("upgrade: sublet-exec"), "{head}");
    stream.send(Kind::Stdin, b"and later");
    stream.send(Kind::Stdin, b"");
    let (out, report) = stream.finish();
    assert_eq!(out, "sent ahead, twice, and later");
    assert_eq!((&report["exit_status"], &report["exec_id"]), (&json!(0), &json!(exec)));
    // All of it ahead, and nothing after.
    let ahead = [framed(Kind::Stdin, b"all of it"), framed(Kind::Stdin, b"")].concat();
    assert_eq!(Stream::open(&run.socket, &body, &ahead).finish().0, "all of it");
    let body = json!({"command": ["cat"], "terminal": {"rows": 5, "columns": 6}});
    let ahead = [framed(Kind::Stdin, b"typed ahead\n"), framed(Kind::Stdin, b"\x04")].concat();
    let (out, _) = Stream::open(&run.socket, &body, &ahead).finish();
    assert!(out.contains("typed ahead"), "{out:?}");
}

#[test]
fn a_stream_carries_signals_and_a_terminal() {
    let world = World::host();
    let profile = leasing_host(&world, VALUE, "");
    let broker = serve(&world);
    let run = broker.start_run(&profile);
    let script = "trap 'echo caught; exit 5' USR1; echo ready; while :; do sleep 0.05; done";
    let body = json!({"command": ["sh", "-c", script]});
    let mut stream = Stream::open(&run.socket, &body, b"");
    stream.wait_for(Kind::Stdout);
    stream.send(Kind::Signal, &[libc_usr1()]);
    let (out, report) = stream.finish();
    assert_eq!((&*out, &report["exit_status"]), ("caught\n", &json!(5)));
    let body = json!({
        "command": ["sh", "-c", "read x; stty size"], "terminal": {"rows": 11, "columns": 22}
    });
    let mut stream = Stream::open(&run.socket, &body, b"");
    stream.wait_for(Kind::Started);
    stream.send(Kind::Window, &[0, 33, 0, 44]);
    stream.send(Kind::Stdin, b"go\n");
    let (out, report) = stream.finish();
    assert!(out.contains("33 44"), "{out:?} {report}");
}

fn libc_usr1() -> u8 {
    rustix::process::Signal::USR1.as_raw().try_into().unwrap()
}

#[test]
fn a_denied_stream_is_an_answer_of_http() {
    let world = World::host();
    let profile = leasing_host(&world, VALUE, "");
    let broker = serve(&world);
    let run = broker.start_run(&profile);
    let denied = |body: Value| {
        let closing = upgrade(&body).replace("Connection: Upgrade", "Connection: Upgrade, close");
        http::raw(&run.socket, closing)
    };
    denied(json!({"command": []})).fails(400, "malformed");
    denied(json!({"command": ["true"], "lease_ids": ["nonsense"]})).fails(400, "malformed");
    let other = upgrade(&json!({"command": ["touch", "ran"]})).replace("sublet-exec", "websocket");
    let refused =
        http::raw(&run.socket, other.replace("Connection: Upgrade", "Connection: Upgrade, close"));
    refused.fails(400, "malformed");
    assert!(!world.workspace.join("ran").exists());
}

#[test]
fn whoever_leaves_takes_the_exec_along() {
    let world = World::host();
    let profile = leasing_host(&world, VALUE, "");
    let broker = serve(&world);
    let run = broker.start_run(&profile);
    let body = json!({"command": ["sh", "-c", "touch began; echo ready; sleep 1000"]});

    // The stream's client closes.
    let mut stream = Stream::open(&run.socket, &body, b"");
    let started: Value = serde_json::from_slice(&stream.wait_for(Kind::Started)).unwrap();
    stream.wait_for(Kind::Stdout);
    let exec = started["exec_id"].as_str().unwrap().to_owned();
    assert_eq!(
        ask(&run.socket, "GET", &format!("/v1/execs/{exec}"), None).ok(200)["state"],
        "running"
    );
    drop(stream);
    becomes(&run.socket, &exec, "exited");

    // The client of a plain answer closes.
    std::fs::remove_file(world.workspace.join("began")).unwrap();
    let mut plain = http::connect(&run.socket);
    plain.write_all(http::request("POST", "/v1/execs", Some(&body)).as_bytes()).unwrap();
    let exec = running(&run.socket);
    appears(&world.workspace.join("began"));
    drop(plain);
    becomes(&run.socket, &exec, "exited");

    // The process that asked dies, while another still holds its connection.
    support::needs("curl", "curl");
    std::fs::remove_file(world.workspace.join("began")).unwrap();
    let mut caller = Command::new("curl")
        .args(["-s", "--unix-socket"])
        .arg(&run.socket)
        .args(["-H", "content-type: application/json", "-d", &body.to_string()])
        .arg("http://sublet/v1/execs")
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let exec = running(&run.socket);
    appears(&world.workspace.join("began"));
    caller.kill().unwrap();
    caller.wait().unwrap();
    becomes(&run.socket, &exec, "exited");
}

/// What it had sent behind its request keeps the server from seeing it leave.
#[test]
fn nothing_begins_for_a_client_that_has_left() {
    let world = World::host();
    let profile = leasing_host(&world, VALUE, "");
    let broker = serve(&world);
    let run = broker.start_run(&profile);
    let body = |name: &str| json!({"command": ["touch", format!("ran-{name}")]});
    let (server, _) = broker.parts();
    for turn in 0..60 {
        // It comes and goes while nobody looks.
        support::host::signal(&server, rustix::process::Signal::STOP);
        let mut leaves = http::connect(&run.socket);
        let ahead = framed(Kind::Stdin, b"ahead");
        let said = [upgrade(&body(&turn.to_string())).as_bytes(), &ahead[..]].concat();
        leaves.write_all(&said).unwrap();
        drop(leaves);
        support::host::signal(&server, rustix::process::Signal::CONT);
        // The control: one that stays.
        let ahead = framed(Kind::Stdin, b"ahead");
        Stream::open(&run.socket, &body(&format!("stays-{turn}")), &ahead).finish();
        assert!(world.workspace.join(format!("ran-stays-{turn}")).exists());
    }
    let is_over = || {
        let all = ask(&run.socket, "GET", "/v1/execs", None).ok(200);
        all["execs"].as_array().unwrap().iter().all(|exec| exec["state"] != "running")
    };
    let start = Instant::now();
    while !is_over() {
        assert!(start.elapsed() < PATIENCE, "something still runs");
        std::thread::sleep(Duration::from_millis(20));
    }
    let ran = (0..60).filter(|turn| world.workspace.join(format!("ran-{turn}")).exists()).count();
    assert_eq!(ran, 0, "commands of clients that had left");
}

#[track_caller]
fn appears(path: &Path) {
    let start = Instant::now();
    while !path.exists() {
        assert!(start.elapsed() < PATIENCE, "{} never came", path.display());
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The one exec that runs.
#[track_caller]
fn running(socket: &Path) -> String {
    let start = Instant::now();
    loop {
        let all = ask(socket, "GET", "/v1/execs", None).ok(200);
        let found = all["execs"].as_array().unwrap().iter().find(|e| e["state"] == "running");
        if let Some(exec) = found {
            return exec["exec_id"].as_str().unwrap().to_owned();
        }
        assert!(start.elapsed() < PATIENCE, "nothing runs: {all}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_plain_answer_is_bounded_and_whole() {
    let world = World::host();
    let profile = leasing_host(&world, VALUE, "");
    let broker = serve(&world);
    let run = broker.start_run(&profile);
    let exec =
        |command: Value| ask(&run.socket, "POST", "/v1/execs", Some(&json!({"command": command})));
    let much =
        exec(json!(["sh", "-c", "head -c 3000000 /dev/zero | tr '\\0' a; echo small >&2"])).ok(200);
    assert_eq!(much["stdout"].as_str().unwrap().len(), 1 << 20);
    assert_eq!((&much["stderr"], &much["truncated"]), (&json!("small\n"), &json!(true)));
    let odd = exec(json!(["printf", "a\\377b"])).ok(200);
    assert_eq!((&odd["stdout"], &odd["truncated"]), (&json!("a\u{fffd}b"), &json!(false)));
    let input = exec(json!(["sh", "-c", "cat; echo done"])).ok(200);
    assert_eq!(input["stdout"], "done\n", "standard input is empty");
    let signal = exec(json!(["sh", "-c", "kill -9 $$"])).ok(200);
    assert_eq!((&signal["exit_status"], &signal["signal"]), (&json!(137), &json!(9)));
    exec(json!(["no-such-command"])).fails(400, "command_not_found");
    let late = json!({"command": ["sleep", "100"], "timeout": 1});
    let late = ask(&run.socket, "POST", "/v1/execs", Some(&late)).ok(200);
    assert_eq!((&late["exit_status"], &late["timed_out"]), (&json!(124), &json!(true)));
    let wordy = exec(json!(["true", "x".repeat(100_000)])).ok(200);
    assert_eq!(wordy["report"]["command"][1].as_str().unwrap().len(), 100_000);
}

#[test]
fn a_lease_serves_as_often_as_it_says() {
    let world = World::host();
    let profile = leasing_host(&world, VALUE, "");
    let broker = serve(&world);
    let run = broker.start_run(&profile);
    let want =
        json!({"capability": "test.use", "audience": "svc.test", "channel": "env", "uses": 2});
    let lease = ask(&run.socket, "POST", "/v1/leases", Some(&want)).ok(201);
    let body = json!({"command": ["sh", "-c", "echo ${#TOKEN}"], "lease_ids": [lease["lease_id"]]});
    for _ in 0..2 {
        let done = ask(&run.socket, "POST", "/v1/execs", Some(&body)).ok(200);
        assert_eq!(done["stdout"], format!("{}\n", VALUE.len()));
    }
    let third = ask(&run.socket, "POST", "/v1/execs", Some(&body));
    assert_eq!(third.status, 403, "{third}");
    assert_eq!(third.json()["error"]["stage"], "decide", "{third}");
    world.holds_nowhere(VALUE);
}

#[test]
fn a_run_that_ends_ends_all_it_had() {
    let world = World::host();
    let profile = leasing_host(&world, VALUE, "");
    let broker = serve(&world);
    let run = broker.start_run(&profile);
    let want = json!({"capability": "test.use", "audience": "svc.test", "channel": "env"});
    let lease = ask(&run.socket, "POST", "/v1/leases", Some(&want)).ok(201);
    let mut idle = http::connect(&run.socket);
    idle.write_all(b"GET /v1/run HTTP/1.1\r\n\r\n").unwrap();
    http::head(&mut idle);
    let mut stream = Stream::open(&run.socket, &json!({"command": ["sleep", "1000"]}), b"");
    stream.wait_for(Kind::Started);
    let ended = ask(&broker.control, "DELETE", &format!("/v1/runs/{}", run.id), None).ok(200);
    assert_eq!(ended["state"], "ended");
    let (_, report) = stream.finish();
    assert_ne!(report["exit_status"], 0, "{report}");
    let mut rest = Vec::new();
    idle.read_to_end(&mut rest).unwrap();
    assert!(UnixStream::connect(&run.socket).is_err(), "the socket is still served");
    let lease = lease["lease_id"].as_str().unwrap();
    let lease = ask(&broker.control, "GET", &format!("/v1/leases/{lease}"), None).ok(200);
    assert_eq!(lease["state"], "revoked");
}
