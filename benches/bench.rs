//! `just bench [SAMPLES]`: how long one sandboxed `/bin/true` takes, side by side in one run.
//!
//! The samples are interleaved, one of each in turn, so that whatever else the machine does falls on all
//! alike; what counts are the ratios. Run as root on an idle machine. Needs `bwrap` and `gcc`; counts page
//! faults, and system calls where `strace` is installed.
//!
//! The launcher is measured by itself as well, as `sublet serve` uses it: from the order to prepare an exec
//! under one memfd lease until nothing of it is left, with the sandbox built for it and with one that stood
//! ready. What a broker adds is its record and its answer.
#![forbid(unsafe_code)]

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::resource::{UsageWho, getrusage};
use sublet::delivery::fill;
use sublet::host::{Places, ProfileRef, Trust};
use sublet::launcher::client::Launcher;
use sublet::launcher::wire::{DeliverySpec, FilledSpec, Notice, Order, Prepare};
use sublet::model::id::{ExecId, RunId};
use sublet::model::name::Channel;
use sublet::sys::clock;
use support::{Floor, TRUE, percentile};

/// Set where it runs from its copy.
const COPIED: &str = "SUBLET_BENCH_COPY";

fn main() {
    go_on_as_installed();
    // `cargo bench` adds `--bench`.
    let samples: usize =
        std::env::args().skip(1).find_map(|arg| arg.parse().ok()).unwrap_or(200).max(10);
    let place = Place::new();
    // First: forking it is for a process of one thread.
    let mut cold = Served::start(&place, 0);
    let mut warm = Served::start(&place, 1);
    let mut floor = Floor::start(&place.dir.path().join("floor"));
    let bwrap = || {
        let mut command = Command::new("bwrap");
        command.args(["--unshare-all", "--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev"]);
        command.args(["--die-with-parent", TRUE]);
        command
    };
    let plain = || place.sublet(&["run", "--", TRUE]);
    let profile = place.profile.to_str().unwrap();
    let leased = || {
        place.sublet(&["run", "--profile", profile, "--lease", "bench.use@svc.test", "--", TRUE])
    };

    // Two rounds that do not count: page cache, first start of the state.
    for _ in 0..2 {
        for command in [bwrap(), plain(), leased()] {
            time(command);
        }
        floor.round();
        cold.round();
        warm.round();
    }
    let mut times: [Vec<Duration>; 6] = Default::default();
    for round in 0..samples {
        for turn in 0..6 {
            // Each round starts with another one.
            let which = (round + turn) % 6;
            times[which].push(match which {
                0 => floor.round(),
                1 => time(bwrap()),
                2 => time(plain()),
                3 => time(leased()),
                4 => cold.round(),
                _ => warm.round(),
            });
        }
    }

    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    println!("{samples} samples each, interleaved, Linux {}", release.trim());
    println!(
        "{:<46}{:>8}{:>8}{:>10}{:>10}{:>10}  goal",
        "", "p50 ms", "p99 ms", "p50/bwrap", "p50/floor", "p99/floor"
    );
    let seconds = |which: usize, percent| percentile(&times[which], percent).as_secs_f64();
    let rows = [
        ("floor: clone3 with the same namespaces", ""),
        ("bwrap --unshare-all, proc, dev", ""),
        ("sublet run -- /bin/true", "<= 0.7 bwrap"),
        ("sublet run, one memfd lease, durable trail", "<= 0.9 bwrap"),
        ("launcher alone, one memfd lease, built for it", "< 1.5 floor"),
        ("launcher alone, one memfd lease, warm", "< 0.8 floor"),
    ];
    for (which, (name, goal)) in rows.into_iter().enumerate() {
        let (half, tail) = (seconds(which, 50), seconds(which, 99));
        println!(
            "{name:<46}{:>8.2}{:>8.2}{:>10.2}{:>10.2}{:>10.2}  {goal}",
            half * 1e3,
            tail * 1e3,
            half / seconds(1, 50),
            half / seconds(0, 50),
            tail / seconds(0, 99),
        );
    }
    println!(
        "launcher alone, warm: {} of {} sandboxes stood ready",
        warm.stood_ready,
        warm.next - 1
    );

    println!("\nstages of the leased run, median of 20, microseconds");
    for (stage, micros) in place.stages(profile) {
        println!("  {stage:<12}{micros:>8}");
    }
    // Neither drifts with what else the machine does.
    println!("\npage faults (getrusage) and system calls (strace -f -c), all processes");
    for (name, command) in
        [("bwrap", bwrap()), ("sublet run", plain()), ("sublet run, leased", leased())]
    {
        let calls = match system_calls(&command, &place) {
            Some(count) => format!("{count:>6}"),
            None => "     - (needs strace: apt-get install strace)".to_owned(),
        };
        println!("  {name:<22}{:>6}{calls}", page_faults(command));
    }
}

/// This program is a launcher too: goes on as a copy of it (`support::installed`).
fn go_on_as_installed() {
    if std::env::var_os(COPIED).is_some() {
        // In use until we end, and then gone.
        std::fs::remove_file(std::env::current_exe().unwrap()).expect("remove the copy's name");
        return;
    }
    let copy = std::env::temp_dir().join(format!("sublet-bench-{}", std::process::id()));
    std::fs::copy(std::env::current_exe().unwrap(), &copy).expect("copy this program");
    let failed = Command::new(&copy).args(std::env::args_os().skip(1)).env(COPIED, "1").exec();
    panic!("{}: {failed}", copy.display());
}

fn time(mut command: Command) -> Duration {
    command.stdin(Stdio::null()).stdout(Stdio::null());
    let start = Instant::now();
    let status = command.status();
    let took = start.elapsed();
    match status {
        Ok(status) if status.success() => took,
        Ok(status) => panic!("{command:?}: {status}"),
        Err(error) => panic!("{command:?}: {error} (apt-get install bubblewrap gcc)"),
    }
}

/// A state, a configuration with one secret and a profile that leases it, in a temporary directory.
struct Place {
    dir: tempfile::TempDir,
    profile: PathBuf,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("sublet-bench-").tempdir().unwrap();
        fs::create_dir(dir.path().join("work")).unwrap();
        fs::write(
            dir.path().join("sublet.toml"),
            "[ceilings]\nrequests_per_minute = 1000000\nrequests_per_run = 1000000\n\
             [secrets.s]\nsource = \"vault\"\nallow = [\"bench.use@svc.test\"]\n",
        )
        .unwrap();
        let profile = dir.path().join("bench.toml");
        fs::write(
            &profile,
            "extends = \"default\"\n[[capability]]\nname = \"bench.use\"\nchannels = [\"memfd\"]\n\
             command = [[\"**\"]]\n[[capability.audience]]\nprotocol = \"https\"\nhost = \"svc.test\"\n\
             secret = \"s\"\nvariable = \"TOKEN\"\n",
        )
        .unwrap();
        let place = Self { dir, profile };
        let mut set = place.sublet(&["secret", "set", "s"]);
        let mut child = set.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(b"a-value-of-the-usual-length-0123456789").unwrap();
        assert!(child.wait().unwrap().success(), "sublet secret set failed");
        place
    }

    fn sublet(&self, args: &[&str]) -> Command {
        let mut command = Command::new(support::installed(self.dir.path()));
        command.env_clear().env("HOME", self.dir.path()).current_dir(self.dir.path().join("work"));
        command.arg("--config").arg(self.dir.path().join("sublet.toml"));
        command.arg("--state-dir").arg(self.dir.path().join("state")).args(args);
        command
    }

    /// The report's stage timings: medians of 20 leased runs, the slowest stage first.
    fn stages(&self, profile: &str) -> Vec<(String, u64)> {
        let report = self.dir.path().join("report.json");
        let mut all: BTreeMap<String, Vec<u64>> = BTreeMap::new();
        for _ in 0..20 {
            let file = report.to_str().unwrap();
            time(self.sublet(&[
                "run",
                "--report",
                file,
                "--profile",
                profile,
                "--lease",
                "bench.use@svc.test",
                "--",
                TRUE,
            ]));
            let report: serde_json::Value =
                serde_json::from_slice(&fs::read(&report).unwrap()).unwrap();
            for (stage, micros) in report["timings_us"].as_object().into_iter().flatten() {
                all.entry(stage.clone()).or_default().extend(micros.as_u64());
            }
        }
        let mut medians: Vec<(String, u64)> = all
            .into_iter()
            .filter(|(_, micros)| !micros.is_empty())
            .map(|(stage, mut micros)| {
                micros.sort_unstable();
                (stage, micros[micros.len() / 2])
            })
            .collect();
        medians.sort_by_key(|(_, micros)| std::cmp::Reverse(*micros));
        medians
    }
}

/// Pages of a command and its children that were mapped when they were touched.
fn page_faults(command: Command) -> i64 {
    let so_far = || getrusage(UsageWho::RUSAGE_CHILDREN).unwrap().minor_page_faults();
    let before = so_far();
    time(command);
    so_far() - before
}

/// Every system call of a command and its children, or `None` without strace.
fn system_calls(command: &Command, place: &Place) -> Option<u64> {
    let out = place.dir.path().join("strace");
    let mut strace = Command::new("strace");
    strace.args(["-f", "-c", "-U", "calls,name", "-o"]).arg(&out);
    strace.arg(command.get_program()).args(command.get_args());
    if let Some(dir) = command.get_current_dir() {
        strace.current_dir(dir);
    }
    strace.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status().ok()?;
    let table = fs::read_to_string(out).ok()?;
    let total = table.lines().find(|line| line.trim_end().ends_with("total"))?;
    total.split_whitespace().next()?.parse().ok()
}

/// A launcher of this process, as the broker of many runs has it.
struct Served {
    launcher: Launcher,
    run: RunId,
    workspace: PathBuf,
    next: u32,
    stood_ready: u32,
}

impl Served {
    fn start(place: &Place, warm: u32) -> Self {
        let etc = place.dir.path().join(format!("served-{warm}"));
        fs::create_dir(&etc).unwrap();
        let config =
            format!("[host]\nworkspaces = [\"{}\"]\nwarm = {warm}\n", place.dir.path().display());
        fs::write(etc.join("sublet.toml"), config).unwrap();
        let places = Places {
            config: Some(etc.join("sublet.toml")),
            state_dir: Some(etc.join("state")),
            runtime_dir: None,
        };
        let launcher = Launcher::fork(&places, Trust::Host).unwrap();
        let workspace = place.dir.path().join("work");
        Self { launcher, run: RunId::fresh(), workspace, next: 1, stood_ready: 0 }
    }

    fn children(&self) -> usize {
        let pid = self.launcher.pid();
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
        children.map_or(0, |c| c.split_ascii_whitespace().count())
    }

    fn round(&mut self) -> Duration {
        let exec = self.next;
        self.next += 1;
        self.stood_ready += u32::from(self.children() > 0);
        let prepare = Prepare {
            exec,
            exec_id: ExecId::fresh(),
            run_id: self.run.clone(),
            profile: ProfileRef::Name("default".into()),
            workspace: self.workspace.clone(),
            argv: vec![TRUE.as_bytes().to_vec()],
            program: None,
            environment: Vec::new(),
            without_network: false,
            terminal: None,
            deliveries: vec![DeliverySpec {
                channel: Channel::Memfd,
                variable: "TOKEN".parse().unwrap(),
                git: None,
                token: None,
                endpoint: false,
            }],
            home: None,
            into: sublet::launcher::into::InContainer::default(),
            // It only waits.
            cpu: u32::MAX,
            agent: false,
        };
        let session = self.launcher.root();
        let start = Instant::now();
        session.order(&Order::Prepare(Box::new(prepare))).unwrap();
        let mut fds = match session.notice_of(|n| matches!(n, Notice::Prepared { .. })).unwrap() {
            (Notice::Prepared { .. }, fds) => fds,
            (other, _) => panic!("{other:?}"),
        };
        let value = b"a-value-of-the-usual-length-0123456789";
        let held = fill::write(fds.pop().unwrap(), &[value]).unwrap();
        let expires = clock::boottime() + Duration::from_secs(60);
        let filled = FilledSpec { bytes: value.len() as u32, expires, kill: false };
        session.order(&Order::Start { exec, deliveries: vec![filled], deadline: None }).unwrap();
        session.notice_of(|n| matches!(n, Notice::Ended { .. })).unwrap();
        let took = start.elapsed();
        drop((held, fds));
        // What was passed over, so that it does not heap up.
        while session.has_passed_over() {
            session.notice().unwrap();
        }
        took
    }
}
