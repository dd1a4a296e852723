//! A bundle's `config.json`, as far as the hook needs it, and the way to its root file system. Read once,
//! bounded; no link in the bundle leads elsewhere.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use serde::Deserialize;
use serde_json::Value;

/// execve(2) takes 2 MiB of arguments and environment; a config with more than that many times over is no
/// honest one.
const MAX_CONFIG: u64 = 16 << 20;

#[derive(Deserialize)]
struct Raw {
    process: Option<Process>,
    root: Option<Root>,
    #[serde(default)]
    annotations: Option<BTreeMap<String, String>>,
    #[serde(default)]
    linux: Option<Linux>,
}

#[derive(Deserialize)]
struct Process {
    #[serde(default)]
    user: User,
    #[serde(default)]
    cwd: PathBuf,
    #[serde(default)]
    env: Option<Vec<String>>,
}

#[derive(Default, Deserialize)]
struct User {
    #[serde(default)]
    uid: u32,
    #[serde(default)]
    gid: u32,
}

#[derive(Deserialize)]
struct Root {
    path: PathBuf,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Linux {
    #[serde(default)]
    uid_mappings: Option<Vec<Mapping>>,
    #[serde(default)]
    gid_mappings: Option<Vec<Mapping>>,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Mapping {
    #[serde(rename = "containerID")]
    container_id: u32,
    #[serde(rename = "hostID")]
    host_id: u32,
    size: u32,
}

/// What a container will be.
#[derive(Debug)]
pub struct Bundle {
    pub env: Vec<String>,
    pub cwd: PathBuf,
    /// On the host.
    pub uid: u32,
    pub gid: u32,
    /// The hooks that run in its namespaces are no host's root there.
    pub has_user_namespace: bool,
    pub annotations: BTreeMap<String, String>,
    pub rootfs: PathBuf,
    /// The directory itself, opened.
    pub root: OwnedFd,
    /// Every string of it, for the guard.
    pub whole: Value,
}

#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    #[error("could not read {path}")]
    Unreadable { path: PathBuf, source: io::Error },
    #[error("{path} has more than {MAX_CONFIG} bytes")]
    TooLarge { path: PathBuf },
    #[error("{path} is no configuration of a container")]
    Malformed { path: PathBuf, source: serde_json::Error },
    #[error("{path} has no `{key}`")]
    Missing { path: PathBuf, key: &'static str },
    #[error("could not open the root file system {path}")]
    Root { path: PathBuf, source: io::Error },
    #[error("the root file system {path} is this host's own")]
    HostsRoot { path: PathBuf },
}

/// # Errors
/// [`BundleError`].
pub fn open(bundle: &Path) -> Result<Bundle, BundleError> {
    let path = bundle.join("config.json");
    let unreadable = |source| BundleError::Unreadable { path: path.clone(), source };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory =
        rustix::fs::openat(CWD, bundle, flags, Mode::empty()).map_err(|e| unreadable(e.into()))?;
    // Not waiting: it may be a pipe.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    let file = rustix::fs::openat2(&directory, "config.json", flags, Mode::empty(), resolve)
        .map_err(|e| unreadable(e.into()))?;
    let file = File::from(file);
    if !file.metadata().map_err(unreadable)?.is_file() {
        return Err(unreadable(io::Error::other("it is no file")));
    }
    let mut text = Vec::new();
    file.take(MAX_CONFIG + 1).read_to_end(&mut text).map_err(unreadable)?;
    if text.len() as u64 > MAX_CONFIG {
        return Err(BundleError::TooLarge { path });
    }
    let (raw, whole) =
        parse(&text).map_err(|source| BundleError::Malformed { path: path.clone(), source })?;
    let missing = |key| BundleError::Missing { path: path.clone(), key };
    let process = raw.process.ok_or_else(|| missing("process"))?;
    let named = raw.root.ok_or_else(|| missing("root"))?.path;
    let linux = raw.linux.unwrap_or_default();
    let (rootfs, root) = open_root(bundle, &directory, &named)?;
    Ok(Bundle {
        env: process.env.unwrap_or_default(),
        cwd: process.cwd,
        uid: on_host(process.user.uid, linux.uid_mappings.as_deref()),
        gid: on_host(process.user.gid, linux.gid_mappings.as_deref()),
        has_user_namespace: linux.uid_mappings.is_some_and(|map| !map.is_empty()),
        annotations: raw.annotations.unwrap_or_default(),
        rootfs,
        root,
        whole,
    })
}

fn parse(text: &[u8]) -> Result<(Raw, Value), serde_json::Error> {
    Ok((serde_json::from_slice(text)?, serde_json::from_slice(text)?))
}

/// Whether these bytes could be a configuration: for fuzzing, which has no bundle.
pub fn is_one(text: &[u8]) -> bool {
    parse(text).is_ok_and(|(raw, _)| raw.process.is_some() && raw.root.is_some())
}

/// Relative to the bundle it lies in it; absolute it is the engine's own, a mount of layers.
fn open_root(
    bundle: &Path,
    directory: &OwnedFd,
    named: &Path,
) -> Result<(PathBuf, OwnedFd), BundleError> {
    let path = bundle.join(named);
    let failed = |e: rustix::io::Errno| BundleError::Root { path: path.clone(), source: e.into() };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let root = if named.is_absolute() {
        rustix::fs::openat(CWD, named, flags, Mode::empty())
    } else {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        rustix::fs::openat2(directory, named, flags, Mode::empty(), resolve)
    }
    .map_err(failed)?;
    let (found, own) = (rustix::fs::fstat(&root), rustix::fs::stat("/"));
    let (found, own) = (found.map_err(failed)?, own.map_err(failed)?);
    if (found.st_dev, found.st_ino) == (own.st_dev, own.st_ino) {
        return Err(BundleError::HostsRoot { path });
    }
    Ok((path, root))
}

/// An id of the container, as the host has it.
fn on_host(id: u32, mappings: Option<&[Mapping]>) -> u32 {
    let Some(mappings) = mappings.filter(|m| !m.is_empty()) else { return id };
    let mapped = mappings.iter().find_map(|m| {
        let offset = id.checked_sub(m.container_id).filter(|offset| *offset < m.size)?;
        m.host_id.checked_add(offset)
    });
    // Nobody's: no one is let in for it.
    mapped.unwrap_or(65_534)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn bundle(config: &[u8]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), config).unwrap();
        std::fs::create_dir(dir.path().join("rootfs")).unwrap();
        dir
    }

    const PLAIN: &[u8] =
        br#"{"ociVersion":"1.0.2","process":{"cwd":"/","env":["A=b"]},"root":{"path":"rootfs"}}"#;

    #[test]
    fn a_plain_bundle_opens() {
        let dir = bundle(PLAIN);
        let opened = open(dir.path()).unwrap();
        assert_eq!((&opened.env[..], opened.uid), (&["A=b".to_owned()][..], 0));
    }

    #[test]
    fn what_is_no_bundle_is_refused() {
        #[track_caller]
        fn check(config: &[u8], change: impl Fn(&Path)) {
            let dir = bundle(config);
            change(dir.path());
            assert!(open(dir.path()).is_err());
        }
        check(PLAIN, |at| std::fs::remove_file(at.join("config.json")).unwrap());
        check(b"{", |_| {});
        check(b"{}", |_| {});
        check(b"{\"process\":{\"env\":[\"\xff\"]}}", |_| {});
        check(br#"{"process":{"env":[1]},"root":{"path":"rootfs"}}"#, |_| {});
        // Links out of the bundle, to the host's root, to itself; a pipe that no one writes.
        for target in ["/", "/etc", "..", "rootfs"] {
            check(PLAIN, |at| {
                std::fs::remove_dir(at.join("rootfs")).unwrap();
                symlink(target, at.join("rootfs")).unwrap();
            });
        }
        check(PLAIN, |at| {
            std::fs::rename(at.join("config.json"), at.join("other")).unwrap();
            symlink("other", at.join("config.json")).unwrap();
        });
        check(PLAIN, |at| {
            std::fs::remove_file(at.join("config.json")).unwrap();
            let mode = Mode::from(0o600);
            let kind = rustix::fs::FileType::Fifo;
            rustix::fs::mknodat(CWD, at.join("config.json"), kind, mode, 0).unwrap();
        });
        let out = br#"{"process":{},"root":{"path":"../"}}"#;
        check(out, |_| {});
        check(br#"{"process":{},"root":{"path":"/"}}"#, |_| {});
        check(&[PLAIN, &vec![b' '; MAX_CONFIG as usize]].concat(), |_| {});
        check(&[&b"[".repeat(100_000)[..], b"1"].concat(), |_| {});
    }

    #[test]
    fn ids_are_the_hosts() {
        let map = [Mapping { container_id: 0, host_id: 100_000, size: 65_536 }];
        assert_eq!(on_host(0, Some(&map)), 100_000);
        assert_eq!(on_host(1000, Some(&map)), 101_000);
        assert_eq!(on_host(70_000, Some(&map)), 65_534);
        assert_eq!(on_host(7, None), 7);
    }
}
