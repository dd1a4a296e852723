//! Many runs on one host: who may ask on which socket, which leases are open, which execs live.
//!
//! Receives typed requests; returns views, never a value. Every call that touches the store blocks: the
//! server calls them where blocking is allowed. An exec is one thread that tells the same story as
//! `sublet run`.
#![forbid(unsafe_code)]

pub mod settle;

mod error;
mod execs;
mod guard;
mod keeper;
mod late;
mod leases;
pub mod listeners;
pub mod metrics;
mod projection;
mod revoker;
mod runs;
mod seen;
pub mod streams;
mod sweeper;
mod threads;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde::Serialize;
use tokio::sync::{oneshot, watch};

use crate::envelope::SigningKey;
use crate::host::Host;
use crate::host::keyfile::KeySource;
use crate::launcher::client::{Door, Launcher};
use crate::launcher::into::InContainer;
use crate::model::event::{Draft, EventType};
use crate::model::exec::ExecState;
use crate::model::id::{ExecId, LeaseId, RunId};
use crate::model::moment::{Moment, Span};
use crate::model::name::{IdentityName, VariableName};
use crate::model::run::{Run, RunState};
use crate::policy::Reason;
use crate::run::RunError;
use crate::run::entries::{self, Who};
use crate::run::ledger::{Keys, Shared, refuse_a_changed_trail};
use crate::run::mailbox::Mail;
use crate::store::{Durability, RunFilter, SharedStore, StoreError, Tx};

pub use error::BrokerError;
use execs::LiveExec;
use keeper::Heard;
use late::{LateEnd, LateRevocation};
use listeners::Listeners;
use metrics::Metrics;
pub use projection::ProjectedView;
use runs::ActiveRun;
use seen::SeenLeases;
use streams::ReadAhead;
use threads::Threads;

/// How long execs have to die once they are killed.
const LAST_WAIT: Duration = Duration::from_secs(5);

/// The broker's state, shared by the server's tasks and the execs' threads.
pub struct Broker {
    host: Arc<Host>,
    hostname: String,
    boot_id: String,
    store: Arc<SharedStore>,
    shared: Arc<Shared>,
    door: Door,
    heard: Heard,
    threads: Threads,
    runs: Mutex<BTreeMap<RunId, Arc<ActiveRun>>>,
    execs: Mutex<BTreeMap<ExecId, LiveExec>>,
    late: Mutex<Vec<LateEnd>>,
    late_revocations: Mutex<Vec<LateRevocation>>,
    listeners: Listeners,
    metrics: Arc<Metrics>,
    trail: watch::Sender<u64>,
    checkpointed: AtomicU64,
    signing: SigningKey,
    draining: AtomicBool,
    launcher_died: AtomicBool,
    stopped: AtomicBool,
    fingerprints: guard::Known,
    seen: SeenLeases,
    projections: Mutex<projection::Projections>,
}

/// What a broker begins with: the process has settled.
pub struct Beginning {
    pub host: Host,
    pub keys: Keys,
    /// The key that signs checkpoints and envelopes.
    pub signing: KeySource,
    pub listeners: Listeners,
    pub metrics: Arc<Metrics>,
    /// What was enforced on this process, for the trail.
    pub posture: serde_json::Value,
}

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
    /// Who and where it is, in a container.
    pub into: InContainer,
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

/// An exec on its way: first comes whether it may start, then it hears its client.
pub struct Accepting {
    /// Denied; or everything is recorded, and the client was greeted.
    pub accepted: oneshot::Receiver<Result<(), BrokerError>>,
    pub read_ahead: ReadAhead,
}

impl Broker {
    /// Opens the store, closes what an earlier broker left open, and takes its runs up again.
    ///
    /// # Errors
    /// A store that cannot be written, or whose trail was cut or rewritten; clocks that cannot be read.
    pub fn begin(beginning: Beginning, launcher: &Launcher) -> Result<Self, BrokerError> {
        let Beginning { host, keys, signing, listeners, metrics, posture } = beginning;
        let now = crate::host::now().map_err(RunError::Clock)?;
        let store = Arc::new(SharedStore::open(&host.state_dir)?);
        refuse_a_changed_trail(&store, &host.state_dir, &now.boot_id)?;
        let signing = crate::audit::key::of(&signing)?;
        let latest = store.read(|view| view.latest_checkpoint())?;
        let checkpointed = latest.map_or(0, |checkpoint| checkpoint.seq);
        let heard = Heard::new().map_err(RunError::Settle)?;
        let (trail, _) = watch::channel(0);
        let committed = {
            let (heard, trail) = (heard.clone(), trail.clone());
            move |heads: crate::store::Heads| {
                heard.committed(heads);
                trail.send_if_modified(|seq| {
                    let has_grown = heads.latest.seq > *seq;
                    *seq = heads.latest.seq.max(*seq);
                    has_grown
                });
            }
        };
        let broker = Self {
            hostname: rustix::system::uname().nodename().to_string_lossy().into_owned(),
            boot_id: now.boot_id.clone(),
            host: Arc::new(host),
            store,
            shared: Arc::new(Shared { keys: Arc::new(keys), committed: Box::new(committed) }),
            door: launcher.door().map_err(RunError::Settle)?,
            heard,
            threads: Threads::default(),
            runs: Mutex::default(),
            execs: Mutex::default(),
            late: Mutex::default(),
            late_revocations: Mutex::default(),
            listeners,
            metrics,
            trail,
            checkpointed: AtomicU64::new(checkpointed),
            signing,
            draining: AtomicBool::new(false),
            launcher_died: AtomicBool::new(false),
            stopped: AtomicBool::new(false),
            fingerprints: guard::Known::default(),
            seen: SeenLeases::default(),
            projections: Mutex::default(),
        };
        broker.transaction(Durability::Durable, |tx| {
            entries::close_orphans(tx, &broker.hostname, &now)?;
            let draft = Draft::new(EventType::BrokerStarted, now.wall, &broker.hostname);
            tx.append(draft.with("version", env!("CARGO_PKG_VERSION")).with("posture", posture))
        })?;
        let filter = RunFilter { state: Some(RunState::Active), ..RunFilter::default() };
        let active = broker.store.read(|view| view.runs_that(filter))?;
        for run in active {
            let run_id = run.run_id.clone();
            if broker.has_lost_its_container(&run_id) {
                broker.end_lost_run(run)?;
                continue;
            }
            if let Err(e) = broker.admit(run, None) {
                // It stays active in the record, and is tried again at the next start.
                tracing::error!(%run_id, error = %e.message(), "could not take a run up again");
                continue;
            }
            broker.project_again(&run_id);
        }
        Ok(broker)
    }

    /// Ends a run that nobody speaks for any more. No lease and no exec of it is open: those of an earlier
    /// broker are closed by now.
    fn end_lost_run(&self, run: Run) -> Result<(), BrokerError> {
        let now = self.now()?;
        let who = self.who(&run, &now);
        self.transaction(Durability::Durable, |tx| entries::end_run(tx, who)).map(drop)
    }

    /// Holds the launcher until it is gone, and then lets nothing more begin. To be called on a thread of
    /// its own.
    pub fn hold(&self, launcher: &Launcher) {
        let why = keeper::keep(launcher, &self.heard, &self.boot_id);
        if !self.stopped.load(Ordering::Acquire) {
            tracing::error!(error = %why, "the launcher is gone: every exec is dead, and the service ends");
            self.launcher_died.store(true, Ordering::Release);
        }
        self.draining.store(true, Ordering::Release);
    }

    /// Grants nothing any more; waits for the living execs until `patience` is over, then kills them.
    pub fn drain(&self, patience: Duration) {
        self.draining.store(true, Ordering::Release);
        let end = Instant::now() + patience;
        while !self.live().is_empty() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(20));
        }
        self.hurry();
        let end = Instant::now() + LAST_WAIT;
        while !self.live().is_empty() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Kills every living exec.
    pub fn hurry(&self) {
        let mail = match self.launcher_died.load(Ordering::Acquire) {
            true => Mail::LauncherDied,
            false => Mail::Kill("the service ends"),
        };
        self.mail_execs(|_| true, mail);
    }

    /// The last words in the trail.
    pub fn stop(&self) -> Result<(), BrokerError> {
        self.stopped.store(true, Ordering::Release);
        self.wipe_projected();
        let now = self.now()?;
        self.transaction(Durability::Durable, |tx| {
            let mut last = Draft::new(EventType::BrokerStopped, now.wall, &self.hostname);
            if self.launcher_died.load(Ordering::Acquire) {
                // Nobody took the open leases back: the next start closes them as interrupted.
                last = last.because("launcher_died");
            } else {
                let revoked = tx.revoke(crate::store::Revoke::All)?;
                let kind = EventType::LeaseRevoked;
                Self::tell_ends(tx, &self.hostname, &now, kind, "broker_stopped", revoked)?;
            }
            tx.append(last).map(drop)
        })?;
        let checkpointed = self.checkpoint(1);
        if !self.launcher_died.load(Ordering::Acquire) {
            self.heard.tell_the_last();
        }
        checkpointed
    }

    /// At most `limit` events after `seq`, as recorded: one JSON object each.
    pub fn events_since(&self, seq: u64, limit: usize) -> Result<Vec<(u64, String)>, BrokerError> {
        let events = self.store.read(|view| {
            view.events_since(seq).take(limit).collect::<Result<Vec<_>, StoreError>>()
        })?;
        Ok(events.into_iter().map(|event| (event.seq, event.line())).collect())
    }

    /// The trail's last committed number; changes with every commit.
    pub fn trail(&self) -> watch::Receiver<u64> {
        self.trail.subscribe()
    }

    /// What `/metrics` shows, in OpenMetrics text.
    pub fn metrics(&self) -> String {
        self.metrics.runs_active(self.active().len() as u64);
        self.metrics.render()
    }

    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Acquire)
    }

    fn refuse_while_draining(&self) -> Result<(), BrokerError> {
        if self.is_draining() { Err(BrokerError::Draining) } else { Ok(()) }
    }

    fn now(&self) -> Result<Moment, BrokerError> {
        Ok(crate::host::now().map_err(RunError::Clock)?)
    }

    fn who<'a>(&'a self, run: &'a Run, now: &'a Moment) -> Who<'a> {
        Who { run, hostname: &self.hostname, now }
    }

    fn transaction<T: Send>(
        &self,
        durability: Durability,
        act: impl FnOnce(&mut Tx<'_>) -> Result<T, StoreError> + Send,
    ) -> Result<T, BrokerError> {
        let began = Instant::now();
        let (value, _) = self.store.transaction(durability, act)?;
        self.metrics.committed(began.elapsed());
        if let Some(heads) = self.store.heads() {
            (self.shared.committed)(heads);
        }
        Ok(value)
    }

    /// Signs a checkpoint, if so many events have come since the last.
    fn checkpoint(&self, every: u64) -> Result<(), BrokerError> {
        let now = self.now()?;
        let due = self
            .store
            .read(|view| view.due_checkpoint(every, &self.signing, &self.hostname, now.wall))?;
        if let Some(signed) = due {
            self.transaction(Durability::Durable, |tx| tx.put_checkpoint(&signed))?;
            self.checkpointed.store(signed.checkpoint().head.seq, Ordering::Relaxed);
        }
        Ok(())
    }
}
