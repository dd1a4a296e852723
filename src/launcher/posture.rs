//! What is enforced for one exec, by what, and what this host lacks. Pure.
//!
//! A protection is an effect. One that no mechanism gives is an error under `enforcement = "strict"`,
//! unless the profile waives it by name; nothing is weakened silently.
#![forbid(unsafe_code)]

use super::wire::{Refusal, RefusalKind};
use crate::model::report::{Effect, Posture, Status};
use crate::profile::{Enforcement, NetworkMode, Profile, Waiver};
use crate::sandbox::cgroup::Held;
use crate::sandbox::identity::Mode;
use crate::sandbox::landlock::Feature;

/// How the workspace got its owner's identity.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ownership {
    /// No workspace, or one that needs no mapping.
    Plain,
    Idmapped,
    /// The file system cannot be idmapped: the exec runs as the workspace's owner.
    AsOwner {
        why: String,
    },
}

/// Whose network namespace an exec enters, of those that are there before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Joins {
    Nothing,
    /// A container's, which is not the host's.
    ContainersOwn,
    /// A container's that has the host's.
    Hosts,
}

/// The facts of one exec.
pub struct Facts<'a> {
    pub mode: Mode,
    pub profile: &'a Profile,
    pub landlock_missing: &'a [Feature],
    pub landlock_abi: u32,
    /// Why there is no cgroup, or what it holds.
    pub cgroup: Result<Held, String>,
    pub ownership: Ownership,
    pub cpus: usize,
    /// Of the deliveries' memory, where there are any.
    pub never_swaps: Option<bool>,
    pub joins: Joins,
}

pub fn posture(facts: &Facts<'_>) -> Result<Posture, Refusal> {
    let mut posture = Posture::default();
    let lacks = |feature: Feature| {
        let (abi, kernel) = feature.since();
        facts
            .landlock_missing
            .contains(&feature)
            .then(|| format!("landlock {} (ABI {abi}, Linux {kernel})", feature.as_str()))
    };
    let with = |base: &[&'static str], landlock: bool| {
        let mut by = base.to_vec();
        if landlock {
            by.push("landlock");
        }
        by
    };

    let missing: Vec<_> = [Feature::Filesystem, Feature::Truncate, Feature::Ioctl]
        .into_iter()
        .filter_map(lacks)
        .collect();
    let by = with(&["mount_namespace", "pivot_root"], facts.landlock_abi > 0);
    posture.set(Effect::Filesystem, &by, &missing, Status::Partial);

    let missing: Vec<_> = lacks(Feature::Scope).into_iter().collect();
    let scope = missing.is_empty();
    let by = with(&["pid_namespace", "own_proc"], scope);
    posture.set(Effect::HostProcesses, &by, &missing, Status::Partial);

    match facts.profile.network.mode {
        NetworkMode::None | NetworkMode::Audience => {
            posture.set(Effect::Network, &["network_namespace"], &[], Status::Full);
            let by = with(&["network_namespace"], scope);
            posture.set(Effect::AbstractSockets, &by, &missing, Status::Partial);
        }
        NetworkMode::Host => {
            let ports = &facts.profile.network;
            if ports.connect_ports.is_some() || ports.bind_ports.is_some() {
                let missing: Vec<_> = lacks(Feature::Network).into_iter().collect();
                let by = with(&[], missing.is_empty());
                posture.set(Effect::Network, &by, &missing, Status::None);
                demand(&posture, Effect::Network, facts.profile, Some(Waiver::Network))?;
            } else if facts.joins != Joins::Nothing {
                posture.set(Effect::Network, &["container_network_namespace"], &[], Status::Full);
            } else {
                posture.set(Effect::Network, &["profile_says_host"], &[], Status::Full);
            }
            // Abstract sockets are a network namespace's: of a container that has one, the host's are out of reach.
            let (by, lacking) = match facts.joins {
                Joins::ContainersOwn => (&["container_network_namespace"][..], Status::Partial),
                Joins::Hosts | Joins::Nothing => (&[][..], Status::None),
            };
            posture.set(Effect::AbstractSockets, &with(by, scope), &missing, lacking);
            demand(&posture, Effect::AbstractSockets, facts.profile, Some(Waiver::Scope))?;
        }
    }

    posture.set(Effect::Ipc, &["ipc_namespace"], &[], Status::Full);
    let by = ["empty_capability_sets", "no_new_privs", "user_namespace"];
    posture.set(Effect::Privileges, &by, &[], Status::Full);
    posture.set(Effect::SystemCalls, &["seccomp"], &[], Status::Full);
    posture.set(Effect::Keyrings, &["new_session_keyring", "seccomp"], &[], Status::Full);
    posture.set(Effect::CoreDumps, &["rlimit_core", "coredump_filter"], &[], Status::Full);

    let none = Vec::new();
    let (by, missing) = match (facts.mode, &facts.ownership) {
        (Mode::Rootless, _) => {
            let words = [
                "a uid of its own (needs root): other processes of this user on the host are trusted",
                "supplementary groups dropped (needs root)",
            ];
            (&[][..], words.map(str::to_owned).to_vec())
        }
        (Mode::Privileged, Ownership::AsOwner { why }) => {
            (&["user_namespace"][..], vec![why.clone()])
        }
        (Mode::Privileged, _) => (&["uid_pool", "user_namespace"][..], none.clone()),
    };
    posture.set(Effect::UserIdentity, by, &missing, Status::Partial);
    match &facts.ownership {
        Ownership::Plain => {
            posture.set(Effect::WorkspaceOwnership, &["same_owner"], &[], Status::Full)
        }
        Ownership::Idmapped => {
            posture.set(Effect::WorkspaceOwnership, &["idmapped_mount"], &[], Status::Full);
        }
        Ownership::AsOwner { why } => {
            posture.set(
                Effect::WorkspaceOwnership,
                &["owner_uid"],
                std::slice::from_ref(why),
                Status::Partial,
            );
        }
    }

    limits(&mut posture, facts)?;

    let by: &[&str] = if facts.cgroup.is_ok() {
        &["pid_namespace", "lifeline", "parent_death_signal", "cgroup_kill"]
    } else {
        &["pid_namespace", "lifeline", "parent_death_signal"]
    };
    posture.set(Effect::TreeDeath, by, &[], Status::Full);

    if let Some(never_swaps) = facts.never_swaps {
        let missing =
            if never_swaps { none } else { vec!["tmpfs noswap (Linux 6.4, privileged)".into()] };
        posture.set(Effect::DeliveryMemory, &["mlock", "dontdump"], &missing, Status::Partial);
    }
    Ok(posture)
}

fn limits(posture: &mut Posture, facts: &Facts<'_>) -> Result<(), Refusal> {
    let limits = &facts.profile.limits;
    let (held, why) = match &facts.cgroup {
        Ok(held) => (*held, "the cgroup hierarchy has no such controller".to_owned()),
        Err(why) => (Held::default(), why.clone()),
    };
    let lack = |controller: &str| vec![format!("cgroup v2 {controller} controller: {why}")];
    if limits.memory.is_some() {
        if held.memory {
            posture.set(Effect::MemoryLimit, &["cgroup_memory"], &[], Status::Full);
        } else {
            // Per process, and only private writable memory: setrlimit(2) RLIMIT_DATA.
            posture.set(Effect::MemoryLimit, &["rlimit_data"], &lack("memory"), Status::Partial);
        }
    }
    if limits.processes.is_some() {
        if held.processes {
            posture.set(Effect::ProcessLimit, &["cgroup_pids"], &[], Status::Full);
        } else {
            // The user namespace counts its own processes (Linux 5.14), so this holds for the tree.
            posture.set(Effect::ProcessLimit, &["rlimit_nproc"], &[], Status::Full);
        }
    }
    if let Some(cpu) = limits.cpu {
        if held.cpu {
            posture.set(Effect::CpuLimit, &["cgroup_cpu"], &[], Status::Full);
        } else if cpu.thousandths as usize >= facts.cpus * 1000 {
            posture.set(Effect::CpuLimit, &["host_has_no_more"], &[], Status::Full);
        } else {
            posture.set(Effect::CpuLimit, &[], &lack("cpu"), Status::None);
            demand(posture, Effect::CpuLimit, facts.profile, None)?;
        }
    }
    Ok(())
}

/// An error if strict and no mechanism gives the effect.
fn demand(
    posture: &Posture,
    effect: Effect,
    profile: &Profile,
    waiver: Option<Waiver>,
) -> Result<(), Refusal> {
    let waived = waiver.is_some_and(|w| profile.landlock.waive.contains(&w));
    let given = posture.0.get(&effect).is_some_and(|e| e.status != Status::None);
    if given || waived || profile.landlock.enforcement == Enforcement::BestEffort {
        return Ok(());
    }
    let missing = posture.0.get(&effect).map(|e| e.missing.join(", ")).unwrap_or_default();
    let hint = match waiver {
        Some(waiver) => format!(
            "use a newer kernel, or `network.mode = \"none\"`, or accept the lack in the profile: \
             `[landlock] waive = [\"{}\"]`",
            waiver.as_str()
        ),
        None => {
            "delegate the controller to sublet, or set `limits.cpu = \"none\"` in the profile, or \
                 accept the lack: `[landlock] enforcement = \"best-effort\"`"
                .to_owned()
        }
    };
    Err(Refusal {
        kind: RefusalKind::ProtectionUnavailable,
        message: format!(
            "profile `{}` asks for the protection `{}`, and nothing on this host gives it: {missing}",
            profile.name,
            effect.as_str()
        ),
        hint,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profile(extra: &str) -> Profile {
        let text = format!("extends = \"default\"\n{extra}");
        crate::profile::resolve("t", &text, &mut crate::profile::load_builtin).unwrap()
    }

    fn facts<'a>(profile: &'a Profile, missing: &'a [Feature], cpus: usize) -> Facts<'a> {
        Facts {
            mode: Mode::Privileged,
            profile,
            landlock_missing: missing,
            landlock_abi: if missing.is_empty() { 7 } else { 2 },
            cgroup: Ok(Held::default()),
            ownership: Ownership::Idmapped,
            cpus,
            never_swaps: None,
            joins: Joins::Nothing,
        }
    }

    #[test]
    fn what_another_mechanism_gives_is_no_error() {
        let profile = profile("");
        let missing = [Feature::Scope];
        let posture = posture(&facts(&profile, &missing, 1024)).unwrap();
        let sockets = &posture.0[&Effect::AbstractSockets];
        assert_eq!(
            (sockets.status, &sockets.by[..]),
            (Status::Partial, &["network_namespace".to_owned()][..])
        );
    }

    #[test]
    fn what_nothing_gives_is_an_error_that_names_effect_lack_and_waiver() {
        let host = profile("network.mode = \"host\"");
        let missing = [Feature::Scope];
        let refusal = posture(&facts(&host, &missing, 1024)).unwrap_err();
        assert_eq!(refusal.kind, RefusalKind::ProtectionUnavailable);
        assert!(refusal.message.contains("abstract_sockets") && refusal.message.contains("6.12"));
        assert!(refusal.hint.contains("waive = [\"scope\"]"));

        let waived = profile("network.mode = \"host\"\nlandlock.waive = [\"scope\"]");
        assert!(posture(&facts(&waived, &missing, 1024)).is_ok());
        // A container's own namespace is another than the host's; one that it shares with the host is not.
        let joined = |joins| posture(&Facts { joins, ..facts(&host, &missing, 1024) });
        assert!(joined(Joins::Hosts).is_err());
        let sockets = &joined(Joins::ContainersOwn).unwrap().0[&Effect::AbstractSockets];
        assert_eq!(sockets.status, Status::Partial);
        assert!(posture(&facts(&host, &[], 1024)).is_ok());
    }

    #[test]
    fn a_cpu_limit_without_its_controller_is_refused_where_it_would_matter() {
        let limited = profile("limits.cpu = 1.0");
        assert!(posture(&facts(&limited, &[], 1)).is_ok());
        let refusal = posture(&facts(&limited, &[], 2)).unwrap_err();
        assert!(refusal.message.contains("cpu_limit"), "{}", refusal.message);
    }
}
