//! The broker's Landlock ruleset: state and runs' sockets for writing, configuration for reading, nothing
//! else; no TCP, no abstract sockets and no signals to anyone outside. landlock(7).
//!
//! Places are opened while the process may still open them; what is forbidden is tried after.
#![forbid(unsafe_code)]

use std::io;
use std::net::TcpStream;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd,
    Ruleset, RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetStatus, Scope,
};

use super::attempt::Attempt;
use super::sockets::Place;
use super::state::Taken;
use super::{SettleError, walls};
use crate::host::Host;
use crate::sys;

/// What the broker reads besides its configuration: the random bytes that SQLite takes for its log's salt.
const READ: [&str; 1] = ["/dev/urandom"];

/// Ready to be enforced.
pub(super) struct Prepared {
    ruleset: RulesetCreated,
    abi: u32,
    /// An abstract socket from before the wall: it can be reached until there is one.
    outside: Outside,
}

struct Outside {
    address: SocketAddr,
    _listener: UnixListener,
}

/// Makes the ruleset. Nothing where the kernel has no Landlock.
pub(super) fn prepare(
    host: &Host,
    state: &Taken,
    place: &Place,
) -> Result<Option<Prepared>, SettleError> {
    let number = sys::landlock::abi_version();
    let Some(abi) = abi(number) else { return Ok(None) };
    let mut ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(AccessFs::from_all(abi))
        .map_err(SettleError::Landlock)?;
    if abi >= ABI::V4 {
        ruleset = ruleset.handle_access(AccessNet::from_all(abi)).map_err(SettleError::Landlock)?;
    }
    if abi >= ABI::V6 {
        ruleset = ruleset.scope(Scope::from_all(abi)).map_err(SettleError::Landlock)?;
    }
    let mut ruleset = ruleset.create().map_err(SettleError::Landlock)?;
    for (path, rights) in rules(host, state, place) {
        let Some(fd) = open(&path)? else { continue };
        let rights = rights & AccessFs::from_all(abi);
        ruleset = ruleset.add_rule(PathBeneath::new(fd, rights)).map_err(SettleError::Landlock)?;
    }
    Ok(Some(Prepared { ruleset, abi: number, outside: Outside::listen()? }))
}

fn rules(host: &Host, state: &Taken, place: &Place) -> Vec<(PathBuf, BitFlags<AccessFs>)> {
    let read_file = BitFlags::from(AccessFs::ReadFile);
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    // Files and directories; no device, no fifo, no link that leads elsewhere, nothing to execute.
    let files = AccessFs::WriteFile
        | AccessFs::Truncate
        | AccessFs::MakeReg
        | AccessFs::RemoveFile
        | AccessFs::MakeDir
        | AccessFs::RemoveDir;
    let sockets = AccessFs::ReadDir
        | AccessFs::MakeDir
        | AccessFs::RemoveDir
        | AccessFs::MakeSock
        | AccessFs::RemoveFile;
    // The state's own directory for the trail's head, which the launcher writes.
    let mut rules = vec![(state.dir.clone(), read), (place.runs(), sockets)];
    if host.config.hook.project_token {
        rules.push((place.runs(), read | files));
    }
    rules.push((place.containers(), read));
    rules.extend(state.owned().map(|owned| (owned, read | files)));
    rules.extend(host.config_file.iter().map(|file| (file.clone(), read_file)));
    rules.extend(host.profile_directories().iter().map(|dir| (dir.clone(), read)));
    rules.extend(READ.iter().map(|file| (PathBuf::from(file), read_file)));
    rules
}

/// What is not there cannot be permitted; what is made there later stays closed.
fn open(path: &Path) -> Result<Option<PathFd>, SettleError> {
    if !path.exists() {
        return Ok(None);
    }
    PathFd::new(path).map(Some).map_err(|e| SettleError::Place {
        path: path.to_owned(),
        doing: "opened for a landlock rule",
        source: io::Error::other(e),
    })
}

/// Puts the wall up and tries it. The ABI that it has; 0 where there is none.
pub(super) fn enforce(prepared: Option<Prepared>) -> Result<u32, SettleError> {
    let Some(Prepared { ruleset, abi, outside }) = prepared else { return Ok(0) };
    let status = ruleset.restrict_self().map_err(SettleError::Landlock)?;
    if status.ruleset != RulesetStatus::FullyEnforced {
        let outcome = format!("{:?}", status.ruleset);
        let (wall, attempt) = ("landlock", "do what a part of the ruleset forbids");
        return Err(SettleError::StillPossible { wall, attempt, outcome });
    }
    let attempt = |what, refusals| Attempt { wall: "landlock", what, refusals };
    attempt("list the root directory", &[libc::EACCES]).must_fail(std::fs::read_dir("/"))?;
    attempt("open /etc/passwd", &[libc::EACCES, libc::ENOENT])
        .must_fail(std::fs::File::open("/etc/passwd"))?;
    if abi >= 4 {
        // No one need listen: the wall answers first.
        attempt("connect over TCP", &[libc::EACCES, libc::EAFNOSUPPORT])
            .must_fail(TcpStream::connect(("127.0.0.1", 9)))?;
    }
    if abi >= 6 {
        attempt("reach an abstract socket", &[libc::EPERM])
            .must_fail(UnixStream::connect_addr(&outside.address))?;
        if let Some(parent) = rustix::process::getppid() {
            attempt("signal its parent", &[libc::EPERM])
                .must_fail(rustix::process::test_kill_process(parent))?;
        }
    }
    Ok(abi)
}

impl Outside {
    fn listen() -> Result<Self, SettleError> {
        let listen = || -> io::Result<Self> {
            let random = crate::sys::random::random_u64()?;
            let name = format!("sublet-{}-{random:016x}", std::process::id());
            let address = SocketAddr::from_abstract_name(name)?;
            let listener = UnixListener::bind_addr(&address)?;
            Ok(Self { address, _listener: listener })
        };
        listen().map_err(walls::failed("make an abstract socket to try the wall with"))
    }
}

/// The newest ABI that both this kernel and the crate know.
fn abi(number: u32) -> Option<ABI> {
    Some(match number {
        0 => return None,
        1 => ABI::V1,
        2 => ABI::V2,
        3 => ABI::V3,
        4 => ABI::V4,
        5 => ABI::V5,
        6 => ABI::V6,
        7 => ABI::V7,
        8 => ABI::V8,
        9 => ABI::V9,
        _ => ABI::V10,
    })
}
