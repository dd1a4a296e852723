//! What the broker counts, as `/metrics` shows it (OpenMetrics 1.0 text).
//!
//! Receives facts from the broker's threads; holds numbers and fixed words, never an id, a name or a
//! value: a run cannot add a label. No method blocks for longer than one addition.
#![forbid(unsafe_code)]

use std::time::Duration;

use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

use crate::model::report::Timings;
use crate::model::verdict::DenyReason;

/// The type under which [`Metrics::render`]'s text is served.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// How an exec ended: the words of `exec.exited` in the trail.
const OUTCOMES: [&str; 7] =
    ["exited", "killed", "timed_out", "expired", "revoked", "not_started", "interrupted"];
const STAGES: [&str; 8] =
    ["request", "decide", "record", "resolve", "deliver", "launch", "run", "scrub"];

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Denied {
    reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Ended {
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct InStage {
    stage: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Answered {
    socket: &'static str,
    status: u32,
}

/// Every number of one broker.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    grants: Counter,
    denials: Family<Denied, Counter>,
    execs_live: Gauge,
    execs: Family<Ended, Counter>,
    stages: Family<InStage, Histogram>,
    runs_active: Gauge,
    leases_open: Gauge,
    revocations: Counter,
    commits: Histogram,
    trail_events: Gauge,
    checkpoint_lag: Gauge,
    requests: Family<Answered, Counter>,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    pub fn new() -> Self {
        // 50 µs to 13 s.
        fn of_a_stage() -> Histogram {
            Histogram::new(exponential_buckets(0.000_05, 2.0, 19))
        }
        let metrics = Self {
            registry: Registry::with_prefix("sublet"),
            grants: Counter::default(),
            denials: Family::default(),
            execs_live: Gauge::default(),
            execs: Family::default(),
            stages: Family::new_with_constructor(of_a_stage),
            runs_active: Gauge::default(),
            leases_open: Gauge::default(),
            revocations: Counter::default(),
            // 50 µs to 1.6 s.
            commits: Histogram::new(exponential_buckets(0.000_05, 2.0, 16)),
            trail_events: Gauge::default(),
            checkpoint_lag: Gauge::default(),
            requests: Family::default(),
        };
        // A series that appears only with its first event hides that event from rate().
        for reason in DenyReason::ALL {
            drop(metrics.denials.get_or_create(&Denied { reason: reason.as_str() }));
        }
        for outcome in OUTCOMES {
            drop(metrics.execs.get_or_create(&Ended { outcome }));
        }
        for stage in STAGES {
            drop(metrics.stages.get_or_create(&InStage { stage }));
        }
        metrics.registered()
    }

    fn registered(mut self) -> Self {
        let r = &mut self.registry;
        r.register("grants", "Leases granted", self.grants.clone());
        r.register("denials", "Leases denied, by reason", self.denials.clone());
        r.register("execs_live", "Execs that live now", self.execs_live.clone());
        r.register("execs", "Execs that ended, by outcome", self.execs.clone());
        r.register_with_unit(
            "exec_stage",
            "Time that execs spent in each stage",
            Unit::Seconds,
            self.stages.clone(),
        );
        r.register("runs_active", "Runs that are active", self.runs_active.clone());
        r.register("leases_open", "Leases granted or in use", self.leases_open.clone());
        r.register("revocations", "Leases revoked", self.revocations.clone());
        r.register_with_unit(
            "store_commit",
            "Time that commits of the store took, fsync included",
            Unit::Seconds,
            self.commits.clone(),
        );
        r.register("trail_events", "Events in the trail", self.trail_events.clone());
        r.register(
            "trail_checkpoint_lag_events",
            "Events since the last signed checkpoint",
            self.checkpoint_lag.clone(),
        );
        r.register(
            "http_requests",
            "Requests answered, by socket and status",
            self.requests.clone(),
        );
        self
    }

    pub fn granted(&self, leases: u64) {
        self.grants.inc_by(leases);
    }

    pub fn denied(&self, reason: DenyReason) {
        self.denials.get_or_create(&Denied { reason: reason.as_str() }).inc();
    }

    pub fn exec_began(&self) {
        self.execs_live.inc();
    }

    /// `outcome`: the word of `exec.exited` in the trail.
    pub fn exec_ended(&self, outcome: &'static str) {
        self.execs_live.dec();
        self.execs.get_or_create(&Ended { outcome }).inc();
    }

    /// The stages of one exec, as its report has them.
    pub fn stages(&self, spent: &Timings) {
        let Timings { request, decide, record, resolve, deliver, launch, run, scrub } = *spent;
        let micros = [request, decide, record, resolve, deliver, launch, run, scrub];
        for (stage, micros) in STAGES.into_iter().zip(micros) {
            self.stage(stage, Duration::from_micros(micros));
        }
    }

    /// `stage`: a member of the report's `timings_us`.
    pub fn stage(&self, stage: &'static str, spent: Duration) {
        self.stages.get_or_create(&InStage { stage }).observe(spent.as_secs_f64());
    }

    pub fn runs_active(&self, now: u64) {
        set(&self.runs_active, now);
    }

    pub fn leases_open(&self, now: u64) {
        set(&self.leases_open, now);
    }

    pub fn revoked(&self, leases: u64) {
        self.revocations.inc_by(leases);
    }

    pub fn committed(&self, spent: Duration) {
        self.commits.observe(spent.as_secs_f64());
    }

    /// The trail's last number, and that of the last signed checkpoint.
    pub fn trail(&self, last: u64, checkpoint: u64) {
        set(&self.trail_events, last);
        set(&self.checkpoint_lag, last.saturating_sub(checkpoint));
    }

    /// `socket`: `agent` or `control`.
    pub fn answered(&self, socket: &'static str, status: u16) {
        self.requests.get_or_create(&Answered { socket, status: status.into() }).inc();
    }

    /// All of it, in OpenMetrics text, to be served as [`CONTENT_TYPE`].
    pub fn render(&self) -> String {
        let mut text = String::new();
        match text::encode(&mut text, &self.registry) {
            Ok(()) => text,
            // A String takes all text; were it otherwise, half an exposition would be taken for whole.
            Err(std::fmt::Error) => "# EOF\n".to_owned(),
        }
    }
}

fn set(gauge: &Gauge, now: u64) {
    gauge.set(i64::try_from(now).unwrap_or(i64::MAX));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, line: &str) {
        assert!(text.lines().any(|l| l == line), "no line `{line}` in\n{text}");
    }

    #[test]
    fn what_is_counted_is_shown_under_the_names_of_the_interface() {
        let metrics = Metrics::new();
        metrics.granted(2);
        metrics.denied(DenyReason::RateExceededMinute);
        metrics.exec_began();
        metrics.exec_began();
        metrics.exec_ended("timed_out");
        metrics.stages(&Timings { launch: 1_500, ..Timings::default() });
        metrics.runs_active(3);
        metrics.leases_open(4);
        metrics.revoked(1);
        metrics.committed(Duration::from_millis(2));
        metrics.trail(100, 90);
        metrics.answered("agent", 429);
        let text = metrics.render();
        check(&text, "sublet_grants_total 2");
        check(&text, "sublet_denials_total{reason=\"rate_exceeded_minute\"} 1");
        check(&text, "sublet_denials_total{reason=\"audit_unavailable\"} 0");
        check(&text, "sublet_execs_live 1");
        check(&text, "sublet_execs_total{outcome=\"timed_out\"} 1");
        check(&text, "sublet_exec_stage_seconds_sum{stage=\"launch\"} 0.0015");
        check(&text, "sublet_exec_stage_seconds_count{stage=\"run\"} 1");
        check(&text, "sublet_runs_active 3");
        check(&text, "sublet_leases_open 4");
        check(&text, "sublet_revocations_total 1");
        check(&text, "sublet_store_commit_seconds_count 1");
        check(&text, "sublet_trail_events 100");
        check(&text, "sublet_trail_checkpoint_lag_events 10");
        check(&text, "sublet_http_requests_total{socket=\"agent\",status=\"429\"} 1");
        assert!(text.ends_with("# EOF\n"));
    }

    #[test]
    fn every_thread_may_count() {
        fn shared<T: Send + Sync>(_: &T) {}
        shared(&Metrics::new());
    }
}
