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
use std::path::Path;

/// Refuses a file that someone else could have written.
///
/// # Errors
/// [`io::ErrorKind::PermissionDenied`] with the reason; and those of looking.
pub fn refuse_foreign(path: &Path) -> io::Result<()> {
    let real = path.canonicalize()?;
    // From the top: once a directory is ours alone, nothing below can be swapped.
    let mut from_the_top: Vec<&Path> = real.ancestors().collect();
    from_the_top.reverse();
    for place in from_the_top {
        let found = std::fs::symlink_metadata(place)?;
        let is_etc = found.is_dir() || real.starts_with("/etc");
        if let Some(why) = objection(&found, is_etc) {
            return Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                format!("{} {why}; a service takes only what root wrote", place.display()),
            ));
        }
    }
    Ok(())
}

/// `may_be_root`: whether a stranger who may be root counts as root.
fn objection(found: &Metadata, may_be_root: bool) -> Option<String> {
    const OVERFLOW: u32 = 65_534;
    let us = rustix::process::geteuid().as_raw();
    let root_is_hidden = || std::fs::metadata("/").is_ok_and(|root| root.uid() == OVERFLOW);
    let is_root = found.uid() == 0 || (may_be_root && found.uid() == OVERFLOW && root_is_hidden());
    if !is_root && found.uid() != us {
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
        mode(dir.path(), 0o777);
        assert!(refuse_foreign(&file).is_err(), "in a directory of everyone");
        mode(dir.path(), 0o755);
        if rustix::process::geteuid().is_root() {
            std::os::unix::fs::chown(&file, Some(12345), None).unwrap();
            assert!(refuse_foreign(&file).is_err(), "of a stranger");
        }
    }
}
