//! Whose the state is while a broker serves it: `STATE/db` and `STATE/keys`, with all that lies in them,
//! are the broker's; STATE itself stays root's, and with it the trail's head, which the launcher writes.
//!
//! Root gives away only what no one but root could have put there: a directory that is root's alone. What
//! belongs to the broker already is never touched, so that nothing which a broker may have planted there
//! is followed, and the directory is given last, so that what is given half is given again. Opens no file
//! of the database's for reading: that would drop the locks on it (fcntl(2)).
#![forbid(unsafe_code)]

use std::fs::{DirBuilder, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, Dir, FileType, FlockOperation, Mode, OFlags, Stat, chownat, fchmod, fchown, flock,
    fstat, fsync, mkdirat, openat, statat, syncfs,
};
use rustix::io::Errno;
use rustix::process::{Gid, Uid};

use super::SettleError;
use crate::host::{Account, Host};
use crate::launcher::serve::HEAD_FILE;

/// What of STATE is the broker's. The database is last: whose it is says whose the state is.
const OWNED: [&str; 2] = ["keys", "db"];
/// By its lock only one broker at a time serves this state. Root's, so that no one else can hold it.
const LOCK: &str = "serve.lock";
/// Directories in directories. What is deeper is not sublet's.
const DEPTH: u32 = 4;

/// The state, taken over.
#[derive(Debug)]
pub(super) struct Taken {
    /// Every link resolved.
    pub dir: PathBuf,
    _lock: OwnedFd,
}

impl Taken {
    pub fn owned(&self) -> impl Iterator<Item = PathBuf> + '_ {
        OWNED.iter().map(|name| self.dir.join(name))
    }
}

/// Makes what is missing, and gives the broker what it needs.
pub(super) fn take_over(state_dir: &Path, account: Account) -> Result<Taken, SettleError> {
    make(state_dir)?;
    let dir = trusted(state_dir)?;
    let fd = open_directory(&dir)?;
    let owner = rustix::process::geteuid().as_raw();
    let found = status(&dir, &fd)?;
    refuse_others(&dir, &found, owner)?;
    let lock = lock(&dir, &fd, LOCK)?;
    if account.uid != owner {
        let_in(&dir, &fd, &found, account)?;
        show_head(&dir, &fd)?;
    }
    for name in OWNED {
        give(&dir, &fd, name, account)?;
    }
    sync(&dir, fsync(&fd))?;
    Ok(Taken { dir, _lock: lock })
}

/// As the broker's user: all that it will need can be reached.
pub(super) fn see_it_usable(
    taken: &Taken,
    host: &Host,
    account: Account,
) -> Result<(), SettleError> {
    let uid = account.uid;
    for path in taken.owned() {
        if let Err(source) = std::fs::read_dir(&path) {
            return Err(SettleError::Unreachable { path, uid, source });
        }
    }
    for path in host.config_file.iter().filter(|file| file.exists()) {
        File::open(path).map_err(|source| SettleError::Unreadable {
            path: path.clone(),
            uid,
            source,
        })?;
    }
    for path in host.profile_directories() {
        match std::fs::read_dir(path) {
            Err(e)
                if !matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) =>
            {
                return Err(SettleError::Unreadable { path: path.clone(), uid, source: e });
            }
            _ => {}
        }
    }
    Ok(())
}

/// Above STATE others may pass through; STATE itself begins closed.
fn make(state_dir: &Path) -> Result<(), SettleError> {
    let failed = |source| place(state_dir, "created", source);
    if let Some(above) = state_dir.parent() {
        DirBuilder::new().recursive(true).mode(0o755).create(above).map_err(failed)?;
    }
    match DirBuilder::new().mode(0o700).create(state_dir) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(failed(e)),
        _ => Ok(()),
    }
}

/// The path with every link resolved, if no one but root and this user can lead it elsewhere.
pub(super) fn trusted(path: &Path) -> Result<PathBuf, SettleError> {
    let real = path.canonicalize().map_err(|e| place(path, "opened", e))?;
    let us = rustix::process::geteuid().as_raw();
    // In a user namespace the host's root has the overflow uid, and so has `/`.
    let root = Path::new("/").metadata().map_err(|e| place(Path::new("/"), "looked at", e))?.uid();
    let is_trusted = |uid| uid == 0 || uid == root || uid == us;
    for above in real.ancestors().skip(1) {
        let found = above.symlink_metadata().map_err(|e| place(above, "looked at", e))?;
        let is_sticky = found.mode() & 0o1000 != 0 && is_trusted(found.uid());
        let is_open = found.mode() & 0o022 != 0 && !is_sticky;
        if is_open || !is_trusted(found.uid()) {
            return Err(SettleError::Unsafe {
                path: path.to_owned(),
                fault: format!(
                    "lies in {} (uid {}, mode {:04o}), where others may replace it",
                    above.display(),
                    found.uid(),
                    found.mode() & 0o7777
                ),
                mend: "choose another place, or close that directory (chmod go-w)".to_owned(),
            });
        }
    }
    Ok(real)
}

pub(super) fn open_directory(path: &Path) -> Result<OwnedFd, SettleError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty()).map_err(|e| place(path, "opened", e))
}

/// A directory that is `owner`'s, and that no one else may write.
pub(super) fn refuse_others(path: &Path, found: &Stat, owner: u32) -> Result<(), SettleError> {
    if found.st_uid == owner && found.st_mode & 0o022 == 0 {
        return Ok(());
    }
    Err(SettleError::Unsafe {
        path: path.to_owned(),
        fault: format!("belongs to uid {} with mode {:04o}", found.st_uid, found.st_mode & 0o7777),
        mend: format!(
            "after a look at what lies there: chown {owner} {0} && chmod go-w {0}",
            path.display()
        ),
    })
}

/// An exclusive lock on a file that this user alone can open, held as long as the descriptor is.
pub(super) fn lock(dir: &Path, fd: &OwnedFd, name: &str) -> Result<OwnedFd, SettleError> {
    let path = dir.join(name);
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file =
        openat(fd, name, flags, Mode::RUSR | Mode::WUSR).map_err(|e| place(&path, "opened", e))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(Errno::WOULDBLOCK) => Err(SettleError::Busy { path: dir.to_owned() }),
        Err(e) => Err(place(&path, "locked", e)),
    }
}

/// Lets the broker pass through STATE: its group, unless everyone may.
fn let_in(dir: &Path, fd: &OwnedFd, found: &Stat, account: Account) -> Result<(), SettleError> {
    let mode = found.st_mode & 0o7777;
    if mode & 0o001 != 0 {
        return Ok(());
    }
    fchown(fd, None, Some(Gid::from_raw(account.gid)))
        .and_then(|()| fchmod(fd, Mode::from_raw_mode((mode & !0o070) | 0o010)))
        .map_err(|e| place(dir, "opened to the broker's group", e))
}

/// The broker compares the trail with its head, which an earlier launcher may have made unreadable.
fn show_head(dir: &Path, fd: &OwnedFd) -> Result<(), SettleError> {
    let path = dir.join(HEAD_FILE);
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    match openat(fd, HEAD_FILE, flags, Mode::empty()) {
        Err(Errno::NOENT) => Ok(()),
        Err(e) => Err(place(&path, "opened", e)),
        Ok(head) => {
            let found = status(&path, &head)?;
            if kind(&found) != FileType::RegularFile || found.st_uid != 0 || found.st_nlink != 1 {
                return Err(odd(&path, &found));
            }
            fchmod(&head, Mode::from_raw_mode(0o644)).map_err(|e| place(&path, "made readable", e))
        }
    }
}

/// Makes `STATE/name` the broker's.
fn give(dir: &Path, fd: &OwnedFd, name: &str, account: Account) -> Result<(), SettleError> {
    let path = dir.join(name);
    match mkdirat(fd, name, Mode::RWXU) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(e) => return Err(place(&path, "created", e)),
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let given = openat(fd, name, flags, Mode::empty()).map_err(|e| place(&path, "opened", e))?;
    let found = status(&path, &given)?;
    if found.st_uid == account.uid {
        return refuse_others(&path, &found, account.uid);
    }
    refuse_others(&path, &found, rustix::process::geteuid().as_raw())?;
    fchmod(&given, Mode::RWXU).map_err(|e| place(&path, "closed to others", e))?;
    give_all_in(&path, &given, account, DEPTH)?;
    // All of it on disk before the sign that it is done.
    sync(&path, syncfs(&given))?;
    fchown(&given, Some(Uid::from_raw(account.uid)), Some(Gid::from_raw(account.gid)))
        .map_err(|e| place(&path, "given to the broker's user", e))?;
    sync(&path, fsync(&given))
}

fn give_all_in(path: &Path, fd: &OwnedFd, account: Account, depth: u32) -> Result<(), SettleError> {
    let entries = Dir::read_from(fd).map_err(|e| place(path, "listed", e))?;
    for entry in entries {
        let entry = entry.map_err(|e| place(path, "listed", e))?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let path = path.join(name.to_string_lossy().as_ref());
        let found = statat(fd, name, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|e| place(&path, "looked at", e))?;
        let is_ours = found.st_uid == 0 || found.st_uid == account.uid;
        match kind(&found) {
            FileType::RegularFile if is_ours && found.st_nlink == 1 => {}
            FileType::Directory if is_ours && depth > 0 => {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let inner = openat(fd, name, flags, Mode::empty())
                    .map_err(|e| place(&path, "opened", e))?;
                give_all_in(&path, &inner, account, depth - 1)?;
            }
            _ => return Err(odd(&path, &found)),
        }
        let (uid, gid) = (Uid::from_raw(account.uid), Gid::from_raw(account.gid));
        chownat(fd, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|e| place(&path, "given to the broker's user", e))?;
    }
    Ok(())
}

fn odd(path: &Path, found: &Stat) -> SettleError {
    SettleError::Unsafe {
        path: path.to_owned(),
        fault: format!(
            "is a {:?} of uid {} with {} names, which sublet did not make",
            kind(found),
            found.st_uid,
            found.st_nlink
        ),
        mend: "move it away after a look at it".to_owned(),
    }
}

pub(super) fn kind(found: &Stat) -> FileType {
    FileType::from_raw_mode(found.st_mode)
}

pub(super) fn status(path: &Path, fd: impl AsFd) -> Result<Stat, SettleError> {
    fstat(fd).map_err(|e| place(path, "looked at", e))
}

fn sync(path: &Path, synced: Result<(), Errno>) -> Result<(), SettleError> {
    synced.map_err(|e| place(path, "made durable", e))
}

pub(super) fn place(path: &Path, doing: &'static str, source: impl Into<io::Error>) -> SettleError {
    SettleError::Place { path: path.to_owned(), doing, source: source.into() }
}
