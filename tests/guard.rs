//! The guard: a container that holds a managed value, or a name that is refused or reserved, does not
//! start; it is told where, never what. Each refusal has the same container without it, which starts.
#![forbid(unsafe_code)]

mod support;

use std::fs;
use std::path::Path;
use std::process::Command;

use base64::Engine as _;
use serde_json::json;
use serial_test::file_serial;
use support::broker::{leasing_host, serve};
use support::bundle::{Bundle, put};
use support::world::{World, finish};

const VALUE: &str = "ghp_0a1B2c3D4e5F6g7H8i9J";

fn guarded_world() -> World {
    let world = World::host();
    leasing_host(&world, VALUE.as_bytes(), "");
    world
}

/// Nothing of a container that was refused.
#[track_caller]
fn nothing_left(world: &World, bundle: &Bundle<'_>) {
    assert_eq!(bundle.known(), "");
    let records = world.state().join("run/containers");
    let left: Vec<_> = fs::read_dir(records).unwrap().flatten().map(|e| e.path()).collect();
    assert!(left.is_empty(), "{left:?}");
    let runs = world.call(&["--json", "runs", "list"]).ok();
    assert!(!runs.out().contains("\"active\""), "{runs}");
}

#[test]
#[file_serial(runc)]
fn a_container_that_holds_a_value_is_refused_by_place_and_its_twin_starts() {
    let world = guarded_world();
    let _broker = serve(&world);
    let check = |name: &str, place: &str, change: &dyn Fn(&mut Bundle<'_>, &str)| {
        let build = |value: &str| {
            let mut bundle = Bundle::new(&world, "echo started").guarded();
            change(&mut bundle, value);
            bundle
        };
        // One byte is another: it is the value that is refused.
        let other = VALUE.replace("3D4e", "3D5e");
        build(&other).run().ok().says("started");
        let bundle = build(VALUE);
        let outcome = bundle.run();
        assert_ne!(outcome.status, Some(0), "{name}: {outcome}");
        let outcome = outcome.never_says("started").never_says(VALUE);
        assert!(outcome.err().contains(place), "{name}: {outcome}");
        assert!(outcome.err().contains("managed secret `s`"), "{name}: {outcome}");
        nothing_left(&world, &bundle);
    };
    check("env", "process.env TOKEN", &|b, value| {
        b.config["process"]["env"] = json!(["PATH=/bin", format!("TOKEN={value}")]);
    });
    check("part of env", "process.env URL", &|b, value| {
        b.config["process"]["env"] = json!([format!("URL=https://x:{value}@host/")]);
    });
    check("annotation", "annotations.note", &|b, value| {
        b.config["annotations"] = json!({ "note": value });
    });
    check("label", "labels.note", &|b, value| b.config["labels"] = json!({ "note": value }));
    check("argument", "process.args[3]", &|b, value| {
        b.config["process"]["args"].as_array_mut().unwrap().push(value.into());
    });
    check("file", "etc/app.conf", &|b, value| {
        put(&b.root("etc/app.conf"), [b"x=\0", value.as_bytes(), b"\n"].concat());
    });
    check("base64", "etc/config.json", &|b, value| {
        let text = base64::engine::general_purpose::STANDARD.encode(format!("user:{value}"));
        put(&b.root("etc/config.json"), format!("{{\"auth\":\"{text}\"}}"));
    });
    check("behind a closed directory", "etc/closed/deep", &|b, value| {
        fs::create_dir(b.root("etc/closed")).unwrap();
        put(&b.root("etc/closed/deep"), value);
        let closed = std::os::unix::fs::PermissionsExt::from_mode(0o000);
        fs::set_permissions(b.root("etc/closed"), closed).unwrap();
    });
}

#[test]
#[file_serial(runc)]
fn names_that_are_refused_or_reserved_do_not_start() {
    let world = guarded_world();
    let _broker = serve(&world);
    let with = |name: &str| {
        let mut bundle = Bundle::new(&world, "echo started").guarded();
        bundle.config["process"]["env"] = json!(["PATH=/bin", format!("{name}=x")]);
        bundle.run()
    };
    for name in ["AZURE_CLIENT_SECRET", "AWS_SECRET_ACCESS_KEY", "SUBLET_SOCKET", "AZURE_CLIENT_ID"]
    {
        let outcome = with(name);
        assert_ne!(outcome.status, Some(0), "{outcome}");
        assert!(outcome.never_says("started").err().contains(name));
    }
    for name in ["AZURE_REGION", "HOME", "LD_LIBRARY_PATH"] {
        with(name).ok().says("started");
    }
    let mut bundle = Bundle::new(&world, "echo started").guarded();
    bundle.config["annotations"] = json!({ "AZURE_CLIENT_SECRET": "x" });
    assert_ne!(bundle.run().never_says("started").status, Some(0));
}

#[test]
#[file_serial(runc)]
fn no_link_of_an_image_leads_the_guard_out_of_it() {
    let world = guarded_world();
    let _broker = serve(&world);
    let outside = world.path("outside");
    fs::create_dir(&outside).unwrap();
    put(&outside.join("file"), VALUE);
    let bundle = Bundle::new(&world, "echo started").guarded();
    for (name, target) in [("etc/link", outside.join("file")), ("etc/dir", outside.clone())] {
        std::os::unix::fs::symlink(target, bundle.root(name)).unwrap();
    }
    // It holds no such file: what a link names is not in it.
    bundle.run().ok().says("started");
}

/// A hook for the root of an overlay, in a mount namespace of its own.
#[track_caller]
fn hook_on_overlay(world: &World, bundle: &Bundle<'_>) -> support::Outcome {
    let at = |name: &str| bundle.dir.join(name).display().to_string();
    let script = format!(
        "mount -t overlay overlay -o lowerdir={}:{},upperdir={},workdir={} {}\n exec \"$0\" \"$@\"",
        at("top"),
        at("base"),
        at("upper"),
        at("ovl"),
        at("rootfs"),
    );
    support::needs("unshare", "util-linux");
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "sh", "-ec", &script]);
    let hook = world.sublet();
    command.arg(hook.get_program()).args(hook.get_args()).args(["hook", "createRuntime"]);
    finish(command, bundle.state(std::process::id() as i32).as_bytes(), None)
}

#[test]
#[file_serial(runc)]
fn a_layer_is_read_once_and_again_when_it_changes() {
    let world = guarded_world();
    let _broker = serve(&world);
    let bundle = Bundle::new(&world, "true");
    bundle.write();
    for name in ["base", "top", "upper", "ovl"] {
        fs::create_dir(bundle.dir.join(name)).unwrap();
    }
    let at = |name: &str| bundle.dir.join(name);
    put(&at("base/file"), "nothing");
    put(&at("top/other"), "nothing");
    // What changed a moment ago is not remembered: a second change in the same tick would not show.
    std::thread::sleep(std::time::Duration::from_millis(3200));
    hook_on_overlay(&world, &bundle).ok();
    let cache = world.state().join("run/guard");
    let remembered = || -> usize {
        let sets = fs::read_dir(&cache).unwrap().flatten();
        sets.map(|set| fs::read_dir(set.path()).unwrap().count()).sum()
    };
    assert_eq!(remembered(), 2, "the lower layers, and not the upper one");
    // Taken at its word: a layer whose summary is the same is not read. The control for what follows.
    hook_on_overlay(&world, &bundle).ok();

    // Changed behind the container's back, with its old times put back.
    let file = fs::File::options().write(true).open(at("base/file")).unwrap();
    let before = file.metadata().unwrap().modified().unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, VALUE.as_bytes(), 0).unwrap();
    file.set_modified(before).unwrap();
    let refused = hook_on_overlay(&world, &bundle).exits(2).never_says(VALUE);
    assert!(refused.err().contains("base/file"), "{refused}");

    // Clean again, and then the upper layer, which is always read.
    put(&at("base/file"), "nothing");
    hook_on_overlay(&world, &bundle).ok();
    put(&at("upper/new"), VALUE);
    assert!(hook_on_overlay(&world, &bundle).exits(2).err().contains("upper/new"));
    fs::remove_file(at("upper/new")).unwrap();
    hook_on_overlay(&world, &bundle).ok();

    // Another value: what was clean of the first may hold this one.
    world.set_secret("s", b"nothing-like-it-was");
    put(&at("top/other"), "x nothing-like-it-was");
    assert!(hook_on_overlay(&world, &bundle).exits(2).err().contains("top/other"));
}

#[test]
#[file_serial(runc)]
fn the_guard_is_told_no_value() {
    let world = guarded_world();
    let broker = serve(&world);
    let told = broker.client().guard().unwrap();
    assert!(told.fingerprints.len() >= 5, "plain, base64, hex");
    let text = serde_json::to_string(&told).unwrap();
    assert!(!text.contains(VALUE) && !text.contains("ghp_"));
    // It is for the control socket: an agent's has no such path.
    let run = broker.start_run("leasing");
    let agent = sublet::api::client::Client::connect(Path::new(&run.socket)).unwrap();
    assert!(agent.guard().is_err());
}
