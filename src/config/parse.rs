//! `sublet.toml` as written, and the way to [`HostConfig`].
#![forbid(unsafe_code)]

mod identity;

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU32;
use std::ops::Range;
use std::path::{Component, PathBuf};

use serde::Deserialize;
use toml::Spanned;

use crate::config::place::{self, Located};
use crate::config::source::raw::RawSecret;
use crate::config::{
    AllowPattern, BrokerWall, Ceilings, HookConfig, Host, HostConfig, Leases, SecretEntry,
    SecretSource, State, UidPool, Warm,
};
use crate::model::moment::Span;
use crate::model::name::{IdentityName, Permission, SecretName};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawConfig {
    #[serde(default)]
    state: RawState,
    #[serde(default)]
    host: RawHost,
    #[serde(default)]
    ceilings: RawCeilings,
    #[serde(default)]
    leases: RawLeases,
    #[serde(default)]
    issuer: identity::RawIssuer,
    #[serde(default)]
    principals: BTreeMap<IdentityName, RawPrincipal>,
    #[serde(default)]
    secrets: BTreeMap<SecretName, Spanned<RawSecret>>,
    #[serde(default)]
    hook: RawHook,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawHook {
    profiles: Option<Vec<String>>,
    principals: Option<Vec<IdentityName>>,
    binary: Option<Spanned<PathBuf>>,
    #[serde(default)]
    project_token: bool,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawState {
    dir: Option<Spanned<PathBuf>>,
    url: Option<Spanned<String>>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawHost {
    #[serde(default)]
    workspaces: Vec<Spanned<PathBuf>>,
    user: Option<Spanned<String>>,
    uid_pool: Option<UidPool>,
    runtime_dir: Option<Spanned<PathBuf>>,
    #[serde(default)]
    warm: Warm,
    #[serde(default)]
    waive: Vec<BrokerWall>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawCeilings {
    requests_per_minute: Option<NonZeroU32>,
    requests_per_run: Option<NonZeroU32>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawLeases {
    default_ttl: Option<Spanned<Span>>,
    max_ttl: Option<Spanned<Span>>,
    auto_renew: Option<bool>,
    renew_before_expiry: Option<Span>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPrincipal {
    permissions: Vec<Permission>,
}

pub(super) fn parse(text: &str, origin: &str) -> Result<HostConfig, Box<Located>> {
    let raw: RawConfig = place::parse(origin, text)?;
    let at = At { origin, text };
    if let Some(url) = &raw.state.url {
        return Err(at.url(url));
    }
    let spans = raw.secrets.iter().map(|(name, secret)| (name.clone(), secret.span())).collect();
    let secrets = raw
        .secrets
        .into_iter()
        .map(|(name, secret)| at.secret(&name, secret).map(|secret| (name, secret)))
        .collect::<Result<_, _>>()?;
    at.references(&secrets, &spans)?;
    Ok(HostConfig {
        origin: Some(origin.to_owned()),
        state: State { dir: raw.state.dir.map(|dir| at.absolute(dir, "state.dir")).transpose()? },
        host: Host {
            workspaces: raw
                .host
                .workspaces
                .into_iter()
                .map(|path| at.absolute(path, "host.workspaces"))
                .collect::<Result<_, _>>()?,
            user: raw.host.user.map(|user| at.user(user)).transpose()?,
            uid_pool: raw.host.uid_pool.unwrap_or_default(),
            runtime_dir: raw
                .host
                .runtime_dir
                .map(|dir| at.absolute(dir, "host.runtime_dir"))
                .transpose()?,
            warm: raw.host.warm,
            waive: raw.host.waive,
        },
        ceilings: {
            let default = Ceilings::default();
            let raw = raw.ceilings;
            Ceilings {
                requests_per_minute: raw.requests_per_minute.unwrap_or(default.requests_per_minute),
                requests_per_run: raw.requests_per_run.unwrap_or(default.requests_per_run),
            }
        },
        leases: at.leases(raw.leases)?,
        issuer: at.issuer(raw.issuer)?,
        principals: raw.principals.into_iter().map(|(name, p)| (name, p.permissions)).collect(),
        secrets,
        hook: HookConfig {
            profiles: raw.hook.profiles,
            principals: raw
                .hook
                .principals
                .map(|names| names.into_iter().map(String::from).collect()),
            binary: raw.hook.binary.map(|path| at.absolute(path, "hook.binary")).transpose()?,
            project_token: raw.hook.project_token,
        },
    })
}

pub(super) struct At<'a> {
    origin: &'a str,
    text: &'a str,
}

pub(super) type Checked<T> = Result<T, Box<Located>>;

impl At<'_> {
    fn error<T>(&self, at: &Spanned<T>, message: impl Into<String>) -> Box<Located> {
        self.at(at.span(), message)
    }

    pub(super) fn at(&self, span: Range<usize>, message: impl Into<String>) -> Box<Located> {
        Box::new(Located::new(self.origin, self.text, span, message))
    }

    /// The same for a value that may carry a password: the line is shown up to it.
    pub(super) fn hiding(&self, span: Range<usize>, message: impl Into<String>) -> Box<Located> {
        let mut located = self.at(span, message);
        located.excerpt = located.excerpt.chars().take(located.column - 1).collect();
        located
    }

    /// A URL may carry a password, so the error does not show the line.
    fn url(&self, url: &Spanned<String>) -> Box<Located> {
        let scheme = url.get_ref().split(':').next().unwrap_or_default();
        let message = if matches!(scheme, "postgres" | "postgresql") {
            "`state.url` names PostgreSQL, which this version cannot keep its state in; remove `url` to \
             use the embedded store in `state.dir`"
        } else {
            "`state.url` is for a PostgreSQL server, which this version cannot use; remove it to use the \
             embedded store in `state.dir`"
        };
        self.hiding(url.span(), message)
    }

    pub(super) fn absolute(&self, path: Spanned<PathBuf>, key: &str) -> Checked<PathBuf> {
        let p = path.get_ref();
        let plain = p.is_absolute()
            && p.components().all(|c| matches!(c, Component::RootDir | Component::Normal(_)))
            && !p.to_string_lossy().contains(char::is_control)
            && p.parent().is_some();
        if plain {
            Ok(path.into_inner())
        } else {
            Err(self
                .error(&path, format!("`{key}` needs an absolute path below `/`, without `..`")))
        }
    }

    fn user(&self, user: Spanned<String>) -> Checked<String> {
        let name = user.get_ref();
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.');
        if name == "root" || name.bytes().all(|b| b == b'0') && !name.is_empty() {
            return Err(self.error(&user, "`host.user` is the broker's, which must not be root"));
        }
        if name.is_empty() || name.len() > 32 || name.starts_with('-') || !name.bytes().all(plain) {
            return Err(self.error(&user, "`host.user` needs the name or the number of a user"));
        }
        Ok(user.into_inner())
    }

    fn leases(&self, raw: RawLeases) -> Checked<Leases> {
        let default = Leases::default();
        let value = |s: &Option<Spanned<Span>>| s.as_ref().map(|s| *s.get_ref());
        let max_ttl = value(&raw.max_ttl).unwrap_or(default.max_ttl);
        // A max_ttl below the built-in default lowers that; one below a written default is a mistake.
        let default_ttl = value(&raw.default_ttl).unwrap_or(default.default_ttl.min(max_ttl));
        if let Some(at) = &raw.default_ttl
            && default_ttl > max_ttl
        {
            return Err(self.error(
                at,
                format!(
                    "`leases.default_ttl` ({default_ttl}) is above `leases.max_ttl` ({max_ttl})"
                ),
            ));
        }
        Ok(Leases {
            default_ttl,
            max_ttl,
            auto_renew: raw.auto_renew.unwrap_or(default.auto_renew),
            renew_before_expiry: raw.renew_before_expiry.unwrap_or(default.renew_before_expiry),
        })
    }

    fn secret(&self, name: &SecretName, raw: Spanned<RawSecret>) -> Checked<SecretEntry> {
        let whole = raw.span();
        let mut raw = raw.into_inner();
        let Some(allow) = raw.allow.take() else {
            return Err(self.at(
                whole,
                format!(
                    "secret `{name}` has no `allow`: name the capability and audience that may draw on it, \
                     as `allow = [\"repo.push@github.com\"]`"
                ),
            ));
        };
        let allow = self.allow(allow.get_ref())?;
        Ok(SecretEntry { source: self.source(name, &mut raw, &whole)?, allow })
    }

    fn allow(&self, allow: &[Spanned<String>]) -> Checked<Vec<AllowPattern>> {
        let parse = |text: &Spanned<String>| {
            text.get_ref().parse::<AllowPattern>().map_err(|e| self.error(text, e.to_string()))
        };
        allow.iter().map(parse).collect()
    }

    /// What names other secrets names such as can be read, and a secret is for leases, for other secrets, or
    /// for both.
    fn references(
        &self,
        secrets: &BTreeMap<SecretName, SecretEntry>,
        spans: &BTreeMap<SecretName, Range<usize>>,
    ) -> Checked<()> {
        let span = |name: &SecretName| spans.get(name).cloned().unwrap_or_default();
        let mut named = BTreeSet::new();
        for (name, entry) in secrets {
            for (role, other) in entry.source.credentials() {
                match secrets.get(other).map(|other| &other.source) {
                    Some(SecretSource::Vault | SecretSource::File { .. }) => {}
                    Some(SecretSource::Jwt(_)) if role.is_token() => {}
                    Some(source) => {
                        let kind = source.as_str();
                        let message = format!(
                            "secret `{name}` takes its {role} from `{other}`, whose source is `{kind}`; it must \
                             be `vault` or `file`{}",
                            if role.is_token() { ", or `jwt`" } else { "" }
                        );
                        return Err(self.at(span(name), message));
                    }
                    None => {
                        let message = format!(
                            "secret `{name}` takes its {role} from `{other}`, and there is no [secrets.{other}]"
                        );
                        return Err(self.at(span(name), message));
                    }
                }
                named.insert(other);
            }
        }
        match secrets.iter().find(|(name, entry)| entry.allow.is_empty() && !named.contains(name)) {
            None => Ok(()),
            Some((name, _)) => Err(self.at(
                span(name),
                format!(
                    "secret `{name}` has an empty `allow`, which is for what other secrets prove themselves \
                     with, and none names it: name the capability and audience that may draw on it"
                ),
            )),
        }
    }
}
