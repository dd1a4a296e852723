//! A small client of the broker: blocking, without a runtime, one connection a request.
//!
//! Receives typed bodies, returns typed objects. Waits no longer than its patience for each part of an
//! answer, and bounds what it reads. Touches one Unix socket; which one, and so whose run, its caller says.
//!
//! In a sandbox: ask for a lease, and run one command under it.
//!
//! ```no_run
//! use std::io::Write;
//! use sublet::api::client::{Client, Frame};
//! use sublet::api::wire::{ExecBody, LeaseBody};
//!
//! let client = Client::from_environment()?;
//! let lease = client.request(&LeaseBody::new("repo.push@github.com".parse()?, None))?;
//! println!("{} for {} s", lease.lease_id, lease.expires_in);
//!
//! let mut body = ExecBody::of(["git", "push"]);
//! body.lease_ids = vec![lease.lease_id];
//! let mut exec = client.exec(&body)?;
//! exec.end_stdin();
//! while let Some(frame) = exec.next_frame()? {
//!     match frame {
//!         Frame::Stdout(bytes) => std::io::stdout().write_all(bytes)?,
//!         Frame::Stderr(bytes) => std::io::stderr().write_all(bytes)?,
//!         Frame::Exit(exit) => println!("exit status {}", exit.exit_status),
//!         Frame::Failed(error) => println!("it did not run: {}", error.message),
//!         Frame::Started(_) => {}
//!     }
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! On the host: start a run, follow the trail.
//!
//! ```no_run
//! use sublet::api::client::Client;
//! use sublet::api::wire::RunBody;
//!
//! let control = Client::connect("/run/sublet/control.sock")?;
//! let run = control.start_run(&RunBody {
//!     agent: "agent-7".parse()?,
//!     principal: "alice".parse()?,
//!     profile: "git-push".into(),
//!     workspace: "/srv/agents/7".into(),
//!     run_id: None,
//! })?;
//! println!("bind {} into the sandbox", run.socket.display());
//! for event in control.events(0, true)? {
//!     println!("{}", event?);
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! A denial is [`ClientError::Refused`] and keeps the broker's words:
//!
//! ```no_run
//! # use sublet::api::client::Client;
//! # use sublet::api::wire::LeaseBody;
//! # let client = Client::from_environment()?;
//! # let body = LeaseBody::new("repo.push@github.com".parse()?, None);
//! match client.request(&body) {
//!     Err(e) if e.refusal().is_some_and(|r| r.reason == "rate_exceeded_minute") => { /* later */ }
//!     other => drop(other?),
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![forbid(unsafe_code)]

mod answer;
mod connection;
mod error;
mod events;
mod exec;
#[cfg(test)]
mod tests;

pub use error::ClientError;
pub use events::EventStream;
pub use exec::{ExecExit, ExecRequest, ExecStream, Frame};

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::api::wire::{
    BatchBody, ExecAnswer, ExecBody, ExecObject, ExecsObject, LeaseBody, LeaseObject, LeasesObject,
    ProjectedObject, RenewBody, RevocationBody, RevocationView, RevokeBody, RevokedObject, RunBody,
    RunObject, RunsObject,
};
use crate::guard::Told;
use crate::model::id::{ExecId, LeaseId, RunId};
use answer::Answer;
use connection::Ask;

/// The agent's socket in a sandbox.
pub const AGENT_SOCKET: &str = "/run/sublet/agent.sock";
/// The variable that names it where it lies elsewhere.
pub const SOCKET_VARIABLE: &str = "SUBLET_SOCKET";
/// For connecting, and for each part of an answer. A broker on a slow disk records in tenths of seconds.
pub const PATIENCE: Duration = Duration::from_secs(30);

const GET: &str = "GET";
const POST: &str = "POST";
const DELETE: &str = "DELETE";
const NO_BODY: Option<&()> = None;

/// A broker's socket: an agent's, which is one run's, or the host's control socket.
///
/// A method that the socket does not serve is refused by the broker: renewing, revoking, runs, events and
/// metrics belong to the control socket, requests and execs to a run's.
pub struct Client {
    path: PathBuf,
    patience: Duration,
    /// The connection that [`Client::connect`] made, for the first request.
    ready: Mutex<Option<UnixStream>>,
}

impl Client {
    /// Connects, so that a socket that nobody serves is known at once.
    ///
    /// # Errors
    /// [`ClientError::Connect`].
    pub fn connect(path: impl Into<PathBuf>) -> Result<Self, ClientError> {
        let client = Self { path: path.into(), patience: PATIENCE, ready: Mutex::new(None) };
        let socket = client.dial()?;
        Ok(Self { ready: Mutex::new(Some(socket)), ..client })
    }

    /// The agent's socket of this sandbox: [`SOCKET_VARIABLE`], else [`AGENT_SOCKET`].
    ///
    /// # Errors
    /// [`ClientError::Connect`].
    pub fn from_environment() -> Result<Self, ClientError> {
        let named = std::env::var_os(SOCKET_VARIABLE).filter(|path| !path.is_empty());
        Self::connect(named.map_or_else(|| AGENT_SOCKET.into(), PathBuf::from))
    }

    /// Waits so long, and no longer, for each part of an answer instead of [`PATIENCE`].
    #[must_use]
    pub fn with_patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    // Both sockets.

    /// The run that this agent's socket belongs to. `GET /v1/run`.
    pub fn run(&self) -> Result<RunObject, ClientError> {
        self.get("/v1/run", "a run")
    }

    /// Asks for a lease. `POST /v1/leases`.
    ///
    /// # Errors
    /// [`ClientError::Refused`] with a deny reason's name if it is denied.
    pub fn request(&self, body: &LeaseBody) -> Result<LeaseObject, ClientError> {
        self.post("/v1/leases", body, "a lease")
    }

    /// Asks for several: all are granted, or none is. `POST /v1/leases:batch`.
    pub fn request_all(&self, body: &BatchBody) -> Result<Vec<LeaseObject>, ClientError> {
        let LeasesObject { leases } = self.post("/v1/leases:batch", body, "leases")?;
        Ok(leases)
    }

    /// The leases that this socket sees; on the control socket those of `run`, or all. `GET /v1/leases`.
    pub fn leases(&self, run: Option<&RunId>) -> Result<Vec<LeaseObject>, ClientError> {
        let LeasesObject { leases } = self.get(&of_run("/v1/leases", run), "leases")?;
        Ok(leases)
    }

    /// `GET /v1/leases/{id}`.
    pub fn lease(&self, id: &LeaseId) -> Result<LeaseObject, ClientError> {
        self.get(&format!("/v1/leases/{id}"), "a lease")
    }

    /// The lease's signed envelope, as its JSON text. `GET /v1/leases/{id}/envelope`.
    pub fn envelope(&self, id: &LeaseId) -> Result<String, ClientError> {
        self.text(&format!("/v1/leases/{id}/envelope"))
    }

    /// Whether a lease was revoked. `GET /v1/revocations/{lease_id}`.
    pub fn revocation(&self, id: &LeaseId) -> Result<RevocationView, ClientError> {
        self.get(&format!("/v1/revocations/{id}"), "a revocation")
    }

    /// Runs a command, and waits until the broker has accepted it. `POST /v1/execs` with an upgrade.
    ///
    /// # Errors
    /// [`ClientError::Refused`] if it is denied: nothing ran.
    pub fn exec(&self, body: &ExecBody) -> Result<ExecStream, ClientError> {
        self.begin_exec(body)?.wait()
    }

    /// As [`Client::exec`], and waits for nothing: for a `poll` loop that has other things to serve.
    pub fn begin_exec(&self, body: &ExecBody) -> Result<ExecRequest, ClientError> {
        let body = serde_json::to_vec(body).map_err(ClientError::Encode)?;
        let socket = self.open()?;
        let ask = Ask { method: POST, target: "/v1/execs", body: Some(&body), upgrades: true };
        ask.send(&socket)?;
        Ok(ExecRequest::new(socket, self.patience))
    }

    /// Runs a command without input to its end, however long that takes. `POST /v1/execs`.
    ///
    /// # Errors
    /// [`ClientError::Refused`] if it did not run.
    pub fn exec_to_end(&self, body: &ExecBody) -> Result<ExecAnswer, ClientError> {
        let body = serde_json::to_vec(body).map_err(ClientError::Encode)?;
        let ask = Ask { method: POST, target: "/v1/execs", body: Some(&body), upgrades: false };
        self.ask(&ask, None)?.json("an exec's answer")
    }

    /// The execs that this socket sees; on the control socket those of `run`, or all. `GET /v1/execs`.
    pub fn execs(&self, run: Option<&RunId>) -> Result<Vec<ExecObject>, ClientError> {
        let ExecsObject { execs } = self.get(&of_run("/v1/execs", run), "execs")?;
        Ok(execs)
    }

    /// `GET /v1/execs/{id}`.
    pub fn exec_of(&self, id: &ExecId) -> Result<ExecObject, ClientError> {
        self.get(&format!("/v1/execs/{id}"), "an exec")
    }

    /// The public half of the key that signs envelopes: a JWKS. `GET /v1/jwks.json`.
    pub fn jwks(&self) -> Result<Value, ClientError> {
        self.get("/v1/jwks.json", "a key set")
    }

    /// `GET /v1/openapi.json`.
    pub fn openapi(&self) -> Result<Value, ClientError> {
        self.get("/v1/openapi.json", "a description")
    }

    /// `GET /v1/health`.
    pub fn health(&self) -> Result<Value, ClientError> {
        self.get("/v1/health", "a health report")
    }

    // The control socket.

    /// `POST /v1/runs`.
    pub fn start_run(&self, body: &RunBody) -> Result<RunObject, ClientError> {
        self.post("/v1/runs", body, "a run")
    }

    /// Active runs, and those that ended. `GET /v1/runs`.
    pub fn runs(&self) -> Result<Vec<RunObject>, ClientError> {
        let RunsObject { runs } = self.get("/v1/runs", "runs")?;
        Ok(runs)
    }

    /// `GET /v1/runs/{id}`.
    pub fn run_of(&self, id: &RunId) -> Result<RunObject, ClientError> {
        self.get(&format!("/v1/runs/{id}"), "a run")
    }

    /// Ends a run: its leases are revoked, its execs killed. `DELETE /v1/runs/{id}`.
    pub fn end_run(&self, id: &RunId) -> Result<RunObject, ClientError> {
        self.send(DELETE, &format!("/v1/runs/{id}"), NO_BODY)?.json("a run")
    }

    /// Has the tokens of a container's profile written for it. `POST /v1/runs/{id}/identity`.
    pub fn project(&self, id: &RunId) -> Result<ProjectedObject, ClientError> {
        self.send(POST, &format!("/v1/runs/{id}/identity"), NO_BODY)?.json("tokens")
    }

    /// `POST /v1/leases/{id}/renew`.
    pub fn renew(&self, id: &LeaseId, body: &RenewBody) -> Result<LeaseObject, ClientError> {
        self.post(&format!("/v1/leases/{id}/renew"), body, "a lease")
    }

    /// Takes a lease back; what it delivered is wiped when this returns. `POST /v1/leases/{id}/revoke`.
    pub fn revoke(&self, id: &LeaseId, body: &RevokeBody) -> Result<LeaseObject, ClientError> {
        self.post(&format!("/v1/leases/{id}/revoke"), body, "a lease")
    }

    /// Takes back all leases of a run, of a principal, or of the host; returns those that were open.
    /// `POST /v1/revocations`.
    pub fn revoke_all(&self, body: &RevocationBody) -> Result<Vec<LeaseObject>, ClientError> {
        let RevokedObject { revoked } = self.post("/v1/revocations", body, "leases")?;
        Ok(revoked)
    }

    /// The trail's events after the one of this number; with `follow` also those that are still to come,
    /// for which it waits without end. `GET /v1/events`.
    pub fn events(&self, since: u64, follow: bool) -> Result<EventStream, ClientError> {
        let target = format!("/v1/events?since={since}&follow={follow}");
        let answer = self.send(GET, &target, NO_BODY)?;
        if !answer.is_success() {
            return Err(answer.refusal());
        }
        if follow {
            answer.body.source().set_read_timeout(None).map_err(ClientError::Receive)?;
        }
        Ok(EventStream::new(answer.body))
    }

    /// What the guard of a container recognises this host's managed values by. `GET /v1/guard`.
    pub fn guard(&self) -> Result<Told, ClientError> {
        self.get("/v1/guard", "fingerprints")
    }

    /// OpenMetrics text. `GET /metrics`.
    pub fn metrics(&self) -> Result<String, ClientError> {
        self.text("/metrics")
    }

    // How it is asked.

    fn get<T: DeserializeOwned>(&self, target: &str, what: &'static str) -> Result<T, ClientError> {
        self.send(GET, target, NO_BODY)?.json(what)
    }

    fn post<T: DeserializeOwned>(
        &self,
        target: &str,
        body: &impl Serialize,
        what: &'static str,
    ) -> Result<T, ClientError> {
        self.send(POST, target, Some(body))?.json(what)
    }

    fn text(&self, target: &str) -> Result<String, ClientError> {
        let bytes = self.send(GET, target, NO_BODY)?.success()?;
        String::from_utf8(bytes).map_err(|_| ClientError::Framing("it is no UTF-8"))
    }

    fn send(
        &self,
        method: &'static str,
        target: &str,
        body: Option<&impl Serialize>,
    ) -> Result<Answer<UnixStream>, ClientError> {
        let body = body.map(serde_json::to_vec).transpose().map_err(ClientError::Encode)?;
        let ask = Ask { method, target, body: body.as_deref(), upgrades: false };
        self.ask(&ask, Some(self.patience))
    }

    /// `patience` for each part of the answer; `None`: without end.
    fn ask(
        &self,
        ask: &Ask<'_>,
        patience: Option<Duration>,
    ) -> Result<Answer<UnixStream>, ClientError> {
        let socket = self.open()?;
        ask.send(&socket)?;
        socket.set_read_timeout(patience).map_err(ClientError::Receive)?;
        Answer::read(socket)
    }

    /// The connection that was made, if it is still fit, else a new one.
    fn open(&self) -> Result<UnixStream, ClientError> {
        let ready = self.ready.lock().unwrap_or_else(PoisonError::into_inner).take();
        match ready {
            Some(socket) if connection::is_quiet(&socket) => Ok(socket),
            _ => self.dial(),
        }
    }

    fn dial(&self) -> Result<UnixStream, ClientError> {
        connection::connect(&self.path, self.patience)
            .map_err(|source| ClientError::Connect { path: self.path.clone(), source })
    }
}

fn of_run(target: &str, run: Option<&RunId>) -> String {
    match run {
        // A run's id needs no escaping: letters, digits, `_`, `-`, `.`.
        Some(run) => format!("{target}?run_id={run}"),
        None => target.to_owned(),
    }
}
