//! Sealed secrets: what the vault made of a value, never the value.
#![forbid(unsafe_code)]

use rusqlite::{OptionalExtension, Row};

use crate::model::digest::ValueDigest;
use crate::model::moment::Moment;
use crate::model::name::SecretName;
use crate::store::error::StoreError;
use crate::store::runs::parsed;
use crate::store::{Tx, View};

/// A secret without its value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SecretEntry {
    pub name: SecretName,
    /// 1 when it is first set, one more with every rotation. Authenticated with the sealed value.
    pub version: u64,
    pub set_at: jiff::Timestamp,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SealedSecret {
    pub entry: SecretEntry,
    pub sealed: Vec<u8>,
}

impl View<'_> {
    pub fn secret(&self, name: &SecretName) -> Result<Option<SealedSecret>, StoreError> {
        self.prepare("SELECT name, version, set_at, sealed FROM secret WHERE name = ?1")?
            .query_row([name.as_str()], |row| {
                Ok(SealedSecret { entry: read_entry(row)?, sealed: row.get(3)? })
            })
            .optional()
            .map_err(self.error())
    }

    /// All secrets by name, without values.
    pub fn secrets(&self) -> Result<Vec<SecretEntry>, StoreError> {
        self.prepare("SELECT name, version, set_at FROM secret ORDER BY name")?
            .query_map([], read_entry)
            .and_then(Iterator::collect)
            .map_err(self.error())
    }

    /// The keyed digests of all managed values, to recognise one in what a user gives.
    pub fn digests(&self) -> Result<Vec<(SecretName, ValueDigest)>, StoreError> {
        self.prepare("SELECT name, digest FROM secret ORDER BY name")?
            .query_map([], |row| Ok((parsed(row, 0)?, ValueDigest(row.get(1)?))))
            .and_then(Iterator::collect)
            .map_err(self.error())
    }
}

impl Tx<'_> {
    /// The version under which the next value of `name` is to be sealed.
    pub fn next_secret_version(&self, name: &SecretName) -> Result<u64, StoreError> {
        let current: Option<u64> = self
            .prepare("SELECT version FROM secret WHERE name = ?1")?
            .query_row([name.as_str()], |row| row.get(0))
            .optional()
            .map_err(self.error())?;
        Ok(current.unwrap_or(0) + 1)
    }

    /// Sets or rotates a secret to what was sealed under `version`, which is
    /// [`Tx::next_secret_version`] of this transaction. What it replaces is overwritten in the file.
    ///
    /// # Errors
    /// [`StoreError::Missing`] if the version is not the next one.
    pub fn put_secret(
        &mut self,
        name: &SecretName,
        version: u64,
        sealed: &[u8],
        digest: &ValueDigest,
        now: &Moment,
    ) -> Result<(), StoreError> {
        if version != self.next_secret_version(name)? {
            let what = format!("the version of {name} before {version}");
            return Err(StoreError::Missing { what });
        }
        self.overwrite_what_is_deleted()?;
        self.large = true;
        self.prepare(
            "INSERT INTO secret (name, version, sealed, digest, set_at) VALUES (?1, ?2, ?3, ?4, ?5)
             ON CONFLICT (name) DO UPDATE SET version = excluded.version, sealed = excluded.sealed,
                 digest = excluded.digest, set_at = excluded.set_at",
        )?
        .execute((name.as_str(), version, sealed, digest.0, now.wall.to_string()))
        .map(drop)
        .map_err(self.error())
    }

    /// Removes a secret and overwrites it in the file. Returns whether it was there. The log keeps its
    /// ciphertext until [`crate::store::Store::tidy`] and the writes after it.
    pub fn remove_secret(&mut self, name: &SecretName) -> Result<bool, StoreError> {
        self.overwrite_what_is_deleted()?;
        self.large = true;
        let removed = self
            .prepare("DELETE FROM secret WHERE name = ?1")?
            .execute([name.as_str()])
            .map_err(self.error())?;
        Ok(removed == 1)
    }

    fn overwrite_what_is_deleted(&self) -> Result<(), StoreError> {
        self.prepare("PRAGMA secure_delete = ON")?.query_row([], |_| Ok(())).map_err(self.error())
    }
}

fn read_entry(row: &Row<'_>) -> rusqlite::Result<SecretEntry> {
    Ok(SecretEntry { name: parsed(row, 0)?, version: row.get(1)?, set_at: parsed(row, 2)? })
}
