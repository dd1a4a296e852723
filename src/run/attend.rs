//! While the command lives: its streams are relayed and masked, signals forwarded, git answered, notices
//! of the launcher heard. One loop, one poll, no thread.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::rc::Rc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::stdio::{stderr, stdin, stdout};

use super::deliver::{Delivered, Delivery};
use super::error::RunError;
use super::ledger::{Leased, Ledger};
use super::scene::{EXEC, Scene};
use super::{Outcome, Stopwatch, value};
use crate::delivery::git::{self, Asked, Destination, Operation, Request};
use crate::launcher::client::Launcher;
use crate::launcher::wire::{Ending, Notice, Order};
use crate::lease::LeaseView;
use crate::model::lease::LeaseState;
use crate::model::name::Channel;
use crate::model::report::{Posture, Report, ScrubbedDelivery, Timings};
use crate::model::secret::Secret;
use crate::redact::Patterns;
use crate::relay::input::Input;
use crate::relay::output::Output;
use crate::relay::terminal::{self, RawMode};
use crate::sandbox::cgroup;
use crate::store::UseRefused;
use crate::sys::process::{self, WaitStatus};

/// Forwarded to the command. SIGWINCH is for the terminal's size.
const FORWARDED: [i32; 6] =
    [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT, libc::SIGUSR1, libc::SIGUSR2];

/// How many refused `get`s of one exec are told in the trail: it could ask without end.
const TOLD_REFUSALS: u64 = 5;

/// How long the tree of a dead launcher has to die: its init sees the lifeline end at once.
const LAST_WAIT: Duration = Duration::from_secs(5);

/// Signals of this process, read from a descriptor from now on.
pub struct Signals(OwnedFd);

impl Signals {
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// The next one that ends a wait. A change of the window's size does not.
    pub fn ending(&self) -> Result<Option<i32>, RunError> {
        loop {
            match process::read_signal(&self.0).map_err(RunError::Relay)? {
                Some(libc::SIGWINCH) => {}
                other => return Ok(other),
            }
        }
    }
}

pub fn take_signals() -> Result<Signals, RunError> {
    let mut signals = vec![libc::SIGWINCH];
    for signal in FORWARDED {
        // A blocked signal reaches its descriptor even where nohup(1) has it ignored.
        if !process::is_ignored(signal).map_err(RunError::Settle)? {
            signals.push(signal);
        }
    }
    Ok(Signals(process::signalfd(&signals).map_err(RunError::Settle)?))
}

/// How it ended.
pub struct Exited {
    ending: Ending,
    /// The launcher's word: bytes and whether they were wiped.
    deliveries: Vec<(u64, bool)>,
    posture: Posture,
    timed_out: bool,
    pub expired: BTreeSet<u32>,
    pub redacted: u64,
    unmasked: u64,
    git_uses: BTreeMap<u32, u32>,
    /// No process of it is left.
    gone: bool,
}

struct Attendant<'a> {
    scene: &'a Scene,
    ledger: &'a mut Ledger,
    launcher: &'a Launcher,
    leased: &'a [Leased],
    deliveries: Vec<Delivery>,
    uid: u32,
    input: Option<Input<'a>>,
    outputs: Vec<Output<'a>>,
    git: Option<UnixListener>,
    /// What `git` was answered with, for the mask.
    given: Vec<Given>,
    unmasked: u64,
    raw_mode: Option<RawMode<'a>>,
    master: Option<OwnedFd>,
    waiting_signals: Vec<i32>,
    posture: Posture,
    started: bool,
    timed_out: bool,
    expired: BTreeSet<u32>,
    git_uses: BTreeMap<u32, u32>,
    git_refused: u64,
    ended: Option<(Ending, Vec<(u64, bool)>)>,
    gone: bool,
}

/// Stays until the command has ended, its deliveries are wiped and all that was written is passed on.
pub fn attend(
    scene: &Scene,
    ledger: &mut Ledger,
    launcher: &Launcher,
    leased: &[Leased],
    delivered: Delivered,
    signals: Signals,
    watch: &mut Stopwatch,
) -> Result<Exited, RunError> {
    let Delivered { mut streams, deliveries, uid } = delivered;
    let (mut input, mut outputs) = (None, Vec::new());
    if streams.len() == 3 {
        let (err, out, inn) = (streams.pop(), streams.pop(), streams.pop());
        if let (Some(inn), Some(out), Some(err)) = (inn, out, err) {
            input = Some(Input::new(stdin(), inn, false).map_err(RunError::Relay)?);
            outputs.push(Output::new(out, stdout()).map_err(RunError::Relay)?);
            outputs.push(Output::new(err, stderr()).map_err(RunError::Relay)?);
        }
    }
    let git = deliveries.iter().find_map(|d| match d {
        Delivery::Git(listener) => Some(listener.try_clone()),
        Delivery::Held(_) => None,
    });
    let git = git.transpose().map_err(RunError::Relay)?.map(UnixListener::from);
    let mut attendant = Attendant {
        scene,
        ledger,
        launcher,
        leased,
        deliveries,
        uid,
        input,
        outputs,
        git,
        given: Vec::new(),
        unmasked: 0,
        raw_mode: None,
        master: None,
        waiting_signals: Vec::new(),
        posture: Posture::default(),
        started: false,
        timed_out: false,
        expired: BTreeSet::new(),
        git_uses: BTreeMap::new(),
        git_refused: 0,
        ended: None,
        gone: false,
    };
    attendant.mask()?;
    let result = attendant.stay(&signals, watch);
    if matches!(result, Err(RunError::LauncherDied)) {
        attendant.outlive_the_launcher();
    }
    result
}

impl Attendant<'_> {
    fn stay(&mut self, signals: &Signals, watch: &mut Stopwatch) -> Result<Exited, RunError> {
        let mut caller = caller();
        loop {
            while self.launcher.has_passed_over() {
                self.hear(watch)?;
            }
            if self.ended.is_some() && self.outputs.iter().all(Output::is_done) {
                return Ok(self.exited());
            }
            match self.wait(signals, caller.as_ref())? {
                Woken::Launcher => self.hear(watch)?,
                Woken::Signal => self.forward(signals)?,
                Woken::Caller => {
                    // Whoever asked for it is gone: so is the exec (kill -9 of the caller included).
                    caller = None;
                    self.launcher.order(&Order::Kill { exec: EXEC })?;
                }
                Woken::Git => self.answer_git()?,
                Woken::Streams => {}
            }
        }
    }

    /// Waits, and serves the streams on the way.
    fn wait(&mut self, signals: &Signals, caller: Option<&OwnedFd>) -> Result<Woken, RunError> {
        let patience = self.outputs.iter().filter_map(Output::patience).min();
        let mut watched = vec![(signals.0.as_fd(), PollFlags::IN, Of::Woken(Woken::Signal))];
        if !self.gone {
            // Afterwards the launcher has said its last word on this exec.
            watched.push((self.launcher.socket(), PollFlags::IN, Of::Woken(Woken::Launcher)));
        }
        if let Some(caller) = caller {
            watched.push((caller.as_fd(), PollFlags::IN, Of::Woken(Woken::Caller)));
        }
        if let Some(git) = &self.git {
            watched.push((git.as_fd(), PollFlags::IN, Of::Woken(Woken::Git)));
        }
        if let Some((fd, flags)) = self.input.as_ref().and_then(Input::interest) {
            watched.push((fd, flags, Of::Input));
        }
        for (index, output) in self.outputs.iter().enumerate() {
            if let Some((fd, flags)) = output.interest() {
                watched.push((fd, flags, Of::Output(index)));
            }
        }
        let mut fds: Vec<PollFd<'_>> =
            watched.iter().map(|&(fd, flags, _)| PollFd::from_borrowed_fd(fd, flags)).collect();
        let timeout = patience
            .map(|p| Timespec { tv_sec: p.as_secs() as i64, tv_nsec: p.subsec_nanos().into() });
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(e) => return Err(RunError::relay(e)),
        }
        let ready: Vec<Of> = fds
            .iter()
            .zip(&watched)
            .filter(|(fd, _)| !fd.revents().is_empty())
            .map(|(_, &(_, _, of))| of)
            .collect();

        let mut woken = Woken::Streams;
        for owner in ready {
            match owner {
                // The first one; the others are still there the next time.
                Of::Woken(who) if woken == Woken::Streams => woken = who,
                Of::Woken(_) => {}
                Of::Input => {
                    if let Some(input) = &mut self.input {
                        input.ready().map_err(RunError::Relay)?;
                    }
                }
                Of::Output(index) => self.outputs[index].ready().map_err(RunError::Relay)?,
            }
        }
        for output in &mut self.outputs {
            output.on_time().map_err(RunError::Relay)?;
        }
        Ok(woken)
    }

    fn hear(&mut self, watch: &mut Stopwatch) -> Result<(), RunError> {
        let (notice, mut fds) = self.launcher.notice()?;
        match notice {
            Notice::Ready { posture, .. } => {
                self.posture = posture;
                if let Some(master) = fds.pop() {
                    self.take_terminal(master)?;
                }
            }
            Notice::Started { .. } => {
                self.started = true;
                watch.lap(|t| &mut t.launch);
                for signal in std::mem::take(&mut self.waiting_signals) {
                    self.launcher.order(&Order::Signal { exec: EXEC, signal })?;
                }
            }
            Notice::Expired { delivery, .. } => {
                self.expired.insert(delivery);
                if let Some(Delivery::Held(held)) = self.deliveries.get_mut(delivery as usize) {
                    held.wipe();
                }
            }
            Notice::TimedOut { .. } => self.timed_out = true,
            Notice::Ending { ending, deliveries, .. } => self.end(ending, deliveries),
            Notice::Ended { ending, deliveries, .. } => {
                self.gone = true;
                self.end(ending, deliveries);
                for output in &mut self.outputs {
                    output.last_words().map_err(RunError::Relay)?;
                }
            }
            Notice::Refused { refusal, .. } => return Err(refusal.into()),
            Notice::HeadKept { refusal: None } => {}
            // The trail itself stands; what is weaker is the proof against its truncation.
            Notice::HeadKept { refusal: Some(refusal) } => {
                eprintln!("sublet: {}\r", refusal.message);
            }
            // A source that was given up has its end told late.
            Notice::SourceEnded { .. } => {}
            Notice::Unsettled { .. }
            | Notice::Prepared { .. }
            | Notice::Source { .. }
            | Notice::SourceRefused { .. }
            | Notice::Explained { .. } => return Err(RunError::LauncherDied),
        }
        Ok(())
    }

    fn end(&mut self, ending: Ending, deliveries: Vec<(u64, bool)>) {
        for delivery in &mut self.deliveries {
            if let Delivery::Held(held) = delivery {
                held.wipe();
            }
        }
        self.git = None;
        self.input = None;
        self.ended = Some((ending, deliveries));
    }

    fn take_terminal(&mut self, master: OwnedFd) -> Result<(), RunError> {
        let dup = || master.try_clone().map_err(RunError::Relay);
        self.raw_mode = RawMode::enter(stdin()).map_err(RunError::relay)?;
        self.input = Some(Input::new(stdin(), dup()?, true).map_err(RunError::Relay)?);
        self.outputs.push(Output::new(dup()?, stdout()).map_err(RunError::Relay)?);
        terminal::follow_size(&[stdin(), stdout(), stderr()], &master).map_err(RunError::relay)?;
        self.master = Some(master);
        self.mask()
    }

    fn forward(&mut self, signals: &Signals) -> Result<(), RunError> {
        while let Some(signal) = process::read_signal(&signals.0).map_err(RunError::Relay)? {
            if signal == libc::SIGWINCH {
                if let Some(master) = &self.master {
                    let ours = [stdin(), stdout(), stderr()];
                    terminal::follow_size(&ours, master).map_err(RunError::relay)?;
                }
            } else if self.ended.is_some() {
                // Only a reader of ours that takes nothing keeps us.
                self.outputs.iter_mut().for_each(Output::give_up);
            } else if self.started {
                self.launcher.order(&Order::Signal { exec: EXEC, signal })?;
            } else {
                self.waiting_signals.push(signal);
            }
        }
        Ok(())
    }

    /// Masks every value that this exec was given so far.
    fn mask(&mut self) -> Result<(), RunError> {
        if self.leased.is_empty() {
            return Ok(());
        }
        let held = self
            .leased
            .iter()
            .zip(&self.deliveries)
            .filter(|(lease, _)| lease.grant.redact())
            .map(|(lease, delivery)| Delivered::value_of(lease, delivery));
        let masked = self.given.iter().filter(|g| g.redact).map(|g| g.secret.expose());
        let values = held.filter(|v| !v.is_empty()).chain(masked);
        let patterns = Rc::new(Patterns::new(values).map_err(RunError::Delivery)?);
        self.unmasked = patterns.unmasked() as u64;
        for output in &mut self.outputs {
            output.mask(&patterns).map_err(RunError::Relay)?;
        }
        Ok(())
    }

    fn answer_git(&mut self) -> Result<(), RunError> {
        let Some(listener) = &self.git else { return Ok(()) };
        let Some(asked) = git::accept(listener, self.uid).map_err(RunError::Relay)? else {
            return Ok(());
        };
        let why = match &asked.request {
            Err(malformed) => malformed.to_string(),
            Ok(request) => match request.operation {
                Operation::Store | Operation::Erase => {
                    asked.swallow();
                    return Ok(());
                }
                Operation::Get => match self.lease_for(request) {
                    None => format!(
                        "no lease of this exec is for {}://{}/{}",
                        request.protocol,
                        request.host,
                        request.path.as_deref().unwrap_or_default()
                    ),
                    Some(index) => match self.take_git_value(index)? {
                        Ok(()) => {
                            give(
                                asked,
                                &self.leased[index],
                                self.given.last().map(|g| g.secret.expose()),
                            );
                            return Ok(());
                        }
                        Err(why) => why,
                    },
                },
            },
        };
        self.git_refused += 1;
        if self.git_refused <= TOLD_REFUSALS {
            let index = asked.request.as_ref().ok().and_then(|r| self.lease_for(r));
            let lease = index.map(|index| &self.leased[index]);
            self.ledger.refuse_git(self.scene, lease, &why)?;
        }
        // A helper that left without waiting for its answer has none.
        drop(asked.refuse(&why));
        Ok(())
    }

    fn lease_for(&self, request: &Request) -> Option<usize> {
        let is_for = |lease: &Leased| {
            let audience = lease.grant.audience();
            Destination {
                protocol: audience.protocol.as_ref().map_or("https", |p| p.as_str()).to_owned(),
                host: audience.host.to_string(),
                path: audience.path.as_ref().map(|p| p.as_str().to_owned()),
                username: audience.git_username().to_owned(),
            }
            .matches(request)
        };
        self.leased
            .iter()
            .zip(&self.deliveries)
            .position(|(lease, d)| matches!(d, Delivery::Git(_)) && is_for(lease))
    }

    /// Takes a use, resolves the value and masks it, in this order. `Err` says why there is none.
    fn take_git_value(&mut self, index: usize) -> Result<Result<(), String>, RunError> {
        let lease = &self.leased[index];
        let id = &lease.record.lease_id;
        if self.expired.contains(&(index as u32)) {
            return Ok(Err(format!("lease_expired: lease {id} has expired")));
        }
        match self.ledger.take(self.scene, lease) {
            Ok(Ok(())) => *self.git_uses.entry(index as u32).or_default() += 1,
            Ok(Err(refused)) => {
                let name = match refused {
                    UseRefused::Exhausted => "uses_exhausted",
                    UseRefused::Expired => "lease_expired",
                    UseRefused::NotFound | UseRefused::NotOpen(_) | UseRefused::OtherBoot => {
                        "lease_not_active"
                    }
                };
                return Ok(Err(format!("{name}: lease {id}: {refused}")));
            }
            Err(e @ RunError::Trail(_)) => return Ok(Err(format!("{}: {e}", e.reason()))),
            Err(e) => return Err(e),
        }
        let resolved = value::resolve(self.scene, self.ledger, self.launcher, None, &lease.grant)
            .and_then(value::Value::into_secret);
        let mut secret = match resolved {
            Ok(secret) => secret,
            Err(e @ RunError::LauncherDied) => return Err(e),
            Err(e) => return Ok(Err(format!("{}: {e}", e.reason()))),
        };
        // Files end in a newline; a line of the protocol cannot hold one.
        if secret.expose().ends_with(b"\n") {
            secret.truncate(secret.len() - 1);
        }
        if secret.expose().iter().any(|b| matches!(b, 0 | b'\n' | b'\r')) {
            return Ok(Err(
                "delivery_unavailable: the value has a line break or NUL in it".to_owned()
            ));
        }
        let redact = lease.grant.redact();
        self.given.push(Given { secret, redact });
        if redact {
            self.mask()?
        }
        Ok(Ok(()))
    }

    /// The launcher died: the lifeline kills the tree, our mappings wipe its deliveries.
    fn outlive_the_launcher(&mut self) {
        for delivery in &mut self.deliveries {
            if let Delivery::Held(held) = delivery {
                held.wipe();
            }
        }
        outlive_the_launcher(self.scene);
    }

    fn exited(&mut self) -> Exited {
        let (ending, deliveries) = self.ended.take().unwrap_or((Ending::Killed, Vec::new()));
        self.raw_mode = None;
        Exited {
            ending,
            deliveries,
            posture: std::mem::take(&mut self.posture),
            timed_out: self.timed_out,
            expired: std::mem::take(&mut self.expired),
            redacted: self.outputs.iter().map(Output::masked).sum(),
            unmasked: self.unmasked,
            git_uses: std::mem::take(&mut self.git_uses),
            gone: self.gone,
        }
    }
}

/// A value that git was answered with.
struct Given {
    secret: Secret,
    redact: bool,
}

/// Who woke the loop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Woken {
    Launcher,
    Signal,
    Caller,
    Git,
    Streams,
}

#[derive(Clone, Copy)]
enum Of {
    Woken(Woken),
    Input,
    Output(usize),
}

fn give(asked: Asked, lease: &Leased, value: Option<&[u8]>) {
    let username = lease.grant.audience().git_username();
    let value = value.unwrap_or_default();
    // The use is taken: a helper that left without waiting has spent it.
    drop(asked.answer(username, value));
}

/// What the launcher would have waited for and removed.
fn outlive_the_launcher(scene: &Scene) {
    if !process::reap_all_within(LAST_WAIT) {
        eprintln!("sublet: a process of {} is stuck in the kernel\r", scene.exec_id);
    }
    cgroup::remove_left(&scene.exec_id);
}

/// The process that asked for this, to end with it. None where it is outside of our pid namespace.
fn caller() -> Option<OwnedFd> {
    let parent = rustix::process::getppid()?;
    let pidfd = rustix::process::pidfd_open(parent, rustix::process::PidfdFlags::empty()).ok()?;
    // It may have ended between the two calls, and its number been given away.
    (rustix::process::getppid() == Some(parent)).then_some(pidfd)
}

impl Exited {
    /// Waits until no process, mount or cgroup of the exec is left.
    pub fn wait_until_gone(&mut self, scene: &Scene, launcher: &Launcher) -> Result<(), RunError> {
        if self.gone {
            return Ok(());
        }
        let is_end = |n: &Notice| matches!(n, Notice::Ended { .. } | Notice::Refused { .. });
        match launcher.notice_of(is_end) {
            Ok((Notice::Refused { refusal, .. }, _)) => Err(refusal.into()),
            Ok(_) => {
                self.gone = true;
                Ok(())
            }
            Err(e) => {
                outlive_the_launcher(scene);
                Err(e.into())
            }
        }
    }

    /// The command's own, 128 and its signal, or 124 for a timeout.
    pub fn exit_status(&self) -> u8 {
        if self.timed_out {
            return 124;
        }
        match (self.code(), self.signal()) {
            (Some(code), _) => code as u8,
            (None, Some(signal)) => 128 + signal as u8,
            (None, None) => 128 + libc::SIGKILL as u8,
        }
    }

    fn code(&self) -> Option<i32> {
        match self.ending {
            Ending::Command { wait_status } => WaitStatus(wait_status).code(),
            Ending::Killed => None,
        }
    }

    pub fn signal(&self) -> Option<i32> {
        match self.ending {
            Ending::Command { wait_status } => WaitStatus(wait_status).signal(),
            Ending::Killed => Some(libc::SIGKILL),
        }
    }

    pub fn outcome_word(&self) -> &'static str {
        match (self.timed_out, self.code(), self.expired.is_empty()) {
            (true, ..) => "timed_out",
            (_, None, false) => "expired",
            (_, Some(_), _) => "exited",
            (_, None, true) => "killed",
        }
    }

    /// How the lease of this index ended.
    pub fn state_of(&self, index: u32) -> LeaseState {
        if self.expired.contains(&index) { LeaseState::Expired } else { LeaseState::Completed }
    }

    /// A use is one start of an exec; on `git`, one answered `get`.
    fn uses_of(&self, lease: &Leased, index: u32) -> u32 {
        match lease.record.channel {
            Channel::Git => self.git_uses.get(&index).copied().unwrap_or(0),
            Channel::Memfd | Channel::File | Channel::Env | Channel::Token => 1,
        }
    }

    pub fn all_wiped(&self) -> bool {
        self.deliveries.iter().all(|(_, wiped)| *wiped)
    }

    pub fn scrubbed(&self, leased: &[Leased]) -> Vec<ScrubbedDelivery> {
        leased
            .iter()
            .zip(&self.deliveries)
            .map(|(lease, &(bytes, wiped))| ScrubbedDelivery {
                lease_id: lease.record.lease_id.clone(),
                channel: lease.record.channel,
                bytes,
                wiped,
            })
            .collect()
    }

    pub fn outcome(self, scene: &Scene, leased: &[Leased], timings: Timings) -> Outcome {
        let leases = leased
            .iter()
            .zip(0..)
            .map(|(lease, index)| {
                let mut record = lease.record.clone();
                record.state = self.state_of(index);
                record.uses_left -= self.uses_of(lease, index);
                let view = LeaseView::new(&record, Some(lease.grant.place()), &scene.now);
                serde_json::to_value(view).unwrap_or_default()
            })
            .collect();
        let exit_status = self.exit_status();
        let report = Report {
            run_id: scene.run.run_id.clone(),
            exec_id: scene.exec_id.clone(),
            profile: scene.run.profile.clone(),
            workspace: scene.run.workspace.clone(),
            command: scene.command.iter().map(|a| a.to_string_lossy().into_owned()).collect(),
            leases,
            exit_status: exit_status.into(),
            signal: self.signal(),
            timed_out: self.timed_out,
            scrubbed: self.scrubbed(leased),
            enforced: self.posture,
            redacted: self.redacted,
            unmasked_values: self.unmasked,
            timings_us: timings,
        };
        Outcome { report, exit_status }
    }
}
