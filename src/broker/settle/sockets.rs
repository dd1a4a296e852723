//! The directory of the sockets: root's or the user's own; in it the control socket, and a directory in
//! which the broker may make one socket a run.
#![forbid(unsafe_code)]

use std::fs::{DirBuilder, Permissions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, fchown, mkdirat, openat};
use rustix::io::Errno;
use rustix::process::{Gid, Uid};

use super::posture::ControlFrom;
use super::state::{lock, open_directory, place, refuse_others, status, trusted};
use super::{SettleError, manager};
use crate::host::{Account, container};

const RUNS: &str = "runs";
const CONTROL: &str = "control.sock";
/// By its lock only one broker at a time has its sockets here.
const LOCK: &str = "serve.lock";

/// The directory of the sockets, ready.
#[derive(Debug)]
pub(super) struct Place {
    dir: PathBuf,
    _lock: OwnedFd,
}

impl Place {
    pub fn runs(&self) -> PathBuf {
        self.dir.join(RUNS)
    }

    /// Records of containers, which root's hook writes.
    pub fn containers(&self) -> PathBuf {
        self.dir.join(container::DIRECTORY)
    }

    pub fn control(&self) -> PathBuf {
        self.dir.join(CONTROL)
    }
}

/// Makes the directory and the one of the runs' sockets.
pub(super) fn open(runtime_dir: &Path, account: Account) -> Result<Place, SettleError> {
    let us = rustix::process::geteuid().as_raw();
    // Execs' uids are locked in root's place, and others' sockets are reached through it.
    let mode = if account.uid == us && us != 0 { 0o700 } else { 0o755 };
    DirBuilder::new()
        .recursive(true)
        .mode(mode)
        .create(runtime_dir)
        .map_err(|e| place(runtime_dir, "created", e))?;
    let dir = trusted(runtime_dir)?;
    let fd = open_directory(&dir)?;
    refuse_others(&dir, &status(&dir, &fd)?, us)?;
    let lock = lock(&dir, &fd, LOCK)?;
    runs(&dir, &fd, account)?;
    let boot = crate::host::now().map_err(|e| place(&dir, "dated", e))?.boot_id;
    container::sweep(&dir, &boot).map_err(|e| place(&dir, "swept of dead containers", e))?;
    Ok(Place { dir, _lock: lock })
}

fn runs(dir: &Path, fd: &OwnedFd, account: Account) -> Result<(), SettleError> {
    let path = dir.join(RUNS);
    match mkdirat(fd, RUNS, Mode::RWXU) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(e) => return Err(place(&path, "created", e)),
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let runs = openat(fd, RUNS, flags, Mode::empty()).map_err(|e| place(&path, "opened", e))?;
    let found = status(&path, &runs)?;
    if found.st_uid == rustix::process::geteuid().as_raw() {
        // Ours alone until now, so that there is nothing in it which another put there.
        refuse_others(&path, &found, found.st_uid)?;
        return fchown(&runs, Some(Uid::from_raw(account.uid)), Some(Gid::from_raw(account.gid)))
            .map_err(|e| place(&path, "given to the broker's user", e));
    }
    refuse_others(&path, &found, account.uid)
}

/// The control socket: systemd's, or a new one.
pub(super) fn listen(at: &Place) -> Result<(UnixListener, ControlFrom), SettleError> {
    if let Some(listener) = manager::handed_over()? {
        return Ok((listener, ControlFrom::Manager));
    }
    let path = at.control();
    remove_stale(&path)?;
    // Mode 0600 from the first moment on: anyone who connected before a chmod would stay.
    let before = rustix::process::umask(Mode::RWXG | Mode::RWXO | Mode::XUSR);
    let bound = UnixListener::bind(&path);
    rustix::process::umask(before);
    let listener = bound.map_err(|e| place(&path, "bound", e))?;
    std::fs::set_permissions(&path, Permissions::from_mode(0o600))
        .map_err(|e| place(&path, "closed to others", e))?;
    Ok((listener, ControlFrom::Broker))
}

/// A socket unit may have it elsewhere.
pub(super) fn path_of(control: &UnixListener, at: &Place) -> PathBuf {
    let address = control.local_addr().ok();
    address.and_then(|a| a.as_pathname().map(Path::to_owned)).unwrap_or_else(|| at.control())
}

/// What an earlier broker left. One that someone listens on is systemd's, to whom it was not said that
/// this process is its service.
fn remove_stale(path: &Path) -> Result<(), SettleError> {
    let found = match path.symlink_metadata() {
        Ok(found) => found,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(place(path, "looked at", e)),
    };
    let us = rustix::process::geteuid().as_raw();
    if !found.file_type().is_socket() || found.uid() != us {
        return Err(SettleError::Unsafe {
            path: path.to_owned(),
            fault: "is there already, and is no socket of this user's".to_owned(),
            mend: "move it away after a look at it".to_owned(),
        });
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(SettleError::Busy { path: path.to_owned() }),
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(|e| place(path, "removed", e))
        }
        Err(e) => Err(place(path, "tried", e)),
    }
}
