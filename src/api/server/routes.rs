//! Every path, its method, and the sockets that serve it. One table, from which both routers are made and
//! which the tests hold against the OpenAPI description.
#![forbid(unsafe_code)]

use std::sync::Arc;

use axum::Router;
use axum::http::Method;
use axum::middleware::from_fn;
use axum::routing::{MethodRouter, delete, get, post};
use tokio::sync::watch;

use crate::api::server::ask::without_query;
use crate::api::server::refusal::Refusal;
use crate::api::server::{events, execs, leases, runs, service};
use crate::broker::Broker;

/// What every handler may use.
pub(super) struct App {
    pub(super) broker: Arc<Broker>,
    /// Changes when the server stops.
    pub(super) stopped: watch::Receiver<()>,
}

pub(super) type Shared = Arc<App>;

/// Which sockets serve a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum On {
    Agent,
    Control,
    Both,
}

impl On {
    pub fn agent(self) -> bool {
        matches!(self, On::Agent | On::Both)
    }

    pub fn control(self) -> bool {
        matches!(self, On::Control | On::Both)
    }
}

type Row = (Method, &'static str, On, MethodRouter<Shared>);

fn table() -> Vec<Row> {
    use On::{Agent, Both, Control};
    // A key that a path does not know is an error: most know none.
    let plain = |handler: MethodRouter<Shared>| handler.route_layer(from_fn(without_query));
    let get_on = |path, on, handler| (Method::GET, path, on, plain(handler));
    let post_on = |path, on, handler| (Method::POST, path, on, plain(handler));
    let asked_on = |path, on, handler| (Method::GET, path, on, handler);
    vec![
        get_on("/v1/run", Agent, get(runs::own)),
        post_on("/v1/runs", Control, post(runs::start)),
        asked_on("/v1/runs", Control, get(runs::list)),
        get_on("/v1/runs/{run_id}", Control, get(runs::show)),
        (Method::DELETE, "/v1/runs/{run_id}", Control, plain(delete(runs::end))),
        post_on("/v1/runs/{run_id}/identity", Control, post(runs::project)),
        post_on("/v1/leases", Agent, post(leases::request)),
        post_on("/v1/leases:batch", Agent, post(leases::request_batch)),
        asked_on("/v1/leases", Both, get(leases::list)),
        get_on("/v1/leases/{lease_id}", Both, get(leases::show)),
        get_on("/v1/leases/{lease_id}/envelope", Both, get(leases::envelope)),
        post_on("/v1/leases/{lease_id}/renew", Control, post(leases::renew)),
        post_on("/v1/leases/{lease_id}/revoke", Control, post(leases::revoke)),
        post_on("/v1/revocations", Control, post(leases::revoke_many)),
        get_on("/v1/revocations/{lease_id}", Both, get(leases::revocation)),
        post_on("/v1/execs", Agent, post(execs::start)),
        asked_on("/v1/execs", Both, get(execs::list)),
        get_on("/v1/execs/{exec_id}", Both, get(execs::show)),
        get_on("/v1/guard", Control, get(service::guard)),
        asked_on("/v1/events", Control, get(events::stream)),
        get_on("/v1/jwks.json", Both, get(service::jwks)),
        get_on("/v1/openapi.json", Both, get(service::openapi)),
        get_on("/v1/health", Both, get(service::health)),
        get_on("/metrics", Control, get(service::metrics)),
    ]
}

/// Method, path and sockets of everything that is served.
pub fn all() -> Vec<(Method, &'static str, On)> {
    table().into_iter().map(|(method, path, on, _)| (method, path, on)).collect()
}

/// The OpenAPI 3.1 description of them, as it is served.
pub fn description() -> &'static str {
    service::OPENAPI
}

pub(super) fn agent(app: Shared) -> Router {
    router(app, On::agent)
}

pub(super) fn control(app: Shared) -> Router {
    router(app, On::control)
}

fn router(app: Shared, is_served: impl Fn(On) -> bool) -> Router {
    let served = table().into_iter().filter(|(_, _, on, _)| is_served(*on));
    served
        .fold(Router::new(), |router, (_, path, _, handler)| router.route(path, handler))
        .fallback(async || Refusal::no_such_path())
        .method_not_allowed_fallback(async || Refusal::method_not_allowed())
        .with_state(app)
}
