//! What can happen.
#![forbid(unsafe_code)]

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

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
    MintIssued = "mint.issued",
    MintRenewed = "mint.renewed",
    MintRevoked = "mint.revoked",
    MintExpired = "mint.expired",
    MintRevocationFailed = "mint.revocation_failed",
    SecretSet = "secret.set",
    SecretRotated = "secret.rotated",
    SecretRemoved = "secret.removed",
    IssuerInitialised = "issuer.initialised",
    IssuerRotated = "issuer.rotated",
    IssuerWithdrawn = "issuer.withdrawn",
    BrokerStarted = "broker.started",
    BrokerStopped = "broker.stopped",
    TrailRotated = "trail.rotated",
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
