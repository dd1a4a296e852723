//! The slice of CPU time that a process asks the scheduler for: who asks for less at a time is let run
//! sooner (EEVDF, Linux 6.12; an earlier kernel takes the wish and does nothing). sched(7), sched_setattr(2).
//! Only speed hangs on it.

use rustix::io::Errno;

use super::process::last_errno;

/// The shortest that the kernel grants.
const SHORTEST: u64 = 100_000;

/// What a process had asked for, for its children to go back to.
#[derive(Clone, Copy)]
pub struct Slice(libc::sched_attr);

/// Asks for the shortest, for this process and its children. None where its policy knows no slices.
pub fn shorten() -> Option<Slice> {
    let mut attributes = libc::sched_attr {
        size: size_of::<libc::sched_attr>() as u32,
        sched_policy: 0,
        sched_flags: 0,
        sched_nice: 0,
        sched_priority: 0,
        sched_runtime: 0,
        sched_deadline: 0,
        sched_period: 0,
    };
    let (size, flags) = (attributes.size, 0);
    // SAFETY: sched_getattr writes at most `size` bytes, which `attributes` has.
    let done =
        unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attributes, size, flags) };
    if done != 0 || attributes.sched_policy != libc::SCHED_OTHER as u32 {
        return None;
    }
    let before = Slice(attributes);
    let short = Slice(libc::sched_attr { sched_runtime: SHORTEST, ..attributes });
    short.ask().ok().map(|()| before)
}

impl Slice {
    /// Asks for this one. Child-side.
    pub fn ask(&self) -> Result<(), Errno> {
        let flags = 0;
        // SAFETY: sched_setattr reads `size` bytes, as many as the kernel wrote, of a structure that lives.
        let done = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const self.0, flags) };
        if done == 0 { Ok(()) } else { Err(last_errno()) }
    }
}
