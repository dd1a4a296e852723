//! On which CPU who runs: processes that wake each other stand in one queue where the kernel takes a wake-up for
//! the waker's last act. Only speed hangs on it. sched_setaffinity(2), getcpu(2).

use std::sync::OnceLock;

use rustix::io::Errno;
use rustix::process::Pid;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

static OWN: OnceLock<CpuSet> = OnceLock::new();

/// Lets a child that was just forked begin on another CPU, if there is one: a fork is queued behind its
/// parent, and on a small machine waits there for as long as the parent runs. Its own set of CPUs is as
/// before afterwards. sched_setaffinity(2).
pub fn start_elsewhere(child: i32) -> Result<(), Errno> {
    move_off(current(), Pid::from_raw(child))
}

/// The CPU that this thread runs on now. No system call: a filter need not allow any.
pub fn current() -> usize {
    // SAFETY: reads a number that the kernel keeps up to date in this thread's memory (rseq(2)), or asks the
    // vDSO for it.
    let cpu = unsafe { libc::sched_getcpu() };
    // There is none to tell where neither is to be had: then it is nobody's.
    usize::try_from(cpu).unwrap_or(usize::MAX)
}

/// Leaves this CPU, if it is that one, to whoever woke us there and has work of its own: a wake-up stays on
/// the waker's CPU where the kernel takes it for the waker's last act, or knows of no cache that both share.
pub fn leave_to_waker(cpu: usize) -> Result<(), Errno> {
    if current() == cpu { move_off(cpu, None) } else { Ok(()) }
}

/// Keeps a process off the CPU that this one runs on, until it calls [`go_anywhere`]: each time that it is woken
/// from here it would stop this process.
pub fn keep_off(process: i32) -> Result<(), Errno> {
    let mut others = *own_cpus()?;
    let here = current();
    if here >= CpuSet::MAX_CPU {
        return Ok(());
    }
    others.unset(here);
    // Refused where no other is left to it.
    sched_setaffinity(Pid::from_raw(process), &others)
}

/// Ends what [`keep_off`] began. Child-side too. Where this process's own set is none any more, since its cpuset
/// has changed, it may run wherever that lets it.
pub fn go_anywhere() {
    // Where nothing was learned nothing was kept off.
    let Some(own) = OWN.get() else { return };
    match sched_setaffinity(None, own).or_else(|_| sched_setaffinity(None, &any())) {
        Ok(()) | Err(_) => {}
    }
}

/// Finds out what this process, and its children after it, may run on: before the first of them is made, and kept
/// off some.
pub fn learn() {
    // Only speed hangs on it: then nothing is kept off, and asked again where it would be.
    match own_cpus() {
        Ok(_) | Err(_) => {}
    }
}

/// What this process may run on as far as it was told by sched_setaffinity(2): any, where only a cpuset binds
/// it, which may change.
fn own_cpus() -> Result<&'static CpuSet, Errno> {
    if let Some(own) = OWN.get() {
        return Ok(own);
    }
    let found = sched_getaffinity(None)?;
    let any = any();
    sched_setaffinity(None, &any)?;
    let is_free = sched_getaffinity(None)? == found;
    if !is_free {
        sched_setaffinity(None, &found)?;
    }
    Ok(OWN.get_or_init(|| if is_free { any } else { found }))
}

fn move_off(cpu: usize, process: Option<Pid>) -> Result<(), Errno> {
    let own = own_cpus()?;
    let mut others = sched_getaffinity(None)?;
    if cpu >= CpuSet::MAX_CPU || others.count() < 2 || !others.is_set(cpu) {
        return Ok(());
    }
    others.unset(cpu);
    sched_setaffinity(process, &others)?;
    sched_setaffinity(process, own)
}

fn any() -> CpuSet {
    let mut any = CpuSet::new();
    (0..CpuSet::MAX_CPU).for_each(|cpu| any.set(cpu));
    any
}
