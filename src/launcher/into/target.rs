//! The container's process: pinned by a pidfd, seen to be the one that was recorded or named, and no process
//! of the host itself. What is opened of it is opened while it is pinned.
#![forbid(unsafe_code)]

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::{InContainer, is_plain};
use crate::host::{Host, Trust, container};
use crate::launcher::compile::invalid;
use crate::launcher::posture::Joins;
use crate::launcher::wire::{Refusal, RefusalKind};
use crate::model::id::RunId;
use crate::sandbox::identity::Mode as Rights;

/// A running container.
pub struct Target {
    pub pid: i32,
    pub started: u64,
    pidfd: OwnedFd,
    /// Its mount and network namespaces, and its root directory.
    mounts: OwnedFd,
    network: OwnedFd,
    root: OwnedFd,
    /// In the container: where its runs work.
    pub workspace: PathBuf,
    /// On the host: whose files its own processes may write.
    pub owner: u32,
    /// Of a run: who its agent is, on the host. Through sublet it is nobody else but, as root, anyone there.
    pub agent: Option<(u32, u32)>,
    uid_map: Vec<(u32, u32, u32)>,
    gid_map: Vec<(u32, u32, u32)>,
}

impl Target {
    /// The container that an exec of this run is to be in, if it is to be in one.
    pub fn of(
        run: &RunId,
        into: &InContainer,
        workspace: &Path,
        host: &Host,
        trust: Trust,
        rights: Rights,
    ) -> Result<Option<Self>, Refusal> {
        let named = match (trust, into.pid) {
            (Trust::Invoker, None) => return Ok(None),
            (Trust::Invoker, Some(pid)) => (pid, None, workspace.to_owned(), None),
            (Trust::Host, pid) => {
                let record = container::read(&host.runtime_dir, run).map_err(|e| {
                    refuse(format!("the record of {run}'s container cannot be taken: {e}"))
                })?;
                match (record, pid) {
                    (None, None) if container::is_of_a_container(run) => {
                        return Err(refuse(format!("the container of {run} is gone")));
                    }
                    (None, None) => return Ok(None),
                    (Some(r), None) => {
                        let boot = crate::host::now().map(|now| now.boot_id).ok();
                        if boot.as_ref() != Some(&r.boot_id) {
                            return Err(refuse(format!(
                                "the container of {run} is of another boot"
                            )));
                        }
                        (r.pid, Some(r.started), r.workspace, Some((r.uid, r.gid)))
                    }
                    // Which container it is, is not the broker's to say.
                    (_, Some(_)) => {
                        return Err(refuse("an exec of a run names no process".to_owned()));
                    }
                }
            }
        };
        if rights != Rights::Privileged {
            return Err(refuse("a container's namespaces can be joined by root alone".to_owned()));
        }
        let (pid, started, workspace, agent) = named;
        Self::open(pid, started, workspace, agent).map(Some)
    }

    fn open(
        pid: i32,
        recorded: Option<u64>,
        workspace: PathBuf,
        agent: Option<(u32, u32)>,
    ) -> Result<Self, Refusal> {
        let gone = || refuse(format!("there is no process {pid} any more"));
        let number = (pid > 1).then(|| Pid::from_raw(pid)).flatten().ok_or_else(gone)?;
        let pidfd = pidfd_open(number, PidfdFlags::empty()).map_err(|_| gone())?;
        let started = container::started(pid).map_err(|_| gone())?;
        if recorded.is_some_and(|recorded| recorded != started) {
            return Err(refuse(format!("process {pid} is not the container's any more")));
        }
        let failed = |what: &str, e: &dyn std::fmt::Display| {
            refuse(format!("could not open the {what} of process {pid}: {e}"))
        };
        let proc = |name: &str| format!("/proc/{pid}/{name}");
        let namespace = |kind: &str| -> Result<OwnedFd, Refusal> {
            let theirs = File::open(proc(&format!("ns/{kind}"))).map_err(|e| failed(kind, &e))?;
            Ok(theirs.into())
        };
        let (mounts, network) = (namespace("mnt")?, namespace("net")?);
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::openat(CWD, proc("root"), flags, Mode::empty())
            .map_err(|e| failed("root", &e))?;
        let read = |name: &str| std::fs::read_to_string(proc(name)).map_err(|e| failed(name, &e));
        let (uid_map, gid_map) = (map(&read("uid_map")?), map(&read("gid_map")?));
        let owner = match agent {
            Some((owner, _)) => owner,
            None => std::fs::metadata(proc("")).map_err(|e| failed("owner", &e))?.uid(),
        };
        let target = Self {
            pid,
            started,
            pidfd,
            mounts,
            network,
            root,
            workspace,
            owner,
            agent,
            uid_map,
            gid_map,
        };
        target.refuse_the_hosts_own()?;
        // All of it was opened by number: it is this process's if that still lives.
        if !target.is_alive() {
            return Err(gone());
        }
        if !is_plain(&target.workspace) {
            return Err(refuse("the workspace is no absolute path without `..`".to_owned()));
        }
        Ok(target)
    }

    fn refuse_the_hosts_own(&self) -> Result<(), Refusal> {
        let same = |theirs: &OwnedFd, ours: &str| -> std::io::Result<bool> {
            let theirs = rustix::fs::fstat(theirs)?;
            let ours = std::fs::metadata(ours)?;
            Ok((theirs.st_dev, theirs.st_ino) == (ours.dev(), ours.ino()))
        };
        for (theirs, ours) in [(&self.mounts, "/proc/self/ns/mnt"), (&self.root, "/")] {
            match same(theirs, ours) {
                Ok(false) => {}
                Ok(true) => {
                    return Err(refuse(format!(
                        "process {} is in no container: it has this host's own mounts",
                        self.pid
                    )));
                }
                Err(e) => return Err(refuse(format!("could not tell the container apart: {e}"))),
            }
        }
        Ok(())
    }

    pub fn is_alive(&self) -> bool {
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        matches!(poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })), Ok(0))
    }

    pub fn mounts(&self) -> BorrowedFd<'_> {
        self.mounts.as_fd()
    }

    pub fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// For the child, which joins it.
    pub fn network(&self) -> std::io::Result<OwnedFd> {
        self.network.try_clone()
    }

    /// Ids of the container, as the host has them.
    pub fn on_host(&self, (uid, gid): (u32, u32)) -> Option<(u32, u32)> {
        Some((to_host(&self.uid_map, uid)?, to_host(&self.gid_map, gid)?))
    }

    /// Ids of the host, as the container has them.
    pub fn inside(&self, (uid, gid): (u32, u32)) -> Option<(u32, u32)> {
        Some((from_host(&self.uid_map, uid)?, from_host(&self.gid_map, gid)?))
    }
}

/// Whose the network namespace is that an exec joins. What cannot be told apart from the host's is taken for it.
pub fn joins(network: Option<&OwnedFd>) -> Joins {
    let Some(network) = network else { return Joins::Nothing };
    let (joined, own) = (rustix::fs::fstat(network), rustix::fs::stat("/proc/self/ns/net"));
    match (joined, own) {
        (Ok(joined), Ok(own)) if (joined.st_dev, joined.st_ino) != (own.st_dev, own.st_ino) => {
            Joins::ContainersOwn
        }
        _ => Joins::Hosts,
    }
}

fn refuse(message: String) -> Refusal {
    let hint = "name a process in a running container of this host, as root";
    Refusal { kind: RefusalKind::Invalid, ..invalid(message, hint) }
}

/// user_namespaces(7): first inside, first outside, how many.
fn map(text: &str) -> Vec<(u32, u32, u32)> {
    let line = |line: &str| {
        let mut words = line.split_ascii_whitespace().map(str::parse);
        match (words.next(), words.next(), words.next()) {
            (Some(Ok(inside)), Some(Ok(outside)), Some(Ok(count))) => {
                Some((inside, outside, count))
            }
            _ => None,
        }
    };
    text.lines().filter_map(line).collect()
}

fn to_host(map: &[(u32, u32, u32)], id: u32) -> Option<u32> {
    map.iter().find_map(|(inside, outside, count)| {
        id.checked_sub(*inside).filter(|o| o < count).and_then(|o| outside.checked_add(o))
    })
}

fn from_host(map: &[(u32, u32, u32)], id: u32) -> Option<u32> {
    map.iter().find_map(|(inside, outside, count)| {
        id.checked_sub(*outside).filter(|o| o < count).and_then(|o| inside.checked_add(o))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_translated_both_ways_and_strangers_are_nobody() {
        let map = map("         0     100000      65536\n     70000 5 1\n");
        assert_eq!(to_host(&map, 1000), Some(101_000));
        assert_eq!(to_host(&map, 70_000), Some(5));
        assert_eq!(to_host(&map, 65_536), None);
        assert_eq!(from_host(&map, 100_000), Some(0));
        assert_eq!(from_host(&map, 0), None);
    }

    #[test]
    fn no_process_of_the_host_itself_is_a_container() {
        let own = std::process::id() as i32;
        let refused = |pid, started| Target::open(pid, started, "/".into(), None).err();
        assert!(refused(own, None).unwrap().message.contains("no container"));
        assert!(refused(own, Some(1)).unwrap().message.contains("not the container's"));
        for none in [-1, 0, 1, i32::MAX] {
            assert!(refused(none, None).is_some(), "{none}");
        }
    }
}
