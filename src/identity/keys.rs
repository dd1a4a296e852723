//! Where the issuer's private keys are read from: for each a systemd credential, opened while there are the
//! rights to, else the state's file. Holds no key.
#![forbid(unsafe_code)]

use std::fs::File;
use std::path::{Path, PathBuf};

use super::issuer::{IF_UNSAFE, MOST_KEYS, file_name};
use super::key;
use crate::host::keyfile::{self, KeyFileError};
use crate::model::secret::Secret;

/// What a credential is called: this, and the key's name. systemd.exec(5), `LoadCredential=`.
pub const CREDENTIAL: &str = "sublet-issuer-";

#[derive(Debug)]
pub struct IssuerKeys {
    state_dir: PathBuf,
    /// By the keys' names.
    credentials: Vec<(String, File)>,
}

impl IssuerKeys {
    /// To be called before a process gives up root's rights. `credentials`: `$CREDENTIALS_DIRECTORY`.
    ///
    /// # Errors
    /// There is a credential of that name that cannot be used.
    pub fn open(state_dir: &Path, credentials: Option<&Path>) -> Result<Self, KeyFileError> {
        let bounds = (MOST_KEYS, key::MAX_PKCS8);
        let credentials = match credentials {
            Some(dir) => keyfile::open_credentials(dir, CREDENTIAL, bounds, IF_UNSAFE)?,
            None => Vec::new(),
        };
        Ok(Self { state_dir: state_dir.to_owned(), credentials })
    }

    pub fn state_dir(&self) -> &Path {
        &self.state_dir
    }

    /// The private half of the key of this name.
    pub(super) fn load(&self, kid: &str) -> Result<Secret, KeyFileError> {
        match self.credentials.iter().find(|(name, _)| name == kid) {
            Some((name, file)) => {
                let path = PathBuf::from(format!("{CREDENTIAL}{name}"));
                keyfile::read_other(file, &path, key::MAX_PKCS8)
            }
            None => {
                keyfile::load_other(&self.state_dir, &file_name(kid), key::MAX_PKCS8, IF_UNSAFE)
            }
        }
    }
}
