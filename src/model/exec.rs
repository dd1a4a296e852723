//! An exec as it is recorded: one command under zero or more leases.
#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};

use crate::model::id::{ExecId, LeaseId, RunId};

/// `running → exited`, or `interrupted` when the host or the whole of sublet died meanwhile.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ExecState {
    Running,
    Exited,
    Interrupted,
}

impl ExecState {
    pub const ALL: [ExecState; 3] = [ExecState::Running, ExecState::Exited, ExecState::Interrupted];

    pub fn as_str(self) -> &'static str {
        match self {
            ExecState::Running => "running",
            ExecState::Exited => "exited",
            ExecState::Interrupted => "interrupted",
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecRecord {
    pub exec_id: ExecId,
    pub run_id: RunId,
    pub lease_ids: Vec<LeaseId>,
    /// As [`crate::model::event::recorded_command`] bounds it.
    pub command: Vec<String>,
    pub state: ExecState,
    /// What sublet exits with for it: the command's own, or 128 and the signal's number.
    pub exit_status: Option<i32>,
    pub started_at: jiff::Timestamp,
}
