//! Who the exec is: its uid outside and inside, the user namespace that maps them, and the slot of the
//! pool that keeps a uid to one exec.
//!
//! Privileged mode: a fresh host uid of the pool for every exec. Rootless mode: the caller's own uid;
//! the launcher first enters a user namespace of its own, in which it may do what follows.
#![forbid(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use caps::Capability;
use nix::fcntl::{FcntlArg, fcntl};
use rustix::fs::{Access, AtFlags, CWD};
use rustix::io::Errno;

use crate::config::UidPool;
use crate::sys::helper::Helper;
use crate::sys::random::random_u32;

/// The uid that the exec sees for itself where the workspace belongs to root.
pub const ORDINARY_UID: u32 = 1000;

/// What the launcher may do here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Root with the capabilities that a fresh uid and an idmapped workspace take.
    Privileged,
    /// An ordinary user, in a user namespace.
    Rootless,
}

/// The uids and gids of one exec, outside (the host's) and inside (what it sees).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    pub inside_uid: u32,
    pub inside_gid: u32,
    pub outside_uid: u32,
    pub outside_gid: u32,
    /// Supplementary groups can be dropped (in rootless mode the kernel forbids it).
    pub drop_groups: bool,
}

impl Identity {
    /// With a uid of the pool, which is the gid as well.
    pub fn pooled((inside_uid, inside_gid): (u32, u32), outside: u32) -> Self {
        Self {
            inside_uid,
            inside_gid,
            outside_uid: outside,
            outside_gid: outside,
            drop_groups: true,
        }
    }

    /// Rootless: the ids of this process.
    pub fn of_caller((inside_uid, inside_gid): (u32, u32)) -> Self {
        Self {
            inside_uid,
            inside_gid,
            outside_uid: rustix::process::geteuid().as_raw(),
            outside_gid: rustix::process::getegid().as_raw(),
            drop_groups: false,
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    #[error("could not read this process's capabilities")]
    Capabilities(#[source] caps::errors::CapsError),
    #[error("could not enter a user namespace")]
    OwnNamespace(#[source] io::Error),
    #[error("could not write {path}")]
    Map { path: String, source: io::Error },
    #[error("could not open the uid pool's lock {path}")]
    PoolLock { path: PathBuf, source: io::Error },
    #[error("{path} is not a directory of root's that only root may write")]
    PoolDirectory { path: PathBuf },
    #[error("all {count} uids of the pool are taken")]
    PoolExhausted { count: u32 },
    #[error(
        "uid {uid}, which is to be the broker's, is an exec's just now; wait until that has ended"
    )]
    Taken { uid: u32 },
    #[error("could not make the user namespace for the workspace's idmap")]
    IdmapNamespace(#[source] io::Error),
    #[error(
        "sublet runs as the host's root, {lacking}: an exec could only have its \
         uid, to which the kernel's settings under /proc/sys belong. Give it what it lacks, or start it as an \
         ordinary user"
    )]
    HostsRoot { lacking: String },
    #[error("could not see whose the kernel's settings are")]
    KernelSettings(#[source] io::Error),
}

/// What the privileged mode takes.
pub const PRIVILEGED: [Capability; 7] = [
    Capability::CAP_SYS_ADMIN,
    Capability::CAP_SETUID,
    Capability::CAP_SETGID,
    Capability::CAP_CHOWN,
    Capability::CAP_FOWNER,
    Capability::CAP_DAC_OVERRIDE,
    Capability::CAP_KILL,
];

impl Mode {
    /// Privileged if this process is root over the pool's uids with every capability that it takes.
    ///
    /// # Errors
    /// [`IdentityError::HostsRoot`] if it is not, and rootless an exec would have the host's root for its uid.
    pub fn detect(pool: UidPool) -> Result<Self, IdentityError> {
        let held =
            caps::read(None, caps::CapSet::Effective).map_err(IdentityError::Capabilities)?;
        let missing: Vec<String> =
            PRIVILEGED.iter().filter(|c| !held.contains(c)).map(ToString::to_string).collect();
        let is_root = rustix::process::geteuid().is_root();
        if is_root && missing.is_empty() && is_mapped_here(pool) {
            return Ok(Mode::Privileged);
        }
        if !is_hosts_root().map_err(IdentityError::KernelSettings)? {
            return Ok(Mode::Rootless);
        }
        let lacking = if missing.is_empty() {
            "in a user namespace that does not know the uid pool".to_owned()
        } else {
            format!("without {}", missing.join(", "))
        };
        Err(IdentityError::HostsRoot { lacking })
    }
}

/// Whether this process is root of the initial user namespace, whatever its own calls it: the kernel asks its
/// settings' writers for that uid and for no capability, so that it is asked. Nothing is written.
fn is_hosts_root() -> io::Result<bool> {
    let settings = "/proc/sys/kernel/overflowuid";
    match rustix::fs::accessat(CWD, settings, Access::WRITE_OK, AtFlags::EACCESS) {
        // A mount that is read-only is not asked whose it is not.
        Ok(()) | Err(Errno::ROFS) => Ok(true),
        Err(Errno::ACCESS | Errno::PERM) => Ok(false),
        // A /proc of processes alone (subset=pid) does not say.
        Err(Errno::NOENT) => Ok(rustix::process::geteuid().is_root()),
        Err(e) => Err(e.into()),
    }
}

/// Whether this process's user namespace knows the pool's ids at all.
fn is_mapped_here(pool: UidPool) -> bool {
    let covers = |map: &str| {
        map.lines().any(|line| {
            let numbers: Vec<u64> =
                line.split_ascii_whitespace().filter_map(|w| w.parse().ok()).collect();
            let end = u64::from(pool.first) + u64::from(pool.count.get());
            matches!(numbers[..], [inside, _, count]
                if inside <= pool.first.into() && inside + count >= end)
        })
    };
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    covers(&read("/proc/self/uid_map")) && covers(&read("/proc/self/gid_map"))
}

/// Takes a uid that no other exec on this host has, and never the broker's. It is given back when the last copy of the returned
/// description is closed, so that init's copy keeps it while anything of the exec lives.
pub fn take_uid(pool: UidPool) -> Result<(u32, OwnedFd), IdentityError> {
    let count = pool.exec_uids();
    // Anywhere, so that a uid is not soon had again: what an earlier exec left somewhere is not ours.
    let directory = lock_directory()?;
    let failed = |source| IdentityError::PoolLock { path: directory.clone(), source };
    let start = random_u32().map_err(failed)? % count;
    for slot in (start..count).chain(0..start) {
        let uid = pool.first + slot;
        // The uid's own byte: pools of different configurations may overlap.
        if let Some(held) = lock(&directory, uid, libc::F_WRLCK)? {
            return Ok((uid, held));
        }
    }
    Err(IdentityError::PoolExhausted { count })
}

/// Keeps the broker's uid from execs of other pools that hold it, for as long as the returned description
/// is open. Brokers of several states may share one.
pub fn hold_uid(uid: u32) -> Result<OwnedFd, IdentityError> {
    lock(&lock_directory()?, uid, libc::F_RDLCK)?.ok_or(IdentityError::Taken { uid })
}

/// Many files, not one: each descriptor that a child closes makes the kernel walk all locks on its file.
const LOCK_FILES: u32 = 256;

/// The uid's byte, locked so; none if another has it.
fn lock(directory: &Path, uid: u32, kind: libc::c_int) -> Result<Option<OwnedFd>, IdentityError> {
    let path = directory.join(format!("uids-{:02x}", uid % LOCK_FILES));
    let opened = OpenOptions::new()
        .read(true)
        // Who may only read it can lock nobody out. fcntl_locking(2).
        .write(kind == libc::F_WRLCK)
        .mode(0o600)
        .custom_flags(libc::O_CREAT | libc::O_NOFOLLOW | libc::O_CLOEXEC)
        .open(&path);
    let locked = opened.and_then(|file| Ok((lock_byte(&file, uid.into(), kind)?, file)));
    match locked {
        Ok((is_ours, file)) => Ok(is_ours.then(|| file.into())),
        Err(source) => Err(IdentityError::PoolLock { path, source }),
    }
}

/// An open file description lock on one byte: gone with its last descriptor, even after `kill -9`.
/// fcntl_locking(2), Linux 3.15.
fn lock_byte(file: &File, byte: i64, kind: libc::c_int) -> io::Result<bool> {
    let lock = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    };
    match fcntl(file, FcntlArg::F_OFD_SETLK(&lock)) {
        Ok(_) => Ok(true),
        Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EACCES) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

/// One directory for the whole host, whatever the state directory: two hosts' worth of state must not
/// share a uid. Under `/run`, else `/dev/shm` where `/run` is read-only.
fn lock_directory() -> Result<PathBuf, IdentityError> {
    let mut last = None;
    for base in ["/run/sublet", "/dev/shm/sublet"] {
        let directory = Path::new(base);
        let failed = |source| IdentityError::PoolLock { path: directory.to_owned(), source };
        match std::fs::DirBuilder::new().mode(0o755).create(directory) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(e) => {
                last = Some(failed(e));
                continue;
            }
        }
        let found = std::fs::symlink_metadata(directory).map_err(failed)?;
        if !found.is_dir() || found.uid() != 0 || found.mode() & 0o022 != 0 {
            return Err(IdentityError::PoolDirectory { path: directory.to_owned() });
        }
        match rustix::fs::statvfs(directory) {
            Ok(on) if !on.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY) => {
                return Ok(directory.to_owned());
            }
            Ok(_) => last = Some(failed(io::ErrorKind::ReadOnlyFilesystem.into())),
            Err(e) => last = Some(failed(e.into())),
        }
    }
    Err(last.unwrap_or(IdentityError::PoolDirectory { path: "/run/sublet".into() }))
}

/// Rootless: moves the calling launcher into a user and mount namespace in which it has the capabilities
/// to build an exec's mounts. Nothing on the host changes hands by it.
pub fn enter_own_namespaces() -> Result<(), IdentityError> {
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    nix::sched::unshare(
        nix::sched::CloneFlags::CLONE_NEWUSER | nix::sched::CloneFlags::CLONE_NEWNS,
    )
    .map_err(|e| IdentityError::OwnNamespace(e.into()))?;
    write_map("/proc/self/setgroups", "deny")?;
    write_map("/proc/self/uid_map", &format!("{uid} {uid} 1"))?;
    write_map("/proc/self/gid_map", &format!("{gid} {gid} 1"))
}

/// Writes the maps of the child's user namespace, once and for all. user_namespaces(7).
pub fn write_maps(pid: i32, identity: &Identity) -> Result<(), IdentityError> {
    let Identity { inside_uid, inside_gid, outside_uid, outside_gid, drop_groups } = *identity;
    if !drop_groups {
        write_map(&format!("/proc/{pid}/setgroups"), "deny")?;
    }
    write_map(&format!("/proc/{pid}/uid_map"), &format!("{inside_uid} {outside_uid} 1"))?;
    write_map(&format!("/proc/{pid}/gid_map"), &format!("{inside_gid} {outside_gid} 1"))
}

fn write_map(path: &str, content: &str) -> Result<(), IdentityError> {
    OpenOptions::new()
        .write(true)
        .open(path)
        .and_then(|mut file| file.write_all(content.as_bytes()))
        .map_err(|source| IdentityError::Map { path: path.to_owned(), source })
}

/// The user namespace of a child of ours, to map a mount through.
fn user_namespace_of(pid: i32) -> io::Result<OwnedFd> {
    Ok(File::open(format!("/proc/{pid}/ns/user"))?.into())
}

/// A user namespace that maps these ids on disk to the exec's outside ids: for a workspace whose owner
/// is not what the exec sees for itself (root's). Held alive by the descriptor alone.
pub struct IdmapNamespace {
    pub fd: OwnedFd,
    helper: Option<Helper>,
}

impl From<OwnedFd> for IdmapNamespace {
    /// One that was made before.
    fn from(fd: OwnedFd) -> Self {
        Self { fd, helper: None }
    }
}

impl IdmapNamespace {
    pub fn new(on_disk: (u32, u32), outside: (u32, u32)) -> Result<Self, IdentityError> {
        let identity = Identity {
            inside_uid: on_disk.0,
            inside_gid: on_disk.1,
            outside_uid: outside.0,
            outside_gid: outside.1,
            drop_groups: true,
        };
        // It stands in the namespace until it is dropped.
        let helper = Helper::start(libc::CLONE_NEWUSER).map_err(IdentityError::IdmapNamespace)?;
        write_maps(helper.pid(), &identity)?;
        let fd = user_namespace_of(helper.pid()).map_err(IdentityError::IdmapNamespace)?;
        Ok(Self { fd, helper: Some(helper) })
    }

    /// The exec's own.
    pub fn of_child(pid: i32) -> Result<Self, IdentityError> {
        let fd = user_namespace_of(pid).map_err(IdentityError::IdmapNamespace)?;
        Ok(Self { fd, helper: None })
    }

    /// Only the descriptor, when the helper is gone.
    pub fn without_helper(self) -> OwnedFd {
        self.fd
    }

    /// The helper may go; [`Helper`] is reaped when it is dropped, so later is cheaper.
    pub fn into_helper(self) -> Option<Helper> {
        let mut helper = self.helper;
        if let Some(helper) = &mut helper {
            helper.dismiss();
        }
        helper
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uid_is_taken_once_and_given_back_with_its_descriptor() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let pool: UidPool = "1900000000:3".parse().unwrap();
        let (a, _lock_a) = take_uid(pool).unwrap();
        let (b, lock_b) = take_uid(pool).unwrap();
        assert_ne!(a, b);
        assert!(matches!(take_uid(pool), Err(IdentityError::PoolExhausted { count: 2 })));
        drop(lock_b);
        assert_eq!(take_uid(pool).unwrap().0, b);
    }

    #[test]
    fn a_brokers_uid_is_no_execs_even_in_another_pool() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let pool: UidPool = "1900000200:2".parse().unwrap();
        let (held, _again) = (hold_uid(1_900_000_200).unwrap(), hold_uid(1_900_000_200).unwrap());
        assert!(matches!(take_uid(pool), Err(IdentityError::PoolExhausted { .. })));
        drop((held, _again));
        let (uid, _lock) = take_uid(pool).unwrap();
        assert!(matches!(hold_uid(uid), Err(IdentityError::Taken { .. })));
    }

    #[test]
    fn pools_that_overlap_share_no_uid() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let (a, _lock) = take_uid("1900000100:2".parse().unwrap()).unwrap();
        let (b, _lock) = take_uid("1900000099:3".parse().unwrap()).unwrap();
        assert_eq!((a, b), (1_900_000_100, 1_900_000_099));
        let (c, _lock) = take_uid("1900000100:3".parse().unwrap()).unwrap();
        assert_eq!(c, 1_900_000_101);
    }
}
