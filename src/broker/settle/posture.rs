//! What was enforced on the broker, by what: for the event `broker.started`, the log and its reader.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use serde::Serialize;

use crate::host::{Account, AccountFrom};
use crate::model::report::{Enforcement, Status};

/// What a wall around the broker achieves, whatever the mechanism.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Wall {
    /// No capability, now or ever.
    Capabilities,
    /// Nothing but the state, the runs' sockets and, for reading, the configuration.
    Filesystem,
    /// No network and no socket of anyone else's.
    Network,
    /// No other process looks at its memory, and no core file holds it.
    Privacy,
    /// It signals no other process.
    Signals,
    /// It starts no program and no process.
    Programs,
    /// Only the filter's system calls.
    SystemCalls,
    /// A user that does nothing else on this host.
    User,
}

/// Who made the control socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ControlFrom {
    Broker,
    /// systemd's socket unit.
    Manager,
}

/// The whole of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Posture {
    pub uid: u32,
    pub gid: u32,
    pub user_from: AccountFrom,
    pub control_from: ControlFrom,
    /// 0 where the kernel has none and the configuration waives it.
    pub landlock_abi: u32,
    pub walls: BTreeMap<Wall, Enforcement>,
}

impl Posture {
    pub(super) fn of(account: Account, landlock_abi: u32, control_from: ControlFrom) -> Self {
        let mut walls = BTreeMap::new();
        let mut set = |wall, by: &[&str], missing: &[&str]| {
            let own = |words: &[&str]| words.iter().map(|&w| w.to_owned()).collect();
            let status = if missing.is_empty() { Status::Full } else { Status::Partial };
            walls.insert(wall, Enforcement { status, by: own(by), missing: own(missing) });
        };
        // What the kernel's Landlock is too old for, the filter gives: by less, yet whole.
        let also = |since: u32, mechanism: &'static str| -> Vec<&'static str> {
            [(landlock_abi >= since).then_some("landlock"), Some(mechanism)]
                .into_iter()
                .flatten()
                .collect()
        };
        set(Wall::Capabilities, &["capabilities", "no_new_privs"], &[]);
        match landlock_abi {
            0 => set(Wall::Filesystem, &["permissions"], &["landlock"]),
            _ => set(Wall::Filesystem, &["landlock", "permissions"], &[]),
        }
        set(Wall::Network, &also(4, "seccomp"), &[]);
        set(Wall::Privacy, &["undumpable", "rlimit"], &[]);
        set(Wall::Signals, &also(6, "seccomp"), &[]);
        set(Wall::Programs, &["seccomp"], &[]);
        set(Wall::SystemCalls, &["seccomp"], &[]);
        match account.from {
            AccountFrom::Configuration | AccountFrom::Pool => set(Wall::User, &["uid"], &[]),
            AccountFrom::Caller => set(Wall::User, &[], &["user of its own"]),
        }
        let Account { uid, gid, from } = account;
        Self { uid, gid, user_from: from, control_from, landlock_abi, walls }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_said() {
        let account = Account { uid: 5, gid: 5, from: AccountFrom::Caller };
        let posture = Posture::of(account, 0, ControlFrom::Broker);
        let status = |wall| posture.walls[&wall].status;
        assert_eq!(status(Wall::Filesystem), Status::Partial);
        assert_eq!(status(Wall::User), Status::Partial);
        assert_eq!(status(Wall::Signals), Status::Full);
        let account = Account { from: AccountFrom::Pool, ..account };
        let posture = Posture::of(account, 7, ControlFrom::Manager);
        assert!(posture.walls.values().all(|wall| wall.status == Status::Full));
        let json = serde_json::to_value(&posture).unwrap();
        assert_eq!(json["user_from"], "pool");
        assert_eq!(json["walls"]["signals"]["by"], serde_json::json!(["landlock", "seccomp"]));
    }
}
