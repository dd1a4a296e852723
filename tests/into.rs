//! An exec in a running container has its file system and its network, under walls of its own: nothing in
//! the container sees the exec, or what is delivered to it, and nothing of the container leads it astray.
#![forbid(unsafe_code)]

mod support;

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::process::Command;

use base64::Engine as _;
use serde_json::json;
use serial_test::file_serial;
use support::broker::{leasing_host, serve};
use support::bundle::{Bundle, put};
use support::world::{ORDINARY, World, finish, leasing_profile, vault_secret};

const VALUE: &str = "hidden-value-4f1d90c2";
const SLEEP: &str = "while :; do sleep 1; done";

/// `sublet run --into PID` with these flags and this script.
fn into(world: &World, pid: i32, flags: &[&str], script: &str) -> support::Outcome {
    let pid = pid.to_string();
    let mut args = vec!["--into", &pid];
    args.extend(flags);
    args.extend(["--", "sh", "-c", script]);
    world.run(&args)
}

#[test]
#[file_serial(runc)]
fn it_has_the_containers_files_and_network_and_namespaces_of_its_own() {
    let world = World::host();
    let bundle = Bundle::new(&world, SLEEP);
    put(&bundle.root("etc/of-the-container"), "yes");
    let container = bundle.start();
    let of = |what: &str| {
        let link = fs::read_link(format!("/proc/{}/ns/{what}", container.pid)).unwrap();
        link.to_str().unwrap().to_owned()
    };
    let seen = into(
        &world,
        container.pid,
        &[],
        "cat /etc/of-the-container; pwd; touch made; for n in mnt net pid ipc; do readlink /proc/self/ns/$n; done",
    )
    .ok();
    let out = seen.out();
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!(lines[0], "yes/work");
    assert_eq!(lines[2], of("net"), "{seen}");
    assert_ne!(lines[2], fs::read_link("/proc/self/ns/net").unwrap().to_str().unwrap());
    for (line, own) in [(1, "mnt"), (3, "pid"), (4, "ipc")] {
        assert_ne!(lines[line], of(own), "{seen}");
    }
    // Its own walls stand there as everywhere.
    // Where Landlock is older, another mechanism stands and the report names the lack.
    let is_whole = sublet::sys::landlock::abi_version() >= 6;
    for effect in ["filesystem", "host_processes", "privileges", "system_calls", "tree_death"] {
        let enforced = seen.enforced(effect);
        let lacks = enforced["missing"].as_array().unwrap();
        let landlocks = lacks.iter().all(|lack| lack.as_str().unwrap().starts_with("landlock "));
        let is_full = enforced["status"] == "full";
        assert!(is_full || (!is_whole && enforced["status"] == "partial" && landlocks), "{seen}");
    }
    assert_eq!(seen.enforced("network")["by"][0], "container_network_namespace");
    // The host's abstract sockets are another namespace's.
    let by = seen.enforced("abstract_sockets")["by"].clone();
    assert_eq!(by[0], "container_network_namespace", "{seen}");
    // What it made is the container's, of the workspace's owner.
    use std::os::unix::fs::MetadataExt;
    assert_eq!(fs::metadata(bundle.root("work/made")).unwrap().uid(), 1000);
    // Nothing of it but the workspace can be written, and its own run, dev and proc are not there.
    for script in ["touch /bin/x", "touch /etc/x", "touch /x", "mkdir /usr"] {
        assert_ne!(into(&world, container.pid, &[], script).status, Some(0), "{script}");
    }
    let none =
        into(&world, container.pid, &["--network", "none"], "readlink /proc/self/ns/net").ok();
    assert_ne!(none.line(), of("net"), "narrowed");
}

#[test]
#[file_serial(runc)]
fn nothing_in_the_container_sees_it_or_its_delivery() {
    let world = World::host();
    let profile = world.leasing(VALUE.as_bytes());
    let bundle = Bundle::new(&world, SLEEP);
    let container = bundle.start();
    let pid = container.pid.to_string();
    let args = |channel: &str, script: &str| {
        let lease = format!("--lease=test.use@svc.test,channel={channel}");
        ["--into", &pid, "--profile", &profile, &lease, "--", "sh", "-c", script].map(str::to_owned)
    };
    // Everything that a process of the container can look at: other processes, files, mounts.
    // Neither the value nor its name is spelt in it: its own command line is among what it sees.
    let encoded = base64::engine::general_purpose::STANDARD.encode(VALUE);
    let look = format!(
        "ps; cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline /proc/[0-9]*/mountinfo; \
         find / -name 'TO?EN'; v=$(echo {encoded} | base64 -d); grep -rl $v /work /tmp /run /dev/shm"
    );
    for (channel, script) in [
        ("file", "cat \"$TOKEN_FILE\" >/dev/null; echo marker-of-the-exec; sleep 30"),
        ("memfd", "cat <&$TOKEN_FD >/dev/null; echo marker-of-the-exec; sleep 30"),
        ("env", ": $TOKEN; echo marker-of-the-exec; sleep 30"),
    ] {
        let args = args(channel, script);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let mut running = world.spawn(&args);
        assert_eq!(running.read_line(), "marker-of-the-exec");
        let seen = container.exec(&look);
        assert!(!seen.out().contains(VALUE), "{channel}: {seen}");
        assert!(!seen.out().contains("marker-of-the-exec"), "{channel}: {seen}");
        assert!(!seen.out().contains("TOKEN"), "{channel}: {seen}");
        running.shoot();
    }
    // The control: what runc itself puts beside it shows at once.
    let beside = format!(
        "v=$(echo {encoded} | base64 -d); TOKEN=$v sleep 20 & p=$!; sleep 1; {look}; kill $p"
    );
    let seen = container.exec(&beside);
    assert!(seen.out().contains(VALUE), "{seen}");
    world.holds_nowhere(VALUE.as_bytes());
}

#[test]
#[file_serial(runc)]
fn it_answers_as_docker_exec_does() {
    let world = World::host();
    let bundle = Bundle::new(&world, SLEEP);
    let container = bundle.start();
    let run = |flags: &[&str], script: &str| into(&world, container.pid, flags, script);
    run(&[], "exit 7").exits(7);
    run(&[], "kill -9 $$").exits(137);
    run(&["--timeout", "1s"], "sleep 20").exits(124);
    let pid = container.pid.to_string();
    world.run(&["--into", &pid, "--", "/none"]).exits(127);
    world.run(&["--into", &pid, "--", "/etc/passwd"]).exits(126);
    run(&["-w", "/etc"], "pwd").ok().prints("/etc\n");
    run(&["-u", "1000:1000"], "id -u; id -g").ok().prints("1000\n1000\n");
    run(&["--user", "0"], "id -u; touch /etc/x; echo $?").ok().says("0\n1\n");
    run(&["-t"], "test -t 0 && test -t 1 && echo terminal").ok().says("terminal");
    run(&[], "test -t 0 || echo none").ok().prints("none\n");
    // Its environment is the profile's and not the container's.
    run(&[], "env").ok().never_says("TERM=xterm");
    run(&["--workspace", "/etc/none"], "true").exits(125);
    run(&["--workspace", "../x"], "true").exits(125);
    run(&["-u", "5:5", "-w", "relative"], "true").exits(125);
}

#[test]
#[file_serial(runc)]
fn only_root_enters_and_only_a_container() {
    let world = World::host();
    let bundle = Bundle::new(&world, SLEEP);
    let container = bundle.start();
    let own = std::process::id() as i32;
    into(&world, own, &["--workspace", "/"], "true").fails_naming(&["no container"]);
    into(&world, i32::MAX, &["--workspace", "/"], "true").fails_naming(&["no process"]);
    into(&world, 1, &["--workspace", "/"], "true").exits(125);
    let user = World::new(ORDINARY, ORDINARY);
    into(&user, container.pid, &["--workspace", "/work"], "id").exits(125).never_says("uid=");
    into(&world, container.pid, &["--workspace", "/work"], "id").ok().says("uid=");
    let pid = container.pid;
    container.delete();
    into(&world, pid, &["--workspace", "/work"], "true").exits(125);
}

#[test]
#[file_serial(runc)]
fn an_image_leads_it_nowhere() {
    let world = World::host();
    let secret = world.path("of-the-host");
    fs::create_dir(&secret).unwrap();
    put(&secret.join("passwd"), "the host's");
    // A root whose names are links out of it, a workspace that is one, devices, a socket, odd names.
    let bundle = Bundle::new(&world, SLEEP);
    fs::remove_dir_all(bundle.root("etc")).unwrap();
    symlink(&secret, bundle.root("etc")).unwrap();
    symlink(&secret, bundle.root("srv")).unwrap();
    symlink("/proc/self/root", bundle.root("opt")).unwrap();
    fs::remove_dir(bundle.root("work")).unwrap();
    symlink("/etc", bundle.root("work")).unwrap();
    fs::create_dir(bundle.root("home")).unwrap();
    put(&bundle.root("a\nname"), "");
    let mode = rustix::fs::Mode::from(0o666);
    let null = rustix::fs::makedev(1, 3);
    let kind = rustix::fs::FileType::CharacterDevice;
    rustix::fs::mknodat(rustix::fs::CWD, bundle.root("null"), kind, mode, null).unwrap();
    let mut bundle = bundle;
    bundle.config["process"]["cwd"] = "/".into();
    let container = bundle.start();
    let before = fs::read_dir(&secret).unwrap().count();
    // Through a link it is refused; a plain one is taken, and no link shows the host.
    into(&world, container.pid, &["--workspace", "/work"], "true").exits(125);
    for script in ["cat /etc/passwd", "cat /srv/passwd", "ls /opt/home/../../../etc"] {
        into(&world, container.pid, &["--workspace", "/"], script).never_says("the host's");
    }
    assert_eq!(fs::read_dir(&secret).unwrap().count(), before, "nothing was written there");
    let seen = into(&world, container.pid, &["--workspace", "/home"], "test -e /null || echo gone");
    if seen.status == Some(0) {
        seen.says("gone");
    }
}

#[test]
#[file_serial(runc)]
fn a_pinned_program_is_one_that_the_container_cannot_change() {
    let world = World::host();
    world.configure(&vault_secret("s", "test.use@svc.test"));
    world.set_secret("s", VALUE.as_bytes());
    let toml = leasing_profile("default", "").replace("[[\"**\"]]", "[[\"sh\", \"-c\", \"**\"]]");
    let profile = world.profile("pinned", &toml);
    let flags = ["--profile", &profile, "--lease=test.use@svc.test,channel=env"];
    let script = "test ${#TOKEN} -eq 21 && echo delivered";
    // Root of the container owns what it is in, and can write it: whatever the agent likes is `sh` there.
    let bundle = Bundle::new(&world, SLEEP);
    let container = bundle.start();
    into(&world, container.pid, &flags, script).denied("command_not_permitted");
    container.delete();
    // Read-only, or another's than the container's own user, it is what the image brought.
    let mut bundle = Bundle::new(&world, SLEEP);
    bundle.config["root"]["readonly"] = true.into();
    let container = bundle.start();
    into(&world, container.pid, &flags, script).ok().says("delivered");
    container.delete();
    let mut bundle = Bundle::new(&world, SLEEP);
    bundle.config["process"]["user"] = json!({ "uid": 1000, "gid": 1000 });
    fs::set_permissions(bundle.dir.join("rootfs"), fs::Permissions::from_mode(0o755)).unwrap();
    let container = bundle.start();
    into(&world, container.pid, &flags, script).ok().says("delivered");
    // Its own copy in the workspace is none.
    container.exec("cp /bin/busybox /work/sh || cat /bin/busybox >/work/sh");
    fs::set_permissions(bundle.root("work/sh"), fs::Permissions::from_mode(0o755)).unwrap();
    let pid = container.pid.to_string();
    let mut args = vec!["--into", &pid];
    args.extend(flags);
    args.extend(["--", "./sh", "-c", script]);
    world.run(&args).denied("command_not_permitted");
}

#[test]
#[file_serial(runc)]
fn a_run_of_the_broker_executes_in_its_container() {
    let world = World::host();
    let profile = leasing_host(&world, VALUE.as_bytes(), "");
    let broker = serve(&world);
    let bundle = Bundle::new(&world, SLEEP).annotated(&profile).guarded();
    let container = bundle.start();
    let runs = broker.call(&["--json", "runs", "list"]).ok().json_lines();
    let run = runs.iter().find(|run| run["state"] == "active").unwrap();
    assert_eq!(run["agent"], "reviewer");
    assert_eq!(run["workspace"], "/work");
    let id = run["run_id"].as_str().unwrap();
    let lease = ["--json", "lease", "request", "test.use@svc.test,channel=file", "--run", id];
    let lease = broker.call(&lease).ok().json();
    let lease = lease["lease_id"].as_str().unwrap();
    let exec = |args: &[&str]| broker.call(&[&["exec", "--run", id][..], args].concat());
    let script = "wc -c <\"$TOKEN_FILE\"; cat \"$TOKEN_FILE\"; pwd; readlink /proc/self/ns/net";
    let seen = exec(&["--lease", lease, "--", "sh", "-c", script]).ok().never_says(VALUE);
    let network = fs::read_link(format!("/proc/{}/ns/net", container.pid)).unwrap();
    assert!(seen.out().contains(network.to_str().unwrap()), "{seen}");
    assert!(seen.out().contains("21") && seen.out().contains("/work"), "{seen}");
    exec(&["-w", "/etc", "-u", "1000", "--", "pwd"]).ok().prints("/etc\n");
    // Its container gone, so is the run, and what it had.
    container.delete();
    let shown = broker.call(&["--json", "runs", "list"]).ok();
    assert!(!shown.out().contains("\"active\""), "{shown}");
    assert_ne!(exec(&["--", "true"]).status, Some(0));
}

#[test]
#[file_serial(runc)]
fn where_user_namespaces_shift_ids_files_keep_their_owner() {
    let world = World::host();
    let mut bundle = Bundle::new(&world, SLEEP);
    let map = json!([{ "containerID": 0, "hostID": 200_000, "size": 65_536 }]);
    bundle.config["linux"]["uidMappings"] = map.clone();
    bundle.config["linux"]["gidMappings"] = map;
    bundle.config["linux"]["namespaces"].as_array_mut().unwrap().push(json!({ "type": "user" }));
    let chown = Command::new("chown").args(["-R", "200000:200000"]).arg(bundle.root("")).status();
    assert!(chown.unwrap().success());
    std::os::unix::fs::chown(bundle.root("work"), Some(201_000), Some(201_000)).unwrap();
    let container = bundle.start();
    into(&world, container.pid, &[], "id -u; touch made; stat -c %u made")
        .ok()
        .prints("1000\n1000\n");
    use std::os::unix::fs::MetadataExt;
    assert_eq!(fs::metadata(bundle.root("work/made")).unwrap().uid(), 201_000);
    into(&world, container.pid, &["-u", "70000"], "true").fails_naming(&["no user 70000"]);
    drop(finish(Command::new("true"), b"", None));
}

#[test]
#[file_serial(runc)]
fn an_agent_is_nobody_else_in_its_container() {
    let world = World::host();
    let profile = leasing_host(&world, VALUE.as_bytes(), "");
    let broker = serve(&world);
    let try_as = |uid: u32, flags: &[&str]| {
        let mut bundle = Bundle::new(&world, SLEEP).annotated(&profile).guarded();
        bundle.config["process"]["user"] = json!({ "uid": uid, "gid": uid });
        put(&bundle.root("work/of-root"), "before");
        let container = bundle.start();
        let runs = broker.call(&["--json", "runs", "list"]).ok().json_lines();
        let run = runs.iter().find(|run| run["state"] == "active").unwrap();
        let id = run["run_id"].as_str().unwrap();
        let script = "echo after >of-root; touch mine && echo made";
        let args = [&["exec", "--run", id][..], flags, &["--", "sh", "-c", script]].concat();
        let outcome = broker.call(&args);
        let content = fs::read_to_string(bundle.root("work/of-root")).unwrap();
        container.delete();
        (outcome, content)
    };
    // A user's agent: its own files, and root's by no flag.
    let (own, content) = try_as(1000, &[]);
    own.ok().says("made");
    assert_eq!(content, "before");
    let (refused, content) = try_as(1000, &["-u", "0"]);
    refused.exits(125);
    assert_eq!(content, "before");
    // Root's agent is root of its files, and may be the other.
    let (root, content) = try_as(0, &["-u", "0"]);
    assert_eq!(content, "after\n", "{root}");
    let (other, content) = try_as(0, &["-u", "1000"]);
    other.ok().says("made");
    assert_eq!(content, "before");
}
