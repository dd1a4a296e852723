//! What the minter gives up before it reads what the broker wrote. The launcher has taken its user,
//! capabilities, keyrings and new privileges already; here go core files, swap, files, ports, and every
//! system call that it does not need. After each wall the forbidden thing is tried, and must fail.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io;
use std::net::TcpStream;
use std::path::Path;

use landlock::{
    Access, AccessFs, AccessNet, CompatLevel, Compatible, NetPort, PathBeneath, PathFd, Ruleset,
    RulesetAttr, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};
use rustix::mm::MlockAllFlags;

use crate::config::Settings;
use crate::model::mint::{Failure, Fault};
use crate::sandbox::landlock::crate_abi;
use crate::sandbox::seccomp as filters;
use crate::sys::{landlock as abi, memory, seccomp};

/// What name resolution reads: resolv.conf(5), hosts(5), nsswitch.conf(5), gai.conf(5), host.conf(5).
const READ: [&str; 5] =
    ["/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf", "/etc/gai.conf", "/etc/host.conf"];

/// Of a name server, where an answer is too long for a datagram.
const DNS: u16 = 53;

/// # Errors
/// A wall does not stand: nothing may be read or asked.
pub fn raise(settings: &Settings) -> Result<(), Failure> {
    let unprotected = |_| Failure::of(Fault::Walls);
    memory::forbid_core_dumps().map_err(unprotected)?;
    see_it_is_nobody()?;
    // Within the limit that the launcher could give: an ordinary user's may be too small, and then what is
    // here may be swapped for the moment that it lives. SECURITY.md says so.
    let all = MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT;
    match rustix::mm::mlockall(all) {
        Ok(()) | Err(_) => {}
    }
    match abi::abi_version() {
        0 if settings.without_landlock => {}
        0 => return Err(Failure::of(Fault::Walls)),
        number => {
            restrict(settings, number).map_err(|_| Failure::of(Fault::Walls))?;
            try_landlock(settings, number).map_err(unprotected)?;
        }
    }
    let filter = filters::builtin("minter").ok_or(Failure::of(Fault::Walls))?;
    seccomp::install(filter.as_slice()).map_err(unprotected)?;
    try_seccomp().map_err(unprotected)
}

/// No capability, and none to be gained: the launcher saw to that.
fn see_it_is_nobody() -> Result<(), Failure> {
    let unprotected = || Failure::of(Fault::Walls);
    for set in [caps::CapSet::Effective, caps::CapSet::Permitted, caps::CapSet::Bounding] {
        if !caps::read(None, set).map_err(|_| unprotected())?.is_empty() {
            return Err(unprotected());
        }
    }
    match rustix::thread::no_new_privs() {
        Ok(true) => Ok(()),
        Ok(false) | Err(_) => Err(unprotected()),
    }
}

fn restrict(settings: &Settings, number: u32) -> Result<(), RulesetError> {
    let abi = crate_abi(number);
    let mut ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(AccessFs::from_all(abi))?;
    if number >= 4 {
        ruleset = ruleset.handle_access(AccessNet::from_all(abi))?;
    }
    if number >= 6 {
        ruleset = ruleset.scope(Scope::from_all(abi))?;
    }
    let mut created = ruleset.create()?;
    for path in READ.iter().filter(|path| Path::new(path).exists()) {
        // One that cannot be opened stays closed: then names are resolved without it, or not at all.
        if let Ok(fd) = PathFd::new(path) {
            created = created.add_rule(PathBeneath::new(fd, AccessFs::ReadFile))?;
        }
    }
    if number >= 4 {
        let ports = settings.source.kind.urls().into_iter().map(|url| url.port);
        for port in ports.chain([DNS]) {
            created = created.add_rule(NetPort::new(port, AccessNet::ConnectTcp))?;
        }
    }
    let status = created.restrict_self()?;
    debug_assert_eq!(status.ruleset, RulesetStatus::FullyEnforced);
    Ok(())
}

fn try_landlock(settings: &Settings, number: u32) -> io::Result<()> {
    must_fail(std::fs::read_dir("/"), &[libc::EACCES])?;
    must_fail(File::open("/etc/passwd"), &[libc::EACCES, libc::ENOENT])?;
    let urls = settings.source.kind.urls();
    // No one need listen: the wall answers first.
    let closed = (1..=9).find(|port| urls.iter().all(|url| url.port != *port));
    if let (Some(port), true) = (closed, number >= 4) {
        let refusals = [libc::EACCES, libc::EAFNOSUPPORT];
        must_fail(TcpStream::connect(("127.0.0.1", port)), &refusals)?;
    }
    Ok(())
}

fn try_seccomp() -> io::Result<()> {
    use rustix::net::{AddressFamily, SocketType, socket};
    const NOTHING: &[&std::ffi::CStr] = &[];
    seccomp::see_it_refused()?;
    // The empty path would be ENOENT.
    must_fail(nix::unistd::execve(c"", NOTHING, NOTHING), &[libc::EPERM])?;
    must_fail(socket(AddressFamily::UNIX, SocketType::STREAM, None), &[libc::EAFNOSUPPORT])?;
    must_fail(rustix::process::test_kill_process(rustix::process::getpid()), &[libc::EPERM])
}

/// # Errors
/// It worked, or failed of something else, which would prove nothing.
fn must_fail<T>(attempt: Result<T, impl Into<io::Error>>, refusals: &[i32]) -> io::Result<()> {
    match attempt.map_err(Into::into) {
        Err(e) if e.raw_os_error().is_some_and(|number| refusals.contains(&number)) => Ok(()),
        Err(e) => Err(e),
        Ok(_) => Err(io::ErrorKind::PermissionDenied.into()),
    }
}
