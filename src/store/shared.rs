//! The store of many threads: one writer, whose transactions share one sync of the disk.
//!
//! Receives steps from any thread; returns what each returned once it is recorded. Must never tell a step
//! that it is recorded before the commit which holds it has returned, and never show an uncommitted one.
//!
//! # Group commit
//! Who comes first *leads*: it takes the writer, opens a transaction, the *batch*, runs its own step in it, and
//! then those of all who wait in the line by now, while they sleep; then it commits for all and wakes them.
//! Who finds no one behind it commits at once, as [`Store::transaction`] does. The steps are run by one thread
//! because handing the writer from thread to thread costs as much as a step does.
//!
//! Each step but the first stands in a SAVEPOINT of its own, so that one which fails takes nothing of the
//! others with it. A batch with a durable step in it is durable as a whole. No batch outlives the leader's
//! hold on the writer.
//!
//! # Failure
//! If the commit fails, every step in it is told so, and none that it was recorded. That says that nothing
//! may rest on the step, not that no trace of it can ever show: a log whose sync failed may still be read
//! back. The next transaction opens the database anew where the connection cannot be trusted, so that the
//! store comes back by itself when the disk does.
#![forbid(unsafe_code)]

mod batch;

use std::collections::VecDeque;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread;
use std::time::{Duration, Instant};

use rusqlite::{Connection, OpenFlags};

use crate::model::event::Head;
use crate::store::connection::{connect, move_log};
use crate::store::place::Place;
use crate::store::reopen::root;
use crate::store::{Durability, OwnerId, Reader, Store, StoreError, Tx, View};
use crate::sys::lend::{Lent, lend};
use batch::{Acted, Verdict, Writer};

/// The most steps that one commit waits for.
const MOST_MEMBERS: usize = 128;

/// From how many transactions on [`SharedStore::tidy`] has something to do; and after how many the writer
/// does it by itself, as no one else has.
const STEPS_PER_TIDY: u64 = 16;
const STEPS_WITHOUT_TIDY: u64 = 4096;
/// When it tries again, if someone's look was in the way.
const STEPS_UNTIL_NEXT_TRY: u64 = 256;

/// How long the writer lets itself be held up by a look that is under way: while it can put off what it
/// wants to do, and while it cannot.
const A_SHORT_LOOK: Duration = Duration::from_millis(5);
const A_LONG_LOOK: Duration = Duration::from_millis(200);

/// The trail's heads as this process has committed them. Neither ever goes back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heads {
    /// Of the last commit.
    pub latest: Head,
    /// Of the last durable commit: on disk. [`Head::EMPTY`] before the first.
    pub durable: Head,
}

/// The database, open for reading and writing by all threads of this process, which together are one owner.
///
/// Open it after the last fork. A step or a look must not call the store that it runs in.
pub struct SharedStore {
    line: Mutex<Line>,
    writer: Mutex<Writer>,
    heads: Mutex<Option<Heads>>,
    owner: OwnerId,
    root: PathBuf,
    /// None where the writer's own connection reads.
    side: Option<Side>,
}

/// Who wants to write.
#[derive(Default)]
struct Line {
    /// Someone leads, and will see to those who wait.
    is_led: bool,
    waiting: VecDeque<Lent<Writer>>,
    /// How many ever came.
    arrivals: u64,
}

/// Connections that are opened when they are first used.
#[derive(Default)]
struct Side {
    reader: Mutex<Option<Reader>>,
    /// The writer wants no one to look: those who come wait until it has the lock.
    held_off: AtomicBool,
    /// Moves the log while the writer writes.
    mover: Mutex<Option<(Connection, Place)>>,
}

impl SharedStore {
    /// For many threads: those that read have a connection of their own.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub fn open(state_dir: &Path) -> Result<Self, StoreError> {
        Ok(Self::over(Store::open(state_dir)?, Some(Side::default())))
    }

    /// For one thread: nothing is opened but the writer, which also reads.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub fn open_single(state_dir: &Path) -> Result<Self, StoreError> {
        Ok(Self::over(Store::open(state_dir)?, None))
    }

    fn over(store: Store, side: Option<Side>) -> Self {
        Self {
            owner: store.owner(),
            root: root(&store.place).to_owned(),
            writer: Mutex::new(Writer::over(store)),
            line: Mutex::default(),
            heads: Mutex::new(None),
            side,
        }
    }

    /// Runs `step` alone among all writers of this database, on this thread or another's, and returns when it
    /// is committed: what it returned, and the trail's head after the commit, which may hold steps of others
    /// too. Under [`Durability::Durable`] that head is on disk.
    ///
    /// # Errors
    /// Those of `step`, which leave nothing. Those of the commit, after which nothing that depends on the
    /// step may happen; [`StoreError::cause`] tells what they are.
    ///
    /// # Panics
    /// If `step` does, and then nothing of it is left.
    pub fn transaction<T: Send>(
        &self,
        durability: Durability,
        step: impl FnOnce(&mut Tx<'_>) -> Result<T, StoreError> + Send,
    ) -> Result<(T, Head), StoreError> {
        let mut line = lock(&self.line);
        let mut turn = Turn { durability, ticket: line.arrivals, step: Some(step), acted: None };
        line.arrivals += 1;
        if line.is_led {
            let mut work = |writer: &mut Writer| turn.take(self, writer);
            lend(&mut work, |lent| {
                line.waiting.push_back(lent);
                drop(line);
            });
        } else {
            line.is_led = true;
            drop(line);
        }
        if turn.acted.is_none() {
            self.lead(|writer| turn.take(self, writer));
        }
        match turn.acted {
            Some(Ok(Acted::Recorded(value, verdict))) => {
                Verdict::of(verdict, &self.root).map(|head| (value, head))
            }
            Some(Ok(Acted::Refused(e)) | Err(e)) => Err(e),
            Some(Ok(Acted::Panicked(panic))) => resume_unwind(panic),
            None => unreachable!("who leads takes its turn first"),
        }
    }

    /// Makes a batch of `own` and of the steps of all who wait by then, commits it and lets them go.
    fn lead(&self, own: impl FnOnce(&mut Writer)) {
        let leading = Leading { line: &self.line };
        let mut served = Vec::new();
        let mut writer = self.lock_writer();
        own(&mut writer);
        while served.len() + 1 < MOST_MEMBERS {
            let next = lock(&self.line).waiting.pop_front();
            match next {
                Some(mut lent) => {
                    lent.run(&mut writer);
                    served.push(lent);
                }
                // Who was told of the last commit just now mostly comes again at once: else the first of
                // them would commit alone, and the others wait for the disk twice. Whoever is alone was
                // alone in the last commit too, and waits for no one.
                None if writer.expects_more() => thread::yield_now(),
                None => break,
            }
        }
        self.commit(&mut writer);
        drop(writer);
        drop(leading);
    }

    /// Reads at one point in time, never within a batch. For short looks: while one lasts, the log grows.
    ///
    /// # Errors
    /// Those of `look`, and as [`Reader::open`].
    pub fn read<T>(
        &self,
        look: impl FnOnce(&View<'_>) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let Some(side) = &self.side else {
            return self.lock_writer().store.read(look);
        };
        let mut reader = side.look();
        let open = match reader.take() {
            Some(open) => open,
            None => Reader::beside_store(&self.root)?,
        };
        let seen = open.read(look);
        // What it cannot read, a reader that is opened anew perhaps can.
        if matches!(seen, Ok(_) | Err(StoreError::Missing { .. })) {
            *reader = Some(open);
        }
        seen
    }

    /// The heads to be kept outside the database, None before the first transaction. Never waits for the
    /// disk. What they name was committed before, so that a caller who was told of its commit finds it here.
    pub fn heads(&self) -> Option<Heads> {
        *lock(&self.heads)
    }

    /// Whether it could be written to, as far as is known without writing; after a failure it is tried to
    /// open the database anew, as the next transaction would. For who wants to know before it has to.
    ///
    /// # Errors
    /// What stands in the way.
    pub fn resume(&self) -> Result<(), StoreError> {
        self.recover(&mut self.lock_writer())
    }

    /// What names this process in the rows that it opens.
    pub fn owner(&self) -> OwnerId {
        self.owner
    }

    /// Moves the log into the database and lets it begin anew, if it is time to. To be called now and then by
    /// a thread that may wait for the disk: most of it happens beside the writer, and holds it up for two or
    /// three syncs. Returns whether the log begins anew; a look that is under way can prevent it, and then
    /// the next call tries again. Without calls the writer does it by itself, in the way of its callers.
    ///
    /// Only who keeps one point in time open, in this process or in another, lets the log grow.
    ///
    /// # Errors
    /// As any write. Nothing is lost by one.
    pub fn tidy(&self) -> Result<bool, StoreError> {
        let Some(side) = &self.side else {
            return self.lock_writer().store.tidy();
        };
        if self.lock_writer().untidied < STEPS_PER_TIDY {
            return Ok(false);
        }
        if let Err(e) = self.move_aside(side) {
            // A sync that failed in another connection is as bad: it was of the same pages.
            self.lock_writer().store.distrust(&e);
            return Err(e);
        }
        let mut writer = self.lock_writer();
        match side.hold_off(A_SHORT_LOOK) {
            Some(_no_look) => writer.begin_log_anew(),
            None => Ok(false),
        }
    }

    fn move_aside(&self, side: &Side) -> Result<(), StoreError> {
        let mut mover = lock(&side.mover);
        let (conn, place) = match mover.take() {
            Some(open) => open,
            None => {
                let place = Place::for_reading(&self.root)?;
                (connect(&place, OpenFlags::SQLITE_OPEN_READ_WRITE)?, place)
            }
        };
        move_log(&conn, &place, "PASSIVE")?;
        *mover = Some((conn, place));
        Ok(())
    }

    /// Opens a batch that a step of this durability may be in, if none is open.
    fn open_batch(
        &self,
        writer: &mut Writer,
        durability: Durability,
        ticket: u64,
    ) -> Result<(), StoreError> {
        match writer.durability() {
            Some(Durability::Durable) => return Ok(()),
            Some(Durability::Relaxed) if durability == Durability::Relaxed => return Ok(()),
            // How a transaction is written is set before it begins.
            Some(Durability::Relaxed) => self.commit(writer),
            None => {}
        }
        writer.refuse_like_others(ticket)?;
        let begun = self.recover(writer).and_then(|()| writer.begin(durability));
        // Those who already wait would each wait as long for the same answer.
        begun.map_err(|e| writer.refuse_until(lock(&self.line).arrivals, ticket, e))
    }

    /// Opens the database anew if its connection cannot be trusted.
    fn recover(&self, writer: &mut Writer) -> Result<(), StoreError> {
        if !writer.store.needs_reopening() {
            return Ok(());
        }
        // Until there is something to open, the old connections stay: they can still be read from.
        writer.store.is_back()?;
        let Some(side) = &self.side else { return writer.store.reopen() };
        // All connections of a process share what SQLite knows of the files.
        let Some(mut reader) = side.hold_off(A_LONG_LOOK) else {
            // The next caller tries again; a connection that is merely doubtful may do until then.
            return writer.store.refuse_after_failure();
        };
        let mut mover = lock(&side.mover);
        (*reader, *mover) = (None, None);
        writer.store.reopen()
    }

    /// Commits the batch, if there is one, and tells all whose steps are in it.
    fn commit(&self, writer: &mut Writer) {
        writer.commit(|head, durability| {
            let mut heads = lock(&self.heads);
            let durable = match (durability, &*heads) {
                (Durability::Durable, _) => head,
                (Durability::Relaxed, Some(before)) => before.durable,
                (Durability::Relaxed, None) => Head::EMPTY,
            };
            *heads = Some(Heads { latest: head, durable });
        });
        if writer.is_tidying_overdue()
            && let Some(side) = &self.side
        {
            let _no_look = side.hold_off(A_LONG_LOOK);
            // Not this caller's affair; if the connection has failed, the next to begin finds out.
            drop(writer.begin_log_anew());
        }
    }

    /// How many wait for the one who leads.
    #[cfg(test)]
    pub(super) fn waiting(&self) -> usize {
        lock(&self.line).waiting.len()
    }

    fn lock_writer(&self) -> MutexGuard<'_, Writer> {
        self.writer.lock().unwrap_or_else(|poisoned| {
            // A panic of our own, not of a step: nothing that was under way is believed.
            let mut writer = poisoned.into_inner();
            writer.distrust_all();
            self.writer.clear_poison();
            writer
        })
    }
}

/// One caller's step, and what became of it before the commit.
struct Turn<T, F> {
    durability: Durability,
    ticket: u64,
    step: Option<F>,
    acted: Option<Result<Acted<T>, StoreError>>,
}

impl<T, F: FnOnce(&mut Tx<'_>) -> Result<T, StoreError>> Turn<T, F> {
    fn take(&mut self, store: &SharedStore, writer: &mut Writer) {
        if let Some(step) = self.step.take() {
            let opened = store.open_batch(writer, self.durability, self.ticket);
            self.acted = Some(opened.map(|()| writer.add(step)));
        }
    }
}

/// Gives the lead to the next in the line when it is dropped.
struct Leading<'a> {
    line: &'a Mutex<Line>,
}

impl Drop for Leading<'_> {
    fn drop(&mut self) {
        let mut line = lock(self.line);
        // A step that comes back without having been run tells its owner to lead.
        let next = line.waiting.pop_front();
        line.is_led = next.is_some();
        drop(line);
        drop(next);
    }
}

impl Side {
    fn look(&self) -> MutexGuard<'_, Option<Reader>> {
        while self.held_off.load(Ordering::Acquire) {
            thread::sleep(A_MOMENT);
        }
        lock(&self.reader)
    }

    /// Keeps others from looking, if those who do are done in time. Only under the writer's lock: it never
    /// waits here for someone who waits for it.
    fn hold_off(&self, patience: Duration) -> Option<MutexGuard<'_, Option<Reader>>> {
        let start = Instant::now();
        self.held_off.store(true, Ordering::Release);
        let held = loop {
            match self.reader.try_lock() {
                Ok(guard) => break Some(guard),
                Err(TryLockError::Poisoned(poisoned)) => break Some(poisoned.into_inner()),
                Err(TryLockError::WouldBlock) if start.elapsed() > patience => break None,
                Err(TryLockError::WouldBlock) => thread::sleep(A_MOMENT),
            }
        };
        self.held_off.store(false, Ordering::Release);
        held
    }
}

const A_MOMENT: Duration = Duration::from_micros(50);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is behind these is replaced whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
