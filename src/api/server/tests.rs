//! Connections and their bounds, on a real socket, without a broker: small bounds and a router of a few
//! paths that misbehave on demand.

use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::sync_channel;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::header::{CONNECTION, UPGRADE};
use axum::http::{HeaderValue, Response, StatusCode};
use axum::routing::{get, post};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, timeout};

use crate::api::server::accept::{self, Admits, Entry};
use crate::api::server::ask::{Answer, Json, json_answer};
use crate::api::server::bounds::Bounds;
use crate::api::server::connection::Asker;
use crate::api::server::door::Door;
use crate::broker::Scope;
use crate::broker::metrics::Metrics;
use crate::broker::streams::ReadAhead;
use crate::run::mailbox::{Mail, Mailbox};

const SOON: Duration = Duration::from_millis(150);
const PATIENCE: Duration = Duration::from_secs(10);

fn small() -> Bounds {
    Bounds {
        head: 2 << 10,
        head_time: SOON,
        body: 1 << 10,
        body_time: SOON,
        idle_time: 2 * SOON,
        write_time: Some(SOON),
        connections: 2,
        connections_a_second: 10_000,
        in_flight: 1,
        queue_time: SOON,
        blocking: 1,
    }
}

struct Place {
    path: PathBuf,
    door: Arc<Door>,
    metrics: Arc<Metrics>,
    open: Option<watch::Sender<()>>,
    gone: mpsc::Receiver<Infallible>,
    _dir: tempfile::TempDir,
}

fn place(bounds: Bounds, router: Router) -> Place {
    place_for(bounds, router, Box::new(|_| true))
}

fn place_for(bounds: Bounds, router: Router, admits: Admits) -> Place {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let listener = tokio::net::UnixListener::bind(&path).unwrap();
    let door = Arc::new(Door::new(Scope::Run("r".parse().unwrap()), bounds));
    let metrics = Arc::new(Metrics::new());
    let entry = Entry { door: door.clone(), router, metrics: metrics.clone(), admits };
    let (open, closing) = watch::channel(());
    let (alive, gone) = mpsc::channel(1);
    tokio::spawn(accept::run(listener, entry, closing, alive));
    Place { path, door, metrics, open: Some(open), gone, _dir: dir }
}

impl Place {
    async fn connect(&self) -> UnixStream {
        UnixStream::connect(&self.path).await.unwrap()
    }

    /// Sends `bytes` on a connection of its own; everything until it closes.
    async fn say(&self, bytes: impl AsRef<[u8]>) -> String {
        let mut stream = self.connect().await;
        // A server that answers early may close before all is sent.
        drop(stream.write_all(bytes.as_ref()).await);
        rest(stream).await
    }
}

async fn rest(mut stream: UnixStream) -> String {
    let mut all = Vec::new();
    let read = timeout(PATIENCE, stream.read_to_end(&mut all)).await;
    drop(read.expect("the connection stays open"));
    String::from_utf8(all).unwrap()
}

async fn head(stream: &mut UnixStream) -> String {
    let mut all = Vec::new();
    while !all.ends_with(b"\r\n\r\n") {
        all.push(timeout(PATIENCE, stream.read_u8()).await.expect("no answer").unwrap());
    }
    String::from_utf8(all).unwrap()
}

/// The status, and of an error its reason.
#[track_caller]
fn check(answer: &str, status: u16, reason: &str) {
    assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{answer}");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
    if !reason.is_empty() {
        assert!(head.contains("content-type: application/json"), "{answer}");
        let object: Value = serde_json::from_str(body).unwrap_or_else(|e| panic!("{e}: {answer}"));
        assert_eq!(object["error"]["reason"], reason, "{answer}");
        let error = object["error"].as_object().unwrap();
        assert!(["stage", "message", "hint"].iter().all(|k| error[*k].is_string()), "{answer}");
    }
}

fn simple() -> Router {
    async fn echo(Json(body): Json<Value>) -> Answer {
        Ok(json_answer(StatusCode::OK, body.to_string()))
    }
    async fn slow() -> Answer {
        sleep(4 * SOON).await;
        Ok(json_answer(StatusCode::OK, "{}"))
    }
    async fn fails() -> Answer {
        panic!("on purpose")
    }
    Router::new()
        .route("/ok", get(async || "fine"))
        .route("/echo", post(echo))
        .route("/slow", get(slow))
        .route("/panic", get(fails))
        .route("/big", get(async || vec![b'x'; 4 << 20]))
}

fn get_of(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
}

fn post_of(path: &str, body: &str) -> String {
    let length = body.len();
    format!(
        "POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}"
    )
}

#[tokio::test]
async fn what_is_no_http_is_told_so() {
    let place = place(small(), simple());
    check(&place.say(get_of("/ok")).await, 200, "");
    for bad in [
        "\x16\x03\x01\x02\x00\x01\x00\x01\x7c\x03\x03\r\n\r\n",
        "GET /ok HTTP/9.9\r\n\r\n",
        "GET /o k HTTP/1.1\r\n\r\n",
        "GET /ok HTTP/1.1\r\nno colon\r\n\r\n",
        "POST /echo HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        "POST /echo HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ] {
        check(&place.say(bad).await, 400, "malformed");
    }
    check(&place.say(get_of("/ok")).await, 200, "");
}

#[tokio::test]
async fn heads_are_bounded() {
    let place = place(small(), simple());
    let fits = format!("GET /ok HTTP/1.1\r\nConnection: close\r\nA: {}\r\n\r\n", "x".repeat(1_900));
    check(&place.say(fits).await, 200, "");
    let long = format!("GET /ok HTTP/1.1\r\nA: {}\r\n\r\n", "x".repeat(2_100));
    check(&place.say(long).await, 431, "too_large");
    let endless = format!("GET /ok HTTP/1.1\r\nA: {}", "x".repeat(1 << 20));
    check(&place.say(endless).await, 431, "too_large");
    let path = format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(3_000));
    check(&place.say(path).await, 431, "too_large");
    let many = format!("GET /ok HTTP/1.1\r\n{}\r\n", "a:b\r\n".repeat(101));
    check(&place.say(many).await, 431, "too_large");
    let allowed = format!("GET /ok HTTP/1.1\r\nConnection: close\r\n{}\r\n", "a:b\r\n".repeat(99));
    check(&place.say(allowed).await, 200, "");
}

#[tokio::test]
async fn a_head_that_does_not_come_whole_in_time_is_given_up() {
    let place = place(small(), simple());
    check(&place.say("").await, 408, "too_slow");
    check(&place.say("GET /ok HTT").await, 408, "too_slow");
    // A byte now and then prolongs nothing.
    let mut stream = place.connect().await;
    let start = Instant::now();
    for byte in get_of("/ok").bytes() {
        if stream.write_u8(byte).await.is_err() {
            break;
        }
        sleep(SOON / 4).await;
        if start.elapsed() > 2 * SOON {
            break;
        }
    }
    check(&rest(stream).await, 408, "too_slow");
    // Neither does one after an answered request.
    let mut stream = place.connect().await;
    stream.write_all(b"GET /ok HTTP/1.1\r\n\r\n").await.unwrap();
    head(&mut stream).await;
    stream.read_exact(&mut [0; 4]).await.unwrap();
    stream.write_all(b"GET ").await.unwrap();
    check(&rest(stream).await, 408, "too_slow");
    // In two parts, but in time.
    let mut stream = place.connect().await;
    stream.write_all(b"GET /ok HTTP/1.1\r\n").await.unwrap();
    sleep(SOON / 4).await;
    stream.write_all(b"Connection: close\r\n\r\n").await.unwrap();
    check(&rest(stream).await, 200, "");
}

#[tokio::test]
async fn an_idle_connection_is_closed_without_a_word() {
    let place = place(small(), simple());
    let mut stream = place.connect().await;
    for _ in 0..3 {
        stream.write_all(b"GET /ok HTTP/1.1\r\n\r\n").await.unwrap();
        assert!(head(&mut stream).await.starts_with("HTTP/1.1 200"));
        stream.read_exact(&mut [0; 4]).await.unwrap();
        // Longer than a head may take.
        sleep(SOON + SOON / 4).await;
    }
    let start = Instant::now();
    assert_eq!(rest(stream).await, "");
    assert!(start.elapsed() < 3 * SOON, "{:?}", start.elapsed());
}

#[tokio::test]
async fn a_long_answer_is_not_taken_for_idleness() {
    let place = place(Bounds { idle_time: SOON, ..small() }, simple());
    check(&place.say(get_of("/slow")).await, 200, "");
}

#[tokio::test]
async fn bodies_are_bounded() {
    let place = place(small(), simple());
    check(&place.say(post_of("/echo", "{\"a\":1}")).await, 200, "");
    let fits = text_of(1_000);
    check(&place.say(post_of("/echo", &fits)).await, 200, "");
    let large = text_of(1_100);
    check(&place.say(post_of("/echo", &large)).await, 413, "too_large");
    // Announced: not a byte of it is read.
    let announced = "POST /echo HTTP/1.1\r\nContent-Length: 999999999999\r\n\r\n";
    check(&place.say(announced).await, 413, "too_large");
    let expecting = "POST /echo HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 9999\r\n\r\n";
    check(&place.say(expecting).await, 413, "too_large");
    let chunk = format!("400\r\n{}\r\n", "x".repeat(1_024));
    let chunked =
        format!("POST /echo HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n{}", chunk.repeat(500));
    check(&place.say(chunked).await, 413, "too_large");
    let slow = "POST /echo HTTP/1.1\r\nContent-Length: 7\r\n\r\n{\"a\"";
    check(&place.say(slow).await, 408, "too_slow");
    let broken = "POST /echo HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n";
    check(&place.say(broken).await, 400, "malformed");
    let lists = |depth| format!("{{\"a\":{}{}}}", "[".repeat(depth), "]".repeat(depth));
    let deep = lists(500);
    check(&place.say(post_of("/echo", &deep)).await, 400, "malformed");
    let nested = lists(120);
    check(&place.say(post_of("/echo", &nested)).await, 200, "");
}

#[tokio::test]
async fn a_body_is_one_object() {
    let place = place(small(), simple());
    check(&place.say(post_of("/echo", " {} ")).await, 200, "");
    for other in ["[]", "[\"a\"]", "\"a\"", "1", "true", "null", "{}{}", "{} []"] {
        check(&place.say(post_of("/echo", other)).await, 400, "malformed");
    }
}

/// An object that holds a text of this length.
fn text_of(length: usize) -> String {
    format!("{{\"a\":\"{}\"}}", "x".repeat(length))
}

#[tokio::test]
async fn a_large_body_is_parsed_beside_the_runtime() {
    let place = place(Bounds { body: 1 << 20, ..small() }, simple());
    let large = text_of(1 << 19);
    check(&place.say(post_of("/echo", &large)).await, 200, "");
    check(&place.say(post_of("/echo", &large[1..])).await, 400, "malformed");
}

#[tokio::test]
async fn connections_are_counted() {
    let place = place(small(), simple());
    let (one, two) = (place.connect().await, place.connect().await);
    check(&place.say(get_of("/ok")).await, 429, "too_many_connections");
    drop(one);
    let start = Instant::now();
    // The server hears of the closing a moment later.
    while !place.say(get_of("/ok")).await.starts_with("HTTP/1.1 200") {
        assert!(start.elapsed() < PATIENCE, "a closed connection still counts");
    }
    drop(two);
    let shown = place.metrics.render();
    assert!(shown.contains("socket=\"agent\",status=\"429\""), "{shown}");
}

#[tokio::test]
async fn many_that_are_turned_away_hold_nothing() {
    let place = place(small(), simple());
    let held = [place.connect().await, place.connect().await];
    let mut crowd = Vec::new();
    for _ in 0..50 {
        crowd.push(place.connect().await);
    }
    for stream in crowd {
        check(&rest(stream).await, 429, "too_many_connections");
    }
    drop(held);
}

#[tokio::test]
async fn a_peer_that_may_not_speak_is_turned_away() {
    let mine = rustix::process::geteuid().as_raw();
    let closed = place_for(small(), simple(), Box::new(move |peer| peer.uid != mine));
    check(&closed.say(get_of("/ok")).await, 403, "peer_not_permitted");
    check(&closed.say("").await, 403, "peer_not_permitted");
    let open = place_for(small(), simple(), Box::new(move |peer| peer.uid == mine));
    check(&open.say(get_of("/ok")).await, 200, "");
}

#[tokio::test]
async fn requests_in_flight_are_counted() {
    let place = place(small(), simple());
    let mut slow = place.connect().await;
    slow.write_all(get_of("/slow").as_bytes()).await.unwrap();
    sleep(SOON / 4).await;
    check(&place.say(get_of("/ok")).await, 429, "too_many_requests");
    check(&rest(slow).await, 200, "");
    // One that waits no longer than it may is answered.
    let patient = self::place(Bounds { queue_time: PATIENCE, ..small() }, simple());
    let mut slow = patient.connect().await;
    slow.write_all(get_of("/slow").as_bytes()).await.unwrap();
    sleep(SOON / 4).await;
    check(&patient.say(get_of("/ok")).await, 200, "");
    check(&rest(slow).await, 200, "");
}

#[tokio::test]
async fn a_panic_ends_its_request_alone() {
    let place = place(small(), simple());
    check(&place.say(get_of("/panic")).await, 500, "internal");
    check(&place.say(get_of("/ok")).await, 200, "");
}

#[tokio::test]
async fn who_does_not_read_is_cut() {
    let mut place = place(small(), simple());
    let mut stream = place.connect().await;
    stream.write_all(b"GET /big HTTP/1.1\r\n\r\n").await.unwrap();
    sleep(SOON * 4).await;
    place.open = None;
    // No task of a connection is left, although the client still holds its end.
    assert_eq!(timeout(PATIENCE, place.gone.recv()).await, Ok(None));
    drop(stream);
    // One that reads gets all of it.
    let place = self::place(small(), simple());
    assert!(place.say(get_of("/big")).await.len() > 4 << 20);
}

#[tokio::test]
async fn work_is_bounded_also_when_its_clients_have_gone() {
    static RUNNING: AtomicUsize = AtomicUsize::new(0);
    static MOST: AtomicUsize = AtomicUsize::new(0);
    async fn work(asker: Asker) -> Answer {
        let busy = || {
            let now = RUNNING.fetch_add(1, Ordering::SeqCst) + 1;
            MOST.fetch_max(now, Ordering::SeqCst);
            std::thread::sleep(SOON / 2);
            RUNNING.fetch_sub(1, Ordering::SeqCst);
        };
        asker.blocking(busy).await?;
        Ok(json_answer(StatusCode::OK, "{}"))
    }
    let bounds = Bounds { connections: 32, in_flight: 32, queue_time: PATIENCE, ..small() };
    let place = place(bounds, Router::new().route("/work", get(work)));
    for _ in 0..20 {
        let mut stream = place.connect().await;
        stream.write_all(get_of("/work").as_bytes()).await.unwrap();
        sleep(SOON / 20).await;
    }
    check(&place.say(get_of("/work")).await, 200, "");
    assert_eq!(MOST.load(Ordering::SeqCst), 1);
}

/// What an exec has of its client.
struct Taken {
    stream: std::os::unix::net::UnixStream,
    mailbox: Mailbox,
}

/// What an exec is told of its client, when it is.
fn told(mailbox: &Mailbox) -> Mail {
    let began = std::time::Instant::now();
    loop {
        if let Some(mail) = mailbox.take().unwrap().pop_front() {
            return mail;
        }
        assert!(began.elapsed() < PATIENCE, "nothing is told");
        std::thread::sleep(SOON / 20);
    }
}

fn upgrading(taken: std::sync::mpsc::SyncSender<Taken>) -> Router {
    let upgrade = async move |asker: Asker, body: axum::body::Bytes| -> Answer {
        assert_eq!(&body[..], b"body");
        let (mailbox, stream) = (Mailbox::new().unwrap(), asker.line.copy().unwrap());
        // Both what an exec does on its own thread.
        asker.line.take();
        std::io::Write::write_all(&mut &stream, b"HTTP/1.1 101 by the exec\r\n\r\n").unwrap();
        asker.line.upgrade_to(ReadAhead::to(mailbox.clone()));
        taken.send(Taken { stream, mailbox }).unwrap();
        let mut response = Response::new(Body::empty());
        *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        let headers = response.headers_mut();
        headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
        headers.insert(UPGRADE, HeaderValue::from_static("sublet-exec"));
        Ok(response)
    };
    Router::new().route("/up", post(upgrade))
}

const UP: &str = "POST /up HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: sublet-exec\r\n\
                  Content-Length: 4\r\n\r\nbody";

#[tokio::test]
async fn an_upgraded_stream_is_handed_over_with_what_was_read_ahead() {
    use std::io::{Read, Write};
    let (taken, execs) = sync_channel(1);
    let place = place(small(), upgrading(taken));
    let mut client = place.connect().await;
    client.write_all(format!("{UP}ahead").as_bytes()).await.unwrap();
    // Once, and by the exec.
    assert_eq!(head(&mut client).await, "HTTP/1.1 101 by the exec\r\n\r\n");
    let exec = execs.recv().unwrap();
    let (exec, told) = tokio::task::spawn_blocking(move || {
        let told = told(&exec.mailbox);
        (exec, told)
    })
    .await
    .unwrap();
    let Mail::ReadAhead(read_ahead) = told else { panic!("{told:?}") };
    client.write_all(b" and later").await.unwrap();
    client.shutdown().await.unwrap();
    let theirs = std::thread::spawn(move || {
        let (mut all, mut stream) = (read_ahead, exec.stream);
        stream.set_nonblocking(false).unwrap();
        stream.read_to_end(&mut all).unwrap();
        stream.write_all(b"heard").unwrap();
        String::from_utf8(all).unwrap()
    });
    assert_eq!(rest(client).await, "heard");
    assert_eq!(theirs.join().unwrap(), "ahead and later");
    // The place among the connections is free again, and so is that in flight.
    assert_eq!(place.door.connections.available_permits(), 2);
    assert_eq!(place.door.in_flight.available_permits(), 1);
}

#[tokio::test]
async fn a_client_that_leaves_before_its_101_takes_nothing_over() {
    let (taken, execs) = sync_channel(1);
    let place = place(small(), upgrading(taken));
    let mut client = place.connect().await;
    client.write_all(&UP.as_bytes()[..UP.len() - 1]).await.unwrap();
    drop(client);
    // The handler never ran, or the exec is told.
    sleep(SOON).await;
    assert!(execs.try_recv().map_or(true, |exec| told(&exec.mailbox) == Mail::ClientGone));
}

/// Before its exec has taken the connection over.
#[tokio::test]
async fn an_exec_is_told_of_a_client_that_leaves_while_it_is_decided_on() {
    let (began, mailboxes) = sync_channel(1);
    let decides = async move || -> Answer {
        let mailbox = Mailbox::new().unwrap();
        let _read_ahead = ReadAhead::to(mailbox.clone());
        began.send(mailbox).unwrap();
        std::future::pending().await
    };
    let place = place(small(), Router::new().route("/up", post(decides)));
    let mut client = place.connect().await;
    client.write_all(UP.as_bytes()).await.unwrap();
    let received = tokio::task::spawn_blocking(move || mailboxes.recv().unwrap());
    let mailbox = received.await.unwrap();
    sleep(SOON).await;
    assert!(mailbox.take().unwrap().is_empty(), "the client is there");
    drop(client);
    let told = tokio::task::spawn_blocking(move || told(&mailbox)).await.unwrap();
    assert_eq!(told, Mail::ClientGone);
}

/// A request is looked at when the answers before it are out: nothing of them could stand behind a 101.
#[tokio::test]
async fn a_101_stands_behind_every_answer_that_came_before() {
    /// More than a socket's buffer takes, each of them less than the server's.
    const MANY: usize = 1000;
    async fn much() -> Answer {
        Ok(json_answer(StatusCode::OK, format!("\"{}\"", "x".repeat(1000))))
    }
    let (taken, execs) = sync_channel(1);
    let router = upgrading(taken).route("/much", get(much));
    let place = place(Bounds { write_time: None, ..small() }, router);
    let mut client = place.connect().await;
    let asked = "GET /much HTTP/1.1\r\n\r\n".repeat(MANY) + UP;
    client.write_all(asked.as_bytes()).await.unwrap();
    sleep(SOON).await;
    assert!(execs.try_recv().is_err(), "nobody has read an answer");
    let ends = tokio::task::spawn_blocking(move || drop(execs.recv().unwrap()));
    let all = rest(client).await;
    ends.await.unwrap();
    assert_eq!(all.matches("HTTP/1.1 200 OK").count(), MANY);
    assert_eq!(all.matches(&"x".repeat(1000)).count(), MANY);
    assert!(all.ends_with("\"HTTP/1.1 101 by the exec\r\n\r\n"), "{}", &all[all.len() - 60..]);
}

#[tokio::test]
async fn closing_ends_what_is_idle_and_answers_what_is_asked() {
    let mut place = place(Bounds { idle_time: PATIENCE, ..small() }, simple());
    let mut idle = place.connect().await;
    idle.write_all(b"GET /ok HTTP/1.1\r\n\r\n").await.unwrap();
    head(&mut idle).await;
    idle.read_exact(&mut [0; 4]).await.unwrap();
    let mut asking = place.connect().await;
    asking.write_all(b"GET /slow HTTP/1.1\r\n\r\n").await.unwrap();
    sleep(SOON / 4).await;
    place.open = None;
    assert_eq!(rest(idle).await, "");
    check(&rest(asking).await, 200, "");
    assert_eq!(timeout(PATIENCE, place.gone.recv()).await, Ok(None));
    assert!(UnixStream::connect(&place.path).await.is_err(), "the listener is closed");
}

#[tokio::test]
async fn what_a_client_waits_for_ends_with_the_client() {
    struct Ends(mpsc::Sender<()>);
    impl Drop for Ends {
        fn drop(&mut self) {
            self.0.try_send(()).unwrap();
        }
    }
    let (sender, mut ended) = mpsc::channel(1);
    let waits = async move || -> Answer {
        let _ends = Ends(sender.clone());
        std::future::pending().await
    };
    let place = place(small(), Router::new().route("/wait", get(waits)));
    for has_said_all in [false, true] {
        let mut client = place.connect().await;
        client.write_all(get_of("/wait").as_bytes()).await.unwrap();
        if has_said_all {
            client.shutdown().await.unwrap();
        }
        assert!(timeout(SOON, ended.recv()).await.is_err(), "it waits");
        drop(client);
        assert_eq!(timeout(PATIENCE, ended.recv()).await, Ok(Some(())));
    }
}

#[tokio::test]
async fn a_client_that_has_said_all_is_answered() {
    let place = place(Bounds { body_time: PATIENCE, ..small() }, simple());
    let half = async |bytes: &str| {
        let mut stream = place.connect().await;
        stream.write_all(bytes.as_bytes()).await.unwrap();
        stream.shutdown().await.unwrap();
        rest(stream).await
    };
    // One whose connection would be kept, and one that takes a while.
    check(&half("GET /ok HTTP/1.1\r\n\r\n").await, 200, "");
    check(&half(&get_of("/slow")).await, 200, "");
    check(&half(&post_of("/echo", "{}")).await, 200, "");
    let two = half("GET /slow HTTP/1.1\r\n\r\nGET /ok HTTP/1.1\r\n\r\n").await;
    assert_eq!(two.matches("HTTP/1.1 200 OK").count(), 2, "{two}");
    // In pieces, of a size that takes several reads, in chunks.
    for pause in [Duration::ZERO, Duration::from_millis(30)] {
        let mut stream = place.connect().await;
        stream.write_all(b"POST /echo HTTP/1.1\r\nContent-Length: 2\r\n\r\n").await.unwrap();
        tokio::time::sleep(pause).await;
        stream.write_all(b"{}").await.unwrap();
        stream.shutdown().await.unwrap();
        check(&rest(stream).await, 200, "");
    }
    let large = format!("{{\"text\":\"{}\"}}", "x".repeat(place.door.bounds.body - 100));
    check(&half(&post_of("/echo", &large)).await, 200, "");
    let chunked = "POST /echo HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n";
    check(&half(chunked).await, 200, "");
    // Its body will not come any more: nothing waits for it.
    let start = Instant::now();
    let cut = half("POST /echo HTTP/1.1\r\nContent-Length: 7\r\n\r\n{").await;
    assert!(start.elapsed() < PATIENCE / 2, "{:?} {cut}", start.elapsed());
    // What is no whole request has no answer.
    assert_eq!(half("GET /ok HTTP").await, "");
}
