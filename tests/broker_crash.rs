//! The broker, the launcher or both are killed with SIGKILL at any moment while leased execs start, run
//! and end: nothing of them lives on, nothing is readable, no use is lost or counted twice, and the service
//! that comes after goes on with the same runs.
//!
//! The moments are random: the seed is printed, and `SUBLET_TEST_SEED` repeats it. `just crash` does it
//! hundreds of times.
#![forbid(unsafe_code)]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;
use serial_test::file_serial;
use sublet::api::client::{Client, Frame};
use sublet::api::wire::{ExecBody, LeaseBody, RunObject};
use sublet::model::lease::LeaseState;
use sublet::model::run::RunState;
use support::World;
use support::broker::{Broker, serve};
use support::host::{self, Process, eventually};
use support::leak::{Accomplice, is_wiped, shows};

const VALUE: &[u8] = b"crash-secret-that-nobody-may-keep-0001";
const CHANNELS: [&str; 4] = ["memfd", "file", "env", "git"];
/// Uses of every lease here.
const USES: usize = 3;
/// Ordinarily, and with `SUBLET_LONG_TESTS=1`.
const ROUNDS: [usize; 2] = [24, 300];

/// One capability a channel, all for the same secret.
fn prepare(world: &World) {
    let names = CHANNELS.map(|c| format!("\"by.{c}@svc.test\"")).join(", ");
    let config = format!(
        "[secrets.s]\nsource = \"vault\"\nallow = [{names}]\n\
         [ceilings]\nrequests_per_minute = 100000\nrequests_per_run = 1000000\n"
    );
    let mut profile = "extends = \"default\"\n".to_owned();
    for channel in CHANNELS {
        let variable = match channel {
            "git" => "",
            _ => "variable = \"TOKEN\"\n",
        };
        profile.push_str(&format!(
            "[[capability]]\nname = \"by.{channel}\"\nchannels = [\"{channel}\"]\nuses = {USES}\n\
             command = [[\"**\"]]\n[[capability.audience]]\nprotocol = \"https\"\nhost = \"svc.test\"\n\
             secret = \"s\"\n{variable}"
        ));
    }
    support::broker::host(world, &config, &[("crash", &profile)]);
    world.set_secret("s", VALUE);
}

/// Where descriptors come out.
struct Leaks {
    memfd: Accomplice,
    file: Accomplice,
}

impl Leaks {
    fn of(world: &World) -> Self {
        Self {
            memfd: Accomplice::at(world, "memfd.sock"),
            file: Accomplice::at(world, "file.sock"),
        }
    }

    fn drain(&self) -> Vec<File> {
        let mut all = self.memfd.drain();
        all.extend(self.file.drain());
        all
    }

    /// What a command does with what it was given.
    fn script(&self, channel: &str, then: &str) -> String {
        let uses = match channel {
            "memfd" => self.memfd.pass_memfd(),
            "file" => self.file.pass_file(),
            "env" => "test -n \"$TOKEN\"".to_owned(),
            "git" => {
                "printf 'protocol=https\\nhost=svc.test\\n\\n' | git credential fill".to_owned()
            }
            other => panic!("{other}"),
        };
        format!("{uses} >/dev/null 2>&1; {then}")
    }
}

/// What is told by the trail of one lease.
#[derive(Default, Debug)]
struct Tale {
    uses: usize,
    /// The exec of each use.
    consumed: Vec<String>,
    ends: Vec<String>,
}

/// The trail, as far as it was read.
#[derive(Default)]
struct Trail {
    seq: u64,
    leases: BTreeMap<String, Tale>,
    execs: BTreeMap<String, Vec<String>>,
}

impl Trail {
    fn read(&mut self, broker: &Broker<'_>) {
        for event in broker.events(self.seq) {
            let seq = event["seq"].as_u64().unwrap();
            assert_eq!(seq, self.seq + 1, "the trail has a gap: {event}");
            self.seq = seq;
            self.take(&event);
        }
    }

    fn take(&mut self, event: &Value) {
        let text = |name: &str| event[name].as_str().unwrap_or_default().to_owned();
        let kind = text("type");
        let exec = text("exec_id");
        match kind.as_str() {
            "exec.started" | "exec.exited" => self.execs.entry(exec).or_default().push(kind),
            "lease.granted" => {
                let uses = event["uses"].as_u64().unwrap() as usize;
                let tale = Tale { uses, ..Tale::default() };
                assert!(self.leases.insert(text("lease_id"), tale).is_none(), "{event}");
            }
            "lease.consumed" => self.tale(event).consumed.push(exec),
            "lease.completed" | "lease.expired" | "lease.revoked" | "lease.interrupted" => {
                self.tale(event).ends.push(kind);
            }
            _ => {}
        }
    }

    fn tale(&mut self, event: &Value) -> &mut Tale {
        let id = event["lease_id"].as_str().unwrap();
        self.leases.get_mut(id).unwrap_or_else(|| panic!("never granted: {event}"))
    }

    /// After a start on this state: what the dead service left open is closed, once, and counted right.
    fn assert_closed(&self, broker: &Broker<'_>) {
        let mut seen = 0;
        for lease in broker.client().leases(None).unwrap() {
            let Some(tale) = self.leases.get(lease.lease_id.as_str()) else { continue };
            seen += 1;
            let consumed = tale.consumed.len();
            assert_eq!(lease.uses_left as usize, tale.uses - consumed, "{lease:?} {tale:?}");
            let [end] = &tale.ends[..] else { panic!("one end each: {lease:?} {tale:?}") };
            assert_eq!(*end, format!("lease.{}", lease.state.as_str()), "{lease:?} {tale:?}");
            let ended = [LeaseState::Completed, LeaseState::Interrupted];
            assert!(ended.contains(&lease.state), "{lease:?} {tale:?}");
        }
        assert_eq!(seen, self.leases.len().min(10_000));
        for (exec, told) in &self.execs {
            assert_eq!(*told, ["exec.started", "exec.exited"], "{exec}");
        }
    }
}

/// A client that has execs run under leases until the broker is gone.
struct Caller {
    thread: JoinHandle<Vec<Ran>>,
}

/// An exec whose command ran, as its client saw it.
struct Ran {
    lease: String,
    exec: String,
    channel: &'static str,
}

impl Caller {
    fn start(
        socket: PathBuf,
        channel: &'static str,
        script: String,
        marker: String,
        stop: Arc<AtomicBool>,
    ) -> Self {
        let thread = std::thread::spawn(move || {
            let mut ran = Vec::new();
            // Whatever fails from here on fails because the broker is shot; what it did shows later.
            while !stop.load(Ordering::Relaxed) {
                let goes_on = || !stop.load(Ordering::Relaxed);
                let asked = (&socket, channel, script.as_str(), marker.as_str());
                let Some(()) = one_lease(asked, &mut ran, goes_on) else { break };
            }
            ran
        });
        Self { thread }
    }
}

fn one_lease(
    (socket, channel, script, marker): (&PathBuf, &'static str, &str, &str),
    ran: &mut Vec<Ran>,
    goes_on: impl Fn() -> bool,
) -> Option<()> {
    let client = Client::connect(socket).ok()?;
    let flag = format!("by.{channel}@svc.test,uses={USES}").parse().unwrap();
    let lease = client.request(&LeaseBody::new(flag, None)).ok()?.lease_id;
    for _ in 0..USES {
        if !goes_on() {
            return None;
        }
        let mut body = ExecBody::of(["sh", "-c", script, marker]);
        body.lease_ids = vec![lease.clone()];
        let mut exec = client.exec(&body).ok()?;
        exec.end_stdin();
        loop {
            match exec.next_frame().ok()?? {
                Frame::Started(id) => {
                    ran.push(Ran { lease: lease.to_string(), exec: id.to_string(), channel });
                }
                Frame::Exit(_) => break,
                Frame::Failed(_) => return None,
                Frame::Stdout(_) | Frame::Stderr(_) => {}
            }
        }
    }
    Some(())
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    Broker,
    Launcher,
    Both,
}

/// Kills, and waits until the service has ended; as a failure, where it ended by itself.
fn kill(broker: &mut Broker<'_>, victim: Victim) {
    let (_, launcher) = broker.parts();
    if victim != Victim::Launcher {
        broker.shoot();
    }
    if victim != Victim::Broker && launcher.is_alive() {
        host::signal(&launcher, Signal::KILL);
    }
    if victim == Victim::Launcher {
        let status = broker.ended(Duration::from_secs(15));
        assert_eq!(status.code(), Some(2), "a service without its launcher ends as a failure");
    }
}

/// What there is of a service and its execs.
struct Remains {
    family: Vec<Process>,
    cgroups: BTreeSet<PathBuf>,
    marker: String,
}

impl Remains {
    fn of(broker: &Broker<'_>, marker: &str) -> Self {
        let family = host::family(broker.pid());
        let cgroups = family
            .iter()
            .filter_map(Process::cgroup)
            .filter(|path| path.to_string_lossy().contains("sublet-exe_"));
        Self { cgroups: cgroups.collect(), family, marker: marker.to_owned() }
    }

    fn assert_dead(&self) {
        for process in &self.family {
            eventually(&format!("{process:?} is gone"), || !process.is_alive());
        }
        eventually("no process of an exec lives", || showing(&self.marker).is_empty());
    }

    /// Only after the next start: who was killed could remove nothing.
    fn assert_no_cgroup(&self) {
        for cgroup in &self.cgroups {
            eventually(&format!("{} is removed", cgroup.display()), || !cgroup.exists());
        }
    }
}

/// The processes with this in their arguments.
fn showing(marker: &str) -> Vec<u32> {
    let has = |pid: &u32| {
        std::fs::read(format!("/proc/{pid}/cmdline"))
            .is_ok_and(|line| host::contains(&line, marker.as_bytes()))
    };
    host::processes().into_iter().map(|p| p.pid).filter(has).collect()
}

/// splitmix64.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    }
}

fn random() -> Random {
    let seed = match std::env::var("SUBLET_TEST_SEED") {
        Ok(text) => text.parse().expect("SUBLET_TEST_SEED is a number"),
        Err(_) => jiff::Timestamp::now().as_microsecond().unsigned_abs(),
    };
    println!("SUBLET_TEST_SEED={seed}");
    Random(seed)
}

fn is_long() -> bool {
    std::env::var_os("SUBLET_LONG_TESTS").is_some_and(|v| v == "1")
}

/// The service as it comes back: the runs are served, the dead one's leases are closed, an exec works.
fn assert_whole(world: &World, broker: &Broker<'_>, runs: &[RunObject], trail: &mut Trail) {
    trail.read(broker);
    trail.assert_closed(broker);
    world.call(&["audit", "verify"]).ok();
    for run in runs {
        let client = Client::connect(&run.socket).unwrap();
        let served = client.run().unwrap();
        assert_eq!((&served.run_id, served.state), (&run.run_id, RunState::Active));
        let lease = client.request(&LeaseBody::new("by.env@svc.test".parse().unwrap(), None));
        let mut body = ExecBody::of(["sh", "-c", "test -n \"$TOKEN\""]);
        body.lease_ids = vec![lease.unwrap().lease_id];
        let answer = client.exec_to_end(&body).unwrap();
        assert_eq!(answer.exit_status, 0, "{answer:?}");
    }
    trail.read(broker);
}

#[test]
#[file_serial(host)]
fn killed_at_any_moment() {
    let mut random = random();
    let world = World::host().with_probe();
    prepare(&world);
    let leaks = Leaks::of(&world);
    let mut trail = Trail::default();
    let (mut readable, mut ran_in_all) = (0, BTreeMap::<&str, usize>::new());
    let mut broker = serve(&world);
    let runs = ["alice", "bob"].map(|principal| broker.run_of(principal, "crash"));
    for round in 0..ROUNDS[usize::from(is_long())] {
        let marker = format!("crash-{}-{round}-", std::process::id());
        let stop = Arc::new(AtomicBool::new(false));
        let callers: Vec<Caller> = CHANNELS
            .iter()
            .zip(runs.iter().cycle())
            .map(|(channel, run)| {
                let script = leaks.script(channel, "sleep 0.02");
                let (socket, stop) = (run.socket.clone(), Arc::clone(&stop));
                Caller::start(socket, channel, script, marker.clone(), stop)
            })
            .collect();
        let victim = [Victim::Broker, Victim::Launcher, Victim::Both][random.below(3) as usize];
        // Early ones are as interesting as late ones, in which leases are used up and ended.
        let longest = [50, 400, 1200][random.below(3) as usize];
        let moment = Duration::from_micros(random.below(longest * 1000));
        std::thread::sleep(moment);
        let mut leaked = leaks.drain();
        readable += leaked.iter().filter(|file| shows(file, VALUE)).count();
        let left = Remains::of(&broker, &marker);
        let shot = Instant::now();
        kill(&mut broker, victim);
        stop.store(true, Ordering::Relaxed);
        left.assert_dead();
        let took = shot.elapsed();
        leaked.extend(leaks.drain());
        if victim != Victim::Both {
            // With both gone the kernel drops the pages with their last holder, and here we are one.
            eventually("what leaked is wiped", || leaked.iter().all(is_wiped));
        }
        let ran: Vec<Ran> = callers.into_iter().flat_map(|c| c.thread.join().unwrap()).collect();
        println!(
            "round {round}: {victim:?} after {moment:?}, {} execs ran, {} leaked, dead within {took:?}",
            ran.len(),
            leaked.len()
        );

        broker = serve(&world);
        assert_whole(&world, &broker, &runs, &mut trail);
        left.assert_no_cgroup();
        for Ran { lease, exec, channel } in &ran {
            *ran_in_all.entry(channel).or_default() += 1;
            let uses = trail.leases[lease].consumed.iter().filter(|by| *by == exec).count();
            // On `git` a use is one answered `get`, which the command may not have come to.
            assert!(uses == 1 || *channel == "git" && uses == 0, "{exec} of {lease}: {uses} uses");
        }
    }
    println!(
        "{readable} descriptors showed the value before a kill; execs that ran: {ran_in_all:?}"
    );
    assert!(readable > 0 && ran_in_all.len() == CHANNELS.len(), "the test has hit nothing");
    world.holds_nowhere(VALUE);
}

/// All four channels are in use, and one lease beside them is not.
#[track_caller]
fn killed_in_use(victim: Victim) {
    let world = World::host().with_probe();
    prepare(&world);
    let leaks = Leaks::of(&world);
    let mut broker = serve(&world);
    let run = broker.run_of("alice", "crash");
    let marker = format!("in-use-{}-{victim:?}-", std::process::id());
    let client = Client::connect(&run.socket).unwrap();
    let unused = client.request(&LeaseBody::new("by.env@svc.test".parse().unwrap(), None)).unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let callers: Vec<Caller> = CHANNELS
        .map(|channel| {
            let script = leaks.script(channel, &format!("touch up-{channel}; sleep 600"));
            Caller::start(run.socket.clone(), channel, script, marker.clone(), Arc::clone(&stop))
        })
        .into();
    for channel in CHANNELS {
        let up = world.workspace.join(format!("up-{channel}"));
        eventually(&format!("{} is there", up.display()), || up.exists());
    }
    let leaked = [leaks.memfd.take(), leaks.file.take()];
    assert!(leaked.iter().all(|file| shows(file, VALUE)));
    // Until each shell's last child has executed it shows its parent's command line.
    eventually("each exec shows once", || showing(&marker).len() == CHANNELS.len());
    // The launcher keeps a child ahead of the next exec, which must go as the others do.
    let with_seed = CHANNELS.len() + 1;
    eventually("each exec and the seed have a cgroup", || {
        Remains::of(&broker, &marker).cgroups.len() == with_seed
    });
    let left = Remains::of(&broker, &marker);
    // Whose exec is seen to end before the service is asks for no other.
    stop.store(true, Ordering::Relaxed);
    kill(&mut broker, victim);
    left.assert_dead();
    if victim == Victim::Both {
        println!("both at once: wiped {:?}", leaked.iter().map(is_wiped).collect::<Vec<_>>());
    } else {
        eventually("what leaked is wiped", || leaked.iter().all(is_wiped));
    }
    let ran: Vec<Ran> = callers.into_iter().flat_map(|c| c.thread.join().unwrap()).collect();
    assert_eq!(ran.len(), CHANNELS.len());
    drop(broker);

    let broker = serve(&world);
    let mut trail = Trail::default();
    assert_whole(&world, &broker, std::slice::from_ref(&run), &mut trail);
    left.assert_no_cgroup();
    for Ran { lease, .. } in &ran {
        assert_eq!(trail.leases[lease].consumed.len(), 1);
        assert_eq!(trail.leases[lease].ends, ["lease.interrupted"]);
    }
    assert_eq!(trail.leases[unused.lease_id.as_str()].ends, ["lease.interrupted"]);
    // What is interrupted is of no use any more.
    let mut body = ExecBody::of(["true"]);
    body.lease_ids = vec![unused.lease_id];
    let refused = Client::connect(&run.socket).unwrap().exec_to_end(&body).unwrap_err();
    assert_eq!(refused.refusal().unwrap().reason, "lease_not_active");
}

#[test]
#[file_serial(host)]
fn the_broker_is_killed_while_all_is_in_use() {
    killed_in_use(Victim::Broker);
}

#[test]
#[file_serial(host)]
fn the_launcher_is_killed_while_all_is_in_use() {
    killed_in_use(Victim::Launcher);
}

#[test]
#[file_serial(host)]
fn both_are_killed_while_all_is_in_use() {
    killed_in_use(Victim::Both);
}
