//! Fingerprints: of each form in which a value may stand somewhere, how long it is, a keyed hash of 32 bits
//! of eight of its bytes (to find it), and a keyed digest of it (to be sure).
//!
//! Without the key a fingerprint tells the length alone. With the key, which is root's, a guess of the
//! whole value can be tried against the digest, and a guess of those eight bytes against 32 bits: nothing
//! that whoever is root here could not have from the vault itself.
#![forbid(unsafe_code)]

use std::io;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD_NO_PAD, URL_SAFE_NO_PAD};
use hmac::{HmacReset, Mac};
use sha2::Sha256;
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

use crate::model::name::SecretName;
use crate::model::secret::Secret;

/// Bytes of a value that a window hash is of. Shorter values are compared as a whole alone.
pub const WINDOW: usize = 8;
/// Of a longer value the beginning stands for the whole.
pub const SPAN: usize = 4096;
/// What is encoded of a value, so that its encodings do not exceed [`SPAN`].
const ENCODED: usize = SPAN / 2;

/// The key of the fingerprints. Derived from the vault's, and opens nothing.
pub struct GuardKey {
    mac: Zeroizing<[u8; 32]>,
    window: [u64; 2],
}

/// In which form the value stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Form {
    Plain,
    Base64,
    Hex,
}

impl Form {
    pub fn as_str(self) -> &'static str {
        match self {
            Form::Plain => "plain",
            Form::Base64 => "base64",
            Form::Hex => "hex",
        }
    }
}

/// What is told of one form of one value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fingerprint {
    pub secret: SecretName,
    pub form: Form,
    /// Of the bytes that `digest` is of.
    pub span: usize,
    /// Where in them the window lies, and its hash; none of a value that is shorter than a window.
    pub window: Option<(usize, u32)>,
    pub digest: [u8; 32],
}

impl GuardKey {
    pub fn new(key: [u8; 32]) -> Self {
        let mac = Zeroizing::new(key);
        let words = digest(&mac, &[b"sublet.guard.window.v1"]);
        let word = |at: usize| {
            let bytes: [u8; 8] = std::array::from_fn(|i| words[at + i]);
            // Odd, so that the multiplication loses nothing.
            u64::from_le_bytes(bytes) | 1
        };
        let window = [word(0), word(8)];
        Self { mac, window }
    }

    /// For whoever may have it.
    pub fn bytes(&self) -> &[u8; 32] {
        &self.mac
    }

    /// Of eight bytes. Fast before all: it is computed at every place of every file.
    #[inline(always)]
    pub fn window_hash(&self, bytes: u64) -> u32 {
        let mixed = bytes.wrapping_mul(self.window[0]);
        ((mixed ^ (mixed >> 32)).wrapping_mul(self.window[1]) >> 32) as u32
    }

    pub fn digest(&self, bytes: &[u8]) -> [u8; 32] {
        digest(&self.mac, &[b"sublet.guard.value.v1", bytes])
    }

    /// Names a set of fingerprints: what was found clean of one may hold what another looks for.
    pub fn set_name(&self, prints: &[Fingerprint]) -> [u8; 32] {
        let mut parts: Vec<&[u8]> = vec![b"sublet.guard.set.v1"];
        parts.extend(prints.iter().map(|p| &p.digest[..]));
        digest(&self.mac, &parts)
    }

    /// All that a value is looked for by.
    ///
    /// # Errors
    /// No locked memory for its encodings.
    pub fn fingerprints(&self, secret: &SecretName, value: &[u8]) -> io::Result<Vec<Fingerprint>> {
        let mut prints = Vec::new();
        let mut add = |form, bytes: &[u8]| {
            let bytes = &bytes[..bytes.len().min(SPAN)];
            let window = best_window(bytes)
                .map(|at| (at, self.window_hash(word_at(bytes, at).unwrap_or_default())));
            if !bytes.is_empty() && (form == Form::Plain || window.is_some()) {
                let digest = self.digest(bytes);
                let secret = secret.clone();
                prints.push(Fingerprint { secret, form, span: bytes.len(), window, digest });
            }
        };
        add(Form::Plain, value);
        if value.len() < WINDOW {
            return Ok(prints);
        }
        let value = &value[..value.len().min(ENCODED)];
        for phase in 0..3 {
            let mut padded = Secret::zeroed(phase + value.len())?;
            padded.expose_mut()[phase..].copy_from_slice(value);
            for engine in [STANDARD_NO_PAD, URL_SAFE_NO_PAD] {
                let mut text = Secret::zeroed(padded.len().div_ceil(3) * 4)?;
                let length = engine
                    .encode_slice(padded.expose(), text.expose_mut())
                    .map_err(io::Error::other)?;
                // The first digits hold bits of what goes before, the last one of what follows.
                let first = (phase * 8).div_ceil(6);
                let last = if padded.len() % 3 == 0 { length } else { length - 1 };
                add(Form::Base64, &text.expose()[first..last]);
            }
        }
        for digits in [b"0123456789abcdef", b"0123456789ABCDEF"] {
            let mut text = Secret::zeroed(2 * value.len())?;
            for (pair, byte) in text.expose_mut().chunks_exact_mut(2).zip(value) {
                pair[0] = digits[usize::from(byte >> 4)];
                pair[1] = digits[usize::from(byte & 15)];
            }
            add(Form::Hex, text.expose());
        }
        // Alphabets agree where no digit differs.
        prints.dedup_by(|a, b| a.digest == b.digest);
        Ok(prints)
    }
}

impl Fingerprint {
    pub fn is_of(&self, digest: &[u8; 32]) -> bool {
        self.digest.ct_eq(digest).into()
    }
}

fn digest(key: &[u8; 32], parts: &[&[u8]]) -> [u8; 32] {
    let mut mac = <HmacReset<Sha256> as hmac::KeyInit>::new_from_slice(key)
        .unwrap_or_else(|_| unreachable!("HMAC takes a key of any length"));
    parts.iter().for_each(|part| mac.update(part));
    mac.finalize().into_bytes().into()
}

/// Eight bytes at a place.
#[inline(always)]
pub fn word_at(bytes: &[u8], at: usize) -> Option<u64> {
    let word = bytes.get(at..at + WINDOW)?;
    Some(u64::from_le_bytes(word.try_into().ok()?))
}

/// Of the windows with the most different bytes the one nearest to the middle: values begin and end alike
/// (`ghp_`, `eyJhbGciOi`, `-----END`), and what is found everywhere finds nothing.
fn best_window(bytes: &[u8]) -> Option<usize> {
    let middle = bytes.len().checked_sub(WINDOW)? / 2;
    let different = |at: usize| {
        let window = &bytes[at..at + WINDOW];
        (0..WINDOW).filter(|&i| !window[..i].contains(&window[i])).count()
    };
    (0..=bytes.len() - WINDOW)
        .max_by_key(|&at| (different(at), std::cmp::Reverse(at.abs_diff(middle))))
}
