//! The launcher's loop: one thread, one epoll, orders in, notices out, on one session or on many. When a
//! session ends, its execs die and their deliveries are wiped; when the root session ends, the broker is
//! gone: everything dies, and the launcher ends.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::time::Duration;

use rustix::event::{Timespec, epoll};
use rustix::fs::Mode as FileMode;
use rustix::io::Errno;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, timerfd_create, timerfd_settime,
};

use super::compile::{self, Profiles};
use super::exec::{Exec, Happened, Pool, Setting};
use super::explain;
use super::source::{self, Helper};
use super::wire::{self, ExecNumber, Notice, Order, Refusal, RefusalKind, WireError};
use crate::host::{Host, Places, Trust};
use crate::sandbox::cgroup::Cgroups;
use crate::sandbox::identity::{self, Mode};
use crate::sys::{clock, landlock, memory, process};

/// How long execs have to die when the broker is gone, before the launcher leaves without them: their
/// init then dies with it (lifeline), and only their cgroup's directory waits for the next start.
const LAST_WAIT: Duration = Duration::from_secs(5);

/// Between two looks for what a killed launcher left and a dying process still holds: the first and the
/// longest.
const SWEEP_AGAIN: [Duration; 2] = [Duration::from_millis(250), Duration::from_secs(60)];

/// Where the trail's head is kept, in the state directory.
pub const HEAD_FILE: &str = "trail.head";

/// A number of this launcher's own, for what it watches.
type Key = u32;

/// The session that was there first: its end is the broker's.
const ROOT: Key = 0;

/// The most sessions at once: one a live exec. Beyond it is a broker that leaks.
const MAX_SESSIONS: usize = 8192;

/// What an epoll entry stands for: a key, shifted, and what it is the key of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Token {
    Session(Key),
    Socket(Key),
    Process(Key),
    Helper(Key),
    Alarm,
}

impl Token {
    fn encode(self) -> u64 {
        let (key, kind) = match self {
            Token::Alarm => (0, 0),
            Token::Session(key) => (key, 1),
            Token::Socket(key) => (key, 2),
            Token::Process(key) => (key, 3),
            Token::Helper(key) => (key, 4),
        };
        u64::from(key) << 3 | kind
    }

    fn decode(word: u64) -> Self {
        let key = (word >> 3) as Key;
        match word & 7 {
            1 => Token::Session(key),
            2 => Token::Socket(key),
            3 => Token::Process(key),
            4 => Token::Helper(key),
            _ => Token::Alarm,
        }
    }
}

/// An exec, and the session that ordered it.
struct Live {
    exec: Exec,
    session: Key,
}

/// Runs as the launcher until the broker is gone. The status to exit with.
pub fn run(broker: OwnedFd, places: &Places, trust: Trust) -> i32 {
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
    match Launcher::settle(broker, places, trust) {
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

/// Maps are written to /proc by number: in the /proc of another pid namespace that is another process.
fn refuse_foreign_proc() -> io::Result<()> {
    let number = std::fs::read_link("/proc/self")?;
    if number.as_os_str() == std::process::id().to_string().as_str() {
        return Ok(());
    }
    Err(io::Error::other(format!("/proc/self is {}, not {}", number.display(), std::process::id())))
}

struct Launcher {
    sessions: BTreeMap<Key, OwnedFd>,
    epoll: OwnedFd,
    setting: Setting,
    execs: BTreeMap<Key, Live>,
    helpers: BTreeMap<Key, (Helper, Key)>,
    /// Sandboxes without a command yet.
    warm: Pool,
    /// When to look again for what is left of killed launchers, and how long after that.
    sweep: Option<(Duration, Duration)>,
    next_key: Key,
    alarm: Option<OwnedFd>,
    /// What the alarm is set to.
    alarm_set: Option<Duration>,
}

impl Launcher {
    fn settle(root: OwnedFd, places: &Places, trust: Trust) -> Result<Self, LauncherError> {
        let failed = |doing| move |source| LauncherError::Settle { doing, source };
        let errno = |doing| move |e: Errno| LauncherError::Settle { doing, source: e.into() };
        // Blocked for the launcher; the command unblocks them, and finds default actions.
        process::block_all_signals().map_err(errno("block signals"))?;
        process::reset_signals();
        refuse_foreign_proc().map_err(failed(
            "find ourselves in /proc: it must be the one of our pid namespace, mount it anew",
        ))?;
        let mut host = Host::load(places)?;
        host.trust(trust);
        // Everything that the environment decides is decided: it may hold anything.
        process::wipe_argv_and_environ().map_err(failed("wipe argv and environ"))?;
        // With the caller's 077 the exec could not read the root that is made for it.
        let umask = rustix::process::umask(FileMode::empty());
        process::set_name(c"sublet-launch").map_err(errno("set the process name"))?;
        // Inherited by every exec: were a core ever written, no memory would be in it (core(5)).
        std::fs::write("/proc/self/coredump_filter", "0").map_err(failed("set coredump_filter"))?;
        memory::forbid_core_dumps().map_err(failed("forbid core dumps"))?;
        let mode = Mode::detect(host.config.host.uid_pool)?;
        if mode == Mode::Rootless {
            identity::enter_own_namespaces()?;
        }
        memory::set_dumpable(false).map_err(failed("become undumpable"))?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        // Not std's count, which walks the cgroup hierarchy for it.
        let cpus = rustix::thread::sched_getaffinity(None)?.count() as usize;
        let setting = Setting {
            host,
            profiles: Profiles::default(),
            mode,
            landlock_abi: landlock::abi_version(),
            cpus,
            umask,
            proc_is_masked: super::exec::proc_is_masked(),
            cgroups: Cgroups::open(mode).map_err(|e| compile::chain(&e)),
        };
        let warm = match trust {
            // One exec, and the end.
            Trust::Invoker => Pool::default(),
            Trust::Host => Pool::new(setting.host.config.host.warm.0),
        };
        let mut launcher = Self {
            sessions: BTreeMap::from([(ROOT, root)]),
            epoll,
            setting,
            execs: BTreeMap::new(),
            helpers: BTreeMap::new(),
            warm,
            sweep: (trust == Trust::Host).then_some((Duration::ZERO, SWEEP_AGAIN[0])),
            next_key: ROOT + 1,
            alarm: None,
            alarm_set: None,
        };
        if let (Trust::Host, Ok(cgroups)) = (trust, &launcher.setting.cgroups) {
            // What a launcher that was killed left.
            cgroups.sweep();
        }
        launcher.watch(launcher.sessions[&ROOT].as_fd(), Token::Session(ROOT))?;
        launcher.sweep(clock::boottime());
        Ok(launcher)
    }

    /// Removes the cgroups of launchers that were killed, when it is time to.
    fn sweep(&mut self, now: Duration) {
        let Some((_, pause)) = self.sweep.take_if(|(at, _)| *at <= now) else { return };
        if let (Ok(cgroups), Mode::Privileged) = (&self.setting.cgroups, self.setting.mode)
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

    fn watch(&self, fd: BorrowedFd<'_>, token: Token) -> Result<(), Errno> {
        let data = epoll::EventData::new_u64(token.encode());
        epoll::add(&self.epoll, fd, data, epoll::EventFlags::IN)
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
        self.set_alarm()?;
        // What is wanted ahead is built when nothing else is to be done.
        let patience = self.warm.is_wanting().then_some(Timespec { tv_sec: 0, tv_nsec: 0 });
        let count = match epoll::wait(&self.epoll, &mut events, patience.as_ref()) {
            Ok(0) if patience.is_some() => {
                self.warm.refill(&self.setting);
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
                Token::Alarm => self.clear_alarm()?,
                Token::Socket(key) => self.hear(key)?,
                Token::Process(key) => self.ended(key)?,
                Token::Helper(key) => self.helper_ended(key)?,
            }
        }
        self.on_time()?;
        Ok(true)
    }

    /// Wakes the loop at the next moment that counts, on the clock that leases are measured on: a wait of
    /// epoll's own would stand still in suspend (timerfd_create(2)).
    fn set_alarm(&mut self) -> Result<(), LauncherError> {
        let next = self.next_time();
        if next == self.alarm_set {
            return Ok(());
        }
        let alarm = match &self.alarm {
            Some(alarm) => alarm,
            None => {
                let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
                let alarm = timerfd_create(TimerfdClockId::Boottime, flags)?;
                self.watch(alarm.as_fd(), Token::Alarm)?;
                self.alarm.insert(alarm)
            }
        };
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        // A moment that has passed goes off at once; all zeros would disarm.
        let at = next.map_or(zero, |at| Timespec {
            tv_sec: at.as_secs() as i64,
            tv_nsec: i64::from(at.subsec_nanos()).max(1),
        });
        let timer = Itimerspec { it_interval: zero, it_value: at };
        timerfd_settime(alarm, TimerfdTimerFlags::ABSTIME, &timer)?;
        self.alarm_set = next;
        Ok(())
    }

    fn clear_alarm(&mut self) -> Result<(), LauncherError> {
        self.alarm_set = None;
        let mut expirations = [0; 8];
        match self.alarm.as_ref().map(|alarm| rustix::io::read(alarm, &mut expirations)) {
            None | Some(Ok(_) | Err(Errno::AGAIN | Errno::INTR)) => Ok(()),
            Some(Err(e)) => Err(e.into()),
        }
    }

    fn next_time(&self) -> Option<Duration> {
        let execs = self.execs.values().filter_map(|live| live.exec.next_time());
        let helpers = self.helpers.values().map(|(helper, _)| helper.deadline);
        let sweep = self.sweep.map(|(at, _)| at);
        execs.chain(helpers).chain(self.warm.next_time()).chain(sweep).min()
    }

    /// The next order of a session. False when it was the root's last.
    fn listen(&mut self, session: Key) -> Result<bool, LauncherError> {
        let Some(socket) = self.sessions.get(&session) else { return Ok(true) };
        match wire::receive::<Order>(socket.as_fd()) {
            Ok((order, fds)) => self.obey(session, order, fds).map(|()| true),
            Err(WireError::Gone) if session == ROOT => Ok(false),
            Err(e) if session == ROOT => Err(e.into()),
            Err(WireError::Gone) => self.end_session(session).map(|()| true),
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
        for live in self.execs.values_mut().filter(|live| live.session == session) {
            live.exec.kill();
        }
        for (helper, of) in self.helpers.values() {
            if *of == session {
                helper.kill()?;
            }
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
        self.watch(socket.as_fd(), Token::Session(key))?;
        self.sessions.insert(key, socket);
        Ok(())
    }

    fn key_of(&self, session: Key, exec: ExecNumber) -> Option<Key> {
        let of = |(_, live): &(&Key, &Live)| live.session == session && live.exec.number == exec;
        self.execs.iter().find(of).map(|(key, _)| *key)
    }

    fn obey(&mut self, session: Key, order: Order, fds: Vec<OwnedFd>) -> Result<(), LauncherError> {
        match order {
            Order::Prepare(prepare) => self.prepare(session, *prepare),
            Order::Start { exec, deliveries, deadline } => {
                self.with(session, exec, |e| e.start(deliveries, deadline))
            }
            Order::Signal { exec, signal } => self.with(session, exec, |e| e.signal(signal)),
            Order::Extend { exec, delivery, expires } => self.with(session, exec, |e| {
                e.extend(delivery as usize, expires);
                Ok(())
            }),
            Order::Revoke { exec, delivery } => self.with(session, exec, |e| {
                e.revoke(delivery as usize);
                Ok(())
            }),
            Order::Kill { exec } => self.with(session, exec, |e| {
                e.kill();
                Ok(())
            }),
            Order::OpenSource { secret } => self.open_source(session, &secret),
            Order::Session if session == ROOT => self.open_session(fds),
            Order::KeepHead { head } if session == ROOT => {
                let refusal = self.keep_head(&head).err().map(|e| Refusal {
                    kind: RefusalKind::Launch,
                    message: format!(
                        "could not keep the trail's head in {}: {e}",
                        self.setting.host.state_dir.join(HEAD_FILE).display()
                    ),
                    hint: "check the space and the mode of the state directory".to_owned(),
                });
                self.notify(session, &Notice::HeadKept { refusal }, &[])
            }
            Order::Session | Order::KeepHead { .. } => {
                eprintln!("sublet: launcher: a session ends: its orders are the root session's");
                self.end_session(session)
            }
            Order::Explain(prepare) => {
                let explanation = explain::explain(&prepare, &self.setting);
                self.notify(session, &Notice::Explained { explanation }, &[])
            }
        }
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

    fn prepare(&mut self, session: Key, prepare: wire::Prepare) -> Result<(), LauncherError> {
        let number = prepare.exec;
        let Some(socket) = self.sessions.get(&session) else { return Ok(()) };
        if self.key_of(session, number).is_some() || prepare.argv.is_empty() {
            let refusal = Refusal {
                kind: RefusalKind::Invalid,
                message: "an exec needs a number of its own and a command".to_owned(),
                hint: String::new(),
            };
            return self.notify(session, &Notice::Refused { exec: number, refusal }, &[]);
        }
        let prepared = |ends: super::exec::BrokerEnds| {
            let fds: Vec<_> = ends.fds.iter().map(AsFd::as_fd).collect();
            let notice = Notice::Prepared { exec: number, uid: ends.uid };
            // A broker that is gone is seen in the next turn.
            if let Err(e) = tell(socket.as_fd(), session, &notice, &fds) {
                eprintln!("sublet: launcher: {}", compile::chain(&e));
            }
        };
        match Exec::prepare(prepare, &self.setting, &mut self.warm, prepared) {
            Ok(exec) => {
                let key = self.fresh_key();
                self.watch(exec.socket(), Token::Socket(key))?;
                self.watch(exec.pidfd(), Token::Process(key))?;
                self.execs.insert(key, Live { exec, session });
                Ok(())
            }
            Err(refusal) => self.notify(session, &Notice::Refused { exec: number, refusal }, &[]),
        }
    }

    /// Does something with an exec; what cannot be done ends it.
    fn with(
        &mut self,
        session: Key,
        number: ExecNumber,
        act: impl FnOnce(&mut Exec) -> Result<(), Refusal>,
    ) -> Result<(), LauncherError> {
        // It may have ended while the order was under way.
        let Some(key) = self.key_of(session, number) else { return Ok(()) };
        let Some(live) = self.execs.get_mut(&key) else { return Ok(()) };
        if let Err(refusal) = act(&mut live.exec) {
            live.exec.refuse(refusal);
        }
        Ok(())
    }

    fn hear(&mut self, key: Key) -> Result<(), LauncherError> {
        let Some(Live { exec, session }) = self.execs.get_mut(&key) else { return Ok(()) };
        let (number, session) = (exec.number, *session);
        match exec.hear(&self.setting) {
            Ok(Happened::Nothing) => Ok(()),
            Ok(Happened::Silence) => {
                epoll::delete(&self.epoll, exec.socket())?;
                Ok(())
            }
            Ok(Happened::Ready(posture, terminal)) => {
                let fds: Vec<_> = terminal.iter().map(AsFd::as_fd).collect();
                self.notify(session, &Notice::Ready { exec: number, posture }, &fds)
            }
            Ok(Happened::Ending(ending, deliveries)) => {
                self.notify(session, &Notice::Ending { exec: number, ending, deliveries }, &[])
            }
            Ok(Happened::Started) => self.notify(session, &Notice::Started { exec: number }, &[]),
            Err(refusal) => {
                exec.refuse(refusal);
                Ok(())
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
        self.warm.want(exec.spec());
        let notice = match exec.end() {
            Ok((ending, deliveries)) => Notice::Ended { exec: number, ending, deliveries },
            Err(refusal) => Notice::Refused { exec: number, refusal },
        };
        self.notify(session, &notice, &[])
    }

    fn open_source(
        &mut self,
        session: Key,
        secret: &crate::model::name::SecretName,
    ) -> Result<(), LauncherError> {
        match source::open(&self.setting.host.config, secret) {
            Err(refusal) => self.notify(session, &Notice::SourceRefused { refusal }, &[]),
            Ok(opened) => {
                let notice = Notice::Source { helper: opened.helper.is_some() };
                self.notify(session, &notice, &[opened.reader.as_fd()])?;
                if let Some(helper) = opened.helper {
                    let key = self.fresh_key();
                    self.watch(helper.pidfd.as_fd(), Token::Helper(key))?;
                    self.helpers.insert(key, (helper, session));
                }
                Ok(())
            }
        }
    }

    fn helper_ended(&mut self, key: Key) -> Result<(), LauncherError> {
        let Some((helper, session)) = self.helpers.remove(&key) else { return Ok(()) };
        epoll::delete(&self.epoll, helper.pidfd.as_fd())?;
        let refusal = helper.reap(clock::boottime());
        self.notify(session, &Notice::SourceEnded { refusal }, &[])
    }

    fn on_time(&mut self) -> Result<(), LauncherError> {
        let now = clock::boottime();
        self.warm.on_time(now);
        self.sweep(now);
        for (helper, _) in self.helpers.values().filter(|(h, _)| h.deadline <= now) {
            helper.kill()?;
        }
        let mut notices = Vec::new();
        for Live { exec, session } in self.execs.values_mut() {
            if exec.next_time().is_none_or(|at| at > now) {
                continue;
            }
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
        }
        for (session, notice) in notices {
            self.notify(session, &notice, &[])?;
        }
        Ok(())
    }

    /// Written in place: the encoding tells a torn write from a rollback. Not synced: it is for tampering,
    /// and what a power cut may take from the trail it may take from here.
    fn keep_head(&self, head: &[u8]) -> io::Result<()> {
        let path = self.setting.host.state_dir.join(HEAD_FILE);
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            // A broker that is not root compares the trail with it. A number and a hash are no secret.
            .mode(0o644)
            .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC)
            .open(path)?;
        file.write_all(head)
    }

    /// The broker is gone: nothing lives on.
    fn leave(&mut self) {
        self.warm.clear();
        for live in self.execs.values_mut() {
            live.exec.kill();
        }
        for (helper, _) in self.helpers.values() {
            if let Err(e) = helper.kill() {
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
        if let (Ok(cgroups), Mode::Privileged) = (&self.setting.cgroups, self.setting.mode) {
            cgroups.sweep();
        }
    }
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
