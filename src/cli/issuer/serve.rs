//! `sublet issuer serve`: two processes. One may read the issuer and speaks to nobody; it hands what is
//! public to the other, which speaks to everybody and can open nothing.
#![forbid(unsafe_code)]

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, CompatLevel, Compatible as _, Ruleset, RulesetAttr as _,
    RulesetStatus, Scope,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::json;

use super::{failure, public, words};
use crate::cli::fail::{Answer, Failure, YES};
use crate::cli::output::Output;
use crate::cli::{Globals, load};
use crate::identity::Issuer;
use crate::identity::serve::{Published, serve};
use crate::sys::process::Forked;
use crate::sys::{ids, landlock as kernel, memory, process};

/// Between two looks at the issuer: a new key has hours.
const LOOK_AGAIN: Duration = Duration::from_secs(2);
/// Whom root becomes: the one who owns nothing.
const NOBODY: u32 = 65_534;

#[derive(Debug, clap::Args)]
#[command(after_long_help = words::SERVE)]
pub struct ServeArgs {
    /// Where to listen: an address and a port
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:8085")]
    pub listen: SocketAddr,
    /// Serve although this kernel has no Landlock to take the host's files away with
    #[arg(long, value_name = "WALL", value_parser = ["landlock"])]
    pub waive: Vec<String>,
}

pub(super) fn execute(globals: &Globals, args: &ServeArgs) -> Answer {
    let (host, issuer) = public(globals)?;
    let failed = |doing: &'static str| {
        move |e: io::Error| {
            Failure::new("issuer", "not_served", format!("could not {doing}")).because(&e)
        }
    };
    let listener = TcpListener::bind(args.listen).map_err(failed("listen"))?;
    let address = listener.local_addr().map_err(failed("listen"))?;
    let (reader, speaker) = UnixStream::pair().map_err(failed("make a socket pair"))?;
    let published = Published::of(&issuer, load::now()?.wall);
    match process::fork().map_err(failed("fork"))? {
        Forked::Child => {
            drop(reader);
            let waived = args.waive.iter().any(|w| w == "landlock");
            let told = confine(waived).and_then(|()| speak(&listener, speaker, published));
            if let Err(e) = told {
                failed("confine the process that answers")(e).report(globals.json);
            }
            process::exit_now(2)
        }
        Forked::Parent { pid: _ } => {
            drop((listener, speaker));
            let mut output = Output::new(globals.json);
            if output.json {
                output.object(&json!({ "listening": address, "issuer": issuer.url }))?;
            } else {
                output.line(format!("serving {} on http://{address}", issuer.url))?;
            }
            output.finish()?;
            watch(&host.state_dir, &reader, published)
        }
    }
}

/// Reads the issuer now and then, and hands over what has changed. Ends with the other.
fn watch(state_dir: &Path, speaker: &UnixStream, mut last: Published) -> Answer {
    loop {
        let mut fds = [PollFd::new(speaker, PollFlags::IN)];
        let wait = Timespec { tv_sec: LOOK_AGAIN.as_secs() as i64, tv_nsec: 0 };
        match poll(&mut fds, Some(&wait)) {
            // It says nothing: this is its end.
            Ok(1..) => {
                return Err(Failure::new(
                    "issuer",
                    "not_served",
                    "the process that answers has ended",
                )
                .hint("its own words stand above"));
            }
            Ok(0) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => {
                return Err(Failure::new("issuer", "not_served", "could not wait")
                    .because(&io::Error::from(e)));
            }
        }
        match Issuer::get(state_dir) {
            Ok(issuer) => {
                let now = Published::of(&issuer, load::now()?.wall);
                if now != last && now.send(speaker).is_ok() {
                    last = now;
                }
            }
            // What was published last still holds.
            Err(e) => failure(&e).note(),
        }
    }
}

fn speak(listener: &TcpListener, reader: UnixStream, first: Published) -> io::Result<()> {
    let published = Arc::new(RwLock::new(first));
    let behind = Arc::clone(&published);
    std::thread::Builder::new().stack_size(256 << 10).spawn(move || {
        loop {
            match Published::receive(&reader) {
                Ok(next) => *behind.write().unwrap_or_else(PoisonError::into_inner) = next,
                // The reader is gone, by a signal for both.
                Err(_) => process::exit_now(i32::from(YES)),
            }
        }
    })?;
    serve(listener, &published)
}

/// Gives up everything but the descriptors that are open.
fn confine(waived: bool) -> io::Result<()> {
    memory::forbid_core_dumps()?;
    if rustix::process::geteuid().is_root() {
        ids::become_user(NOBODY, NOBODY, true)?;
        ids::drop_bounding_set()?;
        ids::drop_all_capabilities()?;
    }
    process::set_no_new_privileges()?;
    let abi = match kernel::abi_version() {
        0 if waived => return Ok(()),
        0 => {
            return Err(io::Error::other(
                "this kernel has no Landlock, which takes the host's files away; `--waive landlock` does \
                 without",
            ));
        }
        1 => ABI::V1,
        2 => ABI::V2,
        3 => ABI::V3,
        4 => ABI::V4,
        5 => ABI::V5,
        _ => ABI::V6,
    };
    let enforce = || -> Result<RulesetStatus, landlock::RulesetError> {
        let mut rules = Ruleset::default()
            .set_compatibility(CompatLevel::HardRequirement)
            .handle_access(AccessFs::from_all(abi))?;
        if abi >= ABI::V4 {
            rules = rules.handle_access(AccessNet::from_all(abi))?;
        }
        if abi >= ABI::V6 {
            rules = rules.scope(Scope::from_all(abi))?;
        }
        Ok(rules.create()?.restrict_self()?.ruleset)
    };
    let status = enforce().map_err(io::Error::other)?;
    // Tried, as every wall is.
    let still_open = std::fs::File::open("/proc/self/status").is_ok();
    if status != RulesetStatus::FullyEnforced || still_open {
        return Err(io::Error::other("landlock was put up, and files can still be opened"));
    }
    Ok(())
}
