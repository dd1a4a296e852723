//! What the command will see, as data: every path of its root and where it comes from. Pure: `root`
//! interprets it, `--explain` prints it.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::ffi::CStr;
use std::path::{Path, PathBuf};

/// A file that is readable by its mode and its mount but covered by no landlock rule: the child tries
/// it and must be refused.
pub const LANDLOCK_PROBE: &CStr = c"/run/.landlock";

/// Where file deliveries appear.
pub const SECRETS: &str = "/run/sublet/secrets";
/// Where an agent finds the broker, `SUBLET_SOCKET`: a link into [`AGENT_DIRECTORY`].
pub const AGENT_SOCKET: &str = "/run/sublet/agent.sock";
/// The run's directory of the broker, and not the socket itself: a broker that starts anew makes another
/// socket, which a mount of the first would never show.
const AGENT_DIRECTORY: &str = "/run/sublet/agent";

/// Where a system keeps the way to `/run` that workload identities are looked for on.
pub const VAR_RUN: &str = "/var/run";

/// The name of the exec's user.
const USER: &str = "agent";

/// A path of the host that is shown inside at the same place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostPath {
    pub path: PathBuf,
    /// Skipped where the host does not have it.
    pub optional: bool,
}

/// What the profile and the caller ask for.
#[derive(Debug, Clone)]
pub struct View {
    pub read_only: Vec<HostPath>,
    pub read_write: Vec<HostPath>,
    /// The top-level names of an image that stands in for the host's directories, and its place.
    pub image: Option<(PathBuf, Vec<PathBuf>)>,
    pub workspace: Option<(PathBuf, Access)>,
    pub home: PathBuf,
    pub uid: u32,
    pub gid: u32,
    pub hostname: String,
    /// `/etc/resolv.conf`, where the network is the host's.
    pub resolver: Option<Vec<u8>>,
    /// The sublet binary at `/run/sublet/bin/sublet`.
    pub binary: bool,
    /// The directory of the run's socket on the host, for [`AGENT_SOCKET`].
    pub agent: Option<PathBuf>,
    /// The ways to workload identities: the profile has some.
    pub identities: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    ReadOnly,
    ReadWrite,
}

/// One path inside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Entry {
    /// A directory of the exec's own tmpfs, root's.
    Directory,
    /// The run's directory of the broker, with its socket.
    Agent {
        source: PathBuf,
    },
    /// The same, writable by the exec: world-writable and sticky, or the user's own.
    Scratch {
        sticky: bool,
    },
    File {
        content: Vec<u8>,
    },
    /// Readable by its mode, covered by no landlock rule.
    Probe,
    Symlink {
        target: PathBuf,
    },
    Device {
        major: u32,
        minor: u32,
    },
    /// A tree or a file of the host.
    Bind {
        source: PathBuf,
        optional: bool,
        access: Access,
    },
    /// A tree or a file of the container that the exec is in.
    OfContainer {
        is_directory: bool,
    },
    /// The workspace: its tree comes later, mapped to the exec's user.
    Workspace {
        access: Access,
    },
    /// The running sublet binary.
    Binary,
    /// A mount that the child makes: `/proc`, `/dev/pts`.
    Inner,
    /// The mount point of file deliveries.
    Secrets,
}

/// Every path, parents before children.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Layout {
    pub entries: BTreeMap<PathBuf, Entry>,
}

impl Layout {
    /// The innermost entry at or above `path` that is a mount of something else.
    pub fn covering(&self, path: &Path) -> Option<(&Path, &Entry)> {
        path.ancestors().find_map(|above| {
            let (at, entry) = self.entries.get_key_value(above)?;
            let is_mount = matches!(
                entry,
                Entry::Bind { .. }
                    | Entry::OfContainer { .. }
                    | Entry::Workspace { .. }
                    | Entry::Inner
            );
            is_mount.then_some((at.as_path(), entry))
        })
    }
}

pub fn layout(view: &View) -> Layout {
    let mut entries = BTreeMap::new();
    let mut put = |at: &str, entry: Entry| {
        entries.insert(PathBuf::from(at), entry);
    };

    put("/etc/passwd", file(passwd(view)));
    put("/etc/group", file(group(view)));
    put("/etc/nsswitch.conf", file("passwd: files\ngroup: files\nhosts: files dns\n".into()));
    put("/etc/hosts", file(hosts(view)));
    put("/etc/hostname", file(format!("{}\n", view.hostname)));
    if let Some(resolver) = &view.resolver {
        put("/etc/resolv.conf", Entry::File { content: resolver.clone() });
    }

    for (name, minor) in [("null", 3), ("zero", 5), ("full", 7), ("random", 8), ("urandom", 9)] {
        put(&format!("/dev/{name}"), Entry::Device { major: 1, minor });
    }
    put("/dev/tty", Entry::Device { major: 5, minor: 0 });
    for (name, target) in [
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
        ("ptmx", "pts/ptmx"),
    ] {
        put(&format!("/dev/{name}"), Entry::Symlink { target: target.into() });
    }
    put("/dev/shm", Entry::Scratch { sticky: true });
    put("/dev/pts", Entry::Inner);
    put("/proc", Entry::Inner);
    put("/run/.landlock", Entry::Probe);
    put(SECRETS, Entry::Secrets);
    if view.identities {
        // The place that client libraries and people know; the files lie with the other deliveries.
        put("/run/secrets/sublet", Entry::Symlink { target: SECRETS.into() });
        put(VAR_RUN, Entry::Symlink { target: "/run".into() });
    }
    if view.binary {
        put("/run/sublet/bin/sublet", Entry::Binary);
    }
    if let Some(source) = &view.agent {
        put(AGENT_DIRECTORY, Entry::Agent { source: source.clone() });
        put(AGENT_SOCKET, Entry::Symlink { target: "agent/agent.sock".into() });
    }
    put("/tmp", Entry::Scratch { sticky: true });

    if let Some((image, names)) = &view.image {
        for name in names {
            let at = Path::new("/").join(name);
            entries.entry(at).or_insert_with(|| Entry::Bind {
                source: image.join(name),
                optional: false,
                access: Access::ReadOnly,
            });
        }
    }
    for (paths, access) in
        [(&view.read_only, Access::ReadOnly), (&view.read_write, Access::ReadWrite)]
    {
        for HostPath { path, optional } in paths {
            let bind = Entry::Bind { source: path.clone(), optional: *optional, access };
            entries.insert(path.clone(), bind);
        }
    }
    if let Some((path, access)) = &view.workspace {
        entries.insert(path.clone(), Entry::Workspace { access: *access });
    }
    entries.entry(view.home.clone()).or_insert(Entry::Scratch { sticky: false });
    Layout { entries }
}

fn file(content: String) -> Entry {
    Entry::File { content: content.into_bytes() }
}

fn passwd(view: &View) -> String {
    let home = view.home.display();
    format!(
        "root:x:0:0:root:/nonexistent:/usr/sbin/nologin\n\
         {USER}:x:{}:{}:sublet exec:{home}:/bin/sh\n\
         nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
        view.uid, view.gid
    )
}

fn group(view: &View) -> String {
    format!("root:x:0:\n{USER}:x:{}:\nnogroup:x:65534:\n", view.gid)
}

fn hosts(view: &View) -> String {
    format!("127.0.0.1 localhost {}\n::1 localhost\n", view.hostname)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view() -> View {
        View {
            read_only: vec![HostPath { path: "/usr".into(), optional: false }],
            read_write: vec![],
            image: None,
            workspace: Some(("/tmp/work".into(), Access::ReadWrite)),
            home: "/tmp/home".into(),
            uid: 1000,
            gid: 1000,
            hostname: "sublet".into(),
            resolver: None,
            binary: false,
            agent: None,
            identities: false,
        }
    }

    #[test]
    fn parents_come_before_children() {
        let layout = layout(&view());
        let paths: Vec<_> = layout.entries.keys().collect();
        let place = |p: &str| paths.iter().position(|q| q.as_path() == Path::new(p)).unwrap();
        assert!(place("/tmp") < place("/tmp/work"));
        assert!(place("/dev/pts") < place("/proc"));
    }

    #[test]
    fn the_workspace_wins_over_scratch_at_the_same_place() {
        let mut view = view();
        view.workspace = Some(("/tmp".into(), Access::ReadWrite));
        let layout = layout(&view);
        assert_eq!(
            layout.entries[Path::new("/tmp")],
            Entry::Workspace { access: Access::ReadWrite }
        );
        assert_eq!(layout.covering(Path::new("/tmp/home")).unwrap().0, Path::new("/tmp"));
    }

    #[test]
    fn nothing_of_the_host_is_there_but_what_the_view_names() {
        let layout = layout(&view());
        let binds: Vec<_> = layout
            .entries
            .values()
            .filter_map(|e| match e {
                Entry::Bind { source, .. } => Some(source.as_path()),
                _ => None,
            })
            .collect();
        assert_eq!(binds, [Path::new("/usr")]);
    }
}
