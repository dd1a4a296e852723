//! The bodies of requests and answers, the same for server and client. What comes in is parsed here, once,
//! into types that cannot be wrong; a key that is not known is an error.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::api::object;
use crate::model::exec::ExecState;
use crate::model::id::{ExecId, LeaseId, RunId};
use crate::model::lease::LeaseState;
use crate::model::moment::Span;
use crate::model::name::{AudienceName, CapabilityName, Channel, IdentityName, VariableName};
use crate::model::run::RunState;
use crate::model::user::ContainerUser;
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
    #[serde(deserialize_with = "object::list")]
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
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "object::maybe")]
    pub terminal: Option<TerminalBody>,
    /// Narrows the profile's network.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<NetworkBody>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<Reason>,
    /// In a container: who the command is there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<ContainerUser>,
    /// In a container: where it starts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workdir: Option<PathBuf>,
}

impl ExecBody {
    /// A command and its arguments, without a lease; the rest is as the profile has it.
    pub fn of<W: Into<String>>(command: impl IntoIterator<Item = W>) -> Self {
        Self {
            lease_ids: Vec::new(),
            command: command.into_iter().map(Into::into).collect(),
            environment: BTreeMap::new(),
            timeout: None,
            terminal: None,
            network: None,
            reason: None,
            user: None,
            workdir: None,
        }
    }
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

/// A run as a client reads it. Members of a later version are kept in `more`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunObject {
    pub run_id: RunId,
    pub socket: PathBuf,
    pub agent: IdentityName,
    pub principal: IdentityName,
    pub profile: String,
    pub workspace: PathBuf,
    pub state: RunState,
    /// RFC 3339, UTC, milliseconds.
    pub started_at: String,
    #[serde(flatten)]
    pub more: Members,
}

/// A lease as a client reads it: a permission, never a value.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseObject {
    pub lease_id: LeaseId,
    pub run_id: RunId,
    pub state: LeaseState,
    pub capability: CapabilityName,
    pub audience: AudienceName,
    pub channel: Channel,
    /// RFC 3339, UTC, milliseconds.
    pub issued_at: String,
    /// RFC 3339, UTC, milliseconds.
    pub expires_at: String,
    /// Whole seconds; 0 once the lease has ended.
    pub expires_in: u64,
    pub uses: u32,
    pub uses_left: u32,
    pub delivery: DeliveryObject,
    #[serde(flatten)]
    pub more: Members,
}

/// Where an exec finds the value: a variable's name, a file's path, or (git) neither.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeliveryObject {
    pub kind: Channel,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variable: Option<VariableName>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    #[serde(flatten)]
    pub more: Members,
}

/// An exec as a client reads it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecObject {
    pub exec_id: ExecId,
    pub run_id: RunId,
    pub lease_ids: Vec<LeaseId>,
    pub command: Vec<String>,
    pub state: ExecState,
    pub exit_status: Option<i32>,
    #[serde(flatten)]
    pub more: Members,
}

/// Members that this version does not know: shown, and otherwise left alone.
pub type Members = serde_json::Map<String, serde_json::Value>;

/// `GET /v1/runs`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunsObject {
    pub runs: Vec<RunObject>,
}

/// `GET /v1/leases`, `POST /v1/leases:batch`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeasesObject {
    pub leases: Vec<LeaseObject>,
}

/// `POST /v1/revocations`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RevokedObject {
    pub revoked: Vec<LeaseObject>,
}

/// `POST /v1/runs/{id}/identity`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProjectedObject {
    pub tokens: Vec<ProjectedToken>,
}

/// A token that stands in a container, as a client reads it: where, and by which lease.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProjectedToken {
    pub lease_id: LeaseId,
    pub capability: CapabilityName,
    pub audience: AudienceName,
    pub path: PathBuf,
    #[serde(flatten)]
    pub more: Members,
}

/// `GET /v1/execs`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecsObject {
    pub execs: Vec<ExecObject>,
}

/// The payload of a `started` frame.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartedObject {
    pub exec_id: ExecId,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_keeps_what_a_later_broker_says_more() {
        let text = format!(
            r#"{{"lease_id":"{}","run_id":"ci-1","state":"granted","capability":"repo.push",
            "audience":"github.com","channel":"git","issued_at":"2026-11-22T10:00:00.000Z",
            "expires_at":"2026-11-22T10:05:00.000Z","expires_in":300,"uses":1,"uses_left":1,
            "delivery":{{"kind":"git","proxy":"http://[::1]:1"}},"later":[1]}}"#,
            LeaseId::fresh()
        );
        let lease: LeaseObject = serde_json::from_str(&text).unwrap();
        assert_eq!(lease.delivery.kind, Channel::Git);
        let given: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(serde_json::to_value(&lease).unwrap(), given);
    }

    #[test]
    fn a_request_is_what_it_says_or_nothing() {
        #[track_caller]
        fn check<T: serde::de::DeserializeOwned>(text: &str, valid: bool) {
            assert_eq!(serde_json::from_str::<T>(text).is_ok(), valid, "{text}");
        }
        check::<LeaseBody>(r#"{"capability":"a.b","audience":"c.d","ttl":300}"#, true);
        check::<LeaseBody>(r#"{"capability":"a.b","audience":"c.d","ttl":"5m","uses":2}"#, true);
        check::<LeaseBody>(r#"{"capability":"a.b","audience":"c.d","uses":0}"#, false);
        check::<LeaseBody>(r#"{"capability":"a.b","audience":"c.d","run_id":"x"}"#, false);
        check::<LeaseBody>(r#"{"capability":"a.b"}"#, false);
        check::<ExecBody>(r#"{"command":["true"],"terminal":{"rows":24,"columns":80}}"#, true);
        check::<ExecBody>(r#"{"command":["true"],"terminal":[24,80]}"#, false);
        check::<ExecBody>(r#"{"command":["true"],"terminal":null}"#, true);
        check::<BatchBody>(r#"{"leases":[{"capability":"a.b","audience":"c.d"}]}"#, true);
        check::<BatchBody>(r#"{"leases":[["a.b","c.d",null,null,null,null]]}"#, false);
        check::<ExecBody>(r#"{"command":["true"],"network":"none"}"#, true);
        check::<ExecBody>(r#"{"command":["true"],"network":"host"}"#, false);
        check::<ExecBody>(r#"{"command":["true"],"lease_ids":["x"]}"#, false);
        check::<RevocationBody>(r#"{"all":true}"#, true);
        check::<RevocationBody>(r#"{"everything":true}"#, false);
    }
}
