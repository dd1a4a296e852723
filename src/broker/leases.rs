//! Leases: asked for on a run's socket, looked at, renewed, taken back.
#![forbid(unsafe_code)]

use crate::broker::late::LateRevocation;
use crate::broker::runs::no_run;
use crate::broker::{Broker, BrokerError, Scope, Selection};
use crate::envelope::{self, Envelope, Issuer};
use crate::host::ProfileRef;
use crate::lease::{Lease, LeaseView};
use crate::model::event::{Draft, EventType};
use crate::model::id::{LeaseId, RequestId, RunId};
use crate::model::lease::{LeaseRecord, LeaseState};
use crate::model::moment::{Moment, Span};
use crate::model::run::Run;
use crate::policy::{self, LeaseFlag, Policy, Reason, Request};
use crate::profile::{Place, Profile};
use crate::run::RunError;
use crate::run::entries;
use crate::run::mailbox::Mail;
use crate::store::{Durability, LeaseFilter, Revoke, StoreError, Tx};

/// How many leases are listed: the newest.
const MOST_LISTED: u32 = 10_000;

impl Broker {
    /// All are granted, or none is. Blocks until it is durable.
    ///
    /// # Errors
    /// The first denial, which is recorded before it is told.
    pub fn request(
        &self,
        run_id: &RunId,
        asked: Vec<(LeaseFlag, Option<Reason>)>,
    ) -> Result<Vec<LeaseView>, BrokerError> {
        self.refuse_while_draining()?;
        self.tell_late_revocations()?;
        let run = self.run_to_decide(run_id)?;
        let profile = self.host.profile(&ProfileRef::parse(&run.profile))?;
        let request_id = RequestId::fresh();
        let requests: Vec<Request> = asked
            .into_iter()
            .map(|(flag, reason)| flag.into_request(request_id.clone(), run_id.clone(), reason))
            .collect();
        let ids: Vec<LeaseId> = requests.iter().map(|_| LeaseId::fresh()).collect();
        let now = self.now()?;
        let who = self.who(&run, &now);
        let policy = Policy {
            profile: &profile,
            config: &self.host.config,
            has_issuer: self.host.has_issuer(),
        };
        let decided = self.transaction(Durability::Durable, |tx| {
            // The run may have ended since it was looked up.
            let state = tx.run(run_id)?.map(|recorded| recorded.state);
            let Some(state) = state else { return Ok(Err(no_run(run_id))) };
            let run = Run { state, ..run.clone() };
            let counters = tx.requests_counted(run_id, &now)?;
            match policy::decide_all(policy, &requests, &run, counters, None) {
                Ok(grants) => entries::record_grants(tx, who, grants, &ids).map(Ok),
                Err(denial) => {
                    entries::record_denial(tx, who, &requests, &denial)?;
                    Ok(Err(RunError::from(denial).into()))
                }
            }
        })?;
        match decided {
            Ok(leased) => {
                self.metrics.granted(leased.len() as u64);
                leased.iter().for_each(|lease| self.seen.remember(&lease.record));
                let view =
                    |l: &entries::Leased| LeaseView::new(&l.record, Some(l.grant.place()), &now);
                Ok(leased.iter().map(view).collect())
            }
            Err(e) => {
                if let BrokerError::Run(RunError::Denied(denial)) = &e {
                    self.metrics.denied(denial.reason);
                }
                Err(e)
            }
        }
    }

    pub fn leases(&self, scope: &Scope) -> Result<Vec<LeaseView>, BrokerError> {
        let run = match scope {
            Scope::Run(id) => Some(id.clone()),
            Scope::Host => None,
        };
        let filter = LeaseFilter { run, limit: Some(MOST_LISTED), ..LeaseFilter::default() };
        let records = self.store.read(|view| view.leases(&filter))?;
        let records: Vec<_> = records.into_iter().map(|record| self.as_revoked(record)).collect();
        let now = self.now()?;
        // Runs are many and profiles few, and a list is often of one run.
        let mut profiles = std::collections::BTreeMap::new();
        Ok(records
            .iter()
            .map(|record| {
                let profile = profiles
                    .entry(record.run_id.clone())
                    .or_insert_with(|| self.profile_of(&record.run_id).ok());
                let place = profile.as_ref().and_then(|profile| place(profile, record));
                LeaseView::new(record, place.as_ref(), &now)
            })
            .collect())
    }

    pub fn lease(&self, scope: &Scope, id: &LeaseId) -> Result<LeaseView, BrokerError> {
        let record = self.record(scope, id)?;
        Ok(self.lease_view(&record, &self.now()?))
    }

    /// O(1): one look-up by key.
    pub fn lease_state(&self, id: &LeaseId) -> Result<LeaseState, BrokerError> {
        Ok(self.record(&Scope::Host, id)?.state)
    }

    /// The signed envelope of a lease, as its JSON text.
    ///
    /// # Errors
    /// [`BrokerError::Conflict`] for a lease that has ended: it permits nothing any more.
    pub fn envelope(&self, scope: &Scope, id: &LeaseId) -> Result<String, BrokerError> {
        let record = self.record(scope, id)?;
        if !record.state.is_open() {
            let state = record.state.as_str();
            return Err(BrokerError::Conflict { message: format!("lease {id} is {state}") });
        }
        let run = self.run_to_decide(&record.run_id)?;
        let profile = self.host.profile(&ProfileRef::parse(&run.profile))?;
        let constraints = profile
            .capability(&record.capability)
            .map(|c| c.constraints.clone())
            .unwrap_or_default();
        let issuer = Issuer { name: self.hostname.parse()?, url: None };
        let envelope = Envelope::of_lease(&record, &run, &constraints, &issuer)?;
        Ok(envelope::sign(&envelope, &self.signing))
    }

    /// The public half of the key that signs envelopes: a JWKS.
    pub fn jwks(&self) -> serde_json::Value {
        self.signing.public().jwks()
    }

    /// Gives a renewable lease more time, as far as `max_ttl` lets.
    ///
    /// # Errors
    /// [`BrokerError::Conflict`] for one that is not renewable, has ended, or cannot last longer.
    pub fn renew(&self, id: &LeaseId, ttl: Option<Span>) -> Result<LeaseView, BrokerError> {
        self.refuse_while_draining()?;
        self.tell_late_revocations()?;
        let conflict = |message| BrokerError::Conflict { message };
        let record = self.record(&Scope::Host, id)?;
        let run = self.run_to_decide(&record.run_id)?;
        let profile = self.host.profile(&ProfileRef::parse(&run.profile))?;
        let capability = profile.capability(&record.capability).ok_or_else(|| {
            conflict(format!("the profile declares no {} any more", record.capability))
        })?;
        if !capability.renewable {
            return Err(conflict(format!(
                "capability {} is not renewable: its profile `{}` does not say so",
                capability.name, profile.name
            )));
        }
        let policy = &self.host.config.leases;
        let most = capability.ttl.map_or(policy.max_ttl, |most| most.min(policy.max_ttl));
        let ttl = ttl.unwrap_or(most.min(policy.default_ttl));
        if ttl > most {
            return Err(conflict(format!(
                "{ttl} is more than the {most} that capability {} permits at a time",
                capability.name
            )));
        }
        let now = self.now()?;
        let who = self.who(&run, &now);
        let renewed = self.transaction(Durability::Durable, |tx| {
            let Some(record) = tx.lease(id)? else { return Ok(Err("it is gone".to_owned())) };
            let mut lease = Lease::recorded(record);
            if let Err(e) = lease.renew(ttl.0, policy.max_ttl.0, &now) {
                return Ok(Err(e.to_string()));
            }
            let record = lease.into_record();
            match tx.renew(id, record.expires_at, record.expires_boot, &now)? {
                Err(refused) => Ok(Err(refused.to_string())),
                Ok(record) => {
                    let draft = who.of_lease(EventType::LeaseRenewed, &record);
                    tx.append(draft.because("control"))?;
                    Ok(Ok(record))
                }
            }
        })?;
        let record = renewed.map_err(conflict)?;
        self.mail_execs(
            |exec| exec.leases.contains(id),
            Mail::Renewed {
                lease: id.clone(),
                expires_at: record.expires_at,
                expires_boot: record.expires_boot,
            },
        );
        Ok(self.lease_view(&record, &now))
    }

    /// Takes leases back: what is in use is wiped at once, then it is recorded. Returns what was open. When it
    /// returns, nothing that these leases delivered can be read any more, and no exec begins with one.
    pub fn revoke(
        &self,
        which: &Selection,
        reason: Option<Reason>,
    ) -> Result<Vec<LeaseView>, BrokerError> {
        // Before all that can fail: a state that cannot be looked at keeps nothing readable.
        self.take_back(which);
        let reason = reason.as_ref().map_or("control", Reason::as_str);
        self.revoke_in_trail(which, reason).map_err(|error| match error {
            BrokerError::Run(RunError::Trail(source)) => {
                let late = LateRevocation { which: which.clone(), reason: reason.to_owned() };
                self.keep_revocation(late);
                BrokerError::LateRevocation(source)
            }
            other => other,
        })
    }

    fn revoke_in_trail(
        &self,
        which: &Selection,
        reason: &str,
    ) -> Result<Vec<LeaseView>, BrokerError> {
        if let Selection::Lease(id) = which {
            self.record(&Scope::Host, id)?;
        }
        let now = self.now()?;
        let revoked = self.transaction(Durability::Durable, |tx| {
            Self::record_revocation(tx, &self.hostname, &now, which, reason)
        })?;
        // An exec that began in between has taken its use before that was recorded.
        self.take_back(which);
        if let (Selection::Lease(id), []) = (which, &revoked[..]) {
            // One that is over stays as it ended: asked twice, answered alike.
            if self.record(&Scope::Host, id)?.state.is_open() {
                let message = format!("lease {id} is a `sublet run`'s: end that process");
                return Err(BrokerError::Conflict { message });
            }
        }
        self.metrics.revoked(revoked.len() as u64);
        Ok(revoked.iter().map(|record| self.lease_view(record, &now)).collect())
    }

    /// Wipes the deliveries of the living execs, before anything is written anywhere, and tells their threads.
    pub(super) fn take_back(&self, which: &Selection) {
        let runs_of = |principal: &crate::model::name::IdentityName| -> Vec<RunId> {
            let active = self.active();
            let of = active.values().filter(|active| active.run.principal == *principal);
            of.map(|active| active.run.run_id.clone()).collect()
        };
        // Execs first: a token of a container may just be being replaced, which waits for the disk.
        match which {
            Selection::Lease(id) => {
                self.mail_execs(|exec| exec.leases.contains(id), Mail::Revoke(id.clone()));
                self.take_back_projected(|_, lease| lease == id);
            }
            Selection::Run(id) => {
                self.mail_execs(|exec| exec.run_id == *id, Mail::RevokeAll);
                self.take_back_projected(|run, _| run == id);
            }
            Selection::Principal(principal) => {
                let runs = runs_of(principal);
                self.mail_execs(|exec| runs.contains(&exec.run_id), Mail::RevokeAll);
                self.take_back_projected(|run, _| runs.contains(run));
            }
            Selection::All => {
                self.mail_execs(|_| true, Mail::RevokeAll);
                self.take_back_projected(|_, _| true);
            }
        }
    }

    /// Returns the leases as they are now.
    pub(super) fn record_revocation(
        tx: &mut Tx<'_>,
        hostname: &str,
        now: &Moment,
        which: &Selection,
        reason: &str,
    ) -> Result<Vec<LeaseRecord>, StoreError> {
        let revoked = tx.revoke(match which {
            Selection::Lease(id) => Revoke::Lease(id),
            Selection::Run(id) => Revoke::Run(id),
            Selection::Principal(principal) => Revoke::Principal(principal),
            Selection::All => Revoke::All,
        })?;
        Self::tell_ends(tx, hostname, now, EventType::LeaseRevoked, reason, revoked)
    }

    /// One event for each lease that has ended so.
    pub(super) fn tell_ends(
        tx: &mut Tx<'_>,
        hostname: &str,
        now: &Moment,
        kind: EventType,
        reason: &str,
        ended: Vec<LeaseRecord>,
    ) -> Result<Vec<LeaseRecord>, StoreError> {
        let state = match kind {
            EventType::LeaseExpired => LeaseState::Expired,
            _ => LeaseState::Revoked,
        };
        let mut told = Vec::with_capacity(ended.len());
        for lease in ended {
            let mut draft = Draft::new(kind, now.wall, hostname).of_lease(&lease);
            if let Some(run) = tx.run(&lease.run_id)? {
                draft = draft.of_run(&run);
            }
            if !reason.is_empty() {
                draft = draft.because(reason);
            }
            tx.append(draft.outcome(state.as_str()))?;
            told.push(LeaseRecord { state, ..lease });
        }
        Ok(told)
    }

    /// Another run's lease is one that does not exist.
    pub(super) fn record(&self, scope: &Scope, id: &LeaseId) -> Result<LeaseRecord, BrokerError> {
        let found = self.store.read(|view| view.lease(id))?;
        let is_seen = |record: &LeaseRecord| match scope {
            Scope::Run(run) => record.run_id == *run,
            Scope::Host => true,
        };
        let found = found.filter(is_seen).map(|record| self.as_revoked(record));
        found.ok_or_else(|| BrokerError::NotFound { what: format!("lease {id}") })
    }

    fn lease_view(&self, record: &LeaseRecord, now: &Moment) -> LeaseView {
        let profile = self.profile_of(&record.run_id).ok();
        let place = profile.as_ref().and_then(|profile| place(profile, record));
        LeaseView::new(record, place.as_ref(), now)
    }

    pub(super) fn profile_of(&self, run_id: &RunId) -> Result<Profile, BrokerError> {
        let active = self.active().get(run_id).map(|active| active.run.profile.clone());
        let named = match active {
            Some(named) => named,
            None => {
                let run = self.store.read(|view| view.run(run_id))?;
                run.ok_or_else(|| no_run(run_id))?.profile
            }
        };
        Ok(self.host.profile(&ProfileRef::parse(&named))?)
    }
}

/// Where a lease's value is found, by the profile as it is now.
fn place(profile: &Profile, record: &LeaseRecord) -> Option<Place> {
    profile.capability(&record.capability)?.audience(&record.audience)?.place(record.channel)
}
