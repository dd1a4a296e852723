//! The writer behind its lock, and the batch that is open in it: steps are added, then all are committed and
//! told, or none.
#![forbid(unsafe_code)]

use std::any::Any;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use crate::model::event::Head;
use crate::store::error::sorted;
use crate::store::place::unusable;
use crate::store::{Durability, Store, StoreError, Tx};

pub(super) struct Writer {
    pub store: Store,
    /// Transactions since the log was begun anew.
    pub untidied: u64,
    /// At how many of them the next attempt is overdue.
    overdue: u64,
    batch: Option<Batch>,
    /// Why no batch could be opened, for those who came before then.
    refused: Option<(u64, Arc<StoreError>)>,
}

struct Batch {
    durability: Durability,
    /// After the last step in it.
    head: Head,
    members: usize,
    large: bool,
    verdict: Arc<Verdict>,
}

/// What became of one step, before the commit.
pub(super) enum Acted<T> {
    Recorded(T),
    Refused(StoreError),
    Panicked(Box<dyn Any + Send>),
}

impl Writer {
    pub fn over(store: Store) -> Self {
        Self { store, untidied: 0, overdue: 0, batch: None, refused: None }
    }

    pub fn durability(&self) -> Option<Durability> {
        self.batch.as_ref().map(|batch| batch.durability)
    }

    pub fn members(&self) -> usize {
        self.batch.as_ref().map_or(0, |batch| batch.members)
    }

    /// Where it will be told what became of the batch that is open.
    pub fn verdict(&self) -> Arc<Verdict> {
        self.batch.as_ref().map(|batch| Arc::clone(&batch.verdict)).unwrap_or_default()
    }

    pub fn begin(&mut self, durability: Durability) -> Result<(), StoreError> {
        let head = self.store.begin(durability)?;
        let verdict = Arc::default();
        self.batch = Some(Batch { durability, head, members: 0, large: false, verdict });
        self.refused = None;
        Ok(())
    }

    pub fn refuse_like_others(&self, ticket: u64) -> Result<(), StoreError> {
        match &self.refused {
            Some((until, cause)) if ticket < *until => Err(StoreError::Shared(Arc::clone(cause))),
            _ => Ok(()),
        }
    }

    /// Notes that those before `until` are refused for this; returns it for the one with `ticket`.
    pub fn refuse_until(&mut self, until: u64, ticket: u64, cause: StoreError) -> StoreError {
        if ticket + 1 == until {
            return cause;
        }
        let cause = Arc::new(cause);
        self.refused = Some((until, Arc::clone(&cause)));
        StoreError::Shared(cause)
    }

    /// Runs a step in the open batch. One that fails or panics leaves nothing in it.
    pub fn add<T>(&mut self, step: impl FnOnce(&mut Tx<'_>) -> Result<T, StoreError>) -> Acted<T> {
        let Some(batch) = &mut self.batch else {
            return Acted::Refused(given_up(&self.store));
        };
        // What the first does is all there is: rolling it back is rolling back everything.
        let is_first = batch.members == 0;
        if !is_first && let Err(e) = self.store.act("SAVEPOINT step") {
            return Acted::Refused(sorted(&self.store.place.db, e));
        }
        let mut tx = self.store.tx(batch.head);
        let result = catch_unwind(AssertUnwindSafe(|| step(&mut tx)));
        let (head, large) = (tx.head, tx.large);
        if self.store.conn.is_autocommit() {
            // A full disk or a failed write can make SQLite roll back the whole transaction.
            // sqlite.org/lang_transaction.html
            let cause = match result {
                Ok(Err(e)) => Arc::new(e),
                Ok(Ok(_)) => Arc::new(given_up(&self.store)),
                Err(panic) => {
                    self.fail(Arc::new(given_up(&self.store)));
                    return Acted::Panicked(panic);
                }
            };
            self.fail(Arc::clone(&cause));
            return Acted::Refused(match Arc::try_unwrap(cause) {
                Ok(only_ours) => only_ours,
                Err(cause) => StoreError::Shared(cause),
            });
        }
        match result {
            Ok(Ok(value)) => {
                if !is_first && let Err(e) = self.store.act("RELEASE step") {
                    let cause = Arc::new(sorted(&self.store.place.db, e));
                    self.fail(Arc::clone(&cause));
                    return Acted::Refused(StoreError::Shared(cause));
                }
                batch.head = head;
                batch.large |= large;
                batch.members += 1;
                Acted::Recorded(value)
            }
            Ok(Err(e)) => {
                self.store.note(&e);
                self.take_back(is_first);
                Acted::Refused(e)
            }
            Err(panic) => {
                self.take_back(is_first);
                Acted::Panicked(panic)
            }
        }
    }

    /// Takes back the last step.
    fn take_back(&mut self, is_first: bool) {
        if is_first {
            self.batch = None;
            self.store.roll_back();
            return;
        }
        let taken =
            self.store.act("ROLLBACK TO step").and_then(|()| self.store.act("RELEASE step"));
        if let Err(e) = taken {
            // What cannot be taken back must not be committed with the others.
            let cause = Arc::new(sorted(&self.store.place.db, e));
            self.fail(cause);
        }
    }

    /// Commits the batch, has it `noted`, and tells its members.
    pub fn commit(&mut self, noted: impl FnOnce(Head, Durability)) -> Result<Head, StoreError> {
        let Some(batch) = self.batch.take() else {
            return Ok(self.store.vouched);
        };
        let committed = self.store.commit(batch.head, batch.large).map(|()| batch.head);
        if let Ok(head) = committed {
            self.untidied += batch.members as u64;
            noted(head, batch.durability);
        }
        if Arc::strong_count(&batch.verdict) == 1 {
            // No one waits: whoever does holds it too, and took it under the writer's lock.
            return committed;
        }
        let shared = committed.map_err(Arc::new);
        batch.verdict.tell(shared.clone());
        shared.map_err(StoreError::Shared)
    }

    /// Rolls the batch back and tells its members why.
    fn fail(&mut self, cause: Arc<StoreError>) {
        self.store.roll_back();
        if let Some(batch) = self.batch.take() {
            batch.verdict.tell(Err(cause));
        }
    }

    /// After a panic under the lock: the batch has failed, and the connection is opened anew.
    pub fn distrust_all(&mut self) {
        self.fail(Arc::new(given_up(&self.store)));
        self.store.stale = true;
    }

    /// Moves what is left in the log and lets it begin anew. Whether it does.
    pub fn begin_log_anew(&mut self) -> Result<bool, StoreError> {
        self.overdue = self.untidied;
        let anew = self.store.begin_log_anew_at_once()?;
        if anew {
            self.untidied = 0;
            self.overdue = 0;
        }
        Ok(anew)
    }

    /// Whether so many transactions have passed since the last attempt.
    pub fn is_tidying_overdue(&self, steps: u64) -> bool {
        self.untidied - self.overdue >= steps
    }
}

fn given_up(store: &Store) -> StoreError {
    let source = io::Error::other("the transaction was rolled back under its steps");
    unusable(&store.place.db, "written", source)
}

/// What became of a batch: told once, to all whose steps are in it.
#[derive(Default)]
pub(super) struct Verdict {
    told: Mutex<Option<Result<Head, Arc<StoreError>>>>,
    changed: Condvar,
}

impl Verdict {
    fn tell(&self, result: Result<Head, Arc<StoreError>>) {
        *self.told.lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
        self.changed.notify_all();
    }

    pub fn wait(&self) -> Result<Head, StoreError> {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match &*told {
                Some(Ok(head)) => return Ok(*head),
                Some(Err(cause)) => return Err(StoreError::Shared(Arc::clone(cause))),
                None => told = self.changed.wait(told).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }
}
