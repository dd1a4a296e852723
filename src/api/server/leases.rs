//! Leases: asked for, shown, renewed, revoked.
#![forbid(unsafe_code)]

use axum::extract::State;
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};

use crate::api::server::ask::{Answer, Id, Json, MaybeJson, Query, json_answer};
use crate::api::server::connection::Asker;
use crate::api::server::refusal::Refusal;
use crate::api::server::routes::Shared;
use crate::api::server::runs::own_run;
use crate::api::wire::{
    BatchBody, LeaseBody, RenewBody, RevocationBody, RevocationView, RevokeBody,
};
use crate::broker::{BrokerError, Scope, Selection};
use crate::lease::LeaseView;
use crate::model::id::{LeaseId, RunId};
use crate::model::lease::LeaseState;

#[derive(Serialize)]
struct Leases {
    leases: Vec<LeaseView>,
}

#[derive(Serialize)]
struct Revoked {
    revoked: Vec<LeaseView>,
}

/// The query of lists on the control socket.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Narrowed {
    run_id: Option<RunId>,
}

impl Narrowed {
    /// What the list shows.
    pub(super) fn scope(self, asker: &Asker) -> Result<Scope, Refusal> {
        match (asker.scope(), self.run_id) {
            (scope, None) => Ok(scope.clone()),
            (Scope::Host, Some(run)) => Ok(Scope::Run(run)),
            (Scope::Run(_), Some(_)) => {
                Err(Refusal::malformed("a run's socket shows that run alone: leave `run_id` out"))
            }
        }
    }
}

pub(super) async fn request(
    State(app): State<Shared>,
    asker: Asker,
    Json(body): Json<LeaseBody>,
) -> Answer {
    let run = own_run(&asker)?;
    let work = move || {
        let granted = app.broker.request(&run, vec![body.into_parts()])?;
        // One was asked for; the broker grants all or none.
        granted.into_iter().next().ok_or(BrokerError::NotFound { what: "such lease".to_owned() })
    };
    asker.reply(StatusCode::CREATED, work).await
}

pub(super) async fn request_batch(
    State(app): State<Shared>,
    asker: Asker,
    Json(body): Json<BatchBody>,
) -> Answer {
    let run = own_run(&asker)?;
    let BatchBody { leases, reason } = body;
    if leases.is_empty() {
        return Err(Refusal::malformed("body: `leases` is empty"));
    }
    let asked = leases.into_iter().map(|lease| {
        let (flag, own) = lease.into_parts();
        (flag, own.or_else(|| reason.clone()))
    });
    let asked = asked.collect();
    let work = move || app.broker.request(&run, asked).map(|leases| Leases { leases });
    asker.reply(StatusCode::CREATED, work).await
}

pub(super) async fn list(
    State(app): State<Shared>,
    asker: Asker,
    Query(narrowed): Query<Narrowed>,
) -> Answer {
    let scope = narrowed.scope(&asker)?;
    let work = move || app.broker.leases(&scope).map(|leases| Leases { leases });
    asker.reply(StatusCode::OK, work).await
}

pub(super) async fn show(
    State(app): State<Shared>,
    asker: Asker,
    Id(lease): Id<LeaseId>,
) -> Answer {
    let scope = asker.scope().clone();
    asker.reply(StatusCode::OK, move || app.broker.lease(&scope, &lease)).await
}

pub(super) async fn envelope(
    State(app): State<Shared>,
    asker: Asker,
    Id(lease): Id<LeaseId>,
) -> Answer {
    let scope = asker.scope().clone();
    let envelope = asker.blocking(move || app.broker.envelope(&scope, &lease)).await??;
    Ok(json_answer(StatusCode::OK, envelope))
}

pub(super) async fn renew(
    State(app): State<Shared>,
    asker: Asker,
    Id(lease): Id<LeaseId>,
    MaybeJson(RenewBody { ttl }): MaybeJson<RenewBody>,
) -> Answer {
    asker.reply(StatusCode::OK, move || app.broker.renew(&lease, ttl)).await
}

/// Answers with the lease as it then is: one that had ended before stays as it was.
pub(super) async fn revoke(
    State(app): State<Shared>,
    asker: Asker,
    Id(lease): Id<LeaseId>,
    MaybeJson(RevokeBody { reason }): MaybeJson<RevokeBody>,
) -> Answer {
    let work = move || {
        app.broker.revoke(&Selection::Lease(lease.clone()), reason)?;
        app.broker.lease(&Scope::Host, &lease)
    };
    asker.reply(StatusCode::OK, work).await
}

pub(super) async fn revoke_many(
    State(app): State<Shared>,
    asker: Asker,
    Json(body): Json<RevocationBody>,
) -> Answer {
    let RevocationBody { run_id, principal, all, reason } = body;
    let which = match (run_id, principal, all) {
        (Some(run), None, false) => Selection::Run(run),
        (None, Some(principal), false) => Selection::Principal(principal),
        (None, None, true) => Selection::All,
        _ => {
            let message =
                "body: exactly one of `run_id`, `principal` and `\"all\":true` is expected";
            return Err(Refusal::malformed(message));
        }
    };
    let work = move || app.broker.revoke(&which, reason).map(|revoked| Revoked { revoked });
    asker.reply(StatusCode::OK, work).await
}

/// A verifier asks this of a lease whose envelope it holds: one look-up. On a run's socket it is answered
/// for that run's leases alone.
pub(super) async fn revocation(
    State(app): State<Shared>,
    asker: Asker,
    Id(lease_id): Id<LeaseId>,
) -> Answer {
    let scope = asker.scope().clone();
    let work = move || {
        let state = match &scope {
            Scope::Host => app.broker.lease_state(&lease_id)?,
            Scope::Run(_) => app.broker.lease(&scope, &lease_id)?.state,
        };
        Ok(RevocationView {
            lease_id,
            state: state.as_str().to_owned(),
            revoked: is_revoked(state),
        })
    };
    asker.reply(StatusCode::OK, work).await
}

/// Taken back before its end, so that an envelope which has not expired yet is good for nothing.
fn is_revoked(state: LeaseState) -> bool {
    match state {
        LeaseState::Revoked | LeaseState::Interrupted | LeaseState::Denied => true,
        LeaseState::Granted
        | LeaseState::Consumed
        | LeaseState::Completed
        | LeaseState::Expired => false,
    }
}
