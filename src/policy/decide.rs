//! The decision: `(policy, request, run, counters, command) → verdict`. It needs no clock: what time does
//! to a lease is in `lease`, and the counters come counted.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::sync::Arc;

use crate::config::{HostConfig, Jwt, SecretSource};
use crate::model::moment::Span;
use crate::model::name::{Channel, SecretName};
use crate::model::run::Counters;
use crate::model::run::{Run, RunState};
use crate::model::verdict::{Denial, DenyReason};
use crate::policy::command::{ResolvedCommand, check_command};
use crate::policy::denial;
use crate::policy::request::Request;
use crate::profile::identity::Identity;
use crate::profile::{Audience, Capability, OnRevoke, Place, Profile};

/// What is decided by: the run's profile, and the host's configuration over it.
#[derive(Debug, Clone, Copy)]
pub struct Policy<'a> {
    pub profile: &'a Profile,
    pub config: &'a HostConfig,
    /// Whether this host has an issuer of identities.
    pub has_issuer: bool,
}

/// The answer to one request.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "moved once; granted is the common case")]
#[must_use = "a verdict that is not looked at is a lease that nobody decided"]
pub enum Verdict {
    Granted(Grant),
    Denied(Denial),
}

impl Verdict {
    pub fn into_result(self) -> Result<Grant, Denial> {
        match self {
            Verdict::Granted(grant) => Ok(grant),
            Verdict::Denied(denial) => Err(denial),
        }
    }
}

/// A permission, not yet a lease. Made by [`decide`] alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    request: Request,
    capability: Arc<Capability>,
    audience: usize,
    channel: Channel,
    place: Place,
    source: SecretSource,
    ttl: Span,
    uses: NonZeroU32,
}

impl Grant {
    pub fn request(&self) -> &Request {
        &self.request
    }

    /// The capability as declared: redact, command patterns, constraints and all.
    pub fn capability(&self) -> &Capability {
        &self.capability
    }

    pub fn audience(&self) -> &Audience {
        &self.capability.audiences[self.audience]
    }

    pub fn channel(&self) -> Channel {
        self.channel
    }

    /// Where the command finds the value.
    pub fn place(&self) -> &Place {
        &self.place
    }

    pub fn secret(&self) -> &SecretName {
        &self.audience().secret
    }

    /// Where the value comes from.
    pub fn source(&self) -> &SecretSource {
        &self.source
    }

    pub fn ttl(&self) -> Span {
        self.ttl
    }

    pub fn uses(&self) -> NonZeroU32 {
        self.uses
    }

    pub fn redact(&self) -> bool {
        self.capability.redact
    }

    pub fn on_revoke(&self) -> OnRevoke {
        self.capability.on_revoke
    }

    /// The exec's command is held to patterns, so its environment is the profile's and the deliveries'.
    pub fn is_pinned(&self) -> bool {
        !self.capability.is_any_command()
    }
}

/// Decides one request. `command` is what the lease is for, where that is known already; else it is
/// judged when an exec is asked for, by [`check_command`].
pub fn decide(
    policy: Policy<'_>,
    request: &Request,
    run: &Run,
    counters: Counters,
    command: Option<&ResolvedCommand<'_>>,
) -> Verdict {
    match judge(policy, request, run, counters, command) {
        Ok(grant) => Verdict::Granted(grant),
        Err(denial) => Verdict::Denied(denial),
    }
}

/// Decides the requests of one exec together: all are granted, or the first denial. Each counts towards
/// the ceilings; no two may deliver to the same place.
///
/// # Errors
/// The first denial.
pub fn decide_all(
    policy: Policy<'_>,
    requests: &[Request],
    run: &Run,
    counters: Counters,
    command: Option<&ResolvedCommand<'_>>,
) -> Result<Vec<Grant>, Denial> {
    let mut grants = Vec::<Grant>::with_capacity(requests.len());
    for (request, before) in requests.iter().zip(0..) {
        let counters = Counters {
            minute: counters.minute.saturating_add(before),
            run: counters.run.saturating_add(before),
        };
        let grant = judge(policy, request, run, counters, command)?;
        if let Some(other) = grants.iter().find(|other| collide(other, &grant)) {
            return Err(denial::collision(&grant, other, policy.profile));
        }
        grants.push(grant);
    }
    Ok(grants)
}

/// The same variable or file, or git's helper for the same host.
fn collide(a: &Grant, b: &Grant) -> bool {
    match (a.place.variable(), b.place.variable()) {
        (Some(a), Some(b)) => a == b,
        (None, None) => {
            if let (Place::Token { kind: a }, Place::Token { kind: b }) = (&a.place, &b.place) {
                return a == b;
            }
            a.channel == b.channel
                && a.audience().host == b.audience().host
                && a.audience().protocol == b.audience().protocol
        }
        (Some(_), None) | (None, Some(_)) => false,
    }
}

fn judge(
    policy: Policy<'_>,
    request: &Request,
    run: &Run,
    counters: Counters,
    command: Option<&ResolvedCommand<'_>>,
) -> Result<Grant, Denial> {
    let Policy { profile, config, .. } = policy;
    check_run(request, run)?;
    check_ceilings(config, request, run, counters)?;

    let capability = profile
        .capability(&request.capability)
        .ok_or_else(|| denial::capability(profile, request))?;
    let (index, audience) = capability
        .audiences
        .iter()
        .enumerate()
        .find(|(_, a)| a.host == request.audience)
        .ok_or_else(|| denial::audience(profile, capability, request))?;
    let channel = channel(policy, capability, request)?;
    check_permission(config, capability, request, run)?;
    let ttl = ttl(policy, capability, request)?;
    let uses = uses(profile, capability, request)?;
    if let Some(command) = command {
        check_command(capability, &request.asked(), &profile.name, command)?;
    }
    let source = source(policy, capability, audience, channel, request)?;
    // Parsed profiles derive a place for each declared channel; a profile made by hand may not.
    let place = audience
        .place(channel)
        .ok_or_else(|| denial::no_place(profile, request, audience, channel))?;
    Ok(Grant {
        request: request.clone(),
        capability: Arc::clone(capability),
        audience: index,
        channel,
        place,
        source,
        ttl,
        uses,
    })
}

fn check_run(request: &Request, run: &Run) -> Result<(), Denial> {
    // Knowing another run's id is no authority.
    if request.run_id != run.run_id {
        return Err(denial::other_run(request, run));
    }
    match run.state {
        RunState::Active => Ok(()),
        RunState::Ended => Err(denial::run_ended(request, run)),
    }
}

fn check_ceilings(
    config: &HostConfig,
    request: &Request,
    run: &Run,
    counters: Counters,
) -> Result<(), Denial> {
    if counters.run >= config.ceilings.requests_per_run.get() {
        return Err(denial::rate(DenyReason::RateExceededRun, config, request, run));
    }
    if counters.minute >= config.ceilings.requests_per_minute.get() {
        return Err(denial::rate(DenyReason::RateExceededMinute, config, request, run));
    }
    Ok(())
}

fn channel(
    policy: Policy<'_>,
    capability: &Capability,
    request: &Request,
) -> Result<Channel, Denial> {
    let profile = policy.profile;
    let channel = match (request.channel, capability.channels.first()) {
        (Some(asked), _) if capability.channels.contains(&asked) => asked,
        (None, Some(first)) => *first,
        (Some(_), _) | (None, None) => return Err(denial::channel(profile, capability, request)),
    };
    match channel {
        Channel::Token if !policy.has_issuer => Err(denial::identity(profile, capability, request)),
        Channel::Memfd
        | Channel::File
        | Channel::Env
        | Channel::Git
        | Channel::Token
        | Channel::Ssh => Ok(channel),
    }
}

/// Where the value comes from, if the host lets this capability and audience draw on it. On `token` that
/// is the issuer, whatever else the secret is the name of.
fn source(
    policy: Policy<'_>,
    capability: &Capability,
    audience: &Audience,
    channel: Channel,
    request: &Request,
) -> Result<SecretSource, Denial> {
    let Policy { profile, config, has_issuer } = policy;
    let named = match config.secrets.get(&audience.secret) {
        Some(secret) if secret.allows(&request.capability, &request.audience) => {
            Some(&secret.source)
        }
        Some(secret) => return Err(denial::secret_not_allowed(config, request, audience, secret)),
        None if audience.is_issuers() => {
            if !config.issuer.allows(&request.capability, &request.audience) {
                return Err(denial::issuer_not_allowed(config, request));
            }
            None
        }
        None => return Err(denial::secret_unknown(config, request, audience)),
    };
    if channel != Channel::Token {
        return match named {
            Some(source) if !has_issuer && draws_on_issuer(config, source) => {
                Err(denial::identity(profile, capability, request))
            }
            Some(source)
                if matches!(source, SecretSource::SshCa(_)) != (channel == Channel::Ssh) =>
            {
                Err(denial::ssh(capability, audience, channel, request))
            }
            Some(source) => Ok(source.clone()),
            None => Err(denial::secret_unknown(config, request, audience)),
        };
    }
    let (asked, claims) = match named {
        Some(SecretSource::Jwt(jwt)) => (jwt.audience.clone(), jwt.claims.clone()),
        Some(_) | None => (None, BTreeMap::new()),
    };
    let identity = audience.identity.as_ref();
    let token_audience = identity
        .and_then(|identity| identity.audience.clone())
        .or(asked)
        .or_else(|| identity.and_then(Identity::default_audience))
        .unwrap_or_else(|| config.issuer.audience.clone());
    let ttl = config.issuer.token_ttl;
    Ok(SecretSource::Jwt(Jwt { audience: Some(token_audience), ttl, claims }))
}

/// It is a token of this host's issuer, or proves itself with one.
fn draws_on_issuer(config: &HostConfig, source: &SecretSource) -> bool {
    let is_jwt = |source: &SecretSource| matches!(source, SecretSource::Jwt(_));
    let proves = |name: &SecretName| config.secrets.get(name).is_some_and(|s| is_jwt(&s.source));
    is_jwt(source) || source.credentials().iter().any(|(_, name)| proves(name))
}

fn check_permission(
    config: &HostConfig,
    capability: &Capability,
    request: &Request,
    run: &Run,
) -> Result<(), Denial> {
    match &capability.permission {
        Some(needed) if !run.permissions.contains(needed) => {
            Err(denial::permission(config, capability, needed, request, run))
        }
        Some(_) | None => Ok(()),
    }
}

/// Asked for nothing: the lesser of the capability's and the host's default. The most: the lesser of the
/// capability's and the host's maximum.
fn ttl(policy: Policy<'_>, capability: &Capability, request: &Request) -> Result<Span, Denial> {
    let leases = policy.config.leases;
    let most = capability.ttl.map_or(leases.max_ttl, |ttl| ttl.min(leases.max_ttl));
    match request.ttl {
        None => Ok(most.min(leases.default_ttl)),
        Some(asked) if asked <= most => Ok(asked),
        Some(asked) => Err(denial::ttl(policy, capability, request, asked, most)),
    }
}

fn uses(
    profile: &Profile,
    capability: &Capability,
    request: &Request,
) -> Result<NonZeroU32, Denial> {
    match request.uses {
        None => Ok(NonZeroU32::MIN),
        Some(asked) if asked <= capability.uses => Ok(asked),
        Some(asked) => Err(denial::uses(profile, capability, request, asked)),
    }
}
