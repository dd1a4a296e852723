//! A sandbox without its command: namespaces, uid, cgroup, root and rules, built as far as they are the
//! same for every command. Its init waits for one.
//!
//! Holds no value, and nothing of any lease. Dropping it kills what is in it and gives everything back.
#![forbid(unsafe_code)]

use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::io::Errno;

use super::make::{Streams, delivery_unavailable, on_disk, workspace_tree};
use super::parts::limits;
use super::seed::{Child, Seed};
use super::user::{Ids, Mapped, Whose};
use super::{Setting, reach, refuse, refuse_error, tell, words};
use crate::delivery::container::{Owner, SecretsMount};
use crate::launcher::compile::{self, Command, Compiled};
use crate::launcher::posture::Ownership;
use crate::launcher::wire::{Refusal, RefusalKind};
use crate::model::name::Channel;
use crate::profile::AWS_VARIABLES;
use crate::profile::{Capability, NetworkMode, Profile};
use crate::sandbox::cgroup::Held;
use crate::sandbox::ground::{Ground, Wanted};
use crate::sandbox::identity::Identity;
use crate::sandbox::landlock::{self, Feature, TcpPorts};
use crate::sandbox::layout::Access;
use crate::sandbox::plan::{ProcMount, lists};
use crate::sandbox::root::{self, Attachment, Place, PlaceKind, Root};
use crate::sandbox::step::{self, Said, Step, Told};
use crate::sys::cpu;
use crate::sys::helper::Helper;

/// Room in the root's tmpfs for what is synthesised, beside what the profile grants.
const SYNTHESISED: u64 = 1 << 20;
/// Trees in one packet: below what the socket carries, so that the child takes them in few.
const TREES_AT_ONCE: usize = 32;

pub(super) struct Sandbox {
    pub child: Child,
    pub identity: Identity,
    /// What was made ahead for its workspace.
    mapped: Option<Mapped>,
    /// The root's own tmpfs, until the command is told. Empty until it is built.
    root: Option<OwnedFd>,
    /// What was laid in it ahead.
    ground: Option<Ground>,
    /// Where file deliveries are made, if the profile has any.
    pub secrets: Option<SecretsMount>,
    /// Where each tree goes that the child attaches, in its order, for messages.
    attached_at: Vec<PathBuf>,
    pub facts: FactsKept,
}

pub(super) struct FactsKept {
    pub cgroup: Result<Held, String>,
    pub ownership: Ownership,
    pub landlock_missing: Vec<Feature>,
}

/// How many files a capability may be delivered as at once: of a token two versions, what comes next, and
/// what stands beside it.
fn files_of(capability: &Arc<Capability>) -> usize {
    let of = |channel: &Channel| match channel {
        Channel::File => 1,
        Channel::Token => 4,
        Channel::Memfd | Channel::Env | Channel::Git | Channel::Ssh => 0,
    };
    capability.audiences.len() * capability.channels.iter().map(of).sum::<usize>()
}

/// The bound of an exec's root.
pub(super) fn size_of_root(profile: &Profile) -> u64 {
    profile.filesystem.tmp.0.saturating_add(SYNTHESISED)
}

impl Sandbox {
    /// Begins one from a seed, whose child may still be making its namespaces: whose it is, which its child
    /// is told if it was not before, and within which bounds.
    pub fn begin(
        compiled: &Compiled,
        seed: Seed,
        whose: Whose,
        setting: &Setting,
    ) -> Result<Self, Refusal> {
        let Seed { mut child, without_cgroup, root, ground, proc_mount, settled, .. } = seed;
        let Whose { identity, ownership, lock, mapped } = whose;
        child.uid_lock = lock;
        let bounded = match (&child.cgroup, without_cgroup) {
            (Some(cgroup), _) => {
                cgroup.bound(compiled.cgroup_limits).map_err(|e| compile::chain(&e))
            }
            (None, why) => Err(why.unwrap_or_default()),
        };
        let facts = FactsKept {
            landlock_missing: landlock::missing(setting.here.landlock_abi),
            cgroup: bounded,
            ownership,
        };
        let root = Some(root);
        let attached_at = Vec::new();
        let secrets = None;
        let sandbox = Self { child, identity, mapped, root, ground, secrets, attached_at, facts };
        // Only speed hangs on it.
        match cpu::keep_off(sandbox.child.pid) {
            Ok(()) | Err(_) => {}
        }
        if settled.is_none() {
            if proc_mount == ProcMount::BeforeUserNamespace {
                sandbox.await_user_namespace()?;
            }
            let lock = sandbox.child.uid_lock.as_ref().map(AsFd::as_fd);
            sandbox.child.settle(&sandbox.identity, lock)?;
        }
        Ok(sandbox)
    }

    /// Builds what its child needs, which goes on by itself after this has returned; what it cannot do shows
    /// on its socket.
    pub fn build(&mut self, compiled: &Compiled, setting: &Setting) -> Result<(), Refusal> {
        let Owner { uid, gid } = self.owner();
        let wanted = Wanted {
            layout: &compiled.layout,
            size: size_of_root(&compiled.profile),
            mode: setting.here.mode,
            owner: (uid, gid),
        };
        let ground = self.ground.take();
        let root = root::build(self.root()?, ground, &wanted, &compiled.trees).map_err(|e| {
            refuse_error(&e, "correct the profile's [filesystem], or run `sublet doctor`")
        })?;
        let Root { attachments, attachments_in_workspace, places } = root;
        self.lay_out(compiled)?;
        self.hand_over_trees(&attachments, &attachments_in_workspace)?;
        let helper = self.hand_over_places(compiled, places, setting)?;
        let inner: Vec<_> = attachments_in_workspace.iter().map(|a| a.tree.as_fd()).collect();
        self.send_trees(&inner)?;
        // Reaped now, when it has long ended.
        drop(helper);
        Ok(())
    }

    /// Where the command will stand, and within which limits.
    fn lay_out(&mut self, compiled: &Compiled) -> Result<(), Refusal> {
        let c_path = |path: &Path| root::c_path(path).map_err(|e| refuse_error(&e, ""));
        let mut places = vec![c_path(&compiled.working_directory)?];
        if let Some(workspace) = &compiled.workspace {
            places.push(c_path(&workspace.path)?);
        }
        let held = self.facts.cgroup.as_ref().ok().copied().unwrap_or_default();
        let limits: Vec<i64> = limits(&compiled.profile, held)
            .iter()
            .flat_map(|limit| [limit.resource.into(), limit.soft as i64, limit.hard as i64])
            .collect();
        let slate = self.child.slate()?;
        slate
            .put_strings(lists::PLACES, &places, 0)
            .and_then(|()| slate.put_numbers(lists::LIMITS, &limits))
            .map_err(|e| refuse_error(&e, ""))
    }

    fn await_user_namespace(&self) -> Result<(), Refusal> {
        match step::hear(self.child.socket.as_fd(), drop).map_err(|e| refuse_error(&e, ""))? {
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
        attachments: &[Attachment],
        in_workspace: &[Attachment],
    ) -> Result<(), Refusal> {
        let paths = |attachments: &[Attachment]| -> Vec<_> {
            attachments.iter().map(|a| a.at.clone()).collect()
        };
        let trees = paths(attachments);
        let slate = self.child.slate()?;
        slate.put_strings(lists::TREES, &trees, 0).map_err(|e| refuse_error(&e, ""))?;
        let inner = paths(in_workspace);
        slate
            .put_strings(lists::TREES_IN_WORKSPACE, &inner, 0)
            .map_err(|e| refuse_error(&e, ""))?;
        let all = trees.iter().chain(&inner);
        self.attached_at =
            all.map(|at| Path::new("/").join(OsStr::from_bytes(at.as_bytes()))).collect();
        let trees: Vec<_> = attachments.iter().map(|a| a.tree.as_fd()).collect();
        if trees.is_empty() {
            // It waits for a first packet.
            return tell(self.child.socket.as_fd(), Told::Trees, &[]);
        }
        self.send_trees(&trees)
    }

    fn send_trees(&self, trees: &[BorrowedFd<'_>]) -> Result<(), Refusal> {
        for some in trees.chunks(TREES_AT_ONCE) {
            tell(self.child.socket.as_fd(), Told::Trees, some)?;
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
            let (ownership, mapped) = (&self.facts.ownership, self.mapped.take());
            let made =
                workspace_tree(workspace, &self.identity, self.child.pid, ownership, mapped)?;
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
        let built = landlock::build(setting.here.landlock_abi, &places, ports.as_ref())
            .map_err(|e| refuse_error(&e, "run `sublet doctor`"))?;
        // Attached before any value is there, while the child may still attach something.
        let files: usize = compiled.profile.capabilities.iter().map(files_of).sum();
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
            foreign: compiled.is_in_container,
            filter: compiled.filter.number(),
        };
        tell(self.child.socket.as_fd(), told, &fds)?;
        Ok(helper)
    }

    /// Gives it its command, which runs at the go.
    pub fn give(
        &mut self,
        command: &Command,
        terminal: Option<(u16, u16)>,
        streams: &Streams,
    ) -> Result<(), Refusal> {
        let in_environment = command.handed.iter().filter(|h| **h == lists::ENVIRONMENT).count()
            * AWS_VARIABLES.len();
        let slate = self.child.slate()?;
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
        tell(self.child.socket.as_fd(), Told::Command { terminal }, &fds)?;
        // The files' mappings keep what is in it.
        (self.root, self.secrets) = (None, None);
        Ok(())
    }

    /// Lets the command run, with these deliveries. False if the child is gone already.
    pub fn go(&mut self, deliveries: &[BorrowedFd<'_>]) -> Result<bool, Refusal> {
        let reached = reach(self.child.socket.as_fd(), Told::Go, deliveries);
        self.child.slate = None;
        reached
    }

    /// The ids on disk that a namespace of its own maps for it.
    pub fn on_disk(&self, compiled: &Compiled) -> Option<Ids> {
        let workspace = compiled.workspace.as_ref()?;
        on_disk(workspace, &self.identity, &self.facts.ownership)
    }

    /// The root's own tmpfs, where the `git` channel's socket is made.
    pub fn root(&self) -> Result<BorrowedFd<'_>, Refusal> {
        let root = self.root.as_ref().map(AsFd::as_fd);
        root.ok_or_else(|| refuse("the exec was given a command twice".into(), ""))
    }

    pub fn owner(&self) -> Owner {
        Owner { uid: self.identity.outside_uid, gid: self.identity.outside_gid }
    }

    /// Words for a step that failed, but for the last: executing the command.
    pub fn explain(&self, step: Step, errno: Errno, which: u32) -> Refusal {
        words::of_step(step, errno, self.attached_at.get(which as usize))
    }
}
