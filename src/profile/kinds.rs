//! The parts of a profile, as everyone downstream reads them. Made by the parser alone.
//!
//! `Serialize` gives back a profile's TOML or JSON with `extends` resolved, for `sublet profile show`.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::model::moment::{Size, Span};
use crate::model::name::{CapabilityName, Channel, VariableName};
use crate::profile::capability::{Audience, Capability};
use crate::profile::path::{BindEntry, HostPath};

/// What a sandbox may do, with every `extends` resolved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Profile {
    /// The name that it was asked for by, or the path of its file. Not part of the TOML.
    #[serde(skip)]
    pub name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    pub filesystem: Filesystem,
    pub network: Network,
    pub seccomp: Seccomp,
    pub landlock: Landlock,
    pub limits: Limits,
    pub environment: Environment,
    /// In the order of declaration, the extended profile's first. Shared with the grants made from it.
    #[serde(rename = "capability", serialize_with = "plain")]
    pub capabilities: Vec<Arc<Capability>>,
}

fn plain<S: Serializer>(capabilities: &[Arc<Capability>], s: S) -> Result<S::Ok, S::Error> {
    s.collect_seq(capabilities.iter().map(|c| &**c))
}

/// The network asked for is wider than the profile's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "network mode `{asked}` is wider than the profile's: `{profile}` has `{has}`, which can only be narrowed"
)]
pub struct WouldWiden {
    pub profile: String,
    pub has: NetworkMode,
    pub asked: NetworkMode,
}

impl Profile {
    pub fn capability(&self, name: &CapabilityName) -> Option<&Arc<Capability>> {
        self.capabilities.iter().find(|c| c.name == *name)
    }

    /// The identities that a container itself may have: of capabilities that are pinned to no command, since
    /// a container is none.
    pub fn projected(&self) -> impl Iterator<Item = (&Arc<Capability>, &Audience)> {
        let open = self.capabilities.iter();
        let open = open.filter(|c| c.channels.contains(&Channel::Token) && c.is_any_command());
        open.flat_map(|capability| capability.audiences.iter().map(move |a| (capability, a)))
    }

    /// `--network MODE`.
    ///
    /// # Errors
    /// If `mode` gives more than the profile does.
    pub fn narrow_network(&mut self, mode: NetworkMode) -> Result<(), WouldWiden> {
        if mode > self.network.mode {
            return Err(WouldWiden {
                profile: self.name.clone(),
                has: self.network.mode,
                asked: mode,
            });
        }
        self.network.mode = mode;
        Ok(())
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Filesystem {
    /// Seen at the same path, read-only. Together with `read_write` no path twice.
    pub read_only: Vec<BindEntry>,
    /// Seen at the same path, writable. Rare: what is written here outlives the exec.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub read_write: Vec<BindEntry>,
    pub workspace: WorkspaceAccess,
    /// The size of the exec's own tmpfs, which holds `/tmp` and the home.
    pub tmp: Size,
    /// `HOME` inside: an empty writable directory on the exec's own tmpfs. Under `/tmp` it costs no
    /// mount. `~` is the invoker's home path, empty but for the entries below it.
    pub home: HostPath,
    /// An image instead of the host's directories.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub root: Option<HostPath>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WorkspaceAccess {
    Rw,
    Ro,
    None,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Network {
    pub mode: NetworkMode,
    /// TCP ports that may be connected to. Nothing: any. Landlock holds it, only where the network is
    /// the host's; UDP is not covered.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connect_ports: Option<Vec<u16>>,
    /// TCP ports that may be bound, 0 being one of the kernel's choice. Nothing: any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bind_ports: Option<Vec<u16>>,
}

/// From narrow to wide, as `Ord` compares.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NetworkMode {
    /// A loopback of its own.
    None,
    /// Only the leases' audiences, through sublet's proxy.
    Audience,
    /// The host's, cloud metadata addresses included.
    Host,
}

impl NetworkMode {
    pub fn as_str(self) -> &'static str {
        match self {
            NetworkMode::None => "none",
            NetworkMode::Audience => "audience",
            NetworkMode::Host => "host",
        }
    }
}

impl fmt::Display for NetworkMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Seccomp {
    pub filter: SeccompFilter,
}

/// The filters in `seccomp/`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SeccompFilter {
    /// As default, and what debuggers and sanitizers need.
    Build,
    Default,
    Strict,
}

impl SeccompFilter {
    /// The file's name in `seccomp/`, without `.json`.
    pub fn as_str(self) -> &'static str {
        match self {
            SeccompFilter::Build => "build",
            SeccompFilter::Default => "default",
            SeccompFilter::Strict => "strict",
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Landlock {
    pub enforcement: Enforcement,
    /// What may be missing under `strict` without an error.
    #[serde(skip_serializing_if = "BTreeSet::is_empty")]
    pub waive: BTreeSet<Waiver>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Enforcement {
    /// What this kernel cannot enforce is an error, unless waived by name.
    Strict,
    /// What this kernel cannot enforce is reported.
    BestEffort,
}

/// What landlock can be excused from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Waiver {
    Filesystem,
    Network,
    Scope,
    Truncate,
    Ioctl,
}

impl Waiver {
    pub const ALL: [Waiver; 5] =
        [Waiver::Filesystem, Waiver::Network, Waiver::Scope, Waiver::Truncate, Waiver::Ioctl];

    pub fn as_str(self) -> &'static str {
        match self {
            Waiver::Filesystem => "filesystem",
            Waiver::Network => "network",
            Waiver::Scope => "scope",
            Waiver::Truncate => "truncate",
            Waiver::Ioctl => "ioctl",
        }
    }
}

/// Nothing: no limit of sublet's.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Limits {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<Size>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub processes: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu: Option<CpuQuota>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub open_files: Option<u32>,
    /// The largest file that may be written: `RLIMIT_FSIZE`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file_size: Option<Size>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout: Option<Span>,
}

/// Processors' worth of time: `1.5`. Kept in thousandths; at least 0.01, where the kernel's quota ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuQuota {
    pub thousandths: u32,
}

impl CpuQuota {
    /// Microseconds of processor time in each `period` microseconds, as `cpu.max` wants it.
    pub fn quota_in(self, period: u64) -> u64 {
        period * u64::from(self.thousandths) / 1000
    }
}

impl<'de> Deserialize<'de> for CpuQuota {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let processors = f64::deserialize(d)?;
        if (0.01..=4096.0).contains(&processors) {
            // In range, so that the cast cannot saturate.
            Ok(Self { thousandths: (processors * 1000.0).round() as u32 })
        } else {
            Err(serde::de::Error::custom(format!(
                "`{processors}` processors: expected a number from 0.01 to 4096"
            )))
        }
    }
}

impl Serialize for CpuQuota {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_f64(f64::from(self.thousandths) / 1000.0)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Environment {
    /// Passed on from the invoker where it has them.
    pub pass: Vec<VariableName>,
    /// `PATH` inside. Never empty.
    pub path: Vec<HostPath>,
    pub set: BTreeMap<VariableName, String>,
}
