//! What once went wrong in a real run, each tried again with the real binary: an awkward caller, a hostile
//! command, a death in the middle. Needs root, as the privileged mode does; without it each test is
//! skipped.

mod cli_common;

use std::path::{Path, PathBuf};
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
    /// `None` without root.
    fn new() -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            return None;
        }
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
        Some(bench)
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
    let Some(bench) = Bench::new() else { return };
    let mut through = Command::new("sh");
    through.args(["-c", "umask 077; exec \"$@\"", "sh"]);
    let plain = bench.run(&[], "umask; id -un; cat /etc/hostname");
    through.arg(plain.get_program()).args(plain.get_args()).env("HOME", "/nonexistent");
    check(&through.output().unwrap(), 0, "0077\nagent\nsublet\n");
}

#[test]
fn an_input_that_cannot_be_read_is_an_empty_one() {
    let Some(bench) = Bench::new() else { return };
    // As nohup(1) leaves it.
    let write_only = std::fs::File::options().write(true).open("/dev/null").unwrap();
    let output = bench.run(&[], "cat; echo on").stdin(write_only).output().unwrap();
    check(&output, 0, "on");
    let directory = std::fs::File::open("/").unwrap();
    check(&bench.run(&[], "cat; echo on").stdin(directory).output().unwrap(), 0, "on");
}

/// Ends this process, which we started, and says whether it went by itself before long.
fn ends_soon(child: &mut std::process::Child) -> bool {
    let ended = comes_true_for(child);
    if !ended {
        child.kill().unwrap();
        child.wait().unwrap();
    }
    ended
}

fn comes_true_for(child: &mut std::process::Child) -> bool {
    let until = Instant::now() + Duration::from_secs(5);
    while Instant::now() < until {
        if child.try_wait().unwrap().is_some() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    false
}

fn signal(child: &std::process::Child, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_child(child);
    rustix::process::kill_process(pid, signal).unwrap();
}

#[test]
fn a_terminal_whose_command_reads_nothing_still_lets_signals_through() {
    let Some(bench) = Bench::new() else { return };
    let mut command = bench.run(&["--tty"], "stty raw -echo; echo ready; exec sleep 60");
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    // More than a terminal holds; the writer stays with what does not go in.
    std::thread::spawn(move || std::io::Write::write_all(&mut stdin, &[b'x'; 4 << 20]));
    let mut seen = [0; 5];
    std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut seen).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    signal(&child, rustix::process::Signal::TERM);
    assert!(ends_soon(&mut child));
}

#[test]
fn a_reader_that_takes_nothing_does_not_keep_us_from_ending() {
    let Some(bench) = Bench::new() else { return };
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
    let Some(bench) = Bench::new() else { return };
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
