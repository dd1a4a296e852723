//! Minters, launcher's side: for a source that makes a fresh value, starts sublet's own program as a process
//! of its own, with less than any other: the only one of sublet's that connects to anything.
//!
//! The launcher writes what the source is (from root's configuration, read by itself) into memory that it
//! seals; the broker's request and the room for the answer are memory of the broker's, passed on unread. So
//! a compromised broker can have any configured source asked, and no other address.
//!
//! The minter gets a uid of the pool (rootless: the caller's), its own pid and ipc namespaces, no capability,
//! no new privileges, a new session and keyring, an empty environment, `/`, the host's network, limits, and a
//! deadline after which it is killed. Its other walls it puts up by itself before it reads what the broker
//! wrote (`minter/walls.rs`).
#![forbid(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::Errno;

use super::source::{Helper, HelperKind, refusal};
use super::wire::Refusal;
use crate::config::{BrokerWall, HostConfig, Minted, SecretSource, Settings};
use crate::model::mint;
use crate::model::name::SecretName;
use crate::sandbox::identity::{self, Mode};
use crate::sys::exec::{self, StringVector};
use crate::sys::process::{self, CloneArgs, Cloned};
use crate::sys::{clock, ids};

/// The descriptors of a minter, beside standard error, which is nowhere.
pub const REQUEST: i32 = 0;
pub const REPLY: i32 = 1;
pub const SETTINGS: i32 = 3;

/// What a minter may have of everything. It needs far less.
const LIMITS: [(u32, u64); 4] = [
    (libc::RLIMIT_CORE, 0),
    (libc::RLIMIT_NOFILE, 64),
    (libc::RLIMIT_AS, 1 << 30),
    (libc::RLIMIT_CPU, 60),
];

/// What every minter is started from: made once, when the launcher settles.
pub struct Program(OwnedFd);

impl Program {
    /// This process's own program, whatever lies at its path later.
    pub fn own() -> io::Result<Self> {
        Ok(Self(File::open("/proc/self/exe")?.into()))
    }
}

/// What root's configuration says of the source.
pub fn settings<'a>(config: &'a HostConfig, secret: &SecretName) -> Result<&'a Minted, Refusal> {
    match config.secrets.get(secret).map(|entry| &entry.source) {
        Some(SecretSource::Minted(minted)) => Ok(minted),
        Some(source) => Err(refusal(
            secret,
            format!("source `{}` is not asked by a minter", source.as_str()),
            "the configuration has changed: start what reads it again",
        )),
        None => Err(refusal(
            secret,
            "the configuration has no such secret".to_owned(),
            "add [secrets]; what it has minted is revoked when it is there again, or expires",
        )),
    }
}

pub fn start(
    program: &Program,
    config: &HostConfig,
    mode: Mode,
    secret: &SecretName,
    fds: Vec<OwnedFd>,
) -> Result<Helper, Refusal> {
    let minted = settings(config, secret)?;
    let Ok([request, reply]) = <[OwnedFd; 2]>::try_from(fds) else {
        return Err(refusal(secret, "the order came without its memory".to_owned(), ""));
    };
    let failed = |e: io::Error| {
        refusal(
            secret,
            format!("could not start a minter: {e}"),
            "`sublet doctor` says what this host lacks",
        )
    };
    let uid = match mode {
        Mode::Privileged => Some(
            identity::take_uid(config.host.uid_pool).map_err(|e| failed(io::Error::other(e)))?,
        ),
        Mode::Rootless => None,
    };
    let (uid, slot) = uid.map_or((None, None), |(uid, slot)| (Some(uid), Some(slot)));
    let told = Settings {
        source: minted.clone(),
        without_landlock: config.host.waive.contains(&BrokerWall::Landlock),
    };
    let started =
        memory_of(&told).and_then(|settings| launch(program, [request, reply, settings], uid));
    let (pid, pidfd) = started.map_err(failed)?;
    let deadline = clock::boottime() + minted.timeout;
    Ok(Helper {
        secret: secret.clone(),
        pidfd,
        pid,
        deadline,
        kind: HelperKind::Minter { _slot: slot },
    })
}

/// The settings, in memory that nobody changes any more.
fn memory_of(settings: &Settings) -> io::Result<OwnedFd> {
    let mut text = vec![0; 64 << 10];
    mint::lay(settings, &mut text).map_err(io::Error::other)?;
    let memfd = rustix::fs::memfd_create(
        c"sublet-source",
        MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING,
    )?;
    io::Write::write_all(&mut File::from(memfd.try_clone()?), &text)?;
    let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&memfd, seals)?;
    Ok(memfd)
}

fn launch(
    program: &Program,
    [request, reply, settings]: [OwnedFd; 3],
    uid: Option<u32>,
) -> io::Result<(i32, OwnedFd)> {
    let argv = StringVector::new(vec![c"sublet".to_owned(), c"mint".to_owned()]);
    let envp = StringVector::new(Vec::new());
    let null = File::options().read(true).write(true).open("/dev/null")?;
    // Out of the way of the numbers that they get.
    let above = |fd: &OwnedFd| rustix::io::fcntl_dupfd_cloexec(fd, 16);
    let (request, reply, settings) = (above(&request)?, above(&reply)?, above(&settings)?);
    let null = rustix::io::fcntl_dupfd_cloexec(&null, 16)?;
    let program = rustix::io::fcntl_dupfd_cloexec(&program.0, 16)?;
    let args = CloneArgs {
        namespaces: (libc::CLONE_NEWPID | libc::CLONE_NEWIPC) as u64,
        ..CloneArgs::default()
    };
    match process::clone3(&args)? {
        Cloned::Child => {
            let step = || -> Result<(), Errno> {
                rustix::process::setsid()?;
                rustix::process::chdir(c"/")?;
                process::duplicate_to(request.as_fd().as_raw_fd(), REQUEST)?;
                process::duplicate_to(reply.as_fd().as_raw_fd(), REPLY)?;
                process::duplicate_to(null.as_fd().as_raw_fd(), 2)?;
                process::duplicate_to(settings.as_fd().as_raw_fd(), SETTINGS)?;
                process::close_on_exec_from(SETTINGS as u32 + 1)?;
                rustix::process::umask(rustix::fs::Mode::from(0o077));
                for (resource, most) in LIMITS {
                    ids::limit(resource, most, most)?;
                }
                if let Some(uid) = uid {
                    // All that it maps may be locked, where root may say so.
                    let most = Some(LIMITS[2].1);
                    let limit = rustix::process::Rlimit { current: most, maximum: most };
                    match rustix::process::setrlimit(rustix::process::Resource::Memlock, limit) {
                        Ok(()) | Err(Errno::PERM) => {}
                        Err(e) => return Err(e),
                    }
                    ids::become_user(uid, uid, true)?;
                }
                ids::drop_bounding_set()?;
                ids::drop_all_capabilities()?;
                match process::join_new_session_keyring() {
                    // A kernel without keyrings, or a container that forbids them.
                    Ok(()) | Err(Errno::NOSYS | Errno::PERM) => {}
                    Err(e) => return Err(e),
                }
                process::set_no_new_privileges()?;
                // Last: a change of credentials clears it. Then see that it was not too late.
                process::die_with_parent()?;
                process::unblock_signals()
            };
            if step().is_ok() {
                exec::execute(&program, &argv, &envp);
            }
            process::exit_now(127)
        }
        Cloned::Parent { pid, pidfd } => Ok((pid, pidfd)),
    }
}
