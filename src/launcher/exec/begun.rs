//! A sandbox that is being made for an exec, with what it was compiled from. It holds no value, no lease and no
//! command; dropped, it is killed and given back.
#![forbid(unsafe_code)]

use super::Setting;
use super::sandbox::Sandbox;
use super::seed::{Seed, Seeds};
use super::user::{User, Whose};
use super::warm::Pool;
use crate::host::Host;
use crate::launcher::compile::{self, Compiled};
use crate::launcher::wire::{Refusal, Spec};
use crate::model::id::ExecId;

pub struct Begun {
    pub(super) spec: Spec,
    pub(super) compiled: Compiled,
    pub(super) sandbox: Sandbox,
    is_built: bool,
}

impl Begun {
    /// Compiles, takes the warm sandbox if it is what would be built now, else begins one.
    pub(super) fn begin(
        spec: Spec,
        name: &ExecId,
        setting: &Setting,
        warm: &mut Pool,
        seeds: &mut Seeds,
    ) -> Result<Self, Refusal> {
        let compiled = compile::sandbox(&spec, &setting.host, setting.here.mode)?;
        if let Some(stood) = warm.take(&spec).filter(|stood| stood.is_what(&compiled)) {
            return Ok(stood);
        }
        let whose = Whose::of(&compiled, setting, |pool| seeds.user(pool))?;
        let mode = compiled.profile.network.mode;
        let seed = match &compiled.network {
            Some(network) => seeds.take_joined(name, network, &setting.here)?,
            None => seeds.take(name, mode, &whose.identity, &setting.here)?,
        };
        let sandbox = Sandbox::begin(&compiled, seed, whose, setting)?;
        seeds.want(&sandbox, &compiled);
        Ok(Self { spec, compiled, sandbox, is_built: false })
    }

    /// A whole one that stands until it is wanted, of a seed of its own.
    pub(super) fn stand(spec: Spec, setting: &Setting) -> Result<Self, Refusal> {
        let compiled = compile::sandbox(&spec, &setting.host, setting.here.mode)?;
        // It has no exec yet; its cgroup needs a name, with the time in it for the sweep.
        let network = compiled.profile.network.mode;
        let seed = Seed::plant(&ExecId::fresh(), network, None, &setting.here, None)?;
        let whose = Whose::of(&compiled, setting, User::take)?;
        let sandbox = Sandbox::begin(&compiled, seed, whose, setting)?;
        let mut begun = Self { spec, compiled, sandbox, is_built: false };
        begun.build(setting)?;
        Ok(begun)
    }

    /// A whole one, for an exec that is still being decided on.
    ///
    /// # Errors
    /// The exec, if it comes to be, tries again and is told.
    pub fn ahead(
        spec: Spec,
        setting: &Setting,
        warm: &mut Pool,
        seeds: &mut Seeds,
    ) -> Result<Self, Refusal> {
        // It may not become that exec's: its cgroup has a name of its own.
        let mut begun = Self::begin(spec, &ExecId::fresh(), setting, warm, seeds)?;
        begun.build(setting)?;
        Ok(begun)
    }

    /// Builds what its child needs, if that is not done yet.
    pub(super) fn build(&mut self, setting: &Setting) -> Result<(), Refusal> {
        if !self.is_built {
            self.sandbox.build(&self.compiled, setting)?;
            self.is_built = true;
        }
        Ok(())
    }

    /// Whether it is what would be built now, and its child still waits for a command.
    fn is_what(&self, wanted: &Compiled) -> bool {
        self.compiled.is_same_as(wanted) && self.sandbox.child.waits()
    }

    /// Whether it is what this wants, and its child still waits for a command. The profile is read again: the
    /// broker may have decided by one that came after this was compiled.
    pub(super) fn is_for(&self, wanted: &Spec, host: &Host) -> bool {
        self.spec == *wanted
            && compile::profile(wanted, host).is_ok_and(|now| now == self.compiled.profile)
            && self.sandbox.child.waits()
    }
}
