use std::convert::Infallible;

use super::*;
use crate::model::event::{Draft, Head, KeptHead};
use crate::model::id::RequestId;

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
    let report = verify(read(trail), None, BOOT, None).unwrap();
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
        let report = verify(read(trail), kept.as_ref(), BOOT, given.as_ref()).unwrap();
        assert_eq!(report.finding, expected);
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
    check(&[], Some(kept(10, 8, BOOT)), None, truncated(0, 8, launcher));

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
    let report = verify(read(&whole[..8]), Some(&kept), BOOT, None).unwrap();
    assert_eq!((report.finding, report.lost_with_power), (None, 2));

    // Events of this boot stand where the lost ones stood.
    let mut grown = whole[..8].to_vec();
    for _ in 0..4 {
        let head = head_of(&grown, grown.len() as u64);
        grown.push(draft(EventType::BrokerStarted).seal(&head).record());
    }
    let report = verify(read(&grown), Some(&kept), BOOT, None).unwrap();
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
