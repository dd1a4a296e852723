//! What is asked, parsed once: ids of paths, queries, JSON bodies. And the way to the broker: blocking
//! work under the door's bound.
//!
//! Each failure is a [`Refusal`]. A body is read whole before it is parsed, within bounds of size and
//! time; JSON nests at most 127 levels (serde_json's bound) and every key must be known.
#![forbid(unsafe_code)]

use std::error::Error;
use std::fmt::Display;
use std::future::poll_fn;
use std::pin::Pin;
use std::str::FromStr;
use std::sync::Arc;

use axum::body::{Body, HttpBody};
use axum::extract::{FromRequest, FromRequestParts, Path};
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use axum::http::request::Parts;
use axum::http::{HeaderMap, Request, Response, StatusCode};
use axum::middleware::Next;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tracing::Span;

use crate::api::object::Object;
use crate::api::server::bounds::Bounds;
use crate::api::server::connection::{Asker, told};
use crate::api::server::refusal::{JSON, Refusal};
use crate::broker::{BrokerError, Scope};
use crate::model::id::{ExecId, LeaseId, RunId};

/// What a handler returns.
pub(super) type Answer = Result<Response<Body>, Refusal>;

/// Larger bodies are parsed in the blocking pool: the runtime's one thread serves every run.
const LARGE: usize = 16 << 10;

impl Asker {
    pub(super) fn scope(&self) -> &Scope {
        &self.caller.door.scope
    }

    fn bounds(&self) -> Bounds {
        self.caller.door.bounds
    }

    /// Does what may block, in the blocking pool and under this door's bound. The bound is held by the
    /// work: a client that goes away does not make room for more.
    pub(super) async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Refusal> {
        within(&self.caller.door.blocking, work).await
    }

    /// Asks the broker, and answers with what it says as JSON.
    pub(super) async fn reply<T: Serialize>(
        &self,
        status: StatusCode,
        work: impl FnOnce() -> Result<T, BrokerError> + Send + 'static,
    ) -> Answer {
        let json = self.blocking(move || work().map(|view| serde_json::to_vec(&view))).await??;
        let json = json.map_err(|e| Refusal::internal(format!("an answer has no JSON: {e}")))?;
        Ok(json_answer(status, json))
    }

    async fn parsed<T>(&self, bytes: Vec<u8>) -> Result<T, Refusal>
    where
        T: DeserializeOwned + Send + 'static,
    {
        let is_large = bytes.len() > LARGE;
        let parse = move || serde_json::from_slice(&bytes).map(|Object(body)| body);
        let parsed = if is_large { within(&self.caller.door.large, parse).await? } else { parse() };
        // serde_json's text ends with line and column.
        parsed.map_err(|e| Refusal::malformed(format!("body: {e}")))
    }
}

async fn within<T: Send + 'static>(
    places: &Arc<Semaphore>,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Refusal> {
    let place = places.clone().acquire_owned().await;
    let span = Span::current();
    let done = tokio::task::spawn_blocking(move || {
        let done = span.in_scope(work);
        drop(place);
        done
    });
    done.await.map_err(|error| {
        if let Ok(panic) = error.try_into_panic() {
            tracing::error!(panic = told(&*panic), "the broker panicked");
        }
        Refusal::internal("the service failed at this request")
    })
}

pub(super) fn json_answer(status: StatusCode, json: impl Into<Body>) -> Response<Body> {
    let mut response = Response::new(json.into());
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, JSON);
    response
}

impl<S: Sync> FromRequestParts<S> for Asker {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Refusal> {
        let asker = parts.extensions.get::<Asker>().cloned();
        asker.ok_or_else(|| Refusal::internal("a request without a connection"))
    }
}

/// An id that a path may hold.
pub(super) trait Named: FromStr + Display {
    const WHAT: &str;
    /// The span's field.
    const FIELD: &str;
}

impl Named for RunId {
    const WHAT: &str = "run";
    const FIELD: &str = "run_id";
}

impl Named for LeaseId {
    const WHAT: &str = "lease";
    const FIELD: &str = "lease_id";
}

impl Named for ExecId {
    const WHAT: &str = "exec";
    const FIELD: &str = "exec_id";
}

/// The path's id. What is no id names nothing that exists: 404.
pub(super) struct Id<T>(pub(super) T);

impl<S: Send + Sync, T: Named> FromRequestParts<S> for Id<T> {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Refusal> {
        let missing = || Refusal::not_found(format!("such {}", T::WHAT));
        let Path(text) =
            Path::<String>::from_request_parts(parts, state).await.map_err(|_| missing())?;
        let id = text.parse::<T>().map_err(|_| missing())?;
        Span::current().record(T::FIELD, tracing::field::display(&id));
        Ok(Self(id))
    }
}

/// The query, in which every key must be known: a misspelt one would widen what is shown.
pub(super) struct Query<T>(pub(super) T);

impl<S: Sync, T: DeserializeOwned> FromRequestParts<S> for Query<T> {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Refusal> {
        match axum::extract::Query::try_from_uri(&parts.uri) {
            Ok(axum::extract::Query(query)) => Ok(Self(query)),
            Err(error) => Err(Refusal::malformed(format!("query: {}", cause(&error)))),
        }
    }
}

/// Every route but those that take a query of their own.
pub(super) async fn without_query(
    _: Query<NoKeys>,
    request: Request<Body>,
    next: Next,
) -> Response<Body> {
    next.run(request).await
}

/// A query without a key.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct NoKeys {}

/// The innermost: what is around it names axum's own parts.
fn cause<'a>(error: &'a (dyn Error + 'static)) -> &'a (dyn Error + 'static) {
    error.source().map_or(error, cause)
}

/// A JSON body.
pub(super) struct Json<T>(pub(super) T);

/// A JSON body that may be left out.
pub(super) struct MaybeJson<T>(pub(super) T);

impl<S: Sync, T: DeserializeOwned + Send + 'static> FromRequest<S> for Json<T> {
    type Rejection = Refusal;

    async fn from_request(request: Request<Body>, _: &S) -> Result<Self, Refusal> {
        let (asker, bytes) = read(request).await?;
        if bytes.is_empty() {
            return Err(Refusal::malformed("body: it is empty, and a JSON object is expected"));
        }
        asker.parsed(bytes).await.map(Self)
    }
}

impl<S: Sync, T: DeserializeOwned + Default + Send + 'static> FromRequest<S> for MaybeJson<T> {
    type Rejection = Refusal;

    async fn from_request(request: Request<Body>, _: &S) -> Result<Self, Refusal> {
        let (asker, bytes) = read(request).await?;
        if bytes.is_empty() {
            return Ok(Self(T::default()));
        }
        asker.parsed(bytes).await.map(Self)
    }
}

async fn read(request: Request<Body>) -> Result<(Asker, Vec<u8>), Refusal> {
    let (mut parts, body) = request.into_parts();
    let asker = Asker::from_request_parts(&mut parts, &()).await?;
    let bounds = asker.bounds();
    is_json(&parts.headers)?;
    let announced = parts.headers.get(CONTENT_LENGTH).and_then(|n| n.to_str().ok()?.parse().ok());
    if announced.is_some_and(|n: u64| n > bounds.body as u64) {
        return Err(Refusal::too_large("the body", bounds.body));
    }
    let bytes = timeout(bounds.body_time, collected(body, bounds.body))
        .await
        .map_err(|_| Refusal::too_slow("the body"))??;
    Ok((asker, bytes))
}

/// `application/json`, or nothing said.
fn is_json(headers: &HeaderMap) -> Result<(), Refusal> {
    let Some(said) = headers.get(CONTENT_TYPE) else { return Ok(()) };
    let essence = said.to_str().ok().and_then(|t| t.split(';').next()).unwrap_or_default();
    if essence.trim().eq_ignore_ascii_case("application/json") {
        Ok(())
    } else {
        Err(Refusal::not_json())
    }
}

async fn collected(mut body: Body, bound: usize) -> Result<Vec<u8>, Refusal> {
    let mut bytes = Vec::new();
    while let Some(frame) = poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await {
        let frame = frame.map_err(|e| Refusal::malformed(format!("body: {e}")).closing())?;
        let Ok(data) = frame.into_data() else { continue };
        if bytes.len() + data.len() > bound {
            return Err(Refusal::too_large("the body", bound));
        }
        bytes.extend_from_slice(&data);
    }
    Ok(bytes)
}
