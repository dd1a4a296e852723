//! The thread that ends what was minted and could not be ended with its exec: the far side was down, or
//! the process that had it minted was killed. A thread of its own, since a far side may be slow: it holds up
//! neither an exec nor the sweeper.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::broker::{Broker, BrokerError};
use crate::run::RunError;
use crate::run::ledger::Ledger;
use crate::run::mint;

/// Between two looks.
const PERIOD: Duration = Duration::from_secs(1);
/// For what is tried in one look: each source has its own deadline below that.
const PATIENCE: Duration = Duration::from_secs(120);

impl Broker {
    /// Revokes until the broker stops.
    pub fn revoke_minted(&self) {
        let mut trouble = false;
        while !self.stopped.load(Ordering::Acquire) {
            std::thread::park_timeout(PERIOD);
            if self.draining.load(Ordering::Acquire) {
                continue;
            }
            match (self.end_due_mints(), trouble) {
                (Err(e), false) => {
                    trouble = true;
                    tracing::error!(error = %e.message(), "what was minted could not be ended");
                }
                (Ok(()), true) => {
                    trouble = false;
                    tracing::info!("what was minted can be ended again");
                }
                (Ok(()), false) | (Err(_), true) => {}
            }
        }
    }

    fn end_due_mints(&self) -> Result<(), BrokerError> {
        let now = self.now()?.wall.as_millisecond();
        if !self.store.read(|view| view.has_due_mints(now))? {
            return Ok(());
        }
        let ledger = Ledger::shared(Arc::clone(&self.store), Arc::clone(&self.shared));
        let session = self.door.open().map_err(RunError::from)?;
        mint::end_due(&ledger, &self.host.config, &self.hostname, &session, PATIENCE)?;
        Ok(())
    }
}
