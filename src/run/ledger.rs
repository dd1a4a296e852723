//! What is recorded of one exec, and when: the store and the trail as the story uses them. Durable before
//! a value moves; relaxed where nothing rests on it.
#![forbid(unsafe_code)]

mod grant;

use std::path::PathBuf;
use std::sync::Arc;

use super::attend::{Exited, Unattended};
use super::caller::Caller;
use super::entries::{self, Leased, Who};
use super::error::RunError;
use super::scene::Scene;
use super::value::unavailable_vault;
use crate::config::SecretSource;
use crate::host::Host;
use crate::identity::IssuerKeys;
use crate::launcher::client::Session;
use crate::launcher::wire::Order;
use crate::lease::Lease;
use crate::model::event::{Draft, EventType, KeptHead};
use crate::model::exec::ExecState;
use crate::model::id::LeaseId;
use crate::model::lease::LeaseState;
use crate::model::name::{Channel, SecretName};
use crate::model::report::ScrubbedDelivery;
use crate::source::vault::{KeySource, VaultError, VaultKey};
use crate::store::{
    Durability, Heads, Held, MintRecord, SealedSecret, SharedStore, StoreError, Tx, UseRefused,
    View,
};
use grant::{begin, end_own_run, grant_fresh, record_start, redeem, same_run};

/// Of so many values at most it is looked within the granting transaction whether they are managed ones.
const FEW: usize = 64;

/// The store, open for this exec.
pub struct Ledger {
    store: Arc<SharedStore>,
    boot_id: String,
    keys: Arc<Keys>,
    /// This is one exec of many.
    shared: Option<Arc<Shared>>,
    /// What was minted for this exec and is to end with it.
    pub mints: Vec<MintRecord>,
    /// From when on, in milliseconds of the wall clock, something that an earlier process minted is to be ended, as far
    /// as is known: at first, whatever there is.
    pub others_due: Option<i64>,
}

/// Where this host's keys are read from. Holds none.
#[derive(Debug)]
pub struct Keys {
    pub vault: KeySource,
    pub issuer: IssuerKeys,
}

/// What the execs of a broker have in common.
pub struct Shared {
    /// Opened while there were the rights to.
    pub keys: Arc<Keys>,
    /// Told after each commit.
    pub committed: Box<dyn Fn(Heads) + Send + Sync>,
}

impl Ledger {
    /// For this process's one exec.
    pub fn open(scene: &Scene, keys: Keys) -> Result<Self, RunError> {
        let state_dir = &scene.host.state_dir;
        let store = SharedStore::open_single(state_dir).map_err(RunError::Trail)?;
        refuse_a_changed_trail(&store, state_dir, &scene.now.boot_id)?;
        let boot_id = scene.now.boot_id.clone();
        Ok(Self {
            store: Arc::new(store),
            boot_id,
            keys: Arc::new(keys),
            shared: None,
            mints: Vec::new(),
            others_due: Some(i64::MIN),
        })
    }

    /// For one exec of many: the broker checks the trail, keeps its head, and tidies.
    pub fn shared(store: Arc<SharedStore>, shared: Arc<Shared>) -> Self {
        let keys = Arc::clone(&shared.keys);
        Self {
            store,
            boot_id: String::new(),
            keys,
            shared: Some(shared),
            mints: Vec::new(),
            others_due: None,
        }
    }

    /// The process ends now: the kernel closes the store's files, and sooner than SQLite takes itself
    /// apart. Nothing of a value is in it.
    pub fn leave_open(self) {
        std::mem::forget(self.store);
    }

    pub fn issuer_keys(&self) -> &IssuerKeys {
        &self.keys.issuer
    }

    /// The vault's key, read anew: it is not kept.
    pub fn vault_key(&self) -> Result<VaultKey, VaultError> {
        self.keys.vault.load()
    }

    /// The same, and makes it where no secret was ever set: what revokes a minted value is sealed with it.
    pub fn vault_key_for_handles(&self) -> Result<VaultKey, VaultError> {
        self.keys.vault.load_or_create()
    }

    /// Looks at the store as it stands.
    pub fn read<T>(
        &self,
        look: impl FnOnce(&View<'_>) -> Result<T, StoreError>,
    ) -> Result<T, RunError> {
        self.store.read(look).map_err(RunError::Trail)
    }

    /// Keeps the log short, so that the next start is fast. For the time in which the launcher works and
    /// the broker waits.
    pub fn tidy(&mut self) {
        if self.shared.is_some() {
            return;
        }
        // Nothing is lost by a log that stays long, and the next exec tries again.
        if let Err(e) = self.store.tidy() {
            eprintln!("sublet: could not tidy the trail's log: {e}");
        }
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
        // Made before: others wait for the transaction.
        let mut given = Some(scene.digests_of_given(&self.keys.vault));
        if let Some(many) = given.take_if(|given| given.as_ref().is_ok_and(|all| all.len() > FEW)) {
            let managed = self.read(|view| view.digests())?;
            scene.refuse_managed_values(&managed, many)?;
        }
        let mut leased = self.transaction(durability, |tx| {
            if let Some(few) = given
                && let Err(e) = scene.refuse_managed_values(&tx.digests()?, few)
            {
                return Ok(Err(e));
            }
            let run = match begin(tx, scene, self.shared.is_some())? {
                None => scene.run.clone(),
                Some(recorded) => match same_run(&scene.run, recorded) {
                    Ok(run) => run,
                    Err(e) => return Ok(Err(e)),
                },
            };
            let who = Who { run: &run, ..scene.who() };
            let leased = match &scene.held {
                None => grant_fresh(tx, scene, who)?,
                Some(ids) => redeem(tx, scene, who, ids)?,
            };
            let mut leased = match leased {
                Ok(leased) => leased,
                Err(why) => {
                    end_own_run(tx, scene, who)?;
                    return Ok(Err(why));
                }
            };
            record_start(tx, scene, who, &leased)?;
            for lease in leased.iter_mut().filter(|lease| is_sealed(lease)) {
                lease.at_hand = tx.secret(lease.grant.secret())?;
            }
            Ok(Ok(leased))
        })??;
        for lease in &mut leased {
            lease.renew_at = scene.renewal_of(lease);
        }
        Ok(leased)
    }

    /// Takes one more use (a `get` on the `git` channel), durably, before its value moves.
    pub fn take(
        &mut self,
        scene: &Scene,
        lease: &Leased,
    ) -> Result<Result<(), UseRefused>, RunError> {
        let now = crate::host::now().map_err(RunError::Clock)?;
        self.transaction(Durability::Durable, |tx| {
            entries::take_use(tx, scene.who().at(&now), &scene.exec_id, &lease.record)
        })
    }

    /// Renews a lease of a living exec, as far as `max_ttl` lets. Returns whether its time has grown.
    pub fn renew(&mut self, scene: &Scene, lease: &mut Leased) -> Result<bool, RunError> {
        let now = crate::host::now().map_err(RunError::Clock)?;
        // Whatever comes of it: it is not tried again at the same time.
        lease.renew_at = None;
        let policy = &scene.host.config.leases;
        let renewed = self.transaction(Durability::Durable, |tx| {
            // As it stands now: the control socket may have renewed or revoked it.
            let Some(record) = tx.lease(&lease.record.lease_id)? else { return Ok(None) };
            let mut renewed = Lease::recorded(record);
            if renewed.renew(lease.ttl, policy.max_ttl.0, &now).is_err() {
                return Ok(None);
            }
            let record = renewed.into_record();
            let (id, boot) = (&record.lease_id, record.expires_boot);
            let Ok(record) = tx.renew(id, record.expires_at, boot, &now)? else {
                return Ok(None);
            };
            let ids = [record.lease_id.clone()];
            let draft = scene.who().at(&now).of_lease(EventType::LeaseRenewed, &record);
            tx.append(draft.of_exec(&scene.exec_id, &ids).because("auto_renew"))?;
            Ok(Some(record))
        })?;
        let Some(record) = renewed else { return Ok(false) };
        lease.extend(record.expires_at, record.expires_boot, scene);
        Ok(true)
    }

    /// A `get` that was not answered, and why: by name, then in words.
    pub fn refuse_git(
        &mut self,
        scene: &Scene,
        lease: Option<&Leased>,
        why: &str,
    ) -> Result<(), RunError> {
        let now = crate::host::now().map_err(RunError::Clock)?;
        let (name, words) = why.split_once(": ").unwrap_or(("audience_not_permitted", why));
        let who = scene.who().at(&now);
        self.transaction(Durability::Relaxed, |tx| {
            let draft = match lease {
                Some(lease) => who.of_lease(EventType::LeaseDenied, &lease.record),
                None => who.draft(EventType::LeaseDenied),
            };
            let ids: Vec<LeaseId> = lease.map(|l| l.record.lease_id.clone()).into_iter().collect();
            let draft = draft.of_exec(&scene.exec_id, &ids).because(name).outcome("denied");
            tx.append(draft.with("message", words)).map(drop)
        })
    }

    /// The exec is over: its end, what was scrubbed, how each lease ended.
    pub fn close(
        &mut self,
        scene: &Scene,
        leased: &[Leased],
        exited: &Exited,
    ) -> Result<(), RunError> {
        let now = crate::host::now().map_err(RunError::Clock)?;
        let who = scene.who().at(&now);
        let ids: Vec<LeaseId> = leased.iter().map(|l| l.record.lease_id.clone()).collect();
        // Nothing that is still to come rests on it. After a power cut in the next moments the exec and its
        // leases are closed as interrupted, as if the cut had come a moment earlier.
        self.transaction(Durability::Relaxed, |tx| {
            let draft =
                |kind| who.draft(kind).of_exec(&scene.exec_id, &ids).of_request(&scene.request_id);
            let status = exited.exit_status();
            if !tx.finish_exec(&scene.exec_id, ExecState::Exited, Some(status.into()))? {
                // Another process took this one for dead, and has told its end.
                return Ok(());
            }
            let mut ended = draft(EventType::ExecExited)
                .outcome(exited.outcome_word())
                .with("exit_status", status);
            if let Some(signal) = exited.signal() {
                ended = ended.with("signal", signal);
            }
            tx.append(ended)?;
            if leased.is_empty() {
                return end_own_run(tx, scene, who);
            }
            tx.append(of_scrubbed(draft(EventType::ExecScrubbed), &exited.scrubbed(leased)))?;
            if exited.redacted > 0 {
                tx.append(draft(EventType::OutputRedacted).with("masked", exited.redacted))?;
            }
            for (index, lease) in leased.iter().enumerate() {
                let state = exited.state_of(scene, lease, index as u32);
                let kind = match state {
                    LeaseState::Expired => EventType::LeaseExpired,
                    _ => EventType::LeaseCompleted,
                };
                let id = &lease.record.lease_id;
                let ended = match (state, scene.is_one_shot()) {
                    (LeaseState::Expired, _) | (_, true) => tx.set_lease_state(id, state)?,
                    // Who revoked it records that, perhaps later than this.
                    (LeaseState::Revoked, false) => false,
                    // Another exec may have taken a use meanwhile: the record tells.
                    (_, false) => tx.complete_if_spent(id)?.is_some(),
                };
                if ended {
                    let state =
                        if kind == EventType::LeaseExpired { "expired" } else { "completed" };
                    tx.append(who.of_lease(kind, &lease.record).outcome(state))?;
                }
            }
            end_own_run(tx, scene, who)
        })
    }

    /// The story stops before the command ran: closes what was recorded, and gives the error back. In one shot a
    /// lease that was never used is revoked; the broker's has lost a use. Under a launcher that died it may have run.
    pub fn abandon(
        &mut self,
        scene: &Scene,
        caller: &Caller,
        leased: &[Leased],
        error: RunError,
    ) -> RunError {
        self.stop(
            scene,
            caller,
            leased,
            Unattended { error, has_begun: false, scrubbed: Vec::new() },
        )
    }

    /// The same while the command runs, which dies of it, or once its deliveries are filled. What has begun is
    /// interrupted, and in one shot its leases are. The broker's, which other execs may have too, are as
    /// [`Ledger::abandon`] leaves them.
    pub fn stop(
        &mut self,
        scene: &Scene,
        caller: &Caller,
        leased: &[Leased],
        early: Unattended,
    ) -> RunError {
        let Unattended { error, has_begun, scrubbed } = early;
        let cut_off = has_begun || matches!(error, RunError::LauncherDied);
        let ids: Vec<LeaseId> = leased.iter().map(|l| l.record.lease_id.clone()).collect();
        let ends_with_it = scene.is_one_shot() || matches!(error, RunError::LauncherDied);
        // Who revoked one records that, perhaps later than this.
        let ours = leased.iter().filter(|lease| !caller.is_revoked(&lease.record.lease_id));
        let ours: Vec<&Leased> = ours.collect();
        let closed = crate::host::now().map_err(RunError::Clock).and_then(|now| {
            let who = scene.who().at(&now);
            self.transaction(Durability::Durable, |tx| {
                let state = if cut_off { ExecState::Interrupted } else { ExecState::Exited };
                let status = (!cut_off).then(|| i32::from(error.exit_status()));
                if !tx.finish_exec(&scene.exec_id, state, status)? {
                    return Ok(());
                }
                let draft = who
                    .draft(EventType::ExecExited)
                    .of_exec(&scene.exec_id, &ids)
                    .of_request(&scene.request_id);
                let outcome = if cut_off { "interrupted" } else { "not_started" };
                tx.append(draft.because(error.reason()).outcome(outcome))?;
                if !scrubbed.is_empty() {
                    let draft = who.draft(EventType::ExecScrubbed).of_exec(&scene.exec_id, &ids);
                    tx.append(of_scrubbed(draft.of_request(&scene.request_id), &scrubbed))?;
                }
                let (state, kind) = if cut_off {
                    (LeaseState::Interrupted, EventType::LeaseInterrupted)
                } else {
                    (LeaseState::Revoked, EventType::LeaseRevoked)
                };
                for lease in ours {
                    let id = &lease.record.lease_id;
                    if !ends_with_it {
                        // Its use is spent; what else it is good for it stays good for.
                        if tx.complete_if_spent(id)?.is_some() {
                            let draft = who.of_lease(EventType::LeaseCompleted, &lease.record);
                            tx.append(draft.outcome("completed"))?;
                        }
                    } else if tx.set_lease_state(id, state)? {
                        let draft = who.of_lease(kind, &lease.record);
                        tx.append(draft.because(error.reason()).outcome(state.as_str()))?;
                    }
                }
                end_own_run(tx, scene, who)
            })
        });
        // The next start finds what is still open without its owner, and closes it as interrupted.
        if let Err(e) = closed {
            eprintln!("sublet: could not record the end of {}: {e}", scene.exec_id);
        }
        error.denying(leased.iter().map(|l| l.grant.request().asked()))
    }

    /// Gives the launcher the trail's head to keep outside of the database. The broker does so for all.
    pub fn keep_head(&self, session: &Session) -> Result<(), RunError> {
        match self.store.heads() {
            Some(heads) if self.shared.is_none() => {
                let head = KeptHead {
                    latest: heads.latest,
                    durable: heads.durable,
                    boot_id: self.boot_id.clone(),
                };
                Ok(session.order(&Order::KeepHead { head: head.encode().into_bytes() })?)
            }
            _ => Ok(()),
        }
    }

    pub fn transaction<T: Send>(
        &self,
        durability: Durability,
        act: impl FnOnce(&mut Tx<'_>) -> Result<T, StoreError> + Send,
    ) -> Result<T, RunError> {
        let (value, _) = self.store.transaction(durability, act).map_err(RunError::Trail)?;
        if let (Some(shared), Some(heads)) = (&self.shared, self.store.heads()) {
            (shared.committed)(heads);
        }
        Ok(value)
    }
}

/// Whether it is delivered as it lies in the vault, before the command begins.
fn is_sealed(lease: &Leased) -> bool {
    let is_at_start = !matches!(lease.record.channel, Channel::Git | Channel::Ssh);
    is_at_start && matches!(lease.grant.source(), SecretSource::Vault)
}

/// Where the keys are, opened while there are the rights to.
pub fn open_keys(host: &Host) -> Result<Keys, RunError> {
    let credentials = std::env::var_os("CREDENTIALS_DIRECTORY").map(PathBuf::from);
    let (state_dir, credentials) = (&host.state_dir, credentials.as_deref());
    let issuer = IssuerKeys::open(state_dir, credentials)
        .map_err(|error| super::identity::unavailable(error.into()))?;
    let vault = KeySource::open(state_dir, credentials).map_err(unavailable_vault)?;
    Ok(Keys { vault, issuer })
}

/// What was wiped, by lease.
pub fn of_scrubbed(draft: Draft, scrubbed: &[ScrubbedDelivery]) -> Draft {
    let all_wiped = scrubbed.iter().all(|delivery| delivery.wiped);
    let draft = draft.outcome(if all_wiped { "wiped" } else { "not_wiped" });
    scrubbed.iter().fold(draft, |draft, ScrubbedDelivery { lease_id, channel, bytes, wiped }| {
        let what = serde_json::json!({"channel": channel, "bytes": bytes, "wiped": wiped});
        draft.with(lease_id.as_str(), what)
    })
}

/// A database that was removed, cut or rewritten would otherwise go on in silence, and what tells of it, the head that is
/// kept outside, would be written over.
///
/// # Errors
/// [`RunError::TrailCut`], [`RunError::TrailRewritten`].
pub fn refuse_a_changed_trail(
    store: &SharedStore,
    state_dir: &std::path::Path,
    boot_id: &str,
) -> Result<(), RunError> {
    let path = state_dir.join(crate::launcher::serve::HEAD_FILE);
    let bytes = match std::fs::read(&path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(RunError::Head { path, source }),
    };
    // A torn head is what `audit verify` is for: the trail itself is whole.
    let Ok(kept) = KeptHead::decode(&bytes) else { return Ok(()) };
    let kept = if kept.boot_id == boot_id { kept.latest } else { kept.durable };
    match store.read(|view| view.holds(&kept)).map_err(RunError::Trail)? {
        Held::Whole => Ok(()),
        Held::EndsAt(found) => Err(RunError::TrailCut { found, kept: kept.seq }),
        Held::Otherwise => Err(RunError::TrailRewritten { seq: kept.seq }),
    }
}
