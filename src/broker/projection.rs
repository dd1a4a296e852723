//! Identity tokens in a container itself: where the host permits it, the tokens of the profile stand in the
//! directory that root's hook has made for them, for as long as the container's run lives.
//!
//! Each is asked for, decided, recorded and consumed as any other lease, by the host itself and not by the
//! agent, and replaced before it is too old; when the lease is nearly over, it is asked for anew. What the
//! lease's end would do to a delivery happens to the files. A capability that is pinned to commands is left
//! out: a container is no command.
#![forbid(unsafe_code)]

mod files;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{MutexGuard, PoisonError};
use std::time::Duration;

use serde::Serialize;

use self::files::Shown;
use crate::broker::{Broker, BrokerError};
use crate::config::SecretSource;
use crate::host::{ProfileRef, identity_directory};
use crate::model::event::EventType;
use crate::model::id::{ExecId, LeaseId, RequestId, RunId};
use crate::model::moment::{Moment, Span};
use crate::model::name::{AudienceName, CapabilityName, Channel};
use crate::model::run::{Counters, Run};
use crate::policy::{self, Policy, Request};
use crate::profile::Profile;
use crate::profile::identity::{self as kinds, Identity};
use crate::run::RunError;
use crate::run::entries::{self, Leased};
use crate::run::identity::{self, Minted, Workload};
use crate::run::mint;
use crate::store::Durability;

/// Between two attempts where a token could not be replaced.
const AGAIN: Duration = Duration::from_secs(15);

/// Why it is asked for, as the trail has it.
const REASON: &str = "projected into its container";

/// By run.
pub(super) type Projections = BTreeMap<RunId, Vec<Projected>>;

/// One token of one container.
pub(super) struct Projected {
    lease: Leased,
    /// The container stands for an exec: this joins what is recorded of its tokens.
    exec_id: ExecId,
    identity: Identity,
    shown: Shown,
    expires: Duration,
    due: Duration,
    /// Its lease was taken back, or is denied by now: no other comes.
    is_over: bool,
}

/// A projected token, as it is shown.
#[derive(Debug, Clone, Serialize)]
pub struct ProjectedView {
    pub lease_id: LeaseId,
    pub capability: CapabilityName,
    pub audience: AudienceName,
    /// In the container.
    pub path: PathBuf,
}

impl Broker {
    /// Writes the tokens that the run's profile has for its container. Asked once more, it shows what is there.
    ///
    /// # Errors
    /// A host that does not permit it, a run that is no container's, a directory that the hook has not made;
    /// a denial. Then no token stands there.
    pub fn project(&self, run_id: &RunId) -> Result<Vec<ProjectedView>, BrokerError> {
        self.refuse_while_draining()?;
        self.tell_late_revocations()?;
        let conflict = |message: String| BrokerError::Conflict { message };
        if !self.host.config.hook.project_token {
            let message = "this host projects no tokens: `[hook] project_token = true` permits it";
            return Err(conflict(message.to_owned()));
        }
        let run = self.run_to_decide(run_id)?;
        if self.container_of(run_id)?.is_none() {
            return Err(conflict(format!("{run_id} is no run of a container")));
        }
        let mut all = self.projections();
        if let Some(projected) = all.get(run_id) {
            return Ok(projected.iter().map(Projected::view).collect());
        }
        let directory = identity_directory(&self.host.runtime_dir, run_id);
        let failed = |source| BrokerError::Projection { path: directory.clone(), source };
        files::clear(&directory).map_err(failed)?;
        let profile = self.host.profile(&ProfileRef::parse(&run.profile))?;
        let mut projected = Vec::new();
        let longest = self.host.config.leases.max_ttl;
        for (request, identity) in wanted(&profile, run_id, longest) {
            let exec_id = ExecId::fresh();
            let one =
                self.grant(&run, &profile, request, &exec_id, None).and_then(|(lease, now)| {
                    let minted = self.mint_token(&run, &lease, &exec_id, &now)?;
                    let shown =
                        files::show(&directory, &identity, &minted.token).map_err(failed)?;
                    let (expires, due) = (minted.expires, minted.replace_at());
                    Ok(Projected { lease, exec_id, identity, shown, expires, due, is_over: false })
                });
            match one {
                Ok(one) => projected.push(one),
                Err(e) => {
                    files::clear(&directory).map_err(failed)?;
                    return Err(e);
                }
            }
        }
        let of_all = projected.iter().map(|one| &one.identity);
        files::write_environment(&directory, of_all, run_id).map_err(failed)?;
        let views = projected.iter().map(Projected::view).collect();
        all.insert(run_id.clone(), projected);
        Ok(views)
    }

    /// For a run that an earlier broker left: whatever that one wrote is wiped, and written anew.
    pub(super) fn project_again(&self, run_id: &RunId) {
        let directory = identity_directory(&self.host.runtime_dir, run_id);
        if !directory.is_dir() {
            return;
        }
        let again = match self.host.config.hook.project_token {
            true => self.project(run_id).map(drop),
            false => files::clear(&directory)
                .map_err(|source| BrokerError::Projection { path: directory, source }),
        };
        if let Err(e) = again {
            tracing::error!(%run_id, error = %e.message(), "a container's tokens could not be projected again");
        }
    }

    /// Replaces what is due, and takes away what is over. One that fails holds up no other.
    pub(super) fn tend_projections(&self) -> Result<(), BrokerError> {
        let now = self.now()?;
        let mut all = self.projections();
        for (run_id, projected) in all.iter_mut() {
            for one in projected {
                if !one.is_over && one.due <= now.boot {
                    // Whatever comes of it: it is not tried again at once.
                    one.due = now.boot + AGAIN;
                    if let Err(e) = self.replace(run_id, one) {
                        one.is_over = matches!(&e, BrokerError::Run(RunError::Denied(_)));
                        tracing::error!(%run_id, error = %e.message(), "a container's token is not replaced");
                    }
                }
                if one.lease.record.expires_boot.min(one.expires) <= now.boot {
                    one.shown.wipe();
                }
            }
        }
        Ok(())
    }

    fn replace(&self, run_id: &RunId, one: &mut Projected) -> Result<(), BrokerError> {
        let run = self.run_to_decide(run_id)?;
        let mut now = self.now()?;
        let SecretSource::Jwt(jwt) = one.lease.grant.source() else { return Ok(()) };
        if one.lease.record.expires_boot < now.boot + jwt.ttl.0 {
            let profile = self.host.profile(&ProfileRef::parse(&run.profile))?;
            let before = &one.lease.record;
            let again =
                Request { request_id: RequestId::fresh(), ..one.lease.grant.request().clone() };
            let before = Some(&before.lease_id);
            (one.lease, now) = self.grant(&run, &profile, again, &one.exec_id, before)?;
        }
        let minted = self.mint_token(&run, &one.lease, &one.exec_id, &now)?;
        let directory = identity_directory(&self.host.runtime_dir, run_id);
        let failed = |source| BrokerError::Projection { path: directory.clone(), source };
        one.shown.replace(&directory, one.identity.kind, &minted.token).map_err(failed)?;
        (one.expires, one.due) = (minted.expires, minted.replace_at());
        Ok(())
    }

    /// Decides, records and takes the use, all durable when it returns; of a lease that it follows, tells the
    /// end. The pace is the host's own, so the ceilings of what an agent asks for do not count.
    fn grant(
        &self,
        run: &Run,
        profile: &Profile,
        request: Request,
        exec_id: &ExecId,
        before: Option<&LeaseId>,
    ) -> Result<(Leased, Moment), BrokerError> {
        let now = self.now()?;
        let who = self.who(run, &now);
        let has_issuer = self.host.has_issuer();
        let policy = Policy { profile, config: &self.host.config, has_issuer };
        let requests = [request];
        let decided = self.transaction(Durability::Durable, |tx| {
            let Some(recorded) = tx.run(&run.run_id)? else {
                return Ok(Err(super::runs::no_run(&run.run_id)));
            };
            let run = Run { state: recorded.state, ..run.clone() };
            let grants =
                match policy::decide_all(policy, &requests, &run, Counters::default(), None) {
                    Ok(grants) => grants,
                    Err(denial) => {
                        entries::record_denial(tx, who, &requests, &denial)?;
                        return Ok(Err(RunError::from(denial).into()));
                    }
                };
            if let Some(ended) = before.map(|id| tx.complete_if_spent(id)).transpose()?.flatten() {
                let draft = who.of_lease(EventType::LeaseCompleted, &ended);
                tx.append(draft.outcome("completed"))?;
            }
            let ids = [LeaseId::fresh()];
            let Some(leased) = entries::record_grants_of_host(tx, who, grants, &ids)?.pop() else {
                return Ok(Err(super::runs::no_run(&run.run_id)));
            };
            match entries::take_use(tx, who, exec_id, &leased.record)? {
                Ok(()) => Ok(Ok(leased)),
                Err(refused) => Ok(Err(BrokerError::Conflict { message: refused.to_string() })),
            }
        })?;
        match &decided {
            Ok(_) => self.metrics.granted(1),
            Err(BrokerError::Run(RunError::Denied(denial))) => self.metrics.denied(denial.reason),
            Err(_) => {}
        }
        Ok((decided?, now))
    }

    /// Mints, and records it before anyone has it.
    fn mint_token(
        &self,
        run: &Run,
        lease: &Leased,
        exec_id: &ExecId,
        now: &Moment,
    ) -> Result<Minted, BrokerError> {
        let SecretSource::Jwt(jwt) = lease.grant.source() else {
            let message = format!("{} is no identity of this host", lease.record.capability);
            return Err(BrokerError::Conflict { message });
        };
        let profile = ProfileRef::parse(&run.profile);
        let keys = &self.shared.keys.issuer;
        let whose = Workload { keys, profile: &profile, run, exec_id };
        let (minted, fresh) = identity::mint(&whose, lease, jwt, now)?;
        self.transaction(Durability::Durable, |tx| {
            mint::record_ours(tx, &self.hostname, now, &fresh)
        })?;
        Ok(minted)
    }

    /// Wipes what these leases have put into containers. No other comes in their place.
    pub(super) fn take_back_projected(&self, is_meant: impl Fn(&RunId, &LeaseId) -> bool) {
        for (run_id, projected) in self.projections().iter_mut() {
            for one in projected.iter_mut().filter(|p| is_meant(run_id, &p.lease.record.lease_id)) {
                one.is_over = true;
                one.shown.wipe();
            }
        }
    }

    /// The run is over, or its tokens are: nothing of them is left.
    pub(super) fn forget_projected(&self, run_id: &RunId) {
        let mut all = self.projections();
        if let Some(mut projected) = all.remove(run_id) {
            projected.iter_mut().for_each(|one| one.shown.wipe());
        }
        let directory = identity_directory(&self.host.runtime_dir, run_id);
        if let Err(e) = files::remove(&directory) {
            tracing::error!(%run_id, error = %e, "a container's tokens are not removed");
        }
    }

    /// The service ends.
    pub(super) fn wipe_projected(&self) {
        let mut all = self.projections();
        all.values_mut().flatten().for_each(|one| one.shown.wipe());
        all.clear();
    }

    fn projections(&self) -> MutexGuard<'_, Projections> {
        self.projections.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Projected {
    fn view(&self) -> ProjectedView {
        ProjectedView {
            lease_id: self.lease.record.lease_id.clone(),
            capability: self.lease.record.capability.clone(),
            audience: self.lease.record.audience.clone(),
            path: self.identity.kind.token_below(kinds::IN_CONTAINER.as_ref()),
        }
    }
}

/// What is asked for: every identity of the profile that any command may have, for as long as it may be.
fn wanted(profile: &Profile, run_id: &RunId, longest: Span) -> Vec<(Request, Identity)> {
    profile
        .projected()
        .map(|(capability, audience)| {
            let request = Request {
                request_id: RequestId::fresh(),
                run_id: run_id.clone(),
                capability: capability.name.clone(),
                audience: audience.host.clone(),
                channel: Some(Channel::Token),
                ttl: Some(capability.ttl.map_or(longest, |ttl| ttl.min(longest))),
                uses: Some(std::num::NonZeroU32::MIN),
                reason: REASON.parse().ok(),
            };
            (request, audience.identity.clone().unwrap_or_default())
        })
        .collect()
}
