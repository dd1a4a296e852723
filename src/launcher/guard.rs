//! What of sublet's own no exec may see, whatever its profile and workspace are: the state (the vault and
//! its key lie there), the configuration with its profiles, and the files of `file` sources.
//!
//! Compared by identity (device and inode), so that no link, no `..` and no bind mount hides it. Reads
//! names and identities only; never a content.
#![forbid(unsafe_code)]

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

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
    fn new(what: String, path: &Path, is_tree: bool) -> Self {
        let real = real(path);
        let shown_by = real.ancestors().filter_map(identity).collect();
        Self { what, path: path.to_owned(), is_tree, real, shown_by }
    }
}

pub struct Guard(Vec<Guarded>);

impl Guard {
    pub fn of(host: &Host) -> Self {
        let mut guarded = vec![
            Guarded::new("sublet's state".to_owned(), &host.state_dir, true),
            Guarded::new("sublet's sockets".to_owned(), &host.runtime_dir, true),
        ];
        let configuration = || "sublet's configuration".to_owned();
        guarded
            .extend(host.config_file.as_deref().map(|f| Guarded::new(configuration(), f, false)));
        let profiles = host.profile_directories().iter();
        guarded.extend(
            profiles.filter(|d| d.exists()).map(|d| Guarded::new(configuration(), d, true)),
        );
        for (name, entry) in &host.config.secrets {
            if let SecretSource::File { path } = &entry.source {
                guarded.push(Guarded::new(format!("the file of secret `{name}`"), path, false));
            }
        }
        Self(guarded)
    }

    /// Why this path of the host cannot be shown; `None` if it can, or if it does not exist.
    pub fn objection(&self, path: &Path) -> Option<String> {
        self.objection_to(path, &path.metadata().ok()?)
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

fn identity(path: &Path) -> Option<Identity> {
    path.metadata().ok().map(|found| (found.dev(), found.ino()))
}

/// Through every link, as far as it exists: what does not is made later, below what does.
fn real(path: &Path) -> PathBuf {
    path.ancestors()
        .find_map(|above| {
            let real = above.canonicalize().ok()?;
            // Joining nothing would leave a slash behind, which no file bears.
            Some(if above == path { real } else { real.join(path.strip_prefix(above).ok()?) })
        })
        .unwrap_or_else(|| path.to_owned())
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
        std::fs::write(at("keys/one"), "").unwrap();
        #[track_caller]
        fn check(state: PathBuf, is_tree: bool, path: PathBuf, refused: bool) {
            let guard = Guard(vec![Guarded::new("x".into(), &state, is_tree)]);
            assert_eq!(guard.objection(&path).is_some(), refused, "{state:?} {path:?}");
        }
        // One that is there, and one that the first run makes.
        for state in ["a/b", "a/state", "link/state", "other/../a/state", "link/b"] {
            check(at(state), true, at("a"), true);
            check(at(state), true, at("link"), true);
            check(at(state), true, dir.path().to_owned(), true);
            check(at(state), true, at("other"), false);
            check(at(state), true, at("keys"), false);
        }
        check(at("a"), true, at("a/b"), true);
        check(at("a"), false, at("a/b"), false);
        check(at("keys/one"), false, at("keys"), true);
        check(at("keys/one"), false, at("keys/one"), true);
        check(at("a"), true, at("missing"), false);
    }
}
