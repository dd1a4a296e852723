//! Runs: a run's own, and all of them.
#![forbid(unsafe_code)]

use axum::extract::State;
use axum::http::StatusCode;
use serde::Serialize;

use crate::api::server::ask::{Answer, Id, Json, Query};
use crate::api::server::connection::Asker;
use crate::api::server::leases::Narrowed;
use crate::api::server::refusal::Refusal;
use crate::api::server::routes::Shared;
use crate::api::wire::RunBody;
use crate::broker::{BrokerError, ProjectedView, RunAsk, RunView, Scope};
use crate::model::id::RunId;

#[derive(Serialize)]
struct Tokens {
    tokens: Vec<ProjectedView>,
}

#[derive(Serialize)]
struct Runs {
    runs: Vec<RunView>,
}

pub(super) async fn own(State(app): State<Shared>, asker: Asker) -> Answer {
    let run = own_run(&asker)?;
    asker.reply(StatusCode::OK, move || app.broker.run(&run)).await
}

/// The run whose socket it is.
pub(super) fn own_run(asker: &Asker) -> Result<RunId, Refusal> {
    match asker.scope() {
        Scope::Run(run) => Ok(run.clone()),
        Scope::Host => Err(Refusal::internal("a run's path is served on the control socket")),
    }
}

pub(super) async fn start(
    State(app): State<Shared>,
    asker: Asker,
    Json(body): Json<RunBody>,
) -> Answer {
    let RunBody { agent, principal, profile, workspace, run_id } = body;
    let uid = asker.caller.peer.uid;
    let ask = RunAsk { agent, principal, profile, workspace, run_id, uid };
    asker.reply(StatusCode::CREATED, move || app.broker.start_run(ask)).await
}

pub(super) async fn list(
    State(app): State<Shared>,
    asker: Asker,
    Query(narrowed): Query<Narrowed>,
) -> Answer {
    let scope = narrowed.scope(&asker)?;
    let work = move || {
        let runs = match scope {
            Scope::Host => app.broker.runs()?,
            Scope::Run(run) => match app.broker.run(&run) {
                // A list of those that are so called.
                Err(BrokerError::NotFound { .. }) => Vec::new(),
                found => vec![found?],
            },
        };
        Ok(Runs { runs })
    };
    asker.reply(StatusCode::OK, work).await
}

pub(super) async fn show(State(app): State<Shared>, asker: Asker, Id(run): Id<RunId>) -> Answer {
    asker.reply(StatusCode::OK, move || app.broker.run(&run)).await
}

/// For root's hook: it has made the directory.
pub(super) async fn project(State(app): State<Shared>, asker: Asker, Id(run): Id<RunId>) -> Answer {
    let projected = move || app.broker.project(&run).map(|tokens| Tokens { tokens });
    asker.reply(StatusCode::OK, projected).await
}

pub(super) async fn end(State(app): State<Shared>, asker: Asker, Id(run): Id<RunId>) -> Answer {
    asker.reply(StatusCode::OK, move || app.broker.end_run(&run)).await
}
