//! Many threads on one store.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use super::*;
use crate::store::SharedStore;

fn record<T: Send>(
    store: &SharedStore,
    step: impl FnOnce(&mut Tx<'_>) -> Result<T, StoreError> + Send,
) -> Result<(T, Head), StoreError> {
    store.transaction(Durability::Durable, step)
}

/// What is on disk, as another process would see it.
fn trail_of(dir: &Path) -> u64 {
    whole_trail(&Store::open(dir).unwrap())
}

fn missing() -> StoreError {
    StoreError::Missing { what: "a reason".to_owned() }
}

/// Runs `steps` as one batch, in no order, and returns what each was told: the first holds the writer until
/// all others wait for it.
fn together<T: Send>(
    store: &SharedStore,
    steps: Vec<Step<'_, T>>,
) -> Vec<std::thread::Result<Result<(T, Head), StoreError>>> {
    let begun = AtomicBool::new(false);
    let others = steps.len() - 1;
    std::thread::scope(|scope| {
        let threads: Vec<_> = steps
            .into_iter()
            .enumerate()
            .map(|(place, step)| {
                let begun = &begun;
                scope.spawn(move || {
                    while place != 0 && !begun.load(Ordering::Acquire) {
                        std::thread::yield_now();
                    }
                    record(store, |tx| {
                        begun.store(true, Ordering::Release);
                        while place == 0 && store.waiting() < others {
                            std::thread::yield_now();
                        }
                        step(tx)
                    })
                })
            })
            .collect();
        threads.into_iter().map(std::thread::ScopedJoinHandle::join).collect()
    })
}

#[test]
fn sixty_four_threads_count_exactly_once() {
    const THREADS: u32 = 64;
    const STEPS: u32 = 20;
    let dir = state();
    let store = SharedStore::open(dir.path()).unwrap();
    let run = run();
    record(&store, |tx| tx.put_run(&run)).unwrap();
    let seen = std::sync::Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (store, run, seen) = (&store, &run, &seen);
            scope.spawn(move || {
                for step in 0..STEPS {
                    let durability = match (thread + step) % 3 {
                        0 => Durability::Relaxed,
                        _ => Durability::Durable,
                    };
                    let lease = lease(run, 1);
                    let step = |tx: &mut Tx<'_>| {
                        let counted = tx.count_request(&run.run_id, &at(1))?;
                        tx.append(draft(EventType::LeaseRequested))?;
                        tx.put_lease(&lease)?;
                        let event = tx.append(draft(EventType::LeaseGranted).of_lease(&lease))?;
                        Ok((counted, event))
                    };
                    let ((counted, event), head) = store.transaction(durability, step).unwrap();
                    assert!(event.seq <= head.seq);
                    let heads = store.heads().unwrap();
                    assert!(head.seq <= heads.latest.seq);
                    if durability == Durability::Durable {
                        assert!(head.seq <= heads.durable.seq);
                    }
                    let found = store.read(|view| view.lease(&lease.lease_id)).unwrap();
                    assert!(found.is_some(), "who is told of it finds it");
                    seen.lock().unwrap().push(counted);
                }
            });
        }
    });
    let mut seen = seen.into_inner().unwrap();
    seen.sort_unstable();
    assert_eq!(seen, (1..=THREADS * STEPS).collect::<Vec<_>>());
    assert_eq!(trail_of(dir.path()), u64::from(THREADS * STEPS * 2));
}

#[test]
fn of_many_threads_one_wins_the_last_use() {
    let dir = state();
    let store = SharedStore::open(dir.path()).unwrap();
    let run = run();
    for _ in 0..20 {
        let lease = lease(&run, 1);
        record(&store, |tx| tx.put_lease(&lease)).unwrap();
        let start = Barrier::new(64);
        let won = AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..64 {
                scope.spawn(|| {
                    start.wait();
                    let consume =
                        |tx: &mut Tx<'_>| tx.consume(&run.run_id, &lease.lease_id, &at(1));
                    match record(&store, consume).unwrap().0 {
                        Ok(left) => {
                            assert_eq!(left, 0);
                            won.fetch_add(1, Ordering::Relaxed);
                        }
                        Err(refused) => assert_eq!(refused, UseRefused::Exhausted),
                    }
                });
            }
        });
        assert_eq!(won.into_inner(), 1);
    }
}

type Step<'a, T> = Box<dyn FnOnce(&mut Tx<'_>) -> Result<T, StoreError> + Send + 'a>;

fn append<'a>() -> Step<'a, u64> {
    Box::new(|tx| Ok(tx.append(draft(EventType::LeaseGranted))?.seq))
}

#[test]
fn one_commit_serves_all_who_wait() {
    let dir = state();
    let store = SharedStore::open(dir.path()).unwrap();
    let told = together(&store, (0..10).map(|_| append()).collect());
    let mut told: Vec<_> = told
        .into_iter()
        .map(|told| told.unwrap().unwrap())
        .map(|(seq, head)| (seq, head.seq))
        .collect();
    told.sort_unstable();
    assert_eq!(told, (1..=10).map(|seq| (seq, 10)).collect::<Vec<_>>());
    assert_eq!(trail_of(dir.path()), 10);
    // Alone: nothing is waited for.
    assert_eq!(record(&store, append()).unwrap().1.seq, 11);
}

#[test]
fn a_step_that_fails_or_panics_takes_nothing_of_the_others_with_it() {
    /// Which of five fail, the first of the batch among them or not.
    #[track_caller]
    fn check(bad: &[usize], panics: bool) {
        let dir = state();
        let store = SharedStore::open(dir.path()).unwrap();
        let run = run();
        record(&store, |tx| tx.put_run(&run)).unwrap();
        let steps = (0..5).map(|place| -> Step<'_, u32> {
            let run = &run;
            Box::new(move |tx| {
                let counted = tx.count_request(&run.run_id, &at(1))?;
                tx.append(draft(EventType::LeaseRequested))?;
                match bad.contains(&place) {
                    false => Ok(counted),
                    true if panics => panic!("on purpose"),
                    true => Err(missing()),
                }
            })
        });
        let told = together(&store, steps.collect());
        for (place, told) in told.iter().enumerate() {
            match told {
                Ok(Ok((_, head))) => {
                    assert!(!bad.contains(&place));
                    assert!(head.seq <= (5 - bad.len()) as u64);
                }
                Ok(Err(e)) => {
                    assert!(bad.contains(&place) && matches!(e, StoreError::Missing { .. }))
                }
                Err(_) => assert!(bad.contains(&place) && panics),
            }
        }
        let good = 5 - bad.len() as u32;
        let mut counted: Vec<u32> =
            told.into_iter().flatten().flatten().map(|(counted, _)| counted).collect();
        counted.sort_unstable();
        assert_eq!(counted, (1..=good).collect::<Vec<_>>());
        assert_eq!(trail_of(dir.path()), u64::from(good), "the chain has no hole");
        let (counted, _) = record(&store, |tx| tx.count_request(&run.run_id, &at(1))).unwrap();
        assert_eq!(counted, good + 1, "and goes on");
    }
    for panics in [false, true] {
        check(&[], panics);
        check(&[0], panics);
        check(&[3], panics);
        check(&[0, 2, 4], panics);
        check(&[0, 1, 2, 3, 4], panics);
    }
}

#[test]
fn a_lone_step_that_fails_or_panics_leaves_nothing() {
    let dir = state();
    for store in
        [SharedStore::open(dir.path()).unwrap(), SharedStore::open_single(dir.path()).unwrap()]
    {
        let before = trail_of(dir.path());
        let failed = record(&store, |tx| {
            tx.append(draft(EventType::RunStarted))?;
            Err::<(), _>(missing())
        });
        assert!(matches!(failed, Err(StoreError::Missing { .. })));
        let panicked = catch_unwind(AssertUnwindSafe(|| {
            record(&store, |tx| {
                tx.append(draft(EventType::RunStarted))?;
                panic!("on purpose");
                #[allow(unreachable_code)]
                Ok(())
            })
        }));
        assert!(panicked.is_err());
        assert_eq!(trail_of(dir.path()), before);
        assert_eq!(record(&store, append()).unwrap().0, before + 1);
    }
}

#[test]
fn a_durable_step_is_not_told_of_a_relaxed_commit() {
    let dir = state();
    let store = SharedStore::open(dir.path()).unwrap();
    assert_eq!(store.heads(), None);
    let (_, relaxed) = store.transaction(Durability::Relaxed, append()).unwrap();
    assert_eq!(store.heads(), Some(Heads { latest: relaxed, durable: Head::EMPTY }));
    let (_, durable) = record(&store, append()).unwrap();
    assert_eq!(store.heads(), Some(Heads { latest: durable, durable }));
    let (_, later) = store.transaction(Durability::Relaxed, append()).unwrap();
    assert_eq!(store.heads(), Some(Heads { latest: later, durable }));

    // A durable step that meets an open relaxed batch gets a transaction of its own.
    let synchronous = |tx: &Tx<'_>| -> i64 {
        tx.conn.query_row("PRAGMA synchronous", [], |row| row.get(0)).unwrap()
    };
    let begun = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            store.transaction(Durability::Relaxed, |tx| {
                begun.store(true, Ordering::Release);
                while store.waiting() < 1 {
                    std::thread::yield_now();
                }
                assert_eq!(synchronous(tx), 1);
                Ok(())
            })
        });
        while !begun.load(Ordering::Acquire) {
            std::thread::yield_now();
        }
        let ((), head) = record(&store, |tx| {
            assert_eq!(synchronous(tx), 2);
            tx.append(draft(EventType::LeaseGranted)).map(drop)
        })
        .unwrap();
        assert_eq!(store.heads().unwrap().durable, head);
    });
}

#[test]
fn a_look_never_sees_what_is_not_committed() {
    let dir = state();
    let store = SharedStore::open(dir.path()).unwrap();
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let looker = scope.spawn(|| {
            let mut looks = 0;
            while !ended.load(Ordering::Acquire) {
                let seen = store.read(|view| view.head()).unwrap().seq;
                assert_eq!(seen % 4, 0, "a part of a batch");
                looks += 1;
            }
            looks
        });
        for _ in 0..30 {
            let told = together(&store, (0..4).map(|_| append()).collect());
            assert!(told.into_iter().all(|told| told.unwrap().is_ok()));
        }
        ended.store(true, Ordering::Release);
        assert!(looker.join().unwrap() > 0);
    });
    assert_eq!(store.read(|view| view.head()).unwrap().seq, 120);

    // With one connection, who looks waits for the batch.
    let dir = state();
    let store = SharedStore::open_single(dir.path()).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for _ in 0..20 {
                    let (seq, _) = record(&store, append()).unwrap();
                    let seen = store.read(|view| view.head()).unwrap().seq;
                    assert!(seen >= seq);
                }
            });
        }
    });
    assert_eq!(trail_of(dir.path()), 160);
}

#[test]
fn the_log_stays_short_under_steady_load_with_readers() {
    #[track_caller]
    fn check(someone_tidies: bool) {
        let dir = state();
        let store = SharedStore::open(dir.path()).unwrap();
        let ended = AtomicBool::new(false);
        let begun_anew = AtomicU32::new(0);
        let text = "x".repeat(900);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while !ended.load(Ordering::Acquire) {
                        store.read(|view| Ok(view.events_since(0).take(300).count())).unwrap();
                    }
                });
            }
            if someone_tidies {
                scope.spawn(|| {
                    while !ended.load(Ordering::Acquire) {
                        begun_anew.fetch_add(store.tidy().unwrap().into(), Ordering::Relaxed);
                        std::thread::sleep(Duration::from_millis(2));
                    }
                });
            }
            let writers: Vec<_> = (0..4)
                .map(|_| {
                    scope.spawn(|| {
                        for _ in 0..2500 {
                            let relaxed = Durability::Relaxed;
                            let event = || draft(EventType::LeaseGranted).because(text.clone());
                            store.transaction(relaxed, |tx| tx.append(event())).unwrap();
                        }
                    })
                })
                .collect();
            writers.into_iter().for_each(|writer| writer.join().unwrap());
            ended.store(true, Ordering::Release);
        });
        assert!(someone_tidies == (begun_anew.into_inner() > 0));
        let size = std::fs::metadata(dir.path().join("db/sublet.db-wal")).unwrap().size();
        // Alone, 10,000 such transactions make a log of some 80 MB.
        // Alone, 10,000 such transactions make a log of some 65 MB.
        let most = 40 << 20;
        assert!(size < most, "the log has {size} bytes");
        assert_eq!(trail_of(dir.path()), 10_000);
    }
    check(true);
    check(false);
}

#[test]
fn a_store_whose_files_are_gone_comes_back_with_them_and_not_without() {
    let dir = state();
    let db = dir.path().join("db");
    let store = SharedStore::open(dir.path()).unwrap();
    for _ in 0..3 {
        record(&store, append()).unwrap();
    }
    let lost = |store: &SharedStore| {
        for _ in 0..3 {
            let refused = record(store, append()).unwrap_err();
            assert!(matches!(refused.cause(), StoreError::Lost { .. }), "{refused:?}");
        }
    };
    // The whole directory, away and back.
    std::fs::rename(&db, dir.path().join("away")).unwrap();
    lost(&store);
    assert!(matches!(store.resume(), Err(StoreError::Lost { .. })));
    assert!(!db.exists(), "nothing is made in its place");
    // Another one in its place is not it.
    drop(Store::open(dir.path()).unwrap());
    lost(&store);
    std::fs::remove_dir_all(&db).unwrap();
    std::fs::rename(dir.path().join("away"), &db).unwrap();
    store.resume().unwrap();
    let (seq, _) = record(&store, append()).unwrap();
    assert!(seq >= 4, "{seq}");
    assert_eq!(store.read(|view| view.head()).unwrap().seq, seq);

    // A copy that holds all that was reported, and one that does not.
    let copy = |to: &str| std::fs::copy(db.join("sublet.db"), dir.path().join(to)).unwrap();
    let put = |from: &str| {
        for file in ["sublet.db", "sublet.db-wal", "sublet.db-shm"] {
            std::fs::remove_file(db.join(file)).ok();
        }
        std::fs::copy(dir.path().join(from), db.join("sublet.db")).unwrap();
    };
    assert!(Store::open(dir.path()).unwrap().begin_log_anew_at_once().unwrap());
    copy("old");
    record(&store, append()).unwrap();
    assert!(Store::open(dir.path()).unwrap().begin_log_anew_at_once().unwrap());
    copy("whole");
    put("old");
    lost(&store);
    put("whole");
    let (next, _) = record(&store, append()).unwrap();
    assert_eq!(next, seq + 2);
    assert_eq!(trail_of(dir.path()), next);
    // Its claim is where it was: what it opened is no orphan.
    let lease = lease(&run(), 1);
    record(&store, |tx| tx.put_lease(&lease)).unwrap();
    let mut other = Store::open(dir.path()).unwrap();
    assert_eq!(write(&mut other, |tx| tx.adopt_orphans()), Orphans::default());
}

#[test]
fn a_failed_commit_is_told_to_all_in_it() {
    let dir = state();
    let store = SharedStore::open(dir.path()).unwrap();
    record(&store, append()).unwrap();
    let db = dir.path().join("db/sublet.db");
    let away = dir.path().join("away");
    let steps = (0..6).map(|place| -> Step<'_, u64> {
        let (db, away) = (&db, &away);
        Box::new(move |tx| {
            if place == 0 {
                std::fs::rename(db, away).unwrap();
            }
            Ok(tx.append(draft(EventType::LeaseGranted))?.seq)
        })
    });
    for told in together(&store, steps.collect()) {
        let error = told.unwrap().unwrap_err();
        assert!(matches!(error.cause(), StoreError::Lost { .. }), "{error:?}");
        assert!(error.to_string().contains("was removed or replaced"), "{error}");
    }
    assert_eq!(store.heads().unwrap().latest.seq, 1, "none of it is vouched for");
    std::fs::rename(away, db).unwrap();
    record(&store, append()).unwrap();
}

#[test]
fn those_who_wait_for_another_process_are_refused_together() {
    let dir = state();
    let store = SharedStore::open(dir.path()).unwrap();
    let mut other = Store::open(dir.path()).unwrap();
    let start = Instant::now();
    write(&mut other, |tx| {
        let callers = std::thread::scope(|scope| {
            let callers: Vec<_> =
                (0..6).map(|_| scope.spawn(|| record(&store, append()))).collect();
            callers.into_iter().map(|caller| caller.join().unwrap()).collect::<Vec<_>>()
        });
        for refused in callers {
            let refused = refused.unwrap_err();
            assert!(matches!(refused.cause(), StoreError::Busy { .. }), "{refused:?}");
        }
        tx.append(draft(EventType::RunStarted))
    });
    // One patience of ten seconds, perhaps a second one for who came just too late.
    assert!(start.elapsed() < Duration::from_secs(35), "{:?}", start.elapsed());
    assert_eq!(record(&store, append()).unwrap().0, 2);
}
