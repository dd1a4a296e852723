//! Someone who may write the database changes the trail with plain SQL; `verify` names the first event
//! that they touched. The control is the same trail before.

use std::path::Path;

use sublet::audit::{Finding, HeadOf, Known, verify};
use sublet::envelope::{Checkpoint, Cut, NoteKey, SignedCheckpoint, SigningKey};
use sublet::model::event::{Draft, EventType, Head, KeptHead};
use sublet::model::secret::Secret;
use sublet::store::{Durability, Reader, Store, StoreError};

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
    found_with(dir, kept, given, &[])
}

fn found_with(
    dir: &Path,
    kept: Option<&KeptHead>,
    given: Option<&Head>,
    keys: &[NoteKey],
) -> Option<Finding> {
    let reader = Reader::open(dir).unwrap();
    let report = reader.read(|view| {
        let mut known = Known::trail(keys);
        if let Some(kept) = kept {
            known = known.kept(kept, BOOT);
        }
        if let Some(given) = given {
            known = known.head(given);
        }
        let rows = view.checkpoints()?.into_iter().map(|row| (row.seq, row.note));
        verify(view.events(), known.rows(rows))
    });
    report.unwrap().finding
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

fn key() -> SigningKey {
    SigningKey::from_seed(Secret::copy_of(&[3; 32]).unwrap()).unwrap()
}

fn now() -> jiff::Timestamp {
    "2026-11-22T12:00:00Z".parse().unwrap()
}

fn signed(head: Head, cut: Option<Cut>) -> SignedCheckpoint {
    Checkpoint { head, time: now(), host: "host-1".to_owned(), cut }.sign(&key())
}

/// Ten events; checkpoints of 2, 4 and 8; the first four moved away; one more event says so.
fn rotated() -> (tempfile::TempDir, Vec<Head>) {
    let (dir, heads) = trail();
    let mut store = Store::open(dir.path()).unwrap();
    let mut write = |step: &dyn Fn(&mut sublet::store::Tx<'_>) -> Result<(), StoreError>| {
        store.transaction(Durability::Durable, |tx| step(tx)).unwrap();
    };
    for seq in [2, 4, 8] {
        write(&|tx| tx.put_checkpoint(&signed(heads[seq - 1], None)));
    }
    write(&|tx| {
        assert_eq!(tx.cut(&signed(heads[3], Some(Cut { first: 1 })))?, 4);
        tx.append(Draft::new(EventType::TrailRotated, now(), "host-1")).map(drop)
    });
    (dir, heads)
}

#[test]
fn what_was_done_to_a_rotated_trail_or_its_checkpoints_is_named() {
    let keys = [key().public().trail_key()];
    let check = |sql: &str, expected: &str, seq: u64| {
        let (dir, heads) = rotated();
        assert_eq!(found_with(dir.path(), None, Some(&heads[9]), &keys), None, "untouched");
        tamper(dir.path(), sql);
        let finding = found_with(dir.path(), None, None, &keys).expect(sql);
        assert_eq!((finding.name(), finding.seq()), (expected, seq), "{sql}: {finding}");
    };
    check("UPDATE event SET body = replace(body, 'host-1', 'host-2') WHERE seq = 6", "changed", 6);
    check("UPDATE event SET body = replace(body, 'host-1', 'host-2') WHERE seq = 5", "changed", 5);
    check("DELETE FROM event WHERE seq = 5", "removed", 5);
    check("DELETE FROM event WHERE seq < 8", "removed", 5);
    check("DELETE FROM event WHERE seq = 7", "removed", 7);
    check("DELETE FROM event WHERE seq > 6", "truncated", 7);
    check("DELETE FROM event", "truncated", 5);
    check(
        "UPDATE event SET seq = 100 WHERE seq = 6; UPDATE event SET seq = 6 WHERE seq = 9;
         UPDATE event SET seq = 9 WHERE seq = 100",
        "reordered",
        6,
    );
    // The beginning: none, another one, one that no rotation made.
    check("DELETE FROM checkpoint WHERE seq = 4", "removed", 1);
    check("DELETE FROM checkpoint", "removed", 1);
    check("DELETE FROM checkpoint WHERE seq = 4; DELETE FROM event WHERE seq <= 8", "removed", 1);
    check(
        "UPDATE checkpoint SET note = replace(note, 'rotated 1', 'rotated 2') WHERE seq = 4",
        "forged_checkpoint",
        4,
    );
    check(
        "UPDATE checkpoint SET seq = 5 WHERE seq = 4; DELETE FROM event WHERE seq = 5",
        "forged_checkpoint",
        5,
    );
    // Checkpoints within.
    check(
        "UPDATE checkpoint SET note = replace(note, 'host-1', 'host-2') WHERE seq = 8",
        "forged_checkpoint",
        8,
    );
    check("UPDATE checkpoint SET note = '' WHERE seq = 8", "forged_checkpoint", 8);
    check("UPDATE checkpoint SET seq = 7 WHERE seq = 8", "forged_checkpoint", 7);
    check("UPDATE checkpoint SET seq = 90 WHERE seq = 8", "forged_checkpoint", 90);
    check("INSERT INTO checkpoint VALUES (6, 'mine')", "forged_checkpoint", 6);

    // Without the key nothing vouches for the beginning.
    let (dir, _) = rotated();
    assert_eq!(found_with(dir.path(), None, None, &[]).unwrap().name(), "forged_checkpoint");
}

/// Whoever may write the database can make a trail that is whole in itself. Its checkpoints they cannot.
#[test]
fn a_trail_that_was_made_anew_contradicts_its_checkpoints() {
    let keys = [key().public().trail_key()];
    let (dir, heads) = trail();
    let mut store = Store::open(dir.path()).unwrap();
    let put = |tx: &mut sublet::store::Tx<'_>| tx.put_checkpoint(&signed(heads[7], None));
    store.transaction(Durability::Durable, put).unwrap();
    drop(store);
    assert_eq!(found_with(dir.path(), None, None, &keys), None);

    tamper(dir.path(), "DELETE FROM event WHERE seq > 5");
    let mut store = Store::open(dir.path()).unwrap();
    for _ in 0..5 {
        let draft = Draft::new(EventType::RunEnded, now(), "host-1");
        store.transaction(Durability::Durable, |tx| tx.append(draft)).unwrap();
    }
    assert_eq!(
        found(dir.path(), None, None).unwrap().name(),
        "forged_checkpoint",
        "no key is known"
    );
    let rewritten = Finding::Rewritten { seq: 8, of: HeadOf::Checkpoint };
    assert_eq!(found_with(dir.path(), None, None, &keys), Some(rewritten));
    // And we do not vouch for it ourselves.
    let refused = store.checkpoint(1, Durability::Durable, &key(), "host-1", now());
    assert!(matches!(refused, Err(StoreError::Corrupt { .. })), "{refused:?}");
}

#[test]
fn a_checkpoint_is_written_when_it_is_due_and_only_of_what_is_there() {
    let (dir, heads) = trail();
    let mut store = Store::open(dir.path()).unwrap();
    let mut due = |every| {
        let written =
            store.checkpoint(every, Durability::Relaxed, &key(), "host-1", now()).unwrap();
        written.map(|signed| signed.checkpoint().head)
    };
    assert_eq!(due(11), None);
    assert_eq!(due(10), Some(heads[9]));
    assert_eq!(due(1), None, "there is nothing new");
    let next = |store: &mut Store| {
        let draft = Draft::new(EventType::RunEnded, now(), "host-1");
        store.transaction(Durability::Durable, |tx| tx.append(draft)).unwrap().1
    };
    let head = next(&mut store);
    let signed_now = store.checkpoint(1, Durability::Durable, &key(), "host-1", now()).unwrap();
    assert_eq!(signed_now.unwrap().checkpoint().head, head);
    let kept: Vec<u64> =
        store.read(|view| Ok(view.checkpoints()?.iter().map(|row| row.seq).collect())).unwrap();
    assert_eq!(kept, [10, 11]);

    // A key that took the place of a lost one begins with the whole trail.
    next(&mut store);
    let other = SigningKey::from_seed(Secret::copy_of(&[4; 32]).unwrap()).unwrap();
    assert!(store.checkpoint(1, Durability::Relaxed, &other, "host-1", now()).unwrap().is_some());

    let mut refused = |signed: SignedCheckpoint, cut: bool| {
        let step = |tx: &mut sublet::store::Tx<'_>| match cut {
            true => tx.cut(&signed).map(drop),
            false => tx.put_checkpoint(&signed),
        };
        let refused = store.transaction(Durability::Durable, step).err();
        assert!(matches!(refused, Some(StoreError::Missing { .. })), "{refused:?}");
    };
    let elsewhere = Head { seq: 5, ..heads[5] };
    refused(signed(elsewhere, None), false);
    refused(signed(elsewhere, Some(Cut { first: 1 })), true);
    refused(signed(heads[4], Some(Cut { first: 2 })), true);
    refused(signed(heads[4], None), true);
    refused(signed(Head { seq: 99, ..heads[5] }, Some(Cut { first: 1 })), true);
    assert_eq!(store.read(|view| Ok(view.events().count())).unwrap(), 12, "nothing was removed");
}
