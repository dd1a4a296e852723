//! The verdict and its record, within the one transaction that begins an exec.
#![forbid(unsafe_code)]

use crate::lease::{Lease, UseError};
use crate::model::event::{EventType, recorded_command};
use crate::model::exec::{ExecRecord, ExecState};
use crate::model::id::LeaseId;
use crate::model::name::Channel;
use crate::model::run::{Counters, Run};
use crate::model::verdict::{Denial, DenyReason};
use crate::policy::{self, Policy};
use crate::run::entries::{self, Leased, Who};
use crate::run::error::RunError;
use crate::run::scene::Scene;
use crate::store::{StoreError, Tx};

/// First in every transaction that begins something: what dead processes left open is closed, and the
/// run stands. Gives the run as it was recorded, if it was.
pub(super) fn begin(
    tx: &mut Tx<'_>,
    scene: &Scene,
    shared: bool,
) -> Result<Option<Run>, StoreError> {
    if !shared {
        entries::close_orphans(tx, &scene.hostname, &scene.now)?;
    }
    let recorded = if scene.is_new_run { None } else { tx.run(&scene.run.run_id)? };
    if recorded.is_none() {
        entries::start_run(tx, scene.who())?;
    }
    Ok(recorded)
}

/// Decides what is asked for, and grants it with the first use of each.
pub(super) fn grant_fresh(
    tx: &mut Tx<'_>,
    scene: &Scene,
    who: Who<'_>,
) -> Result<Result<Vec<Leased>, RunError>, StoreError> {
    let counters = tx.requests_counted(&who.run.run_id, who.now)?;
    let policy = Policy {
        profile: &scene.profile,
        config: &scene.host.config,
        has_issuer: scene.host.has_issuer(),
    };
    let resolved = scene.resolved();
    match policy::decide_all(policy, &scene.requests, who.run, counters, resolved.as_ref()) {
        Err(denial) => {
            entries::record_denial(tx, who, &scene.requests, &denial)?;
            Ok(Err(denial.into()))
        }
        Ok(grants) => {
            let leased = entries::record_grants(tx, who, grants, &scene.lease_ids)?;
            take_uses(tx, scene, who, &leased)?;
            Ok(Ok(leased))
        }
    }
}

/// Decides again about leases that were granted before: the profile, the configuration, the command and
/// the run may say otherwise by now. The ceilings counted them when they were asked for.
pub(super) fn redeem(
    tx: &mut Tx<'_>,
    scene: &Scene,
    who: Who<'_>,
    ids: &[LeaseId],
) -> Result<Result<Vec<Leased>, RunError>, StoreError> {
    let policy = Policy {
        profile: &scene.profile,
        config: &scene.host.config,
        has_issuer: scene.host.has_issuer(),
    };
    let resolved = scene.resolved();
    let decided = policy::decide_all(
        policy,
        &scene.requests,
        who.run,
        Counters::default(),
        resolved.as_ref(),
    );
    let grants = match decided {
        Ok(grants) => grants,
        Err(denial) => return deny_use(tx, scene, who, ids, denial.into()),
    };
    let mut leased = Vec::with_capacity(grants.len());
    for (grant, id) in grants.into_iter().zip(ids) {
        let record = match tx.lease(id)? {
            Some(record) if record.run_id == who.run.run_id => record,
            _ => {
                let why = format!("run {} has no lease {id}", who.run.run_id);
                return deny_use(tx, scene, who, ids, RunError::unusable("lease_not_found", why));
            }
        };
        // All are looked at before one is used: the exec has all of them or none.
        if let Err(why) = Lease::recorded(record.clone()).consume(who.now) {
            let name = match why {
                UseError::Expired { .. } => "lease_expired",
                UseError::Exhausted { .. } => "uses_exhausted",
                UseError::WrongState { .. } | UseError::OtherBoot { .. } => "lease_not_active",
            };
            return deny_use(tx, scene, who, ids, RunError::unusable(name, why.to_string()));
        }
        if *grant.secret() != record.secret {
            let denial = Denial {
                asked: grant.request().asked(),
                reason: DenyReason::SecretNotAllowed,
                message: format!(
                    "lease {id} was granted for secret `{}`, and its audience draws on `{}` now",
                    record.secret,
                    grant.secret()
                ),
                hint: "ask for a new lease".to_owned(),
            };
            return deny_use(tx, scene, who, ids, denial.into());
        }
        leased.push(Leased::of(grant, record));
    }
    take_uses(tx, scene, who, &leased)?;
    Ok(Ok(leased))
}

/// The exec gets none of its leases, and the trail says why.
fn deny_use(
    tx: &mut Tx<'_>,
    scene: &Scene,
    who: Who<'_>,
    ids: &[LeaseId],
    why: RunError,
) -> Result<Result<Vec<Leased>, RunError>, StoreError> {
    // As other denials: counted, and past the ceiling one line a minute tells of all.
    let counted = tx.requests_counted(&who.run.run_id, who.now)?.minute;
    let mut aggregated = 0;
    if counted >= scene.host.config.ceilings.requests_per_minute.get() {
        match tx.note_rate_denial(&who.run.run_id, who.now)? {
            Some(since_the_last) => aggregated = since_the_last,
            None => return Ok(Err(why)),
        }
    } else {
        tx.count_request(&who.run.run_id, who.now)?;
    }
    let mut draft = who
        .draft(EventType::LeaseDenied)
        .of_exec(&scene.exec_id, ids)
        .because(why.reason())
        .outcome("denied")
        .with("message", why.to_string());
    if aggregated > 0 {
        draft = draft.with("aggregated", aggregated);
    }
    tx.append(draft)?;
    Ok(Err(why))
}

/// One use of each, which each has: it was looked at in this transaction. On `git` a use is one `get`, on `ssh` one
/// signature.
fn take_uses(
    tx: &mut Tx<'_>,
    scene: &Scene,
    who: Who<'_>,
    leased: &[Leased],
) -> Result<(), StoreError> {
    let at_start = |lease: &&Leased| !matches!(lease.record.channel, Channel::Git | Channel::Ssh);
    for lease in leased.iter().filter(at_start) {
        if let Err(refused) = entries::take_use(tx, who, &scene.exec_id, &lease.record)? {
            // Nothing of the transaction stays.
            let what = format!("a use of lease {}: {refused}", lease.record.lease_id);
            return Err(StoreError::Missing { what });
        }
    }
    Ok(())
}

pub(super) fn record_start(
    tx: &mut Tx<'_>,
    scene: &Scene,
    who: Who<'_>,
    leased: &[Leased],
) -> Result<(), StoreError> {
    let ids: Vec<LeaseId> = leased.iter().map(|l| l.record.lease_id.clone()).collect();
    tx.put_exec(&ExecRecord {
        exec_id: scene.exec_id.clone(),
        run_id: who.run.run_id.clone(),
        lease_ids: ids.clone(),
        command: recorded_command(&scene.command),
        state: ExecState::Running,
        exit_status: None,
        started_at: who.now.wall,
    })?;
    let mut started = who
        .draft(EventType::ExecStarted)
        .of_exec(&scene.exec_id, &ids)
        .of_request(&scene.request_id)
        .with("command", recorded_command(&scene.command));
    if let Some(reason) = &scene.reason {
        started = started.because(reason.as_str());
    }
    tx.append(started).map(drop)
}

/// A run that was made for this exec alone ends with it; one that the host named goes on.
pub(super) fn end_own_run(tx: &mut Tx<'_>, scene: &Scene, who: Who<'_>) -> Result<(), StoreError> {
    if scene.is_new_run {
        entries::end_run(tx, who)?;
    }
    Ok(())
}

/// A run keeps its agent and principal; it may change its profile and workspace from exec to exec.
pub(super) fn same_run(asked: &Run, recorded: Run) -> Result<Run, RunError> {
    let mismatch = |what, recorded: &str, asked_name: &str| RunError::OtherRun {
        run: asked.run_id.to_string(),
        what,
        recorded: recorded.to_owned(),
        asked: asked_name.to_owned(),
    };
    if recorded.principal != asked.principal {
        return Err(mismatch("principal", recorded.principal.as_str(), asked.principal.as_str()));
    }
    if recorded.agent != asked.agent {
        return Err(mismatch("agent", recorded.agent.as_str(), asked.agent.as_str()));
    }
    Ok(Run { state: recorded.state, started_at: recorded.started_at, ..asked.clone() })
}
