//! Filling the containers that the launcher made, and saying so.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::OwnedFd;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::attend::Token;
use super::caller::Caller;
use super::entries::Leased;
use super::error::RunError;
use super::ledger::Ledger;
use super::scene::{EXEC, Scene};
use super::ssh::SshIdentity;
use super::value::{self, Material, Piece, Value};
use crate::delivery::aws_endpoint::Endpoint;
use crate::delivery::fill::{self, Content, Held};
use crate::launcher::client::Session;
use crate::launcher::wire::{FilledSpec, Notice, Order, Refusal, RefusalKind};
use crate::model::name::Channel;
use crate::model::secret::Secret;
use crate::profile::{AWS_VARIABLES, Format, OnRevoke, Place};
use crate::sys::clock;

/// The longest `NAME=value` that execve takes in one string, with its NUL: MAX_ARG_STRLEN of execve(2).
const MAX_ENVIRONMENT_STRING: usize = 131_072;

/// Between two looks at whether the caller wants the end.
const A_MOMENT: Timespec = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };

/// The broker's ends of what the launcher made.
pub struct Prepared {
    pub streams: Vec<OwnedFd>,
    containers: VecDeque<OwnedFd>,
    pub uid: u32,
}

/// What each lease holds while the exec lives.
pub enum Delivery {
    Held(Held),
    /// Answered on this socket, one `get` a use, each with a memfd that ends with the lease.
    Git {
        listener: OwnedFd,
        answers: Vec<Held>,
    },
    /// An agent's socket, one signature a use.
    Ssh(OwnedFd),
}

/// Every value is where only the exec can reach it.
pub struct Delivered {
    pub streams: Vec<OwnedFd>,
    pub deliveries: Vec<Delivery>,
    pub tokens: Vec<Token>,
    /// By lease: what the agent's socket is answered with.
    pub identities: BTreeMap<usize, SshIdentity>,
    /// What is masked in the output. A copy of its own: the containers are wiped as soon as the command
    /// has ended, and its last words are still on their way then.
    pub masked: Vec<Secret>,
    /// Of the lease of this index: asked for at an address of the exec's.
    pub endpoint: Option<(usize, Endpoint)>,
    pub uid: u32,
}

/// Waits for the launcher's containers.
pub fn prepared(session: &Session) -> Result<Prepared, RunError> {
    let (notice, mut fds) = session.notice_of(|n| {
        matches!(n, Notice::Prepared { exec: EXEC, .. } | Notice::Refused { exec: EXEC, .. })
    })?;
    match notice {
        Notice::Prepared { uid, .. } => {
            let streams = fds.len().min(3);
            let containers = fds.split_off(streams);
            Ok(Prepared { streams: fds, containers: containers.into(), uid })
        }
        Notice::Refused { refusal, .. } => Err(refusal.into()),
        _ => Err(RunError::LauncherDied),
    }
}

/// Waits until the sandbox stands and its command could begin, or the caller wants the end: a workspace that
/// hangs may keep it for ever.
pub fn stands(session: &Session, caller: &Caller) -> Result<(), RunError> {
    let is_told = |n: &Notice| {
        matches!(n, Notice::Ready { exec: EXEC, .. } | Notice::Refused { exec: EXEC, .. })
    };
    loop {
        match session.try_notice_of(is_told)? {
            Some((Notice::Refused { refusal, .. }, _)) => return Err(refusal.into()),
            Some(ready) => {
                session.pass_over(ready);
                return Ok(());
            }
            None => {}
        }
        if caller.may_want_the_end()
            && let Some(why) = caller.interrupted()?
        {
            return Err(why);
        }
        match poll(
            &mut [PollFd::from_borrowed_fd(session.socket(), PollFlags::IN)],
            Some(&A_MOMENT),
        ) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(e) => return Err(RunError::relay(e)),
        }
    }
}

/// Every value but those of `git`, which are resolved at their `get`.
pub fn resolve(
    ledger: &mut Ledger,
    scene: &Scene,
    session: &Session,
    caller: &Caller,
    leased: &mut [Leased],
) -> Result<Vec<Option<Material>>, RunError> {
    let is_now = |lease: &Leased| lease.record.channel != Channel::Git;
    let now: Vec<&Leased> = leased.iter().filter(|lease| is_now(lease)).collect();
    let mut resolved = match now.is_empty() {
        true => Vec::new(),
        false => value::resolve(ledger, scene, session, Some(caller), &now)?,
    }
    .into_iter();
    Ok(leased
        .iter_mut()
        .map(|lease| {
            let material = if is_now(lease) { resolved.next() } else { None };
            lease.value_until = material.as_ref().and_then(|material| material.until);
            lease.at_hand = None;
            material
        })
        .collect())
}

pub fn fill(
    prepared: Prepared,
    leased: &[Leased],
    values: Vec<Option<Material>>,
) -> Result<Delivered, RunError> {
    let Prepared { mut streams, mut containers, uid } = prepared;
    // With a terminal there are no streams: what came first were containers.
    while leased.len() > containers.len() {
        match streams.pop() {
            Some(fd) => containers.push_front(fd),
            None => return Err(RunError::LauncherDied),
        }
    }
    let mut deliveries = Vec::with_capacity(leased.len());
    let mut endpoint = None;
    let (mut pieces, mut tokens, mut identities) = (Vec::new(), Vec::new(), BTreeMap::new());
    let each = leased.iter().zip(values).zip(containers).enumerate();
    for (index, ((lease, material), container)) in each {
        let Some(Material { value, pieces: of_value, .. }) = material else {
            deliveries.push(Delivery::Git { listener: container, answers: Vec::new() });
            continue;
        };
        let value = match value {
            Value::Ssh(identity) => {
                identities.insert(index, identity);
                deliveries.push(Delivery::Ssh(container));
                continue;
            }
            other => other,
        };
        if let (Value::Token(minted), Channel::Token) = (&value, lease.record.channel) {
            tokens.push(Token::new(index, minted));
        }
        if lease.grant.audience().format == Some(Format::AwsEndpoint) {
            let token = random_token()?;
            let held = fill::write(container, &[token.expose()])?;
            let body = aws_container_object(&of_value, lease.value_expires())?;
            endpoint = Some((deliveries.len(), Endpoint::new(token, body)));
            deliveries.push(Delivery::Held(held));
            if lease.grant.redact() {
                let secret = of_value.into_iter().filter(|piece| piece.is_secret);
                pieces.extend(secret.map(|piece| piece.value));
            }
            continue;
        }
        let held = match (lease.grant.place(), lease.grant.audience().format) {
            (Place::Env { .. }, Some(Format::Aws)) => fill_aws_variables(container, &of_value)?,
            (Place::Env { variable }, None) => {
                fill_environment(container, variable.as_str(), &value)?
            }
            _ => fill::with(container, value.len(), |bytes| value.write_to(bytes))?,
        };
        deliveries.push(Delivery::Held(held));
        if lease.grant.redact() {
            let secret = of_value.into_iter().filter(|piece| piece.is_secret);
            pieces.extend(secret.map(|piece| piece.value));
        }
    }
    let mut masked = masked(leased, &deliveries)?;
    masked.extend(pieces);
    Ok(Delivered { streams, deliveries, tokens, identities, masked, endpoint, uid })
}

fn masked(leased: &[Leased], deliveries: &[Delivery]) -> Result<Vec<Secret>, RunError> {
    let mut masked = Vec::new();
    for (lease, delivery) in leased.iter().zip(deliveries) {
        if let (Delivery::Held(held), true) = (delivery, lease.grant.redact()) {
            let content = held.expose();
            let value = value_of(lease, &content);
            if !value.is_empty() {
                masked.push(Secret::copy_of(value).map_err(RunError::Delivery)?);
            }
        }
    }
    Ok(masked)
}

/// The value of a delivery, as it stands in its container: without what `env` puts around it.
fn value_of<'a>(lease: &Leased, content: &'a Content<'_>) -> &'a [u8] {
    let bytes = content.bytes();
    match lease.grant.place() {
        // Its parts are masked, each by itself.
        Place::Env { .. } if lease.grant.audience().format == Some(Format::Aws) => &[],
        Place::Env { variable } => {
            let start = variable.as_str().len() + 1;
            bytes.get(start..bytes.len().saturating_sub(1)).unwrap_or_default()
        }
        _ => bytes,
    }
}

/// `NAME=value` and a NUL, of which execve copies straight into the command's own stack.
fn fill_environment(container: OwnedFd, name: &str, value: &Value) -> Result<Held, RunError> {
    let refuse = |why: String| {
        RunError::Refused(Refusal {
            kind: RefusalKind::DeliveryUnavailable,
            message: format!("the value for `{name}` cannot be an environment variable: {why}"),
            hint: "use the `file` or `memfd` channel, which carry any bytes".to_owned(),
        })
    };
    let prefix = name.len() + 1;
    let size = prefix + value.len() + 1;
    if size > MAX_ENVIRONMENT_STRING {
        let fits = MAX_ENVIRONMENT_STRING - 1;
        let why = format!("with its name it has {} bytes, and {fits} fit", size - 1);
        return Err(refuse(why));
    }
    fill::with(container, size, |bytes| {
        bytes[..prefix - 1].copy_from_slice(name.as_bytes());
        bytes[prefix - 1] = b'=';
        let place = &mut bytes[prefix..size - 1];
        value.write_to(place)?;
        if place.contains(&0) {
            zeroize::Zeroize::zeroize(place);
            return Err(refuse("it has a NUL byte in it".to_owned()));
        }
        Ok(())
    })
}

/// What the exec asks its address with: 256 random bits.
fn random_token() -> Result<Secret, RunError> {
    let mut bytes = Secret::zeroed(32)?;
    crate::sys::random::fill(bytes.expose_mut())
        .map_err(|e| RunError::Delivery(std::io::Error::other(e)))?;
    let mut token = Secret::zeroed(64)?;
    for (digits, byte) in token.expose_mut().chunks_mut(2).zip(bytes.expose()) {
        const HEX: &[u8; 16] = b"0123456789abcdef";
        digits.copy_from_slice(&[HEX[usize::from(byte >> 4)], HEX[usize::from(byte & 15)]]);
    }
    Ok(token)
}

/// The object that a container's credentials are given as, in locked memory. Its parts are plain words: what a
/// JSON string would have to escape is refused.
fn aws_container_object(
    pieces: &[Piece],
    expires: Option<jiff::Timestamp>,
) -> Result<Secret, RunError> {
    let refuse = |why: &str| {
        RunError::Refused(Refusal {
            kind: RefusalKind::DeliveryUnavailable,
            message: format!("the value cannot be given at an address for AWS credentials: {why}"),
            hint: "`format = \"aws-endpoint\"` is for `aws-sts`, and `command` that prints the credential_process object"
                .to_owned(),
        })
    };
    let expiration = expires.map(|at| at.to_string());
    let mut parts: Vec<&[u8]> = Vec::new();
    for (key, name) in [
        ("AccessKeyId", "AccessKeyId"),
        ("SecretAccessKey", "SecretAccessKey"),
        ("Token", "SessionToken"),
    ] {
        let Some(piece) = pieces.iter().find(|piece| piece.name == name) else {
            return Err(refuse(&format!("it has no {name}")));
        };
        let value = piece.value.expose();
        if !value.iter().all(|b| b.is_ascii_graphic() && !matches!(b, b'"' | b'\\')) {
            return Err(refuse(&format!("its {name} is no plain word")));
        }
        parts.extend([
            if parts.is_empty() { &b"{\""[..] } else { b",\"" },
            key.as_bytes(),
            b"\":\"",
            value,
            b"\"",
        ]);
    }
    if let Some(expiration) = &expiration {
        parts.extend([&b",\"Expiration\":\""[..], expiration.as_bytes(), b"\""]);
    }
    parts.push(b"}");
    let mut object = Secret::zeroed(parts.iter().map(|part| part.len()).sum())?;
    let mut rest = object.expose_mut();
    for part in parts {
        let (now, later) = rest.split_at_mut(part.len());
        now.copy_from_slice(part);
        rest = later;
    }
    Ok(object)
}

/// The three variables of an AWS credential, each with its NUL; two where there is no session token.
fn fill_aws_variables(container: OwnedFd, pieces: &[Piece]) -> Result<Held, RunError> {
    let refuse = |why: &str| {
        RunError::Refused(Refusal {
            kind: RefusalKind::DeliveryUnavailable,
            message: format!("the value cannot be an AWS credential's variables: {why}"),
            hint: "`format = \"aws\"` is for `aws-sts`, and `command` that prints the credential_process object"
                .to_owned(),
        })
    };
    let of = |name: &str| pieces.iter().find(|piece| piece.name == name);
    let strings: Vec<(&str, &Secret)> = AWS_VARIABLES
        .iter()
        .filter_map(|(variable, part)| Some((*variable, &of(part)?.value)))
        .collect();
    if of("AccessKeyId").is_none() || of("SecretAccessKey").is_none() {
        return Err(refuse("it has no access key"));
    }
    if strings.iter().any(|(_, value)| value.expose().contains(&0)) {
        return Err(refuse("it has a NUL byte in it"));
    }
    let size: usize = strings.iter().map(|(name, value)| name.len() + value.len() + 2).sum();
    if size > MAX_ENVIRONMENT_STRING {
        return Err(refuse("it is too long"));
    }
    let parts: Vec<&[u8]> = strings
        .iter()
        .flat_map(|(name, value)| [name.as_bytes(), b"=", value.expose(), b"\0"])
        .collect();
    fill::write(container, &parts).map_err(RunError::Delivery)
}

impl From<std::io::Error> for RunError {
    fn from(error: std::io::Error) -> Self {
        RunError::Delivery(error)
    }
}

impl Delivered {
    /// The order that lets the command run.
    pub fn start(&self, scene: &Scene, leased: &[Leased]) -> Order {
        let deliveries = leased
            .iter()
            .zip(&self.deliveries)
            .map(|(lease, delivery)| FilledSpec {
                bytes: match delivery {
                    Delivery::Held(held) => held.len() as u32,
                    Delivery::Git { .. } | Delivery::Ssh(_) => 0,
                },
                expires: lease.until(),
                kill: lease.grant.on_revoke() == OnRevoke::Kill,
            })
            .collect();
        let deadline = scene.timeout.map(|t| clock::boottime() + t);
        Order::Start { exec: EXEC, deliveries, deadline }
    }
}
