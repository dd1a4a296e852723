//! A listener's accept loop: who connects, whether they may, one task for each.
#![forbid(unsafe_code)]

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

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
    let mut pace = Pace::new(entry.door.bounds.connections_a_second);
    loop {
        if let Some(rest) = pace.rest() {
            tokio::select! {
                biased;
                _ = closing.changed() => return,
                () = tokio::time::sleep(rest) => {}
            }
        }
        let accepted = tokio::select! {
            biased;
            _ = closing.changed() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, _)) => {
                pause = FIRST_PAUSE;
                pace.count();
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

/// How fast connections are taken: clients that connect without end wait in the queue of their own socket
/// (listen(2)), and cost the others' server nothing meanwhile.
struct Pace {
    most: u32,
    since: Instant,
    taken: u32,
}

impl Pace {
    const WINDOW: Duration = Duration::from_millis(100);

    fn new(a_second: u32) -> Self {
        Self { most: (a_second / 10).max(1), since: Instant::now(), taken: 0 }
    }

    fn count(&mut self) {
        if self.since.elapsed() >= Self::WINDOW {
            (self.since, self.taken) = (Instant::now(), 0);
        }
        self.taken += 1;
    }

    /// How long to wait before the next one.
    fn rest(&self) -> Option<Duration> {
        let rest = Self::WINDOW.saturating_sub(self.since.elapsed());
        (self.taken >= self.most && !rest.is_zero()).then_some(rest)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_connections_waits_and_a_few_do_not() {
        let mut pace = Pace::new(50);
        for _ in 0..5 {
            assert_eq!(pace.rest(), None);
            pace.count();
        }
        let rest = pace.rest().expect("the sixth of a tenth of a second waits");
        assert!(rest <= Pace::WINDOW);
        std::thread::sleep(rest);
        assert_eq!(pace.rest(), None, "a new window");
        pace.count();
        assert_eq!((pace.taken, pace.rest()), (1, None));
    }
}
