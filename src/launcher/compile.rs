//! The plan of one exec, compiled by the launcher itself: from the profile that it reads, the workspace
//! that it opens, and what the broker asks for. Decides nothing about credentials.
//!
//! In two parts: the sandbox, which is the same for every exec of a run, and the command in it.
#![forbid(unsafe_code)]

mod container;
mod environment;
mod workspace;

pub use container::find;
pub use workspace::Workspace;
use workspace::open_workspace;

use std::collections::BTreeMap;
use std::ffi::CString;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::guard::{Guard, Unclear};
use super::wire::{Prepare, Refusal, RefusalKind, Spec};
use crate::host::{Host, trusted};
use crate::model::name::Channel;
use crate::profile::{NetworkMode, Profile, WorkspaceAccess};
use crate::sandbox::cgroup::CgroupLimits;
use crate::sandbox::identity::{Mode, ORDINARY_UID};
use crate::sandbox::layout::{self, Access, Entry, HostPath, Layout, View};
use crate::sandbox::seccomp::BuiltIn;

/// A sandbox, before anything of it is made.
pub struct Compiled {
    pub profile: Profile,
    pub workspace: Option<Workspace>,
    /// The uid and gid that the exec sees for itself.
    pub inside: (u32, u32),
    pub layout: Layout,
    pub home: PathBuf,
    pub working_directory: PathBuf,
    pub cgroup_limits: CgroupLimits,
    pub filter: BuiltIn,
    /// It stands in a container, of whose root these are detached clones, by their places.
    pub is_in_container: bool,
    pub trees: BTreeMap<PathBuf, OwnedFd>,
    /// The network namespace to join.
    pub network: Option<OwnedFd>,
}

/// The command, before it is given to a sandbox.
pub struct Command {
    /// Of each delivery that is a descriptor: the number that it gets, or [`lists::ENVIRONMENT`].
    pub handed: Vec<i64>,
    pub environment: Vec<CString>,
    pub programs: Vec<CString>,
    pub argv: Vec<CString>,
}

impl Compiled {
    /// Whether a sandbox that was made of one is what would be made of the other. All that was read for
    /// it is compared, not the names of it.
    pub fn is_same_as(&self, other: &Self) -> bool {
        let Self {
            profile,
            workspace,
            inside,
            layout,
            home,
            working_directory,
            // These follow from the profile.
            cgroup_limits: _,
            filter: _,
            // One in a container is never compared: none is kept.
            is_in_container,
            trees: _,
            network: _,
        } = self;
        !is_in_container
            && !other.is_in_container
            && *profile == other.profile
            && workspace.as_ref().map(Workspace::facts)
                == other.workspace.as_ref().map(Workspace::facts)
            && *inside == other.inside
            && *layout == other.layout
            && *home == other.home
            && *working_directory == other.working_directory
    }
}

pub(super) fn invalid(message: String, hint: &str) -> Refusal {
    Refusal { kind: RefusalKind::Invalid, message, hint: hint.to_owned() }
}

/// The profile as it is now, as narrow as it is asked for.
pub fn profile(spec: &Spec, host: &Host) -> Result<Profile, Refusal> {
    let mut profile = host
        .profile(&spec.profile)
        .map_err(|e| invalid(chain(&e), "`sublet profile list` names the profiles"))?;
    if spec.without_network {
        profile
            .narrow_network(NetworkMode::None)
            .map_err(|e| invalid(e.to_string(), "name a mode that is no wider"))?;
    }
    Ok(profile)
}

/// Reads the profile, opens the workspace, and lays out what there will be.
pub fn sandbox(spec: &Spec, host: &Host, mode: Mode) -> Result<Compiled, Refusal> {
    let profile = profile(spec, host)?;
    let home = host.home_for(spec.home.as_deref()).to_owned();
    if let Some(target) = container::target(spec, host, mode)? {
        return container::sandbox(&target, spec, host, profile, home);
    }
    let guard = Guard::of(host).map_err(|e| unclear(&e))?;
    if profile.filesystem.workspace != WorkspaceAccess::None
        && let Some(why) = host.objection_to_workspace(&spec.workspace)
    {
        return Err(invalid(
            format!("{} cannot be a workspace: {why}", spec.workspace.display()),
            "name one that the host permits, or add its directory to `workspaces` of [host]",
        ));
    }
    let workspace = match profile.filesystem.workspace {
        WorkspaceAccess::None => None,
        WorkspaceAccess::Rw => {
            Some(open_workspace(&spec.workspace, Access::ReadWrite, &guard, &home)?)
        }
        WorkspaceAccess::Ro => {
            Some(open_workspace(&spec.workspace, Access::ReadOnly, &guard, &home)?)
        }
    };
    let inside = inside(mode, workspace.as_ref());
    let mut view = view(spec, &profile, workspace.as_ref(), inside, &home)?;
    show_agent(&mut view, spec, host);
    let mut layout = layout::layout(&view);
    settle_ways(&mut layout)?;
    refuse_guarded(&layout, &guard)?;
    if view.identities {
        refuse_hidden_identities(&layout, &BTreeMap::new())?;
    }
    let working_directory = workspace
        .as_ref()
        .map_or_else(|| profile.filesystem.home.resolve(&home), |w| w.path.clone());
    Compiled::of(profile, workspace, inside, layout, home, working_directory)
}

impl Compiled {
    /// With what follows from the profile.
    fn of(
        profile: Profile,
        workspace: Option<Workspace>,
        inside: (u32, u32),
        layout: Layout,
        home: PathBuf,
        working_directory: PathBuf,
    ) -> Result<Self, Refusal> {
        Ok(Self {
            inside,
            layout,
            working_directory,
            cgroup_limits: CgroupLimits {
                memory: profile.limits.memory.map(|s| s.0),
                processes: profile.limits.processes.map(u64::from),
                millicpu: profile.limits.cpu.map(|c| c.thousandths.into()),
            },
            filter: builtin_filter(profile.seccomp.filter.as_str())?,
            home,
            workspace,
            profile,
            is_in_container: false,
            trees: BTreeMap::new(),
            network: None,
        })
    }
}

/// The run's socket, for an agent's command.
fn show_agent(view: &mut View, spec: &Spec, host: &Host) {
    if spec.agent {
        // The way to the runtime directory may have links; what the broker made below it may not.
        let runtime_dir = host.runtime_dir.canonicalize().unwrap_or(host.runtime_dir.clone());
        let socket = crate::host::agent_socket(&runtime_dir, &spec.run_id);
        view.agent = socket.parent().filter(|_| socket.exists()).map(Path::to_owned);
        view.binary |= view.agent.is_some();
    }
}

/// The command for a sandbox.
pub fn command(prepare: &Prepare, sandbox: &Compiled) -> Result<Command, Refusal> {
    let (handed, environment) = environment::environment(prepare, sandbox)?;
    Ok(Command {
        handed,
        environment,
        programs: programs(prepare, &sandbox.profile, &sandbox.home)?,
        argv: prepare
            .argv
            .iter()
            .map(|a| c_string(a.clone(), "an argument"))
            .collect::<Result<_, _>>()?,
    })
}

pub fn builtin_filter(name: &str) -> Result<BuiltIn, Refusal> {
    BuiltIn::named(name).ok_or_else(|| {
        invalid(format!("there is no seccomp filter `{name}`"), "name one of `seccomp/`")
    })
}

/// Where the profile shows a `/var` of its own, tokens are found by that one's link to `/run`.
/// Of a container's it is looked for in its tree.
fn refuse_hidden_identities(
    layout: &Layout,
    trees: &BTreeMap<PathBuf, OwnedFd>,
) -> Result<(), Refusal> {
    let Some((at, entry)) = layout.covering(Path::new(layout::VAR_RUN)) else { return Ok(()) };
    let below = Path::new(layout::VAR_RUN).strip_prefix(at).unwrap_or(Path::new(""));
    let link = match entry {
        Entry::Bind { source, .. } => std::fs::read_link(source.join(below)).ok(),
        Entry::OfContainer { is_directory: true } => trees.get(at).and_then(|tree| {
            let to = rustix::fs::readlinkat(tree, below, Vec::new()).ok()?;
            Some(PathBuf::from(std::ffi::OsStr::from_bytes(to.as_bytes())))
        }),
        _ => None,
    };
    if link.is_some_and(|to| to == Path::new("/run") || to == Path::new("../run")) {
        return Ok(());
    }
    Err(invalid(
        format!(
            "the profile shows {} over the place of workload identities, {}, and it has no link there to \
             /run",
            at.display(),
            layout::VAR_RUN
        ),
        "make /var/run of the image a link to /run, or do not show it",
    ))
}

fn unclear(error: &Unclear) -> Refusal {
    invalid(
        format!("it is not known what may be shown: {}", chain(error)),
        "make that path one that can be looked at, or name another",
    )
}

/// What a profile shows is opened without following a link ([`root`](crate::sandbox::root)), and root's own are resolved
/// before: whoever owns a directory on the way must not lead it to what only root may read.
fn settle_ways(layout: &mut Layout) -> Result<(), Refusal> {
    let mut known: BTreeMap<PathBuf, PathBuf> = BTreeMap::new();
    for entry in layout.entries.values_mut() {
        let Entry::Bind { source, .. } = entry else { continue };
        let (Some(above), Some(name)) = (source.parent(), source.file_name()) else { continue };
        let settled = match known.get(above) {
            Some(settled) => settled.clone(),
            None => match trusted::settled(above) {
                Ok(settled) => known.entry(above.to_owned()).or_insert(settled).clone(),
                // The kernel's own word: told where it is opened, or passed over where it need not be there.
                Err(e) if e.raw_os_error().is_some() => continue,
                Err(e) => {
                    return Err(invalid(
                        format!("the profile cannot show {}: {e}", source.display()),
                        "name the place itself, or give the directory that holds the link to root",
                    ));
                }
            },
        };
        *source = settled.join(name);
    }
    Ok(())
}

/// A profile shows nothing that may not be a workspace's either.
fn refuse_guarded(layout: &Layout, guard: &Guard) -> Result<(), Refusal> {
    let sources = layout.entries.values().filter_map(|entry| match entry {
        Entry::Bind { source, .. } => Some(source),
        _ => None,
    });
    for source in sources {
        if let Some(why) = guard.objection(source).map_err(|e| unclear(&e))? {
            return Err(invalid(
                format!("the profile cannot show {}: {why}", source.display()),
                "list what is needed below it, or move what it holds",
            ));
        }
    }
    Ok(())
}

/// The workspace owner's ids, so that the exec's user namespace serves for the mapping as well; never
/// root's.
fn inside(mode: Mode, workspace: Option<&Workspace>) -> (u32, u32) {
    let ordinary = |id: u32| if id == 0 { ORDINARY_UID } else { id };
    let (uid, gid) = match mode {
        Mode::Privileged => workspace.map_or((ORDINARY_UID, ORDINARY_UID), |w| (w.uid, w.gid)),
        Mode::Rootless => {
            (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw())
        }
    };
    (ordinary(uid), ordinary(gid))
}

fn view(
    spec: &Spec,
    profile: &Profile,
    workspace: Option<&Workspace>,
    inside: (u32, u32),
    home: &Path,
) -> Result<View, Refusal> {
    let resolve = |entries: &[crate::profile::BindEntry]| {
        entries
            .iter()
            .map(|e| HostPath { path: e.path.resolve(home), optional: e.optional })
            .collect()
    };
    let image = match &profile.filesystem.root {
        None => None,
        Some(root) => {
            let root = root.resolve(home);
            let names = std::fs::read_dir(&root)
                .and_then(|entries| {
                    entries
                        .map(|e| Ok(PathBuf::from(e?.file_name())))
                        .collect::<Result<Vec<_>, _>>()
                })
                .map_err(|e| {
                    invalid(
                        format!("could not read the image {}: {e}", root.display()),
                        "filesystem.root names an unpacked root file system",
                    )
                })?;
            // What sublet builds itself. `/etc` is the image's: users and hosts are as it says.
            let own = ["proc", "dev", "sys", "run", "tmp"];
            let kept = names.into_iter().filter(|n| !own.iter().any(|o| n == Path::new(o)));
            Some((root, kept.collect()))
        }
    };
    let resolver = match profile.network.mode {
        NetworkMode::Host => std::fs::read("/etc/resolv.conf").ok(),
        NetworkMode::None | NetworkMode::Audience => None,
    };
    Ok(View {
        read_only: resolve(&profile.filesystem.read_only),
        read_write: resolve(&profile.filesystem.read_write),
        image,
        workspace: workspace.map(|w| (w.path.clone(), w.access)),
        home: profile.filesystem.home.resolve(home),
        uid: inside.0,
        gid: inside.1,
        hostname: "sublet".to_owned(),
        resolver,
        binary: spec.binary,
        agent: None,
        identities: has_identities(profile),
    })
}

/// Whether some capability of the profile is delivered as a workload identity.
pub fn has_identities(profile: &Profile) -> bool {
    profile.capabilities.iter().any(|c| c.channels.contains(&Channel::Token))
}

/// Where the command may be: the resolved program, the path as given, or each directory of the PATH.
fn programs(prepare: &Prepare, profile: &Profile, home: &Path) -> Result<Vec<CString>, Refusal> {
    let Some(name) = prepare.argv.first().filter(|n| !n.is_empty()) else {
        return Err(invalid("there is no command".into(), "write it behind `--`"));
    };
    if let Some(program) = &prepare.program {
        return Ok(vec![c_string(program.as_os_str().as_bytes().to_vec(), "the command")?]);
    }
    if name.contains(&b'/') {
        return Ok(vec![c_string(name.clone(), "the command")?]);
    }
    profile
        .environment
        .path
        .iter()
        .map(|directory| {
            let mut path = directory.resolve(home).into_os_string().into_encoded_bytes();
            path.push(b'/');
            path.extend(name);
            c_string(path, "the command")
        })
        .collect()
}

fn c_string(bytes: Vec<u8>, what: &str) -> Result<CString, Refusal> {
    CString::new(bytes).map_err(|_| {
        invalid(format!("{what} has a NUL byte in it"), "no program can be given one (execve(2))")
    })
}

/// An error with all that caused it, in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}
