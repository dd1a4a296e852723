//! Hostile programs (`probe.c`), and the bare namespace in which they are shown to work: mount and pid
//! namespaces of their own with private propagation, and none of sublet's protections.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use super::outcome::Outcome;
use super::world::{World, finish};

/// The compiled probes. Kept in the build's own directory under a name made of their source, so that
/// each test process does not compile them again.
pub fn binary() -> &'static Path {
    static PROBE: OnceLock<PathBuf> = OnceLock::new();
    PROBE.get_or_init(|| {
        super::needs("gcc", "gcc libc6-dev");
        let source = include_str!("probe.c");
        let digest = source.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| {
            (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3)
        });
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let done = dir.join(format!("probe-{digest:016x}"));
        if !done.exists() {
            let fresh = dir.join(format!("probe-{}", std::process::id()));
            let code = fresh.with_extension("c");
            std::fs::write(&code, source).unwrap();
            let made = Command::new("gcc")
                .args(["-O1", "-w", "-static", "-no-pie", "-o"])
                .args([&fresh, &code])
                .output()
                .unwrap();
            assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
            std::fs::rename(&fresh, &done).unwrap();
            std::fs::remove_file(&code).unwrap();
        }
        done
    })
}

/// What stays as on the host in a control.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bare {
    /// The host's /proc: every process of the machine in view.
    HostProc,
    /// A /proc of the new pid namespace.
    OwnProc,
}

/// `sh -c SCRIPT` in a bare namespace, in the world's workspace, as `uid`, with its own terminal-less
/// streams. Everything that it starts dies with it.
pub fn bare(world: &World, proc: Bare, uid: u32, script: &str) -> Outcome {
    finish(bare_command(world, proc, uid, script), b"", None)
}

pub fn bare_command(world: &World, proc: Bare, uid: u32, script: &str) -> Command {
    super::needs_root();
    super::needs("unshare", "util-linux");
    let mut command = Command::new("unshare");
    world.dress(&mut command);
    command.uid_back_to_root();
    command.args([
        "--mount",
        "--pid",
        "--uts",
        "--ipc",
        "--fork",
        "--kill-child",
        "--propagation",
        "private",
    ]);
    if proc == Bare::OwnProc {
        command.arg("--mount-proc");
    }
    let uid = uid.to_string();
    command.args(["setpriv", "--reuid", &uid, "--regid", &uid, "--clear-groups"]);
    command.args(["sh", "-c", script]);
    command
}

trait BackToRoot {
    fn uid_back_to_root(&mut self);
}

impl BackToRoot for Command {
    /// Making a mount namespace is root's; `setpriv` then becomes the user.
    fn uid_back_to_root(&mut self) {
        use std::os::unix::process::CommandExt;
        self.uid(0).gid(0);
    }
}

/// `word: answer` lines, as the probes print them.
pub fn answers(outcome: &Outcome) -> BTreeMap<String, String> {
    outcome
        .out()
        .lines()
        .filter_map(|line| line.split_once(": "))
        .map(|(word, answer)| (word.to_owned(), answer.to_owned()))
        .collect()
}

/// Did the probe get what it was after?
pub fn worked(answer: &str) -> bool {
    answer.starts_with("allowed")
}
