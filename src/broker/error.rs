//! Why the broker did not do what it was asked.
#![forbid(unsafe_code)]

use std::io;
use std::path::PathBuf;

use crate::audit::key::SigningKeyError;
use crate::envelope::InvalidText;
use crate::host::HostError;
use crate::model::id::RunId;
use crate::model::verdict::DenyReason;
use crate::run::RunError;
use crate::store::StoreError;

/// `stage`, `reason` and `hint` are as everywhere.
#[derive(Debug, thiserror::Error)]
pub enum BrokerError {
    #[error("there is no {what}")]
    NotFound { what: String },
    #[error("{message}")]
    Conflict { message: String },
    #[error("there is a run {run_id} already{}", if *.has_ended { ", which has ended" } else { "" })]
    RunExists { run_id: RunId, has_ended: bool },
    #[error("{message}")]
    Malformed { message: String },
    #[error("the broker is shutting down and grants nothing any more")]
    Draining,
    #[error("{live} execs of this run are alive, which is the most")]
    TooManyExecs { live: usize },
    #[error("could not make the run's socket {path}")]
    Socket { path: PathBuf, source: io::Error },
    #[error("could not write the container's tokens in {path}")]
    Projection { path: PathBuf, source: io::Error },
    #[error("the trail cannot be written, so the revocation could not be recorded yet")]
    LateRevocation(#[source] StoreError),
    #[error("could not start a thread for the exec")]
    Thread(#[source] io::Error),
    #[error("the key that signs envelopes and checkpoints cannot be used")]
    Signing(#[from] SigningKeyError),
    #[error("the lease's envelope cannot be written")]
    Envelope(#[from] InvalidText),
    #[error(transparent)]
    Run(#[from] RunError),
}

impl From<StoreError> for BrokerError {
    fn from(error: StoreError) -> Self {
        BrokerError::Run(RunError::Trail(error))
    }
}

impl From<HostError> for BrokerError {
    fn from(error: HostError) -> Self {
        BrokerError::Run(error.into())
    }
}

impl BrokerError {
    pub fn stage(&self) -> &'static str {
        match self {
            BrokerError::Run(e) => e.stage(),
            BrokerError::LateRevocation(_) => "record",
            _ => "request",
        }
    }

    /// The name that programs match on.
    pub fn reason(&self) -> &'static str {
        match self {
            BrokerError::NotFound { .. } => "not_found",
            BrokerError::Conflict { .. } | BrokerError::RunExists { .. } => "conflict",
            BrokerError::Malformed { .. } => "malformed",
            BrokerError::Draining => "draining",
            BrokerError::TooManyExecs { .. } => "too_many_execs",
            BrokerError::Socket { .. } => "socket_failed",
            BrokerError::Projection { .. } => "projection_failed",
            BrokerError::LateRevocation(_) => DenyReason::AuditUnavailable.as_str(),
            BrokerError::Thread(_) => "thread_failed",
            BrokerError::Signing(_) => "signing_key_unusable",
            BrokerError::Envelope(_) => "envelope_unwritable",
            BrokerError::Run(e) => e.reason(),
        }
    }

    /// What `sublet exec` exits with for it.
    pub fn exit_status(&self) -> u8 {
        match self {
            BrokerError::Run(e) => e.exit_status(),
            _ => 125,
        }
    }

    /// What failed, with all that caused it, in one line.
    pub fn message(&self) -> String {
        match self {
            // As every command has it: what was asked, the reason's name, why.
            BrokerError::Run(RunError::Denied(denial)) => {
                format!("{} is denied: {}: {}", denial.asked, denial.reason, denial.message)
            }
            other => crate::launcher::compile::chain(other),
        }
    }

    pub fn hint(&self) -> String {
        match self {
            BrokerError::Run(e) => e.hint(),
            BrokerError::Draining => "ask again when the service is up".to_owned(),
            BrokerError::TooManyExecs { .. } => "wait until one of them has ended".to_owned(),
            BrokerError::LateRevocation(_) => {
                "what was delivered is wiped and nothing more is lent; it is recorded when the trail can be written"
                    .to_owned()
            }
            BrokerError::Thread(_) => "raise TasksMax or RLIMIT_NPROC of the service".to_owned(),
            BrokerError::Socket { .. } => {
                "look at the space and the length of the runtime directory (unix(7): 107 bytes)"
                    .to_owned()
            }
            BrokerError::Projection { .. } => {
                "only `sublet hook createRuntime` makes that directory, when a container begins"
                    .to_owned()
            }
            BrokerError::RunExists { .. } => {
                "an id is used once, and stays taken when its run has ended: choose another, or none for a new one"
                    .to_owned()
            }
            BrokerError::Envelope(_) => {
                "correct the capability's `constraints` in the profile".to_owned()
            }
            BrokerError::NotFound { .. }
            | BrokerError::Signing(_)
            | BrokerError::Conflict { .. }
            | BrokerError::Malformed { .. } => String::new(),
        }
    }
}
