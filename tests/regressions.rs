//! What once went wrong in a real run, each tried again with the real binary: an awkward caller, a hostile
//! command, a death in the middle. Needs root, as the privileged mode does; without it each test
//! fails and says so.

mod cli_common;

use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use cli_common::{stderr, stdout, sublet};
use tempfile::TempDir;

const VALUE: &str = "hunter2-hunter2-hunter2";

/// A state, a configuration with one secret of each kind of source, and an empty workspace.
struct Bench {
    dir: TempDir,
}

impl Bench {
    fn new() -> Self {
        assert!(rustix::process::geteuid().is_root(), "run these tests as root");
        let dir = tempfile::Builder::new().prefix("sublet-").tempdir().unwrap();
        let bench = Self { dir };
        for name in ["ws", "conf"] {
            std::fs::create_dir(bench.path(name)).unwrap();
        }
        bench.write(
            "conf/sublet.toml",
            &format!(
                "[secrets.stored]\nsource = \"vault\"\nallow = [\"vault.*@*\"]\n\
                 [secrets.minted]\nsource = \"command\"\ncommand = [\"{}\"]\nallow = [\"minted.*@*\"]\n",
                bench.path("mint").display()
            ),
        );
        let capability = |name: &str, secret: &str, channels: &str| {
            format!(
                "[[capability]]\nname = \"{name}\"\nchannels = [{channels}]\ncommand = [[\"**\"]]\n\
                 [[capability.audience]]\nprotocol = \"https\"\nhost = \"a.internal\"\n\
                 secret = \"{secret}\"\nvariable = \"TOKEN\"\n"
            )
        };
        bench.write(
            "conf/profile.toml",
            &format!(
                "extends = \"default\"\n{}{}{}",
                capability("vault.read", "stored", "\"file\", \"memfd\", \"env\""),
                capability("minted.read", "minted", "\"file\""),
                capability("vault.git", "stored", "\"git\""),
            ),
        );
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).unwrap();
    }

    /// What the `command` source runs.
    fn mint(&self, script: &str) {
        use std::os::unix::fs::PermissionsExt;
        self.write("mint", &format!("#!/bin/sh\n{script}\n"));
        std::fs::set_permissions(self.path("mint"), PermissionsExt::from_mode(0o700)).unwrap();
    }

    fn store_value(&self) {
        let mut command = self.sublet();
        command.args(["secret", "set", "stored"]).stdin(Stdio::piped()).stdout(Stdio::null());
        let mut child = command.spawn().unwrap();
        std::io::Write::write_all(&mut child.stdin.take().unwrap(), VALUE.as_bytes()).unwrap();
        assert!(child.wait().unwrap().success());
    }

    fn sublet(&self) -> Command {
        let mut command = sublet();
        command.arg("--config").arg(self.path("conf/sublet.toml"));
        command.arg("--state-dir").arg(self.path("state"));
        command.env("HOME", "/nonexistent").current_dir(self.dir.path());
        command
    }

    /// `sublet run` with the profile and the workspace of this bench.
    fn run(&self, flags: &[&str], script: &str) -> Command {
        let mut command = self.sublet();
        command.arg("run").arg("--profile").arg(self.path("conf/profile.toml"));
        command.arg("--workspace").arg(self.path("ws"));
        command.args(flags).args(["--", "/bin/sh", "-c", script]).stdin(Stdio::null());
        command
    }
}

/// Whether this comes true before long.
fn comes_true(what: impl Fn() -> bool) -> bool {
    let until = Instant::now() + Duration::from_secs(5);
    while Instant::now() < until {
        if what() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    what()
}

#[track_caller]
fn check(output: &Output, status: i32, said: &str) {
    assert_eq!(output.status.code(), Some(status), "{}{}", stdout(output), stderr(output));
    assert!(stdout(output).contains(said), "{said:?} is not in {:?}", stdout(output));
}

#[test]
fn a_strict_umask_of_the_caller_is_the_commands_and_not_the_roots() {
    let bench = Bench::new();
    let mut through = Command::new("sh");
    through.args(["-c", "umask 077; exec \"$@\"", "sh"]);
    let plain = bench.run(&[], "umask; id -un; cat /etc/hostname");
    through.arg(plain.get_program()).args(plain.get_args()).env("HOME", "/nonexistent");
    check(&through.output().unwrap(), 0, "0077\nagent\nsublet\n");
}

#[test]
fn an_input_that_cannot_be_read_is_an_empty_one() {
    let bench = Bench::new();
    // As nohup(1) leaves it.
    let write_only = std::fs::File::options().write(true).open("/dev/null").unwrap();
    let output = bench.run(&[], "cat; echo on").stdin(write_only).output().unwrap();
    check(&output, 0, "on");
    let directory = std::fs::File::open("/").unwrap();
    check(&bench.run(&[], "cat; echo on").stdin(directory).output().unwrap(), 0, "on");
}

/// Ends this process, which we started, and says whether it went by itself before long.
fn ends_soon(child: &mut std::process::Child) -> bool {
    let until = Instant::now() + Duration::from_secs(5);
    while Instant::now() < until {
        if child.try_wait().unwrap().is_some() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    false
}

fn signal(child: &std::process::Child, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_child(child);
    rustix::process::kill_process(pid, signal).unwrap();
}

#[test]
fn a_terminal_whose_command_reads_nothing_still_lets_signals_through() {
    let bench = Bench::new();
    let mut command = bench.run(&["--tty"], "stty raw -echo; touch ready; exec sleep 60");
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    assert!(comes_true(|| bench.path("ws/ready").exists()));
    let mut stdin = child.stdin.take().unwrap();
    // More than a terminal holds; the writer stays with what does not go in.
    std::thread::spawn(move || std::io::Write::write_all(&mut stdin, &[b'x'; 4 << 20]));
    std::thread::sleep(Duration::from_millis(300));
    signal(&child, rustix::process::Signal::TERM);
    assert!(ends_soon(&mut child));
}

#[test]
fn a_reader_that_takes_nothing_does_not_keep_us_from_ending() {
    let bench = Bench::new();
    let mut command = bench.run(&["--timeout", "1s"], "yes");
    // The read end stays open and unread.
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(3500));
    assert!(child.try_wait().unwrap().is_none(), "the control: it waits for its reader");
    signal(&child, rustix::process::Signal::TERM);
    assert!(ends_soon(&mut child));
}

#[test]
fn a_stream_that_was_passed_to_a_stranger_is_not_waited_for_and_loses_nothing() {
    let bench = Bench::new();
    let listener = std::os::unix::net::UnixListener::bind(bench.path("ws/out")).unwrap();
    let stranger = std::thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        let (mut fds, mut byte) = (Vec::new(), [0]);
        sublet::sys::socket::receive(&stream, &mut byte, |fd| fds.push(fd)).unwrap();
        std::thread::sleep(Duration::from_secs(8));
        drop(fds);
    });
    let script = "import socket, sys\n\
                  s = socket.socket(socket.AF_UNIX)\n\
                  s.connect('out')\n\
                  socket.send_fds(s, [b'x'], [1])\n\
                  sys.stdout.write('y' * 60000 + 'end')";
    bench.write("ws/pass.py", script);
    let started = Instant::now();
    let output = bench.run(&[], "python3 pass.py").output().unwrap();
    check(&output, 0, "yend");
    assert_eq!(output.stdout.len(), 60003);
    assert!(started.elapsed() < Duration::from_secs(5));
    drop(stranger);
}

#[test]
fn a_signal_that_nohup_ignores_stays_ignored() {
    let bench = Bench::new();
    let plain = bench.run(&[], "sleep 1; echo survived");
    let mut through = Command::new("sh");
    through.args(["-c", "trap '' HUP; exec \"$@\"", "sh"]);
    through.arg(plain.get_program()).args(plain.get_args()).stdout(Stdio::piped());
    let child = through.spawn().unwrap();
    std::thread::sleep(Duration::from_millis(400));
    signal(&child, rustix::process::Signal::HUP);
    check(&child.wait_with_output().unwrap(), 0, "survived");

    // The control: forwarded where it is not ignored.
    let child = bench.run(&[], "sleep 5; echo survived").spawn().unwrap();
    std::thread::sleep(Duration::from_millis(400));
    signal(&child, rustix::process::Signal::HUP);
    check(&child.wait_with_output().unwrap(), 129, "");
}

#[test]
fn a_lease_that_expired_while_its_source_was_slow_is_not_delivered() {
    let bench = Bench::new();
    bench.mint("sleep 2; echo '{\"value\":\"hunter2-hunter2\"}'");
    let lease = "--lease=minted.read@a.internal,ttl=1s";
    let output = bench.run(&[lease], "touch ran").output().unwrap();
    check(&output, 125, "");
    assert!(stderr(&output).contains("expired"), "{}", stderr(&output));
    assert!(!bench.path("ws/ran").exists());

    let lease = "--lease=minted.read@a.internal,ttl=1m";
    check(&bench.run(&[lease], "wc -c < $TOKEN_FILE").output().unwrap(), 0, "15");
}

#[test]
fn the_command_of_a_source_does_not_start_in_the_callers_directory() {
    let bench = Bench::new();
    bench.mint(
        "pwd > ${0%/*}/where; umask >> ${0%/*}/where; echo '{\"value\":\"hunter2-hunter2\"}'",
    );
    let lease = "--lease=minted.read@a.internal";
    check(&bench.run(&[lease], "true").output().unwrap(), 0, "");
    assert_eq!(std::fs::read_to_string(bench.path("where")).unwrap(), "/\n0077\n");
}

#[test]
fn a_client_that_drips_its_request_does_not_hold_the_broker() {
    let bench = Bench::new();
    bench.store_value();
    bench.write(
        "ws/drip.py",
        "import socket, time\n\
         s = socket.socket(socket.AF_UNIX)\n\
         s.connect('/run/sublet/git.sock')\n\
         open('dripping', 'w')\n\
         for _ in range(60):\n    s.send(b'x')\n    time.sleep(0.5)",
    );
    let lease = "--lease=vault.git@a.internal";
    let mut child = bench.run(&[lease], "exec python3 drip.py").spawn().unwrap();
    assert!(comes_true(|| bench.path("ws/dripping").exists()));
    signal(&child, rustix::process::Signal::TERM);
    assert!(ends_soon(&mut child));
}

#[test]
fn an_exec_whose_workspace_cannot_be_mapped_leaves_no_cgroup() {
    let bench = Bench::new();
    // In a mount namespace of its own, since it mounts.
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation=private", "sh", "-c"]);
    command.arg("mkdir -p $0/ws/proc && mount -t proc proc $0/ws/proc && exec \"$@\"");
    command.arg(bench.dir.path());
    let plain = bench.run(&[], "true");
    command.arg(plain.get_program()).args(plain.get_args());
    let output = command.output().unwrap();
    check(&output, 125, "");
    let said = stderr(&output);
    assert!(said.contains("could not map the owner"), "{said}");
    assert!(!said.contains("cgroup"), "{said}");
}

#[test]
fn no_profile_shows_state_configuration_or_the_file_of_a_source() {
    let bench = Bench::new();
    for made in ["home/.local/keys", "home/work"] {
        std::fs::create_dir_all(bench.path(made)).unwrap();
    }
    bench.write("home/.local/keys/one", VALUE);
    bench.store_value();
    let key = bench.path("home/.local/keys/one").display().to_string();
    let secret =
        format!("[secrets.one]\nsource = \"file\"\npath = \"{key}\"\nallow = [\"a.b@c\"]\n");
    bench.write("conf/sublet.toml", &secret);
    let shown = |path: &str, access: &str| {
        let path = bench.path(path).display().to_string();
        let tools = "\"/usr\", \"-/bin\", \"-/lib\", \"-/lib64\"";
        let lists = match access {
            "read_only" => format!("read_only = [{tools}, \"{path}\"]"),
            _ => format!("read_only = [{tools}]\nread_write = [\"{path}\"]"),
        };
        bench
            .write("conf/profile.toml", &format!("extends = \"default\"\n[filesystem]\n{lists}\n"));
        bench.run(&[], "true").output().unwrap()
    };
    check(&shown("home/work", "read_write"), 0, "");
    for refused in ["home", "home/.local", "home/.local/keys/one", "conf", "state", "state/keys"] {
        for access in ["read_only", "read_write"] {
            let output = shown(refused, access);
            let said = stderr(&output);
            assert_eq!(output.status.code(), Some(125), "{refused}: {said}");
            assert!(said.contains("holds or lies in"), "{refused}: {said}");
        }
    }
}

#[test]
fn a_workspace_holds_neither_state_nor_the_file_of_a_source() {
    let bench = Bench::new();
    bench.write("ws/key", VALUE);
    let key = bench.path("ws/key").display().to_string();
    let secret =
        format!("[secrets.one]\nsource = \"file\"\npath = \"{key}\"\nallow = [\"a.b@c\"]\n");
    check(&bench.run(&[], "true").output().unwrap(), 0, "");
    bench.write("conf/sublet.toml", &secret);
    check(&bench.run(&[], "true").output().unwrap(), 125, "");

    // A state that the first run would make, named through what is not its parent.
    let mut command = sublet();
    command.arg("--state-dir").arg(bench.path("conf/../ws/state")).arg("run");
    command
        .arg("--workspace")
        .arg(bench.path("ws"))
        .args(["--", "true"])
        .env("HOME", "/nonexistent");
    check(&command.output().unwrap(), 125, "");
}

#[test]
fn a_link_in_the_workspace_leads_no_bind_elsewhere() {
    let bench = Bench::new();
    for made in ["ws/fixed/hooks", "elsewhere/hooks"] {
        std::fs::create_dir_all(bench.path(made)).unwrap();
    }
    bench.write("elsewhere/hooks/key", VALUE);
    let hooks = bench.path("ws/fixed/hooks").display().to_string();
    let tools = "\"/usr\", \"-/bin\", \"-/lib\", \"-/lib64\"";
    let lists = format!("[filesystem]\nread_only = [{tools}, \"{hooks}\"]\n");
    bench.write("conf/profile.toml", &format!("extends = \"default\"\n{lists}"));
    let output = bench.run(&[], "touch ok fixed/ok; touch fixed/hooks/x || echo fixed").output();
    check(&output.unwrap(), 0, "fixed");

    // What an earlier exec can do to the next one.
    std::fs::rename(bench.path("ws/fixed"), bench.path("ws/away")).unwrap();
    for target in ["../elsewhere", "/usr"] {
        std::os::unix::fs::symlink(target, bench.path("ws/fixed")).unwrap();
        std::fs::create_dir_all(bench.path("ws/elsewhere/hooks")).unwrap();
        let output = bench.run(&[], "cat fixed/hooks/key").output().unwrap();
        assert_eq!(output.status.code(), Some(125), "{target}: {}", stderr(&output));
        std::fs::remove_file(bench.path("ws/fixed")).unwrap();
    }
    std::fs::create_dir(bench.path("ws/fixed")).unwrap();
    std::os::unix::fs::symlink("../../elsewhere/hooks", bench.path("ws/fixed/hooks")).unwrap();
    check(&bench.run(&[], "true").output().unwrap(), 125, "");
}

/// The cgroups that execs of sublet have on this machine, ours and others'.
fn has_cgroup(exec: &str) -> bool {
    ["/sys/fs/cgroup/sublet", "/sys/fs/cgroup/unified/sublet"]
        .iter()
        .any(|parent| PathBuf::from(parent).join(format!("sublet-{exec}")).exists())
}

/// The exec that the trail of this bench began last.
fn last_exec(bench: &Bench) -> String {
    let output = bench.sublet().args(["audit", "list", "--json"]).output().unwrap();
    let started = stdout(&output)
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap())
        .rfind(|event| event["type"] == "exec.started");
    started.unwrap()["exec_id"].as_str().unwrap().to_owned()
}

#[test]
fn what_broker_and_launcher_left_when_both_were_killed_goes_with_the_next_start() {
    let bench = Bench::new();
    let mut child = bench.run(&[], "touch ready; exec sleep 60").spawn().unwrap();
    assert!(comes_true(|| bench.path("ws/ready").exists()));
    let children = format!("/proc/{0}/task/{0}/children", child.id());
    let launcher: i32 = std::fs::read_to_string(children).unwrap().trim().parse().unwrap();
    let launcher = rustix::process::Pid::from_raw(launcher).unwrap();
    let init = format!("/proc/{0}/task/{0}/children", launcher.as_raw_nonzero());
    let init: i32 = std::fs::read_to_string(init).unwrap().trim().parse().unwrap();
    let exec = last_exec(&bench);

    rustix::process::kill_process(launcher, rustix::process::Signal::KILL).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(comes_true(|| !PathBuf::from(format!("/proc/{init}")).exists()), "the tree dies");
    check(&bench.run(&[], "true").output().unwrap(), 0, "");
    assert!(!has_cgroup(&exec));
}

#[test]
fn a_broker_that_fails_leaves_when_its_exec_is_gone() {
    let bench = Bench::new();
    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    let mut command = bench.run(&[], "touch ready; echo x; exec sleep 60");
    assert_eq!(command.stdout(full).stderr(Stdio::null()).status().unwrap().code(), Some(125));
    assert!(bench.path("ws/ready").exists());
    assert!(!has_cgroup(&last_exec(&bench)));
}

#[test]
fn init_of_an_ordinary_users_exec_is_not_to_be_looked_into() {
    use std::os::unix::fs::MetadataExt;
    use std::os::unix::process::CommandExt;
    const NOBODY: u32 = 65534;
    let bench = Bench::new();
    // The state is made by the user; the binary may lie where only root can go.
    let binary = bench.path("sublet");
    std::fs::copy(env!("CARGO_BIN_EXE_sublet"), &binary).unwrap();
    for owned in ["", "ws", "conf", "conf/sublet.toml", "conf/profile.toml"] {
        std::os::unix::fs::chown(bench.path(owned), Some(NOBODY), Some(NOBODY)).unwrap();
    }
    let plain = bench.run(&[], "touch ready; exec sleep 60");
    let mut command = Command::new(&binary);
    command.args(plain.get_args()).env("HOME", bench.path("home")).current_dir(bench.dir.path());
    command.uid(NOBODY).gid(NOBODY).stdin(Stdio::null());
    let mut child = command.spawn().unwrap();
    if !comes_true(|| bench.path("ws/ready").exists()) {
        // A host that gives this user no user namespaces says so; `sublet doctor` is for that.
        assert_eq!(child.wait().unwrap().code(), Some(125));
        return;
    }
    let child_of = |pid: u32| -> u32 {
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
        children.unwrap().trim().parse().unwrap()
    };
    let init = child_of(child_of(child.id()));
    let command = child_of(init);
    let owner = |pid: u32| std::fs::metadata(format!("/proc/{pid}/environ")).unwrap().uid();
    // Of what is not dumpable, proc(5) has it, root owns the files; the command itself is the control.
    assert_eq!((owner(init), owner(command)), (0, NOBODY));
    signal(&child, rustix::process::Signal::TERM);
    assert!(ends_soon(&mut child));
}

#[test]
fn a_refusal_says_what_failed_once() {
    let bench = Bench::new();
    let output = bench
        .sublet()
        .args(["run", "--workspace"])
        .arg(bench.path("ws"))
        .args(["--", "nowhere-to-be-found"])
        .output()
        .unwrap();
    check(&output, 127, "");
    assert_eq!(stderr(&output).matches("not found").count(), 1, "{}", stderr(&output));
}

#[test]
fn ctrl_c_is_heard_while_a_source_is_slow() {
    let bench = Bench::new();
    bench.mint("sleep 8; echo '{\"value\":\"hunter2-hunter2\"}'");
    let mut command = bench.run(&["--lease=minted.read@a.internal"], "touch ran");
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(500));
    signal(&child, rustix::process::Signal::INT);
    assert!(ends_soon(&mut child));
    check(&child.wait_with_output().unwrap(), 130, "");
    assert!(!bench.path("ws/ran").exists());
}

#[test]
fn a_get_that_was_refused_is_in_the_trail_and_a_flood_of_them_is_not() {
    let bench = Bench::new();
    bench.store_value();
    let get =
        "printf 'protocol=https\\nhost=%s\\n\\n' $host | /run/sublet/bin/sublet git-credential get";
    let script = format!("for host in a.internal a.internal b c d e f g h i; do {get}; done; true");
    let output = bench.run(&["--lease=vault.git@a.internal"], &script).output().unwrap();
    check(&output, 0, "password=***");
    let trail = bench.sublet().args(["--json", "audit", "list"]).output().unwrap();
    let denied: Vec<serde_json::Value> = stdout(&trail)
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .filter(|event: &serde_json::Value| event["type"] == "lease.denied")
        .collect();
    assert_eq!(denied.len(), 5, "{denied:?}");
    assert_eq!(denied[0]["reason"], "uses_exhausted");
    assert_eq!(denied[1]["reason"], "audience_not_permitted");
}

#[test]
fn a_host_that_forbids_user_namespaces_is_told_as_such() {
    let bench = Bench::new();
    // In a user namespace of its own, whose limit on further ones is none.
    let limit = "echo 0 >/proc/sys/user/max_user_namespaces && exec \"$@\"";
    let plain = bench.run(&[], "touch ran");
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "--mount", "sh", "-c", limit, "sh"]);
    command.arg(plain.get_program()).args(plain.get_args()).env("HOME", "/nonexistent");
    let output = command.output().unwrap();
    check(&output, 125, "");
    let said = stderr(&output);
    assert!(said.contains("user namespace") && said.contains("sublet doctor"), "{said}");
    assert!(!bench.path("ws/ran").exists());
}

#[test]
fn a_managed_value_as_an_argument_is_refused_before_the_trail_has_it() {
    let bench = Bench::new();
    bench.store_value();
    let mut command = bench.run(&[], "touch ran");
    let output = command.arg(VALUE).output().unwrap();
    check(&output, 125, "");
    assert!(stderr(&output).contains("managed secret `stored`"), "{}", stderr(&output));
    assert!(!stderr(&output).contains(VALUE) && !bench.path("ws/ran").exists());
    // Many are looked at by other means.
    let output = bench.run(&[], "touch ran").args(["x"; 300]).arg(VALUE).output().unwrap();
    check(&output, 125, "");
    assert!(stderr(&output).contains("argument 303"), "{}", stderr(&output));
    assert!(!bench.path("ws/ran").exists());
    check(&bench.run(&[], "touch ran").arg("another").output().unwrap(), 0, "");
    // What was kept with the newline of `echo` is the same to whoever gives it without.
    let mut rotate = bench.sublet();
    rotate.args(["secret", "rotate", "stored"]).stdin(Stdio::piped());
    let mut rotate = rotate.spawn().unwrap();
    rotate.stdin.take().unwrap().write_all(b"hunter3-hunter3\n").unwrap();
    assert!(rotate.wait().unwrap().success());
    let output = bench.run(&["--env", "A=hunter3-hunter3"], "touch ran").output().unwrap();
    check(&output, 125, "");
    assert!(stderr(&output).contains("managed secret `stored`"), "{}", stderr(&output));
}

/// What a command says goes to a full disk: it did run, and what it was lent is over.
#[test]
fn a_command_whose_output_nobody_takes_has_run_in_the_trail_too() {
    let bench = Bench::new();
    bench.store_value();
    let lease = ["--lease=vault.read@a.internal,channel=file"];
    let mut command = bench.run(&lease, "touch ran; echo said; sleep 600");
    command.stdout(std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap());
    let output = command.output().unwrap();
    check(&output, 125, "");
    assert!(stderr(&output).contains("could not relay"), "{}", stderr(&output));
    assert!(bench.path("ws/ran").exists());
    let trail = bench.sublet().args(["--json", "audit", "list"]).output().unwrap();
    let ended: Vec<serde_json::Value> = stdout(&trail)
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .filter(|e: &serde_json::Value| e["outcome"] == "interrupted")
        .collect();
    let of = |kind: &str| ended.iter().find(|e| e["type"] == kind);
    assert_eq!(of("exec.exited").unwrap()["reason"], "relay_failed", "{ended:?}");
    assert!(of("lease.interrupted").is_some(), "{ended:?}");
    check(&bench.sublet().args(["audit", "verify"]).output().unwrap(), 0, "");
}

/// A trail that was made anew goes as far as the old one, or further, and verifies in itself: what tells of it is the
/// head outside of the database, which the next run would have written over.
#[test]
fn a_trail_that_was_rewritten_is_not_gone_on_with() {
    let [bench, other] = [(), ()].map(|()| Bench::new());
    check(&bench.run(&[], "true").output().unwrap(), 0, "");
    for _ in 0..2 {
        check(&other.run(&[], "true").output().unwrap(), 0, "");
    }
    let [theirs, ours, kept] = [other.path("state/db"), bench.path("state/db"), bench.path("kept")];
    let replace = |from: &PathBuf| {
        std::fs::remove_dir_all(&ours).unwrap();
        check(&Command::new("cp").arg("-a").args([from, &ours]).output().unwrap(), 0, "");
    };
    check(&Command::new("cp").arg("-a").args([&ours, &kept]).output().unwrap(), 0, "");
    replace(&theirs);
    for _ in 0..2 {
        let output = bench.run(&[], "touch ran").output().unwrap();
        check(&output, 125, "");
        assert!(stderr(&output).contains("rewritten"), "{}", stderr(&output));
        assert!(!bench.path("ws/ran").exists());
        check(&bench.sublet().args(["audit", "verify"]).output().unwrap(), 1, "");
    }
    replace(&kept);
    check(&bench.run(&[], "touch ran").output().unwrap(), 0, "");
    check(&bench.sublet().args(["audit", "verify"]).output().unwrap(), 0, "");
}

/// 125 says that nothing ran.
#[test]
fn a_command_whose_end_cannot_be_recorded_has_its_own_exit_status() {
    let bench = Bench::new();
    bench.store_value();
    let report = bench.path("report.json");
    let flags =
        ["--lease=vault.read@a.internal,channel=file", "--report", report.to_str().unwrap()];
    let script = "touch up; until test -e go; do sleep 0.02; done; exit 3";
    let running = bench.run(&flags, script).stderr(Stdio::piped()).spawn().unwrap();
    let up = bench.path("ws/up");
    let began = Instant::now();
    while !up.exists() {
        assert!(began.elapsed() < Duration::from_secs(20), "it does not begin");
        std::thread::sleep(Duration::from_millis(10));
    }
    let (database, moved) = (bench.path("state/db/sublet.db"), bench.path("state/db/moved"));
    std::fs::rename(&database, &moved).unwrap();
    std::fs::write(bench.path("ws/go"), "").unwrap();
    let output = running.wait_with_output().unwrap();
    check(&output, 3, "");
    assert!(stderr(&output).contains("could not be recorded"), "{}", stderr(&output));
    let report: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&report).unwrap()).unwrap();
    assert_eq!(
        (&report["exit_status"], &report["scrubbed"][0]["wiped"]),
        (&3.into(), &true.into())
    );
    std::fs::rename(&moved, &database).unwrap();
    check(&bench.run(&[], "true").output().unwrap(), 0, "");
    let listed = bench.sublet().args(["audit", "list"]).output().unwrap();
    assert!(
        stdout(&listed).contains("lease.interrupted"),
        "{} {}",
        stdout(&listed),
        stderr(&listed)
    );
}

#[test]
fn events_of_an_exec_name_its_request_and_its_leases() {
    let bench = Bench::new();
    bench.store_value();
    check(&bench.run(&[], "true").output().unwrap(), 0, "");
    let leased = ["--lease=vault.read@a.internal,channel=file"];
    check(&bench.run(&leased, "true").output().unwrap(), 0, "");
    let listed = bench.sublet().args(["--json", "audit", "list"]).output().unwrap();
    let events: Vec<serde_json::Value> =
        stdout(&listed).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let of = |kind: &str| events.iter().filter(|e| e["type"] == kind).collect::<Vec<_>>();
    let lease = &of("lease.granted")[0]["lease_id"];
    for (index, leases) in [serde_json::json!([]), serde_json::json!([lease])].iter().enumerate() {
        let (started, exited) = (of("exec.started")[index], of("exec.exited")[index]);
        for event in [started, exited] {
            assert_eq!(&event["detail"]["lease_ids"], leases, "{event}");
            assert!(event["detail"]["request_id"].as_str().unwrap().starts_with("req_"));
        }
        assert_eq!(started["detail"]["request_id"], exited["detail"]["request_id"]);
    }
    let of_leased = &of("lease.granted")[0]["detail"]["request_id"];
    assert_eq!(&of("exec.scrubbed")[0]["detail"]["request_id"], of_leased);
    assert_eq!(&of("exec.exited")[1]["detail"]["request_id"], of_leased);
}

/// Its deliveries were filled before it could be tried.
#[test]
fn a_leased_exec_that_did_not_start_is_scrubbed_in_the_trail_too() {
    let bench = Bench::new();
    bench.store_value();
    let mut command = bench.run(&["--lease=vault.read@a.internal,channel=file"], "true");
    let words: Vec<_> = command.get_args().map(|word| word.to_owned()).collect();
    let program = words.iter().position(|word| word == "/bin/sh").unwrap();
    command = bench.sublet();
    let own = command.get_args().count();
    command.args(&words[own..program]).arg("/no/such/command").stdin(Stdio::null());
    check(&command.output().unwrap(), 127, "");
    let listed = bench.sublet().args(["--json", "audit", "list"]).output().unwrap();
    let events: Vec<serde_json::Value> =
        stdout(&listed).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let of =
        |kind: &str| events.iter().find(|e| e["type"] == kind).unwrap_or_else(|| panic!("{kind}"));
    assert_eq!(of("exec.exited")["outcome"], "not_started");
    let (scrubbed, lease) =
        (of("exec.scrubbed"), of("lease.granted")["lease_id"].as_str().unwrap());
    assert_eq!(
        (&scrubbed["outcome"], &scrubbed["detail"][lease]["wiped"]),
        (&"wiped".into(), &true.into())
    );
    assert_eq!(scrubbed["detail"][lease]["bytes"], VALUE.len());
}

/// Events that were archived are gone from the database, and not from the trail.
#[test]
fn a_trail_that_was_rotated_is_gone_on_with() {
    let bench = Bench::new();
    for _ in 0..2 {
        check(&bench.run(&[], "true").output().unwrap(), 0, "");
    }
    let archive = bench.path("archive");
    let rotate = ["audit", "rotate", "--out", archive.to_str().unwrap()];
    let rotated = bench.sublet().args(rotate).output().unwrap();
    check(&rotated, 0, &stdout(&rotated));
    for _ in 0..2 {
        check(&bench.run(&[], "true").output().unwrap(), 0, "");
        let verify = ["audit", "verify", "--archive", archive.to_str().unwrap()];
        let verified = bench.sublet().args(verify).output().unwrap();
        check(&verified, 0, &stdout(&verified));
    }
}
