//! Whether an exec can have namespaces of its own, and who forbids it.
#![forbid(unsafe_code)]

use std::io;

use procfs::process::{MountInfo, Process};
use rustix::io::Errno;

use super::{Check, setting};
use crate::sys::probe::{self, Climb, Step, Within};

pub fn examine(is_privileged: bool) -> Vec<Check> {
    let inside = probe::namespaces(Within::FreshUserNamespace);
    let outside =
        if is_privileged { probe::namespaces(Within::OwnUserNamespace).ok() } else { None };
    let mounts: Vec<MountInfo> = Process::myself()
        .and_then(|me| me.mountinfo())
        .map(|mounts| mounts.into_iter().collect())
        .unwrap_or_default();
    vec![
        user_namespaces(&inside, &Blockers::of_this_host(is_privileged)),
        own_proc(inside.as_ref().ok(), outside.as_ref(), &covered_proc(&mounts)),
        hidepid(&mounts),
        time(crate::host::now().map(|_| ())),
    ]
}

/// The switches that forbid user namespaces, as far as they are set against us.
#[derive(Debug, Clone, Default)]
struct Blockers(Vec<(&'static str, &'static str)>);

impl Blockers {
    fn of_this_host(is_privileged: bool) -> Self {
        let is = |path, value| setting(path).as_deref() == Some(value);
        let mut blockers = Vec::new();
        if is("/proc/sys/user/max_user_namespaces", "0") {
            blockers.push((
                "user.max_user_namespaces = 0",
                "sysctl -w user.max_user_namespaces=15000, kept in /etc/sysctl.d/",
            ));
        }
        if !is_privileged && is("/proc/sys/kernel/unprivileged_userns_clone", "0") {
            blockers.push((
                "kernel.unprivileged_userns_clone = 0",
                "sysctl -w kernel.unprivileged_userns_clone=1, kept in /etc/sysctl.d/",
            ));
        }
        if !is_privileged && is("/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1") {
            blockers.push((
                "kernel.apparmor_restrict_unprivileged_userns = 1",
                "give sublet an AppArmor profile with `userns,` in /etc/apparmor.d/sublet, or \
                 sysctl -w kernel.apparmor_restrict_unprivileged_userns=0",
            ));
        }
        Self(blockers)
    }
}

fn user_namespaces(climb: &io::Result<Climb>, blockers: &Blockers) -> Check {
    const NAME: &str = "user_namespaces";
    const MEANS: &str = "every exec lives in a user namespace of its own: without one nothing runs";
    let (what, errno) = match climb {
        Err(e) => {
            return Check::fail(
                NAME,
                format!("could not be tried: {e}"),
                MEANS,
                "look at this user's limits on processes and descriptors: ulimit -u, ulimit -n",
            );
        }
        Ok(climb) => {
            let refused = climb.first_refusal().filter(|(step, _)| *step < Step::Proc);
            match refused {
                Some((step, errno)) => (step.tried(), errno),
                None if climb.reached(Step::Tmpfs) => {
                    return Check::ok(
                        NAME,
                        "made, mapped, and mounted in",
                        "every exec can have a user namespace of its own, and all others inside it",
                    );
                }
                None => ("hear from the probe", Errno::PIPE),
            }
        }
    };
    let blamed: Vec<&str> = blockers.0.iter().map(|(who, _)| *who).collect();
    let found = if blamed.is_empty() {
        format!("cannot {what}: {errno}")
    } else {
        format!("cannot {what}: {errno}; {}", blamed.join("; "))
    };
    let mends: Vec<&str> = blockers.0.iter().map(|(_, mend)| *mend).collect();
    let mend = match (mends.is_empty(), errno) {
        (false, _) => mends.join("; "),
        (true, Errno::NOSPC | Errno::USERS) => {
            "too many, or too deeply nested, user namespaces: raise user.max_user_namespaces".into()
        }
        (true, Errno::NOSYS) => {
            "boot a kernel with CONFIG_USER_NS=y; inside a container let its seccomp profile permit it"
                .into()
        }
        (true, _) => "no sysctl forbids it, so look at the container's seccomp profile or the security \
                      module (docker: --security-opt seccomp=unconfined; SELinux: ausearch -m avc)"
            .into(),
    };
    Check::fail(NAME, found, MEANS, mend)
}

/// Parts of this /proc that another mount covers, as container runtimes do.
fn covered_proc(mounts: &[MountInfo]) -> Vec<String> {
    mounts
        .iter()
        .map(|mount| mount.mount_point.to_string_lossy().into_owned())
        .filter(|point| {
            point.starts_with("/proc/") && !point.starts_with("/proc/sys/fs/binfmt_misc")
        })
        .collect()
}

fn own_proc(inside: Option<&Climb>, outside: Option<&Climb>, covered: &[String]) -> Check {
    const NAME: &str = "own_proc";
    let listed = match covered {
        [] => String::new(),
        some => format!("; covered here: {}", some.join(", ")),
    };
    if inside.is_some_and(|climb| climb.reached(Step::Proc)) {
        return Check::ok(
            NAME,
            format!("mountable{listed}"),
            "an exec has a /proc that shows only its own processes",
        );
    }
    let why = match inside.and_then(|climb| climb.outcome(Step::Proc)) {
        Some(Err(errno)) => format!("refused: {errno}"),
        _ => "not reached: see user_namespaces".to_owned(),
    };
    if outside.is_some_and(|climb| climb.reached(Step::Proc)) {
        return Check::warn(
            NAME,
            format!("only with this process's privileges ({why}){listed}"),
            "the kernel lets no user namespace mount a /proc while parts of ours are covered; the \
             privileged launcher can mount it beforehand",
            "start the container with an uncovered /proc (docker: --security-opt systempaths=unconfined)",
        );
    }
    Check::fail(
        NAME,
        format!("{why}{listed}"),
        "an exec cannot have a /proc that shows only its own processes",
        "start the container with an uncovered /proc (docker: --security-opt systempaths=unconfined), or \
         with CAP_SYS_ADMIN",
    )
}

fn hidepid(mounts: &[MountInfo]) -> Check {
    const NAME: &str = "hidepid";
    let proc = mounts.iter().rfind(|mount| mount.mount_point.as_os_str() == "/proc");
    let option = proc.and_then(|mount| mount.super_options.get("hidepid").cloned().flatten());
    match option.as_deref() {
        Some(hidden @ ("1" | "2" | "4" | "noaccess" | "invisible" | "ptraceable")) => Check::ok(
            NAME,
            format!("/proc has hidepid={hidden}"),
            "other users of this host do not see the command lines of execs",
        ),
        _ => Check::ok(
            NAME,
            "/proc shows every process to every user of this host",
            "others may read the command lines of execs; sublet never puts a value there. To hide them \
             too, mount /proc with hidepid=invisible",
        ),
    }
}

fn time(reading: io::Result<()>) -> Check {
    const NAME: &str = "clock";
    match reading {
        Ok(()) => {
            Check::ok(NAME, "boot time and boot id are readable", "lease expiry can be trusted")
        }
        Err(e) => Check::fail(
            NAME,
            format!("the boot clock and boot id cannot be read: {e}"),
            "lease expiry is measured on the boot clock and could not be trusted: nothing is granted",
            "start sublet outside a time namespace, with /proc mounted",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Status;

    fn climb(refused: Option<(Step, Errno)>) -> Climb {
        let steps = [
            Step::UserNamespace,
            Step::IdMaps,
            Step::OtherNamespaces,
            Step::PrivateMounts,
            Step::FirstProcess,
            Step::Tmpfs,
            Step::Proc,
        ];
        let mut climb = Climb::default();
        for step in steps {
            match refused {
                Some((at, errno)) if at == step => {
                    climb.0.push((step, Err(errno)));
                    if step < Step::FirstProcess {
                        break;
                    }
                }
                _ => climb.0.push((step, Ok(()))),
            }
        }
        climb
    }

    #[test]
    fn who_forbids_user_namespaces_is_named_with_the_mend() {
        #[track_caller]
        fn check(refused: Option<(Step, Errno)>, blockers: Blockers, status: Status, text: &str) {
            let found = user_namespaces(&Ok(climb(refused)), &blockers);
            assert_eq!(found.status, status, "{found:?}");
            assert!(format!("{found:?}").contains(text), "{found:?}");
        }
        let apparmor = || {
            let name = "kernel.apparmor_restrict_unprivileged_userns = 1";
            Blockers(vec![(name, "userns, in /etc/apparmor.d/sublet")])
        };
        check(None, Blockers::default(), Status::Ok, "made");
        // A switch that does not stop us is not to be blamed.
        check(None, apparmor(), Status::Ok, "made");
        check(Some((Step::IdMaps, Errno::ACCESS)), apparmor(), Status::Fail, "apparmor.d");
        check(
            Some((Step::UserNamespace, Errno::NOSPC)),
            Blockers::default(),
            Status::Fail,
            "raise",
        );
        check(
            Some((Step::UserNamespace, Errno::PERM)),
            Blockers::default(),
            Status::Fail,
            "seccomp",
        );
        check(
            Some((Step::Tmpfs, Errno::PERM)),
            Blockers::default(),
            Status::Fail,
            "detached tmpfs",
        );
        // That is own_proc's to tell.
        check(Some((Step::Proc, Errno::PERM)), Blockers::default(), Status::Ok, "made");
    }

    #[test]
    fn a_covered_proc_is_a_matter_of_privilege() {
        let refused = climb(Some((Step::Proc, Errno::PERM)));
        let fine = climb(None);
        let covered = ["/proc/kcore".to_owned()];
        assert_eq!(own_proc(Some(&fine), None, &[]).status, Status::Ok);
        let warned = own_proc(Some(&refused), Some(&fine), &covered);
        assert_eq!(warned.status, Status::Warn);
        assert!(warned.found.contains("/proc/kcore"));
        assert_eq!(own_proc(Some(&refused), None, &covered).status, Status::Fail);
        assert_eq!(own_proc(None, None, &[]).status, Status::Fail);
    }
}
