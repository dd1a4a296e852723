//! The kernel's version, and the calls that a sandbox is built with.
#![forbid(unsafe_code)]

use std::io;
use std::path::Path;

use super::{Check, setting};
use crate::sys::probe::{self, SeccompAction};

/// Landlock and memfd_secret came with 5.14 at the latest; everything else that is needed is older.
const OLDEST: (u32, u32) = (5, 14);
/// noswap tmpfs (6.4), non-executable memfds (6.3), memfd_secret on by default (6.5).
const FULL: (u32, u32) = (6, 5);

pub fn examine(is_privileged: bool, workspace: &Path) -> Vec<Check> {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let modules = setting("/sys/kernel/security/lsm");
    vec![
        version(&release),
        landlock(&probe::landlock_abi(), modules.as_deref()),
        seccomp(probe::seccomp_has),
        clone3(probe::has_clone3()),
        idmapped_mounts(is_privileged, workspace, || probe::idmapped_mount(workspace)),
    ]
}

fn version(release: &str) -> Check {
    const NAME: &str = "kernel";
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
    let (Some(Ok(major)), Some(Ok(minor))) = (numbers.next(), numbers.next()) else {
        return Check::warn(
            NAME,
            format!("Linux {release}"),
            "the version cannot be read from its name; the checks below look at what it can do",
            "none is needed if the other checks are fine",
        );
    };
    let found = format!("Linux {release}");
    if (major, minor) < OLDEST {
        Check::fail(
            NAME,
            found,
            "too old: Landlock, memfd_secret and mount_setattr are not all there",
            "boot Linux 5.14 or newer; 6.12 or newer gives every protection",
        )
    } else if (major, minor) < FULL {
        Check::warn(
            NAME,
            found,
            "new enough to run; before 6.5 a tmpfs may swap and memfds are executable in principle",
            "boot Linux 6.5 or newer; 6.12 or newer gives every protection",
        )
    } else {
        Check::ok(NAME, found, "new enough")
    }
}

fn landlock(abi: &io::Result<u32>, modules: Option<&str>) -> Check {
    const NAME: &str = "landlock";
    let listed = match modules {
        Some(list) if list.split(',').any(|m| m == "landlock") => ", in the list of active modules",
        Some(_) => ", not in the list of active modules",
        None => "",
    };
    let mend = match modules {
        Some(list) => format!("boot with lsm=landlock,{list}"),
        None => "boot a kernel with CONFIG_SECURITY_LANDLOCK=y and with landlock in its lsm= list"
            .into(),
    };
    match abi {
        Err(e) => {
            let how = match e.raw_os_error() {
                Some(libc::EOPNOTSUPP) => "built in and not enabled at boot".to_owned(),
                _ => format!("missing ({e})"),
            };
            Check::warn(
                NAME,
                format!("{how}{listed}"),
                "the second wall around the filesystem is missing: the mount namespace alone holds it. \
                 Strict profiles with network = \"host\" are refused",
                mend,
            )
        }
        Ok(abi @ 6..) => Check::ok(
            NAME,
            format!("ABI {abi}{listed}"),
            "files, TCP ports, abstract sockets and signals can be walled off",
        ),
        Ok(abi) => {
            let lacks = match abi {
                ..=2 => "truncation, TCP ports, device ioctls, abstract sockets and signals",
                3 => "TCP ports, device ioctls, abstract sockets and signals",
                4 => "device ioctls, abstract sockets and signals",
                _ => "abstract sockets and signals",
            };
            Check::warn(
                NAME,
                format!("ABI {abi}{listed}"),
                format!(
                    "Landlock cannot wall off {lacks}; namespaces still do, but for sockets and ports \
                     under network = \"host\": strict profiles with it are refused"
                ),
                "boot Linux 6.12 or newer (ABI 6), or keep to network = \"none\"",
            )
        }
    }
}

fn seccomp(has: impl Fn(SeccompAction) -> bool) -> Check {
    const NAME: &str = "seccomp";
    if !(has(SeccompAction::KillProcess) && has(SeccompAction::Errno)) {
        return Check::fail(
            NAME,
            "no filters",
            "no command runs without its system call filter",
            "boot a kernel with CONFIG_SECCOMP_FILTER=y",
        );
    }
    if !has(SeccompAction::UserNotification) {
        return Check::warn(
            NAME,
            "filters without user notification",
            "the filters work; what needs an answer at run time is refused outright",
            "boot a kernel of 5.0 or newer",
        );
    }
    Check::ok(NAME, "filters and user notification", "system calls can be filtered")
}

fn clone3(is_there: bool) -> Check {
    const NAME: &str = "clone3";
    if is_there {
        return Check::ok(
            NAME,
            "reaches the kernel",
            "an exec is born in its namespaces and cgroup",
        );
    }
    Check::fail(
        NAME,
        "refused",
        "an exec cannot be born in its namespaces; this is usually the container's seccomp filter",
        "outside a container: boot Linux 5.7 or newer; inside one: let its seccomp profile permit clone3 \
         (docker: --security-opt seccomp=unconfined, or grant CAP_SYS_ADMIN)",
    )
}

fn idmapped_mounts(
    is_privileged: bool,
    workspace: &Path,
    attempt: impl FnOnce() -> io::Result<()>,
) -> Check {
    const NAME: &str = "idmapped_mounts";
    if !is_privileged {
        return Check::ok(
            NAME,
            "not needed here",
            "without privileges an exec runs as its invoker, and files keep their owner",
        );
    }
    let place = workspace.display();
    match attempt() {
        Ok(()) => Check::ok(
            NAME,
            format!("possible at {place}"),
            "every exec can have a user of its own while its files keep theirs",
        ),
        Err(e) => Check::warn(
            NAME,
            format!("refused at {place}: {e}"),
            "the filesystem of this workspace cannot be idmapped: execs in it run as its owner",
            "keep workspaces on ext4, xfs, btrfs or tmpfs (Linux 6.3); overlayfs cannot be idmapped",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Status;

    #[test]
    fn versions() {
        #[track_caller]
        fn check(release: &str, status: Status) {
            assert_eq!(version(release).status, status, "{release}");
        }
        check("5.10.0-28-amd64", Status::Fail);
        check("5.14.0", Status::Warn);
        check("6.1.0-13-amd64", Status::Warn);
        check("6.5", Status::Ok);
        check("6.18.44-fc", Status::Ok);
        check("custom", Status::Warn);
    }

    #[test]
    fn landlock_by_abi_and_by_the_way_it_is_missing() {
        #[track_caller]
        fn check(abi: io::Result<u32>, modules: Option<&str>, status: Status, text: &str) {
            let found = landlock(&abi, modules);
            assert_eq!(found.status, status, "{found:?}");
            assert!(format!("{found:?}").contains(text), "{found:?}");
        }
        check(Ok(7), Some("capability,landlock,yama"), Status::Ok, "ABI 7, in the list");
        check(Ok(6), None, Status::Ok, "ABI 6");
        check(Ok(5), None, Status::Warn, "cannot wall off abstract sockets and signals");
        check(Ok(1), None, Status::Warn, "TCP ports");
        let off = || Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
        check(off(), Some("capability,yama"), Status::Warn, "lsm=landlock,capability,yama");
        check(
            Err(io::Error::from_raw_os_error(libc::ENOSYS)),
            None,
            Status::Warn,
            "CONFIG_SECURITY_LANDLOCK",
        );
    }

    #[test]
    fn filters_are_needed_and_notification_is_not() {
        assert_eq!(seccomp(|_| true).status, Status::Ok);
        assert_eq!(seccomp(|_| false).status, Status::Fail);
        assert_eq!(seccomp(|a| a != SeccompAction::UserNotification).status, Status::Warn);
    }

    #[test]
    fn idmapping_matters_only_with_privileges() {
        let refused = || Err(io::Error::from_raw_os_error(libc::EINVAL));
        let here = Path::new("/w");
        assert_eq!(idmapped_mounts(false, here, refused).status, Status::Ok);
        assert_eq!(idmapped_mounts(true, here, || Ok(())).status, Status::Ok);
        let warned = idmapped_mounts(true, here, refused);
        assert_eq!(warned.status, Status::Warn);
        assert!(warned.found.contains("/w"));
    }
}
