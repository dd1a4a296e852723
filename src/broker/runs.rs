//! Runs: started by the control socket, each with a socket of its own, ended with all that it has.
#![forbid(unsafe_code)]

use std::fs::{DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};

use crate::broker::late::LateRevocation;
use crate::broker::{Broker, BrokerError, RunAsk, RunView, Selection};
use crate::host::{ProfileRef, container};
use crate::model::id::RunId;
use crate::model::moment::timestamp_text;
use crate::model::run::{Run, RunState};
use crate::run::entries;
use crate::run::mailbox::Mail;
use crate::store::{Durability, RunFilter};

/// How many ended runs are listed beside the active ones.
const MOST_LISTED: u32 = 10_000;

/// An active run.
#[derive(Debug)]
pub(super) struct ActiveRun {
    /// Without its principal's permissions, which are configuration.
    pub run: Run,
    /// Who else may speak on its socket.
    starter: Option<u32>,
    owner: Option<u32>,
}

impl Broker {
    /// Starts a run, and its socket.
    ///
    /// # Errors
    /// A profile or workspace that this host does not permit; an id that is taken; an unwritable trail.
    pub fn start_run(&self, ask: RunAsk) -> Result<RunView, BrokerError> {
        self.refuse_while_draining()?;
        let profile = ProfileRef::parse(&ask.profile);
        // A profile that does not load would deny everything later, and less clearly.
        self.host.profile(&profile)?;
        let container = match &ask.run_id {
            Some(run_id) => self.container_of(run_id)?,
            None => None,
        };
        let workspace = match &container {
            None if ask.run_id.as_ref().is_some_and(container::is_of_a_container) => {
                let message = "an id that begins with `oci-` is of a container's run, and no container \
                               has this one (sublet hook)";
                return Err(BrokerError::Malformed { message: message.to_owned() });
            }
            // A place in the container: the launcher opens it there.
            Some(record) => record.workspace.clone(),
            None => self.workspace(&ask.workspace)?,
        };
        let now = self.now()?;
        let run = Run {
            run_id: ask.run_id.unwrap_or_else(RunId::fresh),
            agent: ask.agent,
            principal: ask.principal,
            permissions: Vec::new(),
            profile: profile.to_string(),
            workspace,
            state: RunState::Active,
            started_at: now.wall,
        };
        let who = self.who(&run, &now);
        let before = self.transaction(Durability::Durable, |tx| {
            let before = tx.run(&run.run_id)?;
            if before.is_none() {
                entries::start_run(tx, who)?;
            }
            Ok(before)
        })?;
        if let Some(Run { run_id, state, .. }) = before {
            return Err(BrokerError::RunExists { run_id, has_ended: state == RunState::Ended });
        }
        if let Err(e) = self.admit(run.clone(), Some(ask.uid)) {
            // Nobody could ever speak for it.
            self.transaction(Durability::Relaxed, |tx| entries::end_run(tx, who))?;
            return Err(e);
        }
        Ok(self.view(&run))
    }

    /// Makes the socket of a run and opens it to the server.
    pub(super) fn admit(&self, run: Run, starter: Option<u32>) -> Result<(), BrokerError> {
        let path = self.socket(&run.run_id);
        let failed = |source| BrokerError::Socket { path: path.clone(), source };
        let listener = listen(&path).map_err(failed)?;
        let owner = match self.container_of(&run.run_id)? {
            Some(record) => Some(record.uid),
            None => std::fs::metadata(&run.workspace).ok().map(|found| found.uid()),
        };
        let run_id = run.run_id.clone();
        let active = Arc::new(ActiveRun { run, starter, owner });
        self.active().insert(run_id.clone(), active);
        self.listeners.add(run_id, listener).map_err(|_| BrokerError::Draining)
    }

    pub fn run(&self, id: &RunId) -> Result<RunView, BrokerError> {
        let run = match self.active_run(id) {
            Some(active) => Some(active.run.clone()),
            None => self.store.read(|view| view.run(id))?,
        };
        run.map(|run| self.view(&run)).ok_or_else(|| no_run(id))
    }

    /// The active ones and the newest of those that ended, in the order of their start.
    pub fn runs(&self) -> Result<Vec<RunView>, BrokerError> {
        let filter = RunFilter { limit: Some(MOST_LISTED), ..RunFilter::default() };
        let runs = self.store.read(|view| view.runs_that(filter))?;
        Ok(runs.iter().map(|run| self.view(run)).collect())
    }

    /// Ends a run: its leases are revoked, its execs killed, its socket removed.
    ///
    /// # Errors
    /// Where there is no such run. One that has ended already is returned as it is.
    pub fn end_run(&self, id: &RunId) -> Result<RunView, BrokerError> {
        let Some(active) = self.active().remove(id) else { return self.run(id) };
        self.listeners.remove(id);
        self.take_back(&Selection::Run(id.clone()));
        self.mail_execs(|exec| exec.run_id == *id, Mail::Kill("its run has ended"));
        let now = self.now()?;
        let who = self.who(&active.run, &now);
        let ended = self.transaction(Durability::Durable, |tx| {
            Self::record_revocation(
                tx,
                who.hostname,
                &now,
                &Selection::Run(id.clone()),
                "run_ended",
            )?;
            entries::end_run(tx, who)
        });
        // An exec that was asked for in between has begun before that was recorded.
        self.take_back(&Selection::Run(id.clone()));
        self.mail_execs(|exec| exec.run_id == *id, Mail::Kill("its run has ended"));
        self.forget_projected(id);
        remove_socket(&self.socket(id));
        if let Err(e) = ended {
            // Its execs are dead. Whoever asks again ends it; what it was granted is over in any case.
            let which = Selection::Run(id.clone());
            self.keep_revocation(LateRevocation { which, reason: "run_ended".to_owned() });
            self.active().insert(id.clone(), active);
            return Err(e);
        }
        Ok(self.view(&Run { state: RunState::Ended, ..active.run.clone() }))
    }

    /// Whether a peer of this uid may speak on the run's socket: root, the broker itself, who started the
    /// run, the workspace's owner, or an exec's uid.
    pub fn may_speak(&self, run: &RunId, uid: u32) -> bool {
        let Some(active) = self.active_run(run) else { return false };
        uid == 0
            || uid == rustix::process::geteuid().as_raw()
            || active.starter == Some(uid)
            || active.owner == Some(uid)
            || self.host.config.host.uid_pool.contains(uid)
    }

    /// With what the principal holds now.
    pub(super) fn run_to_decide(&self, id: &RunId) -> Result<Run, BrokerError> {
        let active = self.active_run(id).ok_or_else(|| no_run(id))?;
        let permissions = self.host.config.permissions_of(&active.run.principal).to_vec();
        Ok(Run { permissions, ..active.run.clone() })
    }

    fn active_run(&self, id: &RunId) -> Option<Arc<ActiveRun>> {
        self.active().get(id).cloned()
    }

    pub(super) fn active(
        &self,
    ) -> std::sync::MutexGuard<'_, std::collections::BTreeMap<RunId, Arc<ActiveRun>>> {
        self.runs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The container that a run belongs to, by root's own record of it.
    pub(super) fn container_of(
        &self,
        run: &RunId,
    ) -> Result<Option<container::Record>, BrokerError> {
        let failed = |source: io::Error| BrokerError::Malformed {
            message: format!("the record of {run}'s container cannot be taken: {source}"),
        };
        container::read(&self.host.runtime_dir, run).map_err(failed)
    }

    /// Whether a run that an earlier broker left was a container's that is gone.
    pub(super) fn has_lost_its_container(&self, run: &RunId) -> bool {
        container::is_of_a_container(run) && !matches!(self.container_of(run), Ok(Some(_)))
    }

    /// As the launcher will take it: absolute, links resolved as far as we may look.
    fn workspace(&self, asked: &Path) -> Result<PathBuf, BrokerError> {
        let malformed = |message| BrokerError::Malformed { message };
        if !asked.is_absolute() {
            let shown = asked.display();
            return Err(malformed(format!("the workspace {shown} is no absolute path")));
        }
        let real = match asked.canonicalize() {
            Ok(real) => real,
            // The launcher, which may look, opens it without following any link.
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => asked.to_owned(),
            Err(e) => return Err(malformed(format!("the workspace {}: {e}", asked.display()))),
        };
        match self.host.objection_to_workspace(&real) {
            Some(why) => Err(malformed(format!(
                "{} cannot be a workspace: {why}; add its directory there, and restart the service",
                real.display()
            ))),
            None => Ok(real),
        }
    }

    fn socket(&self, id: &RunId) -> PathBuf {
        self.host.agent_socket(id)
    }

    fn view(&self, run: &Run) -> RunView {
        RunView {
            run_id: run.run_id.clone(),
            socket: self.socket(&run.run_id),
            agent: run.agent.clone(),
            principal: run.principal.clone(),
            profile: run.profile.clone(),
            workspace: run.workspace.clone(),
            state: run.state,
            started_at: timestamp_text(run.started_at),
        }
    }
}

pub(super) fn no_run(id: &RunId) -> BrokerError {
    BrokerError::NotFound { what: format!("active run {id}") }
}

/// The directory above keeps strangers out. This one is mounted in the run's sandboxes, whose execs have
/// many uids: they may pass, and see no name but the one that they know.
fn listen(path: &Path) -> io::Result<UnixListener> {
    if let Some(directory) = path.parent() {
        DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
        std::fs::set_permissions(directory, Permissions::from_mode(0o711))?;
    }
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, Permissions::from_mode(0o666))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// What is left of one is an entry in a directory of ours: no one listens any more.
fn remove_socket(path: &Path) {
    drop(std::fs::remove_file(path));
    if let Some(directory) = path.parent() {
        drop(std::fs::remove_dir(directory));
    }
}
