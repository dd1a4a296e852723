//! What of sublet's own no exec may see, whatever its profile and workspace are: the state (the vault and
//! its key lie there), the configuration with its profiles, and the files of `file` sources.
//!
//! Compared by identity (device and inode), so that no link, no `..` and no bind mount hides it. Reads
//! names and identities only; never a content.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fs::Metadata;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use crate::config::SecretSource;
use crate::host::Host;

/// A file or directory of the host as the kernel knows it.
type Identity = (u64, u64);

/// One thing that no exec may see.
struct Guarded {
    what: String,
    path: PathBuf,
    /// Whether all that lies below is guarded too.
    is_tree: bool,
    /// `path` with every link resolved, as far as it exists.
    real: PathBuf,
    /// Of it and of every directory above: what shows one of these shows it.
    shown_by: Vec<Identity>,
}

impl Guarded {
    fn new(what: String, path: &Path, is_tree: bool, ways: &mut Ways) -> Result<Self, Unclear> {
        // Without a slash or a dot at its end, behind which the kernel looks through a link.
        let path: &Path = &path.components().collect::<PathBuf>();
        let real = ways.real(path)?;
        let mut shown_by = Vec::new();
        for above in real.ancestors() {
            shown_by.extend(ways.identity(above)?);
        }
        Ok(Self { what, path: path.to_owned(), is_tree, real, shown_by })
    }
}

/// A place could not be looked at: then it is not known what shows it.
#[derive(Debug, thiserror::Error)]
#[error("could not look at {}", path.display())]
pub struct Unclear {
    path: PathBuf,
    source: io::Error,
}

/// What is there, unless nothing is; where this process may not look, no exec of its may either.
fn seen<T>(path: &Path, found: io::Result<T>) -> Result<Option<T>, Unclear> {
    const NOTHING: [i32; 5] =
        [libc::ENOENT, libc::ENOTDIR, libc::ELOOP, libc::ENAMETOOLONG, libc::EACCES];
    match found {
        Ok(found) => Ok(Some(found)),
        Err(e) if e.raw_os_error().is_some_and(|number| NOTHING.contains(&number)) => Ok(None),
        Err(source) => Err(Unclear { path: path.to_owned(), source }),
    }
}

/// What was found at places: what is guarded lies near to each other, and each place is looked at once.
#[derive(Default)]
struct Ways(BTreeMap<PathBuf, Option<Seen>>);

#[derive(Clone, Copy)]
enum Seen {
    Link,
    Other(Identity),
}

impl Ways {
    fn at(&mut self, path: &Path) -> Result<Option<Seen>, Unclear> {
        if let Some(known) = self.0.get(path) {
            return Ok(*known);
        }
        let found = seen(path, path.symlink_metadata())?.map(|found| match found.is_symlink() {
            true => Seen::Link,
            false => Seen::Other((found.dev(), found.ino())),
        });
        self.0.insert(path.to_owned(), found);
        Ok(found)
    }

    /// Of what is there, through every link.
    fn identity(&mut self, path: &Path) -> Result<Option<Identity>, Unclear> {
        match self.at(path)? {
            None => Ok(None),
            Some(Seen::Other(identity)) => Ok(Some(identity)),
            Some(Seen::Link) => {
                let found = seen(path, path.metadata())?;
                Ok(found.map(|found| (found.dev(), found.ino())))
            }
        }
    }

    /// Through every link, as far as it exists: what does not is made later, below what does.
    fn real(&mut self, path: &Path) -> Result<PathBuf, Unclear> {
        let mut is_plain =
            path.is_absolute() && !path.components().any(|part| part == Component::ParentDir);
        for above in path.ancestors() {
            is_plain = is_plain && matches!(self.at(above)?, Some(Seen::Other(_)));
        }
        if is_plain { Ok(path.to_owned()) } else { resolved(path) }
    }
}

pub struct Guard(Vec<Guarded>);

impl Guard {
    /// # Errors
    /// What is to be guarded could not be looked at.
    pub fn of(host: &Host) -> Result<Self, Unclear> {
        let (mut guarded, mut ways) = (Vec::new(), Ways::default());
        let mut guard = |what: String, path: &Path, is_tree: bool| {
            Guarded::new(what, path, is_tree, &mut ways).map(|new| guarded.push(new))
        };
        guard("sublet's state".to_owned(), &host.state_dir, true)?;
        guard("sublet's sockets".to_owned(), &host.runtime_dir, true)?;
        let configuration = || "sublet's configuration".to_owned();
        if let Some(file) = &host.config_file {
            guard(configuration(), file, false)?;
        }
        for directory in host.profile_directories().iter().filter(|d| d.exists()) {
            guard(configuration(), directory, true)?;
        }
        for (name, entry) in &host.config.secrets {
            if let SecretSource::File { path } = &entry.source {
                guard(format!("the file of secret `{name}`"), path, false)?;
            }
        }
        Ok(Self(guarded))
    }

    /// Why this path of the host cannot be shown; `None` if it can, or if it does not exist.
    ///
    /// # Errors
    /// It could not be looked at.
    pub fn objection(&self, path: &Path) -> Result<Option<String>, Unclear> {
        let found = seen(path, path.metadata())?;
        Ok(found.and_then(|found| self.objection_to(path, &found)))
    }

    /// The same of what was opened there.
    pub fn objection_to(&self, path: &Path, found: &Metadata) -> Option<String> {
        let found = (found.dev(), found.ino());
        self.0.iter().find_map(|guarded| {
            let lies_in = guarded.is_tree
                && (path.starts_with(&guarded.real) || path.starts_with(&guarded.path));
            (lies_in || guarded.shown_by.contains(&found)).then(|| {
                format!("it holds or lies in {} ({})", guarded.what, guarded.path.display())
            })
        })
    }
}

fn resolved(path: &Path) -> Result<PathBuf, Unclear> {
    for above in path.ancestors() {
        let Some(real) = seen(above, above.canonicalize())? else { continue };
        // Joining nothing would leave a slash behind, which no file bears.
        return Ok(match path.strip_prefix(above) {
            Ok(below) if above != path => real.join(below),
            Ok(_) | Err(_) => real,
        });
    }
    Ok(path.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_shows_the_state_is_refused_by_whatever_way_it_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for made in ["a/b", "other", "keys"] {
            std::fs::create_dir_all(at(made)).unwrap();
        }
        std::os::unix::fs::symlink("a", at("link")).unwrap();
        std::fs::create_dir_all(at("far/state")).unwrap();
        std::os::unix::fs::symlink("far/state", at("last")).unwrap();
        std::fs::write(at("keys/one"), "").unwrap();
        #[track_caller]
        fn check(state: PathBuf, is_tree: bool, path: PathBuf, refused: bool) {
            let guard = Guard(vec![
                Guarded::new("x".into(), &state, is_tree, &mut Ways::default()).unwrap(),
            ]);
            let objection = guard.objection(&path).unwrap();
            assert_eq!(objection.is_some(), refused, "{state:?} {path:?}");
        }
        // One that is there, and one that the first run makes.
        for state in ["a/b", "a/state", "link/state", "other/../a/state", "link/b"] {
            check(at(state), true, at("a"), true);
            check(at(state), true, at("link"), true);
            check(at(state), true, dir.path().to_owned(), true);
            check(at(state), true, at("other"), false);
            check(at(state), true, at("keys"), false);
        }
        // A link is the last of its way, however it is written.
        for state in ["last", "last/", "last/.", "./last/"] {
            for (path, refused) in
                [("far", true), ("far/state", true), ("last", true), ("a", false)]
            {
                check(at(state), true, at(path), refused);
                check(at(state), false, at(path), refused);
            }
        }
        check(at("a"), true, at("a/b"), true);
        check(at("a"), false, at("a/b"), false);
        check(at("keys/one"), false, at("keys"), true);
        check(at("keys/one"), false, at("keys/one"), true);
        check(at("a"), true, at("missing"), false);
    }

    /// The control: a place where nothing is.
    #[test]
    fn what_cannot_be_looked_at_is_not_taken_for_nothing() {
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("round", dir.path().join("round")).unwrap();
        let at = |name: &str| dir.path().join(name);
        let guarded = |path: PathBuf| Guarded::new("x".into(), &path, true, &mut Ways::default());
        for nothing in ["nothing/below", "round/below", &"x".repeat(300)] {
            assert!(guarded(at(nothing)).is_ok(), "{nothing}");
        }
        // No kernel looks at such a name.
        assert!(guarded(at("a\0b")).is_err());
        let guard = Guard(vec![guarded(at("nothing")).unwrap()]);
        assert!(guard.objection(&at("round")).unwrap().is_none());
        assert!(guard.objection(&at("a\0b")).is_err());
    }
}
