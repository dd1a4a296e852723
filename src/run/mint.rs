//! Values that another party mints for a lease: asked for by a minter, recorded before they are delivered,
//! ended when their exec is.
//!
//! What revokes a value is sealed by the vault's key and durable before the value moves, so that the next
//! start can revoke it after a crash of everything. Each value has its `mint.issued` and one end:
//! `mint.revoked`, `mint.expired`, and between them perhaps `mint.revocation_failed`, as often as it was tried.
//! The lease's id joins them all, and is what the far side is told.
//!
//! - [`renew`]: while the exec lives
//! - [`end`]: when it is over
#![forbid(unsafe_code)]

mod end;
pub mod renew;

pub use end::{end_all, end_due, look_for_others, next_expiry, tell_expired};

use std::time::Duration;

use jiff::Timestamp;

use self::end::{ask_to_revoke, revoked};
use super::entries::Leased;
use super::error::RunError;
use super::identity;
use super::ledger::Ledger;
use super::scene::Scene;
use super::sources::{self, Exchange, Question, unavailable};
use super::value::{self, Material, Piece, Value, unavailable_vault};
use crate::config::{HostConfig, SecretSource};
use crate::launcher::client::Session;
use crate::model::event::{Draft, EventType};
use crate::model::id::{ExecId, MintId};
use crate::model::mint::{
    About, Credential, Facts, Failure, Fault, Operation, Reply, Request, Role,
};
use crate::model::moment::{Moment, timestamp_text};
use crate::model::name::SecretName;
use crate::model::secret::Secret;
use crate::source::vault;
use crate::store::{Durability, MintRecord, StoreError, Tx};

/// What a request takes beside its credentials and its handle.
const ROOM_FOR_FACTS: usize = 48 << 10;
/// How long an exec's end waits for what it revokes.
const PATIENCE: Duration = Duration::from_secs(10);

/// Just minted: to be recorded, or revoked.
pub struct Fresh {
    record: MintRecord,
    handle: Option<Secret>,
}

impl Fresh {
    /// Made by ourselves for a lease: nothing revokes it, and it ends when it expires.
    pub fn of_ours(exec_id: &ExecId, lease: &Leased, about: About) -> Self {
        let record = MintRecord {
            mint_id: MintId::fresh(),
            lease_id: lease.record.lease_id.clone(),
            exec_id: exec_id.clone(),
            secret: lease.grant.secret().clone(),
            about,
            handle: None,
            attempts: 0,
        };
        Self { record, handle: None }
    }
}

/// Asks a minter for the value of a lease.
pub fn ask(
    ledger: &Ledger,
    scene: &Scene,
    session: &Session,
    lease: &Leased,
    now: &Moment,
) -> Result<Question, RunError> {
    let (grant, record) = (&lease.grant, &lease.record);
    let capability = grant.capability();
    let mut constraints: Vec<(String, String)> =
        capability.constraints.iter().map(|(k, v)| (k.clone(), v.clone())).collect();
    constraints.sort();
    let facts = Facts {
        lease_id: record.lease_id.to_string(),
        run_id: record.run_id.to_string(),
        exec_id: scene.exec_id.to_string(),
        agent: scene.run.agent.to_string(),
        principal: scene.run.principal.to_string(),
        capability: record.capability.to_string(),
        audience: record.audience.to_string(),
        path: grant.audience().path.as_ref().map(|path| path.as_str().to_owned()),
        constraints,
        ttl_seconds: record.expires_boot.saturating_sub(now.boot).as_secs().max(1),
        now: now.wall.as_second(),
    };
    send(ledger, &scene.host.config, session, grant.secret(), Operation::Mint, facts, None)
}

/// Gathers what the source proves itself with, and starts the minter.
fn send(
    ledger: &Ledger,
    config: &HostConfig,
    session: &Session,
    name: &SecretName,
    operation: Operation,
    facts: Facts,
    handle: Option<&Secret>,
) -> Result<Question, RunError> {
    let Some(entry) = config.secrets.get(name) else {
        return Err(unavailable(name, "the configuration has no such secret", "add [secrets]"));
    };
    let mut credentials: Vec<(Role, Secret)> = Vec::new();
    for (role, other) in entry.source.credentials() {
        let Some(source) = config.secrets.get(other).map(|entry| &entry.source) else {
            return Err(unavailable(
                other,
                "the configuration has no such secret",
                "add [secrets]",
            ));
        };
        let secret = match source {
            SecretSource::Jwt(jwt) => identity::proof(ledger, &facts, jwt)?,
            source => value::credential(ledger, session, other, source)?,
        };
        credentials.push((role, secret));
    }
    let room = credentials.iter().map(|(_, secret)| secret.len()).sum::<usize>()
        + handle.map_or(0, Secret::len)
        + ROOM_FOR_FACTS;
    let request = Request {
        operation,
        facts,
        credentials: credentials
            .iter()
            .map(|(role, secret)| Credential { role: *role, value: secret.expose() })
            .collect(),
        handle: handle.map(Secret::expose),
    };
    let exchange = Exchange::new(&request, room).map_err(RunError::Delivery)?;
    Question::mint(session, name, exchange)
}

fn failed(name: &SecretName, failure: &Failure) -> RunError {
    let hint = match failure.fault {
        Fault::Unresolved | Fault::Unreachable | Fault::NoAnswer | Fault::TooSlow => {
            "see that this host reaches it"
        }
        Fault::Untrusted | Fault::Tls => {
            "name the certificate that signs it with `ca_file`, or mend the host's own"
        }
        Fault::Refused => "see what the far side's own log says; the lease's id is in it",
        Fault::Expired => "the clocks of this host and of who issued it may differ",
        _ => "see this kind of source in docs/sources.md",
    };
    unavailable(name, &failure.to_string(), hint)
}

/// What the minter answered, as what the lease delivers.
pub fn taken(
    exec_id: &ExecId,
    lease: &Leased,
    exchange: &Exchange,
    now: &Moment,
    fresh: &mut Vec<Fresh>,
) -> Result<Material, RunError> {
    let name = lease.grant.secret();
    let minted = match exchange.reply() {
        Ok(Reply::Minted(minted)) => minted,
        Ok(Reply::Failed(failure)) => return Err(failed(name, &failure)),
        Ok(Reply::Renewed(_) | Reply::Revoked) | Err(_) => {
            return Err(failed(name, &Failure::of(Fault::Minter)));
        }
    };
    let copy = |bytes: &[u8]| Secret::copy_of(bytes).map_err(RunError::Delivery);
    let expires_at = minted.about.expires_at.and_then(|ms| Timestamp::from_millisecond(ms).ok());
    // What was only read, and lives on at its source, has no end of ours.
    if minted.handle.is_some() || minted.about.expires_at.is_some() {
        fresh.push(Fresh {
            record: MintRecord {
                mint_id: MintId::fresh(),
                lease_id: lease.record.lease_id.clone(),
                exec_id: exec_id.clone(),
                secret: name.clone(),
                about: minted.about.clone(),
                handle: None,
                attempts: 0,
            },
            handle: minted.handle.map(copy).transpose()?,
        });
    }
    if expires_at.is_some_and(|at| at <= now.wall) {
        return Err(failed(name, &Failure::of(Fault::Expired)));
    }
    let pieces = minted.parts.into_iter().map(|part| {
        Ok(Piece { name: part.name, is_secret: part.is_secret, value: copy(part.value)? })
    });
    Ok(Material {
        value: Value::Plain(copy(minted.value)?),
        pieces: pieces.collect::<Result<_, RunError>>()?,
        until: expires_at.map(|at| value::until(at, now)),
    })
}

/// Records what was minted, durably, with what revokes it. What cannot be recorded is revoked at once.
///
/// # Errors
/// Then none of it may be delivered.
pub fn record(
    ledger: &mut Ledger,
    scene: &Scene,
    session: &Session,
    fresh: Vec<Fresh>,
) -> Result<(), RunError> {
    if fresh.is_empty() {
        return Ok(());
    }
    match record_durably(ledger, scene, &fresh) {
        Ok(records) => {
            ledger.mints.extend(records);
            Ok(())
        }
        Err(why) => {
            let questions = fresh
                .iter()
                .filter_map(|fresh| {
                    let (name, handle) = (&fresh.record.secret, fresh.handle.as_ref()?);
                    Some(
                        ask_to_revoke(ledger, &scene.host.config, session, &fresh.record, handle)
                            .unwrap_or_else(|why| Question::over(name, why)),
                    )
                })
                .collect();
            for answer in sources::answers(session, None, questions, Some(PATIENCE))? {
                if let Err(e) = revoked(answer) {
                    eprintln!(
                        "sublet: what was minted and could not be recorded lives on: {}\r",
                        e.message
                    );
                }
            }
            Err(why)
        }
    }
}

/// Records what we made ourselves and nothing revokes; whoever looks for what is due tells its end.
pub fn record_ours(
    tx: &mut Tx<'_>,
    hostname: &str,
    now: &Moment,
    fresh: &Fresh,
) -> Result<(), StoreError> {
    let record = &fresh.record;
    tx.put_mint(record)?;
    if let Some(at) = record.about.expires_at {
        tx.postpone_mint(&record.mint_id, at, false)?;
    }
    let draft = draft(tx, hostname, now, EventType::MintIssued, record)?;
    tx.append(draft.outcome("issued")).map(drop)
}

fn record_durably(
    ledger: &Ledger,
    scene: &Scene,
    fresh: &[Fresh],
) -> Result<Vec<MintRecord>, RunError> {
    let now = crate::host::now().map_err(RunError::Clock)?;
    let mut records = Vec::with_capacity(fresh.len());
    for fresh in fresh {
        let mut record = fresh.record.clone();
        if let Some(handle) = &fresh.handle {
            let key = ledger.vault_key_for_handles().map_err(unavailable_vault)?;
            let sealed = vault::seal_handle(&key, &record.secret, &record.mint_id, handle)
                .map_err(unavailable_vault)?;
            record.handle = Some(sealed);
        }
        records.push(record);
    }
    ledger.transaction(Durability::Durable, |tx| {
        for record in &records {
            tx.put_mint(record)?;
            let draft = draft(tx, &scene.hostname, &now, EventType::MintIssued, record)?;
            tx.append(draft.outcome("issued"))?;
        }
        Ok(())
    })?;
    Ok(records)
}

/// An event of a minted value: whose it was, and what the far side calls it.
fn draft(
    tx: &Tx<'_>,
    hostname: &str,
    now: &Moment,
    kind: EventType,
    mint: &MintRecord,
) -> Result<Draft, StoreError> {
    let mut draft = Draft::new(kind, now.wall, hostname);
    if let Some(lease) = tx.lease(&mint.lease_id)? {
        if let Some(run) = tx.run(&lease.run_id)? {
            draft = draft.of_run(&run);
        }
        draft = draft.of_lease(&lease).of_request(&lease.request_id);
    }
    draft = draft
        .of_exec(&mint.exec_id, std::slice::from_ref(&mint.lease_id))
        .with("mint_id", mint.mint_id.as_str())
        .with("secret", mint.secret.as_str())
        .with("issuer", mint.about.issuer.as_str());
    let words = [
        ("scope", &mint.about.scope),
        ("issued_to", &mint.about.principal),
        ("far_id", &mint.about.far_id),
    ];
    for (key, word) in words {
        if let Some(word) = word {
            draft = draft.with(key, word.as_str());
        }
    }
    let expires_at = mint.about.expires_at.and_then(|ms| Timestamp::from_millisecond(ms).ok());
    Ok(match expires_at {
        Some(at) => draft.with("expires_at", timestamp_text(at)),
        None => draft,
    })
}
