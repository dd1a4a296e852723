//! What the service tells of itself.
#![forbid(unsafe_code)]

use axum::body::Body;
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderValue, Response, StatusCode};
use serde_json::json;

use crate::api::server::ask::{Answer, json_answer};
use crate::api::server::connection::Asker;
use crate::api::server::routes::Shared;
use crate::broker::metrics::CONTENT_TYPE as OPENMETRICS;

/// OpenAPI 3.1, of both sockets.
pub(super) const OPENAPI: &str = include_str!("../openapi.json");

pub(super) async fn openapi() -> Answer {
    Ok(json_answer(StatusCode::OK, OPENAPI))
}

pub(super) async fn jwks(State(app): State<Shared>, asker: Asker) -> Answer {
    asker.reply(StatusCode::OK, move || Ok(app.broker.jwks())).await
}

pub(super) async fn guard(State(app): State<Shared>, asker: Asker) -> Answer {
    asker.reply(StatusCode::OK, move || app.broker.guard()).await
}

/// Always 200: who asks is answered, so the service lives.
pub(super) async fn health(State(app): State<Shared>) -> Answer {
    let status = if app.broker.is_draining() { "draining" } else { "ok" };
    Ok(json_answer(StatusCode::OK, json!({ "status": status }).to_string()))
}

pub(super) async fn metrics(State(app): State<Shared>, asker: Asker) -> Answer {
    let text = asker.blocking(move || app.broker.metrics()).await?;
    let mut response = Response::new(Body::from(text));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(OPENMETRICS));
    Ok(response)
}
