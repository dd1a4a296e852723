//! `sublet hook`: what a container runtime calls. Reads the state, and tells what the hook says.
#![forbid(unsafe_code)]

use std::io::{self, Read};
use std::path::PathBuf;

use clap::ValueEnum;

use super::fail::{Answer, Failure, YES};
use super::{Globals, load};
use crate::hook::{self, HookError, Setting, state};
use crate::host::{Host, Places};

#[derive(Debug, clap::Args)]
#[command(after_long_help = HELP)]
pub struct HookArgs {
    /// The stage at which the runtime calls
    pub stage: Stage,
    /// Where the broker's sockets are [default: the configuration's, else /run/sublet]
    #[arg(long, value_name = "DIR")]
    pub runtime_dir: Option<PathBuf>,
}

pub const HELP: &str = "\
Examples:
  sublet hook createRuntime <state.json
  podman run --annotation dev.sublet.profile=git-push --annotation dev.sublet.principal=alice IMAGE

Exit status:
  0    done
  2    refused, or it could not be done: the runtime gives the container up

Stages:
  createRuntime    refuses a container that holds a managed value or a name that is refused; starts the run
  createContainer  gives it /run/sublet/agent.sock and /run/sublet/bin/sublet
  startContainer   sees from inside that the socket answers (optional)
  poststart        sees that the run is there (optional)
  poststop         ends the run: every lease is revoked

Annotations:
  dev.sublet.profile    a run under this profile; without it the guard alone is asked
  dev.sublet.principal  on whose behalf; mandatory with a profile
  dev.sublet.agent      which agent [default: container]
  dev.sublet.workspace  where in the container its execs work [default: process.cwd]

Notes:
  The container's state comes on standard input (OCI runtime-spec). docs/oci.md has the set-up for podman,
  CRI-O, containerd and Docker.";

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "camelCase")]
pub enum Stage {
    CreateRuntime,
    CreateContainer,
    StartContainer,
    Poststart,
    Poststop,
}

impl From<Stage> for hook::Stage {
    fn from(stage: Stage) -> Self {
        match stage {
            Stage::CreateRuntime => hook::Stage::CreateRuntime,
            Stage::CreateContainer => hook::Stage::CreateContainer,
            Stage::StartContainer => hook::Stage::StartContainer,
            Stage::Poststart => hook::Stage::Poststart,
            Stage::Poststop => hook::Stage::Poststop,
        }
    }
}

pub fn execute(globals: &Globals, args: &HookArgs) -> Answer {
    // It compares with keyed fingerprints, and the container's own environment may hold anything.
    crate::sys::memory::set_dumpable(false).map_err(|e| {
        Failure::new("hook", "hook_unprotected", "cannot make the hook undumpable").because(&e)
    })?;
    let mut input = Vec::new();
    io::stdin().lock().take(state::MAX_STATE as u64 + 1).read_to_end(&mut input).map_err(|e| {
        Failure::new("hook", "state_invalid", "cannot read the state on standard input").because(&e)
    })?;
    let places = Places { runtime_dir: args.runtime_dir.clone(), ..load::places(globals) };
    let host = Host::load(&places).map_err(|e| Failure::from(&e))?;
    let control = host.runtime_dir.join("control.sock");
    let setting = Setting { host: &host, runtime_dir: &host.runtime_dir, control: &control };
    hook::perform(args.stage.into(), &input, &setting).map_err(|e| Failure::from(&e))?;
    Ok(YES)
}

impl From<&HookError> for Failure {
    fn from(error: &HookError) -> Self {
        Failure::new("hook", error.reason(), error.to_string())
            .because_of_source(error)
            .hint(error.hint())
    }
}
