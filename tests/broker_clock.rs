//! The wall clock is stepped while leases live, and the machine is started anew: neither prolongs a lease,
//! and a step does not shorten one.
//!
//! The real clock is not touched: `sublet serve` runs with a shim before its C library (`support/clock.c`
//! says what that can show and what not), and a control shows that the broker's own times follow it. A
//! reboot is another boot id, in a mount namespace of the service's own.
#![forbid(unsafe_code)]

mod support;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use serial_test::file_serial;
use support::World;
use support::broker::{Broker, Way, serve, serve_as};
use support::host::eventually;
use support::http::{Reply, ask};
use support::leak::{Accomplice, shows, wiped_at};

const VALUE: &[u8] = b"secret-of-whatever-time-it-is-0004";
const DAY: i64 = 86_400;

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
"#;

fn world(ceilings: &str) -> World {
    let world = World::host().with_probe();
    let config = format!(
        "[secrets.s]\nsource = \"vault\"\nallow = [\"test.use@svc.test\"]\n[ceilings]\n{ceilings}\n"
    );
    support::broker::host(&world, &config, &[("timed", PROFILE)]);
    world.set_secret("s", VALUE);
    world
}

/// The wall clock of one service.
struct Clock {
    shim: PathBuf,
    path: PathBuf,
    file: File,
}

impl Clock {
    fn of(world: &World) -> Self {
        support::needs("cc", "gcc libc6-dev");
        let (code, shim) = (world.path("clock.c"), world.path("clock.so"));
        std::fs::write(&code, include_str!("support/clock.c")).unwrap();
        let made = Command::new("cc")
            .args(["-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-o"])
            .args([&shim, &code])
            .output()
            .unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let path = world.path("clock.offset");
        std::fs::write(&path, 0_i64.to_ne_bytes()).unwrap();
        let file = File::options().write(true).open(&path).unwrap();
        Self { shim, path, file }
    }

    /// So many seconds from the real one.
    fn step(&self, seconds: i64) {
        self.file.write_all_at(&seconds.to_ne_bytes(), 0).unwrap();
    }

    #[track_caller]
    fn serve<'a>(&self, world: &'a World) -> Broker<'a> {
        let text = |path: &Path| path.to_str().unwrap().to_owned();
        let (shim, offset) = (text(&self.shim), text(&self.path));
        let environment = [("LD_PRELOAD", shim.as_str()), ("SHIM_OFFSET", offset.as_str())];
        serve_as(world, Way { environment: &environment, ..Way::default() })
    }
}

fn request(socket: &Path, more: Value) -> Reply {
    let mut body = json!({"capability": "test.use", "audience": "svc.test"});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    ask(socket, "POST", "/v1/leases", Some(&body))
}

fn lease(socket: &Path, more: Value) -> String {
    request(socket, more).ok(201)["lease_id"].as_str().unwrap().to_owned()
}

fn exec(socket: &Path, lease: &str, script: &str) -> Reply {
    let body = json!({"lease_ids": [lease], "command": ["sh", "-c", script]});
    ask(socket, "POST", "/v1/execs", Some(&body))
}

fn shown(socket: &Path, lease: &str) -> Value {
    ask(socket, "GET", &format!("/v1/leases/{lease}"), None).ok(200)
}

/// Seconds of the wall clock.
fn seconds(time: &Value) -> i64 {
    time.as_str().unwrap().parse::<jiff::Timestamp>().unwrap().as_second()
}

/// The service's clock shows about this many seconds more than ours.
#[track_caller]
fn assert_off(time: &Value, by: i64) {
    let off = seconds(time) - jiff::Timestamp::now().as_second();
    assert!((off - by).abs() < 30, "{time} is off by {off}, not {by}");
}

#[test]
#[file_serial(host)]
fn a_step_of_the_wall_clock_moves_no_expiry() {
    let world = world("requests_per_minute = 1000");
    let clock = Clock::of(&world);
    let accomplice = Accomplice::at(&world, "holder.sock");
    let broker = clock.serve(&world);
    let run = broker.run_of("alice", "timed").socket;
    for step in [DAY, -DAY] {
        clock.step(0);
        let began = Instant::now();
        let short = lease(&run, json!({"ttl": 3, "uses": 2, "channel": "env"}));
        let long = lease(&run, json!({"ttl": 60, "uses": 3, "channel": "env"}));
        let used = lease(&run, json!({"ttl": 3}));
        let (socket, id) = (run.clone(), used.clone());
        let script = format!("{} >/dev/null; sleep 5", accomplice.pass_memfd());
        let living = std::thread::spawn(move || exec(&socket, &id, &script));
        let memfd = accomplice.take();
        assert_off(&shown(&run, &long)["issued_at"], 0);

        clock.step(step);
        // The control: what the broker writes now has the other time.
        let other = lease(&run, json!({}));
        assert_off(&shown(&run, &other)["issued_at"], step);
        let last = broker.events(0).pop().unwrap();
        assert_off(&last["time"], step);

        // Not shortened.
        assert_eq!(exec(&run, &short, "test -n \"$TOKEN\"").ok(200)["exit_status"], 0);
        assert_eq!(exec(&run, &long, "test -n \"$TOKEN\"").ok(200)["exit_status"], 0);
        assert!(began.elapsed() < Duration::from_millis(2900), "too slow to tell");
        assert!(shows(&memfd, VALUE));
        let left = shown(&run, &long)["expires_in"].as_u64().unwrap();
        assert!((50..=60).contains(&left), "{left}");

        // Not prolonged.
        let wiped = wiped_at(&memfd) - began;
        println!("stepped by {step} s: a delivery of 3 s is wiped after {wiped:?}");
        assert!((2900..4500).contains(&wiped.as_millis()), "{wiped:?}");
        std::thread::sleep(Duration::from_millis(3100).saturating_sub(began.elapsed()));
        assert_eq!(exec(&run, &short, "true").status, 403);
        eventually("it is told", || shown(&run, &short)["state"] == "expired");
        // The sweeper has looked, and the day has not passed for this one.
        assert_eq!(shown(&run, &long)["state"], "consumed");
        assert_eq!(exec(&run, &long, "true").ok(200)["exit_status"], 0);
        assert_eq!(living.join().unwrap().ok(200)["exit_status"], 0);
        assert_eq!(shown(&run, &used)["state"], "expired");
    }
    world.call(&["audit", "verify"]).ok();
}

#[test]
fn a_step_of_the_wall_clock_opens_no_ceiling() {
    let world = world("requests_per_minute = 5");
    let clock = Clock::of(&world);
    let broker = clock.serve(&world);
    let run = broker.run_of("alice", "timed").socket;
    for _ in 0..5 {
        lease(&run, json!({}));
    }
    for step in [0, DAY, -DAY] {
        clock.step(step);
        request(&run, json!({})).fails(403, "rate_exceeded_minute");
    }
    let other = broker.run_of("alice", "timed");
    assert_off(&json!(other.started_at), -DAY);
}

const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
const NEXT_BOOT: &str = "0badb007-0000-4000-8000-000000000001";

#[test]
#[file_serial(host)]
fn another_boot_ends_every_lease() {
    let world = world("requests_per_minute = 1000");
    let mut broker = serve(&world);
    let run = broker.run_of("alice", "timed").socket;
    let unused = lease(&run, json!({"ttl": "10m"}));
    let used = lease(&run, json!({"ttl": "10m", "uses": 3, "channel": "env"}));
    assert_eq!(exec(&run, &used, "test -n \"$TOKEN\"").ok(200)["exit_status"], 0);
    broker.shoot();
    drop(broker);

    let file = world.path("boot_id");
    std::fs::write(&file, format!("{NEXT_BOOT}\n")).unwrap();
    let before = format!("mount --bind {} {BOOT_ID}", file.display());
    let broker = serve_as(&world, Way { before: Some(&before), ..Way::default() });
    assert_eq!(broker.inside(&format!("cat {BOOT_ID}")).ok().line(), NEXT_BOOT);
    assert_ne!(std::fs::read_to_string(BOOT_ID).unwrap().trim(), NEXT_BOOT);
    for (lease, left) in [(&unused, 1), (&used, 2)] {
        let record = shown(&run, lease);
        assert_eq!((&record["state"], &record["uses_left"]), (&json!("interrupted"), &json!(left)));
        assert_eq!(record["expires_in"], 0);
        exec(&run, lease, "true").fails(403, "lease_not_active");
    }
    // The run goes on, with leases of this boot.
    let fresh = lease(&run, json!({"channel": "env"}));
    assert_eq!(exec(&run, &fresh, "test -n \"$TOKEN\"").ok(200)["exit_status"], 0);
    world.call(&["audit", "verify"]).ok();
    let db = rusqlite::Connection::open(world.state().join("db/sublet.db")).unwrap();
    let boot_of = |lease: &str| -> String {
        let look = "SELECT boot_id FROM lease WHERE lease_id = ?1";
        db.query_row(look, [lease], |row| row.get(0)).unwrap()
    };
    assert_eq!(boot_of(&fresh), NEXT_BOOT);
    assert_ne!(boot_of(&unused), NEXT_BOOT);
}

/// The owner's death alone would have ended the leases above. Here it lives, and the record alone is of
/// another boot.
#[test]
fn a_lease_of_another_boot_is_refused_when_it_is_used() {
    let world = world("requests_per_minute = 1000");
    let broker = serve(&world);
    let run = broker.run_of("alice", "timed").socket;
    let [other, own] = [(), ()].map(|()| lease(&run, json!({"channel": "env"})));
    let db = rusqlite::Connection::open(world.state().join("db/sublet.db")).unwrap();
    db.busy_timeout(Duration::from_secs(5)).unwrap();
    let set = "UPDATE lease SET boot_id = ?2 WHERE lease_id = ?1";
    assert_eq!(db.execute(set, (other.as_str(), NEXT_BOOT)).unwrap(), 1);
    drop(db);
    let error = exec(&run, &other, "true").fails(403, "lease_not_active");
    assert!(
        error["message"].as_str().unwrap().contains("before this machine was started"),
        "{error}"
    );
    assert_eq!(exec(&run, &own, "true").ok(200)["exit_status"], 0);
}
