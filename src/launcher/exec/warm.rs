//! Warm sandboxes: built ahead for runs that executed lately, so that the next exec of such a run only
//! needs its command.
//!
//! A warm sandbox is used for one exec, or for none. It holds no value, no lease and no command; it
//! dies with the launcher, as every exec does, and is killed and given back when it is not used.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::time::Duration;

use super::Setting;
use super::sandbox::Sandbox;
use super::seed::Seed;
use super::user::{User, Whose};
use crate::launcher::compile::{self, Compiled};
use crate::launcher::wire::{Refusal, Spec};
use crate::model::id::ExecId;
use crate::sandbox::identity::Mode;
use crate::sys::clock;

/// How long one is kept: the mounts that it shows are those of its making.
const LIFE: Duration = Duration::from_secs(120);

/// A sandbox that stands and waits for its command.
pub struct Warm {
    spec: Spec,
    compiled: Compiled,
    sandbox: Sandbox,
    /// `CLOCK_BOOTTIME`.
    until: Duration,
}

impl Warm {
    /// Builds one. Its child is not waited for: what it cannot do is found when it is to be used.
    pub fn prepare(spec: Spec, setting: &Setting) -> Result<Self, Refusal> {
        let compiled = compile::sandbox(&spec, &setting.host, setting.here.mode)?;
        // It has no exec yet; its cgroup needs a name, with the time in it for the sweep.
        let seed = Seed::plant(
            &ExecId::fresh(),
            compiled.profile.network.mode,
            None,
            &setting.here,
            None,
        )?;
        let user = match setting.here.mode {
            Mode::Rootless => None,
            Mode::Privileged => Some(User::take(setting.host.config.host.uid_pool)?),
        };
        let whose = Whose::of(&compiled, user, setting.here.mode)?;
        let mut sandbox = Sandbox::begin(&compiled, seed, whose, setting)?;
        sandbox.build(&compiled, setting)?;
        Ok(Self { spec, compiled, sandbox, until: clock::boottime() + LIFE })
    }

    /// Its sandbox, if that is what would be built now: profile and workspace were read again. One that
    /// does not fit, failed or died is given back.
    pub(super) fn into_sandbox(self, wanted: &Compiled) -> Option<Sandbox> {
        let fits = self.compiled.is_same_as(wanted) && self.sandbox.child.waits();
        fits.then_some(self.sandbox)
    }
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
    pub fn take(&mut self, spec: &Spec) -> Option<Warm> {
        let found = self.ready.iter().position(|warm| warm.spec == *spec)?;
        self.ready.remove(found)
    }

    /// An exec of this kind has ended: the next one may come soon.
    pub fn want(&mut self, spec: &Spec) {
        if self.capacity == 0 || self.ready.iter().any(|warm| warm.spec == *spec) {
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
        match Warm::prepare(spec, setting) {
            Ok(warm) => self.ready.push_back(warm),
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
