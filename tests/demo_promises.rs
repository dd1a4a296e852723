//! `sublet demo`: every promise kept and nothing left, as root and as an ordinary user; in failure too.
#![forbid(unsafe_code)]

use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

mod cli_common;
use cli_common::{stderr, stdout, sublet};

const ORDINARY: u32 = 65534;

/// Runs the demo below `dir`, which must be empty afterwards.
fn demo(dir: &Path, program: Option<&Path>, args: &[&str]) -> Output {
    let mut command = match program {
        None => sublet(),
        Some(program) => Command::new(program),
    };
    if program.is_some() {
        command.uid(ORDINARY).gid(ORDINARY).env("HOME", dir);
    }
    let output =
        command.arg("demo").args(args).env("TMPDIR", dir).current_dir(dir).output().unwrap();
    assert_eq!(std::fs::read_dir(dir).unwrap().count(), 0, "the demo left something");
    output
}

fn fresh() -> (tempfile::TempDir, PathBuf) {
    let home = tempfile::tempdir().unwrap();
    std::fs::set_permissions(home.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let dir = home.path().join("t");
    std::fs::create_dir(&dir).unwrap();
    (home, dir)
}

#[track_caller]
fn check(output: &Output) {
    assert!(output.status.success(), "{}{}", stdout(output), stderr(output));
    assert_eq!(stderr(output), "");
}

#[test]
fn every_promise_is_kept_and_nothing_is_left() {
    let (_home, dir) = fresh();
    let output = demo(&dir, None, &[]);
    check(&output);
    assert!(stdout(&output).contains("promises kept") && !stdout(&output).contains("FAILED"));
    if rustix::process::geteuid().is_root() {
        let (home, dir) = fresh();
        chown(&dir, Some(ORDINARY), Some(ORDINARY)).unwrap();
        let program = home.path().join("sublet");
        std::fs::copy(env!("CARGO_BIN_EXE_sublet"), &program).unwrap();
        check(&demo(&dir, Some(&program), &[]));
    }
}

#[test]
fn json_is_one_object_a_step() {
    let (_home, dir) = fresh();
    let output = demo(&dir, None, &["--json"]);
    check(&output);
    let text = stdout(&output);
    let steps: Vec<serde_json::Value> =
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(steps.len(), 6);
    for step in &steps {
        let promises = step["promises"].as_array().unwrap();
        assert!(!promises.is_empty());
        assert!(promises.iter().all(|promise| promise["kept"] == true), "{step}");
    }
}

#[test]
fn what_cannot_be_shown_fails_and_leaves_nothing() {
    let (_home, dir) = fresh();
    let missing = dir.join("missing");
    let mut command = sublet();
    let output = command.arg("demo").env("TMPDIR", &missing).output().unwrap();
    assert_eq!(output.status.code(), Some(125));
    assert!(stderr(&output).contains("TMPDIR"));
}

#[test]
fn an_interrupt_ends_it_and_leaves_nothing() {
    let (_home, dir) = fresh();
    let mut command = sublet();
    command.args(["demo", "--json"]).env("TMPDIR", &dir);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut first = String::new();
    BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut first).unwrap();
    assert!(
        std::fs::read_dir(&dir).unwrap().count() == 1,
        "the control: it is there while it runs"
    );
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", stderr(&output));
    assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 0);
}
