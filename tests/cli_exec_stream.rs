//! The broker's clients on the command line, against a broker that is a script: what they send, what they
//! print, what they exit with, whatever it answers.
#![forbid(unsafe_code)]

mod cli_common;

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use cli_common::{json, stderr, stdout, sublet};
use serde_json::{Value, json};
use sublet::relay::frames::{Kind, push, take};

const LEASE: &str = "lse_01990000000070008000000000000001";
const EXEC: &str = "exe_01990000000070008000000000000002";

/// A broker that serves connections by a script, one after the other.
struct Fake {
    base: tempfile::TempDir,
    thread: JoinHandle<Vec<Request>>,
}

#[derive(Debug)]
struct Request {
    line: String,
    body: Value,
}

type Act = Box<dyn FnOnce(&mut Peer) + Send>;

impl Fake {
    fn new(acts: Vec<Act>) -> Self {
        let base = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(base.path().join("s")).unwrap();
        let thread = thread::spawn(move || {
            let mut heard = Vec::new();
            for act in acts {
                let (socket, _) = listener.accept().unwrap();
                socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
                let mut peer = Peer { socket, bytes: Vec::new() };
                heard.push(peer.request());
                act(&mut peer);
            }
            heard
        });
        Self { base, thread }
    }

    fn answering(status: &'static str, body: Value) -> Self {
        Self::new(vec![Box::new(move |peer| peer.answer(status, &body))])
    }

    /// One exec: accepted, and then this.
    fn executing(act: impl FnOnce(&mut Peer) + Send + 'static) -> Self {
        Self::new(vec![Box::new(move |peer| {
            peer.accept();
            act(peer);
        })])
    }

    fn path(&self) -> PathBuf {
        self.base.path().join("s")
    }

    /// `sublet` in a sandbox whose socket this is.
    fn sublet(&self, args: &[&str]) -> Command {
        let mut command = sublet();
        command.env("SUBLET_SOCKET", self.path()).env("HOME", self.base.path()).args(args);
        command
    }

    fn call(&self, args: &[&str]) -> Output {
        self.sublet(args).stdin(Stdio::null()).output().unwrap()
    }

    fn heard(self) -> Vec<Request> {
        self.thread.join().unwrap()
    }
}

struct Peer {
    socket: UnixStream,
    bytes: Vec<u8>,
}

impl Peer {
    fn more(&mut self) -> bool {
        let mut buffer = [0; 4096];
        let n = self.socket.read(&mut buffer).unwrap();
        self.bytes.extend_from_slice(&buffer[..n]);
        n > 0
    }

    fn request(&mut self) -> Request {
        loop {
            let text = String::from_utf8_lossy(&self.bytes).into_owned();
            if let Some((head, body)) = text.split_once("\r\n\r\n") {
                let length = head.lines().find_map(|l| l.strip_prefix("content-length: "));
                let length = length.map_or(0, |l| l.parse().unwrap());
                if body.len() >= length {
                    let line = head.lines().next().unwrap().to_owned();
                    let body = serde_json::from_str(&body[..length]).unwrap_or(Value::Null);
                    self.bytes.drain(..head.len() + 4 + length);
                    return Request { line, body };
                }
            }
            assert!(self.more(), "half a request: {text}");
        }
    }

    fn answer(&mut self, status: &str, body: &Value) {
        let body = body.to_string();
        let head = format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n", body.len());
        self.write(head.as_bytes());
        self.write(body.as_bytes());
    }

    fn accept(&mut self) {
        self.write(
            format!(
                "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\n\
                 upgrade: sublet-exec\r\nsublet-exec-id: {EXEC}\r\n\r\n"
            )
            .as_bytes(),
        );
    }

    fn write(&mut self, bytes: &[u8]) {
        // The client may have gone, which is what some scripts are about.
        drop(self.socket.write_all(bytes));
    }

    fn say(&mut self, kind: Kind, payload: &[u8]) {
        let mut bytes = Vec::new();
        push(kind, payload, &mut bytes);
        self.write(&bytes);
    }

    fn exit(&mut self, status: i32) {
        self.say(Kind::Exit, json!({ "exit_status": status }).to_string().as_bytes());
    }

    /// The next frame of the client; `None` when it has closed.
    fn hear(&mut self) -> Option<(Kind, Vec<u8>)> {
        loop {
            if let Some((kind, payload, taken)) = take(&self.bytes).unwrap() {
                let frame = (kind, payload.to_vec());
                self.bytes.drain(..taken);
                return Some(frame);
            }
            if !self.more() {
                return None;
            }
        }
    }

    /// Waits for this frame, past all others.
    fn await_frame(&mut self, kind: Kind) -> Vec<u8> {
        loop {
            let (heard, payload) = self.hear().expect("the client closed");
            if heard == kind {
                return payload;
            }
        }
    }
}

fn run_object() -> Value {
    json!({"run_id": "ci-1", "socket": "/r/runs/ci-1/agent.sock", "agent": "bot", "principal": "alice",
        "profile": "git-push", "workspace": "/srv/w", "state": "active",
        "started_at": "2026-11-22T10:00:00.000Z"})
}

fn lease_object(state: &str) -> Value {
    json!({"lease_id": LEASE, "run_id": "ci-1", "state": state, "capability": "repo.push",
        "audience": "github.com", "channel": "env", "issued_at": "2026-11-22T10:00:00.000Z",
        "expires_at": "2026-11-22T10:05:00.000Z", "expires_in": 299, "uses": 2, "uses_left": 1,
        "delivery": {"kind": "env", "variable": "TOKEN"}})
}

fn error(stage: &str, reason: &str) -> Value {
    json!({"error": {"stage": stage, "reason": reason, "message": format!("m {reason}"), "hint": "h"}})
}

#[test]
fn an_execs_streams_pass_whole_and_its_status_is_ours() {
    let fake = Fake::executing(|peer| {
        peer.say(Kind::Started, json!({ "exec_id": EXEC }).to_string().as_bytes());
        let mut input = Vec::new();
        loop {
            match peer.hear().unwrap() {
                (Kind::Stdin, bytes) if bytes.is_empty() => break,
                (Kind::Stdin, bytes) => input.extend(bytes),
                other => panic!("{other:?}"),
            }
        }
        peer.say(Kind::Stdout, &input);
        peer.say(Kind::Stderr, b"to the side\xff\0");
        peer.exit(42);
    });
    let mut child = fake
        .sublet(&["exec", "--lease", LEASE, "--env", "A=b=c", "--timeout", "90s"])
        .args(["--reason", "why not", "--network", "none", "--", "cmd", "-x", "--json"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let input: Vec<u8> = (0..3_000_000_u32).map(|n| (n % 251) as u8).collect();
    let mut stdin = child.stdin.take().unwrap();
    let sent = input.clone();
    let writer = thread::spawn(move || stdin.write_all(&sent).unwrap());
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    assert_eq!(output.status.code(), Some(42), "{}", stderr(&output));
    assert!(output.stdout == input, "{} bytes came back", output.stdout.len());
    assert_eq!(output.stderr, b"to the side\xff\0");
    let heard = fake.heard();
    assert_eq!(heard[0].line, "POST /v1/execs HTTP/1.1");
    assert_eq!(
        heard[0].body,
        json!({"lease_ids": [LEASE], "command": ["cmd", "-x", "--json"], "environment": {"A": "b=c"},
            "timeout": "90s", "network": "none", "reason": "why not"})
    );
}

#[test]
fn a_report_is_written_whatever_happens() {
    #[track_caller]
    fn check(fake: Fake, status: i32, expected: &Value) {
        let report = fake.base.path().join("report.json");
        let output = fake.call(&["exec", "--report", report.to_str().unwrap(), "--", "x"]);
        assert_eq!(output.status.code(), Some(status), "{}", stderr(&output));
        let text = std::fs::read(&report).unwrap();
        assert_eq!(serde_json::from_slice::<Value>(&text).unwrap(), *expected);
    }
    let report = json!({"exit_status": 137, "signal": 9, "timed_out": false, "more": ["kept"]});
    let said = report.clone();
    let exits = Fake::executing(move |peer| peer.say(Kind::Exit, said.to_string().as_bytes()));
    check(exits, 137, &report);
    let denied = error("decide", "permission_missing");
    check(Fake::answering("403 Forbidden", denied.clone()), 125, &denied);
    let failed = error("deliver", "delivery_unavailable");
    let said = failed.clone();
    let fails = Fake::executing(move |peer| peer.say(Kind::Error, said.to_string().as_bytes()));
    check(fails, 125, &failed);

    let fake = Fake::executing(|_| ());
    let output = fake.call(&["exec", "--report", "/proc/nowhere/r", "--", "x"]);
    assert_eq!(output.status.code(), Some(125));
    assert!(stderr(&output).contains("cannot write /proc/nowhere/r"), "{}", stderr(&output));
    // And nothing was asked of the broker.
    drop(UnixStream::connect(fake.path()));
}

#[test]
fn what_did_not_run_is_told_in_the_brokers_words_with_a_shells_status() {
    #[track_caller]
    fn check(stage: &'static str, reason: &'static str, status: i32) {
        for fake in [
            Fake::answering("403 Forbidden", error(stage, reason)),
            Fake::executing(move |peer| {
                peer.say(Kind::Error, error(stage, reason).to_string().as_bytes());
            }),
        ] {
            let output = fake.call(&["--json", "exec", "--", "x"]);
            assert_eq!(output.status.code(), Some(status), "{reason}: {}", stderr(&output));
            assert_eq!(json(&stderr(&output)), error(stage, reason));
            assert_eq!(stdout(&output), "");
        }
    }
    check("decide", "command_not_permitted", 125);
    check("launch", "command_not_executable", 126);
    check("launch", "command_not_found", 127);
    check("request", "draining", 125);
}

#[test]
fn an_exec_that_is_lost_is_no_exit_status_of_the_command() {
    #[track_caller]
    fn check(act: impl FnOnce(&mut Peer) + Send + 'static, reason: &str) {
        let fake = Fake::executing(act);
        let output = fake.call(&["--json", "exec", "--", "x"]);
        assert_eq!(output.status.code(), Some(125), "{}", stderr(&output));
        let error = &json(&stderr(&output))["error"];
        assert_eq!(error["reason"], reason, "{error}");
        assert_ne!(error["hint"], "");
    }
    check(|_| (), "exec_lost");
    check(
        |peer| peer.say(Kind::Started, format!(r#"{{"exec_id":"{EXEC}"}}"#).as_bytes()),
        "exec_lost",
    );
    check(|peer| peer.write(&[6, 0, 0, 0, 0, 0, 0, 9, b'{']), "exec_lost");
    check(|peer| peer.say(Kind::Exit, b"{}"), "answer_invalid");
    check(|peer| peer.write(b"garbage that is no frame"), "answer_invalid");
    check(|peer| peer.say(Kind::Window, &[0; 4]), "answer_invalid");
}

#[test]
fn what_was_written_before_the_end_is_written() {
    let fake = Fake::executing(|peer| {
        for _ in 0..64 {
            peer.say(Kind::Stdout, &[b'x'; 32 << 10]);
        }
        peer.exit(0);
    });
    let mut child = fake
        .sublet(&["exec", "--", "x"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // A reader that comes late: the broker has long closed.
    thread::sleep(Duration::from_millis(300));
    let mut got = Vec::new();
    child.stdout.take().unwrap().read_to_end(&mut got).unwrap();
    assert_eq!(got.len(), 2 << 20);
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn standard_input_is_left_alone_while_the_broker_takes_none() {
    let (reader, mut writer) = std::io::pipe().unwrap();
    let fake = Fake::executing(|peer| {
        // Takes nothing for as long as the test looks.
        thread::sleep(Duration::from_millis(700));
        peer.exit(0);
    });
    let mut child = fake
        .sublet(&["exec", "--", "x"])
        .stdin(reader.try_clone().unwrap())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    rustix::pipe::fcntl_setpipe_size(&writer, 1 << 20).unwrap();
    writer.write_all(&vec![7; 1 << 20]).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
    let left = rustix::io::ioctl_fionread(&reader).unwrap();
    // A socket's buffer holds some; the rest is the next program's.
    assert!(left >= 512 << 10, "{left} bytes are left");
}

#[test]
fn a_reader_that_goes_away_is_told_to_the_command() {
    let (told, hears) = std::sync::mpsc::channel();
    let fake = Fake::executing(move |peer| {
        peer.say(Kind::Stdout, b"first\n");
        let closed = loop {
            peer.say(Kind::Stdout, &[b'y'; 1000]);
            match peer.hear() {
                Some((Kind::Stdin, _)) => {}
                other => break other,
            }
        };
        told.send(closed).unwrap();
        // What the command does then.
        peer.exit(141);
    });
    let (reader, writer) = std::io::pipe().unwrap();
    let mut child =
        fake.sublet(&["exec", "--", "yes"]).stdin(Stdio::null()).stdout(writer).spawn().unwrap();
    drop(reader);
    assert_eq!(hears.recv().unwrap(), Some((Kind::Stdout, Vec::new())));
    assert_eq!(child.wait().unwrap().code(), Some(141));
}

#[test]
fn a_broker_that_ends_what_nobody_reads_is_no_error() {
    let fake = Fake::executing(|peer| {
        peer.say(Kind::Stdout, b"first\n");
        while peer.hear().is_some_and(|(kind, _)| kind == Kind::Stdin) {}
    });
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output =
        fake.sublet(&["exec", "--", "yes"]).stdin(Stdio::null()).stdout(writer).output().unwrap();
    assert_eq!(output.status.code(), Some(141));
    assert_eq!(stderr(&output), "");
}

#[test]
fn signals_reach_the_command_and_its_end_is_ours() {
    for (signal, number) in [
        (rustix::process::Signal::INT, 2),
        (rustix::process::Signal::TERM, 15),
        (rustix::process::Signal::HUP, 1),
        (rustix::process::Signal::QUIT, 3),
        (rustix::process::Signal::USR1, 10),
        (rustix::process::Signal::USR2, 12),
    ] {
        let fake = Fake::executing(move |peer| {
            peer.say(Kind::Stdout, b"ready\n");
            assert_eq!(peer.await_frame(Kind::Signal), [number]);
            peer.exit(128 + i32::from(number));
        });
        let mut child = fake
            .sublet(&["exec", "--", "x"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdout.as_mut().unwrap().read_exact(&mut [0; 6]).unwrap();
        rustix::process::kill_process(rustix::process::Pid::from_child(&child), signal).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(128 + i32::from(number)));
        fake.heard();
    }
}

#[test]
fn a_signal_before_the_broker_has_answered_ends_the_wait() {
    let (told, hears) = std::sync::mpsc::channel();
    let fake = Fake::new(vec![Box::new(move |peer| {
        told.send(()).unwrap();
        assert_eq!(peer.hear(), None, "the client closes");
    })]);
    let child = fake
        .sublet(&["exec", "--json", "--", "x"])
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    hears.recv().unwrap();
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(143), "{}", stderr(&output));
    assert_eq!(json(&stderr(&output))["error"]["reason"], "interrupted");
    fake.heard();
}

#[test]
fn a_terminal_is_asked_for_with_its_size_and_told_of_its_changes() {
    use rustix::termios::{Winsize, tcgetattr, tcsetwinsize};
    let (master, slave) = terminal();
    let size =
        |rows, columns| Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    tcsetwinsize(&master, size(40, 100)).unwrap();
    let before = format!("{:?}", tcgetattr(&slave).unwrap());
    let fake = Fake::executing(|peer| {
        assert_eq!(peer.await_frame(Kind::Window), [0, 40, 0, 100]);
        peer.say(Kind::Stdout, b"\x1b[1mready");
        assert_eq!(peer.await_frame(Kind::Window), [0, 50, 0, 120]);
        // Raw: Ctrl-C is a byte for the command, not a signal for us.
        assert_eq!(peer.await_frame(Kind::Stdin), b"\x03");
        peer.exit(7);
    });
    let mut child = fake
        .sublet(&["exec", "-t", "--", "x"])
        .stdin(slave.try_clone().unwrap())
        .stdout(slave.try_clone().unwrap())
        .spawn()
        .unwrap();
    let mut shown = [0; 9];
    (&master).read_exact(&mut shown).unwrap();
    assert_eq!(&shown, b"\x1b[1mready");
    tcsetwinsize(&master, size(50, 120)).unwrap();
    // The kernel tells a terminal's session only, and the child is in the test's.
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::WINCH).unwrap();
    (&master).write_all(b"\x03").unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(7));
    assert_eq!(format!("{:?}", tcgetattr(&slave).unwrap()), before, "the terminal is as it was");
    let body = &fake.heard()[0].body;
    assert_eq!(body["terminal"], json!({"rows": 40, "columns": 100}));
}

fn terminal() -> (std::fs::File, std::fs::File) {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let name = ptsname(&master, Vec::new()).unwrap();
    let slave = rustix::fs::open(
        name.as_c_str(),
        rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY,
        rustix::fs::Mode::empty(),
    )
    .unwrap();
    (master.into(), slave.into())
}

#[test]
fn an_exec_dies_with_who_asked_for_it() {
    let (told, hears) = std::sync::mpsc::channel();
    let fake = Fake::executing(move |peer| {
        peer.say(Kind::Stdout, b"ready\n");
        while peer.hear().is_some() {}
        told.send(()).unwrap();
    });
    // A shell that runs it and is killed: the client is nobody's child any more.
    let mut shell = Command::new("sh")
        .args(["-c", "\"$0\" exec -- x; true", env!("CARGO_BIN_EXE_sublet")])
        .env("SUBLET_SOCKET", fake.path())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    shell.stdout.as_mut().unwrap().read_exact(&mut [0; 6]).unwrap();
    shell.kill().unwrap();
    shell.wait().unwrap();
    hears.recv_timeout(Duration::from_secs(10)).expect("the client closes");
}

#[test]
fn leases_are_asked_for_and_shown() {
    let fake = Fake::answering("201 Created", lease_object("granted"));
    let output = fake.call(&[
        "lease",
        "request",
        "repo.push@github.com,channel=env,ttl=5m,uses=2",
        "--reason",
        "nightly",
    ]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!(
        stdout(&output),
        format!("{LEASE} granted: repo.push@github.com by env, for 299 s, uses left: 1\n")
    );
    let heard = &fake.heard()[0];
    assert_eq!(heard.line, "POST /v1/leases HTTP/1.1");
    assert_eq!(
        heard.body,
        json!({"capability": "repo.push", "audience": "github.com", "channel": "env", "ttl": "5m",
            "uses": 2, "reason": "nightly"})
    );

    // Several: all or nothing, one object a line.
    let both = json!({"leases": [lease_object("granted"), lease_object("granted")]});
    let fake = Fake::answering("201 Created", both);
    let output = fake.call(&["--json", "lease", "request", "a.b@c.d", "e.f@g.h"]);
    let lines: Vec<Value> =
        stdout(&output).lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(lines, [lease_object("granted"), lease_object("granted")]);
    let heard = &fake.heard()[0];
    assert_eq!(heard.line, "POST /v1/leases:batch HTTP/1.1");
    assert_eq!(heard.body["leases"][1], json!({"capability": "e.f", "audience": "g.h"}));

    let fake = Fake::answering("200 OK", json!({"leases": [lease_object("consumed")]}));
    let output = fake.call(&["lease", "list"]);
    let text = stdout(&output);
    assert!(text.starts_with("LEASE "), "{text}");
    assert!(text.contains("consumed") && text.contains("1/2"), "{text}");
    assert_eq!(fake.heard()[0].line, "GET /v1/leases HTTP/1.1");

    let envelope = json!({"payload": "e30=", "payloadType": "x", "signatures": []});
    let fake = Fake::answering("200 OK", envelope.clone());
    let output = fake.call(&["lease", "show", LEASE, "--envelope"]);
    assert_eq!(json(&stdout(&output)), envelope);
    assert_eq!(fake.heard()[0].line, format!("GET /v1/leases/{LEASE}/envelope HTTP/1.1"));

    let fake = Fake::answering("200 OK", lease_object("granted"));
    let output = fake.call(&["lease", "show", LEASE]);
    assert!(stdout(&output).contains("delivery    env in TOKEN\n"), "{}", stdout(&output));
    assert_eq!(fake.heard()[0].line, format!("GET /v1/leases/{LEASE} HTTP/1.1"));
}

#[test]
fn a_denial_is_one_and_all_other_trouble_is_two() {
    #[track_caller]
    fn check(args: &[&str], status: &'static str, reason: &'static str, exit: i32) {
        let fake = Fake::answering(status, error("decide", reason));
        let socket = fake.path();
        let args = [args, &["--socket", socket.to_str().unwrap()]].concat();
        let output = fake.call(&[&["--json"], &args[..]].concat());
        assert_eq!(output.status.code(), Some(exit), "{args:?}: {}", stderr(&output));
        assert_eq!(json(&stderr(&output)), error("decide", reason));
        assert_eq!(stdout(&output), "");
    }
    let request = ["lease", "request", "a.b@c.d"];
    check(&request, "403 Forbidden", "permission_missing", 1);
    check(&request, "403 Forbidden", "rate_exceeded_minute", 1);
    check(&request, "503 Service Unavailable", "draining", 2);
    check(&request, "400 Bad Request", "malformed", 2);
    check(&["lease", "show", LEASE], "404 Not Found", "not_found", 1);
    check(&["lease", "renew", LEASE], "404 Not Found", "not_found", 1);
    check(&["lease", "renew", LEASE], "409 Conflict", "conflict", 2);
    check(&["lease", "renew", LEASE], "403 Forbidden", "ttl_exceeds_policy", 1);
    check(&["lease", "revoke", LEASE], "404 Not Found", "not_found", 1);
    check(&["runs", "end", "ci-1"], "404 Not Found", "not_found", 2);
}

#[test]
fn runs_and_revocations_are_asked_of_the_control_socket() {
    let on = |fake: &Fake, args: &[&str]| {
        let socket = fake.path();
        fake.call(&[args, &["--socket", socket.to_str().unwrap()]].concat())
    };
    let workspace = tempfile::tempdir().unwrap();
    let workspace = workspace.path().canonicalize().unwrap();
    let fake = Fake::answering("201 Created", run_object());
    let output = on(
        &fake,
        &[
            "runs",
            "start",
            "--agent",
            "bot",
            "--principal",
            "alice",
            "--profile",
            "git-push",
            "--workspace",
            workspace.to_str().unwrap(),
        ],
    );
    assert_eq!(stdout(&output), "ci-1  /r/runs/ci-1/agent.sock\n", "{}", stderr(&output));
    let heard = &fake.heard()[0];
    assert_eq!(heard.line, "POST /v1/runs HTTP/1.1");
    assert_eq!(
        heard.body,
        json!({"agent": "bot", "principal": "alice", "profile": "git-push", "workspace": workspace})
    );

    let fake = Fake::answering("200 OK", json!({"runs": [run_object()]}));
    let output = on(&fake, &["runs", "list"]);
    assert!(stdout(&output).ends_with("2026-11-22T10:00:00.000Z  /srv/w\n"), "{}", stdout(&output));
    let fake = Fake::answering("200 OK", run_object());
    let output = on(&fake, &["--json", "runs", "end", "ci-1"]);
    assert_eq!(json(&stdout(&output)), run_object());
    assert_eq!(fake.heard()[0].line, "DELETE /v1/runs/ci-1 HTTP/1.1");

    let fake = Fake::answering("200 OK", lease_object("granted"));
    on(&fake, &["lease", "renew", LEASE, "--ttl", "10m"]);
    let heard = &fake.heard()[0];
    assert_eq!(heard.line, format!("POST /v1/leases/{LEASE}/renew HTTP/1.1"));
    assert_eq!(heard.body, json!({"ttl": "10m"}));

    let fake = Fake::answering("200 OK", lease_object("revoked"));
    let output = on(&fake, &["lease", "revoke", LEASE, "--reason", "leaked"]);
    assert_eq!(stdout(&output), format!("{LEASE} revoked: repo.push@github.com by env\n"));
    assert_eq!(fake.heard()[0].body, json!({"reason": "leaked"}));

    for (args, body) in [
        (["--run", "ci-1"].to_vec(), json!({"run_id": "ci-1"})),
        (vec!["--principal", "alice"], json!({"principal": "alice"})),
        (vec!["--all"], json!({"all": true})),
    ] {
        let fake = Fake::answering("200 OK", json!({"revoked": [lease_object("revoked")]}));
        let output = on(&fake, &[&["--json", "lease", "revoke"], &args[..]].concat());
        assert_eq!(json(&stdout(&output)), lease_object("revoked"));
        let heard = &fake.heard()[0];
        assert_eq!(heard.line, "POST /v1/revocations HTTP/1.1");
        assert_eq!(heard.body, body);
    }
}

#[test]
fn one_thing_is_revoked_at_a_time() {
    for args in [&["lease", "revoke"][..], &["lease", "revoke", LEASE, "--all"]] {
        let output = sublet().args(args).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{args:?}");
    }
}

#[test]
fn a_socket_of_another_run_is_not_taken_for_the_one_that_was_named() {
    let fake = Fake::answering("200 OK", run_object());
    let output = fake.call(&["--json", "exec", "--run", "ci-2", "--", "x"]);
    assert_eq!(output.status.code(), Some(125));
    assert_eq!(json(&stderr(&output))["error"]["reason"], "run_mismatch");
    assert_eq!(fake.heard()[0].line, "GET /v1/run HTTP/1.1");

    let fake = Fake::new(vec![
        Box::new(|peer| peer.answer("200 OK", &run_object())),
        Box::new(|peer| {
            peer.accept();
            peer.exit(3);
        }),
    ]);
    let output = fake.call(&["exec", "--run", "ci-1", "--", "x"]);
    assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
}

#[test]
fn a_list_is_narrowed_where_the_socket_is_not_the_runs_own() {
    let leases = || json!({"leases": []});
    // A run's own socket takes no run's name.
    let fake = Fake::new(vec![
        Box::new(|peer| peer.answer("200 OK", &run_object())),
        Box::new(move |peer| peer.answer("200 OK", &leases())),
    ]);
    let output = fake.call(&["lease", "list", "--run", "ci-1"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!(fake.heard()[1].line, "GET /v1/leases HTTP/1.1");

    let fake = Fake::new(vec![
        Box::new(|peer| peer.answer("404 Not Found", &error("request", "not_found"))),
        Box::new(move |peer| peer.answer("200 OK", &leases())),
    ]);
    let output = fake.call(&["lease", "list", "--run", "ci-1"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!(fake.heard()[1].line, "GET /v1/leases?run_id=ci-1 HTTP/1.1");
}

#[test]
fn where_no_broker_is_it_says_where_it_looked_and_what_to_try() {
    let base = tempfile::tempdir().unwrap();
    let config = base.path().join("sublet.toml");
    std::fs::write(&config, "").unwrap();
    let state = base.path().join("state");
    let call = |args: &[&str]| {
        let places = ["--config", config.to_str().unwrap(), "--state-dir", state.to_str().unwrap()];
        sublet()
            .env_remove("SUBLET_SOCKET")
            .args(places)
            .args(args)
            .current_dir(base.path())
            .output()
            .unwrap()
    };
    #[track_caller]
    fn check(output: &Output, status: i32, words: &[&str]) {
        let text = stderr(output);
        assert_eq!(output.status.code(), Some(status), "{text}");
        for word in words {
            assert!(text.contains(word), "{word}: {text}");
        }
        assert_eq!(stdout(output), "");
    }
    let control = state.join("run/control.sock");
    let control = control.to_str().unwrap();
    check(
        &call(&["runs", "list"]),
        2,
        &[control, "why:", "ENOENT", "sublet serve", "systemctl start"],
    );
    check(&call(&["lease", "list"]), 2, &[control]);
    let agent = state.join("run/runs/ci-1/agent.sock");
    check(
        &call(&["exec", "--run", "ci-1", "--", "x"]),
        125,
        &[agent.to_str().unwrap(), "runs list"],
    );
    check(&call(&["exec", "--", "x"]), 125, &["no run is named", "--run"]);
    check(&call(&["lease", "request", "a.b@c.d"]), 2, &["no run is named"]);
    let dead = base.path().join("dead");
    drop(UnixListener::bind(&dead).unwrap());
    let dead = dead.to_str().unwrap();
    check(
        &call(&["exec", "--socket", dead, "--", "x"]),
        125,
        &[dead, "ECONNREFUSED", "sublet serve"],
    );

    // In a sandbox, what is the host's is not asked for.
    let inside = sublet().env("SUBLET_SOCKET", dead).args(["runs", "list"]).output().unwrap();
    check(&inside, 2, &["control socket", dead]);
    let inside = sublet().env("SUBLET_SOCKET", dead).args(["lease", "list"]).output().unwrap();
    check(&inside, 2, &[dead, "this sandbox's run"]);
}

#[test]
fn what_json_cannot_carry_is_refused_before_it_is_asked() {
    use std::os::unix::ffi::OsStrExt;
    let latin = std::ffi::OsStr::from_bytes(b"gr\xfc\xdfe");
    let output = sublet().args(["exec", "--socket", "/none", "--"]).arg(latin).output().unwrap();
    assert_eq!(output.status.code(), Some(125));
    assert!(stderr(&output).contains("no UTF-8"), "{}", stderr(&output));
    let output = sublet()
        .args(["exec", "--socket", "/none", "--env", "hunter2", "--", "x"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(125));
    assert!(stderr(&output).contains("--env number 1"), "{}", stderr(&output));
    assert!(!stderr(&output).contains("hunter2"), "{}", stderr(&output));
    let output = sublet().args(["exec", "true"]).output().unwrap();
    assert_eq!(output.status.code(), Some(125));
    assert!(stderr(&output).contains("sublet exec [OPTIONS] -- COMMAND"), "{}", stderr(&output));
}
