//! The landlock ruleset of one exec, made in the launcher with the `landlock` crate. landlock(7).
//!
//! What the kernel's ABI lacks is named in [`Built::missing`]; whether that is an error is decided by
//! the profile (`enforcement`, `waive`) and by whether another mechanism gives the effect.
#![forbid(unsafe_code)]

use std::os::fd::OwnedFd;

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, NetPort, Ruleset,
    RulesetAttr, RulesetCreatedAttr, RulesetError, Scope,
};
use rustix::io::Errno;

use super::root::{Place, PlaceKind};
use crate::sys;

/// What landlock can do that is asked for by name: in profiles (`waive`) and in reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Feature {
    /// Any landlock at all, and files: ABI 1, Linux 5.13.
    Filesystem,
    /// Truncation: ABI 3, Linux 6.2.
    Truncate,
    /// TCP bind and connect: ABI 4, Linux 6.7.
    Network,
    /// ioctl on devices: ABI 5, Linux 6.10.
    Ioctl,
    /// Abstract Unix sockets and signals: ABI 6, Linux 6.12.
    Scope,
}

impl Feature {
    pub const ALL: [Feature; 5] =
        [Feature::Filesystem, Feature::Truncate, Feature::Network, Feature::Ioctl, Feature::Scope];

    pub fn as_str(self) -> &'static str {
        match self {
            Feature::Filesystem => "filesystem",
            Feature::Truncate => "truncate",
            Feature::Network => "network",
            Feature::Ioctl => "ioctl",
            Feature::Scope => "scope",
        }
    }

    /// The ABI that brought it, and its kernel.
    pub fn since(self) -> (u32, &'static str) {
        match self {
            Feature::Filesystem => (1, "5.13"),
            Feature::Truncate => (3, "6.2"),
            Feature::Network => (4, "6.7"),
            Feature::Ioctl => (5, "6.10"),
            Feature::Scope => (6, "6.12"),
        }
    }
}

/// TCP ports where the network is the host's. `None`: any.
#[derive(Debug, Clone, Default)]
pub struct TcpPorts {
    pub connect: Option<Vec<u16>>,
    pub bind: Option<Vec<u16>>,
}

/// A ruleset ready for the child, if the kernel has landlock.
pub struct Built {
    pub ruleset: Option<OwnedFd>,
    /// Features that this kernel lacks.
    pub missing: Vec<Feature>,
    /// Rights for places that exist only inside, to be added there.
    pub inner: InnerRights,
}

/// Right bits for `/proc` and `/dev/pts`. linux/landlock.h.
#[derive(Debug, Clone, Copy, Default)]
pub struct InnerRights {
    pub proc: u64,
    pub pts: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum LandlockError {
    #[error("could not make the landlock ruleset")]
    Ruleset(#[from] RulesetError),
    #[error("could not add a landlock rule for a place of kind {kind:?}")]
    Rule { kind: PlaceKind, source: Errno },
}

/// What this kernel lacks.
pub fn missing(abi: u32) -> Vec<Feature> {
    Feature::ALL.into_iter().filter(|f| abi < f.since().0).collect()
}

/// The rights that [`build`] will name for inner places, known before the ruleset is.
pub fn inner_rights(abi: u32) -> InnerRights {
    let rights = Rights::of(crate_abi(abi));
    InnerRights { proc: (rights.read | rights.write_file).bits(), pts: rights.device_tree.bits() }
}

/// Makes the ruleset: what `places` allow, TCP as `ports` say where the network is the host's.
pub fn build(abi: u32, places: &[Place], ports: Option<&TcpPorts>) -> Result<Built, LandlockError> {
    let missing = missing(abi);
    let inner = inner_rights(abi);
    if abi == 0 {
        return Ok(Built { ruleset: None, missing, inner });
    }
    let abi = crate_abi(abi);
    let rights = Rights::of(abi);

    let mut ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(rights.all)?;
    if !missing.contains(&Feature::Scope) {
        ruleset = ruleset.scope(Scope::from_all(abi))?;
    }
    if let (Some(ports), false) = (ports, missing.contains(&Feature::Network)) {
        if ports.connect.is_some() {
            ruleset = ruleset.handle_access(AccessNet::ConnectTcp)?;
        }
        if ports.bind.is_some() {
            ruleset = ruleset.handle_access(AccessNet::BindTcp)?;
        }
    }

    let mut created = ruleset.create()?;
    if let (Some(ports), false) = (ports, missing.contains(&Feature::Network)) {
        for &port in ports.connect.iter().flatten() {
            created = created.add_rule(NetPort::new(port, AccessNet::ConnectTcp))?;
        }
        for &port in ports.bind.iter().flatten() {
            created = created.add_rule(NetPort::new(port, AccessNet::BindTcp))?;
        }
    }
    let ruleset: Option<OwnedFd> = created.into();
    // Not by the crate, which asks of each descriptor what it is: its kind says so.
    if let Some(ruleset) = &ruleset {
        for Place { fd, kind } in places {
            sys::landlock::allow_beneath(ruleset, fd, rights.at(*kind).bits())
                .map_err(|source| LandlockError::Rule { kind: *kind, source })?;
        }
    }
    Ok(Built { ruleset, missing, inner })
}

/// The rights of one ABI, by what a place is for.
struct Rights {
    all: BitFlags<AccessFs>,
    read: BitFlags<AccessFs>,
    write_file: BitFlags<AccessFs>,
    tree: BitFlags<AccessFs>,
    file: BitFlags<AccessFs>,
    device_tree: BitFlags<AccessFs>,
}

impl Rights {
    fn of(abi: ABI) -> Self {
        let all = AccessFs::from_all(abi);
        let devices = AccessFs::MakeChar | AccessFs::MakeBlock | AccessFs::IoctlDev;
        let read = AccessFs::ReadFile | AccessFs::ReadDir;
        let write_file = BitFlags::from(AccessFs::WriteFile);
        let ioctl = BitFlags::from(AccessFs::IoctlDev) & all;
        Self {
            all,
            read,
            write_file,
            tree: all & !devices,
            file: AccessFs::from_file(abi) & !devices,
            device_tree: read | write_file | ioctl,
        }
    }

    fn at(&self, kind: PlaceKind) -> BitFlags<AccessFs> {
        match kind {
            PlaceKind::TopDirectory => AccessFs::ReadDir.into(),
            PlaceKind::Synthesised => self.read,
            PlaceKind::ReadOnlyTree => self.read | AccessFs::Execute,
            PlaceKind::ReadOnlyFile => AccessFs::ReadFile | AccessFs::Execute,
            PlaceKind::WritableTree => self.tree,
            PlaceKind::WritableFile => self.file,
            PlaceKind::DeviceDirectory => self.device_tree,
        }
    }
}

/// The newest ABI that both this kernel and our rules know.
pub fn crate_abi(abi: u32) -> ABI {
    match abi {
        0 | 1 => ABI::V1,
        2 => ABI::V2,
        3 => ABI::V3,
        4 => ABI::V4,
        5 => ABI::V5,
        _ => ABI::V6,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_old_kernel_lacks_what_came_later() {
        assert_eq!(missing(6), []);
        assert_eq!(
            missing(2),
            [Feature::Truncate, Feature::Network, Feature::Ioctl, Feature::Scope]
        );
        assert_eq!(missing(0).len(), 5);
    }
}
