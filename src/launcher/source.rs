//! `file` and `command` sources, launcher's side: opens the file, or runs the command as an exec of its
//! own, and hands the broker a descriptor to read. Reads no value itself.
//!
//! A `command` source is the host's own program, named in root's configuration: it runs as the launcher's
//! user, outside of any sandbox profile, but in its own pid namespace, with an empty environment, in `/`,
//! with no input, no terminal, its standard error discarded, and a deadline after which its tree is killed.
#![forbid(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

use rustix::io::Errno;

use super::wire::{Refusal, RefusalKind};
use crate::config::{HostConfig, SecretSource};
use crate::model::name::SecretName;
use crate::sys::exec::{self, StringVector};
use crate::sys::process::{self, CloneArgs, Cloned};

/// A source whose bytes can be read now.
pub struct Opened {
    pub reader: OwnedFd,
    pub helper: Option<Helper>,
}

/// The running command of a `command` source, or a minter.
pub struct Helper {
    pub secret: SecretName,
    pub pidfd: OwnedFd,
    pub pid: i32,
    /// `CLOCK_BOOTTIME` at which it is killed.
    pub deadline: Duration,
    pub kind: HelperKind,
}

pub enum HelperKind {
    /// Of a `command` source.
    Command,
    /// With its uid, where it has one of its own: nobody else's until it is reaped.
    Minter { _slot: Option<OwnedFd> },
}

pub(super) fn refusal(secret: &SecretName, why: String, hint: &str) -> Refusal {
    Refusal {
        kind: RefusalKind::SourceUnavailable,
        message: format!("the source of secret `{secret}` is not available: {why}"),
        hint: hint.to_owned(),
    }
}

pub fn open(config: &HostConfig, secret: &SecretName) -> Result<Opened, Refusal> {
    let Some(entry) = config.secrets.get(secret) else {
        return Err(refusal(
            secret,
            "the configuration has no such secret".into(),
            "add [secrets]",
        ));
    };
    match &entry.source {
        SecretSource::Vault => Err(refusal(
            secret,
            "it lies in the vault".into(),
            "the broker opens the vault by itself",
        )),
        SecretSource::Jwt(_) | SecretSource::SshCa(_) => {
            Err(refusal(secret, "the broker makes it".into(), "the broker signs by itself"))
        }
        SecretSource::Minted(_) => Err(refusal(
            secret,
            "its values are minted, and nothing of it can be opened".into(),
            "the configuration has changed: start what reads it again",
        )),
        SecretSource::File { path } => open_file(secret, path),
        SecretSource::Command { command, timeout } => {
            run(secret, command, timeout.0).map_err(|e| {
                refusal(
                    secret,
                    format!("could not run {}: {e}", command[0]),
                    "check the path and its mode",
                )
            })
        }
    }
}

fn open_file(secret: &SecretName, path: &Path) -> Result<Opened, Refusal> {
    let shown = path.display();
    let opened = OpenOptions::new()
        .read(true)
        // A fifo would hang, a device surprise.
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY | libc::O_CLOEXEC)
        .open(path)
        .and_then(|file| Ok((file.metadata()?, file)));
    match opened {
        Err(e) => Err(refusal(secret, format!("{shown}: {e}"), "check `path` of this secret")),
        Ok((found, _)) if !found.is_file() => {
            Err(refusal(secret, format!("{shown} is no regular file"), "name a file"))
        }
        Ok((found, _)) if found.mode() & 0o007 != 0 => Err(refusal(
            secret,
            format!("{shown} is open to every user (mode {:o})", found.mode() & 0o7777),
            &format!("chmod o= {shown}"),
        )),
        Ok((_, file)) => Ok(Opened { reader: file.into(), helper: None }),
    }
}

fn run(secret: &SecretName, command: &[String], timeout: Duration) -> io::Result<Opened> {
    let c_string = |s: &str| std::ffi::CString::new(s).map_err(io::Error::other);
    let program = c_string(&command[0])?;
    let argv = StringVector::new(command.iter().map(|a| c_string(a)).collect::<Result<_, _>>()?);
    let path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    let envp =
        StringVector::new(vec![c_string(path)?, c_string("LANG=C.UTF-8")?, c_string("HOME=/")?]);
    let null = File::options().read(true).write(true).open("/dev/null")?;
    let (reader, writer) = io::pipe()?;
    let writer: OwnedFd = writer.into();
    let args = CloneArgs {
        namespaces: (libc::CLONE_NEWPID | libc::CLONE_NEWIPC) as u64,
        ..CloneArgs::default()
    };
    match process::clone3(&args)? {
        Cloned::Child => {
            let step = || -> Result<(), Errno> {
                process::die_with_parent()?;
                rustix::process::setsid()?;
                // The caller's directory may be a hostile workspace, with configuration for this program.
                rustix::process::chdir(c"/")?;
                process::duplicate_to(null.as_raw_fd(), 0)?;
                process::duplicate_to(null.as_raw_fd(), 2)?;
                process::duplicate_to(writer.as_fd().as_raw_fd(), 1)?;
                process::close_on_exec_from(3)?;
                rustix::process::umask(rustix::fs::Mode::from(0o077));
                process::set_no_new_privileges()?;
                process::unblock_signals()
            };
            if step().is_ok() {
                exec::execve(&program, &argv, &envp);
            }
            process::exit_now(127)
        }
        Cloned::Parent { pid, pidfd } => Ok(Opened {
            reader: reader.into(),
            helper: Some(Helper {
                secret: secret.clone(),
                pidfd,
                pid,
                deadline: crate::sys::clock::boottime() + timeout,
                kind: HelperKind::Command,
            }),
        }),
    }
}

/// How a helper ended, for the broker: nothing, or why its output is not to be used.
pub type HelperEnd = Option<Refusal>;

impl Helper {
    /// Kills it and its tree: it is the init of its pid namespace.
    pub fn kill(&self) -> Result<(), Errno> {
        match process::signal_pidfd(&self.pidfd, libc::SIGKILL) {
            Err(Errno::SRCH) => Ok(()),
            other => other,
        }
    }

    /// Reaps it, after its pidfd became readable.
    pub fn reap(&self, now: Duration) -> HelperEnd {
        let (what, hint) = match self.kind {
            HelperKind::Command => {
                ("its command", "run the command by hand as the host's administrator")
            }
            HelperKind::Minter { .. } => {
                ("its minter", "see that what it asks answers within `timeout`; docs/sources.md")
            }
        };
        let why = match process::wait_for(self.pid) {
            Err(e) => format!("the end of {what} could not be learnt: {e}"),
            Ok(status) => match (status.code(), status.signal()) {
                (Some(0), _) => return None,
                (_, Some(libc::SIGKILL)) if now >= self.deadline => {
                    format!("{what} took too long and was killed")
                }
                (Some(127), _) => format!("{what} could not be executed"),
                (Some(code), _) => format!("{what} exited with status {code}"),
                (None, signal) => {
                    format!("{what} was killed by signal {}", signal.unwrap_or(0))
                }
            },
        };
        Some(refusal(&self.secret, why, hint))
    }
}
