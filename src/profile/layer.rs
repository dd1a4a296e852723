//! One profile text as written: what is there, nothing resolved. A text goes in, a [`Layer`] or an
//! error with its place comes out. All that one text can be wrong about alone is refused here.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::marker::PhantomData;
use std::num::NonZeroU32;
use std::ops::Range;
use std::str::FromStr;
use std::sync::Arc;

use serde::de::value::StrDeserializer;
use serde::de::{self, IntoDeserializer};
use serde::{Deserialize, Deserializer};
use toml::Spanned;

use crate::config::place::{self, Located};
use crate::model::moment::{Size, Span};
use crate::model::name::{
    AudienceName, CapabilityName, Channel, Permission, SecretName, VariableName,
};
use crate::profile::capability::{
    Audience, Capability, OnRevoke, Protocol, RepositoryPath, Username,
};
use crate::profile::command::CommandPattern;
use crate::profile::kinds::{
    CpuQuota, Enforcement, NetworkMode, SeccompFilter, Waiver, WorkspaceAccess,
};
use crate::profile::names::{self, NameClass};
use crate::profile::path::{BindEntry, HostPath};

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawProfile {
    description: Option<String>,
    extends: Option<Spanned<String>>,
    #[serde(default)]
    filesystem: RawFilesystem,
    #[serde(default)]
    network: RawNetwork,
    #[serde(default)]
    seccomp: RawSeccomp,
    #[serde(default)]
    landlock: RawLandlock,
    #[serde(default)]
    limits: RawLimits,
    #[serde(default)]
    environment: RawEnvironment,
    #[serde(default)]
    capability: Vec<Spanned<RawCapability>>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawFilesystem {
    pub read_only: Option<Items>,
    pub read_write: Option<Items>,
    pub workspace: Option<WorkspaceAccess>,
    pub tmp: Option<Size>,
    pub home: Option<Spanned<HostPath>>,
    pub root: Option<Spanned<HostPath>>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawNetwork {
    pub mode: Option<Spanned<NetworkMode>>,
    pub connect_ports: Option<Vec<u16>>,
    pub bind_ports: Option<Vec<u16>>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawSeccomp {
    pub filter: Option<SeccompFilter>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawLandlock {
    pub enforcement: Option<Enforcement>,
    pub waive: Option<BTreeSet<Waiver>>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawLimits {
    pub memory: Option<Limit<Size>>,
    pub processes: Option<Limit<NonZeroU32>>,
    pub cpu: Option<Limit<CpuQuota>>,
    pub open_files: Option<Limit<NonZeroU32>>,
    pub file_size: Option<Limit<Size>>,
    pub timeout: Option<Limit<Span>>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawEnvironment {
    #[serde(default)]
    pub set: BTreeMap<VariableName, Spanned<String>>,
    pub pass: Option<Items>,
    pub path: Option<Spanned<Items>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawCapability {
    name: Spanned<CapabilityName>,
    permission: Option<Permission>,
    channels: Option<Spanned<Vec<Channel>>>,
    ttl: Option<Span>,
    uses: Option<Spanned<i64>>,
    renewable: Option<bool>,
    command: Option<Vec<Spanned<Words>>>,
    redact: Option<bool>,
    on_revoke: Option<OnRevoke>,
    #[serde(default)]
    constraints: BTreeMap<String, String>,
    #[serde(default)]
    audience: Vec<Spanned<RawAudience>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawAudience {
    protocol: Option<Spanned<Protocol>>,
    host: Spanned<AudienceName>,
    path: Option<RepositoryPath>,
    secret: Spanned<SecretName>,
    username: Option<Username>,
    variable: Option<Spanned<VariableName>>,
}

/// A list of texts whose elements are parsed one by one, so that an error points at the element.
type Items = Vec<Spanned<String>>;

/// One command of `command`, not yet a pattern.
struct Words(Vec<String>);

impl<'de> Deserialize<'de> for Words {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = Words;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a list of words, as in `command = [[\"git\", \"push\", \"**\"]]`")
            }
            fn visit_seq<A: de::SeqAccess<'de>>(self, mut seq: A) -> Result<Words, A::Error> {
                let mut words = Vec::new();
                while let Some(word) = seq.next_element()? {
                    words.push(word);
                }
                Ok(Words(words))
            }
        }
        d.deserialize_any(Visitor)
    }
}

/// A limit as written: a value, or `"none"` to lift the extended profile's.
#[derive(Clone, Copy)]
pub(super) enum Limit<T> {
    None,
    At(T),
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Limit<T> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct Visitor<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> de::Visitor<'de> for Visitor<T> {
            type Value = Limit<T>;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a limit, or \"none\"")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Limit<T>, E> {
                if text == "none" {
                    return Ok(Limit::None);
                }
                T::deserialize(StrDeserializer::new(text)).map(Limit::At)
            }
            fn visit_i64<E: de::Error>(self, n: i64) -> Result<Limit<T>, E> {
                T::deserialize(n.into_deserializer()).map(Limit::At)
            }
            fn visit_u64<E: de::Error>(self, n: u64) -> Result<Limit<T>, E> {
                T::deserialize(n.into_deserializer()).map(Limit::At)
            }
            fn visit_f64<E: de::Error>(self, n: f64) -> Result<Limit<T>, E> {
                T::deserialize(n.into_deserializer()).map(Limit::At)
            }
        }
        d.deserialize_any(Visitor(PhantomData))
    }
}

/// One text, checked for all that it alone can be wrong about.
pub(super) struct Layer {
    pub origin: String,
    text: String,
    pub description: Option<String>,
    pub extends: Option<Spanned<String>>,
    pub filesystem: RawFilesystem,
    pub read_only: Option<Vec<Spanned<BindEntry>>>,
    pub read_write: Option<Vec<Spanned<BindEntry>>>,
    pub network: RawNetwork,
    pub seccomp: RawSeccomp,
    pub landlock: RawLandlock,
    pub limits: RawLimits,
    pub set: BTreeMap<VariableName, Spanned<String>>,
    pub pass: Option<Vec<Spanned<VariableName>>>,
    pub path: Option<Vec<Spanned<HostPath>>>,
    pub capabilities: Vec<Arc<Capability>>,
}

impl Layer {
    pub fn parse(origin: &str, text: String) -> Result<Self, Box<Located>> {
        let raw: RawProfile = place::parse(origin, &text)?;
        let at = At { origin, text: &text };
        at.filesystem(&raw.filesystem)?;
        let read_only = raw.filesystem.read_only.as_ref().map(|l| at.items(l)).transpose()?;
        let read_write = raw.filesystem.read_write.as_ref().map(|l| at.items(l)).transpose()?;
        at.network(&raw.network)?;
        at.set(&raw.environment.set)?;
        let pass = raw.environment.pass.as_ref().map(|l| at.pass(l)).transpose()?;
        let path = raw.environment.path.as_ref().map(|l| at.path(l)).transpose()?;
        let mut capabilities = Vec::<Arc<Capability>>::with_capacity(raw.capability.len());
        for capability in raw.capability {
            let name = capability.get_ref().name.span();
            let capability = at.capability(capability)?;
            if capabilities.iter().any(|c| c.name == capability.name) {
                return Err(at.error(
                    name,
                    format!("capability `{}` is declared twice in this file", capability.name),
                ));
            }
            capabilities.push(Arc::new(capability));
        }
        Ok(Self {
            origin: origin.to_owned(),
            description: raw.description,
            extends: raw.extends,
            filesystem: raw.filesystem,
            read_only,
            read_write,
            network: raw.network,
            seccomp: raw.seccomp,
            landlock: raw.landlock,
            limits: raw.limits,
            set: raw.environment.set,
            pass,
            path,
            capabilities,
            text,
        })
    }

    /// An error at a range of this layer's text.
    pub fn error(&self, range: Range<usize>, message: impl Into<String>) -> Box<Located> {
        At { origin: &self.origin, text: &self.text }.error(range, message)
    }
}

/// The checks, with the text at hand for the place of an error.
struct At<'a> {
    origin: &'a str,
    text: &'a str,
}

type Checked<T> = Result<T, Box<Located>>;

impl At<'_> {
    fn error(&self, range: Range<usize>, message: impl Into<String>) -> Box<Located> {
        Box::new(Located::new(self.origin, self.text, range, message))
    }

    fn filesystem(&self, raw: &RawFilesystem) -> Checked<()> {
        if let Some(root) = &raw.root
            && matches!(root.get_ref(), HostPath::Home(_))
        {
            return Err(
                self.error(root.span(), "`root` is an image of the host: write its absolute path")
            );
        }
        let Some(home) = &raw.home else { return Ok(()) };
        let HostPath::Absolute(path) = home.get_ref() else { return Ok(()) };
        let taken = ["/proc", "/dev", "/sys", "/usr", "/etc", "/run/sublet"];
        if path.parent().is_none()
            || path.as_os_str() == "/tmp"
            || taken.iter().any(|t| path.starts_with(t))
        {
            return Err(self.error(
                home.span(),
                format!(
                    "`{}` cannot be the home inside: choose a directory of its own, as /tmp/home",
                    path.display()
                ),
            ));
        }
        Ok(())
    }

    fn network(&self, raw: &RawNetwork) -> Checked<()> {
        match &raw.mode {
            Some(mode) if *mode.get_ref() == NetworkMode::Audience => Err(self.error(
                mode.span(),
                "network mode `audience` needs sublet's audience proxy, which this version does not have; \
                 use `none`, or `host` with `connect_ports`",
            )),
            Some(_) | None => Ok(()),
        }
    }

    fn items<T: FromStr<Err: fmt::Display>>(&self, list: &Items) -> Checked<Vec<Spanned<T>>> {
        list.iter()
            .map(|item| match item.get_ref().parse::<T>() {
                Ok(parsed) => Ok(Spanned::new(item.span(), parsed)),
                Err(e) => Err(self.error(item.span(), e.to_string())),
            })
            .collect()
    }

    fn set(&self, set: &BTreeMap<VariableName, Spanned<String>>) -> Checked<()> {
        for (name, value) in set {
            let class = names::class(name.as_str());
            // Git's names are judged per exec: they matter only beside a git lease.
            if !matches!(class, NameClass::Free | NameClass::Loader | NameClass::Git)
                && let Some(why) = names::why(class)
            {
                return Err(self.error(value.span(), format!("`{name}` {why}")));
            }
            if value.get_ref().contains('\0') {
                return Err(self.error(value.span(), format!("the value of `{name}` holds a NUL")));
            }
        }
        Ok(())
    }

    fn pass(&self, list: &Items) -> Checked<Vec<Spanned<VariableName>>> {
        let names: Vec<Spanned<VariableName>> = self.items(list)?;
        for name in &names {
            let class = names::class(name.get_ref().as_str());
            if !matches!(class, NameClass::Free | NameClass::Git)
                && let Some(why) = names::why(class)
            {
                return Err(self.error(name.span(), format!("`{}` {why}", name.get_ref())));
            }
        }
        Ok(names)
    }

    fn path(&self, list: &Spanned<Items>) -> Checked<Vec<Spanned<HostPath>>> {
        let directories: Vec<Spanned<HostPath>> = self.items(list.get_ref())?;
        if directories.is_empty() {
            return Err(self.error(list.span(), "`path` must name at least one directory"));
        }
        // PATH has no escape for its own separator.
        match list.get_ref().iter().find(|d| d.get_ref().contains(':')) {
            Some(d) => Err(self
                .error(d.span(), format!("`{}` cannot be in PATH: it holds a `:`", d.get_ref()))),
            None => Ok(directories),
        }
    }

    fn capability(&self, raw: Spanned<RawCapability>) -> Checked<Capability> {
        let whole = raw.span();
        let raw = raw.into_inner();
        let name = raw.name.into_inner();
        let lacks = |what: &str, example: &str| {
            self.error(whole.clone(), format!("capability `{name}` has no `{what}`: add {example}"))
        };
        let Some(channels) = raw.channels.filter(|c| !c.get_ref().is_empty()) else {
            return Err(lacks("channels", "for example `channels = [\"memfd\"]`"));
        };
        let Some(command) = raw.command.filter(|c| !c.is_empty()) else {
            return Err(lacks(
                "command",
                "the commands that may have the value, as `command = [[\"git\", \"push\", \"**\"]]`, or \
                 `command = [[\"**\"]]` for any",
            ));
        };
        if raw.audience.is_empty() {
            return Err(lacks("audience", "a `[[capability.audience]]` with `host` and `secret`"));
        }
        let at_channels = channels.span();
        let channels = channels.into_inner();
        if let Some(twice) = twice(&channels) {
            return Err(self.error(at_channels, format!("channel `{twice}` is listed twice")));
        }
        let pattern = |words: &Spanned<Words>| {
            CommandPattern::new(&words.get_ref().0)
                .map_err(|e| self.error(words.span(), e.to_string()))
        };
        let command = command.iter().map(pattern).collect::<Checked<_>>()?;
        let uses = match raw.uses {
            None => NonZeroU32::MIN,
            Some(uses) => match u32::try_from(*uses.get_ref()).ok().and_then(NonZeroU32::new) {
                Some(n) => n,
                None => {
                    return Err(self.error(
                        uses.span(),
                        format!("`uses` is how often the value may be used: 1 to {}", u32::MAX),
                    ));
                }
            },
        };
        let mut audiences = Vec::<Audience>::with_capacity(raw.audience.len());
        for audience in raw.audience {
            let host = audience.get_ref().host.span();
            let audience = self.audience(audience, &name, &channels)?;
            if audiences.iter().any(|a| a.host == audience.host) {
                return Err(self.error(
                    host,
                    format!(
                        "capability `{name}` has audience `{}` twice; a lease names only the host, so \
                         declare a second capability",
                        audience.host
                    ),
                ));
            }
            audiences.push(audience);
        }
        Ok(Capability {
            permission: raw.permission,
            channels,
            ttl: raw.ttl,
            uses,
            renewable: raw.renewable.unwrap_or(false),
            command,
            redact: raw.redact.unwrap_or(true),
            on_revoke: raw.on_revoke.unwrap_or_default(),
            constraints: raw.constraints,
            audiences,
            name,
        })
    }

    fn audience(
        &self,
        raw: Spanned<RawAudience>,
        capability: &CapabilityName,
        channels: &[Channel],
    ) -> Checked<Audience> {
        let whole = raw.span();
        let raw = raw.into_inner();
        let git = channels.contains(&Channel::Git);
        if git && !raw.protocol.as_ref().is_some_and(|p| p.get_ref().is_http()) {
            return Err(self.error(
                raw.protocol.as_ref().map_or(whole.clone(), Spanned::span),
                format!(
                    "the git channel speaks HTTP: audience `{}` of `{capability}` needs `protocol = \"https\"`",
                    raw.host.get_ref()
                ),
            ));
        }
        let at_name = raw.variable.as_ref().map_or(raw.secret.span(), Spanned::span);
        let audience = Audience {
            protocol: raw.protocol.map(Spanned::into_inner),
            host: raw.host.into_inner(),
            path: raw.path,
            secret: raw.secret.into_inner(),
            username: raw.username,
            variable: raw.variable.map(Spanned::into_inner),
        };
        for &channel in channels {
            let Some(place) = audience.place(channel) else {
                return Err(self.error(
                    at_name,
                    format!(
                        "channel `{channel}` can derive no variable name from secret `{}` or its \
                         `variable`: add a `variable` of at most 120 characters",
                        audience.secret
                    ),
                ));
            };
            if let Some(variable) = place.variable() {
                let class = names::class(variable.as_str());
                if !matches!(class, NameClass::Free | NameClass::OnlyByLease)
                    && let Some(why) = names::why(class)
                {
                    return Err(self.error(
                        at_name,
                        format!("channel `{channel}` would deliver as `{variable}`, which {why}"),
                    ));
                }
            }
        }
        Ok(audience)
    }
}

fn twice<T: PartialEq>(items: &[T]) -> Option<&T> {
    items.iter().enumerate().find(|(i, item)| items[..*i].contains(item)).map(|(_, item)| item)
}
