//! `sublet secret` from outside: values go in by standard input or a terminal, none comes out, and each
//! change is in the trail.

mod cli_common;

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Output, Stdio};

use cli_common::{json, stderr, stdout, sublet};

const VALUE: &[u8] = b"hunter2-hunter2-hunter2";

fn secret(state: &Path, args: &[&str], input: &[u8]) -> Output {
    let mut child = sublet()
        .env("HOME", state)
        .args(["secret", "--state-dir"])
        .arg(state)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A command that refuses early does not read.
    drop(child.stdin.take().unwrap().write_all(input));
    child.wait_with_output().unwrap()
}

fn trail(state: &Path) -> Vec<serde_json::Value> {
    let output =
        sublet().args(["audit", "list", "--json", "--state-dir"]).arg(state).output().unwrap();
    stdout(&output).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn a_value_is_set_rotated_listed_and_removed_and_never_shown() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let mut said = String::new();
    let mut ok = |args: &[&str], input: &[u8]| {
        let output = secret(&state, args, input);
        assert_eq!(output.status.code(), Some(0), "{args:?}: {}", stderr(&output));
        said += &(stdout(&output) + &stderr(&output));
        stdout(&output)
    };
    assert!(ok(&["set", "bot"], VALUE).contains("kept bot, version 1"));
    assert_eq!(json(&ok(&["rotate", "bot", "--json"], VALUE))["version"], 2);
    let listed = json(&ok(&["list", "--json"], b""));
    assert_eq!((&listed["name"], &listed["version"]), (&"bot".into(), &2.into()));
    ok(&["rm", "bot"], b"");
    assert!(ok(&["list"], b"").contains(&format!("no secret is kept in {}", state.display())));
    assert!(!said.contains("hunter2"), "{said}");

    let events = trail(&state);
    let types: Vec<&str> = events.iter().map(|event| event["type"].as_str().unwrap()).collect();
    assert_eq!(types, ["secret.set", "secret.rotated", "secret.removed"]);
    assert!(events.iter().all(|event| event["detail"]["secret"] == "bot"));
    assert!(events.iter().all(|event| event["principal"].is_string()));
}

#[test]
fn a_value_that_is_typed_as_an_argument_is_not_said_again() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    for action in ["set", "rotate"] {
        for more in [
            &["hunter2hunter2"][..],
            &["hunter2hunter2", "--json"],
            &["--json", "--", "-hunter2"],
            &["--hunter2"],
            &["--trim=hunter2"],
            &["-----hunter2 KEY-----"],
        ] {
            let output = secret(&state, &[&[action, "foo"], more].concat(), b"piped");
            let said = stderr(&output);
            assert_eq!(output.status.code(), Some(2), "{more:?}: {said}");
            assert!(!(stdout(&output) + &said).contains("hunter2"), "{more:?}: {said}");
            assert!(said.contains("pipe the value in"), "{more:?}: {said}");
            if more.contains(&"--json") {
                assert_eq!(json(&said)["error"]["reason"], "bad_usage");
            }
        }
    }
    assert!(!state.exists());
    // What is no value is named as elsewhere.
    let other = sublet().args(["secret", "list", "surplus"]).output().unwrap();
    assert!(stderr(&other).contains("surplus"), "{}", stderr(&other));
}

#[test]
fn nothing_below_the_state_directory_holds_the_value() {
    fn files(dir: &Path, all: &mut Vec<u8>) {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                files(&path, all);
            } else {
                std::fs::File::open(path).unwrap().read_to_end(all).unwrap();
            }
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    secret(&state, &["set", "bot"], VALUE);
    let mut all = Vec::new();
    files(&state, &mut all);
    assert!(all.windows(3).any(|window| window == b"bot"), "the control: the name is there");
    assert!(!all.windows(7).any(|window| window == b"hunter2"));
}

#[test]
fn a_name_is_set_once_and_only_what_is_kept_is_rotated_or_removed() {
    #[track_caller]
    fn check(state: &Path, args: &[&str], reason: &str, hint: &str) {
        let output = secret(state, &[args, &["--json"]].concat(), VALUE);
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        let error = &json(&stderr(&output))["error"];
        assert_eq!(error["reason"], reason, "{args:?}");
        assert!(error["hint"].as_str().unwrap().contains(hint), "{error}");
    }
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    check(&state, &["rm", "bot"], "secret_unknown", "secret list");
    assert!(!state.exists(), "removing from nothing makes nothing");
    check(&state, &["rotate", "bot"], "secret_unknown", "secret list");
    secret(&state, &["set", "bot"], VALUE);
    check(&state, &["set", "bot"], "secret_exists", "rotate bot");
    assert_eq!(trail(&state).len(), 1);
}

#[test]
fn a_secret_that_no_lease_can_draw_on_comes_with_the_lines_to_add() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let unconfigured = secret(&state, &["set", "bot"], VALUE);
    assert!(stderr(&unconfigured).contains("[secrets.bot]"), "{}", stderr(&unconfigured));
    assert!(stderr(&unconfigured).contains("source = \"vault\""), "{}", stderr(&unconfigured));

    let config = dir.path().join("sublet.toml");
    std::fs::write(&config, "[secrets.bot]\nsource = \"vault\"\nallow = [\"a@b.com\"]\n").unwrap();
    let configured =
        secret(&state, &["rotate", "bot", "--config", config.to_str().unwrap()], VALUE);
    assert_eq!(stderr(&configured), "");
    let listed = secret(&state, &["list", "--json", "--config", config.to_str().unwrap()], b"");
    assert_eq!(json(&stdout(&listed))["configured"], true);
}

#[test]
fn a_line_feed_at_the_end_is_kept_and_told_or_trimmed() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let reasons = |args: &[&str], input: &[u8]| {
        let output = secret(&state, &[args, &["--json"]].concat(), input);
        let answer = json(&stdout(&output));
        let notes = answer["notes"].as_array().unwrap().clone();
        notes.iter().map(|n| n["reason"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert!(reasons(&["set", "a"], b"token\n").contains(&"value_ends_line".into()));
    assert!(!reasons(&["set", "b", "--trim"], b"token\n").contains(&"value_ends_line".into()));
    assert!(reasons(&["set", "c"], b"").contains(&"value_empty".into()));
}

#[test]
fn a_value_is_at_most_a_mebibyte() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let most = vec![b'x'; 1 << 20];
    assert_eq!(secret(&state, &["set", "most"], &most).status.code(), Some(0));
    let over = vec![b'x'; (1 << 20) + 1];
    let refused = secret(&state, &["set", "over"], &over);
    assert_eq!(refused.status.code(), Some(2));
    assert!(stderr(&refused).contains("at most 1048576 bytes"), "{}", stderr(&refused));
}

#[test]
fn where_nothing_can_be_recorded_nothing_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    let output = secret(&file.join("state"), &["set", "bot"], VALUE);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("why:"), "{}", stderr(&output));

    let open = dir.path().join("open");
    std::fs::create_dir(&open).unwrap();
    std::fs::set_permissions(&open, std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
    let output = secret(&open, &["set", "bot", "--json"], VALUE);
    assert_eq!(json(&stderr(&output))["error"]["reason"], "state_unsafe");
}

/// A terminal: what is typed into `keys` reaches the child, and what the child's side echoes comes back.
fn terminal() -> (std::fs::File, OwnedFd) {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let name = ptsname(&master, Vec::new()).unwrap();
    let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY | rustix::fs::OFlags::CLOEXEC;
    let slave = rustix::fs::open(name, flags, rustix::fs::Mode::empty()).unwrap();
    (std::fs::File::from(master), slave)
}

/// Types each entry when its prompt has come; returns the output and what the terminal echoed.
fn typed(state: &Path, entries: &[&str]) -> (Output, String) {
    let (mut keys, slave) = terminal();
    let mut child = sublet()
        .env("HOME", state)
        .args(["secret", "set", "bot", "--state-dir"])
        .arg(state)
        .stdin(slave.try_clone().unwrap())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut prompts = child.stderr.take().unwrap();
    for entry in entries {
        let mut prompt = Vec::new();
        while !prompt.ends_with(b": ") {
            let mut byte = [0];
            assert_eq!(prompts.read(&mut byte).unwrap(), 1, "no prompt for an entry");
            prompt.push(byte[0]);
        }
        keys.write_all(entry.as_bytes()).unwrap();
    }
    let mut output = child.wait_with_output().unwrap();
    prompts.read_to_end(&mut output.stderr).unwrap();
    // The terminal is as it was: it echoes again, and what it echoes ends what it has echoed.
    assert!(
        rustix::termios::tcgetattr(&slave)
            .unwrap()
            .local_modes
            .contains(rustix::termios::LocalModes::ECHO | rustix::termios::LocalModes::ICANON)
    );
    keys.write_all(b"end\n").unwrap();
    let mut echoed = Vec::new();
    while !echoed.ends_with(b"end\r\n") {
        let mut byte = [0];
        assert_eq!(keys.read(&mut byte).unwrap(), 1);
        echoed.push(byte[0]);
    }
    (output, String::from_utf8(echoed).unwrap())
}

#[test]
fn a_typed_value_is_asked_for_twice_and_not_echoed() {
    let dir = tempfile::tempdir().unwrap();
    let (output, echoed) = typed(&dir.path().join("state"), &["hunter2\r", "hunter2\r"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(stdout(&output).contains("kept bot"));
    assert_eq!(echoed, "end\r\n");
}

#[test]
fn entries_that_differ_and_ctrl_c_keep_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let (differ, _) = typed(&state, &["hunter2\r", "hunter3\r"]);
    assert_eq!(differ.status.code(), Some(2));
    assert!(stderr(&differ).contains("the two entries differ"), "{}", stderr(&differ));
    let (interrupted, echoed) = typed(&state, &["hunt\x03"]);
    assert_eq!(interrupted.status.code(), Some(130));
    assert_eq!(echoed, "end\r\n");
    assert!(trail(&state).is_empty());
}
