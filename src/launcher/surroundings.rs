//! What the kernel and the caller of this launcher let it do: the same for every exec, and known before it
//! is told anything.
#![forbid(unsafe_code)]

use rustix::fs::Mode as FileMode;

use super::compile;
use crate::sandbox::cgroup::Cgroups;
use crate::sandbox::identity::Mode;
use crate::sys::landlock;
use crate::sys::slice::Slice;

pub struct Surroundings {
    pub mode: Mode,
    pub landlock_abi: u32,
    pub cpus: usize,
    /// Parts of /proc are masked, as container runtimes do.
    pub proc_is_masked: bool,
    /// Where execs get their cgroups, or why there is no such place.
    pub cgroups: Result<Cgroups, String>,
    /// The caller's, for the command: what the launcher makes has the modes that it names.
    pub umask: FileMode,
    /// The caller's, for the command.
    pub slice: Option<Slice>,
}

impl Surroundings {
    pub fn survey(mode: Mode, umask: FileMode, slice: Option<Slice>) -> rustix::io::Result<Self> {
        Ok(Self {
            mode,
            landlock_abi: landlock::abi_version(),
            // Not std's count, which walks the cgroup hierarchy for it.
            cpus: rustix::thread::sched_getaffinity(None)?.count() as usize,
            proc_is_masked: super::exec::proc_is_masked(),
            cgroups: Cgroups::open(mode).map_err(|e| compile::chain(&e)),
            umask,
            slice,
        })
    }
}
