//! Awkward places: inside a container with a masked /proc, on overlayfs, in root's own directory, on
//! /tmp, under a read-only root. Each works by the documented fallback or says what to change.
#![forbid(unsafe_code)]

mod support;

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::process::Command;

use serial_test::file_serial;
use support::probe::{Bare, bare};
use support::world::{binary, finish, quoted};
use support::{ORDINARY, Outcome, World, needs};

/// Works, or fails as documented: exit 125, nothing run, and a message that says what to change.
#[track_caller]
fn works_or_says_what_to_change(outcome: &Outcome, expected: &str) {
    match outcome.status {
        Some(0) => assert!(outcome.out().contains(expected), "{outcome}"),
        Some(125) => {
            assert!(!outcome.out().contains(expected), "{outcome}");
            assert!(outcome.err().trim().len() > 40, "what is there to change?\n{outcome}");
        }
        _ => panic!("neither worked nor refused\n{outcome}"),
    }
}

#[test]
fn a_root_owned_workspace() {
    let world = World::new(0, 0);
    world.file("mine", "root's own\n", 0o600);
    let outcome = world.run(&["--", "sh", "-c", "cat mine && touch made && id -u && whoami"]).ok();
    assert!(outcome.out().starts_with("root's own\n"), "{outcome}");
    assert!(!outcome.out().contains("\n0\n"), "nobody is root inside\n{outcome}");
    assert_eq!(fs::metadata(world.workspace.join("made")).unwrap().uid(), 0, "the owner stays");
}

#[test]
fn the_temporary_directory_itself_as_workspace() {
    // A /tmp of its own, with the sticky bit, that belongs to root.
    let world = World::host();
    let line = world.shell_line(&[
        "--workspace",
        "/tmp",
        "--",
        "sh",
        "-c",
        "echo from inside >made; cat made; pwd",
    ]);
    // Configuration and state must not lie in the workspace: they move out of /tmp for this scene.
    let base = world.path("");
    let base = base.to_str().unwrap().trim_end_matches('/');
    let script = format!(
        "mkdir -p /mnt/world && mount --bind {0} /mnt/world && mount -t tmpfs -o mode=1777 none /tmp && cd /tmp && HOME=/mnt/world/home {1}",
        quoted(base),
        // The checkout may lie in /tmp too.
        line.replace(base, "/mnt/world")
            .replace(support::world::binary().to_str().unwrap(), "/mnt/world/sublet"),
    );
    fs::copy(support::world::binary(), world.path("sublet")).unwrap();
    let outcome = bare_in_copy(&world, &script);
    works_or_says_what_to_change(&outcome, "from inside\n/tmp\n");
    // Before Linux 6.3 no tmpfs can be idmapped, and nobody becomes root for one of root's.
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let mut numbers =
        release.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse::<u32>().unwrap());
    if (numbers.next(), numbers.next()) < (Some(6), Some(3)) {
        assert!(outcome.exits(125).err().contains("tmpfs before Linux 6.3"));
    } else {
        assert_eq!(outcome.status, Some(0), "{outcome}");
    }
}

/// In a bare namespace where /mnt may be written to, whatever the host's is.
fn bare_in_copy(world: &World, script: &str) -> Outcome {
    bare(world, Bare::OwnProc, 0, &format!("mount -t tmpfs none /mnt && {script}"))
}

#[test]
fn an_overlay_workspace() {
    let world = World::host();
    let line = world.shell_line(&[
        "--",
        "sh",
        "-c",
        "cat lower && touch made && stat -c %u made && echo over >lower",
    ]);
    let dir = world.workspace.to_str().unwrap();
    let script = format!(
        "mkdir /mnt/l /mnt/u /mnt/w && echo from below >/mnt/l/lower && chown -R {ORDINARY}:{ORDINARY} /mnt/l /mnt/u && \
         mount -t overlay -o lowerdir=/mnt/l,upperdir=/mnt/u,workdir=/mnt/w none {0} && cd {0} && {line}; \
         s=$?; stat -c 'owner %u' /mnt/u/made 2>/dev/null; exit $s",
        quoted(dir)
    );
    let outcome = bare_in_copy(&world, &script);
    works_or_says_what_to_change(&outcome, "from below\n");
    if outcome.status == Some(0) {
        assert!(outcome.out().contains(&format!("owner {ORDINARY}")), "{outcome}");
    }
}

#[test]
fn a_tmpfs_workspace() {
    let world = World::host();
    let line = world.shell_line(&["--", "sh", "-c", "touch made && stat -c %u made"]);
    let dir = quoted(world.workspace.to_str().unwrap());
    let script =
        format!("mount -t tmpfs -o uid={ORDINARY},gid={ORDINARY} none {dir} && cd {dir} && {line}");
    bare(&world, Bare::OwnProc, 0, &script).ok().prints(&format!("{ORDINARY}\n"));
}

#[test]
fn a_read_only_root() {
    for world in World::each() {
        let profile = world.leasing(b"on-a-read-only-root");
        let line = world.shell_line(&[
            "--profile",
            &profile,
            "--lease",
            "test.use@svc.test",
            "--",
            "sh",
            "-c",
            "test -s /proc/self/fd/$TOKEN_FD && echo delivered",
        ]);
        let base = world.path("");
        let base = quoted(base.to_str().unwrap().trim_end_matches('/'));
        let script = format!(
            "mount --bind {base} {base} && mount -o remount,bind,ro / && ! touch /x 2>/dev/null && cd {} && {line}",
            quoted(world.workspace.to_str().unwrap())
        );
        bare(&world, Bare::OwnProc, 0, &script).ok().prints("delivered\n");
    }
}

#[test]
fn a_workspace_with_spaces_and_odd_bytes() {
    for world in World::each() {
        for name in [&b"od d \"dir'\nwith\tall"[..], b"no \xff UTF-8"] {
            let dir = world.path("").join(std::ffi::OsStr::from_bytes(name));
            fs::create_dir(&dir).unwrap();
            chown(&dir, Some(ORDINARY), Some(ORDINARY)).unwrap();
            let mut run = world.sublet();
            let script = "touch made; ls";
            run.current_dir(&dir).args(["run", "--report", "../r.json", "--", "sh", "-c", script]);
            let outcome = finish(run, b"", Some(&world.path("r.json"))).ok();
            let shown = dir.display().to_string();
            assert_eq!(outcome.report()["workspace"], shown.as_str());
            outcome.prints("made\n");
        }
    }
}

#[test]
fn a_workspace_that_its_owner_may_not_enter_is_an_error() {
    let world = World::developer();
    fs::set_permissions(&world.workspace, fs::Permissions::from_mode(0o000)).unwrap();
    let mut run = world.sublet();
    run.current_dir("/").args(["run", "--workspace"]).arg(&world.workspace).args(["--", "ls"]);
    let outcome = finish(run, b"", None);
    assert_ne!(outcome.status, Some(0), "{outcome}");
    fs::set_permissions(&world.workspace, fs::Permissions::from_mode(0o755)).unwrap();
}

#[test]
fn many_at_once() {
    let world = World::host();
    let profile = world.leasing_with(b"many-at-once-value", "default", "redact = false");
    world.configure(&format!(
        "{}[ceilings]\nrequests_per_minute = 1000\n",
        support::world::vault_secret("s", "test.use@svc.test")
    ));
    let commands: Vec<Command> = (0..16)
        .map(|_| {
            world
                .prepare(&[
                    "--profile",
                    &profile,
                    "--lease",
                    "test.use@svc.test",
                    "--",
                    "sh",
                    "-c",
                    "cat /proc/self/fd/$TOKEN_FD",
                ])
                .0
        })
        .collect();
    let handles: Vec<_> =
        commands.into_iter().map(|c| std::thread::spawn(move || finish(c, b"", None))).collect();
    for handle in handles {
        handle.join().unwrap().ok().prints("many-at-once-value");
    }
    world.call(&["audit", "verify"]).ok();
}

// ---- inside a container, as docker sets one up --------------------------------------------------------

/// What docker masks and makes read-only in /proc by default, and the capabilities that it leaves.
const MASKED: &str = r#"["/proc/asound","/proc/acpi","/proc/kcore","/proc/keys","/proc/latency_stats","/proc/timer_list","/proc/timer_stats","/proc/sched_debug","/proc/scsi","/sys/firmware"]"#;
const READ_ONLY: &str = r#"["/proc/bus","/proc/fs","/proc/irq","/proc/sys","/proc/sysrq-trigger"]"#;
const CAPABILITIES: &str = r#"["CAP_CHOWN","CAP_DAC_OVERRIDE","CAP_FSETID","CAP_FOWNER","CAP_MKNOD","CAP_NET_RAW","CAP_SETGID","CAP_SETUID","CAP_SETFCAP","CAP_SETPCAP","CAP_NET_BIND_SERVICE","CAP_SYS_CHROOT","CAP_KILL","CAP_AUDIT_WRITE"]"#;

/// Runs `script` in a container that runc makes from the host's own /usr, as uid `user`, with
/// `capabilities`, and with /proc masked or not.
fn in_container(
    world: &World,
    user: u32,
    capabilities: &str,
    masked: bool,
    script: &str,
) -> Outcome {
    needs("runc", "runc");
    let bundle = world.path("bundle");
    fs::create_dir_all(bundle.join("rootfs")).unwrap();
    let bind = |from: &str, to: &str, mode: &str| {
        format!(
            r#"{{"destination":"{to}","type":"bind","source":"{from}","options":["rbind","{mode}"]}}"#
        )
    };
    let base = world.path("");
    let base = base.to_str().unwrap().trim_end_matches('/');
    let program = binary().parent().unwrap().to_str().unwrap();
    let mut mounts = vec![
        r#"{"destination":"/proc","type":"proc","source":"proc"}"#.to_owned(),
        r#"{"destination":"/dev","type":"tmpfs","source":"tmpfs","options":["nosuid","strictatime","mode=755"]}"#.to_owned(),
        r#"{"destination":"/dev/pts","type":"devpts","source":"devpts","options":["nosuid","noexec","newinstance","ptmxmode=0666","mode=0620"]}"#.to_owned(),
        r#"{"destination":"/dev/shm","type":"tmpfs","source":"shm","options":["nosuid","noexec","nodev"]}"#.to_owned(),
        r#"{"destination":"/tmp","type":"tmpfs","source":"tmpfs","options":["mode=1777"]}"#.to_owned(),
        r#"{"destination":"/run","type":"tmpfs","source":"tmpfs","options":["mode=755"]}"#.to_owned(),
    ];
    for dir in ["/usr", "/etc", "/bin", "/sbin", "/lib", "/lib64"] {
        if fs::symlink_metadata(dir).is_ok() {
            mounts.push(bind(dir, dir, "ro"));
        }
    }
    mounts.push(bind(program, program, "ro"));
    mounts.push(bind(base, base, "rw"));
    let (masked, read_only) = if masked { (MASKED, READ_ONLY) } else { ("[]", "[]") };
    let config = format!(
        r#"{{"ociVersion":"1.0.2","process":{{"terminal":false,"user":{{"uid":{user},"gid":{user}}},
        "args":["sh","-c",{script}],"cwd":{cwd},
        "env":["PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin","HOME={base}/home"],
        "capabilities":{{"bounding":{capabilities},"effective":{capabilities},"permitted":{capabilities}}}}},
        "root":{{"path":"rootfs"}},"hostname":"container","mounts":[{mounts}],
        "linux":{{"namespaces":[{{"type":"pid"}},{{"type":"mount"}},{{"type":"ipc"}},{{"type":"uts"}},{{"type":"network"}}],
        "maskedPaths":{masked},"readonlyPaths":{read_only}}}}}"#,
        script = serde_json::Value::from(script),
        cwd = serde_json::Value::from(world.workspace.to_str().unwrap()),
        mounts = mounts.join(","),
    );
    fs::write(bundle.join("config.json"), config).unwrap();
    let id = format!("sublet-test-{}-{}", std::process::id(), user);
    // runc's own effects on mounts stay in a namespace of this test.
    let script = format!(
        "runc --root {base}/runc run --bundle {} {id}; s=$?; runc --root {base}/runc delete -f {id} 2>/dev/null; exit $s",
        quoted(bundle.to_str().unwrap())
    );
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "sh", "-c", &script]);
    finish(command, b"", None)
}

fn inside(world: &World) -> String {
    let mut line = world.shell_line(&[
        "--",
        "sh",
        "-c",
        "echo works; ls -d /proc/[0-9]* | wc -l; grep -c . /proc/self/status >/dev/null",
    ]);
    if let Some(at) = line.find(&quoted(binary().to_str().unwrap())) {
        // The container's user is the invoker already.
        line = line[at..].to_owned();
    }
    line
}

#[test]
#[file_serial]
fn root_in_a_docker_like_container() {
    let world = World::host();
    let outcome = in_container(&world, 0, CAPABILITIES, true, &inside(&world));
    works_or_says_what_to_change(&outcome, "works\n");
}

#[test]
#[file_serial]
fn an_ordinary_user_in_a_docker_like_container() {
    let world = World::developer();
    let outcome = in_container(&world, ORDINARY, "[]", true, &inside(&world));
    works_or_says_what_to_change(&outcome, "works\n");
}

#[test]
#[file_serial]
fn an_ordinary_user_in_a_container_with_an_open_proc_works() {
    let world = World::developer();
    let outcome = in_container(&world, ORDINARY, "[]", false, &inside(&world)).ok();
    assert!(outcome.out().starts_with("works\n"), "{outcome}");
}

#[test]
#[file_serial]
fn a_leased_exec_in_a_docker_like_container_delivers_or_refuses_whole() {
    let world = World::host();
    let profile = world.leasing(b"value-inside-a-container");
    let line = world.shell_line(&[
        "--profile",
        &profile,
        "--lease",
        "test.use@svc.test",
        "--",
        "sh",
        "-c",
        "test -s /proc/self/fd/$TOKEN_FD && echo delivered",
    ]);
    let outcome = in_container(&world, 0, CAPABILITIES, true, &line);
    works_or_says_what_to_change(&outcome, "delivered\n");
    let doctor = format!("{} doctor", quoted(binary().to_str().unwrap()));
    let told = in_container(&world, 0, CAPABILITIES, true, &doctor);
    assert!(told.out().contains("proc") || told.out().contains("namespace"), "{told}");
}

/// The control of the container itself: what docker masks is masked.
#[test]
#[file_serial]
fn the_container_is_as_masked_as_docker_makes_it() {
    let world = World::host();
    let outcome = in_container(
        &world,
        0,
        CAPABILITIES,
        true,
        "wc -c </proc/keys; (echo x >/proc/sys/kernel/hostname) 2>&1 | grep -c Read-only; unshare -m true 2>/dev/null || echo no mounts",
    );
    assert_eq!(outcome.out(), "0\n1\nno mounts\n", "{outcome}");
}
