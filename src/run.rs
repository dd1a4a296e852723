//! The story of one exec, told once: request, decide, record, deliver, launch, wait, scrub.
//!
//! The only file that knows every stage. It calls them in order and does no work itself; each stage's
//! type is made only by the stage before. Nothing here is undone by hand: whatever stops the story drops
//! the launcher, and with it the exec, its deliveries and its mounts.
#![forbid(unsafe_code)]

mod attend;
mod deliver;
mod error;
mod explained;
mod ledger;
mod scene;
mod value;

use crate::launcher::client::Launcher;
use crate::launcher::wire::Order;
use crate::model::report::{Report, Timings};
use crate::sys::{memory, process};

pub use error::RunError;
pub use explained::{Explained, LeaseVerdict, explain};
pub use scene::Asked;

/// What became of it.
pub struct Outcome {
    pub report: Report,
    /// The command's own status, 128 and its signal, or 124 for a timeout.
    pub exit_status: u8,
}

/// Runs one command under zero or more leases, and returns when nothing of it is left.
///
/// # Errors
/// Before the command ran: then nothing of it did. After: if the launcher died under it, or the trail
/// could not be closed; the tree is dead and the deliveries are wiped then too.
pub fn run(asked: Asked) -> Result<Outcome, RunError> {
    let mut watch = Stopwatch::start();
    process::adopt_orphans().map_err(RunError::settle)?;
    let signals = attend::take_signals()?;
    // Before anything secret is loaded: the launcher must never have held it.
    let launcher = Launcher::fork(&asked.places)?;
    memory::set_dumpable(false).map_err(RunError::Settle)?;
    memory::forbid_core_dumps().map_err(RunError::Settle)?;

    let scene = scene::set(asked)?;
    // The launcher builds the sandbox while the broker decides and records.
    launcher.order(&Order::Prepare(Box::new(scene.prepare())))?;
    scene.host.become_state_owner_beside_launcher()?;
    watch.lap(|t| &mut t.request);

    let mut ledger = ledger::Ledger::open(&scene)?;
    scene.refuse_managed_values(&ledger)?;
    watch.lap(|t| &mut t.decide);

    // Decided and durable before any value moves: granted, and the use taken.
    let leased = ledger.grant(&scene)?;
    ledger.keep_head(&launcher)?;
    watch.lap(|t| &mut t.record);

    let prepared = deliver::prepared(&launcher).map_err(|e| ledger.abandon(&scene, &leased, e))?;
    let values = deliver::resolve(&scene, &ledger, &launcher, &signals, &leased)
        .map_err(|e| ledger.abandon(&scene, &leased, e))?;
    watch.lap(|t| &mut t.resolve);

    let delivered =
        deliver::fill(prepared, &leased, values).map_err(|e| ledger.abandon(&scene, &leased, e))?;
    launcher.order(&delivered.start(&scene, &leased))?;
    watch.lap(|t| &mut t.deliver);

    ledger.tidy();
    let mut exited =
        attend::attend(&scene, &mut ledger, &launcher, &leased, delivered, signals, &mut watch)
            .map_err(|e| ledger.abandon(&scene, &leased, e))?;
    watch.lap(|t| &mut t.run);

    // The kernel takes the namespaces down meanwhile.
    ledger.close(&scene, &leased, &exited)?;
    ledger.keep_head(&launcher)?;
    exited.wait_until_gone(&scene, &launcher)?;
    watch.lap(|t| &mut t.scrub);
    Ok(exited.outcome(&scene, &leased, watch.timings))
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
