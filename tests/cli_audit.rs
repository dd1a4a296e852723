//! `sublet audit` from outside: filters, the chain, and what was done to it.

mod cli_common;

use std::io::Write;
use std::path::Path;
use std::process::{Output, Stdio};

use cli_common::{json, stderr, stdout, sublet};

fn audit(state: &Path, args: &[&str]) -> Output {
    sublet().args(["audit", "--state-dir"]).arg(state).args(args).output().unwrap()
}

/// A trail of three events.
fn trail_of_three() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for name in ["a", "b", "c"] {
        let mut child = sublet()
            .args(["secret", "set", name, "--state-dir"])
            .arg(dir.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(b"value").unwrap();
        assert!(child.wait().unwrap().success());
    }
    dir
}

#[test]
fn filters_take_what_fits() {
    let dir = trail_of_three();
    let check = |args: &[&str], sequence: &[u64]| {
        let output = audit(dir.path(), &[&["list", "--json"], args].concat());
        let found: Vec<u64> = stdout(&output)
            .lines()
            .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()["seq"].as_u64())
            .map(Option::unwrap)
            .collect();
        assert_eq!(found, sequence, "{args:?}: {}", stderr(&output));
    };
    check(&[], &[1, 2, 3]);
    check(&["--type", "secret.set"], &[1, 2, 3]);
    check(&["--type", "secret.removed"], &[]);
    check(&["--last", "2"], &[2, 3]);
    check(&["--since", "1h"], &[1, 2, 3]);
    check(&["--since", "2100-01-01T00:00:00Z"], &[]);
    check(&["--run", "none-such"], &[]);
}

#[test]
fn a_trail_that_is_not_there_is_told_and_is_not_made() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let lease = "lse_00000000000000000000000000000000";
    let actions = [&["verify"][..], &["export"], &["show", lease]];
    // No directory, and one in which nothing is.
    for _ in 0..2 {
        for action in actions {
            let output = audit(&state, &[action, &["--json"]].concat());
            assert_eq!(output.status.code(), Some(2), "{action:?}: {}", stderr(&output));
            assert_eq!(json(&stderr(&output))["error"]["reason"], "state_not_found", "{action:?}");
            assert_eq!(stdout(&output), "", "{action:?}");
        }
        for action in ["list", "tail"] {
            let output = audit(&state, &[action]);
            assert_eq!((output.status.code(), stdout(&output).as_str()), (Some(0), ""));
            assert!(stderr(&output).contains("nothing is recorded in"), "{}", stderr(&output));
        }
        assert!(!state.join("db").exists());
        std::fs::create_dir_all(&state).unwrap();
    }
    // What is known of it shows that it was removed.
    let head = format!("1:{}", "0".repeat(64));
    let cut = audit(&state, &["verify", "--head", &head]);
    assert_eq!(cut.status.code(), Some(1), "{}", stderr(&cut));

    drop(sublet::store::Store::open(&state).unwrap());
    assert_eq!(audit(&state, &["list"]).status.code(), Some(0));
    assert!(stdout(&audit(&state, &["verify"])).contains("whole: 0 events"));
    let unknown = audit(&state, &["show", lease]);
    assert_eq!(unknown.status.code(), Some(1));
    assert!(stderr(&unknown).contains("lease.granted"), "{}", stderr(&unknown));
    assert_eq!(audit(&state, &["show", "lse_x"]).status.code(), Some(2));
}

#[test]
fn a_whole_trail_gives_a_head_that_holds_it_and_any_later_one() {
    let dir = trail_of_three();
    let report = json(&stdout(&audit(dir.path(), &["verify", "--json"])));
    assert_eq!((&report["whole"], &report["events"]), (&true.into(), &3.into()));
    let head = report["head"].as_str().unwrap();
    assert_eq!(audit(dir.path(), &["verify", "--head", head]).status.code(), Some(0));
    // The head of an earlier time holds the trail of a later one.
    let second: serde_json::Value = serde_json::from_str(
        stdout(&audit(dir.path(), &["list", "--json"])).lines().nth(1).unwrap(),
    )
    .unwrap();
    let earlier = format!("2:{}", second["hash"].as_str().unwrap());
    assert_eq!(audit(dir.path(), &["verify", "--head", &earlier]).status.code(), Some(0));
    // And another trail's does not.
    let other = trail_of_three();
    let refused = audit(other.path(), &["verify", "--head", head]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(stdout(&refused).contains("rewritten"), "{}", stdout(&refused));
}

#[test]
fn the_first_event_that_was_changed_removed_or_cut_off_is_named() {
    #[track_caller]
    fn check(sql: &str, head: Option<&str>, says: &str) {
        let dir = trail_of_three();
        let database = rusqlite::Connection::open(dir.path().join("db/sublet.db")).unwrap();
        database.execute_batch(sql).unwrap();
        drop(database);
        let mut args = vec!["verify"];
        args.extend(head.iter().flat_map(|head| ["--head", head]));
        let output = audit(dir.path(), &args);
        assert_eq!(output.status.code(), Some(1), "{sql}: {}{}", stdout(&output), stderr(&output));
        assert!(stdout(&output).contains(says), "{sql}: {}", stdout(&output));
    }
    check("UPDATE event SET body = replace(body, '\"b\"', '\"x\"')", None, "event 2 was changed");
    check("DELETE FROM event WHERE seq = 2", None, "event 2 was removed");
    let kept = format!("3:{}", "0".repeat(64));
    check("DELETE FROM event WHERE seq = 3", Some(&kept), "event 3 was removed at the end");
}

#[test]
fn the_head_that_is_kept_beside_the_database_shows_a_cut_and_a_torn_record_is_told() {
    use sublet::model::event::{Head, KeptHead};
    let dir = trail_of_three();
    let head: Head = json(&stdout(&audit(dir.path(), &["verify", "--json"])))["head"]
        .as_str()
        .unwrap()
        .parse()
        .unwrap();
    let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    let kept = KeptHead { latest: head, durable: head, boot_id: boot_id.trim().to_owned() };
    let record = dir.path().join("trail.head");
    std::fs::write(&record, kept.encode()).unwrap();
    assert_eq!(audit(dir.path(), &["verify"]).status.code(), Some(0), "the control");

    let database = rusqlite::Connection::open(dir.path().join("db/sublet.db")).unwrap();
    database.execute_batch("DELETE FROM event WHERE seq = 3").unwrap();
    drop(database);
    let cut = audit(dir.path(), &["verify"]);
    assert_eq!(cut.status.code(), Some(1));
    assert!(stdout(&cut).contains("the head that the launcher keeps"), "{}", stdout(&cut));

    std::fs::write(&record, &kept.encode()[..20]).unwrap();
    let torn = audit(dir.path(), &["verify", "--json"]);
    assert_eq!(torn.status.code(), Some(2));
    assert_eq!(json(&stderr(&torn))["error"]["reason"], "head_unusable");
}
