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

mod bound;
mod head;
mod kind;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::model::event::bound::{bounded, bounded_members};
use crate::model::id::{EventId, ExecId, LeaseId, RequestId, RunId};
use crate::model::lease::LeaseRecord;
use crate::model::moment::timestamp_text;
use crate::model::name::{AudienceName, CapabilityName, Channel, IdentityName};
use crate::model::run::Run;

pub use bound::{MAX_ARGUMENTS, MAX_COMMAND, MAX_DETAIL, MAX_TEXT, recorded_command};
pub use head::{EventHash, Head, InvalidHead, KeptHead, KeptHeadError};
pub use kind::{EventType, UnknownEventType};

/// What is hashed before the body, so that no other document of ours has an event's hash.
pub const DOMAIN: &str = "sublet.event.v1\n";
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
        self.sealed(head).0
    }

    /// [`Draft::seal`], and what the store keeps of it, which is [`Event::record`].
    pub fn sealed(self, head: &Head) -> (Event, RecordedEvent) {
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
        let body = event.body();
        event.hash = EventHash::of_body(&body);
        let record = RecordedEvent { seq: event.seq, hash: event.hash.to_string(), body };
        (event, record)
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
        body_of(self.line())
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

fn body_of(mut line: String) -> String {
    line.truncate(line.len().saturating_sub(HASH_MEMBER));
    line.push('}');
    line
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

/// The members that make the chain.
#[derive(Deserialize)]
struct Link {
    seq: u64,
    prev_hash: EventHash,
}

impl RecordedEvent {
    /// An exported line taken apart again, byte for byte: the line's end is its hash, what stands before
    /// it the body. Nothing if the line is not of that form. `seq` is what the body says, which nothing
    /// vouches for before [`RecordedEvent::verify_link`].
    pub fn from_line(line: &str) -> Option<Self> {
        let cut = line.len().checked_sub(HASH_MEMBER)?;
        let (open, hash) = (line.get(..cut)?, line.get(cut..)?);
        let hash = hash.strip_prefix(r#","hash":""#)?.strip_suffix(r#""}"#)?;
        let body = format!("{open}}}");
        let Link { seq, .. } = serde_json::from_str(&body).ok()?;
        Some(Self { seq, hash: hash.to_owned(), body })
    }

    /// What it says stands before it. Nothing if its body says nothing of the kind.
    pub fn predecessor(&self) -> Option<Head> {
        let Link { seq, prev_hash } = serde_json::from_str(&self.body).ok()?;
        Some(Head { seq: seq.checked_sub(1)?, hash: prev_hash })
    }

    /// Whether the body is the one that was hashed. Says nothing of its place.
    pub fn fits_its_hash(&self) -> bool {
        self.hash.parse().is_ok_and(|hash: EventHash| hash == EventHash::of_body(&self.body))
    }

    /// Checks that it is unchanged and follows `head`.
    ///
    /// Only the members that make the chain are read, so that the trail of a later version can be
    /// checked by an earlier one.
    ///
    /// # Errors
    /// [`LinkFault`]: the first thing that does not fit.
    pub fn verify_link(&self, head: &Head) -> Result<Head, LinkFault> {
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
