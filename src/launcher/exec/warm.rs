//! Warm sandboxes: built ahead for runs that executed lately, so that the next exec of such a run only
//! needs its command.
//!
//! A warm sandbox is used for one exec, or for none. It holds no value, no lease and no command; it
//! dies with the launcher, as every exec does, and is killed and given back when it is not used.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::time::Duration;

use super::Setting;
use super::begun::Begun;
use crate::launcher::wire::Spec;
use crate::sys::clock;

/// How long one is kept: the mounts that it shows are those of its making.
const LIFE: Duration = Duration::from_secs(120);

/// One, and until when it is kept (`CLOCK_BOOTTIME`). Its child was not waited for: what it cannot do is found when
/// it is to be used.
struct Warm {
    begun: Begun,
    until: Duration,
}

/// The warm sandboxes of a launcher. Of capacity 0 by default: a launcher of one exec needs none.
#[derive(Default)]
pub struct Pool {
    capacity: usize,
    /// The oldest first.
    ready: VecDeque<Warm>,
    /// What executed lately and has none ready, the latest last.
    wanted: VecDeque<Spec>,
}

impl Pool {
    /// For so many in all.
    pub fn new(capacity: usize) -> Self {
        Self { capacity, ..Self::default() }
    }

    pub fn keeps_any(&self) -> bool {
        self.capacity > 0
    }

    /// For an exec that begins: one that was built for its like, if there is one.
    pub fn take(&mut self, spec: &Spec) -> Option<Begun> {
        let found = self.ready.iter().position(|warm| warm.begun.spec == *spec)?;
        self.ready.remove(found).map(|warm| warm.begun)
    }

    /// An exec of this kind has ended: the next one may come soon.
    pub fn want(&mut self, spec: &Spec) {
        if self.capacity == 0 || self.ready.iter().any(|warm| warm.begun.spec == *spec) {
            return;
        }
        self.wanted.retain(|wanted| wanted != spec);
        self.wanted.push_back(spec.clone());
        if self.wanted.len() > self.capacity {
            self.wanted.pop_front();
        }
    }

    /// Whether [`Pool::refill`] has something to do.
    pub fn is_wanting(&self) -> bool {
        !self.wanted.is_empty()
    }

    /// Builds the one that is wanted most, for a moment in which nothing else is to be done. The oldest
    /// makes room for it.
    pub fn refill(&mut self, setting: &Setting) {
        let Some(spec) = self.wanted.pop_back() else { return };
        if self.ready.len() >= self.capacity {
            self.ready.pop_front();
        }
        match Begun::stand(spec, setting) {
            Ok(begun) => self.ready.push_back(Warm { begun, until: clock::boottime() + LIFE }),
            // The next exec of its kind is refused for the same reason, and its caller is told.
            Err(refusal) => eprintln!("sublet: launcher: no sandbox is kept ahead: {refusal}"),
        }
    }

    /// The next moment at which [`Pool::on_time`] has something to do.
    pub fn next_time(&self) -> Option<Duration> {
        self.ready.iter().map(|warm| warm.until).min()
    }

    /// Gives back what has stood too long.
    pub fn on_time(&mut self, now: Duration) {
        self.ready.retain(|warm| warm.until > now);
    }

    /// Gives all back.
    pub fn clear(&mut self) {
        self.ready.clear();
        self.wanted.clear();
    }
}
