//! However an exec ends, nothing is left: no process, mount, cgroup, file or readable descriptor, and the
//! trail says what became of the lease.
#![forbid(unsafe_code)]

mod support;

use std::fs;
use std::io::IoSliceMut;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, PermissionsExt, chown};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serial_test::file_serial;
use support::host::{self, Parts, Process, Traces, eventually};
use support::world::Running;
use support::{ORDINARY, Outcome, World, needs};

const VALUE: &[u8] = b"wiped-when-the-exec-ends-2342";

/// A host-side accomplice: it takes descriptors that the exec passes out through a socket in the shared
/// workspace, and keeps them.
struct Accomplice {
    listener: UnixListener,
}

impl Accomplice {
    fn in_workspace(world: &World) -> Self {
        let path = world.workspace.join("holder.sock");
        let listener = UnixListener::bind(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).unwrap();
        if rustix::process::geteuid().is_root() {
            chown(&path, Some(ORDINARY), Some(ORDINARY)).unwrap();
        }
        Self { listener }
    }

    fn take(&self) -> fs::File {
        use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
        let (peer, _) = self.listener.accept().unwrap();
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut byte = [0];
        recvmsg(&peer, &mut [IoSliceMut::new(&mut byte)], &mut control, RecvFlags::empty())
            .unwrap();
        let fd: OwnedFd = control
            .drain()
            .find_map(|message| match message {
                RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
                _ => None,
            })
            .expect("a descriptor came with the byte");
        fd.into()
    }
}

/// What the holder of a leaked descriptor reads now.
fn read_leak(file: &fs::File) -> Vec<u8> {
    let mut bytes = vec![0; VALUE.len()];
    match file.read_at(&mut bytes, 0) {
        Ok(n) => {
            bytes.truncate(n);
            bytes
        }
        // A tmpfs that is gone answers with an error: nothing is read either.
        Err(_) => Vec::new(),
    }
}

fn is_wiped(file: &fs::File) -> bool {
    read_leak(file).iter().all(|b| *b == 0)
}

/// A leased exec that has passed both its memfd and its file out, and then runs `rest`.
struct Scene {
    world: World,
    exec: Running,
    memfd: fs::File,
    file: fs::File,
    before: Traces,
    family: Vec<Process>,
    cgroup: Option<PathBuf>,
}

const PASS_OUT: &str = "./probe leak-fd $TOKEN_FD holder.sock && \
     ./probe leak-fd 4 holder.sock 4<$TOKEN_FILE && echo passed";

impl Scene {
    fn open(world: World, flags: &[&str], rest: &str) -> Self {
        let world = world.with_probe();
        let profile = two_channels(&world);
        let accomplice = Accomplice::in_workspace(&world);
        let before = Traces::now();
        let script = format!("{PASS_OUT}; {rest}");
        let mut args = vec![
            "--profile",
            &profile,
            "--lease",
            "by.memfd@svc.test",
            "--lease",
            "by.file@svc.test",
        ];
        args.extend(flags);
        args.extend(["--", "sh", "-c", &script]);
        let mut exec = world.spawn(&args);
        for expected in ["leak: allowed ", "leak: allowed ", "passed"] {
            assert_eq!(exec.read_line(), expected);
        }
        let (memfd, file) = (accomplice.take(), accomplice.take());
        Self { family: host::family(exec.pid()), cgroup: None, world, exec, memfd, file, before }
    }

    /// Both leaked descriptors hold the value now: else the wipe proves nothing.
    fn assert_readable(&self) {
        assert_eq!(read_leak(&self.memfd), VALUE);
        assert_eq!(read_leak(&self.file), VALUE);
    }

    fn assert_nothing_left(&self) {
        for process in &self.family {
            eventually(&format!("{process:?} is gone"), || !process.is_alive());
        }
        eventually("the leaked memfd reads zeros", || is_wiped(&self.memfd));
        eventually("the leaked file reads zeros", || is_wiped(&self.file));
        assert_eq!(Traces::now(), self.before);
        if let Some(cgroup) = &self.cgroup {
            eventually(&format!("{} is removed", cgroup.display()), || !cgroup.exists());
        }
        self.world.holds_nowhere(VALUE);
    }
}

fn two_channels(world: &World) -> String {
    let mut toml = "extends = \"default\"\n".to_owned();
    let mut config = String::new();
    for channel in ["memfd", "file"] {
        config.push_str(&support::world::vault_secret(channel, &format!("by.{channel}@svc.test")));
        toml.push_str(&format!(
            "[[capability]]\nname = \"by.{channel}\"\nchannels = [\"{channel}\"]\ncommand = [[\"**\"]]\n\
             [[capability.audience]]\nhost = \"svc.test\"\nsecret = \"{channel}\"\nvariable = \"TOKEN\"\n"
        ));
    }
    world.configure(&config);
    for channel in ["memfd", "file"] {
        world.set_secret(channel, VALUE);
    }
    world.profile("two", &toml)
}

fn lease_ends(world: &World) -> Vec<String> {
    let ends = ["lease.completed", "lease.interrupted", "lease.revoked", "lease.expired"];
    world.event_types().into_iter().filter(|t| ends.contains(&t.as_str())).collect()
}

#[track_caller]
fn ends_with(world: World, flags: &[&str], rest: &str, status: i32) -> Outcome {
    let mut scene = Scene::open(world, flags, &format!("read go <go; {rest}"));
    scene.cgroup = Parts::of(scene.exec.pid()).command.cgroup();
    scene.assert_readable();
    // The exec waits at a fifo in the workspace until it has been looked at.
    let go = scene.world.workspace.join("go");
    std::thread::spawn(move || fs::write(go, "go\n"));
    let outcome = scene.exec.finish().exits(status);
    let scrubbed = outcome.report()["scrubbed"].as_array().unwrap().clone();
    assert_eq!(scrubbed.len(), 2, "{outcome}");
    for entry in &scrubbed {
        assert_eq!(entry["wiped"], true, "{outcome}");
        // The whole container, which may be larger than the value.
        assert!(entry["bytes"].as_u64().unwrap() >= VALUE.len() as u64, "{outcome}");
    }
    scene.assert_nothing_left();
    assert_eq!(lease_ends(&scene.world), ["lease.completed", "lease.completed"], "{outcome}");
    outcome
}

/// A world whose workspace holds the fifo `go`.
fn with_gate(world: World) -> World {
    let path = world.workspace.join("go");
    let made = Command::new("mkfifo").arg(&path).status().unwrap();
    assert!(made.success());
    if rustix::process::geteuid().is_root() {
        chown(&path, Some(ORDINARY), Some(ORDINARY)).unwrap();
    }
    world
}

#[test]
#[file_serial]
fn after_success_and_after_failure() {
    for world in World::each() {
        ends_with(with_gate(world), &[], "exit 0", 0);
    }
    for world in World::each() {
        ends_with(with_gate(world), &[], "exit 3", 3);
    }
}

#[test]
#[file_serial]
fn after_every_fatal_signal() {
    // Every signal whose default action ends a process: signal(7).
    for number in
        [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 24, 25, 26, 27, 29, 30, 31, 34, 64]
    {
        let rest = format!("exec ./probe raise {number}");
        let outcome = ends_with(with_gate(World::host()), &[], &rest, 128 + number);
        assert_eq!(outcome.report()["signal"], number, "{outcome}");
    }
    ends_with(with_gate(World::developer()), &[], "exec ./probe raise 11", 139);
}

#[test]
#[file_serial]
fn after_a_timeout_even_of_one_that_ignores_signals() {
    for world in World::each() {
        let scene = Scene::open(world, &["--timeout", "1500ms"], "exec ./probe stubborn");
        scene.assert_readable();
        let mut scene = scene;
        let outcome = scene.exec.finish().exits(124);
        assert_eq!(outcome.report()["timed_out"], true, "{outcome}");
        scene.assert_nothing_left();
    }
}

#[test]
#[file_serial]
fn a_polite_command_may_clean_up_at_the_timeout() {
    let world = World::host();
    world
        .run(&[
            "--timeout",
            "1",
            "--",
            "sh",
            "-c",
            "trap 'echo cleaned; exit 0' TERM; sleep 30 & wait",
        ])
        .exits(124)
        .prints("cleaned\n");
}

#[test]
#[file_serial]
fn after_ctrl_c_and_its_kin() {
    for (signal, status) in [(Signal::INT, 130), (Signal::TERM, 143), (Signal::HUP, 129)] {
        for world in World::each() {
            let mut scene = Scene::open(world, &[], "exec sleep 60");
            scene.assert_readable();
            let parts = Parts::of(scene.exec.pid());
            scene.cgroup = parts.command.cgroup();
            host::signal(&parts.broker, signal);
            scene.exec.finish().exits(status);
            scene.assert_nothing_left();
            assert_eq!(lease_ends(&scene.world), ["lease.completed", "lease.completed"]);
        }
    }
}

#[test]
#[file_serial]
fn a_command_that_handles_the_signal_decides_the_status() {
    let world = World::host();
    let mut exec = world.spawn(&[
        "--",
        "sh",
        "-c",
        "trap 'exit 9' INT; echo up; while :; do sleep 0.05; done",
    ]);
    assert_eq!(exec.read_line(), "up");
    let parts = Parts::of(exec.pid());
    host::signal(&parts.broker, Signal::INT);
    exec.finish().exits(9);
}

/// Who is killed with SIGKILL, and what the trail says then.
#[derive(Clone, Copy, Debug)]
enum Killed {
    Broker,
    Launcher,
    Init,
    BrokerAndLauncher,
    AllOfSublet,
}

#[track_caller]
fn killed(world: World, who: Killed) {
    let mut scene = Scene::open(world, &[], "sleep 61 & exec sleep 62");
    let parts = Parts::of(scene.exec.pid());
    scene.family = host::family(scene.exec.pid());
    scene.cgroup = parts.command.cgroup();
    scene.assert_readable();
    let victims: &[&Process] = match who {
        Killed::Broker => &[&parts.broker],
        Killed::Launcher => &[&parts.launcher],
        Killed::Init => &[&parts.init],
        Killed::BrokerAndLauncher => &[&parts.broker, &parts.launcher],
        Killed::AllOfSublet => &[&parts.broker, &parts.launcher, &parts.init],
    };
    for victim in victims {
        // Killing the first may already have ended the others: that is the point.
        if victim.is_alive() {
            host::signal(victim, Signal::KILL);
        }
    }
    let outcome = scene.exec.finish();
    assert_ne!(outcome.status, Some(0), "{who:?}: {outcome}");
    for process in &scene.family {
        eventually(&format!("after {who:?}: {process:?} is gone"), || !process.is_alive());
    }
    // The next start finds what is unfinished and says so.
    scene.world.run(&["--", "true"]).ok();
    scene.world.call(&["audit", "verify"]).ok();
    let ends = lease_ends(&scene.world);
    assert_eq!(ends.len(), 2, "after {who:?} each lease ends once: {ends:?}");
    assert!(
        ends.iter().all(|e| e == "lease.completed" || e == "lease.interrupted"),
        "after {who:?}: {ends:?}"
    );
    if matches!(who, Killed::Broker | Killed::BrokerAndLauncher | Killed::AllOfSublet) {
        assert!(ends.iter().all(|e| e == "lease.interrupted"), "after {who:?}: {ends:?}");
    }
    match who {
        // Nobody is left to wipe: the kernel drops the deliveries with their last holder, and here the
        // accomplice is one.
        Killed::BrokerAndLauncher | Killed::AllOfSublet => {
            assert_eq!(Traces::now(), scene.before);
            if let Some(cgroup) = &scene.cgroup {
                eventually(&format!("{} is removed", cgroup.display()), || !cgroup.exists());
            }
        }
        Killed::Broker | Killed::Launcher | Killed::Init => scene.assert_nothing_left(),
    }
}

#[test]
#[file_serial]
fn after_kill_9_of_sublet() {
    World::each().into_iter().for_each(|world| killed(world, Killed::Broker));
}

#[test]
#[file_serial]
fn after_kill_9_of_the_launcher() {
    World::each().into_iter().for_each(|world| killed(world, Killed::Launcher));
}

#[test]
#[file_serial]
fn after_kill_9_of_init() {
    World::each().into_iter().for_each(|world| killed(world, Killed::Init));
}

#[test]
#[file_serial]
fn after_kill_9_of_sublet_and_launcher_at_once() {
    World::each().into_iter().for_each(|world| killed(world, Killed::BrokerAndLauncher));
}

#[test]
#[file_serial]
fn after_kill_9_of_all_of_sublet() {
    World::each().into_iter().for_each(|world| killed(world, Killed::AllOfSublet));
}

#[test]
#[file_serial]
fn after_kill_9_of_the_caller() {
    needs("setpriv", "util-linux");
    for world in World::each() {
        let world = world.with_probe();
        let profile = two_channels(&world);
        let accomplice = Accomplice::in_workspace(&world);
        let script = format!("{PASS_OUT}; sleep 63");
        let (run, _) = world.prepare(&[
            "--profile",
            &profile,
            "--lease",
            "by.memfd@svc.test",
            "--lease",
            "by.file@svc.test",
            "--",
            "sh",
            "-c",
            &script,
        ]);
        // The caller is a shell that waits for sublet; `; true` keeps it from becoming sublet by exec.
        let mut caller = Command::new("sh");
        world.dress(&mut caller);
        caller.args(["-c", "\"$@\"; true", "sh"]).arg(run.get_program()).args(run.get_args());
        caller.stdin(Stdio::null()).stdout(Stdio::null()).process_group(0);
        let mut caller = caller.spawn().unwrap();
        let (memfd, file) = (accomplice.take(), accomplice.take());
        let family: Vec<Process> =
            host::family(caller.id()).into_iter().filter(|p| p.pid != caller.id()).collect();
        assert!(family.len() >= 4, "{family:?}");
        assert_eq!(read_leak(&memfd), VALUE);
        caller.kill().unwrap();
        caller.wait().unwrap();
        for process in &family {
            eventually(&format!("{process:?} is gone"), || !process.is_alive());
        }
        assert!(is_wiped(&memfd) && is_wiped(&file));
    }
}

#[test]
#[file_serial]
fn a_pipe_whose_reader_left_ends_the_exec_and_still_scrubs() {
    let world = World::host();
    let profile = two_channels(&world);
    let (mut run, report) =
        world.prepare(&["--profile", &profile, "--lease", "by.memfd@svc.test", "--", "yes"]);
    run.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = run.spawn().unwrap();
    drop(child.stdout.take());
    let start = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if start.elapsed() > Duration::from_secs(15) {
            child.kill().unwrap();
            panic!("`yes` into a closed pipe goes on for ever");
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    assert_eq!(status.code(), Some(128 + 13));
    let report: serde_json::Value = serde_json::from_slice(&fs::read(report).unwrap()).unwrap();
    assert_eq!(report["scrubbed"][0]["wiped"], true);
}

#[test]
#[file_serial]
fn a_background_child_does_not_outlive_or_hold_up_its_exec() {
    for world in World::each() {
        let start = Instant::now();
        world.run(&["--", "sh", "-c", "sleep 70 & echo done"]).ok().prints("done\n");
        assert!(start.elapsed() < Duration::from_secs(20), "waited for the orphan");
    }
}

/// The cgroups that execs of this machine have now.
fn cgroups() -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut dirs = vec![PathBuf::from("/sys/fs/cgroup")];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|t| t.is_dir()) {
                if entry.file_name().to_string_lossy().contains("exe_") {
                    found.push(entry.path());
                }
                dirs.push(entry.path());
            }
        }
    }
    found
}

#[test]
#[file_serial]
fn after_kill_9_at_any_moment_of_an_execs_life() {
    for world in World::each() {
        let profile = two_channels(&world);
        let before = Traces::now();
        let earlier = cgroups();
        let mut families = Vec::new();
        for step in 0..40 {
            // From before the launcher is forked until after the command runs.
            let mut exec = world.spawn(&[
                "--profile",
                &profile,
                "--run",
                "shot",
                "--lease",
                "by.memfd@svc.test",
                "--lease",
                "by.file@svc.test",
                "--",
                "sleep",
                "65",
            ]);
            std::thread::sleep(Duration::from_micros(1_500 * step));
            families.extend(host::family(exec.pid()));
            exec.shoot();
        }
        for process in &families {
            eventually(&format!("{process:?} is gone"), || !process.is_alive());
        }
        assert_eq!(Traces::now(), before);
        // Another exec may be running on this machine; ours are those that came and stayed empty.
        eventually("no cgroup is left", || {
            cgroups().iter().filter(|c| !earlier.contains(c)).all(|c| {
                fs::read_to_string(c.join("cgroup.procs")).is_ok_and(|procs| !procs.is_empty())
            })
        });
        world.run(&["--", "true"]).ok();
        world.call(&["audit", "verify"]).ok();
        let types = world.event_types();
        let count = |kind: &str| types.iter().filter(|t| *t == kind).count();
        assert_eq!(
            count("lease.granted"),
            count("lease.completed") + count("lease.interrupted"),
            "{types:?}"
        );
        world.holds_nowhere(VALUE);
    }
}

#[test]
#[file_serial]
fn after_kill_9_of_the_launcher_at_any_moment() {
    for world in World::each() {
        let profile = two_channels(&world);
        let before = Traces::now();
        for step in 0..25 {
            let mut exec = world.spawn(&[
                "--profile",
                &profile,
                "--run",
                "shot",
                "--lease",
                "by.memfd@svc.test",
                "--lease",
                "by.file@svc.test",
                "--",
                "sleep",
                "67",
            ]);
            std::thread::sleep(Duration::from_micros(2_000 * step));
            let family = host::family(exec.pid());
            match family.get(1) {
                Some(launcher) if launcher.is_alive() => {
                    host::signal(launcher, Signal::KILL);
                    let outcome = exec.finish();
                    assert_ne!(outcome.status, Some(0), "{outcome}");
                    assert!(!outcome.stderr.is_empty(), "silent\n{outcome}");
                }
                _ => exec.shoot(),
            }
            for process in &family {
                eventually(&format!("{process:?} is gone"), || !process.is_alive());
            }
        }
        assert_eq!(Traces::now(), before);
        world.run(&["--", "true"]).ok();
        world.call(&["audit", "verify"]).ok();
        let types = world.event_types();
        let count = |kind: &str| types.iter().filter(|t| *t == kind).count();
        assert_eq!(
            count("lease.granted"),
            count("lease.completed") + count("lease.interrupted"),
            "{types:?}"
        );
    }
}

#[test]
#[file_serial]
fn ctrl_c_typed_at_a_terminal_reaches_the_command() {
    needs("script", "bsdutils");
    for world in World::each() {
        let line = |command: &str| {
            let (run, _) = world.prepare(&["--tty", "--", "sh", "-c", command]);
            let words: Vec<String> = std::iter::once(run.get_program())
                .chain(run.get_args())
                .map(|w| support::world::quoted(&w.to_string_lossy()))
                .collect();
            words.join(" ")
        };
        let typed = |command: &str| {
            let mut script = Command::new("sh");
            world.dress(&mut script);
            let inner = support::world::quoted(&line(command));
            script.args([
                "-c",
                &format!("(sleep 1.5; printf '\\003'; sleep 1) | script -qec {inner} /dev/null"),
            ]);
            support::world::finish(script, b"", None)
        };
        typed("exec sleep 66").exits(130);
        typed("trap 'echo caught; exit 4' INT; while :; do sleep 0.1; done")
            .exits(4)
            .says("caught");
    }
}
