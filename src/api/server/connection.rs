//! One connection, from accept to close: requests one after the other, or an upgrade that ends in the
//! broker's hands.
//!
//! Knows no route: that is the router's. A panic in a handler ends that request with 500 (where the
//! profile unwinds; the release aborts, which is why handlers may not panic).
#![forbid(unsafe_code)]

use std::any::Any;
use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes, HttpBody};
use axum::http::{Request, Response};
use axum::response::IntoResponse;
use hyper::body::{Frame, Incoming, SizeHint};
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::{OwnedSemaphorePermit, watch};
use tokio::time::{sleep, timeout};
use tracing::Instrument;

use crate::api::peer::Peer;
use crate::api::server::door::Door;
use crate::api::server::line::{Busy, Guarded, Line};
use crate::api::server::refusal::Refusal;
use crate::api::server::socket::{Gone, Socket};
use crate::broker::metrics::Metrics;

/// Bytes that hyper buffers in each direction.
const BUFFER: usize = 64 << 10;
/// How long a client is given to read the last answer, and how many of its bytes are thrown away meanwhile:
/// a Unix socket that closes with unread bytes fails the other side's writes before it reads.
const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES: usize = 4 << 20;

/// How long a request is answered before it is looked whether its client is still there: most take less.
const UNWATCHED: Duration = Duration::from_millis(50);

/// Whose connection it is, through which door.
pub(super) struct Caller {
    pub(super) door: Arc<Door>,
    pub(super) peer: Peer,
    pub(super) router: Router,
    pub(super) metrics: Arc<Metrics>,
}

/// What handlers learn of who asks: an extension of every request.
#[derive(Clone)]
pub(super) struct Asker {
    pub(super) caller: Arc<Caller>,
    pub(super) line: Arc<Line>,
    place: Arc<Mutex<Option<OwnedSemaphorePermit>>>,
}

impl Asker {
    /// This request no longer counts as in flight: what it waits for has a bound of its own.
    pub(super) fn leave_place(&self) {
        drop(self.place.lock().unwrap_or_else(PoisonError::into_inner).take());
    }
}

/// Serves until either side closes; `closing` changes when no further request is to be taken.
pub(super) async fn serve(stream: UnixStream, caller: Caller, mut closing: watch::Receiver<()>) {
    let caller = Arc::new(caller);
    let socket = Socket::new(stream);
    let line = Arc::new(Line::new(caller.door.bounds, socket.copied()));
    let service = {
        let (caller, line) = (caller.clone(), line.clone());
        service_fn(move |request: Request<Incoming>| {
            let busy = line.busy();
            let answering = answer(request, caller.clone(), line.clone(), busy);
            Box::pin(async move { Ok::<_, Infallible>(answering.await) })
        })
    };
    let mut connection = http1::Builder::new()
        // Who has said all is still answered; whether it has left is looked at below.
        .half_close(true)
        // Times are the line's.
        .header_read_timeout(None)
        .max_header_size(caller.door.bounds.head)
        .max_buf_size(BUFFER)
        .serve_connection(TokioIo::new(Guarded::new(socket, line.clone())), service);
    let mut patience = Box::pin(sleep(caller.door.bounds.head_time));
    let mut gone: Option<Gone> = None;
    let mut is_closing = false;
    let ended = loop {
        let speaking = poll_fn(|cx| {
            if let Poll::Ready(ended) = connection.poll_without_shutdown(cx) {
                return Poll::Ready(Ended::Spoken(ended));
            }
            // Asked after the connection was polled, which alone moves it.
            let (until, then) = match (line.deadline(), line.busy_since()) {
                (Some(deadline), _) => (deadline, Ended::Late),
                (None, Some(since)) if !line.is_taken() => (since + UNWATCHED, Ended::Left),
                (None, _) => return Poll::Pending,
            };
            if patience.deadline() != until {
                gone = None;
                patience.as_mut().reset(until);
            }
            if gone.is_none() {
                ready!(patience.as_mut().poll(cx));
            }
            if let Ended::Left = then {
                // One that cannot be watched is taken for gone.
                gone = gone.take().or_else(|| line.gone().ok());
                ready!(gone.as_ref().map_or(Poll::Ready(()), |gone| gone.poll(cx)));
            }
            Poll::Ready(then)
        });
        tokio::select! {
            ended = speaking => break ended,
            _ = closing.changed(), if !is_closing => {
                is_closing = true;
                Pin::new(&mut connection).graceful_shutdown();
            }
        }
    };
    drop(gone);
    let parts = connection.into_parts();
    let mut socket = parts.io.into_inner().into_socket();
    if line.is_taken() {
        // Watched here no more, before the exec reads from it.
        drop(socket);
        // Else the taker is dropped, and with it the exec.
        if let (Ended::Spoken(Ok(())), Some(taker)) = (ended, line.take_upgrade()) {
            taker.give(parts.read_buf.to_vec());
        }
        return;
    }
    if let Some(refusal) = refusal_of(&ended, &line, &caller.door) {
        caller.metrics.answered(caller.door.socket(), refusal.status.as_u16());
        tell(&mut socket, &refusal).await;
    }
    linger(socket).await;
}

/// How a connection came to its end.
enum Ended {
    Spoken(hyper::Result<()>),
    /// Nothing whole came in time.
    Late,
    /// The client has closed both directions while it was answered.
    Left,
}

/// What the client is still told, where hyper would say it without a body or not at all.
fn refusal_of(ended: &Ended, line: &Line, door: &Door) -> Option<Refusal> {
    match ended {
        Ended::Late => line.is_head_due().then(|| Refusal::too_slow("the request's head")),
        Ended::Spoken(Err(error)) if error.is_parse_too_large() => {
            Some(Refusal::head_too_large(door.bounds.head))
        }
        Ended::Spoken(Err(error)) if error.is_parse() => {
            Some(Refusal::malformed(format!("this is no HTTP/1.1: {error}")).closing())
        }
        // Done; or the client is gone, or does not read.
        Ended::Spoken(_) | Ended::Left => None,
    }
}

/// Turns a connection away before it speaks.
pub(super) async fn turn_away(mut stream: UnixStream, refusal: &Refusal) {
    tell(&mut stream, refusal).await;
    linger(stream).await;
}

async fn tell(stream: &mut (impl AsyncWrite + Unpin), refusal: &Refusal) {
    // That nobody reads it is not ours to mend: the connection closes either way.
    drop(timeout(LINGER, stream.write_all(&refusal.bytes())).await);
}

async fn linger(mut stream: impl AsyncRead + AsyncWrite + Unpin) {
    drop(stream.shutdown().await);
    let mut bytes = [0; 4096];
    let drained = async {
        let mut seen = 0;
        while let Ok(n @ 1..) = stream.read(&mut bytes).await {
            seen += n;
            if seen > LINGER_BYTES {
                break;
            }
        }
    };
    drop(timeout(LINGER, drained).await);
}

async fn answer(
    mut request: Request<Incoming>,
    caller: Arc<Caller>,
    line: Arc<Line>,
    busy: Busy,
) -> Response<Body> {
    let door = caller.door.clone();
    let span = tracing::info_span!(
        "request",
        socket = door.socket(),
        run_id = door.run(),
        method = %request.method(),
        // Its path may hold anything: shown with escapes.
        path = ?shortened(request.uri().path()),
        lease_id = tracing::field::Empty,
        exec_id = tracing::field::Empty,
        status = tracing::field::Empty,
    );
    let answering = async {
        // One request a turn: a client that sends many at once does not hold up the others.
        tokio::task::yield_now().await;
        let Ok(place) =
            timeout(door.bounds.queue_time, door.in_flight.clone().acquire_owned()).await
        else {
            return Refusal::too_many_requests(door.bounds.in_flight).into_response();
        };
        let place = Arc::new(Mutex::new(place.ok()));
        let asker = Asker { caller: caller.clone(), line, place: place.clone() };
        request.extensions_mut().insert(asker);
        let answer =
            Caught::new(TowerToHyperService::new(caller.router.clone()).call(request)).await;
        // A handler that has no use for its request lets go of it early.
        drop(place);
        match answer {
            Ok(Ok(response)) => response,
            Ok(Err(never)) => match never {},
            Err(panic) => {
                tracing::error!(panic = told(&*panic), "a handler panicked");
                Refusal::internal("the service failed at this request").into_response()
            }
        }
    };
    let response = answering.instrument(span.clone()).await;
    let status = response.status().as_u16();
    caller.metrics.answered(door.socket(), status);
    span.record("status", status);
    tracing::debug!(parent: &span, "answered");
    response.map(|body| Body::new(Kept { body, _busy: busy }))
}

/// For traces: they are no place for a client's 16 KiB.
fn shortened(path: &str) -> &str {
    path.get(..200).unwrap_or(path)
}

/// What a panic said.
pub(super) fn told(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("?")
}

/// A future whose panic is a value.
struct Caught<F>(Pin<Box<F>>);

impl<F: Future> Caught<F> {
    fn new(future: F) -> Self {
        Self(Box::pin(future))
    }
}

impl<F: Future> Future for Caught<F> {
    type Output = Result<F::Output, Box<dyn Any + Send>>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        // Unwind safe: after a panic the future is dropped and never polled again.
        match catch_unwind(AssertUnwindSafe(|| self.0.as_mut().poll(cx))) {
            Ok(polled) => polled.map(Ok),
            Err(panic) => Poll::Ready(Err(panic)),
        }
    }
}

/// A body that keeps its connection busy until it is written or given up.
struct Kept {
    body: Body,
    _busy: Busy,
}

impl HttpBody for Kept {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
