//! Which files only root or we could have written: nobody else can change them, or put others in their
//! place.
//!
//! In a user namespace that root is not mapped into (the rootless launcher's), all strangers look alike,
//! root included (user_namespaces(7), overflow uid): then a directory of theirs counts as root's, and a
//! file only below `/etc`, whose way there is root's on every host.
#![forbid(unsafe_code)]

use std::fs::Metadata;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use rustix::io::Errno;

/// Refuses a file that someone else could have written, or could have led the way to: what stands before a link is
/// judged as it is written, and what stands behind it as it is.
///
/// # Errors
/// [`io::ErrorKind::PermissionDenied`] with the reason; and those of looking.
pub fn refuse_foreign(path: &Path) -> io::Result<()> {
    // Without a slash or a dot at its end, behind which the kernel looks through a link.
    let path: &Path = &path.components().collect::<PathBuf>();
    // As it is written, if no link is on its way: each place is looked at once, and none is asked for its link.
    let is_plain = path.is_absolute() && !path.components().any(|c| c == Component::ParentDir);
    if is_plain && refuse_foreign_way(path)? {
        return Ok(());
    }
    let real = path.canonicalize()?;
    if refuse_foreign_way(&real)? {
        return Ok(());
    }
    Err(io::Error::other(format!("{} was changed while it was looked at", path.display())))
}

/// False where a link is on the way.
fn refuse_foreign_way(path: &Path) -> io::Result<bool> {
    let us = rustix::process::geteuid().as_raw();
    // From the top: once a directory is ours alone, nothing below can be swapped.
    let mut from_the_top: Vec<&Path> = path.ancestors().collect();
    from_the_top.reverse();
    for place in from_the_top {
        let found = std::fs::symlink_metadata(place)?;
        if found.is_symlink() {
            return Ok(false);
        }
        let is_etc = found.is_dir() || path.starts_with("/etc");
        if let Some(why) = objection(&found, us, is_etc) {
            return Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                format!("{} {why}; a service takes only what root wrote", place.display()),
            ));
        }
    }
    Ok(true)
}

/// The directory with every link on the way to it resolved, if nobody but root or us could have made one of them.
///
/// # Errors
/// [`io::ErrorKind::PermissionDenied`] with the reason; and those of looking.
pub fn settled(directory: &Path) -> io::Result<PathBuf> {
    /// As the kernel, path_resolution(7).
    const MOST_LINKS: usize = 40;
    let us = rustix::process::geteuid().as_raw();
    let mut asked = directory.to_owned();
    'links: for _ in 0..MOST_LINKS {
        let mut settled = PathBuf::from("/");
        let mut stranger = None;
        let mut names = asked.components();
        while let Some(name) = names.next() {
            let name = match name {
                Component::Normal(name) => name,
                Component::ParentDir => {
                    settled.pop();
                    continue;
                }
                _ => continue,
            };
            let above = std::fs::symlink_metadata(&settled)?;
            stranger = stranger.or_else(|| {
                let why = objection(&above, us, true)?;
                Some(format!("{} {why}", settled.display()))
            });
            settled.push(name);
            // What stands in a directory that is sticky may be anyone's.
            let found = std::fs::symlink_metadata(&settled)?;
            if !found.is_symlink() {
                continue;
            }
            let is_strangers = !is_ours_or_roots(&found, us, true);
            let own = is_strangers.then(|| format!("it belongs to uid {}", found.uid()));
            if let Some(why) = stranger.or(own) {
                let message =
                    format!("{} is a link that a stranger may have made: {why}", settled.display());
                return Err(io::Error::new(io::ErrorKind::PermissionDenied, message));
            }
            let target = std::fs::read_link(&settled)?;
            settled.pop();
            asked = settled.join(target).join(names.as_path());
            continue 'links;
        }
        return Ok(settled);
    }
    Err(Errno::LOOP.into())
}

/// `may_be_root`: whether a stranger who may be root counts as root.
fn is_ours_or_roots(found: &Metadata, us: u32, may_be_root: bool) -> bool {
    const OVERFLOW: u32 = 65_534;
    let root_is_hidden = || std::fs::metadata("/").is_ok_and(|root| root.uid() == OVERFLOW);
    let is_root = found.uid() == 0 || (may_be_root && found.uid() == OVERFLOW && root_is_hidden());
    is_root || found.uid() == us
}

fn objection(found: &Metadata, us: u32, may_be_root: bool) -> Option<String> {
    if !is_ours_or_roots(found, us, may_be_root) {
        return Some(format!("belongs to uid {}", found.uid()));
    }
    // In a sticky directory others can make files, and cannot replace these (sticky of chmod(1)).
    let sticky = found.is_dir() && found.mode() & 0o1000 != 0;
    if found.mode() & 0o022 != 0 && !sticky {
        return Some(format!(
            "has mode {:04o}, so that others may write it",
            found.mode() & 0o7777
        ));
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_way_is_settled_through_our_own_links_alone() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().canonicalize().unwrap();
        std::fs::create_dir_all(base.join("real/below")).unwrap();
        std::os::unix::fs::symlink("real", base.join("link")).unwrap();
        std::os::unix::fs::symlink("link/../link", base.join("climb")).unwrap();
        for way in ["real/below", "link/below", "climb/below", "link/../real/./below"] {
            assert_eq!(settled(&base.join(way)).unwrap(), base.join("real/below"), "{way}");
        }
        std::os::unix::fs::symlink("round", base.join("round")).unwrap();
        assert_eq!(settled(&base.join("round")).unwrap_err().raw_os_error(), Some(libc::ELOOP));
        let missing = settled(&base.join("none/below")).unwrap_err();
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
        let shared = base.join("shared");
        std::fs::create_dir(&shared).unwrap();
        std::os::unix::fs::symlink(base.join("real"), shared.join("way")).unwrap();
        assert_eq!(settled(&shared.join("way/below")).unwrap(), base.join("real/below"));
        std::fs::set_permissions(&shared, std::fs::Permissions::from_mode(0o777)).unwrap();
        let refused = settled(&shared.join("way/below")).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::PermissionDenied, "{refused}");
    }

    #[test]
    fn only_what_no_one_else_could_have_written() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("p.toml");
        std::fs::write(&file, "").unwrap();
        let mode = |path: &Path, mode| {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
        };
        mode(&file, 0o644);
        refuse_foreign(&file).unwrap();
        mode(&file, 0o664);
        assert!(refuse_foreign(&file).is_err(), "writable by its group");
        mode(&file, 0o644);
        let link = dir.path().join("link");
        std::os::unix::fs::symlink("p.toml", &link).unwrap();
        refuse_foreign(&link).unwrap();
        let strange = tempfile::tempdir().unwrap();
        mode(strange.path(), 0o777);
        std::fs::write(strange.path().join("p.toml"), "").unwrap();
        std::fs::create_dir(strange.path().join("inner")).unwrap();
        let inner = dir.path().join("inner");
        std::os::unix::fs::symlink(strange.path().join("inner"), &inner).unwrap();
        for way in [inner.clone(), inner.join(""), inner.join(".")] {
            assert!(refuse_foreign(&way).is_err(), "{way:?}: below a directory of everyone");
        }
        let way = dir.path().join("way");
        std::os::unix::fs::symlink(strange.path(), &way).unwrap();
        assert!(refuse_foreign(&way.join("p.toml")).is_err(), "a link to a directory of everyone");
        assert!(
            refuse_foreign(&dir.path().join("none/../way/p.toml")).is_err(),
            "the same, by a climb"
        );
        mode(dir.path(), 0o777);
        assert!(refuse_foreign(&file).is_err(), "in a directory of everyone");
        mode(dir.path(), 0o755);
        if rustix::process::geteuid().is_root() {
            std::os::unix::fs::chown(&file, Some(12345), None).unwrap();
            assert!(refuse_foreign(&file).is_err(), "of a stranger");
        }
    }
}
