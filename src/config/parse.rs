//! `sublet.toml` as written, and the way to [`HostConfig`].
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;
use toml::Spanned;

use crate::config::place::{self, Located};
use crate::config::{
    AllowPattern, BrokerWall, Ceilings, HookConfig, Host, HostConfig, Leases, SOURCE_TIMEOUT,
    SecretEntry, SecretSource, State, UidPool, Warm,
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

#[derive(Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum RawSource {
    Vault,
    File,
    Command,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawSecret {
    source: RawSource,
    path: Option<Spanned<PathBuf>>,
    command: Option<Spanned<Vec<String>>>,
    timeout: Option<Spanned<Span>>,
    allow: Option<Vec<Spanned<String>>>,
}

pub(super) fn parse(text: &str, origin: &str) -> Result<HostConfig, Box<Located>> {
    let raw: RawConfig = place::parse(origin, text)?;
    let at = At { origin, text };
    if let Some(url) = &raw.state.url {
        return Err(at.url(url));
    }
    let secrets = raw
        .secrets
        .into_iter()
        .map(|(name, secret)| at.secret(&name, secret).map(|secret| (name, secret)))
        .collect::<Result<_, _>>()?;
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
        principals: raw.principals.into_iter().map(|(name, p)| (name, p.permissions)).collect(),
        secrets,
        hook: HookConfig {
            profiles: raw.hook.profiles,
            principals: raw
                .hook
                .principals
                .map(|names| names.into_iter().map(String::from).collect()),
            binary: raw.hook.binary.map(|path| at.absolute(path, "hook.binary")).transpose()?,
        },
    })
}

struct At<'a> {
    origin: &'a str,
    text: &'a str,
}

type Checked<T> = Result<T, Box<Located>>;

impl At<'_> {
    fn error<T>(&self, at: &Spanned<T>, message: impl Into<String>) -> Box<Located> {
        Box::new(Located::new(self.origin, self.text, at.span(), message))
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
        let mut located = self.error(url, message);
        located.excerpt = located.excerpt.chars().take(located.column - 1).collect();
        located
    }

    fn absolute(&self, path: Spanned<PathBuf>, key: &str) -> Checked<PathBuf> {
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
        let allow = raw.get_ref().allow.as_deref().unwrap_or_default();
        if allow.is_empty() {
            return Err(self.error(
                &raw,
                format!(
                    "secret `{name}` has no `allow`: name the capability and audience that may draw on it, \
                     as `allow = [\"repo.push@github.com\"]`"
                ),
            ));
        }
        let allow = allow
            .iter()
            .map(|text| {
                text.get_ref().parse::<AllowPattern>().map_err(|e| self.error(text, e.to_string()))
            })
            .collect::<Result<_, _>>()?;
        Ok(SecretEntry { source: self.source(name, &raw)?, allow })
    }

    fn source(&self, name: &SecretName, whole: &Spanned<RawSecret>) -> Checked<SecretSource> {
        let raw = whole.get_ref();
        let stray =
            |key: &str, source: &str| format!("`{key}` has no meaning for source `{source}`");
        if let Some(path) = &raw.path
            && raw.source != RawSource::File
        {
            return Err(self.error(path, stray("path", raw.source.as_str())));
        }
        if raw.source != RawSource::Command {
            if let Some(command) = &raw.command {
                return Err(self.error(command, stray("command", raw.source.as_str())));
            }
            if let Some(timeout) = &raw.timeout {
                return Err(self.error(timeout, stray("timeout", raw.source.as_str())));
            }
        }
        match raw.source {
            RawSource::Vault => Ok(SecretSource::Vault),
            RawSource::File => match &raw.path {
                Some(path) => {
                    let path = self.absolute(path.clone(), &format!("secrets.{name}.path"))?;
                    Ok(SecretSource::File { path })
                }
                None => Err(self.error(whole, format!("secret `{name}` needs `path = \"/…\"`"))),
            },
            RawSource::Command => {
                let Some(command) = &raw.command else {
                    let message =
                        format!("secret `{name}` needs `command = [\"/path/to/program\", …]`");
                    return Err(self.error(whole, message));
                };
                let words = command.get_ref();
                if !words.first().is_some_and(|program| Path::new(program).is_absolute()) {
                    return Err(self.error(
                        command,
                        format!("`secrets.{name}.command` must begin with an absolute path; there is no shell"),
                    ));
                }
                if words.iter().any(|word| word.contains('\0')) {
                    return Err(self.error(command, "an argument cannot hold a NUL"));
                }
                let timeout = raw.timeout.as_ref().map_or(SOURCE_TIMEOUT, |t| *t.get_ref());
                Ok(SecretSource::Command { command: words.clone(), timeout })
            }
        }
    }
}

impl RawSource {
    fn as_str(self) -> &'static str {
        match self {
            RawSource::Vault => "vault",
            RawSource::File => "file",
            RawSource::Command => "command",
        }
    }
}
