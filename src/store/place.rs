//! Where the store lies, `STATE/db/`: made for us alone, and refused if others could change it.
//!
//! Receives the state directory; returns the paths, checked. Touches nothing but these directories.
//! Must never open the database's own files: closing any descriptor of one drops the locks that SQLite
//! holds on it in this process (fcntl(2), "record locks").
#![forbid(unsafe_code)]

use std::fs::{DirBuilder, File, Metadata};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::Access;
use rustix::io::Errno;

use crate::store::error::StoreError;

pub(super) struct Place {
    pub dir: PathBuf,
    pub db: PathBuf,
    pub wal: PathBuf,
    pub shm: PathBuf,
    pub owners: PathBuf,
}

/// The files behind the paths: device and inode of database, log and index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Identity([Option<(u64, u64)>; 3]);

impl Place {
    /// Creates what is missing with mode 0700, parents included.
    pub fn for_writing(state_dir: &Path) -> Result<Self, StoreError> {
        let user = rustix::process::geteuid().as_raw();
        let root = match resolve(state_dir, user) {
            Err(StoreError::NotFound { .. }) => {
                create(state_dir, true)?;
                resolve(state_dir, user)?
            }
            other => other?,
        };
        refuse_unsafe(&root, &found(&root)?, Kind::Above, user)?;
        let place = Self::under(&root);
        match found(&place.dir) {
            Err(StoreError::NotFound { .. }) => {
                create(&place.dir, false)?;
                // Else a power cut could take the directory back with all that was durable in it.
                for directory in [Some(root.as_path()), root.parent()].into_iter().flatten() {
                    sync(directory)?;
                }
                refuse_unsafe(&place.dir, &found(&place.dir)?, Kind::Directory, user)?;
            }
            other => refuse_unsafe(&place.dir, &other?, Kind::Directory, user)?,
        }
        place.refuse_unsafe_files(user)?;
        Ok(place)
    }

    /// Creates nothing. Not even root reads what another user recorded: reading makes an index beside the
    /// database, where that user could lead it elsewhere. Root becomes that user first.
    pub fn for_reading(state_dir: &Path) -> Result<Self, StoreError> {
        let user = rustix::process::geteuid().as_raw();
        let root = resolve(state_dir, user)?;
        let place = Self::under(&root);
        refuse_unsafe(&root, &found(&root)?, Kind::Above, user)?;
        refuse_unsafe(&place.dir, &found(&place.dir)?, Kind::Directory, user)?;
        found(&place.db)?;
        place.refuse_unsafe_files(user)?;
        Ok(place)
    }

    fn under(root: &Path) -> Self {
        let dir = root.join("db");
        Self {
            db: dir.join("sublet.db"),
            wal: dir.join("sublet.db-wal"),
            shm: dir.join("sublet.db-shm"),
            owners: dir.join("owners"),
            dir,
        }
    }

    fn refuse_unsafe_files(&self, user: u32) -> Result<(), StoreError> {
        for file in [&self.db, &self.wal, &self.shm, &self.owners] {
            match found(file) {
                Err(StoreError::NotFound { .. }) => {}
                other => refuse_unsafe(file, &other?, Kind::File, user)?,
            }
        }
        Ok(())
    }

    /// Whether there is a database. A log without one is all that is left of a removed database, and
    /// would be played into a new one.
    pub fn has_database(&self, files: &Identity) -> Result<bool, StoreError> {
        match (files.database(), files.0[1]) {
            (Some(_), _) => Ok(true),
            (None, None) => Ok(false),
            (None, Some(_)) => Err(StoreError::Corrupt {
                path: self.db.clone(),
                found: "it is gone, and its write-ahead log is still there".to_owned(),
                source: None,
            }),
        }
    }

    /// Whether SQLite may write the log's index, which it does through a mapping: where the file cannot be written any
    /// more (chattr(1) +i, a file system that the kernel has made read-only) that is SIGBUS, and the process's end.
    /// mmap(2). Asked before each step and look; what changes within one is not met.
    ///
    /// # Errors
    /// [`StoreError::Unwritable`].
    pub fn check_index(&self) -> Result<(), StoreError> {
        match rustix::fs::access(&self.shm, Access::WRITE_OK) {
            // One that was removed is still mapped; who lost what is found out elsewhere.
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(e) => Err(unusable(&self.shm, "written", e.into())),
        }
    }

    pub fn identity(&self) -> Identity {
        let inode = |path: &Path| {
            std::fs::symlink_metadata(path).ok().map(|found| (found.dev(), found.ino()))
        };
        Identity([inode(&self.db), inode(&self.wal), inode(&self.shm)])
    }
}

impl Identity {
    pub fn database(&self) -> Option<(u64, u64)> {
        self.0[0]
    }

    pub fn has_log(&self) -> bool {
        self.0[1].is_some()
    }
}

#[derive(Clone, Copy)]
enum Kind {
    /// The state's directory: root's, where a broker that is not root serves the state.
    Above,
    Directory,
    File,
}

/// The directory's own path, links resolved, if no one but root and us can lead it elsewhere.
fn resolve(state_dir: &Path, user: u32) -> Result<PathBuf, StoreError> {
    let link = found(state_dir)?;
    if link.is_symlink() && link.uid() != user && link.uid() != 0 {
        return Err(refused(
            state_dir,
            format!("is a symbolic link of uid {}", link.uid()),
            "name the directory itself",
        ));
    }
    let root = std::fs::canonicalize(state_dir).map_err(|e| unusable(state_dir, "opened", e))?;
    for ancestor in root.ancestors().skip(1) {
        let above = found(ancestor)?;
        // Where others may write and nothing is sticky, they may rename what is below.
        if above.mode() & 0o002 != 0 && above.mode() & 0o1000 == 0 {
            return Err(refused(
                &root,
                format!("lies in {}, where anyone may replace it", ancestor.display()),
                "choose another with --state-dir, or take the write permission from others",
            ));
        }
    }
    Ok(root)
}

fn refuse_unsafe(path: &Path, found: &Metadata, kind: Kind, user: u32) -> Result<(), StoreError> {
    match kind {
        Kind::Above | Kind::Directory if !found.is_dir() => {
            return Err(refused(path, "is no directory", "choose another with --state-dir"));
        }
        Kind::File if found.is_symlink() => {
            return Err(refused(path, "is a symbolic link", "put the file itself there"));
        }
        Kind::File if !found.is_file() => {
            return Err(refused(path, "is no regular file", "move it away"));
        }
        Kind::Above | Kind::Directory | Kind::File => {}
    }
    let is_roots = matches!(kind, Kind::Above) && found.uid() == 0;
    if found.uid() != user && !is_roots {
        return Err(refused(
            path,
            format!("belongs to uid {} and not to {user}", found.uid()),
            "run as that user, or choose another with --state-dir",
        ));
    }
    if found.mode() & 0o022 != 0 {
        return Err(refused(
            path,
            format!("has mode {:04o}, so that others may write it", found.mode() & 0o7777),
            "take the permission from them (chmod go-w) after a look at what they changed",
        ));
    }
    Ok(())
}

fn found(path: &Path) -> Result<Metadata, StoreError> {
    std::fs::symlink_metadata(path).map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => StoreError::NotFound { path: path.to_owned() },
        _ => unusable(path, "opened", e),
    })
}

fn create(path: &Path, parents: bool) -> Result<(), StoreError> {
    match DirBuilder::new().recursive(parents).mode(0o700).create(path) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other.map_err(|e| unusable(path, "created", e)),
    }
}

/// Makes a directory's entries durable.
pub(super) fn sync(directory: &Path) -> Result<(), StoreError> {
    File::open(directory)
        .and_then(|d| d.sync_all())
        .map_err(|e| unusable(directory, "made durable", e))
}

pub(super) fn unusable(path: &Path, doing: &'static str, source: io::Error) -> StoreError {
    StoreError::Unwritable { path: path.to_owned(), doing, source: source.into() }
}

fn refused(path: &Path, fault: impl Into<String>, mend: &'static str) -> StoreError {
    StoreError::Unsafe { path: path.to_owned(), fault: fault.into(), mend }
}
