//! The client against bytes that are written by hand.
#![forbid(unsafe_code)]

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use super::answer::{Answer, MAX_HEAD, take_head};
use super::*;
use crate::api::wire::ErrorObject;
use crate::relay::frames::{Kind, MAX_PAYLOAD, push};

/// Gives its pieces one read each, then the end.
struct Pieces(Vec<Vec<u8>>);

impl Read for Pieces {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        if self.0.is_empty() {
            return Ok(0);
        }
        let piece = self.0.remove(0);
        buffer[..piece.len()].copy_from_slice(&piece);
        Ok(piece.len())
    }
}

fn body_of(pieces: Vec<Vec<u8>>) -> Result<Vec<u8>, ClientError> {
    Answer::read(Pieces(pieces))?.success()
}

#[track_caller]
fn gives(text: &str, body: &str) {
    let bytes = text.as_bytes();
    for at in 0..bytes.len() {
        let pieces = vec![bytes[..at].to_vec(), bytes[at..].to_vec()];
        let pieces = pieces.into_iter().filter(|p| !p.is_empty()).collect();
        assert_eq!(body_of(pieces).unwrap(), body.as_bytes(), "split at {at}");
    }
    let single = bytes.iter().map(|&b| vec![b]).collect();
    assert_eq!(body_of(single).unwrap(), body.as_bytes(), "byte by byte");
    for at in 0..bytes.len() {
        assert!(body_of(vec![bytes[..at].to_vec()]).is_err(), "cut at {at}");
    }
}

#[test]
fn an_answer_is_whole_however_it_is_split_and_an_error_wherever_it_is_cut() {
    gives("HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello", "hello");
    gives("HTTP/1.1 200 OK\r\nContent-Length:  0 \r\nConnection: close\r\n\r\n", "");
    gives("HTTP/1.1 204 No Content\r\n\r\n", "");
    gives(
        "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n\
         HTTP/1.1 201 Created\r\ncontent-length: 2\r\n\r\n{}",
        "{}",
    );
    gives("HTTP/1.1 200 OK\r\ntransfer-encoding: Chunked\r\n\r\n0\r\n\r\n", "");
    gives(
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n\
         5;name=\"x\"\r\nhello\r\n00A\r\n, world 12\r\n0\r\nx-trailer: y\r\n\r\n",
        "hello, world 12",
    );
}

#[track_caller]
fn refuses(text: impl AsRef<[u8]>, expected: fn(&ClientError) -> bool) {
    let text = text.as_ref();
    let pieces = text.chunks(4096).map(<[u8]>::to_vec).collect();
    let error = body_of(pieces).expect_err("it was taken");
    assert!(expected(&error), "{error:?}");
}

#[test]
fn what_is_no_answer_or_ends_in_two_places_is_refused() {
    let is_http = |e: &ClientError| matches!(e, ClientError::Http(_));
    let is_framing = |e: &ClientError| matches!(e, ClientError::Framing(_));
    let is_cut = |e: &ClientError| matches!(e, ClientError::Cut);
    let is_large = |e: &ClientError| matches!(e, ClientError::TooLarge { .. });
    let head = |lines: &str| format!("HTTP/1.1 200 OK\r\n{lines}\r\n\r\n");

    refuses("", is_cut);
    refuses("SSH-2.0-OpenSSH_9.2\r\n", is_http);
    refuses("GET / HTTP/1.1\r\n\r\n", is_http);
    refuses([0xff; 64], is_http);
    refuses("HTTP/1.1 2x0 OK\r\n\r\n", is_http);
    refuses(head("a b: c"), is_http);
    refuses("HTTP/1.1 200 OK\r\n\r\nuntil the end", is_framing);
    refuses(head("content-length: 5\r\ncontent-length: 6") + "hello!", is_framing);
    refuses(head("content-length: 5\r\ntransfer-encoding: chunked") + "hello", is_framing);
    refuses(head("content-length: +5") + "hello", is_framing);
    refuses(head("content-length: -1"), is_framing);
    refuses(head("content-length: 5, 5") + "hello", is_framing);
    refuses(head("content-length: 99999999999999999999"), is_framing);
    refuses(head("content-length: 999999999999"), is_large);
    refuses(head("content-length: 6") + "hello", is_cut);
    refuses(head("transfer-encoding: gzip, chunked"), is_framing);
    refuses(head("transfer-encoding: chunked") + "x\r\n", is_framing);
    refuses(head("transfer-encoding: chunked") + "fffffffffffffffff\r\n", is_framing);
    refuses(head("transfer-encoding: chunked") + "3\r\nhello\r\n0\r\n\r\n", is_framing);
    refuses(head("transfer-encoding: chunked") + "5\nhello\r\n0\r\n\r\n", is_framing);
    refuses(head("transfer-encoding: chunked") + "5\r\nhel", is_cut);
    refuses(head("transfer-encoding: chunked") + "5;" + &"x".repeat(9000), is_large);
    let trailers = "a: b\r\n".repeat(2000);
    refuses(head("transfer-encoding: chunked") + "0\r\n" + &trailers, is_large);
    refuses(head(&format!("a: {}", "x".repeat(MAX_HEAD))), is_large);
    refuses(format!("HTTP/1.1 200 OK\r\na: {}", "x".repeat(MAX_HEAD)), is_large);
    refuses("HTTP/1.1 200 OK\r\n".to_owned() + &"a: b\r\n".repeat(65), is_http);
    refuses("HTTP/1.1 100 Continue\r\n\r\n".repeat(9), is_framing);
}

#[test]
fn no_byte_of_an_answer_makes_the_client_panic() {
    // Every single corruption of a good answer: an answer or an error, never more.
    let good = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n";
    for at in 0..good.len() {
        for byte in 0..=255 {
            let mut bad = good.to_vec();
            bad[at] = byte;
            drop(body_of(vec![bad]));
        }
    }
}

#[test]
fn an_exec_id_is_read_beside_an_upgrade() {
    let text = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: sublet-exec\r\n\
                Sublet-Exec-Id: exe_1\r\n\r\n\x01";
    let (head, taken) = take_head(text.as_bytes()).unwrap().unwrap();
    assert_eq!((head.status, head.is_upgraded, taken), (101, true, text.len() - 1));
    assert_eq!(head.exec_id.as_deref(), Some("exe_1"));
}

/// A broker that reads a request and then says this, connection by connection.
struct Scripted {
    _base: tempfile::TempDir,
    path: PathBuf,
    thread: Option<thread::JoinHandle<Vec<String>>>,
}

impl Scripted {
    fn new(answers: Vec<Vec<u8>>) -> Self {
        let base = tempfile::tempdir().unwrap();
        let path = base.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let thread = thread::spawn(move || {
            let mut heard = Vec::new();
            for answer in answers {
                let (mut socket, _) = listener.accept().unwrap();
                heard.push(request(&mut socket));
                // A client that has heard enough may be gone.
                drop(socket.write_all(&answer));
            }
            heard
        });
        Self { _base: base, path, thread: Some(thread) }
    }

    fn client(&self) -> Client {
        Client::connect(&self.path).unwrap().with_patience(Duration::from_secs(5))
    }

    fn heard(mut self) -> Vec<String> {
        self.thread.take().unwrap().join().unwrap()
    }
}

/// One request, head and body.
fn request(socket: &mut UnixStream) -> String {
    let mut bytes = Vec::new();
    let mut byte = [0];
    let length = |text: &str| -> usize {
        text.lines()
            .find_map(|l| l.strip_prefix("content-length: "))
            .map_or(0, |l| l.parse().unwrap())
    };
    loop {
        if socket.read(&mut byte).unwrap() == 0 {
            return String::from_utf8(bytes).unwrap();
        }
        bytes.push(byte[0]);
        let text = String::from_utf8_lossy(&bytes);
        if let Some((head, body)) = text.split_once("\r\n\r\n")
            && body.len() >= length(head)
        {
            return text.into_owned();
        }
    }
}

fn answer(status: &str, body: &str) -> Vec<u8> {
    format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n{body}", body.len()).into_bytes()
}

const RUN: &str = r#"{"run_id":"ci-1","socket":"/s","agent":"a","principal":"p","profile":"default",
"workspace":"/w","state":"active","started_at":"2026-11-22T10:00:00.000Z"}"#;

fn lease() -> String {
    format!(
        r#"{{"lease_id":"{}","run_id":"ci-1","state":"granted","capability":"repo.push",
        "audience":"github.com","channel":"env","issued_at":"x","expires_at":"y","expires_in":300,
        "uses":1,"uses_left":1,"delivery":{{"kind":"env","variable":"TOKEN"}}}}"#,
        LeaseId::fresh()
    )
}

#[test]
fn each_route_is_asked_for_as_the_broker_has_it() {
    let (lease_id, exec_id) = (LeaseId::fresh(), ExecId::fresh());
    let run_id: RunId = "ci-1".parse().unwrap();
    let lease = lease();
    let leases = format!(r#"{{"leases":[{lease},{lease}]}}"#);
    let exec = format!(
        r#"{{"exec_id":"{exec_id}","run_id":"ci-1","lease_ids":[],"command":["true"],
        "state":"exited","exit_status":0,"started_at":"z"}}"#
    );
    let ended = format!(
        r#"{{"exec_id":"{exec_id}","exit_status":3,"signal":null,"timed_out":false,
        "stdout":"o","stderr":"e","truncated":false,"report":{{}}}}"#
    );
    let ok = |body: &str| answer("200 OK", body);
    let broker = Scripted::new(vec![
        ok(RUN),
        answer("201 Created", &lease),
        answer("201 Created", &leases),
        ok(&leases),
        ok(&lease),
        ok(r#"{"payload":"e30="}"#),
        ok(&format!(r#"{{"lease_id":"{lease_id}","state":"revoked","revoked":true}}"#)),
        ok(&ended),
        ok(&format!(r#"{{"execs":[{exec}]}}"#)),
        ok(&exec),
        ok(r#"{"keys":[]}"#),
        ok("{}"),
        ok(r#"{"status":"ok"}"#),
        answer("201 Created", RUN),
        ok(&format!(r#"{{"runs":[{RUN}]}}"#)),
        ok(RUN),
        ok(RUN),
        ok(&lease),
        ok(&lease),
        ok(&format!(r#"{{"revoked":[{lease}]}}"#)),
        ok("a 1\n# EOF\n"),
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\n{\"a\"\r\n6\r\n:1}\n\n{\r\n2\r\n}\n\r\n0\r\n\r\n".to_vec(),
    ]);
    let client = broker.client();
    assert_eq!(client.run().unwrap().run_id, run_id);
    let body = LeaseBody::new("repo.push@github.com,ttl=5m".parse().unwrap(), None);
    assert_eq!(client.request(&body).unwrap().expires_in, 300);
    let batch = BatchBody { leases: vec![body.clone(), body], reason: None };
    assert_eq!(client.request_all(&batch).unwrap().len(), 2);
    assert_eq!(client.leases(Some(&run_id)).unwrap().len(), 2);
    client.lease(&lease_id).unwrap();
    assert_eq!(client.envelope(&lease_id).unwrap(), r#"{"payload":"e30="}"#);
    assert!(client.revocation(&lease_id).unwrap().revoked);
    let ended = client.exec_to_end(&ExecBody::of(["true"])).unwrap();
    assert_eq!((ended.exit_status, ended.stdout.as_str()), (3, "o"));
    assert_eq!(client.execs(None).unwrap()[0].more["started_at"], "z");
    client.exec_of(&exec_id).unwrap();
    client.jwks().unwrap();
    client.openapi().unwrap();
    assert_eq!(client.health().unwrap()["status"], "ok");
    let run = RunBody {
        agent: "a".parse().unwrap(),
        principal: "p".parse().unwrap(),
        profile: "default".into(),
        workspace: "/w".into(),
        run_id: None,
    };
    client.start_run(&run).unwrap();
    assert_eq!(client.runs().unwrap().len(), 1);
    client.run_of(&run_id).unwrap();
    client.end_run(&run_id).unwrap();
    client.renew(&lease_id, &RenewBody::default()).unwrap();
    client.revoke(&lease_id, &RevokeBody::default()).unwrap();
    let all = RevocationBody { all: true, ..RevocationBody::default() };
    assert_eq!(client.revoke_all(&all).unwrap().len(), 1);
    assert!(client.metrics().unwrap().ends_with("# EOF\n"));
    let events: Result<Vec<_>, _> = client.events(7, false).unwrap().collect();
    assert_eq!(events.unwrap(), [r#"{"a":1}"#, "{}"]);

    let lines: Vec<String> =
        broker.heard().iter().map(|r| r.lines().next().unwrap().to_owned()).collect();
    let expected = [
        "GET /v1/run".to_owned(),
        "POST /v1/leases".into(),
        "POST /v1/leases:batch".into(),
        "GET /v1/leases?run_id=ci-1".into(),
        format!("GET /v1/leases/{lease_id}"),
        format!("GET /v1/leases/{lease_id}/envelope"),
        format!("GET /v1/revocations/{lease_id}"),
        "POST /v1/execs".into(),
        "GET /v1/execs".into(),
        format!("GET /v1/execs/{exec_id}"),
        "GET /v1/jwks.json".into(),
        "GET /v1/openapi.json".into(),
        "GET /v1/health".into(),
        "POST /v1/runs".into(),
        "GET /v1/runs".into(),
        "GET /v1/runs/ci-1".into(),
        "DELETE /v1/runs/ci-1".into(),
        format!("POST /v1/leases/{lease_id}/renew"),
        format!("POST /v1/leases/{lease_id}/revoke"),
        "POST /v1/revocations".into(),
        "GET /metrics".into(),
        "GET /v1/events?since=7&follow=false".into(),
    ];
    assert_eq!(lines, expected.map(|line| line + " HTTP/1.1"));
}

const DENIED: &str = r#"{"error":{"stage":"decide","reason":"permission_missing","message":"m: why",
"hint":"h","later":1}}"#;

#[test]
fn a_refusal_keeps_the_brokers_words() {
    let broker = Scripted::new(vec![
        answer("403 Forbidden", DENIED),
        answer("500 Internal Server Error", "oops"),
        answer("200 OK", r#"{"run_id":3}"#),
    ]);
    let client = broker.client();
    let said = ErrorObject {
        stage: "decide".into(),
        reason: "permission_missing".into(),
        message: "m: why".into(),
        hint: "h".into(),
    };
    let error = client.run().unwrap_err();
    assert_eq!(error.to_string(), "m: why");
    assert_eq!(error.refusal(), Some(&said));
    assert!(matches!(client.run(), Err(ClientError::Unexplained { status: 500 })));
    assert!(matches!(client.run(), Err(ClientError::Json { what: "a run", .. })));
}

#[test]
fn an_answer_that_came_before_all_was_read_is_heard() {
    let base = tempfile::tempdir().unwrap();
    let path = base.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    let server = thread::spawn(move || {
        let (mut socket, _) = listener.accept().unwrap();
        socket.read_exact(&mut [0; 16]).unwrap();
        socket.write_all(&answer("413 Content Too Large", DENIED)).unwrap();
    });
    let client = Client::connect(&path).unwrap();
    let mut body = ExecBody::of(["true"]);
    body.command.push("x".repeat(4 << 20));
    let error = client.exec_to_end(&body).unwrap_err();
    assert!(matches!(error, ClientError::Refused { status: 413, .. }), "{error:?}");
    server.join().unwrap();
}

#[test]
fn a_broker_that_says_nothing_is_not_waited_for_without_end() {
    let base = tempfile::tempdir().unwrap();
    let path = base.path().join("s");
    let _listener = UnixListener::bind(&path).unwrap();
    let client = Client::connect(&path).unwrap().with_patience(Duration::from_millis(50));
    let start = Instant::now();
    assert!(matches!(client.run(), Err(ClientError::Silent)));
    assert!(matches!(client.exec(&ExecBody::of(["true"])), Err(ClientError::Silent)));
    assert!(start.elapsed() < Duration::from_secs(5));
}

#[test]
fn a_connection_that_went_stale_is_made_anew() {
    let base = tempfile::tempdir().unwrap();
    let path = base.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    let client = Client::connect(&path).unwrap();
    // What a server does with a connection that stays idle.
    drop(listener.accept().unwrap());
    let server = thread::spawn(move || {
        let (mut socket, _) = listener.accept().unwrap();
        request(&mut socket);
        socket.write_all(&answer("200 OK", RUN)).unwrap();
    });
    client.run().unwrap();
    server.join().unwrap();
}

#[test]
fn where_nothing_listens_the_error_says_which_kind_of_nothing() {
    #[track_caller]
    fn check(path: &Path, kind: std::io::ErrorKind) {
        match Client::connect(path) {
            Err(ClientError::Connect { path: named, source }) => {
                assert_eq!((named.as_path(), source.kind()), (path, kind));
            }
            other => panic!("{:?}", other.err()),
        }
    }
    let base = tempfile::tempdir().unwrap();
    let path = base.path().join("s");
    check(&path, std::io::ErrorKind::NotFound);
    drop(UnixListener::bind(&path).unwrap());
    check(&path, std::io::ErrorKind::ConnectionRefused);
}

#[test]
fn events_are_lines_and_end_with_the_first_error() {
    #[track_caller]
    fn check(body: &[u8], expected: &[&str], ends_well: bool) {
        let head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n".to_vec();
        let mut text = head;
        for byte in body {
            text.extend_from_slice(&[b'1', b'\r', b'\n', *byte, b'\r', b'\n']);
        }
        text.extend_from_slice(b"0\r\n\r\n");
        let broker = Scripted::new(vec![text]);
        let mut events = broker.client().events(0, true).unwrap();
        for line in expected {
            assert_eq!(events.next().unwrap().unwrap(), *line);
        }
        assert_eq!(events.next().is_none(), ends_well);
        assert!(events.next().is_none());
    }
    check(b"", &[], true);
    check(b"\n\n{}\n\n{\"a\":1}\n", &["{}", "{\"a\":1}"], true);
    check(b"{}\n{\"a\"", &["{}"], false);
    check(b"{}\n\xff\n{}\n", &["{}"], false);
}

/// The answer and what follows it, on one end of a pair; the test holds the other.
fn accepted(rest: &[u8]) -> (ExecStream, UnixStream) {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let head = format!(
        "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: sublet-exec\r\n\
         sublet-exec-id: {}\r\n\r\n",
        ExecId::fresh()
    );
    theirs.write_all(head.as_bytes()).unwrap();
    theirs.write_all(rest).unwrap();
    (ExecRequest::new(ours, Duration::from_secs(5)).wait().unwrap(), theirs)
}

fn frames(list: &[(Kind, &[u8])]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (kind, payload) in list {
        push(*kind, payload, &mut bytes);
    }
    bytes
}

#[test]
fn an_exec_is_a_stream_of_frames_that_begins_in_the_answers_own_packet() {
    let id = ExecId::fresh();
    let started = format!(r#"{{"exec_id":"{id}"}}"#);
    let exit = br#"{"exit_status":139,"signal":11,"timed_out":false,"unmasked_values":1,"x":[2]}"#;
    let (mut exec, _theirs) = accepted(&frames(&[
        (Kind::Started, started.as_bytes()),
        (Kind::Stdout, b"out"),
        (Kind::Stderr, b"err"),
        (Kind::Exit, exit),
    ]));
    assert!(exec.exec_id().is_some());
    assert_eq!(exec.next_frame().unwrap(), Some(Frame::Started(id.clone())));
    assert_eq!(exec.exec_id(), Some(&id));
    assert_eq!(exec.next_frame().unwrap(), Some(Frame::Stdout(b"out")));
    assert_eq!(exec.next_frame().unwrap(), Some(Frame::Stderr(b"err")));
    let Some(Frame::Exit(exit)) = exec.next_frame().unwrap() else { panic!("no exit") };
    assert_eq!((exit.exit_status, exit.signal, exit.unmasked_values), (139, Some(11), 1));
    assert_eq!(exit.report["x"][0], 2);
    assert!(exec.is_over());
    assert_eq!(exec.next_frame().unwrap(), None);
}

#[test]
fn frames_come_whole_byte_by_byte() {
    let (mut exec, mut theirs) = accepted(&[]);
    let bytes = frames(&[(Kind::Stdout, b"ab"), (Kind::Exit, br#"{"exit_status":0}"#)]);
    let writer = thread::spawn(move || {
        for byte in bytes {
            theirs.write_all(&[byte]).unwrap();
            thread::sleep(Duration::from_micros(200));
        }
        theirs
    });
    assert_eq!(exec.next_frame().unwrap(), Some(Frame::Stdout(b"ab")));
    assert!(matches!(exec.next_frame().unwrap(), Some(Frame::Exit(_))));
    drop(writer.join().unwrap());
}

#[test]
fn a_report_may_take_several_frames() {
    // One that fills its frames to the last byte is ended by an empty one.
    for pad in [10, MAX_PAYLOAD - 30, MAX_PAYLOAD, 3 * MAX_PAYLOAD] {
        let report = format!(r#"{{"exit_status":7,"command":"{}"}}"#, "x".repeat(pad));
        let bytes = frames(&[(Kind::Exit, report.as_bytes())]);
        let (mut exec, mut theirs) = accepted(&[]);
        let writer = thread::spawn(move || theirs.write_all(&bytes).map(|()| theirs));
        let Some(Frame::Exit(exit)) = exec.next_frame().unwrap() else { panic!("no exit") };
        assert_eq!(exit.report["command"].as_str().unwrap().len(), pad);
        drop(writer.join().unwrap());
    }
}

#[test]
fn what_ends_badly_says_so() {
    #[track_caller]
    fn check(bytes: &[u8], expected: fn(&ClientError) -> bool) {
        let (mut exec, theirs) = accepted(bytes);
        theirs.shutdown(Shutdown::Write).unwrap();
        let error = loop {
            match exec.next_frame() {
                Ok(Some(Frame::Exit(_)) | None) => panic!("it ended well"),
                Ok(Some(_)) => {}
                Err(e) => break e,
            }
        };
        assert!(expected(&error), "{error:?}");
    }
    let is_lost = |e: &ClientError| matches!(e, ClientError::Lost);
    let is_json = |e: &ClientError| matches!(e, ClientError::Json { .. });
    let is_frame = |e: &ClientError| matches!(e, ClientError::Frame(_));
    check(b"", is_lost);
    check(&frames(&[(Kind::Stdout, b"x")]), is_lost);
    check(&frames(&[(Kind::Exit, br#"{"exit_status":0}"#)])[..20], is_lost);
    check(&frames(&[(Kind::Exit, b"{}")]), is_json);
    check(&frames(&[(Kind::Exit, br#"{"exit_status":256}"#)]), is_json);
    check(&frames(&[(Kind::Exit, br#"{"exit_status":-1}"#)]), is_json);
    check(&frames(&[(Kind::Exit, b"")]), is_json);
    check(&frames(&[(Kind::Error, b"{}")]), is_json);
    check(&frames(&[(Kind::Started, b"{\"exec_id\":\"../x\"}")]), is_json);
    check(&frames(&[(Kind::Signal, b"\x09")]), |e| {
        matches!(e, ClientError::Misplaced(Kind::Signal))
    });
    check(b"HTTP/1.1 200 OK", is_frame);
    check(&[1, 0, 0, 0, 0xff, 0, 0, 0], is_frame);
}

#[test]
fn an_error_frame_is_the_brokers_own_words() {
    let (mut exec, _theirs) = accepted(&frames(&[(Kind::Error, DENIED.as_bytes())]));
    let Some(Frame::Failed(error)) = exec.next_frame().unwrap() else { panic!("no error") };
    assert_eq!((error.reason.as_str(), error.hint.as_str()), ("permission_missing", "h"));
    assert!(exec.is_over());
}

#[test]
fn what_a_client_says_is_framed() {
    let (mut exec, mut theirs) = accepted(&[]);
    exec.stdin(b"in");
    exec.stdin(b"");
    exec.end_stdin();
    exec.signal(15);
    exec.window(24, 258);
    exec.close_stdout();
    exec.close_stderr();
    assert_eq!(exec.unsent(), 10 + 8 + 9 + 12 + 8 + 8);
    exec.flush().unwrap();
    assert_eq!(exec.unsent(), 0);
    drop(exec);
    let mut got = Vec::new();
    theirs.read_to_end(&mut got).unwrap();
    assert_eq!(
        got,
        frames(&[
            (Kind::Stdin, b"in"),
            (Kind::Stdin, b""),
            (Kind::Signal, &[15]),
            (Kind::Window, &[0, 24, 1, 2]),
            (Kind::Stdout, b""),
            (Kind::Stderr, b""),
        ])
    );
}

#[test]
fn a_broker_that_reads_nothing_stops_no_one_and_its_last_word_is_heard() {
    let (mut exec, mut theirs) = accepted(&[]);
    exec.stdin(&vec![7; 4 << 20]);
    exec.flush().unwrap();
    assert!(exec.unsent() > 0);
    theirs.write_all(&frames(&[(Kind::Exit, br#"{"exit_status":5}"#)])).unwrap();
    // Closes with our bytes unread: a reset.
    drop(theirs);
    exec.flush().unwrap();
    assert_eq!(exec.unsent(), 0);
    let Some(Frame::Exit(exit)) = exec.next_frame().unwrap() else { panic!("no exit") };
    assert_eq!(exit.exit_status, 5);
}

#[test]
fn an_exec_that_is_not_accepted_did_not_run() {
    #[track_caller]
    fn check(text: &str, expected: fn(&ClientError) -> bool) {
        let broker = Scripted::new(vec![text.as_bytes().to_vec()]);
        let error = broker.client().exec(&ExecBody::of(["true"])).err().expect("accepted");
        assert!(expected(&error), "{error:?}");
    }
    let denied = String::from_utf8(answer("403 Forbidden", DENIED)).unwrap();
    check(&denied, |e| e.refusal().is_some_and(|r| r.reason == "permission_missing"));
    let is_framing = |e: &ClientError| matches!(e, ClientError::Framing(_));
    check("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}", is_framing);
    check("HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\n\r\n", is_framing);
    check("", |e| matches!(e, ClientError::Cut));
    check("HTTP/1.1 101 Sw", |e| matches!(e, ClientError::Cut));
}
