//! Why the story stopped, with the name, the stage and the exit status that users and programs see.
#![forbid(unsafe_code)]

use std::io;
use std::path::PathBuf;

use crate::delivery::container::ContainerError;
use crate::host::HostError;
use crate::launcher::client::ForkError;
use crate::launcher::wire::{Refusal, RefusalKind, WireError};
use crate::model::id::InvalidId;
use crate::model::name::SecretName;
use crate::model::verdict::{Denial, DenyReason};
use crate::policy::environment::EnvironmentError;
use crate::store::StoreError;

#[derive(Debug, thiserror::Error)]
pub enum RunError {
    #[error("could not settle as a broker")]
    Settle(#[source] io::Error),
    #[error(transparent)]
    Fork(#[from] ForkError),
    #[error(transparent)]
    Host(#[from] HostError),
    #[error("could not read the clocks")]
    Clock(#[source] io::Error),
    #[error(transparent)]
    Environment(#[from] EnvironmentError),
    #[error("{what} is the managed secret `{secret}`")]
    ManagedValue { what: String, secret: SecretName },
    #[error(transparent)]
    Denied(#[from] Denial),
    #[error("{0}")]
    WouldWiden(String),
    #[error("run `{run}` belongs to {what} `{recorded}`, not to `{asked}`")]
    OtherRun { run: String, what: &'static str, recorded: String, asked: String },
    #[error("the trail cannot be written, so nothing is granted and nothing is run")]
    Trail(#[source] StoreError),
    #[error("could not read the trail's head {path}, which tells whether the trail was cut")]
    Head { path: PathBuf, source: io::Error },
    #[error("the trail was cut: its database ends at event {found}, and event {kept} was recorded")]
    TrailCut { found: u64, kept: u64 },
    #[error("the trail was rewritten: its event {seq} is not the one that was recorded")]
    TrailRewritten { seq: u64 },
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error("could not speak with the launcher")]
    Wire(#[source] WireError),
    #[error(
        "the launcher died; the command and all that it started are dead, and its deliveries are wiped"
    )]
    LauncherDied,
    #[error("could not fill a delivery")]
    Delivery(#[source] io::Error),
    #[error(transparent)]
    Container(#[from] ContainerError),
    #[error("could not relay the command's streams")]
    Relay(#[source] io::Error),
    #[error(transparent)]
    Id(#[from] InvalidId),
    #[error("interrupted by signal {0} before the command ran")]
    Interrupted(i32),
    #[error("stopped before the command ran: {0}")]
    Stopped(&'static str),
    #[error("{message}")]
    Unusable { name: &'static str, message: String },
    #[error("whoever asked for the exec left before it was started")]
    CallerGone,
}

impl From<WireError> for RunError {
    fn from(error: WireError) -> Self {
        match error {
            WireError::Gone => RunError::LauncherDied,
            WireError::Unsettled(refusal) => RunError::Refused(refusal),
            other => RunError::Wire(other),
        }
    }
}

impl RunError {
    pub(crate) fn settle(e: rustix::io::Errno) -> Self {
        RunError::Settle(e.into())
    }

    pub(crate) fn unavailable_vault(e: crate::source::vault::VaultError) -> Self {
        super::value::unavailable_vault(e)
    }

    pub(crate) fn relay(e: impl Into<io::Error>) -> Self {
        RunError::Relay(e.into())
    }

    /// As the denial of what was asked, where that is what it comes to: a source, a delivery or a
    /// protection that is not to be had.
    pub(crate) fn denying(self, asked: impl Iterator<Item = String>) -> Self {
        let asked: Vec<String> = asked.collect();
        let Some(reason) = DenyReason::ALL.into_iter().find(|r| r.as_str() == self.reason()) else {
            return self;
        };
        if asked.is_empty() || matches!(self, RunError::Denied(_)) {
            return self;
        }
        let hint = self.hint();
        let message = crate::launcher::compile::chain(&self);
        RunError::Denied(Denial { asked: asked.join(" "), reason, message, hint })
    }

    /// A lease of the caller's that cannot be used, and why by name.
    pub(crate) fn unusable(name: &'static str, message: String) -> Self {
        RunError::Unusable { name, message }
    }

    /// Whether the answer was no: a denial, or a lease that is not what it was.
    pub fn is_denial(&self) -> bool {
        matches!(self, RunError::Denied(_) | RunError::Unusable { .. })
    }

    /// The part of the story that stopped.
    pub fn stage(&self) -> &'static str {
        match self {
            RunError::Settle(_) | RunError::Fork(_) | RunError::Clock(_) => "settle",
            RunError::Host(_) => "config",
            RunError::Environment(_) | RunError::ManagedValue { .. } => "environment",
            RunError::WouldWiden(_) | RunError::OtherRun { .. } | RunError::Id(_) => "request",
            RunError::Denied(_) | RunError::Unusable { .. } => "decide",
            RunError::Trail(_)
            | RunError::TrailCut { .. }
            | RunError::TrailRewritten { .. }
            | RunError::Head { .. } => "record",
            RunError::Delivery(_) | RunError::Container(_) => "deliver",
            RunError::Refused(refusal) => match refusal.kind {
                RefusalKind::Invalid => "request",
                RefusalKind::SourceUnavailable => "resolve",
                RefusalKind::DeliveryUnavailable => "deliver",
                RefusalKind::Launch
                | RefusalKind::ProtectionUnavailable
                | RefusalKind::NotExecutable
                | RefusalKind::NotFound => "launch",
            },
            RunError::Wire(_) | RunError::LauncherDied => "launch",
            RunError::Relay(_) => "run",
            RunError::Interrupted(_) | RunError::Stopped(_) => "resolve",
            RunError::CallerGone => "run",
        }
    }

    /// The name that programs match on; for a denial its reason.
    pub fn reason(&self) -> &'static str {
        match self {
            RunError::Settle(_) => "settle_failed",
            RunError::Fork(_) => "fork_failed",
            RunError::Clock(_) => "clock_unusable",
            RunError::Host(HostError::Load(_)) => "profile_unusable",
            RunError::Host(HostError::Profile(_)) => "profile_invalid",
            RunError::Host(_) => "config_invalid",
            RunError::Environment(_) => "environment_refused",
            RunError::ManagedValue { .. } => "managed_value_refused",
            RunError::WouldWiden(_) => "network_would_widen",
            RunError::OtherRun { .. } | RunError::Id(_) => "run_mismatch",
            RunError::Denied(denial) => denial.reason.as_str(),
            RunError::Trail(_)
            | RunError::TrailCut { .. }
            | RunError::TrailRewritten { .. }
            | RunError::Head { .. } => DenyReason::AuditUnavailable.as_str(),
            RunError::Delivery(_) | RunError::Container(_) => {
                DenyReason::DeliveryUnavailable.as_str()
            }
            RunError::Refused(refusal) => match refusal.kind {
                RefusalKind::Launch => "launch_failed",
                RefusalKind::ProtectionUnavailable => DenyReason::ProtectionUnavailable.as_str(),
                RefusalKind::DeliveryUnavailable => DenyReason::DeliveryUnavailable.as_str(),
                RefusalKind::SourceUnavailable => DenyReason::SourceUnavailable.as_str(),
                RefusalKind::Invalid => "invalid_request",
                RefusalKind::NotExecutable => "command_not_executable",
                RefusalKind::NotFound => "command_not_found",
            },
            RunError::Wire(_) => "launcher_unreachable",
            RunError::LauncherDied => "launcher_died",
            RunError::Relay(_) => "relay_failed",
            RunError::Interrupted(_) => "interrupted",
            RunError::Stopped(_) => "stopped",
            RunError::Unusable { name, .. } => name,
            RunError::CallerGone => "caller_gone",
        }
    }

    /// 126, 127 and 128 with a signal as a shell has them, else 125.
    pub fn exit_status(&self) -> u8 {
        match self {
            RunError::Refused(refusal) => match refusal.kind {
                RefusalKind::NotExecutable => 126,
                RefusalKind::NotFound => 127,
                _ => 125,
            },
            RunError::Interrupted(signal) => 128_u8.saturating_add(*signal as u8),
            _ => 125,
        }
    }

    /// What to try; empty where the message says it.
    pub fn hint(&self) -> String {
        match self {
            RunError::Denied(denial) => denial.hint.clone(),
            RunError::Refused(refusal) => refusal.hint.clone(),
            RunError::ManagedValue { secret, .. } => {
                format!("ask for a lease that delivers `{secret}`, instead of its value")
            }
            RunError::Trail(_) | RunError::Head { .. } => {
                "look at the state directory's space, mode and owner, or name another with --state-dir"
                    .to_owned()
            }
            RunError::TrailCut { .. } | RunError::TrailRewritten { .. } => {
                "`sublet audit verify` tells more; restore the database, or keep the damaged state and \
                 start with a fresh --state-dir"
                    .to_owned()
            }
            RunError::OtherRun { .. } => "name another --run, or the same agent and principal".to_owned(),
            RunError::Delivery(_) | RunError::Container(_) => {
                "raise RLIMIT_MEMLOCK (ulimit -l), or lease less in one exec".to_owned()
            }
            RunError::Settle(_) | RunError::Fork(_) | RunError::Clock(_) | RunError::Wire(_) => {
                "`sublet doctor` shows what this host can and cannot do".to_owned()
            }
            RunError::Unusable { .. } => "ask for a new lease".to_owned(),
            RunError::LauncherDied => {
                "look for the kernel's out-of-memory killer; the lease is closed as interrupted".to_owned()
            }
            RunError::Host(HostError::Load(_)) => "`sublet profile list` names the profiles".to_owned(),
            RunError::Host(_)
            | RunError::Environment(_)
            | RunError::WouldWiden(_)
            | RunError::Relay(_)
            | RunError::Interrupted(_)
            | RunError::Stopped(_)
            | RunError::CallerGone
            | RunError::Id(_) => String::new(),
        }
    }
}
