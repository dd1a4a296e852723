//! One socket's share of the server: who comes in there, and how many at once.
//!
//! Every run has a door of its own. Nothing that is behind one door waits for anything behind another.
#![forbid(unsafe_code)]

use std::sync::Arc;

use tokio::sync::Semaphore;

use crate::api::server::bounds::Bounds;
use crate::broker::Scope;

/// Connections that were turned away and are still given time to read why.
const TURNED_AWAY: usize = 8;

#[derive(Debug)]
pub struct Door {
    pub scope: Scope,
    pub bounds: Bounds,
    pub(super) connections: Arc<Semaphore>,
    pub(super) turned_away: Arc<Semaphore>,
    pub(super) in_flight: Arc<Semaphore>,
    /// Held by the blocking work itself: a client that goes away frees nothing.
    pub(super) blocking: Arc<Semaphore>,
    /// Large bodies are parsed one at a time.
    pub(super) large: Arc<Semaphore>,
}

impl Door {
    pub fn new(scope: Scope, bounds: Bounds) -> Self {
        let semaphore = |permits| Arc::new(Semaphore::new(permits));
        Self {
            scope,
            connections: semaphore(bounds.connections),
            turned_away: semaphore(TURNED_AWAY),
            in_flight: semaphore(bounds.in_flight),
            blocking: semaphore(bounds.blocking),
            large: semaphore(1),
            bounds,
        }
    }

    /// For metrics and traces.
    pub fn socket(&self) -> &'static str {
        match self.scope {
            Scope::Run(_) => "agent",
            Scope::Host => "control",
        }
    }

    /// For traces.
    pub fn run(&self) -> Option<&str> {
        match &self.scope {
            Scope::Run(run) => Some(run.as_str()),
            Scope::Host => None,
        }
    }
}
