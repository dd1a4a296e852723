//! What is signed for others: envelopes, checkpoints, key sets. Whatever the bytes, nothing is believed that
//! our key has not signed.
#![forbid(unsafe_code)]

use sublet::envelope::{
    self, Checkpoint, Cut, Envelope, EnvelopeError, Jwks, NoteKey, PublicKey, SigningKey, note,
};
use sublet::model::event::{EventHash, Head};
use sublet::model::secret::Secret;

use super::feed::Feed;

/// The envelope that the corpus holds signed: what verifies must be this one.
const KNOWN: &str = r#"{"agent_nhi":"agent","run_id":"ci-1","principal":"alice","action":"push","resource":"acme/insights","constraints":{"uses":"1"},"issued_at":"2026-11-22T10:00:00.000Z","expires_at":"2026-11-22T10:05:00.000Z","lease_id":"lse_0123456789abcdef0123456789abcdef","issuer":"build-7","revocation_url":"/v1/revocations/lse_0123456789abcdef0123456789abcdef","audit_emit":true}"#;

pub fn run(input: &[u8]) {
    let mut feed = Feed::new(input);
    match feed.below(7) {
        0 => verified(feed.rest()),
        1 => signed(feed.rest()),
        2 => changed(feed),
        3 => key_set(feed.rest()),
        4 => note_key(feed.rest()),
        5 => opened(feed.rest()),
        _ => checkpoint(feed),
    }
}

fn key() -> SigningKey {
    let seed = Secret::copy_of(&[7; 32]).expect("memory can be locked");
    SigningKey::from_seed(seed).expect("32 bytes")
}

fn known() -> Envelope {
    serde_json::from_str(KNOWN).expect("an envelope")
}

fn now() -> jiff::Timestamp {
    "2026-11-22T10:01:00Z".parse().expect("a time")
}

/// Bytes of a stranger.
fn verified(bytes: &[u8]) {
    let key = key();
    let keys = Jwks::of([key.public().clone()]);
    match envelope::verify(bytes, &keys, now(), None) {
        Ok(envelope) => assert_eq!(envelope, known(), "this was never signed"),
        Err(e) => assert!(!e.to_string().is_empty() && !e.name().is_empty()),
    }
    let revoked = envelope::verify(bytes, &keys, now(), Some(&|_| true));
    assert!(revoked.is_err());
    let stranger = Jwks::of([PublicKey::from_bytes(&[
        0xd7, 0x5a, 0x98, 0x01, 0x82, 0xb1, 0x0a, 0xb7, 0xd5, 0x4b, 0xfe, 0xd3, 0xc9, 0x64, 0x07,
        0x3a, 0x0e, 0xe1, 0x72, 0xf3, 0xda, 0xa6, 0x23, 0x25, 0xaf, 0x02, 0x1a, 0x68, 0xf7, 0x07,
        0x51, 0x1a,
    ])
    .expect("RFC 8032's first key")]);
    assert!(envelope::verify(bytes, &stranger, now(), None).is_err());
}

/// Any envelope that can be read is, signed, the same envelope, for as long as it says.
fn signed(bytes: &[u8]) {
    let Ok(envelope) = serde_json::from_slice::<Envelope>(bytes) else { return };
    let key = key();
    let keys = Jwks::of([key.public().clone()]);
    let text = envelope::sign(&envelope, &key);
    let Envelope { issued_at, expires_at, .. } = envelope;
    for at in [issued_at, expires_at, now(), jiff::Timestamp::MIN, jiff::Timestamp::MAX] {
        match envelope::verify(text.as_bytes(), &keys, at, None) {
            Ok(read) => {
                assert!(at < expires_at);
                assert_eq!(read, envelope);
            }
            Err(EnvelopeError::Expired { .. }) => assert!(expires_at <= at),
            Err(EnvelopeError::NotYetValid { .. }) => assert!(at < issued_at),
            Err(EnvelopeError::TooLarge(size)) => assert_eq!(size, text.len()),
            Err(e) => panic!("{e}: {text}"),
        }
    }
}

/// The known envelope with some bytes changed.
fn changed(mut feed: Feed<'_>) {
    let mut text = envelope::sign(&known(), &key()).into_bytes();
    while !feed.is_empty() {
        let at = feed.number() as usize % text.len();
        text[at] = feed.byte();
    }
    verified(&text);
}

fn key_set(bytes: &[u8]) {
    match Jwks::parse(bytes) {
        Ok(keys) => {
            let text = String::from_utf8_lossy(bytes);
            assert!(text.contains("keys"));
            // A key that fits anybody's signature is none.
            let envelope = envelope::sign(&known(), &key());
            let ours = keys.key(key().public().kid()) == Some(key().public());
            let verified = envelope::verify(envelope.as_bytes(), &keys, now(), None);
            assert_eq!(verified.is_ok(), ours);
        }
        Err(e) => assert!(!e.to_string().is_empty()),
    }
    let ours = key().public().jwks().to_string();
    assert_eq!(Jwks::parse(ours.as_bytes()), Ok(Jwks::of([key().public().clone()])));
}

fn note_key(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(key) = text.parse::<NoteKey>() {
        assert_eq!(key.to_string(), text);
        assert!(!key.name().contains([' ', '\n', '+']));
    }
}

/// A note of a stranger, opened with our key and with those that it may name itself.
fn opened(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let key = key();
    let keys = [key.public().trail_key()];
    if let Ok((said, by)) = note::open(text, &keys) {
        assert!(text.starts_with(said) && said.ends_with('\n'));
        assert_eq!(by, &keys[0]);
    }
    if let Ok(signed) = Checkpoint::open(text, &keys) {
        // The corpus holds one that is signed.
        assert_eq!(signed.checkpoint(), &said_before());
        assert_eq!(signed.note(), text);
    }
    if let Some(checkpoint) = Checkpoint::unproven(text) {
        assert!(checkpoint.head.seq >= 1);
        assert!(checkpoint.cut.is_none_or(|cut| (1..=checkpoint.head.seq).contains(&cut.first)));
    }
    assert!(Checkpoint::open(text, &[]).is_err());
}

fn said_before() -> Checkpoint {
    let head = Head { seq: 1024, hash: EventHash::from_bytes([9; 32]) };
    let time = "2026-11-22T10:00:00Z".parse().expect("a time");
    Checkpoint { head, time, host: "build-7".to_owned(), cut: Some(Cut { first: 513 }) }
}

/// Whatever the host is called, its checkpoint says one thing; changed, it says nothing.
fn checkpoint(mut feed: Feed<'_>) {
    let key = key();
    let keys = [key.public().trail_key()];
    let seq = (feed.number() >> feed.below(64)).max(1);
    let milliseconds = feed.number() as i64 % 250_000_000_000_000;
    let checkpoint = Checkpoint {
        head: Head { seq, hash: EventHash::from_bytes([feed.byte(); 32]) },
        time: jiff::Timestamp::from_millisecond(milliseconds).unwrap_or(jiff::Timestamp::MIN),
        host: feed.text(),
        cut: (feed.below(2) == 0).then(|| Cut { first: 1 + feed.number() % seq }),
    };
    let signed = checkpoint.sign(&key);
    let opened = Checkpoint::open(signed.note(), &keys).expect("it is ours");
    assert_eq!(opened, signed);
    assert_eq!(Checkpoint::unproven(signed.note()).as_ref(), Some(signed.checkpoint()));
    let mut note = signed.note().as_bytes().to_vec();
    while !feed.is_empty() {
        let at = feed.number() as usize % note.len();
        note[at] = feed.byte();
    }
    if let Ok(text) = String::from_utf8(note)
        && let Ok(opened) = Checkpoint::open(&text, &keys)
    {
        assert_eq!(opened.checkpoint(), signed.checkpoint(), "{text}");
    }
}
