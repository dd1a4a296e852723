//! `cargo bench --bench store`: what a durable grant costs when 64 callers ask at once, on a disk whose sync
//! takes 2 ms: group commit against one sync a grant, side by side in one run. Needs `cc`.
//!
//! The slow disk is `slow_fsync.c`, put under this program by starting it again with `LD_PRELOAD`.
#![forbid(unsafe_code)]

use std::path::Path;
use std::process::{Command, ExitCode};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use sublet::model::event::{Draft, EventType};
use sublet::model::id::{LeaseId, RequestId, RunId};
use sublet::model::lease::{LeaseRecord, LeaseState};
use sublet::model::moment::Moment;
use sublet::model::name::Channel;
use sublet::model::run::{Run, RunState};
use sublet::store::{Durability, SharedStore, Store, StoreError, Tx};

const CALLERS: usize = 64;
const SYNC: Duration = Duration::from_millis(2);
/// Measured in turns, so that whatever else the machine does falls on both.
const ROUNDS: usize = 4;
const ROUND: Duration = Duration::from_millis(1500);
const SHIMMED: &str = "SUBLET_BENCH_SHIMMED";

fn main() -> ExitCode {
    if std::env::var_os(SHIMMED).is_none() {
        return on_a_slow_disk();
    }
    let place = tempfile::tempdir().unwrap();
    println!(
        "sync of the disk: {:.2} ms, asked for {:.2}",
        milliseconds(sync_takes(place.path())),
        milliseconds(SYNC)
    );
    let shared = SharedStore::open(&place.path().join("grouped")).unwrap();
    let grouped = Grants::begin(|run| {
        shared.transaction(Durability::Durable, |tx| tx.put_run(run)).map(drop)
    });
    let alone = Mutex::new(Store::open(&place.path().join("alone")).unwrap());
    let single = Grants::begin(|run| {
        alone.lock().unwrap().transaction(Durability::Durable, |tx| tx.put_run(run)).map(drop)
    });
    let in_group =
        |run: &Run| shared.transaction(Durability::Durable, |tx| grant(tx, run)).map(drop);
    let by_itself = |run: &Run| {
        alone.lock().unwrap().transaction(Durability::Durable, |tx| grant(tx, run)).map(drop)
    };
    let (mut with, mut without) = (Measured::default(), Measured::default());
    for _ in 0..ROUNDS {
        without.add(single.ask(CALLERS, ROUND, by_itself, || alone.lock().unwrap().tidy()));
        with.add(grouped.ask(CALLERS, ROUND, in_group, || shared.tidy()));
    }
    let ratio = with.rate() / without.rate();
    println!("{CALLERS} callers              grants/s   p50 ms   p99 ms   CPU µs/grant");
    println!("one sync a grant     {without}");
    println!("group commit         {with}");
    println!("ratio {ratio:.1} (goal: 20 or more)");

    let (mut one, mut lone) = (Measured::default(), Measured::default());
    for _ in 0..ROUNDS {
        one.add(single.ask(1, ROUND / 4, by_itself, || Ok(false)));
        lone.add(grouped.ask(1, ROUND / 4, in_group, || Ok(false)));
    }
    println!("1 caller");
    println!("one sync a grant     {one}");
    println!("group commit         {lone}");
    println!("a lone caller waits {:.2} times as long (goal: 1)", lone.at(50) / one.at(50));
    if ratio < 20.0 { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

fn on_a_slow_disk() -> ExitCode {
    let place = tempfile::tempdir().unwrap();
    let shim = place.path().join("slow_fsync.so");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/slow_fsync.c");
    let mut cc = Command::new("cc");
    cc.args(["-shared", "-fPIC", "-O1", "-o"]).arg(&shim).arg(source);
    assert!(cc.status().expect("cc").success(), "the slow disk could not be built");
    let status = Command::new(std::env::current_exe().unwrap())
        .env(SHIMMED, "1")
        .env("LD_PRELOAD", &shim)
        .env("SLOW_FSYNC_US", SYNC.as_micros().to_string())
        .status()
        .unwrap();
    if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn sync_takes(dir: &Path) -> Duration {
    let file = std::fs::File::create(dir.join("probe")).unwrap();
    let start = Instant::now();
    (0..20).for_each(|_| file.sync_data().unwrap());
    start.elapsed() / 20
}

/// What is recorded of one lease that is granted, as the ledger does it.
fn grant(tx: &mut Tx<'_>, run: &Run) -> Result<(), StoreError> {
    let now = now();
    let lease = LeaseRecord {
        lease_id: LeaseId::fresh(),
        run_id: run.run_id.clone(),
        request_id: RequestId::fresh(),
        capability: "repo.push".parse().unwrap(),
        audience: "github.com".parse().unwrap(),
        channel: Channel::Git,
        secret: "github-bot".parse().unwrap(),
        issued_at: now.wall,
        expires_at: now.wall + Duration::from_secs(300),
        expires_boot: now.boot + Duration::from_secs(300),
        boot_id: now.boot_id.clone(),
        uses: 5,
        uses_left: 5,
        state: LeaseState::Granted,
    };
    // Decided on, then counted.
    tx.requests_counted(&run.run_id, &now)?;
    tx.count_request(&run.run_id, &now)?;
    let of_lease = |kind| Draft::new(kind, now.wall, "host-1").of_run(run).of_lease(&lease);
    tx.append(of_lease(EventType::LeaseRequested).because("push the branch"))?;
    tx.put_lease(&lease)?;
    tx.append(of_lease(EventType::LeaseGranted).outcome("granted")).map(drop)
}

fn now() -> Moment {
    let boot = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    Moment {
        wall: jiff::Timestamp::now(),
        boot: Duration::new(boot.tv_sec as u64, boot.tv_nsec as u32),
        boot_id: "5a2c7f0e-0000-4000-8000-123456789abc".to_owned(),
    }
}

/// One run for each caller.
struct Grants {
    runs: Vec<Run>,
}

impl Grants {
    fn begin(put: impl Fn(&Run) -> Result<(), StoreError>) -> Self {
        let run = |_| Run {
            run_id: RunId::fresh(),
            agent: "agent-7".parse().unwrap(),
            principal: "alice".parse().unwrap(),
            permissions: Vec::new(),
            profile: "default".to_owned(),
            workspace: "/srv/agents/a".into(),
            state: RunState::Active,
            started_at: jiff::Timestamp::now(),
        };
        let runs: Vec<Run> = (0..CALLERS).map(run).collect();
        runs.iter().for_each(|run| put(run).unwrap());
        Self { runs }
    }

    /// Each caller asks again as soon as it has its answer, while someone keeps the log short.
    fn ask(
        &self,
        callers: usize,
        time: Duration,
        ask: impl Fn(&Run) -> Result<(), StoreError> + Sync,
        tidy: impl Fn() -> Result<bool, StoreError> + Sync,
    ) -> Measured {
        let ended = AtomicBool::new(false);
        let granted = AtomicU64::new(0);
        let waits = Mutex::new(Vec::new());
        let (start, cpu) = (Instant::now(), cpu_time());
        std::thread::scope(|scope| {
            for run in &self.runs[..callers] {
                scope.spawn(|| {
                    let mut own = Vec::new();
                    while !ended.load(Ordering::Relaxed) {
                        let asked = Instant::now();
                        ask(run).unwrap();
                        own.push(asked.elapsed());
                    }
                    granted.fetch_add(own.len() as u64, Ordering::Relaxed);
                    waits.lock().unwrap().append(&mut own);
                });
            }
            scope.spawn(|| {
                while !ended.load(Ordering::Relaxed) {
                    std::thread::sleep(Duration::from_millis(250));
                    tidy().unwrap();
                }
            });
            std::thread::sleep(time);
            ended.store(true, Ordering::Relaxed);
        });
        let (time, granted) = (start.elapsed(), granted.into_inner());
        let cpu = cpu_time() - cpu;
        Measured { granted, time, cpu, waits: waits.into_inner().unwrap() }
    }
}

#[derive(Default)]
struct Measured {
    granted: u64,
    time: Duration,
    /// Of all threads, those that ask included.
    cpu: Duration,
    waits: Vec<Duration>,
}

impl Measured {
    fn add(&mut self, mut other: Measured) {
        self.granted += other.granted;
        self.time += other.time;
        self.cpu += other.cpu;
        self.waits.append(&mut other.waits);
        self.waits.sort_unstable();
    }

    /// Grants a second.
    fn rate(&self) -> f64 {
        self.granted as f64 / self.time.as_secs_f64()
    }

    /// A percentile of the waits, in milliseconds.
    fn at(&self, percent: usize) -> f64 {
        milliseconds(self.waits[(self.waits.len() - 1) * percent / 100])
    }
}

impl std::fmt::Display for Measured {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let cpu = self.cpu.as_secs_f64() * 1e6 / self.granted as f64;
        write!(f, "{:>11.0}{:>9.2}{:>9.2}{cpu:>15.0}", self.rate(), self.at(50), self.at(99))
    }
}

fn cpu_time() -> Duration {
    let spent = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(spent.tv_sec as u64, spent.tv_nsec as u32)
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
