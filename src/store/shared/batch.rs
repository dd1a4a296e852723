//! The writer behind its lock, and the batch that is open in it: steps are added, then all are committed and
//! told, or none.
#![forbid(unsafe_code)]

use std::any::Any;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use super::{STEPS_UNTIL_NEXT_TRY, STEPS_WITHOUT_TIDY};
use crate::model::event::Head;
use crate::store::error::sorted;
use crate::store::place::unusable;
use crate::store::{Durability, Store, StoreError, Tx};

pub(super) struct Writer {
    pub store: Store,
    /// Transactions since the log was begun anew.
    pub untidied: u64,
    /// At how many of them the next attempt is overdue.
    overdue_at: u64,
    batch: Option<Batch>,
    last: Option<Last>,
    /// Why no batch could be opened, for those who came before then.
    refused: Option<(u64, Arc<StoreError>)>,
}

/// The last batch that was written durably.
struct Last {
    members: usize,
    ended: Instant,
    took: Duration,
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
    /// If the verdict on its batch is.
    Recorded(T, Arc<Verdict>),
    Refused(StoreError),
    Panicked(Box<dyn Any + Send>),
}

impl Writer {
    pub fn over(store: Store) -> Self {
        Self {
            store,
            untidied: 0,
            overdue_at: STEPS_WITHOUT_TIDY,
            batch: None,
            last: None,
            refused: None,
        }
    }

    pub fn durability(&self) -> Option<Durability> {
        self.batch.as_ref().map(|batch| batch.durability)
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

    /// Whether this batch is still smaller than the last one, whose callers were told only now: for the
    /// fourth part of the time that a commit takes.
    pub fn expects_more(&self) -> bool {
        let (Some(batch), Some(last)) = (&self.batch, &self.last) else { return false };
        batch.members < last.members && last.ended.elapsed() < last.took / 4
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
                Acted::Recorded(value, Arc::clone(&batch.verdict))
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
    pub fn commit(&mut self, noted: impl FnOnce(Head, Durability)) {
        let Some(batch) = self.batch.take() else { return };
        let begun = Instant::now();
        let committed = self.store.commit(batch.head, batch.large).map(|()| batch.head);
        self.last = (batch.durability == Durability::Durable).then(|| {
            let ended = Instant::now();
            Last { members: batch.members, ended, took: ended - begun }
        });
        if let Ok(head) = committed {
            self.untidied += batch.members as u64;
            noted(head, batch.durability);
        }
        batch.verdict.tell(committed.map_err(Arc::new));
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
        self.overdue_at = self.untidied + STEPS_UNTIL_NEXT_TRY;
        let anew = self.store.begin_log_anew_at_once()?;
        if anew {
            (self.untidied, self.overdue_at) = (0, STEPS_WITHOUT_TIDY);
        }
        Ok(anew)
    }

    /// Whether no one has tidied for too long.
    pub fn is_tidying_overdue(&self) -> bool {
        self.untidied >= self.overdue_at
    }
}

fn given_up(store: &Store) -> StoreError {
    unusable(&store.place.db, "written", rolled_back())
}

fn rolled_back() -> io::Error {
    io::Error::other("the transaction was rolled back under its steps")
}

/// What became of a batch: told once, before those whose steps are in it are let go.
#[derive(Default)]
pub(super) struct Verdict(OnceLock<Result<Head, Arc<StoreError>>>);

impl Verdict {
    fn tell(&self, result: Result<Head, Arc<StoreError>>) {
        // Whoever tells has taken the batch out of the writer: no one else can.
        let is_first = self.0.set(result).is_ok();
        debug_assert!(is_first);
    }

    /// What was told to one of its members; to an only one in plain words.
    pub fn of(told: Arc<Self>, root: &Path) -> Result<Head, StoreError> {
        let cause = match told.0.get() {
            Some(Ok(head)) => return Ok(*head),
            Some(Err(cause)) => Arc::clone(cause),
            // The thread that led has panicked.
            None => return Err(unusable(root, "written", rolled_back())),
        };
        drop(told);
        Err(Arc::try_unwrap(cause).unwrap_or_else(StoreError::Shared))
    }
}
