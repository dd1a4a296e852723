//! The sockets of the real service: who may speak where, what a run sees of another, and what slow and
//! hostile clients cost.
#![forbid(unsafe_code)]

mod support;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use serial_test::file_serial;
use support::broker::{leasing_host, serve};
use support::http::{self, ask, raw};
use support::world::finish;
use support::{ORDINARY, World};

const VALUE: &[u8] = b"never-seen-on-a-socket-1";

fn want() -> Value {
    json!({"capability": "test.use", "audience": "svc.test", "channel": "env"})
}

#[test]
fn a_run_sees_nothing_of_another() {
    let world = World::host();
    let profile = leasing_host(&world, VALUE, "");
    let broker = serve(&world);
    let (one, two) = (broker.start_run(&profile), broker.start_run(&profile));
    let lease = ask(&one.socket, "POST", "/v1/leases", Some(&want())).ok(201);
    let lease = lease["lease_id"].as_str().unwrap();
    let command = json!({"command": ["true"]});
    let exec = ask(&one.socket, "POST", "/v1/execs", Some(&command)).ok(200);
    let exec = exec["exec_id"].as_str().unwrap();

    // What is another run's is as what does not exist, word for word.
    let pairs = [
        (lease, "lse_00000000000000000000000000000000"),
        (exec, "exe_00000000000000000000000000000000"),
    ];
    let paths = ["/v1/leases/ID", "/v1/leases/ID/envelope", "/v1/revocations/ID", "/v1/execs/ID"];
    for path in paths {
        let (real, none) = pairs[usize::from(path.contains("execs"))];
        let at = |id: &str| path.replace("ID", id);
        assert_eq!(ask(&one.socket, "GET", &at(real), None).status, 200, "{path}");
        assert_eq!(ask(&broker.control, "GET", &at(real), None).status, 200, "{path}");
        let foreign = ask(&two.socket, "GET", &at(real), None).fails(404, "not_found");
        let missing = ask(&two.socket, "GET", &at(none), None).fails(404, "not_found");
        let told = |error: &Value, id: &str| error.to_string().replace(id, "ID");
        assert_eq!(told(&foreign, real), told(&missing, none));
    }
    let with = |id: &str| json!({"command": ["touch", "ran"], "lease_ids": [id]});
    let foreign = ask(&two.socket, "POST", "/v1/execs", Some(&with(lease)));
    foreign.fails(404, "not_found");
    assert!(!world.workspace.join("ran").exists(), "it ran with another run's lease");
    ask(&one.socket, "POST", "/v1/execs", Some(&with(lease))).ok(200);
    assert!(world.workspace.join("ran").exists());

    assert_eq!(ask(&two.socket, "GET", "/v1/leases", None).ok(200), json!({"leases": []}));
    assert_eq!(ask(&two.socket, "GET", "/v1/execs", None).ok(200), json!({"execs": []}));
    let run = ask(&two.socket, "GET", "/v1/run", None).ok(200);
    assert_eq!(run["run_id"], two.id.as_str());
    let narrowed = ask(&broker.control, "GET", &format!("/v1/leases?run_id={}", two.id), None);
    assert_eq!(narrowed.ok(200), json!({"leases": []}));
}

#[test]
fn a_runs_socket_has_no_control() {
    let world = World::host();
    let profile = leasing_host(&world, VALUE, "renewable = true");
    let broker = serve(&world);
    let run = broker.start_run(&profile);
    let lease = ask(&run.socket, "POST", "/v1/leases", Some(&want())).ok(201);
    let lease = lease["lease_id"].as_str().unwrap();
    for (method, path) in [
        ("GET", "/v1/runs"),
        ("POST", "/v1/runs"),
        ("DELETE", &*format!("/v1/runs/{}", run.id)),
        ("POST", "/v1/revocations"),
        ("GET", "/v1/events"),
        ("GET", "/metrics"),
        ("POST", &*format!("/v1/leases/{lease}/renew")),
        ("POST", &*format!("/v1/leases/{lease}/revoke")),
    ] {
        let body = (method == "POST").then(|| json!({}));
        ask(&run.socket, method, path, body.as_ref()).fails(404, "not_found");
    }
    // And control has no run of its own.
    for (path, status, reason) in [
        ("/v1/leases", 405, "method_not_allowed"),
        ("/v1/execs", 405, "method_not_allowed"),
        ("/v1/leases:batch", 404, "not_found"),
    ] {
        ask(&broker.control, "POST", path, Some(&want())).fails(status, reason);
    }
    ask(&broker.control, "GET", "/v1/run", None).fails(404, "not_found");
    let refused = ask(&run.socket, "DELETE", "/v1/leases", None);
    refused.fails(405, "method_not_allowed");
    assert!(refused.head.contains("allow: "), "{refused}");
}

#[test]
fn what_no_route_knows_is_refused() {
    let world = World::host();
    let profile = leasing_host(&world, VALUE, "renewable = true");
    let broker = serve(&world);
    let (run, other) = (broker.start_run(&profile), broker.start_run(&profile));
    let lease = ask(&run.socket, "POST", "/v1/leases", Some(&want())).ok(201);
    let lease = lease["lease_id"].as_str().unwrap();

    // A key on every route that is served. No handler comes to its work: an id need not exist.
    let id = "lse_00000000000000000000000000000000";
    for (method, path, on) in sublet::api::server::routes::all() {
        let path = path.replace("{run_id}", "r").replace("{lease_id}", id).replace("{exec_id}", id);
        let sockets = [(on.agent(), &run.socket), (on.control(), &broker.control)];
        for socket in sockets.into_iter().filter_map(|(serves, socket)| serves.then_some(socket)) {
            for query in ["x=1", "x", "since=0&x=%20"] {
                let asked = format!("{path}?{query}");
                ask(socket, method.as_str(), &asked, None).fails(400, "malformed");
            }
        }
    }
    assert_eq!(ask(&run.socket, "GET", "/v1/health?", None).ok(200), json!({"status": "ok"}));

    // A body that is no object, with the members in the order that they have here.
    for (socket, path, body) in [
        (&run.socket, "/v1/leases", json!(["test.use", "svc.test", null, null, null, null])),
        (&run.socket, "/v1/leases:batch", json!([[want()], null])),
        (
            &run.socket,
            "/v1/leases:batch",
            json!({"leases": [["test.use", "svc.test", null, null, null, null]]}),
        ),
        (&run.socket, "/v1/execs", json!([[], ["true"], {}, null, null, null, null, null, null])),
        (&run.socket, "/v1/execs", json!({"command": ["true"], "terminal": [24, 80]})),
        (&broker.control, "/v1/runs", json!(["a", "b", "default", world.workspace, null])),
        (&broker.control, &*format!("/v1/leases/{lease}/renew"), json!([null])),
        (&broker.control, &*format!("/v1/leases/{lease}/revoke"), json!([null])),
        (&broker.control, "/v1/revocations", json!([null, null, true, null])),
    ] {
        ask(socket, "POST", path, Some(&body)).fails(400, "malformed");
    }
    assert_eq!(
        ask(&run.socket, "GET", &format!("/v1/leases/{lease}"), None).ok(200)["state"],
        "granted"
    );

    let named = |query: &str| {
        let listed = ask(&broker.control, "GET", &format!("/v1/runs{query}"), None).ok(200);
        let runs = listed["runs"].as_array().unwrap().iter();
        runs.map(|run| run["run_id"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(named(""), [run.id.as_str(), other.id.as_str()]);
    assert_eq!(named(&format!("?run_id={}", other.id)), [other.id.as_str()]);
    assert!(named("?run_id=nobody").is_empty());
}

#[test]
fn a_client_that_has_said_all_is_answered_and_is_noticed_when_it_leaves() {
    let world = World::host();
    let profile = leasing_host(&world, VALUE, "");
    let broker = serve(&world);
    let run = broker.start_run(&profile);
    let half = |socket: &Path, path: &str, body: Option<&Value>| {
        let body = body.map_or_else(String::new, Value::to_string);
        let method = if body.is_empty() { "GET" } else { "POST" };
        let mut stream = UnixStream::connect(socket).unwrap();
        let length = body.len();
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n{body}"
        )
        .unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        stream
    };
    let answered = |mut stream: UnixStream| {
        let mut all = String::new();
        stream.read_to_string(&mut all).unwrap();
        assert!(all.starts_with("HTTP/1.1 200 OK"), "{all}");
        all
    };
    answered(half(&broker.control, "/v1/health", None));
    let slow = json!({"command": ["sh", "-c", "sleep 1; echo done"]});
    assert!(answered(half(&run.socket, "/v1/execs", Some(&slow))).contains("done"));

    // Gone for good, its exec is.
    let endless = json!({"command": ["sh", "-c", "touch began; sleep 60"]});
    let leaving = half(&run.socket, "/v1/execs", Some(&endless));
    let began = Instant::now();
    while !world.workspace.join("began").exists() {
        assert!(began.elapsed() < Duration::from_secs(20), "it does not begin");
        std::thread::sleep(Duration::from_millis(20));
    }
    drop(leaving);
    let is_over = || {
        let execs = ask(&run.socket, "GET", "/v1/execs", None).ok(200);
        execs["execs"].as_array().unwrap().iter().all(|exec| exec["state"] != "running")
    };
    let left = Instant::now();
    while !is_over() {
        assert!(left.elapsed() < Duration::from_secs(10), "its exec lives on");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_stranger_on_a_runs_socket_is_turned_away() {
    support::needs("curl", "curl");
    let world = World::host();
    let profile = leasing_host(&world, VALUE, "");
    let broker = serve(&world);
    let run = broker.start_run(&profile);
    // The directory keeps strangers out; here it does not, so that the peer's own check is seen.
    for dir in run.socket.ancestors().skip(1).take_while(|dir| *dir != world.state()) {
        fs::set_permissions(dir, fs::Permissions::from_mode(0o711)).unwrap();
    }
    fs::set_permissions(world.state(), fs::Permissions::from_mode(0o711)).unwrap();
    let as_user = |uid: u32| {
        let mut command = Command::new("setpriv");
        let uid = uid.to_string();
        command.args(["--reuid", &uid, "--regid", &uid, "--clear-groups", "curl", "-s"]);
        command.arg("--unix-socket").arg(&run.socket).arg("http://sublet/v1/run");
        finish(command, b"", None).json()
    };
    assert_eq!(as_user(54_321)["error"]["reason"], "peer_not_permitted");
    assert_eq!(as_user(ORDINARY)["run_id"], run.id.as_str(), "the workspace's owner");
    assert_eq!(as_user(0)["run_id"], run.id.as_str());
}

#[test]
fn what_is_sent_is_bounded() {
    let world = World::host();
    let profile = leasing_host(&world, VALUE, "");
    let broker = serve(&world);
    let run = broker.start_run(&profile);
    let on = |bytes: &str| raw(&run.socket, bytes);
    on("\r\n\r\n\x00\x01\x02 nonsense\r\n\r\n").fails(400, "malformed");
    on(&format!("GET /v1/run HTTP/1.1\r\nA: {}\r\n\r\n", "x".repeat(17 << 10)))
        .fails(431, "too_large");
    let headers = "a: b\r\n".repeat(101);
    on(&format!("GET /v1/run HTTP/1.1\r\n{headers}\r\n")).fails(431, "too_large");
    let large = json!({"command": ["true", "x".repeat(1 << 20)]});
    ask(&run.socket, "POST", "/v1/execs", Some(&large)).fails(413, "too_large");
    let fits = json!({"command": ["true"], "reason": "x".repeat(900 << 10)});
    ask(&run.socket, "POST", "/v1/execs", Some(&fits)).fails(400, "malformed");
    on("POST /v1/leases HTTP/1.1\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\n{}")
        .fails(415, "unsupported_media_type");
    let error = on("POST /v1/leases HTTP/1.1\r\nConnection: close\r\nContent-Length: 14\r\n\r\n{\n \"audience\"}\n")
        .fails(400, "malformed");
    assert!(error["message"].as_str().unwrap().contains("line 2 column"), "{error}");
    let deep = format!("{}{}", "[".repeat(10_000), "]".repeat(10_000));
    let length = deep.len();
    on(&format!(
        "POST /v1/leases HTTP/1.1\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{deep}"
    ))
    .fails(400, "malformed");
    // A head that never ends: five seconds.
    let start = Instant::now();
    on("GET /v1/run HTTP/1.1\r\nA: ").fails(408, "too_slow");
    assert!(start.elapsed() > Duration::from_secs(4) && start.elapsed() < Duration::from_secs(9));
    let mut held: Vec<UnixStream> = (0..32).map(|_| http::connect(&run.socket)).collect();
    // Accepted in order: the last of them is in when it is answered.
    held[31].write_all(b"GET /v1/health HTTP/1.1\r\n\r\n").unwrap();
    assert!(http::head(&mut held[31]).starts_with("HTTP/1.1 200"));
    ask(&run.socket, "GET", "/v1/run", None).fails(429, "too_many_connections");
    drop(held);
    let start = Instant::now();
    while ask(&run.socket, "GET", "/v1/run", None).status != 200 {
        assert!(start.elapsed() < Duration::from_secs(10), "closed connections still count");
    }
    assert!(broker.log().lines().all(|line| !line.contains("panic")), "{}", broker.log());
}

#[test]
fn the_trail_is_followed() {
    let world = World::host();
    let profile = leasing_host(&world, VALUE, "");
    let broker = serve(&world);
    let run = broker.start_run(&profile);
    let past = ask(&broker.control, "GET", "/v1/events", None);
    let last = String::from_utf8(past.body).unwrap().lines().count();
    let mut follower = http::connect(&broker.control);
    let request = format!("GET /v1/events?follow=true&since={last} HTTP/1.0\r\n\r\n");
    follower.write_all(request.as_bytes()).unwrap();
    http::head(&mut follower);
    ask(&run.socket, "POST", "/v1/leases", Some(&want())).ok(201);
    let mut lines = Vec::new();
    let mut bytes = [0; 4096];
    while lines.iter().filter(|b| **b == b'\n').count() < 2 {
        let n = follower.read(&mut bytes).unwrap();
        assert_ne!(n, 0, "the stream ended: {}", String::from_utf8_lossy(&lines));
        lines.extend_from_slice(&bytes[..n]);
    }
    let lines = String::from_utf8(lines).unwrap();
    let events: Vec<Value> = lines.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(events[0]["seq"], last + 1, "{lines}");
    let types: Vec<&str> = events.iter().filter_map(|e| e["type"].as_str()).collect();
    assert!(types.starts_with(&["lease.requested", "lease.granted"]), "{types:?}");
    // The service's end is the stream's end, and is told in it.
    drop(broker);
    let mut rest = String::new();
    follower.read_to_string(&mut rest).unwrap();
}

/// The slowest but one of a hundred.
fn p99(times: &mut [Duration]) -> Duration {
    times.sort();
    times[times.len() * 99 / 100 - 1]
}

fn quiet(socket: &Path) -> Duration {
    let times = (0..200).map(|_| {
        let start = Instant::now();
        ask(socket, "GET", "/v1/leases", None).ok(200);
        start.elapsed()
    });
    p99(&mut times.collect::<Vec<_>>())
}

#[test]
#[file_serial]
fn a_hostile_run_does_not_hold_up_its_neighbour() {
    let world = World::host();
    let profile = leasing_host(&world, VALUE, "");
    let broker = serve(&world);
    let (loud, calm) = (broker.start_run(&profile), broker.start_run(&profile));
    let alone = quiet(&calm.socket);
    let over = AtomicBool::new(false);
    let junk = json!({"leases": vec![want(); 12_000]}).to_string().replacen("test.use", "TEST", 1);
    let large = format!(
        "POST /v1/leases:batch HTTP/1.1\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{junk}",
        junk.len()
    );
    let beside = std::thread::scope(|scope| {
        for kind in 0..4 {
            let (over, socket, large) = (&over, &loud.socket, &large);
            scope.spawn(move || {
                let mut held = std::collections::VecDeque::new();
                while !over.load(Ordering::Relaxed) {
                    let Ok(mut stream) = UnixStream::connect(socket) else { continue };
                    let sent = match kind {
                        // Large bodies that are wrong.
                        0 => stream.write_all(large.as_bytes()),
                        // Requests whose answers nobody reads.
                        1 => {
                            stream.write_all(&b"GET /v1/openapi.json HTTP/1.1\r\n\r\n".repeat(200))
                        }
                        // Work, and nobody waits for it.
                        2 => stream.write_all(&b"GET /v1/leases HTTP/1.1\r\n\r\n".repeat(20)),
                        // Heads that never end.
                        _ => stream.write_all(b"GET /v1/run HTTP/1.1\r\n"),
                    };
                    drop(sent);
                    held.push_back(stream);
                    if held.len() > 12 {
                        drop(held.pop_front());
                    }
                    std::thread::sleep(Duration::from_millis(2));
                }
            });
        }
        std::thread::sleep(Duration::from_millis(300));
        let beside = quiet(&calm.socket);
        over.store(true, Ordering::Relaxed);
        beside
    });
    println!("p99 of a quiet run: alone {alone:?}, beside an attack {beside:?}");
    // The attackers themselves take two CPUs of this test's.
    assert!(beside < alone + Duration::from_millis(250), "alone {alone:?}, beside {beside:?}");
}
