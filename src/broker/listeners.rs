//! How a run's socket reaches the server: the broker binds it and gives the listener here; the server
//! takes it and answers on it until it is removed.
//!
//! Callable from every thread. Does no I/O, and never waits for the server.
#![forbid(unsafe_code)]

use std::os::unix::net::UnixListener;

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use crate::model::id::RunId;

/// A run's socket begins or ends to be served.
#[derive(Debug)]
pub enum Change {
    Add(RunId, UnixListener),
    Remove(RunId),
}

/// The broker's end.
#[derive(Debug, Clone)]
pub struct Listeners(UnboundedSender<Change>);

/// The server's end.
#[derive(Debug)]
pub struct Changes(UnboundedReceiver<Change>);

/// Nobody answers on sockets any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the server has ended, so the run's socket would be answered by nobody")]
pub struct ServerGone;

/// Both ends. What is added before the server starts is served when it does.
pub fn listeners() -> (Listeners, Changes) {
    let (sender, receiver) = unbounded_channel();
    (Listeners(sender), Changes(receiver))
}

impl Listeners {
    /// Everything that comes in on this listener is the run's from now on. A listener that the run had
    /// before is closed.
    ///
    /// # Errors
    /// [`ServerGone`]; the listener is closed.
    pub fn add(&self, run: RunId, listener: UnixListener) -> Result<(), ServerGone> {
        self.0.send(Change::Add(run, listener)).map_err(|_| ServerGone)
    }

    /// Closes the run's listener and idle connections; requests in flight are still answered. A server
    /// that has ended has closed it already.
    pub fn remove(&self, run: &RunId) {
        drop(self.0.send(Change::Remove(run.clone())));
    }
}

impl Changes {
    /// `None` when no [`Listeners`] is left.
    pub async fn next(&mut self) -> Option<Change> {
        self.0.recv().await
    }
}
