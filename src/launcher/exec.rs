//! One exec in the launcher: prepared, started, ended. A sandbox (`sandbox.rs`), which may have been
//! built before it was asked for (`warm.rs`), with a command, its streams and its deliveries.
#![forbid(unsafe_code)]

mod make;
mod parts;
mod sandbox;
mod seed;
mod warm;
mod words;

pub use make::ownership;
pub use parts::{limit_name, limits, namespace_names, proc_is_masked};
pub use seed::Seeds;
pub use warm::{Pool, Warm};

use make::{delivery_unavailable, make_deliveries, make_streams};
use sandbox::Sandbox;
use words::end_text;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::fs::Mode as FileMode;
use rustix::io::Errno;

use super::compile::{self, Profiles, Spec};
use super::into;
use super::posture::{self, Facts, Joins};
use super::wire::{
    DeliverySpec, ENDPOINT_PORT, Ending, ExecNumber, FilledSpec, Prepare, Refusal, RefusalKind,
};
use crate::delivery::container::{ContainerError, Empty, Filled, SecretsMount};
use crate::host::Host;
use crate::model::name::Channel;
use crate::model::report::Posture;
use crate::profile::Profile;
use crate::profile::identity::IdentityKind;
use crate::sandbox::cgroup::Cgroups;
use crate::sandbox::identity::Mode;
use crate::sandbox::step::{self, Said, Told};
use crate::sys::{clock, net, process};

/// Between SIGTERM at the deadline and SIGKILL.
pub const KILL_AFTER: Duration = Duration::from_secs(2);
/// The launcher's own facts, the same for every exec.
pub struct Setting {
    pub host: Host,
    pub profiles: Profiles,
    pub mode: Mode,
    pub landlock_abi: u32,
    pub cpus: usize,
    /// Parts of /proc are masked, as container runtimes do.
    pub proc_is_masked: bool,
    /// Where execs get their cgroups, or why there is no such place.
    pub cgroups: Result<Cgroups, String>,
    /// The caller's, for the command: what the launcher makes has the modes that it names.
    pub umask: FileMode,
}

/// What the broker keeps of the exec's streams and containers.
pub struct BrokerEnds {
    pub fds: Vec<OwnedFd>,
    pub uid: u32,
}

/// One delivery in the launcher.
enum Delivery {
    /// Of a token, whose libraries read it.
    Empty(Empty, Option<IdentityKind>),
    Filled {
        filled: Filled,
        expires: Duration,
        kill: bool,
        token: Option<Versions>,
    },
    /// The value stays with the broker, which answers on the socket of git's helper or of an SSH agent.
    Socket {
        expires: Option<Duration>,
        kill: bool,
    },
    Gone,
}

/// Of a token that is replaced while the exec lives.
struct Versions {
    kind: IdentityKind,
    /// What the broker is filling.
    next: Option<Empty>,
    /// What stood there before: whoever was reading it may go on until the one after it comes.
    previous: Option<Filled>,
}

pub struct Exec {
    pub number: ExecNumber,
    spec: Spec,
    sandbox: Sandbox,
    deliveries: Vec<Delivery>,
    /// Where the next version of a token is made.
    tokens: Option<SecretsMount>,
    names: Names,
    has_endpoint: bool,
    profile: Profile,
    /// Of the deliveries' memory, where there are any.
    never_swaps: Option<bool>,
    is_in_container: bool,
    joins: Joins,
    /// The child has built everything and waits for the go.
    ready: bool,
    start: Option<(Vec<FilledSpec>, Option<Duration>)>,
    started: bool,
    deadline: Option<Duration>,
    kill_at: Option<Duration>,
    wait_status: Option<i32>,
    refusal: Option<Refusal>,
    /// By us, for whatever reason.
    killed: bool,
}

struct Names {
    command: String,
    path: String,
}

fn refuse(message: String, hint: &str) -> Refusal {
    Refusal { kind: RefusalKind::Launch, message, hint: hint.to_owned() }
}

fn refuse_error(error: &dyn std::error::Error, hint: &str) -> Refusal {
    refuse(compile::chain(error), hint)
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
    /// Compiles, takes the warm sandbox if it is what would be built now, else builds one; makes the
    /// containers, hands their broker ends to `prepared`, and gives the sandbox its command.
    pub fn prepare(
        order: Prepare,
        setting: &Setting,
        warm: &mut Pool,
        seeds: &mut Seeds,
        prepared: impl FnOnce(BrokerEnds),
    ) -> Result<Self, Refusal> {
        let spec = Spec::of(&order);
        let compiled = compile::sandbox(&spec, &setting.host, &setting.profiles, setting.mode)?;
        let command = compile::command(&order, &compiled)?;
        let mut sandbox = match warm.take(&spec).and_then(|warm| warm.into_sandbox(&compiled)) {
            Some(sandbox) => sandbox,
            None => {
                let mode = compiled.profile.network.mode;
                let seed = match &compiled.network {
                    Some(network) => seeds.take_joined(&order.exec_id, network, setting)?,
                    None => seeds.take(&order.exec_id, mode, setting)?,
                };
                Sandbox::build(&compiled, seed, setting)?
            }
        };

        let owner = sandbox.owner();
        let mut streams = make_streams(&order, owner)?;
        let secrets = sandbox.secrets.as_ref();
        let (deliveries, delivery_ends) =
            make_deliveries(&order.deliveries, owner, sandbox.root()?, secrets)?;
        let is_file = |d: &DeliverySpec| matches!(d.channel, Channel::File | Channel::Token);
        let swaps = secrets.is_some_and(|s| !s.never_swaps) && order.deliveries.iter().any(is_file);
        let tokens = match secrets {
            Some(secrets) if order.deliveries.iter().any(|d| d.token.is_some()) => {
                Some(secrets.again().map_err(|e| delivery_unavailable(&e))?)
            }
            _ => None,
        };
        let mut fds = std::mem::take(&mut streams.outside);
        fds.extend(delivery_ends);
        prepared(BrokerEnds { fds, uid: owner.uid });
        sandbox.give(&command, order.terminal, &streams)?;

        let path = compiled.profile.environment.path.iter().map(ToString::to_string);
        Ok(Self {
            number: order.exec,
            spec,
            sandbox,
            names: Names {
                command: String::from_utf8_lossy(&order.argv[0]).into_owned(),
                path: path.collect::<Vec<_>>().join(":"),
            },
            has_endpoint: order.deliveries.iter().any(|delivery| delivery.endpoint),
            profile: compiled.profile,
            never_swaps: (!order.deliveries.is_empty()).then_some(!swaps),
            is_in_container: compiled.is_in_container,
            joins: into::joins(compiled.network.as_ref()),
            deliveries,
            tokens,
            ready: false,
            start: None,
            started: false,
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

    /// The broker has filled the deliveries. They go in as soon as the child is ready.
    pub fn start(
        &mut self,
        deliveries: Vec<FilledSpec>,
        deadline: Option<Duration>,
    ) -> Result<(), Refusal> {
        if self.start.is_some() || self.started || deliveries.len() != self.deliveries.len() {
            return Err(refuse("the broker started an exec wrongly".into(), ""));
        }
        self.start = Some((deliveries, deadline));
        if self.ready { self.go() } else { Ok(()) }
    }

    fn go(&mut self) -> Result<(), Refusal> {
        let Some((specs, deadline)) = self.start.take() else { return Ok(()) };
        // Its source may have taken longer than the lease lasts.
        let now = clock::boottime();
        if specs.iter().any(|spec| spec.expires <= now) {
            return Err(Refusal {
                kind: RefusalKind::DeliveryUnavailable,
                message: "a lease expired before its command could be started".to_owned(),
                hint: "ask for a longer ttl: the source's own time counts".to_owned(),
            });
        }
        let failed = |e: &dyn std::error::Error| Refusal {
            kind: RefusalKind::DeliveryUnavailable,
            message: compile::chain(e),
            hint: "free locked memory (RLIMIT_MEMLOCK) or lease less in one exec".to_owned(),
        };
        let mut readers = Vec::new();
        for (delivery, spec) in self.deliveries.iter_mut().zip(&specs) {
            *delivery = match std::mem::replace(delivery, Delivery::Gone) {
                Delivery::Empty(empty, kind) => {
                    let (filled, reader) =
                        empty.close(spec.bytes as usize).map_err(|e| failed(&e))?;
                    readers.extend(reader);
                    let token = kind.map(|kind| Versions { kind, next: None, previous: None });
                    Delivery::Filled { filled, expires: spec.expires, kill: spec.kill, token }
                }
                Delivery::Socket { .. } => {
                    Delivery::Socket { expires: Some(spec.expires), kill: spec.kill }
                }
                other => other,
            };
        }
        let readers: Vec<BorrowedFd<'_>> = readers.iter().map(AsFd::as_fd).collect();
        self.deadline = deadline;
        self.sandbox.go(&readers)
    }

    /// The child has something to say.
    pub fn hear(&mut self, setting: &Setting) -> Result<Happened, Refusal> {
        let mut fds = Vec::new();
        let said =
            step::hear(self.socket(), |fd| fds.push(fd)).map_err(|e| refuse_error(&e, ""))?;
        match said {
            // Answered before the exec was made of it.
            Some(Said::NeedsMaps) => Ok(Happened::Nothing),
            Some(Said::Ready) => {
                self.ready = true;
                let posture = posture::posture(&self.facts(setting))?;
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
                self.wipe();
                Ok(Happened::Ending(Ending::Command { wait_status }, self.scrubbed()))
            }
            Some(Said::Failed { step, errno, which }) => {
                self.refusal = Some(self.explain(step, Errno::from_raw_os_error(errno), which));
                self.wipe();
                Ok(Happened::Nothing)
            }
            None => Ok(Happened::Silence),
        }
    }

    fn facts<'a>(&'a self, setting: &Setting) -> Facts<'a> {
        Facts {
            mode: setting.mode,
            profile: &self.profile,
            landlock_missing: &self.sandbox.facts.landlock_missing,
            landlock_abi: setting.landlock_abi,
            cgroup: self.sandbox.facts.cgroup.clone(),
            ownership: self.sandbox.facts.ownership.clone(),
            cpus: setting.cpus,
            never_swaps: self.never_swaps,
            joins: self.joins,
        }
    }

    /// Forwards a signal to the command's process group.
    pub fn signal(&self, signal: i32) -> Result<(), Refusal> {
        if self.started { tell(self.socket(), Told::Signal { signal }, &[]) } else { Ok(()) }
    }

    /// A renewed lease: its delivery stays for longer. One that was wiped stays wiped.
    pub fn extend(&mut self, delivery: usize, until: Duration) {
        match self.deliveries.get_mut(delivery) {
            Some(Delivery::Filled { filled, expires, .. }) if !filled.is_wiped() => {
                *expires = until.max(*expires);
            }
            Some(Delivery::Socket { expires: Some(expires), .. }) => *expires = until.max(*expires),
            Some(_) | None => {}
        }
    }

    /// Wipes one delivery at once, and kills the exec if its lease was granted so. One that was not yet let
    /// run never is.
    pub fn revoke(&mut self, delivery: usize) {
        if self.start.take().is_some() {
            self.refuse(Refusal {
                kind: RefusalKind::DeliveryUnavailable,
                message: "a lease was revoked before its command could be started".to_owned(),
                hint: "ask for a new lease".to_owned(),
            });
            return;
        }
        let kill = match self.deliveries.get_mut(delivery) {
            Some(Delivery::Filled { filled, kill, token, .. }) => {
                filled.wipe();
                wipe_previous(token);
                *kill
            }
            Some(Delivery::Socket { kill, expires }) => {
                *expires = None;
                *kill
            }
            Some(Delivery::Empty(..) | Delivery::Gone) | None => false,
        };
        if kill {
            self.kill();
        }
    }

    /// Ends an exec that cannot go on, for this reason.
    pub fn refuse(&mut self, refusal: Refusal) {
        self.refusal.get_or_insert(refusal);
        self.kill();
    }

    /// Kills the tree, and wipes at once: a process that is stuck in the kernel delays nothing.
    pub fn kill(&mut self) {
        self.killed = true;
        self.sandbox.child.kill();
        self.wipe();
    }

    /// Per delivery: its bytes, and whether they were wiped.
    fn scrubbed(&self) -> Vec<(u64, bool)> {
        let told = |delivery: &Delivery| match delivery {
            Delivery::Filled { filled, .. } => (filled.bytes(), filled.is_wiped()),
            Delivery::Empty(..) | Delivery::Socket { .. } | Delivery::Gone => (0, true),
        };
        self.deliveries.iter().map(told).collect()
    }

    fn wipe(&mut self) {
        for delivery in &mut self.deliveries {
            if let Delivery::Filled { filled, token, .. } = delivery {
                filled.wipe();
                wipe_previous(token);
            }
        }
    }

    /// An empty file for the next version of a token; its descriptor is the broker's to fill.
    pub fn replace(&mut self, delivery: usize) -> Result<OwnedFd, Refusal> {
        let over = || Refusal {
            kind: RefusalKind::DeliveryUnavailable,
            message: "there is no token to replace any more".to_owned(),
            hint: String::new(),
        };
        let owner = self.sandbox.owner();
        match (self.deliveries.get_mut(delivery), &self.tokens) {
            (Some(Delivery::Filled { filled, token: Some(token), .. }), Some(mount))
                if !filled.is_wiped() =>
            {
                let next =
                    mount.next_token(token.kind, owner).map_err(|e| delivery_unavailable(&e))?;
                let fd = next.fd().try_clone_to_owned().map_err(|e| delivery_unavailable(&e))?;
                token.next = Some(next);
                Ok(fd)
            }
            _ => Err(over()),
        }
    }

    /// The next version is filled: it takes the token's place. Where that cannot be, the one that stands
    /// there stays, and the new one is wiped.
    pub fn put_replacement(&mut self, delivery: usize, bytes: usize) -> Result<(), ContainerError> {
        let Some(Delivery::Filled { filled, token: Some(token), .. }) =
            self.deliveries.get_mut(delivery)
        else {
            return Ok(());
        };
        let (Some(next), Some(mount)) = (token.next.take(), &self.tokens) else { return Ok(()) };
        let (mut next, _) = next.close(bytes)?;
        // It may have been revoked, or have expired, while the broker filled.
        if filled.is_wiped() {
            next.wipe();
            return Ok(());
        }
        if let Err(e) = mount.put_token(token.kind) {
            next.wipe();
            return Err(e);
        }
        let mut before = token.previous.replace(std::mem::replace(filled, next));
        if let Some(before) = &mut before {
            before.wipe();
        }
        Ok(())
    }

    /// The next moment at which [`Exec::on_time`] has something to do.
    pub fn next_time(&self) -> Option<Duration> {
        let expiries = self.deliveries.iter().filter_map(|d| match d {
            Delivery::Filled { filled, expires, .. } if !filled.is_wiped() => Some(*expires),
            Delivery::Socket { expires, .. } => *expires,
            _ => None,
        });
        if self.wait_status.is_some() {
            return None;
        }
        expiries.chain(self.deadline).chain(self.kill_at).min()
    }

    /// Does what is due. Gives the deliveries that expired, and whether the deadline passed.
    pub fn on_time(&mut self, now: Duration) -> Result<(Vec<u32>, bool), Refusal> {
        let due: Vec<usize> = self
            .deliveries
            .iter()
            .enumerate()
            .filter(|(_, d)| match d {
                Delivery::Filled { filled, expires, .. } => !filled.is_wiped() && *expires <= now,
                Delivery::Socket { expires, .. } => expires.is_some_and(|e| e <= now),
                _ => false,
            })
            .map(|(i, _)| i)
            .collect();
        for &index in &due {
            self.revoke(index);
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
                    self.refusal = Some(self.explain(step, Errno::from_raw_os_error(errno), which));
                }
                Ok(Some(_)) => {}
                Ok(None) | Err(_) => break,
            }
        }
        self.wipe();
        let init = process::wait_for(self.sandbox.child.pid);
        self.sandbox.child.reaped = true;
        let scrubbed = self.scrubbed();
        self.sandbox.child.cgroup = None;
        self.sandbox.child.uid_lock = None;
        match (self.refusal.take(), self.wait_status) {
            (Some(refusal), _) => Err(refusal),
            (None, Some(wait_status)) => Ok((Ending::Command { wait_status }, scrubbed)),
            // That it was not yet heard to start does not make it a failure.
            (None, None) if self.started || self.killed => Ok((Ending::Killed, scrubbed)),
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

fn wipe_previous(token: &mut Option<Versions>) {
    if let Some(Versions { previous: Some(previous), .. }) = token {
        previous.wipe();
    }
}

fn tell(socket: BorrowedFd<'_>, told: Told, fds: &[BorrowedFd<'_>]) -> Result<(), Refusal> {
    match step::tell(socket, told, fds) {
        // A child that is gone shows on its pidfd, with its reason in the socket.
        Ok(()) | Err(Errno::PIPE | Errno::CONNRESET) => Ok(()),
        Err(e) => Err(refuse(format!("could not reach the exec's init: {e}"), "")),
    }
}
