//! Work that one thread lends to another and waits for: how a closure that borrows is run elsewhere.
//!
//! Receives the closure and a way to give it away; returns when whoever got it has let go of it. Must never
//! return before, whatever panics: the borrows would be over while another thread still uses them.

use std::mem;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, Thread};

type Work<'a, C> = dyn FnMut(&mut C) + Send + 'a;

/// A closure of a thread that waits until this is dropped, run or not.
pub struct Lent<C> {
    work: NonNull<Work<'static, C>>,
    returned: Arc<Returned>,
}

struct Returned {
    is_back: AtomicBool,
    owner: Thread,
}

// SAFETY: `std::marker::Send` asks that a value may be used from another thread. The closure behind `work` is
// itself Send, `lend` made the pointer from the only reference to it, and `Lent` is not Clone, so that one
// thread at a time reaches it. `Returned` is Send and Sync by its parts.
unsafe impl<C> Send for Lent<C> {}

impl<C> Lent<C> {
    pub fn run(&mut self, context: &mut C) {
        // SAFETY: `NonNull::as_mut` asks for a pointer to a live value with no other access to it. `lend`
        // holds the exclusive reference that it was made from and does not touch it before this is dropped,
        // and `&mut self` keeps a second call out.
        let work = unsafe { self.work.as_mut() };
        work(context);
    }
}

impl<C> Drop for Lent<C> {
    fn drop(&mut self) {
        // The last use of `work` came before this store, which its owner acquires.
        self.returned.is_back.store(true, Ordering::Release);
        self.returned.owner.unpark();
    }
}

/// Gives `work` away, and waits until the [`Lent`] is dropped. If that never happens, neither does this end.
pub fn lend<C>(work: &mut Work<'_, C>, give: impl FnOnce(Lent<C>)) {
    let returned = Arc::new(Returned { is_back: AtomicBool::new(false), owner: thread::current() });
    let work = NonNull::from(work);
    // SAFETY: `mem::transmute` asks for two types of one layout and a value that is valid for both: they
    // differ in a lifetime only. That what the closure borrows is gone one day is why this function does not
    // end, nor unwind, before the `Lent` is dropped (`Wait`), and `Lent::run` needs one that is not.
    let work = unsafe { mem::transmute::<NonNull<Work<'_, C>>, NonNull<Work<'static, C>>>(work) };
    let wait = Wait(Arc::clone(&returned));
    give(Lent { work, returned });
    drop(wait);
}

/// Waits when it is dropped, so that a panic waits too.
struct Wait(Arc<Returned>);

impl Drop for Wait {
    fn drop(&mut self) {
        while !self.0.is_back.load(Ordering::Acquire) {
            thread::park();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    #[test]
    fn borrowed_work_is_done_elsewhere_before_its_owner_goes_on() {
        let (give, take) = mpsc::channel::<Lent<u32>>();
        let worker = thread::spawn(move || {
            let mut count = 0;
            for mut lent in take {
                thread::sleep(Duration::from_millis(1));
                lent.run(&mut count);
                lent.run(&mut count);
            }
            count
        });
        for round in 0..20 {
            let mut seen = Vec::new();
            let mut work = |count: &mut u32| {
                *count += 1;
                seen.push((thread::current().id(), *count));
            };
            lend(&mut work, |lent| give.send(lent).unwrap());
            let id = worker.thread().id();
            assert_eq!(seen, [(id, round * 2 + 1), (id, round * 2 + 2)]);
        }
        drop(give);
        assert_eq!(worker.join().unwrap(), 40);
    }

    #[test]
    fn what_is_not_run_is_given_back() {
        let mut runs = 0;
        let mut work = |_: &mut ()| runs += 1;
        lend(&mut work, drop);
        assert_eq!(runs, 0);
    }

    #[test]
    fn a_giver_that_panics_still_waits() {
        let (give, take) = mpsc::channel::<Lent<()>>();
        let worker = thread::spawn(move || {
            let mut lent = take.recv().unwrap();
            thread::sleep(Duration::from_millis(20));
            lent.run(&mut ());
        });
        let mut ran = false;
        let mut work = |(): &mut ()| ran = true;
        let panicked = catch_unwind(AssertUnwindSafe(|| {
            lend(&mut work, |lent| {
                give.send(lent).unwrap();
                panic!("on purpose");
            });
        }));
        assert!(panicked.is_err() && ran);
        worker.join().unwrap();
    }
}
