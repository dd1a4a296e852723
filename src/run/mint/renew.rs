//! Minted values that must be renewed at their source to live as long as they may: while their exec lives.
#![forbid(unsafe_code)]

use std::time::Duration;

use jiff::Timestamp;

use super::{draft, send};
use crate::config::{HostConfig, SecretSource};
use crate::launcher::client::Session;
use crate::model::event::EventType;
use crate::model::id::{LeaseId, MintId};
use crate::model::mint::{About, Facts, Failure, Fault, Operation, Reply};
use crate::model::moment::Moment;
use crate::run::entries::Leased;
use crate::run::error::RunError;
use crate::run::ledger::Ledger;
use crate::run::scene::Scene;
use crate::run::sources::{Answer, Question};
use crate::run::value::{self, unavailable_vault};
use crate::source::vault;
use crate::store::Durability;

/// A renewal that is under way.
pub struct Renewal {
    pub mint: MintId,
    lease: LeaseId,
    pub question: Question,
}

/// When the next of this exec's values is to be renewed, on `CLOCK_BOOTTIME`.
pub fn next(ledger: &Ledger) -> Option<Duration> {
    let first = ledger.mints.iter().filter_map(|mint| mint.about.renew_at).min()?;
    let now = crate::host::now().ok()?;
    Timestamp::from_millisecond(first).ok().map(|at| value::until(at, &now))
}

/// The lease was given more time: what was made to end with it is to be renewed at once.
pub fn follow(ledger: &mut Ledger, config: &HostConfig, lease: &LeaseId) -> Result<(), RunError> {
    let now = crate::host::now().map_err(RunError::Clock)?.wall.as_millisecond();
    for mint in ledger.mints.iter_mut().filter(|mint| mint.lease_id == *lease) {
        let source = config.secrets.get(&mint.secret).map(|entry| &entry.source);
        if matches!(source, Some(SecretSource::Minted(m)) if m.kind.ends_with_the_lease()) {
            mint.about.renew_at = Some(now);
        }
    }
    Ok(())
}

/// Asks for what is due.
pub fn ask(
    ledger: &mut Ledger,
    scene: &Scene,
    session: &Session,
    leased: &[Leased],
) -> Result<Vec<Renewal>, RunError> {
    let now = crate::host::now().map_err(RunError::Clock)?;
    let mut renewals = Vec::new();
    for index in 0..ledger.mints.len() {
        let mint = &mut ledger.mints[index];
        if mint.about.renew_at.is_none_or(|at| at > now.wall.as_millisecond()) {
            continue;
        }
        // Whatever comes of it: not again at the same time.
        mint.about.renew_at = None;
        let mint = mint.clone();
        let lease = leased.iter().find(|lease| lease.record.lease_id == mint.lease_id);
        let (Some(lease), Some(sealed)) = (lease, &mint.handle) else { continue };
        let left = lease.record.expires_boot.saturating_sub(now.boot).as_secs();
        if left == 0 {
            continue;
        }
        let facts = Facts {
            lease_id: mint.lease_id.to_string(),
            exec_id: mint.exec_id.to_string(),
            ttl_seconds: left,
            now: now.wall.as_second(),
            ..Facts::default()
        };
        let question = ledger
            .vault_key()
            .and_then(|key| vault::open_handle(&key, &mint.secret, &mint.mint_id, sealed))
            .map_err(unavailable_vault)
            .and_then(|handle| {
                let (config, name) = (&scene.host.config, &mint.secret);
                send(ledger, config, session, name, Operation::Renew, facts, Some(&handle))
            })
            .unwrap_or_else(|why| Question::over(&mint.secret, why));
        renewals.push(Renewal { mint: mint.mint_id, lease: mint.lease_id, question });
    }
    Ok(renewals)
}

/// What became of one: recorded, and until when its lease's delivery may stay now.
pub fn done(
    ledger: &mut Ledger,
    scene: &Scene,
    renewal: Renewal,
) -> Result<Option<(LeaseId, Duration)>, RunError> {
    let now = crate::host::now().map_err(RunError::Clock)?;
    let renewed = match renewal.question.into_result() {
        Some(Ok(Answer::Reply(exchange))) => match exchange.reply() {
            Ok(Reply::Renewed(about)) => Ok(about),
            Ok(Reply::Failed(failure)) => Err(failure.to_string()),
            Ok(Reply::Minted(_) | Reply::Revoked) | Err(_) => {
                Err(Failure::of(Fault::Minter).to_string())
            }
        },
        Some(Ok(Answer::Printed(_))) | None => Err(Failure::of(Fault::Minter).to_string()),
        Some(Err(why)) => Err(why.to_string()),
    };
    let Some(mint) = ledger.mints.iter_mut().find(|mint| mint.mint_id == renewal.mint) else {
        return Ok(None);
    };
    let until = match &renewed {
        Ok(about) => {
            mint.about.expires_at = about.expires_at;
            mint.about.renew_at = about.renew_at;
            about.expires_at.and_then(|ms| Timestamp::from_millisecond(ms).ok())
        }
        Err(_) => {
            mint.about.renew_at = again(&mint.about, &now);
            None
        }
    };
    let mint = mint.clone();
    ledger.transaction(Durability::Durable, |tx| {
        let drafted = draft(tx, &scene.hostname, &now, EventType::MintRenewed, &mint)?;
        let drafted = match &renewed {
            Ok(_) => {
                tx.extend_mint(&mint.mint_id, mint.about.expires_at)?;
                drafted.outcome("renewed")
            }
            Err(why) => drafted.outcome("failed").with("message", why.as_str()),
        };
        tx.append(drafted).map(drop)
    })?;
    Ok(until.map(|at| (renewal.lease, value::until(at, &now))))
}

/// Half of what is left, while that is more than a second.
fn again(about: &About, now: &Moment) -> Option<i64> {
    let now = now.wall.as_millisecond();
    let half = about.expires_at?.saturating_sub(now) / 2;
    (half > 1000).then_some(now + half)
}
