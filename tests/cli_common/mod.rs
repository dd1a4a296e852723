//! What the tests of the command line share. Each test has a home of its own, so that no test sees the
//! configuration or the state of the person who runs it.
#![allow(dead_code)]

use std::process::{Command, Output};

/// The binary under test, with nothing of the caller's environment that it would heed.
pub fn sublet() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sublet"));
    for name in ["SUBLET_CONFIG", "XDG_CONFIG_HOME", "XDG_STATE_HOME", "NO_COLOR", "SUDO_USER"] {
        command.env_remove(name);
    }
    command
}

pub fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// One JSON value on one line.
#[track_caller]
pub fn json(text: &str) -> serde_json::Value {
    assert_eq!(text.matches('\n').count(), 1, "{text:?}");
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text:?}"))
}
