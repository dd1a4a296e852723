//! Many at once on one broker: who races for the last use, for the last place under a ceiling, or with a
//! revocation. Exactly as many win as may.
#![forbid(unsafe_code)]

mod support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use serial_test::file_serial;
use support::World;
use support::broker::{Broker, serve};
use support::host::eventually;
use support::http::{Reply, ask};
use support::leak::{Accomplice, is_wiped, shows};

const VALUE: &[u8] = b"raced-for-secret-of-many-callers-0003";
const CALLERS: usize = 64;

const PROFILE: &str = r#"extends = "default"
[[capability]]
name = "test.use"
channels = ["memfd", "env"]
uses = 5
command = [["**"]]
on_revoke = "wipe"
[[capability.audience]]
host = "svc.test"
secret = "s"
variable = "TOKEN"
[[capability]]
name = "kill.use"
channels = ["memfd"]
command = [["**"]]
on_revoke = "kill"
[[capability.audience]]
host = "svc.test"
secret = "s"
variable = "TOKEN"
"#;

fn world(ceilings: &str) -> World {
    let world = World::host().with_probe();
    let config = format!(
        "[secrets.s]\nsource = \"vault\"\nallow = [\"*.use@svc.test\"]\n[ceilings]\n{ceilings}\n"
    );
    support::broker::host(&world, &config, &[("raced", PROFILE)]);
    world.set_secret("s", VALUE);
    world
}

const HIGH: &str = "requests_per_minute = 100000\nrequests_per_run = 1000000";

/// As often as it takes to have a connection: of a run no more than 32 are served at a time.
fn insist(socket: &Path, method: &str, path: &str, body: &Value) -> Reply {
    let start = Instant::now();
    loop {
        let reply = ask(socket, method, path, Some(body));
        if reply.status != 429 || start.elapsed() > Duration::from_secs(60) {
            return reply;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn want(capability: &str, more: Value) -> Value {
    let mut body = json!({"capability": capability, "audience": "svc.test"});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

#[track_caller]
fn lease(socket: &Path, capability: &str, more: Value) -> String {
    let granted = ask(socket, "POST", "/v1/leases", Some(&want(capability, more))).ok(201);
    granted["lease_id"].as_str().unwrap().to_owned()
}

/// The same of all callers at the same time: status and reason of each answer, counted.
fn all_at_once(
    callers: usize,
    act: impl Fn() -> Reply + Send + Sync + 'static,
) -> BTreeMap<(u16, String), usize> {
    let (act, barrier) = (Arc::new(act), Arc::new(Barrier::new(callers)));
    let threads: Vec<_> = (0..callers)
        .map(|_| {
            let (act, barrier) = (Arc::clone(&act), Arc::clone(&barrier));
            std::thread::spawn(move || {
                barrier.wait();
                act()
            })
        })
        .collect();
    let mut counted = BTreeMap::new();
    for thread in threads {
        let reply = thread.join().unwrap();
        let reason = reply.json()["error"]["reason"].as_str().unwrap_or_default().to_owned();
        *counted.entry((reply.status, reason)).or_default() += 1;
    }
    counted
}

fn told(broker: &Broker<'_>, kind: &str, lease: &str) -> usize {
    broker.events(0).iter().filter(|e| e["type"] == kind && e["lease_id"] == lease).count()
}

#[test]
#[file_serial(host)]
fn one_use_is_for_one_of_sixty_four() {
    let world = world(HIGH);
    let broker = serve(&world);
    let run = broker.run_of("alice", "raced").socket;
    // The twin: five uses are for five.
    for uses in [1, 5] {
        let id = lease(&run, "test.use", json!({"channel": "env", "uses": uses}));
        let ran = format!("ran-{uses}");
        let body = json!({
            "lease_ids": [id], "command": ["sh", "-c", format!("test -n \"$TOKEN\" && echo x >>{ran}")]
        });
        let socket = run.clone();
        let counted = all_at_once(CALLERS, move || insist(&socket, "POST", "/v1/execs", &body));
        println!("{uses} uses: {counted:?}");
        assert_eq!(counted.get(&(200, String::new())), Some(&uses), "{counted:?}");
        let refused: usize =
            counted.iter().filter(|((status, _), _)| *status == 403).map(|(_, n)| n).sum();
        assert_eq!(refused, CALLERS - uses, "{counted:?}");
        let reasons = ["", "uses_exhausted", "lease_not_active"];
        assert!(
            counted.keys().all(|(_, reason)| reasons.contains(&reason.as_str())),
            "{counted:?}"
        );
        let lines = std::fs::read_to_string(world.workspace.join(ran)).unwrap();
        assert_eq!(lines.lines().count(), uses);
        let shown = ask(&run, "GET", &format!("/v1/leases/{id}"), None).ok(200);
        assert_eq!((&shown["uses_left"], &shown["state"]), (&json!(0), &json!("completed")));
        assert_eq!(told(&broker, "lease.consumed", &id), uses);
        assert_eq!(told(&broker, "lease.completed", &id), 1);
    }
    world.call(&["audit", "verify"]).ok();
}

#[test]
#[file_serial(host)]
fn ceilings_are_exact_among_sixty_four_and_after_a_restart() {
    for (ceilings, reason) in [
        ("requests_per_minute = 20", "rate_exceeded_minute"),
        ("requests_per_minute = 100000\nrequests_per_run = 20", "rate_exceeded_run"),
    ] {
        let world = world(ceilings);
        let mut broker = serve(&world);
        let run = broker.run_of("alice", "raced");
        let body = want("test.use", json!({}));
        let began = Instant::now();
        let ask_all = |callers: usize, body: &Value| {
            let (socket, body) = (run.socket.clone(), body.clone());
            all_at_once(callers, move || insist(&socket, "POST", "/v1/leases", &body))
        };
        let half = ask_all(8, &body);
        assert_eq!(half, BTreeMap::from([((201, String::new()), 8)]));
        // Killed: what was granted is counted all the same.
        broker.shoot();
        drop(broker);
        let broker = serve(&world);
        let rest = ask_all(CALLERS, &body);
        println!("{reason}: 8, and after a restart {rest:?}");
        assert!(began.elapsed() < Duration::from_secs(60), "the minute is over");
        let expected = [((201, String::new()), 12), ((403, reason.to_owned()), CALLERS - 12)];
        assert_eq!(rest, BTreeMap::from(expected));
        drop(broker);
        // Also after an end in good order; in a batch each one counts.
        let broker = serve(&world);
        assert_eq!(ask_all(8, &body), BTreeMap::from([((403, reason.to_owned()), 8)]));
        let granted = broker.events(0).iter().filter(|e| e["type"] == "lease.granted").count();
        assert_eq!(granted, 20);
    }
}

/// What a race of a revocation with the start of an exec came to.
#[derive(Debug, Default)]
struct Came {
    before: usize,
    in_time: usize,
    never: usize,
    killed: usize,
}

#[test]
#[file_serial(host)]
fn nothing_is_readable_after_a_revocation_was_acknowledged() {
    let world = world(HIGH);
    let accomplice = Accomplice::at(&world, "holder.sock");
    let broker = serve(&world);
    let run = broker.run_of("alice", "raced").socket;
    let rounds = if std::env::var_os("SUBLET_LONG_TESTS").is_some() { 500 } else { 48 };
    let mut came = Came::default();
    // How long a start takes here, now: the revocation is to fall anywhere in it.
    let first = Instant::now();
    let id = lease(&run, "test.use", json!({"channel": "memfd"}));
    let script = format!("{} >/dev/null; echo went", accomplice.pass_memfd());
    exec(&run, &id, &script).ok(200);
    let usual = first.elapsed();
    assert_eq!(accomplice.drain().len(), 1);
    for round in 0..rounds {
        let capability = ["test.use", "kill.use"][round % 2];
        let id = lease(&run, capability, json!({"channel": "memfd"}));
        let (socket, lease_id) = (run.clone(), id.clone());
        // Once for each twentieth of a second, so that later ones are seen as well.
        let pass = accomplice.pass_memfd();
        let script =
            format!("for n in 1 2 3 4 5 6; do {pass} >/dev/null; sleep 0.05; done; echo went");
        let exec = std::thread::spawn(move || exec(&socket, &lease_id, &script));
        std::thread::sleep(usual * (round as u32 % 24) / 16);
        let path = format!("/v1/leases/{id}/revoke");
        let revoked = ask(&broker.control, "POST", &path, Some(&json!({}))).ok(200);
        assert_eq!(revoked["state"], "revoked");
        let until_then = accomplice.drain();
        // Of the one that is acknowledged: the first look counts.
        assert!(
            until_then.iter().all(is_wiped),
            "round {round}: readable after it was acknowledged"
        );
        let reply = exec.join().unwrap();
        let later = accomplice.drain();
        assert!(!later.iter().any(|file| shows(file, VALUE)), "round {round}: {reply}");
        assert!(later.iter().all(is_wiped), "round {round}: {reply}");
        match (reply.status, until_then.is_empty()) {
            (200, false) => came.in_time += 1,
            (200, true) => came.before += 1,
            (403 | 409, _) => came.never += 1,
            other => panic!("{other:?}: {reply}"),
        }
        if reply.status == 200 {
            let answer = reply.json();
            let killed = answer["exit_status"] == 137;
            came.killed += usize::from(killed);
            // Whoever is to be killed is; a wipe lets go on.
            assert_eq!(killed, capability == "kill.use", "round {round}: {answer}");
        }
    }
    println!("{rounds} races, a start takes {usual:?}: {came:?}");
    assert!(came.in_time > 0 && came.never > 0, "the race was never one: {came:?}");
}

fn exec(run: &Path, lease: &str, script: &str) -> Reply {
    let body = json!({"lease_ids": [lease], "command": ["sh", "-c", script]});
    ask(run, "POST", "/v1/execs", Some(&body))
}

#[test]
#[file_serial(host)]
fn a_run_that_ends_while_execs_begin_leaves_none() {
    let world = world(HIGH);
    let broker = serve(&world);
    for round in 0..12_u64 {
        let run = broker.run_of("alice", "raced");
        let marker = format!("ends-{}-{round}-", std::process::id());
        let threads: Vec<_> = (0..6)
            .map(|_| {
                let (socket, marker): (PathBuf, String) = (run.socket.clone(), marker.clone());
                std::thread::spawn(move || {
                    let body = json!({"command": ["sh", "-c", "sleep 600", marker]});
                    // The socket goes away under some of them.
                    std::panic::catch_unwind(|| ask(&socket, "POST", "/v1/execs", Some(&body))).ok()
                })
            })
            .collect();
        std::thread::sleep(Duration::from_millis(round * 4));
        let path = format!("/v1/runs/{}", run.run_id);
        ask(&broker.control, "DELETE", &path, None).ok(200);
        for thread in threads {
            if let Some(reply) = thread.join().unwrap()
                && reply.status == 200
            {
                assert_eq!(reply.json()["exit_status"], 137, "{reply}");
            }
        }
        eventually("no process of the run lives", || showing(&marker) == 0);
        let execs = broker.client().execs(Some(&run.run_id)).unwrap();
        assert!(execs.iter().all(|e| e.state.as_str() != "running"), "{execs:?}");
    }
}

fn showing(marker: &str) -> usize {
    let shows = |p: &support::host::Process| {
        std::fs::read(format!("/proc/{}/cmdline", p.pid))
            .is_ok_and(|line| support::host::contains(&line, marker.as_bytes()))
    };
    support::host::processes().iter().filter(|p| shows(p)).count()
}
