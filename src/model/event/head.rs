//! A hash of the chain, the head of a trail, and the head as it is kept outside the database.
#![forbid(unsafe_code)]

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::model::event::DOMAIN;

/// The SHA-256 of an event, written as 64 lower-case hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct EventHash([u8; 32]);

impl EventHash {
    /// What the first event names as its predecessor.
    pub const ZERO: EventHash = EventHash([0; 32]);

    /// A hash as another document carries it.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    pub(super) fn of_body(body: &str) -> Self {
        Self(Sha256::new().chain_update(DOMAIN).chain_update(body).finalize().into())
    }
}

impl fmt::Display for EventHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let mut text = [0; 64];
        for (pair, byte) in text.chunks_exact_mut(2).zip(self.0) {
            pair[0] = DIGITS[usize::from(byte >> 4)];
            pair[1] = DIGITS[usize::from(byte & 15)];
        }
        // Digits are text.
        f.write_str(std::str::from_utf8(&text).map_err(|_| fmt::Error)?)
    }
}

impl fmt::Debug for EventHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl From<EventHash> for String {
    fn from(hash: EventHash) -> String {
        hash.to_string()
    }
}

impl TryFrom<String> for EventHash {
    type Error = InvalidHead;
    fn try_from(text: String) -> Result<Self, InvalidHead> {
        text.parse()
    }
}

impl FromStr for EventHash {
    type Err = InvalidHead;
    fn from_str(text: &str) -> Result<Self, InvalidHead> {
        let invalid = || InvalidHead(text.chars().take(100).collect());
        let digits: &[u8; 64] = text.as_bytes().try_into().map_err(|_| invalid())?;
        let digit = |d: u8| match d {
            b'0'..=b'9' => Ok(d - b'0'),
            b'a'..=b'f' => Ok(d - b'a' + 10),
            _ => Err(invalid()),
        };
        let mut hash = [0; 32];
        for (byte, pair) in hash.iter_mut().zip(digits.chunks_exact(2)) {
            *byte = digit(pair[0])? << 4 | digit(pair[1])?;
        }
        Ok(Self(hash))
    }
}

/// The text is no head of a trail, or no hash.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is no head of a trail: expected `SEQ:HASH`, a number, a colon and 64 lower-case hexadecimal digits"
)]
pub struct InvalidHead(String);

/// The last event of a trail, and with it all before: `SEQ:HASH`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    pub seq: u64,
    pub hash: EventHash,
}

impl Head {
    /// Of a trail without events.
    pub const EMPTY: Head = Head { seq: 0, hash: EventHash::ZERO };
}

impl fmt::Display for Head {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.seq, self.hash)
    }
}

impl FromStr for Head {
    type Err = InvalidHead;
    fn from_str(text: &str) -> Result<Self, InvalidHead> {
        let invalid = || InvalidHead(text.chars().take(100).collect());
        let (seq, hash) = text.split_once(':').ok_or_else(invalid)?;
        let plain = !seq.is_empty() && seq.bytes().all(|b| b.is_ascii_digit());
        match seq.parse() {
            Ok(seq) if plain => Ok(Self { seq, hash: hash.parse().map_err(|_| invalid())? }),
            _ => Err(invalid()),
        }
    }
}

/// The head as it is kept outside the database, to show what was removed at the end of the trail.
///
/// `latest` may be ahead of `durable`: events after the exec are written without waiting for the disk,
/// and a power cut (not a mere crash) may take them. Under the same `boot_id` no power was cut, so that
/// anything less than `latest` was removed; under another, only what is less than `durable`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeptHead {
    pub latest: Head,
    pub durable: Head,
    pub boot_id: String,
}

/// A record of the kept head that cannot be read. A rollback is never this: an older record is whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KeptHeadError {
    #[error("the record of the trail's head is {0} bytes long and not {size}: a write of it was torn", size = KeptHead::SIZE)]
    Size(usize),
    #[error(
        "the record of the trail's head does not fit its own checksum: a write of it was torn, or it was edited"
    )]
    Torn,
    #[error(
        "the record of the trail's head is whole, but no version of sublet writes what it holds"
    )]
    Malformed,
}

impl KeptHead {
    const MARK: &'static str = "sublet.head.v1";
    /// Bytes of every record, so that one write in place replaces the other: mark, two heads (a number
    /// of 20 digits, a hash), boot id, checksum, with separators and a line feed.
    pub const SIZE: usize = Self::MARK.len() + 2 * (1 + 20 + 1 + 64) + 1 + 36 + 1 + 64 + 1;

    /// One line of text. A boot id is 36 characters; another length is cut or padded with `-`.
    pub fn encode(&self) -> String {
        let boot_id: String =
            self.boot_id.chars().filter(char::is_ascii_graphic).take(36).collect();
        let (latest, durable) = (self.latest, self.durable);
        let fields = format!(
            "{} {:020}:{} {:020}:{} {boot_id:-<36}",
            Self::MARK,
            latest.seq,
            latest.hash,
            durable.seq,
            durable.hash,
        );
        format!("{fields} {}\n", Self::checksum(&fields))
    }

    /// # Errors
    /// [`KeptHeadError`]: torn, or written by something else.
    pub fn decode(record: &[u8]) -> Result<Self, KeptHeadError> {
        if record.len() != Self::SIZE {
            return Err(KeptHeadError::Size(record.len()));
        }
        let text = std::str::from_utf8(record).map_err(|_| KeptHeadError::Torn)?;
        let (fields, checksum) =
            text.trim_end_matches('\n').rsplit_once(' ').ok_or(KeptHeadError::Torn)?;
        if checksum != Self::checksum(fields).to_string() {
            return Err(KeptHeadError::Torn);
        }
        let mut words = fields.split(' ');
        let mut word = || words.next().ok_or(KeptHeadError::Malformed);
        if word()? != Self::MARK {
            return Err(KeptHeadError::Malformed);
        }
        let latest = word()?.parse().map_err(|_| KeptHeadError::Malformed)?;
        let durable = word()?.parse().map_err(|_| KeptHeadError::Malformed)?;
        Ok(Self { latest, durable, boot_id: word()?.to_owned() })
    }

    fn checksum(fields: &str) -> EventHash {
        EventHash(Sha256::digest(fields).into())
    }
}
