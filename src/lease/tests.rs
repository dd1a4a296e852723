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
    let policy = Policy { profile: &profile, config: &config };
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
