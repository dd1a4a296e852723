//! One agent run: what everything is attributed to.
#![forbid(unsafe_code)]

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::model::id::RunId;
use crate::model::name::{IdentityName, Permission};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RunState {
    Active,
    Ended,
}

/// A run as it is recorded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    pub run_id: RunId,
    /// The non-human identity that acts.
    pub agent: IdentityName,
    /// The person or workflow that authorised it.
    pub principal: IdentityName,
    /// What the principal holds, from `[principals]`, at the moment of decision: not recorded.
    #[serde(skip)]
    pub permissions: Vec<Permission>,
    /// The profile's name, or the path of its file.
    pub profile: String,
    pub workspace: PathBuf,
    pub state: RunState,
    pub started_at: jiff::Timestamp,
}

/// What a run has asked for so far, to be held against its ceilings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Counters {
    /// Within the last sixty seconds of `CLOCK_BOOTTIME`, in this boot.
    pub minute: u32,
    /// Since the run started, whatever the boot.
    pub run: u32,
}
