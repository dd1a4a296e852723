//! Whose the state is. `serve` gives it to the broker's user; root's own commands then become that user
//! before they touch it, so that nothing which that user may have put there works with root's rights.
#![forbid(unsafe_code)]

use std::fs::Metadata;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};
use rustix::process::Resource;

use super::limit;
use crate::sys::memory;

#[derive(Debug, thiserror::Error)]
pub enum OwnerError {
    #[error("could not look at {path}")]
    Unreadable { path: PathBuf, source: io::Error },
    #[error(
        "refused to use the state in {path} as root: it belongs to uid {owner}, and the directory around it to uid {above}; run as that user, or choose another with --state-dir"
    )]
    Foreign { path: PathBuf, owner: u32, above: u32 },
    #[error("could not become uid {uid}, to whom the state belongs: {step}")]
    Become { uid: u32, step: &'static str, source: io::Error },
    #[error("became uid {uid}, to whom the state belongs, and could have become root again")]
    Regained { uid: u32 },
}

/// `beside_roots`: whether a process of root's goes on to write in the state's directory.
pub(super) fn become_owner_of(state_dir: &Path, beside_roots: bool) -> Result<(), OwnerError> {
    if !rustix::process::geteuid().is_root() {
        return Ok(());
    }
    let path = state_dir.join("db");
    // No link is followed: it would lead to an owner of someone's choice.
    let (Some(db), Some(above)) = (found(&path, false)?, found(state_dir, true)?) else {
        return Ok(());
    };
    match (db.uid(), above.uid()) {
        (0, _) => Ok(()),
        (owner, 0) => settle_as(owner, db.gid()),
        (owner, above) if above == owner && !beside_roots => settle_as(owner, db.gid()),
        (owner, above) => Err(OwnerError::Foreign { path, owner, above }),
    }
}

fn found(path: &Path, follow: bool) -> Result<Option<Metadata>, OwnerError> {
    let looked = if follow { path.metadata() } else { path.symlink_metadata() };
    match looked {
        Ok(found) => Ok(Some(found)),
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            Ok(None)
        }
        Err(source) => Err(OwnerError::Unreadable { path: path.to_owned(), source }),
    }
}

/// Becomes `uid` and `gid` for good: the kernel empties the capability sets when the last of the three
/// uids leaves 0 (capabilities(7)).
fn settle_as(uid: u32, gid: u32) -> Result<(), OwnerError> {
    let failed = |step| move |source| OwnerError::Become { uid, step, source };
    let errno = |step| move |e: nix::errno::Errno| failed(step)(e.into());
    // The limit that does not bind root binds whom it becomes.
    limit::raise(Resource::Memlock, limit::LOCKED_MEMORY).map_err(failed("setrlimit"))?;
    let (user, group) = (Uid::from_raw(uid), Gid::from_raw(gid));
    setgroups(&[]).map_err(errno("setgroups"))?;
    setresgid(group, group, group).map_err(errno("setresgid"))?;
    setresuid(user, user, user).map_err(errno("setresuid"))?;
    // The same user's other processes must not look at what root gave to this one.
    memory::set_dumpable(false).map_err(failed("become undumpable"))?;
    let root = Uid::from_raw(0);
    let keep = Uid::from_raw(u32::MAX);
    let capabilities = caps::read(None, caps::CapSet::Permitted)
        .map_err(|e| failed("read the capabilities")(io::Error::other(e)))?;
    if setresuid(keep, root, keep).is_ok()
        || setresgid(Gid::from_raw(u32::MAX), Gid::from_raw(0), Gid::from_raw(u32::MAX)).is_ok()
        || !capabilities.is_empty()
    {
        return Err(OwnerError::Regained { uid });
    }
    Ok(())
}
