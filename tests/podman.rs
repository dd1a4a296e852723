//! podman, which finds the hooks in a directory, as an operator sets them up: directories and images of its own
//! storage, and commands in its containers. Where cgroups are unified it is as it is; elsewhere it is shown them
//! so, and does without.
#![forbid(unsafe_code)]

mod support;

use std::fs;
use std::process::Command;

use serde_json::{Value, json};
use serial_test::file_serial;
use support::broker::{Broker, leasing_host, serve};
use support::bundle::{Bundle, put, unified};
use support::host::has_unified_cgroups;
use support::world::{World, finish};

const VALUE: &str = "hidden-value-4f1d90c2";

fn records(world: &World) -> usize {
    fs::read_dir(world.state().join("run/containers")).map_or(0, Iterator::count)
}

fn active(broker: &Broker<'_>) -> Vec<Value> {
    let runs = broker.call(&["--json", "runs", "list"]).ok().json_lines();
    runs.into_iter().filter(|run| run["state"] == "active").collect()
}

/// podman with these hooks in a directory of hooks, as an operator sets them up. Its state is the test's own.
fn podman(world: &World, args: &[&str]) -> support::Outcome {
    support::needs("crun", "crun");
    let at = |name: &str| world.path(name).display().to_string();
    let mut command = unified("podman");
    command.args(["--root", &at("podman/root"), "--runroot", &at("podman/run")]);
    command.args(["--tmpdir", &at("podman/tmp"), "--runtime", "crun"]);
    // The storage of layers does not lie on one.
    let storage = if has_unified_cgroups() { "overlay" } else { "vfs" };
    command.args(["--storage-driver", storage]);
    command.args(["--cgroup-manager", "cgroupfs", "--events-backend", "none"]);
    command.args(["--hooks-dir", &at("hooks.d")]).args(args);
    finish(command, b"", None)
}

/// `podman run` of an image, or with `--rootfs DIR` of a directory.
fn podman_run(world: &World, flags: &[&str], image: &[&str], script: &str) -> support::Outcome {
    let mut args = vec!["run", "--network", "none"];
    if !flags.contains(&"--detach") {
        args.push("--rm");
    }
    // Its own defaults are more than a machine without CAP_SYS_RESOURCE may set.
    args.extend(["--ulimit", "nofile=1024:1024", "--ulimit", "nproc=999:999"]);
    args.extend(["--security-opt", "seccomp=unconfined", "--volume", "/usr:/usr:ro"]);
    match has_unified_cgroups() {
        true => args.extend(["--memory", "128m", "--pids-limit", "100"]),
        false => args.push("--cgroups=disabled"),
    }
    args.extend(flags);
    args.extend(image);
    args.extend(["/bin/sh", "-c", script]);
    podman(world, &args)
}

/// The files of docs/oci, for this binary and this state.
fn hooks_directory(world: &World) {
    fs::create_dir(world.path("hooks.d")).unwrap();
    let documents = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/oci");
    for stage in ["createRuntime", "createContainer", "poststart", "poststop"] {
        let name = format!("sublet-{stage}.json");
        let text = fs::read_to_string(documents.join(&name)).unwrap();
        let mut hook: Value = serde_json::from_str(&text).unwrap();
        let args = hook["hook"]["args"].as_array().unwrap();
        assert_eq!((&args[1], &args[2]), (&json!("hook"), &json!(stage)));
        hook["hook"]["path"] = json!(support::world::binary());
        hook["hook"]["args"] = json!([
            "sublet",
            "--config",
            world.path("etc/sublet.toml"),
            "--state-dir",
            world.state(),
            "hook",
            stage,
        ]);
        put(&world.path("hooks.d").join(name), hook.to_string());
    }
}

#[test]
#[file_serial(runc)]
fn podman_calls_it_from_its_directory_of_hooks() {
    let world = World::host();
    let profile = leasing_host(&world, VALUE.as_bytes(), "");
    let broker = serve(&world);
    hooks_directory(&world);
    let bundle = Bundle::new(&world, "true").with_host_tools();
    let root = bundle.root("").display().to_string();
    let image = ["--rootfs", &root];
    let profile = format!("dev.sublet.profile={profile}");
    let wanted = ["--annotation", &profile, "--annotation", "dev.sublet.principal=root"];
    let script = "echo ran-inside; cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/pids.max
        lease=$(/run/sublet/bin/sublet --json lease request test.use@svc.test,channel=env |
            grep -o 'lse_[0-9a-f]*' | head -1)
        /run/sublet/bin/sublet exec --lease $lease -- sh -c 'echo \"length ${#TOKEN}\"; echo \"$TOKEN\"'";
    let seen = podman_run(&world, &wanted, &image, script).ok().never_says(VALUE);
    assert!(seen.out().contains("length 21") && seen.out().contains("***"), "{seen}");
    // As podman is where it may: in a cgroup of its own, of which the exec is none.
    if has_unified_cgroups() {
        assert!(seen.out().contains("134217728\n100\n"), "{seen}");
    }
    assert_eq!((active(&broker).len(), records(&world)), (0, 0));
    // Without annotations there is the guard alone: no run, and no socket.
    let plain = podman_run(&world, &[], &image, "ls /run/sublet || echo ran-inside");
    plain.ok().says("ran-inside");
    let variable = format!("TOKEN={VALUE}");
    let refused = podman_run(&world, &["--env", &variable], &image, "echo ran-inside");
    assert_ne!(refused.never_says("ran-inside").status, Some(0));
    put(&bundle.root("etc/app.conf"), VALUE);
    let refused = podman_run(&world, &wanted, &image, "echo ran-inside");
    assert_ne!(refused.never_says("ran-inside").never_says(VALUE).status, Some(0));
    assert_eq!((active(&broker).len(), records(&world)), (0, 0));
}

#[test]
#[file_serial(runc)]
fn podman_runs_an_image_of_its_own_storage_and_refuses_one_that_holds_a_value() {
    let world = World::host();
    let profile = leasing_host(&world, VALUE.as_bytes(), "");
    let broker = serve(&world);
    hooks_directory(&world);
    let bundle = Bundle::new(&world, "true").with_host_tools();
    support::needs("tar", "tar");
    let import = |name: &str| {
        let archive = world.path(name).display().to_string();
        let mut pack = Command::new("tar");
        pack.args(["-C", bundle.root("").to_str().unwrap(), "-cf", &archive, "."]);
        finish(pack, b"", None).ok();
        podman(&world, &["import", "--quiet", &archive, &format!("localhost/{name}:1")]).ok();
    };
    import("clean");
    put(&bundle.root("etc/app.conf"), VALUE);
    import("leaky");
    let profile = format!("dev.sublet.profile={profile}");
    let wanted = ["--annotation", &profile, "--annotation", "dev.sublet.principal=root"];
    let script = "echo ran-inside; /run/sublet/bin/sublet --json lease request test.use@svc.test";
    let seen = podman_run(&world, &wanted, &["localhost/clean:1"], script).ok();
    assert!(seen.out().contains("ran-inside") && seen.out().contains("lse_"), "{seen}");
    let said = world.path("hook-said").display().to_string();
    let told = format!("run.oci.hooks.stderr={said}");
    let flags = ["--annotation", &told];
    let refused = podman_run(&world, &flags, &["localhost/leaky:1"], "echo ran-inside");
    assert_ne!(refused.never_says("ran-inside").never_says(VALUE).status, Some(0));
    let told = fs::read_to_string(&said).unwrap();
    assert!(told.contains("etc/app.conf") && !told.contains(VALUE), "{told}");
    assert_eq!((active(&broker).len(), records(&world)), (0, 0));
}

#[test]
#[file_serial(runc)]
fn a_command_enters_a_container_of_podman_and_ends_with_it() {
    let world = World::host();
    let profile = leasing_host(&world, VALUE.as_bytes(), "");
    let broker = serve(&world);
    hooks_directory(&world);
    let bundle = Bundle::new(&world, "true");
    put(&bundle.root("etc/of-the-container"), "yes");
    let root = bundle.root("").display().to_string();
    let annotation = format!("dev.sublet.profile={profile}");
    let flags = ["--detach", "--name", "agent", "--annotation", &annotation];
    let flags =
        [&flags[..], &["--annotation", "dev.sublet.principal=root", "--workdir", "/work"]].concat();
    let sleep = "while :; do sleep 1; done";
    let started = podman_run(&world, &flags, &["--rootfs", &root], sleep).ok();
    let run = active(&broker)[0]["run_id"].as_str().unwrap().to_owned();
    let id = started.out();
    assert!(run.starts_with(&format!("oci-{}", &id.trim()[..12])), "{run} {started}");

    let lease =
        ["--json", "lease", "request", "test.use@svc.test,channel=file,uses=3", "--run", &run];
    let lease = broker.call(&lease).ok().json();
    let lease = lease["lease_id"].as_str().unwrap();
    let script = "cat /etc/of-the-container; wc -c <\"$TOKEN_FILE\"; cat \"$TOKEN_FILE\"; \
                  readlink /proc/self/ns/net";
    let seen = broker.call(&["exec", "--run", &run, "--lease", lease, "--", "sh", "-c", script]);
    let pid = podman(&world, &["inspect", "--format", "{{.State.Pid}}", "agent"]).ok().line();
    let network = fs::read_link(format!("/proc/{pid}/ns/net")).unwrap();
    let out = seen.ok().never_says(VALUE).out();
    assert!(out.contains("yes21\n") && out.contains(network.to_str().unwrap()), "{out}");
    let into = ["--into", &pid, "--", "sh", "-c", "cat /etc/of-the-container; pwd"];
    world.run(&into).ok().prints("yes/work\n");

    podman(&world, &["rm", "--force", "--time", "0", "agent"]).ok();
    assert_eq!((active(&broker).len(), records(&world)), (0, 0));
    let over = broker.call(&["exec", "--run", &run, "--", "true"]);
    assert_ne!(over.status, Some(0), "{over}");
    let revoked = broker.events(0).iter().filter(|e| e["type"] == "lease.revoked").count();
    assert_eq!(revoked, 1, "two uses were left");
}
