//! One line of the audit trail: what a caller drafts, what it becomes when it is sealed into the chain,
//! and the chain's head. Pure: no clock, no store. No type in here can hold a value.
//!
//! # The chain, exactly
//!
//! The **line** of an event is one JSON object without white space. Its members stand in the order in
//! which [`Event`] declares them; members that do not apply are absent; `detail` is sorted by key, and
//! so are objects within it; numbers are integers; text is UTF-8 with only `"`, `\` and the control
//! characters below U+0020 escaped. `hash` is the last member.
//!
//! The **body** is the line with the text `,"hash":"…"` taken out, and
//! `hash = lowercase_hex(SHA-256("sublet.event.v1\n" ‖ body))` (FIPS 180-4).
//!
//! `seq` counts from 1 without gaps; `prev_hash` is the `hash` of `seq - 1`, and 64 zeros in the first.
//! Every line can so be checked with a JSON parser and `sha256sum`, without this program.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::model::id::{EventId, ExecId, LeaseId, RequestId, RunId};
use crate::model::lease::LeaseRecord;
use crate::model::moment::timestamp_text;
use crate::model::name::{AudienceName, CapabilityName, Channel, IdentityName};
use crate::model::run::Run;

/// What is hashed before the body, so that no other document of ours has an event's hash.
pub const DOMAIN: &str = "sublet.event.v1\n";
/// The most bytes of one text that a user gave: a reason, an argument. More is cut, and ends in `…`.
pub const MAX_TEXT: usize = 1024;
/// The most bytes of text in one event's `detail`, keys included.
pub const MAX_DETAIL: usize = 8192;
/// The most arguments of a command that are recorded, and the most bytes of them together.
pub const MAX_ARGUMENTS: usize = 64;
pub const MAX_COMMAND: usize = 4096;

macro_rules! event_types {
    ($($name:ident = $text:literal,)*) => {
        /// What happened. The texts are part of the interface.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub enum EventType {
            $(#[serde(rename = $text)] $name,)*
        }

        impl EventType {
            pub const ALL: &[EventType] = &[$(EventType::$name,)*];

            pub fn as_str(self) -> &'static str {
                match self {
                    $(EventType::$name => $text,)*
                }
            }
        }
    };
}

event_types! {
    RunStarted = "run.started",
    RunEnded = "run.ended",
    LeaseRequested = "lease.requested",
    LeaseGranted = "lease.granted",
    LeaseDenied = "lease.denied",
    LeaseConsumed = "lease.consumed",
    LeaseRenewed = "lease.renewed",
    LeaseCompleted = "lease.completed",
    LeaseExpired = "lease.expired",
    LeaseRevoked = "lease.revoked",
    LeaseInterrupted = "lease.interrupted",
    ExecStarted = "exec.started",
    ExecExited = "exec.exited",
    ExecScrubbed = "exec.scrubbed",
    OutputRedacted = "output.redacted",
    SecretSet = "secret.set",
    SecretRotated = "secret.rotated",
    SecretRemoved = "secret.removed",
    BrokerStarted = "broker.started",
    BrokerStopped = "broker.stopped",
}

impl fmt::Display for EventType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The text is no event type.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no event type: expected one such as lease.granted or exec.exited")]
pub struct UnknownEventType(String);

impl FromStr for EventType {
    type Err = UnknownEventType;
    fn from_str(text: &str) -> Result<Self, UnknownEventType> {
        let known = EventType::ALL.iter().copied().find(|t| t.as_str() == text);
        known.ok_or_else(|| UnknownEventType(text.chars().take(40).collect()))
    }
}

/// The SHA-256 of an event, written as 64 lower-case hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct EventHash([u8; 32]);

impl EventHash {
    /// What the first event names as its predecessor.
    pub const ZERO: EventHash = EventHash([0; 32]);

    fn of_body(body: &str) -> Self {
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
        text.iter().try_for_each(|&digit| fmt::Write::write_char(f, char::from(digit)))
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

/// What a caller says has happened; the store gives it its place in the chain.
#[derive(Debug, Clone, PartialEq)]
pub struct Draft {
    pub kind: EventType,
    pub time: jiff::Timestamp,
    pub host: String,
    pub run_id: Option<RunId>,
    pub agent: Option<IdentityName>,
    pub principal: Option<IdentityName>,
    pub lease_id: Option<LeaseId>,
    pub exec_id: Option<ExecId>,
    pub capability: Option<CapabilityName>,
    pub audience: Option<AudienceName>,
    pub channel: Option<Channel>,
    pub ttl_seconds: Option<u64>,
    pub uses: Option<u32>,
    /// The user's words, or a deny reason's name. Cut at [`MAX_TEXT`].
    pub reason: Option<String>,
    pub outcome: Option<String>,
    /// What the type needs beyond that: `request_id`, `lease_ids`, `command`, counts. Cut at
    /// [`MAX_DETAIL`]; fractions become text, as they have no canonical form.
    pub detail: BTreeMap<String, Value>,
}

impl Draft {
    pub fn new(kind: EventType, time: jiff::Timestamp, host: &str) -> Self {
        Self {
            kind,
            time,
            host: host.to_owned(),
            run_id: None,
            agent: None,
            principal: None,
            lease_id: None,
            exec_id: None,
            capability: None,
            audience: None,
            channel: None,
            ttl_seconds: None,
            uses: None,
            reason: None,
            outcome: None,
            detail: BTreeMap::new(),
        }
    }

    /// Attributes it: run, agent, principal.
    pub fn of_run(mut self, run: &Run) -> Self {
        self.run_id = Some(run.run_id.clone());
        self.agent = Some(run.agent.clone());
        self.principal = Some(run.principal.clone());
        self
    }

    /// Joins it to the other events of one request.
    pub fn of_request(self, request: &RequestId) -> Self {
        self.with("request_id", request.as_str())
    }

    /// Everything that a lease says of itself; `uses` is what it was granted for.
    pub fn of_lease(mut self, lease: &LeaseRecord) -> Self {
        self.run_id = Some(lease.run_id.clone());
        self.lease_id = Some(lease.lease_id.clone());
        self.capability = Some(lease.capability.clone());
        self.audience = Some(lease.audience.clone());
        self.channel = Some(lease.channel);
        let lifetime = lease.expires_at.duration_since(lease.issued_at).as_secs();
        self.ttl_seconds = u64::try_from(lifetime).ok();
        self.uses = Some(lease.uses);
        self.of_request(&lease.request_id)
    }

    /// Joins it to an exec and to the leases that the exec holds.
    pub fn of_exec(mut self, exec: &ExecId, leases: &[LeaseId]) -> Self {
        self.exec_id = Some(exec.clone());
        if leases.is_empty() {
            return self;
        }
        let ids: Vec<&str> = leases.iter().map(LeaseId::as_str).collect();
        self.with("lease_ids", ids)
    }

    pub fn because(mut self, reason: impl Into<String>) -> Self {
        self.reason = Some(reason.into());
        self
    }

    pub fn outcome(mut self, outcome: impl Into<String>) -> Self {
        self.outcome = Some(outcome.into());
        self
    }

    pub fn with(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.detail.insert(key.to_owned(), value.into());
        self
    }

    /// Gives it a fresh id and its place after `head`, bounds what users said, and hashes it.
    pub fn seal(self, head: &Head) -> Event {
        let mut budget = MAX_DETAIL;
        let text = |text: String| bounded(&text, MAX_TEXT);
        let mut event = Event {
            seq: head.seq + 1,
            id: EventId::fresh(),
            // What is written has milliseconds; what is held says the same.
            time: jiff::Timestamp::from_millisecond(self.time.as_millisecond())
                .unwrap_or(self.time),
            kind: self.kind,
            host: bounded(&self.host, 255),
            run_id: self.run_id,
            agent: self.agent,
            principal: self.principal,
            lease_id: self.lease_id,
            exec_id: self.exec_id,
            capability: self.capability,
            audience: self.audience,
            channel: self.channel,
            ttl_seconds: self.ttl_seconds,
            uses: self.uses,
            reason: self.reason.map(text),
            outcome: self.outcome.map(text),
            detail: bounded_members(self.detail, &mut budget, 8),
            prev_hash: head.hash,
            hash: EventHash::ZERO,
        };
        event.hash = EventHash::of_body(&event.body());
        event
    }
}

/// An event in its place in the chain.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Event {
    pub seq: u64,
    pub id: EventId,
    #[serde(with = "milliseconds")]
    pub time: jiff::Timestamp,
    #[serde(rename = "type")]
    pub kind: EventType,
    pub host: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub run_id: Option<RunId>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub agent: Option<IdentityName>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub principal: Option<IdentityName>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lease_id: Option<LeaseId>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exec_id: Option<ExecId>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub capability: Option<CapabilityName>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub audience: Option<AudienceName>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub channel: Option<Channel>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ttl_seconds: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uses: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub outcome: Option<String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub detail: BTreeMap<String, Value>,
    pub prev_hash: EventHash,
    pub hash: EventHash,
}

impl Event {
    pub fn head(&self) -> Head {
        Head { seq: self.seq, hash: self.hash }
    }

    /// What is hashed, after [`DOMAIN`].
    pub fn body(&self) -> String {
        body_of(&self.line())
    }

    /// What is exported: one JSON object, `hash` last, without a line feed.
    pub fn line(&self) -> String {
        // Cannot fail: keys are text, values owned data, and no serializer here returns an error of
        // its own. Were that to change, the body would be `}`, which no reader accepts as an event.
        serde_json::to_string(self).unwrap_or_default()
    }

    /// As the store keeps it.
    pub fn record(&self) -> RecordedEvent {
        RecordedEvent { seq: self.seq, hash: self.hash.to_string(), body: self.body() }
    }

    /// Checks that it is unchanged and follows `head`.
    ///
    /// # Errors
    /// [`LinkFault`]: the first thing that does not fit.
    pub fn verify_link(&self, head: &Head) -> Result<Head, LinkFault> {
        self.record().verify_link(head)
    }
}

/// `,"hash":"` and 64 digits and `"}`.
const HASH_MEMBER: usize = 9 + 64 + 2;

fn body_of(line: &str) -> String {
    let mut body = line[..line.len().saturating_sub(HASH_MEMBER)].to_owned();
    body.push('}');
    body
}

/// An event as it lies in the store, where anyone who may write there can have changed any part of it:
/// nothing here is believed before [`RecordedEvent::verify_link`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordedEvent {
    /// The row's own number.
    pub seq: u64,
    pub hash: String,
    pub body: String,
}

/// Why an event does not follow the one before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LinkFault {
    #[error("event {expected} is not there: event {found} stands in its place")]
    Gap { expected: u64, found: u64 },
    #[error("the contents of event {seq} do not fit its hash")]
    Altered { seq: u64 },
    #[error("event {found} stands in the place of event {seq}")]
    Moved { seq: u64, found: u64 },
    #[error("event {seq} does not follow the event before it: one of the two was replaced")]
    Unlinked { seq: u64 },
}

impl RecordedEvent {
    /// Checks that it is unchanged and follows `head`.
    ///
    /// Only the members that make the chain are read, so that the trail of a later version can be
    /// checked by an earlier one.
    ///
    /// # Errors
    /// [`LinkFault`]: the first thing that does not fit.
    pub fn verify_link(&self, head: &Head) -> Result<Head, LinkFault> {
        #[derive(Deserialize)]
        struct Link {
            seq: u64,
            prev_hash: EventHash,
        }
        let seq = self.seq;
        if head.seq.checked_add(1) != Some(seq) {
            return Err(LinkFault::Gap { expected: head.seq.saturating_add(1), found: seq });
        }
        let altered = LinkFault::Altered { seq };
        let hash: EventHash = self.hash.parse().map_err(|_| altered)?;
        if hash != EventHash::of_body(&self.body) {
            return Err(altered);
        }
        let link: Link = serde_json::from_str(&self.body).map_err(|_| altered)?;
        if link.seq != seq {
            return Err(LinkFault::Moved { seq, found: link.seq });
        }
        if link.prev_hash != head.hash {
            return Err(LinkFault::Unlinked { seq });
        }
        Ok(Head { seq, hash })
    }

    /// The event itself, read but not verified.
    ///
    /// # Errors
    /// If it is no event that this version knows.
    pub fn event(&self) -> Result<Event, serde_json::Error> {
        serde_json::from_str(&self.line())
    }

    /// The line as it is exported. See [`Event::line`].
    pub fn line(&self) -> String {
        let open = self.body.strip_suffix('}').unwrap_or(&self.body);
        format!(r#"{open},"hash":"{}"}}"#, self.hash)
    }
}

/// A command as it is recorded: at most [`MAX_ARGUMENTS`] arguments of [`MAX_TEXT`] bytes, together
/// [`MAX_COMMAND`]; bytes that are no UTF-8 are replaced; the rest is counted in a last element.
pub fn recorded_command<S: AsRef<OsStr>>(argv: &[S]) -> Vec<String> {
    let mut left = MAX_COMMAND;
    let mut recorded = Vec::new();
    for argument in argv.iter().take(MAX_ARGUMENTS) {
        let argument = bounded(&argument.as_ref().to_string_lossy(), MAX_TEXT);
        match left.checked_sub(argument.len()) {
            Some(rest) => left = rest,
            None => break,
        }
        recorded.push(argument);
    }
    if recorded.len() < argv.len() {
        recorded.push(format!("…and {} more", argv.len() - recorded.len()));
    }
    recorded
}

/// At most `max` bytes of `text`, cut between characters; what was cut ends in `…`.
fn bounded(text: &str, max: usize) -> String {
    if text.len() <= max {
        return text.to_owned();
    }
    let end = (0..=max.saturating_sub('…'.len_utf8())).rev().find(|&i| text.is_char_boundary(i));
    format!("{}…", &text[..end.unwrap_or(0)])
}

fn bounded_value(value: Value, budget: &mut usize, depth: u8) -> Value {
    match value {
        Value::Null | Value::Bool(_) => value,
        Value::Number(ref n) if n.is_f64() => Value::String(n.to_string()),
        Value::Number(_) => value,
        Value::String(text) => {
            let text = bounded(&text, MAX_TEXT.min(*budget));
            *budget = budget.saturating_sub(text.len());
            Value::String(text)
        }
        Value::Array(_) | Value::Object(_) if depth == 0 => Value::String("…".to_owned()),
        Value::Array(elements) => {
            let total = elements.len();
            let mut kept = Vec::new();
            for element in elements {
                if *budget < 8 {
                    kept.push(Value::String(format!("…and {} more", total - kept.len())));
                    break;
                }
                *budget -= 8;
                kept.push(bounded_value(element, budget, depth - 1));
            }
            Value::Array(kept)
        }
        Value::Object(members) => {
            let sorted: BTreeMap<String, Value> = members.into_iter().collect();
            Value::Object(bounded_members(sorted, budget, depth - 1).into_iter().collect())
        }
    }
}

fn bounded_members(
    members: BTreeMap<String, Value>,
    budget: &mut usize,
    depth: u8,
) -> BTreeMap<String, Value> {
    let mut kept = BTreeMap::new();
    for (key, value) in members {
        let cost = key.len().min(64) + 8;
        if *budget < cost {
            kept.insert("truncated".to_owned(), Value::Bool(true));
            break;
        }
        *budget -= cost;
        kept.insert(bounded(&key, 64), bounded_value(value, budget, depth));
    }
    kept
}

mod milliseconds {
    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(time: &jiff::Timestamp, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&super::timestamp_text(*time))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<jiff::Timestamp, D::Error> {
        String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests;
