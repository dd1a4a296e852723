//! The audit trail: drafts out of hostile words, records and heads as somebody may have left them.
#![forbid(unsafe_code)]

use std::convert::Infallible;

use serde_json::Value;
use sha2::{Digest, Sha256};
use sublet::audit::archive::{self, Ending};
use sublet::audit::{self, HeadOf, Item, Known, ocsf};
use sublet::envelope::{Checkpoint, NoteKey, SigningKey};
use sublet::model::event::{
    DOMAIN, Draft, Event, EventHash, EventType, Head, KeptHead, MAX_ARGUMENTS, MAX_COMMAND,
    MAX_DETAIL, MAX_TEXT, RecordedEvent, recorded_command,
};
use sublet::model::id::{ExecId, LeaseId, RunId};
use sublet::model::secret::Secret;

use super::feed::Feed;

pub fn run(input: &[u8]) {
    let mut feed = Feed::new(input);
    match feed.below(7) {
        0 => heads(feed.rest()),
        1 => kept(feed.rest()),
        2 => record(feed),
        3 => drafted(feed),
        4 => tampered(feed),
        5 => any_file(feed.rest()),
        _ => tampered_file(feed),
    }
}

/// What parses is written back as it was, but for zeros before a number.
fn heads(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(hash) = text.parse::<EventHash>() {
        assert_eq!(hash.to_string(), text);
    }
    if let Ok(head) = text.parse::<Head>() {
        assert_eq!(head.to_string(), text.trim_start_matches('0').replacen(':', &colon(text), 1));
        assert_eq!(head.to_string().parse(), Ok(head));
    }
    if let Ok(kind) = text.parse::<EventType>() {
        assert_eq!(kind.as_str(), text);
    }
}

/// `0:…` keeps its zero.
fn colon(text: &str) -> String {
    if text.trim_start_matches('0').starts_with(':') { "0:".to_owned() } else { ":".to_owned() }
}

/// The head that the launcher keeps: as it is, and with a checksum that fits.
fn kept(bytes: &[u8]) {
    let sum = |fields: &[u8]| {
        Sha256::digest(fields).iter().map(|b| format!("{b:02x}")).collect::<String>()
    };
    let mended = [bytes, b" ", sum(bytes).as_bytes(), b"\n"].concat();
    for record in [bytes, &mended] {
        let Ok(kept) = KeptHead::decode(record) else { continue };
        let written = kept.encode();
        assert_eq!(written.len(), KeptHead::SIZE);
        let again = KeptHead::decode(written.as_bytes()).expect("what was written can be read");
        assert_eq!((again.latest, again.durable), (kept.latest, kept.durable));
        let plain = kept.boot_id.bytes().all(|b| b.is_ascii_graphic());
        if plain && kept.boot_id.len() == 36 {
            assert_eq!(again, kept);
        }
    }
}

/// A row of the store, every part of which may have been changed.
fn record(mut feed: Feed<'_>) {
    let (seq, before) = (feed.number() >> feed.below(64), feed.number() >> feed.below(64));
    let fitting = feed.below(2) == 0;
    let hash = feed.text();
    let body = String::from_utf8_lossy(feed.rest()).into_owned();
    let true_hash = hash_of(&body);
    let hash = if fitting { true_hash.clone() } else { hash };
    let head = Head { seq: before, hash: EventHash::ZERO };
    let recorded = RecordedEvent { seq, hash, body };
    let event = recorded.event();
    match recorded.verify_link(&head) {
        Ok(next) => {
            assert_eq!(next, Head { seq, hash: true_hash.parse().expect("a hash") });
            assert_eq!(before.checked_add(1), Some(seq));
            let read: Value = serde_json::from_str(&recorded.body).expect("it is JSON");
            assert_eq!(read["seq"].as_u64(), Some(seq));
            assert_eq!(read["prev_hash"].as_str(), Some(EventHash::ZERO.to_string().as_str()));
            if let Ok(event) = &event {
                assert_eq!((event.seq, event.hash), (next.seq, next.hash));
            }
        }
        Err(fault) => assert!(!fault.to_string().is_empty()),
    }
    if let Ok(event) = event {
        let again: Event = serde_json::from_str(&event.line()).expect("a line reads back");
        assert_eq!(again.line(), event.line());
    }
}

fn hash_of(body: &str) -> String {
    let digest = Sha256::new().chain_update(DOMAIN).chain_update(body).finalize();
    digest.iter().map(|b| format!("{b:02x}")).collect()
}

/// Whatever users say: the line is bounded, is the event, and is bound to its place.
fn drafted(mut feed: Feed<'_>) {
    let event = draft(&mut feed).seal(&Head { seq: feed.number() >> 1, hash: EventHash::ZERO });
    let head = Head { seq: event.seq - 1, hash: EventHash::ZERO };
    let line = event.line();
    assert!(!line.contains('\n') && line.is_char_boundary(line.len()));
    // Escaped, a byte may take six.
    assert!(line.len() <= 6 * (2 * MAX_TEXT + 2 * MAX_DETAIL + 255) + 2048, "{}", line.len());
    for text in [&event.reason, &event.outcome].into_iter().flatten() {
        assert!(text.len() <= MAX_TEXT);
    }
    let read: Event = serde_json::from_str(&line).expect("a line reads back");
    assert_eq!(read, event);
    let recorded = event.record();
    assert_eq!(recorded.line(), line);
    assert_eq!(recorded.event().expect("a record reads back"), event);
    assert_eq!(recorded.verify_link(&head), Ok(event.head()));
    assert_eq!(recorded.hash, hash_of(&recorded.body));
    assert_eq!(RecordedEvent::from_line(&line), Some(recorded));
    let mapped = ocsf::event(&event);
    assert_eq!(mapped["time"].as_i64(), Some(event.time.as_millisecond()));

    let argv: Vec<String> = (0..feed.byte()).map(|_| feed.text()).collect();
    let command = recorded_command(&argv);
    assert!(command.len() <= MAX_ARGUMENTS + 1);
    assert!(command.iter().map(String::len).sum::<usize>() <= MAX_COMMAND + 32);
}

fn draft(feed: &mut Feed<'_>) -> Draft {
    let milliseconds = feed.number() as i64 % 250_000_000_000_000;
    let time = jiff::Timestamp::from_millisecond(milliseconds).unwrap_or(jiff::Timestamp::MIN);
    let mut draft = Draft::new(feed.pick(EventType::ALL), time, &feed.text());
    draft.run_id = feed.text().parse::<RunId>().ok();
    draft.agent = feed.text().parse().ok();
    draft.capability = feed.text().parse().ok();
    draft.audience = feed.text().parse().ok();
    draft.channel = feed.text().parse().ok();
    let given = feed.byte();
    if given & 1 != 0 {
        draft.lease_id = Some(LeaseId::fresh());
        draft.exec_id = Some(ExecId::fresh());
    }
    if given & 2 != 0 {
        draft.ttl_seconds = Some(feed.number());
        draft.uses = Some(feed.number() as u32);
    }
    if given & 4 != 0 {
        draft = draft.because(feed.text().repeat(1 + feed.below(200)));
    }
    if given & 8 != 0 {
        draft = draft.outcome(feed.text().repeat(1 + feed.below(200)));
    }
    for _ in 0..feed.below(12) {
        let key = feed.text();
        draft = draft.with(&key, value(feed, 12));
    }
    draft
}

fn value(feed: &mut Feed<'_>, depth: u8) -> Value {
    match feed.below(if depth == 0 { 6 } else { 9 }) {
        0 => Value::Null,
        1 => feed.byte().is_multiple_of(2).into(),
        2 => feed.number().into(),
        3 => (feed.number() as i64).into(),
        4 => f64::from_bits(feed.number()).into(),
        5 => feed.text().repeat(1 + feed.below(40)).into(),
        6 => {
            let element = value(feed, depth - 1);
            // Long only at the top: else a few bytes of input would be more than memory holds.
            vec![element; if depth == 12 { 1 + feed.below(256) } else { 1 }].into()
        }
        7 => (0..feed.below(6)).map(|_| value(feed, depth - 1)).collect(),
        _ => {
            let members = (0..feed.below(6)).map(|_| (feed.text(), value(feed, depth - 1)));
            Value::Object(members.collect())
        }
    }
}

const BOOT: &str = "00000000-0000-0000-0000-000000000000";

/// A whole trail, and its head.
fn trail(feed: &mut Feed<'_>) -> (Vec<RecordedEvent>, Head) {
    let mut events = Vec::<RecordedEvent>::new();
    let mut head = Head::EMPTY;
    for nth in 0..2 + feed.below(8) {
        let kind = EventType::ALL[nth % EventType::ALL.len()];
        let event = Draft::new(kind, jiff::Timestamp::UNIX_EPOCH, "host")
            .because(feed.text())
            .with("nth", nth as u64)
            .seal(&head);
        head = event.head();
        events.push(event.record());
    }
    (events, head)
}

fn signing_key() -> SigningKey {
    let seed = Secret::copy_of(&[7; 32]).expect("memory can be locked");
    SigningKey::from_seed(seed).expect("32 bytes")
}

fn keys(key: &SigningKey) -> [NoteKey; 1] {
    [key.public().trail_key()]
}

fn sound<T>(result: Result<T, Infallible>) -> T {
    result.unwrap_or_else(|never| match never {})
}

/// A trail that somebody worked on: `audit::verify` says so, unless nothing was changed.
fn tampered(mut feed: Feed<'_>) {
    let (whole, head) = trail(&mut feed);
    let mut events = whole.clone();
    let kept = KeptHead { latest: head, durable: head, boot_id: BOOT.to_owned() };
    for _ in 0..feed.below(4) {
        let (at, to) = (feed.below(events.len().max(1)), feed.below(events.len().max(1)));
        match feed.below(8) {
            _ if events.is_empty() => {}
            0 => drop(events.remove(at)),
            1 => events.swap(at, to),
            2 => events.insert(at, events[to].clone()),
            3 => events.truncate(at),
            4 => events[at].seq = feed.number(),
            5 => events[at].hash = events[to].hash.clone(),
            6 => {
                let body = &mut events[at].body;
                let place = feed.below(256) % body.len();
                if body.is_char_boundary(place) && body.is_char_boundary(place + 1) {
                    let with = char::from(feed.byte() & 0x7F).to_string();
                    body.replace_range(place..place + 1, &with);
                }
            }
            // Hashed anew, as who may write to the store can.
            _ => {
                events[at].body = events[to].body.clone();
                events[at].hash = hash_of(&events[at].body);
            }
        }
    }
    let key = signing_key();
    let keys = keys(&key);
    let rows = || events.iter().cloned().map(Ok::<_, Infallible>);
    let verified = |known: Known<'_>| sound(audit::verify(rows(), known));
    let report = verified(Known::trail(&keys).kept(&kept, BOOT));
    assert_eq!(report.finding.is_none(), events == whole, "{report:?}\n{events:#?}");
    let given = verified(Known::trail(&keys).head(&head));
    assert_eq!(given.finding.is_none(), events == whole);
    // A signed checkpoint in the store holds all that is before it.
    let signed = checkpoint(head).sign(&key);
    let row = (head.seq, signed.note().to_owned());
    let vouched = verified(Known::trail(&keys).rows([row]));
    assert_eq!(vouched.finding.is_none(), events == whole);
    assert!(report.events <= events.len() as u64);
    // Without a head kept elsewhere, only a beginning of the trail passes for the whole.
    let alone = verified(Known::trail(&keys));
    if alone.finding.is_none() && !rehashed(&events, &whole) {
        assert!(whole.starts_with(&events), "{events:#?}");
    }
    if let Some(audit::Finding::Truncated { last, kept, of }) = report.finding {
        assert_eq!(of, HeadOf::Launcher);
        assert_eq!((last, kept), (events.len() as u64, whole.len() as u64));
    }
    let all = audit::Filter::default();
    assert_eq!(audit::list(rows(), &all).count(), events.len());
}

fn checkpoint(head: Head) -> Checkpoint {
    Checkpoint { head, time: jiff::Timestamp::UNIX_EPOCH, host: "host".to_owned(), cut: None }
}

/// The last event may be another that was made to fit: nothing follows it that would show.
fn rehashed(events: &[RecordedEvent], whole: &[RecordedEvent]) -> bool {
    events.split_last().is_some_and(|(_, before)| whole.starts_with(before))
}

/// A file that may never have been a trail: it is read to an end, and verified to a report.
fn any_file(bytes: &[u8]) {
    let key = signing_key();
    let keys = keys(&key);
    for ending in [Ending::Any, Ending::Rotation] {
        let items = || archive::read(bytes, "some.jsonl", ending);
        let count = items().count();
        assert!(count <= bytes.split(|b| *b == b'\n').count() + 1);
        for known in [Known::trail(&keys), Known::part(&keys)] {
            let report = audit::verify(items(), known).expect("bytes can be read");
            assert!(report.events <= count as u64);
            if let Some(finding) = report.finding {
                assert!(!finding.to_string().is_empty() && !finding.name().is_empty());
            }
        }
    }
}

/// An exported trail with its checkpoints, in which bytes were changed: what passes is what was written.
fn tampered_file(mut feed: Feed<'_>) {
    let (events, head) = trail(&mut feed);
    let key = signing_key();
    let keys = keys(&key);
    let middle = events[events.len() / 2].verify_link(&Head {
        seq: events[events.len() / 2].seq - 1,
        hash: events[events.len() / 2 - 1].hash.parse().expect("a hash"),
    });
    let middle = middle.expect("it is whole");
    let notes =
        [middle, head].map(|head| (head.seq, checkpoint(head).sign(&key).note().to_owned()));
    let mut file = Vec::new();
    let rows = events.iter().cloned().map(Ok::<_, Infallible>);
    archive::write(&mut file, &Head::EMPTY, head.seq, rows, notes).expect("a whole trail");
    let whole = file.clone();
    for _ in 0..1 + feed.below(3) {
        let at = feed.number() as usize % (file.len() + 1);
        match feed.below(4) {
            0 => file.insert(at, feed.byte()),
            1 if at < file.len() => drop(file.remove(at)),
            2 => file.truncate(at),
            _ if at < file.len() => file[at] = feed.byte(),
            _ => {}
        }
    }
    let items = |file: &[u8]| -> Vec<Item> {
        archive::read(file, "some.jsonl", Ending::Any).map(|item| item.expect("bytes")).collect()
    };
    let known = Known::trail(&keys).head(&head);
    let report = audit::verify(archive::read(&file[..], "some.jsonl", Ending::Any), known);
    let report = report.expect("bytes can be read");
    let told: Vec<Item> = events_of(items(&file));
    assert_eq!(report.finding.is_none(), told == events_of(items(&whole)) && agrees(&file, &keys));
}

fn events_of(items: Vec<Item>) -> Vec<Item> {
    items.into_iter().filter(|item| !matches!(item, Item::Checkpoint(_))).collect()
}

/// Every checkpoint of the file is signed, and stands behind the event that it is about.
fn agrees(file: &[u8], keys: &[NoteKey]) -> bool {
    let mut last = 0;
    archive::read(file, "some.jsonl", Ending::Any).all(|item| match item.expect("bytes") {
        Item::Event(event) => {
            last = event.seq;
            true
        }
        Item::Checkpoint(note) => {
            Checkpoint::open(&note, keys).is_ok_and(|signed| signed.checkpoint().head.seq == last)
        }
        Item::Fault(_) => false,
    })
}
