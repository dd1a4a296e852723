//! The launcher's loop: one thread, one epoll, orders in, notices out. When the broker is gone, every
//! exec dies, every delivery is wiped, and the launcher ends.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::time::Duration;

use rustix::event::{Timespec, epoll};
use rustix::fs::Mode as FileMode;
use rustix::io::Errno;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, timerfd_create, timerfd_settime,
};

use super::compile;
use super::exec::{Exec, Happened, Setting};
use super::explain;
use super::source::{self, Helper};
use super::wire::{self, ExecNumber, Notice, Order, Refusal, RefusalKind, WireError};
use crate::host::{Host, Places};
use crate::sandbox::cgroup::Cgroups;
use crate::sandbox::identity::{self, Mode};
use crate::sys::{clock, landlock, memory, process};

/// How long execs have to die when the broker is gone, before the launcher leaves without them: their
/// init then dies with it (lifeline), and only their cgroup's directory waits for the next start.
const LAST_WAIT: Duration = Duration::from_secs(5);

/// Where the trail's head is kept, in the state directory.
pub const HEAD_FILE: &str = "trail.head";

/// What an epoll entry stands for: an exec's number, shifted, and which of its descriptors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Token {
    Broker,
    Socket(ExecNumber),
    Process(ExecNumber),
    Helper(ExecNumber),
    Alarm,
}

impl Token {
    fn encode(self) -> u64 {
        match self {
            Token::Broker => 0,
            Token::Alarm => !3,
            Token::Socket(n) => u64::from(n) << 2 | 1,
            Token::Process(n) => u64::from(n) << 2 | 2,
            Token::Helper(n) => u64::from(n) << 2 | 3,
        }
    }

    fn decode(word: u64) -> Self {
        let number = (word >> 2) as ExecNumber;
        match word & 3 {
            1 => Token::Socket(number),
            2 => Token::Process(number),
            3 => Token::Helper(number),
            _ if word == Token::Alarm.encode() => Token::Alarm,
            _ => Token::Broker,
        }
    }
}

/// Runs as the launcher until the broker is gone. The status to exit with.
pub fn run(broker: OwnedFd, places: &Places) -> i32 {
    let voice = broker.try_clone();
    match Launcher::settle(broker, places) {
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
    broker: OwnedFd,
    epoll: OwnedFd,
    setting: Setting,
    execs: BTreeMap<ExecNumber, Exec>,
    helpers: BTreeMap<ExecNumber, Helper>,
    next_helper: ExecNumber,
    alarm: Option<OwnedFd>,
    /// What the alarm is set to.
    alarm_set: Option<Duration>,
}

impl Launcher {
    fn settle(broker: OwnedFd, places: &Places) -> Result<Self, LauncherError> {
        let failed = |doing| move |source| LauncherError::Settle { doing, source };
        let errno = |doing| move |e: Errno| LauncherError::Settle { doing, source: e.into() };
        // Blocked for the launcher; the command unblocks them, and finds default actions.
        process::block_all_signals().map_err(errno("block signals"))?;
        process::reset_signals();
        refuse_foreign_proc().map_err(failed(
            "find ourselves in /proc: it must be the one of our pid namespace, mount it anew",
        ))?;
        let host = Host::load(places)?;
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
            mode,
            landlock_abi: landlock::abi_version(),
            cpus,
            umask,
            proc_is_masked: super::exec::proc_is_masked(),
            cgroups: Cgroups::open(mode).map_err(|e| compile::chain(&e)),
        };
        let launcher = Self {
            broker,
            epoll,
            setting,
            execs: BTreeMap::new(),
            helpers: BTreeMap::new(),
            next_helper: 0,
            alarm: None,
            alarm_set: None,
        };
        launcher.watch(launcher.broker.as_fd(), Token::Broker)?;
        Ok(launcher)
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
        let count = match epoll::wait(&self.epoll, &mut events, None) {
            Ok(count) => count,
            Err(Errno::INTR) => 0,
            Err(e) => return Err(e.into()),
        };
        for event in &events[..count] {
            match Token::decode(event.data.u64()) {
                Token::Broker => match wire::receive::<Order>(self.broker.as_fd()) {
                    Ok((order, _fds)) => self.obey(order)?,
                    Err(WireError::Gone) => return Ok(false),
                    Err(e) => return Err(e.into()),
                },
                Token::Alarm => self.clear_alarm()?,
                Token::Socket(number) => self.hear(number)?,
                Token::Process(number) => self.ended(number)?,
                Token::Helper(number) => self.helper_ended(number)?,
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
        let execs = self.execs.values().filter_map(Exec::next_time);
        execs.chain(self.helpers.values().map(|h| h.deadline)).min()
    }

    fn obey(&mut self, order: Order) -> Result<(), LauncherError> {
        match order {
            Order::Prepare(prepare) => self.prepare(*prepare),
            Order::Start { exec, deliveries, deadline } => {
                self.with(exec, |e| e.start(deliveries, deadline))
            }
            Order::Signal { exec, signal } => self.with(exec, |e| e.signal(signal)),
            Order::Revoke { exec, delivery } => self.with(exec, |e| {
                e.revoke(delivery as usize);
                Ok(())
            }),
            Order::Kill { exec } => self.with(exec, |e| {
                e.kill();
                Ok(())
            }),
            Order::OpenSource { secret } => self.open_source(&secret),
            Order::KeepHead { head } => {
                let refusal = self.keep_head(&head).err().map(|e| Refusal {
                    kind: RefusalKind::Launch,
                    message: format!(
                        "could not keep the trail's head in {}: {e}",
                        self.setting.host.state_dir.join(HEAD_FILE).display()
                    ),
                    hint: "check the space and the mode of the state directory".to_owned(),
                });
                self.notify(&Notice::HeadKept { refusal }, &[])
            }
            Order::Explain(prepare) => {
                let explanation = explain::explain(&prepare, &self.setting);
                self.notify(&Notice::Explained { explanation }, &[])
            }
        }
    }

    fn notify(&self, notice: &Notice, fds: &[BorrowedFd<'_>]) -> Result<(), LauncherError> {
        match wire::send(self.broker.as_fd(), notice, fds) {
            // Its end shows on the socket.
            Ok(()) | Err(WireError::Gone) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    fn prepare(&mut self, prepare: wire::Prepare) -> Result<(), LauncherError> {
        let number = prepare.exec;
        if self.execs.contains_key(&number) || prepare.argv.is_empty() {
            let refusal = Refusal {
                kind: RefusalKind::Invalid,
                message: "an exec needs a number of its own and a command".to_owned(),
                hint: String::new(),
            };
            return self.notify(&Notice::Refused { exec: number, refusal }, &[]);
        }
        let broker = self.broker.as_fd();
        let prepared = |ends: super::exec::BrokerEnds| {
            let fds: Vec<_> = ends.fds.iter().map(AsFd::as_fd).collect();
            // If the broker is gone its socket says so in the next turn.
            match wire::send(broker, &Notice::Prepared { exec: number, uid: ends.uid }, &fds) {
                Ok(()) | Err(WireError::Gone) => {}
                Err(e) => eprintln!("sublet: launcher: {}", compile::chain(&e)),
            }
        };
        match Exec::prepare(prepare, &self.setting, None, prepared) {
            Ok(exec) => {
                self.watch(exec.socket(), Token::Socket(number))?;
                self.watch(exec.pidfd(), Token::Process(number))?;
                self.execs.insert(number, exec);
                Ok(())
            }
            Err(refusal) => self.notify(&Notice::Refused { exec: number, refusal }, &[]),
        }
    }

    /// Does something with an exec; what cannot be done ends it.
    fn with(
        &mut self,
        number: ExecNumber,
        act: impl FnOnce(&mut Exec) -> Result<(), Refusal>,
    ) -> Result<(), LauncherError> {
        // It may have ended while the order was under way.
        let Some(exec) = self.execs.get_mut(&number) else { return Ok(()) };
        match act(exec) {
            Ok(()) => Ok(()),
            Err(refusal) => self.give_up(number, refusal),
        }
    }

    fn give_up(&mut self, number: ExecNumber, refusal: Refusal) -> Result<(), LauncherError> {
        if let Some(exec) = self.execs.get_mut(&number) {
            exec.refuse(refusal);
        }
        Ok(())
    }

    fn hear(&mut self, number: ExecNumber) -> Result<(), LauncherError> {
        let Some(exec) = self.execs.get_mut(&number) else { return Ok(()) };
        match exec.hear(&self.setting) {
            Ok(Happened::Nothing) => Ok(()),
            Ok(Happened::Silence) => {
                epoll::delete(&self.epoll, exec.socket())?;
                Ok(())
            }
            Ok(Happened::Ready(posture, terminal)) => {
                let fds: Vec<_> = terminal.iter().map(AsFd::as_fd).collect();
                self.notify(&Notice::Ready { exec: number, posture }, &fds)
            }
            Ok(Happened::Ending(ending, deliveries)) => {
                self.notify(&Notice::Ending { exec: number, ending, deliveries }, &[])
            }
            Ok(Happened::Started) => self.notify(&Notice::Started { exec: number }, &[]),
            Err(refusal) => self.give_up(number, refusal),
        }
    }

    fn ended(&mut self, number: ExecNumber) -> Result<(), LauncherError> {
        let Some(exec) = self.execs.remove(&number) else { return Ok(()) };
        for fd in [exec.socket(), exec.pidfd()] {
            match epoll::delete(&self.epoll, fd) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(e) => return Err(e.into()),
            }
        }
        let notice = match exec.end() {
            Ok((ending, deliveries)) => Notice::Ended { exec: number, ending, deliveries },
            Err(refusal) => Notice::Refused { exec: number, refusal },
        };
        self.notify(&notice, &[])
    }

    fn open_source(
        &mut self,
        secret: &crate::model::name::SecretName,
    ) -> Result<(), LauncherError> {
        match source::open(&self.setting.host.config, secret) {
            Err(refusal) => self.notify(&Notice::SourceRefused { refusal }, &[]),
            Ok(opened) => {
                let notice = Notice::Source { helper: opened.helper.is_some() };
                self.notify(&notice, &[opened.reader.as_fd()])?;
                if let Some(helper) = opened.helper {
                    let number = self.next_helper;
                    self.next_helper = self.next_helper.wrapping_add(1);
                    self.watch(helper.pidfd.as_fd(), Token::Helper(number))?;
                    self.helpers.insert(number, helper);
                }
                Ok(())
            }
        }
    }

    fn helper_ended(&mut self, number: ExecNumber) -> Result<(), LauncherError> {
        let Some(helper) = self.helpers.remove(&number) else { return Ok(()) };
        epoll::delete(&self.epoll, helper.pidfd.as_fd())?;
        let refusal = helper.reap(clock::boottime());
        self.notify(&Notice::SourceEnded { refusal }, &[])
    }

    fn on_time(&mut self) -> Result<(), LauncherError> {
        let now = clock::boottime();
        for helper in self.helpers.values().filter(|h| h.deadline <= now) {
            helper.kill()?;
        }
        let mut notices = Vec::new();
        let mut failed = Vec::new();
        for (&number, exec) in &mut self.execs {
            if exec.next_time().is_none_or(|at| at > now) {
                continue;
            }
            match exec.on_time(now) {
                Ok((expired, timed_out)) => {
                    let expired = expired
                        .into_iter()
                        .map(|delivery| Notice::Expired { exec: number, delivery });
                    notices.extend(expired);
                    notices.extend(timed_out.then_some(Notice::TimedOut { exec: number }));
                }
                Err(refusal) => failed.push((number, refusal)),
            }
        }
        for notice in notices {
            self.notify(&notice, &[])?;
        }
        for (number, refusal) in failed {
            self.give_up(number, refusal)?;
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
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC)
            .open(path)?;
        file.write_all(head)
    }

    /// The broker is gone: nothing lives on.
    fn leave(&mut self) {
        for exec in self.execs.values_mut() {
            exec.kill();
        }
        for helper in self.helpers.values() {
            if let Err(e) = helper.kill() {
                eprintln!("sublet: launcher: could not kill a source's command: {e}");
            }
        }
        let until = clock::boottime() + LAST_WAIT;
        while let Some((_, exec)) = self.execs.pop_first() {
            let left = until.saturating_sub(clock::boottime());
            let timeout =
                Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
            let mut fds = [rustix::event::PollFd::from_borrowed_fd(
                exec.pidfd(),
                rustix::event::PollFlags::IN,
            )];
            match rustix::event::poll(&mut fds, Some(&timeout)) {
                Ok(0) | Err(_) => eprintln!(
                    "sublet: launcher: an exec is stuck in the kernel; it dies with its init"
                ),
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
