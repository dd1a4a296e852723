//! The bodies of requests and answers, the same for server and client. What comes in is parsed here, once,
//! into types that cannot be wrong; a key that is not known is an error.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::model::id::{ExecId, LeaseId, RunId};
use crate::model::moment::Span;
use crate::model::name::{AudienceName, CapabilityName, Channel, IdentityName, VariableName};
use crate::policy::{LeaseFlag, Reason};

/// The protocol that `POST /v1/execs` upgrades to.
pub const UPGRADE: &str = "sublet-exec";

/// `POST /v1/leases`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LeaseBody {
    pub capability: CapabilityName,
    pub audience: AudienceName,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub channel: Option<Channel>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl: Option<Span>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uses: Option<NonZeroU32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<Reason>,
}

impl LeaseBody {
    pub fn new(flag: LeaseFlag, reason: Option<Reason>) -> Self {
        let LeaseFlag { capability, audience, channel, ttl, uses } = flag;
        Self { capability, audience, channel, ttl, uses, reason }
    }

    pub fn into_parts(self) -> (LeaseFlag, Option<Reason>) {
        let Self { capability, audience, channel, ttl, uses, reason } = self;
        (LeaseFlag { capability, audience, channel, ttl, uses }, reason)
    }
}

/// `POST /v1/leases:batch`. A lease's own reason goes before the common one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BatchBody {
    pub leases: Vec<LeaseBody>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<Reason>,
}

/// `POST /v1/execs`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExecBody {
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub lease_ids: Vec<LeaseId>,
    pub command: Vec<String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub environment: BTreeMap<VariableName, String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout: Option<Span>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub terminal: Option<TerminalBody>,
    /// Narrows the profile's network.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<NetworkBody>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<Reason>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TerminalBody {
    pub rows: u16,
    pub columns: u16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NetworkBody {
    None,
}

/// `POST /v1/runs`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunBody {
    pub agent: IdentityName,
    pub principal: IdentityName,
    #[serde(default = "default_profile")]
    pub profile: String,
    pub workspace: PathBuf,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run_id: Option<RunId>,
}

fn default_profile() -> String {
    "default".to_owned()
}

/// `POST /v1/leases/{id}/renew`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RenewBody {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ttl: Option<Span>,
}

/// `POST /v1/leases/{id}/revoke`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RevokeBody {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<Reason>,
}

/// `POST /v1/revocations`: exactly one of `run_id`, `principal`, `all`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RevocationBody {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub run_id: Option<RunId>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub principal: Option<IdentityName>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub all: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<Reason>,
}

/// `GET /v1/revocations/{id}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RevocationView {
    pub lease_id: LeaseId,
    pub state: String,
    pub revoked: bool,
}

/// Every answer that is no success.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    pub error: ErrorObject,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorObject {
    #[serde(default)]
    pub stage: String,
    /// A name that programs match on; for a denial the deny reason.
    pub reason: String,
    pub message: String,
    #[serde(default)]
    pub hint: String,
}

/// What `POST /v1/execs` answers without an upgrade.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ExecAnswer {
    pub exec_id: ExecId,
    pub exit_status: u8,
    pub signal: Option<i32>,
    pub timed_out: bool,
    /// As UTF-8; what is none is replaced. At most 1 MiB.
    pub stdout: String,
    pub stderr: String,
    /// Whether more was written than is shown.
    pub truncated: bool,
    pub report: serde_json::Value,
}
