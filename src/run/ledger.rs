//! What is recorded of one exec, and when: the store and the trail as the story uses them. Durable before
//! a value moves; relaxed where nothing rests on it.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use super::attend::Exited;
use super::error::RunError;
use super::scene::Scene;
use crate::launcher::client::Launcher;
use crate::launcher::wire::Order;
use crate::lease::Lease;
use crate::model::digest::ValueDigest;
use crate::model::event::{Draft, EventType, Head, KeptHead, recorded_command};
use crate::model::exec::{ExecRecord, ExecState};
use crate::model::id::LeaseId;
use crate::model::lease::{LeaseRecord, LeaseState};
use crate::model::moment::Moment;
use crate::model::name::{Channel, SecretName};
use crate::model::run::Run;
use crate::model::verdict::{Denial, DenyReason};
use crate::policy::{self, Grant, Policy, Request};
use crate::sandbox::cgroup;
use crate::store::{Durability, SealedSecret, Store, StoreError, Tx, UseRefused};

/// The store, open for this exec.
pub struct Ledger {
    store: Store,
    head: Option<KeptHead>,
    boot_id: String,
}

/// One granted lease of this exec: what was granted, and its record.
pub struct Leased {
    pub grant: Grant,
    pub record: LeaseRecord,
}

impl Ledger {
    pub fn open(scene: &Scene) -> Result<Self, RunError> {
        let store = Store::open(&scene.host.state_dir).map_err(RunError::Trail)?;
        let ledger = Self { store, head: None, boot_id: scene.now.boot_id.clone() };
        ledger.refuse_a_cut_trail(scene)?;
        Ok(ledger)
    }

    /// A database that was removed would otherwise begin a new trail in silence.
    fn refuse_a_cut_trail(&self, scene: &Scene) -> Result<(), RunError> {
        let path = scene.host.state_dir.join(crate::launcher::serve::HEAD_FILE);
        let Ok(bytes) = std::fs::read(path) else { return Ok(()) };
        // A torn head is what `audit verify` is for: the trail itself is whole.
        let Ok(kept) = KeptHead::decode(&bytes) else { return Ok(()) };
        let found = self.store.read(|view| view.head()).map_err(RunError::Trail)?;
        let must_be = if kept.boot_id == self.boot_id { kept.latest.seq } else { kept.durable.seq };
        if found.seq < must_be {
            return Err(RunError::TrailCut { found: found.seq, kept: must_be });
        }
        Ok(())
    }

    /// Keeps the log short, so that the next start is fast. For the time in which the launcher works and
    /// the broker waits.
    pub fn tidy(&mut self) {
        // Nothing is lost by a log that stays long, and the next exec tries again.
        if let Err(e) = self.store.tidy() {
            eprintln!("sublet: could not tidy the trail's log: {e}");
        }
    }

    pub fn digests(&self) -> Result<Vec<(SecretName, ValueDigest)>, RunError> {
        self.store.read(|view| view.digests()).map_err(RunError::Trail)
    }

    pub fn sealed(&self, name: &SecretName) -> Result<Option<SealedSecret>, RunError> {
        self.store.read(|view| view.secret(name)).map_err(RunError::Trail)
    }

    /// The verdict, and its record: one transaction, so that counters are exact under any race. Granted:
    /// the requests, the grants, the use of each, and the exec, durable before any value moves. Denied:
    /// recorded before it is told. Without a lease nothing rests on the record, so it is only written.
    pub fn grant(&mut self, scene: &Scene) -> Result<Vec<Leased>, RunError> {
        let durability =
            if scene.requests.is_empty() { Durability::Relaxed } else { Durability::Durable };
        self.transaction(durability, |tx| {
            let recorded = begin(tx, scene)?;
            let run = match recorded {
                None => scene.run.clone(),
                Some(recorded) => match same_run(&scene.run, recorded) {
                    Ok(run) => run,
                    Err(e) => return Ok(Err(e)),
                },
            };
            let counters = tx.requests_counted(&run.run_id, &scene.now)?;
            let policy = Policy { profile: &scene.profile, config: &scene.host.config };
            let resolved = scene.resolved();
            match policy::decide_all(policy, &scene.requests, &run, counters, resolved.as_ref()) {
                Err(denial) => {
                    record_denial(tx, scene, &denial)?;
                    Ok(Err(denial.into()))
                }
                Ok(grants) => record_grants(tx, scene, grants).map(|granted| {
                    granted.map_err(|refused| {
                        RunError::Denied(Denial {
                            asked: scene.requests.first().map(Request::asked).unwrap_or_default(),
                            reason: DenyReason::DeliveryUnavailable,
                            message: refused.to_string(),
                            hint: "ask for a new lease".to_owned(),
                        })
                    })
                }),
            }
        })?
    }

    /// Takes one more use (a `get` on the `git` channel), durably, before its value moves.
    pub fn take(
        &mut self,
        scene: &Scene,
        lease: &Leased,
    ) -> Result<Result<(), UseRefused>, RunError> {
        let now = crate::host::now().map_err(RunError::Clock)?;
        self.transaction(Durability::Durable, |tx| take_use(tx, scene, lease, &now))
    }

    /// The exec is over: its end, what was scrubbed, how each lease ended.
    pub fn close(
        &mut self,
        scene: &Scene,
        leased: &[Leased],
        exited: &Exited,
    ) -> Result<(), RunError> {
        let now = crate::host::now().map_err(RunError::Clock)?;
        let ids: Vec<LeaseId> = leased.iter().map(|l| l.record.lease_id.clone()).collect();
        let durability = if leased.is_empty() { Durability::Relaxed } else { Durability::Durable };
        self.transaction(durability, |tx| {
            let draft = |kind| {
                Draft::new(kind, now.wall, &scene.hostname).of_run(&scene.run).of_exec(&scene.exec_id, &ids)
            };
            tx.finish_exec(&scene.exec_id, ExecState::Exited, Some(exited.exit_status().into()))?;
            let mut ended = draft(EventType::ExecExited)
                .outcome(exited.outcome_word())
                .with("exit_status", exited.exit_status());
            if let Some(signal) = exited.signal() {
                ended = ended.with("signal", signal);
            }
            tx.append(ended)?;
            if leased.is_empty() {
                return end_own_run(tx, scene, &now);
            }
            let mut scrubbed = draft(EventType::ExecScrubbed)
                .outcome(if exited.all_wiped() { "wiped" } else { "not_wiped" });
            for wiped in exited.scrubbed(leased) {
                scrubbed = scrubbed.with(
                    wiped.lease_id.as_str(),
                    serde_json::json!({"channel": wiped.channel, "bytes": wiped.bytes, "wiped": wiped.wiped}),
                );
            }
            tx.append(scrubbed)?;
            if exited.redacted > 0 {
                tx.append(draft(EventType::OutputRedacted).with("masked", exited.redacted))?;
            }
            for (index, lease) in leased.iter().enumerate() {
                let state = exited.state_of(index as u32);
                let kind = match state {
                    LeaseState::Expired => EventType::LeaseExpired,
                    _ => EventType::LeaseCompleted,
                };
                if tx.set_lease_state(&lease.record.lease_id, state)? {
                    tx.append(of_lease(kind, scene, lease, &now).outcome(state.as_str()))?;
                }
            }
            end_own_run(tx, scene, &now)
        })?;
        Ok(())
    }

    /// The story stops before the command ran, or the launcher died under it: closes what was recorded,
    /// and gives the error back. A lease that was never used is revoked; one whose exec was cut off is
    /// interrupted.
    pub fn abandon(&mut self, scene: &Scene, leased: &[Leased], error: RunError) -> RunError {
        let cut_off = matches!(error, RunError::LauncherDied);
        let ids: Vec<LeaseId> = leased.iter().map(|l| l.record.lease_id.clone()).collect();
        let closed = crate::host::now().map_err(RunError::Clock).and_then(|now| {
            self.transaction(Durability::Durable, |tx| {
                let state = if cut_off { ExecState::Interrupted } else { ExecState::Exited };
                let status = (!cut_off).then(|| i32::from(error.exit_status()));
                tx.finish_exec(&scene.exec_id, state, status)?;
                let draft = Draft::new(EventType::ExecExited, now.wall, &scene.hostname)
                    .of_run(&scene.run)
                    .of_exec(&scene.exec_id, &ids)
                    .because(error.reason())
                    .outcome(if cut_off { "interrupted" } else { "not_started" });
                tx.append(draft)?;
                let (state, kind) = if cut_off {
                    (LeaseState::Interrupted, EventType::LeaseInterrupted)
                } else {
                    (LeaseState::Revoked, EventType::LeaseRevoked)
                };
                for lease in leased {
                    if tx.set_lease_state(&lease.record.lease_id, state)? {
                        let draft = of_lease(kind, scene, lease, &now);
                        tx.append(draft.because(error.reason()).outcome(state.as_str()))?;
                    }
                }
                end_own_run(tx, scene, &now)
            })
        });
        // The next start finds what is still open without its owner, and closes it as interrupted.
        if let Err(e) = closed {
            eprintln!("sublet: could not record the end of {}: {e}", scene.exec_id);
        }
        error.denying(leased.iter().map(|l| l.grant.request().asked()))
    }

    /// Gives the launcher the trail's head to keep outside of the database.
    pub fn keep_head(&self, launcher: &Launcher) -> Result<(), RunError> {
        match &self.head {
            Some(head) => {
                Ok(launcher.order(&Order::KeepHead { head: head.encode().into_bytes() })?)
            }
            None => Ok(()),
        }
    }

    fn transaction<T>(
        &mut self,
        durability: Durability,
        act: impl FnOnce(&mut Tx<'_>) -> Result<T, StoreError>,
    ) -> Result<T, RunError> {
        let is_durable = durability == Durability::Durable;
        let (result, head) = self.store.transaction(durability, act).map_err(RunError::Trail)?;
        let durable = match (&self.head, is_durable) {
            (_, true) => head,
            (Some(kept), false) => kept.durable,
            (None, false) => Head::EMPTY,
        };
        self.head = Some(KeptHead { latest: head, durable, boot_id: self.boot_id.clone() });
        Ok(result)
    }
}

fn record_denial(tx: &mut Tx<'_>, scene: &Scene, denial: &Denial) -> Result<(), StoreError> {
    let past_ceiling =
        matches!(denial.reason, DenyReason::RateExceededMinute | DenyReason::RateExceededRun);
    let mut aggregated = 0;
    if past_ceiling {
        // A run that hammers would fill the disk: one line a minute tells of all.
        match tx.note_rate_denial(&scene.run.run_id, &scene.now)? {
            Some(since_the_last) => aggregated = since_the_last,
            None => return Ok(()),
        }
    }
    for request in &scene.requests {
        if !past_ceiling {
            tx.count_request(&scene.run.run_id, &scene.now)?;
        }
        tx.append(requested(scene, request))?;
        let draft = Draft::new(EventType::LeaseDenied, scene.now.wall, &scene.hostname)
            .because(denial.reason.as_str())
            .outcome("denied")
            .with("message", denial.message.clone());
        let mut draft = of_request(draft, scene, request);
        if request.asked() != denial.asked {
            draft = draft.with("denied_with", denial.asked.clone());
        }
        if aggregated > 0 {
            draft = draft.with("aggregated", aggregated);
        }
        tx.append(draft)?;
    }
    end_own_run(tx, scene, &scene.now)
}

fn record_grants(
    tx: &mut Tx<'_>,
    scene: &Scene,
    grants: Vec<Grant>,
) -> Result<Result<Vec<Leased>, UseRefused>, StoreError> {
    let leased: Vec<Leased> = grants
        .into_iter()
        .map(|grant| {
            let record = Lease::granted(&grant, LeaseId::fresh(), &scene.now).into_record();
            Leased { grant, record }
        })
        .collect();
    let ids: Vec<LeaseId> = leased.iter().map(|l| l.record.lease_id.clone()).collect();
    for lease in &leased {
        tx.count_request(&scene.run.run_id, &scene.now)?;
        tx.append(requested(scene, lease.grant.request()))?;
        tx.put_lease(&lease.record)?;
        tx.append(of_lease(EventType::LeaseGranted, scene, lease, &scene.now).outcome("granted"))?;
    }
    tx.put_exec(&ExecRecord {
        exec_id: scene.exec_id.clone(),
        run_id: scene.run.run_id.clone(),
        lease_ids: ids.clone(),
        command: recorded_command(&scene.command),
        state: ExecState::Running,
        exit_status: None,
        started_at: scene.now.wall,
    })?;
    for lease in &leased {
        // On `git` a use is one `get`.
        if lease.record.channel != Channel::Git
            && let Err(refused) = take_use(tx, scene, lease, &scene.now)?
        {
            return Ok(Err(refused));
        }
    }
    let mut started = Draft::new(EventType::ExecStarted, scene.now.wall, &scene.hostname)
        .of_run(&scene.run)
        .of_exec(&scene.exec_id, &ids)
        .with("command", recorded_command(&scene.command));
    if let Some(first) = leased.first() {
        started = started.of_request(&first.record.request_id);
    }
    tx.append(started)?;
    Ok(Ok(leased))
}

/// First in every transaction that begins something: what dead processes left open is closed, and the
/// run stands. Gives the run as it was recorded, if it was.
fn begin(tx: &mut Tx<'_>, scene: &Scene) -> Result<Option<Run>, StoreError> {
    let orphans = tx.adopt_orphans()?;
    let mut runs: BTreeMap<_, Option<Run>> = BTreeMap::new();
    for exec in &orphans.execs {
        // Both of its keepers were killed; the directory outlived its last process.
        cgroup::remove_left(&exec.exec_id);
        tx.finish_exec(&exec.exec_id, ExecState::Interrupted, None)?;
        let run = run_of(tx, &mut runs, &exec.run_id)?;
        let mut draft = Draft::new(EventType::ExecExited, scene.now.wall, &scene.hostname)
            .of_exec(&exec.exec_id, &exec.lease_ids)
            .outcome("interrupted");
        if let Some(run) = &run {
            draft = draft.of_run(run);
        }
        tx.append(draft)?;
    }
    for lease in &orphans.leases {
        if tx.set_lease_state(&lease.lease_id, LeaseState::Interrupted)? {
            let run = run_of(tx, &mut runs, &lease.run_id)?;
            let mut draft =
                Draft::new(EventType::LeaseInterrupted, scene.now.wall, &scene.hostname)
                    .of_lease(lease)
                    .outcome("interrupted");
            if let Some(run) = &run {
                draft = draft.of_run(run);
            }
            tx.append(draft)?;
        }
    }
    let recorded = if scene.is_new_run { None } else { tx.run(&scene.run.run_id)? };
    if recorded.is_none() {
        tx.put_run(&scene.run)?;
        tx.append(
            Draft::new(EventType::RunStarted, scene.now.wall, &scene.hostname)
                .of_run(&scene.run)
                .with("profile", scene.run.profile.clone())
                .with("workspace", scene.run.workspace.display().to_string()),
        )?;
    }
    Ok(recorded)
}

/// A run that was made for this exec alone ends with it; one that the host named goes on.
fn end_own_run(tx: &mut Tx<'_>, scene: &Scene, now: &Moment) -> Result<(), StoreError> {
    if scene.is_new_run && tx.end_run(&scene.run.run_id)? {
        tx.append(Draft::new(EventType::RunEnded, now.wall, &scene.hostname).of_run(&scene.run))?;
    }
    Ok(())
}

fn run_of(
    tx: &Tx<'_>,
    known: &mut BTreeMap<crate::model::id::RunId, Option<Run>>,
    id: &crate::model::id::RunId,
) -> Result<Option<Run>, StoreError> {
    if let Some(run) = known.get(id) {
        return Ok(run.clone());
    }
    let run = tx.run(id)?;
    known.insert(id.clone(), run.clone());
    Ok(run)
}

fn take_use(
    tx: &mut Tx<'_>,
    scene: &Scene,
    lease: &Leased,
    now: &Moment,
) -> Result<Result<(), UseRefused>, StoreError> {
    match tx.consume(&scene.run.run_id, &lease.record.lease_id, now)? {
        Err(refused) => Ok(Err(refused)),
        Ok(left) => {
            let ids = [lease.record.lease_id.clone()];
            tx.append(
                of_lease(EventType::LeaseConsumed, scene, lease, now)
                    .of_exec(&scene.exec_id, &ids)
                    .with("uses_left", left),
            )?;
            Ok(Ok(()))
        }
    }
}

fn requested(scene: &Scene, request: &Request) -> Draft {
    let draft = Draft::new(EventType::LeaseRequested, scene.now.wall, &scene.hostname);
    of_request(draft, scene, request)
}

fn of_request(draft: Draft, scene: &Scene, request: &Request) -> Draft {
    let mut draft = draft.of_run(&scene.run).of_request(&request.request_id);
    draft.capability = Some(request.capability.clone());
    draft.audience = Some(request.audience.clone());
    draft.channel = request.channel;
    if draft.reason.is_none()
        && let Some(reason) = &request.reason
    {
        draft = draft.because(reason.as_str());
    }
    draft
}

fn of_lease(kind: EventType, scene: &Scene, lease: &Leased, now: &Moment) -> Draft {
    Draft::new(kind, now.wall, &scene.hostname)
        .of_run(&scene.run)
        .of_lease(&lease.record)
        .of_request(&lease.record.request_id)
}

/// A run keeps its agent and principal; it may change its profile and workspace from exec to exec.
fn same_run(asked: &Run, recorded: Run) -> Result<Run, RunError> {
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
