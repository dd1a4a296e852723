//! Where the vault's key lies: a systemd credential, or `STATE/keys/vault.key`, outside the database's
//! directory and for its owner alone.
//!
//! The file belongs to whoever serves the state. A credential is root's (systemd.exec(5)): it is opened
//! while this process may, and read as often as the key is needed.
#![forbid(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::{CREDENTIAL, KEY_SIZE, VaultError, VaultKey};
use crate::model::secret::Secret;

/// Where the key is read from. Holds no key.
#[derive(Debug)]
pub struct KeySource {
    state_dir: PathBuf,
    /// The systemd credential, open.
    credential: Option<File>,
}

impl KeySource {
    /// The credential if `credentials` (`$CREDENTIALS_DIRECTORY`) holds it, else the state's file, which
    /// need not be there yet. To be called before a process gives up root's rights.
    ///
    /// # Errors
    /// [`VaultError::UnsafeKey`] or [`VaultError::ReadKey`] if there is a credential that cannot be used.
    pub fn open(state_dir: &Path, credentials: Option<&Path>) -> Result<Self, VaultError> {
        let credential = match credentials.map(|dir| dir.join(CREDENTIAL)) {
            None => None,
            Some(path) => match open(&path, Holder::ServiceManager) {
                Ok(file) => Some(file),
                Err(VaultError::NoKey { .. }) => None,
                Err(e) => return Err(e),
            },
        };
        Ok(Self { state_dir: state_dir.to_owned(), credential })
    }

    /// The key that is there.
    ///
    /// # Errors
    /// [`VaultError::NoKey`] if there is none, [`VaultError::UnsafeKey`] if others may read or change it,
    /// or it has not 32 bytes.
    pub fn load(&self) -> Result<VaultKey, VaultError> {
        let path = path(&self.state_dir);
        if let Some(credential) = &self.credential {
            return read(credential, Path::new(CREDENTIAL));
        }
        let directory = self.state_dir.join(DIRECTORY);
        match std::fs::symlink_metadata(&directory) {
            Ok(found) => refuse_unsafe_directory(&directory, &found)?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return Err(VaultError::NoKey { path });
            }
            Err(source) => return Err(VaultError::ReadKey { path, source }),
        }
        read(&open(&path, Holder::Us)?, &path)
    }

    /// As [`KeySource::load`], and makes the file on first use: random, mode 0600, synced to disk with
    /// its directory before anything is sealed under it. The state directory must exist.
    ///
    /// # Errors
    /// As [`KeySource::load`]; [`VaultError::CreateKey`].
    pub fn load_or_create(&self) -> Result<VaultKey, VaultError> {
        match self.load() {
            Err(VaultError::NoKey { .. }) => {}
            other => return other,
        }
        create(&self.state_dir, &path(&self.state_dir))?;
        self.load()
    }
}

const DIRECTORY: &str = "keys";

pub(super) fn path(state_dir: &Path) -> PathBuf {
    state_dir.join(DIRECTORY).join("vault.key")
}

fn open(path: &Path, holder: Holder) -> Result<File, VaultError> {
    let unreadable = |source| VaultError::ReadKey { path: path.to_owned(), source };
    // O_NONBLOCK so that a FIFO in its place does not hang us before it is refused. open(2).
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_CLOEXEC;
    let file = match OpenOptions::new().read(true).custom_flags(flags).open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            return Err(VaultError::NoKey { path: path.to_owned() });
        }
        Err(e) if e.raw_os_error() == Some(libc::ELOOP) => {
            return Err(unsafe_key(path, "is a symbolic link", "put the key itself there"));
        }
        Err(e) => return Err(unreadable(e)),
    };
    refuse_unsafe_file(path, &file.metadata().map_err(unreadable)?, holder)?;
    Ok(file)
}

/// Straight into locked memory.
fn read(file: &File, path: &Path) -> Result<VaultKey, VaultError> {
    let mut master =
        Secret::zeroed(KEY_SIZE).map_err(|source| VaultError::LockMemory { source })?;
    file.read_exact_at(master.expose_mut(), 0)
        .map_err(|source| VaultError::ReadKey { path: path.to_owned(), source })?;
    VaultKey::derive(&master)
}

/// Who put the key there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Holder {
    Us,
    /// systemd gives credentials mode 0400, or root's 0440 whose group bits are an access list's mask.
    ServiceManager,
}

fn unsafe_key(path: &Path, fault: impl Into<String>, mend: &'static str) -> VaultError {
    VaultError::UnsafeKey { path: path.to_owned(), fault: fault.into(), mend }
}

fn refuse_unsafe_directory(path: &Path, found: &std::fs::Metadata) -> Result<(), VaultError> {
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

fn refuse_unsafe_file(
    path: &Path,
    found: &std::fs::Metadata,
    holder: Holder,
) -> Result<(), VaultError> {
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
        let fault = format!("has mode {:04o}, so that others may use it", found.mode() & 0o7777);
        return Err(unsafe_key(
            path,
            fault,
            "take it to be known to them: set the secrets anew under a new key, with mode 0600",
        ));
    }
    if found.len() != KEY_SIZE as u64 {
        let fault = format!("has {} bytes and not {KEY_SIZE}", found.len());
        return Err(unsafe_key(
            path,
            fault,
            "restore it from a backup; without it no secret opens",
        ));
    }
    Ok(())
}

/// Writes a new key under a name of its own and publishes it whole with a link, which fails if another
/// process was first: no reader ever sees half a key.
fn create(state_dir: &Path, path: &Path) -> Result<(), VaultError> {
    use std::os::unix::fs::DirBuilderExt;
    let failed = |source| VaultError::CreateKey { path: path.to_owned(), source };
    let directory = state_dir.join(DIRECTORY);
    match std::fs::DirBuilder::new().mode(0o700).create(&directory) {
        Ok(()) => File::open(state_dir).and_then(|d| d.sync_all()).map_err(failed)?,
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
        Err(e) => return Err(failed(e)),
    }
    refuse_unsafe_directory(&directory, &std::fs::symlink_metadata(&directory).map_err(failed)?)?;

    let random = |source| VaultError::Random { source };
    let mut key = Secret::zeroed(KEY_SIZE).map_err(|source| VaultError::LockMemory { source })?;
    getrandom::fill(key.expose_mut()).map_err(random)?;
    let unique = getrandom::u64().map_err(random)?;
    let fresh = directory.join(format!(".vault.key.{unique:016x}"));
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
