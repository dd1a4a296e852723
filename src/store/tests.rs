use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::*;
use crate::model::digest::ValueDigest;
use crate::model::event::{Draft, EventType};
use crate::model::exec::{ExecRecord, ExecState};
use crate::model::id::{ExecId, LeaseId, RequestId, RunId};
use crate::model::lease::{LeaseRecord, LeaseState};
use crate::model::moment::Moment;
use crate::model::run::{Counters, Run, RunState};

mod children;
mod damage;
mod queries;
mod shared;

const BOOT: &str = "5a2c7f0e-0000-4000-8000-123456789abc";

fn state() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("sublet-store-").tempdir().unwrap()
}

fn at(seconds: u64) -> Moment {
    Moment {
        wall: "2026-11-22T10:00:00Z".parse().unwrap(),
        boot: Duration::from_secs(seconds),
        boot_id: BOOT.to_owned(),
    }
}

fn draft(kind: EventType) -> Draft {
    Draft::new(kind, at(0).wall, "host-1")
}

fn run() -> Run {
    Run {
        run_id: RunId::fresh(),
        agent: "agent-7".parse().unwrap(),
        principal: "alice".parse().unwrap(),
        permissions: Vec::new(),
        profile: "default".to_owned(),
        workspace: PathBuf::from("/srv/agents/a b"),
        state: RunState::Active,
        started_at: at(0).wall,
    }
}

fn lease(run: &Run, uses: u32) -> LeaseRecord {
    LeaseRecord {
        lease_id: LeaseId::fresh(),
        run_id: run.run_id.clone(),
        request_id: RequestId::fresh(),
        capability: "repo.push".parse().unwrap(),
        audience: "github.com".parse().unwrap(),
        channel: crate::model::name::Channel::Git,
        secret: "github-bot".parse().unwrap(),
        issued_at: "2026-11-22T10:00:00.123456789Z".parse().unwrap(),
        expires_at: "2026-11-22T10:05:00Z".parse().unwrap(),
        expires_boot: Duration::new(400, 5),
        boot_id: BOOT.to_owned(),
        uses,
        uses_left: uses,
        state: LeaseState::Granted,
    }
}

fn exec(run: &Run, leases: &[LeaseId]) -> ExecRecord {
    ExecRecord {
        exec_id: ExecId::fresh(),
        run_id: run.run_id.clone(),
        lease_ids: leases.to_vec(),
        command: vec!["git".to_owned(), "push \"it\"".to_owned()],
        state: ExecState::Running,
        exit_status: None,
        started_at: at(0).wall,
    }
}

/// A durable step whose result is all that matters.
fn write<T>(store: &mut Store, step: impl FnOnce(&mut Tx<'_>) -> Result<T, StoreError>) -> T {
    store.transaction(Durability::Durable, step).unwrap().0
}

/// Follows the whole chain; returns how many events it has.
#[track_caller]
fn whole_trail(store: &Store) -> u64 {
    let end = store.read(|view| {
        let mut head = Head::EMPTY;
        for event in view.events() {
            head = event?.verify_link(&head).expect("the chain holds");
        }
        assert_eq!(view.head()?, head);
        Ok(head)
    });
    end.unwrap().seq
}

#[test]
fn what_is_recorded_is_read_back() {
    let dir = state();
    let mut store = Store::open(dir.path()).unwrap();
    let run = run();
    let lease = lease(&run, 3);
    let exec = exec(&run, std::slice::from_ref(&lease.lease_id));
    let (event, head) = store
        .transaction(Durability::Durable, |tx| {
            tx.put_run(&run)?;
            tx.put_lease(&lease)?;
            tx.put_exec(&exec)?;
            let event = tx.append(draft(EventType::LeaseGranted).of_run(&run).of_lease(&lease))?;
            assert_eq!(tx.lease(&lease.lease_id)?.as_ref(), Some(&lease), "sees its own writes");
            Ok(event)
        })
        .unwrap();
    assert_eq!(head, event.head());
    drop(store);

    let reader = Reader::open(dir.path()).unwrap();
    reader
        .read(|view| {
            assert_eq!(view.run(&run.run_id)?, Some(run.clone()));
            assert_eq!(view.runs()?, std::slice::from_ref(&run));
            assert_eq!(view.lease(&lease.lease_id)?, Some(lease.clone()));
            assert_eq!(view.exec(&exec.exec_id)?, Some(exec.clone()));
            assert_eq!(view.execs(Some(&run.run_id))?, std::slice::from_ref(&exec));
            assert_eq!(view.head()?, head);
            let events: Vec<_> = view.events().map(|e| e.unwrap().event().unwrap()).collect();
            assert_eq!(events, std::slice::from_ref(&event));
            assert_eq!(view.events_since(1).count(), 0);
            Ok(())
        })
        .unwrap();
}

#[test]
fn leases_and_execs_end_once() {
    let dir = state();
    let mut store = Store::open(dir.path()).unwrap();
    let (run, other) = (run(), run());
    let (kept, closed) = (lease(&run, 1), lease(&other, 1));
    let exec = exec(&run, &[]);
    write(&mut store, |tx| {
        tx.put_lease(&kept)?;
        tx.put_lease(&closed)?;
        tx.put_exec(&exec)?;
        assert!(tx.set_lease_state(&closed.lease_id, LeaseState::Revoked)?);
        assert!(!tx.set_lease_state(&closed.lease_id, LeaseState::Completed)?);
        assert!(!tx.set_lease_state(&LeaseId::fresh(), LeaseState::Completed)?);
        assert_eq!(tx.lease(&closed.lease_id)?.unwrap().state, LeaseState::Revoked);
        assert!(tx.finish_exec(&exec.exec_id, ExecState::Exited, Some(7))?);
        assert!(!tx.finish_exec(&exec.exec_id, ExecState::Interrupted, None)?);
        assert_eq!(tx.exec(&exec.exec_id)?.unwrap().exit_status, Some(7));

        let ids = |filter| -> Result<Vec<LeaseId>, StoreError> {
            Ok(tx.leases(&filter)?.into_iter().map(|lease| lease.lease_id).collect())
        };
        assert_eq!(ids(LeaseFilter::default())?, [kept.lease_id.clone(), closed.lease_id.clone()]);
        assert_eq!(
            ids(LeaseFilter { open_only: true, ..Default::default() })?,
            std::slice::from_ref(&kept.lease_id)
        );
        let of_other = LeaseFilter { run: Some(other.run_id.clone()), ..Default::default() };
        assert_eq!(ids(of_other)?, std::slice::from_ref(&closed.lease_id));
        Ok(())
    });
}

#[test]
fn a_use_is_given_to_the_right_run_in_time_and_no_more_often_than_granted() {
    let dir = state();
    let mut store = Store::open(dir.path()).unwrap();
    let run = run();
    let (lease, late) = (lease(&run, 2), lease(&run, 2));
    let stranger = RunId::fresh();
    let other_boot = Moment { boot_id: "another".to_owned(), ..at(100) };
    write(&mut store, |tx| {
        tx.put_lease(&lease)?;
        tx.put_lease(&late)
    });
    let mut check = |run: &RunId, id: &LeaseId, now: Moment, expected| {
        assert_eq!(write(&mut store, |tx| tx.consume(run, id, &now)), expected);
    };
    check(&stranger, &lease.lease_id, at(100), Err(UseRefused::NotFound));
    check(&run.run_id, &LeaseId::fresh(), at(100), Err(UseRefused::NotFound));
    check(&run.run_id, &lease.lease_id, other_boot, Err(UseRefused::OtherBoot));
    check(&run.run_id, &lease.lease_id, at(401), Err(UseRefused::Expired));
    check(&run.run_id, &lease.lease_id, at(100), Ok(1));
    check(&run.run_id, &lease.lease_id, at(399), Ok(0));
    check(&run.run_id, &lease.lease_id, at(399), Err(UseRefused::Exhausted));
    // The last nanosecond, and the first that is too late.
    let exact = |nanoseconds| Moment { boot: Duration::new(400, nanoseconds), ..at(0) };
    check(&run.run_id, &late.lease_id, exact(4), Ok(1));
    check(&run.run_id, &late.lease_id, exact(5), Err(UseRefused::Expired));
    write(&mut store, |tx| tx.set_lease_state(&lease.lease_id, LeaseState::Revoked));
    let refused = write(&mut store, |tx| tx.consume(&run.run_id, &lease.lease_id, &at(100)));
    assert_eq!(refused, Err(UseRefused::NotOpen(LeaseState::Revoked)));
}

#[test]
fn requests_are_counted_over_a_sliding_minute_and_the_whole_run() {
    let dir = state();
    let mut store = Store::open(dir.path()).unwrap();
    let (run, other) = (run(), run());
    write(&mut store, |tx| {
        tx.put_run(&run)?;
        tx.put_run(&other)
    });
    let mut count = |now: Moment, minute, run_total| {
        let counted = write(&mut store, |tx| {
            let number = tx.count_request(&run.run_id, &now)?;
            let counted = tx.requests_counted(&run.run_id, &now)?;
            assert_eq!(number, counted.run);
            Ok(counted)
        });
        assert_eq!(counted, Counters { minute, run: run_total }, "{now:?}");
    };
    count(at(10), 1, 1);
    count(at(10), 2, 2);
    count(at(40), 3, 3);
    // Sixty seconds after the first two they are outside; a moment before they are not.
    count(Moment { boot: Duration::from_millis(69_999), ..at(0) }, 4, 4);
    count(at(70), 3, 5);
    // A reading of the clock that was overtaken: by it the first two are still inside.
    count(at(69), 6, 6);
    let rebooted = |seconds| Moment { boot_id: "next".to_owned(), ..at(seconds) };
    count(rebooted(5), 1, 7);
    count(rebooted(6), 2, 8);

    store
        .read(|view| {
            let counted = |now: Moment| view.requests_counted(&run.run_id, &now);
            assert_eq!(counted(rebooted(65))?, Counters { minute: 1, run: 8 });
            assert_eq!(counted(rebooted(66))?, Counters { minute: 0, run: 8 });
            assert_eq!(view.requests_counted(&other.run_id, &at(10))?, Counters::default());
            Ok(())
        })
        .unwrap();
    write(&mut store, |tx| {
        assert!(tx.end_run(&run.run_id)?);
        assert!(!tx.end_run(&run.run_id)?);
        assert_eq!(tx.run(&run.run_id)?.unwrap().state, RunState::Ended);
        assert_eq!(tx.requests_counted(&run.run_id, &at(10))?.run, 8);
        assert!(matches!(
            tx.count_request(&RunId::fresh(), &at(1)),
            Err(StoreError::Missing { .. })
        ));
        Ok(())
    });
}

#[test]
fn counting_stays_exact_when_old_requests_are_swept() {
    let dir = state();
    let mut store = Store::open(dir.path()).unwrap();
    let run = run();
    write(&mut store, |tx| {
        tx.put_run(&run)?;
        for second in 0..300u64 {
            tx.count_request(&run.run_id, &at(1000 + second))?;
            let counted = tx.requests_counted(&run.run_id, &at(1000 + second))?;
            let expected = u32::try_from(second + 1).unwrap();
            assert_eq!(counted, Counters { minute: expected.min(60), run: expected });
        }
        let count = |row: &rusqlite::Row<'_>| row.get::<_, i64>(0);
        let rows = tx.conn.query_row("SELECT count(*) FROM request", [], count).unwrap();
        assert!(rows < 130, "{rows}");
        Ok(())
    });
}

#[test]
fn secrets_have_versions_and_only_the_next_one_is_taken() {
    let dir = state();
    let mut store = Store::open(dir.path()).unwrap();
    let name: crate::model::name::SecretName = "github-bot".parse().unwrap();
    let large = vec![9; 1 << 20];
    write(&mut store, |tx| {
        assert_eq!(tx.next_secret_version(&name)?, 1);
        let put = |tx: &mut Tx<'_>, version, sealed: &[u8], byte| {
            tx.put_secret(&name, version, sealed, &ValueDigest([byte; 32]), &at(0))
        };
        assert!(put(tx, 2, b"sealed", 1).is_err());
        put(tx, 1, b"sealed", 1)?;
        assert!(put(tx, 1, b"sealed", 1).is_err());
        put(tx, 2, &large, 2)
    });
    store
        .read(|view| {
            let found = view.secret(&name)?.unwrap();
            assert_eq!((found.entry.version, &found.sealed), (2, &large));
            assert_eq!(view.secrets()?, [found.entry]);
            assert_eq!(view.digests()?, [(name.clone(), ValueDigest([2; 32]))]);
            assert_eq!(view.secret(&"other".parse().unwrap())?, None);
            Ok(())
        })
        .unwrap();
    assert!(write(&mut store, |tx| tx.remove_secret(&name)));
    assert!(!write(&mut store, |tx| tx.remove_secret(&name)));
    assert!(store.tidy().unwrap());
    let file = std::fs::read(dir.path().join("db/sublet.db")).unwrap();
    assert!(!file.windows(64).any(|w| w == [9; 64]), "what is removed is overwritten");
}

#[test]
fn a_step_that_fails_leaves_nothing() {
    let dir = state();
    let mut store = Store::open(dir.path()).unwrap();
    let run = run();
    let failed = store.transaction(Durability::Durable, |tx| {
        tx.put_run(&run)?;
        tx.append(draft(EventType::RunStarted))?;
        Err::<(), _>(StoreError::Missing { what: "a reason".to_owned() })
    });
    assert!(matches!(failed, Err(StoreError::Missing { .. })));
    assert_eq!(whole_trail(&store), 0);
    // The same again, to its end.
    write(&mut store, |tx| tx.put_run(&run));
    assert!(store.transaction(Durability::Durable, |tx| tx.put_run(&run)).is_err(), "known");
    assert!(store.read(|view| view.run(&run.run_id)).unwrap().is_some());
}

#[test]
fn each_transaction_has_the_durability_it_asks_for() {
    let dir = state();
    let mut store = Store::open(dir.path()).unwrap();
    let mut check = |durability, expected: i64| {
        let synchronous = store.transaction(durability, |tx| {
            let read = |row: &rusqlite::Row<'_>| row.get::<_, i64>(0);
            let set = tx.conn.query_row("PRAGMA synchronous", [], read).map_err(tx.error())?;
            let mode = |row: &rusqlite::Row<'_>| row.get::<_, String>(0);
            let journal = tx.conn.query_row("PRAGMA journal_mode", [], mode).map_err(tx.error())?;
            assert_eq!(journal, "wal");
            Ok(set)
        });
        assert_eq!(synchronous.unwrap().0, expected, "{durability:?}");
    };
    check(Durability::Durable, 2);
    check(Durability::Relaxed, 1);
    check(Durability::Relaxed, 1);
    check(Durability::Durable, 2);
}

#[test]
fn the_log_is_kept_short_and_closing_moves_nothing() {
    let dir = state();
    let log = dir.path().join("db/sublet.db-wal");
    let mut largest = 0;
    let mut tidied = 0;
    for _ in 0..80 {
        let mut store = Store::open(dir.path()).unwrap();
        write(&mut store, |tx| {
            for _ in 0..5 {
                tx.append(draft(EventType::ExecStarted))?;
            }
            Ok(())
        });
        tidied += u32::from(store.tidy().unwrap());
        store
            .transaction(Durability::Relaxed, |tx| {
                for _ in 0..3 {
                    tx.append(draft(EventType::ExecScrubbed))?;
                }
                Ok(())
            })
            .unwrap();
        drop(store);
        largest = largest.max(std::fs::metadata(&log).expect("the log stays").size());
    }
    let store = Store::open(dir.path()).unwrap();
    assert_eq!(whole_trail(&store), 640);
    assert!((15..=25).contains(&tidied), "{tidied}");
    assert!(largest < 400_000, "the log has {largest} bytes");
}

#[test]
fn threads_with_a_connection_each_leave_one_gapless_chain() {
    const THREADS: u64 = 8;
    const STEPS: u64 = 40;
    let dir = state();
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let path = dir.path();
            scope.spawn(move || {
                let mut store = Store::open(path).unwrap();
                for step in 0..STEPS {
                    let durability = if (thread + step) % 2 == 0 {
                        Durability::Durable
                    } else {
                        Durability::Relaxed
                    };
                    let appended = store.transaction(durability, |tx| {
                        tx.append(draft(EventType::LeaseRequested))?;
                        tx.append(draft(EventType::LeaseGranted))
                    });
                    appended.unwrap();
                    store.tidy().unwrap();
                }
            });
        }
    });
    let store = Store::open(dir.path()).unwrap();
    assert_eq!(whole_trail(&store), THREADS * STEPS * 2);
}

#[test]
fn of_many_racers_one_wins_the_last_use() {
    let dir = state();
    let run = run();
    let lease = lease(&run, 1);
    write(&mut Store::open(dir.path()).unwrap(), |tx| tx.put_lease(&lease));
    let start = std::sync::Barrier::new(64);
    let race = || {
        let mut store = Store::open(dir.path()).unwrap();
        start.wait();
        write(&mut store, |tx| tx.consume(&run.run_id, &lease.lease_id, &at(1)))
    };
    let results: Vec<_> = std::thread::scope(|scope| {
        let racers: Vec<_> = (0..64).map(|_| scope.spawn(race)).collect();
        racers.into_iter().map(|racer| racer.join().unwrap()).collect()
    });
    assert_eq!(results.iter().filter(|r| **r == Ok(0)).count(), 1);
    assert_eq!(results.iter().filter(|r| **r == Err(UseRefused::Exhausted)).count(), 63);
}

#[test]
fn what_a_living_owner_holds_is_no_orphan() {
    let dir = state();
    let run = run();
    let lease = lease(&run, 1);
    let mut first = Store::open(dir.path()).unwrap();
    let mut second = Store::open(dir.path()).unwrap();
    assert_ne!(first.owner(), second.owner());
    write(&mut first, |tx| tx.put_lease(&lease));
    assert_eq!(write(&mut first, |tx| tx.adopt_orphans()), Orphans::default());
    assert_eq!(write(&mut second, |tx| tx.adopt_orphans()), Orphans::default());
    drop(first);
    let adopted = |store: &mut Store| write(store, |tx| tx.adopt_orphans()).leases;
    assert_eq!(adopted(&mut second), std::slice::from_ref(&lease));
    assert_eq!(adopted(&mut second), [], "it is its own now");
    let mut third = Store::open(dir.path()).unwrap();
    assert_eq!(adopted(&mut third), [], "and no one else's");
    drop(second);
    assert_eq!(adopted(&mut third), [lease], "until it is gone before it closed it");
}

#[test]
fn a_reader_sees_one_point_in_time_and_makes_nothing() {
    let dir = state();
    let missing = dir.path().join("state");
    assert!(matches!(Reader::open(&missing), Err(StoreError::NotFound { .. })));
    assert!(!missing.exists());
    let mut store = Store::open(dir.path()).unwrap();
    write(&mut store, |tx| tx.append(draft(EventType::RunStarted)));
    let reader = Reader::open(dir.path()).unwrap();
    reader
        .read(|view| {
            assert_eq!(view.head()?.seq, 1);
            write(&mut store, |tx| tx.append(draft(EventType::RunEnded)));
            assert_eq!(view.head()?.seq, 1, "not what came later");
            assert_eq!(view.events().count(), 1);
            Ok(())
        })
        .unwrap();
    assert_eq!(reader.read(|view| view.head()).unwrap().seq, 2);
    let events = |since| reader.read(|view| Ok(view.events_since(since).count())).unwrap();
    assert_eq!((events(0), events(1), events(2)), (2, 1, 0));
}

#[test]
fn a_long_trail_is_read_in_order() {
    let dir = state();
    let mut store = Store::open(dir.path()).unwrap();
    write(&mut store, |tx| {
        (0..600).try_for_each(|_| tx.append(draft(EventType::ExecStarted)).map(drop))
    });
    assert_eq!(whole_trail(&store), 600);
}
