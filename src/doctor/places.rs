//! The state directory and the configuration: there, ours, and closed to others.
#![forbid(unsafe_code)]

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::Access;

use super::Check;

/// Where sublet would look.
#[derive(Debug, Clone, Default)]
pub struct Places {
    pub config: PathBuf,
    /// Someone named it, so it must exist.
    pub config_is_named: bool,
    pub state_dir: PathBuf,
    /// Where `sublet run` would work: the current directory.
    pub workspace: PathBuf,
}

pub fn examine(places: &Places) -> Vec<Check> {
    vec![configuration(&places.config, places.config_is_named), state_directory(&places.state_dir)]
}

fn configuration(path: &Path, is_named: bool) -> Check {
    const NAME: &str = "configuration";
    let place = path.display();
    let meta = match std::fs::metadata(path) {
        Ok(meta) => meta,
        Err(e) if e.kind() == io::ErrorKind::NotFound && !is_named => {
            return Check::ok(
                NAME,
                format!("none at {place}"),
                "fine: defaults hold, and no lease can be granted until a secret is configured \
                 (sublet init)",
            );
        }
        Err(e) => {
            return Check::fail(
                NAME,
                format!("{place}: {e}"),
                "every command that needs the configuration refuses",
                "correct --config or SUBLET_CONFIG, or write one with sublet init",
            );
        }
    };
    if let Err(e) = std::fs::read(path) {
        return Check::fail(
            NAME,
            format!("{place}: {e}"),
            "every command that needs the configuration refuses",
            format!("let this user read it: chmod u+r {place}, or name another with --config"),
        );
    }
    let me = rustix::process::geteuid().as_raw();
    if meta.mode() & 0o022 != 0 || (meta.uid() != 0 && meta.uid() != me) {
        return Check::fail(
            NAME,
            format!("{place}: owner {}, mode {:04o}", meta.uid(), meta.mode() & 0o7777),
            "another user can say which secrets are given to what",
            format!("chown {me} {place} && chmod go-w {place}"),
        );
    }
    Check::ok(NAME, format!("{place}"), "read, and only its owner can change it")
}

fn state_directory(path: &Path) -> Check {
    const NAME: &str = "state_directory";
    let place = path.display();
    let meta = match std::fs::metadata(path) {
        Ok(meta) => meta,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return not_there_yet(path),
        Err(e) => {
            return Check::fail(
                NAME,
                format!("{place}: {e}"),
                "nothing can be recorded, so nothing is granted",
                "name another directory with --state-dir",
            );
        }
    };
    let me = rustix::process::geteuid().as_raw();
    let found = format!("{place}: owner {}, mode {:04o}", meta.uid(), meta.mode() & 0o7777);
    let may_write = rustix::fs::access(path, Access::WRITE_OK | Access::EXEC_OK).is_ok();
    if !meta.is_dir() || !may_write {
        return Check::fail(
            NAME,
            found,
            "nothing can be recorded there, so nothing is granted",
            "name a directory of this user's with --state-dir",
        );
    }
    if meta.uid() != me || meta.mode() & 0o077 != 0 {
        return Check::fail(
            NAME,
            found,
            "others can reach encrypted secrets, leases and the trail",
            format!("chown -R {me} {place} && chmod 0700 {place}"),
        );
    }
    Check::ok(NAME, found, "only this user can reach leases, secrets and the trail")
}

fn not_there_yet(path: &Path) -> Check {
    const NAME: &str = "state_directory";
    let place = path.display();
    let above = path.ancestors().skip(1).find(|a| !a.as_os_str().is_empty() && a.exists());
    let above = above.unwrap_or(Path::new("."));
    if rustix::fs::access(above, Access::WRITE_OK | Access::EXEC_OK).is_ok() {
        return Check::ok(NAME, format!("{place}: not there yet"), "it is made when it is needed");
    }
    Check::fail(
        NAME,
        format!("{place}: not there, and {} is not writable", above.display()),
        "nothing can be recorded, so nothing is granted",
        "make it for this user, or name another directory with --state-dir",
    )
}

#[cfg(test)]
mod tests {
    use std::fs::{Permissions, set_permissions};
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::doctor::Status;

    #[test]
    fn a_state_directory_is_its_owners_alone() {
        let dir = tempfile::tempdir().unwrap();
        let check = |mode: u32, status: Status| {
            set_permissions(dir.path(), Permissions::from_mode(mode)).unwrap();
            assert_eq!(state_directory(dir.path()).status, status, "{mode:o}");
        };
        check(0o755, Status::Fail);
        check(0o700, Status::Ok);
        assert_eq!(state_directory(&dir.path().join("a/b")).status, Status::Ok);
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        assert_eq!(state_directory(&file).status, Status::Fail);
        assert_eq!(state_directory(&file.join("below")).status, Status::Fail);
    }

    #[test]
    fn a_configuration_may_be_absent_unless_named_and_never_writable_by_others() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sublet.toml");
        assert_eq!(configuration(&path, false).status, Status::Ok);
        assert_eq!(configuration(&path, true).status, Status::Fail);
        std::fs::write(&path, "").unwrap();
        let check = |mode: u32, status: Status| {
            set_permissions(&path, Permissions::from_mode(mode)).unwrap();
            assert_eq!(configuration(&path, true).status, status, "{mode:o}");
        };
        check(0o644, Status::Ok);
        check(0o600, Status::Ok);
        check(0o664, Status::Fail);
        check(0o646, Status::Fail);
    }
}
