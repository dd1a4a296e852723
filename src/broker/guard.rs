//! What the guard of a container recognises the managed values by. Each is opened once in a broker's life
//! for that, in locked memory; what is kept and told is its fingerprints.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use crate::broker::{Broker, BrokerError};
use crate::config::SecretSource;
use crate::guard::{Fingerprint, GuardKey, Told};
use crate::model::name::SecretName;
use crate::run::RunError;
use crate::source::vault::{self, VaultError};

/// By name and version.
pub(super) type Known = Mutex<BTreeMap<(SecretName, u64), Vec<Fingerprint>>>;

impl Broker {
    /// The fingerprints of all values in the vault, as they are now.
    ///
    /// # Errors
    /// A vault that cannot be opened: then nothing can be said to be clean.
    pub fn guard(&self) -> Result<Told, BrokerError> {
        let failed = |e: VaultError| BrokerError::Run(RunError::unavailable_vault(e));
        let entries = self.store.read(|view| view.secrets())?;
        let kept = |source: &SecretSource| matches!(source, SecretSource::Vault);
        let others = self.host.config.secrets.iter().filter(|(_, entry)| !kept(&entry.source));
        let unguarded = others.map(|(name, _)| name.clone()).collect();
        if entries.is_empty() {
            // There may be no key yet, and there is nothing to compare.
            return Ok(Told::new(&GuardKey::new([0; 32]), Vec::new(), unguarded));
        }
        let key = self.shared.keys.vault.load().map_err(failed)?;
        let mut known = self.fingerprints.lock().unwrap_or_else(PoisonError::into_inner);
        let mut all = Vec::new();
        let mut current = BTreeMap::new();
        for entry in entries {
            let id = (entry.name.clone(), entry.version);
            let prints = match known.remove(&id) {
                Some(prints) => prints,
                None => {
                    // Rotated or removed since it was listed: told as it is now, or not at all.
                    let Some(secret) = self.store.read(|view| view.secret(&entry.name))? else {
                        continue;
                    };
                    let version = secret.entry.version;
                    vault::fingerprints(&key, &entry.name, version, &secret.sealed)
                        .map_err(failed)?
                }
            };
            all.extend(prints.iter().cloned());
            current.insert(id, prints);
        }
        *known = current;
        Ok(Told::new(&key.guard_key(), all, unguarded))
    }
}
