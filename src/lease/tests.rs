use super::*;
use crate::config::HostConfig;
use crate::model::id::RequestId;
use crate::model::run::{Counters, Run, RunState};
use crate::policy::{LeaseFlag, Policy, decide};
use crate::profile::{load_builtin, resolve};

const PROFILE: &str = r#"
[[capability]]
name = "db.read"
channels = ["file", "env", "memfd"]
ttl = "1h"
uses = 9
command = [["**"]]
[[capability.audience]]
host = "db.internal:5432"
secret = "db"
"#;

fn grant(options: &str) -> Grant {
    let profile = resolve("p", PROFILE, &mut load_builtin).unwrap();
    let text = "[secrets.db]\nsource = \"vault\"\nallow = [\"*@*\"]";
    let config = HostConfig::parse(text, "c").unwrap();
    let run = Run {
        run_id: "ci-1".parse().unwrap(),
        agent: "bot".parse().unwrap(),
        principal: "alice".parse().unwrap(),
        permissions: vec![],
        profile: "p".into(),
        workspace: "/w".into(),
        state: RunState::Active,
        started_at: jiff::Timestamp::UNIX_EPOCH,
    };
    let flag: LeaseFlag = format!("db.read@db.internal:5432{options}").parse().unwrap();
    let request = flag.into_request(RequestId::fresh(), run.run_id.clone(), None);
    let policy = Policy { profile: &profile, config: &config, has_issuer: false };
    decide(policy, &request, &run, Counters::default(), None).into_result().unwrap()
}

/// Seconds on the boottime clock, with the wall clock beside it.
fn at(boot: u64, wall: i64) -> Moment {
    Moment {
        wall: jiff::Timestamp::from_second(wall).unwrap(),
        boot: Duration::from_secs(boot),
        boot_id: "boot-a".into(),
    }
}

fn granted(options: &str) -> Lease {
    Lease::granted(&grant(options), LeaseId::fresh(), &at(1000, 1_700_000_000))
}

#[test]
fn uses_are_counted_down_to_none() {
    let mut lease = granted(",uses=2,ttl=60s");
    let now = at(1001, 1_700_000_001);
    assert_eq!((lease.record().uses_left, lease.record().state), (2, LeaseState::Granted));
    lease.consume(&now).unwrap();
    assert_eq!((lease.record().uses_left, lease.record().state), (1, LeaseState::Consumed));
    lease.consume(&now).unwrap();
    let before = lease.clone();
    assert!(matches!(lease.consume(&now), Err(UseError::Exhausted { uses: 2, .. })));
    assert_eq!(lease, before);
}

#[test]
fn expiry_is_boottime_whatever_the_wall_clock_says() {
    #[track_caller]
    fn check(boot: u64, wall: i64, usable: bool) {
        let mut lease = granted(",ttl=60s");
        let now = at(boot, wall);
        assert_eq!(is_expired(lease.record(), &now), !usable);
        // Whether or not the sweeper was there before.
        let mut swept = lease.clone();
        if swept.expire(&now).is_ok() {
            assert_eq!(swept.consume(&now), lease.consume(&now));
        }
        match lease.consume(&now) {
            Ok(()) => assert!(usable),
            Err(UseError::Expired { late, .. }) => {
                assert!(!usable);
                assert_eq!(late, Duration::from_secs(boot - 1060));
            }
            Err(e) => panic!("{e}"),
        }
    }
    let issued = 1_700_000_000;
    check(1000, issued, true);
    check(1059, issued + 59, true);
    check(1060, issued + 60, false);
    check(5000, issued + 4000, false);
    // The wall clock steps forward by a year: nothing is lost. Back by a year: nothing is won.
    check(1010, issued + 31_536_000, true);
    check(1060, issued - 31_536_000, false);
    assert_eq!(remaining(granted(",ttl=60s").record(), &at(1045, 0)), Duration::from_secs(15));
}

#[test]
fn a_lease_of_another_boot_is_over() {
    let mut lease = granted(",ttl=60s");
    let now = Moment { boot_id: "boot-b".into(), ..at(1001, 1_700_000_001) };
    assert!(is_expired(lease.record(), &now));
    assert!(matches!(lease.consume(&now), Err(UseError::OtherBoot { .. })));
    lease.interrupt().unwrap();
    assert_eq!(lease.record().state, LeaseState::Interrupted);
}

#[test]
fn every_step_from_every_state() {
    const STATES: [LeaseState; 7] = [
        LeaseState::Granted,
        LeaseState::Consumed,
        LeaseState::Completed,
        LeaseState::Expired,
        LeaseState::Revoked,
        LeaseState::Denied,
        LeaseState::Interrupted,
    ];
    #[track_caller]
    fn check(from: &[LeaseState], to: LeaseState, step: impl Fn(&mut Lease) -> bool) {
        for state in STATES {
            let record = LeaseRecord { state, ..granted(",uses=3,ttl=60s").into_record() };
            let mut lease = Lease::recorded(record);
            assert_eq!(step(&mut lease), from.contains(&state), "{state:?} to {to:?}");
            let expected = if from.contains(&state) { to } else { state };
            assert_eq!(lease.record().state, expected);
        }
    }
    let open = [LeaseState::Granted, LeaseState::Consumed];
    let (now, late) = (at(1001, 0), at(1060, 0));
    check(&open, LeaseState::Consumed, |l| l.consume(&now).is_ok());
    check(&open[1..], LeaseState::Completed, |l| l.complete().is_ok());
    check(&open, LeaseState::Expired, |l| l.expire(&late).is_ok());
    check(&open, LeaseState::Revoked, |l| l.revoke().is_ok());
    check(&open, LeaseState::Interrupted, |l| l.interrupt().is_ok());
    check(&[], LeaseState::Expired, |l| l.expire(&now).is_ok());
    let e = granted(",ttl=60s").expire(&now).unwrap_err();
    assert!(matches!(e, EndError::NotExpired { left, .. } if left == Duration::from_secs(59)));
}

#[test]
fn a_far_future_neither_wraps_nor_fails() {
    let now = Moment { wall: jiff::Timestamp::MAX, boot: Duration::MAX, boot_id: "b".into() };
    let lease = Lease::granted(&grant(""), LeaseId::fresh(), &now);
    assert_eq!(lease.record().expires_at, jiff::Timestamp::MAX);
}

#[test]
fn the_agents_view() {
    #[track_caller]
    fn check(options: &str, delivery: &str) {
        let grant = grant(&format!(",ttl=90s{options}"));
        let lease = Lease::granted(&grant, LeaseId::fresh(), &at(1000, 1_700_000_000));
        let id = lease.record().lease_id.as_str().to_owned();
        let view = LeaseView::new(lease.record(), Some(grant.place()), &at(1001, 0));
        let channel = grant.channel();
        assert_eq!(
            serde_json::to_string(&view).unwrap(),
            format!(
                "{{\"lease_id\":\"{id}\",\"run_id\":\"ci-1\",\"state\":\"granted\",\"capability\":\"db.read\",\
                 \"audience\":\"db.internal:5432\",\"channel\":\"{channel}\",\
                 \"issued_at\":\"2023-11-14T22:13:20.000Z\",\"expires_at\":\"2023-11-14T22:14:50.000Z\",\
                 \"expires_in\":89,\"uses\":1,\"uses_left\":1,\"delivery\":{delivery}}}"
            )
        );
    }
    check("", "{\"kind\":\"file\",\"path\":\"/run/sublet/secrets/DB\"}");
    check(",channel=env", "{\"kind\":\"env\",\"variable\":\"DB\"}");
    check(",channel=memfd", "{\"kind\":\"memfd\",\"variable\":\"DB_FD\"}");

    let mut lease = granted(",ttl=90s");
    lease.revoke().unwrap();
    let view = LeaseView::new(lease.record(), None, &at(1001, 0));
    assert_eq!((view.expires_in, view.delivery.variable), (0, None));
}

#[test]
fn a_renewal_prolongs_it_up_to_the_most_it_may_last() {
    /// Granted at 1000 for 60 s; renewed at `now` for `ttl`, of at most `max_ttl` in all.
    #[track_caller]
    fn check(now: u64, ttl: u64, max_ttl: u64, expected: Option<u64>) {
        let mut lease = granted(",ttl=60s");
        let before = lease.clone();
        let seconds = Duration::from_secs;
        // A wall clock that was set meanwhile changes nothing.
        let renewed = lease.renew(seconds(ttl), seconds(max_ttl), &at(now, 5));
        match expected {
            Some(until) => {
                assert_eq!(renewed, Ok(()));
                assert_eq!(lease.record().expires_boot, seconds(until));
                let shown = 1_700_000_000 + (until as i64 - 1000);
                assert_eq!(lease.record().expires_at.as_second(), shown);
                assert!(!is_expired(lease.record(), &at(until - 1, 0)));
                assert!(is_expired(lease.record(), &at(until, 0)));
            }
            None => {
                assert!(renewed.is_err());
                assert_eq!(lease, before);
            }
        }
    }
    check(1030, 60, 3600, Some(1090));
    check(1030, 60, 80, Some(1080));
    check(1059, 3600, 90, Some(1090));
    // No longer than before, past the most, past its time.
    check(1000, 60, 3600, None);
    check(1010, 20, 3600, None);
    check(1030, 60, 60, None);
    check(1030, 60, 30, None);
    check(1060, 60, 3600, None);
}

#[test]
fn renewals_do_not_add_up_beyond_the_most() {
    let mut lease = granted(",ttl=60s");
    let (ttl, most) = (Duration::from_secs(60), Duration::from_secs(150));
    lease.consume(&at(1001, 0)).unwrap();
    lease.renew(ttl, most, &at(1050, 0)).unwrap();
    lease.renew(ttl, most, &at(1100, 0)).unwrap();
    assert_eq!(lease.record().expires_boot, Duration::from_secs(1150));
    let refused = lease.renew(ttl, most, &at(1149, 0)).unwrap_err();
    assert!(matches!(refused, RenewError::AtMaximum { max_ttl, .. } if max_ttl == most));
    assert!(matches!(lease.renew(ttl, most, &at(1150, 0)), Err(RenewError::Expired { .. })));
    let rebooted = Moment { boot_id: "boot-b".into(), ..at(1100, 0) };
    assert!(matches!(lease.renew(ttl, most, &rebooted), Err(RenewError::OtherBoot { .. })));
    lease.revoke().unwrap();
    let refused = lease.renew(ttl, most, &at(1100, 0)).unwrap_err();
    assert!(matches!(refused, RenewError::WrongState { state: LeaseState::Revoked, .. }));
}

#[test]
fn a_renewal_is_due_shortly_before_the_end() {
    #[track_caller]
    fn check(change: fn(&mut LeaseRecord), now: u64, due: bool) {
        let mut record = granted(",ttl=60s").into_record();
        change(&mut record);
        assert_eq!(renewal_due(&record, &at(now, 0), Duration::from_secs(20)), due);
    }
    check(|_| {}, 1039, false);
    check(|_| {}, 1040, true);
    check(|_| {}, 1059, true);
    check(|_| {}, 1060, false);
    check(|r| r.state = LeaseState::Consumed, 1040, true);
    check(|r| r.state = LeaseState::Revoked, 1040, false);
    check(|r| r.boot_id = "boot-b".into(), 1040, false);
}
