use std::convert::Infallible;

use super::archive::Ending;
use super::*;
use crate::envelope::{Checkpoint, Cut, SigningKey};
use crate::model::event::{Draft, EventHash, Head, KeptHead};
use crate::model::id::RequestId;
use crate::model::secret::Secret;

const BOOT: &str = "5a2c7f0e-0000-4000-8000-123456789abc";

fn draft(kind: EventType) -> Draft {
    Draft::new(kind, "2026-11-22T10:00:00Z".parse().unwrap(), "host-1")
}

fn sealed(drafts: Vec<Draft>) -> Vec<Event> {
    let mut head = Head::EMPTY;
    drafts
        .into_iter()
        .map(|draft| {
            let event = draft.seal(&head);
            head = event.head();
            event
        })
        .collect()
}

fn trail_of(count: usize) -> Vec<RecordedEvent> {
    let drafts = (0..count).map(|i| draft(EventType::RunStarted).with("n", i)).collect();
    sealed(drafts).iter().map(Event::record).collect()
}

fn read(trail: &[RecordedEvent]) -> impl Iterator<Item = Result<RecordedEvent, Infallible>> {
    trail.iter().cloned().map(Ok)
}

fn head_of(trail: &[RecordedEvent], seq: u64) -> Head {
    let hash = trail[seq as usize - 1].hash.parse().unwrap();
    Head { seq, hash }
}

#[track_caller]
fn check(trail: &[RecordedEvent], expected: Option<Finding>, proven: u64) {
    let report = verify(read(trail), Known::trail(&[])).unwrap();
    assert_eq!((report.finding, report.events), (expected, proven));
}

#[test]
fn a_whole_trail_is_proven_and_the_first_damage_is_named() {
    let whole = trail_of(10);
    check(&whole, None, 10);
    check(&[], None, 0);
    let damaged = |damage: &dyn Fn(&mut Vec<RecordedEvent>)| {
        let mut trail = whole.clone();
        damage(&mut trail);
        trail
    };

    let changed = |seq| Some(Finding::Changed { seq });
    check(&damaged(&|t| t[4].body = t[4].body.replace("host-1", "host-2")), changed(5), 4);
    check(&damaged(&|t| t[4].hash = t[5].hash.clone()), changed(5), 4);
    check(&damaged(&|t| t[0].body.clear()), changed(1), 0);
    // A space that changes no meaning is a change.
    check(&damaged(&|t| t[4].body.push(' ')), changed(5), 4);

    let removed = |first, last| Some(Finding::Removed { first, last });
    check(&damaged(&|t| drop(t.remove(4))), removed(5, 5), 4);
    check(&damaged(&|t| drop(t.drain(0..3))), removed(1, 3), 0);

    let swapped = damaged(&|t| {
        t.swap(4, 6);
        (t[4].seq, t[6].seq) = (5, 7);
    });
    check(&swapped, Some(Finding::Reordered { seq: 5, found: 7 }), 4);

    let inserted = damaged(&|t| {
        let mut extra = t[3].clone();
        extra.seq = 0;
        t.insert(0, extra);
    });
    check(&inserted, Some(Finding::Inserted { seq: 0, expected: 1 }), 0);

    let replaced = damaged(&|t| {
        t[4] = draft(EventType::RunEnded).seal(&head_of(t, 4)).record();
    });
    check(&replaced, Some(Finding::Replaced { seq: 5 }), 5);
    let first = damaged(&|t| {
        let stranger = Head { seq: 0, ..head_of(t, 3) };
        t[0] = draft(EventType::RunEnded).seal(&stranger).record();
    });
    check(&first, changed(1), 0);
}

#[test]
fn the_end_is_held_against_the_heads_that_are_known() {
    let whole = trail_of(10);
    let kept = |latest, durable, boot: &str| KeptHead {
        latest: head_of(&whole, latest),
        durable: head_of(&whole, durable),
        boot_id: boot.to_owned(),
    };
    #[track_caller]
    fn check(
        trail: &[RecordedEvent],
        kept: Option<KeptHead>,
        given: Option<Head>,
        expected: Option<Finding>,
    ) {
        let mut known = Known::trail(&[]);
        if let Some(kept) = &kept {
            known = known.kept(kept, BOOT);
        }
        if let Some(given) = &given {
            known = known.head(given);
        }
        assert_eq!(verify(read(trail), known).unwrap().finding, expected);
    }
    check(&whole, Some(kept(10, 8, BOOT)), Some(head_of(&whole, 10)), None);
    // A head of the past is still one that the trail has passed.
    check(&whole, Some(kept(7, 7, BOOT)), Some(head_of(&whole, 3)), None);

    let cut = &whole[..8];
    let launcher = HeadOf::Launcher;
    let truncated = |last, kept, of| Some(Finding::Truncated { last, kept, of });
    check(cut, None, None, None);
    check(cut, Some(kept(10, 8, BOOT)), None, truncated(8, 10, launcher));
    check(&whole[..5], Some(kept(10, 8, "other")), None, truncated(5, 8, launcher));
    check(cut, None, Some(head_of(&whole, 9)), truncated(8, 9, HeadOf::Caller));
    // As far as is sure, whichever of the heads says it.
    check(&[], Some(kept(10, 8, BOOT)), None, truncated(0, 10, launcher));
    check(&whole[..4], Some(kept(10, 6, BOOT)), None, truncated(4, 10, launcher));
    check(&whole[..4], Some(kept(10, 6, "other")), None, truncated(4, 6, launcher));
    let given = Some(head_of(&whole, 9));
    check(&whole[..4], Some(kept(10, 6, "other")), given, truncated(4, 9, HeadOf::Caller));

    // A whole new trail, in itself without a fault.
    let other: Vec<_> = sealed((0..12).map(|_| draft(EventType::RunEnded)).collect())
        .iter()
        .map(Event::record)
        .collect();
    let rewritten = |seq, of| Some(Finding::Rewritten { seq, of });
    check(&other, None, None, None);
    check(&other, Some(kept(10, 8, BOOT)), None, rewritten(8, launcher));
    check(&other, None, Some(head_of(&whole, 10)), rewritten(10, HeadOf::Caller));
    let no_such_start = Head { seq: 0, ..head_of(&whole, 1) };
    check(&whole, None, Some(no_such_start), rewritten(0, HeadOf::Caller));
}

#[test]
fn what_a_power_cut_took_is_no_finding() {
    let whole = trail_of(10);
    let kept = KeptHead {
        latest: head_of(&whole, 10),
        durable: head_of(&whole, 8),
        boot_id: "the boot before".to_owned(),
    };
    let report = verify(read(&whole[..8]), Known::trail(&[]).kept(&kept, BOOT)).unwrap();
    assert_eq!((report.finding, report.lost_with_power), (None, 2));

    // Events of this boot stand where the lost ones stood.
    let mut grown = whole[..8].to_vec();
    for _ in 0..4 {
        let head = head_of(&grown, grown.len() as u64);
        grown.push(draft(EventType::BrokerStarted).seal(&head).record());
    }
    let report = verify(read(&grown), Known::trail(&[]).kept(&kept, BOOT)).unwrap();
    assert_eq!((report.finding, report.lost_with_power), (None, 0));
}

/// Two leases asked for in one request and used by one exec; another run's lease between them.
fn two_lives() -> (Vec<Event>, LeaseId, LeaseId) {
    let (push, read, other) = (LeaseId::fresh(), LeaseId::fresh(), LeaseId::fresh());
    let (request, exec) = (RequestId::fresh(), ExecId::fresh());
    let of = |kind, lease: Option<&LeaseId>, capability: Option<&str>| Draft {
        lease_id: lease.cloned(),
        capability: capability.map(|c| c.parse().unwrap()),
        run_id: Some("run-1".parse().unwrap()),
        ..draft(kind)
    };
    let held = [push.clone(), read.clone()];
    let exec_event = |kind| of(kind, None, None).of_exec(&exec, &held);
    let events = sealed(vec![
        of(EventType::LeaseRequested, None, Some("repo.push")).of_request(&request),
        of(EventType::LeaseRequested, None, Some("db.read")).of_request(&request),
        of(EventType::LeaseGranted, Some(&push), Some("repo.push")).of_request(&request),
        of(EventType::LeaseGranted, Some(&read), Some("db.read")).of_request(&request),
        of(EventType::LeaseGranted, Some(&other), Some("repo.push")),
        of(EventType::LeaseConsumed, Some(&push), None),
        of(EventType::LeaseConsumed, Some(&read), None),
        exec_event(EventType::ExecStarted),
        Draft { exec_id: Some(exec.clone()), ..of(EventType::OutputRedacted, None, None) },
        exec_event(EventType::ExecScrubbed),
        of(EventType::LeaseCompleted, Some(&push), None),
    ]);
    (events, push, read)
}

#[test]
fn show_tells_the_whole_life_of_a_lease_and_no_others() {
    let (events, push, read) = two_lives();
    let trail: Vec<_> = events.iter().map(Event::record).collect();
    let life = |lease: &LeaseId| -> Vec<u64> {
        let shown = show(|| trail.iter().cloned().map(Ok::<_, Infallible>), lease).unwrap();
        shown.iter().map(|event| event.seq).collect()
    };
    assert_eq!(life(&push), [1, 3, 6, 8, 9, 10, 11]);
    assert_eq!(life(&read), [2, 4, 7, 8, 9, 10]);
    assert_eq!(life(&LeaseId::fresh()), Vec::<u64>::new());
}

#[test]
fn list_filters_by_all_that_is_given() {
    let (events, push, _) = two_lives();
    let trail: Vec<_> = events.iter().map(Event::record).collect();
    #[track_caller]
    fn check(trail: &[RecordedEvent], filter: Filter, expected: &[u64]) {
        let listed: Vec<u64> = list(read(trail), &filter).map(|event| event.unwrap().seq).collect();
        assert_eq!(listed, expected, "{filter:?}");
    }
    let all: Vec<u64> = (1..=11).collect();
    check(&trail, Filter::default(), &all);
    check(&trail, Filter { lease: Some(push.clone()), ..Filter::default() }, &[3, 6, 8, 10, 11]);
    check(&trail, Filter { exec: events[7].exec_id.clone(), ..Filter::default() }, &[8, 9, 10]);
    check(&trail, Filter { run: Some("run-2".parse().unwrap()), ..Filter::default() }, &[]);
    check(&trail, Filter { run: Some("run-1".parse().unwrap()), ..Filter::default() }, &all);
    let types = vec![EventType::LeaseConsumed, EventType::LeaseCompleted];
    check(&trail, Filter { types: types.clone(), ..Filter::default() }, &[6, 7, 11]);
    check(&trail, Filter { types, lease: Some(push), ..Filter::default() }, &[6, 11]);
    let later = "2026-11-22T10:00:01Z".parse().ok();
    check(&trail, Filter { since: later, ..Filter::default() }, &[]);
    let then = "2026-11-22T10:00:00Z".parse().ok();
    check(&trail, Filter { since: then, ..Filter::default() }, &all);
}

#[test]
fn an_event_that_cannot_be_read_is_named() {
    let mut trail = trail_of(3);
    trail[1].body = trail[1].body.replace("run.started", "run.exploded");
    let listed: Vec<_> = list(read(&trail), &Filter::default()).collect();
    assert!(matches!(listed[1], Err(AuditError::Unknown { seq: 2, .. })));
    assert!(listed[2].is_ok());
}

fn signing_key(seed: u8) -> SigningKey {
    SigningKey::from_seed(Secret::copy_of(&[seed; 32]).unwrap()).unwrap()
}

fn checkpoint(trail: &[RecordedEvent], seq: u64, first: Option<u64>, key: &SigningKey) -> String {
    let time = "2026-11-22T10:00:00Z".parse().unwrap();
    let cut = first.map(|first| Cut { first });
    let head = head_of(trail, seq);
    Checkpoint { head, time, host: "host-1".to_owned(), cut }.sign(key).note().to_owned()
}

#[test]
fn the_trail_is_held_against_its_checkpoints_and_the_first_contradiction_is_named() {
    let (key, stranger) = (signing_key(1), signing_key(2));
    let keys = [key.public().trail_key()];
    let whole = trail_of(10);
    let other: Vec<_> = sealed((0..12).map(|_| draft(EventType::RunEnded)).collect())
        .iter()
        .map(Event::record)
        .collect();
    let note = |seq| (seq, checkpoint(&whole, seq, None, &key));
    let cut = |seq| (seq, checkpoint(&whole, seq, Some(1), &key));
    let strange = |seq| (seq, checkpoint(&whole, seq, None, &stranger));

    let check = |trail: &[RecordedEvent], rows: &[(u64, String)], expected: Option<Finding>| {
        let report = verify(read(trail), Known::trail(&keys).rows(rows.to_vec())).unwrap();
        assert_eq!(report.finding, expected);
        (report.from, report.events, report.checkpoints)
    };
    let of = HeadOf::Checkpoint;
    assert_eq!(check(&whole, &[note(3), note(7), note(10)], None), (1, 10, 3));
    check(&other, &[note(3), note(7)], Some(Finding::Rewritten { seq: 3, of }));
    check(&whole[..6], &[note(3), note(7)], Some(Finding::Truncated { last: 6, kept: 7, of }));
    let forged = |finding: Option<Finding>, seq| match finding {
        Some(Finding::Forged { seq: found, .. }) => assert_eq!(found, seq),
        other => panic!("{other:?}"),
    };
    let found = |trail: &[RecordedEvent], rows: Vec<(u64, String)>| {
        verify(read(trail), Known::trail(&keys).rows(rows)).unwrap().finding
    };
    forged(found(&whole, vec![note(3), strange(7)]), 7);
    forged(found(&whole, vec![note(3), (7, note(6).1)]), 7);
    forged(found(&whole, vec![(3, String::new())]), 3);
    forged(found(&whole, vec![(3, note(3).1.replace("host-1", "host-2"))]), 3);
    forged(found(&whole, vec![(99, "x".to_owned())]), 99);

    // After a rotation the trail begins behind its checkpoint, and behind no other.
    assert_eq!(check(&whole[4..], &[cut(4), note(7)], None), (5, 6, 2));
    check(&whole[4..], &[note(4)], Some(Finding::Removed { first: 1, last: 4 }));
    check(&whole[4..], &[], Some(Finding::Removed { first: 1, last: 4 }));
    check(&whole[5..], &[cut(4)], Some(Finding::Removed { first: 5, last: 5 }));
    check(&whole[3..], &[cut(4)], Some(Finding::Inserted { seq: 4, expected: 5 }));
    check(&other[4..], &[cut(4)], Some(Finding::Replaced { seq: 4 }));
    forged(found(&whole[4..], vec![(4, checkpoint(&whole, 4, Some(1), &stranger))]), 4);

    // What is known of an event that was moved away is known, or said not to be.
    let kept = |seq| KeptHead {
        latest: head_of(&whole, seq),
        durable: head_of(&whole, seq),
        boot_id: BOOT.to_owned(),
    };
    let known = || Known::trail(&keys).rows([cut(4)]);
    let finding = |known| verify(read(&whole[4..]), known).unwrap().finding;
    assert_eq!(finding(known().kept(&kept(2), BOOT)), None);
    assert_eq!(finding(known().head(&head_of(&whole, 4))), None);
    assert_eq!(
        finding(known().head(&head_of(&whole, 3))),
        Some(Finding::OutOfReach { seq: 3, from: 5 })
    );
    let rewritten = Finding::Rewritten { seq: 4, of: HeadOf::Caller };
    assert_eq!(finding(known().head(&head_of(&other, 4))), Some(rewritten));
    let kept = Checkpoint::open(&note(9).1, &keys).unwrap();
    assert_eq!(finding(known().checkpoint(&kept)), None);
    let set_back = verify(read(&whole[4..8]), known().checkpoint(&kept)).unwrap().finding;
    let of = HeadOf::KeptCheckpoint;
    assert_eq!(set_back, Some(Finding::Truncated { last: 8, kept: 9, of }));
}

/// Lines of a file, as [`archive::write`] and [`archive::seal`] leave them.
fn archived(whole: &[RecordedEvent], base: u64, last: u64, key: &SigningKey) -> Vec<String> {
    let base = if base == 0 { Head::EMPTY } else { head_of(whole, base) };
    let notes = [2, 6].map(|seq| (seq, checkpoint(whole, seq, None, key)));
    let events = whole[base.seq as usize..].iter().cloned().map(Ok::<_, Infallible>);
    let mut out = Vec::new();
    let head = archive::write(&mut out, &base, last, events, notes).unwrap();
    let time = "2026-11-22T10:00:00Z".parse().unwrap();
    let cut = Some(Cut { first: base.seq + 1 });
    let cut = Checkpoint { head, time, host: "host-1".to_owned(), cut }.sign(key);
    archive::seal(&mut out, &cut).unwrap();
    String::from_utf8(out).unwrap().lines().map(str::to_owned).collect()
}

#[test]
fn no_number_stands_behind_the_last_one() {
    let zeros = EventHash::ZERO;
    let last = |seq: u64| format!(r#"{{"seq":{seq},"prev_hash":"{zeros}","hash":"{zeros}"}}"#);
    let items = |text: String| -> Vec<Item> {
        archive::read(text.as_bytes(), "file", Ending::Any).map(Result::unwrap).collect()
    };
    for (seq, due) in [(u64::MAX, u64::MAX), (41, 42)] {
        let behind = items(format!("{}\nno event\n", last(seq)));
        let Item::Fault(finding) = &behind[1] else { panic!("{behind:?}") };
        assert_eq!((finding.name(), finding.seq()), ("not_an_event", due));
        let changed = items(format!("{0}\n{0}\n", last(seq)));
        assert!(matches!(&changed[1], Item::Event(event) if event.seq == due), "{changed:?}");
    }
}

#[test]
fn an_archive_is_proven_alone_and_what_was_done_to_it_is_named() {
    let key = signing_key(1);
    let keys = [key.public().trail_key()];
    let whole = trail_of(10);
    let lines = archived(&whole, 0, 4, &key);
    assert_eq!(lines.len(), 6, "four events, a checkpoint, and the one that ends it");

    let report = |lines: &[String], ending| {
        let text = lines.join("\n") + "\n";
        let items = archive::read(text.as_bytes(), "file", ending);
        verify(items, Known::part(&keys)).unwrap()
    };
    let check = |damage: &dyn Fn(&mut Vec<String>), expected: Option<&str>| {
        let mut lines = lines.clone();
        damage(&mut lines);
        let report = report(&lines, Ending::Rotation);
        assert_eq!(report.finding.as_ref().map(Finding::name), expected, "{:?}", report.finding);
        report.finding.map_or(0, |finding| finding.seq())
    };
    let proven = report(&lines, Ending::Rotation);
    assert_eq!((proven.from, proven.events, proven.checkpoints), (1, 4, 2));
    check(&|_| {}, None);
    assert_eq!(check(&|l| l[3] = l[3].replace("host-1", "host-2"), Some("changed")), 3);
    assert_eq!(check(&|l| l[3] = l[3].replace("\"seq\":3", "\"seq\":9"), Some("changed")), 3);
    assert_eq!(check(&|l| drop(l.remove(3)), Some("removed")), 3);
    // Behind the first line nothing says that there was one before it but the checkpoint at the end.
    assert_eq!(check(&|l| drop(l.remove(0)), Some("cut_off")), 4);
    assert_eq!(check(&|l| l.swap(0, 1), Some("inserted")), 1);
    assert_eq!(check(&|l| l.swap(3, 4), Some("reordered")), 3);
    assert_eq!(check(&|l| l.insert(1, l[0].clone()), Some("inserted")), 1);
    assert_eq!(check(&|l| drop(l.remove(5)), Some("cut_off")), 4);
    assert_eq!(check(&|l| l.truncate(3), Some("cut_off")), 2);
    assert_eq!(check(&|l| drop(l.remove(4)), Some("forged_checkpoint")), 3);
    assert_eq!(check(&|l| l[3].push(' '), Some("not_an_event")), 3);
    assert_eq!(check(&|l| l.insert(2, String::new()), Some("not_an_event")), 3);
    assert_eq!(check(&|l| l.swap(2, 3), Some("forged_checkpoint")), 3);
    let strange = archived(&whole, 0, 4, &signing_key(2));
    assert_eq!(check(&|l| l[5] = strange[5].clone(), Some("forged_checkpoint")), 4);
    assert_eq!(check(&|l| drop(l.remove(2)), None), 0, "a checkpoint less is no event less");

    // Exported lines need no ending, and say themselves where they begin.
    let exported: Vec<String> = whole[6..].iter().map(RecordedEvent::line).collect();
    let report = report(&exported, Ending::Any);
    assert_eq!((report.finding, report.from, report.events), (None, 7, 4));
}

#[test]
fn archives_and_the_trail_join() {
    let key = signing_key(1);
    let keys = [key.public().trail_key()];
    let whole = trail_of(10);
    let (first, second) = (archived(&whole, 0, 4, &key), archived(&whole, 4, 7, &key));
    let rows = vec![(7, checkpoint(&whole, 7, Some(5), &key))];
    let check = |files: &[&Vec<String>], trail: &[RecordedEvent], expected: Option<&str>| {
        let texts: Vec<String> = files.iter().map(|lines| lines.join("\n") + "\n").collect();
        let items = texts
            .iter()
            .flat_map(|text| archive::read(text.as_bytes(), "file", Ending::Rotation))
            .chain(trail.iter().cloned().map(|event| Ok(Item::Event(event))));
        let report = verify(items, Known::part(&keys).rows(rows.clone())).unwrap();
        assert_eq!(report.finding.as_ref().map(Finding::name), expected, "{:?}", report.finding);
    };
    check(&[&first, &second], &whole[7..], None);
    check(&[&second], &whole[7..], None);
    check(&[&first], &whole[7..], Some("removed"));
    check(&[&second, &first], &whole[7..], Some("inserted"));
    check(&[&first, &second], &whole[8..], Some("removed"));
    check(&[&first, &second], &[], None);
    let other = trail_of(10);
    check(&[&archived(&other, 0, 4, &key), &second], &whole[7..], Some("replaced"));
    // Another archive of the same numbers, of the same key: the trail's own beginning contradicts it.
    let third = archived(&other, 4, 7, &key);
    check(&[&archived(&other, 0, 4, &key), &third], &whole[7..], Some("rewritten"));
}
