//! The story of one exec, told once: request, decide, record, deliver, launch, wait, scrub.
//!
//! The only file that knows every stage. It calls them in order and does no work itself; each stage's
//! type is made only by the stage before. Nothing here is undone by hand: whatever stops the story drops
//! the launcher, and with it the exec, its deliveries and its mounts.
#![forbid(unsafe_code)]

mod attend;
pub mod caller;
mod deliver;
pub mod entries;
mod error;
mod explained;
pub mod identity;
pub mod ledger;
pub mod mailbox;
pub mod mint;
mod printed;
mod scene;
mod sources;
mod ssh;
mod value;

use std::sync::Arc;

use crate::host::{Host, Trust};
use crate::launcher::client::{Launcher, Session, Unsettled};
use crate::launcher::wire::Order;
use crate::model::id::ExecId;
use crate::model::report::{Report, Timings};
use crate::sys::{memory, process, slice};

pub use error::RunError;
pub use explained::{Explained, LeaseVerdict, explain};
pub use scene::{Asked, AskedOfRun};

use caller::Caller;
use entries::Leased;
use ledger::Ledger;
use scene::Scene;

/// What became of it.
pub struct Outcome {
    pub report: Report,
    /// The command's own status, 128 and its signal, or 124 for a timeout.
    pub exit_status: u8,
    /// How it ended, as the trail has it: `exited`, `killed`, `timed_out`, `expired`, `revoked`.
    pub word: &'static str,
    /// Why its end is not in the trail, where it is not yet: the trail cannot be written.
    pub unrecorded: Option<RunError>,
}

/// What is begun before it is known what is asked for.
pub struct Begun {
    exec_id: ExecId,
    caller: Caller,
    launcher: Unsettled,
    watch: Stopwatch,
}

/// Takes the signals over and forks the launcher: before the command line is parsed, which takes as long as
/// the launcher takes to settle, and long before anything secret is loaded, which it must never have held.
///
/// # Errors
/// Nothing was begun.
pub fn begin() -> Result<Begun, RunError> {
    let watch = Stopwatch::start();
    process::adopt_orphans().map_err(RunError::settle)?;
    let caller = Caller::process()?;
    let exec_id = ExecId::fresh();
    let launcher = Launcher::begin(Trust::Invoker, Some(&exec_id))?;
    // Only speed hangs on it: what the launcher starts is not to wait for what is done meanwhile.
    slice::shorten();
    Ok(Begun { exec_id, caller, launcher, watch })
}

/// Runs one command under zero or more leases, and returns when nothing of it is left: `sublet run`.
///
/// # Errors
/// Before the command ran: then nothing of it did. After: if the launcher died under it, its output could not be
/// relayed, or the trail could not be closed; the tree is dead and the deliveries are wiped then too.
pub fn run(begun: Begun, asked: Asked) -> Result<Outcome, RunError> {
    let Begun { exec_id, mut caller, launcher, mut watch } = begun;
    let launcher = launcher.settle(&asked.places)?;
    memory::set_dumpable(false).map_err(RunError::Settle)?;
    memory::forbid_core_dumps().map_err(RunError::Settle)?;
    let scene = scene::set(asked, exec_id, launcher.root())?;
    let ledger = || {
        let keys = ledger::open_keys(&scene.host)?;
        // The state may be a broker's: the launcher keeps what only root can do.
        scene.host.become_state_owner_beside_launcher()?;
        Ledger::open(&scene, keys)
    };
    tell(&scene, launcher.root(), &mut caller, ledger, &mut watch)
}

/// Runs one command of a run of the broker, under leases that were granted before. Returns, as
/// [`run`] does, when nothing of it is left.
///
/// # Errors
/// As [`run`].
pub fn run_held(
    host: &Arc<Host>,
    asked: AskedOfRun,
    session: &Session,
    caller: &mut Caller,
    ledger: Ledger,
) -> Result<Outcome, RunError> {
    let mut watch = Stopwatch::start();
    let scene = scene::of_run(host, asked, session)?;
    tell(&scene, session, caller, || Ok(ledger), &mut watch)
}

/// The story itself.
fn tell(
    scene: &Scene,
    session: &Session,
    caller: &mut Caller,
    ledger: impl FnOnce() -> Result<Ledger, RunError>,
    watch: &mut Stopwatch,
) -> Result<Outcome, RunError> {
    // The launcher builds the sandbox while the broker decides and records.
    session.order(&Order::Prepare(Box::new(scene.prepare())))?;
    watch.lap(|t| &mut t.request);

    let mut ledger = ledger()?;
    watch.lap(|t| &mut t.decide);

    // Decided and durable before any value moves: granted, and the use taken.
    let leased = ledger.grant(scene)?;
    let kept = ledger.keep_head(session);
    watch.lap(|t| &mut t.record);

    let told = perform(scene, session, caller, &mut ledger, leased, kept, watch);
    // Whatever became of it: what was minted for it ends with it.
    mint::end_all(&mut ledger, scene, session);
    if scene.is_one_shot() {
        ledger.leave_open();
    }
    told
}

/// From the grant to the scrub.
fn perform(
    scene: &Scene,
    session: &Session,
    caller: &mut Caller,
    ledger: &mut Ledger,
    mut leased: Vec<Leased>,
    kept: Result<(), RunError>,
    watch: &mut Stopwatch,
) -> Result<Outcome, RunError> {
    // What is at hand is fetched and delivered while the launcher builds; what is made for this exec, once it
    // can begin: its client hears before that, since it may take long.
    let is_at_hand = value::is_at_hand(&leased);
    if !is_at_hand {
        caller.accepted();
    }
    let early = is_at_hand.then(|| deliver::resolve(ledger, scene, session, caller, &mut leased));
    // A launcher that could not prepare has said why; one that is gone keeps no head either.
    let prepared = deliver::prepared(session).and_then(|prepared| kept.map(|()| prepared));
    let prepared = prepared.map_err(|e| ledger.abandon(scene, caller, &leased, e))?;
    let values = match early {
        Some(early) => early,
        None => deliver::stands(session, caller)
            .and_then(|()| deliver::resolve(ledger, scene, session, caller, &mut leased)),
    }
    .map_err(|e| ledger.abandon(scene, caller, &leased, e))?;
    watch.lap(|t| &mut t.resolve);

    let delivered = deliver::fill(prepared, &leased, values)
        .map_err(|e| ledger.abandon(scene, caller, &leased, e))?;
    caller
        .guard(session, &leased, &delivered)
        .map_err(|e| ledger.abandon(scene, caller, &leased, e))?;
    // Nothing begins for a client that is gone.
    caller.refuse_if_gone().map_err(|e| ledger.abandon(scene, caller, &leased, e))?;
    session.order(&delivered.start(scene, &leased))?;
    caller.accepted();
    watch.lap(|t| &mut t.deliver);

    ledger.tidy();
    mint::look_for_others(ledger, scene);
    let attended = attend::attend(scene, ledger, session, caller, &mut leased, delivered, watch);
    let mut exited = attended.map_err(|early| ledger.stop(scene, caller, &leased, *early))?;
    exited.note_revoked(|id| caller.is_revoked(id), &leased);
    watch.lap(|t| &mut t.run);

    // The kernel takes the namespaces down meanwhile.
    let recorded = ledger.close(scene, &leased, &exited).and_then(|()| ledger.keep_head(session));
    exited.wait_until_gone(scene, session)?;
    watch.lap(|t| &mut t.scrub);
    let outcome = exited.outcome(scene, &leased, std::mem::take(&mut watch.timings));
    Ok(Outcome { unrecorded: recorded.err(), ..outcome })
}

/// Wall time between laps, in the report's own words.
pub(crate) struct Stopwatch {
    last: std::time::Instant,
    timings: Timings,
}

impl Stopwatch {
    fn start() -> Self {
        Self { last: std::time::Instant::now(), timings: Timings::default() }
    }

    fn lap(&mut self, stage: impl FnOnce(&mut Timings) -> &mut u64) {
        let now = std::time::Instant::now();
        *stage(&mut self.timings) += (now - self.last).as_micros() as u64;
        self.last = now;
    }
}
