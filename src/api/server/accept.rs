//! A listener's accept loop: who connects, whether they may, one task for each.
#![forbid(unsafe_code)]

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, watch};

use crate::api::peer::Peer;
use crate::api::server::connection::{Caller, serve, turn_away};
use crate::api::server::door::Door;
use crate::api::server::refusal::Refusal;
use crate::broker::metrics::Metrics;

/// Whether this peer may speak here. Does not block.
pub(super) type Admits = Box<dyn Fn(&Peer) -> bool + Send + Sync>;

/// What a listener leads to.
pub(super) struct Entry {
    pub(super) door: Arc<Door>,
    pub(super) router: Router,
    pub(super) metrics: Arc<Metrics>,
    pub(super) admits: Admits,
}

const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Accepts until `closing` changes. Every task that this starts holds a clone of `alive`.
pub(super) async fn run(
    listener: UnixListener,
    entry: Entry,
    mut closing: watch::Receiver<()>,
    alive: mpsc::Sender<Infallible>,
) {
    let mut pause = FIRST_PAUSE;
    loop {
        let accepted = tokio::select! {
            biased;
            _ = closing.changed() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, _)) => {
                pause = FIRST_PAUSE;
                admit(stream, &entry, &closing, &alive);
            }
            Err(error) => {
                // No descriptor or no memory left: the connection stays in the queue, and asking for it
                // again at once would do nothing else.
                tracing::warn!(socket = entry.door.socket(), %error, "could not accept");
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
        }
    }
}

fn admit(
    stream: UnixStream,
    entry: &Entry,
    closing: &watch::Receiver<()>,
    alive: &mpsc::Sender<Infallible>,
) {
    let door = &entry.door;
    let peer = match Peer::of(&stream) {
        Ok(peer) => peer,
        Err(error) => {
            tracing::debug!(%error, "a connection without a peer");
            return;
        }
    };
    let refusal = if !(entry.admits)(&peer) {
        Refusal::peer_not_permitted(peer.uid)
    } else if let Ok(place) = door.connections.clone().try_acquire_owned() {
        let (router, metrics) = (entry.router.clone(), entry.metrics.clone());
        let caller = Caller { door: door.clone(), peer, router, metrics };
        let (closing, alive) = (closing.clone(), alive.clone());
        tokio::spawn(async move {
            serve(stream, caller, closing).await;
            drop((place, alive));
        });
        return;
    } else {
        Refusal::too_many_connections(door.bounds.connections)
    };
    entry.metrics.answered(door.socket(), refusal.status.as_u16());
    // Hostile clients may make these at will: never louder than this.
    tracing::debug!(socket = door.socket(), run_id = door.run(), %refusal, "turned away");
    match door.turned_away.clone().try_acquire_owned() {
        Ok(place) => {
            tokio::spawn(async move {
                turn_away(stream, &refusal).await;
                drop(place);
            });
        }
        // Nobody waits for its reader; the socket's buffer is empty and takes it.
        Err(_) => drop(stream.try_write(&refusal.bytes())),
    }
}
