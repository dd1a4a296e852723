//! The whole life of a lease in the broker, over its sockets: asked for, denied with each reason, used,
//! renewed, expired, taken back. Every deny test has its allow twin.
#![forbid(unsafe_code)]

mod support;

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use serial_test::file_serial;
use sublet::api::wire::RunObject;
use support::World;
use support::broker::{Broker, serve};
use support::host::eventually;
use support::http::{self, Reply, ask, connect};
use support::leak::{Accomplice, is_wiped, shown, shows, wiped_at};

const VALUE: &[u8] = b"leased-secret-that-comes-and-goes-0002";

/// A capability's table: for `svc.test` and the secret `s`, by `variable`.
fn capability(name: &str, channels: &str, more: &str) -> String {
    format!(
        "[[capability]]\nname = \"{name}\"\nchannels = [{channels}]\n{more}\n\
         [[capability.audience]]\nprotocol = \"https\"\nhost = \"svc.test\"\nsecret = \"s\"\n\
         variable = \"TOKEN\"\n"
    )
}

const ANY: &str = "command = [[\"**\"]]";

/// The profile `leasing`: `test.use`, as the profile of most tests has it, and what `more` adds.
fn profile(more: &[String]) -> String {
    let usual = format!("ttl = \"10m\"\nuses = 5\n{ANY}");
    let first = capability("test.use", "\"memfd\", \"file\", \"env\"", &usual);
    format!("extends = \"default\"\n{first}{}", more.concat())
}

fn secret(name: &str, allow: &str) -> String {
    format!("[secrets.{name}]\nsource = \"vault\"\nallow = [\"{allow}\"]\n")
}

/// A world in which everything may draw on `s`.
fn world(config: &str, more: &[String]) -> World {
    let world = World::host().with_probe();
    let config = format!("{}{config}", secret("s", "*.*@svc.test"));
    support::broker::host(&world, &config, &[("leasing", &profile(more))]);
    world.set_secret("s", VALUE);
    world
}

fn want(capability: &str, more: Value) -> Value {
    let mut body = json!({"capability": capability, "audience": "svc.test"});
    let members = more.as_object().unwrap().clone();
    body.as_object_mut().unwrap().extend(members);
    body
}

fn request(socket: &Path, body: &Value) -> Reply {
    ask(socket, "POST", "/v1/leases", Some(body))
}

#[track_caller]
fn lease(socket: &Path, more: Value) -> String {
    let granted = request(socket, &want("test.use", more)).ok(201);
    granted["lease_id"].as_str().unwrap().to_owned()
}

fn exec(socket: &Path, leases: &[&str], command: &[&str]) -> Reply {
    let body = json!({"lease_ids": leases, "command": command});
    ask(socket, "POST", "/v1/execs", Some(&body))
}

#[track_caller]
fn state(socket: &Path, lease: &str) -> String {
    let shown = ask(socket, "GET", &format!("/v1/leases/{lease}"), None).ok(200);
    shown["state"].as_str().unwrap().to_owned()
}

/// 403, by this name, with words that help.
#[track_caller]
fn denied(reply: &Reply, reason: &str) {
    let error = reply.fails(403, reason);
    assert_ne!(error["hint"], "", "{reply}");
    assert_ne!(error["message"], "", "{reply}");
}

/// The event of this type for this lease, once it is in the trail.
#[track_caller]
fn event(broker: &Broker<'_>, kind: &str, lease: &str) -> Value {
    let mut found = None;
    eventually(&format!("{kind} of {lease}"), || {
        let is_it = |e: &Value| e["type"] == kind && e["lease_id"] == lease;
        found = broker.events(0).into_iter().find(is_it);
        found.is_some()
    });
    found.unwrap()
}

#[test]
fn a_request_is_denied_by_name_and_its_twin_is_granted() {
    let more = [
        capability("needs.leave", "\"env\"", &format!("permission = \"thing:do\"\n{ANY}")),
        capability("by.identity", "\"token\", \"env\"", ANY),
        // Not for this secret's allow list, which names `svc.test` alone.
        format!(
            "[[capability]]\nname = \"no.secret\"\nchannels = [\"env\"]\n{ANY}\n\
             [[capability.audience]]\nhost = \"svc.test\"\nsecret = \"closed\"\nvariable = \"TOKEN\"\n"
        ),
    ];
    let config = format!(
        "{}[ceilings]\nrequests_per_minute = 1000\n[principals.alice]\npermissions = [\"thing:do\"]\n",
        secret("closed", "other.use@svc.test")
    );
    let world = world(&config, &more);
    let broker = serve(&world);
    let alice = broker.run_of("alice", "leasing").socket;
    let bob = broker.run_of("bob", "leasing").socket;
    let other = |audience: &str| json!({"capability": "test.use", "audience": audience});
    let usual = want("test.use", json!({}));
    let cases: [(&str, &Path, Value, &Path, Value); 9] = [
        ("capability_not_declared", &alice, want("no.such", json!({})), &alice, usual.clone()),
        ("audience_not_permitted", &alice, other("else.test"), &alice, usual.clone()),
        ("audience_not_permitted", &alice, other("svc.test:8443"), &alice, usual),
        (
            "channel_mismatch",
            &alice,
            want("test.use", json!({"channel": "git"})),
            &alice,
            want("test.use", json!({"channel": "file"})),
        ),
        (
            "permission_missing",
            &bob,
            want("needs.leave", json!({})),
            &alice,
            want("needs.leave", json!({})),
        ),
        (
            "ttl_exceeds_policy",
            &alice,
            want("test.use", json!({"ttl": 601})),
            &alice,
            want("test.use", json!({"ttl": "10m"})),
        ),
        (
            "uses_exceed_channel",
            &alice,
            want("test.use", json!({"uses": 6})),
            &alice,
            want("test.use", json!({"uses": 5})),
        ),
        (
            "secret_not_allowed",
            &alice,
            want("no.secret", json!({})),
            &alice,
            want("test.use", json!({"channel": "env"})),
        ),
        (
            "identity_not_configured",
            &alice,
            want("by.identity", json!({"channel": "token"})),
            &alice,
            want("by.identity", json!({"channel": "env"})),
        ),
    ];
    for (reason, denied_on, denied_body, granted_on, granted_body) in cases {
        denied(&request(denied_on, &denied_body), reason);
        let granted = request(granted_on, &granted_body).ok(201);
        assert_eq!(granted["state"], "granted", "{reason}: {granted}");
        assert!(!granted.to_string().contains(std::str::from_utf8(VALUE).unwrap()));
    }
}

#[test]
fn a_run_that_another_process_ended_is_not_active() {
    let world = world("", &[]);
    let broker = serve(&world);
    let run = broker.run_of("alice", "leasing");
    lease(&run.socket, json!({}));
    // No way of the interface leads here but a race of `runs end` with a request.
    let db = rusqlite::Connection::open(world.state().join("db/sublet.db")).unwrap();
    db.busy_timeout(Duration::from_secs(5)).unwrap();
    let set = "UPDATE run SET state = 'ended' WHERE run_id = ?1";
    assert_eq!(db.execute(set, [run.run_id.as_str()]).unwrap(), 1);
    drop(db);
    denied(&request(&run.socket, &want("test.use", json!({}))), "run_not_active");
}

#[test]
fn ceilings_deny_a_run_and_not_its_neighbour() {
    for (ceiling, reason) in [
        ("requests_per_minute = 3", "rate_exceeded_minute"),
        ("requests_per_run = 3", "rate_exceeded_run"),
    ] {
        let world = world(&format!("[ceilings]\n{ceiling}\n"), &[]);
        let broker = serve(&world);
        let [run, other] = ["alice", "alice"].map(|who| broker.run_of(who, "leasing").socket);
        for _ in 0..3 {
            lease(&run, json!({}));
        }
        for _ in 0..5 {
            denied(&request(&run, &want("test.use", json!({}))), reason);
        }
        lease(&other, json!({}));
        // Past a ceiling one line tells of all: a run cannot fill the disk.
        let told = broker.events(0).iter().filter(|e| e["reason"] == reason).count();
        assert_eq!(told, 1);
    }
}

#[test]
fn an_exec_is_denied_by_name_and_its_twin_runs() {
    let more = [
        capability("only.true", "\"env\"", "command = [[\"true\"]]"),
        // Nothing was ever set for it.
        format!(
            "[[capability]]\nname = \"no.value\"\nchannels = [\"env\"]\n{ANY}\n\
             [[capability.audience]]\nhost = \"svc.test\"\nsecret = \"unset\"\nvariable = \"TOKEN\"\n"
        ),
        // An environment cannot hold its NUL.
        format!(
            "[[capability]]\nname = \"with.nul\"\nchannels = [\"env\", \"file\"]\n{ANY}\n\
             [[capability.audience]]\nhost = \"svc.test\"\nsecret = \"nul\"\nvariable = \"TOKEN\"\n"
        ),
    ];
    let config = format!(
        "{}{}[ceilings]\nrequests_per_minute = 1000\n",
        secret("unset", "no.value@svc.test"),
        secret("nul", "with.nul@svc.test")
    );
    let world = world(&config, &more);
    world.set_secret("nul", b"\0 a value with a NUL \0");
    let broker = serve(&world);
    let run = broker.run_of("alice", "leasing").socket;
    let lease_of = |capability: &str, more: Value| {
        let granted = request(&run, &want(capability, more)).ok(201);
        granted["lease_id"].as_str().unwrap().to_owned()
    };
    let one = lease_of("only.true", json!({}));
    denied(&exec(&run, &[&one], &["false"]), "command_not_permitted");
    // The refusal has taken nothing.
    assert_eq!(exec(&run, &[&one], &["true"]).ok(200)["exit_status"], 0);

    let one = lease_of("no.value", json!({}));
    denied(&exec(&run, &[&one], &["true"]), "source_unavailable");
    world.set_secret("unset", VALUE);
    let one = lease_of("no.value", json!({}));
    assert_eq!(exec(&run, &[&one], &["true"]).ok(200)["exit_status"], 0);

    let one = lease_of("with.nul", json!({"channel": "env"}));
    denied(&exec(&run, &[&one], &["true"]), "delivery_unavailable");
    let one = lease_of("with.nul", json!({"channel": "file"}));
    assert_eq!(exec(&run, &[&one], &["true"]).ok(200)["exit_status"], 0);
}

#[test]
fn a_protection_that_this_host_lacks_denies() {
    let world = World::host();
    let with = |limit: &str| format!("{}[limits]\n{limit}\n", profile(&[]));
    let config = secret("s", "test.use@svc.test");
    let profiles = [("bound", with("cpu = 0.5")), ("usual", with("open_files = 64"))];
    let profiles = profiles.each_ref().map(|(name, toml)| (*name, toml.as_str()));
    support::broker::host(&world, &config, &profiles);
    world.set_secret("s", VALUE);
    let broker = serve(&world);
    let ran = |profile: &str| {
        let run = broker.run_of("alice", profile).socket;
        exec(&run, &[&lease(&run, json!({}))], &["true"])
    };
    assert_eq!(ran("usual").ok(200)["exit_status"], 0);
    let controllers =
        ["/sys/fs/cgroup/cgroup.controllers", "/sys/fs/cgroup/unified/cgroup.controllers"];
    let found = controllers.iter().find_map(|path| std::fs::read_to_string(path).ok());
    if found.unwrap_or_default().split_whitespace().any(|c| c == "cpu") {
        println!("this host can bound the CPU: nothing is denied");
        assert_eq!(ran("bound").ok(200)["exit_status"], 0);
    } else {
        denied(&ran("bound"), "protection_unavailable");
    }
}

#[test]
fn a_batch_is_granted_whole_or_not_at_all() {
    let more = [format!(
        "[[capability]]\nname = \"other.use\"\nchannels = [\"env\"]\n{ANY}\n\
         [[capability.audience]]\nhost = \"svc.test\"\nsecret = \"s\"\nvariable = \"OTHER\"\n"
    )];
    let world = world("", &more);
    let broker = serve(&world);
    let run = broker.run_of("alice", "leasing").socket;
    let batch = |bodies: &[Value]| {
        ask(&run, "POST", "/v1/leases:batch", Some(&json!({"leases": bodies, "reason": "both"})))
    };
    let (good, second) = (want("test.use", json!({})), want("other.use", json!({})));
    for bad in [want("no.such", json!({})), want("test.use", json!({"uses": 6}))] {
        for both in [[good.clone(), bad.clone()], [bad.clone(), good.clone()]] {
            let reply = batch(&both);
            assert_eq!(reply.status, 403, "{reply}");
        }
    }
    // Two of one place are a batch of which one could not be delivered.
    assert_eq!(batch(&[good.clone(), good.clone()]).status, 403);
    let listed = ask(&run, "GET", "/v1/leases", None).ok(200);
    assert_eq!(listed["leases"], json!([]));
    assert!(broker.events(0).iter().all(|e| e["type"] != "lease.granted"));

    let granted = batch(&[good, second]).ok(201);
    let ids: Vec<&str> = granted["leases"]
        .as_array()
        .unwrap()
        .iter()
        .map(|l| l["lease_id"].as_str().unwrap())
        .collect();
    assert_eq!(ids.len(), 2);
    let script = "test -r /proc/self/fd/$TOKEN_FD && test -n \"$OTHER\"";
    assert_eq!(exec(&run, &ids, &["sh", "-c", script]).ok(200)["exit_status"], 0);
    // An exec has all of its leases or none: the first one here is used up.
    let third = lease(&run, json!({"channel": "file"}));
    assert_eq!(exec(&run, &[&third, ids[1]], &["true"]).status, 403);
    assert_eq!(state(&run, &third), "granted");
}

#[test]
fn another_runs_lease_is_one_that_does_not_exist() {
    let world = world("", &[]);
    let broker = serve(&world);
    let run = broker.run_of("alice", "leasing").socket;
    // Of the same principal: it is the run that counts.
    let other = broker.run_of("alice", "leasing").socket;
    let foreign = lease(&run, json!({}));
    let nowhere = sublet::model::id::LeaseId::fresh().to_string();
    let nowhere = nowhere.as_str();
    for path in ["/v1/leases/ID", "/v1/leases/ID/envelope", "/v1/revocations/ID"] {
        let [a, b] = [foreign.as_str(), nowhere].map(|id| {
            let reply = ask(&other, "GET", &path.replace("ID", id), None);
            (reply.status, reply.json().to_string().replace(id, "ID"))
        });
        if !path.contains("revocations") {
            assert_eq!((a.0, &a), (404, &b), "{path}");
        }
        // Its own run finds it there.
        ask(&run, "GET", &path.replace("ID", &foreign), None).ok(200);
    }
    assert_eq!(ask(&other, "GET", "/v1/leases", None).ok(200)["leases"], json!([]));
    let [a, b] = [foreign.as_str(), nowhere].map(|id| {
        let reply = exec(&other, &[id], &["touch", "ran"]);
        (reply.status, reply.json().to_string().replace(id, "ID"))
    });
    assert_eq!((a.0, &a), (404, &b));
    assert!(!world.workspace.join("ran").exists());
    // Nothing was taken from it.
    assert_eq!(exec(&run, &[&foreign], &["touch", "ran"]).ok(200)["exit_status"], 0);
    assert!(world.workspace.join("ran").exists());
}

#[test]
fn uses_are_spent_one_an_exec_and_the_last_completes() {
    let world = world("", &[]);
    let broker = serve(&world);
    let run = broker.run_of("alice", "leasing").socket;
    let id = lease(&run, json!({"uses": 2, "channel": "env"}));
    for (left, expected) in [(1, "consumed"), (0, "completed")] {
        assert_eq!(exec(&run, &[&id], &["true"]).ok(200)["exit_status"], 0);
        let shown = ask(&run, "GET", &format!("/v1/leases/{id}"), None).ok(200);
        assert_eq!(
            (shown["uses_left"].as_u64(), shown["state"].as_str()),
            (Some(left), Some(expected))
        );
    }
    denied(&exec(&run, &[&id], &["true"]), "lease_not_active");
    let consumed = broker.events(0).iter().filter(|e| e["type"] == "lease.consumed").count();
    assert_eq!(consumed, 2);
    event(&broker, "lease.completed", &id);
}

#[test]
#[file_serial(host)]
fn what_is_not_used_expires_and_no_sweeper_is_needed_for_it() {
    let world = world("[ceilings]\nrequests_per_minute = 1000\n", &[]);
    let broker = serve(&world);
    let run = broker.run_of("alice", "leasing").socket;
    // In time, the twin.
    let id = lease(&run, json!({"ttl": 2, "uses": 2}));
    assert_eq!(exec(&run, &[&id], &["true"]).ok(200)["exit_status"], 0);

    // The sweeper looks twice a second: of some that expire in between, one is asked for before it is told.
    let (mut before_the_sweeper, mut lates) = (0, Vec::new());
    for attempt in 0..8 {
        std::thread::sleep(Duration::from_millis(attempt * 70));
        let asked = Instant::now();
        let id = lease(&run, json!({"ttl": 1}));
        std::thread::sleep(Duration::from_millis(1005).saturating_sub(asked.elapsed()));
        while ask(&run, "GET", &format!("/v1/leases/{id}"), None).ok(200)["expires_in"] != 0 {}
        let reply = exec(&run, &[&id], &["touch", "ran"]);
        assert_eq!(reply.status, 403, "{reply}");
        let expired = event(&broker, "lease.expired", &id);
        // Told of the exec, with all the leases that it was to have.
        let is_it =
            |e: &Value| e["type"] == "lease.denied" && e["detail"]["lease_ids"] == json!([id]);
        let refused = broker.events(0).into_iter().find(is_it).unwrap();
        if refused["seq"].as_u64() < expired["seq"].as_u64() {
            assert_eq!(reply.json()["error"]["reason"], "lease_expired", "{reply}");
            before_the_sweeper += 1;
        }
        let late = millis(&expired["time"]) - millis(&granted_until(&run, &id));
        assert!(late >= 0, "told before its time");
        lates.push(late);
        assert_eq!(state(&run, &id), "expired");
        // After the sweeper it is told as before it.
        denied(&exec(&run, &[&id], &["touch", "ran"]), "lease_expired");
    }
    assert!(before_the_sweeper > 0, "the sweeper was always first");
    lates.sort();
    println!("told so many ms after their expiry: {lates:?}");
    // Half a second between two looks. The middle one: on a busy machine a disk stands still for seconds.
    assert!(lates[lates.len() / 2] < 1000, "{lates:?}");
    assert!(!world.workspace.join("ran").exists());
}

fn granted_until(run: &Path, lease: &str) -> Value {
    ask(run, "GET", &format!("/v1/leases/{lease}"), None).ok(200)["expires_at"].clone()
}

fn millis(time: &Value) -> i64 {
    time.as_str().unwrap().parse::<jiff::Timestamp>().unwrap().as_millisecond()
}

#[test]
fn time_is_added_by_the_control_socket_alone_and_never_past_the_most() {
    let more =
        [capability("renew.me", "\"env\"", &format!("ttl = \"1m\"\nrenewable = true\n{ANY}"))];
    let world = world("[leases]\nmax_ttl = \"90s\"\nauto_renew = false\n", &more);
    let broker = serve(&world);
    let run = broker.run_of("alice", "leasing").socket;
    let id = |reply: Reply| reply.ok(201)["lease_id"].as_str().unwrap().to_owned();
    let renewable = id(request(&run, &want("renew.me", json!({"ttl": 30}))));
    let fixed = id(request(&run, &want("test.use", json!({"ttl": 30}))));
    let renew = |socket: &Path, lease: &str, body: Value| {
        ask(socket, "POST", &format!("/v1/leases/{lease}/renew"), Some(&body))
    };
    renew(&run, &renewable, json!({"ttl": 60})).fails(404, "not_found");
    renew(&broker.control, &fixed, json!({"ttl": 60})).fails(409, "conflict");
    renew(&broker.control, &renewable, json!({"ttl": 61})).fails(409, "conflict");
    renew(&broker.control, &renewable, json!({"ttl": 10})).fails(409, "conflict");
    let renewed = renew(&broker.control, &renewable, json!({"ttl": 60})).ok(200);
    let left = renewed["expires_in"].as_u64().unwrap();
    assert!((55..=60).contains(&left), "{renewed}");
    event(&broker, "lease.renewed", &renewable);
    // In all no more than 90 s from the grant; then there is nothing to add.
    std::thread::sleep(Duration::from_millis(1100));
    for _ in 0..40 {
        let reply = renew(&broker.control, &renewable, json!({"ttl": 60}));
        if reply.status == 409 {
            break;
        }
        let span = millis(&reply.json()["expires_at"]) - millis(&reply.json()["issued_at"]);
        assert!(span <= 90_000, "{reply}");
    }
    // One that has ended gets no time.
    ask(&broker.control, "POST", &format!("/v1/leases/{renewable}/revoke"), Some(&json!({})))
        .ok(200);
    renew(&broker.control, &renewable, json!({})).fails(409, "conflict");
    assert_eq!(state(&run, &renewable), "revoked");
}

/// A leased exec that has passed its memfd out and goes on.
struct InUse {
    lease: String,
    memfd: File,
    exec: JoinHandle<Reply>,
}

impl InUse {
    /// Of the capability; the command then waits until the file `go` is in the workspace.
    #[track_caller]
    fn of(run: &Path, accomplice: &Accomplice, capability: &str, more: Value) -> Self {
        let granted = request(run, &want(capability, more)).ok(201);
        let lease = granted["lease_id"].as_str().unwrap().to_owned();
        let script = format!(
            "{} >/dev/null; until test -e go; do sleep 0.05; done; echo went",
            accomplice.pass_memfd()
        );
        let (socket, id) = (run.to_owned(), lease.clone());
        let exec = std::thread::spawn(move || exec(&socket, &[&id], &["sh", "-c", &script]));
        let memfd = accomplice.take();
        // Else nothing that follows proves anything.
        assert!(shows(&memfd, VALUE), "{:?}", shown(&memfd, 40));
        Self { lease, memfd, exec }
    }

    /// The exec's answer.
    #[track_caller]
    fn finish(self) -> Value {
        self.exec.join().unwrap().ok(200)
    }
}

#[test]
#[file_serial(host)]
fn a_living_exec_keeps_its_lease_until_the_most_that_it_may_last() {
    let usual = format!("ttl = \"2s\"\nuses = 2\n{ANY}");
    let more = [
        capability(
            "kept.use",
            "\"memfd\"",
            &format!("renewable = true\non_revoke = \"wipe\"\n{usual}"),
        ),
        capability("short.use", "\"memfd\"", &format!("on_revoke = \"wipe\"\n{usual}")),
    ];
    let config = "[leases]\nmax_ttl = \"5s\"\nauto_renew = true\nrenew_before_expiry = \"1s\"\n";
    let world = world(config, &more);
    let accomplice = Accomplice::at(&world, "holder.sock");
    let broker = serve(&world);
    let run = broker.run_of("alice", "leasing").socket;

    // The control: what is not renewable is wiped at its first expiry.
    let before = Instant::now();
    let short = InUse::of(&run, &accomplice, "short.use", json!({}));
    let wiped = wiped_at(&short.memfd) - before;
    println!("not renewable: wiped {wiped:?} after it was asked for");
    assert!((1900..4000).contains(&wiped.as_millis()), "{wiped:?}");

    let before = Instant::now();
    let kept = InUse::of(&run, &accomplice, "kept.use", json!({}));
    let wiped = wiped_at(&kept.memfd) - before;
    println!("renewed by itself: wiped {wiped:?} after it was asked for");
    assert!((4900..7000).contains(&wiped.as_millis()), "{wiped:?}");
    let renewed = event(&broker, "lease.renewed", &kept.lease);
    assert_eq!(renewed["reason"], "auto_renew");
    std::fs::write(world.workspace.join("go"), "").unwrap();
    for exec in [short, kept] {
        let lease = exec.lease.clone();
        let answer = exec.finish();
        assert_eq!(answer["stdout"], "went\n", "{answer}");
        assert_eq!(state(&run, &lease), "expired");
        event(&broker, "lease.expired", &lease);
    }
}

/// What is revoked, and how it is asked for.
fn revocation(by: &str, run: &RunObject, lease: &str) -> (String, Value) {
    match by {
        "lease" => (format!("/v1/leases/{lease}/revoke"), json!({"reason": "a test"})),
        "run" => ("/v1/revocations".to_owned(), json!({"run_id": run.run_id})),
        "principal" => ("/v1/revocations".to_owned(), json!({"principal": "alice"})),
        "all" => ("/v1/revocations".to_owned(), json!({"all": true})),
        other => panic!("{other}"),
    }
}

#[test]
#[file_serial(host)]
fn what_is_revoked_in_use_is_wiped_at_once() {
    let more = [
        capability("kill.use", "\"memfd\"", &format!("on_revoke = \"kill\"\n{ANY}")),
        capability("wipe.use", "\"memfd\"", &format!("on_revoke = \"wipe\"\n{ANY}")),
    ];
    let world = world("[ceilings]\nrequests_per_minute = 1000\n", &more);
    let accomplice = Accomplice::at(&world, "holder.sock");
    let broker = serve(&world);
    let run = broker.run_of("alice", "leasing");
    let other = broker.run_of("bob", "leasing");
    let go = world.workspace.join("go");
    for by in ["lease", "run", "principal", "all"] {
        for capability in ["kill.use", "wipe.use"] {
            let used = InUse::of(&run.socket, &accomplice, capability, json!({}));
            let spared = InUse::of(&other.socket, &accomplice, capability, json!({}));
            let (path, body) = revocation(by, &run, &used.lease);
            let control: PathBuf = broker.control.clone();
            let memfd = used.memfd.try_clone().unwrap();
            let watching = std::thread::spawn(move || wiped_at(&memfd));
            let start = Instant::now();
            let reply = ask(&control, "POST", &path, Some(&body)).ok(200);
            let acknowledged = start.elapsed();
            // No later than it is told.
            assert!(is_wiped(&used.memfd), "by {by}: acknowledged, and still readable");
            let wiped = watching.join().unwrap() - start;
            println!("by {by}, {capability}: wiped after {wiped:?}, told after {acknowledged:?}");
            assert!(wiped < Duration::from_millis(100), "by {by}: {wiped:?}");
            assert!(reply.to_string().contains(&used.lease), "by {by}: {reply}");
            assert_eq!(state(&run.socket, &used.lease), "revoked");
            // The neighbour's is left, unless all are meant.
            assert_eq!(shows(&spared.memfd, VALUE), by != "all", "by {by}");
            assert_eq!(state(&other.socket, &spared.lease) == "revoked", by == "all");

            let lease = used.lease.clone();
            if capability == "kill.use" {
                let answer = used.finish();
                assert_eq!(answer["exit_status"], 137, "{answer}");
                std::fs::write(&go, "").unwrap();
            } else {
                std::thread::sleep(Duration::from_millis(200));
                assert!(!used.exec.is_finished(), "a wipe does not kill");
                std::fs::write(&go, "").unwrap();
                let answer = used.finish();
                assert_eq!(
                    (&answer["exit_status"], &answer["stdout"]),
                    (&json!(0), &json!("went\n"))
                );
            }
            let survives = by != "all" || capability == "wipe.use";
            assert_eq!(spared.finish()["exit_status"] == 0, survives, "by {by}");
            std::fs::remove_file(&go).unwrap();
            denied(&exec(&run.socket, &[&lease], &["true"]), "lease_not_active");
            event(&broker, "lease.revoked", &lease);
        }
    }
}

/// The exec's own thread is busy: with a source that takes its time, or with a helper that says nothing.
#[test]
#[file_serial(host)]
fn a_revocation_waits_for_no_busy_exec() {
    let capabilities = [
        capability("kill.use", "\"memfd\"", &format!("on_revoke = \"kill\"\n{ANY}")),
        capability("wipe.use", "\"memfd\"", &format!("on_revoke = \"wipe\"\n{ANY}")),
        format!(
            "[[capability]]\nname = \"slow.git\"\nchannels = [\"git\"]\n{ANY}\n[[capability.audience]]\n\
             protocol = \"https\"\nhost = \"svc.test\"\nsecret = \"slow\"\n"
        ),
    ];
    let config = "[secrets.slow]\nsource = \"command\"\nallow = [\"slow.git@svc.test\"]\n\
                  command = [\"/bin/sh\", \"-c\", \"sleep 4; echo '{\\\"value\\\":\\\"minted\\\"}'\"]\n";
    let world = world(config, &capabilities);
    let accomplice = Accomplice::at(&world, "holder.sock");
    let broker = serve(&world);
    let run = broker.run_of("alice", "leasing");
    let up = world.workspace.join("up");
    let fetch = "touch up; printf 'protocol=https\\nhost=svc.test\\n\\n' | git credential fill";
    let silence = "./probe hold /run/sublet/git.sock up";
    for (capability, busy) in
        [("wipe.use", fetch), ("kill.use", fetch), ("wipe.use", silence), ("kill.use", silence)]
    {
        let [id, slow] = [capability, "slow.git"].map(|capability| {
            let granted = request(&run.socket, &want(capability, json!({}))).ok(201);
            granted["lease_id"].as_str().unwrap().to_owned()
        });
        let script =
            format!("{} >/dev/null; {busy} >/dev/null 2>&1; echo went", accomplice.pass_memfd());
        let (socket, ids) = (run.socket.clone(), [id.clone(), slow]);
        let exec = std::thread::spawn(move || {
            exec(&socket, &ids.each_ref().map(String::as_str), &["sh", "-c", &script])
        });
        let memfd = accomplice.take();
        eventually("it is busy", || up.exists());
        std::thread::sleep(Duration::from_millis(100));
        assert!(shows(&memfd, VALUE));
        let start = Instant::now();
        let path = format!("/v1/leases/{id}/revoke");
        ask(&broker.control, "POST", &path, Some(&json!({}))).ok(200);
        assert!(is_wiped(&memfd), "{capability}, {busy}: acknowledged, and still readable");
        let told = start.elapsed();
        assert!(told < Duration::from_secs(1), "{told:?}");
        let answer = exec.join().unwrap().ok(200);
        let took = start.elapsed();
        println!("{capability} beside {busy:?}: told after {told:?}, over after {took:?}");
        if capability == "kill.use" {
            assert_eq!(answer["exit_status"], 137, "{answer}");
            assert!(took < Duration::from_millis(3500), "{took:?}");
        } else {
            assert_eq!(answer["stdout"], "went\n", "{answer}");
        }
        std::fs::remove_file(&up).unwrap();
    }
}

/// In the broker as in `sublet run`, whose filter and user are others: the pipe of a leased command's output is
/// written over at its end, and of one without a lease there is no need to.
#[test]
#[file_serial(host)]
fn the_pipe_of_a_leased_output_is_written_over() {
    let world = world("", &[]);
    let accomplice = Accomplice::at(&world, "holder.sock");
    let broker = serve(&world);
    let run = broker.run_of("alice", "leasing");
    let lease = lease(&run.socket, json!({}));
    let left = |leases: &[&str]| {
        // Its other end, opened anew: read when all is over.
        let script = "echo said; exec ./probe leak-fd 3 holder.sock 3</proc/self/fd/1";
        exec(&run.socket, leases, &["sh", "-c", script]).ok(200);
        let mut pages = Vec::new();
        accomplice.take().read_to_end(&mut pages).unwrap();
        pages
    };
    assert_eq!(left(&[]), b"");
    assert_eq!(left(&[&lease]), [0; 8192]);
}

/// What git was given is wiped by who revokes, though the exec's own thread waits for a helper that says nothing.
#[test]
#[file_serial(host)]
fn a_revocation_wipes_what_git_was_given_at_once() {
    let git = format!(
        "[[capability]]\nname = \"repo.push\"\nchannels = [\"git\"]\nuses = 5\non_revoke = \"wipe\"\n{ANY}\n\
         [[capability.audience]]\nprotocol = \"https\"\nhost = \"svc.test\"\nsecret = \"s\"\n"
    );
    let world = world("", &[git]);
    let accomplice = Accomplice::at(&world, "holder.sock");
    let broker = serve(&world);
    let run = broker.run_of("alice", "leasing");
    let granted = request(&run.socket, &want("repo.push", json!({"uses": 3}))).ok(201);
    let id = granted["lease_id"].as_str().unwrap().to_owned();
    let script = "import socket, subprocess\n\
                  s = socket.socket(socket.AF_UNIX)\n\
                  s.connect('/run/sublet/git.sock')\n\
                  s.send(b'get\\nprotocol=https\\nhost=svc.test\\ncapability[]=sublet-memfd\\n\\n')\n\
                  _, fds, _, _ = socket.recv_fds(s, 4096, 1)\n\
                  h = socket.socket(socket.AF_UNIX)\n\
                  h.connect('holder.sock')\n\
                  socket.send_fds(h, [b'x'], fds)\n\
                  subprocess.run(['./probe', 'hold', '/run/sublet/git.sock', 'up'])";
    // git itself, by our helper.
    let fill = "printf 'protocol=https\nhost=svc.test\n\n' | git credential fill";
    let filled = exec(&run.socket, &[&id], &["sh", "-c", fill]).ok(200);
    assert!(filled["stdout"].as_str().unwrap().contains("password=***\n"), "{filled}");
    let (socket, lease) = (run.socket.clone(), id.clone());
    let living = std::thread::spawn(move || exec(&socket, &[&lease], &["python3", "-c", script]));
    let memfd = accomplice.take();
    eventually("the exec's thread waits", || world.workspace.join("up").exists());
    let lines = [&b"username=x-access-token\npassword="[..], VALUE, b"\n"].concat();
    assert!(shows(&memfd, &lines), "{:?}", String::from_utf8_lossy(&shown(&memfd, 200)));
    let path = format!("/v1/leases/{id}/revoke");
    ask(&broker.control, "POST", &path, Some(&json!({}))).ok(200);
    assert!(is_wiped(&memfd), "acknowledged, and still readable");
    assert_eq!(state(&broker.control, &id), "revoked");
    ask(&broker.control, "DELETE", &format!("/v1/runs/{}", run.run_id), None).ok(200);
    living.join().unwrap();
    assert_eq!(state(&broker.control, &id), "revoked");
}

#[test]
#[file_serial(host)]
fn a_run_that_ends_takes_all_along() {
    let more = [capability("wipe.use", "\"memfd\"", &format!("on_revoke = \"wipe\"\n{ANY}"))];
    let world = world("", &more);
    let accomplice = Accomplice::at(&world, "holder.sock");
    let broker = serve(&world);
    let run = broker.run_of("alice", "leasing");
    let other = broker.run_of("alice", "leasing");
    let idle = lease(&run.socket, json!({}));
    // Even one that a revocation would only wipe is killed, and one without a lease.
    let used = InUse::of(&run.socket, &accomplice, "wipe.use", json!({}));
    let socket = run.socket.clone();
    let bare = std::thread::spawn(move || exec(&socket, &[], &["sh", "-c", "touch up; sleep 600"]));
    eventually("the bare one runs", || world.workspace.join("up").exists());
    let spared = InUse::of(&other.socket, &accomplice, "wipe.use", json!({}));

    let ended = ask(&broker.control, "DELETE", &format!("/v1/runs/{}", run.run_id), None).ok(200);
    assert_eq!(ended["state"], "ended");
    assert!(is_wiped(&used.memfd));
    assert!(!run.socket.exists());
    assert_eq!(bare.join().unwrap().ok(200)["exit_status"], 137);
    for lease in [&idle, &used.lease] {
        assert_eq!(state(&broker.control, lease), "revoked");
        event(&broker, "lease.revoked", lease);
    }
    assert_eq!(used.finish()["exit_status"], 137);
    assert!(shows(&spared.memfd, VALUE));
    std::fs::write(world.workspace.join("go"), "").unwrap();
    assert_eq!(spared.finish()["exit_status"], 0);
}

/// Neither spins: what stands ready is made once, then both wait.
#[test]
#[file_serial(host)]
fn a_broker_with_nothing_to_do_sleeps() {
    let world = world("", &[]);
    let broker = serve(&world);
    let run = broker.run_of("alice", "leasing");
    let lease = lease(&run.socket, json!({}));
    let (service, launcher) = broker.parts();
    // Of both, as they are shown by the kernel: hundredths of a second.
    let spent = || -> u64 {
        let of = |pid: u32| {
            let stat = procfs::process::Process::new(pid as i32).unwrap().stat().unwrap();
            stat.utime + stat.stime
        };
        of(service.pid) + of(launcher.pid)
    };
    let sleeps = || {
        // Longer than what is made ready takes to begin.
        std::thread::sleep(Duration::from_millis(200));
        let before = spent();
        std::thread::sleep(Duration::from_millis(800));
        let took = spent() - before;
        assert!(took < 20, "{took} of 80 hundredths of a second");
    };
    sleeps();
    exec(&run.socket, &[&lease], &["true"]).ok(200);
    sleeps();
    // While a command lives, too.
    let socket = run.socket.clone();
    let living = std::thread::spawn(move || exec(&socket, &[], &["sh", "-c", "touch up; sleep 2"]));
    eventually("it lives", || world.workspace.join("up").exists());
    sleeps();
    living.join().unwrap().ok(200);
}

/// Their descriptors are the launcher's, which a child that is cloned beside them shares at first.
#[test]
#[file_serial(host)]
fn beside_many_execs_a_new_one_has_its_own_descriptors_alone() {
    const MANY: usize = 80;
    let world = world("", &[]);
    let broker = serve(&world);
    let run = broker.run_of("alice", "leasing");
    let lease = lease(&run.socket, json!({"uses": 5}));
    let (_, launcher) = broker.parts();
    let inits = || {
        let all = support::host::processes().into_iter();
        all.filter(|p| p.parent == launcher.pid).collect::<Vec<_>>()
    };
    let descriptors = || {
        let script = "cd /proc/self/fd && echo *; cat <&$TOKEN_FD | wc -c";
        exec(&run.socket, &[&lease], &["sh", "-c", script]).ok(200)["stdout"].clone()
    };
    let alone = descriptors();
    // A run has so many connections and no more.
    let runs: Vec<_> = (0..MANY / 20).map(|_| broker.run_of("alice", "leasing")).collect();
    let sleeping = json!({"lease_ids": [], "command": ["sleep", "600"]});
    let mut living = Vec::new();
    for run in &runs {
        living.extend((0..20).map(|_| {
            let mut stream = connect(&run.socket);
            let request = http::request("POST", "/v1/execs", Some(&sleeping));
            stream.write_all(request.as_bytes()).unwrap();
            stream
        }));
        eventually("they live", || inits().len() >= living.len());
    }
    for _ in 0..3 {
        assert_eq!(descriptors(), alone);
    }
    for init in inits() {
        let open =
            || std::fs::read_dir(format!("/proc/{}/fd", init.pid)).map_or(0, Iterator::count);
        // Socket, lifeline, uid lock, signals; one that stands ready has its root, /proc and /dev/pts instead of those.
        eventually("an init has closed what is not its own", || open() <= 6);
    }
    // Had one of them another's lifeline, that one would live on.
    let before = inits();
    support::host::signal(&launcher, rustix::process::Signal::KILL);
    eventually("all end with their launcher", || !before.iter().any(|init| init.is_alive()));
    drop(living);
}
