//! Everything that the child needs before it is told what it is for: nothing is decided, looked up or
//! allocated after the clone. What becomes known only later, its user, the trees, the limits and the
//! command, comes over the socket and in the slate.
#![forbid(unsafe_code)]

use std::ffi::CString;
use std::os::fd::OwnedFd;

use rustix::fs::Mode;

use super::seccomp::BuiltIn;
use crate::sys::slate::{Place, Slate};
use crate::sys::slice::Slice;

/// The lists of a slate.
pub mod lists {
    use super::Place;

    /// Where each tree goes: relative to the root, parents first.
    pub const TREES: Place = 0;
    /// Where each tree goes that lies in the workspace.
    pub const TREES_IN_WORKSPACE: Place = 1;
    /// Candidates on the PATH, tried in order.
    pub const PROGRAMS: Place = 2;
    pub const ARGV: Place = 3;
    /// Without what `env` delivers, but with a free slot for each.
    pub const ENVP: Place = 4;
    /// Each delivery that is a descriptor: the number that the command inherits it under, or
    /// [`ENVIRONMENT`].
    pub const DELIVERIES: Place = 5;

    /// The working directory; then where the workspace's tree goes, if there is one. That one comes last:
    /// it may be mapped through the child's own user namespace.
    pub const PLACES: Place = 6;
    /// Resource, soft and hard limit, one after the other.
    pub const LIMITS: Place = 7;

    /// A sealed memfd that holds `NAME=value\0`, mapped for execve to copy from.
    pub const ENVIRONMENT: i64 = -1;
}

/// The first of [`lists::PLACES`].
pub const WORKING_DIRECTORY: usize = 0;
/// The second of [`lists::PLACES`].
pub const WORKSPACE: usize = 1;

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
    /// Those that the child enters by itself: the network's, which takes the kernel longest, while the
    /// launcher goes on; all but the pid namespace where `/proc` comes first.
    pub late_namespaces: u64,
    pub proc_mount: ProcMount,
    /// The network namespace of a container, joined before there is a user namespace of the exec's own:
    /// from in there it could not be.
    pub network: Option<OwnedFd>,
    /// The tmpfs that becomes its root, empty yet: the launcher builds in it.
    pub root: Option<OwnedFd>,
    pub hostname: CString,
    pub loopback: bool,
    /// The caller's.
    pub umask: Mode,
    /// The caller's, where the launcher and its children have another.
    pub slice: Option<Slice>,
    /// Where the launcher runs, which does not wait for the child there.
    pub launchers_cpu: usize,
    pub inner_rules: Vec<InnerRule>,
    pub init_filter: BuiltIn,
    /// Cloned with the launcher's table of descriptors, which is to be left before all.
    pub shares_descriptors: bool,
    /// The child's end of the packet socket.
    pub socket: OwnedFd,
    /// The read end of the pipe whose write end only the launcher holds.
    pub lifeline: OwnedFd,
    /// Of the uid, which comes with the maps. Held open by init as well, so that it stays taken until the
    /// last process is gone.
    pub uid_lock: Option<OwnedFd>,
    /// What the launcher writes after the clone. Init keeps none.
    pub slate: Option<Slate>,
}
