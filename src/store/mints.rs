//! Values that another party minted for a lease and that have not ended yet: who issued them, until when,
//! and what revokes them, sealed by the vault. A row goes when the value has ended; the trail keeps the rest.
#![forbid(unsafe_code)]

use rusqlite::Row;

use crate::model::id::{ExecId, LeaseId, MintId};
use crate::model::mint::About;
use crate::model::name::SecretName;
use crate::store::error::StoreError;
use crate::store::owner::OwnerId;
use crate::store::place::unusable;
use crate::store::runs::parsed;
use crate::store::{Tx, View};

/// A minted value that has not ended, without the value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MintRecord {
    pub mint_id: MintId,
    pub lease_id: LeaseId,
    pub exec_id: ExecId,
    /// Whose source minted it, and can revoke it.
    pub secret: SecretName,
    pub about: About,
    /// What revokes it, sealed. Nothing: it ends when it expires.
    pub handle: Option<Vec<u8>>,
    /// How often its revocation has failed.
    pub attempts: u32,
}

const COLUMNS: &str =
    "mint_id, lease_id, exec_id, secret, issuer, scope, principal, far_id, expires_ms,
     handle, attempts";

impl View<'_> {
    /// All that have not ended, oldest first.
    pub fn mints(&self) -> Result<Vec<MintRecord>, StoreError> {
        if !self.has_step(3)? {
            return Ok(Vec::new());
        }
        self.prepare(&format!("SELECT {COLUMNS} FROM mint ORDER BY mint_id"))?
            .query_map([], read_mint)
            .and_then(Iterator::collect)
            .map_err(self.error())
    }

    /// From when on [`View::has_due_mints`] says yes.
    pub fn next_due_mint(&self) -> Result<Option<i64>, StoreError> {
        self.prepare("SELECT min(coalesce(due_ms, 0)) FROM mint")?
            .query_row([], |row| row.get(0))
            .map_err(self.error())
    }

    /// Whether [`Tx::due_mints`] could find something, without writing: what is due, or belongs to an exec,
    /// perhaps of a process that is gone.
    pub fn has_due_mints(&self, now_ms: i64) -> Result<bool, StoreError> {
        Ok(self.next_due_mint()?.is_some_and(|at| at <= now_ms))
    }
}

impl Tx<'_> {
    /// Minted for an exec of this process that lives: no one else ends it while this process does.
    pub fn put_mint(&mut self, mint: &MintRecord) -> Result<(), StoreError> {
        self.prepare(&format!(
            "INSERT INTO mint ({COLUMNS}, due_ms, owner)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, NULL, ?12)"
        ))?
        .execute((
            mint.mint_id.as_str(),
            mint.lease_id.as_str(),
            mint.exec_id.as_str(),
            mint.secret.as_str(),
            &mint.about.issuer,
            &mint.about.scope,
            &mint.about.principal,
            &mint.about.far_id,
            mint.about.expires_at,
            &mint.handle,
            mint.attempts,
            self.owner.id().0,
        ))
        .map(drop)
        .map_err(self.error())
    }

    /// The far side lets it live longer.
    pub fn extend_mint(&mut self, id: &MintId, expires_ms: Option<i64>) -> Result<(), StoreError> {
        self.prepare("UPDATE mint SET expires_ms = ?2 WHERE mint_id = ?1")?
            .execute((id.as_str(), expires_ms))
            .map(drop)
            .map_err(self.error())
    }

    /// It shall end, and is tried again at this time: its exec is over, or a try has failed.
    pub fn postpone_mint(
        &mut self,
        id: &MintId,
        due_ms: i64,
        has_failed: bool,
    ) -> Result<(), StoreError> {
        self.prepare("UPDATE mint SET due_ms = ?2, attempts = attempts + ?3 WHERE mint_id = ?1")?
            .execute((id.as_str(), due_ms, has_failed))
            .map(drop)
            .map_err(self.error())
    }

    /// It has ended. Returns whether that is new. What revoked it is overwritten in the file.
    pub fn end_mint(&mut self, id: &MintId) -> Result<bool, StoreError> {
        self.prepare("PRAGMA secure_delete = ON")?
            .query_row([], |_| Ok(()))
            .map_err(self.error())?;
        self.large = true;
        let ended = self
            .prepare("DELETE FROM mint WHERE mint_id = ?1")?
            .execute([id.as_str()])
            .map_err(self.error())?;
        Ok(ended == 1)
    }

    /// What is to end by now: of this process, and of processes that are gone. Adopted, and not due again
    /// before `again_ms`, so that no other process tries meanwhile.
    pub fn due_mints(&mut self, now_ms: i64, again_ms: i64) -> Result<Vec<MintRecord>, StoreError> {
        let owners: Vec<i64> = self
            .prepare("SELECT DISTINCT owner FROM mint WHERE due_ms IS NULL OR due_ms <= ?1")?
            .query_map([now_ms], |row| row.get(0))
            .and_then(Iterator::collect)
            .map_err(self.error())?;
        let mut due = Vec::new();
        for owner in owners {
            let is_ours = owner == self.owner.id().0;
            let alive = self
                .owner
                .is_alive(OwnerId(owner))
                .map_err(|e| unusable(&self.place.owners, "asked who is alive", e))?;
            if alive && !is_ours {
                continue;
            }
            // Without a time it belongs to an exec that lives, if its process does.
            let which = "owner = ?1 AND (due_ms <= ?2 OR (due_ms IS NULL AND ?3))";
            let found = self
                .prepare(&format!("SELECT {COLUMNS} FROM mint WHERE {which}"))?
                .query_map((owner, now_ms, !is_ours), read_mint)
                .and_then(Iterator::collect::<rusqlite::Result<Vec<_>>>)
                .map_err(self.error())?;
            self.prepare(&format!("UPDATE mint SET owner = ?4, due_ms = ?5 WHERE {which}"))?
                .execute((owner, now_ms, !is_ours, self.owner.id().0, again_ms))
                .map_err(self.error())?;
            due.extend(found);
        }
        Ok(due)
    }
}

fn read_mint(row: &Row<'_>) -> rusqlite::Result<MintRecord> {
    Ok(MintRecord {
        mint_id: parsed(row, 0)?,
        lease_id: parsed(row, 1)?,
        exec_id: parsed(row, 2)?,
        secret: parsed(row, 3)?,
        about: About {
            issuer: row.get(4)?,
            scope: row.get(5)?,
            principal: row.get(6)?,
            far_id: row.get(7)?,
            expires_at: row.get(8)?,
            renew_at: None,
        },
        handle: row.get(9)?,
        attempts: row.get(10)?,
    })
}
