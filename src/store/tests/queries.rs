//! What the broker asks and changes: each with the case in which it must not.

use super::*;
use crate::store::{Counts, ExecFilter, LeaseFilter, RenewRefused, Revoke, RunFilter};

fn run_of(principal: &str) -> Run {
    Run { principal: principal.parse().unwrap(), ..run() }
}

fn ids(leases: &[LeaseRecord]) -> Vec<&LeaseId> {
    leases.iter().map(|lease| &lease.lease_id).collect()
}

/// Two runs of alice and one of bob, with three leases each, the first of which is closed.
struct Host {
    _dir: tempfile::TempDir,
    store: Store,
    runs: Vec<Run>,
    leases: Vec<LeaseRecord>,
}

fn host() -> Host {
    let dir = state();
    let mut store = Store::open(dir.path()).unwrap();
    let runs = vec![run_of("alice"), run_of("alice"), run_of("bob")];
    let leases: Vec<LeaseRecord> =
        runs.iter().flat_map(|run| [lease(run, 1), lease(run, 2), lease(run, 2)]).collect();
    write(&mut store, |tx| {
        runs.iter().try_for_each(|run| tx.put_run(run))?;
        leases.iter().try_for_each(|lease| tx.put_lease(lease))?;
        for closed in leases.iter().step_by(3) {
            assert!(tx.set_lease_state(&closed.lease_id, LeaseState::Completed)?);
        }
        Ok(())
    });
    Host { _dir: dir, store, runs, leases }
}

#[test]
fn leases_are_listed_by_run_principal_and_state() {
    let host = host();
    #[track_caller]
    fn check(host: &Host, filter: LeaseFilter, expected: &[usize]) {
        let found = host.store.read(|view| view.leases(&filter)).unwrap();
        let expected: Vec<_> = expected.iter().map(|&i| &host.leases[i].lease_id).collect();
        assert_eq!(ids(&found), expected, "{filter:?}");
    }
    let all = LeaseFilter::default;
    let run = |i: usize| Some(host.runs[i].run_id.clone());
    let of = |name: &str| Some(name.parse().unwrap());
    check(&host, all(), &[0, 1, 2, 3, 4, 5, 6, 7, 8]);
    check(&host, LeaseFilter { limit: Some(2), ..all() }, &[7, 8]);
    check(&host, LeaseFilter { limit: Some(0), ..all() }, &[]);
    check(&host, LeaseFilter { run: run(1), ..all() }, &[3, 4, 5]);
    check(&host, LeaseFilter { run: run(1), limit: Some(1), ..all() }, &[5]);
    check(&host, LeaseFilter { run: run(1), open_only: true, ..all() }, &[4, 5]);
    check(&host, LeaseFilter { run: Some(RunId::fresh()), ..all() }, &[]);
    check(&host, LeaseFilter { principal: of("alice"), ..all() }, &[0, 1, 2, 3, 4, 5]);
    check(&host, LeaseFilter { principal: of("bob"), open_only: true, ..all() }, &[7, 8]);
    check(&host, LeaseFilter { principal: of("carol"), ..all() }, &[]);
    check(&host, LeaseFilter { principal: of("bob"), run: run(0), ..all() }, &[]);
    check(&host, LeaseFilter { open_only: true, ..all() }, &[1, 2, 4, 5, 7, 8]);
    check(&host, LeaseFilter { open_only: true, limit: Some(3), ..all() }, &[5, 7, 8]);
    let state = |state| LeaseFilter { state: Some(state), ..all() };
    check(&host, state(LeaseState::Completed), &[0, 3, 6]);
    check(&host, state(LeaseState::Revoked), &[]);
    check(
        &host,
        LeaseFilter { open_only: true, ..state(LeaseState::Granted) },
        &[1, 2, 4, 5, 7, 8],
    );
    check(&host, LeaseFilter { open_only: true, ..state(LeaseState::Completed) }, &[]);
}

#[test]
fn what_is_asked_often_is_found_by_an_index() {
    let host = host();
    #[track_caller]
    fn check(host: &Host, sql: &str, index: &str) {
        let plan = host.store.read(|view| {
            let mut plan = view.prepare(&format!("EXPLAIN QUERY PLAN {sql}"))?;
            let rows = plan.query_map([], |row| row.get::<_, String>(3)).unwrap();
            Ok(rows.map(Result::unwrap).collect::<Vec<_>>().join("; "))
        });
        let plan = plan.unwrap();
        assert!(plan.contains(index) && !plan.contains("SCAN lease"), "{sql}: {plan}");
        assert!(!plan.contains("TEMP B-TREE"), "{sql}: {plan}");
    }
    let by_run = "WHERE run_id = 'r' ORDER BY lease_id DESC LIMIT 5";
    check(&host, &format!("SELECT uses FROM lease {by_run}"), "lease_of_run");
    let by_run = "WHERE run_id = 'r' ORDER BY exec_id DESC LIMIT 5";
    check(&host, &format!("SELECT command FROM exec {by_run}"), "exec_of_run");
    let open = "owner = 1 AND state IN ('granted', 'consumed')";
    check(&host, &format!("SELECT min(expires_boot_ns) FROM lease WHERE {open}"), "lease_due");
    check(
        &host,
        &format!(
            "SELECT uses FROM lease INDEXED BY lease_due WHERE {open} AND expires_boot_ns <= 5
             ORDER BY expires_boot_ns LIMIT 5"
        ),
        "lease_due",
    );
    check(
        &host,
        "SELECT max(boot_ns) FROM request WHERE run_id = 'r' AND boot_id = 'b'",
        "SEARCH request USING PRIMARY KEY",
    );
}

#[test]
fn a_lease_is_renewed_only_while_it_is_good() {
    let mut host = host();
    let [closed, open] = [0, 1].map(|i| host.leases[i].lease_id.clone());
    let shown: jiff::Timestamp = "2026-11-22T11:00:00Z".parse().unwrap();
    let mut renew = |id: &LeaseId, until: u64, now: Moment| {
        let until = Duration::from_secs(until);
        write(&mut host.store, |tx| tx.renew(id, shown, until, &now))
    };
    let rebooted = Moment { boot_id: "another".to_owned(), ..at(100) };
    assert_eq!(renew(&LeaseId::fresh(), 500, at(100)), Err(RenewRefused::NotFound));
    assert_eq!(renew(&closed, 500, at(100)), Err(RenewRefused::NotOpen(LeaseState::Completed)));
    assert_eq!(renew(&open, 500, rebooted), Err(RenewRefused::OtherBoot));
    assert_eq!(renew(&open, 500, at(401)), Err(RenewRefused::Expired));
    assert_eq!(renew(&open, 300, at(100)), Err(RenewRefused::NoLonger));
    let renewed = renew(&open, 500, at(400)).unwrap();
    let expected = LeaseRecord {
        expires_at: shown,
        expires_boot: Duration::from_secs(500),
        ..host.leases[1].clone()
    };
    assert_eq!(renewed, expected);
    // It counts: a use is given after the first expiry, and not after the second.
    let run = &host.runs[0].run_id;
    let mut consume = |now| write(&mut host.store, |tx| tx.consume(run, &open, &now));
    assert_eq!(consume(at(499)), Ok(1));
    assert_eq!(consume(at(500)), Err(UseRefused::Expired));
}

#[test]
fn a_lease_is_complete_when_it_is_spent_and_no_longer_used() {
    let mut host = host();
    let (run, lease) = (host.runs[0].clone(), host.leases[1].lease_id.clone());
    let unused = host.leases[2].lease_id.clone();
    let [first, second] =
        [exec(&run, std::slice::from_ref(&lease)), exec(&run, std::slice::from_ref(&lease))];
    let unrelated = exec(&run, &[]);
    write(&mut host.store, |tx| {
        let spent = |tx: &mut Tx<'_>, id: &LeaseId| {
            tx.complete_if_spent(id).map(|completed| completed.map(|lease| lease.state))
        };
        tx.put_exec(&unrelated)?;
        assert_eq!(spent(tx, &lease)?, None, "not used");
        tx.put_exec(&first)?;
        assert_eq!(tx.consume(&run.run_id, &lease, &at(1))?, Ok(1));
        assert!(tx.finish_exec(&first.exec_id, ExecState::Exited, Some(0))?);
        assert_eq!(spent(tx, &lease)?, None, "a use is left");
        tx.put_exec(&second)?;
        assert_eq!(tx.consume(&run.run_id, &lease, &at(1))?, Ok(0));
        assert_eq!(spent(tx, &lease)?, None, "in use");
        assert!(tx.finish_exec(&second.exec_id, ExecState::Exited, Some(0))?);
        assert_eq!(spent(tx, &lease)?, Some(LeaseState::Completed));
        assert_eq!(spent(tx, &lease)?, None, "once");
        assert_eq!(spent(tx, &unused)?, None);
        assert_eq!(tx.lease(&lease)?.unwrap().state, LeaseState::Completed);
        assert_eq!(tx.lease(&unused)?.unwrap().state, LeaseState::Granted);
        Ok(())
    });
}

#[test]
fn revoking_closes_what_is_open_of_these_and_ours_and_nothing_else() {
    #[track_caller]
    fn check(
        which: impl for<'a> Fn(&'a [Run], &'a [LeaseRecord]) -> Revoke<'a>,
        expected: &[usize],
    ) {
        let mut host = host();
        // One is in use.
        let (used, run) = (host.leases[1].lease_id.clone(), host.runs[0].run_id.clone());
        write(&mut host.store, |tx| tx.consume(&run, &used, &at(1))).unwrap();
        let (runs, leases) = (host.runs.clone(), host.leases.clone());
        // What another process delivers, only that one can wipe.
        let mut other = Store::open(host._dir.path()).unwrap();
        assert_eq!(write(&mut other, |tx| tx.revoke(which(&runs, &leases))), []);
        for again in [false, true] {
            let revoked = write(&mut host.store, |tx| tx.revoke(which(&runs, &leases)));
            let mut found = ids(&revoked);
            found.sort();
            let all: Vec<_> = expected.iter().map(|&i| &host.leases[i].lease_id).collect();
            assert_eq!(found, if again { vec![] } else { all });
            for lease in &revoked {
                let in_use = lease.lease_id == used;
                let state = if in_use { LeaseState::Consumed } else { LeaseState::Granted };
                assert_eq!(lease.state, state, "as it was");
            }
        }
        for (i, lease) in host.leases.iter().enumerate() {
            let state = host.store.read(|view| view.lease(&lease.lease_id)).unwrap().unwrap().state;
            assert_eq!(state == LeaseState::Revoked, expected.contains(&i), "{i}");
        }
        // Nothing is released under it any more.
        let refused = write(&mut host.store, |tx| tx.consume(&run, &used, &at(1)));
        assert_eq!(refused.is_err(), expected.contains(&1));
    }
    check(|_, leases| Revoke::Lease(&leases[1].lease_id), &[1]);
    check(|_, leases| Revoke::Lease(&leases[0].lease_id), &[]);
    check(|runs, _| Revoke::Run(&runs[0].run_id), &[1, 2]);
    check(|runs, _| Revoke::Principal(&runs[0].principal), &[1, 2, 4, 5]);
    check(|runs, _| Revoke::Principal(&runs[2].principal), &[7, 8]);
    check(|_, _| Revoke::All, &[1, 2, 4, 5, 7, 8]);
}

#[test]
fn what_is_due_expires_and_what_is_not_stays() {
    let dir = state();
    let mut store = Store::open(dir.path()).unwrap();
    let mut other = Store::open(dir.path()).unwrap();
    let run = run();
    let until =
        |seconds| LeaseRecord { expires_boot: Duration::from_secs(seconds), ..lease(&run, 1) };
    let (late, soon, later) = (until(200), until(100), until(300));
    let of_another_process = until(50);
    let of_another_boot = LeaseRecord { boot_id: "another".to_owned(), ..until(60) };
    write(&mut store, |tx| {
        [&late, &soon, &later, &of_another_boot]
            .into_iter()
            .try_for_each(|lease| tx.put_lease(lease))
    });
    write(&mut other, |tx| tx.put_lease(&of_another_process));
    let owner = store.owner();
    let next = |store: &Store| store.read(|view| view.next_expiry(owner)).unwrap();
    assert_eq!(next(&store), Some(Duration::from_secs(60)));
    write(&mut store, |tx| tx.set_lease_state(&of_another_boot.lease_id, LeaseState::Interrupted));
    assert_eq!(next(&store), Some(Duration::from_secs(100)));
    let expire = |store: &mut Store, now, limit| write(store, |tx| tx.expire_due(&at(now), limit));
    assert_eq!(expire(&mut store, 99, 9), []);
    assert_eq!(expire(&mut store, 250, 1), std::slice::from_ref(&soon));
    assert_eq!(expire(&mut store, 250, 9), std::slice::from_ref(&late));
    assert_eq!(expire(&mut store, 250, 9), []);
    assert_eq!(next(&store), Some(Duration::from_secs(300)));
    let state = |lease: &LeaseRecord| {
        store.read(|view| view.lease(&lease.lease_id)).unwrap().unwrap().state
    };
    assert_eq!([&soon, &late].map(state), [LeaseState::Expired; 2]);
    assert_eq!([&later, &of_another_process].map(state), [LeaseState::Granted; 2]);
    // Nanoseconds: the moment of expiry itself is too late.
    let exact = Moment { boot: Duration::from_nanos(300_000_000_000 - 1), ..at(0) };
    assert_eq!(write(&mut store, |tx| tx.expire_due(&exact, 9)), []);
    assert_eq!(expire(&mut store, 300, 9), [later]);
    assert_eq!(next(&store), None);
}

#[test]
fn runs_and_execs_are_listed_by_state_and_what_is_open_is_counted() {
    let mut host = host();
    let (first, last) = (host.runs[0].clone(), host.runs[2].clone());
    let (running, ended) = (exec(&first, &[]), exec(&first, &[]));
    let of_last = exec(&last, &[]);
    let counts = |store: &Store| store.read(|view| view.counts()).unwrap();
    let before = Counts { open_leases: 6, running_execs: 0, events: 0 };
    assert_eq!(counts(&host.store), before);
    write(&mut host.store, |tx| {
        [&running, &ended, &of_last].into_iter().try_for_each(|exec| tx.put_exec(exec))?;
        assert!(tx.finish_exec(&ended.exec_id, ExecState::Exited, Some(0))?);
        assert!(tx.end_run(&last.run_id)?);
        tx.append(draft(EventType::RunEnded))
    });
    assert_eq!(counts(&host.store), Counts { running_execs: 2, events: 1, ..before });

    let runs = |filter| -> Vec<RunId> {
        let found = host.store.read(|view| view.runs_that(filter)).unwrap();
        found.into_iter().map(|run| run.run_id).collect()
    };
    let all = RunFilter::default;
    let mut by_name: Vec<RunId> = host.runs.iter().map(|run| run.run_id.clone()).collect();
    by_name.sort();
    assert_eq!(runs(all()), by_name);
    assert_eq!(runs(RunFilter { limit: Some(1), ..all() }), by_name[2..]);
    let state = |state| RunFilter { state: Some(state), ..all() };
    assert_eq!(runs(state(RunState::Ended)), std::slice::from_ref(&last.run_id));
    assert_eq!(runs(state(RunState::Active)).len(), 2);
    let bobs = RunFilter { principal: Some(&last.principal), ..all() };
    assert_eq!(runs(bobs), std::slice::from_ref(&last.run_id));
    assert_eq!(runs(RunFilter { state: Some(RunState::Active), ..bobs }), []);

    let execs = |filter: ExecFilter| -> Vec<ExecId> {
        let found = host.store.read(|view| view.execs_that(&filter)).unwrap();
        found.into_iter().map(|exec| exec.exec_id).collect()
    };
    let (running, ended, of_last) = (running.exec_id, ended.exec_id, of_last.exec_id);
    let all = ExecFilter::default;
    let of_first = || ExecFilter { run: Some(first.run_id.clone()), ..all() };
    let alive = Some(ExecState::Running);
    assert_eq!(execs(all()), [running.clone(), ended.clone(), of_last.clone()]);
    assert_eq!(execs(ExecFilter { limit: Some(2), ..all() }), [ended.clone(), of_last.clone()]);
    assert_eq!(execs(of_first()), [running.clone(), ended.clone()]);
    assert_eq!(execs(ExecFilter { state: alive, ..of_first() }), std::slice::from_ref(&running));
    assert_eq!(execs(ExecFilter { state: alive, ..all() }), [running, of_last]);
    assert_eq!(execs(ExecFilter { state: Some(ExecState::Exited), ..all() }), [ended]);
}
