//! Many runs on one host: who may ask on which socket, which leases are open, which execs live.
//!
//! Receives typed requests; returns views, never a value. Every call that touches the store blocks: the
//! server calls them where blocking is allowed. An exec is one thread that tells the same story as
//! `sublet run`.
#![forbid(unsafe_code)]

pub mod settle;

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;

use serde::Serialize;
use tokio::sync::{oneshot, watch};

use crate::lease::LeaseView;
use crate::model::exec::ExecState;
use crate::model::id::{ExecId, LeaseId, RunId};
use crate::model::lease::LeaseState;
use crate::model::moment::Span;
use crate::model::name::{IdentityName, VariableName};
use crate::model::run::RunState;
use crate::policy::{LeaseFlag, Reason};

/// The broker's state, shared by the server's tasks and the execs' threads.
pub struct Broker {}

/// A run to be started, as the control socket asks for it.
#[derive(Debug, Clone)]
pub struct RunAsk {
    pub agent: IdentityName,
    pub principal: IdentityName,
    /// A profile's name, or a file's path.
    pub profile: String,
    pub workspace: PathBuf,
    pub run_id: Option<RunId>,
    /// Who asks, beside root and the execs' uids the one that may use the run's socket.
    pub uid: u32,
}

/// One exec, as a run's socket asks for it.
#[derive(Debug)]
pub struct ExecAsk {
    pub lease_ids: Vec<LeaseId>,
    pub command: Vec<OsString>,
    pub environment: Vec<(VariableName, OsString)>,
    pub timeout: Option<Span>,
    /// Rows and columns.
    pub terminal: Option<(u16, u16)>,
    pub without_network: bool,
    pub reason: Option<Reason>,
    /// The process that asks: when it dies, the exec does.
    pub caller: Option<OwnedFd>,
}

/// A run as it is shown. DESIGN section 12.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RunView {
    pub run_id: RunId,
    pub socket: PathBuf,
    pub agent: IdentityName,
    pub principal: IdentityName,
    pub profile: String,
    pub workspace: PathBuf,
    pub state: RunState,
    /// RFC 3339, UTC, milliseconds.
    pub started_at: String,
}

/// An exec as it is shown.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ExecView {
    pub exec_id: ExecId,
    pub run_id: RunId,
    pub lease_ids: Vec<LeaseId>,
    pub command: Vec<String>,
    pub state: ExecState,
    pub exit_status: Option<i32>,
    pub started_at: String,
}

/// Whose leases and execs a socket sees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Scope {
    Run(RunId),
    Host,
}

/// Which leases are taken back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Selection {
    Lease(LeaseId),
    Run(RunId),
    Principal(IdentityName),
    All,
}

/// Why the broker did not do it. `stage`, `reason` and `hint` as everywhere.
#[derive(Debug, thiserror::Error)]
pub enum BrokerError {
    #[error("there is no {what}")]
    NotFound { what: String },
    #[error("{message}")]
    Conflict { message: String },
    #[error("{message}")]
    Malformed { message: String },
    #[error("the broker is shutting down and grants nothing any more")]
    Draining,
    #[error("{live} execs of this run are alive, which is the most")]
    TooManyExecs { live: usize },
    #[error(transparent)]
    Run(#[from] crate::run::RunError),
}

impl BrokerError {
    pub fn stage(&self) -> &'static str {
        match self {
            BrokerError::Run(e) => e.stage(),
            _ => "request",
        }
    }

    pub fn reason(&self) -> &'static str {
        match self {
            BrokerError::NotFound { .. } => "not_found",
            BrokerError::Conflict { .. } => "conflict",
            BrokerError::Malformed { .. } => "malformed",
            BrokerError::Draining => "draining",
            BrokerError::TooManyExecs { .. } => "too_many_execs",
            BrokerError::Run(e) => e.reason(),
        }
    }

    pub fn hint(&self) -> String {
        match self {
            BrokerError::Run(e) => e.hint(),
            BrokerError::Draining => "ask again when the service is up".to_owned(),
            BrokerError::TooManyExecs { .. } => "wait until one of them has ended".to_owned(),
            BrokerError::NotFound { .. }
            | BrokerError::Conflict { .. }
            | BrokerError::Malformed { .. } => String::new(),
        }
    }
}

/// An exec on its way: first comes whether it may start, then it takes the client's stream.
pub struct Accepting {
    /// Denied, or its id: everything is recorded, the command starts without waiting for the stream.
    pub accepted: oneshot::Receiver<Result<ExecId, BrokerError>>,
    /// Takes the client's connection, on which frames are spoken from then on. Dropped without one, the
    /// exec is killed.
    pub stream: std::sync::mpsc::SyncSender<UnixStream>,
}

impl Broker {
    pub fn start_run(&self, ask: RunAsk) -> Result<RunView, BrokerError> {
        let _ = ask;
        todo!()
    }

    pub fn run(&self, id: &RunId) -> Result<RunView, BrokerError> {
        let _ = id;
        todo!()
    }

    /// Active ones, and those that ended.
    pub fn runs(&self) -> Result<Vec<RunView>, BrokerError> {
        todo!()
    }

    /// Ends a run: its leases are revoked, its execs killed, its socket removed.
    pub fn end_run(&self, id: &RunId) -> Result<RunView, BrokerError> {
        let _ = id;
        todo!()
    }

    /// All are granted, or none is.
    pub fn request(
        &self,
        run: &RunId,
        asked: Vec<(LeaseFlag, Option<Reason>)>,
    ) -> Result<Vec<LeaseView>, BrokerError> {
        let _ = (run, asked);
        todo!()
    }

    pub fn leases(&self, scope: &Scope) -> Result<Vec<LeaseView>, BrokerError> {
        let _ = scope;
        todo!()
    }

    pub fn lease(&self, scope: &Scope, id: &LeaseId) -> Result<LeaseView, BrokerError> {
        let _ = (scope, id);
        todo!()
    }

    /// O(1): one look-up by key.
    pub fn lease_state(&self, id: &LeaseId) -> Result<LeaseState, BrokerError> {
        let _ = id;
        todo!()
    }

    /// The signed envelope, as its JSON text.
    pub fn envelope(&self, scope: &Scope, id: &LeaseId) -> Result<String, BrokerError> {
        let _ = (scope, id);
        todo!()
    }

    /// The envelope key's public half: a JWKS.
    pub fn jwks(&self) -> serde_json::Value {
        todo!()
    }

    pub fn renew(&self, id: &LeaseId, ttl: Option<Span>) -> Result<LeaseView, BrokerError> {
        let _ = (id, ttl);
        todo!()
    }

    /// Wipes what is in use at once, then records. Returns what was open.
    pub fn revoke(
        &self,
        which: &Selection,
        reason: Option<Reason>,
    ) -> Result<Vec<LeaseView>, BrokerError> {
        let _ = (which, reason);
        todo!()
    }

    pub fn execs(&self, scope: &Scope) -> Result<Vec<ExecView>, BrokerError> {
        let _ = scope;
        todo!()
    }

    pub fn exec_of(&self, scope: &Scope, id: &ExecId) -> Result<ExecView, BrokerError> {
        let _ = (scope, id);
        todo!()
    }

    /// Begins an exec on a thread of its own. Does not block.
    pub fn exec(self: &Arc<Self>, run: &RunId, ask: ExecAsk) -> Result<Accepting, BrokerError> {
        let _ = (run, ask);
        todo!()
    }

    /// At most `limit` events after `seq`, as recorded: one JSON object each.
    pub fn events_since(&self, seq: u64, limit: usize) -> Result<Vec<(u64, String)>, BrokerError> {
        let _ = (seq, limit);
        todo!()
    }

    /// The trail's last committed number; changes with every commit.
    pub fn trail(&self) -> watch::Receiver<u64> {
        todo!()
    }

    /// Whether a peer of this uid may speak on the run's socket: root, the broker itself, who started the
    /// run, the workspace's owner, or an exec's uid.
    pub fn may_speak(&self, run: &RunId, uid: u32) -> bool {
        let _ = (run, uid);
        todo!()
    }

    /// What `/metrics` shows, in OpenMetrics text.
    pub fn metrics(&self) -> String {
        todo!()
    }

    pub fn is_draining(&self) -> bool {
        todo!()
    }
}
