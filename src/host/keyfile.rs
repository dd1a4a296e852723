//! A key of this host: 32 random bytes in a file of `STATE/keys/`, made on first use, or a systemd
//! credential. Given out in locked memory, refused if others could have read or changed it.
//!
//! Touches the key's file and directory. Must never hold a copy of the key outside of a [`Secret`].
#![forbid(unsafe_code)]

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Write};
use std::ops::RangeInclusive;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::model::secret::Secret;

/// Of all keys, under the state directory.
pub const DIRECTORY: &str = "keys";

/// Bytes of every key.
pub const KEY_SIZE: usize = 32;

/// Which key, and what to tell of one that cannot be used.
#[derive(Debug, Clone, Copy)]
pub struct KeyFile {
    /// The file's name under `STATE/keys`.
    pub name: &'static str,
    /// The systemd credential that holds the key, if there is one. systemd.exec(5), `LoadCredential=`.
    pub credential: &'static str,
    /// What to do if others may have read it.
    pub if_known: &'static str,
    /// What to do if it has not its size.
    pub if_torn: &'static str,
}

#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
    #[error(
        "there is no key at {path}: none was made on this host, or its state was moved without it"
    )]
    Absent { path: PathBuf },
    #[error("the key {path} {fault}; {mend}")]
    Unsafe { path: PathBuf, fault: String, mend: &'static str },
    #[error("cannot read the key {path}")]
    Read { path: PathBuf, source: io::Error },
    #[error("cannot create the key {path}")]
    Create { path: PathBuf, source: io::Error },
    #[error("cannot lock memory for a key; raise the limit for locked memory (ulimit -l)")]
    LockMemory { source: io::Error },
    #[error("the kernel gave no random bytes (getrandom(2))")]
    Random { source: std::io::Error },
}

/// Where a key is read from. Holds no key.
#[derive(Debug)]
pub struct KeySource {
    file: KeyFile,
    state_dir: PathBuf,
    /// The systemd credential, open.
    credential: Option<File>,
}

impl KeySource {
    pub fn state_dir(&self) -> &Path {
        &self.state_dir
    }

    /// The key that is there.
    ///
    /// # Errors
    /// [`KeyFileError::Absent`] if there is none, [`KeyFileError::Unsafe`] if others may read or change
    /// it, or it has not 32 bytes.
    pub fn load(&self) -> Result<Secret, KeyFileError> {
        if let Some(credential) = &self.credential {
            return read(credential, Path::new(self.file.credential));
        }
        let path = self.file.path(&self.state_dir);
        let directory = self.state_dir.join(DIRECTORY);
        match std::fs::symlink_metadata(&directory) {
            Ok(found) => refuse_unsafe_directory(&directory, &found)?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return Err(KeyFileError::Absent { path });
            }
            Err(source) => return Err(KeyFileError::Read { path, source }),
        }
        read(&self.file.open_file(&path, Holder::Us)?, &path)
    }

    /// As [`KeySource::load`], and makes the file on first use: random, mode 0600, synced to disk with its
    /// directory before it is given out. The state directory must exist.
    ///
    /// # Errors
    /// As [`KeySource::load`]; [`KeyFileError::Create`].
    pub fn load_or_create(&self) -> Result<Secret, KeyFileError> {
        match self.load() {
            Err(KeyFileError::Absent { .. }) => {}
            other => return other,
        }
        self.file.create(&self.state_dir, &self.file.path(&self.state_dir))?;
        self.load()
    }
}

/// Straight into locked memory.
fn read(file: &File, path: &Path) -> Result<Secret, KeyFileError> {
    let mut key = Secret::zeroed(KEY_SIZE).map_err(|source| KeyFileError::LockMemory { source })?;
    file.read_exact_at(key.expose_mut(), 0)
        .map_err(|source| KeyFileError::Read { path: path.to_owned(), source })?;
    Ok(key)
}

impl KeyFile {
    /// The file under a state directory, outside the database's.
    pub fn path(&self, state_dir: &Path) -> PathBuf {
        state_dir.join(DIRECTORY).join(self.name)
    }

    /// [`KeyFile::open`] and [`KeySource::load`] in one.
    ///
    /// # Errors
    /// Theirs.
    pub fn load(
        &self,
        state_dir: &Path,
        credentials: Option<&Path>,
    ) -> Result<Secret, KeyFileError> {
        self.open(state_dir, credentials)?.load()
    }

    /// [`KeyFile::open`] and [`KeySource::load_or_create`] in one.
    ///
    /// # Errors
    /// Theirs.
    pub fn load_or_create(
        &self,
        state_dir: &Path,
        credentials: Option<&Path>,
    ) -> Result<Secret, KeyFileError> {
        self.open(state_dir, credentials)?.load_or_create()
    }

    /// Where the key is to be read from: the systemd credential if `credentials`
    /// (`$CREDENTIALS_DIRECTORY`) holds it, which is opened now, before a process gives up root's rights;
    /// else the state's file, which need not be there yet.
    ///
    /// # Errors
    /// [`KeyFileError::Unsafe`] or [`KeyFileError::Read`] if there is a credential that cannot be used.
    pub fn open(
        self,
        state_dir: &Path,
        credentials: Option<&Path>,
    ) -> Result<KeySource, KeyFileError> {
        let credential = match credentials.map(|dir| dir.join(self.credential)) {
            None => None,
            Some(path) => match self.open_file(&path, Holder::ServiceManager) {
                Ok(file) => Some(file),
                Err(KeyFileError::Absent { .. }) => None,
                Err(e) => return Err(e),
            },
        };
        Ok(KeySource { file: self, state_dir: state_dir.to_owned(), credential })
    }

    fn open_file(&self, path: &Path, holder: Holder) -> Result<File, KeyFileError> {
        self.open_sized(path, holder, KEY_SIZE as u64..=KEY_SIZE as u64)
    }

    fn open_sized(
        &self,
        path: &Path,
        holder: Holder,
        sizes: RangeInclusive<u64>,
    ) -> Result<File, KeyFileError> {
        let unreadable = |source| KeyFileError::Read { path: path.to_owned(), source };
        // O_NONBLOCK so that a FIFO in its place does not hang us before it is refused. open(2).
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_CLOEXEC;
        let file = match OpenOptions::new().read(true).custom_flags(flags).open(path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return Err(KeyFileError::Absent { path: path.to_owned() });
            }
            Err(e) if e.raw_os_error() == Some(libc::ELOOP) => {
                return Err(unsafe_key(path, "is a symbolic link", "put the key itself there"));
            }
            Err(e) => return Err(unreadable(e)),
        };
        self.refuse_unsafe_file(path, &file.metadata().map_err(unreadable)?, holder, &sizes)?;
        Ok(file)
    }

    fn refuse_unsafe_file(
        &self,
        path: &Path,
        found: &Metadata,
        holder: Holder,
        sizes: &RangeInclusive<u64>,
    ) -> Result<(), KeyFileError> {
        if !found.is_file() {
            return Err(unsafe_key(path, "is no regular file", "put the key itself there"));
        }
        let ours = rustix::process::geteuid().as_raw();
        let (owner_fits, forbidden) = match holder {
            Holder::Us => (found.uid() == ours, 0o077),
            Holder::ServiceManager => (found.uid() == ours || found.uid() == 0, 0o037),
        };
        if !owner_fits {
            let fault = format!("belongs to uid {} and not to {ours}", found.uid());
            return Err(unsafe_key(path, fault, "give it to the user that sublet runs as (chown)"));
        }
        if found.mode() & forbidden != 0 {
            let mode = found.mode() & 0o7777;
            let fault = format!("has mode {mode:04o}, so that others may use it");
            return Err(unsafe_key(path, fault, self.if_known));
        }
        if !sizes.contains(&found.len()) {
            let fault = format!("has {} bytes, which no such key has", found.len());
            return Err(unsafe_key(path, fault, self.if_torn));
        }
        Ok(())
    }

    /// Writes a new key under a name of its own and publishes it whole with a link, which fails if another
    /// process was first: no reader ever sees half a key.
    fn create(&self, state_dir: &Path, path: &Path) -> Result<(), KeyFileError> {
        let failed = |source| KeyFileError::Create { path: path.to_owned(), source };
        let directory = directory_in(state_dir).map_err(|e| match e {
            KeyFileError::Create { source, .. } => failed(source),
            other => other,
        })?;
        let random = |source| KeyFileError::Random { source };
        let mut key =
            Secret::zeroed(KEY_SIZE).map_err(|source| KeyFileError::LockMemory { source })?;
        crate::sys::random::fill(key.expose_mut()).map_err(random)?;
        let unique = crate::sys::random::random_u64().map_err(random)?;
        let fresh = directory.join(format!(".{}.{unique:016x}", self.name));
        let written = write_new(&fresh, key.expose()).and_then(|()| {
            match std::fs::hard_link(&fresh, path) {
                // Another process was first: its key is the key.
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
                other => other,
            }
        });
        let removed = match std::fs::remove_file(&fresh) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        };
        written.and(removed).map_err(failed)?;
        File::open(&directory).and_then(|d| d.sync_all()).map_err(failed)
    }
}

/// A key that is no 32 random bytes, but of at most `most`: read as [`KeySource::load`] reads its own.
///
/// # Errors
/// As [`KeySource::load`].
pub fn load_other(
    state_dir: &Path,
    name: &str,
    most: usize,
    if_unsafe: &'static str,
) -> Result<Secret, KeyFileError> {
    let file = KeyFile { name: "", credential: "", if_known: if_unsafe, if_torn: if_unsafe };
    let directory = state_dir.join(DIRECTORY);
    let path = directory.join(name);
    match std::fs::symlink_metadata(&directory) {
        Ok(found) => refuse_unsafe_directory(&directory, &found)?,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(KeyFileError::Absent { path }),
        Err(source) => return Err(KeyFileError::Read { path, source }),
    }
    read_other(&file.open_sized(&path, Holder::Us, 1..=most as u64)?, &path, most)
}

/// As [`load_other`], of a file that is open.
pub fn read_other(file: &File, path: &Path, most: usize) -> Result<Secret, KeyFileError> {
    let unreadable = |source| KeyFileError::Read { path: path.to_owned(), source };
    let len = file.metadata().map_err(unreadable)?.len() as usize;
    let mut key =
        Secret::zeroed(len.min(most)).map_err(|source| KeyFileError::LockMemory { source })?;
    file.read_exact_at(key.expose_mut(), 0).map_err(unreadable)?;
    Ok(key)
}

/// Systemd's credentials whose names begin so, open, by the rest of their names: at most so many, of at most
/// `most` bytes each. To be called as [`KeyFile::open`].
///
/// # Errors
/// As [`KeyFile::open`].
pub fn open_credentials(
    credentials: &Path,
    prefix: &str,
    (count, most): (usize, usize),
    if_unsafe: &'static str,
) -> Result<Vec<(String, File)>, KeyFileError> {
    let unreadable = |source| KeyFileError::Read { path: credentials.to_owned(), source };
    let file = KeyFile { name: "", credential: "", if_known: if_unsafe, if_torn: if_unsafe };
    let entries = match std::fs::read_dir(credentials) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(unreadable(source)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let name = entry.map_err(unreadable)?.file_name();
        let Some(rest) = name.to_str().and_then(|name| name.strip_prefix(prefix)) else { continue };
        let open =
            file.open_sized(&credentials.join(&name), Holder::ServiceManager, 1..=most as u64)?;
        if found.len() < count {
            found.push((rest.to_owned(), open));
        }
    }
    Ok(found)
}

/// Keeps such a key under a name that is free, mode 0600, on disk with its directory when this returns.
///
/// # Errors
/// [`KeyFileError::Create`], [`KeyFileError::Unsafe`].
pub fn store_other(state_dir: &Path, name: &str, key: &Secret) -> Result<PathBuf, KeyFileError> {
    let directory = directory_in(state_dir)?;
    let path = directory.join(name);
    let failed = |source| KeyFileError::Create { path: path.clone(), source };
    write_new(&path, key.expose()).map_err(failed)?;
    File::open(&directory).and_then(|d| d.sync_all()).map_err(failed)?;
    Ok(path)
}

/// `STATE/keys`, made where it is not there, refused where others could write it.
pub fn directory_in(state_dir: &Path) -> Result<PathBuf, KeyFileError> {
    let directory = state_dir.join(DIRECTORY);
    let failed = |source| KeyFileError::Create { path: directory.clone(), source };
    match std::fs::DirBuilder::new().mode(0o700).create(&directory) {
        Ok(()) => File::open(state_dir).and_then(|d| d.sync_all()).map_err(failed)?,
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
        Err(e) => return Err(failed(e)),
    }
    let found = std::fs::symlink_metadata(&directory).map_err(failed)?;
    refuse_unsafe_directory(&directory, &found)?;
    Ok(directory)
}

/// Who put the key there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Holder {
    Us,
    /// systemd gives credentials mode 0400, or root's 0440 whose group bits are an access list's mask.
    ServiceManager,
}

fn unsafe_key(path: &Path, fault: impl Into<String>, mend: &'static str) -> KeyFileError {
    KeyFileError::Unsafe { path: path.to_owned(), fault: fault.into(), mend }
}

fn refuse_unsafe_directory(path: &Path, found: &Metadata) -> Result<(), KeyFileError> {
    if !found.is_dir() {
        return Err(unsafe_key(path, "lies in what is no directory", "make it a directory"));
    }
    // Root's is as good as ours: where a state is root's, its keys' directory may be too.
    let is_trusted = found.uid() == rustix::process::geteuid().as_raw() || found.uid() == 0;
    if !is_trusted || found.mode() & 0o022 != 0 {
        let fault = format!(
            "lies in a directory that others own or may write (uid {}, mode {:04o})",
            found.uid(),
            found.mode() & 0o7777
        );
        return Err(unsafe_key(path, fault, "make it ours alone (chown, chmod 0700)"));
    }
    Ok(())
}

fn write_new(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let flags = libc::O_NOFOLLOW | libc::O_CLOEXEC;
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .custom_flags(flags)
        .open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}
