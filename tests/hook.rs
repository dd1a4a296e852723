//! `sublet hook` under a real `runc`: a container gets a run, its socket and the binary, and everything of it
//! ends with it. Whatever goes wrong, the container does not start, the message says why, and nothing is
//! left behind.
#![forbid(unsafe_code)]

mod support;

use std::fs;
use std::process::Command;

use serde_json::{Value, json};
use serial_test::file_serial;
use support::broker::{Broker, leasing_host, serve};
use support::bundle::{Bundle, Runtime, put};
use support::host::Traces;
use support::world::{World, finish};

const VALUE: &str = "hidden-value-4f1d90c2";

fn hook(world: &World, stage: &str, input: &str) -> support::Outcome {
    let mut command = world.sublet();
    command.args(["hook", stage]);
    finish(command, input.as_bytes(), None)
}

fn records(world: &World) -> usize {
    fs::read_dir(world.state().join("run/containers")).map_or(0, Iterator::count)
}

fn active(broker: &Broker<'_>) -> Vec<Value> {
    let runs = broker.call(&["--json", "runs", "list"]).ok().json_lines();
    runs.into_iter().filter(|run| run["state"] == "active").collect()
}

#[test]
#[file_serial(runc)]
fn an_agent_in_a_container_leases_and_executes_and_all_ends_with_it() {
    whole_life(Runtime::Runc);
}

#[test]
#[file_serial(runc)]
fn crun_calls_it_as_runc_does() {
    whole_life(Runtime::Crun);
}

#[track_caller]
fn whole_life(runtime: Runtime) {
    let world = World::host();
    let profile = leasing_host(&world, VALUE.as_bytes(), "");
    let broker = serve(&world);
    let before = Traces::now();
    let script = "
        ls -l /run/sublet /run/sublet/bin; env | grep -c -i token
        lease=$(/run/sublet/bin/sublet --json lease request test.use@svc.test,channel=env,uses=3 |
            grep -o 'lse_[0-9a-f]*' | head -1)
        echo \"lease: $lease\"
        /run/sublet/bin/sublet exec --lease $lease -- sh -c 'echo \"length ${#TOKEN}\"; echo \"$TOKEN\"'
        /run/sublet/bin/sublet runs list; echo \"control: $?\"
        echo x >/run/sublet/bin/sublet; echo \"write: $?\"
        rm /run/sublet/agent.sock; echo \"remove: $?\"
        exec 3<>/proc/self/exe; echo done";
    let mut bundle = Bundle::new(&world, script).with_host_tools().annotated(&profile).by(runtime);
    bundle = bundle.hooked(&[
        "createRuntime",
        "createContainer",
        "startContainer",
        "poststart",
        "poststop",
    ]);
    // The last stage that the container's own root has: sublet as it is in there.
    bundle.config["hooks"]["startContainer"][0]["path"] = "/run/sublet/bin/sublet".into();
    bundle.config["hooks"]["startContainer"][0]["args"] =
        json!(["sublet", "hook", "startContainer"]);
    let outcome = bundle.run().never_says(VALUE);
    let out = outcome.out();
    assert!(out.contains("lease: lse_"), "{outcome}");
    assert!(out.contains("length 21") && out.contains("***"), "{outcome}");
    assert!(out.contains("control: 2") || out.contains("control: 1"), "{outcome}");
    assert!(out.contains("write: 1") || out.contains("write: 2"), "{outcome}");
    assert!(out.contains("remove: 1"), "{outcome}");
    // Ended: the lease with two uses left was taken back, and nothing is left on the host.
    assert_eq!(active(&broker), Vec::<Value>::new());
    assert_eq!(records(&world), 0);
    let types: Vec<Value> = broker.events(0).into_iter().map(|e| e["type"].clone()).collect();
    for wanted in ["run.started", "lease.consumed", "exec.scrubbed", "lease.revoked", "run.ended"] {
        assert!(types.contains(&wanted.into()), "{wanted}: {types:?}");
    }
    assert_eq!(Traces::now(), before);
    assert!(!bundle.root("run/sublet").exists(), "the mount point is gone from the root");
    world.holds_nowhere(VALUE.as_bytes());
    // And the guard: refused before anything of it runs, and nothing stays.
    let mut bundle =
        Bundle::new(&world, "echo ran-inside").annotated(&profile).guarded().by(runtime);
    put(&bundle.root("etc/app.conf"), VALUE);
    // crun shows what a hook says only where it is told to.
    let said = world.path("hook-said");
    bundle.config["annotations"]["run.oci.hooks.stderr"] = json!(said);
    let mut refused = || {
        let refused = bundle.run().never_says("ran-inside").never_says(VALUE);
        let told = refused.err() + &fs::read_to_string(&said).unwrap_or_default();
        assert!(refused.status != Some(0) && told.contains("etc/app.conf"), "{told}{refused}");
        let annotations = bundle.config["annotations"].as_object_mut().unwrap();
        annotations.retain(|key, _| key.starts_with("run.oci."));
    };
    refused();
    assert_eq!((active(&broker).len(), records(&world)), (0, 0));
    // Where no run is wanted, too.
    refused();
}

#[test]
#[file_serial(runc)]
fn the_same_name_again_is_another_run() {
    let world = World::host();
    let profile = leasing_host(&world, VALUE.as_bytes(), "");
    let broker = serve(&world);
    let bundle = Bundle::new(&world, "sleep 60").annotated(&profile).guarded();
    let first = bundle.start();
    let one = active(&broker)[0]["run_id"].clone();
    first.delete();
    let second = bundle.start();
    let other = active(&broker)[0]["run_id"].clone();
    assert_ne!(one, other);
    second.delete();
    assert_eq!(active(&broker), Vec::<Value>::new());
}

#[test]
#[file_serial(runc)]
fn without_a_broker_nothing_starts_and_nothing_is_left() {
    let world = World::host();
    let profile = leasing_host(&world, VALUE.as_bytes(), "");
    let before = Traces::now();
    let bundle = Bundle::new(&world, "echo ran-inside").annotated(&profile).guarded();
    let outcome = bundle.run().never_says("ran-inside");
    assert_ne!(outcome.status, Some(0));
    assert!(outcome.err().contains("broker does not answer"), "{outcome}");
    assert_eq!(bundle.known(), "");
    assert_eq!((records(&world), Traces::now()), (0, before));
    // The control: with it, the same container starts.
    let _broker = serve(&world);
    bundle.run().ok().says("ran-inside");
}

#[test]
#[file_serial(runc)]
fn a_broker_that_dies_meanwhile_ends_the_run_when_it_is_back() {
    let world = World::host();
    let profile = leasing_host(&world, VALUE.as_bytes(), "");
    let mut broker = serve(&world);
    let bundle = Bundle::new(&world, "sleep 60").annotated(&profile).guarded();
    let container = bundle.start();
    assert_eq!(active(&broker).len(), 1);
    broker.shoot();
    container.delete();
    assert_eq!(records(&world), 0, "poststop leaves no record");
    drop(broker);
    let broker = serve(&world);
    assert_eq!(active(&broker), Vec::<Value>::new());
    // And one that lives on keeps its run over a restart.
    let container = bundle.start();
    let id = active(&broker)[0]["run_id"].clone();
    drop(broker);
    let broker = serve(&world);
    assert_eq!(active(&broker)[0]["run_id"], id);
    container.delete();
    assert_eq!(active(&broker), Vec::<Value>::new());
}

#[test]
#[file_serial(runc)]
fn called_twice_and_out_of_order_it_does_what_is_right() {
    let world = World::host();
    let profile = leasing_host(&world, VALUE.as_bytes(), "");
    let broker = serve(&world);
    let bundle = Bundle::new(&world, "sleep 60").annotated(&profile);
    let container = bundle.start();
    let state = bundle.state(container.pid);
    // Before its time: no run yet.
    for early in ["createContainer", "poststart"] {
        hook(&world, early, &state).exits(2).explains("no run");
    }
    hook(&world, "poststop", &state).ok();
    hook(&world, "createRuntime", &state).ok();
    hook(&world, "createRuntime", &state).ok();
    assert_eq!((active(&broker).len(), records(&world)), (1, 1));
    hook(&world, "poststart", &state).ok();
    // In the runtime's own mount namespace nothing is mounted.
    let mounts = Traces::now();
    hook(&world, "createContainer", &state).exits(2).explains("mount namespace");
    assert_eq!(Traces::now(), mounts);
    hook(&world, "poststop", &state).ok();
    hook(&world, "poststop", &state).ok();
    assert_eq!((active(&broker).len(), records(&world)), (0, 0));
    hook(&world, "poststart", &state).exits(2);
}

#[test]
#[file_serial(runc)]
fn a_container_that_dies_between_hooks_leaves_nothing() {
    let world = World::host();
    let profile = leasing_host(&world, VALUE.as_bytes(), "");
    let broker = serve(&world);
    let bundle = Bundle::new(&world, "true").annotated(&profile);
    bundle.write();
    // Its process is gone before the first.
    let mut process = Command::new("sleep").arg("60").spawn().unwrap();
    let state = bundle.state(process.id() as i32);
    hook(&world, "createRuntime", &state).ok();
    assert_eq!(active(&broker).len(), 1);
    let id = active(&broker)[0]["run_id"].as_str().unwrap().to_owned();
    process.kill().unwrap();
    process.wait().unwrap();
    // An exec of its run finds no container, whatever has its number by now.
    let exec = broker.call(&["exec", "--run", &id, "--", "true"]);
    assert_eq!(exec.status, Some(125), "{exec}");
    hook(&world, "createRuntime", &state).exits(2).explains("is gone");
    hook(&world, "poststop", &bundle.state(0)).ok();
    assert_eq!((active(&broker).len(), records(&world)), (0, 0));
}

#[test]
#[file_serial(runc)]
fn what_is_no_state_or_bundle_is_refused_and_leaves_nothing() {
    let world = World::host();
    let profile = leasing_host(&world, VALUE.as_bytes(), "");
    let broker = serve(&world);
    let before = Traces::now();
    let own = std::process::id() as i32;
    let bundle = Bundle::new(&world, "true").annotated(&profile);
    let check = |what: &str, input: &str, names: &str| {
        let outcome = hook(&world, "createRuntime", input).exits(2);
        assert!(outcome.err().contains(names), "{what}: {outcome}");
        assert_eq!((active(&broker).len(), records(&world)), (0, 0), "{what}");
    };
    fs::remove_file(bundle.dir.join("config.json")).unwrap();
    check("no config", &bundle.state(own), "config.json");
    check("nothing", "", "no state");
    check("no pid", &bundle.state(own).replace(&format!("\"pid\":{own},"), ""), "pid");
    let config = bundle.dir.join("config.json");
    for (what, content) in [
        ("cut", "{\"process\":".to_owned()),
        ("no root", json!({ "process": {} }).to_string()),
        ("root of the host", json!({ "process": {}, "root": { "path": "/" } }).to_string()),
        ("root outside", json!({ "process": {}, "root": { "path": "../../.." } }).to_string()),
        (
            "environment of numbers",
            json!({ "process": { "env": [1] }, "root": { "path": "rootfs" } }).to_string(),
        ),
        ("giant", format!("{{\"process\":{{\"env\":[\"A={}\"]}}}}", "x".repeat(17 << 20))),
    ] {
        put(&config, content);
        check(what, &bundle.state(own), "sublet:");
    }
    put(&config, b"{\"process\":{\"env\":[\"A=\xff\"]},\"root\":{\"path\":\"rootfs\"}}");
    check("invalid UTF-8", &bundle.state(own), "no configuration");
    fs::remove_file(&config).unwrap();
    std::os::unix::fs::symlink(world.path("etc/sublet.toml"), &config).unwrap();
    check("a link", &bundle.state(own), "config.json");
    fs::remove_file(&config).unwrap();
    let mut wrong = Bundle::new(&world, "true").annotated("no-such-profile");
    wrong.write();
    check("no such profile", &wrong.state(own), "could not start the run");
    wrong.config["annotations"] = json!({ "dev.sublet.profil": "x" });
    wrong.write();
    check("a mistyped annotation", &wrong.state(own), "dev.sublet.profil");
    wrong.config["annotations"] = json!({ "dev.sublet.profile": profile });
    wrong.write();
    check("no principal", &wrong.state(own), "principal");
    assert_eq!(Traces::now(), before);
}

#[test]
#[file_serial(runc)]
fn a_link_in_the_place_of_its_directory_gets_nothing_mounted() {
    let world = World::host();
    let profile = leasing_host(&world, VALUE.as_bytes(), "");
    let broker = serve(&world);
    let outside = world.path("outside");
    fs::create_dir(&outside).unwrap();
    for (name, target) in [("run", outside.clone()), ("run/sublet", outside.clone())] {
        let bundle = Bundle::new(&world, "echo ran-inside").annotated(&profile).guarded();
        if name == "run" {
            fs::remove_dir(bundle.root("run")).unwrap();
        }
        std::os::unix::fs::symlink(target, bundle.root(name)).unwrap();
        let outcome = bundle.run().never_says("ran-inside");
        assert_ne!(outcome.status, Some(0), "{outcome}");
        assert!(outcome.err().contains("/run/sublet"), "{outcome}");
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
        assert_eq!((active(&broker).len(), records(&world)), (0, 0));
    }
}

#[test]
#[file_serial(runc)]
fn the_hosts_list_of_what_may_be_named_binds() {
    let world = World::host();
    let profile = leasing_host(&world, VALUE.as_bytes(), "");
    let toml = fs::read_to_string(world.path("etc/sublet.toml")).unwrap();
    let with = |lists: &str| world.configure(&format!("{toml}[hook]\n{lists}\n"));
    with("principals = [\"alice\"]");
    let _broker = serve(&world);
    let bundle = Bundle::new(&world, "echo ran-inside").annotated(&profile).guarded();
    let refused = bundle.run().never_says("ran-inside");
    assert!(refused.err().contains("principals"), "{refused}");
    with("principals = [\"alice\", \"root\"]\nprofiles = [\"leasing\"]");
    bundle.run().ok().says("ran-inside");
}

#[test]
#[file_serial(runc)]
fn in_a_user_namespace_it_has_the_same() {
    let world = World::host();
    let profile = leasing_host(&world, VALUE.as_bytes(), "");
    let broker = serve(&world);
    let script = "ls -ln /run/sublet/ /run/sublet/bin; /run/sublet/bin/sublet --json lease request test.use@svc.test";
    let mut bundle = Bundle::new(&world, script).with_host_tools().annotated(&profile).guarded();
    let map = json!([{ "containerID": 0, "hostID": 300_000, "size": 65_536 }]);
    bundle.config["linux"]["uidMappings"] = map.clone();
    bundle.config["linux"]["gidMappings"] = map;
    bundle.config["linux"]["namespaces"].as_array_mut().unwrap().push(json!({ "type": "user" }));
    let chown = Command::new("chown").args(["-R", "300000:300000"]).arg(bundle.root("")).status();
    assert!(chown.unwrap().success());
    let outcome = bundle.run().ok();
    assert!(outcome.out().contains("lse_"), "{outcome}");
    assert_eq!((active(&broker).len(), records(&world)), (0, 0));
}
