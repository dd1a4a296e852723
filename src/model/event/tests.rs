use sha2::{Digest, Sha256};

use super::*;

fn time() -> jiff::Timestamp {
    "2026-11-22T10:00:00.123456789Z".parse().unwrap()
}

fn draft() -> Draft {
    Draft::new(EventType::LeaseGranted, time(), "host-1")
}

#[test]
fn the_encoding_is_what_the_documentation_says() {
    let event = Event {
        id: "evt_00000000000070008000000000000000".parse().unwrap(),
        ..draft().because("to push").with("masked", 3).with("b", "x").seal(&Head::EMPTY)
    };
    let body = format!(
        r#"{{"seq":1,"id":"evt_00000000000070008000000000000000","time":"2026-11-22T10:00:00.123Z","type":"lease.granted","host":"host-1","reason":"to push","detail":{{"b":"x","masked":3}},"prev_hash":"{}"}}"#,
        "0".repeat(64)
    );
    assert_eq!(event.body(), body);
    let mut hasher = Sha256::new();
    hasher.update(b"sublet.event.v1\n");
    hasher.update(&body);
    let hash: [u8; 32] = hasher.finalize().into();
    let hex: String = hash.iter().map(|b| format!("{b:02x}")).collect();
    assert_eq!(EventHash::of_body(&event.body()).to_string(), hex);
    let line: serde_json::Value = serde_json::from_str(&event.line()).unwrap();
    assert_eq!(line["hash"], event.hash.to_string());
}

#[test]
fn a_chain_verifies_and_every_change_to_it_is_seen() {
    let first = draft().seal(&Head::EMPTY);
    let second = draft().seal(&first.head());
    assert_eq!(first.verify_link(&Head::EMPTY), Ok(first.head()));
    assert_eq!(second.verify_link(&first.head()), Ok(second.head()));

    #[track_caller]
    fn check(event: &Event, head: &Head, expected: LinkFault) {
        assert_eq!(event.verify_link(head), Err(expected));
    }
    check(&second, &Head::EMPTY, LinkFault::Gap { expected: 1, found: 2 });
    let changed = Event { host: "host-2".to_owned(), ..second.clone() };
    check(&changed, &first.head(), LinkFault::Altered { seq: 2 });
    let other = draft().seal(&Head::EMPTY);
    check(&second, &other.head(), LinkFault::Unlinked { seq: 2 });
    let mut moved = first.record();
    moved.seq = 2;
    assert_eq!(moved.verify_link(&first.head()), Err(LinkFault::Moved { seq: 2, found: 1 }));
}

#[test]
fn a_record_reads_back_as_the_event() {
    let event = draft()
        .with("command", recorded_command(&["git", "push"]))
        .with("nested", serde_json::json!({"z": 1, "a": [true, null]}))
        .outcome("ok \"quoted\" \u{1b}[31m\n")
        .seal(&Head::EMPTY);
    assert_eq!(event.record().event().unwrap(), event);
    assert_eq!(event.record().line(), event.line());
    let read: Event = serde_json::from_str(&event.line()).unwrap();
    assert_eq!(read.verify_link(&Head::EMPTY), Ok(event.head()));
}

#[test]
fn what_users_say_is_bounded() {
    let long = "ä".repeat(100_000);
    let event = draft()
        .because(long.clone())
        .with("text", long.clone())
        .with("list", vec![long.clone(); 1000])
        .with("fraction", 0.1)
        .with("z", serde_json::json!({ "deep": { "er": long } }))
        .seal(&Head::EMPTY);
    let reason = event.reason.as_ref().unwrap();
    assert!(reason.len() <= MAX_TEXT && reason.ends_with("ä…"), "{}", reason.len());
    assert_eq!(event.detail["fraction"], "0.1");
    assert!(event.line().len() < 3 * MAX_DETAIL, "{}", event.line().len());
    assert_eq!(event.record().event().unwrap().verify_link(&Head::EMPTY), Ok(event.head()));

    let many = draft().with("n", vec![1u64; 1_000_000]).seal(&Head::EMPTY);
    assert!(many.line().len() < 3 * MAX_DETAIL);

    let argv: Vec<String> = (0..200).map(|i| format!("{i}")).collect();
    let recorded = recorded_command(&argv);
    assert_eq!(recorded.len(), MAX_ARGUMENTS + 1);
    assert_eq!(recorded.last().unwrap(), "…and 136 more");
    assert_eq!(recorded_command(&["a", "b"]), ["a", "b"]);
    let heavy = recorded_command(&vec!["x".repeat(5000); 20]);
    assert!(heavy.concat().len() <= MAX_COMMAND + 40);
}

#[test]
fn every_type_has_its_text() {
    for &kind in EventType::ALL {
        assert_eq!(kind.as_str().parse(), Ok(kind));
        assert_eq!(serde_json::to_value(kind).unwrap(), kind.as_str());
    }
    assert!("lease.stolen".parse::<EventType>().is_err());
}

#[test]
fn heads_as_users_write_them() {
    let head = draft().seal(&Head::EMPTY).head();
    assert_eq!(head.to_string().parse(), Ok(head));
    let hash = head.hash.to_string();
    for bad in [
        String::new(),
        hash.clone(),
        format!("x:{hash}"),
        format!("+1:{hash}"),
        format!("1:{}", hash.to_uppercase().replace(|c: char| c.is_ascii_digit(), "A")),
        format!("1:{hash}0"),
        format!("1:{hash}\n"),
        format!(":{hash}"),
    ] {
        assert!(bad.parse::<Head>().is_err(), "{bad:?}");
    }
}

#[test]
fn a_torn_record_of_the_head_is_told_from_an_older_one() {
    let latest = draft().seal(&Head::EMPTY).head();
    let boot_id = "5a2c7f0e-0000-4000-8000-123456789abc".to_owned();
    let kept = KeptHead { latest, durable: Head::EMPTY, boot_id: boot_id.clone() };
    let record = kept.encode();
    assert_eq!(record.len(), KeptHead::SIZE);
    assert_eq!(KeptHead::decode(record.as_bytes()), Ok(kept.clone()));

    let newer = KeptHead { latest: draft().seal(&latest).head(), durable: latest, ..kept };
    let newer = newer.encode();
    for tear in [60, 90, 150, 250] {
        let torn = [&newer.as_bytes()[..tear], &record.as_bytes()[tear..]].concat();
        assert_eq!(KeptHead::decode(&torn), Err(KeptHeadError::Torn), "{tear}");
    }
    assert_eq!(KeptHead::decode(&record.as_bytes()[..100]), Err(KeptHeadError::Size(100)));
    assert_eq!(KeptHead::decode(b""), Err(KeptHeadError::Size(0)));
    assert_eq!(KeptHead::decode(&[0; KeptHead::SIZE]), Err(KeptHeadError::Torn));
}
