//! Sources that mint, through the broker: one that is down does not slow the leases of others, and what could
//! not be revoked is tried again until it is.
#![forbid(unsafe_code)]

mod support;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use serial_test::file_serial;
use support::World;
use support::broker::{self, Broker, serve};
use support::far::{Asked, Does, Far, json as answers};
use support::http::ask;

const TOKEN: &str = "broker-minted-token-0123456789";

fn issues(asked: &Asked) -> Does {
    match asked.path.as_str() {
        "/token" => answers(200, json!({"access_token": TOKEN, "expires_in": 300})),
        _ => answers(200, json!({})),
    }
}

fn source(name: &str, far: &Far, capability: &str) -> String {
    format!(
        "[secrets.{name}]\nsource = \"oauth\"\ntoken_url = \"{}\"\nrevocation_url = \"{}\"\n\
         client_id = \"a\"\nclient_secret = \"client\"\ntimeout = \"25s\"\nallow = [\"{capability}@svc.test\"]\n",
        far.url("/token"),
        far.url("/revoke"),
    )
}

fn capability(name: &str, secret: &str) -> String {
    format!(
        "[[capability]]\nname = \"{name}\"\nchannels = [\"env\"]\nuses = 500\ncommand = [[\"**\"]]\n\
         [[capability.audience]]\nhost = \"svc.test\"\nsecret = \"{secret}\"\nvariable = \"TOKEN\"\n"
    )
}

fn world(healthy: &Far, down: &Far) -> World {
    let world = World::host();
    let config = format!(
        "{}{}[secrets.client]\nsource = \"vault\"\nallow = []\n[ceilings]\nrequests_per_minute = 100000\n\
         requests_per_run = 100000\n[host]\n",
        source("healthy", healthy, "well.use"),
        source("down", down, "down.use"),
    );
    let profile = format!(
        "extends = \"default\"\n{}{}",
        capability("well.use", "healthy"),
        capability("down.use", "down")
    );
    broker::host(&world, &config, &[("both", &profile)]);
    world.set_secret("client", b"client-secret-0123456789");
    world
}

fn exec(socket: &std::path::Path, capability: &str) -> (u16, Duration) {
    let want = json!({"capability": capability, "audience": "svc.test"});
    let lease = ask(socket, "POST", "/v1/leases", Some(&want)).ok(201);
    let body = json!({"lease_ids": [lease["lease_id"]], "command": ["true"]});
    let start = Instant::now();
    let reply = ask(socket, "POST", "/v1/execs", Some(&body));
    (reply.status, start.elapsed())
}

/// Half and nearly all of these took no longer.
fn percentiles(mut times: Vec<Duration>) -> (Duration, Duration) {
    times.sort();
    (times[times.len() / 2], times[times.len() * 99 / 100])
}

fn measure(socket: &std::path::Path, count: usize) -> (Duration, Duration) {
    let times = (0..count).map(|_| {
        let (status, time) = exec(socket, "well.use");
        assert_eq!(status, 200);
        time
    });
    percentiles(times.collect())
}

#[test]
#[file_serial]
fn a_source_that_hangs_does_not_slow_the_leases_of_others() {
    let healthy = Far::serve(issues);
    let down = Far::serve(|_| Does::Hangs(Duration::from_secs(60)));
    let world = world(&healthy, &down);
    let broker = serve(&world);
    let run = broker.start_run("both");
    exec(&run.socket, "well.use");
    let alone = measure(&run.socket, 60);
    let hung: Vec<_> = (0..16)
        .map(|_| {
            let socket = run.socket.clone();
            std::thread::spawn(move || exec(&socket, "down.use"))
        })
        .collect();
    let start = Instant::now();
    while down.asked().len() < hung.len() {
        assert!(start.elapsed() < Duration::from_secs(10), "they are not all asked");
        std::thread::sleep(Duration::from_millis(10));
    }
    let beside = measure(&run.socket, 60);
    println!(
        "a healthy source's leased exec: p50 {:?}, p99 {:?} alone; p50 {:?}, p99 {:?} beside 16 that hang",
        alone.0, alone.1, beside.0, beside.1
    );
    let still = hung.iter().filter(|thread| !thread.is_finished()).count();
    assert_eq!(still, hung.len(), "all of them hung meanwhile");
    let slack = Duration::from_millis(40);
    assert!(beside.0 < alone.0 * 2 + slack, "{alone:?} {beside:?}");
    for thread in hung {
        let (status, time) = thread.join().unwrap();
        assert_ne!(status, 200);
        assert!(time < Duration::from_secs(45), "{time:?}");
    }
}

fn events(broker: &Broker<'_>, kind: &str) -> Vec<Value> {
    broker.events(0).into_iter().filter(|event| event["type"] == kind).collect()
}

#[test]
#[file_serial]
fn what_could_not_be_revoked_is_tried_again_until_it_is() {
    static IS_UP: AtomicBool = AtomicBool::new(false);
    let far = Far::serve(|asked: &Asked| match asked.path.as_str() {
        "/revoke" if !IS_UP.load(Ordering::SeqCst) => answers(503, json!({})),
        _ => issues(asked),
    });
    let world = world(&far, &far);
    let broker = serve(&world);
    let run = broker.start_run("both");
    assert_eq!(exec(&run.socket, "well.use").0, 200);
    assert_eq!(events(&broker, "mint.revocation_failed").len(), 1);
    IS_UP.store(true, Ordering::SeqCst);
    let start = Instant::now();
    while events(&broker, "mint.revoked").is_empty() {
        assert!(start.elapsed() < Duration::from_secs(20), "{}", broker.log());
        std::thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(far.asked_at("/revoke").last().unwrap().fields("token"), [TOKEN]);
}
