//! One exec in the launcher: prepared, started, ended. Owns what must be given back: containers,
//! cgroup, uid, lifeline, the process itself.
#![forbid(unsafe_code)]

mod make;
mod parts;
mod words;

pub use make::ownership;
pub use parts::{limit_name, limits, namespace_names, proc_is_masked};

use make::{make_deliveries, make_streams, workspace_tree};
use parts::{inner_rules, keep_only_planned, namespaces};
use words::{clone_refusal, end_text};

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use rustix::fs::Mode as FileMode;
use rustix::io::Errno;

use super::compile::{self, Compiled, Workspace};
use super::posture::{self, Facts, Ownership};
use super::wire::{Ending, ExecNumber, FilledSpec, Prepare, Refusal, RefusalKind};
use crate::delivery::container::{Empty, Filled, Owner, SecretsMount};
use crate::host::Host;
use crate::model::report::Posture;
use crate::profile::{NetworkMode, Profile};
use crate::sandbox::cgroup::{Cgroup, Cgroups, Held};
use crate::sandbox::child;
use crate::sandbox::identity::{self, Identity, Mode};
use crate::sandbox::landlock::{self, Feature, TcpPorts};
use crate::sandbox::layout::Access;
use crate::sandbox::plan::{Handed, Plan, ProcMount};
use crate::sandbox::root::{self, Place, PlaceKind, Root};
use crate::sandbox::step::{self, Said, Told};
use crate::sys::clock;
use crate::sys::exec::StringVector;
use crate::sys::process::{self, CloneArgs, Cloned};
use crate::sys::socket;

/// Between SIGTERM at the deadline and SIGKILL.
pub const KILL_AFTER: Duration = Duration::from_secs(2);
/// For the command's process until it executes; touched only a little, so it costs its address space.
const STACK: usize = 64 << 10;
/// Room in the root's tmpfs for what is synthesised, beside what the profile grants.
const SYNTHESISED: u64 = 1 << 20;

/// The launcher's own facts, the same for every exec.
pub struct Setting {
    pub host: Host,
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
    Empty(Empty),
    Filled {
        filled: Filled,
        expires: Duration,
        kill: bool,
    },
    /// The value stays with the broker, which answers on the socket.
    Git {
        expires: Option<Duration>,
        kill: bool,
    },
    Gone,
}

pub struct Exec {
    pub number: ExecNumber,
    pid: i32,
    pidfd: OwnedFd,
    socket: OwnedFd,
    /// Init polls the other end; closing this, by death too, ends the tree.
    _lifeline: OwnedFd,
    deliveries: Vec<Delivery>,
    secrets: Option<SecretsMount>,
    cgroup: Option<Cgroup>,
    uid_lock: Option<OwnedFd>,
    attached_at: Vec<PathBuf>,
    names: Names,
    profile: Profile,
    facts: FactsKept,
    /// The child has built everything and waits for the go.
    ready: bool,
    start: Option<(Vec<FilledSpec>, Option<Duration>)>,
    started: bool,
    deadline: Option<Duration>,
    kill_at: Option<Duration>,
    wait_status: Option<i32>,
    refusal: Option<Refusal>,
    pending_maps: Option<Pending>,
}

struct Names {
    command: String,
    path: String,
}

struct FactsKept {
    cgroup: Result<Held, String>,
    ownership: Ownership,
    landlock_missing: Vec<Feature>,
    never_swaps: Option<bool>,
}

/// What follows once the child stands in its user namespace.
struct Pending {
    identity: Identity,
    places: Vec<Place>,
    workspace: Option<Workspace>,
    ports: Option<TcpPorts>,
}

fn refuse(message: String, hint: &str) -> Refusal {
    Refusal { kind: RefusalKind::Launch, message, hint: hint.to_owned() }
}

fn refuse_error(error: &dyn std::error::Error, hint: &str) -> Refusal {
    refuse(compile::chain(error), hint)
}

/// What became known by some event.
pub enum Happened {
    Nothing,
    /// Descriptor: the terminal's master.
    Ready(Posture, Option<OwnedFd>),
    Started,
    /// The command has ended, and its deliveries are wiped.
    Ending(Ending, Vec<(u64, bool)>),
    /// The child closed its socket; the rest shows on its pidfd.
    Silence,
}

impl Exec {
    /// Compiles, makes the containers, hands their broker ends to `prepared` at once, then builds the
    /// root and clones the child.
    pub fn prepare(
        order: Prepare,
        setting: &Setting,
        prepared: impl FnOnce(BrokerEnds),
    ) -> Result<Self, Refusal> {
        let mut uid_lock = None;
        let compiled = compile::compile(&order, &setting.host, setting.mode, || {
            let (uid, lock) = identity::take_uid(setting.host.config.host.uid_pool)
                .map_err(|e| refuse_error(&e, "check /run/sublet and [host] uid_pool"))?;
            uid_lock = Some(lock);
            Ok((uid, uid))
        })?;
        let Compiled { profile, workspace, mut identity, layout, handed, .. } = compiled;
        let ownership = ownership(setting.mode, workspace.as_ref(), &mut identity)?;
        let owner = Owner { uid: identity.outside_uid, gid: identity.outside_gid };

        let size = profile.filesystem.tmp.0.saturating_add(SYNTHESISED);
        let root = root::build(&layout, size, setting.mode, &identity).map_err(|e| {
            refuse_error(&e, "correct the profile's [filesystem], or run `sublet doctor`")
        })?;

        let (streams, stream_ends) = make_streams(&order, owner)?;
        let (deliveries, secrets, delivery_ends) =
            make_deliveries(&order.deliveries, owner, &root, &identity)?;
        let mut fds = stream_ends;
        fds.extend(delivery_ends);
        prepared(BrokerEnds { fds, uid: identity.outside_uid });

        let cgroup = setting.cgroups.as_ref().map_err(Clone::clone).and_then(|cgroups| {
            cgroups.make(&order.exec_id, compiled.cgroup_limits).map_err(|e| compile::chain(&e))
        });
        let (cgroup, held) = match cgroup {
            Ok(cgroup) => {
                let held = cgroup.held;
                (Some(cgroup), Ok(held))
            }
            Err(why) => (None, Err(why)),
        };
        let facts = FactsKept {
            landlock_missing: landlock::missing(setting.landlock_abi),
            never_swaps: (!order.deliveries.is_empty())
                .then(|| secrets.as_ref().is_none_or(|s| s.never_swaps)),
            cgroup: held,
            ownership,
        };

        let (ours, theirs) = socket::packet_pair().map_err(|e| refuse_error(&e, ""))?;
        let (lifeline_read, lifeline_write) = io::pipe().map_err(|e| refuse_error(&e, ""))?;
        let workspace_at = match &workspace {
            Some(w) => Some(root::c_path(&w.path).map_err(|e| refuse_error(&e, ""))?),
            None => None,
        };
        let Root { tmpfs, attachments, attachments_in_workspace, attached_at, places } = root;
        let network = profile.network.mode;
        let mut plan = Plan {
            namespaces: namespaces(network),
            late_namespaces: 0,
            proc_mount: ProcMount::Inside,
            identity,
            root: tmpfs,
            attachments,
            workspace_at,
            attachments_in_workspace,
            hostname: c"sublet".to_owned(),
            loopback: network == NetworkMode::None,
            limits: limits(&profile, facts.cgroup.as_ref().ok().copied().unwrap_or_default()),
            working_directory: root::c_path(&compiled.working_directory)
                .map_err(|e| refuse_error(&e, ""))?,
            programs: compiled.programs,
            argv: StringVector::new(compiled.argv),
            envp: StringVector::with_reserve(
                compiled.environment,
                handed.iter().filter(|h| **h == Handed::Environment).count(),
            ),
            streams,
            deliveries: handed,
            inner_rules: inner_rules(setting.landlock_abi),
            filter: compiled.filter,
            init_filter: compiled.init_filter,
            socket: theirs,
            lifeline: lifeline_read.into(),
            close_before: Vec::new(),
            close_after: Vec::new(),
            stack: vec![0; STACK],
            umask: setting.umask,
            uid_lock: None,
        };
        if setting.mode == Mode::Privileged && setting.proc_is_masked {
            // The kernel refuses a new /proc from inside the user namespace there.
            plan.proc_mount = ProcMount::BeforeUserNamespace;
            plan.late_namespaces = plan.namespaces & !(libc::CLONE_NEWPID as u64);
            plan.namespaces = libc::CLONE_NEWPID as u64;
        }
        plan.uid_lock = match &uid_lock {
            Some(lock) => Some(lock.try_clone().map_err(|e| refuse_error(&e, ""))?),
            None => None,
        };
        keep_only_planned(&mut plan);

        // Rootless, the child's maps can be written only while it is dumpable (proc(5)).
        let dumpable = setting.mode == Mode::Rootless;
        if dumpable {
            set_dumpable(true)?;
        }
        let args = CloneArgs {
            namespaces: plan.namespaces,
            cgroup: cgroup.as_ref().map(Cgroup::directory),
        };
        let cloned = match process::clone3(&args) {
            Ok(Cloned::Child) => child::run(&mut plan),
            Ok(Cloned::Parent { pid, pidfd }) => Ok((pid, pidfd)),
            Err(e) => Err(clone_refusal(&e, setting.mode)),
        };
        if dumpable {
            set_dumpable(false)?;
        }
        let (pid, pidfd) = cloned?;
        let ports = (network == NetworkMode::Host).then(|| TcpPorts {
            connect: profile.network.connect_ports.clone(),
            bind: profile.network.bind_ports.clone(),
        });
        let mut exec = Self {
            number: order.exec,
            pid,
            pidfd,
            socket: ours,
            _lifeline: lifeline_write.into(),
            deliveries,
            secrets,
            cgroup,
            uid_lock,
            attached_at,
            names: Names {
                command: String::from_utf8_lossy(&order.argv[0]).into_owned(),
                path: profile
                    .environment
                    .path
                    .iter()
                    .map(ToString::to_string)
                    .collect::<Vec<_>>()
                    .join(":"),
            },
            profile,
            facts,
            ready: false,
            start: None,
            started: false,
            deadline: None,
            kill_at: None,
            wait_status: None,
            refusal: None,
            pending_maps: Some(Pending { identity, places, workspace, ports }),
        };
        if plan.proc_mount == ProcMount::Inside
            && let Err(refusal) = exec.follow(setting)
        {
            // Killed by it. What goes back now, its cgroup and its uid, must be nobody's any more.
            return match process::wait_for(exec.pid) {
                Ok(_) | Err(Errno::CHILD) => Err(refusal),
                Err(e) => Err(refuse(format!("{refusal}; its init was not reaped: {e}"), "")),
            };
        }
        Ok(exec)
    }

    /// Writes the child's maps, then makes what it needs meanwhile: the workspace's tree and the
    /// landlock ruleset. The child builds its root in parallel.
    fn follow(&mut self, setting: &Setting) -> Result<(), Refusal> {
        let Some(Pending { identity, places, workspace, ports }) = self.pending_maps.take() else {
            return Err(refuse("the child asked for its maps twice".into(), ""));
        };
        let mut places = places;
        let result = (|| {
            identity::write_maps(self.pid, &identity).map_err(|e| {
                refuse_error(&e, "run `sublet doctor`: it says who blocks user namespaces")
            })?;
            tell(self.socket.as_fd(), Told::Maps, &[])?;

            let tree = match &workspace {
                None => None,
                Some(workspace) => {
                    let tree =
                        workspace_tree(workspace, &identity, self.pid, &self.facts.ownership)?;
                    let kind = match workspace.access {
                        Access::ReadOnly => PlaceKind::ReadOnlyTree,
                        Access::ReadWrite => PlaceKind::WritableTree,
                    };
                    let fd = tree.try_clone().map_err(|e| refuse_error(&e, ""))?;
                    places.push(Place { fd, kind });
                    Some(tree)
                }
            };
            let built = landlock::build(setting.landlock_abi, &places, ports.as_ref())
                .map_err(|e| refuse_error(&e, "run `sublet doctor`"))?;
            let fds: Vec<BorrowedFd<'_>> =
                built.ruleset.iter().chain(&tree).map(AsFd::as_fd).collect();
            let told = Told::Places { ruleset: built.ruleset.is_some(), workspace: tree.is_some() };
            tell(self.socket.as_fd(), told, &fds)
        })();
        if result.is_err() {
            self.kill();
        }
        result
    }

    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
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
                Delivery::Empty(empty) => {
                    let (filled, reader) =
                        empty.close(spec.bytes as usize).map_err(|e| failed(&e))?;
                    readers.extend(reader);
                    Delivery::Filled { filled, expires: spec.expires, kill: spec.kill }
                }
                Delivery::Git { .. } => {
                    Delivery::Git { expires: Some(spec.expires), kill: spec.kill }
                }
                other => other,
            };
        }
        let mut fds: Vec<BorrowedFd<'_>> = readers.iter().map(AsFd::as_fd).collect();
        fds.extend(self.secrets.as_ref().map(SecretsMount::fd));
        self.deadline = deadline;
        tell(self.socket.as_fd(), Told::Go { secrets: self.secrets.is_some() }, &fds)
    }

    /// The child has something to say.
    pub fn hear(&mut self, setting: &Setting) -> Result<Happened, Refusal> {
        let mut fds = Vec::new();
        let said =
            step::hear(self.socket.as_fd(), |fd| fds.push(fd)).map_err(|e| refuse_error(&e, ""))?;
        match said {
            Some(Said::NeedsMaps) => self.follow(setting).map(|()| Happened::Nothing),
            Some(Said::Ready) => {
                self.ready = true;
                let posture = posture::posture(&self.facts(setting))?;
                self.go()?;
                Ok(Happened::Ready(posture, fds.pop()))
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
            landlock_missing: &self.facts.landlock_missing,
            landlock_abi: setting.landlock_abi,
            cgroup: self.facts.cgroup.clone(),
            ownership: self.facts.ownership.clone(),
            cpus: setting.cpus,
            never_swaps: self.facts.never_swaps,
        }
    }

    /// Forwards a signal to the command's process group.
    pub fn signal(&self, signal: i32) -> Result<(), Refusal> {
        if self.started { tell(self.socket.as_fd(), Told::Signal { signal }, &[]) } else { Ok(()) }
    }

    /// A renewed lease: its delivery stays for longer. One that was wiped stays wiped.
    pub fn extend(&mut self, delivery: usize, until: Duration) {
        match self.deliveries.get_mut(delivery) {
            Some(Delivery::Filled { filled, expires, .. }) if !filled.is_wiped() => {
                *expires = until.max(*expires);
            }
            Some(Delivery::Git { expires: Some(expires), .. }) => *expires = until.max(*expires),
            Some(_) | None => {}
        }
    }

    /// Wipes one delivery at once, and kills the exec if its lease was granted so.
    pub fn revoke(&mut self, delivery: usize) {
        let kill = match self.deliveries.get_mut(delivery) {
            Some(Delivery::Filled { filled, kill, .. }) => {
                filled.wipe();
                *kill
            }
            Some(Delivery::Git { kill, expires }) => {
                *expires = None;
                *kill
            }
            Some(Delivery::Empty(_) | Delivery::Gone) | None => false,
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
        if let Some(cgroup) = &self.cgroup
            && let Err(e) = cgroup.kill()
        {
            eprintln!("sublet: {}", compile::chain(&e));
        }
        match process::signal_pidfd(&self.pidfd, libc::SIGKILL) {
            Ok(()) | Err(Errno::SRCH) => {}
            Err(e) => eprintln!("sublet: could not kill the init of an exec: {e}"),
        }
        self.wipe();
    }

    /// Per delivery: its bytes, and whether they were wiped.
    fn scrubbed(&self) -> Vec<(u64, bool)> {
        let told = |delivery: &Delivery| match delivery {
            Delivery::Filled { filled, .. } => (filled.bytes(), filled.is_wiped()),
            Delivery::Empty(_) | Delivery::Git { .. } | Delivery::Gone => (0, true),
        };
        self.deliveries.iter().map(told).collect()
    }

    fn wipe(&mut self) {
        for delivery in &mut self.deliveries {
            if let Delivery::Filled { filled, .. } = delivery {
                filled.wipe();
            }
        }
    }

    /// The next moment at which [`Exec::on_time`] has something to do.
    pub fn next_time(&self) -> Option<Duration> {
        let expiries = self.deliveries.iter().filter_map(|d| match d {
            Delivery::Filled { filled, expires, .. } if !filled.is_wiped() => Some(*expires),
            Delivery::Git { expires, .. } => *expires,
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
                Delivery::Git { expires, .. } => expires.is_some_and(|e| e <= now),
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
            tell(self.socket.as_fd(), Told::SignalAll { signal: libc::SIGTERM }, &[])?;
        }
        if self.kill_at.is_some_and(|k| k <= now) {
            self.kill_at = None;
            self.kill();
        }
        Ok((due.into_iter().map(|i| i as u32).collect(), timed_out))
    }

    /// Init is gone, and with it every process of the exec: gives back everything.
    pub fn end(mut self) -> Result<(Ending, Vec<(u64, bool)>), Refusal> {
        // What init said last may not have been heard yet.
        while self.wait_status.is_none() && self.refusal.is_none() {
            match step::hear(self.socket.as_fd(), drop) {
                Ok(Some(Said::Ended { wait_status })) => self.wait_status = Some(wait_status),
                Ok(Some(Said::Failed { step, errno, which })) => {
                    self.refusal = Some(self.explain(step, Errno::from_raw_os_error(errno), which));
                }
                Ok(Some(_)) => {}
                Ok(None) | Err(_) => break,
            }
        }
        self.wipe();
        let init = process::wait_for(self.pid);
        let scrubbed = self.scrubbed();
        self.cgroup = None;
        self.uid_lock = None;
        match (self.refusal.take(), self.wait_status) {
            (Some(refusal), _) => Err(refusal),
            (None, Some(wait_status)) => Ok((Ending::Command { wait_status }, scrubbed)),
            (None, None) if self.started => Ok((Ending::Killed, scrubbed)),
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
    match step::tell(socket, told, fds) {
        // A child that is gone shows on its pidfd, with its reason in the socket.
        Ok(()) | Err(Errno::PIPE | Errno::CONNRESET) => Ok(()),
        Err(e) => Err(refuse(format!("could not reach the exec's init: {e}"), "")),
    }
}

fn set_dumpable(dumpable: bool) -> Result<(), Refusal> {
    crate::sys::memory::set_dumpable(dumpable).map_err(|e| refuse_error(&e, ""))
}
