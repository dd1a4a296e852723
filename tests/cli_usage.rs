//! The command line from outside: help, usage errors, exit statuses, JSON errors, colours, broken pipes.

mod cli_common;

use cli_common::{json, stderr, stdout, sublet};

#[test]
fn help_and_version_go_to_standard_output_and_are_no_error() {
    for flags in [&["--help"][..], &["-h"], &["--version"], &["run", "--help"], &["help", "run"]] {
        let output = sublet().args(flags).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{flags:?}");
        assert!(stdout(&output).contains("sublet"), "{flags:?}");
        assert_eq!(stderr(&output), "", "{flags:?}");
    }
}

#[test]
fn bad_usage_is_125_beside_a_command_and_2_elsewhere() {
    #[track_caller]
    fn check(args: &[&str], status: i32, names: &str) {
        let output = sublet().args(args).output().unwrap();
        assert_eq!(output.status.code(), Some(status), "{args:?}: {}", stderr(&output));
        assert!(stderr(&output).contains(names), "{args:?}: {}", stderr(&output));
        assert_eq!(stdout(&output), "", "{args:?}");
    }
    check(&["run"], 125, "COMMAND");
    check(&["run", "true"], 125, "after `--`");
    check(&["run", "--"], 125, "COMMAND");
    check(&["run", "--timeout", "soon", "--", "true"], 125, "`soon` is no duration");
    check(&["run", "--network", "bridge", "--", "true"], 125, "audience");
    check(&["run", "--run", "a/b", "--", "true"], 125, "`a/b` is no run id");
    check(&["--config", "run", "run", "--nope", "--", "true"], 125, "--nope");
    check(&["demo", "--nope"], 125, "--nope");
    check(&["doctor", "--nope"], 2, "--nope");
    check(&["doctr"], 2, "doctor");
    check(&["serve", "--nope"], 2, "--nope");
    check(&[], 2, "Usage");
    // What follows the dashes is the command's, whatever it looks like.
    check(&["doctor", "--", "run"], 2, "run");
}

#[test]
fn an_error_in_json_is_one_object_on_standard_error() {
    let output =
        sublet().args(["run", "--json", "--timeout", "soon", "--", "true"]).output().unwrap();
    assert_eq!(output.status.code(), Some(125));
    assert_eq!(stdout(&output), "");
    let error = &json(&stderr(&output))["error"];
    assert_eq!(error["stage"], "usage");
    assert_eq!(error["reason"], "bad_usage");
    assert!(error["message"].as_str().unwrap().contains("`soon` is no duration"));
    assert!(error["hint"].as_str().unwrap().contains("--help"));
    assert_eq!(error.as_object().unwrap().len(), 4);
}

#[test]
fn the_commands_own_json_flag_is_not_ours() {
    let output = sublet().args(["run", "--nope", "--", "true", "--json"]).output().unwrap();
    assert!(stderr(&output).starts_with("error: "), "{}", stderr(&output));
}

#[test]
fn failures_are_plain_text_where_no_terminal_reads_them() {
    let output = sublet().args(["man", "nonesuch"]).output().unwrap();
    let text = stderr(&output);
    assert!(text.starts_with("sublet: there is no manual page sublet-nonesuch\n  try: "), "{text}");
    assert!(!text.contains('\x1b'), "{text:?}");
}

#[test]
fn a_hostile_name_in_a_message_is_shown_not_obeyed() {
    let output = sublet().args(["man", "\x1b]0;owned\x07"]).output().unwrap();
    assert!(!stderr(&output).contains('\x1b'));
    assert!(stderr(&output).contains("\\u{1b}]0;owned"));
}

#[test]
fn a_reader_that_goes_away_is_met_with_silence() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = sublet().args(["completions", "bash"]).stdout(writer).output().unwrap();
    assert_eq!(stderr(&output), "");
    assert_eq!(output.status.code(), Some(141));
}

#[test]
fn a_full_disk_behind_standard_output_is_told() {
    let full = std::fs::File::create("/dev/full").unwrap();
    let output = sublet().args(["completions", "bash"]).stdout(full).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("cannot write to standard output"), "{}", stderr(&output));
}

/// Else the next file that is opened, such as the state, is where messages go.
#[test]
fn streams_that_are_closed_are_opened_on_dev_null() {
    let place = tempfile::tempdir().unwrap();
    let program = sublet().get_program().to_owned();
    // The control: without the program, they are closed.
    for (closed, program) in [(false, program), (true, "/bin/sleep".into())] {
        let mut command = std::process::Command::new("/bin/sh");
        command.args(["-c", "exec \"$0\" \"$@\" >&- 2>&-"]).arg(&program);
        if closed {
            command.arg("60");
        } else {
            command.arg("--state-dir").arg(place.path().join("state")).args(["secret", "set", "x"]);
        }
        let mut child = command.stdin(std::process::Stdio::piped()).spawn().unwrap();
        let of = |name: &str| format!("/proc/{}/{name}", child.id());
        let began = std::time::Instant::now();
        let is_there = || {
            let exe = std::fs::read_link(of("exe")).ok();
            let at = exe.zip(std::fs::canonicalize(&program).ok());
            // It waits, for its input or its time.
            at.is_some_and(|(exe, program)| exe == program)
                && std::fs::read_to_string(of("stat")).is_ok_and(|stat| stat.contains(") S "))
        };
        while !is_there() {
            assert!(began.elapsed().as_secs() < 20, "{program:?} does not wait");
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        for stream in ["fd/1", "fd/2"] {
            let leads_to = std::fs::read_link(of(stream)).ok();
            let expected = (!closed).then(|| std::path::PathBuf::from("/dev/null"));
            assert_eq!(leads_to, expected, "{stream}");
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
