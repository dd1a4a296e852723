//! The sandbox of an exec in a running container: laid out of the container's root, read-only but for the
//! workspace, under a `/proc`, `/dev`, `/run` and `/tmp` of the exec's own.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};

use super::{Compiled, Workspace, has_identities, invalid, refuse_hidden_identities, show_agent};
use crate::host::Host;
use crate::launcher::into::program::{Found, Search};
use crate::launcher::into::survey::{Kind, survey};
use crate::launcher::into::{self, InContainer, Survey, Target, Wanted};
use crate::launcher::wire::{Find, Refusal, Spec};
use crate::profile::{NetworkMode, Profile, WorkspaceAccess};
use crate::sandbox::identity::{Mode, ORDINARY_UID};
use crate::sandbox::layout::{self, Access, Entry, View};

/// The container that an exec is to be in, if it is to be in one.
pub(super) fn target(spec: &Spec, host: &Host, mode: Mode) -> Result<Option<Target>, Refusal> {
    let found = Target::of(&spec.run_id, &spec.into, &spec.workspace, host, host.trusts(), mode)?;
    let InContainer { pid: _, user, directory } = &spec.into;
    if found.is_none() && (user.is_some() || directory.is_some()) {
        return Err(invalid(
            "a user and a working directory can be named in a container alone".to_owned(),
            "leave them out, or name a container's process with --into",
        ));
    }
    Ok(found)
}

pub(super) fn sandbox(
    target: &Target,
    spec: &Spec,
    host: &Host,
    mut profile: Profile,
    home: PathBuf,
) -> Result<Compiled, Refusal> {
    // What a profile says of the network it says of the host's. The container's own wall is what its
    // runtime made of it; `without_network` goes behind another.
    if !spec.without_network {
        profile.network.mode = NetworkMode::Host;
    }
    let access = access(&profile, target);
    let wanted =
        Wanted { root: true, workspace: access.map(|_| target.workspace.clone()), program: None };
    let Survey { names, workspace, program: _ } = survey(target, &wanted)?;
    let (inside, on_disk) = ids(target, spec, workspace.as_ref().map(|(s, _)| (s.uid, s.gid)))?;
    let workspace = workspace
        .zip(access)
        .map(|(found, access)| Workspace::of_container(&target.workspace, found, on_disk, access));

    let mut view = View {
        read_only: Vec::new(),
        read_write: Vec::new(),
        image: None,
        workspace: workspace.as_ref().map(|w| (w.path.clone(), w.access)),
        home: profile.filesystem.home.resolve(&home),
        uid: inside.0,
        gid: inside.1,
        hostname: "sublet".to_owned(),
        resolver: None,
        binary: spec.binary,
        agent: None,
        identities: has_identities(&profile),
    };
    show_agent(&mut view, spec, host);
    let mut layout = layout::layout(&view);
    if names.iter().any(|name| name.path == Path::new("etc")) {
        // Its own, whatever it is: nothing of ours is written where a link of its could lead.
        layout.entries.retain(|at, _| !at.starts_with("/etc"));
    }
    if names.iter().any(|name| name.path == Path::new("var")) {
        // Its own too: whether there is a way to /run is looked at below.
        layout.entries.remove(Path::new(layout::VAR_RUN));
    }
    let mut trees = std::collections::BTreeMap::new();
    for name in names {
        let at = Path::new("/").join(&name.path);
        // A directory of the root that is the workspace itself comes as that.
        if layout.entries.contains_key(&at) {
            continue;
        }
        let entry = match name.kind {
            Kind::Directory => Entry::OfContainer { is_directory: true },
            Kind::File => Entry::OfContainer { is_directory: false },
            Kind::Link { target } => {
                // What would lie behind it is not made: see `add` in `sandbox/root.rs`.
                layout.entries.retain(|inner, _| !inner.starts_with(&at));
                let target = <std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(&target);
                Entry::Symlink { target: target.into() }
            }
        };
        trees.extend(name.tree.map(|tree| (at.clone(), tree)));
        layout.entries.insert(at, entry);
    }
    if has_identities(&profile) {
        refuse_hidden_identities(&layout, &trees)?;
    }
    let directory = spec.into.directory.clone();
    if let Some(directory) = directory.as_deref().filter(|d| !into::is_plain(d)) {
        return Err(invalid(
            format!("{} is no absolute path without `..`", directory.display()),
            "name a directory of the container with --workdir",
        ));
    }
    let working_directory = directory.unwrap_or_else(|| target.workspace.clone());
    let network = match profile.network.mode {
        NetworkMode::Host => {
            Some(target.network().map_err(|e| invalid(e.to_string(), "too many open files"))?)
        }
        NetworkMode::None | NetworkMode::Audience => None,
    };
    let compiled = Compiled::of(profile, workspace, inside, layout, home, working_directory)?;
    Ok(Compiled { is_in_container: true, trees, network, ..compiled })
}

/// Which file a command is in the container, and who could change it.
pub fn find(find: &Find, host: &Host, mode: Mode) -> Result<Option<Found>, Refusal> {
    let profile = host
        .profile(&find.profile)
        .map_err(|e| invalid(super::chain(&e), "`sublet profile list` names the profiles"))?;
    let target = Target::of(&find.run_id, &find.into, &find.workspace, host, host.trusts(), mode)?;
    let target = target.ok_or_else(|| {
        invalid("the run is no container's".to_owned(), "name a container's process with --into")
    })?;
    let home = host.home_for(find.home.as_deref());
    let mut writable = vec![
        PathBuf::from("/tmp"),
        PathBuf::from("/dev"),
        PathBuf::from("/run"),
        profile.filesystem.home.resolve(home),
    ];
    if access(&profile, &target) == Some(Access::ReadWrite) {
        writable.push(target.workspace.clone());
    }
    let search = Search {
        name: find.name.clone(),
        path: profile.environment.path.iter().map(|d| d.resolve(home)).collect(),
        directory: find.into.directory.clone().unwrap_or_else(|| target.workspace.clone()),
        writable,
        owner: target.owner,
    };
    let wanted = Wanted { program: Some(search), ..Wanted::default() };
    Ok(survey(&target, &wanted)?.program)
}

fn access(profile: &Profile, target: &Target) -> Option<Access> {
    if !into::can_be_a_workspace(&target.workspace) {
        return None;
    }
    match profile.filesystem.workspace {
        WorkspaceAccess::None => None,
        WorkspaceAccess::Ro => Some(Access::ReadOnly),
        WorkspaceAccess::Rw => Some(Access::ReadWrite),
    }
}

/// Who the command is in there, and whose files on the host it has in the workspace.
#[allow(clippy::type_complexity, reason = "two pairs of ids")]
fn ids(
    target: &Target,
    spec: &Spec,
    owner: Option<(u32, u32)>,
) -> Result<((u32, u32), (u32, u32)), Refusal> {
    if let Some(user) = spec.into.user {
        let on_disk = target.on_host(user).ok_or_else(|| {
            invalid(
                format!("the container has no user {}:{}", user.0, user.1),
                "name one that its user namespace maps",
            )
        })?;
        // Root of the container may be anyone in it already.
        let is_free = target.agent.is_none_or(|agent| {
            agent == on_disk || target.inside(agent).is_some_and(|(uid, _)| uid == 0)
        });
        if !is_free {
            return Err(invalid(
                format!("an agent of this container is no user {}:{} of it", user.0, user.1),
                "leave --user out: it is the container's own (process.user)",
            ));
        }
        return Ok((user, on_disk));
    }
    // An agent gets no files by sublet that it has not by itself.
    let owner = target.agent.or(owner);
    let ordinary = |id: u32| if id == 0 { ORDINARY_UID } else { id };
    let on_disk = owner.unwrap_or((ORDINARY_UID, ORDINARY_UID));
    let (uid, gid) = target.inside(on_disk).unwrap_or((ORDINARY_UID, ORDINARY_UID));
    Ok(((ordinary(uid), ordinary(gid)), on_disk))
}
