//! What can wait is done when nothing starts or ends: giving back what ended execs had, and making ready what the
//! next ones begin with.
#![forbid(unsafe_code)]

use std::time::Duration;

use super::Launcher;
use crate::launcher::exec::Exec;
use crate::model::id::ExecId;
use crate::sandbox::identity::Mode;
use crate::sys::clock;

/// When what can wait is done, such as planting the next exec's seed: so long after one was started, since many
/// end sooner, and the kernel does not take their namespaces down while it makes others; and after one ended,
/// whose broker has to say so.
const QUIET_AFTER_START: Duration = Duration::from_millis(5);
const QUIET_AFTER_END: Duration = Duration::from_millis(1);

/// What is left of so many execs waits for that; then it is given back at once.
const MOST_REMAINS: usize = 8;

impl Launcher {
    /// An exec is being started.
    pub(super) fn quiet_after_start(&mut self) {
        self.quiet_at = Some(clock::boottime() + QUIET_AFTER_START);
    }

    /// One has ended, and its broker has to say so.
    pub(super) fn quiet_after_end(&mut self) {
        let now = clock::boottime();
        let soon = now + QUIET_AFTER_END;
        let still_to_come = self.quiet_at.filter(|at| *at > now);
        self.quiet_at = Some(still_to_come.map_or(soon, |at| at.min(soon)));
    }

    /// What an exec had that has ended, and been told to: given back later, if that may wait.
    pub(super) fn leave_remains(&mut self, exec: Exec) {
        self.remains.push(exec);
        // What is locked counts for an ordinary user, until it is given back.
        let may_stay = self.is_for_many && self.setting.here.mode == Mode::Privileged;
        if !may_stay || self.remains.len() > MOST_REMAINS {
            self.remains.clear();
        }
    }

    /// When to do what can wait, if something does.
    pub(super) fn next_quiet(&self) -> Option<Duration> {
        let waits = !self.remains.is_empty() || self.warm.is_wanting() || self.wants_a_seed();
        self.quiet_at.filter(|_| waits)
    }

    pub(super) fn is_quiet(&self) -> bool {
        self.next_quiet().is_some_and(|at| at <= clock::boottime())
    }

    /// A launcher of many execs keeps one seed ready, if it keeps no whole sandboxes.
    fn wants_a_seed(&self) -> bool {
        self.is_for_many && !self.warm.keeps_any() && self.seeds.is_wanting()
    }

    /// One thing that could wait.
    pub(super) fn use_the_quiet(&mut self) {
        if !self.remains.is_empty() {
            self.remains.clear();
        } else if self.warm.is_wanting() {
            self.warm.refill(&self.setting);
        } else {
            self.plant();
        }
    }

    fn plant(&mut self) {
        self.seeds.live = self.execs.len();
        // It has no exec yet; its cgroup needs a name, with the time in it for the sweep.
        if self.setting.here.mode == Mode::Privileged {
            self.seeds.prepare_user(self.setting.host.config.host.uid_pool);
        }
        if let Err(refusal) = self.seeds.plant(&ExecId::fresh(), &self.setting.here) {
            eprintln!("sublet: launcher: no seed is kept ready: {refusal}");
            // Until an exec asks for one, and is told the same.
            self.is_for_many = false;
        }
    }
}
