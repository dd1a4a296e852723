//! The launcher's loop: one thread, one epoll, orders in, notices out, on one session or on many. When a
//! session ends, its execs die and their deliveries are wiped; when the root session ends, the broker is
//! gone: everything dies, and the launcher ends.
//!
//! - `settle`: from the fork to the first order
//! - `orders`: what a session orders; `watched`: what epoll's words stand for; `agenda`, `alarm`: when which
//!   exec has something to do; `quiet`: what is done when none has
#![forbid(unsafe_code)]

mod agenda;
mod alarm;
mod orders;
mod quiet;
mod settle;
mod watched;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use super::compile::{self};
use super::exec::{Begun, Exec, Happened, Pool, Ready, Seeds, Setting};
use super::mint;
use super::source::Helper;
use super::wire::{self, ExecNumber, Notice, Order, Refusal, RefusalKind, Ticket, WireError};
use crate::host::Trust;
use crate::model::id::ExecId;
use crate::sandbox::identity::{self, Mode};
use crate::sys::{clock, process};
use agenda::Agenda;
use alarm::Alarm;
use rustix::event::{Timespec, epoll};
use rustix::io::Errno;
use watched::{Key, ROOT, Token};

/// How long execs have to die when the broker is gone, before the launcher leaves without them: their
/// init then dies with it (lifeline), and only their cgroup's directory waits for the next start.
const LAST_WAIT: Duration = Duration::from_secs(5);

/// Between two looks for what a killed launcher left and a dying process still holds: the first and the
/// longest.
const SWEEP_AGAIN: [Duration; 2] = [Duration::from_millis(250), Duration::from_secs(60)];

/// Where the trail's head is kept, in the state directory.
pub const HEAD_FILE: &str = "trail.head";

/// The most sessions at once: one a live exec. Beyond it is a broker that leaks.
const MAX_SESSIONS: usize = 8192;

/// The most sources that are being asked at once, by all sessions.
const MAX_HELPERS: usize = 512;

/// A source that is being asked, and who waits for its end.
struct Asked {
    helper: Helper,
    session: Key,
    ticket: Ticket,
}

/// An exec, and the session that ordered it.
struct Live {
    exec: Exec,
    session: Key,
}

/// Runs as the launcher until the broker is gone. The status to exit with.
pub fn run(broker: OwnedFd, trust: Trust, ahead: Option<&ExecId>) -> i32 {
    if trust == Trust::Host {
        // A control socket that a service manager handed over is the broker's.
        let ours = broker.as_raw_fd().unsigned_abs();
        let others = [(3, ours.saturating_sub(1)), (ours + 1, u32::MAX)];
        for (first, last) in others.into_iter().filter(|(first, last)| first <= last) {
            if let Err(e) = process::close_range(first, last) {
                eprintln!("sublet: launcher: could not close what was inherited: {e}");
                return 125;
            }
        }
    }
    let voice = broker.try_clone();
    match Launcher::settle(broker, trust, ahead) {
        Ok(mut launcher) => status(launcher.serve()),
        // The broker reads the same configuration and says what is wrong with it.
        Err(LauncherError::Host(_)) => 125,
        Err(e) => {
            let refusal = Refusal {
                kind: RefusalKind::Launch,
                message: compile::chain(&e),
                hint: "`sublet doctor` says what this host forbids, and how to mend it".to_owned(),
            };
            match voice.map(|v| wire::send(v.as_fd(), &Notice::Unsettled { refusal }, &[])) {
                Ok(Ok(())) => 125,
                _ => status(Err(e)),
            }
        }
    }
}

fn status(served: Result<(), LauncherError>) -> i32 {
    match served {
        Ok(()) => 0,
        // The broker has ended.
        Err(LauncherError::Wire(WireError::Gone)) => 125,
        Err(e) => {
            eprintln!("sublet: launcher: {}", compile::chain(&e));
            125
        }
    }
}

#[derive(Debug, thiserror::Error)]
enum LauncherError {
    #[error("could not settle as a launcher: {doing}")]
    Settle { doing: &'static str, source: io::Error },
    #[error(transparent)]
    Host(#[from] crate::host::HostError),
    #[error(transparent)]
    Identity(#[from] identity::IdentityError),
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error("could not wait for events")]
    Epoll(#[from] Errno),
}

struct Launcher {
    sessions: BTreeMap<Key, OwnedFd>,
    epoll: OwnedFd,
    setting: Setting,
    execs: BTreeMap<Key, Live>,
    helpers: BTreeMap<Key, Asked>,
    /// What minters are started from.
    program: mint::Program,
    /// Sandboxes without a command yet.
    warm: Pool,
    /// What the next exec's sandbox begins with.
    seeds: Seeds,
    /// What was built for the execs of these sessions, which are still being decided on.
    ahead: BTreeMap<Key, Begun>,
    /// What execs had that have ended, and been told to: memory, descriptors, mounts.
    remains: Vec<Exec>,
    /// When to do what can wait: not while the latest exec is being started, which would wait for it.
    quiet_at: Option<Duration>,
    is_for_many: bool,
    /// When to look again for what is left of killed launchers, and how long after that.
    sweep: Option<(Duration, Duration)>,
    next_key: Key,
    /// By session and its own number.
    numbers: BTreeMap<(Key, ExecNumber), Key>,
    agenda: Agenda,
    alarm: Alarm,
}

impl Launcher {
    /// Removes the cgroups of launchers that were killed, when it is time to.
    fn sweep(&mut self, now: Duration) {
        let Some((_, pause)) = self.sweep.take_if(|(at, _)| *at <= now) else { return };
        if let (Ok(cgroups), Mode::Privileged) =
            (&self.setting.here.cgroups, self.setting.here.mode)
            && cgroups.sweep()
        {
            self.sweep = Some((now + pause, (pause * 2).min(SWEEP_AGAIN[1])));
        }
    }

    fn fresh_key(&mut self) -> Key {
        let key = self.next_key;
        // Comes round after 2^32 execs; what lives that long keeps its key.
        self.next_key = self.next_key.wrapping_add(1).max(ROOT + 1);
        let taken = self.sessions.contains_key(&key)
            || self.execs.contains_key(&key)
            || self.helpers.contains_key(&key);
        if taken { self.fresh_key() } else { key }
    }

    fn serve(&mut self) -> Result<(), LauncherError> {
        loop {
            match self.turn() {
                Ok(true) => {}
                Ok(false) => {
                    self.leave();
                    return Ok(());
                }
                Err(e) => {
                    self.leave();
                    return Err(e);
                }
            }
        }
    }

    /// Waits for the next events and handles them. False when the broker is gone.
    fn turn(&mut self) -> Result<bool, LauncherError> {
        let mut events = [epoll::Event {
            flags: epoll::EventFlags::empty(),
            data: epoll::EventData::new_u64(0),
        }; 32];
        let (next, epoll) = (self.next_time(), &self.epoll);
        self.alarm.set(next, |timer| watch(epoll, timer, Token::Alarm))?;
        // What can wait is done when nothing else is to be done.
        let is_quiet = self.is_quiet();
        let patience = is_quiet.then_some(Timespec { tv_sec: 0, tv_nsec: 0 });
        let count = match epoll::wait(&self.epoll, &mut events, patience.as_ref()) {
            Ok(0) if is_quiet => {
                self.use_the_quiet();
                0
            }
            Ok(count) => count,
            Err(Errno::INTR) => 0,
            Err(e) => return Err(e.into()),
        };
        for event in &events[..count] {
            match Token::decode(event.data.u64()) {
                Token::Session(session) => {
                    if !self.listen(session)? {
                        return Ok(false);
                    }
                }
                Token::Alarm => self.alarm.clear()?,
                Token::Socket(key) => self.hear(key)?,
                Token::Process(key) => self.ended(key)?,
                Token::Helper(key) => self.helper_ended(key)?,
            }
        }
        self.on_time()?;
        Ok(true)
    }

    fn next_time(&self) -> Option<Duration> {
        let helpers = self.helpers.values().map(|asked| asked.helper.deadline);
        let sweep = self.sweep.map(|(at, _)| at);
        let due = helpers.chain(self.agenda.next()).chain(self.warm.next_time());
        // What is due waits for an idle moment and for no alarm.
        let quiet = self.next_quiet().filter(|_| !self.is_quiet());
        due.chain(sweep).chain(quiet).min()
    }

    /// The next order of a session. False when it was the root's last.
    fn listen(&mut self, session: Key) -> Result<bool, LauncherError> {
        let Some(socket) = self.sessions.get(&session) else { return Ok(true) };
        match wire::receive::<Order>(socket.as_fd()) {
            Ok((order, fds)) => self.obey(session, order, fds).map(|()| true),
            Err(WireError::Gone) if session == ROOT => Ok(false),
            Err(e) if session == ROOT => Err(e.into()),
            Err(WireError::Gone) => self.end_session(session).map(|()| true),
            Err(WireError::Receive(e)) if e.kind() == io::ErrorKind::WouldBlock => Ok(true),
            Err(e) => {
                eprintln!("sublet: launcher: a session ends: {}", compile::chain(&e));
                self.end_session(session).map(|()| true)
            }
        }
    }

    /// Whoever gave the orders is gone: nothing of theirs lives on.
    fn end_session(&mut self, session: Key) -> Result<(), LauncherError> {
        let Some(socket) = self.sessions.remove(&session) else { return Ok(()) };
        epoll::delete(&self.epoll, &socket)?;
        self.ahead.remove(&session);
        let keys: Vec<Key> = self.keys_of(session).collect();
        for key in keys {
            if let Some(live) = self.execs.get_mut(&key) {
                live.exec.kill();
            }
            self.reschedule(key);
        }
        for asked in self.helpers.values().filter(|asked| asked.session == session) {
            asked.helper.kill()?;
        }
        Ok(())
    }

    fn open_session(&mut self, mut fds: Vec<OwnedFd>) -> Result<(), LauncherError> {
        let (Some(socket), true) = (fds.pop(), self.sessions.len() < MAX_SESSIONS) else {
            // Closed again: its other end sees that.
            return Ok(());
        };
        // Whoever does not read the few notices of an exec must not stop those of the others.
        rustix::io::ioctl_fionbio(&socket, true)?;
        let key = self.fresh_key();
        watch(&self.epoll, socket.as_fd(), Token::Session(key))?;
        self.sessions.insert(key, socket);
        // Its first order is there already, as a rule.
        self.listen(key).map(drop)
    }

    fn key_of(&self, session: Key, exec: ExecNumber) -> Option<Key> {
        self.numbers.get(&(session, exec)).copied()
    }

    fn keys_of(&self, session: Key) -> impl Iterator<Item = Key> {
        let numbers = (session, ExecNumber::MIN)..=(session, ExecNumber::MAX);
        self.numbers.range(numbers).map(|(_, key)| *key)
    }

    /// Something has been done with the exec: it may have something else to do, at another time.
    fn reschedule(&mut self, key: Key) {
        self.agenda.set(key, self.execs.get(&key).and_then(|live| live.exec.next_time()));
    }

    fn notify(
        &self,
        session: Key,
        notice: &Notice,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), LauncherError> {
        let Some(socket) = self.sessions.get(&session) else { return Ok(()) };
        tell(socket.as_fd(), session, notice, fds)
    }

    fn hear(&mut self, key: Key) -> Result<(), LauncherError> {
        let Some(Live { exec, session }) = self.execs.get_mut(&key) else { return Ok(()) };
        let (number, session) = (exec.number, *session);
        let happened = exec.hear();
        if matches!(happened, Ok(Happened::Silence)) {
            epoll::delete(&self.epoll, exec.socket())?;
        }
        if let Err(refusal) = &happened {
            exec.refuse(refusal.clone());
        }
        self.reschedule(key);
        match happened {
            Ok(Happened::Nothing | Happened::Silence) | Err(_) => Ok(()),
            Ok(Happened::Ready(Ready { posture, terminal, endpoint })) => {
                let fds: Vec<_> = terminal.iter().chain(&endpoint).map(AsFd::as_fd).collect();
                let endpoint = endpoint.is_some();
                self.notify(session, &Notice::Ready { exec: number, posture, endpoint }, &fds)
            }
            Ok(Happened::Ending(ending, deliveries)) => {
                self.notify(session, &Notice::Ending { exec: number, ending, deliveries }, &[])?;
                if let Some(live) = self.execs.get_mut(&key) {
                    live.exec.let_go_of_output();
                    // It has said its last: that it closes shows on its pidfd a moment later.
                    epoll::delete(&self.epoll, live.exec.socket())?;
                }
                Ok(())
            }
            Ok(Happened::Started) => {
                self.quiet_after_start();
                self.notify(session, &Notice::Started { exec: number }, &[])
            }
        }
    }

    fn ended(&mut self, key: Key) -> Result<(), LauncherError> {
        let Some(Live { mut exec, session }) = self.execs.remove(&key) else { return Ok(()) };
        for fd in [exec.socket(), exec.pidfd()] {
            match epoll::delete(&self.epoll, fd) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(e) => return Err(e.into()),
            }
        }
        let number = exec.number;
        self.numbers.remove(&(session, number));
        self.agenda.set(key, None);
        self.quiet_after_end();
        if let Some(spec) = exec.spec() {
            self.warm.want(spec);
        }
        let notice = match exec.end() {
            Ok((ending, deliveries)) => Notice::Ended { exec: number, ending, deliveries },
            Err(refusal) => Notice::Refused { exec: number, refusal },
        };
        self.notify(session, &notice, &[])?;
        self.leave_remains(exec);
        Ok(())
    }

    fn on_time(&mut self) -> Result<(), LauncherError> {
        let now = clock::boottime();
        self.warm.on_time(now);
        self.sweep(now);
        for asked in self.helpers.values().filter(|asked| asked.helper.deadline <= now) {
            asked.helper.kill()?;
        }
        let mut notices = Vec::new();
        for key in self.agenda.due(now) {
            let Some(Live { exec, session }) = self.execs.get_mut(&key) else { continue };
            let number = exec.number;
            match exec.on_time(now) {
                Ok((expired, timed_out)) => {
                    let expired = expired
                        .into_iter()
                        .map(|delivery| Notice::Expired { exec: number, delivery });
                    let timed_out = timed_out.then_some(Notice::TimedOut { exec: number });
                    notices.extend(expired.chain(timed_out).map(|notice| (*session, notice)));
                }
                Err(refusal) => exec.refuse(refusal),
            }
            self.reschedule(key);
        }
        for (session, notice) in notices {
            self.notify(session, &notice, &[])?;
        }
        Ok(())
    }

    /// The broker is gone: nothing lives on.
    fn leave(&mut self) {
        for live in self.execs.values_mut() {
            live.exec.kill();
        }
        self.remains.clear();
        self.ahead.clear();
        self.warm.clear();
        self.seeds.clear();
        for asked in self.helpers.values() {
            if let Err(e) = asked.helper.kill() {
                eprintln!("sublet: launcher: could not kill a source's command: {e}");
            }
        }
        let until = clock::boottime() + LAST_WAIT;
        while let Some((_, Live { mut exec, .. })) = self.execs.pop_first() {
            let left = until.saturating_sub(clock::boottime());
            let timeout =
                Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
            let mut fds = [rustix::event::PollFd::from_borrowed_fd(
                exec.pidfd(),
                rustix::event::PollFlags::IN,
            )];
            match rustix::event::poll(&mut fds, Some(&timeout)) {
                Ok(0) | Err(_) => {
                    eprintln!(
                        "sublet: launcher: an exec is stuck in the kernel; it dies with its init"
                    );
                    // It has been killed and wiped; waiting for it once more would only take longer.
                    std::mem::forget(exec);
                }
                Ok(_) => {
                    // There is no one left to tell how it ended.
                    drop(exec.end());
                }
            }
        }
        // The one-shot caller has gone on meanwhile: nothing waits for this.
        if let (Ok(cgroups), Mode::Privileged) =
            (&self.setting.here.cgroups, self.setting.here.mode)
        {
            cgroups.sweep();
        }
    }
}

fn watch(epoll: &OwnedFd, fd: BorrowedFd<'_>, token: Token) -> Result<(), Errno> {
    epoll::add(epoll, fd, epoll::EventData::new_u64(token.encode()), epoll::EventFlags::IN)
}

/// A session that takes no notice, or is gone, shows that on its socket: it ends in a later turn.
fn tell(
    socket: BorrowedFd<'_>,
    session: Key,
    notice: &Notice,
    fds: &[BorrowedFd<'_>],
) -> Result<(), LauncherError> {
    match wire::send(socket, notice, fds) {
        Ok(()) | Err(WireError::Gone) => Ok(()),
        Err(e) if session == ROOT => Err(e.into()),
        Err(e) => {
            eprintln!("sublet: launcher: a session ends: {}", compile::chain(&e));
            match rustix::net::shutdown(socket, rustix::net::Shutdown::Both) {
                Ok(()) | Err(Errno::NOTCONN) => Ok(()),
                Err(e) => Err(e.into()),
            }
        }
    }
}
