//! `sublet demo`: the main job end to end, with a demonstration secret and no configuration.
//!
//! - [`place`]: a temporary directory with configuration, profile and workspace, and what was left in it
//! - [`act`]: this binary called as a user would call it
//! - [`hold`]: a leased exec that stays, leaks a descriptor and waits to be ended
//! - [`host`]: what another process of the host sees of it
//! - [`show`]: steps, what they showed, and which promises were kept
//! - [`steps`]: the promises, one after the other
//!
//! Touches nothing outside its directory, and removes that in failure as well. Takes no short cut into
//! the library: what is shown is what `sublet run` does.
#![forbid(unsafe_code)]

mod act;
mod hold;
mod host;
mod place;
mod show;
mod steps;

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use super::Globals;
use super::fail::{Answer, Failure, YES};
use crate::sys::{memory, process};

use act::Sublet;
use place::Place;
use show::Tale;

#[derive(Debug, clap::Args)]
#[command(after_long_help = HELP)]
pub struct DemoArgs {
    /// Hands standard input's descriptor to whoever listens on a Unix socket. The demo's own leased
    /// command calls it, to show what such a descriptor is worth later.
    #[arg(long, hide = true, value_name = "SOCKET")]
    pub leak: Option<PathBuf>,
}

pub const HELP: &str = "\
Examples:
  sublet demo
  sublet demo --json

Exit status:
  0      every promise shown was kept
  125    sublet failed, or a promise was not kept: sublet doctor says what this machine lacks
  128+N  signal N (1, 2 or 15) ended it; what it made is gone all the same

What it shows:
  1  the vault: no file holds the value
  2  the delivery: one command has it, by variable, file and memfd; what it prints is masked
  3  the sibling: another exec of the same profile and workspace reads nothing, nor does another
     user of the host
  4  the scrub: when the exec is over, and after kill -9 of sublet, a descriptor that leaked out
     reads zeros
  5  the refusals, by name: a second use, a command and an audience that are not permitted
  6  the trail: all of it recorded, and a change to it found

What it uses:
  The commands that anyone would type, and sh, cat, head and sha256sum. Secret, configuration and
  state are made for it in a directory below TMPDIR (else /tmp) and removed at the end: it heeds
  neither --config nor --state-dir.";

/// Signals that end the demo, once what it made is gone.
const ENDING: [i32; 3] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP];

pub fn execute(globals: &Globals, args: DemoArgs) -> Answer {
    match args.leak {
        Some(socket) => hold::leak(&socket),
        None => demonstrate(globals.json),
    }
}

fn demonstrate(json: bool) -> Answer {
    let failed = |e: &dyn std::error::Error| {
        Failure::new("demo", "demo_unprotected", "cannot make the demo itself undumpable")
            .because(e)
    };
    // The demo knows the value, to look for it: it must not be where the value can be found.
    memory::set_dumpable(false).map_err(|e| failed(&e))?;
    memory::forbid_core_dumps().map_err(|e| failed(&e))?;
    // What outlives a killed sublet comes here, so that nothing can be left unseen.
    process::adopt_orphans().map_err(|e| failed(&e))?;
    let signals = process::signalfd(&ENDING).map_err(|e| failed(&e))?;

    let place = Place::make()?;
    let sublet = Sublet::new(&place)?;
    let mut tale = Tale::begin(json, &place)?;
    let told = tell(&mut tale, &sublet, &signals);
    // In failure as well. If both fail, the first failure is the one to know of.
    let removed = place.remove();
    told?;
    removed?;
    tale.end()?;
    Ok(YES)
}

fn tell(tale: &mut Tale, sublet: &Sublet<'_>, signals: &OwnedFd) -> Result<(), Failure> {
    for step in steps::ALL {
        step(tale, sublet)?;
        stop_if_asked(signals)?;
    }
    Ok(())
}

fn stop_if_asked(signals: &OwnedFd) -> Result<(), Failure> {
    match process::read_signal(signals) {
        Ok(None) => Ok(()),
        Ok(Some(signal)) => {
            let status = u8::try_from(128 + signal).unwrap_or(u8::MAX);
            Err(Failure::new("demo", "interrupted", "the demo was interrupted").exit(status))
        }
        Err(e) => {
            Err(Failure::new("demo", "signals_unreadable", "cannot read signals").because(&e))
        }
    }
}
