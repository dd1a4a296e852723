//! What the machine shows from outside: processes, mounts, cgroups and files. Reads only, but for
//! [`signal`], which takes a pid that the test itself started.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// One process: its pid and when it started, so that a reused pid is not taken for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    pub pid: u32,
    pub parent: u32,
    pub name: String,
    started: u64,
}

impl Process {
    pub fn of(pid: u32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name is in parentheses and may hold spaces: proc_pid_stat(5).
        let (head, tail) = stat.rsplit_once(')')?;
        let fields: Vec<&str> = tail.split_whitespace().collect();
        if fields[0] == "Z" || fields[0] == "X" {
            return None;
        }
        Some(Self {
            pid,
            parent: fields[1].parse().ok()?,
            name: head.split_once('(')?.1.to_owned(),
            started: fields[19].parse().ok()?,
        })
    }

    pub fn is_alive(&self) -> bool {
        Self::of(self.pid).is_some_and(|now| now.started == self.started)
    }

    /// Its cgroup v2 directory, if it is in one below the root.
    pub fn cgroup(&self) -> Option<PathBuf> {
        let lines = fs::read_to_string(format!("/proc/{}/cgroup", self.pid)).ok()?;
        let path = lines.lines().find_map(|l| l.strip_prefix("0::"))?;
        let root = if Path::new("/sys/fs/cgroup/cgroup.procs").exists() {
            "/sys/fs/cgroup"
        } else {
            "/sys/fs/cgroup/unified"
        };
        (path != "/").then(|| PathBuf::from(format!("{root}{path}")))
    }
}

pub fn processes() -> Vec<Process> {
    fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter_map(Process::of)
        .collect()
}

/// The process and all below it, parents first.
pub fn family(pid: u32) -> Vec<Process> {
    let all = processes();
    let mut found: Vec<Process> = all.iter().filter(|p| p.pid == pid).cloned().collect();
    let mut next = 0;
    while next < found.len() {
        let parent = found[next].pid;
        found.extend(all.iter().filter(|p| p.parent == parent).cloned());
        next += 1;
    }
    found
}

/// The parts of a running exec, told apart by where they stand below `sublet run`.
pub struct Parts {
    pub broker: Process,
    pub launcher: Process,
    pub init: Process,
    pub command: Process,
}

impl Parts {
    /// Waits until the command of the exec under `pid` runs.
    #[track_caller]
    pub fn of(pid: u32) -> Self {
        let mut seen = Vec::new();
        for _ in 0..2_000 {
            seen = family(pid);
            if let [broker, launcher, init, command, ..] = &seen[..] {
                let chain = launcher.parent == broker.pid
                    && init.parent == launcher.pid
                    && command.parent == init.pid;
                if chain {
                    return Self {
                        broker: broker.clone(),
                        launcher: launcher.clone(),
                        init: init.clone(),
                        command: command.clone(),
                    };
                }
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        panic!("no broker → launcher → init → command below {pid}: {seen:?}");
    }
}

/// Signals one process of an exec that the test started.
#[track_caller]
pub fn signal(process: &Process, signal: rustix::process::Signal) {
    assert!(process.is_alive(), "{process:?} is gone already");
    let pid = rustix::process::Pid::from_raw(process.pid as i32).unwrap();
    rustix::process::kill_process(pid, signal).unwrap();
}

/// Whether cgroups are v2 and nothing else, as in `vm-tests`' guests. Only there crun and podman are what
/// they are; where v1 is beside it, they are shown v2 alone and do without cgroups.
pub fn has_unified_cgroups() -> bool {
    Path::new("/sys/fs/cgroup/cgroup.controllers").exists()
}

/// What the host must have the same before an exec and after it.
#[derive(Debug, PartialEq, Eq)]
pub struct Traces {
    mounts: Vec<String>,
    run_entries: Vec<PathBuf>,
}

impl Traces {
    pub fn now() -> Self {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        // The first field, an id, is given anew; the rest says what is mounted where.
        let mut mounts: Vec<String> =
            mounts.lines().map(|l| l.split_once(' ').unwrap().1.to_owned()).collect();
        mounts.sort();
        let mut run_entries: Vec<PathBuf> = ["/run", "/dev/shm", "/var/lib"]
            .iter()
            .flat_map(|dir| fs::read_dir(dir).into_iter().flatten().flatten())
            .map(|e| e.path())
            .filter(|p| p.to_string_lossy().contains("sublet"))
            .collect();
        run_entries.sort();
        Self { mounts, run_entries }
    }
}

/// Every file below `dir` that holds `value`.
pub fn files_holding(dir: &Path, value: &[u8]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut dirs = vec![dir.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            let kind = entry.file_type().unwrap();
            if kind.is_dir() {
                dirs.push(entry.path());
            } else if kind.is_file()
                && fs::read(entry.path()).is_ok_and(|bytes| contains(&bytes, value))
            {
                found.push(entry.path());
            }
        }
    }
    found
}

pub fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    !needle.is_empty() && haystack.windows(needle.len()).any(|w| w == needle)
}

/// Every readable `/proc/PID/{environ,cmdline}` of the machine that holds `value`, but for `except`.
pub fn processes_showing(value: &[u8], except: &[u32]) -> Vec<String> {
    let mut found = Vec::new();
    for process in processes().iter().filter(|p| !except.contains(&p.pid)) {
        for file in ["environ", "cmdline"] {
            let path = format!("/proc/{}/{file}", process.pid);
            if fs::read(&path).is_ok_and(|bytes| contains(&bytes, value)) {
                found.push(format!("{path} ({})", process.name));
            }
        }
    }
    found
}

/// Tries until `true`, for at most ten seconds.
#[track_caller]
pub fn eventually(what: &str, mut check: impl FnMut() -> bool) {
    let start = Instant::now();
    while !check() {
        assert!(start.elapsed() < Duration::from_secs(10), "not within ten seconds: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}
