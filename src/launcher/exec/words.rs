//! What failed in the child or at the clone, in words: the step, the path, the likely cause, what to try.
#![forbid(unsafe_code)]

use std::io;
use std::path::PathBuf;

use rustix::io::Errno;

use super::{Exec, refuse};
use crate::launcher::wire::{Refusal, RefusalKind};
use crate::sandbox::identity::Mode;
use crate::sandbox::step::Step;
use crate::sys::process::WaitStatus;

impl Exec {
    /// Words for a failed step.
    pub(super) fn explain(&self, step: Step, errno: Errno, which: u32) -> Refusal {
        let command = &self.names.command;
        if step == Step::Exec {
            return match errno {
                Errno::NOENT | Errno::NOTDIR if command.contains('/') => Refusal {
                    kind: RefusalKind::NotFound,
                    message: format!("{command}: not found inside the sandbox"),
                    hint: "the profile shows only the workspace and the paths of [filesystem]; if it is a \
                           script, its interpreter must be there too"
                        .to_owned(),
                },
                Errno::NOENT | Errno::NOTDIR => Refusal {
                    kind: RefusalKind::NotFound,
                    message: format!("{command}: not found on the profile's PATH ({})", self.names.path),
                    hint: "`sublet run --explain` shows what is there".to_owned(),
                },
                Errno::ACCESS => Refusal {
                    kind: RefusalKind::NotExecutable,
                    message: format!("{command}: found, but not executable"),
                    hint: "a file needs its execute bit, and a directory is no command".to_owned(),
                },
                Errno::NOEXEC => Refusal {
                    kind: RefusalKind::NotExecutable,
                    message: format!("{command}: neither a program nor a script with a #! line"),
                    hint: "name the interpreter: `sh FILE`".to_owned(),
                },
                e => Refusal {
                    kind: RefusalKind::NotExecutable,
                    message: format!("{command}: {e}"),
                    hint: String::new(),
                },
            };
        }
        self.sandbox.explain(step, errno, which)
    }
}

/// Words for a step of the sandbox's; `at` is the tree that it was about, where it was about one.
pub(super) fn of_step(step: Step, errno: Errno, at: Option<&PathBuf>) -> Refusal {
    let subject = match step {
        Step::Attach => at.map(|p| format!(" at {}", p.display())).unwrap_or_default(),
        _ => String::new(),
    };
    let hint = match (step, errno) {
        (Step::MountProc, Errno::PERM) => {
            "this surrounding masks parts of /proc, as container runtimes do: unmask it (docker: \
             `--security-opt systempaths=unconfined`), or run sublet as root"
        }
        (Step::Attach, Errno::NOENT) => {
            "the path lies in a tree that does not hold it; create it there, or show another path"
        }
        (Step::AttachWorkspace, Errno::NOENT) => {
            "the workspace lies in a read-only path of the profile that does not hold it"
        }
        (Step::Pivot, Errno::INVAL) => {
            "the root is an initramfs: switch to a real root file system first (switch_root(8))"
        }
        (Step::Descriptors, Errno::INVAL) => {
            "the limit of open files is too low for sublet itself: raise it (`ulimit -n 128`)"
        }
        (_, Errno::PERM) => "run `sublet doctor`: it says what this host forbids",
        _ => "`sublet doctor` shows what this host can and cannot do",
    };
    refuse(format!("could not {}{subject}: {errno}", step.doing()), hint)
}

pub(super) fn end_text(status: WaitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (None, signal) => format!("signal {}", signal.unwrap_or(0)),
    }
}

pub(super) fn clone_refusal(error: &io::Error, mode: Mode) -> Refusal {
    let hint = match (error.raw_os_error(), mode) {
        (Some(libc::EPERM), Mode::Rootless) => {
            "this host forbids user namespaces to this user; `sublet doctor` says which setting"
        }
        (Some(libc::ENOSPC | libc::EUSERS), _) => {
            "too many namespaces: raise the limits under /proc/sys/user"
        }
        (Some(libc::EAGAIN), _) => "too many processes: raise the limit, or end some",
        _ => "`sublet doctor` shows what this host can and cannot do",
    };
    refuse(format!("could not create the exec's namespaces: {error}"), hint)
}
