//! The credential helper outside an exec: git is told to stop asking, and nothing is kept.

mod cli_common;

use std::io::Write;
use std::process::{Output, Stdio};

use cli_common::{stderr, stdout, sublet};

fn helper(operation: &str, request: &[u8]) -> Output {
    let mut child = sublet()
        .args(["git-credential", operation])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A helper that refuses early does not read to the end.
    drop(child.stdin.take().unwrap().write_all(request));
    child.wait_with_output().unwrap()
}

#[test]
fn store_and_erase_are_swallowed() {
    for operation in ["store", "erase"] {
        let output = helper(operation, b"protocol=https\npassword=hunter2\n\n");
        assert_eq!(output.status.code(), Some(0), "{operation}");
        assert_eq!((stdout(&output), stderr(&output)), (String::new(), String::new()));
    }
}

#[test]
fn without_a_lease_git_is_told_to_stop_asking_and_the_person_how_to_get_one() {
    let output = helper("get", b"protocol=https\nhost=github.com\npassword=hunter2\n\n");
    assert_eq!(stdout(&output), "quit=1\n");
    assert!(stderr(&output).contains("sublet run --profile P --lease"), "{}", stderr(&output));
    assert!(!stderr(&output).contains("hunter2"));
    assert_eq!(output.status.code(), Some(2));
}
