//! Envelopes from outside: the command that checks them, and what stays of the key in memory.

use std::path::Path;

use sublet::audit::key;
use sublet::cli::Globals;
use sublet::cli::verify_envelope::{VerifyEnvelopeArgs, execute};
use sublet::envelope::{self, Envelope, SigningKey};
use sublet::model::secret::Secret;

fn envelope(minutes: i64) -> Envelope {
    let now = jiff::Timestamp::now();
    let at =
        |seconds: i64| jiff::Timestamp::from_second(now.as_second() + seconds).unwrap().to_string();
    serde_json::from_value(serde_json::json!({
        "agent_nhi": "agent", "run_id": "ci-1", "principal": "alice", "action": "push",
        "resource": "acme/insights", "constraints": { "branch": "main" },
        "issued_at": at(-600), "expires_at": at(minutes * 60),
        "lease_id": "lse_0123456789abcdef0123456789abcdef", "issuer": "build-7",
        "revocation_url": "/v1/revocations/lse_0123456789abcdef0123456789abcdef",
        "audit_emit": true,
    }))
    .unwrap()
}

#[test]
fn the_command_says_yes_to_what_is_signed_by_a_known_key_and_in_its_time() {
    let dir = tempfile::tempdir().unwrap();
    let (state, stranger) = (dir.path().join("state"), dir.path().join("stranger"));
    std::fs::create_dir(&state).unwrap();
    std::fs::create_dir(&stranger).unwrap();
    let key = key::load_or_create(&state, None).unwrap();
    let other = key::load_or_create(&stranger, None).unwrap();
    let place = |name: &str, text: String| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let good = place("good", envelope::sign(&envelope(5), &key));
    let late = place("late", envelope::sign(&envelope(-1), &key));
    let jwks = place("jwks", key.public().jwks().to_string());
    let strange = place("strange", other.public().jwks().to_string());
    let nothing = dir.path().join("nothing");

    let check = |file: &Path, state: &Path, jwks: Option<&Path>, issuer: Option<&str>| {
        for json in [false, true] {
            let globals = Globals { state_dir: Some(state.to_owned()), json, ..Globals::default() };
            let args = VerifyEnvelopeArgs {
                file: file.to_owned(),
                jwks: jwks.map(Path::to_owned),
                issuer: issuer.map(str::to_owned),
            };
            let answer = execute(&globals, &args).unwrap_or_else(|failure| failure.exit);
            if json {
                return answer;
            }
        }
        unreachable!()
    };
    assert_eq!(check(&good, &state, None, None), 0);
    assert_eq!(check(&good, &state, None, Some("build-7")), 0);
    assert_eq!(check(&good, &nothing, Some(&jwks), None), 0);
    assert_eq!(check(&good, &state, None, Some("build-8")), 1);
    assert_eq!(check(&late, &state, None, None), 1);
    assert_eq!(check(&good, &state, Some(&strange), None), 1);
    assert_eq!(check(&good, &stranger, None, None), 1);
    assert_eq!(check(&jwks, &state, None, None), 1, "no envelope");
    assert_eq!(check(&good, &nothing, None, None), 2, "no key");
    assert_eq!(check(&good, &state, Some(&good), None), 2, "no key set");
    assert_eq!(check(&nothing, &state, None, None), 2, "no file");
}

/// How many times the masked bytes lie in the clear in what of this process can be read.
fn copies_in_memory(masked: &[u8], mask: u8) -> usize {
    use std::os::unix::fs::FileExt;
    let memory = std::fs::File::open("/proc/self/mem").unwrap();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let mut copies = 0;
    let mut buffer = vec![0; 4096];
    for line in maps.lines().filter(|line| line.split(' ').nth(1).unwrap().starts_with("rw")) {
        let (start, end) = line.split(' ').next().unwrap().split_once('-').unwrap();
        let start = u64::from_str_radix(start, 16).unwrap();
        let end = u64::from_str_radix(end, 16).unwrap();
        // What is looked for is aligned to its words; a page's border it does not cross by chance.
        for at in (start..end).step_by(4096 - masked.len()) {
            let want = buffer.len().min((end - at) as usize);
            let Ok(got) = memory.read_at(&mut buffer[..want], at) else { break };
            let first = masked[0] ^ mask;
            copies += (0..got.saturating_sub(masked.len()))
                .filter(|&i| buffer[i] == first)
                .filter(|&i| buffer[i..].iter().zip(masked).all(|(a, b)| a ^ mask == *b))
                .count();
            buffer.fill(0);
        }
    }
    copies
}

#[test]
fn no_copy_of_the_signing_key_stays_behind() {
    const MASK: u8 = 0x5A;
    let mut masked = [0; 32];
    sublet::sys::random::fill(&mut masked).unwrap();
    let mut seed = Secret::zeroed(32).unwrap();
    for (byte, masked) in seed.expose_mut().iter_mut().zip(masked) {
        *byte = masked ^ MASK;
    }
    let mut control = seed.expose().to_vec();
    let key = SigningKey::from_seed(seed).unwrap();
    for _ in 0..3 {
        envelope::sign(&envelope(5), &key);
    }
    drop(key);
    let begin = &masked[..16];
    assert!(copies_in_memory(begin, MASK) >= 1, "the control");
    zeroize::Zeroize::zeroize(&mut control);
    assert_eq!(copies_in_memory(begin, MASK), 0);
}
