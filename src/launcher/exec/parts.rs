//! The parts of a plan that follow from the profile alone, and the facts of the host that decide them.
#![forbid(unsafe_code)]

use crate::profile::{NetworkMode, Profile};
use crate::sandbox::cgroup::Held;
use crate::sandbox::landlock;
use crate::sandbox::plan::{InnerRule, Limit};

pub(super) fn namespaces(network: NetworkMode) -> u64 {
    let always = libc::CLONE_NEWUSER
        | libc::CLONE_NEWNS
        | libc::CLONE_NEWPID
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWUTS
        | libc::CLONE_NEWCGROUP;
    let network = match network {
        NetworkMode::None | NetworkMode::Audience => libc::CLONE_NEWNET,
        NetworkMode::Host => 0,
    };
    (always | network) as u64
}

/// The namespaces of an exec, for people.
pub fn namespace_names(network: NetworkMode) -> Vec<String> {
    let mut names = vec!["user", "mount", "pid", "ipc", "uts", "cgroup"];
    if network != NetworkMode::Host {
        names.push("network");
    }
    names.into_iter().map(str::to_owned).collect()
}

/// The name of a limit that [`limits`] sets.
pub fn limit_name(resource: u32) -> &'static str {
    match resource {
        libc::RLIMIT_CORE => "core",
        libc::RLIMIT_NOFILE => "open_files",
        libc::RLIMIT_FSIZE => "file_size",
        libc::RLIMIT_NPROC => "processes",
        libc::RLIMIT_DATA => "memory_per_process",
        _ => "limit",
    }
}

pub fn limits(profile: &Profile, held: Held) -> Vec<Limit> {
    let both = |resource: u32, value: u64| Limit { resource, soft: value, hard: value };
    // 1, not 0: a piped core_pattern ignores the limit but for this value, at which the kernel gives
    // up the dump (core(5)).
    let mut limits = vec![both(libc::RLIMIT_CORE, 1)];
    if let Some(files) = profile.limits.open_files {
        limits.push(both(libc::RLIMIT_NOFILE, files.into()));
    }
    if let Some(size) = profile.limits.file_size {
        limits.push(both(libc::RLIMIT_FSIZE, size.0));
    }
    if let (Some(processes), false) = (profile.limits.processes, held.processes) {
        // Init is one of them.
        limits.push(both(libc::RLIMIT_NPROC, u64::from(processes) + 1));
    }
    if let (Some(memory), false) = (profile.limits.memory, held.memory) {
        limits.push(both(libc::RLIMIT_DATA, memory.0));
    }
    limits
}

pub(super) fn inner_rules(abi: u32) -> Vec<InnerRule> {
    if abi == 0 {
        return Vec::new();
    }
    let rights = landlock::inner_rights(abi);
    vec![
        InnerRule { path: c"/proc".to_owned(), access: rights.proc },
        InnerRule { path: c"/dev/pts".to_owned(), access: rights.pts },
    ]
}

/// Mounts over parts of /proc, as container runtimes make them.
pub fn proc_is_masked() -> bool {
    // In few reads: each makes the kernel walk the mounts anew.
    let mut mounts = Vec::new();
    let read = std::fs::File::open("/proc/self/mountinfo").and_then(|mut file| {
        let mut chunk = [0; 4 << 10];
        loop {
            match std::io::Read::read(&mut file, &mut chunk)? {
                0 => return Ok(()),
                n => mounts.extend_from_slice(&chunk[..n]),
            }
        }
    });
    let mounts = String::from_utf8_lossy(&mounts);
    read.is_ok()
        && mounts.lines().any(|line| {
            line.split(' ')
                .nth(4)
                .is_some_and(|at| at.starts_with("/proc/") && at != "/proc/sys/fs/binfmt_misc")
        })
}
