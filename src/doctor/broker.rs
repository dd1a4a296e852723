//! What `sublet serve` would be here: its user, its walls, its sockets, the memory that it may lock.
#![forbid(unsafe_code)]

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::process::{Resource, getrlimit};

use super::{Check, Places};
use crate::config::BrokerWall;
use crate::host::limit::LOCKED_MEMORY;
use crate::host::{Account, AccountFrom};
use crate::sandbox::identity::Mode;
use crate::sys::landlock;

pub fn examine(places: &Places, mode: Mode) -> Vec<Check> {
    let Some(broker) = &places.broker else { return Vec::new() };
    let account = match (mode, broker) {
        (Mode::Privileged, named) => named.clone(),
        // Started as an ordinary user it is that user's, whatever the configuration says.
        (Mode::Rootless, _) => Ok(Account::of_caller()),
    };
    let owner = places.state_dir.as_deref().and_then(|state| owner_of(&state.join("db")));
    let mut checks = vec![
        user(&account, owner),
        walls(landlock::abi_version(), places.waive.contains(&BrokerWall::Landlock)),
        locked_memory(getrlimit(Resource::Memlock).maximum, mode),
    ];
    checks.extend(places.runtime_dir.as_deref().map(runtime_directory));
    checks
}

fn owner_of(path: &Path) -> Option<u32> {
    path.symlink_metadata().ok().map(|found| found.uid())
}

/// `owner`: whose the recorded state is, where there is one.
fn user(account: &Result<Account, String>, owner: Option<u32>) -> Check {
    const NAME: &str = "broker_user";
    let account = match account {
        Ok(account) => account,
        Err(error) => {
            return Check::fail(
                NAME,
                error.clone(),
                "sublet serve refuses to start",
                "correct [host] user, or leave it out: the last uid of the pool serves as well",
            );
        }
    };
    let uid = account.uid;
    if let Some(owner) = owner.filter(|&owner| owner != uid && owner != 0) {
        return Check::fail(
            NAME,
            format!("uid {uid}, and the state belongs to uid {owner}"),
            "sublet serve refuses to start: it does not take from one user what another has written",
            format!(
                "with no broker running, after a look at STATE/db and STATE/keys: chown -R {uid} both, \
                 or set [host] user = \"{owner}\""
            ),
        );
    }
    match account.from {
        AccountFrom::Configuration => Check::ok(
            NAME,
            format!("uid {uid}, as [host] user says"),
            "whoever takes the broker over has that user's rights and nothing of root's",
        ),
        AccountFrom::Pool => Check::ok(
            NAME,
            format!("uid {uid}, the last of [host] uid_pool"),
            "whoever takes the broker over has the rights of a user who owns nothing else",
        ),
        AccountFrom::Caller => Check::warn(
            NAME,
            format!("uid {uid}, as whoever starts it"),
            "the broker's files and sockets are in reach of all that this user runs",
            "start sublet serve as root, and it becomes a user of its own",
        ),
    }
}

fn walls(abi: u32, is_waived: bool) -> Check {
    const NAME: &str = "broker_walls";
    let lacks = "the broker can open what its user can: permissions alone keep it from other files";
    match (abi, is_waived) {
        (0, false) => Check::fail(
            NAME,
            "no Landlock, and [host] waive does not name it",
            "sublet serve refuses to start",
            "boot with lsm=landlock,… (Linux 5.13), or do without: [host] waive = [\"landlock\"]",
        ),
        (0, true) => Check::warn(
            NAME,
            "seccomp; no Landlock, as [host] waive accepts",
            lacks,
            "boot with lsm=landlock,… (Linux 5.13)",
        ),
        (abi, _) => Check::ok(
            NAME,
            format!("seccomp, Landlock ABI {abi}"),
            "the broker starts, signals and connects to nothing, and opens its state alone",
        ),
    }
}

/// `hard`: the hard limit in bytes, nothing for none. Root raises it.
fn locked_memory(hard: Option<u64>, mode: Mode) -> Check {
    const NAME: &str = "broker_memory";
    match hard {
        Some(bytes) if bytes < LOCKED_MEMORY && mode == Mode::Rootless => Check::warn(
            NAME,
            format!("sublet serve may lock {} KiB", bytes >> 10),
            "with many leased execs at once it runs out, and then denies: source_unavailable, \
             delivery_unavailable",
            format!(
                "LimitMEMLOCK={}M in its unit, or memlock in limits.conf(5)",
                LOCKED_MEMORY >> 20
            ),
        ),
        _ => Check::ok(
            NAME,
            format!("sublet serve may lock {} MiB and more", LOCKED_MEMORY >> 20),
            "enough for a thousand leased execs at once",
        ),
    }
}

fn runtime_directory(path: &Path) -> Check {
    const NAME: &str = "runtime_directory";
    let place = path.display();
    let found = match path.symlink_metadata() {
        Ok(found) => found,
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            return Check::ok(NAME, format!("{place}: not there yet"), "sublet serve makes it");
        }
        Err(e) => {
            return Check::fail(
                NAME,
                format!("{place}: {e}"),
                "sublet serve has no place for its sockets",
                "choose another: [host] runtime_dir, or sublet serve --runtime-dir",
            );
        }
    };
    let me = rustix::process::geteuid().as_raw();
    let described = format!("{place}: owner {}, mode {:04o}", found.uid(), found.mode() & 0o7777);
    if !found.is_dir() || found.uid() != me || found.mode() & 0o022 != 0 {
        return Check::fail(
            NAME,
            described,
            "others could put their sockets in the place of the broker's, so that it is refused",
            format!("chown {me} {place} && chmod go-w {place}"),
        );
    }
    Check::ok(NAME, described, "only this user can put sockets there")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Status;

    fn account(uid: u32, from: AccountFrom) -> Result<Account, String> {
        Ok(Account { uid, gid: uid, from })
    }

    #[test]
    fn the_brokers_user_and_the_states_owner_must_be_one() {
        #[track_caller]
        fn check(account: Result<Account, String>, owner: Option<u32>, status: Status) {
            assert_eq!(user(&account, owner).status, status);
        }
        check(account(998, AccountFrom::Configuration), None, Status::Ok);
        check(account(998, AccountFrom::Configuration), Some(998), Status::Ok);
        // Root's is taken over.
        check(account(998, AccountFrom::Pool), Some(0), Status::Ok);
        check(account(998, AccountFrom::Pool), Some(997), Status::Fail);
        check(account(1000, AccountFrom::Caller), Some(1000), Status::Warn);
        check(Err("no such user".to_owned()), None, Status::Fail);
    }

    #[test]
    fn a_wall_that_is_not_there_stops_it_unless_waived() {
        assert_eq!(walls(0, false).status, Status::Fail);
        assert_eq!(walls(0, true).status, Status::Warn);
        assert_eq!(walls(1, false).status, Status::Ok);
    }

    #[test]
    fn little_memory_to_lock_is_said_to_those_who_cannot_have_more() {
        assert_eq!(locked_memory(Some(8 << 20), Mode::Rootless).status, Status::Warn);
        assert_eq!(locked_memory(Some(8 << 20), Mode::Privileged).status, Status::Ok);
        assert_eq!(locked_memory(Some(LOCKED_MEMORY), Mode::Rootless).status, Status::Ok);
        assert_eq!(locked_memory(None, Mode::Rootless).status, Status::Ok);
    }

    #[test]
    fn the_sockets_directory_is_closed_to_others() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let check = |mode: u32, status: Status| {
            let mode = std::fs::Permissions::from_mode(mode);
            std::fs::set_permissions(dir.path(), mode).unwrap();
            assert_eq!(runtime_directory(dir.path()).status, status);
        };
        check(0o755, Status::Ok);
        check(0o775, Status::Fail);
        assert_eq!(runtime_directory(&dir.path().join("none")).status, Status::Ok);
    }
}
