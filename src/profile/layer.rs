//! One profile text as written: what is there, nothing resolved. A text goes in, a [`Layer`] or an
//! error with its place comes out. All that one text can be wrong about alone is refused here.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fmt;
use std::num::NonZeroU32;
use std::ops::Range;
use std::str::FromStr;
use std::sync::Arc;

use toml::Spanned;

use crate::config::place::{self, Located};
use crate::model::name::{CapabilityName, Channel, VariableName};
use crate::profile::capability::{Audience, Capability, Format, ISSUER};
use crate::profile::command::CommandPattern;
use crate::profile::kinds::NetworkMode;
use crate::profile::names::{self, NameClass};
use crate::profile::path::{BindEntry, HostPath};
use crate::profile::raw::{
    Items, RawAudience, RawCapability, RawFilesystem, RawLandlock, RawLimits, RawNetwork,
    RawProfile, RawSeccomp, Words,
};

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
        let secret = match (raw.secret, channels) {
            (Some(secret), _) => secret,
            // It draws on the issuer alone.
            (None, [Channel::Token]) => match ISSUER.parse() {
                Ok(issuer) => Spanned::new(whole.clone(), issuer),
                Err(e) => return Err(self.error(whole, format!("{e}"))),
            },
            (None, _) => {
                return Err(self.error(
                    whole,
                    format!(
                        "audience `{}` of `{capability}` has no `secret`: name the `[secrets.NAME]` of the \
                         configuration that it draws on (`token` alone needs none)",
                        raw.host.get_ref()
                    ),
                ));
            }
        };
        let identity = match raw.identity {
            None => None,
            Some(identity) if !channels.contains(&Channel::Token) => {
                let message =
                    "`identity` is for the channel `token`, which this capability has not";
                return Err(self.error(identity.span(), message));
            }
            Some(identity) => Some(
                identity.into_inner().into_identity().map_err(|(at, why)| self.error(at, why))?,
            ),
        };
        let at_name = raw.variable.as_ref().map_or(secret.span(), Spanned::span);
        let audience = Audience {
            protocol: raw.protocol.map(Spanned::into_inner),
            host: raw.host.into_inner(),
            path: raw.path,
            secret: secret.into_inner(),
            username: raw.username,
            variable: raw.variable.map(Spanned::into_inner),
            identity,
            format: raw.format,
        };
        let is_endpoint = audience.format == Some(Format::AwsEndpoint);
        if is_endpoint && channels != [Channel::File] {
            return Err(self.error(
                at_name,
                "`format = \"aws-endpoint\"` is for the channel `file` alone: its file is what the address \
                 is asked with",
            ));
        }
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
            if let Some(variable) = place.variable().filter(|_| !is_endpoint) {
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
