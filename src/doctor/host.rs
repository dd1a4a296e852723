//! Cgroups, capabilities, ptrace: what the host's other processes may do to an exec, and what may limit it.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};

use caps::{CapSet, Capability};
use procfs::process::Process;
use rustix::fs::Access;

use super::{Check, setting};

/// What the privileged mode takes: a host user of its own for each exec, idmapped workspaces.
const PRIVILEGED: [Capability; 5] = [
    Capability::CAP_SYS_ADMIN,
    Capability::CAP_SETUID,
    Capability::CAP_SETGID,
    Capability::CAP_CHOWN,
    Capability::CAP_DAC_OVERRIDE,
];

pub fn examine(is_privileged: bool) -> Vec<Check> {
    vec![
        cgroups(&Cgroups::of_this_process()),
        ptrace(is_privileged, setting("/proc/sys/kernel/yama/ptrace_scope").as_deref()),
    ]
}

/// Who this process is and what it may do.
#[derive(Debug, Clone)]
pub struct Privileges {
    is_root: bool,
    /// In a user namespace capabilities hold over what belongs to it, and not over the host's ids.
    is_nested: bool,
    missing: Vec<Capability>,
}

impl Privileges {
    pub fn of_this_process() -> Self {
        // What cannot be read is not there to be used.
        let held = caps::read(None, CapSet::Effective).unwrap_or_default();
        Self {
            is_root: rustix::process::geteuid().is_root(),
            is_nested: !maps_every_id(&setting("/proc/self/uid_map").unwrap_or_default()),
            missing: PRIVILEGED.into_iter().filter(|cap| !held.contains(cap)).collect(),
        }
    }

    pub fn can_administer(&self) -> bool {
        self.missing.is_empty() && !self.is_nested
    }
}

/// The initial user namespace maps every id to itself. user_namespaces(7).
fn maps_every_id(uid_map: &str) -> bool {
    uid_map.split_ascii_whitespace().eq(["0", "0", "4294967295"])
}

pub fn capabilities(privileges: &Privileges) -> Check {
    const NAME: &str = "capabilities";
    let missing: Vec<String> = privileges.missing.iter().map(ToString::to_string).collect();
    match (privileges.is_root, privileges.can_administer()) {
        (_, true) => Check::ok(
            NAME,
            "all that the privileged mode takes",
            "every exec can have a host user of its own, and other users' processes cannot reach it",
        ),
        (false, false) => Check::ok(
            NAME,
            "an ordinary user",
            "rootless: execs run as this user, and this user's other processes on the host are trusted",
        ),
        (true, false) if missing.is_empty() => Check::warn(
            NAME,
            "the superuser of a user namespace",
            "as in a rootless container: execs run rootless, as this user",
            "start sublet on the host, or in a container without a user namespace",
        ),
        (true, false) => Check::warn(
            NAME,
            format!("the superuser without {}", missing.join(", ")),
            "as in a container: execs run rootless, as this user",
            "grant the container these capabilities, or start sublet on the host",
        ),
    }
}

/// The unified hierarchy as this process sees it.
#[derive(Debug, Clone, Default)]
struct Cgroups {
    mount: Option<PathBuf>,
    controllers: Vec<String>,
    /// This process's own cgroup, and whether cgroups may be made in it.
    own: Option<PathBuf>,
    is_ours: bool,
}

impl Cgroups {
    fn of_this_process() -> Self {
        let Ok(me) = Process::myself() else { return Self::default() };
        let mounts = me.mountinfo().map(|m| m.into_iter().collect::<Vec<_>>()).unwrap_or_default();
        let Some(mount) = mounts.into_iter().find(|m| m.fs_type == "cgroup2") else {
            return Self::default();
        };
        let unified = me.cgroups().ok().and_then(|all| {
            all.into_iter().find(|group| group.hierarchy == 0).map(|group| group.pathname)
        });
        let own = unified.map(|path| match path.trim_start_matches('/') {
            "" => mount.mount_point.clone(),
            below => mount.mount_point.join(below),
        });
        let list = own.as_deref().unwrap_or(&mount.mount_point).join("cgroup.controllers");
        Self {
            controllers: list
                .to_str()
                .and_then(setting)
                .map(|text| text.split_ascii_whitespace().map(str::to_owned).collect())
                .unwrap_or_default(),
            is_ours: own.as_deref().is_some_and(may_make_groups_in),
            mount: Some(mount.mount_point),
            own,
        }
    }
}

fn may_make_groups_in(group: &Path) -> bool {
    let may_write = |path: &Path| rustix::fs::access(path, Access::WRITE_OK).is_ok();
    may_write(group) && may_write(&group.join("cgroup.procs"))
}

fn cgroups(seen: &Cgroups) -> Check {
    const NAME: &str = "cgroups";
    const INSTEAD: &str = "memory, processes and cpu are limited by rlimits, each process for itself; the \
                           pid namespace still takes the whole tree down";
    let Some(mount) = &seen.mount else {
        return Check::warn(
            NAME,
            "no cgroup v2 mounted",
            INSTEAD,
            "mount -t cgroup2 none /sys/fs/cgroup, or boot with systemd.unified_cgroup_hierarchy=1",
        );
    };
    let wanted = ["memory", "pids", "cpu"];
    let missing: Vec<&str> =
        wanted.into_iter().filter(|w| !seen.controllers.iter().any(|c| c == w)).collect();
    let have = match seen.controllers.as_slice() {
        [] => "no controllers".to_owned(),
        some => some.join(" "),
    };
    let found = format!("v2 at {} with {have}", mount.display());
    if !seen.is_ours {
        let own = seen.own.as_deref().map_or("unknown".into(), |own| own.display().to_string());
        return Check::warn(
            NAME,
            format!("{found}; not delegated to this user: {own}"),
            INSTEAD,
            "start under systemd-run --user --scope -p Delegate=yes, or as a service with Delegate=yes",
        );
    }
    if !missing.is_empty() {
        return Check::warn(
            NAME,
            format!("{found}; without {}", missing.join(", ")),
            "cgroup.kill works; limits of the missing controllers are set by rlimits, each process for \
             itself",
            "boot with systemd.unified_cgroup_hierarchy=1 (cgroup_no_v1=all), and let the parent cgroup \
             enable them in cgroup.subtree_control",
        );
    }
    Check::ok(NAME, found, "the whole tree of an exec can be limited and killed at once")
}

fn ptrace(is_privileged: bool, scope: Option<&str>) -> Check {
    const NAME: &str = "ptrace";
    match (scope, is_privileged) {
        (Some(scope @ ("1" | "2" | "3")), _) => Check::ok(
            NAME,
            format!("kernel.yama.ptrace_scope = {scope}"),
            "a process can be traced only by its parent or by root",
        ),
        (other, true) => Check::ok(
            NAME,
            format!(
                "kernel.yama.ptrace_scope {}",
                other.map_or("absent".into(), |s| format!("= {s}"))
            ),
            "an exec has a host user of its own, so that no other user's process may trace it",
        ),
        (other, false) => Check::warn(
            NAME,
            format!(
                "kernel.yama.ptrace_scope {}",
                other.map_or("absent".into(), |s| format!("= {s}"))
            ),
            "this user's other processes on the host may trace what runs as this user; execs cannot trace \
             one another",
            "sysctl -w kernel.yama.ptrace_scope=1 (a kernel with CONFIG_SECURITY_YAMA=y), or start sublet \
             as root",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Status;

    #[test]
    fn cgroups_need_a_mount_controllers_and_delegation() {
        #[track_caller]
        fn check(mount: bool, controllers: &str, is_ours: bool, status: Status, text: &str) {
            let found = cgroups(&Cgroups {
                mount: mount.then(|| "/sys/fs/cgroup".into()),
                controllers: controllers.split_whitespace().map(str::to_owned).collect(),
                own: Some("/sys/fs/cgroup/a".into()),
                is_ours,
            });
            assert_eq!(found.status, status, "{found:?}");
            assert!(format!("{found:?}").contains(text), "{found:?}");
        }
        check(true, "cpu memory pids io", true, Status::Ok, "io");
        check(false, "", false, Status::Warn, "no cgroup v2");
        check(true, "", true, Status::Warn, "without memory, pids, cpu");
        check(true, "memory pids", true, Status::Warn, "without cpu");
        check(true, "cpu memory pids", false, Status::Warn, "Delegate=yes");
    }

    #[test]
    fn the_superuser_in_a_container_is_told_what_it_lacks() {
        let some = vec![Capability::CAP_SYS_ADMIN];
        let of =
            |is_root, missing| capabilities(&Privileges { is_root, is_nested: false, missing });
        assert_eq!(of(true, vec![]).status, Status::Ok);
        assert_eq!(of(false, some.clone()).status, Status::Ok);
        let warned = of(true, some);
        assert_eq!(warned.status, Status::Warn);
        assert!(warned.found.contains("CAP_SYS_ADMIN"));
        let nested = Privileges { is_root: true, is_nested: true, missing: vec![] };
        assert!(!nested.can_administer());
        assert_eq!(capabilities(&nested).status, Status::Warn);
        assert!(maps_every_id("         0          0 4294967295"));
        assert!(!maps_every_id("0 1000 1") && !maps_every_id(""));
    }

    #[test]
    fn tracing_by_ones_own_user_matters_without_privileges() {
        assert_eq!(ptrace(true, Some("0")).status, Status::Ok);
        assert_eq!(ptrace(false, Some("1")).status, Status::Ok);
        assert_eq!(ptrace(false, Some("0")).status, Status::Warn);
        assert_eq!(ptrace(false, None).status, Status::Warn);
    }
}
