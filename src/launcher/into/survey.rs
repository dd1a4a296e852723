//! What a container's root holds, and detached clones of it: made by a short-lived child of the launcher
//! that enters the container's mount namespace, executes nothing, and is killed if it takes too long (a
//! file system of the container's may answer when it likes).
//!
//! The child stays in the host's pid and user namespaces: nothing in the container sees, signals or traces
//! it.
#![forbid(unsafe_code)]

use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{
    Dir, FileType, Mode, OFlags, ResolveFlags, fstat, fstatfs, openat, openat2, readlinkat,
};
use rustix::io::Errno;
use rustix::mount::{OpenTreeFlags, open_tree};
use serde::{Deserialize, Serialize};

use super::program::{self, Found, Search};
use super::{OWN, Target};
use crate::launcher::compile::{chain, invalid};
use crate::launcher::wire::{self, Refusal, RefusalKind};
use crate::sys::process::{self, Forked};
use crate::sys::socket;

/// Looking at some names and cloning some mounts takes milliseconds.
const PATIENCE: Timespec = Timespec { tv_sec: 5, tv_nsec: 0 };
/// A root has twenty names or so.
const MAX_NAMES: usize = 256;
/// Descriptors in one packet.
const AT_ONCE: usize = 32;

/// What is looked for.
#[derive(Debug, Clone, Default)]
pub struct Wanted {
    /// The names of the root, with clones of them.
    pub root: bool,
    pub workspace: Option<PathBuf>,
    pub program: Option<Search>,
}

/// What the child tells; clones come beside it, in its order.
#[derive(Debug, Serialize, Deserialize)]
struct Told {
    names: Vec<(Vec<u8>, Kind)>,
    workspace: Option<Seen>,
    program: Option<Found>,
    /// What could not be done.
    failed: Option<(String, i32)>,
    clones: usize,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    Directory,
    File,
    Link { target: Vec<u8> },
}

/// The workspace as it is in there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    pub uid: u32,
    pub gid: u32,
    pub dev: u64,
    pub ino: u64,
    pub file_system: u64,
}

/// One name of the root.
#[derive(Debug)]
pub struct Name {
    pub path: PathBuf,
    pub kind: Kind,
    /// A detached clone of the mounts there; none of a link.
    pub tree: Option<OwnedFd>,
}

#[derive(Debug, Default)]
pub struct Survey {
    pub names: Vec<Name>,
    pub workspace: Option<(Seen, OwnedFd)>,
    pub program: Option<Found>,
}

/// Looks into the container.
///
/// # Errors
/// What the container lacks or forbids; one that does not answer.
pub fn survey(target: &Target, wanted: &Wanted) -> Result<Survey, Refusal> {
    let failed = |e: &dyn std::error::Error| refuse(chain(e));
    let (ours, theirs) = socket::packet_pair().map_err(|e| failed(&e))?;
    let pid = match process::fork().map_err(|e| failed(&e))? {
        Forked::Child => {
            drop(ours);
            process::exit_now(look(target, wanted, theirs.as_fd()))
        }
        Forked::Parent { pid } => pid,
    };
    drop(theirs);
    let received = receive(ours.as_fd());
    // Nothing waits for it any more. It may have ended, and is not reaped: the number is its own.
    if let Some(child) = rustix::process::Pid::from_raw(pid) {
        match rustix::process::kill_process(child, rustix::process::Signal::KILL) {
            Ok(()) | Err(Errno::SRCH) => {}
            Err(e) => return Err(failed(&e)),
        }
    }
    process::wait_for(pid).map_err(|e| failed(&e))?;
    assemble(received?)
}

fn receive(socket: BorrowedFd<'_>) -> Result<(Told, Vec<OwnedFd>), Refusal> {
    let ready = || -> Result<(), Refusal> {
        match poll(&mut [PollFd::new(&socket, PollFlags::IN)], Some(&PATIENCE)) {
            Ok(1..) => Ok(()),
            Ok(0) => Err(refuse("a file system of the container does not answer".to_owned())),
            Err(e) => Err(refuse(e.to_string())),
        }
    };
    ready()?;
    let (told, _) = wire::receive::<Told>(socket).map_err(|e| refuse(chain(&e)))?;
    let mut clones = Vec::new();
    while clones.len() < told.clones {
        ready()?;
        let before = clones.len();
        let mut byte = [0];
        socket::receive(socket, &mut byte, |fd| clones.push(fd))
            .map_err(|e| refuse(e.to_string()))?;
        if clones.len() == before {
            return Err(refuse("the look into the container was cut short".to_owned()));
        }
    }
    Ok((told, clones))
}

fn assemble((told, clones): (Told, Vec<OwnedFd>)) -> Result<Survey, Refusal> {
    if let Some((what, errno)) = told.failed {
        return Err(refuse(format!("{what}: {}", Errno::from_raw_os_error(errno))));
    }
    let mut clones = clones.into_iter();
    let short = || refuse("the look into the container was cut short".to_owned());
    let mut names = Vec::new();
    for (name, kind) in told.names {
        let path = PathBuf::from(OsStr::from_bytes(&name));
        let tree = match &kind {
            Kind::Link { .. } => None,
            Kind::Directory | Kind::File => {
                let tree = clones.next().ok_or_else(short)?;
                // What stands there by now: never a link in a directory's place.
                let now = fstat(&tree).map_err(|e| refuse(e.to_string()))?;
                let is_directory = FileType::from_raw_mode(now.st_mode) == FileType::Directory;
                if is_directory != (kind == Kind::Directory) {
                    return Err(refuse(format!("/{} was swapped in a moment", path.display())));
                }
                Some(tree)
            }
        };
        names.push(Name { path, kind, tree });
    }
    let workspace = match told.workspace {
        Some(seen) => Some((seen, clones.next().ok_or_else(short)?)),
        None => None,
    };
    Ok(Survey { names, workspace, program: told.program })
}

fn refuse(why: String) -> Refusal {
    let message = format!("could not look into the container: {why}");
    Refusal { kind: RefusalKind::Launch, ..invalid(message, "is it running, and whole?") }
}

/// The child's whole life. Its status says nothing: what it found crosses the socket.
fn look(target: &Target, wanted: &Wanted, socket: BorrowedFd<'_>) -> i32 {
    let mut told =
        Told { names: Vec::new(), workspace: None, program: None, failed: None, clones: 0 };
    let mut clones = Vec::new();
    if let Err((what, errno)) = look_at(target, wanted, &mut told, &mut clones) {
        told.failed = Some((what, errno.raw_os_error()));
        clones.clear();
    }
    told.clones = clones.len();
    if wire::send(socket, &told, &[]).is_err() {
        return 1;
    }
    for some in clones.chunks(AT_ONCE) {
        let fds: Vec<BorrowedFd<'_>> = some.iter().map(AsFd::as_fd).collect();
        if socket::send(socket, &[0], &fds).is_err() {
            return 1;
        }
    }
    // Until it is killed: what it sent is in nobody's hands before it is received.
    let mut fds = [PollFd::from_borrowed_fd(socket, PollFlags::HUP)];
    match poll(&mut fds, Some(&PATIENCE)) {
        Ok(_) | Err(_) => 0,
    }
}

type Failed = (String, Errno);

fn look_at(
    target: &Target,
    wanted: &Wanted,
    told: &mut Told,
    clones: &mut Vec<OwnedFd>,
) -> Result<(), Failed> {
    let failed = |what: &str| {
        let what = what.to_owned();
        move |e: Errno| (what, e)
    };
    process::enter_namespace(target.mounts(), libc::CLONE_NEWNS)
        .map_err(failed("it could not be entered"))?;
    let root = target.root();
    if wanted.root {
        names(root, told, clones)?;
    }
    if let Some(path) = &wanted.workspace {
        let shown = format!("the workspace {}", path.display());
        let inner = path.strip_prefix("/").unwrap_or(path);
        let inner = if inner.as_os_str().is_empty() { Path::new(".") } else { inner };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let resolve =
            ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let directory = openat2(root, inner, flags, Mode::empty(), resolve)
            .map_err(failed(&format!("{shown} (through no symbolic link)")))?;
        let found = fstat(&directory).map_err(failed(&shown))?;
        let file_system = fstatfs(&directory).map_err(failed(&shown))?.f_type as u64;
        told.workspace = Some(Seen {
            uid: found.st_uid,
            gid: found.st_gid,
            dev: found.st_dev,
            ino: found.st_ino,
            file_system,
        });
        clones.push(clone(directory.as_fd()).map_err(failed(&shown))?);
    }
    if let Some(search) = &wanted.program {
        told.program = program::find(root, search);
    }
    Ok(())
}

fn names(root: BorrowedFd<'_>, told: &mut Told, clones: &mut Vec<OwnedFd>) -> Result<(), Failed> {
    let failed = |e: Errno| ("its root could not be read".to_owned(), e);
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let listed = openat(root, ".", flags, Mode::empty()).map_err(failed)?;
    for entry in Dir::read_from(&listed).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name();
        let is_own = OWN.iter().any(|own| name.to_bytes() == own.as_bytes());
        if is_own || matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let opened = openat(root, name, flags, Mode::empty()).map_err(failed)?;
        let found = fstat(&opened).map_err(failed)?;
        let kind = match FileType::from_raw_mode(found.st_mode) {
            FileType::Directory => Kind::Directory,
            FileType::RegularFile => Kind::File,
            FileType::Symlink => {
                let target = readlinkat(root, name, Vec::new()).map_err(failed)?;
                Kind::Link { target: target.into_bytes() }
            }
            // No device, pipe or socket of it is shown.
            _ => continue,
        };
        if !matches!(kind, Kind::Link { .. }) {
            clones.push(clone(opened.as_fd()).map_err(failed)?);
        }
        told.names.push((name.to_bytes().to_vec(), kind));
        if told.names.len() > MAX_NAMES {
            return Err(("its root holds too many names".to_owned(), Errno::TOOBIG));
        }
    }
    Ok(())
}

fn clone(place: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_RECURSIVE
        | OpenTreeFlags::AT_EMPTY_PATH;
    open_tree(place, c"", flags)
}
