use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use super::*;
use crate::model::event::{EventHash, Head};
use crate::model::lease::LeaseState;
use crate::model::run::RunState;
use crate::model::secret::Secret;

/// RFC 8032 §7.1, TEST 1; the public half is RFC 8037 appendix A's.
const SEED: [u8; 32] = [
    0x9d, 0x61, 0xb1, 0x9d, 0xef, 0xfd, 0x5a, 0x60, 0xba, 0x84, 0x4a, 0xf4, 0x92, 0xec, 0x2c, 0xc4,
    0x44, 0x49, 0xc5, 0x69, 0x7b, 0x32, 0x69, 0x19, 0x70, 0x3b, 0xac, 0x03, 0x1c, 0xae, 0x7f, 0x60,
];

fn key() -> SigningKey {
    SigningKey::from_seed(Secret::copy_of(&SEED).unwrap()).unwrap()
}

fn stranger() -> SigningKey {
    SigningKey::from_seed(Secret::copy_of(&[5; 32]).unwrap()).unwrap()
}

fn at(text: &str) -> jiff::Timestamp {
    text.parse().unwrap()
}

fn lease() -> LeaseRecord {
    LeaseRecord {
        lease_id: "lse_0123456789abcdef0123456789abcdef".parse().unwrap(),
        run_id: "ci-1".parse().unwrap(),
        request_id: "req_0123456789abcdef0123456789abcdef".parse().unwrap(),
        capability: "repo.push".parse().unwrap(),
        audience: "github.com".parse().unwrap(),
        channel: crate::model::name::Channel::Git,
        secret: "github-bot".parse().unwrap(),
        issued_at: at("2026-11-22T10:00:00.123456Z"),
        expires_at: at("2026-11-22T10:05:00.123456Z"),
        expires_boot: Duration::from_secs(300),
        boot_id: String::new(),
        uses: 5,
        uses_left: 5,
        state: LeaseState::Granted,
    }
}

fn run() -> Run {
    Run {
        run_id: "ci-1".parse().unwrap(),
        agent: "agent-7".parse().unwrap(),
        principal: "alice".parse().unwrap(),
        permissions: Vec::new(),
        profile: "git-push".to_owned(),
        workspace: "/srv/agents/1".into(),
        state: RunState::Active,
        started_at: at("2026-11-22T09:00:00Z"),
    }
}

fn constraints(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect()
}

fn envelope() -> Envelope {
    let issuer = Issuer { name: "build-7".parse().unwrap(), url: None };
    Envelope::of_lease(&lease(), &run(), &constraints(&[]), &issuer).unwrap()
}

#[test]
fn the_key_is_named_as_the_rfcs_say() {
    let key = key();
    let jwk = key.public().jwk();
    assert_eq!(jwk["x"], "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo");
    assert_eq!(key.public().kid(), "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k", "RFC 8037 A.3");
    // RFC 8032 §7.1, TEST 1: the signature of nothing.
    let signature = STANDARD.encode(key.sign(b""));
    assert!(signature.starts_with("5VZDAMNgrHKQhuLMgG6CioSHfx645dl02HPgZSJJAVVf"), "{signature}");
    assert!(SigningKey::from_seed(Secret::copy_of(&[1; 31]).unwrap()).is_err());
}

#[test]
fn what_is_signed_is_what_dsse_says() {
    let bytes = dsse::pre_authentication("http://example.com/HelloWorld", b"hello world");
    assert_eq!(bytes, b"DSSEv1 29 http://example.com/HelloWorld 11 hello world");
}

#[test]
fn an_envelope_holds_the_twelve_fields_and_what_the_profile_says() {
    let whole = serde_json::to_value(envelope()).unwrap();
    let fields: Vec<&String> = whole.as_object().unwrap().keys().collect();
    assert_eq!(
        fields,
        [
            "action",
            "agent_nhi",
            "audit_emit",
            "constraints",
            "expires_at",
            "issued_at",
            "issuer",
            "lease_id",
            "principal",
            "resource",
            "revocation_url",
            "run_id"
        ]
    );
    assert_eq!((&whole["action"], &whole["resource"]), (&json!("repo.push"), &json!("github.com")));
    assert_eq!(whole["issued_at"], "2026-11-22T10:00:00.123Z");
    assert_eq!(whole["revocation_url"], "/v1/revocations/lse_0123456789abcdef0123456789abcdef");

    let issuer = Issuer {
        name: "build-7".parse().unwrap(),
        url: Some("https://build-7.example".parse().unwrap()),
    };
    let given = constraints(&[("action", "push"), ("branch", "main"), ("uses", "999")]);
    let told = Envelope::of_lease(&lease(), &run(), &given, &issuer).unwrap();
    assert_eq!((told.action.as_str(), told.resource.as_str()), ("push", "github.com"));
    let expected = [
        ("audience", "github.com"),
        ("branch", "main"),
        ("capability", "repo.push"),
        ("uses", "5"),
    ];
    assert_eq!(
        told.constraints,
        constraints(&expected),
        "what sublet knows goes over what is said"
    );
    assert!(
        told.revocation_url.as_str().starts_with("https://build-7.example/v1/revocations/lse_")
    );
    let broken = constraints(&[("resource", "a\nb")]);
    assert!(Envelope::of_lease(&lease(), &run(), &broken, &issuer).is_err());
}

/// Signs what is no envelope with the right key: only form can refuse it.
fn signed(payload: &str) -> String {
    dsse::seal(payload.as_bytes(), &key())
}

#[test]
fn only_what_is_signed_known_and_in_its_time_is_taken() {
    let keys = Jwks::of([key().public().clone()]);
    let good = sign(&envelope(), &key());
    let now = at("2026-11-22T10:01:00Z");
    #[track_caller]
    fn check(bytes: &str, keys: &Jwks, now: jiff::Timestamp, expected: Result<(), &str>) {
        let found = verify(bytes.as_bytes(), keys, now, None).map(|found| {
            assert_eq!(found, envelope());
        });
        assert_eq!(
            found.as_ref().map_err(EnvelopeError::name),
            expected.as_ref().map_err(|e| *e),
            "{found:?}"
        );
    }
    check(&good, &keys, now, Ok(()));

    // Time, at its edges.
    check(&good, &keys, at("2026-11-22T09:59:01Z"), Ok(()));
    check(&good, &keys, at("2026-11-22T09:58:59Z"), Err("not_yet_valid"));
    check(&good, &keys, at("2026-11-22T10:05:00.122Z"), Ok(()));
    check(&good, &keys, at("2026-11-22T10:05:00.123Z"), Err("expired"));

    // Keys.
    check(&good, &Jwks::of([stranger().public().clone()]), now, Err("unknown_key"));
    check(&good, &Jwks::of([stranger().public().clone(), key().public().clone()]), now, Ok(()));
    let renamed = good.replace(key().public().kid(), stranger().public().kid());
    let both = Jwks::of([stranger().public().clone(), key().public().clone()]);
    check(&renamed, &both, now, Err("bad_signature"));

    // The object around it.
    let sealed: Value = serde_json::from_str(&good).unwrap();
    let changed = |change: &dyn Fn(&mut Value)| {
        let mut sealed = sealed.clone();
        change(&mut sealed);
        sealed.to_string()
    };
    check(&changed(&|_| {}), &keys, now, Ok(()));
    check(
        &changed(&|s| s["payloadType"] = json!("application/json")),
        &keys,
        now,
        Err("other_type"),
    );
    check(&changed(&|s| s["extra"] = json!(1)), &keys, now, Err("malformed"));
    check(&changed(&|s| s["signatures"][0]["extra"] = json!(1)), &keys, now, Err("malformed"));
    check(&changed(&|s| s["signatures"] = json!([])), &keys, now, Err("malformed"));
    check(&changed(&|s| s["signatures"][0]["sig"] = json!("AAAA")), &keys, now, Err("malformed"));
    check(&changed(&|s| s["payload"] = json!("*")), &keys, now, Err("malformed"));
    let zeros = STANDARD.encode([0; 64]);
    check(
        &changed(&|s| s["signatures"][0]["sig"] = json!(zeros)),
        &keys,
        now,
        Err("bad_signature"),
    );
    let one = sealed["signatures"][0].clone();
    let many = |count| json!(vec![one.clone(); count]);
    check(&changed(&|s| s["signatures"] = many(2)), &keys, now, Ok(()));
    check(&changed(&|s| s["signatures"] = many(17)), &keys, now, Err("malformed"));
    // One of a key that is not known does not hurt, one of a known key that does not fit does.
    let strange = json!({ "keyid": "other", "sig": "x" });
    check(&changed(&|s| s["signatures"] = json!([strange, one])), &keys, now, Ok(()));
    let unfit = json!({ "keyid": key().public().kid(), "sig": zeros });
    check(&changed(&|s| s["signatures"] = json!([one, unfit])), &keys, now, Err("bad_signature"));
    // The other alphabet of base64 is as good (protocol.md).
    let url_safe = |text: &Value| json!(text.as_str().unwrap().replace('+', "-").replace('/', "_"));
    check(
        &changed(&|s| {
            s["payload"] = url_safe(&s["payload"]);
            s["signatures"][0]["sig"] = url_safe(&s["signatures"][0]["sig"]);
        }),
        &keys,
        now,
        Ok(()),
    );
    let doubled =
        good.replacen('{', r#"{"payloadType":"application/vnd.sublet.envelope+json","#, 1);
    check(&doubled, &keys, now, Err("malformed"));
    check(&format!("{good} "), &keys, now, Ok(()));
    check(&format!("{good}{{}}"), &keys, now, Err("malformed"));
    check("", &keys, now, Err("malformed"));
    check(&" ".repeat(MAX_ENVELOPE + 1), &keys, now, Err("too_large"));

    // What is in it.
    let payload = serde_json::to_string(&envelope()).unwrap();
    check(&signed(&payload), &keys, now, Ok(()));
    check(&signed(&payload.replacen('{', r#"{"extra":1,"#, 1)), &keys, now, Err("malformed"));
    check(&signed(&payload.replacen('{', r#"{"run_id":"ci-1","#, 1)), &keys, now, Err("malformed"));
    let twice = payload.replacen(r#""uses":"5""#, r#""uses":"9","uses":"5""#, 1);
    assert_ne!(twice, payload);
    check(&signed(&twice), &keys, now, Err("malformed"));
    check(&signed(&payload.replace("agent-7", "a b")), &keys, now, Err("malformed"));
    check(&signed(&payload.replace(",\"audit_emit\":true", "")), &keys, now, Err("malformed"));
    check(&signed(&payload.replace("build-7", "build\\n7")), &keys, now, Err("malformed"));

    // A note of the same key is signed over other bytes.
    let as_note = note::sign(&format!("{payload}\n"), key().public().trail_key(), &key());
    let sig = as_note.trim_end().rsplit(' ').next().unwrap();
    let sig = STANDARD.encode(&STANDARD.decode(sig).unwrap()[4..]);
    check(&changed(&|s| s["signatures"][0]["sig"] = json!(sig)), &keys, now, Err("bad_signature"));
}

/// Every single bit of payload and signature counts.
#[test]
fn a_changed_bit_is_refused() {
    let keys = Jwks::of([key().public().clone()]);
    let now = at("2026-11-22T10:01:00Z");
    let good: Value = serde_json::from_str(&sign(&envelope(), &key())).unwrap();
    let payload = STANDARD.decode(good["payload"].as_str().unwrap()).unwrap();
    for bit in (0..payload.len() * 8).step_by(11) {
        let mut changed = payload.clone();
        changed[bit / 8] ^= 1 << (bit % 8);
        let mut sealed = good.clone();
        sealed["payload"] = json!(STANDARD.encode(&changed));
        let refused = verify(sealed.to_string().as_bytes(), &keys, now, None);
        assert_eq!(refused.map_err(|e| e.name()), Err("bad_signature"), "{bit}");
    }
    let signature = STANDARD.decode(good["signatures"][0]["sig"].as_str().unwrap()).unwrap();
    for bit in 0..signature.len() * 8 {
        let mut changed = signature.clone();
        changed[bit / 8] ^= 1 << (bit % 8);
        let mut sealed = good.clone();
        sealed["signatures"][0]["sig"] = json!(STANDARD.encode(&changed));
        let refused = verify(sealed.to_string().as_bytes(), &keys, now, None);
        assert_eq!(refused.map_err(|e| e.name()), Err("bad_signature"), "{bit}");
    }
}

#[test]
fn revocation_and_issuer_are_the_verifiers_to_ask() {
    let keys = Jwks::of([key().public().clone()]);
    let bytes = sign(&envelope(), &key()).into_bytes();
    let now = at("2026-11-22T10:01:00Z");
    let (yes, no) = (|_: &LeaseId| true, |_: &LeaseId| false);
    assert!(verify(&bytes, &keys, now, Some(&no)).is_ok());
    assert_eq!(verify(&bytes, &keys, now, Some(&yes)).unwrap_err().name(), "revoked");
    let found = verify(&bytes, &keys, now, None).unwrap();
    assert_eq!(found.must_be_from("build-7"), Ok(()));
    assert_eq!(found.must_be_from("build-8").unwrap_err().name(), "other_issuer");
}

#[test]
fn key_sets_are_read_as_they_are_published() {
    #[track_caller]
    fn check(set: Value, expected: Result<&str, &str>) {
        let found = Jwks::parse(set.to_string().as_bytes());
        let found = found.as_ref().map(|set| set.key(expected.unwrap_or("")).is_some());
        match expected {
            Ok(_) => assert_eq!(found, Ok(true)),
            Err(says) => assert!(found.unwrap_err().to_string().contains(says), "{found:?}"),
        }
    }
    let ours = key().public().jwk();
    let kid = key().public().kid().to_owned();
    let with = |name: &str, value: Value| {
        let mut jwk = ours.clone();
        jwk[name] = value;
        jwk
    };
    let rsa = json!({ "kty": "RSA", "n": "AQ", "e": "AQAB", "kid": "r" });
    check(key().public().jwks(), Ok(&kid));
    check(json!({ "keys": [rsa, ours], "more": 1 }), Ok(&kid));
    check(json!({ "keys": [with("kid", json!("mine"))] }), Ok("mine"));
    check(json!({ "keys": [{ "kty": "OKP", "crv": "Ed25519", "x": ours["x"] }] }), Ok(&kid));
    check(json!({ "keys": [rsa] }), Err("no key in it"));
    check(json!({ "keys": [with("use", json!("enc"))] }), Err("no key in it"));
    check(json!({ "keys": [with("crv", json!("X25519"))] }), Err("no key in it"));
    check(json!({ "keys": [ours, ours] }), Err("two keys"));
    check(json!({ "keys": [with("d", json!("AA"))] }), Err("private"));
    check(json!({ "keys": [with("x", json!("AA"))] }), Err("no public key"));
    // The neutral element: its signatures can be made by anyone.
    let mut weak = [0; 32];
    weak[0] = 1;
    let weak = base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(weak);
    check(json!({ "keys": [with("x", json!(weak))] }), Err("no public key"));
    check(json!([]), Err("no set"));
}

/// The example of c2sp.org/signed-note's reference (golang.org/x/mod/sumdb/note).
#[test]
fn notes_are_those_of_the_reference() {
    let key = "example.com/foo+530d903a+AekyeRrm56hApGFkyQR4ZCbV54Id2LKaANYcrnKv3U2k";
    let key: NoteKey = key.parse().unwrap();
    assert_eq!(
        key.to_string(),
        "example.com/foo+530d903a+AekyeRrm56hApGFkyQR4ZCbV54Id2LKaANYcrnKv3U2k"
    );
    let text = "This is an example message.\n";
    let line = "\u{2014} example.com/foo Uw2QOkn8srV1yJGh2VYRlL1Tnagv1YEq6TfXppzi2ONncAlTgK7Ztg1ERYNZXsYjOBH3mFXmRKuwHjG1Yu72IneyaQM=\n";
    let keys = [key];
    let opened = |note: &str| note::open(note, &keys).map(|(text, _)| text.to_owned());
    assert_eq!(opened(&format!("{text}\n{line}")).as_deref(), Ok(text));

    let malformed =
        |note: &str| assert!(matches!(opened(note), Err(NoteError::Malformed(_))), "{note:?}");
    malformed("");
    malformed(text);
    malformed(&format!("{text}\n"));
    malformed(&format!("{text}{line}"));
    malformed(&format!("{text}\n{}", line.trim_end()));
    malformed(&format!("{text}\n{}", line.replace('\u{2014}', "-")));
    malformed(&format!("{text}\n{line}{line} "));
    malformed(&format!("{text}\t\n{line}").replace('\n', "\r\n"));
    malformed(&format!("{text}\n{}", line.repeat(101)));
    let changed = opened(&format!("This is another message.\n\n{line}"));
    assert!(matches!(changed, Err(NoteError::BadSignature(_))));
    let unknown = opened(&format!("{text}\n{}", line.replace("foo", "bar")));
    assert_eq!(unknown, Err(NoteError::UnknownKey("example.com/bar".to_owned())));
    // Another's line beside it is passed over.
    let both = format!("{text}\n{}{line}", line.replace("foo", "bar"));
    assert_eq!(opened(&both).as_deref(), Ok(text));

    for bad in [
        "",
        "example.com/foo",
        "example.com/foo+530d903b+AekyeRrm56hApGFkyQR4ZCbV54Id2LKaANYcrnKv3U2k",
        "example.com/fox+530d903a+AekyeRrm56hApGFkyQR4ZCbV54Id2LKaANYcrnKv3U2k",
        "+530d903a+AekyeRrm56hApGFkyQR4ZCbV54Id2LKaANYcrnKv3U2k",
        "example.com/foo+530d903a+AukyeRrm56hApGFkyQR4ZCbV54Id2LKaANYcrnKv3U2k",
        "example.com/foo+530d903a+AekyeRrm",
    ] {
        assert!(bad.parse::<NoteKey>().is_err(), "{bad}");
    }
}

#[test]
fn a_checkpoint_says_what_was_signed_and_nothing_else_passes_for_one() {
    let head = Head { seq: 1024, hash: EventHash::from_bytes([7; 32]) };
    let checkpoint = Checkpoint {
        head,
        time: at("2026-11-22T10:00:00.123Z"),
        host: "host-1".to_owned(),
        cut: None,
    };
    let signed = checkpoint.clone().sign(&key());
    let hash = STANDARD.encode([7; 32]);
    let text = format!(
        "sublet/trail/{kid}\n1024\n{hash}\ntime 2026-11-22T10:00:00.123Z\nhost host-1\n\n\u{2014} sublet/trail/{kid} ",
        kid = key().public().kid(),
    );
    assert!(signed.note().starts_with(&text), "{}", signed.note());
    let keys = [stranger().public().trail_key(), key().public().trail_key()];
    assert_eq!(Checkpoint::open(signed.note(), &keys).as_ref(), Ok(&signed));
    assert_eq!(signed.checkpoint(), &checkpoint);
    let cut = Checkpoint { cut: Some(Cut { first: 513 }), ..checkpoint.clone() }.sign(&key());
    assert_eq!(
        Checkpoint::open(cut.note(), &keys).unwrap().checkpoint().cut,
        Some(Cut { first: 513 })
    );

    // A host's name cannot add a line.
    let sly = Checkpoint { host: "h\nrotated 1".to_owned(), ..checkpoint.clone() }.sign(&key());
    let sly = Checkpoint::open(sly.note(), &keys).unwrap();
    assert_eq!((sly.checkpoint().cut, sly.checkpoint().host.as_str()), (None, "hrotated 1"));

    let refused = |note: &str| Checkpoint::open(note, &keys).unwrap_err();
    assert!(matches!(
        refused(&signed.note().replace("1024", "1025")),
        CheckpointError::Note(NoteError::BadSignature(_))
    ));
    assert!(matches!(
        Checkpoint::open(signed.note(), &keys[..1]),
        Err(CheckpointError::Note(NoteError::UnknownKey(_)))
    ));
    // Signed by us, and no checkpoint.
    let name = || key().public().trail_key();
    let malformed = |text: String| {
        let note = note::sign(&text, name(), &key());
        assert!(matches!(refused(&note), CheckpointError::Malformed(_)), "{text}");
    };
    let origin = name().name().to_owned();
    let rest = "time 2026-11-22T10:00:00Z\nhost h\n";
    let good = note::sign(&format!("{origin}\n1\n{hash}\n{rest}more\n"), name(), &key());
    assert!(Checkpoint::open(&good, &keys).is_ok(), "the control");
    malformed(format!("other\n1\n{hash}\n{rest}"));
    malformed(format!("{origin}\n01\n{hash}\n{rest}"));
    malformed(format!("{origin}\n0\n{hash}\n{rest}"));
    malformed(format!("{origin}\n+1\n{hash}\n{rest}"));
    malformed(format!("{origin}\n1\nAAAA\n{rest}"));
    malformed(format!("{origin}\n1\n{hash}\n"));
    malformed(format!("{origin}\n1\n{hash}\n{rest}rotated 2\n"));
    malformed(format!("{origin}\n1\n{hash}\n{rest}rotated 0\n"));
}

/// What begins as one of ours and goes on as it likes, or is nothing of the kind.
fn strange(good: String) -> impl proptest::strategy::Strategy<Value = Vec<u8>> {
    use proptest::prelude::*;
    let len = good.len();
    let spoiled = (any::<prop::sample::Index>(), any::<Vec<u8>>(), 0..len).prop_map(
        move |(at, with, cut)| {
            let mut bytes = good.clone().into_bytes();
            let at = at.index(len);
            bytes.splice(at..(at + cut).min(len), with);
            bytes
        },
    );
    prop_oneof![spoiled, any::<Vec<u8>>()]
}

proptest::proptest! {
    /// Nothing panics, and nothing but the signed bytes is taken.
    #[test]
    fn whatever_comes_is_refused_in_words(
        sealed in strange(sign(&envelope(), &key())),
        note in strange(checkpoint_of_1().note().to_owned()),
        set in strange(key().public().jwks().to_string()),
        vkey in strange(key().public().trail_key().to_string()),
    ) {
        let keys = Jwks::of([key().public().clone()]);
        if let Ok(found) = verify(&sealed, &keys, at("2026-11-22T10:01:00Z"), None) {
            assert_eq!(found, envelope());
        }
        let text = String::from_utf8_lossy(&note);
        if let Ok(found) = Checkpoint::open(&text, &[key().public().trail_key()]) {
            assert_eq!(found.checkpoint(), checkpoint_of_1().checkpoint());
        }
        drop(Checkpoint::unproven(&text));
        drop(Jwks::parse(&set));
        if let Ok(found) = String::from_utf8_lossy(&vkey).parse::<NoteKey>() {
            assert_eq!(found.to_string().parse(), Ok(found));
        }
        drop(crate::model::event::RecordedEvent::from_line(&text));
    }
}

fn checkpoint_of_1() -> SignedCheckpoint {
    let head = Head { seq: 1, hash: EventHash::from_bytes([7; 32]) };
    let (time, host) = (at("2026-11-22T10:00:00Z"), "host-1".to_owned());
    Checkpoint { head, time, host, cut: Some(Cut { first: 1 }) }.sign(&key())
}
