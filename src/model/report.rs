//! What `--report` writes and what `--explain` prints: facts of one exec, never a value.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::model::id::{ExecId, LeaseId, RunId};
use crate::model::name::Channel;

/// What a protection achieves, whatever the mechanism.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Effect {
    /// Only what the profile names can be read or written.
    Filesystem,
    /// The host's processes are neither seen nor signalled nor traced.
    HostProcesses,
    /// The network is no wider than the profile says.
    Network,
    /// Abstract Unix sockets of the host cannot be reached.
    AbstractSockets,
    /// System V and POSIX message objects of the host cannot be reached.
    Ipc,
    /// No capability, now or after any exec.
    Privileges,
    /// Only the filter's system calls.
    SystemCalls,
    /// The exec has a host uid that nothing else has.
    UserIdentity,
    /// Files in the workspace keep their owner and are usable inside.
    WorkspaceOwnership,
    /// No keyring of the caller.
    Keyrings,
    /// No core file holds its memory.
    CoreDumps,
    /// Memory of the whole exec is bounded.
    MemoryLimit,
    /// The number of processes of the whole exec is bounded.
    ProcessLimit,
    /// CPU time of the whole exec is bounded.
    CpuLimit,
    /// The whole tree dies together.
    TreeDeath,
    /// Deliveries never reach swap.
    DeliveryMemory,
}

impl Effect {
    pub fn as_str(self) -> &'static str {
        match self {
            Effect::Filesystem => "filesystem",
            Effect::HostProcesses => "host_processes",
            Effect::Network => "network",
            Effect::AbstractSockets => "abstract_sockets",
            Effect::Ipc => "ipc",
            Effect::Privileges => "privileges",
            Effect::SystemCalls => "system_calls",
            Effect::UserIdentity => "user_identity",
            Effect::WorkspaceOwnership => "workspace_ownership",
            Effect::Keyrings => "keyrings",
            Effect::CoreDumps => "core_dumps",
            Effect::MemoryLimit => "memory_limit",
            Effect::ProcessLimit => "process_limit",
            Effect::CpuLimit => "cpu_limit",
            Effect::TreeDeath => "tree_death",
            Effect::DeliveryMemory => "delivery_memory",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    Full,
    Partial,
    None,
}

/// How far an effect is enforced, by what, and what is missing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Enforcement {
    pub status: Status,
    pub by: Vec<String>,
    pub missing: Vec<String>,
}

/// Every effect of one exec.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Posture(pub BTreeMap<Effect, Enforcement>);

impl Posture {
    /// Records an effect. Full if nothing is missing, else as `otherwise` says.
    pub fn set(&mut self, effect: Effect, by: &[&str], missing: &[String], otherwise: Status) {
        let own = |words: &[&str]| words.iter().map(|&w| w.to_owned()).collect();
        let status = if missing.is_empty() { Status::Full } else { otherwise };
        self.0.insert(effect, Enforcement { status, by: own(by), missing: missing.to_vec() });
    }
}

/// What became of one delivery.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubbedDelivery {
    pub lease_id: LeaseId,
    pub channel: Channel,
    /// The size of the container that was zeroed.
    pub bytes: u64,
    pub wiped: bool,
}

/// Microseconds spent in each stage of one exec, wall time.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timings {
    pub request: u64,
    pub decide: u64,
    pub record: u64,
    pub resolve: u64,
    pub deliver: u64,
    pub launch: u64,
    pub run: u64,
    pub scrub: u64,
}

/// The whole of `--report FILE`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    pub run_id: RunId,
    pub exec_id: ExecId,
    pub profile: String,
    #[serde(serialize_with = "crate::model::path_bytes::words")]
    pub workspace: PathBuf,
    pub command: Vec<String>,
    pub leases: Vec<serde_json::Value>,
    pub exit_status: i32,
    pub signal: Option<i32>,
    pub timed_out: bool,
    pub enforced: Posture,
    pub scrubbed: Vec<ScrubbedDelivery>,
    /// Occurrences of leased values that were masked in the output.
    pub redacted: u64,
    /// Leased values too short to be masked.
    pub unmasked_values: u64,
    pub timings_us: Timings,
}
