//! From the fork to the first order. What hangs on nothing that the broker tells is done first, while the
//! broker still reads its command line.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::event::epoll;
use rustix::fs::Mode as FileMode;
use rustix::io::Errno;

use super::agenda::Agenda;
use super::alarm::Alarm;
use super::watched::{ROOT, Token};
use super::{Launcher, LauncherError, SWEEP_AGAIN, watch};
use crate::config::UidPool;
use crate::host::{self, Host, Trust};
use crate::launcher::exec::{Cots, Pool, Seeds, Setting};
use crate::launcher::mint;
use crate::launcher::surroundings::Surroundings;
use crate::launcher::wire::{self, Order, WireError};
use crate::model::id::ExecId;
use crate::sandbox::identity::{self, IdentityError, Mode};
use crate::sys::{clock, memory, process, slice};

impl Launcher {
    pub(super) fn settle(
        root: OwnedFd,
        trust: Trust,
        ahead: Option<&ExecId>,
    ) -> Result<Self, LauncherError> {
        let failed = |doing| move |source| LauncherError::Settle { doing, source };
        let errno = |doing| move |e: Errno| LauncherError::Settle { doing, source: e.into() };
        // Blocked for the launcher; the command unblocks them, and finds default actions.
        process::block_all_signals().map_err(errno("block signals"))?;
        process::reset_signals();
        refuse_foreign_proc().map_err(failed(
            "find ourselves in /proc: it must be the one of our pid namespace, mount it anew",
        ))?;
        // With the caller's 077 the exec could not read the root that is made for it.
        let umask = rustix::process::umask(FileMode::empty());
        let slice = slice::shorten();
        process::set_name(c"sublet-launch").map_err(errno("set the process name"))?;
        // Inherited by every exec: were a core ever written, no memory would be in it (core(5)).
        std::fs::write("/proc/self/coredump_filter", "0").map_err(failed("set coredump_filter"))?;
        memory::forbid_core_dumps().map_err(failed("forbid core dumps"))?;
        let program = mint::Program::own().map_err(failed("open this program"))?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let defaults = host::Defaults::of_environment();
        // Everything that the environment decides is decided: it may hold anything.
        process::wipe_argv_and_environ().map_err(failed("wipe argv and environ"))?;

        // The configuration may name another pool of uids, and then this is another mode.
        let mode = match Mode::detect(UidPool::default()) {
            Err(IdentityError::HostsRoot { .. }) => Mode::Rootless,
            detected => detected?,
        };
        let mut here = Surroundings::survey(mode, umask, slice)?;
        let mut seeds = Seeds::default();
        if here.mode == Mode::Privileged {
            memory::set_dumpable(false).map_err(failed("become undumpable"))?;
            if let Some(exec) = ahead {
                // What fails here fails again when the exec is asked for, and is told then.
                match seeds.plant(exec, &here) {
                    Ok(()) | Err(_) => {}
                }
            }
        }

        let places = match wire::receive(root.as_fd())? {
            (Order::Settle(places), _) => places,
            _ => return Err(WireError::Malformed(postcard::Error::DeserializeBadEnum).into()),
        };
        let mut host = Host::load_with(&places, defaults)?;
        host.trust(trust);
        let mode = Mode::detect(host.config.host.uid_pool)?;
        if mode != here.mode {
            seeds.clear();
            here = Surroundings::survey(mode, umask, slice)?;
        }
        if mode == Mode::Rootless {
            // Else its own maps are not its to write (proc(5)).
            memory::set_dumpable(true).map_err(failed("become dumpable"))?;
            identity::enter_own_namespaces()?;
            memory::set_dumpable(false).map_err(failed("become undumpable"))?;
        }
        let setting = Setting { host, here };
        let warm = match trust {
            // One exec, and the end.
            Trust::Invoker => Pool::default(),
            Trust::Host => Pool::new(setting.host.config.host.warm.0),
        };
        if trust == Trust::Host {
            // While low numbers are free.
            seeds.cots = Some(Cots::keep().map_err(failed("keep descriptors"))?);
        }
        let mut launcher = Self {
            sessions: BTreeMap::from([(ROOT, root)]),
            epoll,
            setting,
            execs: BTreeMap::new(),
            helpers: BTreeMap::new(),
            program,
            warm,
            seeds,
            ahead: BTreeMap::new(),
            remains: Vec::new(),
            quiet_at: Some(Duration::ZERO),
            is_for_many: trust == Trust::Host,
            sweep: (trust == Trust::Host).then_some((Duration::ZERO, SWEEP_AGAIN[0])),
            next_key: ROOT + 1,
            numbers: BTreeMap::new(),
            agenda: Agenda::default(),
            alarm: Alarm::default(),
        };
        if let Some(exec) = ahead.filter(|_| launcher.seeds.is_wanting()) {
            match launcher.seeds.plant(exec, &launcher.setting.here) {
                Ok(()) | Err(_) => {}
            }
        }
        watch(&launcher.epoll, launcher.sessions[&ROOT].as_fd(), Token::Session(ROOT))?;
        launcher.sweep(clock::boottime());
        Ok(launcher)
    }
}

/// Maps are written to /proc by number: in the /proc of another pid namespace that is another process.
fn refuse_foreign_proc() -> io::Result<()> {
    let number = std::fs::read_link("/proc/self")?;
    if number.as_os_str() == std::process::id().to_string().as_str() {
        return Ok(());
    }
    Err(io::Error::other(format!("/proc/self is {}, not {}", number.display(), std::process::id())))
}
