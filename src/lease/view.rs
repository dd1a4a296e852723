//! A lease as JSON, for the agent and for `--json`. Never a value.
#![forbid(unsafe_code)]

use std::path::PathBuf;

use serde::Serialize;

use crate::lease::remaining;
use crate::model::id::{LeaseId, RunId};
use crate::model::lease::{LeaseRecord, LeaseState};
use crate::model::moment::{Moment, timestamp_text};
use crate::model::name::{AudienceName, CapabilityName, Channel, VariableName};
use crate::profile::Place;

/// `{"lease_id","run_id","state","capability","audience","channel","issued_at","expires_at",
/// "expires_in","uses","uses_left","delivery"}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LeaseView {
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
    /// Whole seconds, rounded down; 0 once the lease has ended.
    pub expires_in: u64,
    pub uses: u32,
    pub uses_left: u32,
    pub delivery: DeliveryView,
}

/// `{"kind","variable"|"path"}`; git and a profile that no longer declares the lease have the kind alone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DeliveryView {
    pub kind: Channel,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub variable: Option<VariableName>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
}

impl LeaseView {
    /// `place`: `Grant::place`, or what the profile's audience says for the record's channel.
    pub fn new(record: &LeaseRecord, place: Option<&Place>, now: &Moment) -> Self {
        let (variable, path) = match place {
            Some(Place::Env { variable } | Place::Memfd { variable } | Place::Ssh { variable }) => {
                (Some(variable.clone()), None)
            }
            Some(Place::File { path, .. }) => (None, Some(path.clone())),
            Some(Place::Token { kind }) => (None, Some(kind.token_path())),
            Some(Place::Git) | None => (None, None),
        };
        Self {
            lease_id: record.lease_id.clone(),
            run_id: record.run_id.clone(),
            state: record.state,
            capability: record.capability.clone(),
            audience: record.audience.clone(),
            channel: record.channel,
            issued_at: timestamp_text(record.issued_at),
            expires_at: timestamp_text(record.expires_at),
            expires_in: if record.state.is_open() { remaining(record, now).as_secs() } else { 0 },
            uses: record.uses,
            uses_left: record.uses_left,
            delivery: DeliveryView { kind: record.channel, variable, path },
        }
    }
}
