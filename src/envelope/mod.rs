//! What this host signs for others to check without it: capability envelopes, and checkpoints of the trail.
//!
//! Receives records, keys and the time; returns signed texts, or what a signed text says once it is proven.
//! Pure: no file, no clock of its own. Must never return a word of what it has not verified.
//!
//! - here: [`Envelope`], what a lease permits, in twelve fields; [`sign`] and [`verify`] it
//! - [`key`]: the host's Ed25519 key, its public half, and sets of such (JWKS)
//! - [`note`], [`checkpoint`]: signed notes (c2sp.org/signed-note) and what the trail says in one
//!
//! # The envelope, exactly
//! One JSON object of DSSE v1 (github.com/secure-systems-lab/dsse):
//! `{"payloadType":"application/vnd.sublet.envelope+json","payload":BASE64,"signatures":[{"keyid","sig"}]}`.
//! The signature is Ed25519 (RFC 8032) over `DSSEv1 LEN TYPE LEN PAYLOAD`, so over the payload's exact
//! bytes, and of no other document: a note of the same key never begins with `DSSEv1 `.
//! `keyid` is the RFC 7638 thumbprint of the key. Fields that are not known, or stand twice, are refused.
#![forbid(unsafe_code)]

pub mod checkpoint;
mod dsse;
pub mod key;
pub mod note;
mod text;

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::model::id::{LeaseId, RunId};
use crate::model::lease::LeaseRecord;
use crate::model::name::IdentityName;
use crate::model::run::Run;

pub use checkpoint::{Checkpoint, CheckpointError, Cut, SignedCheckpoint};
pub use key::{Jwks, KeyError, PublicKey, SigningKey};
pub use note::{NoteError, NoteKey};
pub use text::{InvalidText, Text};

/// The DSSE payload type, which no other document of ours has.
pub const PAYLOAD_TYPE: &str = "application/vnd.sublet.envelope+json";

/// The largest envelope that is read, in bytes.
pub const MAX_ENVELOPE: usize = 64 << 10;

/// How far ahead of us the issuer's wall clock may be.
pub const CLOCK_SKEW: Duration = Duration::from_secs(60);

/// What a lease permits, told to whoever is asked to honour it. Never a value.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Envelope {
    /// The non-human identity that acts: the run's agent.
    pub agent_nhi: IdentityName,
    pub run_id: RunId,
    /// Who authorised the run.
    pub principal: IdentityName,
    /// The capability's constraint `action`, else its name.
    pub action: Text,
    /// The capability's constraint `resource`, else the audience.
    pub resource: Text,
    /// The capability's other constraints, and always `capability`, `audience` and `uses`.
    #[serde(deserialize_with = "text::unique")]
    pub constraints: BTreeMap<String, String>,
    #[serde(with = "text::milliseconds")]
    pub issued_at: jiff::Timestamp,
    /// By the wall clock, which is all that an offline verifier has. The host itself measures the lease on
    /// its boot clock.
    #[serde(with = "text::milliseconds")]
    pub expires_at: jiff::Timestamp,
    pub lease_id: LeaseId,
    pub issuer: Text,
    /// Where to ask whether the lease was revoked: an address, or a path on the control socket.
    pub revocation_url: Text,
    /// Whoever honours the envelope records its use. sublet always writes `true`.
    pub audit_emit: bool,
}

/// In whose name envelopes are issued.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Issuer {
    pub name: Text,
    /// Where the host publishes `/v1/revocations`, without a trailing `/`; nothing for the control socket.
    pub url: Option<Text>,
}

impl Envelope {
    /// Of a lease as it is recorded, with the constraints that the run's profile declares for its
    /// capability.
    ///
    /// `action` and `resource` are taken out of the constraints; without them they are the capability's
    /// name and the audience. What sublet itself knows goes over a constraint of the same name.
    ///
    /// # Errors
    /// [`InvalidText`] if a constraint or the issuer's address cannot be told in one line.
    pub fn of_lease(
        lease: &LeaseRecord,
        run: &Run,
        constraints: &BTreeMap<String, String>,
        issuer: &Issuer,
    ) -> Result<Self, InvalidText> {
        let mut constraints = constraints.clone();
        let action = constraints.remove("action").unwrap_or_else(|| lease.capability.to_string());
        let resource = constraints.remove("resource").unwrap_or_else(|| lease.audience.to_string());
        constraints.insert("capability".to_owned(), lease.capability.to_string());
        constraints.insert("audience".to_owned(), lease.audience.to_string());
        constraints.insert("uses".to_owned(), lease.uses.to_string());
        let base = issuer.url.as_ref().map_or("", Text::as_str);
        Ok(Self {
            agent_nhi: run.agent.clone(),
            run_id: lease.run_id.clone(),
            principal: run.principal.clone(),
            action: action.parse()?,
            resource: resource.parse()?,
            constraints,
            issued_at: text::to_the_millisecond(lease.issued_at),
            expires_at: text::to_the_millisecond(lease.expires_at),
            lease_id: lease.lease_id.clone(),
            issuer: issuer.name.clone(),
            revocation_url: format!("{base}/v1/revocations/{}", lease.lease_id).parse()?,
            audit_emit: true,
        })
    }

    /// # Errors
    /// [`EnvelopeError::OtherIssuer`] if another host than `name` issued it.
    pub fn must_be_from(&self, name: &str) -> Result<(), EnvelopeError> {
        if self.issuer.as_str() == name {
            return Ok(());
        }
        let (issuer, wanted) = (self.issuer.to_string(), name.to_owned());
        Err(EnvelopeError::OtherIssuer { issuer, wanted })
    }
}

/// Why an envelope is not to be honoured.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EnvelopeError {
    #[error("it has {0} bytes, and an envelope has at most {MAX_ENVELOPE}")]
    TooLarge(usize),
    #[error("it is no envelope: {0}")]
    Malformed(String),
    #[error("it is signed as `{0}`, which is no envelope of sublet ({PAYLOAD_TYPE})")]
    OtherType(String),
    #[error("it is signed by the key {0}, which is not among the keys that are known")]
    UnknownKey(String),
    #[error("the signature of the key {0} does not fit: it was changed, or signed by another")]
    BadSignature(String),
    #[error("it was issued at {issued_at}, which is yet to come: one of the clocks is wrong")]
    NotYetValid { issued_at: jiff::Timestamp },
    #[error("it expired at {expires_at}")]
    Expired { expires_at: jiff::Timestamp },
    #[error("the lease {0} was revoked")]
    Revoked(LeaseId),
    #[error("it was issued by `{issuer}` and not by `{wanted}`")]
    OtherIssuer { issuer: String, wanted: String },
}

impl EnvelopeError {
    /// A name that programs match on.
    pub fn name(&self) -> &'static str {
        match self {
            EnvelopeError::TooLarge(_) => "too_large",
            EnvelopeError::Malformed(_) => "malformed",
            EnvelopeError::OtherType(_) => "other_type",
            EnvelopeError::UnknownKey(_) => "unknown_key",
            EnvelopeError::BadSignature(_) => "bad_signature",
            EnvelopeError::NotYetValid { .. } => "not_yet_valid",
            EnvelopeError::Expired { .. } => "expired",
            EnvelopeError::Revoked(_) => "revoked",
            EnvelopeError::OtherIssuer { .. } => "other_issuer",
        }
    }
}

/// Signs it, and gives the DSSE object as text without a line feed.
pub fn sign(envelope: &Envelope, key: &SigningKey) -> String {
    // Cannot fail: keys are text, values owned data. An empty payload would not verify.
    let payload = serde_json::to_vec(envelope).unwrap_or_default();
    dsse::seal(&payload, key)
}

/// Checks an envelope offline: form, key, signature, time, and, where the caller can look it up, that the
/// lease was not revoked. Nothing of an envelope that fails is returned.
///
/// `now` is the verifier's wall clock. Expiry has no grace; an issuer's clock may be [`CLOCK_SKEW`] ahead.
/// With no `revoked` the answer holds as of the envelope's issue: ask at `revocation_url` if that is too
/// long ago.
///
/// # Errors
/// [`EnvelopeError`], in the order of its variants: what is told is the first thing that is wrong.
///
/// ```
/// use sublet::envelope::{self, Envelope, EnvelopeError, Jwks, SigningKey};
/// use sublet::model::secret::Secret;
///
/// # let key = SigningKey::from_seed(Secret::copy_of(&[7; 32])?)?;
/// # let envelope: Envelope = serde_json::from_str(r#"{"agent_nhi":"agent","run_id":"ci-1",
/// #   "principal":"alice","action":"push","resource":"acme/insights","constraints":{},
/// #   "issued_at":"2026-11-22T10:00:00.000Z","expires_at":"2026-11-22T10:05:00.000Z",
/// #   "lease_id":"lse_0123456789abcdef0123456789abcdef","issuer":"build-7",
/// #   "revocation_url":"/v1/revocations/lse_0123456789abcdef0123456789abcdef","audit_emit":true}"#)?;
/// # let received = envelope::sign(&envelope, &key).into_bytes();
/// # let published = key.public().jwks().to_string();
/// // `published` is the issuer's /v1/jwks.json, `received` what the agent handed over.
/// let keys = Jwks::parse(published.as_bytes())?;
/// let now = "2026-11-22T10:01:00Z".parse()?;
///
/// let envelope = envelope::verify(&received, &keys, now, None)?;
/// envelope.must_be_from("build-7")?;
/// assert_eq!((envelope.action.as_str(), envelope.resource.as_str()), ("push", "acme/insights"));
///
/// let is_revoked = |lease: &_| *lease == envelope.lease_id;
/// let refused = envelope::verify(&received, &keys, now, Some(&is_revoked));
/// assert!(matches!(refused, Err(EnvelopeError::Revoked(_))));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn verify(
    bytes: &[u8],
    keys: &Jwks,
    now: jiff::Timestamp,
    revoked: Option<&dyn Fn(&LeaseId) -> bool>,
) -> Result<Envelope, EnvelopeError> {
    if bytes.len() > MAX_ENVELOPE {
        return Err(EnvelopeError::TooLarge(bytes.len()));
    }
    let payload = dsse::open(bytes, keys)?;
    let envelope: Envelope =
        serde_json::from_slice(&payload).map_err(|e| EnvelopeError::Malformed(e.to_string()))?;
    let Envelope { issued_at, expires_at, .. } = envelope;
    if issued_at > now.saturating_add(CLOCK_SKEW).unwrap_or(jiff::Timestamp::MAX) {
        return Err(EnvelopeError::NotYetValid { issued_at });
    }
    if expires_at <= now {
        return Err(EnvelopeError::Expired { expires_at });
    }
    if revoked.is_some_and(|revoked| revoked(&envelope.lease_id)) {
        return Err(EnvelopeError::Revoked(envelope.lease_id));
    }
    Ok(envelope)
}

#[cfg(test)]
mod tests;
