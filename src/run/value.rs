//! A value on its way from its source to its delivery, in locked memory or still sealed.
#![forbid(unsafe_code)]

use std::time::Duration;

use super::caller::Caller;
use super::entries::Leased;
use super::error::RunError;
use super::identity::{self, Minted, Workload};
use super::ledger::Ledger;
use super::mint::{self, Fresh};
use super::printed;
use super::scene::Scene;
use super::sources::{self, Answer, Question, unavailable};
use super::ssh::{self, SshIdentity};
use crate::config::SecretSource;
use crate::launcher::client::Session;
use crate::launcher::wire::{Refusal, RefusalKind};
use crate::model::id::ExecId;
use crate::model::moment::Moment;
use crate::model::name::SecretName;
use crate::model::secret::Secret;
use crate::source::vault::{self, VaultError, VaultKey};
use crate::store::SealedSecret;

/// What a lease delivers: a value, and what is known of it.
pub struct Material {
    pub value: Value,
    /// Parts of the value that stand for themselves.
    pub pieces: Vec<Piece>,
    /// `CLOCK_BOOTTIME` at which the value itself ends, where its source has said.
    pub until: Option<Duration>,
}

/// A part of a value, by the name that its kind has for it.
pub struct Piece {
    pub name: String,
    /// It is masked in the command's output.
    pub is_secret: bool,
    pub value: Secret,
}

/// A value, not yet delivered.
pub enum Value {
    /// Opened where it is delivered, so that no other copy is made.
    Sealed {
        key: VaultKey,
        secret: SealedSecret,
        len: usize,
    },
    Plain(Secret),
    /// Of this host's own issuer, which may be replaced while its exec lives.
    Token(Minted),
    /// Never delivered itself: what is signed with it is.
    Ssh(SshIdentity),
}

impl Value {
    pub fn len(&self) -> usize {
        match self {
            Value::Sealed { len, .. } => *len,
            Value::Plain(secret) => secret.len(),
            Value::Token(minted) => minted.token.len(),
            Value::Ssh(_) => 0,
        }
    }

    /// Writes the value to `out`, which has exactly its length.
    pub fn write_to(&self, out: &mut [u8]) -> Result<(), RunError> {
        match self {
            Value::Sealed { key, secret, .. } => {
                let entry = &secret.entry;
                vault::open_into(key, &entry.name, entry.version, &secret.sealed, out)
                    .map_err(unavailable_vault)
            }
            Value::Plain(plain) => {
                out.copy_from_slice(plain.expose());
                Ok(())
            }
            Value::Token(minted) => {
                out.copy_from_slice(minted.token.expose());
                Ok(())
            }
            Value::Ssh(_) => Err(no_value()),
        }
    }

    /// The value in locked memory of its own, for the `git` channel.
    pub fn into_secret(self) -> Result<Secret, RunError> {
        match self {
            Value::Plain(secret) => Ok(secret),
            Value::Token(minted) => Ok(minted.token),
            Value::Ssh(_) => Err(no_value()),
            sealed @ Value::Sealed { .. } => {
                let mut secret = Secret::zeroed(sealed.len()).map_err(RunError::Delivery)?;
                sealed.write_to(secret.expose_mut())?;
                Ok(secret)
            }
        }
    }
}

/// The decision lets an SSH identity go to an agent's socket alone.
fn no_value() -> RunError {
    RunError::Delivery(std::io::ErrorKind::Unsupported.into())
}

pub fn unavailable_vault(error: VaultError) -> RunError {
    RunError::Refused(Refusal {
        kind: RefusalKind::SourceUnavailable,
        message: crate::launcher::compile::chain(&error),
        hint: "check the vault's key, or set the secret again with `sublet secret set`".to_owned(),
    })
}

/// Whether the values of these leases lie in the vault: no one is asked for them, and nothing is made.
pub fn is_at_hand(leased: &[Leased]) -> bool {
    leased.iter().all(|lease| matches!(lease.grant.source(), SecretSource::Vault))
}

/// Resolves the values of these leases from their sources, all at once. Where there is a `caller`, they can
/// end the wait for slow sources. What was minted on the way is recorded before this returns, whatever became
/// of the others: the ledger then knows what is to be revoked.
pub fn resolve(
    ledger: &mut Ledger,
    scene: &Scene,
    session: &Session,
    caller: Option<&Caller>,
    leases: &[&Leased],
) -> Result<Vec<Material>, RunError> {
    let now = crate::host::now().map_err(RunError::Clock)?;
    let begun: Vec<Begun> =
        leases.iter().map(|lease| begin(ledger, scene, session, lease, &now)).collect();
    let (mut questions, mut kept, mut fresh) = (Vec::new(), Vec::new(), Vec::new());
    for (begun, lease) in begun.into_iter().zip(leases) {
        match begun {
            Begun::Resolved(material) => kept.push(Some(material)),
            Begun::Made(both) => {
                let (material, made) = *both;
                kept.push(Some(material));
                fresh.push(made);
            }
            Begun::Asked(question) => {
                kept.push(None);
                questions.push(question);
            }
            Begun::Failed(why) => {
                kept.push(None);
                questions.push(Question::over(lease.grant.secret(), why));
            }
        }
    }
    let mut answers = sources::answers(session, caller, questions, None)?.into_iter();
    let now = crate::host::now().map_err(RunError::Clock)?;
    let mut materials = Vec::new();
    for (kept, lease) in kept.into_iter().zip(leases) {
        materials.push(match kept {
            Some(material) => Ok(material),
            None => answers
                .next()
                .unwrap_or(Err(RunError::LauncherDied))
                .and_then(|answer| taken(&scene.exec_id, lease, answer, &now, &mut fresh)),
        });
    }
    mint::record(ledger, scene, session, fresh)?;
    materials.into_iter().collect()
}

enum Begun {
    Resolved(Material),
    /// By ourselves.
    Made(Box<(Material, Fresh)>),
    Asked(Question),
    Failed(RunError),
}

fn begin(ledger: &Ledger, scene: &Scene, session: &Session, lease: &Leased, now: &Moment) -> Begun {
    let name = lease.grant.secret();
    let asked = |question: Result<Question, RunError>| match question {
        Ok(question) => Begun::Asked(question),
        Err(why) => Begun::Failed(why),
    };
    // What it says of its own end is between it and who takes it: a delivery may outlast it.
    let made = |value, fresh| {
        Begun::Made(Box::new((Material { value, pieces: Vec::new(), until: None }, fresh)))
    };
    match lease.grant.source() {
        SecretSource::Vault => match at_hand(ledger, lease) {
            Ok(value) => Begun::Resolved(Material { value, pieces: Vec::new(), until: None }),
            Err(why) => Begun::Failed(why),
        },
        SecretSource::File { .. } | SecretSource::Command { .. } => {
            asked(Question::open(session, name))
        }
        SecretSource::Jwt(jwt) => {
            match identity::mint(&Workload::of(scene, ledger), lease, jwt, now) {
                Ok((minted, fresh)) => made(Value::Token(minted), fresh),
                Err(why) => Begun::Failed(why),
            }
        }
        SecretSource::SshCa(source) => {
            match ssh::issue(ledger, scene, session, lease, source, now) {
                Ok((identity, fresh)) => made(Value::Ssh(identity), fresh),
                Err(why) => Begun::Failed(why),
            }
        }
        SecretSource::Minted(_) => asked(mint::ask(ledger, scene, session, lease, now)),
    }
}

fn at_hand(ledger: &Ledger, lease: &Leased) -> Result<Value, RunError> {
    let name = lease.grant.secret();
    match &lease.at_hand {
        Some(secret) => opened(ledger, name, secret.clone()),
        None => sealed(ledger, name),
    }
}

fn sealed(ledger: &Ledger, name: &SecretName) -> Result<Value, RunError> {
    match ledger.sealed(name)? {
        Some(secret) => opened(ledger, name, secret),
        None => {
            let hint = format!("set it: `sublet secret set {name}`");
            Err(unavailable(name, "no value was ever set", &hint))
        }
    }
}

/// With the key to it. Opened where it is written to.
fn opened(ledger: &Ledger, name: &SecretName, secret: SealedSecret) -> Result<Value, RunError> {
    let key = ledger.vault_key().map_err(unavailable_vault)?;
    let len = vault::plaintext_len(name, &secret.sealed).map_err(unavailable_vault)?;
    Ok(Value::Sealed { key, secret, len })
}

/// A secret that another source proves itself with: of the vault, or of a file, whose last line end is not
/// part of it.
pub fn credential(
    ledger: &Ledger,
    session: &Session,
    name: &SecretName,
    source: &SecretSource,
) -> Result<Secret, RunError> {
    let mut secret = match source {
        SecretSource::Vault => sealed(ledger, name)?.into_secret()?,
        SecretSource::File { .. } => {
            let question = Question::open(session, name)?;
            match sources::answers(session, None, vec![question], None)?.pop() {
                Some(Ok(Answer::Printed(secret))) => secret,
                Some(Err(why)) => return Err(why),
                Some(Ok(Answer::Reply(_))) | None => return Err(RunError::LauncherDied),
            }
        }
        // The configuration was checked when it was read.
        SecretSource::Command { .. }
        | SecretSource::Jwt(_)
        | SecretSource::SshCa(_)
        | SecretSource::Minted(_) => {
            let hint = "use `vault` or `file`";
            return Err(unavailable(name, "its source cannot prove another", hint));
        }
    };
    while secret.expose().ends_with(b"\n") {
        secret.truncate(secret.len() - 1);
    }
    Ok(secret)
}

/// An answer, as what it is to the lease.
fn taken(
    exec_id: &ExecId,
    lease: &Leased,
    answer: Answer,
    now: &Moment,
    fresh: &mut Vec<Fresh>,
) -> Result<Material, RunError> {
    let name = lease.grant.secret();
    match (answer, lease.grant.source()) {
        (Answer::Printed(printed), SecretSource::Command { .. }) => {
            let printed::Parsed { value, pieces, expires_at } = printed::parse(name, printed)?;
            if expires_at.is_some_and(|at| at <= now.wall) {
                let hint = "the clocks of this host and of who issued it may differ";
                return Err(unavailable(
                    name,
                    "what its command printed has expired already",
                    hint,
                ));
            }
            let until = expires_at.map(|at| until(at, now));
            Ok(Material { value: Value::Plain(value), pieces, until })
        }
        (Answer::Printed(value), _) => {
            Ok(Material { value: Value::Plain(value), pieces: Vec::new(), until: None })
        }
        (Answer::Reply(exchange), _) => mint::taken(exec_id, lease, &exchange, now, fresh),
    }
}

/// A time of the wall clock, on the clock that nobody can set.
pub fn until(at: jiff::Timestamp, now: &Moment) -> Duration {
    let left = at.duration_since(now.wall);
    now.boot + Duration::try_from(left).unwrap_or_default()
}
