//! Bodies of requests and answers, as any process that reaches a socket may send them: the first byte says
//! which, the rest is the body.
#![forbid(unsafe_code)]

use std::fmt::Debug;

use serde::Serialize;
use serde::de::DeserializeOwned;
use sublet::api::wire::{
    BatchBody, ErrorBody, ExecAnswer, ExecBody, LeaseBody, RenewBody, RevocationBody,
    RevocationView, RevokeBody, RunBody,
};
use sublet::policy::{LeaseFlag, Reason};

pub fn run(input: &[u8]) {
    let Some((which, body)) = input.split_first() else { return };
    match which % 10 {
        0 => read::<LeaseBody>(body).iter().for_each(check_lease),
        1 => {
            if let Some(batch) = read::<BatchBody>(body) {
                batch.leases.iter().for_each(check_lease);
                batch.reason.iter().for_each(check_reason);
            }
        }
        2 => {
            if let Some(exec) = read::<ExecBody>(body) {
                exec.reason.iter().for_each(check_reason);
                for name in exec.environment.keys() {
                    assert!(!name.as_str().is_empty() && !name.as_str().contains('='));
                }
            }
        }
        3 => {
            if let Some(run) = read::<RunBody>(body) {
                for name in [&run.agent, &run.principal] {
                    assert!(name.as_str().bytes().all(|b| b.is_ascii_graphic()));
                }
                if let Some(id) = run.run_id {
                    // It is a directory's name.
                    assert!(!id.as_str().contains('/') && !id.as_str().starts_with('.'));
                }
            }
        }
        4 => drop(read::<RenewBody>(body)),
        5 => read::<RevokeBody>(body).iter().flat_map(|b| &b.reason).for_each(check_reason),
        6 => drop(read::<RevocationBody>(body)),
        7 => drop(read::<RevocationView>(body)),
        8 => drop(read::<ErrorBody>(body)),
        _ => drop(read::<ExecAnswer>(body)),
    }
}

/// What is read means one thing: written and read again it is the same.
fn read<T: Serialize + DeserializeOwned + Debug>(body: &[u8]) -> Option<T> {
    let read: T = match serde_json::from_slice(body) {
        Ok(read) => read,
        Err(e) => {
            assert!(!e.to_string().is_empty());
            return None;
        }
    };
    let text = serde_json::to_string(&read).expect("a body is JSON");
    let again: T = serde_json::from_str(&text).expect("what was written can be read");
    assert_eq!(format!("{again:?}"), format!("{read:?}"), "{text}");
    Some(read)
}

/// A body and a `--lease` flag are two ways to say one thing.
fn check_lease(body: &LeaseBody) {
    body.reason.iter().for_each(check_reason);
    let (flag, reason) = body.clone().into_parts();
    assert_eq!(&LeaseBody::new(flag.clone(), reason), body);
    let LeaseFlag { capability, audience, channel, ttl, uses } = &flag;
    let mut text = format!("{capability}@{audience}");
    let mut add = |key: &str, value: Option<String>| {
        text += &value.map(|v| format!(",{key}={v}")).unwrap_or_default();
    };
    add("channel", channel.map(|c| c.to_string()));
    add("ttl", ttl.map(|t| t.to_string()));
    add("uses", uses.map(|n| n.to_string()));
    assert_eq!(text.parse(), Ok(flag), "{text}");
}

fn check_reason(reason: &Reason) {
    let text = reason.as_str();
    assert!(!text.trim().is_empty() && text.chars().count() <= Reason::MAX);
    assert!(!text.contains(char::is_control));
}
