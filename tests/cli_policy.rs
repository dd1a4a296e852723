//! `sublet policy test` from outside: every denial with its allow twin, and nothing recorded.

mod cli_common;

use std::path::Path;
use std::process::Output;

use cli_common::{json, stderr, stdout, sublet};

const CONFIG: &str = r#"
[principals.alice]
permissions = ["db:read"]
[secrets.db]
source = "vault"
allow = ["db.*@db.internal:5432"]
"#;

const PROFILE: &str = r#"
extends = "default"
[[capability]]
name = "db.read"
permission = "db:read"
channels = ["env", "file"]
ttl = "10m"
uses = 2
command = [["sh", "-c", "*"]]
[[capability.audience]]
host = "db.internal:5432"
secret = "db"
variable = "DB_KEY"
[[capability]]
name = "db.any"
channels = ["env"]
command = [["**"]]
[[capability.audience]]
host = "db.internal:5432"
secret = "db"
variable = "DB_KEY"
[[capability.audience]]
host = "other.internal"
secret = "other"
variable = "OTHER_KEY"
"#;

fn host() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("sublet.toml"), CONFIG).unwrap();
    std::fs::write(dir.path().join("p.toml"), PROFILE).unwrap();
    dir
}

fn test(host: &Path, args: &[&str]) -> Output {
    sublet()
        .current_dir(host)
        .args(["policy", "test", "--config", "sublet.toml", "--state-dir", "state"])
        .args(["--profile", "p.toml"])
        .args(args)
        .output()
        .unwrap()
}

#[test]
fn every_denial_has_its_name_and_its_allow_twin() {
    let host = host();
    let check = |args: &[&str], reason: Option<&str>| {
        let output = test(host.path(), &[&["--json"], args].concat());
        let text = stdout(&output);
        let verdict = json(text.lines().next_back().map(|l| format!("{l}\n")).unwrap().as_str());
        assert_eq!(verdict["error"]["reason"].as_str(), reason, "{args:?}: {text}");
        assert_eq!(output.status.code(), Some(i32::from(reason.is_some())), "{args:?}");
    };
    let alice = ["--principal", "alice"];
    let ask = |lease: &'static str| [alice[0], alice[1], "--lease", lease];
    check(&ask("db.read@db.internal:5432"), None);
    check(
        &["--principal", "bob", "--lease", "db.read@db.internal:5432"],
        Some("permission_missing"),
    );
    check(&ask("db.write@db.internal:5432"), Some("capability_not_declared"));
    check(&ask("db.read@db.internal"), Some("audience_not_permitted"));
    check(&ask("db.read@db.internal:5432,channel=file"), None);
    check(&ask("db.read@db.internal:5432,channel=memfd"), Some("channel_mismatch"));
    check(&ask("db.read@db.internal:5432,ttl=10m"), None);
    check(&ask("db.read@db.internal:5432,ttl=11m"), Some("ttl_exceeds_policy"));
    check(&ask("db.read@db.internal:5432,uses=2"), None);
    check(&ask("db.read@db.internal:5432,uses=3"), Some("uses_exceed_channel"));
    check(&ask("db.any@other.internal"), Some("secret_not_allowed"));
    let with = |command: &[&'static str]| {
        [&ask("db.read@db.internal:5432")[..], &["--"], command].concat()
    };
    check(&with(&["sh", "-c", "true"]), None);
    check(&with(&["/bin/ls"]), Some("command_not_permitted"));
    check(&with(&["sh", "-c", "true", "more"]), Some("command_not_permitted"));
    assert!(!host.path().join("state").exists(), "nothing is recorded");
}

#[test]
fn a_program_that_the_exec_could_write_is_not_the_one_that_is_permitted() {
    let host = host();
    std::fs::copy("/bin/sh", host.path().join("sh")).unwrap();
    let ask = ["--principal", "alice", "--lease", "db.read@db.internal:5432", "--"];
    let allowed = test(host.path(), &[&ask[..], &["sh", "-c", "true"]].concat());
    assert_eq!(allowed.status.code(), Some(0), "{}", stdout(&allowed));
    let denied = test(host.path(), &[&ask[..], &["./sh", "-c", "true"]].concat());
    assert_eq!(denied.status.code(), Some(1), "{}", stdout(&denied));
}

#[test]
fn what_each_may_have_both_may_not_when_they_would_be_delivered_to_one_place() {
    let host = host();
    let one = ["--principal", "alice", "--lease", "db.read@db.internal:5432"];
    let two = [&one[..], &["--lease", "db.any@db.internal:5432"]].concat();
    let alone = test(host.path(), &one);
    assert!(stdout(&alone).contains("granted, by env at DB_KEY"), "{}", stdout(&alone));
    assert!(stdout(&alone).contains("name yours after `--`"), "{}", stdout(&alone));
    let both = test(host.path(), &two);
    assert_eq!(both.status.code(), Some(1), "{}", stdout(&both));
    assert!(stdout(&both).contains("DB_KEY"), "{}", stdout(&both));
}

#[test]
fn a_denial_for_people_says_why_and_what_would_be_allowed() {
    let host = host();
    let output = test(host.path(), &["--principal", "alice", "--lease", "db.read@db.internal"]);
    let text = stdout(&output);
    assert!(
        text.starts_with("db.read@db.internal: denied, audience_not_permitted\n  why: "),
        "{text}"
    );
    assert!(text.contains("  try: ") && text.contains("db.internal:5432"), "{text}");
}

#[test]
fn what_cannot_be_decided_is_no_denial() {
    let host = host();
    let lease = ["--lease", "db.read@db.internal:5432"];
    let missing = test(host.path(), &[&lease[..], &["--", "no-such-program"]].concat());
    assert_eq!(missing.status.code(), Some(2));
    assert!(stderr(&missing).contains("no program `no-such-program`"), "{}", stderr(&missing));
    let malformed = test(host.path(), &["--lease", "db.read@db.internal,ttl=soon"]);
    assert_eq!(malformed.status.code(), Some(2));
    assert!(stderr(&malformed).contains("`soon` is no duration"), "{}", stderr(&malformed));
    let unknown =
        sublet().args(["policy", "test", "--profile", "nope", "--lease", "a@b"]).output().unwrap();
    assert_eq!(unknown.status.code(), Some(2));
}
