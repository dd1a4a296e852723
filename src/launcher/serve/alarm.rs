//! Wakes the loop at the next moment that counts, on the clock that leases are measured on: a wait of
//! epoll's own would stand still in suspend (timerfd_create(2)).
#![forbid(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::Timespec;
use rustix::io::Errno;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, timerfd_create, timerfd_settime,
};

/// Made when it is first needed.
#[derive(Debug, Default)]
pub(super) struct Alarm {
    timer: Option<OwnedFd>,
    set: Option<Duration>,
}

impl Alarm {
    /// Goes off at `next`, or never. `watch` is told of the timer when it is made.
    pub fn set(
        &mut self,
        next: Option<Duration>,
        watch: impl FnOnce(BorrowedFd<'_>) -> Result<(), Errno>,
    ) -> Result<(), Errno> {
        if next == self.set {
            return Ok(());
        }
        let timer = match &self.timer {
            Some(timer) => timer,
            None => {
                let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
                let timer = timerfd_create(TimerfdClockId::Boottime, flags)?;
                watch(timer.as_fd())?;
                self.timer.insert(timer)
            }
        };
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        // A moment that has passed goes off at once; all zeros would disarm.
        let at = next.map_or(zero, |at| Timespec {
            tv_sec: at.as_secs() as i64,
            tv_nsec: i64::from(at.subsec_nanos()).max(1),
        });
        let setting = Itimerspec { it_interval: zero, it_value: at };
        timerfd_settime(timer, TimerfdTimerFlags::ABSTIME, &setting)?;
        self.set = next;
        Ok(())
    }

    /// It has gone off.
    pub fn clear(&mut self) -> Result<(), Errno> {
        self.set = None;
        let mut expirations = [0; 8];
        match self.timer.as_ref().map(|timer| rustix::io::read(timer, &mut expirations)) {
            None | Some(Ok(_) | Err(Errno::AGAIN | Errno::INTR)) => Ok(()),
            Some(Err(e)) => Err(e),
        }
    }
}
