//! The end of what was minted: revoked at its source, or told once it has ended by itself; and of what earlier
//! processes left.
//!
//! Receives the values that are due and the session to the launcher that starts the minters, returns once each
//! stands in the store as ended or to be tried again. Must never forget a value that may still live.
#![forbid(unsafe_code)]

use std::time::Duration;

use jiff::Timestamp;

use super::{PATIENCE, draft, send};
use crate::config::{HostConfig, SecretSource};
use crate::launcher::client::Session;
use crate::model::event::EventType;
use crate::model::id::MintId;
use crate::model::mint::{Facts, Failure, Fault, Operation, Reply};
use crate::model::secret::Secret;
use crate::run::error::RunError;
use crate::run::ledger::Ledger;
use crate::run::scene::Scene;
use crate::run::sources::{self, Answer, Question};
use crate::run::value::{self, unavailable_vault};
use crate::source::vault;
use crate::store::{Durability, MintRecord, Tx};

/// How long it waits for what earlier processes left.
const PATIENCE_FOR_OTHERS: Duration = Duration::from_secs(3);
/// Between two tries to revoke: the first pause, and the longest.
const PAUSES: [i64; 2] = [5_000, 3_600_000];

/// How one value stands after a try to end it.
enum End {
    Revoked,
    Expired,
    /// It cannot be revoked: it ends when it expires.
    Waits(i64),
    /// It can neither be revoked, nor is it known when it ends.
    LeftToTheFarSide,
    Failed(Unrevoked),
}

/// Why it was not revoked.
pub(super) struct Unrevoked {
    pub failure: Failure,
    pub message: String,
}

/// The exec is over, whatever became of it: what was minted for it is revoked, as far as it can be now. In
/// one shot also what earlier processes left. What is still to be done stands in the store.
pub fn end_all(ledger: &mut Ledger, scene: &Scene, session: &Session) {
    let mints = std::mem::take(&mut ledger.mints);
    let (config, hostname) = (&scene.host.config, &scene.hostname);
    let ended = end(ledger, config, hostname, session, mints, PATIENCE).and_then(|()| {
        let now = crate::host::now().map_err(RunError::Clock)?.wall.as_millisecond();
        if ledger.others_due.is_some_and(|at| at <= now) {
            end_due(ledger, config, hostname, session, PATIENCE_FOR_OTHERS)?;
        }
        Ok(())
    });
    // The next start, or the broker's own thread, finds what is left.
    if let Err(e) = ended {
        eprintln!("sublet: could not end what was minted for {}: {e}\r", scene.exec_id);
    }
}

/// Looks when something that earlier processes left is to be ended, while the command runs: its caller is not to wait
/// for the look afterwards.
pub fn look_for_others(ledger: &mut Ledger, scene: &Scene) {
    if scene.is_one_shot()
        && let Ok(next) = ledger.read(|view| view.next_due_mint())
    {
        ledger.others_due = next;
    }
}

/// Ends what is due by now, of this process and of those that are gone. Returns whether there was something.
pub fn end_due(
    ledger: &Ledger,
    config: &HostConfig,
    hostname: &str,
    session: &Session,
    patience: Duration,
) -> Result<bool, RunError> {
    let now = crate::host::now().map_err(RunError::Clock)?.wall.as_millisecond();
    if !ledger.read(|view| view.has_due_mints(now))? {
        return Ok(false);
    }
    let again = now + patience.as_millis() as i64 + PAUSES[0];
    let due = ledger.transaction(Durability::Durable, |tx| tx.due_mints(now, again))?;
    let is_work = !due.is_empty();
    end(ledger, config, hostname, session, due, patience)?;
    Ok(is_work)
}

fn end(
    ledger: &Ledger,
    config: &HostConfig,
    hostname: &str,
    session: &Session,
    mints: Vec<MintRecord>,
    patience: Duration,
) -> Result<(), RunError> {
    if mints.is_empty() {
        return Ok(());
    }
    let now = crate::host::now().map_err(RunError::Clock)?.wall.as_millisecond();
    let (mut ended, mut asked, mut questions) = (Vec::new(), Vec::new(), Vec::new());
    for mint in mints {
        match (&mint.handle, mint.about.expires_at) {
            (_, Some(at)) if at <= now && !must_be_revoked(config, &mint) => {
                ended.push((mint, End::Expired));
            }
            (None, Some(at)) => ended.push((mint, End::Waits(at))),
            (None, None) => ended.push((mint, End::LeftToTheFarSide)),
            (Some(sealed), _) => {
                let question = ledger
                    .vault_key()
                    .and_then(|key| vault::open_handle(&key, &mint.secret, &mint.mint_id, sealed))
                    .map_err(unavailable_vault)
                    .and_then(|handle| ask_to_revoke(ledger, config, session, &mint, &handle));
                questions.push(question.unwrap_or_else(|why| Question::over(&mint.secret, why)));
                asked.push(mint);
            }
        }
    }
    let answers = sources::answers(session, None, questions, Some(patience))?;
    for (mint, answer) in asked.into_iter().zip(answers) {
        let end = match revoked(answer) {
            Ok(()) => End::Revoked,
            Err(why) => End::Failed(why),
        };
        ended.push((mint, end));
    }
    tell(ledger, hostname, &ended)
}

/// When the next of this exec's values ends by itself, on `CLOCK_BOOTTIME`; not one that is being renewed.
pub fn next_expiry(
    ledger: &Ledger,
    config: &HostConfig,
    is_renewing: impl Fn(&MintId) -> bool,
) -> Option<Duration> {
    let ending = ledger
        .mints
        .iter()
        .filter(|mint| !must_be_revoked(config, mint) && !is_renewing(&mint.mint_id));
    let first = ending.filter_map(|mint| mint.about.expires_at).min()?;
    let now = crate::host::now().ok()?;
    Timestamp::from_millisecond(first).ok().map(|at| value::until(at, &now))
}

/// Records what has ended by itself by now.
pub fn tell_expired(
    ledger: &mut Ledger,
    scene: &Scene,
    is_renewing: impl Fn(&MintId) -> bool,
) -> Result<(), RunError> {
    let now = crate::host::now().map_err(RunError::Clock)?.wall.as_millisecond();
    let config = &scene.host.config;
    let is_over = |mint: &MintRecord| {
        mint.about.expires_at.is_some_and(|at| at <= now)
            && !must_be_revoked(config, mint)
            && !is_renewing(&mint.mint_id)
    };
    let over: Vec<_> = ledger.mints.iter().filter(|mint| is_over(mint)).cloned().collect();
    let told: Vec<_> = over.into_iter().map(|mint| (mint, End::Expired)).collect();
    if !told.is_empty() {
        tell(ledger, &scene.hostname, &told)?;
        ledger.mints.retain(|mint| !told.iter().any(|(told, _)| told.mint_id == mint.mint_id));
    }
    Ok(())
}

/// Whether it is there until it is taken away, as a role of a database is.
fn must_be_revoked(config: &HostConfig, mint: &MintRecord) -> bool {
    let source = config.secrets.get(&mint.secret).map(|entry| &entry.source);
    mint.handle.is_some()
        && matches!(source, Some(SecretSource::Minted(minted)) if minted.kind.must_be_revoked())
}

pub(super) fn ask_to_revoke(
    ledger: &Ledger,
    config: &HostConfig,
    session: &Session,
    mint: &MintRecord,
    handle: &Secret,
) -> Result<Question, RunError> {
    let now = crate::host::now().map_err(RunError::Clock)?;
    let facts = Facts {
        lease_id: mint.lease_id.to_string(),
        exec_id: mint.exec_id.to_string(),
        now: now.wall.as_second(),
        ..Facts::default()
    };
    send(ledger, config, session, &mint.secret, Operation::Revoke, facts, Some(handle))
}

pub(super) fn revoked(answer: Result<Answer, RunError>) -> Result<(), Unrevoked> {
    let failure = match answer {
        Ok(Answer::Printed(_)) => Failure::of(Fault::Minter),
        Ok(Answer::Reply(exchange)) => match exchange.reply() {
            Ok(Reply::Revoked) => return Ok(()),
            Ok(Reply::Failed(failure)) => failure,
            Ok(Reply::Minted(_) | Reply::Renewed(_)) | Err(_) => Failure::of(Fault::Minter),
        },
        Err(why) => {
            let message = crate::launcher::compile::chain(&why);
            return Err(Unrevoked { failure: Failure::of(Fault::Minter), message });
        }
    };
    Err(Unrevoked { message: failure.to_string(), failure })
}

/// Records how each stands.
fn tell(ledger: &Ledger, hostname: &str, ended: &[(MintRecord, End)]) -> Result<(), RunError> {
    let now = crate::host::now().map_err(RunError::Clock)?;
    ledger.transaction(Durability::Durable, |tx| {
        for (mint, end) in ended {
            let of = |tx: &Tx<'_>, kind| draft(tx, hostname, &now, kind, mint);
            match end {
                End::Revoked | End::Expired | End::LeftToTheFarSide => {
                    let (kind, outcome) = match end {
                        End::Revoked => (EventType::MintRevoked, "revoked"),
                        End::Expired => (EventType::MintExpired, "expired"),
                        _ => (EventType::MintExpired, "left_to_the_far_side"),
                    };
                    if tx.end_mint(&mint.mint_id)? {
                        let draft = of(tx, kind)?;
                        tx.append(draft.outcome(outcome))?;
                    }
                }
                End::Waits(at) => tx.postpone_mint(&mint.mint_id, *at, false)?,
                End::Failed(Unrevoked { failure, message }) => {
                    let pause = PAUSES[0] << mint.attempts.min(10);
                    let again = now.wall.as_millisecond() + pause.min(PAUSES[1]);
                    // Its own end comes first.
                    let ends_by_itself =
                        mint.about.expires_at.filter(|at| *at > now.wall.as_millisecond());
                    let again = ends_by_itself.map_or(again, |at| at.min(again));
                    tx.postpone_mint(&mint.mint_id, again, true)?;
                    let mut draft = of(tx, EventType::MintRevocationFailed)?
                        .because(failure.fault.as_str())
                        .outcome("failed")
                        .with("message", message.as_str())
                        .with("attempts", mint.attempts + 1);
                    if let Some(status) = failure.status {
                        draft = draft.with("status", status);
                    }
                    tx.append(draft)?;
                }
            }
        }
        Ok(())
    })
}
