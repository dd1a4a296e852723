//! The host's configuration, `sublet.toml`: state, ceilings, leases, principals, secrets. It binds every
//! run, whatever profile is named. A text goes in, a [`HostConfig`] that cannot be wrong comes out;
//! nothing is read or looked up here. Also the room of [`place`], where TOML errors get line and column.
//!
//! - [`allow`]: which capability and audience may draw on a secret
//! - [`source`]: where a value comes from, one file a kind
//! - [`place`]: line, column and excerpt of an error
#![forbid(unsafe_code)]

pub mod allow;
mod parse;
pub mod place;
pub mod source;

pub use allow::{AllowPattern, InvalidAllow};
pub use place::Located;
pub use source::{Jwt, MintKind, Minted, SOURCE_TIMEOUT, SecretSource, Settings, SshCa};

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::str::FromStr;

use serde::Deserialize;

use crate::model::moment::Span;
use crate::model::name::{AudienceName, CapabilityName, IdentityName, Permission, SecretName};

/// What `sublet init` writes. All of it is commented out, so that it says the defaults.
pub const STARTER: &str = include_str!("starter.toml");

/// `sublet.toml`, with defaults for what it does not say.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HostConfig {
    /// The file that it came from; nothing without one.
    pub origin: Option<String>,
    pub state: State,
    pub host: Host,
    pub ceilings: Ceilings,
    pub leases: Leases,
    pub issuer: Issuer,
    /// Without an entry a principal holds no permission.
    pub principals: BTreeMap<IdentityName, Vec<Permission>>,
    pub secrets: BTreeMap<SecretName, SecretEntry>,
    pub hook: HookConfig,
}

/// `[hook]`: what the annotations of containers may ask for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HookConfig {
    /// Profiles that they may name; any that this host permits, without a list.
    pub profiles: Option<Vec<String>>,
    /// Principals that they may name; any, without a list.
    pub principals: Option<Vec<String>>,
    /// The binary that containers get; the hook's own, if it is not named.
    pub binary: Option<PathBuf>,
    /// Containers are given their profile's identity tokens as files, for as long as they live. Off unless it
    /// is said: every process of the container's user can then take them.
    pub project_token: bool,
}

impl HostConfig {
    /// # Errors
    /// The first thing that is wrong with `text`, at its line and column. `origin` names the text.
    pub fn parse(text: &str, origin: &str) -> Result<Self, Box<Located>> {
        parse::parse(text, origin)
    }

    /// What `principal` holds: for `Run::permissions`.
    pub fn permissions_of(&self, principal: &IdentityName) -> &[Permission] {
        self.principals.get(principal).map_or(&[], Vec::as_slice)
    }

    /// How hints call the file.
    pub fn called(&self) -> &str {
        self.origin.as_deref().unwrap_or("sublet.toml")
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct State {
    /// Absolute. Nothing: `/var/lib/sublet`, or for a user `$XDG_STATE_HOME/sublet`.
    pub dir: Option<PathBuf>,
}

#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Host {
    /// Absolute; where `serve` may take workspaces from.
    pub workspaces: Vec<PathBuf>,
    /// The broker's user, by name or number; never root. Nothing: the pool's last uid.
    pub user: Option<String>,
    pub uid_pool: UidPool,
    /// Absolute; where the sockets are. Nothing: `/run/sublet`, for a user `$XDG_RUNTIME_DIR/sublet`.
    pub runtime_dir: Option<PathBuf>,
    /// How many sandboxes `serve` keeps standing ahead of their commands, for runs that executed lately.
    pub warm: Warm,
    /// Walls of the broker that this host may lack.
    pub waive: Vec<BrokerWall>,
}

/// How many sandboxes are kept ahead; each is a process that waits, with a uid of the pool and a cgroup.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(try_from = "u32")]
pub struct Warm(pub usize);

impl Warm {
    const MOST: u32 = 256;
}

impl TryFrom<u32> for Warm {
    type Error = String;

    fn try_from(count: u32) -> Result<Self, String> {
        if count > Self::MOST {
            return Err(format!("at most {} sandboxes are kept warm", Self::MOST));
        }
        Ok(Self(count as usize))
    }
}

/// A wall around the broker that an old kernel lacks, and that the host's owner may do without.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BrokerWall {
    /// Files, TCP, signals and abstract sockets: Landlock, Linux 5.13.
    Landlock,
}

/// Host uids of sublet's own, written `first:count`: the last is the broker's, all others are for execs.
/// Never holds 0, 65534 (nobody) or 4294967295.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct UidPool {
    pub first: u32,
    pub count: NonZeroU32,
}

impl UidPool {
    /// The broker's, where the configuration names no user. No exec ever has it.
    pub fn broker_uid(self) -> u32 {
        self.first + self.exec_uids()
    }

    /// How many uids there are for execs, from the first on.
    pub fn exec_uids(self) -> u32 {
        self.count.get() - 1
    }

    pub fn contains(self, uid: u32) -> bool {
        uid >= self.first && uid - self.first < self.count.get()
    }
}

impl Default for UidPool {
    /// 1879048192 (0x7000_0000) and 65536 from there: above what distributions hand out and what
    /// systemd-nspawn and podman allocate from.
    fn default() -> Self {
        Self { first: 0x7000_0000, count: NonZeroU32::new(65_536).unwrap_or(NonZeroU32::MIN) }
    }
}

/// The text is no pool of uids.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is no uid pool: {why}")]
pub struct InvalidPool {
    text: String,
    why: &'static str,
}

impl FromStr for UidPool {
    type Err = InvalidPool;
    fn from_str(text: &str) -> Result<Self, InvalidPool> {
        let invalid = |why| InvalidPool { text: text.chars().take(40).collect(), why };
        let number =
            |t: &str| t.parse::<u32>().ok().filter(|_| t.bytes().all(|b| b.is_ascii_digit()));
        let (first, count) = text
            .split_once(':')
            .and_then(|(first, count)| Some((number(first)?, NonZeroU32::new(number(count)?)?)))
            .ok_or_else(|| invalid("expected `first:count`, as `1879048192:65536`"))?;
        if count.get() < 2 {
            return Err(invalid("it must hold two at least: the last one is the broker's"));
        }
        if first < 1000 {
            return Err(invalid("uids below 1000 belong to the system"));
        }
        // 2^32-1 is "no uid" to the kernel: chown(2).
        if first.checked_add(count.get()).is_none() {
            return Err(invalid("it must end below 4294967295"));
        }
        let pool = Self { first, count };
        if pool.contains(65_534) {
            return Err(invalid("it holds 65534, which is `nobody` and the kernel's overflow uid"));
        }
        Ok(pool)
    }
}

impl TryFrom<String> for UidPool {
    type Error = InvalidPool;
    fn try_from(text: String) -> Result<Self, InvalidPool> {
        text.parse()
    }
}

/// Per run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ceilings {
    pub requests_per_minute: NonZeroU32,
    pub requests_per_run: NonZeroU32,
}

impl Default for Ceilings {
    fn default() -> Self {
        let number = |n| NonZeroU32::new(n).unwrap_or(NonZeroU32::MIN);
        Self { requests_per_minute: number(20), requests_per_run: number(500) }
    }
}

/// `default_ttl` is never above `max_ttl`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Leases {
    pub default_ttl: Span,
    pub max_ttl: Span,
    pub auto_renew: bool,
    pub renew_before_expiry: Span,
}

impl Default for Leases {
    fn default() -> Self {
        Self {
            default_ttl: Span::seconds(300),
            max_ttl: Span::seconds(3600),
            auto_renew: true,
            renew_before_expiry: Span::seconds(60),
        }
    }
}

/// `[issuer]`: what the tokens of this host's issuer are like. Whether there is one, the state says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Issuer {
    /// The audience of a token where neither profile nor source says another.
    pub audience: String,
    /// How long a token lives; never longer than its lease.
    pub token_ttl: Span,
    /// Which capabilities and audiences may have a token without a secret's entry. Empty: none.
    pub allow: Vec<AllowPattern>,
    /// Where the documents are published on this host, if they are. Absolute.
    pub publish: Option<PathBuf>,
}

impl Issuer {
    /// Below it no relying party is asked in time; above it, keys would have to stay published for longer.
    pub const TOKEN_TTL: std::ops::RangeInclusive<Span> = Span::seconds(10)..=Span::seconds(3600);

    pub fn allows(&self, capability: &CapabilityName, audience: &AudienceName) -> bool {
        self.allow.iter().any(|pattern| pattern.matches(capability, audience))
    }
}

impl Default for Issuer {
    fn default() -> Self {
        Self {
            audience: "api://AzureADTokenExchange".to_owned(),
            token_ttl: Span::seconds(900),
            allow: Vec::new(),
            publish: None,
        }
    }
}

/// One `[secrets.NAME]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SecretEntry {
    pub source: SecretSource,
    /// Empty only for what other secrets alone draw on.
    pub allow: Vec<AllowPattern>,
}

impl SecretEntry {
    pub fn allows(&self, capability: &CapabilityName, audience: &AudienceName) -> bool {
        self.allow.iter().any(|pattern| pattern.matches(capability, audience))
    }
}

#[cfg(test)]
mod tests;
