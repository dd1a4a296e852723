//! Answers HTTP/1.1 on the control socket and on every run's socket.
//!
//! Receives listeners; asks the [`Broker`]; returns JSON. Runs on a current-thread runtime: whatever
//! blocks goes to the blocking pool, under a bound of its socket's own. What one run's clients do is
//! bounded by that run's [`door`], so that they cost other runs no more than their share of the CPU.
//! Nothing here may panic on input: the release is built with `panic = "abort"`.
//!
//! - [`bounds`]: how much a client may send, hold and wait
//! - [`door`]: one socket's share: who comes in, how many at once
//! - `accept`: the accept loops; `connection`: one connection, from accept to close; `line`: its clocks;
//!   `socket`: what it is read from and written to
//! - [`routes`]: every path; `ask`: parsing what is asked; [`refusal`]: every answer that is no success
//! - `runs`, `leases`, `execs`, `events`, `service`: the handlers
//! - [`logs`]: where traces go
#![forbid(unsafe_code)]

mod accept;
mod ask;
pub mod bounds;
mod connection;
pub mod door;
mod events;
mod execs;
mod leases;
mod line;
pub mod logs;
pub mod refusal;
pub mod routes;
mod runs;
mod service;
mod socket;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};

use crate::api::server::accept::Entry;
use crate::api::server::bounds::Bounds;
use crate::api::server::door::Door;
use crate::api::server::routes::App;
use crate::broker::listeners::{Change, Changes};
use crate::broker::metrics::Metrics;
use crate::broker::{Broker, Scope};
use crate::model::id::RunId;

pub use logs::init_tracing;

/// How long answers under way may take once the server is told to stop.
const GRACE: Duration = Duration::from_secs(5);

/// What a server is made of.
pub struct Server {
    pub broker: Arc<Broker>,
    /// Bound and listening. Who may open it is its file's mode's business.
    pub control: UnixListener,
    /// The runs' sockets, from `broker::listeners::listeners`.
    pub changes: Changes,
    /// The same that the broker shows in `Broker::metrics`.
    pub metrics: Arc<Metrics>,
    pub agent_bounds: Bounds,
    pub control_bounds: Bounds,
}

impl Server {
    /// With the bounds of the documentation.
    pub fn new(
        broker: Arc<Broker>,
        control: UnixListener,
        changes: Changes,
        metrics: Arc<Metrics>,
    ) -> Self {
        let (agent_bounds, control_bounds) = (Bounds::agent(), Bounds::control());
        Self { broker, control, changes, metrics, agent_bounds, control_bounds }
    }
}

/// The server could not begin.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error("could not listen on the control socket")]
    Control(#[source] io::Error),
}

/// Serves until `stop` is ready; then closes every listener and idle connection, ends followed event
/// streams, and gives answers under way five seconds. Must be called in a tokio runtime with I/O and time.
///
/// # Errors
/// [`ServeError`], before anything is served.
pub async fn serve(server: Server, stop: impl Future<Output = ()>) -> Result<(), ServeError> {
    let Server { broker, control, mut changes, metrics, agent_bounds, control_bounds } = server;
    let (stopping, stopped) = watch::channel(());
    // Every task of a connection holds one end: when none is left, all answers are out.
    let (alive, mut all_gone) = mpsc::channel::<Infallible>(1);
    let app = Arc::new(App { broker: broker.clone(), stopped });

    let control = listening(control).map_err(ServeError::Control)?;
    let door = Arc::new(Door::new(Scope::Host, control_bounds));
    let router = routes::control(app.clone());
    let entry = Entry { door, router, metrics: metrics.clone(), admits: Box::new(|_| true) };
    let (control_open, closing) = watch::channel(());
    tokio::spawn(accept::run(control, entry, closing, alive.clone()));

    let agent_router = routes::agent(app);
    // Dropping a run's sender closes its door.
    let mut runs: HashMap<RunId, watch::Sender<()>> = HashMap::new();
    tokio::pin!(stop);
    loop {
        let change = tokio::select! {
            () = &mut stop => break,
            change = changes.next() => change,
        };
        match change {
            Some(Change::Add(run, listener)) => match listening(listener) {
                Ok(listener) => {
                    let (open, closing) = watch::channel(());
                    let entry = Entry {
                        door: Arc::new(Door::new(Scope::Run(run.clone()), agent_bounds)),
                        router: agent_router.clone(),
                        metrics: metrics.clone(),
                        admits: admitting(broker.clone(), run.clone()),
                    };
                    tokio::spawn(accept::run(listener, entry, closing, alive.clone()));
                    drop(runs.insert(run, open));
                }
                Err(error) => tracing::error!(%run, %error, "could not listen on a run's socket"),
            },
            Some(Change::Remove(run)) => drop(runs.remove(&run)),
            // Nobody is left who could add a run; those that are there go on.
            None => {
                stop.as_mut().await;
                break;
            }
        }
    }
    drop((stopping, control_open, runs, alive));
    if tokio::time::timeout(GRACE, all_gone.recv()).await.is_err() {
        tracing::warn!("connections were cut: their answers were not taken in time");
    }
    Ok(())
}

fn listening(listener: UnixListener) -> io::Result<tokio::net::UnixListener> {
    listener.set_nonblocking(true)?;
    tokio::net::UnixListener::from_std(listener)
}

fn admitting(broker: Arc<Broker>, run: RunId) -> accept::Admits {
    Box::new(move |peer| broker.may_speak(&run, peer.uid))
}
