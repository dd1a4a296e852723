//! An exec in a running container: its file system and its network, under mount, pid and ipc namespaces of
//! the exec's own, so that nothing in the container sees the exec or what is delivered to it.
//!
//! The container is not trusted: no path of it is resolved by the launcher itself, no link leads out of it,
//! nothing of it is executed before the exec's own walls stand, and nothing of the host is shown in it.
//!
//! - [`target`]: which process, and that it is the one that was meant
//! - [`survey`]: what its root holds, looked at by a child in its mount namespace, with a deadline
//! - [`program`]: which file a command is in there, and who could change it
#![forbid(unsafe_code)]

pub mod program;
pub mod survey;
pub mod target;

pub use survey::{Survey, Wanted};
pub use target::{Target, joins};

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// What an order says of it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct InContainer {
    /// `--into`: only from an invoker. For a run of the broker the container is the one of root's record.
    pub pid: Option<i32>,
    /// Who the command is in there, by number; else the workspace's owner.
    pub user: Option<(u32, u32)>,
    /// Where it starts, in there; else in the workspace.
    #[serde(with = "crate::model::path_bytes::option")]
    pub directory: Option<PathBuf>,
}

/// What sublet builds itself, and the container's own is not shown of.
pub const OWN: [&str; 5] = ["proc", "dev", "sys", "run", "tmp"];

/// Whether a directory of a container can be a workspace: what the exec may write. Its root and what
/// belongs to its system cannot.
pub fn can_be_a_workspace(path: &Path) -> bool {
    const SYSTEM: [&str; 8] = ["bin", "boot", "etc", "lib", "lib64", "sbin", "usr", "var"];
    let inner = path.strip_prefix("/").unwrap_or(path);
    let Some(first) = inner.components().next() else { return false };
    let first = first.as_os_str();
    let is_system = inner.components().count() == 1 && SYSTEM.iter().any(|s| first == *s);
    !is_system && !OWN.iter().any(|own| first == *own)
}

/// An absolute path without `.` and `..`.
pub fn is_plain(path: &Path) -> bool {
    use std::path::Component::{Normal, RootDir};
    path.is_absolute() && path.components().all(|part| matches!(part, RootDir | Normal(_)))
}
