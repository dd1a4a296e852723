//! Tokens of this host's own issuer, minted by the broker for a lease: no network, no key outside of it.
#![forbid(unsafe_code)]

use std::time::Duration;

use jiff::SignedDuration;
use serde_json::{Map, Value, json};

use super::entries::Leased;
use super::error::RunError;
use super::ledger::Ledger;
use super::mint::Fresh;
use super::scene::Scene;
use crate::config::Jwt;
use crate::host::ProfileRef;
use crate::identity::{Act, Assertion, Issuer, IssuerError, IssuerKeys, Subject};
use crate::launcher::wire::{Refusal, RefusalKind};
use crate::model::id::{ExecId, LeaseId};
use crate::model::mint::{About, Facts};
use crate::model::moment::Moment;
use crate::model::name::Channel;
use crate::model::run::Run;
use crate::model::secret::Secret;
use crate::store::StoreError;

/// A relying party that reads a token when it has so long to live has it in time: DESIGN's ten minutes,
/// and what a busy host may be late by.
const REMAINING: Duration = Duration::from_secs(10 * 60 + 30);

/// A token, and when it is over.
pub struct Minted {
    pub token: Secret,
    /// `CLOCK_BOOTTIME`.
    pub issued: Duration,
    /// `CLOCK_BOOTTIME`; never beyond the lease.
    pub expires: Duration,
}

impl Minted {
    /// When another shall stand in its place: while ten minutes are left, or, of one that never had so many,
    /// half of its life.
    pub fn replace_at(&self) -> Duration {
        let early = self.expires.saturating_sub(REMAINING);
        if early > self.issued { early } else { self.issued + (self.expires - self.issued) / 2 }
    }
}

/// Whom a token speaks of.
pub struct Workload<'a> {
    pub keys: &'a IssuerKeys,
    pub profile: &'a ProfileRef,
    pub run: &'a Run,
    pub exec_id: &'a ExecId,
}

impl<'a> Workload<'a> {
    pub fn of(scene: &'a Scene, ledger: &'a Ledger) -> Self {
        Self {
            keys: ledger.issuer_keys(),
            profile: &scene.profile_ref,
            run: &scene.run,
            exec_id: &scene.exec_id,
        }
    }
}

/// Mints for one lease.
///
/// # Errors
/// As a source that is not available: there is no issuer any more, or its key cannot be used.
pub fn mint(
    whose: &Workload<'_>,
    lease: &Leased,
    jwt: &Jwt,
    now: &Moment,
) -> Result<(Minted, Fresh), RunError> {
    let Workload { keys, profile, run, exec_id } = *whose;
    let issuer = Issuer::get(keys.state_dir()).map_err(unavailable)?;
    let workload = Subject::new(&profile.identity(), &run.agent);
    let grant = &lease.grant;
    let host = grant.audience().host.as_str();
    let expires = (now.boot + jwt.ttl.0).min(lease.record.expires_boot);
    let life = SignedDuration::try_from(expires.saturating_sub(now.boot));
    let expires_at = life.ok().and_then(|life| now.wall.checked_add(life).ok()).unwrap_or(now.wall);

    let text = |(name, value): (&String, &String)| (name.clone(), Value::from(value.as_str()));
    let mut more: Map<String, Value> = jwt.claims.iter().map(text).collect();
    more.insert(
        "sublet".to_owned(),
        json!({
            "run_id": run.run_id, "exec_id": exec_id, "principal": run.principal,
            "capability": lease.record.capability,
        }),
    );
    let is_identity = lease.record.channel == Channel::Token;
    if !is_identity {
        authorize(&mut more, lease);
    }
    // An identity stands for the workload itself; elsewhere it acts for who authorised the run. RFC 8693 §4.1.
    let (subject, actor) = match is_identity {
        true => (workload.as_str(), run.agent.as_str()),
        false => (run.principal.as_str(), workload.as_str()),
    };
    let audience = jwt.audience.as_deref().unwrap_or(host);
    let token = Assertion {
        subject,
        audience,
        actor: Act(actor),
        lease_id: &lease.record.lease_id,
        issued_at: now.wall,
        expires_at,
        more,
    }
    .sign(&issuer, keys)
    .map_err(unavailable)?;
    let about = About {
        issuer: issuer.url.to_string(),
        scope: Some(audience.to_owned()),
        principal: Some(subject.to_owned()),
        far_id: Some(lease.record.lease_id.to_string()),
        expires_at: Some(expires_at.as_millisecond()),
        renew_at: None,
    };
    let fresh = Fresh::of_ours(exec_id, lease, about);
    Ok((Minted { token, issued: now.boot, expires }, fresh))
}

/// A token by which this host proves to a source who asks: of the lease's workload. It goes to a minter alone,
/// also when what was minted is to be revoked and the lease is over.
pub fn proof(ledger: &Ledger, facts: &Facts, jwt: &Jwt) -> Result<Secret, RunError> {
    let now = crate::host::now().map_err(RunError::Clock)?;
    let keys = ledger.issuer_keys();
    let issuer = Issuer::get(keys.state_dir()).map_err(unavailable)?;
    let lease_id: LeaseId = facts.lease_id.parse()?;
    let lost = || StoreError::Missing { what: format!("lease {lease_id} and its run") };
    let (lease, run) = ledger.read(|view| {
        let lease = view.lease(&lease_id)?.ok_or_else(lost)?;
        let run = view.run(&lease.run_id)?.ok_or_else(lost)?;
        Ok((lease, run))
    })?;
    let workload = Subject::new(&ProfileRef::parse(&run.profile).identity(), &run.agent);
    let life = SignedDuration::try_from(jwt.ttl.0).unwrap_or(SignedDuration::ZERO);
    let text = |(name, value): (&String, &String)| (name.clone(), Value::from(value.as_str()));
    let mut more: Map<String, Value> = jwt.claims.iter().map(text).collect();
    more.insert(
        "sublet".to_owned(),
        json!({
            "run_id": run.run_id, "exec_id": facts.exec_id, "principal": run.principal,
            "capability": lease.capability,
        }),
    );
    Assertion {
        subject: workload.as_str(),
        audience: jwt.audience.as_deref().unwrap_or(lease.audience.as_str()),
        actor: Act(run.agent.as_str()),
        lease_id: &lease_id,
        issued_at: now.wall,
        expires_at: now.wall.checked_add(life).unwrap_or(now.wall),
        more,
    }
    .sign(&issuer, keys)
    .map_err(unavailable)
}

/// What the lease is good for, as the capability's constraints say it; RFC 9396 §2.
fn authorize(claims: &mut Map<String, Value>, lease: &Leased) {
    let capability = lease.grant.capability();
    let constraint = |name: &str| capability.constraints.get(name).map(String::as_str);
    let action = constraint("action").unwrap_or(capability.name.as_str());
    let resource = constraint("resource").unwrap_or(lease.record.audience.as_str());
    claims.insert("action".to_owned(), action.into());
    claims.insert("resource".to_owned(), resource.into());
    let mut detail = Map::new();
    for (name, value) in &capability.constraints {
        if !matches!(name.as_str(), "action" | "resource") {
            detail.insert(name.clone(), value.as_str().into());
        }
    }
    detail.entry("type").or_insert_with(|| capability.name.as_str().into());
    detail.insert("actions".to_owned(), json!([action]));
    detail.insert("identifier".to_owned(), resource.into());
    detail.insert("locations".to_owned(), json!([lease.record.audience]));
    claims.insert("authorization_details".to_owned(), json!([detail]));
}

pub(super) fn unavailable(error: IssuerError) -> RunError {
    RunError::Refused(Refusal {
        kind: RefusalKind::SourceUnavailable,
        message: format!(
            "the host's issuer cannot mint: {}",
            crate::launcher::compile::chain(&error)
        ),
        hint: "`sublet issuer list` shows its keys".to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_replaced_while_more_than_ten_minutes_are_left() {
        #[track_caller]
        fn check(life: u64, expected: u64) {
            let token = Secret::zeroed(0).unwrap();
            let issued = Duration::from_secs(1000);
            let minted = Minted { token, issued, expires: issued + Duration::from_secs(life) };
            assert_eq!(minted.replace_at(), issued + Duration::from_secs(expected), "{life}");
        }
        check(900, 270);
        check(3600, 2970);
        // These never have ten minutes.
        check(300, 150);
        check(20, 10);
        check(630, 315);
    }
}
