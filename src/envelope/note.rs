//! Signed notes: text, an empty line, and a line for each signature. c2sp.org/signed-note, v1.0.0.
#![forbid(unsafe_code)]

use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use sha2::{Digest, Sha256};

use crate::envelope::key::{KEY_SIZE, PublicKey, SigningKey};

/// The largest note that is read, in bytes.
pub const MAX_NOTE: usize = 64 << 10;
/// Verifiers must take 16; as many as Go's reference takes.
const MOST_SIGNATURES: usize = 100;
/// The signature type of Ed25519.
const ED25519: u8 = 1;
const DASH: &str = "\u{2014} ";

/// A key as a note names it: `NAME+KEYID+BASE64`, the form in which verifiers keep it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NoteKey {
    name: String,
    id: [u8; 4],
    key: PublicKey,
}

/// The text is no verifier key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is no verifier key of Ed25519: expected NAME+KEYID+BASE64, as `sublet audit key` prints it"
)]
pub struct InvalidNoteKey(String);

/// Why a note proves nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoteError {
    #[error("is no signed note: {0}")]
    Malformed(&'static str),
    #[error("is not signed by a key that is known, but by {0}")]
    UnknownKey(String),
    #[error("does not fit the signature of {0}: it was changed, or signed by another")]
    BadSignature(String),
}

impl NoteKey {
    /// `name` must hold no space and no `+`; ours are `sublet/trail/KID`.
    pub(super) fn named(name: String, key: PublicKey) -> Self {
        let digest = Sha256::new()
            .chain_update(&name)
            .chain_update([b'\n', ED25519])
            .chain_update(key.as_bytes())
            .finalize();
        let mut id = [0; 4];
        id.copy_from_slice(&digest[..4]);
        Self { name, id, key }
    }

    pub fn name(&self) -> &str {
        &self.name
    }
}

impl fmt::Display for NoteKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let key = [&[ED25519], &self.key.as_bytes()[..]].concat();
        let id = u32::from_be_bytes(self.id);
        write!(f, "{}+{id:08x}+{}", self.name, STANDARD.encode(key))
    }
}

impl FromStr for NoteKey {
    type Err = InvalidNoteKey;
    fn from_str(text: &str) -> Result<Self, InvalidNoteKey> {
        let parsed = || {
            // Base64 may hold a `+`, so the name and the id are cut off from the front.
            let (name, rest) = text.split_once('+')?;
            let (id, key) = rest.split_once('+')?;
            let bytes = STANDARD.decode(key).ok()?;
            let (&ED25519, key) = bytes.split_first()? else { return None };
            let key: &[u8; KEY_SIZE] = key.try_into().ok()?;
            let found = is_name(name)
                .then(|| PublicKey::from_bytes(key).ok())?
                .map(|key| Self::named(name.to_owned(), key))?;
            (id == format!("{:08x}", u32::from_be_bytes(found.id))).then_some(found)
        };
        parsed().ok_or_else(|| InvalidNoteKey(text.chars().take(120).collect()))
    }
}

fn is_name(name: &str) -> bool {
    !name.is_empty() && !name.chars().any(|c| c.is_whitespace() || c.is_control() || c == '+')
}

/// Signs `text`, which ends with a line feed and holds no other control character, as `name`.
pub(super) fn sign(text: &str, name: NoteKey, key: &SigningKey) -> String {
    let signature = [&name.id[..], &key.sign(text.as_bytes())].concat();
    format!("{text}\n{DASH}{} {}\n", name.name, STANDARD.encode(signature))
}

/// The text of a note, and which of `keys` vouches for it. Signatures of other keys are passed over, and
/// one of a known key that does not fit refuses the whole.
///
/// # Errors
/// [`NoteError`].
pub fn open<'n, 'k>(
    note: &'n str,
    keys: &'k [NoteKey],
) -> Result<(&'n str, &'k NoteKey), NoteError> {
    let malformed = NoteError::Malformed;
    if note.len() > MAX_NOTE {
        return Err(malformed("it is too large"));
    }
    if note.bytes().any(|b| b < 0x20 && b != b'\n') {
        return Err(malformed("it holds control characters"));
    }
    // Text may hold empty lines: the last one ends it, and the text keeps its own line feed.
    let end = note.rfind("\n\n").ok_or(malformed("no empty line ends its text"))?;
    let (text, signatures) = (&note[..=end], &note[end + 2..]);
    let signatures = signatures.strip_suffix('\n').ok_or(malformed("its last line is cut off"))?;
    let (mut voucher, mut others) = (None, Vec::new());
    for (number, line) in signatures.split('\n').enumerate() {
        if number == MOST_SIGNATURES {
            return Err(malformed("it has too many signatures"));
        }
        let (name, signature) = line
            .strip_prefix(DASH)
            .and_then(|line| line.split_once(' '))
            .filter(|(name, _)| is_name(name))
            .ok_or(malformed("a line of it is no signature"))?;
        let signature =
            STANDARD.decode(signature).map_err(|_| malformed("a signature is no base64"))?;
        let (id, signature) =
            signature.split_at_checked(4).ok_or(malformed("a signature is cut off"))?;
        let Some(key) = keys.iter().find(|key| key.name == name && key.id == *id) else {
            others.push(name.chars().take(80).collect::<String>());
            continue;
        };
        let fits = <&[u8; 64]>::try_from(signature)
            .is_ok_and(|signature| key.key.verifies(text.as_bytes(), signature));
        if !fits {
            return Err(NoteError::BadSignature(key.name.clone()));
        }
        voucher = voucher.or(Some(key));
    }
    voucher.map(|key| (text, key)).ok_or_else(|| NoteError::UnknownKey(others.join(", ")))
}
