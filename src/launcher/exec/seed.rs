//! What of a sandbox is the same whatever it is for: a child in namespaces of its own, away from the host's
//! mounts in a root that is still empty, with a cgroup. Made before there is an exec for it,
//! since the kernel takes its time for namespaces, and in that time other things can be done.
//!
//! A seed becomes one exec's sandbox, or is given back. It holds no value, no lease, no command, and of a
//! profile nothing but whether its network is its own, and the ground of a root like the last exec's, which is
//! taken away where another is wanted. Its child may know whom it is to be; an exec that is to be someone else
//! takes another seed.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::cots::Cots;
use super::parts::{inner_rules, namespaces};
use super::sandbox::{Sandbox, size_of_root};
use super::user::{Ids, User};
use super::words::{self, clone_refusal};
use super::{refuse, refuse_error, tell};
use crate::config::UidPool;
use crate::launcher::compile::{self, Compiled};
use crate::launcher::surroundings::Surroundings;
use crate::launcher::wire::{Refusal, RefusalKind};
use crate::model::id::ExecId;
use crate::profile::NetworkMode;
use crate::sandbox::cgroup::Cgroup;
use crate::sandbox::ground::{Ground, Wanted};
use crate::sandbox::identity::{self, Identity, Mode};
use crate::sandbox::layout::Layout;
use crate::sandbox::plan::{Plan, ProcMount};
use crate::sandbox::step::{self, Said, Told};
use crate::sandbox::{child, root};
use crate::sys::cpu;
use crate::sys::process::{self, CloneArgs, Cloned};
use crate::sys::slate::Slate;
use crate::sys::socket;

/// How long a child that is given up has to die. What takes longer is stuck in the kernel, has been
/// killed, and is reaped by nobody but the launcher's own end.
const LAST_WAIT: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// How long a child has to leave the launcher's descriptors, its first act: the launcher does nothing meanwhile.
const PATIENCE: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };

/// The init of an exec, and what it holds of this host. Dropped, it is killed and all is given back.
pub(super) struct Child {
    pub pid: i32,
    pub pidfd: OwnedFd,
    pub socket: OwnedFd,
    /// Init polls the other end; closing this, by death too, ends the tree.
    _lifeline: OwnedFd,
    /// Until the go.
    pub slate: Option<Slate>,
    pub cgroup: Option<Cgroup>,
    pub uid_lock: Option<OwnedFd>,
    /// Its mount namespace: while this is open, init's end does not wait for the kernel to take the mounts
    /// down, which is done when this is closed, after the exec's end was told. No process is in it then.
    _mounts: Option<OwnedFd>,
    pub reaped: bool,
}

pub(super) struct Seed {
    pub child: Child,
    /// Why it has no cgroup, if it has none.
    pub without_cgroup: Option<String>,
    /// The root's own tmpfs, and what was laid in it.
    pub root: OwnedFd,
    pub ground: Option<Ground>,
    /// Whom its child was told that it is.
    pub settled: Option<Identity>,
    pub proc_mount: ProcMount,
    network: NetworkMode,
}

impl Seed {
    /// Clones the child, which goes on by itself. What it cannot do shows on its socket. `joined`: the network
    /// namespace of a container. `cots`: beside many execs.
    pub fn plant(
        name: &ExecId,
        network: NetworkMode,
        joined: Option<&OwnedFd>,
        here: &Surroundings,
        mut cots: Option<&mut Cots>,
    ) -> Result<Self, Refusal> {
        let failed = |e: &dyn std::error::Error| refuse_error(e, "");
        let cgroup = here
            .cgroups
            .as_ref()
            .map_err(Clone::clone)
            .and_then(|cgroups| cgroups.make(name).map_err(|e| compile::chain(&e)));
        let (cgroup, without_cgroup) = match cgroup {
            Ok(cgroup) => (Some(cgroup), None),
            Err(why) => (None, Some(why)),
        };
        let root = root::make_tmpfs().map_err(|e| failed(&e))?;
        let (ours, theirs) = socket::packet_pair().map_err(|e| failed(&e))?;
        let (lifeline_read, lifeline_write) = io::pipe().map_err(|e| failed(&e))?;
        let all = namespaces(network);
        let is_masked = here.mode == Mode::Privileged && here.proc_is_masked;
        let (now, late, proc_mount) = if is_masked || joined.is_some() {
            // Where it is masked the kernel refuses a new /proc from inside the user namespace; and another's
            // network namespace is joined before there is one, which must then come later than the pid
            // namespace whose /proc it is.
            let now = libc::CLONE_NEWPID as u64;
            (now, all & !now, ProcMount::BeforeUserNamespace)
        } else {
            let late = all & libc::CLONE_NEWNET as u64;
            (all & !late, late, ProcMount::Inside)
        };
        let shares_descriptors = cots.is_some();
        let mut lay = |place: usize, fd: OwnedFd| match &mut cots {
            Some(cots) => cots.lay(place, fd).map_err(|e| failed(&e)),
            None => Ok(fd),
        };
        let (theirs, lifeline_read) = (lay(0, theirs)?, lay(1, lifeline_read.into())?);
        let own_root = lay(2, root.try_clone().map_err(|e| failed(&e))?)?;
        let network_to_join = joined.map(OwnedFd::try_clone).transpose().map_err(|e| failed(&e))?;
        let network_to_join = network_to_join.map(|fd| lay(3, fd)).transpose()?;
        let mut plan = Plan {
            namespaces: now,
            late_namespaces: late,
            proc_mount,
            network: network_to_join,
            root: Some(own_root),
            hostname: c"sublet".to_owned(),
            loopback: network != NetworkMode::Host,
            inner_rules: inner_rules(here.landlock_abi),
            init_filter: compile::builtin_filter("init")?,
            socket: theirs,
            lifeline: lifeline_read,
            shares_descriptors,
            umask: here.umask,
            slice: here.slice,
            launchers_cpu: cpu::current(),
            uid_lock: None,
            slate: Some(Slate::new().map_err(|e| failed(&e))?),
        };
        // Rootless, the child's maps can be written only while it is dumpable (proc(5)).
        let dumpable = here.mode == Mode::Rootless;
        if dumpable {
            set_dumpable(true)?;
        }
        let args = CloneArgs {
            namespaces: plan.namespaces,
            cgroup: cgroup.as_ref().map(Cgroup::directory),
            shares_descriptors,
        };
        let cloned = match process::clone3(&args) {
            Ok(Cloned::Child) => child::run(&mut plan),
            Ok(Cloned::Parent { pid, pidfd }) => Ok((pid, pidfd)),
            Err(e) => Err(clone_refusal(&e, here.mode)),
        };
        if dumpable {
            set_dumpable(false)?;
        }
        let (pid, pidfd) = cloned?;
        // Only speed hangs on it.
        let mounts = match proc_mount {
            ProcMount::Inside => File::open(format!("/proc/{pid}/ns/mnt")).ok().map(OwnedFd::from),
            ProcMount::BeforeUserNamespace => None,
        };
        let child = Child {
            pid,
            pidfd,
            socket: ours,
            _lifeline: lifeline_write.into(),
            slate: plan.slate.take(),
            cgroup,
            uid_lock: None,
            _mounts: mounts,
            reaped: false,
        };
        if let Some(cots) = cots {
            // Until then what is closed here is closed there.
            child.await_apart()?;
            let Plan { socket, lifeline, root, network, .. } = plan;
            let places = [Some(socket), Some(lifeline), root, network];
            for (fd, place) in places.into_iter().zip(0..) {
                fd.map_or(Ok(()), |fd| cots.take_back(place, fd)).map_err(|e| failed(&e))?;
            }
        }
        // The next child is another exec's.
        if let Some(slate) = &child.slate {
            slate.keep_from_others().map_err(|e| failed(&e))?;
        }
        Ok(Self { child, without_cgroup, root, ground: None, settled: None, proc_mount, network })
    }
}

/// From so many live execs on the next one's child shares the launcher's descriptors at first. Not before: the
/// launcher waits for it to leave them.
const MANY: usize = 64;

/// The seed that stands ready in a launcher, if one does.
#[derive(Default)]
pub struct Seeds {
    ready: Option<Seed>,
    /// Of a launcher of many execs.
    pub cots: Option<Cots>,
    /// How many live.
    pub live: usize,
    /// What the last exec wanted of the network: the next one's wish, most likely.
    network: Option<NetworkMode>,
    /// Whom the next exec is to be; a workspace of these ids is to be mapped for it.
    user: Option<User>,
    on_disk: Option<Ids>,
    /// What its root is to be, and how large.
    layout: Option<(Layout, u64)>,
    /// Who it is to be for itself, if its uid on the host is one of the pool; and whether the exec before wanted
    /// the same.
    inside: Option<Ids>,
    is_steady: bool,
}

impl Seeds {
    /// For an exec that begins.
    pub(super) fn take(
        &mut self,
        name: &ExecId,
        network: NetworkMode,
        identity: &Identity,
        here: &Surroundings,
    ) -> Result<Seed, Refusal> {
        self.network = Some(network);
        let fits = |seed: &Seed| {
            let is_whose = seed.settled.as_ref().is_none_or(|settled| settled == identity);
            seed.network == network && is_whose && !seed.child.is_gone()
        };
        match self.ready.take().filter(fits) {
            Some(seed) => Ok(seed),
            // One that does not fit is gone by now, with its cgroup, which may have the same name.
            None => Seed::plant(name, network, None, here, self.cots()),
        }
    }

    /// For an exec in a container: one of its own, with nothing of an earlier one that stood ready.
    pub(super) fn take_joined(
        &mut self,
        name: &ExecId,
        network: &OwnedFd,
        here: &Surroundings,
    ) -> Result<Seed, Refusal> {
        // It is gone, with its cgroup, which may have the same name.
        self.ready = None;
        Seed::plant(name, NetworkMode::Host, Some(network), here, self.cots())
    }

    /// Whom an exec that begins is to be.
    pub(super) fn user(&mut self, pool: UidPool) -> Result<User, Refusal> {
        self.user.take().map_or_else(|| User::take(pool), Ok)
    }

    /// What the exec wanted: the next one's wish, most likely.
    pub(super) fn want(&mut self, sandbox: &Sandbox, compiled: &Compiled) {
        self.on_disk = sandbox.on_disk(compiled);
        let identity = sandbox.identity;
        let is_pooled = Identity::pooled(compiled.inside, identity.outside_uid) == identity;
        let inside = is_pooled.then_some(compiled.inside);
        // A child is one user's for good: only where two execs in a row were the same inside.
        self.is_steady = inside.is_some() && inside == self.inside;
        self.inside = inside;
        let size = size_of_root(&compiled.profile);
        let is_known =
            |(layout, known): &(Layout, u64)| *known == size && *layout == compiled.layout;
        if !self.layout.as_ref().is_some_and(is_known) {
            self.layout = Some((compiled.layout.clone(), size));
        }
    }

    /// Has a user ready for the next exec, as far as that can be: else it takes its own, and is told why not.
    pub fn prepare_user(&mut self, pool: UidPool) {
        let user = self.user(pool);
        self.user = user
            .and_then(|user| match self.on_disk {
                Some(on_disk) => user.mapping(on_disk),
                None => Ok(user),
            })
            .ok();
    }

    /// Whether [`Seeds::plant`] has something to do.
    pub fn is_wanting(&self) -> bool {
        self.ready.as_ref().is_none_or(|seed| seed.ground.is_none() && self.layout.is_some())
    }

    /// Makes one ahead, or lays the ground of its root, for a moment in which nothing else is to be done.
    ///
    /// # Errors
    /// The next exec tries again, and its caller is told.
    pub fn plant(&mut self, name: &ExecId, here: &Surroundings) -> Result<(), Refusal> {
        let Some(mut seed) = self.ready.take() else {
            let network = self.network.unwrap_or(NetworkMode::None);
            self.ready = Some(Seed::plant(name, network, None, here, self.cots())?);
            return Ok(());
        };
        // Its owner is known where it is one of the pool.
        let (Some((layout, size)), Some(user)) = (&self.layout, &self.user) else {
            self.layout = None;
            self.ready = Some(seed);
            return Ok(());
        };
        let (mode, owner) = (here.mode, (user.uid, user.uid));
        let wanted = Wanted { layout, size: *size, mode, owner };
        match Ground::lay(seed.root.as_fd(), &wanted) {
            Ok(ground) => seed.ground = Some(ground),
            Err(_) => {
                // What stands in its root is of no use, nor is another try. The next exec is told, if it meets the
                // same.
                self.layout = None;
                return Ok(());
            }
        }
        if let Some(inside) = self.inside.filter(|_| self.is_steady)
            && seed.proc_mount == ProcMount::Inside
        {
            let identity = Identity::pooled(inside, user.uid);
            if seed.child.settle(&identity, Some(user.lock.as_fd())).is_err() {
                // Its child is gone, or soon is. The next one is not told ahead.
                (self.inside, self.is_steady) = (None, false);
                return Ok(());
            }
            seed.settled = Some(identity);
        }
        self.ready = Some(seed);
        Ok(())
    }

    fn cots(&mut self) -> Option<&mut Cots> {
        self.cots.as_mut().filter(|_| self.live >= MANY)
    }

    /// Gives it back.
    pub fn clear(&mut self) {
        (self.ready, self.user) = (None, None);
    }
}

impl Child {
    /// Tells it who it is. `lock`: of its uid.
    pub fn settle(&self, identity: &Identity, lock: Option<BorrowedFd<'_>>) -> Result<(), Refusal> {
        let Identity { inside_uid: uid, inside_gid: gid, drop_groups, .. } = *identity;
        identity::write_maps(self.pid, identity).map_err(|e| {
            refuse_error(&e, "run `sublet doctor`: it says who blocks user namespaces")
        })?;
        tell(self.socket.as_fd(), Told::Maps { uid, gid, drop_groups }, lock.as_slice())
    }

    /// Whether its init still waits, and has not said that something failed.
    pub fn waits(&self) -> bool {
        let mut fds =
            [PollFd::new(&self.socket, PollFlags::IN), PollFd::new(&self.pidfd, PollFlags::IN)];
        matches!(poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })), Ok(0))
    }

    /// Waits until it has a table of descriptors of its own.
    fn await_apart(&self) -> Result<(), Refusal> {
        let mut fds =
            [PollFd::new(&self.socket, PollFlags::IN), PollFd::new(&self.pidfd, PollFlags::IN)];
        while let Err(e) = poll(&mut fds, Some(&PATIENCE)) {
            if e != Errno::INTR {
                return Err(refuse_error(&e, ""));
            }
        }
        // Its end alone would not show on the socket, whose other end is still ours too.
        let has_spoken = !fds[0].revents().is_empty();
        let said = has_spoken.then(|| step::hear(self.socket.as_fd(), drop)).transpose();
        match said.map_err(|e| refuse_error(&e, ""))?.flatten() {
            Some(Said::Apart) => Ok(()),
            Some(Said::Failed { step, errno, .. }) => {
                Err(words::of_step(step, Errno::from_raw_os_error(errno), None))
            }
            Some(_) | None => Err(refuse(
                "the exec's init did not come to have descriptors of its own".into(),
                "",
            )),
        }
    }

    /// Whether it has ended. What it says before that is heard by whoever uses it.
    fn is_gone(&self) -> bool {
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        !matches!(poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })), Ok(0))
    }

    pub fn slate(&mut self) -> Result<&mut Slate, Refusal> {
        self.slate.as_mut().ok_or_else(|| Refusal {
            kind: RefusalKind::Launch,
            message: "the exec was given a command twice".to_owned(),
            hint: String::new(),
        })
    }

    pub fn kill(&self) {
        if let Some(cgroup) = &self.cgroup
            && let Err(e) = cgroup.kill()
        {
            eprintln!("sublet: {}", compile::chain(&e));
        }
        match process::signal_pidfd(&self.pidfd, libc::SIGKILL) {
            Ok(()) | Err(Errno::SRCH) => {}
            Err(e) => eprintln!("sublet: could not kill the init of an exec: {e}"),
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if self.reaped {
            return;
        }
        self.kill();
        // What goes back now, its cgroup and its uid, must be nobody's any more.
        let ended = poll(&mut [PollFd::new(&self.pidfd, PollFlags::IN)], Some(&LAST_WAIT));
        match ended {
            Ok(1..) => match process::wait_for(self.pid) {
                Ok(_) | Err(Errno::CHILD) => {}
                Err(e) => eprintln!("sublet: the init of an exec was not reaped: {e}"),
            },
            Ok(0) | Err(_) => eprintln!("sublet: the init of an exec is stuck in the kernel"),
        }
    }
}

fn set_dumpable(dumpable: bool) -> Result<(), Refusal> {
    crate::sys::memory::set_dumpable(dumpable).map_err(|e| refuse_error(&e, ""))
}
