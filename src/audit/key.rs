//! The key with which this host signs its trail and its envelopes: an Ed25519 seed in a file beside the
//! vault's, made on first use.
//!
//! Receives the state directory; returns the key in locked memory. Touches that file and nothing else.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};

use crate::envelope::{KeyError, SigningKey};
use crate::host::keyfile::{KeyFile, KeyFileError, KeySource};

/// The systemd credential that holds the key, if there is one. systemd.exec(5), `LoadCredential=`.
pub const CREDENTIAL: &str = "sublet-signing-key";

const FILE: KeyFile = KeyFile {
    name: "signing.key",
    credential: CREDENTIAL,
    if_known: "take it to be known to them: move it away, so that a new one is made with mode 0600, \
               and no longer trust what the old one signed after that",
    if_torn: "restore it from a backup, or move it away and keep the old public half for `--key`",
};

#[derive(Debug, thiserror::Error)]
pub enum SigningKeyError {
    #[error(transparent)]
    File(#[from] KeyFileError),
    #[error(transparent)]
    Key(#[from] KeyError),
}

/// The key's file under a state directory, outside the database's.
pub fn path(state_dir: &Path) -> PathBuf {
    FILE.path(state_dir)
}

/// The key that is there: the systemd credential if `credentials` (`$CREDENTIALS_DIRECTORY`) holds it, else
/// the file. Nothing if there is neither: this host has signed nothing yet.
///
/// # Errors
/// [`SigningKeyError`]: others may read or change it, or it has not 32 bytes.
pub fn load(
    state_dir: &Path,
    credentials: Option<&Path>,
) -> Result<Option<SigningKey>, SigningKeyError> {
    match FILE.load(state_dir, credentials) {
        Ok(seed) => Ok(Some(SigningKey::from_seed(seed)?)),
        Err(KeyFileError::Absent { .. }) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// Where the key is to be read from, for [`of`]: a credential is opened now, before a process gives up
/// root's rights.
///
/// # Errors
/// [`KeyFileError`]: there is a credential that cannot be used.
pub fn open(state_dir: &Path, credentials: Option<&Path>) -> Result<KeySource, KeyFileError> {
    FILE.open(state_dir, credentials)
}

/// The key, made on first use as by [`load_or_create`].
///
/// # Errors
/// As [`load_or_create`].
pub fn of(source: &KeySource) -> Result<SigningKey, SigningKeyError> {
    Ok(SigningKey::from_seed(source.load_or_create()?)?)
}

/// As [`load`], and makes the file on first use: random, mode 0600, on disk before anything is signed with
/// it. The state directory must exist.
///
/// # Errors
/// As [`load`], and if the file cannot be made.
pub fn load_or_create(
    state_dir: &Path,
    credentials: Option<&Path>,
) -> Result<SigningKey, SigningKeyError> {
    of(&open(state_dir, credentials)?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn the_key_is_made_once_and_found_again_and_refused_to_others() {
        let dir = tempfile::tempdir().unwrap();
        assert!(load(dir.path(), None).unwrap().is_none());
        assert!(!dir.path().join("keys").exists(), "looking makes nothing");
        let key = load_or_create(dir.path(), None).unwrap();
        let again = load(dir.path(), None).unwrap().unwrap();
        assert_eq!(key.public(), again.public());
        let file = path(dir.path());
        assert_eq!(file.metadata().unwrap().permissions().mode() & 0o7777, 0o600);

        // The service manager's goes before the file's.
        let credentials = tempfile::tempdir().unwrap();
        std::fs::write(credentials.path().join(CREDENTIAL), [9; 32]).unwrap();
        let mode = |path: &Path, mode| {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
        };
        mode(&credentials.path().join(CREDENTIAL), 0o400);
        let other = load(dir.path(), Some(credentials.path())).unwrap().unwrap();
        assert_ne!(other.public(), key.public());

        mode(&file, 0o640);
        let refused = load(dir.path(), None).err().unwrap();
        assert!(refused.to_string().contains("0640"), "{refused}");
        mode(&file, 0o600);
        std::fs::write(&file, [1; 31]).unwrap();
        assert!(load(dir.path(), None).is_err());
    }
}
