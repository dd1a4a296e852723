//! `just bench-broker [SAMPLES] [SOAK]`: what an exec costs through the broker, alone and among many; how
//! fast a revocation wipes; what an idle run costs; whether anything grows.
//!
//! One `sublet serve` (release) on a temporary state, asked through the library's own client, one exec at a
//! time. Samples of what is compared are interleaved; what counts are the ratios. As root, on an idle
//! machine. Needs `gcc` and `python3`; compares with `runc` where it is installed.
#![forbid(unsafe_code)]

mod support;

use std::fs;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use sublet::api::client::{Client, ExecStream, Frame};
use sublet::api::wire::{ExecBody, LeaseBody, RevokeBody, RunBody};
use sublet::model::id::LeaseId;
use support::{Floor, TRUE, percentile};

const ALIVE: usize = 1000;
const RUNS: usize = 10_000;
const SOAK: usize = 2000;
const USES: u32 = 1_000_000;

fn main() {
    // `cargo bench` adds `--bench`.
    let mut numbers = std::env::args().skip(1).filter_map(|arg| arg.parse().ok());
    let samples = numbers.next().unwrap_or(200).max(10);
    let soak = numbers.next().unwrap_or(SOAK);
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    println!("{samples} samples, interleaved, Linux {}", release.trim());

    let place = Place::new(0);
    let agent = place.start_run("bench");
    let lease = place.lease(&agent, "bench.use", "memfd");
    {
        let warm = Place::new(4);
        let warm_agent = warm.start_run("bench");
        let warm_lease = warm.lease(&warm_agent, "bench.use", "memfd");
        let brokers = [(&place, &agent, &lease), (&warm, &warm_agent, &warm_lease)];
        latency(brokers, samples);
    }
    revocation(&place, &agent, (samples / 4).max(10));
    neighbours(&place, &agent, &lease, samples);
    crowd(&place, &agent, &lease, samples.min(100));
    idle_runs(&place, &agent, &lease, samples.min(100));
    growth(&place, &agent, &lease, soak);
}

/// One leased exec of /bin/true, without and with warm sandboxes, against the floor and runc.
fn latency(brokers: [(&Place, &Client, &LeaseId); 2], samples: usize) {
    let place = brokers[0].0;
    let mut floor = Floor::start(&place.dir.path().join("floor"));
    let bundle = place.bundle();
    for _ in 0..3 {
        for (place, agent, lease) in brokers {
            place.exec(agent, lease);
        }
        floor.round();
    }
    let (mut bare, mut leased, mut runc) = (Vec::new(), [Vec::new(), Vec::new()], Vec::new());
    for round in 0..samples {
        bare.push(floor.round());
        for ((place, agent, lease), times) in brokers.into_iter().zip(&mut leased) {
            times.push(place.exec(agent, lease));
            // A warm sandbox is made behind an exec, off its way.
            std::thread::sleep(Duration::from_millis(10));
        }
        if let Some(bundle) = bundle.as_ref().filter(|_| round % 10 == 0) {
            runc.push(bundle.run(round));
        }
    }
    println!(
        "\none leased exec of /bin/true{:>29}{:>9}{:>11}{:>8}",
        "p50 ms", "p99 ms", "ratio", "goal"
    );
    let (half, tail) = (percentile(&bare, 50), percentile(&bare, 99));
    println!(
        "  {:<46}{:>9.2}{:>9.2}",
        "floor: clone3 with the same namespaces",
        ms(half),
        ms(tail)
    );
    let runc_half = (!runc.is_empty()).then(|| percentile(&runc, 50));
    for (name, goals, times) in [
        ("through the broker", ["<= 1.5", "<= 0.1"], &leased[0]),
        ("the same with warm sandboxes", ["<= 0.8", "<= 0.04"], &leased[1]),
    ] {
        let (mine, worst) = (percentile(times, 50), percentile(times, 99));
        println!("  {name:<46}{:>9.2}{:>9.2}", ms(mine), ms(worst));
        println!("  {:<64}{:>11.2}{:>8}", "  p50 by the floor's", ratio(mine, half), goals[0]);
        println!("  {:<64}{:>11.2}{:>8}", "  p99 by the floor's", ratio(worst, tail), goals[0]);
        if let Some(other) = runc_half {
            println!("  {:<64}{:>11.2}{:>8}", "  p50 by runc's", ratio(mine, other), goals[1]);
        }
    }
    match runc_half {
        Some(other) => println!("  {:<46}{:>9.2}", "runc run", ms(other)),
        None => println!("  runc: not installed, or it does not run here"),
    }
}

/// From the request to zeros in the command's own view of the memfd.
fn revocation(place: &Place, agent: &Client, samples: usize) {
    const WATCH: &str = "import os, sys, time\n\
        fd = int(os.environ['TOKEN_FD'])\n\
        print('ready', flush=True)\n\
        while os.pread(fd, 1, 0) != b'\\0': pass\n\
        print(time.clock_gettime_ns(time.CLOCK_MONOTONIC), flush=True)\n";
    let mut times = Vec::new();
    for _ in 0..samples {
        let lease = place.lease(agent, "bench.watch", "memfd");
        let mut stream = place.start(agent, Some(&lease), &["python3", "-c", WATCH]);
        let mut said = lines(&mut stream);
        assert_eq!(said.next(), "ready");
        let asked = monotonic();
        place.control.revoke(&lease, &RevokeBody::default()).unwrap();
        let wiped: u64 = said.next().parse().unwrap();
        times.push(Duration::from_nanos(wiped.saturating_sub(asked)));
        said.finish();
    }
    println!("\nrevocation of a lease in use, request to zeros{:>12}{:>9}", "p50 ms", "p99 ms");
    let (half, tail) = (percentile(&times, 50), percentile(&times, 99));
    println!("  {:<46}{:>9.2}{:>9.2}{:>19}", "memfd", ms(half), ms(tail), "<= 10 ms");
}

/// A quiet run while its neighbour's clients attack.
fn neighbours(place: &Place, agent: &Client, lease: &LeaseId, samples: usize) {
    let quiet: Vec<_> = (0..samples).map(|_| place.exec(agent, lease)).collect();
    let other = place.start_run("attacker");
    let stop = Arc::new(AtomicBool::new(false));
    let attackers: Vec<_> = (0..4)
        .map(|kind| {
            let (stop, path) = (Arc::clone(&stop), other.path().to_owned());
            std::thread::spawn(move || attack(kind, &path, &stop))
        })
        .collect();
    std::thread::sleep(Duration::from_millis(300));
    let attacked: Vec<_> = (0..samples).map(|_| place.exec(agent, lease)).collect();
    stop.store(true, Ordering::Release);
    for attacker in attackers {
        attacker.join().unwrap();
    }
    println!("\na quiet run's exec, while a neighbour is attacked{:>9}{:>9}", "p50 ms", "p99 ms");
    for (name, times) in [("before", &quiet), ("during", &attacked)] {
        let (half, tail) = (percentile(times, 50), percentile(times, 99));
        println!("  {name:<46}{:>9.2}{:>9.2}", ms(half), ms(tail));
    }
    let (before, during) = (percentile(&quiet, 99), percentile(&attacked, 99));
    println!("  {:<64}{:>11.2}", "p99 during by before", ratio(during, before));
    place.control.end_run(&"attacker".parse().unwrap()).unwrap();
}

/// Half requests, garbage, connections that are opened and left, refused requests; each as fast as one
/// thread can.
fn attack(kind: usize, path: &Path, stop: &AtomicBool) {
    let mut open = Vec::new();
    while !stop.load(Ordering::Acquire) {
        let Ok(mut socket) = UnixStream::connect(path) else { continue };
        let patience = Some(Duration::from_millis(200));
        drop((socket.set_read_timeout(patience), socket.set_write_timeout(patience)));
        match kind {
            0 => drop(socket.write_all(b"POST /v1/execs HTTP/1.1\r\nHost: x\r\nContent-Le")),
            1 => drop(socket.write_all(&[0xff; 4096])),
            2 => {}
            _ => {
                let body = r#"{"capability":"no.such","audience":"x.test"}"#;
                let head = format!(
                    "POST /v1/leases HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n{body}",
                    body.len()
                );
                drop(socket.write_all(head.as_bytes()));
                drop(std::io::Read::read(&mut socket, &mut [0; 4096]));
            }
        }
        if kind != 3 {
            open.push(socket);
        }
        if open.len() > 64 {
            open.clear();
        }
    }
}

/// A new exec while a thousand live.
fn crowd(place: &Place, agent: &Client, lease: &LeaseId, samples: usize) {
    let alone: Vec<_> = (0..samples).map(|_| place.exec(agent, lease)).collect();
    let other = place.start_run("crowd");
    let began = Instant::now();
    let sleepers: Vec<ExecStream> =
        (0..ALIVE).map(|_| place.start(&other, None, &["sleep", "1000"])).collect();
    let took = began.elapsed();
    // The kernel is still busy with how they began: what counts is that they live.
    std::thread::sleep(Duration::from_secs(3));
    let among: Vec<_> = (0..samples).map(|_| place.exec(agent, lease)).collect();
    println!("\n{ALIVE} execs alive at once (started in {:.1} s)", took.as_secs_f64());
    let (before, during) = (percentile(&alone, 50), percentile(&among, 50));
    println!("  {:<46}{:>9.2}", "a new exec's p50 before, ms", ms(before));
    println!(
        "  {:<46}{:>9.2}{:>20.2}{:>8}",
        "among them, and the ratio",
        ms(during),
        ratio(during, before),
        "<= 1.5"
    );
    let (broker, launcher) = place.memory();
    println!("  resident: broker {} MiB, launcher {} MiB", broker >> 10, launcher >> 10);
    drop(sleepers);
    place.control.end_run(&"crowd".parse().unwrap()).unwrap();
    place.wait_until_idle();
}

/// What a run costs that does nothing.
fn idle_runs(place: &Place, agent: &Client, lease: &LeaseId, samples: usize) {
    let alone: Vec<_> = (0..samples).map(|_| place.exec(agent, lease)).collect();
    let (broker, launcher) = place.memory();
    let began = Instant::now();
    for number in 0..RUNS {
        place.start_run(&format!("idle-{number}"));
    }
    let took = began.elapsed();
    let (more_broker, more_launcher) = place.memory();
    let kilobytes = (more_broker + more_launcher).saturating_sub(broker + launcher) as f64;
    println!("\n{RUNS} runs registered (in {:.1} s)", took.as_secs_f64());
    println!(
        "  {:<46}{:>9.2}{:>28}",
        "memory of an idle run, kB (broker and launcher)",
        kilobytes / RUNS as f64,
        "<= 20"
    );
    let among: Vec<_> = (0..samples).map(|_| place.exec(agent, lease)).collect();
    let (before, during) = (percentile(&alone, 50), percentile(&among, 50));
    println!(
        "  {:<64}{:>11.2}{:>8}",
        "a new exec's p50, by that before",
        ratio(during, before),
        "<= 1.5"
    );
    for number in 0..RUNS {
        place.control.end_run(&format!("idle-{number}").parse().unwrap()).unwrap();
    }
}

/// Whether anything grows from exec to exec.
fn growth(place: &Place, agent: &Client, lease: &LeaseId, execs: usize) {
    let tenth = (execs / 10).max(1);
    for _ in 0..tenth {
        place.exec(agent, lease);
    }
    place.wait_until_idle();
    let before = place.holdings();
    let began = Instant::now();
    for _ in 0..execs {
        place.exec(agent, lease);
    }
    let took = began.elapsed();
    place.wait_until_idle();
    let after = place.holdings();
    println!("\n{execs} execs ({:.0} a second)", execs as f64 / took.as_secs_f64());
    for ((name, before), (_, after)) in before.iter().zip(&after) {
        println!("  {name:<46}{before:>9}{after:>9}");
    }
}

/// A broker on a temporary state, with one secret and a profile that leases it.
struct Place {
    dir: tempfile::TempDir,
    serve: Child,
    control: Client,
}

impl Place {
    fn new(warm: usize) -> Self {
        let dir = tempfile::Builder::new().prefix("sublet-bench-").tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        // The broker's user has to pass.
        fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))
            .unwrap();
        fs::create_dir_all(at("etc/profiles")).unwrap();
        fs::create_dir(at("work")).unwrap();
        let most = 4_000_000;
        fs::write(
            at("etc/sublet.toml"),
            format!(
                "[host]\nworkspaces = [{:?}]\nwarm = {warm}\n[ceilings]\nrequests_per_minute = {most}\n\
                 requests_per_run = {most}\n[leases]\ndefault_ttl = \"1h\"\nmax_ttl = \"24h\"\n\
                 [secrets.s]\nsource = \"vault\"\n\
                 allow = [\"bench.use@svc.test\", \"bench.watch@svc.test\"]\n",
                at("work")
            ),
        )
        .unwrap();
        let capability = |name: &str| {
            format!(
                "[[capability]]\nname = {name:?}\nchannels = [\"memfd\"]\nuses = {USES}\n\
                 on_revoke = \"wipe\"\ncommand = [[\"**\"]]\n[[capability.audience]]\n\
                 protocol = \"https\"\nhost = \"svc.test\"\nsecret = \"s\"\nvariable = \"TOKEN\"\n"
            )
        };
        let profile = format!(
            "extends = \"default\"\n{}{}",
            capability("bench.use"),
            capability("bench.watch")
        );
        fs::write(at("etc/profiles/bench.toml"), profile).unwrap();
        let program = support::installed(dir.path());
        let sublet = |args: &[&str]| {
            let mut command = Command::new(&program);
            command.arg("--config").arg(at("etc/sublet.toml"));
            command.arg("--state-dir").arg(at("state")).args(args);
            command
        };
        let mut set = sublet(&["secret", "set", "s"]);
        let mut child = set.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(b"a-value-of-the-usual-length-0123456789").unwrap();
        assert!(child.wait().unwrap().success(), "sublet secret set failed");
        let serve = sublet(&["serve"]).env("RUST_LOG", "sublet=error").spawn().unwrap();
        let socket = at("state/run/control.sock");
        let began = Instant::now();
        let control = loop {
            let client = Client::connect(&socket);
            match client.and_then(|c| c.health().map(|_| c)) {
                Ok(client) => break client,
                Err(e) if began.elapsed() > Duration::from_secs(10) => panic!("no broker: {e}"),
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        };
        Self { dir, serve, control }
    }

    fn start_run(&self, id: &str) -> Client {
        let run = self
            .control
            .start_run(&RunBody {
                agent: "bench".parse().unwrap(),
                principal: "bench".parse().unwrap(),
                profile: "bench".to_owned(),
                workspace: self.dir.path().join("work"),
                run_id: Some(id.parse().unwrap()),
            })
            .unwrap();
        Client::connect(run.socket).unwrap()
    }

    fn lease(&self, agent: &Client, capability: &str, channel: &str) -> LeaseId {
        let body: LeaseBody = serde_json::from_value(serde_json::json!({
            "capability": capability, "audience": "svc.test", "channel": channel, "uses": USES,
        }))
        .unwrap();
        agent.request(&body).unwrap().lease_id
    }

    fn start(&self, agent: &Client, lease: Option<&LeaseId>, command: &[&str]) -> ExecStream {
        let body = ExecBody {
            lease_ids: lease.into_iter().cloned().collect(),
            command: command.iter().map(ToString::to_string).collect(),
            environment: Default::default(),
            timeout: None,
            terminal: None,
            network: None,
            reason: None,
            user: None,
            workdir: None,
        };
        let mut stream = agent.exec(&body).unwrap();
        stream.end_stdin();
        stream.flush().unwrap();
        stream
    }

    /// One leased exec of /bin/true, from the request to its report.
    fn exec(&self, agent: &Client, lease: &LeaseId) -> Duration {
        let began = Instant::now();
        let mut stream = self.start(agent, Some(lease), &[TRUE]);
        loop {
            match stream.next_frame().unwrap() {
                Some(Frame::Exit(exit)) => {
                    assert_eq!(exit.exit_status, 0);
                    return began.elapsed();
                }
                Some(Frame::Failed(error)) => panic!("{error:?}"),
                Some(_) => {}
                None => panic!("no report"),
            }
        }
    }

    fn launcher(&self) -> u32 {
        let children = format!("/proc/{0}/task/{0}/children", self.serve.id());
        let children = fs::read_to_string(children).unwrap_or_default();
        children.split_whitespace().next().and_then(|pid| pid.parse().ok()).expect("a launcher")
    }

    /// Resident kilobytes of broker and launcher.
    fn memory(&self) -> (u64, u64) {
        let resident = |pid: u32| {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap_or_default();
            line.split_whitespace().nth(1).and_then(|n| n.parse().ok()).unwrap_or(0)
        };
        (resident(self.serve.id()), resident(self.launcher()))
    }

    fn holdings(&self) -> Vec<(&'static str, u64)> {
        let (broker, launcher) = self.memory();
        let entries = |path: String| fs::read_dir(path).map_or(0, |found| found.count() as u64);
        let descriptors = |pid: u32| entries(format!("/proc/{pid}/fd"));
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        vec![
            ("resident, kB: broker", broker),
            ("resident, kB: launcher", launcher),
            ("descriptors: broker", descriptors(self.serve.id())),
            ("descriptors: launcher", descriptors(self.launcher())),
            ("threads: broker", entries(format!("/proc/{}/task", self.serve.id()))),
            ("mounts of the host", mounts.lines().count() as u64),
            ("cgroups of sublet", cgroups()),
        ]
    }

    /// Until no exec's cgroup is left, or it is clear that one stays.
    fn wait_until_idle(&self) {
        let began = Instant::now();
        while self.threads() > 16 && began.elapsed() < Duration::from_secs(30) {
            std::thread::sleep(Duration::from_millis(50));
        }
        std::thread::sleep(Duration::from_secs(1));
    }

    fn threads(&self) -> usize {
        fs::read_dir(format!("/proc/{}/task", self.serve.id())).map_or(0, Iterator::count)
    }

    /// A bundle for runc with the same command, where there is one.
    fn bundle(&self) -> Option<Bundle> {
        let bundle = self.dir.path().join("bundle");
        let rootfs = bundle.join("rootfs");
        for made in ["usr", "proc"] {
            fs::create_dir_all(rootfs.join(made)).ok()?;
        }
        for merged in ["bin", "lib", "lib64"] {
            std::os::unix::fs::symlink(format!("usr/{merged}"), rootfs.join(merged)).ok()?;
        }
        let made = Command::new("runc").arg("spec").current_dir(&bundle).status();
        made.ok().filter(|status| status.success())?;
        let text = fs::read_to_string(bundle.join("config.json")).ok()?;
        let mut config: serde_json::Value = serde_json::from_str(&text).ok()?;
        config["process"]["terminal"] = false.into();
        config["process"]["args"] = serde_json::json!([TRUE]);
        let mounts = config["mounts"].as_array_mut()?;
        // Where v1 and v2 are mounted side by side it cannot be mounted.
        mounts.retain(|mount| mount["type"] != "cgroup");
        mounts.push(serde_json::json!({
            "destination": "/usr", "source": "/usr", "type": "none", "options": ["rbind", "ro"],
        }));
        fs::write(bundle.join("config.json"), config.to_string()).ok()?;
        let bundle = Bundle { dir: bundle };
        bundle.try_run(0).map(|_| bundle)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // The child is ours; its launcher and all execs end with it.
        let _ = self.serve.kill();
        let _ = self.serve.wait();
        std::thread::sleep(Duration::from_millis(500));
    }
}

struct Bundle {
    dir: PathBuf,
}

impl Bundle {
    fn try_run(&self, number: usize) -> Option<Duration> {
        let mut command = Command::new("runc");
        let name = format!("sublet-bench-{}-{number}", std::process::id());
        command.arg("run").arg("--bundle").arg(&self.dir).arg(name);
        let said = self.dir.join("said");
        let stderr = fs::File::create(&said).ok()?;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr);
        let began = Instant::now();
        let status = command.status().ok()?;
        let took = began.elapsed();
        if !status.success() {
            println!("  runc: {}", fs::read_to_string(said).unwrap_or_default().trim());
        }
        status.success().then_some(took)
    }

    fn run(&self, number: usize) -> Duration {
        self.try_run(number).expect("runc ran before")
    }
}

fn cgroups() -> u64 {
    fn count(path: &Path) -> u64 {
        let Ok(entries) = fs::read_dir(path) else { return 0 };
        entries
            .flatten()
            .filter(|e| e.file_type().is_ok_and(|t| t.is_dir()))
            .map(|e| u64::from(e.file_name().to_string_lossy().contains("exe_")) + count(&e.path()))
            .sum()
    }
    count(Path::new("/sys/fs/cgroup"))
}

/// The lines that a command prints.
struct Lines<'a> {
    stream: &'a mut ExecStream,
    text: String,
}

fn lines(stream: &mut ExecStream) -> Lines<'_> {
    Lines { stream, text: String::new() }
}

impl Lines<'_> {
    fn next(&mut self) -> String {
        loop {
            if let Some((line, rest)) = self.text.split_once('\n') {
                let (line, rest) = (line.to_owned(), rest.to_owned());
                self.text = rest;
                return line;
            }
            match self.stream.next_frame().unwrap() {
                Some(Frame::Stdout(bytes)) => self.text.push_str(&String::from_utf8_lossy(bytes)),
                Some(Frame::Stderr(bytes)) => panic!("{}", String::from_utf8_lossy(bytes)),
                Some(Frame::Started(_)) => {}
                other => panic!("{other:?}"),
            }
        }
    }

    fn finish(self) {
        while self.stream.next_frame().unwrap().is_some() {}
    }
}

fn monotonic() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn ratio(one: Duration, other: Duration) -> f64 {
    one.as_secs_f64() / other.as_secs_f64()
}
