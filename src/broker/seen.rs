//! Leases as they were when they were last looked at: what an exec's request is made of does not change, and what a
//! lease is worth is decided from the store when it is used.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::model::id::LeaseId;
use crate::model::lease::LeaseRecord;

/// How many are remembered; then all are forgotten.
const MOST: usize = 1024;

#[derive(Debug, Default)]
pub(super) struct SeenLeases(Mutex<BTreeMap<LeaseId, LeaseRecord>>);

impl SeenLeases {
    pub(super) fn lease(&self, id: &LeaseId) -> Option<LeaseRecord> {
        self.lock().get(id).cloned()
    }

    pub(super) fn remember(&self, record: &LeaseRecord) {
        let mut seen = self.lock();
        if seen.len() >= MOST {
            seen.clear();
        }
        seen.insert(record.lease_id.clone(), record.clone());
    }

    /// It was refused: what was seen of its state is of no use.
    pub(super) fn forget(&self, ids: &[LeaseId]) {
        let mut seen = self.lock();
        for id in ids {
            seen.remove(id);
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<LeaseId, LeaseRecord>> {
        // Whoever panicked with it left whole entries.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
