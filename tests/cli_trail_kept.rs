//! What is kept of the trail elsewhere: checkpoints, archives, exports; and the trail as it goes on.

mod cli_common;

use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Output, Stdio};
use std::time::{Duration, Instant};

use cli_common::{json, stderr, stdout, sublet};
use sublet::model::event::{Draft, EventType};
use sublet::store::{Durability, Store};

/// A state directory with `count` events, one a second from ten o'clock on.
fn trail(count: u64) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    append(dir.path(), 0, count);
    dir
}

fn append(state: &Path, first: u64, count: u64) {
    let mut store = Store::open(state).unwrap();
    let start: jiff::Timestamp = "2026-11-22T10:00:00Z".parse().unwrap();
    let step = |tx: &mut sublet::store::Tx<'_>| {
        (first..first + count).try_for_each(|n| {
            let time = start.checked_add(Duration::from_secs(n)).unwrap();
            tx.append(Draft::new(EventType::LeaseGranted, time, "host-1").with("n", n)).map(drop)
        })
    };
    store.transaction(Durability::Durable, step).unwrap();
}

fn audit(state: &Path, args: &[&str]) -> Output {
    sublet().args(["audit", "--state-dir"]).arg(state).args(args).output().unwrap()
}

#[track_caller]
fn check(state: &Path, args: &[&str], status: i32, says: &str) -> String {
    let output = audit(state, args);
    let all = stdout(&output) + &stderr(&output);
    assert_eq!(output.status.code(), Some(status), "{args:?}: {all}");
    assert!(all.contains(says), "{args:?}: {all}");
    stdout(&output)
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn tamper(state: &Path, sql: &str) {
    let database = rusqlite::Connection::open(state.join("db/sublet.db")).unwrap();
    database.execute_batch(sql).unwrap();
}

/// A copy of everything, as someone makes who wants to set the trail back later.
fn copied(state: &Path) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    let done = std::process::Command::new("cp")
        .args(["-a", "--"])
        .arg(state.join("."))
        .arg(copy.path())
        .status();
    assert!(done.unwrap().success());
    copy
}

#[test]
fn a_checkpoint_that_was_kept_elsewhere_shows_that_all_was_set_back() {
    let elsewhere = tempfile::tempdir().unwrap();
    let kept = elsewhere.path().join("checkpoint");
    let state = trail(5);
    check(state.path(), &["key"], 1, "no key");
    check(state.path(), &["checkpoint"], 0, "sublet/trail/");
    let before = copied(state.path());

    append(state.path(), 5, 3);
    std::fs::write(&kept, check(state.path(), &["checkpoint"], 0, "sublet/trail/")).unwrap();
    let with_kept = ["verify", "--checkpoint", text(&kept)];
    check(state.path(), &with_kept, 0, "signed checkpoints that agree: 3");
    assert_eq!(
        check(state.path(), &["checkpoint"], 0, ""),
        std::fs::read_to_string(&kept).unwrap(),
        "of what was signed already there is no second"
    );
    check(before.path(), &["verify"], 0, "whole");
    check(before.path(), &with_kept, 1, "events 6 to 8 were removed at the end");
    // Grown again, with the host's own key at hand.
    append(before.path(), 50, 9);
    check(before.path(), &["checkpoint"], 0, "");
    check(before.path(), &with_kept, 1, "rewritten up to event 8");

    // Another host's trail, whose key is not ours.
    let other = trail(8);
    check(other.path(), &with_kept, 1, "not signed by a key that is known");
    let key = check(state.path(), &["key"], 0, "sublet/trail/");
    let with_key = ["verify", "--checkpoint", text(&kept), "--key", key.trim()];
    check(state.path(), &with_key, 0, "whole");
    check(other.path(), &with_key, 1, "rewritten up to event 8");

    std::fs::write(&kept, "no note").unwrap();
    check(state.path(), &with_kept, 2, "is no signed note");
    std::fs::remove_file(&kept).unwrap();
    check(state.path(), &with_kept, 2, "cannot read");
}

#[test]
fn a_state_that_is_not_there_is_not_made_by_signing_it() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let out = dir.path().join("out");
    check(&state, &["checkpoint"], 1, "no event to sign");
    check(&state, &["rotate", "--out", text(&out)], 0, "nothing is older");
    check(&state, &["tail"], 0, "");
    check(&state, &["export"], 2, "nothing is recorded");
    check(&state, &["export", "--out", text(&out)], 2, "nothing is recorded");
    assert!(!state.exists() && !out.exists());
}

#[test]
fn events_move_to_archives_and_the_chain_goes_on() {
    let state = trail(20);
    let place = tempfile::tempdir().unwrap();
    let file = |name: &str| place.path().join(name);
    let (first, second, third) = (file("1"), file("2"), file("3"));
    check(state.path(), &["checkpoint"], 0, "");
    check(state.path(), &["rotate", "--keep", "20", "--out", text(&first)], 0, "nothing is older");
    assert!(!first.exists());

    let told = json(&check(
        state.path(),
        &["rotate", "--keep", "15", "--json", "--out", text(&first)],
        0,
        "",
    ));
    assert_eq!((&told["first"], &told["last"], &told["events"]), (&1.into(), &5.into(), &5.into()));
    assert_eq!(first.metadata().unwrap().permissions().mode() & 0o7777, 0o600);
    assert_eq!(std::fs::read_dir(place.path()).unwrap().count(), 1, "nothing else is left there");
    check(state.path(), &["verify"], 0, "from event 6 on");
    check(state.path(), &["verify", "--file", text(&first)], 0, "5 events");

    // Twelve is the last before the time.
    let before = ["rotate", "--before", "2026-11-22T10:00:12Z", "--out"];
    check(state.path(), &[&before[..], &[text(&second)]].concat(), 0, "events 6 to 12 are now in");
    check(state.path(), &["rotate", "--out", text(&third)], 0, "events 13 to 22 are now in");
    check(state.path(), &["list"], 0, "trail.rotated");
    let all = ["verify", "--archive", text(&first), text(&second), text(&third)];
    check(state.path(), &all, 0, "the trail is whole: 23 events");

    // The events that tell of the rotations tell where.
    let listed = check(state.path(), &["list", "--json"], 0, "trail.rotated");
    let event = json(&listed);
    assert_eq!(event["detail"]["archive"], text(&third));
    assert_eq!((&event["detail"]["first"], &event["detail"]["last"]), (&13.into(), &22.into()));

    // Life goes on.
    append(state.path(), 100, 3);
    check(state.path(), &["checkpoint"], 0, "");
    check(state.path(), &all, 0, "the trail is whole: 26 events");
    check(state.path(), &["verify"], 0, "the trail is whole: 4 events");

    // What was done to one of them is named.
    check(state.path(), &[&all[..2], &all[3..]].concat(), 0, "from event 6 on");
    let two = ["verify", "--archive", text(&first), text(&third)];
    check(state.path(), &two, 1, "events 6 to 12 were removed");
    let text_of_second = std::fs::read_to_string(&second).unwrap();
    std::fs::write(&second, text_of_second.replace("\"n\":7", "\"n\":8")).unwrap();
    check(state.path(), &all, 1, "event 8 was changed");
    let cut: String = text_of_second.lines().take(4).map(|line| format!("{line}\n")).collect();
    std::fs::write(&second, cut).unwrap();
    check(state.path(), &all, 1, "was cut off");
    std::fs::write(&second, text_of_second).unwrap();
    check(state.path(), &all, 0, "26 events");
    tamper(state.path(), "DELETE FROM event WHERE seq <= 23");
    check(state.path(), &all, 1, "event 23 was removed");
    check(state.path(), &["verify"], 1, "event 23 was removed");

    // Elsewhere, with the key that was kept.
    let key = check(state.path(), &["key"], 0, "");
    let nowhere = place.path().join("nowhere");
    check(&nowhere, &[&all[..], &["--key", key.trim()]].concat(), 0, "22 events");
    check(&nowhere, &all, 1, "not signed by a key that is known");
}

#[test]
fn nothing_is_overwritten_and_a_trail_that_is_not_whole_is_not_moved() {
    let state = trail(10);
    let place = tempfile::tempdir().unwrap();
    let out = place.path().join("archive");
    let rotate = ["rotate", "--keep", "4", "--out", text(&out)];
    for mine in ["my own file\n", ""] {
        std::fs::write(&out, mine).unwrap();
        check(state.path(), &rotate, 2, "is there already");
        assert_eq!(std::fs::read_to_string(&out).unwrap(), mine);
        check(state.path(), &["export", "--out", text(&out)], 2, "is there already");
    }
    std::fs::remove_file(&out).unwrap();
    std::os::unix::fs::symlink("/nonexistent", &out).unwrap();
    check(state.path(), &rotate, 2, "is there already");
    std::fs::remove_file(&out).unwrap();
    check(state.path(), &["rotate", "--out", "/proc/none/archive"], 2, "cannot write");
    check(state.path(), &["verify"], 0, "10 events");

    tamper(state.path(), "UPDATE event SET body = replace(body, 'host-1', 'host-2') WHERE seq = 9");
    check(state.path(), &rotate, 1, "event 9 was changed");
    assert!(!out.exists());
}

/// A crash after the archive was written and before its events were removed: the same command ends it.
#[test]
fn an_archive_that_is_there_already_is_taken_if_it_is_the_right_one() {
    let state = trail(10);
    check(state.path(), &["checkpoint"], 0, "");
    let crashed = copied(state.path());
    let place = tempfile::tempdir().unwrap();
    let out = place.path().join("archive");
    let rotate = ["rotate", "--keep", "4", "--out", text(&out)];
    check(state.path(), &rotate, 0, "events 1 to 6");
    let archive = std::fs::read_to_string(&out).unwrap();

    check(crashed.path(), &["verify"], 0, "10 events");
    check(crashed.path(), &rotate, 0, "events 1 to 6");
    check(crashed.path(), &["verify", "--archive", text(&out)], 0, "11 events");
    // Where it was done already it is not the oldest events' any more.
    check(crashed.path(), &rotate, 2, "is there already");
    // Nor is that of another trail, or one that someone worked on.
    check(trail(10).path(), &rotate, 2, "is there already");
    let again = copied(state.path());
    std::fs::write(&out, archive.replace("\"n\":3", "\"n\":9")).unwrap();
    check(again.path(), &rotate, 2, "is there already");
    check(again.path(), &["verify"], 0, "whole");
}

#[test]
fn a_rotation_that_is_killed_loses_nothing() {
    const EVENTS: u64 = 3000;
    let place = tempfile::tempdir().unwrap();
    let origin = trail(EVENTS);
    check(origin.path(), &["checkpoint"], 0, "");
    let took = |state: &Path, out: &Path| {
        sublet()
            .args(["audit", "rotate", "--keep", "10", "--state-dir"])
            .args([state, Path::new("--out"), out])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap()
    };
    let begun = Instant::now();
    assert!(
        took(copied(origin.path()).path(), &place.path().join("whole")).wait().unwrap().success()
    );
    let whole = begun.elapsed();

    let (mut without_archive, mut between, mut after) = (0, 0, 0);
    const ROUNDS: u32 = 24;
    for round in 0..ROUNDS {
        let state = copied(origin.path());
        let out = place.path().join(format!("{round}"));
        let mut child = took(state.path(), &out);
        std::thread::sleep(whole * (round + 4) / (ROUNDS + 4));
        child.kill().unwrap();
        child.wait().unwrap();

        let told = check(state.path(), &["verify", "--json"], 0, "");
        let is_cut = json(&told)["from"] != 1;
        match (out.exists(), is_cut) {
            (false, false) => without_archive += 1,
            (true, false) => between += 1,
            (true, true) => after += 1,
            (false, true) => panic!("events are gone and are in no archive"),
        }
        if out.exists() {
            check(state.path(), &["verify", "--file", text(&out)], 0, "2990 events");
        }
        if !is_cut {
            assert_eq!(json(&told)["events"], EVENTS);
            assert!(took(state.path(), &out).wait().unwrap().success());
        }
        check(state.path(), &["verify", "--archive", text(&out)], 0, "whole: 3001 events");
    }
    println!(
        "killed before the archive {without_archive}, before the cut {between}, after {after}"
    );
}

#[test]
fn exported_lines_are_verified_alone() {
    let state = trail(10);
    let place = tempfile::tempdir().unwrap();
    let out = place.path().join("trail.jsonl");
    check(state.path(), &["export", "--out", text(&out)], 0, "10 events are in");
    assert_eq!(out.metadata().unwrap().permissions().mode() & 0o7777, 0o600);
    let lines = std::fs::read_to_string(&out).unwrap();
    assert_eq!(check(state.path(), &["export"], 0, ""), lines);
    let nowhere = place.path().join("nowhere");
    let verify = ["verify", "--file", text(&out)];
    check(&nowhere, &verify, 0, "the trail is whole: 10 events");
    let head = check(state.path(), &["verify"], 0, "head: ");
    let head = head.lines().last().unwrap().strip_prefix("head: ").unwrap();
    check(&nowhere, &[&verify[..], &["--head", head]].concat(), 0, "whole");

    std::fs::write(&out, lines.replace("\"n\":4", "\"n\":5")).unwrap();
    check(&nowhere, &verify, 1, "event 5 was changed");
    let without_last: String = lines.lines().take(9).map(|line| format!("{line}\n")).collect();
    std::fs::write(&out, &without_last).unwrap();
    check(&nowhere, &verify, 0, "9 events");
    check(
        &nowhere,
        &[&verify[..], &["--head", head]].concat(),
        1,
        "event 10 was removed at the end",
    );
    std::fs::write(&out, check(state.path(), &["export", "--since", "8"], 0, "")).unwrap();
    check(&nowhere, &verify, 0, "from event 8 on");
    std::fs::write(&out, format!("{without_last}{{\"seq\":10")).unwrap();
    check(&nowhere, &verify, 1, "line 10 of");

    let ocsf = check(state.path(), &["export", "--format", "ocsf", "--since", "10"], 0, "");
    let event = json(&ocsf);
    assert_eq!((&event["class_uid"], &event["type_uid"]), (&3003.into(), &300_301.into()));
    assert_eq!(event["metadata"]["sequence"], 10);

    tamper(state.path(), "UPDATE event SET body = 'x' WHERE seq = 3");
    check(state.path(), &["export"], 2, "event 3 is no event");
    let fresh = place.path().join("fresh");
    check(state.path(), &["export", "--out", text(&fresh)], 2, "event 3 is no event");
    assert!(!fresh.exists());
    assert_eq!(std::fs::read_dir(place.path()).unwrap().count(), 1, "nothing half is left");
}

/// Root becomes the user whom the state belongs to, and still reads and writes where root may.
#[test]
fn root_moves_the_events_of_the_brokers_user_to_where_only_root_may_write() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: only root can be another user");
        return;
    }
    const BROKER: u32 = 12_345;
    let state = trail(10);
    check(state.path(), &["checkpoint"], 0, "");
    let all = |path: &Path| -> Vec<PathBuf> {
        std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()).collect()
    };
    for directory in [state.path().join("db"), state.path().join("keys")] {
        for path in all(&directory).into_iter().chain([directory]) {
            std::os::unix::fs::chown(path, Some(BROKER), Some(BROKER)).unwrap();
        }
    }
    let mode = |path: &Path, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    mode(state.path(), 0o711);
    let place = tempfile::tempdir().unwrap();
    mode(place.path(), 0o700);
    let (archive, export) = (place.path().join("archive"), place.path().join("export"));
    check(state.path(), &["rotate", "--keep", "4", "--out", text(&archive)], 0, "events 1 to 6");
    check(state.path(), &["export", "--out", text(&export)], 0, "5 events");
    check(state.path(), &["verify", "--archive", text(&archive)], 0, "11 events");
    check(state.path(), &["verify", "--file", text(&export)], 0, "5 events");
    use std::os::unix::fs::MetadataExt;
    let owner = |path: &Path| path.metadata().unwrap().uid();
    assert_eq!((owner(&archive), owner(&export)), (0, 0));
    assert!(all(&state.path().join("db")).iter().all(|path| owner(path) == BROKER));
    // And what the broker's user could not name, root's command does not write there in their name.
    assert_eq!(all(place.path()).len(), 2);
}

struct Followed {
    child: Child,
    lines: std::sync::mpsc::Receiver<String>,
}

fn follow(state: &Path, args: &[&str]) -> Followed {
    let mut child = sublet()
        .args(["audit", "tail", "--follow", "--json", "--state-dir"])
        .arg(state)
        .args(args)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let stdout = BufReader::new(child.stdout.take().unwrap());
    let (send, lines) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for line in stdout.lines() {
            if send.send(line.unwrap()).is_err() {
                return;
            }
        }
    });
    Followed { child, lines }
}

impl Followed {
    #[track_caller]
    fn sees(&self, sequence: std::ops::RangeInclusive<u64>) {
        for seq in sequence {
            let line = self.lines.recv_timeout(Duration::from_secs(20)).unwrap();
            assert_eq!(json(&format!("{line}\n"))["seq"], seq);
        }
    }
}

#[test]
fn the_trail_is_followed_until_it_is_enough() {
    let state = trail(20);
    assert_eq!(check(state.path(), &["tail", "-n", "3"], 0, "").lines().count(), 3);
    let mut followed = follow(state.path(), &["-n", "2"]);
    followed.sees(19..=20);
    append(state.path(), 20, 5);
    followed.sees(21..=25);
    // Older events may go meanwhile.
    let place = tempfile::tempdir().unwrap();
    check(state.path(), &["rotate", "--keep", "1", "--out", text(&place.path().join("a"))], 0, "");
    followed.sees(26..=26);
    append(state.path(), 30, 1);
    followed.sees(27..=27);
    let pid = rustix::process::Pid::from_child(&followed.child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    assert_eq!(followed.child.wait().unwrap().code(), Some(0));
}

#[test]
fn a_trail_that_begins_or_is_replaced_under_the_follower_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let state: PathBuf = dir.path().join("state");
    let mut followed = follow(&state, &[]);
    std::thread::sleep(Duration::from_millis(300));
    append(&state, 0, 3);
    followed.sees(1..=3);
    std::fs::rename(state.join("db"), state.join("moved")).unwrap();
    append(&state, 0, 2);
    followed.sees(1..=2);
    followed.child.kill().unwrap();
    followed.child.wait().unwrap();
}

#[test]
fn a_follower_whose_reader_went_away_ends_by_itself() {
    let state = trail(3);
    let mut child = sublet()
        .args(["audit", "tail", "--follow", "--state-dir"])
        .arg(state.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    stdout.read_line(&mut line).unwrap();
    drop(stdout);
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            assert_eq!(status.code(), Some(141));
            return;
        }
        assert!(Instant::now() < deadline, "it follows for no one");
        std::thread::sleep(Duration::from_millis(20));
    }
}
