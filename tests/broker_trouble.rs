//! The disk is full, the state cannot be written, the database is gone; the service is told to end; a client
//! reads nothing, or is killed. Grants stop where nothing can be recorded, what runs ends in good order, and
//! no one else is delayed.
#![forbid(unsafe_code)]

mod support;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use serial_test::file_serial;
use sublet::api::client::Client;
use sublet::api::wire::ExecBody;
use support::World;
use support::broker::{Broker, Way, serve, serve_as};
use support::host::{self, eventually};
use support::http::{Reply, ask};
use support::leak::{Accomplice, is_wiped, shows};

const VALUE: &[u8] = b"secret-that-outlasts-no-trouble-0005";

const PROFILE: &str = r#"extends = "default"
[[capability]]
name = "test.use"
channels = ["memfd", "env"]
uses = 5
command = [["**"]]
[[capability.audience]]
host = "svc.test"
secret = "s"
variable = "TOKEN"
[[capability]]
name = "repo.push"
channels = ["git"]
uses = 5
command = [["**"]]
[[capability.audience]]
protocol = "https"
host = "git.test"
secret = "s"
"#;

fn world() -> World {
    let world = World::host().with_probe();
    let config = "[secrets.s]\nsource = \"vault\"\nallow = [\"test.use@svc.test\", \"repo.push@git.test\"]\n\
                  [ceilings]\nrequests_per_minute = 1000000\nrequests_per_run = 1000000\n";
    support::broker::host(&world, config, &[("troubled", PROFILE)]);
    world.set_secret("s", VALUE);
    world
}

fn request(socket: &Path) -> Reply {
    let body = json!({"capability": "test.use", "audience": "svc.test", "channel": "memfd"});
    ask(socket, "POST", "/v1/leases", Some(&body))
}

#[track_caller]
fn lease(socket: &Path) -> String {
    request(socket).ok(201)["lease_id"].as_str().unwrap().to_owned()
}

fn exec(socket: &Path, leases: &[&str], command: &[&str]) -> Reply {
    let body = json!({"lease_ids": leases, "command": command});
    ask(socket, "POST", "/v1/execs", Some(&body))
}

/// A leased exec that has passed its memfd out, and ends by itself when it is let go.
struct InUse {
    go: PathBuf,
    lease: String,
    memfd: File,
    exec: JoinHandle<Reply>,
}

impl InUse {
    #[track_caller]
    fn begin(world: &World, socket: &Path) -> Self {
        let accomplice = Accomplice::at(world, "holder.sock");
        let lease = lease(socket);
        let script = format!(
            "{} >/dev/null; until test -e go; do sleep 0.02; done; echo went; exit 7",
            accomplice.pass_memfd()
        );
        let (socket, id) = (socket.to_owned(), lease.clone());
        let exec = std::thread::spawn(move || exec(&socket, &[&id], &["sh", "-c", &script]));
        let memfd = accomplice.take();
        // Another one may be begun.
        std::fs::remove_file(world.workspace.join("holder.sock")).unwrap();
        assert!(shows(&memfd, VALUE));
        Self { go: world.workspace.join("go"), lease, memfd, exec }
    }

    /// Lets it end: as ever, whatever else is wrong.
    #[track_caller]
    fn ends_well(self) -> String {
        assert!(shows(&self.memfd, VALUE), "trouble with the trail takes nothing from what runs");
        std::fs::write(&self.go, "").unwrap();
        let answer = self.exec.join().unwrap().ok(200);
        assert_eq!((&answer["exit_status"], &answer["stdout"]), (&json!(7), &json!("went\n")));
        assert_eq!(answer["report"]["scrubbed"][0]["wiped"], true, "{answer}");
        assert!(is_wiped(&self.memfd));
        std::fs::remove_file(&self.go).unwrap();
        self.lease
    }
}

/// Grants stop, by name and with words that help; nothing runs either that would have to be recorded.
#[track_caller]
fn refuses(broker: &Broker<'_>, run: &Path, held: &str, words: &str) {
    for reply in [request(run), exec(run, &[held], &["touch", "ran"])] {
        let error = reply.fails(403, "audit_unavailable");
        assert!(error["message"].as_str().unwrap().contains(words), "{error}");
        assert_ne!(error["hint"], "", "{error}");
    }
    // It still answers what needs no record.
    ask(&broker.control, "GET", "/v1/health", None).ok(200);
    ask(run, "GET", "/v1/run", None).ok(200);
}

/// The service has come back by itself: the end that could not be recorded is, and grants go on.
#[track_caller]
fn resumes(broker: &Broker<'_>, run: &Path, held: &str, ended: &str) {
    eventually("grants go on", || request(run).status == 201);
    assert_eq!(exec(run, &[held], &["true"]).ok(200)["exit_status"], 0);
    let of = |kind: &str| {
        let names =
            |e: &Value| e["detail"]["lease_ids"] == json!([ended]) || e["lease_id"] == ended;
        broker.events(0).into_iter().filter(|e| e["type"] == kind && names(e)).collect::<Vec<_>>()
    };
    eventually("the end is told", || of("exec.exited").len() == 1);
    assert_eq!(of("exec.exited")[0]["detail"]["exit_status"], 7);
    assert_eq!(of("exec.scrubbed")[0]["outcome"], "wiped");
    assert_eq!(of("lease.completed").len(), 1);
    let shown = ask(run, "GET", &format!("/v1/leases/{ended}"), None).ok(200);
    assert_eq!(shown["state"], "completed");
    let running = broker.client().execs(None).unwrap();
    assert!(running.iter().all(|e| e.state.as_str() != "running"), "{running:?}");
}

#[test]
#[file_serial(host)]
fn a_full_disk_stops_grants_until_there_is_room() {
    let world = world();
    let (state, seed) = (world.state(), world.path("seed"));
    // A small file system of the service's own, with what the state has until now.
    let before = format!(
        "cp -a {state} {seed}; mount -t tmpfs -o size=3m,mode=0755 none {state}; cp -a {seed}/. {state}/",
        state = state.display(),
        seed = seed.display(),
    );
    let sockets = world.path("sockets");
    let way = Way { before: Some(&before), runtime_dir: Some(&sockets), ..Way::default() };
    let broker = serve_as(&world, way);
    let run = broker.run_of("alice", "troubled").socket;
    let (held, taken) = (lease(&run), lease(&run));
    let used = InUse::begin(&world, &run);
    let ballast = state.join("ballast");
    broker.inside(&format!("cat /dev/zero >{} 2>/dev/null || true", ballast.display())).ok();
    // What the file system has set aside for the database is used up first.
    let mut granted = 0;
    while request(&run).status == 201 {
        granted += 1;
        assert!(granted < 5000, "it never fills");
    }
    println!("{granted} grants fitted");
    refuses(&broker, &run, &held, "cannot be");
    assert!(!world.workspace.join("ran").exists());
    // What is taken back meanwhile is so for everybody who asks.
    let path = |of: &str| format!("/v1/leases/{taken}{of}");
    ask(&broker.control, "POST", &path("/revoke"), Some(&json!({})))
        .fails(403, "audit_unavailable");
    let revoked = ask(&run, "GET", &format!("/v1/revocations/{taken}"), None).ok(200);
    assert_eq!((&revoked["state"], &revoked["revoked"]), (&json!("revoked"), &json!(true)));
    assert_eq!(ask(&run, "GET", &path("/envelope"), None).status, 409);
    assert_eq!(ask(&run, "GET", &path(""), None).ok(200)["state"], "revoked");
    assert_eq!(ask(&run, "GET", &format!("/v1/leases/{held}"), None).ok(200)["state"], "granted");
    let ended = used.ends_well();
    refuses(&broker, &run, &held, "cannot be");
    broker.inside(&format!("rm {}", ballast.display())).ok();
    eventually("it is recorded", || {
        broker.events(0).iter().any(|e| e["type"] == "lease.revoked" && e["lease_id"] == *taken)
    });
    resumes(&broker, &run, &held, &ended);
    let verify = format!(
        "{} --config {} --state-dir {} audit verify",
        support::world::binary().display(),
        world.path("etc/sublet.toml").display(),
        state.display()
    );
    broker.inside(&verify).ok();
}

/// Files that cannot be written, not by root either, as on a file system that the kernel has made read-only
/// after an error. (A remount that is asked for is refused with EBUSY while the service holds them open for
/// writing: mount(2).)
struct Immutable(Vec<PathBuf>);

impl Immutable {
    fn make(directory: &Path) -> Self {
        let files = std::fs::read_dir(directory).unwrap().map(|e| e.unwrap().path());
        let mut all: Vec<PathBuf> = files.collect();
        all.push(directory.to_owned());
        let made = Self(all);
        assert!(made.set("+i"), "this test needs a file system with chattr(1): set TMPDIR");
        made
    }

    fn set(&self, flag: &str) -> bool {
        let mut command = Command::new("chattr");
        command.arg(flag).args(&self.0).stderr(Stdio::null());
        command.status().is_ok_and(|status| status.success())
    }
}

impl Drop for Immutable {
    fn drop(&mut self) {
        assert!(self.set("-i"), "cannot be undone: {:?}", self.0);
    }
}

#[test]
#[file_serial(host)]
fn a_state_that_cannot_be_written_stops_grants_until_it_can() {
    support::needs("chattr", "e2fsprogs");
    let world = world();
    let broker = serve(&world);
    let run = broker.run_of("alice", "troubled").socket;
    let held = lease(&run);
    let taken = InUse::begin(&world, &run);
    let used = InUse::begin(&world, &run);
    // What lies on disk as it is in memory has to be asked for again before it is written: SIGBUS, not an error.
    let state = std::fs::File::open(world.state()).unwrap();
    rustix::fs::syncfs(&state).unwrap();
    let immutable = Immutable::make(&world.state().join("db"));
    refuses(&broker, &run, &held, "cannot be");
    assert!(!world.workspace.join("ran").exists());
    // What is taken back is gone, though it cannot be written down.
    let path = format!("/v1/leases/{}/revoke", taken.lease);
    let late =
        ask(&broker.control, "POST", &path, Some(&json!({}))).fails(403, "audit_unavailable");
    assert!(late["hint"].as_str().unwrap().contains("is wiped"), "{late}");
    assert!(is_wiped(&taken.memfd));
    let ended = used.ends_well();
    // The broker's own threads have looked at it too.
    std::thread::sleep(Duration::from_millis(700));
    refuses(&broker, &run, &held, "cannot be");
    drop(immutable);
    // It is the first that is written, before anyone can use what was taken back.
    exec(&run, &[&taken.lease], &["touch", "ran"]).fails(403, "lease_not_active");
    assert!(!world.workspace.join("ran").exists());
    let shown = ask(&run, "GET", &format!("/v1/leases/{}", taken.lease), None).ok(200);
    assert_eq!(shown["state"], "revoked");
    resumes(&broker, &run, &held, &ended);
    world.call(&["audit", "verify"]).ok();
}

/// Neither what is refused nor what would be given can be recorded: nothing is given, and the exec goes on.
#[test]
#[file_serial(host)]
fn git_is_given_nothing_while_the_state_cannot_be_written() {
    support::needs("chattr", "e2fsprogs");
    let world = world();
    let broker = serve(&world);
    let run = broker.run_of("alice", "troubled").socket;
    let body = json!({"capability": "repo.push", "audience": "git.test", "uses": 3});
    let granted = ask(&run, "POST", "/v1/leases", Some(&body)).ok(201);
    let id = granted["lease_id"].as_str().unwrap().to_owned();
    // One file a step: the exec says where it is, and waits to be let on.
    let script = "step() { touch at-$1; until test -e go-$1; do sleep 0.02; done; }\n\
                  get() { printf 'protocol=https\\nhost=%s\\n\\n' $1 | /run/sublet/bin/sublet git-credential get; }\n\
                  step begun; get other.test; get git.test; step refused; get git.test; exit 7";
    let (socket, lease) = (run.clone(), id.clone());
    let living = std::thread::spawn(move || exec(&socket, &[&lease], &["sh", "-c", script]));
    let at = |step: &str| world.workspace.join(format!("at-{step}"));
    let let_on = |step: &str| fs::write(world.workspace.join(format!("go-{step}")), "").unwrap();
    eventually("the exec begins", || at("begun").exists());
    let immutable = Immutable::make(&world.state().join("db"));
    let_on("begun");
    eventually("both are answered", || at("refused").exists());
    drop(immutable);
    eventually("grants go on", || request(&run).status == 201);
    let_on("refused");
    let answer = living.join().unwrap().ok(200);
    assert_eq!(answer["exit_status"], 7, "{answer}");
    // Only the last: that the state could be written again is the control.
    assert_eq!(answer["stdout"].as_str().unwrap().matches("password=").count(), 1, "{answer}");
    let said = answer["stderr"].as_str().unwrap();
    assert!(said.contains("other.test") && said.contains("audit_unavailable"), "{said}");
    let left = ask(&run, "GET", &format!("/v1/leases/{id}"), None).ok(200);
    assert_eq!(left["uses_left"], 2, "{left}");
    world.call(&["audit", "verify"]).ok();
}

#[test]
#[file_serial(host)]
fn a_database_that_is_gone_stops_grants_for_good() {
    let world = world();
    let broker = serve(&world);
    let run = broker.run_of("alice", "troubled").socket;
    let held = lease(&run);
    let used = InUse::begin(&world, &run);
    std::fs::remove_file(world.state().join("db/sublet.db")).unwrap();
    refuses(&broker, &run, &held, "removed or replaced");
    used.ends_well();
    std::thread::sleep(Duration::from_millis(1500));
    refuses(&broker, &run, &held, "removed or replaced");
    assert!(!world.workspace.join("ran").exists());
    assert!(broker.log().contains("removed or replaced"), "{}", broker.log());
}

#[test]
#[file_serial(host)]
fn an_end_that_is_asked_for_lets_execs_finish_and_grants_nothing() {
    let world = world();
    let mut broker = serve_as(&world, Way { flags: &["--drain", "3s"], ..Way::default() });
    let run = broker.run_of("alice", "troubled").socket;
    let held = lease(&run);
    let used = InUse::begin(&world, &run);
    let socket = run.clone();
    let endless =
        std::thread::spawn(move || exec(&socket, &[], &["sh", "-c", "touch up; sleep 600"]));
    eventually("it runs", || world.workspace.join("up").exists());
    let start = Instant::now();
    broker.terminate();
    eventually("it drains", || request(&run).status == 503);
    request(&run).fails(503, "draining");
    exec(&run, &[&held], &["touch", "ran"]).fails(503, "draining");
    let more = json!({"agent": "a", "principal": "b", "workspace": world.workspace});
    ask(&broker.control, "POST", "/v1/runs", Some(&more)).fails(503, "draining");
    // This one takes a part of its time, and ends as it would have.
    std::thread::sleep(Duration::from_millis(300));
    let ended = used.ends_well();
    assert!(start.elapsed() < Duration::from_secs(3), "too slow to tell");
    let killed = endless.join().unwrap().ok(200);
    let took = start.elapsed();
    assert_eq!(killed["exit_status"], 137, "{killed}");
    assert!((2900..6000).contains(&took.as_millis()), "killed after {took:?}");
    assert_eq!(broker.ended(Duration::from_secs(10)).code(), Some(0));
    drop(broker);
    assert!(!world.workspace.join("ran").exists());
    let trail = world.trail();
    let end_of = |lease: &str| {
        let ends = ["lease.completed", "lease.revoked"];
        let is_it =
            |e: &&Value| e["lease_id"] == lease && ends.contains(&e["type"].as_str().unwrap());
        trail.iter().find(is_it).unwrap()["type"].clone()
    };
    assert_eq!((end_of(&ended), end_of(&held)), (json!("lease.completed"), json!("lease.revoked")));
    assert_eq!(trail.last().unwrap()["type"], "broker.stopped");
    world.call(&["audit", "verify"]).ok();
}

/// The trail's head is kept outside the database, a moment later than what it is the head of; the last one of a
/// service that ends in order is not lost.
#[test]
#[file_serial(host)]
fn the_head_kept_outside_follows_and_is_the_last_at_the_end() {
    let world = world();
    let mut broker = serve_as(&world, Way::default());
    let kept = |world: &World| {
        let head = fs::read_to_string(world.state().join("trail.head")).unwrap_or_default();
        let seq = head.split([' ', ':']).nth(1).and_then(|seq| seq.parse::<u64>().ok());
        seq.unwrap_or_default()
    };
    let run = broker.run_of("alice", "troubled").socket;
    exec(&run, &[], &["true"]).ok(200);
    let last = broker.events(0).last().unwrap()["seq"].as_u64().unwrap();
    eventually("its head is kept", || kept(&world) == last);
    broker.terminate();
    assert_eq!(broker.ended(Duration::from_secs(10)).code(), Some(0));
    drop(broker);
    let events = world.call(&["audit", "list", "--json"]).ok().out();
    let last: Value = serde_json::from_str(events.lines().last().unwrap()).unwrap();
    assert_eq!(last["type"], "broker.stopped");
    assert_eq!(Some(kept(&world)), last["seq"].as_u64());
}

#[test]
#[file_serial(host)]
fn a_second_signal_does_not_wait() {
    let world = world();
    let mut broker = serve_as(&world, Way { flags: &["--drain", "10m"], ..Way::default() });
    let run = broker.run_of("alice", "troubled").socket;
    let socket = run.clone();
    let endless =
        std::thread::spawn(move || exec(&socket, &[], &["sh", "-c", "touch up; sleep 600"]));
    eventually("it runs", || world.workspace.join("up").exists());
    broker.terminate();
    eventually("it drains", || request(&run).status == 503);
    assert!(!endless.is_finished());
    broker.terminate();
    assert_eq!(broker.ended(Duration::from_secs(10)).code(), Some(0));
    // Killed; whether it is told depends on who is faster.
    drop(endless.join());
    eventually("nothing of it lives", || {
        !host::processes()
            .iter()
            .any(|p| p.parent == broker.pid() || p.name == "sleep" && is_ours(p.pid, &world))
    });
}

fn is_ours(pid: u32, world: &World) -> bool {
    std::fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd == world.workspace)
}

/// The middle of some execs' times.
fn usual_time(socket: &Path) -> Duration {
    let mut times: Vec<Duration> = (0..9)
        .map(|_| {
            let start = Instant::now();
            assert_eq!(exec(socket, &[], &["true"]).ok(200)["exit_status"], 0);
            start.elapsed()
        })
        .collect();
    times.sort();
    times[times.len() / 2]
}

#[test]
#[file_serial(host)]
fn who_reads_nothing_or_is_killed_delays_no_one_else() {
    let world = world();
    let broker = serve(&world);
    let [slow, quiet] = ["alice", "bob"].map(|who| broker.run_of(who, "troubled"));
    let alone = usual_time(&quiet.socket);

    // Output without end, of which nobody reads a byte: it waits in the pipe, and the command with it.
    let client = Client::connect(&slow.socket).unwrap();
    let endless = ["sh", "-c", "head -c 64M /dev/zero; touch all-written; sleep 600"];
    let unread: Vec<_> = (0..4).map(|_| client.exec(&ExecBody::of(endless)).unwrap()).collect();
    let beside_unread = usual_time(&quiet.socket);
    assert!(!world.workspace.join("all-written").exists(), "it was kept by someone");
    let memory = std::fs::read_to_string(format!("/proc/{}/status", broker.pid())).unwrap();
    let resident = memory.lines().find(|l| l.starts_with("VmRSS")).unwrap().to_owned();

    // Clients that are killed in mid exec, again and again.
    let marker = format!("killed-client-{}-", std::process::id());
    let report = world.path("reports/killed.json");
    for _ in 0..4 {
        let mut child = world
            .sublet()
            .args(["exec", "--run", slow.run_id.as_str(), "--report"])
            .arg(&report)
            .args(["--", "sh", "-c", "touch up; sleep 600 & sleep 600", &marker])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let up = world.workspace.join("up");
        eventually("it runs", || up.exists());
        let client = host::family(child.id()).len();
        assert_eq!(client, 1, "an exec is no child of its client");
        child.kill().unwrap();
        child.wait().unwrap();
        eventually("the exec dies with its client", || showing(&marker) == 0);
        std::fs::remove_file(up).unwrap();
    }
    let after_kills = usual_time(&quiet.socket);
    println!(
        "an exec alone {alone:?}, beside 4 that nobody reads {beside_unread:?} ({resident}), after killed clients {after_kills:?}"
    );
    // Generous: the machine is shared. A delay by another's client would be seconds, or without end.
    for time in [beside_unread, after_kills] {
        assert!(time < alone * 5 + Duration::from_millis(200), "{alone:?} {time:?}");
    }
    drop(unread);
    eventually("all execs have ended", || {
        let execs = broker.client().execs(None).unwrap();
        execs.iter().all(|e| e.state.as_str() != "running")
    });
}

fn showing(marker: &str) -> usize {
    let shows = |p: &host::Process| {
        std::fs::read(format!("/proc/{}/cmdline", p.pid))
            .is_ok_and(|line| host::contains(&line, marker.as_bytes()))
    };
    host::processes().iter().filter(|p| shows(p)).count()
}
