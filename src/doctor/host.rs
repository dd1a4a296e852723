//! Cgroups, capabilities, ptrace: what the host's other processes may do to an exec, and what may limit it.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};

use caps::{CapSet, Capability};
use procfs::process::Process;
use rustix::fs::Access;

use super::{Check, setting};
use crate::config::UidPool;
use crate::sandbox::identity::{Mode, PRIVILEGED};

pub fn examine(mode: Mode) -> Vec<Check> {
    vec![
        cgroups(&Cgroups::of_this_process(mode)),
        ptrace(mode, setting("/proc/sys/kernel/yama/ptrace_scope").as_deref()),
    ]
}

/// Who this process is and what it lacks for the privileged mode.
#[derive(Debug, Clone)]
pub struct Privileges {
    pub mode: Mode,
    /// No mode is possible, and nothing runs.
    pub is_refused: bool,
    pub is_root: bool,
    pub missing: Vec<Capability>,
}

impl Privileges {
    /// `pool` is the host's, which the privileged mode must be able to map.
    pub fn of_this_process(pool: UidPool) -> Self {
        // What cannot be read is not there to be used.
        let held = caps::read(None, CapSet::Effective).unwrap_or_default();
        let mode = Mode::detect(pool);
        Self {
            is_refused: mode.is_err(),
            mode: mode.unwrap_or(Mode::Rootless),
            is_root: rustix::process::geteuid().is_root(),
            missing: PRIVILEGED.into_iter().filter(|cap| !held.contains(cap)).collect(),
        }
    }
}

pub fn capabilities(privileges: &Privileges) -> Check {
    const NAME: &str = "capabilities";
    let missing: Vec<String> = privileges.missing.iter().map(ToString::to_string).collect();
    if privileges.is_refused {
        let found = match &missing[..] {
            [] => "the host's root, in a user namespace that does not know the uid pool".to_owned(),
            missing => format!("the host's root without {}", missing.join(", ")),
        };
        return Check::fail(
            NAME,
            found,
            "nothing is run: an exec could only have this uid, to which the kernel's settings belong",
            "give sublet these capabilities (and the pool of [host] uid_pool), or start it as an ordinary user",
        );
    }
    match (privileges.mode, privileges.is_root) {
        (Mode::Privileged, _) => Check::ok(
            NAME,
            "all that the privileged mode takes",
            "every exec can have a host user of its own, and other users' processes cannot reach it",
        ),
        (Mode::Rootless, false) => Check::ok(
            NAME,
            "an ordinary user",
            "rootless: execs run as this user, and this user's other processes on the host are trusted",
        ),
        (Mode::Rootless, true) if missing.is_empty() => Check::warn(
            NAME,
            "the superuser of a user namespace that does not know the uid pool",
            "as in a rootless container: execs run rootless, as this user",
            "start sublet on the host, or map [host] uid_pool into the container",
        ),
        (Mode::Rootless, true) => Check::warn(
            NAME,
            format!("the superuser of a user namespace, without {}", missing.join(", ")),
            "as in a rootless container: execs run rootless, as this user",
            "grant the container these capabilities, or start sublet on the host",
        ),
    }
}

/// The unified hierarchy as this process sees it.
#[derive(Debug, Clone, Default)]
struct Cgroups {
    mount: Option<PathBuf>,
    /// What can be limited where execs get their cgroups.
    controllers: Vec<String>,
    /// There: at the top for the superuser, else in this process's own cgroup.
    place: Option<PathBuf>,
    /// Cgroups may be made there.
    is_ours: bool,
}

impl Cgroups {
    fn of_this_process(mode: Mode) -> Self {
        let Ok(me) = Process::myself() else { return Self::default() };
        let mounts = me.mountinfo().map(|m| m.into_iter().collect::<Vec<_>>()).unwrap_or_default();
        let Some(mount) = mounts.into_iter().find(|m| m.fs_type == "cgroup2") else {
            return Self::default();
        };
        let own = me.cgroups().ok().and_then(|all| {
            all.into_iter().find(|group| group.hierarchy == 0).map(|group| group.pathname)
        });
        let below = match mode {
            Mode::Privileged => Some(String::new()),
            Mode::Rootless => own,
        };
        let place = below.map(|path| match path.trim_start_matches('/') {
            "" => mount.mount_point.clone(),
            below => mount.mount_point.join(below),
        });
        let list = place.as_deref().unwrap_or(&mount.mount_point).join("cgroup.controllers");
        Self {
            controllers: list
                .to_str()
                .and_then(setting)
                .map(|text| text.split_ascii_whitespace().map(str::to_owned).collect())
                .unwrap_or_default(),
            is_ours: place.as_deref().is_some_and(may_make_groups_in),
            mount: Some(mount.mount_point),
            place,
        }
    }
}

fn may_make_groups_in(group: &Path) -> bool {
    let may_write = |path: &Path| rustix::fs::access(path, Access::WRITE_OK).is_ok();
    may_write(group) && may_write(&group.join("cgroup.procs"))
}

fn cgroups(seen: &Cgroups) -> Check {
    const NAME: &str = "cgroups";
    const INSTEAD: &str = "limits.memory holds for each process alone (RLIMIT_DATA), limits.processes \
                           for the tree all the same; a strict profile whose limits.cpu is less than this \
                           host has is refused";
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
        let place = seen.place.as_deref().map_or("unknown".into(), |p| p.display().to_string());
        return Check::warn(
            NAME,
            format!("{found}; not delegated to this user: {place}"),
            INSTEAD,
            "start under systemd-run --user --scope -p Delegate=yes, or as a service with Delegate=yes",
        );
    }
    if !missing.is_empty() {
        return Check::warn(
            NAME,
            format!("{found}; without {}", missing.join(", ")),
            INSTEAD,
            "boot with systemd.unified_cgroup_hierarchy=1 (cgroup_no_v1=all), and let the parent cgroup \
             enable them in cgroup.subtree_control",
        );
    }
    Check::ok(NAME, found, "the whole tree of an exec can be limited and killed at once")
}

fn ptrace(mode: Mode, scope: Option<&str>) -> Check {
    const NAME: &str = "ptrace";
    match (scope, mode) {
        (Some(scope @ ("1" | "2" | "3")), _) => Check::ok(
            NAME,
            format!("kernel.yama.ptrace_scope = {scope}"),
            "a process can be traced only by its parent or by root",
        ),
        (other, Mode::Privileged) => Check::ok(
            NAME,
            format!(
                "kernel.yama.ptrace_scope {}",
                other.map_or("absent".into(), |s| format!("= {s}"))
            ),
            "an exec has a host user of its own, so that no other user's process may trace it",
        ),
        (other, Mode::Rootless) => Check::warn(
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
                place: Some("/sys/fs/cgroup/a".into()),
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
        let told = |is_refused, mode, is_root, missing: &[Capability]| {
            capabilities(&Privileges { mode, is_refused, is_root, missing: missing.to_vec() })
        };
        let of = |mode, is_root, missing: &[Capability]| told(false, mode, is_root, missing);
        assert_eq!(of(Mode::Privileged, true, &[]).status, Status::Ok);
        assert_eq!(of(Mode::Rootless, false, &some).status, Status::Ok);
        let container = of(Mode::Rootless, true, &some);
        assert_eq!(container.status, Status::Warn);
        assert!(container.found.contains("CAP_SYS_ADMIN"));
        let nested = of(Mode::Rootless, true, &[]);
        assert_eq!(nested.status, Status::Warn);
        assert!(nested.mend.contains("uid_pool"));
        let refused = told(true, Mode::Rootless, true, &some);
        assert_eq!(refused.status, Status::Fail);
        assert!(refused.found.contains("CAP_SYS_ADMIN"));
        assert!(told(true, Mode::Rootless, true, &[]).found.contains("pool"));
    }

    #[test]
    fn tracing_by_ones_own_user_matters_without_privileges() {
        assert_eq!(ptrace(Mode::Privileged, Some("0")).status, Status::Ok);
        assert_eq!(ptrace(Mode::Rootless, Some("1")).status, Status::Ok);
        assert_eq!(ptrace(Mode::Rootless, Some("0")).status, Status::Warn);
        assert_eq!(ptrace(Mode::Rootless, None).status, Status::Warn);
    }
}
