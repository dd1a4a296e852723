//! The state directory and the configuration: there, ours, and closed to others.
#![forbid(unsafe_code)]

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::Access;

use super::Check;
use crate::config::{BrokerWall, HostConfig, UidPool};
use crate::host::Account;

/// Where sublet would look.
#[derive(Debug, Clone, Default)]
pub struct Places {
    /// Nothing where neither a flag nor a home directory says.
    pub config: Option<PathBuf>,
    /// Someone named it, so it must exist.
    pub config_is_named: bool,
    /// What is wrong with it, where something is.
    pub config_error: Option<String>,
    /// Nothing where the configuration that may name it cannot be read.
    pub state_dir: Option<PathBuf>,
    /// Where `sublet run` would work: the current directory.
    pub workspace: PathBuf,
    /// The host users that execs are to run as.
    pub uid_pool: UidPool,
    /// Where `sublet serve` would have its sockets. Nothing as for the state.
    pub runtime_dir: Option<PathBuf>,
    /// Whose `sublet serve` would be where root starts it, or why it could be no one's. Nothing as for the
    /// state.
    pub broker: Option<Result<Account, String>>,
    /// Where it could be read.
    pub host_config: Option<HostConfig>,
    /// Where container runtimes look for hooks.
    pub hook_directories: Vec<PathBuf>,
    /// `[hook] binary`.
    pub hook_binary: Option<PathBuf>,
    /// Walls of the broker that the configuration does without.
    pub waive: Vec<BrokerWall>,
}

pub fn examine(places: &Places) -> Vec<Check> {
    let state_directory = match &places.state_dir {
        Some(path) => state_directory(path),
        None => Check::fail(
            "state_directory",
            "not known",
            "nothing can be recorded, so nothing is granted",
            "mend the configuration, which may name it, or name it with --state-dir",
        ),
    };
    vec![configuration(places), state_directory]
}

fn configuration(places: &Places) -> Check {
    const NAME: &str = "configuration";
    let Some(path) = &places.config else {
        return Check::warn(
            NAME,
            "no place for one: HOME is not set",
            "defaults hold, and no lease can be granted",
            "set HOME, or name a file with --config",
        );
    };
    let place = path.display();
    let meta = match std::fs::metadata(path) {
        Ok(meta) => meta,
        Err(e) if e.kind() == io::ErrorKind::NotFound && !places.config_is_named => {
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
    if let Some(error) = &places.config_error {
        return Check::fail(
            NAME,
            format!("{place} is not valid: {error}"),
            "every command that needs the configuration refuses",
            "correct the line; sublet init --print shows all that it may hold",
        );
    }
    Check::ok(NAME, format!("{place}"), "valid, and only its owner can change it")
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
    let db = path.join("db").symlink_metadata().ok().map(|db| db.uid());
    if let Some(owner) = db.filter(|&db| me == 0 && meta.uid() == 0 && db != 0)
        && meta.mode() & 0o022 == 0
    {
        return Check::ok(
            NAME,
            format!("{found}; what is recorded belongs to uid {owner}, a broker's user"),
            "root's own commands become that user before they touch it",
        );
    }
    if meta.uid() != me || meta.mode() & 0o022 != 0 {
        return Check::fail(
            NAME,
            found,
            "others could put another trail or other secrets there, so it is refused",
            format!("chown -R {me} {place} && chmod 0700 {place}"),
        );
    }
    if meta.mode() & 0o055 != 0 {
        return Check::warn(
            NAME,
            found,
            "others see that it is there; what it holds is in directories of mode 0700",
            format!("chmod 0700 {place}"),
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
        check(0o777, Status::Fail);
        check(0o720, Status::Fail);
        check(0o755, Status::Warn);
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
        let places = |config_is_named, config_error: Option<&str>| Places {
            config: Some(path.clone()),
            config_is_named,
            config_error: config_error.map(str::to_owned),
            ..Places::default()
        };
        assert_eq!(configuration(&places(false, None)).status, Status::Ok);
        assert_eq!(configuration(&places(true, None)).status, Status::Fail);
        assert_eq!(configuration(&Places::default()).status, Status::Warn);
        std::fs::write(&path, "").unwrap();
        let check = |mode: u32, status: Status| {
            set_permissions(&path, Permissions::from_mode(mode)).unwrap();
            assert_eq!(configuration(&places(true, None)).status, status, "{mode:o}");
        };
        check(0o644, Status::Ok);
        check(0o600, Status::Ok);
        check(0o664, Status::Fail);
        check(0o646, Status::Fail);
        check(0o600, Status::Ok);
        let invalid = configuration(&places(true, Some("x.toml:3:1: unknown key")));
        assert_eq!(invalid.status, Status::Fail);
        assert!(invalid.found.contains("x.toml:3:1"));
    }
}
