//! Which file a command's first word names in a container, and whether that file can be relied on: neither
//! the exec nor the container's own user may be able to change it, or put another in its place.
//!
//! Runs in the survey's child. Follows links by itself, below the root that it was given, so that every
//! directory on the way is looked at.
#![forbid(unsafe_code)]

use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags, StatVfsMountFlags, fstat, fstatvfs, openat, readlinkat};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

/// As the kernel has it.
const MAX_LINKS: u32 = 40;

/// What is asked.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Search {
    pub name: Vec<u8>,
    /// The profile's PATH.
    pub path: Vec<PathBuf>,
    /// Where a name with a slash begins.
    pub directory: PathBuf,
    /// What the exec can write.
    pub writable: Vec<PathBuf>,
    /// The container's own user, on the host.
    pub owner: u32,
}

/// argv\[0\] as a file of the container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Found {
    pub path: PathBuf,
    pub found_on_path: bool,
    pub can_be_changed: bool,
}

pub fn find(root: BorrowedFd<'_>, search: &Search) -> Option<Found> {
    let name = OsStr::from_bytes(&search.name);
    let first_on_path = |name: &OsStr| {
        search.path.iter().map(|d| d.join(name)).find(|p| resolve(root, p).is_ok_and(|r| r.runs))
    };
    let (path, found_on_path) = if search.name.contains(&b'/') {
        let path = search.directory.join(name);
        let first = path.file_name().and_then(first_on_path);
        let found = first.is_some_and(|first| first == path);
        (path, found)
    } else {
        (first_on_path(name)?, true)
    };
    let can_be_changed = match resolve(root, &path) {
        Ok(resolved) => {
            let below =
                |place: &PathBuf| path.starts_with(place) || resolved.real.starts_with(place);
            resolved.owned_by(search.owner) || search.writable.iter().any(below)
        }
        Err(_) => true,
    };
    Some(Found { path, found_on_path, can_be_changed })
}

/// Where a path leads, and who owns what on the way.
struct Resolved {
    real: PathBuf,
    runs: bool,
    /// Owners of what lies on a writable mount; none where others may write it.
    owners: Vec<Option<u32>>,
}

impl Resolved {
    /// Root of the container owns what it is in, and with it everything of the container.
    fn owned_by(&self, user: u32) -> bool {
        self.owners.iter().any(|owner| owner.is_none_or(|owner| owner == user || user == 0))
    }
}

fn resolve(root: BorrowedFd<'_>, path: &Path) -> Result<Resolved, Errno> {
    let mut ahead: Vec<Vec<u8>> = parts(path);
    let mut behind: Vec<(OwnedFd, PathBuf)> = Vec::new();
    let mut resolved = Resolved { real: PathBuf::from("/"), runs: false, owners: Vec::new() };
    let top = rustix::io::fcntl_dupfd_cloexec(root, 0)?;
    resolved.owners.extend(owner(top.as_fd())?);
    behind.push((top, PathBuf::from("/")));
    let mut links = 0;
    while let Some(name) = ahead.pop() {
        if name == b".." {
            if behind.len() > 1 {
                behind.pop();
            }
            continue;
        }
        let (above, real) = behind.last().ok_or(Errno::NOENT)?;
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let name = OsStr::from_bytes(&name);
        let opened = openat(above, name, flags, Mode::empty())?;
        let found = fstat(&opened)?;
        match FileType::from_raw_mode(found.st_mode) {
            FileType::Symlink => {
                links += 1;
                if links > MAX_LINKS {
                    return Err(Errno::LOOP);
                }
                let target = readlinkat(above, name, Vec::new())?;
                let target = Path::new(OsStr::from_bytes(target.to_bytes()));
                if target.is_absolute() {
                    behind.truncate(1);
                }
                ahead.extend(parts(target));
            }
            FileType::Directory => {
                resolved.owners.extend(owner(opened.as_fd())?);
                let real = real.join(name);
                behind.push((opened, real));
            }
            FileType::RegularFile if ahead.is_empty() => {
                resolved.owners.extend(owner(opened.as_fd())?);
                resolved.real = real.join(name);
                resolved.runs = found.st_mode & 0o111 != 0;
                return Ok(resolved);
            }
            _ => return Err(Errno::ACCESS),
        }
    }
    Err(Errno::ACCESS)
}

/// The last first. `..` stays: what it leads to is known only on the way.
fn parts(path: &Path) -> Vec<Vec<u8>> {
    let part = |part: Component<'_>| match part {
        Component::Normal(name) => Some(name.as_bytes().to_vec()),
        Component::ParentDir => Some(b"..".to_vec()),
        _ => None,
    };
    let mut parts: Vec<_> = path.components().filter_map(part).collect();
    parts.reverse();
    parts
}

/// Nothing where the mount is read-only.
fn owner(of: BorrowedFd<'_>) -> Result<Option<Option<u32>>, Errno> {
    if fstatvfs(of)?.f_flag.contains(StatVfsMountFlags::RDONLY) {
        return Ok(None);
    }
    let found = fstat(of)?;
    let sticky = FileType::from_raw_mode(found.st_mode) == FileType::Directory
        && found.st_mode & 0o1000 != 0;
    let others = found.st_mode & 0o022 != 0 && !sticky;
    Ok(Some((!others).then_some(found.st_uid)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::unix::fs::{PermissionsExt, symlink};

    #[test]
    fn a_command_is_found_below_the_root_and_who_could_change_it_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let mode = |name: &str, mode| {
            std::fs::set_permissions(at(name), std::fs::Permissions::from_mode(mode)).unwrap();
        };
        std::fs::create_dir_all(at("usr/bin")).unwrap();
        std::fs::create_dir(at("work")).unwrap();
        symlink("usr/bin", at("bin")).unwrap();
        for name in ["usr/bin/tool", "work/tool", "work/other"] {
            std::fs::write(at(name), "").unwrap();
            mode(name, 0o755);
        }
        for name in ["", "usr", "usr/bin", "work"] {
            mode(name, 0o755);
        }
        symlink("/../../usr/bin/tool", at("usr/bin/climbs")).unwrap();
        symlink("/work/other", at("usr/bin/astray")).unwrap();
        symlink("round", at("usr/bin/round")).unwrap();
        let root = File::open(dir.path()).unwrap();
        let us = rustix::process::geteuid().as_raw();
        let search = |name: &str, owner| Search {
            name: name.into(),
            path: vec!["/usr/local/bin".into(), "/bin".into()],
            directory: "/work".into(),
            writable: vec!["/work".into(), "/tmp".into()],
            owner,
        };
        let found = |name: &str, owner| find(root.as_fd(), &search(name, owner));
        let tool = found("tool", us + 77).unwrap();
        assert_eq!((tool.path, tool.found_on_path), ("/bin/tool".into(), true));
        assert!(!tool.can_be_changed, "nobody but another user could");
        assert!(found("tool", us).unwrap().can_be_changed, "its owner");
        assert!(found("tool", 0).unwrap().can_be_changed, "root");
        assert!(!found("climbs", us + 77).unwrap().can_be_changed);
        assert!(found("astray", us + 77).unwrap().can_be_changed, "it leads where the exec writes");
        assert!(found("./tool", us + 77).unwrap().can_be_changed);
        assert!(!found("./tool", us + 77).unwrap().found_on_path);
        assert_eq!(found("round", us), None);
        assert_eq!(found("none", us), None);
        mode("usr/bin", 0o777);
        assert!(found("tool", us + 77).unwrap().can_be_changed, "anyone could");
    }
}
