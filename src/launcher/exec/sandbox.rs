//! A sandbox without its command: namespaces, uid, cgroup, root and rules, built as far as they are the
//! same for every command. Its init waits for one.
//!
//! Holds no value, and nothing of any lease. Dropping it kills what is in it and gives everything back.
#![forbid(unsafe_code)]

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::make::{Streams, delivery_unavailable, ownership, workspace_tree};
use super::parts::{inner_rules, keep_only_planned, limits, namespaces};
use super::words::{self, clone_refusal};
use super::{Setting, refuse, refuse_error, tell};
use crate::delivery::container::{Owner, SecretsMount};
use crate::launcher::compile::{self, Command, Compiled};
use crate::launcher::posture::Ownership;
use crate::launcher::wire::{Refusal, RefusalKind};
use crate::model::id::ExecId;
use crate::model::name::Channel;
use crate::profile::{Capability, NetworkMode};
use crate::sandbox::cgroup::{Cgroup, Held};
use crate::sandbox::child;
use crate::sandbox::identity::{self, Identity, Mode};
use crate::sandbox::landlock::{self, Feature, TcpPorts};
use crate::sandbox::layout::Access;
use crate::sandbox::plan::{Plan, ProcMount, lists};
use crate::sandbox::root::{self, Attachment, Place, PlaceKind, Root};
use crate::sandbox::step::{self, Said, Step, Told};
use crate::sys::helper::Helper;
use crate::sys::process::{self, CloneArgs, Cloned};
use crate::sys::slate::Slate;
use crate::sys::socket;

/// Room in the root's tmpfs for what is synthesised, beside what the profile grants.
const SYNTHESISED: u64 = 1 << 20;
/// Trees in one packet: below what the socket carries, so that the child takes them in few.
const TREES_AT_ONCE: usize = 32;
/// How long a sandbox that is given up has to die. What takes longer is stuck in the kernel, has been
/// killed, and is reaped by nobody but the launcher's own end.
const LAST_WAIT: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

pub(super) struct Sandbox {
    pub pid: i32,
    pub pidfd: OwnedFd,
    pub socket: OwnedFd,
    /// Init polls the other end; closing this, by death too, ends the tree.
    _lifeline: OwnedFd,
    /// Until the go.
    slate: Option<Slate>,
    pub cgroup: Option<Cgroup>,
    pub uid_lock: Option<OwnedFd>,
    pub identity: Identity,
    /// The root's own tmpfs, until the command is told.
    root: Option<OwnedFd>,
    /// Where file deliveries are made, if the profile has any.
    pub secrets: Option<SecretsMount>,
    /// Where each tree goes that the child attaches, in its order, for messages.
    attached_at: Vec<PathBuf>,
    pub facts: FactsKept,
    pub reaped: bool,
}

pub(super) struct FactsKept {
    pub cgroup: Result<Held, String>,
    pub ownership: Ownership,
    pub landlock_missing: Vec<Feature>,
}

impl Sandbox {
    /// Clones the child, and builds what it needs while it makes its namespaces. It goes on by itself
    /// after this has returned; what it cannot do shows on its socket.
    pub fn build(compiled: &Compiled, name: &ExecId, setting: &Setting) -> Result<Self, Refusal> {
        let (mut identity, uid_lock) = take_identity(compiled, setting)?;
        let ownership = ownership(setting.mode, compiled.workspace.as_ref(), &mut identity)?;
        let cgroup = setting.cgroups.as_ref().map_err(Clone::clone).and_then(|cgroups| {
            cgroups.make(name, compiled.cgroup_limits).map_err(|e| compile::chain(&e))
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
            cgroup: held,
            ownership,
        };
        let (mut sandbox, enters_by_itself) =
            clone_child(compiled, identity, uid_lock, cgroup, facts, setting)?;
        let size = compiled.profile.filesystem.tmp.0.saturating_add(SYNTHESISED);
        let root = root::build(&compiled.layout, &compiled.trees, size, setting.mode, &identity)
            .map_err(|e| {
                refuse_error(&e, "correct the profile's [filesystem], or run `sublet doctor`")
            })?;
        if enters_by_itself {
            sandbox.await_user_namespace()?;
            sandbox.write_maps()?;
        }
        let Root { tmpfs, attachments, attachments_in_workspace, places } = root;
        sandbox.hand_over_trees(&tmpfs, &attachments, &attachments_in_workspace)?;
        sandbox.root = Some(tmpfs);
        let helper = sandbox.hand_over_places(compiled, places, setting)?;
        sandbox.send_trees(attachments_in_workspace.iter().map(|a| a.tree.as_fd()))?;
        // Reaped now, when it has long ended.
        drop(helper);
        // The next child is another exec's.
        match &sandbox.slate {
            Some(slate) => slate.keep_from_others().map_err(|e| refuse_error(&e, ""))?,
            None => return Err(refuse("the exec has no slate".into(), "")),
        }
        Ok(sandbox)
    }

    fn write_maps(&self) -> Result<(), Refusal> {
        identity::write_maps(self.pid, &self.identity).map_err(|e| {
            refuse_error(&e, "run `sublet doctor`: it says who blocks user namespaces")
        })?;
        tell(self.socket.as_fd(), Told::Maps, &[])
    }

    fn await_user_namespace(&self) -> Result<(), Refusal> {
        match step::hear(self.socket.as_fd(), drop).map_err(|e| refuse_error(&e, ""))? {
            Some(Said::NeedsMaps) => Ok(()),
            Some(Said::Failed { step, errno, which }) => {
                Err(self.explain(step, Errno::from_raw_os_error(errno), which))
            }
            Some(_) | None => {
                Err(refuse("the exec's init ended before it stood in its namespaces".into(), ""))
            }
        }
    }

    fn hand_over_trees(
        &mut self,
        tmpfs: &OwnedFd,
        attachments: &[Attachment],
        in_workspace: &[Attachment],
    ) -> Result<(), Refusal> {
        let paths = |attachments: &[Attachment]| -> Vec<_> {
            attachments.iter().map(|a| a.at.clone()).collect()
        };
        let mut trees = vec![c"/".to_owned()];
        trees.extend(paths(attachments));
        let slate = self.slate()?;
        slate.put_strings(lists::TREES, &trees, 0).map_err(|e| refuse_error(&e, ""))?;
        let inner = paths(in_workspace);
        slate
            .put_strings(lists::TREES_IN_WORKSPACE, &inner, 0)
            .map_err(|e| refuse_error(&e, ""))?;
        let all = trees.iter().chain(&inner);
        self.attached_at =
            all.map(|at| Path::new("/").join(OsStr::from_bytes(at.as_bytes()))).collect();
        let trees = std::iter::once(tmpfs).chain(attachments.iter().map(|a| &a.tree));
        self.send_trees(trees.map(AsFd::as_fd))
    }

    fn send_trees<'a>(&self, trees: impl Iterator<Item = BorrowedFd<'a>>) -> Result<(), Refusal> {
        let trees: Vec<_> = trees.collect();
        for some in trees.chunks(TREES_AT_ONCE) {
            tell(self.socket.as_fd(), Told::Trees, some)?;
        }
        Ok(())
    }

    /// The workspace's tree and the landlock ruleset, while the child builds its root.
    fn hand_over_places(
        &mut self,
        compiled: &Compiled,
        mut places: Vec<Place>,
        setting: &Setting,
    ) -> Result<Option<Helper>, Refusal> {
        let mut helper = None;
        let mut tree = None;
        if let Some(workspace) = &compiled.workspace {
            let made = workspace_tree(workspace, &self.identity, self.pid, &self.facts.ownership)?;
            let kind = match workspace.access {
                Access::ReadOnly => PlaceKind::ReadOnlyTree,
                Access::ReadWrite => PlaceKind::WritableTree,
            };
            let fd = made.0.try_clone().map_err(|e| refuse_error(&e, ""))?;
            places.push(Place { fd, kind });
            (tree, helper) = (Some(made.0), made.1);
        }
        let network = &compiled.profile.network;
        let ports = (network.mode == NetworkMode::Host).then(|| TcpPorts {
            connect: network.connect_ports.clone(),
            bind: network.bind_ports.clone(),
        });
        let built = landlock::build(setting.landlock_abi, &places, ports.as_ref())
            .map_err(|e| refuse_error(&e, "run `sublet doctor`"))?;
        // Attached before any value is there, while the child may still attach something.
        let file = |c: &&Arc<Capability>| c.channels.contains(&Channel::File);
        let files: usize =
            compiled.profile.capabilities.iter().filter(file).map(|c| c.audiences.len()).sum();
        if files > 0 {
            let made = SecretsMount::new(files).map_err(|e| delivery_unavailable(&e))?;
            self.secrets = Some(made);
        }
        let secrets = self.secrets.as_ref().map(SecretsMount::fd);
        let fds: Vec<BorrowedFd<'_>> =
            built.ruleset.iter().chain(&tree).map(AsFd::as_fd).chain(secrets).collect();
        let told = Told::Places {
            ruleset: built.ruleset.is_some(),
            workspace: tree.is_some(),
            secrets: secrets.is_some(),
        };
        tell(self.socket.as_fd(), told, &fds)?;
        Ok(helper)
    }

    /// Gives it its command, which runs at the go.
    pub fn give(
        &mut self,
        command: &Command,
        terminal: Option<(u16, u16)>,
        streams: &Streams,
    ) -> Result<(), Refusal> {
        let in_environment = command.handed.iter().filter(|h| **h == lists::ENVIRONMENT).count();
        let slate = self.slate()?;
        slate
            .put_strings(lists::PROGRAMS, &command.programs, 0)
            .and_then(|()| slate.put_strings(lists::ARGV, &command.argv, 0))
            .and_then(|()| slate.put_strings(lists::ENVP, &command.environment, in_environment))
            .and_then(|()| slate.put_numbers(lists::DELIVERIES, &command.handed))
            .map_err(|e| Refusal {
                kind: RefusalKind::NotExecutable,
                message: e.to_string(),
                hint: "give the command its input in a file, or on standard input".to_owned(),
            })?;
        let fds: Vec<BorrowedFd<'_>> = streams.inside.iter().map(AsFd::as_fd).collect();
        tell(self.socket.as_fd(), Told::Command { terminal }, &fds)?;
        // The files' mappings keep what is in it.
        (self.root, self.secrets) = (None, None);
        Ok(())
    }

    /// Lets the command run, with these deliveries.
    pub fn go(&mut self, deliveries: &[BorrowedFd<'_>]) -> Result<(), Refusal> {
        self.slate = None;
        tell(self.socket.as_fd(), Told::Go, deliveries)
    }

    fn slate(&mut self) -> Result<&mut Slate, Refusal> {
        self.slate.as_mut().ok_or_else(|| refuse("the exec was given a command twice".into(), ""))
    }

    /// The root's own tmpfs, where the `git` channel's socket is made.
    pub fn root(&self) -> Result<BorrowedFd<'_>, Refusal> {
        let root = self.root.as_ref().map(AsFd::as_fd);
        root.ok_or_else(|| refuse("the exec was given a command twice".into(), ""))
    }

    pub fn owner(&self) -> Owner {
        Owner { uid: self.identity.outside_uid, gid: self.identity.outside_gid }
    }

    /// Whether its init still waits, and has not said that something failed.
    pub fn waits(&self) -> bool {
        let mut fds =
            [PollFd::new(&self.socket, PollFlags::IN), PollFd::new(&self.pidfd, PollFlags::IN)];
        matches!(poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })), Ok(0))
    }

    /// Words for a step that failed, but for the last: executing the command.
    pub fn explain(&self, step: Step, errno: Errno, which: u32) -> Refusal {
        words::of_step(step, errno, self.attached_at.get(which as usize))
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

impl Drop for Sandbox {
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

fn take_identity(
    compiled: &Compiled,
    setting: &Setting,
) -> Result<(Identity, Option<OwnedFd>), Refusal> {
    match setting.mode {
        Mode::Rootless => Ok((Identity::of_caller(compiled.inside), None)),
        Mode::Privileged => {
            let (uid, lock) = identity::take_uid(setting.host.config.host.uid_pool)
                .map_err(|e| refuse_error(&e, "check /run/sublet and [host] uid_pool"))?;
            Ok((Identity::pooled(compiled.inside, uid), Some(lock)))
        }
    }
}

fn clone_child(
    compiled: &Compiled,
    identity: Identity,
    uid_lock: Option<OwnedFd>,
    cgroup: Option<Cgroup>,
    facts: FactsKept,
    setting: &Setting,
) -> Result<(Sandbox, bool), Refusal> {
    let failed = |e: &dyn std::error::Error| refuse_error(e, "");
    let (ours, theirs) = socket::packet_pair().map_err(|e| failed(&e))?;
    let (lifeline_read, lifeline_write) = io::pipe().map_err(|e| failed(&e))?;
    let workspace_at = match &compiled.workspace {
        Some(w) => Some(root::c_path(&w.path).map_err(|e| failed(&e))?),
        None => None,
    };
    let network = compiled.profile.network.mode;
    let held = facts.cgroup.as_ref().ok().copied().unwrap_or_default();
    let joined = compiled.network.as_ref().map(OwnedFd::try_clone).transpose();
    let joined = joined.map_err(|e| failed(&e))?;
    let all = namespaces(network);
    let is_late = joined.is_some() || setting.mode == Mode::Privileged && setting.proc_is_masked;
    let (now, late, proc_mount) = if is_late {
        // A container's network is joined before there is a user namespace of the exec's own, and the
        // kernel makes a /proc only for who rules over its pid namespace. Where /proc is masked it makes
        // none from inside a user namespace at all.
        let now = libc::CLONE_NEWPID as u64;
        (now, all & !now, ProcMount::BeforeUserNamespace)
    } else {
        let late = all & libc::CLONE_NEWNET as u64;
        (all & !late, late, ProcMount::Inside)
    };
    let mut plan = Plan {
        namespaces: now,
        late_namespaces: late,
        proc_mount,
        network: joined,
        in_container: compiled.is_in_container,
        identity,
        workspace_at,
        hostname: c"sublet".to_owned(),
        loopback: network == NetworkMode::None,
        limits: limits(&compiled.profile, held),
        working_directory: root::c_path(&compiled.working_directory).map_err(|e| failed(&e))?,
        inner_rules: inner_rules(setting.landlock_abi),
        filter: compiled.filter.clone(),
        init_filter: compiled.init_filter.clone(),
        socket: theirs,
        lifeline: lifeline_read.into(),
        close: Vec::new(),
        umask: setting.umask,
        uid_lock: uid_lock.as_ref().map(OwnedFd::try_clone).transpose().map_err(|e| failed(&e))?,
        slate: Some(Slate::new().map_err(|e| failed(&e))?),
    };
    keep_only_planned(&mut plan);

    // Rootless, the child's maps can be written only while it is dumpable (proc(5)).
    let dumpable = setting.mode == Mode::Rootless;
    if dumpable {
        set_dumpable(true)?;
    }
    let args =
        CloneArgs { namespaces: plan.namespaces, cgroup: cgroup.as_ref().map(Cgroup::directory) };
    let cloned = match process::clone3(&args) {
        Ok(Cloned::Child) => child::run(&mut plan),
        Ok(Cloned::Parent { pid, pidfd }) => Ok((pid, pidfd)),
        Err(e) => Err(clone_refusal(&e, setting.mode)),
    };
    if dumpable {
        set_dumpable(false)?;
    }
    let (pid, pidfd) = cloned?;
    let sandbox = Sandbox {
        pid,
        pidfd,
        socket: ours,
        _lifeline: lifeline_write.into(),
        slate: plan.slate.take(),
        cgroup,
        uid_lock,
        identity,
        root: None,
        secrets: None,
        attached_at: Vec::new(),
        facts,
        reaped: false,
    };
    // Before anything else: the child waits for nothing so soon.
    let enters_by_itself = plan.enters_by_itself();
    if !enters_by_itself {
        sandbox.write_maps()?;
    }
    Ok((sandbox, enters_by_itself))
}

fn set_dumpable(dumpable: bool) -> Result<(), Refusal> {
    crate::sys::memory::set_dumpable(dumpable).map_err(|e| refuse_error(&e, ""))
}
