//! The credential helper against a socket of the test's own: what git sends reaches it whole, what it
//! answers reaches git, a refusal is named, and git is told to stop asking.

mod cli_common;

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::process::{Output, Stdio};

use cli_common::{stderr, stdout, sublet};

/// Runs the helper against a server that answers `reply`; returns what the server was sent.
fn helper(operation: &str, request: &[u8], reply: &'static [u8]) -> (Output, Option<Vec<u8>>) {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("git.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    listener.set_nonblocking(operation != "get" || request.contains(&b'\r')).unwrap();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().ok()?;
        let mut asked = Vec::new();
        stream.read_to_end(&mut asked).unwrap();
        stream.write_all(reply).unwrap();
        Some(asked)
    });
    let mut child = sublet()
        .args(["git-credential", operation, "--socket"])
        .arg(&socket)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(request).unwrap();
    let output = child.wait_with_output().unwrap();
    (output, server.join().unwrap())
}

const REQUEST: &[u8] = b"capability[]=authtype\nprotocol=https\nhost=github.com\npath=a/b.git\n\n";

#[test]
fn a_request_passes_whole_and_so_does_its_answer() {
    let (output, asked) = helper("get", REQUEST, b"username=x\npassword=demo=1\n\n");
    assert_eq!(asked.as_deref(), Some(REQUEST));
    assert_eq!(stdout(&output), "username=x\npassword=demo=1\n\n");
    assert_eq!(output.status.code(), Some(0));
}

#[test]
fn a_refusal_is_named_and_git_stops_asking() {
    let reply = b"sublet-reason=audience_not_permitted\nsublet-message=not for evil.com\nsublet-hint=none\n";
    let (output, _) = helper("get", REQUEST, reply);
    assert_eq!(stdout(&output), "quit=1\n");
    assert!(stderr(&output).contains("audience_not_permitted"), "{}", stderr(&output));
    assert!(stderr(&output).contains("why: not for evil.com"), "{}", stderr(&output));
    assert_eq!(output.status.code(), Some(1));
}

#[test]
fn an_answer_that_is_no_credential_never_reaches_git_or_a_message() {
    for reply in [&b"password=hunter2\nevil\n"[..], b"url=hunter2\n", b"password=hunter2\0\n", b""]
    {
        let (output, _) = helper("get", REQUEST, reply);
        assert_eq!(stdout(&output), "quit=1\n", "{reply:?}");
        assert!(!stderr(&output).contains("hunter2"), "{}", stderr(&output));
        assert_eq!(output.status.code(), Some(2));
    }
}

#[test]
fn a_request_with_a_carriage_return_is_not_even_passed_on() {
    let (output, asked) = helper("get", b"protocol=https\nhost=a\rb\n", b"password=hunter2\n");
    assert_eq!(asked, None);
    assert_eq!(stdout(&output), "quit=1\n");
}

#[test]
fn store_and_erase_are_swallowed() {
    for operation in ["store", "erase"] {
        let (output, asked) = helper(operation, b"protocol=https\npassword=hunter2\n", b"");
        assert_eq!((asked, output.status.code()), (None, Some(0)), "{operation}");
        assert_eq!((stdout(&output), stderr(&output)), (String::new(), String::new()));
    }
}

#[test]
fn outside_an_exec_it_says_how_to_get_a_lease() {
    let output = sublet()
        .args(["git-credential", "get", "--socket", "/nonexistent/git.sock"])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert_eq!(stdout(&output), "quit=1\n");
    assert!(stderr(&output).contains("sublet run --lease"), "{}", stderr(&output));
    assert_eq!(output.status.code(), Some(2));
}
