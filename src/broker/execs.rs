//! Execs: each a thread of its own, which tells the story of `run.rs` and speaks with its client alone.
#![forbid(unsafe_code)]

use std::cell::Cell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::{Arc, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use crate::broker::late::LateEnd;
use crate::broker::streams::{ClientStream, ReadAhead};
use crate::broker::{Accepting, Broker, BrokerError, ExecAsk, ExecView, Scope};
use crate::model::exec::ExecRecord;
use crate::model::id::{ExecId, LeaseId, RunId};
use crate::model::lease::LeaseRecord;
use crate::model::moment::timestamp_text;
use crate::policy::environment::{Given, Origin};
use crate::profile::NetworkMode;
use crate::relay::connection::Connection;
use crate::relay::frames::Kind;
use crate::run::caller::{Caller, Client};
use crate::run::ledger::Ledger;
use crate::run::mailbox::{Mail, Mailbox};
use crate::run::{self, AskedOfRun, Outcome, RunError};
use crate::store::ExecFilter;

/// Of one run at once.
const MOST_OF_A_RUN: usize = 1024;
/// How many execs are listed: the newest.
const MOST_LISTED: u32 = 10_000;

/// A living exec, as other threads reach it.
#[derive(Debug)]
pub(super) struct LiveExec {
    pub run_id: RunId,
    pub leases: Vec<LeaseId>,
    pub mailbox: Mailbox,
}

impl Broker {
    /// Begins an exec on a thread of its own. Does not wait for anything.
    ///
    /// # Errors
    /// Where there is no such run, no thread, or too much of it already. All else comes through
    /// [`Accepting::accepted`].
    pub fn exec(
        self: &Arc<Self>,
        run_id: &RunId,
        exec_id: ExecId,
        ask: ExecAsk,
        client: ClientStream,
    ) -> Result<Accepting, BrokerError> {
        self.refuse_while_draining()?;
        if ask.command.is_empty() {
            return Err(BrokerError::Malformed { message: "there is no command".to_owned() });
        }
        let run = self.run_to_decide(run_id)?;
        let mailbox = Mailbox::new().map_err(BrokerError::Thread)?;
        let live = LiveExec {
            run_id: run_id.clone(),
            leases: ask.lease_ids.clone(),
            mailbox: mailbox.clone(),
        };
        {
            // Known before it takes a use, so that no revocation can miss it.
            let mut execs = self.live();
            let of_run = execs.values().filter(|live| live.run_id == *run_id).count();
            if of_run >= MOST_OF_A_RUN {
                return Err(BrokerError::TooManyExecs { live: of_run });
            }
            execs.insert(exec_id.clone(), live);
        }
        let (tell, accepted) = oneshot::channel();
        let read_ahead = ReadAhead::to(mailbox.clone());
        let task = Task {
            broker: Arc::clone(self),
            run,
            exec_id: exec_id.clone(),
            ask,
            mailbox,
            tell,
            client,
        };
        if let Err(e) = self.threads.spawn(move || task.perform()) {
            self.live().remove(&exec_id);
            return Err(BrokerError::Thread(e));
        }
        Ok(Accepting { accepted, read_ahead })
    }

    pub fn execs(&self, scope: &Scope) -> Result<Vec<ExecView>, BrokerError> {
        let run = match scope {
            Scope::Run(id) => Some(id.clone()),
            Scope::Host => None,
        };
        let filter = ExecFilter { run, limit: Some(MOST_LISTED), ..ExecFilter::default() };
        let found = self.store.read(|view| view.execs_that(&filter))?;
        Ok(found.into_iter().map(view).collect())
    }

    pub fn exec_of(&self, scope: &Scope, id: &ExecId) -> Result<ExecView, BrokerError> {
        let found = self.store.read(|view| view.exec(id))?.filter(|exec| match scope {
            Scope::Run(run) => exec.run_id == *run,
            Scope::Host => true,
        });
        found.map(view).ok_or_else(|| BrokerError::NotFound { what: format!("exec {id}") })
    }

    /// As it is recorded, or was when it was looked at before.
    fn seen_lease(&self, scope: &Scope, id: &LeaseId) -> Result<LeaseRecord, BrokerError> {
        let seen = self.seen.lease(id).filter(|lease| *scope == Scope::Run(lease.run_id.clone()));
        seen.map_or_else(|| self.record(scope, id).inspect(|record| self.seen.remember(record)), Ok)
    }

    pub(super) fn live(&self) -> MutexGuard<'_, BTreeMap<ExecId, LiveExec>> {
        self.execs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells every living exec that fits.
    pub(super) fn mail_execs(&self, fits: impl Fn(&LiveExec) -> bool, mail: Mail) {
        for (id, live) in self.live().iter().filter(|(_, live)| fits(live)) {
            if let Err(e) = live.mailbox.send(mail.clone()) {
                // Its thread sees the launcher's wiping at expiry; this is a descriptor that failed.
                tracing::error!(exec_id = %id, error = %e, "could not reach a living exec");
            }
        }
    }
}

/// One exec on its thread.
struct Task {
    broker: Arc<Broker>,
    run: crate::model::run::Run,
    exec_id: ExecId,
    ask: ExecAsk,
    mailbox: Mailbox,
    tell: oneshot::Sender<Result<(), BrokerError>>,
    client: ClientStream,
}

impl Task {
    fn perform(self) {
        let Task { broker, run, exec_id, mut ask, mailbox, tell, client } = self;
        let span = tracing::info_span!("exec", run_id = %run.run_id, exec_id = %exec_id);
        let _entered = span.enter();
        broker.metrics.exec_began();
        // Taken by whoever answers first: the grant, or the failure before it.
        let tell = Rc::new(Cell::new(Some(tell)));
        let ClientStream { socket, greeting, taken } = client;
        let accept = {
            let tell = Rc::clone(&tell);
            move |connection: &mut Connection| {
                taken();
                connection.greet(&greeting);
                answer(&tell, Ok(()));
            }
        };
        let process = ask.caller.take();
        let mut caller =
            Caller::Client(Client::new(accept, Connection::new(socket), process, mailbox));
        let (of_run, leases) = (run.clone(), ask.lease_ids.clone());
        let told = tell_story(&broker, run, &exec_id, ask, &mut caller);
        if let Ok(outcome) = &told
            && let Some(error) = &outcome.unrecorded
        {
            tracing::error!(%error, "the end of an exec could not be recorded yet");
            broker.keep_end(LateEnd::of(of_run, exec_id.clone(), leases.clone(), outcome));
        }
        broker.live().remove(&exec_id);
        let outcome = match &told {
            Ok(outcome) => outcome.word,
            Err(BrokerError::Run(RunError::LauncherDied | RunError::Relay(_))) => "interrupted",
            Err(_) => "not_started",
        };
        broker.metrics.exec_ended(outcome);
        let (kind, last) = match told {
            Ok(outcome) => {
                broker.metrics.stages(&outcome.report.timings_us);
                (Kind::Exit, serde_json::to_vec(&outcome.report).unwrap_or_default())
            }
            Err(e) => {
                broker.seen.forget(&leases);
                if let BrokerError::Run(RunError::Denied(denial)) = &e {
                    broker.metrics.denied(denial.reason);
                }
                let body = serde_json::json!({ "error": {
                    "stage": e.stage(),
                    "reason": e.reason(),
                    "message": e.message(),
                    "hint": e.hint(),
                    "exit_status": e.exit_status(),
                }});
                answer(&tell, Err(e));
                (Kind::Error, body.to_string().into_bytes())
            }
        };
        if let Err(e) = caller.finish(kind, &last) {
            tracing::debug!(error = %e, "the client did not take the end of its exec");
        }
    }
}

type Tell = Cell<Option<oneshot::Sender<Result<(), BrokerError>>>>;

fn answer(tell: &Tell, with: Result<(), BrokerError>) {
    if let Some(tell) = tell.take() {
        // A client that left does not wait for it.
        drop(tell.send(with));
    }
}

fn tell_story(
    broker: &Broker,
    run: crate::model::run::Run,
    exec_id: &ExecId,
    ask: ExecAsk,
    caller: &mut Caller,
) -> Result<Outcome, BrokerError> {
    // On this thread, which may wait for the disk.
    broker.tell_late_revocations()?;
    let scope = Scope::Run(run.run_id.clone());
    let leases: Result<Vec<_>, _> =
        ask.lease_ids.iter().map(|id| broker.seen_lease(&scope, id)).collect();
    let session = broker.door.open().map_err(RunError::from)?;
    let asked = AskedOfRun {
        run,
        exec_id: exec_id.clone(),
        leases: leases?,
        reason: ask.reason,
        environment: ask
            .environment
            .into_iter()
            .map(|(name, value)| Given { name, value, origin: Origin::Request })
            .collect(),
        timeout: ask.timeout,
        terminal: ask.terminal,
        network: ask.without_network.then_some(NetworkMode::None),
        command: ask.command,
        into: ask.into,
    };
    // It builds while the request is made whole and decided.
    if let Some(ahead) = asked.ahead(&broker.host) {
        session.order(&ahead).map_err(RunError::from)?;
    }
    let ledger = Ledger::shared(Arc::clone(&broker.store), Arc::clone(&broker.shared));
    let told = run::run_held(&broker.host, asked, &session, caller, ledger);
    if told.is_err() {
        // Whatever stands of it: who takes back its leases, and its client, may keep the session open for a while.
        session.end();
    }
    Ok(told?)
}

fn view(exec: ExecRecord) -> ExecView {
    ExecView {
        exec_id: exec.exec_id,
        run_id: exec.run_id,
        lease_ids: exec.lease_ids,
        command: exec.command,
        state: exec.state,
        exit_status: exec.exit_status,
        started_at: timestamp_text(exec.started_at),
    }
}
