//! The workspace of an exec: opened once by its canonical path, refused where it must never be one.
#![forbid(unsafe_code)]

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode as FileMode, OFlags, ResolveFlags};
use rustix::io::Errno;

use super::invalid;
use crate::launcher::guard::Guard;
use crate::launcher::into::survey::Seen;
use crate::launcher::wire::Refusal;
use crate::sandbox::layout::Access;

/// The workspace, opened once: nothing can be swapped for it afterwards.
pub struct Workspace {
    pub directory: OwnedFd,
    pub path: PathBuf,
    pub uid: u32,
    pub gid: u32,
    pub access: Access,
    /// Its magic number, statfs(2).
    pub file_system: u64,
    /// `directory` is a detached clone already: of a container, whose mounts only it can clone.
    pub is_clone: bool,
    /// Device and inode.
    identity: (u64, u64),
}

impl Workspace {
    /// One in a container, as the survey found it; whose files the exec's user has on the host.
    pub(super) fn of_container(
        path: &Path,
        (seen, tree): (Seen, OwnedFd),
        owner: (u32, u32),
        access: Access,
    ) -> Self {
        Self {
            directory: tree,
            path: path.to_owned(),
            uid: owner.0,
            gid: owner.1,
            access,
            file_system: seen.file_system,
            is_clone: true,
            identity: (seen.dev, seen.ino),
        }
    }

    pub(super) fn facts(&self) -> (&Path, u32, u32, Access, (u64, u64)) {
        (&self.path, self.uid, self.gid, self.access, self.identity)
    }
}

/// Opens the workspace by its canonical path and refuses what must never be one.
pub(super) fn open_workspace(
    path: &Path,
    access: Access,
    guard: &Guard,
    home: &Path,
) -> Result<Workspace, Refusal> {
    let shown = path.display();
    let refuse = |why: String| {
        invalid(
            format!("{shown} cannot be a workspace: {why}"),
            "name a project directory with --workspace",
        )
    };
    if !path.is_absolute() {
        return Err(refuse("its path is not absolute".into()));
    }
    // Below one of the roots by its beginning alone, `roots/../etc` would be.
    if path.components().any(|part| part == std::path::Component::ParentDir) {
        return Err(refuse("its path holds `..`".into()));
    }
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    // The caller resolved every link; one that stands there now was put there since.
    let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let directory =
        rustix::fs::openat2(CWD, path, flags, FileMode::empty(), resolve).map_err(|e| {
            refuse(match e {
                Errno::NOENT => "there is no such directory".into(),
                Errno::NOTDIR => "it is not a directory".into(),
                Errno::LOOP => {
                    "a symbolic link was put in its path while it was being opened".into()
                }
                e => e.to_string(),
            })
        })?;
    let found = File::from(directory.try_clone().map_err(|e| refuse(e.to_string()))?)
        .metadata()
        .map_err(|e| refuse(e.to_string()))?;
    if path == Path::new("/") {
        return Err(refuse("it is the whole file system".into()));
    }
    if home.starts_with(path) || same_directory(home, &found) {
        return Err(refuse(
            "it is or holds a home directory, with its keys and configuration".into(),
        ));
    }
    const SYSTEM: [&str; 12] = [
        "/bin", "/boot", "/dev", "/etc", "/lib", "/lib64", "/proc", "/run", "/sbin", "/sys",
        "/usr", "/var",
    ];
    if SYSTEM.iter().any(|s| path == Path::new(s))
        || ["/dev", "/proc", "/sys", "/run/sublet"].iter().any(|s| path.starts_with(s))
    {
        return Err(refuse("it belongs to the system".into()));
    }
    if let Some(why) = guard.objection_to(path, &found) {
        return Err(refuse(why));
    }
    let file_system = rustix::fs::fstatfs(&directory).map_err(|e| refuse(e.to_string()))?.f_type;
    Ok(Workspace {
        file_system: file_system as u64,
        is_clone: false,
        directory,
        path: path.to_owned(),
        uid: found.uid(),
        gid: found.gid(),
        access,
        identity: (found.dev(), found.ino()),
    })
}

fn same_directory(path: &Path, found: &std::fs::Metadata) -> bool {
    path.metadata().is_ok_and(|m| m.dev() == found.dev() && m.ino() == found.ino())
}
