//! A lease as it is recorded: a granted permission, never a value.
#![forbid(unsafe_code)]

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::model::id::{LeaseId, RequestId, RunId};
use crate::model::name::{AudienceName, CapabilityName, Channel, SecretName};

/// `granted → consumed → completed | expired | revoked`; `denied` ends at once; `interrupted` when the
/// host or the whole of sublet died.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LeaseState {
    Granted,
    Consumed,
    Completed,
    Expired,
    Revoked,
    Denied,
    Interrupted,
}

impl LeaseState {
    pub const ALL: [LeaseState; 7] = [
        LeaseState::Granted,
        LeaseState::Consumed,
        LeaseState::Completed,
        LeaseState::Expired,
        LeaseState::Revoked,
        LeaseState::Denied,
        LeaseState::Interrupted,
    ];

    pub fn as_str(self) -> &'static str {
        match self {
            LeaseState::Granted => "granted",
            LeaseState::Consumed => "consumed",
            LeaseState::Completed => "completed",
            LeaseState::Expired => "expired",
            LeaseState::Revoked => "revoked",
            LeaseState::Denied => "denied",
            LeaseState::Interrupted => "interrupted",
        }
    }

    /// May still be used or is in use.
    pub fn is_open(self) -> bool {
        matches!(self, LeaseState::Granted | LeaseState::Consumed)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseRecord {
    pub lease_id: LeaseId,
    pub run_id: RunId,
    pub request_id: RequestId,
    pub capability: CapabilityName,
    pub audience: AudienceName,
    pub channel: Channel,
    /// The source that the value comes from.
    pub secret: SecretName,
    pub issued_at: jiff::Timestamp,
    /// For people. Expiry is decided by `expires_boot` under `boot_id`.
    pub expires_at: jiff::Timestamp,
    pub expires_boot: Duration,
    pub boot_id: String,
    pub uses: u32,
    pub uses_left: u32,
    pub state: LeaseState,
}
