//! The words of every denial: why, with the subject, and what would be allowed. One function a reason.
#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::fmt::Display;
use std::num::NonZeroU32;

use crate::config::{HostConfig, SecretEntry};
use crate::model::moment::Span;
use crate::model::name::{Channel, Permission};
use crate::model::run::Run;
use crate::model::verdict::{Denial, DenyReason};
use crate::policy::command::ResolvedCommand;
use crate::policy::decide::{Grant, Policy};
use crate::policy::request::Request;
use crate::profile::{Audience, Capability, Place, Profile};

fn denial(request: &Request, reason: DenyReason, message: String, hint: String) -> Denial {
    Denial { asked: request.asked(), reason, message, hint }
}

fn list<T: Display>(items: impl IntoIterator<Item = T>) -> String {
    let items: Vec<_> = items.into_iter().map(|item| format!("`{item}`")).collect();
    items.join(", ")
}

/// A table key or a string as TOML writes it: bare where it may be, else quoted.
fn key(text: &str) -> String {
    let bare = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-');
    if !text.is_empty() && text.bytes().all(bare) { text.to_owned() } else { quoted(text) }
}

fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}

pub(super) fn other_run(request: &Request, run: &Run) -> Denial {
    denial(
        request,
        DenyReason::RunNotActive,
        format!(
            "the request names run `{}`, but the caller belongs to run `{}`",
            request.run_id, run.run_id
        ),
        "ask within your own run".to_owned(),
    )
}

pub(super) fn run_ended(request: &Request, run: &Run) -> Denial {
    denial(
        request,
        DenyReason::RunNotActive,
        format!("run `{}` has ended", run.run_id),
        "start a new run".to_owned(),
    )
}

pub(super) fn rate(
    reason: DenyReason,
    config: &HostConfig,
    request: &Request,
    run: &Run,
) -> Denial {
    let ceilings = config.ceilings;
    let (ceiling, window, remedy) = match reason {
        DenyReason::RateExceededMinute => (
            format!("requests_per_minute = {}", ceilings.requests_per_minute),
            " in the last minute",
            "wait a minute, or raise",
        ),
        _ => (
            format!("requests_per_run = {}", ceilings.requests_per_run),
            "",
            "start a new run, or raise",
        ),
    };
    denial(
        request,
        reason,
        format!(
            "run `{}` has made as many requests{window} as the host permits: {ceiling}",
            run.run_id
        ),
        format!("{remedy} it under [ceilings] in {}", config.called()),
    )
}

pub(super) fn capability(profile: &Profile, request: &Request) -> Denial {
    let hint = if profile.capabilities.is_empty() {
        format!(
            "profile `{}` declares no capability; add a [[capability]] to it, or name another with --profile",
            profile.name
        )
    } else {
        format!(
            "profile `{}` declares {}; add a [[capability]] to it, or name another with --profile",
            profile.name,
            list(profile.capabilities.iter().map(|c| &c.name))
        )
    };
    denial(
        request,
        DenyReason::CapabilityNotDeclared,
        format!("profile `{}` declares no capability `{}`", profile.name, request.capability),
        hint,
    )
}

pub(super) fn audience(profile: &Profile, capability: &Capability, request: &Request) -> Denial {
    denial(
        request,
        DenyReason::AudienceNotPermitted,
        format!(
            "capability `{}` of profile `{}` is not for audience `{}`",
            capability.name, profile.name, request.audience
        ),
        format!("it is for {}", list(capability.audiences.iter().map(|a| &a.host))),
    )
}

pub(super) fn channel(profile: &Profile, capability: &Capability, request: &Request) -> Denial {
    let asked = request.channel.map_or("none", Channel::as_str);
    denial(
        request,
        DenyReason::ChannelMismatch,
        format!(
            "capability `{}` of profile `{}` is not delivered by channel `{asked}`",
            capability.name, profile.name
        ),
        format!("it is delivered by {}", list(&capability.channels)),
    )
}

pub(super) fn identity(profile: &Profile, capability: &Capability, request: &Request) -> Denial {
    let others: Vec<_> = capability.channels.iter().filter(|c| **c != Channel::Token).collect();
    let init = "make this host an issuer with `sublet issuer init --url https://…`";
    let is_token = request.channel.or(capability.channels.first().copied()) == Some(Channel::Token);
    let instead = match (is_token, others.is_empty()) {
        (true, false) => format!("{init}, or ask for channel {}", list(others)),
        _ => init.to_owned(),
    };
    let what = if is_token { "channel `token`" } else { "a secret of source `jwt`" };
    denial(
        request,
        DenyReason::IdentityNotConfigured,
        format!(
            "{what}, which capability `{}` of profile `{}` draws on, needs a workload identity issuer, and \
             this host has none",
            capability.name, profile.name
        ),
        instead,
    )
}

pub(super) fn permission(
    config: &HostConfig,
    capability: &Capability,
    needed: &Permission,
    request: &Request,
    run: &Run,
) -> Denial {
    let held = run.permissions.iter().chain([needed]).map(|p| quoted(p.as_str()));
    let hint = format!(
        "if `{}` should, put this into {}:\n[principals.{}]\npermissions = [{}]",
        run.principal,
        config.called(),
        key(run.principal.as_str()),
        held.collect::<Vec<_>>().join(", "),
    );
    denial(
        request,
        DenyReason::PermissionMissing,
        format!(
            "capability `{}` needs permission `{needed}`, which principal `{}` does not hold",
            capability.name, run.principal
        ),
        hint,
    )
}

pub(super) fn ttl(
    policy: Policy<'_>,
    capability: &Capability,
    request: &Request,
    asked: Span,
    most: Span,
) -> Denial {
    let whose = if capability.ttl == Some(most) {
        format!("`ttl` of capability `{}` in profile `{}`", capability.name, policy.profile.name)
    } else {
        format!("`leases.max_ttl` in {}", policy.config.called())
    };
    denial(
        request,
        DenyReason::TtlExceedsPolicy,
        format!("a ttl of {asked} is longer than the {most} that {whose} permits"),
        format!("ask for ttl={most} or less"),
    )
}

pub(super) fn uses(
    profile: &Profile,
    capability: &Capability,
    request: &Request,
    asked: NonZeroU32,
) -> Denial {
    denial(
        request,
        DenyReason::UsesExceedChannel,
        format!(
            "{asked} uses are more than the {} that capability `{}` of profile `{}` permits",
            capability.uses, capability.name, profile.name
        ),
        format!("ask for uses={} or less", capability.uses),
    )
}

/// A text for a message: bounded, and nothing that controls a terminal.
fn plain(text: &str) -> String {
    text.chars().take(160).map(|c| if c.is_control() { '?' } else { c }).collect()
}

/// The words of a command for a message.
fn shown(argv: &[OsString]) -> String {
    let words: Vec<_> = argv.iter().take(8).map(|word| word.to_string_lossy()).collect();
    let text = plain(&words.join(" "));
    if argv.len() > 8 { format!("{text} …") } else { text }
}

pub(super) fn command(
    capability: &Capability,
    asked: &str,
    profile: &str,
    command: &ResolvedCommand<'_>,
) -> Denial {
    Denial {
        asked: asked.to_owned(),
        reason: DenyReason::CommandNotPermitted,
        message: format!(
            "capability `{}` of profile `{profile}` is not for the command `{}` ({})",
            capability.name,
            shown(command.argv),
            plain(&command.program.to_string_lossy())
        ),
        hint: format!(
            "it is for {}; a bare name is the one found first on the profile's PATH",
            list(&capability.command)
        ),
    }
}

pub(super) fn writable_program(
    capability: &Capability,
    asked: &str,
    profile: &str,
    command: &ResolvedCommand<'_>,
) -> Denial {
    Denial {
        asked: asked.to_owned(),
        reason: DenyReason::CommandNotPermitted,
        message: format!(
            "capability `{}` of profile `{profile}` is pinned to commands, but the command could rewrite \
             its own program {}",
            capability.name,
            plain(&command.program.to_string_lossy())
        ),
        hint: "run a program from a place that is read-only inside, such as /usr, or declare the capability \
               with `command = [[\"**\"]]`, which says \"any\""
            .to_owned(),
    }
}

pub(super) fn secret_unknown(
    config: &HostConfig,
    request: &Request,
    audience: &Audience,
) -> Denial {
    denial(
        request,
        DenyReason::SecretNotAllowed,
        format!(
            "the profile draws on secret `{}`, which {} does not have",
            audience.secret,
            config.called()
        ),
        format!(
            "if it should, put this into {}, then run `sublet secret set {}`:\n[secrets.{}]\nsource = \"vault\"\nallow = [{}]",
            config.called(),
            audience.secret,
            key(audience.secret.as_str()),
            quoted(&request.asked()),
        ),
    )
}

pub(super) fn secret_not_allowed(
    config: &HostConfig,
    request: &Request,
    audience: &Audience,
    secret: &SecretEntry,
) -> Denial {
    let allowed: Vec<_> = secret.allow.iter().map(|p| quoted(&p.to_string())).collect();
    denial(
        request,
        DenyReason::SecretNotAllowed,
        format!(
            "secret `{}` may be drawn on for {} only, says {}",
            audience.secret,
            list(&secret.allow),
            config.called()
        ),
        format!(
            "if it should be, write under [secrets.{}]:\nallow = [{}, {}]",
            key(audience.secret.as_str()),
            allowed.join(", "),
            quoted(&request.asked()),
        ),
    )
}

/// An SSH identity and the channel `ssh` are for each other alone.
pub(super) fn ssh(
    capability: &Capability,
    audience: &Audience,
    channel: Channel,
    request: &Request,
) -> Denial {
    let (message, hint) = match channel {
        Channel::Ssh => (
            format!(
                "channel `ssh` needs a secret of source `ssh-ca`, and `{}` is another",
                audience.secret
            ),
            format!("give capability `{}` such a secret, or another channel", capability.name),
        ),
        _ => (
            format!(
                "`{}` is of source `ssh-ca`, which no channel but `ssh` delivers",
                audience.secret
            ),
            format!("name `ssh` in `channels` of capability `{}`", capability.name),
        ),
    };
    denial(request, DenyReason::ChannelMismatch, message, hint)
}

pub(super) fn issuer_not_allowed(config: &HostConfig, request: &Request) -> Denial {
    let allowed: Vec<_> = config.issuer.allow.iter().map(|p| p.to_string()).collect();
    let asked = request.asked();
    let all = allowed.iter().map(String::as_str).chain([asked.as_str()]).map(quoted);
    denial(
        request,
        DenyReason::SecretNotAllowed,
        format!("{} does not let this have a token of the host's issuer", config.called()),
        format!(
            "if it should, write under [issuer]:\nallow = [{}]",
            all.collect::<Vec<_>>().join(", ")
        ),
    )
}

pub(super) fn no_place(
    profile: &Profile,
    request: &Request,
    audience: &Audience,
    channel: Channel,
) -> Denial {
    denial(
        request,
        DenyReason::DeliveryUnavailable,
        format!("channel `{channel}` has no variable name for secret `{}`", audience.secret),
        format!("add a `variable` to audience `{}` in profile `{}`", audience.host, profile.name),
    )
}

pub(super) fn collision(grant: &Grant, other: &Grant, profile: &Profile) -> Denial {
    let place = match grant.place().variable() {
        Some(variable) => format!("as `{variable}`"),
        None => match grant.place() {
            Place::Token { kind } => format!("as the token of kind `{}`", kind.as_str()),
            _ => format!("to git for `{}`", grant.audience().host),
        },
    };
    denial(
        grant.request(),
        DenyReason::DeliveryUnavailable,
        format!("the same exec already gets `{}` {place}", other.request().asked()),
        format!(
            "ask for one of the two, for another channel, or give one another `variable` in profile `{}`",
            profile.name
        ),
    )
}
