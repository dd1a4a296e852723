//! The threads that execs are told on: kept for a while after an exec, since the next one may come soon and a
//! thread takes a tenth of a millisecond to begin and to end.
#![forbid(unsafe_code)]

use std::io;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// An exec's thread keeps little on its stack, and only what is touched costs memory.
const STACK: usize = 512 << 10;
/// How many wait for the next exec, and how long.
const MOST_IDLE: usize = 4;
const PATIENCE: Duration = Duration::from_secs(5);

type Work = Box<dyn FnOnce() + Send>;

#[derive(Clone)]
pub struct Threads {
    idle: Arc<Mutex<Idle>>,
    patience: Duration,
}

impl Default for Threads {
    fn default() -> Self {
        Self { idle: Arc::default(), patience: PATIENCE }
    }
}

#[derive(Default)]
struct Idle {
    /// The latest last: its memory is the warmest.
    waiting: Vec<(u64, SyncSender<Work>)>,
    latest: u64,
}

impl Threads {
    /// Has the work done by a thread that waits for some, or by a new one.
    pub fn spawn(&self, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
        let waiting = self.lock().waiting.pop();
        let work: Work = Box::new(work);
        let work = match waiting {
            // It hears what was sent before it left.
            Some((_, thread)) => match thread.send(work) {
                Ok(()) => return Ok(()),
                Err(unsent) => unsent.0,
            },
            None => work,
        };
        let threads = self.clone();
        let thread = std::thread::Builder::new().name("exec".to_owned()).stack_size(STACK);
        thread.spawn(move || threads.serve(work)).map(drop)
    }

    fn serve(&self, first: Work) {
        let mut work = first;
        loop {
            work();
            let (sender, receiver) = sync_channel(1);
            let Some(number) = self.wait_with(sender) else { return };
            work = match receiver.recv_timeout(self.patience) {
                Ok(work) => work,
                Err(_) => {
                    self.lock().waiting.retain(|(waits, _)| *waits != number);
                    // Whoever had taken it out before that sends what it is taken out for.
                    match receiver.recv() {
                        Ok(work) => work,
                        Err(_) => return,
                    }
                }
            };
        }
    }

    /// None where enough wait already.
    fn wait_with(&self, sender: SyncSender<Work>) -> Option<u64> {
        let mut idle = self.lock();
        if idle.waiting.len() >= MOST_IDLE {
            return None;
        }
        idle.latest += 1;
        let number = idle.latest;
        idle.waiting.push((number, sender));
        Some(number)
    }

    fn lock(&self) -> MutexGuard<'_, Idle> {
        // Whoever panicked with it left whole entries.
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;
    use std::thread::ThreadId;

    fn of_one(threads: &Threads) -> ThreadId {
        let (tell, told) = channel();
        threads.spawn(move || tell.send(std::thread::current().id()).unwrap()).unwrap();
        told.recv().unwrap()
    }

    fn wait_until_idle(threads: &Threads, count: usize) {
        while threads.lock().waiting.len() != count {
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_thread_that_waits_does_the_next_work() {
        let threads = Threads::default();
        let first = of_one(&threads);
        wait_until_idle(&threads, 1);
        assert_eq!(of_one(&threads), first);
    }

    /// Threads that give up while work comes to them.
    #[test]
    fn no_work_is_lost_on_a_thread_that_gives_up() {
        let patience = Duration::from_micros(60);
        let threads = Threads { patience, ..Threads::default() };
        let (tell, told) = channel();
        for turn in 0..20_000_u64 {
            let tell = tell.clone();
            threads.spawn(move || tell.send(turn).unwrap()).unwrap();
            assert_eq!(told.recv_timeout(Duration::from_secs(20)), Ok(turn));
            // About when it gives up.
            let began = std::time::Instant::now();
            while began.elapsed() < Duration::from_micros(40 + turn % 80) {
                std::hint::spin_loop();
            }
        }
    }

    #[test]
    fn work_never_waits_for_work() {
        let threads = Threads::default();
        let (tell, told) = channel();
        let (end, ended) = channel::<()>();
        let ended = Arc::new(Mutex::new(ended));
        for _ in 0..20 {
            let (tell, ended) = (tell.clone(), Arc::clone(&ended));
            threads
                .spawn(move || {
                    tell.send(std::thread::current().id()).unwrap();
                    assert!(ended.lock().unwrap().recv().is_err());
                })
                .unwrap();
        }
        let all: std::collections::HashSet<_> = (0..20)
            .map(|_| told.recv_timeout(Duration::from_secs(20)).unwrap())
            .map(|id| format!("{id:?}"))
            .collect();
        assert_eq!(all.len(), 20);
        drop(end);
        wait_until_idle(&threads, MOST_IDLE);
    }
}
