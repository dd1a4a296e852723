//! While the command lives: its streams are relayed and masked, signals forwarded, git answered, notices
//! of the launcher heard. One loop, one poll, no thread.
#![forbid(unsafe_code)]

mod agent;
mod answer;
mod exited;
mod leases;
mod listen;
mod tokens;

pub use exited::Exited;
pub use tokens::Token;

use std::collections::{BTreeMap, BTreeSet};
use std::net::TcpListener;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::rc::Rc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::stdio::{stderr, stdin, stdout};

use super::Stopwatch;
use super::caller::Caller;
use super::deliver::{Delivered, Delivery};
use super::entries::Leased;
use super::error::RunError;
use super::ledger::Ledger;
use super::mint::renew::Renewal;
use super::scene::{EXEC, Scene};
use super::ssh::SshIdentity;
use crate::delivery::aws_endpoint::Endpoint;
use crate::delivery::fill::Held;
use crate::delivery::ssh;
use crate::launcher::client::Session;
use crate::launcher::wire::{Ending, Notice, Order};
use crate::model::report::{Posture, ScrubbedDelivery};
use crate::model::secret::Secret;
use crate::relay::frames::Kind;
use crate::relay::input::Input;
use crate::relay::output::Output;
use crate::relay::terminal::RawMode;
use crate::sandbox::cgroup;
use crate::sys::{clock, process};

/// How many refused `get`s of one exec are told in the trail: it could ask without end.
const TOLD_REFUSALS: u64 = 5;

/// How long the tree of a dead launcher has to die: its init sees the lifeline end at once.
const LAST_WAIT: Duration = Duration::from_secs(5);

struct Attendant<'a> {
    scene: &'a Scene,
    ledger: &'a mut Ledger,
    session: &'a Session,
    caller: &'a Caller,
    leased: &'a mut [Leased],
    deliveries: Vec<Delivery>,
    tokens: Vec<Token>,
    uid: u32,
    input: Option<Input<'a>>,
    outputs: Vec<Output<'a>>,
    git: Option<UnixListener>,
    ssh: Option<UnixListener>,
    ssh_clients: Vec<ssh::Connection>,
    /// By lease.
    identities: BTreeMap<usize, SshIdentity>,
    /// Of the lease of this index, and where it is asked for.
    endpoint: Option<(usize, Endpoint)>,
    asked_at: Option<TcpListener>,
    /// What this exec was given, for the mask.
    given: Vec<Given>,
    unmasked: u64,
    raw_mode: Option<RawMode<'a>>,
    master: Option<OwnedFd>,
    waiting_signals: Vec<i32>,
    posture: Posture,
    started: bool,
    timed_out: bool,
    expired: BTreeSet<u32>,
    revoked: BTreeSet<u32>,
    /// The client of this exec is gone, or has broken the protocol.
    lost: bool,
    uses: BTreeMap<u32, u32>,
    refused: u64,
    /// Of minted values, at their sources.
    renewing: Vec<Renewal>,
    /// The trail could not be told that a value ended by itself: not tried again before the end.
    expiry_is_untold: bool,
    ended: Option<(Ending, Vec<(u64, bool)>)>,
    gone: bool,
}

/// Why an exec, which was told to start, is not attended to its end.
pub struct Unattended {
    pub error: RunError,
    /// Its command may have been executed.
    pub has_begun: bool,
    /// What was wiped of it.
    pub scrubbed: Vec<ScrubbedDelivery>,
}

/// Stays until the command has ended, its deliveries are wiped and all that was written is passed on.
pub fn attend(
    scene: &Scene,
    ledger: &mut Ledger,
    session: &Session,
    caller: &mut Caller,
    leased: &mut [Leased],
    delivered: Delivered,
    watch: &mut Stopwatch,
) -> Result<Exited, Box<Unattended>> {
    let parent = caller.parent();
    let mut attendant = attendant(scene, ledger, session, caller, leased, delivered)
        .map_err(|error| Unattended { error, has_begun: true, scrubbed: Vec::new() })
        .map_err(Box::new)?;
    attendant.mask();
    attendant.stay(parent, watch).map_err(|error| {
        // The launcher does so too, while it lives.
        attendant.wipe_all();
        if matches!(error, RunError::LauncherDied) {
            outlive_the_launcher(scene);
        }
        // A command that could not be executed is the launcher's to tell.
        let has_begun = attendant.started || !matches!(error, RunError::Refused(_));
        Box::new(Unattended { error, has_begun, scrubbed: attendant.scrubbed() })
    })
}

fn attendant<'a>(
    scene: &'a Scene,
    ledger: &'a mut Ledger,
    session: &'a Session,
    caller: &'a Caller,
    leased: &'a mut [Leased],
    delivered: Delivered,
) -> Result<Attendant<'a>, RunError> {
    let Delivered { mut streams, deliveries, tokens, identities, masked, endpoint, uid } =
        delivered;
    let (mut input, mut outputs) = (None, Vec::new());
    if streams.len() == 3 {
        let (err, out, inn) = (streams.pop(), streams.pop(), streams.pop());
        if let (Some(inn), Some(out), Some(err)) = (inn, out, err) {
            input = Some(match caller.connection() {
                None => Input::new(stdin(), inn, false).map_err(RunError::Relay)?,
                Some(_) => Input::fed(inn, false).map_err(RunError::Relay)?,
            });
            outputs.push(output(caller, out, Kind::Stdout)?);
            outputs.push(output(caller, err, Kind::Stderr)?);
        }
    }
    let listener = |of: fn(&Delivery) -> Option<&OwnedFd>| {
        let listener = deliveries.iter().find_map(of).map(OwnedFd::try_clone).transpose();
        listener.map(|fd| fd.map(UnixListener::from)).map_err(RunError::Relay)
    };
    let git = listener(|d| match d {
        Delivery::Git { listener, .. } => Some(listener),
        _ => None,
    })?;
    let ssh = listener(|d| if let Delivery::Ssh(fd) = d { Some(fd) } else { None })?;
    Ok(Attendant {
        scene,
        ledger,
        session,
        caller,
        leased,
        deliveries,
        tokens,
        uid,
        input,
        outputs,
        git,
        ssh,
        ssh_clients: Vec::new(),
        identities,
        endpoint,
        asked_at: None,
        given: masked
            .into_iter()
            .map(|secret| Given { secret: Rc::new(secret), redact: true })
            .collect(),
        unmasked: 0,
        raw_mode: None,
        master: None,
        waiting_signals: Vec::new(),
        posture: Posture::default(),
        started: false,
        timed_out: false,
        expired: BTreeSet::new(),
        revoked: BTreeSet::new(),
        lost: false,
        uses: BTreeMap::new(),
        refused: 0,
        renewing: Vec::new(),
        expiry_is_untold: false,
        ended: None,
        gone: false,
    })
}

fn output<'a>(caller: &Caller, from: OwnedFd, kind: Kind) -> Result<Output<'a>, RunError> {
    match caller.connection() {
        Some(connection) => Ok(Output::framed(from, connection, kind)),
        None => {
            let to = if kind == Kind::Stdout { stdout() } else { stderr() };
            Output::new(from, to).map_err(RunError::Relay)
        }
    }
}

impl Attendant<'_> {
    fn stay(
        &mut self,
        mut parent: Option<OwnedFd>,
        watch: &mut Stopwatch,
    ) -> Result<Exited, RunError> {
        loop {
            while self.session.has_passed_over() {
                self.hear(watch)?;
            }
            if self.ended.is_some() && self.outputs.iter().all(Output::is_done) {
                return Ok(self.exited());
            }
            self.renew_what_is_due()?;
            self.replace_what_is_due()?;
            self.tell_what_expired();
            let is_unheard = self.caller.connection().is_some_and(|c| c.borrow().is_unheard());
            if is_unheard && self.has_room() {
                self.listen()?;
            }
            match self.wait(parent.as_ref())? {
                Woken::Launcher => self.hear(watch)?,
                Woken::Interrupt => {
                    self.forward()?;
                    self.read_mail()?;
                }
                Woken::Parent => {
                    // Whoever asked for it is gone: so is the exec (kill -9 of the caller included).
                    parent = None;
                    self.session.order(&Order::Kill { exec: EXEC })?;
                }
                Woken::Client => self.listen()?,
                Woken::Git => self.answer_git()?,
                Woken::Ssh => self.accept_ssh()?,
                Woken::SshClient(which) => self.answer_ssh(which)?,
                Woken::Endpoint => self.answer_endpoint()?,
                Woken::Streams => {}
            }
        }
    }

    /// Waits for what has something to say or takes something.
    fn ready(&self, parent: Option<&OwnedFd>) -> Result<Vec<Of>, RunError> {
        let patience = self.outputs.iter().filter_map(Output::patience);
        let renewal = self.next_renewal().map(|at| at.saturating_sub(clock::boottime()));
        let replacement = self.next_replacement().map(|at| at.saturating_sub(clock::boottime()));
        let expiry = self.next_expiry().map(|at| at.saturating_sub(clock::boottime()));
        let patience = patience.chain(renewal).chain(replacement).chain(expiry).min();
        let connection = match self.lost {
            true => None,
            false => self.caller.connection(),
        };
        let connection = connection.map(|connection| connection.borrow());
        let mut watched =
            vec![(self.caller.interrupt(), PollFlags::IN, Of::Woken(Woken::Interrupt))];
        if !self.gone {
            // Afterwards the launcher has said its last word on this exec.
            watched.push((self.session.socket(), PollFlags::IN, Of::Woken(Woken::Launcher)));
        }
        if let Some(parent) = parent {
            watched.push((parent.as_fd(), PollFlags::IN, Of::Woken(Woken::Parent)));
        }
        if let Some(git) = &self.git {
            watched.push((git.as_fd(), PollFlags::IN, Of::Woken(Woken::Git)));
        }
        // At most so many are spoken with; the next waits.
        if let Some(ssh) = self.ssh.as_ref().filter(|_| self.ssh_clients.len() < ssh::MOST) {
            watched.push((ssh.as_fd(), PollFlags::IN, Of::Woken(Woken::Ssh)));
        }
        for (which, client) in self.ssh_clients.iter().enumerate() {
            watched.push((client.fd(), PollFlags::IN, Of::Woken(Woken::SshClient(which))));
        }
        if let Some(listener) = &self.asked_at {
            watched.push((listener.as_fd(), PollFlags::IN, Of::Woken(Woken::Endpoint)));
        }
        if let Some((fd, flags)) = self.input.as_ref().and_then(Input::interest) {
            watched.push((fd, flags, Of::Input));
        }
        if let Some(connection) = &connection {
            // A command that reads nothing stops its client's input, but never hides its leaving.
            let mut flags = PollFlags::RDHUP;
            if self.has_room() {
                flags |= PollFlags::IN;
            }
            if connection.has_unsent() {
                flags |= PollFlags::OUT;
            }
            watched.push((connection.fd(), flags, Of::Woken(Woken::Client)));
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
        let ready = fds.iter().zip(&watched).filter(|(fd, _)| !fd.revents().is_empty());
        Ok(ready.map(|(_, &(_, _, of))| of).collect())
    }

    /// Waits, and serves the streams on the way.
    fn wait(&mut self, parent: Option<&OwnedFd>) -> Result<Woken, RunError> {
        let ready = self.ready(parent)?;
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
        let (notice, mut fds) = self.session.notice()?;
        match notice {
            Notice::Ready { posture, endpoint, .. } => {
                self.posture = posture;
                if endpoint {
                    self.asked_at = fds.pop().map(TcpListener::from);
                }
                if let Some(master) = fds.pop() {
                    self.take_terminal(master)?;
                }
            }
            Notice::Started { .. } => {
                self.started = true;
                if let Some(connection) = self.caller.connection() {
                    let text = serde_json::json!({ "exec_id": self.scene.exec_id }).to_string();
                    // A client that is gone shows in the next turn.
                    drop(connection.borrow_mut().push(Kind::Started, text.as_bytes()));
                }
                watch.lap(|t| &mut t.launch);
                for signal in std::mem::take(&mut self.waiting_signals) {
                    self.session.order(&Order::Signal { exec: EXEC, signal })?;
                }
            }
            Notice::Expired { delivery, .. } => {
                self.expired.insert(delivery);
                self.wipe(delivery as usize);
                self.close_endpoint(delivery as usize);
            }
            Notice::Replacement { delivery, refusal, .. } => {
                self.take_replacement(delivery, refusal, fds.pop())?;
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
            notice @ (Notice::SourceEnded { .. } | Notice::SourceRefused { .. }) => {
                self.hear_of_renewal(notice, fds)?;
            }
            Notice::Unsettled { .. }
            | Notice::Prepared { .. }
            | Notice::Source { .. }
            | Notice::Found { .. }
            | Notice::Explained { .. } => return Err(RunError::LauncherDied),
        }
        Ok(())
    }

    fn end(&mut self, ending: Ending, deliveries: Vec<(u64, bool)>) {
        self.wipe_all();
        self.git = None;
        // Private keys with them.
        self.ssh = None;
        self.ssh_clients.clear();
        self.identities.clear();
        self.asked_at = None;
        self.endpoint = None;
        self.input = None;
        self.ended = Some((ending, deliveries));
    }

    fn wipe_all(&self) {
        (0..self.deliveries.len()).for_each(|index| self.wipe(index));
    }

    fn scrubbed(&self) -> Vec<ScrubbedDelivery> {
        let each = self.leased.iter().zip(&self.deliveries);
        each.map(|(lease, delivery)| ScrubbedDelivery {
            lease_id: lease.record.lease_id.clone(),
            channel: lease.record.channel,
            bytes: match delivery {
                Delivery::Held(held) => held.len() as u64,
                Delivery::Git { answers, .. } => answers.iter().map(|held| held.len() as u64).sum(),
                Delivery::Ssh(_) => 0,
            },
            wiped: true,
        })
        .collect()
    }

    /// Zeroes what a delivery's holders see: of a token, every version that is left.
    fn wipe(&self, index: usize) {
        match self.deliveries.get(index) {
            Some(Delivery::Held(held)) => held.wipe(),
            Some(Delivery::Git { answers, .. }) => answers.iter().for_each(Held::wipe),
            Some(Delivery::Ssh(_)) | None => {}
        }
        self.tokens.iter().filter(|token| token.index == index).for_each(Token::wipe_previous);
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
            revoked: std::mem::take(&mut self.revoked),
            redacted: self.outputs.iter().map(Output::masked).sum(),
            unmasked: self.unmasked,
            uses: std::mem::take(&mut self.uses),
            gone: self.gone,
        }
    }
}

/// A value that the command was given.
struct Given {
    secret: Rc<Secret>,
    redact: bool,
}

/// Who woke the loop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Woken {
    Launcher,
    Interrupt,
    Parent,
    Client,
    Git,
    Ssh,
    SshClient(usize),
    Endpoint,
    Streams,
}

#[derive(Clone, Copy)]
enum Of {
    Woken(Woken),
    Input,
    Output(usize),
}

/// What the launcher would have waited for and removed. In the broker, the other execs' threads do the
/// same, and the service ends.
fn outlive_the_launcher(scene: &Scene) {
    if scene.is_one_shot() && !process::reap_all_within(LAST_WAIT) {
        eprintln!("sublet: a process of {} is stuck in the kernel\r", scene.exec_id);
    }
    cgroup::remove_left(&scene.exec_id);
}
