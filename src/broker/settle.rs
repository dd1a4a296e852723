//! Settling as the broker: what the process needs is opened, then everything else is given up for good.
//!
//! Receives the host's configuration in a process of one thread, after the launcher was forked; returns
//! the sockets, the vault's key and what was enforced. Touches the state's and the sockets' directories.
//! Must never return with a wall that is not there: after each restriction the forbidden thing is tried,
//! and what still works is an error.
//!
//! - `state`: the state's files become the broker's, the state's directory stays root's
//! - `sockets`: the directory of the sockets, the control socket, the directory of the runs' sockets
//! - [`manager`]: systemd, told and asked through a socket that was opened before
//! - `walls`: what is given up, and in which order; `landlock` and `attempt` are parts of it
//! - [`posture`]: what was enforced, by what
#![forbid(unsafe_code)]

mod attempt;
mod landlock;
pub mod manager;
pub mod posture;
mod sockets;
mod state;
mod walls;

use std::io;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use crate::audit;
use crate::config::BrokerWall;
use crate::host::keyfile::{self, KeyFileError};
use crate::host::{Account, AccountError, Host};
use crate::identity::IssuerKeys;
use crate::run::ledger::Keys;
use crate::sandbox::identity::{self, IdentityError, Mode};
use crate::source::vault::{KeySource, VaultError};

pub use manager::ServiceManager;
pub use posture::{ControlFrom, Posture, Wall};

/// What the process is to be the broker of.
#[derive(Debug, Clone, Copy)]
pub struct Settlement<'a> {
    pub host: &'a Host,
    /// `--runtime-dir`, else [`Host::runtime_dir`]. Absolute.
    pub runtime_dir: &'a Path,
    /// `$CREDENTIALS_DIRECTORY`, which only root may read.
    pub credentials: Option<&'a Path>,
}

/// The broker's process, with what it may still use. To be kept as long as it serves: with it go the
/// locks by which no second broker serves the same state or sockets.
#[must_use]
pub struct Settled {
    /// Listens; who may connect is the business of its mode, 0600.
    pub control: UnixListener,
    /// Where that is, as clients name it.
    pub control_path: PathBuf,
    /// The broker's own, mode 0700: the place of `RUN_ID/agent.sock`. May hold what an earlier broker left.
    pub runs_dir: PathBuf,
    /// The vault's key and the issuer's, be they files of the state or credentials of systemd's.
    pub keys: Keys,
    /// The same of the key that signs.
    pub signing: keyfile::KeySource,
    pub manager: ServiceManager,
    /// For the event `broker.started` and the service's log.
    pub posture: Posture,
    _state: state::Taken,
    _place: sockets::Place,
    _uid: Option<std::os::fd::OwnedFd>,
}

#[derive(Debug, thiserror::Error)]
pub enum SettleError {
    #[error("could not settle as a broker: {doing}")]
    Step { doing: &'static str, source: io::Error },
    #[error("a broker settles in a process of one thread, and this one has {threads}")]
    Threads { threads: usize },
    #[error(transparent)]
    Account(#[from] AccountError),
    #[error(
        "[host] user names `{name}`, and this process may not become another user; start it with all capabilities of root, or leave the key out"
    )]
    CannotBecome { name: String },
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error(transparent)]
    Key(#[from] VaultError),
    #[error(transparent)]
    IssuerKey(#[from] KeyFileError),
    #[error("{path} could not be {doing}")]
    Place { path: PathBuf, doing: &'static str, source: io::Error },
    #[error("refused to serve from {path}: it {fault}; {mend}")]
    Unsafe { path: PathBuf, fault: String, mend: String },
    #[error("another broker serves {path}; end it first (systemctl stop sublet)")]
    Busy { path: PathBuf },
    #[error(
        "the broker's user (uid {uid}) cannot use {path}; let it pass through every directory above (chmod o+x), or choose another place"
    )]
    Unreachable { path: PathBuf, uid: u32, source: io::Error },
    #[error(
        "the broker's user (uid {uid}) cannot read {path}; let it (chmod o+r, or chgrp and chmod g+r): policy is no secret"
    )]
    Unreadable { path: PathBuf, uid: u32, source: io::Error },
    #[error(
        "systemd handed over {found} instead of one listening Unix stream socket; see docs/systemd/sublet.socket"
    )]
    Activation { found: String },
    #[error("could not reach the service manager at {socket}")]
    Manager { socket: String, source: io::Error },
    #[error(
        "this kernel has no Landlock, which walls off the host's files, TCP, signals and abstract sockets from the broker; boot with lsm=landlock,… (Linux 5.13), or do without: [host] waive = [\"landlock\"]"
    )]
    NoLandlock,
    #[error("could not make or enforce the broker's landlock ruleset")]
    Landlock(#[source] ::landlock::RulesetError),
    #[error("the filter seccomp/broker.json is not built in")]
    NoFilter,
    #[error("gave up {wall}, and could still {attempt}: {outcome}")]
    StillPossible { wall: &'static str, attempt: &'static str, outcome: String },
}

/// Becomes the broker, for good.
///
/// Call it after the launcher was forked and before any thread exists. Needs the process's environment as
/// systemd gave it (`LISTEN_*`, `NOTIFY_SOCKET`, `WATCHDOG_*`). Afterwards nothing but the state, the
/// runs' sockets, and for reading the configuration can be opened, and nothing can be started, connected
/// to, signalled or mounted. Threads that are made later have the same walls.
///
/// # Errors
/// The process must end then: it may have given up a part already.
pub fn settle(settlement: &Settlement<'_>) -> Result<Settled, SettleError> {
    let host = settlement.host;
    walls::refuse_threads()?;
    let account = account(host)?;
    walls::close_to_others()?;
    walls::raise_limits()?;
    // Kept for all that comes: it cannot be read afterwards.
    crate::host::now().map_err(walls::failed("read the clocks"))?;

    // With the rights that this process started with: everything that is needed, opened or made.
    let state = state::take_over(&host.state_dir, account)?;
    let place = sockets::open(settlement.runtime_dir, account)?;
    let (control, control_from) = sockets::listen(&place)?;
    let keys = Keys {
        vault: KeySource::open(&host.state_dir, settlement.credentials)?,
        issuer: IssuerKeys::open(&host.state_dir, settlement.credentials)?,
    };
    let signing = audit::key::open(&host.state_dir, settlement.credentials)?;
    let manager = ServiceManager::of_environment()?;
    let uid = match Mode::detect(host.config.host.uid_pool)? {
        Mode::Privileged => Some(identity::hold_uid(account.uid)?),
        Mode::Rootless => None,
    };
    let ruleset = landlock::prepare(host, &state, &place)?;
    if ruleset.is_none() && !host.config.host.waive.contains(&BrokerWall::Landlock) {
        return Err(SettleError::NoLandlock);
    }

    // Given up, one after the other. The filter is last: it need not allow what the others take.
    walls::become_account(account)?;
    walls::drop_capabilities()?;
    walls::forget_keyrings()?;
    walls::refuse_new_privileges()?;
    state::see_it_usable(&state, host, account)?;
    let landlock_abi = landlock::enforce(ruleset)?;
    walls::filter_system_calls()?;

    let posture = Posture::of(account, landlock_abi, control_from);
    Ok(Settled {
        control_path: sockets::path_of(&control, &place),
        control,
        runs_dir: place.runs(),
        keys,
        signing,
        manager,
        posture,
        _state: state,
        _place: place,
        _uid: uid,
    })
}

/// Whose the broker is to be. One that is started by an ordinary user is that user's.
fn account(host: &Host) -> Result<Account, SettleError> {
    let is_root = rustix::process::geteuid().is_root();
    match (Mode::detect(host.config.host.uid_pool)?, &host.config.host.user) {
        (Mode::Privileged, _) => Ok(host.broker_account()?),
        (Mode::Rootless, Some(name)) if is_root => {
            Err(SettleError::CannotBecome { name: name.clone() })
        }
        (Mode::Rootless, _) => Ok(Account::of_caller()),
    }
}
