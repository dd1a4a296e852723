//! Someone who may write the database changes the trail with plain SQL; `verify` names the first event
//! that they touched. The control is the same trail before.

use std::path::Path;

use sublet::audit::{Finding, HeadOf, verify};
use sublet::model::event::{Draft, EventType, Head, KeptHead};
use sublet::store::{Durability, Reader, Store};

const BOOT: &str = "5a2c7f0e-0000-4000-8000-123456789abc";

fn trail() -> (tempfile::TempDir, Vec<Head>) {
    let dir = tempfile::tempdir().unwrap();
    let mut store = Store::open(dir.path()).unwrap();
    let heads = (0..10).map(|n| {
        let time = "2026-11-22T10:00:00Z".parse().unwrap();
        let draft = Draft::new(EventType::LeaseGranted, time, "host-1").with("n", n);
        let step = store.transaction(Durability::Durable, |tx| tx.append(draft));
        step.unwrap().1
    });
    let heads = heads.collect();
    (dir, heads)
}

fn tamper(dir: &Path, sql: &str) {
    let conn = rusqlite::Connection::open(dir.join("db/sublet.db")).unwrap();
    conn.execute_batch(sql).unwrap();
}

fn found(dir: &Path, kept: Option<&KeptHead>, given: Option<&Head>) -> Option<Finding> {
    let reader = Reader::open(dir).unwrap();
    let report = reader.read(|view| verify(view.events(), kept, BOOT, given)).unwrap();
    report.finding
}

#[test]
fn the_first_event_that_was_touched_is_named() {
    #[track_caller]
    fn check(sql: &str, expected: Finding) {
        let (dir, heads) = trail();
        assert_eq!(found(dir.path(), None, heads.last()), None, "untouched");
        tamper(dir.path(), sql);
        assert_eq!(found(dir.path(), None, None), Some(expected), "{sql}");
    }
    let changed = |seq| Finding::Changed { seq };
    check("UPDATE event SET body = replace(body, 'host-1', 'host-2') WHERE seq = 4", changed(4));
    check(
        "UPDATE event SET body = replace(body, 'host-1', 'host-2') WHERE seq IN (9, 7)",
        changed(7),
    );
    check("UPDATE event SET hash = upper(hash) WHERE seq = 4", changed(4));
    check("UPDATE event SET body = '' WHERE seq = 1", changed(1));
    check("UPDATE event SET hash = '', body = 'x' WHERE seq = 10", changed(10));
    check("DELETE FROM event WHERE seq = 4", Finding::Removed { first: 4, last: 4 });
    check("DELETE FROM event WHERE seq < 4", Finding::Removed { first: 1, last: 3 });
    check(
        "DELETE FROM event WHERE seq = 4; UPDATE event SET seq = seq - 1 WHERE seq > 4",
        Finding::Reordered { seq: 4, found: 5 },
    );
    check(
        "UPDATE event SET seq = 100 WHERE seq = 4; UPDATE event SET seq = 4 WHERE seq = 6;
         UPDATE event SET seq = 6 WHERE seq = 100",
        Finding::Reordered { seq: 4, found: 6 },
    );
    check(
        "INSERT INTO event SELECT -1, hash, body FROM event WHERE seq = 1",
        Finding::Inserted { seq: 0, expected: 1 },
    );
}

#[test]
fn what_is_removed_at_the_end_shows_against_a_head_kept_elsewhere() {
    let (dir, heads) = trail();
    let kept = KeptHead { latest: heads[9], durable: heads[9], boot_id: BOOT.to_owned() };
    let kept = KeptHead::decode(kept.encode().as_bytes()).unwrap();
    assert_eq!(found(dir.path(), Some(&kept), Some(&heads[9])), None);

    tamper(dir.path(), "DELETE FROM event WHERE seq > 7");
    assert_eq!(found(dir.path(), None, None), None, "in itself the rest is whole");
    let truncated = |of| Some(Finding::Truncated { last: 7, kept: 10, of });
    assert_eq!(found(dir.path(), Some(&kept), None), truncated(HeadOf::Launcher));
    assert_eq!(found(dir.path(), None, Some(&heads[9])), truncated(HeadOf::Caller));

    // Grown again over the gap, it is another trail.
    let mut store = Store::open(dir.path()).unwrap();
    for _ in 0..5 {
        let draft =
            Draft::new(EventType::RunEnded, "2026-11-22T11:00:00Z".parse().unwrap(), "host-1");
        store.transaction(Durability::Durable, |tx| tx.append(draft)).unwrap();
    }
    let rewritten = |of| Some(Finding::Rewritten { seq: 10, of });
    assert_eq!(found(dir.path(), Some(&kept), None), rewritten(HeadOf::Launcher));
    assert_eq!(found(dir.path(), None, Some(&heads[9])), rewritten(HeadOf::Caller));
}

#[test]
fn a_trail_whose_end_is_no_hash_takes_no_further_event() {
    let (dir, _) = trail();
    tamper(dir.path(), "UPDATE event SET hash = 'none' WHERE seq = 10");
    let mut store = Store::open(dir.path()).unwrap();
    let refused = store.transaction(Durability::Durable, |_| Ok(())).err().unwrap();
    assert!(refused.to_string().contains("event 10"), "{refused}");
}
