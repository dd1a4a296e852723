//! The trail as it grows: one event a line.
//!
//! The reader pulls: a page is read when the one before is written, so a slow reader lags and holds no
//! more than one page.
#![forbid(unsafe_code)]

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderValue, Response};
use hyper::body::Frame;
use serde::Deserialize;
use tokio::sync::watch;

use crate::api::server::ask::{Answer, Query};
use crate::api::server::connection::Asker;
use crate::api::server::refusal::Refusal;
use crate::api::server::routes::Shared;

/// Events in one page. An event is at most about 16 KiB.
const PAGE: usize = 64;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Since {
    /// Events after this one.
    #[serde(default)]
    since: u64,
    /// Whether to wait for more.
    #[serde(default)]
    follow: bool,
}

pub(super) async fn stream(
    State(app): State<Shared>,
    asker: Asker,
    Query(Since { since, follow }): Query<Since>,
) -> Answer {
    let stopped = app.stopped.clone();
    let mut tail = Tail { trail: app.broker.trail(), app, asker, at: since, follow, stopped };
    // The first page here: what goes wrong with it is still an answer of its own.
    let first = tail.page().await?;
    let mut response = Response::new(Body::new(Lines { ready: first, next: Some(next(tail)) }));
    let ndjson = HeaderValue::from_static("application/x-ndjson");
    response.headers_mut().insert(CONTENT_TYPE, ndjson);
    Ok(response)
}

/// Where a reader is.
struct Tail {
    app: Shared,
    asker: Asker,
    trail: watch::Receiver<u64>,
    at: u64,
    follow: bool,
    stopped: watch::Receiver<()>,
}

impl Tail {
    async fn page(&mut self) -> Result<Bytes, Refusal> {
        // Seen before the store is read: what is committed after it wakes us.
        self.trail.borrow_and_update();
        let (broker, at) = (Arc::clone(&self.app.broker), self.at);
        let events = self.asker.blocking(move || broker.events_since(at, PAGE)).await??;
        let mut lines = Vec::new();
        for (seq, event) in events {
            self.at = seq;
            lines.extend_from_slice(event.as_bytes());
            lines.push(b'\n');
        }
        Ok(lines.into())
    }

    /// The next lines; `None` at the end, which a follower reaches when the service stops.
    async fn lines(&mut self) -> Result<Option<Bytes>, Refusal> {
        loop {
            let page = self.page().await?;
            if !page.is_empty() {
                return Ok(Some(page));
            }
            if !self.follow {
                return Ok(None);
            }
            tokio::select! {
                biased;
                _ = self.stopped.changed() => return Ok(None),
                changed = self.trail.changed() => if changed.is_err() { return Ok(None) },
            }
        }
    }
}

type Next = Pin<Box<dyn Future<Output = (Tail, Result<Option<Bytes>, Refusal>)> + Send>>;

fn next(mut tail: Tail) -> Next {
    Box::pin(async move {
        let lines = tail.lines().await;
        (tail, lines)
    })
}

struct Lines {
    ready: Bytes,
    next: Option<Next>,
}

impl HttpBody for Lines {
    type Data = Bytes;
    type Error = Refusal;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Refusal>>> {
        if !self.ready.is_empty() {
            return Poll::Ready(Some(Ok(Frame::data(std::mem::take(&mut self.ready)))));
        }
        let Some(pending) = &mut self.next else { return Poll::Ready(None) };
        let (tail, lines) = ready!(pending.as_mut().poll(cx));
        self.next = None;
        Poll::Ready(match lines {
            Ok(Some(lines)) => {
                self.next = Some(next(tail));
                Some(Ok(Frame::data(lines)))
            }
            Ok(None) => None,
            // The connection breaks: a reader sees that this is not the trail's end.
            Err(refusal) => Some(Err(refusal)),
        })
    }
}
