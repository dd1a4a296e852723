//! The clients against the real broker: runs, leases and execs from the command line and by the library.
#![forbid(unsafe_code)]

mod support;

use std::io::{Read, Write};
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::Value;
use serial_test::file_serial;
use sublet::api::client::{Client, Frame};
use sublet::api::wire::ExecBody;
use sublet::model::exec::ExecState;
use sublet::model::id::RunId;
use support::World;
use support::broker::{Broker, Run, leasing_host, serve};
use support::host::eventually;

const VALUE: &[u8] = b"broker-secret-never-shown-0123456789";

/// The run's execs that live, as the control socket tells them.
fn live(broker: &Broker<'_>, run: &Run<'_>) -> usize {
    let id: RunId = run.id.parse().unwrap();
    let execs = Client::connect(&broker.control).unwrap().execs(Some(&id)).unwrap();
    execs.iter().filter(|exec| exec.state == ExecState::Running).count()
}

#[test]
#[file_serial(host)]
fn runs_start_are_listed_and_end() {
    let world = World::host();
    let profile = leasing_host(&world, VALUE, "");
    let broker = serve(&world);
    let run = broker.start_run(&profile);
    assert_eq!(run.object["state"], "active");
    assert_eq!(run.object["agent"], "bot");
    assert!(run.socket.exists());
    broker.call(&["runs", "list"]).ok().says(&run.id).says("active");

    let ended = broker.call(&["--json", "runs", "end", &run.id]).ok().json();
    assert_eq!(ended["state"], "ended");
    assert!(!run.socket.exists());
    run.exec(&["--", "true"]).exits(125);
    let again = ["--agent", "bot", "--principal", "alice", "--run", &run.id, "--workspace"];
    let again = [&["--json", "runs", "start"], &again[..], &[world.workspace.to_str().unwrap()]];
    let again = error_of(&broker.call(&again.concat()).exits(2).stderr);
    assert_eq!(again["reason"], "conflict", "{again}");
    assert!(again["message"].as_str().unwrap().contains("ended"), "{again}");
    assert!(again["hint"].as_str().unwrap().contains("used once"), "{again}");
    let nope = ["--agent", "bot", "--principal", "alice", "--profile", "nope", "--workspace"];
    let nope = [&["--json", "runs", "start"], &nope[..], &[world.workspace.to_str().unwrap()]];
    let nope = error_of(&broker.call(&nope.concat()).exits(2).stderr);
    assert!(nope["message"].as_str().unwrap().contains("git-push, leasing, strict"), "{nope}");
    let unknown = broker.call(&["--json", "runs", "end", "nobody-1"]).exits(2);
    assert_eq!(error_of(&unknown.stderr)["reason"], "not_found");
}

fn error_of(stderr: &[u8]) -> Value {
    let text = String::from_utf8_lossy(stderr);
    serde_json::from_str::<Value>(&text).unwrap_or_else(|e| panic!("{e}: {text}"))["error"].clone()
}

#[test]
#[file_serial(host)]
fn an_exec_is_relayed_as_by_run() {
    let world = World::host();
    let profile = leasing_host(&world, VALUE, "");
    world.file("text", "just text", 0o644);
    let broker = serve(&world);
    let run = broker.start_run(&profile);

    for status in [0, 1, 42, 125, 255] {
        let outcome = run.exec(&["--", "sh", "-c", &format!("exit {status}")]).exits(status);
        assert_eq!(outcome.report()["exit_status"], status, "{outcome}");
        assert!(outcome.report()["enforced"].is_object(), "{outcome}");
    }
    run.exec(&["--", "sh", "-c", "kill -SEGV $$"]).exits(139);
    run.exec(&["--timeout", "300ms", "--", "sleep", "60"]).exits(124);
    run.exec(&["--", "./text"]).exits(126);
    run.exec(&["--", "no-such-command-anywhere"]).exits(127);
    run.exec(&["--env", "A=b=c", "--", "sh", "-c", "echo $A; echo side >&2"]).ok().prints("b=c\n");

    let input: Vec<u8> = (0..2_000_000_u32).map(|n| (n % 251) as u8).collect();
    let outcome = run.exec_with(&["--", "cat"], &input).ok();
    assert!(outcome.stdout == input, "{} bytes came back", outcome.stdout.len());
    // Its own bytes, and not its terminal's: a report's and a stream's ends are apart.
    run.exec(&["--", "head", "-c", "5000000", "/dev/zero"]).ok();
}

#[test]
#[file_serial(host)]
fn a_leased_exec_has_the_value_and_no_one_else_does() {
    let world = World::host();
    let profile = leasing_host(&world, VALUE, "");
    let broker = serve(&world);
    let run = broker.start_run(&profile);
    let lease = run.lease(",channel=env,uses=2");
    broker.call(&["lease", "list", "--run", &run.id]).ok().says(&lease).says("granted");

    let script = "printf %s \"$TOKEN\" | wc -c; echo $TOKEN";
    let outcome = run.exec(&["--lease", &lease, "--", "sh", "-c", script]).ok();
    outcome.clone().says(&VALUE.len().to_string()).never_says(std::str::from_utf8(VALUE).unwrap());
    assert_eq!(outcome.report()["leases"][0]["lease_id"], lease.as_str(), "{outcome}");
    assert_eq!(outcome.report()["redacted"], 1, "{outcome}");
    let shown = broker.call(&["--json", "lease", "show", &lease]).ok().json();
    assert_eq!(shown["uses_left"], 1);

    run.exec(&["--lease", &lease, "--", "true"]).ok();
    // Its uses are spent.
    run.exec(&["--lease", &lease, "--", "true"]).exits(125);
    // Without it there is nothing.
    run.exec(&["--", "sh", "-c", "test -z \"$TOKEN\""]).ok();
}

#[test]
#[file_serial(host)]
fn a_denial_is_one_with_its_reason_and_a_run_has_only_its_own() {
    let world = World::host();
    let profile = leasing_host(&world, VALUE, "");
    let broker = serve(&world);
    let (run, other) = (broker.start_run(&profile), broker.start_run(&profile));
    let request = |lease: &str| {
        broker.call(&["--json", "lease", "request", lease, "--run", &run.id, "--reason", "a test"])
    };
    let denied = request("test.other@svc.test").exits(1);
    assert_eq!(error_of(&denied.stderr)["reason"], "capability_not_declared");
    let denied = request("test.use@svc.test,ttl=2h").exits(1);
    assert_eq!(error_of(&denied.stderr)["reason"], "ttl_exceeds_policy");
    assert_ne!(error_of(&denied.stderr)["hint"], "");
    request("test.use@svc.test").ok();

    // All or nothing.
    let both = ["test.use@svc.test", "test.other@svc.test"];
    let before = broker.call(&["--json", "lease", "list", "--run", &other.id]).ok().json_lines();
    broker.call(&[&["lease", "request", "--run", &other.id], &both[..]].concat()).exits(1);
    let after = broker.call(&["--json", "lease", "list", "--run", &other.id]).ok().json_lines();
    assert_eq!(before, after);

    // The id of a lease is no authority.
    let lease = run.lease("");
    let socket = other.socket.to_str().unwrap();
    broker.call(&["lease", "show", &lease, "--socket", socket]).exits(1);
    other.exec(&["--lease", &lease, "--", "true"]).exits(125);
    run.exec(&["--lease", &lease, "--", "true"]).ok();
}

#[test]
#[file_serial(host)]
fn what_is_revoked_ends() {
    let world = World::host();
    let profile = leasing_host(&world, VALUE, "renewable = true");
    let broker = serve(&world);
    let run = broker.start_run(&profile);

    let lease = run.lease(",ttl=1m");
    let renewed = broker.call(&["--json", "lease", "renew", &lease, "--ttl", "2m"]).ok().json();
    assert!(renewed["expires_in"].as_u64().unwrap() > 60, "{renewed}");
    let report = world.path("reports/revoked.json");
    let mut child = run
        .prepare(&report, &["--lease", &lease, "--", "sh", "-c", "echo ready; sleep 60"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdout.as_mut().unwrap().read_exact(&mut [0; 6]).unwrap();
    let start = Instant::now();
    let revoked = broker.call(&["--json", "lease", "revoke", &lease, "--reason", "a test"]).ok();
    assert_eq!(revoked.json()["state"], "revoked", "{revoked}");
    assert_eq!(child.wait().unwrap().code(), Some(137));
    assert!(start.elapsed() < Duration::from_secs(5));
    run.exec(&["--lease", &lease, "--", "true"]).exits(125);

    for which in [&["--run", run.id.as_str()][..], &["--principal", "root"], &["--all"]] {
        let lease = run.lease("");
        let revoked = broker.call(&[&["--json", "lease", "revoke"], which].concat()).ok();
        let ids: Vec<Value> = revoked.json_lines().iter().map(|l| l["lease_id"].clone()).collect();
        assert_eq!(ids, [lease.as_str()], "{which:?}: {revoked}");
        broker.call(&[&["lease", "revoke"], which].concat()).ok().says("leases revoked: 0");
    }
    for which in [["--run", "mistyped"], ["--principal", "mistyped"]] {
        let args = [&["lease", "revoke"][..], &which].concat();
        assert_eq!(String::from_utf8_lossy(&broker.call(&args).ok().stdout), "leases revoked: 0\n");
        assert!(broker.call(&[&["--json"], &args[..]].concat()).ok().json_lines().is_empty());
    }
    let lease = run.lease("");
    let one = broker.call(&["lease", "revoke", "--run", &run.id]).ok();
    one.says(&lease).says("leases revoked: 1");
}

#[test]
#[file_serial(host)]
fn an_exec_ends_with_its_client_its_run_and_its_broker() {
    let world = World::host();
    let profile = leasing_host(&world, VALUE, "");
    let mut broker = serve(&world);
    {
        let run = broker.start_run(&profile);
        let start = |name: &str| {
            let mut child = run
                .prepare(&world.path(name), &["--json", "--", "sh", "-c", "echo ready; sleep 60"])
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap();
            child.stdout.as_mut().unwrap().read_exact(&mut [0; 6]).unwrap();
            child
        };
        let mut shot = start("reports/shot.json");
        assert_eq!(live(&broker, &run), 1);
        shot.kill().unwrap();
        shot.wait().unwrap();
        eventually("the exec is dead", || live(&broker, &run) == 0);

        let signalled = start("reports/signalled.json");
        let pid = rustix::process::Pid::from_child(&signalled);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        assert_eq!(signalled.wait_with_output().unwrap().status.code(), Some(143));

        let ended = start("reports/ended.json");
        broker.call(&["runs", "end", &run.id]).ok();
        assert_eq!(ended.wait_with_output().unwrap().status.code(), Some(137));
    }
    let lost = {
        let run = broker.start_run(&profile);
        let mut child = run
            .prepare(
                &world.path("reports/lost.json"),
                &["--json", "--", "sh", "-c", "echo ready; sleep 60"],
            )
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdout.as_mut().unwrap().read_exact(&mut [0; 6]).unwrap();
        child
    };
    broker.shoot();
    let output = lost.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(125));
    assert_eq!(error_of(&output.stderr)["reason"], "exec_lost");
}

#[test]
#[file_serial(host)]
fn a_reader_that_goes_away_ends_a_command_that_never_would() {
    let world = World::host();
    let profile = leasing_host(&world, VALUE, "");
    let broker = serve(&world);
    let run = broker.start_run(&profile);
    let mut child = run
        .prepare(&world.path("reports/yes.json"), &["--", "yes"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut out = child.stdout.take().unwrap();
    out.read_exact(&mut [0; 4]).unwrap();
    drop(out);
    let start = Instant::now();
    // 128 and SIGPIPE: what the command met, or what we did.
    assert_eq!(child.wait().unwrap().code(), Some(141));
    assert!(start.elapsed() < Duration::from_secs(10));
    eventually("the exec is dead", || live(&broker, &run) == 0);
}

#[test]
#[file_serial(host)]
fn a_terminal_is_the_commands_own() {
    let world = World::host();
    let profile = leasing_host(&world, VALUE, "");
    let broker = serve(&world);
    let run = broker.start_run(&profile);
    let script = "test -t 0 && test -t 1 && test -t 2 && stty size && read line && echo got:$line";
    let outcome = run.exec_with(&["-t", "--", "sh", "-c", script], b"hello\n").ok();
    outcome.clone().says("24 80\r\n").says("got:hello\r\n");
    // The end of input is Ctrl-D's.
    run.exec_with(&["-t", "--", "cat"], b"").ok();
}

#[test]
#[file_serial(host)]
fn inside_a_sandbox_of_the_run_its_socket_is_at_its_place() {
    let world = World::host();
    let profile = leasing_host(&world, VALUE, "");
    let broker = serve(&world);
    let run = broker.start_run(&profile);
    world.file("sublet", std::fs::read(support::world::binary()).unwrap(), 0o755);
    let script = "set -e
        sublet=./sublet
        lease=$($sublet lease request test.use@svc.test,channel=env --reason inner)
        $sublet lease list | grep granted
        $sublet exec --lease ${lease%% *} -- sh -c 'printf %s \"$TOKEN\" | wc -c'
        ! $sublet runs list";
    let outcome = world
        .run(&["--run", &run.id, "--agent", "bot", "--profile", &profile, "--", "sh", "-c", script])
        .ok();
    outcome.clone().says(&format!("{}\n", VALUE.len()));
    assert!(outcome.err().contains("this is a sandbox"), "{outcome}");
}

#[test]
#[file_serial(host)]
fn the_library_speaks_to_both_sockets() {
    let world = World::host();
    let profile = leasing_host(&world, VALUE, "");
    let broker = serve(&world);
    let run = broker.start_run(&profile);
    let (agent, control) =
        (Client::connect(&run.socket).unwrap(), Client::connect(&broker.control).unwrap());
    assert_eq!(agent.run().unwrap().run_id.as_str(), run.id);
    assert_eq!(control.health().unwrap()["status"], "ok");
    assert_eq!(control.openapi().unwrap()["openapi"], "3.1.0");
    assert!(control.metrics().unwrap().ends_with("# EOF\n"));
    assert!(control.jwks().unwrap()["keys"].is_array());
    let refused = agent.runs().unwrap_err();
    assert_eq!(refused.refusal().unwrap().reason, "not_found");

    let lease: sublet::model::id::LeaseId = run.lease("").parse().unwrap();
    let envelope: Value = serde_json::from_str(&agent.envelope(&lease).unwrap()).unwrap();
    assert!(envelope["payload"].is_string() && envelope["signatures"].is_array(), "{envelope}");
    let shown = broker.call(&["lease", "show", lease.as_str(), "--envelope"]).ok();
    broker.call_with(&["lease", "verify", "-"], &shown.stdout).ok();
    assert!(!agent.revocation(&lease).unwrap().revoked);
    control.revoke(&lease, &Default::default()).unwrap();
    assert!(control.revocation(&lease).unwrap().revoked);

    let answer = agent.exec_to_end(&ExecBody::of(["sh", "-c", "echo out; echo err >&2; exit 3"]));
    let answer = answer.unwrap();
    assert_eq!((answer.exit_status, answer.stdout.as_str()), (3, "out\n"));
    assert_eq!(answer.stderr, "err\n");
    assert_eq!(control.exec_of(&answer.exec_id).unwrap().exit_status, Some(3));

    let mut exec = agent.exec(&ExecBody::of(["cat"])).unwrap();
    exec.stdin(b"through");
    exec.end_stdin();
    let mut out = Vec::new();
    let exit = loop {
        match exec.next_frame().unwrap().expect("an exit") {
            Frame::Stdout(bytes) => out.write_all(bytes).unwrap(),
            Frame::Exit(exit) => break exit,
            Frame::Started(_) | Frame::Stderr(_) => {}
            Frame::Failed(error) => panic!("{error:?}"),
        }
    };
    assert_eq!((out.as_slice(), exit.exit_status), (&b"through"[..], 0));

    // The trail, and what comes into it while it is followed.
    let mut events = control.events(0, true).unwrap();
    let first: Value = serde_json::from_str(&events.next().unwrap().unwrap()).unwrap();
    assert_eq!(first["seq"], 1);
    let all: Vec<String> = control.events(0, false).unwrap().map(Result::unwrap).collect();
    run.exec(&["--", "true"]).ok();
    let next = events.nth(all.len() - 1).unwrap().unwrap();
    let next: Value = serde_json::from_str(&next).unwrap();
    assert_eq!(next["seq"].as_u64().unwrap(), all.len() as u64 + 1);
    let since = control.events(all.len() as u64, false).unwrap().next().unwrap().unwrap();
    assert_eq!(serde_json::from_str::<Value>(&since).unwrap(), next);
}
