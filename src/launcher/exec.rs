//! One exec in the launcher: prepared, started, ended. A sandbox (`sandbox.rs`), which may have been
//! built before it was asked for (`warm.rs`), with a command, its streams and its deliveries.
#![forbid(unsafe_code)]

mod begun;
mod cots;
mod deliveries;
mod make;
mod parts;
mod sandbox;
mod seed;
mod user;
mod warm;
mod words;

pub use begun::Begun;
pub use cots::Cots;
pub use make::ownership;
pub use parts::{limit_name, limits, namespace_names, proc_is_masked};
pub use seed::Seeds;
pub use warm::Pool;

use deliveries::Deliveries;
use make::{delivery_unavailable, make_streams};
use sandbox::Sandbox;
use words::end_text;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::io::Errno;

use super::compile;
use super::into;
use super::posture::{self, Facts};
use super::surroundings::Surroundings;
use super::wire::{
    ENDPOINT_PORT, Ending, ExecNumber, FilledSpec, Prepare, Refusal, RefusalKind, Spec,
};
use crate::host::Host;
use crate::model::name::Channel;
use crate::model::report::Posture;
use crate::sandbox::step::{self, Said, Step, Told};
use crate::sys::{clock, net, process};

/// Between SIGTERM at the deadline and SIGKILL.
pub const KILL_AFTER: Duration = Duration::from_secs(2);
/// The launcher's own facts, the same for every exec.
pub struct Setting {
    pub host: Host,
    pub here: Surroundings,
}

/// What the broker keeps of the exec's streams and containers.
pub struct BrokerEnds {
    pub fds: Vec<OwnedFd>,
    pub uid: u32,
}

pub struct Exec {
    pub number: ExecNumber,
    spec: Spec,
    sandbox: Sandbox,
    pub deliveries: Deliveries,
    /// The command's ends of its output, until it has ended: see [`Exec::let_go_of_output`].
    outputs: Vec<OwnedFd>,
    names: Names,
    has_endpoint: bool,
    /// Until the child stands behind its walls and it is told.
    posture: Option<Posture>,
    is_in_container: bool,
    /// The child has built everything and waits for the go.
    ready: bool,
    /// It was told to start; what with, until it can.
    is_ordered: bool,
    start: Option<Start>,
    /// The child was let go: from here on its command may have run.
    went: bool,
    started: bool,
    deadline: Option<Duration>,
    kill_at: Option<Duration>,
    wait_status: Option<i32>,
    refusal: Option<Refusal>,
    /// By us, for whatever reason.
    killed: bool,
}

/// What it starts with.
struct Start {
    /// The deliveries that the command inherits, in their order.
    readers: Vec<OwnedFd>,
    deadline: Option<Duration>,
}

struct Names {
    command: String,
    path: String,
}

fn refuse(message: String, hint: &str) -> Refusal {
    Refusal { kind: RefusalKind::Launch, message, hint: hint.to_owned() }
}

fn expired() -> Refusal {
    Refusal {
        kind: RefusalKind::DeliveryUnavailable,
        message: "a lease expired before its command could be started".to_owned(),
        hint: "ask for a longer ttl: the source's own time counts".to_owned(),
    }
}

fn refuse_error(error: &dyn std::error::Error, hint: &str) -> Refusal {
    refuse(compile::chain(error), hint)
}

/// Whether what it delivers has a place in the exec's root, which must stand first.
fn lies_in_root(channel: Channel) -> bool {
    match channel {
        Channel::Memfd | Channel::Env => false,
        Channel::File | Channel::Token | Channel::Git | Channel::Ssh => true,
    }
}

/// The child stands behind its walls.
pub struct Ready {
    pub posture: Posture,
    pub terminal: Option<OwnedFd>,
    /// Listens on the exec's own loopback.
    pub endpoint: Option<OwnedFd>,
}

/// What became known by some event.
pub enum Happened {
    Nothing,
    Ready(Ready),
    Started,
    /// The command has ended, and its deliveries are wiped.
    Ending(Ending, Vec<(u64, bool)>),
    /// The child closed its socket; the rest shows on its pidfd.
    Silence,
}

impl Exec {
    /// Takes the sandbox that was built ahead for it, if that is what it wants, else begins one; makes the
    /// containers, hands their broker ends to `prepared`, and gives the sandbox its command. The broker hears
    /// as early as it can: it has work of its own until the sandbox stands, which may still fail.
    pub fn prepare(
        order: Prepare,
        setting: &Setting,
        ahead: Option<Begun>,
        warm: &mut Pool,
        seeds: &mut Seeds,
        prepared: impl FnOnce(BrokerEnds),
    ) -> Result<Self, Refusal> {
        let spec = Spec::of(&order);
        let mut begun = match ahead.filter(|ahead| ahead.is_for(&spec, &setting.host)) {
            Some(ahead) => ahead,
            None => Begun::begin(spec, &order.exec_id, setting, warm, seeds)?,
        };
        let command = compile::command(&order, &begun.compiled)?;
        if order.deliveries.iter().any(|delivery| lies_in_root(delivery.channel)) {
            begun.build(setting)?;
        }

        let owner = begun.sandbox.owner();
        let mut streams = make_streams(&order, owner)?;
        let (deliveries, delivery_ends) = Deliveries::make(&order.deliveries, &begun.sandbox)?;
        let mut fds = std::mem::take(&mut streams.outside);
        fds.extend(delivery_ends);
        prepared(BrokerEnds { fds, uid: owner.uid });
        begun.build(setting)?;
        let Begun { spec, compiled, mut sandbox, .. } = begun;
        sandbox.give(&command, order.terminal, &streams)?;
        // While the child goes on. A protection that is missing and not waived ends it here.
        let posture = posture::posture(&Facts {
            mode: setting.here.mode,
            profile: &compiled.profile,
            landlock_missing: &sandbox.facts.landlock_missing,
            landlock_abi: setting.here.landlock_abi,
            cgroup: sandbox.facts.cgroup.clone(),
            ownership: sandbox.facts.ownership.clone(),
            cpus: setting.here.cpus,
            never_swaps: deliveries.never_swaps(),
            joins: into::joins(compiled.network.as_ref()),
        })?;

        let path = compiled.profile.environment.path.iter().map(ToString::to_string);
        Ok(Self {
            number: order.exec,
            spec,
            sandbox,
            names: Names {
                command: String::from_utf8_lossy(&order.argv[0]).into_owned(),
                path: path.collect::<Vec<_>>().join(":"),
            },
            outputs: streams.inside.split_off(streams.inside.len().min(1)),
            has_endpoint: order.deliveries.iter().any(|delivery| delivery.endpoint),
            posture: Some(posture),
            is_in_container: compiled.is_in_container,
            deliveries,
            ready: false,
            is_ordered: false,
            start: None,
            started: false,
            went: false,
            deadline: None,
            kill_at: None,
            wait_status: None,
            refusal: None,
            killed: false,
        })
    }

    pub fn socket(&self) -> BorrowedFd<'_> {
        self.sandbox.child.socket.as_fd()
    }

    /// What its sandbox was made for, and another one may be. None in a container, whose mounts may be
    /// others by then.
    pub fn spec(&self) -> Option<&Spec> {
        (!self.is_in_container).then_some(&self.spec)
    }

    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.sandbox.child.pidfd.as_fd()
    }

    /// The broker has filled the deliveries, which are closed at once. They go in as soon as the child is ready.
    pub fn start(
        &mut self,
        deliveries: Vec<FilledSpec>,
        deadline: Option<Duration>,
    ) -> Result<(), Refusal> {
        if self.is_ordered || deliveries.len() != self.deliveries.len() {
            return Err(refuse("the broker started an exec wrongly".into(), ""));
        }
        self.is_ordered = true;
        if self.killed {
            // By what came before.
            return Ok(());
        }
        let readers = self.deliveries.close(&deliveries)?;
        self.start = Some(Start { readers, deadline });
        if self.ready { self.go() } else { Ok(()) }
    }

    fn go(&mut self) -> Result<(), Refusal> {
        let Some(Start { readers, deadline }) = self.start.take() else { return Ok(()) };
        // Its source may have taken longer than the lease lasts.
        if self.deliveries.next_expiry().is_some_and(|expires| expires <= clock::boottime()) {
            return Err(expired());
        }
        let readers: Vec<BorrowedFd<'_>> = readers.iter().map(AsFd::as_fd).collect();
        self.deadline = deadline;
        self.went = self.sandbox.go(&readers)?;
        Ok(())
    }

    /// The child has something to say.
    pub fn hear(&mut self) -> Result<Happened, Refusal> {
        let mut fds = Vec::new();
        let said =
            step::hear(self.socket(), |fd| fds.push(fd)).map_err(|e| refuse_error(&e, ""))?;
        match said {
            // Answered before the exec was made of it.
            Some(Said::Apart | Said::NeedsMaps) => Ok(Happened::Nothing),
            Some(Said::Ready) => {
                self.ready = true;
                let posture = self.posture.take();
                let posture =
                    posture.ok_or_else(|| refuse("the exec was ready twice".into(), ""))?;
                // Before there is a command that could have taken the port.
                let endpoint = match self.has_endpoint {
                    true => Some(
                        net::listen_in(self.sandbox.child.pid, ENDPOINT_PORT)
                            .map_err(|e| delivery_unavailable(&e))?,
                    ),
                    false => None,
                };
                self.go()?;
                Ok(Happened::Ready(Ready { posture, terminal: fds.pop(), endpoint }))
            }
            Some(Said::Started) => {
                self.started = true;
                Ok(Happened::Started)
            }
            Some(Said::Ended { wait_status }) => {
                self.wait_status = Some(wait_status);
                // Init ends now and the kernel kills the rest of its namespace: wipe meanwhile.
                self.deliveries.wipe();
                Ok(Happened::Ending(Ending::Command { wait_status }, self.deliveries.scrubbed()))
            }
            Some(Said::Failed { step, errno, which }) => {
                self.failed(step, Errno::from_raw_os_error(errno), which);
                self.deliveries.wipe();
                Ok(Happened::Nothing)
            }
            None => Ok(Happened::Silence),
        }
    }

    /// The broker has been told of the command's end: now its streams may end too. Sooner, each would wake the
    /// broker, on the CPU on which init is about to die.
    pub fn let_go_of_output(&mut self) {
        self.outputs.clear();
    }

    /// Forwards a signal to the command's process group.
    pub fn signal(&self, signal: i32) -> Result<(), Refusal> {
        if self.started { tell(self.socket(), Told::Signal { signal }, &[]) } else { Ok(()) }
    }

    /// Wipes one delivery at once, and kills the exec if its lease was granted so. One that was not yet let
    /// run never is.
    pub fn revoke(&mut self, delivery: usize) {
        if !self.is_ordered || self.start.take().is_some() {
            self.refuse(Refusal {
                kind: RefusalKind::DeliveryUnavailable,
                message: "a lease was revoked before its command could be started".to_owned(),
                hint: "ask for a new lease".to_owned(),
            });
            return;
        }
        if self.deliveries.revoke(delivery) {
            self.kill();
        }
    }

    /// A step failed in the child. What its init tells after the go says nothing of the command, which may have run.
    fn failed(&mut self, step: Step, errno: Errno, which: u32) {
        let refusal = self.explain(step, errno, which);
        if self.went && matches!(step, Step::Spawn | Step::Init) {
            self.refuse(refusal);
        } else {
            self.refusal = Some(refusal);
        }
    }

    /// Ends an exec that cannot go on, for this reason. One whose command may have run is killed, not refused.
    pub fn refuse(&mut self, refusal: Refusal) {
        if self.went {
            eprintln!("sublet: launcher: an exec is killed: {}", refusal.message);
        } else {
            self.refusal.get_or_insert(refusal);
        }
        self.kill();
    }

    /// Kills the tree, and wipes at once: a process that is stuck in the kernel delays nothing.
    pub fn kill(&mut self) {
        self.killed = true;
        self.sandbox.child.kill();
        self.deliveries.wipe();
    }

    /// The next moment at which [`Exec::on_time`] has something to do.
    pub fn next_time(&self) -> Option<Duration> {
        if self.wait_status.is_some() {
            return None;
        }
        self.deliveries.next_expiry().into_iter().chain(self.deadline).chain(self.kill_at).min()
    }

    /// Does what is due. Gives the deliveries that expired, and whether the deadline passed.
    pub fn on_time(&mut self, now: Duration) -> Result<(Vec<u32>, bool), Refusal> {
        let due = self.deliveries.due(now);
        for &index in &due {
            match self.start.take() {
                Some(_) => self.refuse(expired()),
                None => self.revoke(index),
            }
        }
        let mut timed_out = false;
        if self.deadline.is_some_and(|d| d <= now) {
            self.deadline = None;
            self.kill_at = Some(now + KILL_AFTER);
            timed_out = true;
            tell(self.socket(), Told::SignalAll { signal: libc::SIGTERM }, &[])?;
        }
        if self.kill_at.is_some_and(|k| k <= now) {
            self.kill_at = None;
            self.kill();
        }
        Ok((due.into_iter().map(|i| i as u32).collect(), timed_out))
    }

    /// Init is gone, and with it every process of the exec: gives back everything.
    ///
    /// What is left, memory and descriptors, goes when the exec is dropped.
    pub fn end(&mut self) -> Result<(Ending, Vec<(u64, bool)>), Refusal> {
        // What init said last may not have been heard yet.
        while self.wait_status.is_none() && self.refusal.is_none() {
            match step::hear(self.socket(), drop) {
                Ok(Some(Said::Ended { wait_status })) => self.wait_status = Some(wait_status),
                Ok(Some(Said::Failed { step, errno, which })) => {
                    self.failed(step, Errno::from_raw_os_error(errno), which);
                }
                Ok(Some(_)) => {}
                Ok(None) | Err(_) => break,
            }
        }
        self.deliveries.wipe();
        let init = process::wait_for(self.sandbox.child.pid);
        self.sandbox.child.reaped = true;
        let scrubbed = self.deliveries.scrubbed();
        self.sandbox.child.cgroup = None;
        self.sandbox.child.uid_lock = None;
        match (self.refusal.take(), self.wait_status) {
            (Some(refusal), _) => Err(refusal),
            (None, Some(wait_status)) => Ok((Ending::Command { wait_status }, scrubbed)),
            // That it was not yet heard to start does not make it a failure.
            (None, None) if self.went || self.killed => Ok((Ending::Killed, scrubbed)),
            (None, None) => Err(refuse(
                format!(
                    "the exec's init ended before the command ran ({})",
                    match init {
                        Ok(status) => end_text(status),
                        Err(e) => e.to_string(),
                    }
                ),
                "look for the kernel's out-of-memory killer, or run `sublet doctor`",
            )),
        }
    }
}

fn tell(socket: BorrowedFd<'_>, told: Told, fds: &[BorrowedFd<'_>]) -> Result<(), Refusal> {
    reach(socket, told, fds).map(drop)
}

/// Whether it will hear of it. A child that is gone shows on its pidfd, with its reason in the socket.
fn reach(socket: BorrowedFd<'_>, told: Told, fds: &[BorrowedFd<'_>]) -> Result<bool, Refusal> {
    match step::tell(socket, told, fds) {
        Ok(()) => Ok(true),
        Err(Errno::PIPE | Errno::CONNRESET) => Ok(false),
        Err(e) => Err(refuse(format!("could not reach the exec's init: {e}"), "")),
    }
}
