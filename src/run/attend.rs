//! While the command lives: its streams are relayed and masked, signals forwarded, git answered, notices
//! of the launcher heard. One loop, one poll, no thread.
#![forbid(unsafe_code)]

mod answer;
mod exited;

pub use exited::Exited;

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::rc::Rc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::stdio::{stderr, stdin, stdout};

use super::Stopwatch;
use super::deliver::{Delivered, Delivery};
use super::error::RunError;
use super::ledger::{Leased, Ledger};
use super::scene::{EXEC, Scene};
use crate::launcher::client::Launcher;
use crate::launcher::wire::{Ending, Notice, Order};
use crate::model::report::Posture;
use crate::model::secret::Secret;
use crate::redact::Patterns;
use crate::relay::input::Input;
use crate::relay::output::Output;
use crate::relay::terminal::{self, RawMode};
use crate::sandbox::cgroup;
use crate::sys::process;

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
