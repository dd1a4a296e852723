//! One cgroup (v2) for one exec: limits on the whole tree, and a place that it cannot leave. cgroups(7).
//!
//! Works with whatever controllers the hierarchy offers, also where v2 is mounted beside v1. Existing
//! groups are left alone: everything is made below one directory of sublet's own.
//!
//! Whoever made a group holds a lock on its directory (flock(2)), which the kernel drops with the process,
//! `kill -9` included: one that nobody holds is what a killed launcher left.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags};
use rustix::io::Errno;

use super::identity;
use crate::model::id::ExecId;

const CGROUP2_MAGIC: u64 = 0x6367_7270;
/// How often a group is made anew that a sweep takes for a dead launcher's, and how long a sweep has it.
const MOST_TRIES: usize = 100;
const A_MOMENT: Duration = Duration::from_millis(1);
const DIRECTORY: OFlags = OFlags::DIRECTORY.union(OFlags::CLOEXEC).union(OFlags::NOFOLLOW);

/// What a cgroup may be asked to bound. `None` is no bound.
#[derive(Debug, Clone, Copy, Default)]
pub struct CgroupLimits {
    pub memory: Option<u64>,
    pub processes: Option<u64>,
    /// Thousandths of a CPU.
    pub millicpu: Option<u64>,
}

/// Which of the limits the cgroup holds. The rest is for rlimits.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Held {
    pub memory: bool,
    pub processes: bool,
    pub cpu: bool,
}

/// The cgroup of one exec. Removed on drop, when all its processes are gone.
pub struct Cgroup {
    parent: Arc<OwnedFd>,
    name: String,
    directory: OwnedFd,
}

#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    #[error("no cgroup v2 hierarchy is mounted at /sys/fs/cgroup or /sys/fs/cgroup/unified")]
    NoHierarchy,
    #[error("could not make the cgroup {path}")]
    Make { path: PathBuf, source: io::Error },
    #[error("could not write {value} to {file} of the exec's cgroup")]
    Write { file: &'static str, value: String, source: io::Error },
}

/// The place below which execs get their cgroups.
pub struct Cgroups {
    parent: Arc<OwnedFd>,
    path: PathBuf,
}

impl Cgroups {
    /// Finds the place, makes it where there is none, and asks for its controllers.
    pub fn open(mode: identity::Mode) -> Result<Self, CgroupError> {
        let hierarchy = hierarchy().ok_or(CgroupError::NoHierarchy)?;
        let path = match mode {
            identity::Mode::Privileged => hierarchy.join("sublet"),
            // A user's own cgroup, where it was delegated to them.
            identity::Mode::Rootless => {
                hierarchy.join(own_cgroup().ok_or(CgroupError::NoHierarchy)?)
            }
        };
        let failed = |e: Errno| CgroupError::Make { path: path.clone(), source: e.into() };
        let open = || rustix::fs::open(&path, DIRECTORY, Mode::empty());
        let parent = match open() {
            // The first exec on this host.
            Err(Errno::NOENT) if mode == identity::Mode::Privileged => {
                match rustix::fs::mkdir(&path, Mode::from(0o755)) {
                    Ok(()) | Err(Errno::EXIST) => open(),
                    Err(e) => Err(e),
                }
            }
            opened => opened,
        }
        .map_err(failed)?;
        if mode == identity::Mode::Privileged {
            enable_controllers(&hierarchy, parent.as_fd());
        }
        Ok(Self { parent: Arc::new(parent), path })
    }

    /// Removes what launchers that were killed left: cgroups that nobody holds. Returns whether one could not
    /// be removed yet, because a process in it is still dying.
    pub fn sweep(&self) -> bool {
        let Ok(directory) = rustix::fs::Dir::read_from(&*self.parent) else { return false };
        let names = directory.flatten().map(|entry| entry.file_name().to_owned());
        let ours: Vec<_> =
            names.filter(|name| name.to_bytes().starts_with(b"sublet-exe_")).collect();
        let mut is_left = false;
        for name in ours {
            let opened = rustix::fs::openat(&*self.parent, &*name, DIRECTORY, Mode::empty());
            // Swept by another meanwhile.
            let Ok(directory) = opened else { continue };
            if rustix::fs::flock(&directory, FlockOperation::NonBlockingLockExclusive).is_err() {
                continue;
            }
            match rustix::fs::unlinkat(&*self.parent, &*name, AtFlags::REMOVEDIR) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(Errno::BUSY) => is_left = true,
                Err(e) => {
                    eprintln!(
                        "sublet: could not remove the cgroup {}: {e}",
                        name.to_string_lossy()
                    );
                }
            }
        }
        is_left
    }

    /// Makes an exec's cgroup, without limits yet.
    pub fn make(&self, exec: &ExecId) -> Result<Cgroup, CgroupError> {
        let name = format!("sublet-{exec}");
        let path = self.path.join(&name);
        let failed = |e: Errno| CgroupError::Make { path: path.clone(), source: e.into() };
        let directory = self.make_held(&name).map_err(failed)?;
        Ok(Cgroup { parent: Arc::clone(&self.parent), name, directory })
    }

    /// Until it is held, a sweep takes it for a dead launcher's.
    fn make_held(&self, name: &str) -> Result<OwnedFd, Errno> {
        for _ in 0..MOST_TRIES {
            match rustix::fs::mkdirat(&*self.parent, name, Mode::from(0o755)) {
                // Ours, of the last try: names are fresh.
                Ok(()) | Err(Errno::EXIST) => {}
                Err(e) => return Err(e),
            }
            let directory = match rustix::fs::openat(&*self.parent, name, DIRECTORY, Mode::empty())
            {
                Err(Errno::NOENT) => continue,
                opened => opened?,
            };
            match rustix::fs::flock(&directory, FlockOperation::NonBlockingLockShared) {
                Ok(()) => {}
                Err(Errno::WOULDBLOCK) => {
                    std::thread::sleep(A_MOMENT);
                    continue;
                }
                Err(e) => return Err(e),
            }
            let held = rustix::fs::fstat(&directory)?;
            match rustix::fs::statat(&*self.parent, name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(found) if found.st_ino == held.st_ino => return Ok(directory),
                Ok(_) | Err(Errno::NOENT) => {}
                Err(e) => return Err(e),
            }
        }
        Err(Errno::BUSY)
    }
}

impl Cgroup {
    pub fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// Kills every process in it, and whatever they fork meanwhile: `cgroup.kill`, Linux 5.14.
    pub fn kill(&self) -> Result<(), CgroupError> {
        self.write("cgroup.kill", "1").map(|_| ())
    }

    /// Sets what it can of `limits`, and says what that is.
    pub fn bound(&self, limits: CgroupLimits) -> Result<Held, CgroupError> {
        let mut held = Held::default();
        if let Some(bytes) = limits.memory {
            held.memory = self.write("memory.max", &bytes.to_string())?;
            if held.memory {
                // Without this an exec at its limit would go on in swap. Absent where swap is not accounted.
                self.write("memory.swap.max", "0")?;
                self.write("memory.oom.group", "1")?;
            }
        }
        if let Some(count) = limits.processes {
            // Init is one of them.
            held.processes = self.write("pids.max", &(count + 1).to_string())?;
        }
        if let Some(millicpu) = limits.millicpu {
            held.cpu = self.write("cpu.max", &format!("{} 100000", millicpu * 100))?;
        }
        Ok(held)
    }

    /// False if the hierarchy does not have this file: its controller is not there.
    fn write(&self, file: &'static str, value: &str) -> Result<bool, CgroupError> {
        let failed = |source| CgroupError::Write { file, value: value.to_owned(), source };
        let opened = rustix::fs::openat(
            &self.directory,
            file,
            OFlags::WRONLY | OFlags::CLOEXEC,
            Mode::empty(),
        );
        match opened {
            Ok(fd) => {
                rustix::io::write(&fd, value.as_bytes()).map_err(|e| failed(e.into()))?;
                Ok(true)
            }
            Err(Errno::NOENT) => Ok(false),
            Err(e) => Err(failed(e.into())),
        }
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // Busy only if something still lives in it; the next `make` cannot collide, names are fresh.
        match rustix::fs::unlinkat(&*self.parent, &self.name, AtFlags::REMOVEDIR) {
            // Another launcher's sweep may have taken it, as soon as it was empty.
            Ok(()) | Err(rustix::io::Errno::NOENT) => {}
            Err(e) => eprintln!("sublet: could not remove the cgroup {}: {e}", self.name),
        }
    }
}

/// Removes what a launcher that was killed left of this exec. Nothing to do where it made none.
pub fn remove_left(exec: &ExecId) {
    let Some(hierarchy) = hierarchy() else { return };
    let parents = [Some(PathBuf::from("sublet")), own_cgroup()];
    for parent in parents.into_iter().flatten() {
        let path = hierarchy.join(parent).join(format!("sublet-{exec}"));
        match rustix::fs::rmdir(&path) {
            Ok(()) | Err(Errno::NOENT | Errno::NOTDIR) => {}
            Err(e) => eprintln!("sublet: could not remove the cgroup {}: {e}", path.display()),
        }
    }
}

fn hierarchy() -> Option<PathBuf> {
    ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"]
        .into_iter()
        .map(PathBuf::from)
        .find(|path| rustix::fs::statfs(path).is_ok_and(|s| s.f_type as u64 == CGROUP2_MAGIC))
}

/// This process's place in the v2 hierarchy, `0::/path` in /proc/self/cgroup.
fn own_cgroup() -> Option<PathBuf> {
    let text = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let path = text.lines().find_map(|l| l.strip_prefix("0::/"))?;
    Some(PathBuf::from(path))
}

/// Asks for each controller on the way down to our directory's children. One that the hierarchy does
/// not have is found missing when a limit is written, and told in the posture.
fn enable_controllers(hierarchy: &Path, ours: BorrowedFd<'_>) {
    let wanted = ["memory", "pids", "cpu"];
    let Ok(available) = std::fs::read_to_string(hierarchy.join("cgroup.controllers")) else {
        return;
    };
    let present: Vec<_> = wanted
        .into_iter()
        .filter(|w| available.split_ascii_whitespace().any(|a| a == *w))
        .collect();
    if present.is_empty() {
        return;
    }
    let enabled = |fd: BorrowedFd<'_>| {
        let mut text = [0; 256];
        rustix::fs::openat(
            fd,
            "cgroup.subtree_control",
            OFlags::RDONLY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .and_then(|f| rustix::io::read(&f, &mut text))
        .map(|n| String::from_utf8_lossy(&text[..n]).into_owned())
        .unwrap_or_default()
    };
    let root = File::options().read(true).custom_flags(libc::O_DIRECTORY).open(hierarchy);
    let Ok(root) = root else { return };
    for directory in [root.as_fd(), ours] {
        let on = enabled(directory);
        for controller in &present {
            if on.split_ascii_whitespace().any(|c| c == *controller) {
                continue;
            }
            let change = rustix::fs::openat(
                directory,
                "cgroup.subtree_control",
                OFlags::WRONLY | OFlags::CLOEXEC,
                Mode::empty(),
            )
            .and_then(|f| rustix::io::write(&f, format!("+{controller}").as_bytes()));
            if change.is_err() {
                continue;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a sweep asks of a directory any file system has.
    #[test]
    fn a_sweep_takes_what_nobody_holds_and_leaves_the_rest() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_owned();
        let parent = rustix::fs::open(&path, DIRECTORY, Mode::empty()).unwrap();
        let cgroups = Cgroups { parent: Arc::new(parent), path: path.clone() };
        let held = cgroups.make(&ExecId::fresh()).unwrap();
        let dead = path.join(format!("sublet-{}", ExecId::fresh()));
        let other = path.join("someone-elses");
        std::fs::create_dir(&dead).unwrap();
        std::fs::create_dir(&other).unwrap();
        assert!(!cgroups.sweep());
        assert!(path.join(&held.name).exists() && other.exists() && !dead.exists());
        let name = held.name.clone();
        drop(held);
        assert!(!path.join(name).exists());
    }

    #[test]
    fn what_is_made_under_a_sweep_is_held_in_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let open = || Cgroups {
            parent: Arc::new(rustix::fs::open(dir.path(), DIRECTORY, Mode::empty()).unwrap()),
            path: dir.path().to_owned(),
        };
        let is_over = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            let sweeper = scope.spawn(|| {
                let cgroups = open();
                while !is_over.load(std::sync::atomic::Ordering::Relaxed) {
                    cgroups.sweep();
                }
            });
            let cgroups = open();
            for _ in 0..500 {
                let held = cgroups.make(&ExecId::fresh()).unwrap();
                assert!(dir.path().join(&held.name).exists());
            }
            is_over.store(true, std::sync::atomic::Ordering::Relaxed);
            sweeper.join().unwrap();
        });
    }
}
