//! Everything that the child needs, compiled by the launcher before the clone: nothing is decided,
//! looked up or allocated afterwards.
#![forbid(unsafe_code)]

use std::ffi::CString;
use std::os::fd::OwnedFd;

use rustix::fs::Mode;

use super::identity::Identity;
use super::seccomp::Filter;
use crate::sys::exec::StringVector;

/// A detached mount tree and where the child attaches it, relative to the new root.
pub struct Attachment {
    pub tree: OwnedFd,
    pub at: CString,
}

/// One resource limit. setrlimit(2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limit {
    pub resource: u32,
    pub soft: u64,
    pub hard: u64,
}

/// A landlock rule on a place that exists only inside: `/proc`, `/dev/pts`.
pub struct InnerRule {
    pub path: CString,
    pub access: u64,
}

/// Where the command's standard streams come from.
pub enum Streams {
    /// Pipes whose other ends the broker relays.
    Pipes { stdin: OwnedFd, stdout: OwnedFd, stderr: OwnedFd },
    /// A pseudo-terminal of the exec's own devpts, opened by the child, its master sent out.
    Terminal { rows: u16, columns: u16 },
}

/// One delivery as the child handles it. The descriptors come with the go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Handed {
    /// A descriptor that the command inherits under this number.
    Descriptor { number: i32 },
    /// A sealed memfd that holds `NAME=value\0`, mapped for execve to copy from.
    Environment,
}

/// Where the mount for `/proc` is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProcMount {
    /// In the new user namespace: the ordinary way.
    Inside,
    /// Before entering it: where the surroundings mask parts of their own /proc (as container runtimes
    /// do), the kernel refuses a new one from inside (mount_too_revealing), but not from a privileged
    /// process outside.
    BeforeUserNamespace,
}

pub struct Plan {
    /// `CLONE_NEW*` flags for clone3, the user namespace among them.
    pub namespaces: u64,
    /// Those that the child enters by itself, where `/proc` comes first.
    pub late_namespaces: u64,
    pub proc_mount: ProcMount,
    pub identity: Identity,
    /// The detached root.
    pub root: OwnedFd,
    /// In order, parents first.
    pub attachments: Vec<Attachment>,
    /// Where the workspace's tree goes, which comes later: it may be mapped through the child's own
    /// user namespace.
    pub workspace_at: Option<CString>,
    /// Those that lie in the workspace.
    pub attachments_in_workspace: Vec<Attachment>,
    pub hostname: CString,
    pub loopback: bool,
    pub limits: Vec<Limit>,
    pub working_directory: CString,
    /// The caller's.
    pub umask: Mode,
    /// Candidates on the PATH, tried in order.
    pub programs: Vec<CString>,
    pub argv: StringVector,
    pub envp: StringVector,
    pub streams: Streams,
    pub deliveries: Vec<Handed>,
    pub inner_rules: Vec<InnerRule>,
    pub filter: Filter,
    pub init_filter: Filter,
    /// The child's end of the packet socket.
    pub socket: OwnedFd,
    /// The read end of the pipe whose write end only the launcher holds.
    pub lifeline: OwnedFd,
    /// Ranges of descriptors that init closes first: all but those of this plan.
    pub close_before: Vec<(u32, u32)>,
    /// Ranges that it closes once the command runs: all but socket, lifeline and lock.
    pub close_after: Vec<(u32, u32)>,
    /// For the command's process until it executes.
    pub stack: Vec<u8>,
    /// Held open by init as well, so that the uid stays taken until the last process is gone.
    pub uid_lock: Option<OwnedFd>,
}
