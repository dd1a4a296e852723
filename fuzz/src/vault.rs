//! Sealed values as they may lie in the store: made by us and changed, or never made by us.
#![forbid(unsafe_code)]

use std::cell::OnceCell;

use sublet::model::name::SecretName;
use sublet::model::secret::Secret;
use sublet::source::vault::{OVERHEAD, VaultError, VaultKey, open_into, plaintext_len, seal};

use super::feed::Feed;

thread_local! {
    /// Made once a thread: its file costs an fsync.
    static KEY: OnceCell<VaultKey> = const { OnceCell::new() };
}

pub fn run(input: &[u8]) {
    KEY.with(|cell| {
        let key = cell.get_or_init(|| {
            let directory = tempfile::tempdir().expect("a temporary directory");
            VaultKey::load_or_create(directory.path(), None).expect("a new key")
        });
        let mut feed = Feed::new(input);
        match feed.below(3) {
            0 => foreign(key, feed.rest()),
            1 => under_our_name(key, feed.rest()),
            _ => changed(key, feed),
        }
    });
}

fn name(text: &str) -> SecretName {
    text.parse().expect("a name")
}

/// Opens, and sees to it that a refusal leaves nothing behind.
fn opened(
    key: &VaultKey,
    secret: &str,
    version: u64,
    sealed: &[u8],
    len: usize,
) -> Result<Vec<u8>, VaultError> {
    let mut out = vec![0xAA; len];
    let result = open_into(key, &name(secret), version, sealed, &mut out);
    if let Err(e) = &result {
        assert!(out.iter().all(|b| *b == 0), "a refused buffer is wiped");
        assert!(e.to_string().contains(secret), "{e}");
    }
    result.map(|()| out)
}

/// Bytes that no vault made.
fn foreign(key: &VaultKey, sealed: &[u8]) {
    let len = plaintext_len(&name("s"), sealed);
    for len in [len.as_ref().copied().unwrap_or(7), 0, sealed.len()] {
        assert!(opened(key, "s", 1, sealed, len).is_err());
    }
    match len {
        Ok(len) => assert_eq!(len + OVERHEAD, sealed.len()),
        Err(e) => assert!(matches!(e, VaultError::NotSealed { .. })),
    }
}

/// The same under a header of ours, so that the cipher has to refuse.
fn under_our_name(key: &VaultKey, rest: &[u8]) {
    let empty = Secret::zeroed(0).expect("memory can be locked");
    let header = seal(key, &name("s"), 1, &empty).expect("it is small");
    let sealed = [&header[..9], rest].concat();
    let Ok(len) = plaintext_len(&name("s"), &sealed) else { return };
    assert!(opened(key, "s", 1, &sealed, len).is_err());
}

/// A value of ours comes back as it was, and only unchanged, in its own name and version.
fn changed(key: &VaultKey, mut feed: Feed<'_>) {
    let version = feed.number();
    let value = Secret::copy_of(feed.chunk()).expect("memory can be locked");
    let sealed = seal(key, &name("s"), version, &value).expect("it is small");
    assert_eq!(opened(key, "s", version, &sealed, value.len()).expect("ours"), value.expose());
    assert!(opened(key, "s", version ^ 1, &sealed, value.len()).is_err());
    assert!(opened(key, "s2", version, &sealed, value.len()).is_err());
    assert!(opened(key, "s", version, &sealed, value.len() + 1).is_err());
    let mut other = sealed.clone();
    while !feed.is_empty() {
        let at = feed.number() as usize % (other.len() + 1);
        match feed.below(4) {
            _ if other.is_empty() => {}
            0 => other.insert(at, feed.byte()),
            1 => drop(other.remove(at.min(sealed.len() - 1).min(other.len() - 1))),
            2 => other.truncate(at),
            _ => {
                let at = at.min(other.len() - 1);
                other[at] ^= feed.byte();
            }
        }
    }
    let len = plaintext_len(&name("s"), &other).unwrap_or(value.len());
    assert_eq!(opened(key, "s", version, &other, len).is_ok(), other == sealed);
}
