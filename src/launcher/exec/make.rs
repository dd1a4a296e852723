//! What is made for one exec: its streams, and the workspace's tree.
#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use super::user::{Ids, Mapped};
use super::{refuse, refuse_error};
use crate::delivery::container::Owner;
use crate::launcher::compile::{self, Workspace};
use crate::launcher::posture::Ownership;
use crate::launcher::wire::{Prepare, Refusal, RefusalKind};
use crate::sandbox::identity::{Identity, IdmapNamespace, Mode};
use crate::sandbox::layout::Access;
use crate::sandbox::root;
use crate::sys::helper::Helper;
use crate::sys::mount::{self, MountAttributes};

/// The command's streams; none where it gets a terminal.
pub(super) struct Streams {
    /// Standard input, output and error as the command has them.
    pub inside: Vec<OwnedFd>,
    /// Their other ends, for the broker.
    pub outside: Vec<OwnedFd>,
}

/// Pipes of the exec's uid, so that it can reopen them (`/dev/stdout`); the broker relays, and writes over
/// what a value went through, as a user of its own. Nobody else comes to a pipe: it lies in no directory, and
/// following a link of `/proc/PID/fd` takes the right to trace that process (proc(5)).
pub(super) fn make_streams(order: &Prepare, owner: Owner) -> Result<Streams, Refusal> {
    if order.terminal.is_some() {
        return Ok(Streams { inside: Vec::new(), outside: Vec::new() });
    }
    let output = if order.deliveries.is_empty() { 0o600 } else { 0o602 };
    let pipe = |mode: u32| -> io::Result<(OwnedFd, OwnedFd)> {
        let (read, write) = io::pipe()?;
        let (read, write): (OwnedFd, OwnedFd) = (read.into(), write.into());
        if owner.uid != rustix::process::geteuid().as_raw() {
            rustix::fs::fchown(
                &read,
                Some(rustix::fs::Uid::from_raw(owner.uid)),
                Some(rustix::fs::Gid::from_raw(owner.gid)),
            )?;
            if mode != 0o600 {
                rustix::fs::fchmod(&read, rustix::fs::Mode::from(mode))?;
            }
        }
        Ok((read, write))
    };
    let failed = |e: io::Error| refuse_error(&e, "");
    let (stdin, stdin_end) = pipe(0o600).map_err(failed)?;
    let (stdout_end, stdout) = pipe(output).map_err(failed)?;
    let (stderr_end, stderr) = pipe(output).map_err(failed)?;
    Ok(Streams {
        inside: vec![stdin, stdout, stderr],
        outside: vec![stdin_end, stdout_end, stderr_end],
    })
}

pub(super) fn delivery_unavailable(error: &dyn std::error::Error) -> Refusal {
    Refusal {
        kind: RefusalKind::DeliveryUnavailable,
        message: compile::chain(error),
        hint: "`sublet doctor` shows what this host can and cannot do".to_owned(),
    }
}

/// Whether the workspace can be mapped; where its file system cannot, the exec becomes its owner.
pub fn ownership(
    mode: Mode,
    workspace: Option<&Workspace>,
    identity: &mut Identity,
) -> Result<Ownership, Refusal> {
    let (Mode::Privileged, Some(workspace)) = (mode, workspace) else {
        return Ok(Ownership::Plain);
    };
    let kind = match workspace.file_system {
        0x794c_7630 => "overlayfs",
        0x6969 => "nfs",
        0x0102_1997 => "9p",
        0x6573_5546 => "fuse",
        0x6a65_6a62 => "virtiofs",
        0x0102_1994 if is_before((6, 3)) => "tmpfs before Linux 6.3",
        // Tried, and an error says so: see `workspace_tree`.
        _ => return Ok(Ownership::Idmapped),
    };
    let shown = workspace.path.display();
    if workspace.uid == 0 && workspace.access == Access::ReadWrite {
        return Err(refuse(
            format!(
                "{shown} belongs to root on {kind}, which cannot be idmapped: an exec that may write \
                 there would have to be root on this host"
            ),
            "give it to an ordinary user (`chown -R 1000:1000 DIR`), use a profile with \
             `workspace = \"ro\"`, or put it on ext4, xfs, btrfs or tmpfs",
        ));
    }
    if workspace.uid == 0 {
        // Read by what its mode gives to others; the exec keeps the uid of its own.
        return Ok(Ownership::Plain);
    }
    // The pool's slot stays taken: its number may still serve as the gid.
    identity.outside_uid = workspace.uid;
    if workspace.gid != 0 {
        identity.outside_gid = workspace.gid;
    }
    Ok(Ownership::AsOwner { why: format!("a uid of its own ({kind} cannot be idmapped)") })
}

/// Whether the kernel is older. One that does not say is taken for a newer one, and then tried.
fn is_before(version: (u32, u32)) -> bool {
    let uname = rustix::system::uname();
    let release = uname.release().to_string_lossy().into_owned();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => (major, minor) < version,
        _ => false,
    }
}

/// The ids of a workspace that a namespace of its own maps: not where it is not mapped, and not where the exec's
/// own does.
pub(super) fn on_disk(
    workspace: &Workspace,
    identity: &Identity,
    ownership: &Ownership,
) -> Option<Ids> {
    let ids = (workspace.uid, workspace.gid);
    let is_mapped = matches!(ownership, Ownership::Idmapped);
    (is_mapped && ids != (identity.inside_uid, identity.inside_gid)).then_some(ids)
}

/// The tree, and a helper that may be reaped later. `mapped`: what may have been made for it.
pub(super) fn workspace_tree(
    workspace: &Workspace,
    identity: &Identity,
    pid: i32,
    ownership: &Ownership,
    mapped: Option<Mapped>,
) -> Result<(OwnedFd, Option<Helper>), Refusal> {
    let shown = workspace.path.display();
    let tree = match workspace.is_clone {
        true => rustix::io::fcntl_dupfd_cloexec(&workspace.directory, 0),
        false => root::clone_tree(workspace.directory.as_fd()),
    }
    .map_err(|e| refuse(format!("could not show {shown} inside: {e}"), ""))?;
    let idmap = match ownership {
        Ownership::Plain | Ownership::AsOwner { .. } => None,
        Ownership::Idmapped => {
            let outside = (identity.outside_uid, identity.outside_gid);
            let namespace = match on_disk(workspace, identity, ownership) {
                None => IdmapNamespace::of_child(pid),
                Some(on_disk) => match mapped.and_then(|mapped| mapped.of(on_disk, outside)) {
                    Some(made) => Ok(made),
                    None => IdmapNamespace::new(on_disk, outside),
                },
            };
            Some(namespace.map_err(|e| refuse_error(&e, ""))?)
        }
    };
    let read_only = match workspace.access {
        Access::ReadOnly => mount::RDONLY,
        Access::ReadWrite => 0,
    };
    let attributes = MountAttributes {
        set: read_only | mount::NOSUID | mount::NODEV,
        recursive: true,
        idmap: idmap.as_ref().map(|namespace| namespace.fd.as_fd()),
    };
    mount::set_attributes(&tree, &attributes).map_err(|e| {
        refuse(
            format!("could not map the owner of {shown}: {e}"),
            "a file system in it cannot be idmapped: unmount it, or use another workspace",
        )
    })?;
    Ok((tree, idmap.and_then(IdmapNamespace::into_helper)))
}
