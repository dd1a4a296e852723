//! Files that the invoker names beside a command's own: `--report`, `--env-file`.
//!
//! Receives a path as it was typed, gives what is in the file, or the report to write. What an earlier command may
//! have left in its workspace leads nowhere else: below the workspace, and on a relative way, no link is followed.
//! A FIFO holds nobody up; streams are taken by the names that the system gives them (`/dev/stdout`, `<(…)`).
#![forbid(unsafe_code)]

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, openat, statat, unlinkat};
use rustix::io::Errno;
use serde::Serialize;

use super::fail::Failure;

/// A path, and how far it is trusted.
struct Named {
    /// Absolute, with no `..` in it.
    path: PathBuf,
    way: Way,
}

enum Way {
    /// A descriptor of this process, or a device.
    Stream,
    /// From this directory on, through these names, nobody knows who made what is there.
    Below { directory: PathBuf, names: Vec<OsString> },
    /// The invoker's own links.
    Free,
}

impl Named {
    fn of(path: &Path, workspace: Option<&Path>) -> io::Result<Self> {
        let here = std::env::current_dir()?;
        let path_here = here.join(path);
        let path_here = without_dots(&path_here);
        let mut untrusted: Vec<&Path> = workspace.into_iter().collect();
        if path.is_relative() {
            untrusted.push(&here);
        }
        let way = match is_stream(&path_here) {
            true => Way::Stream,
            false => below(&path_here, &untrusted).unwrap_or(Way::Free),
        };
        Ok(Self { path: path_here, way })
    }

    /// The directory that holds it, and its name there.
    fn place(&self) -> io::Result<(OwnedFd, &OsStr)> {
        let name = self.path.file_name().ok_or(io::ErrorKind::IsADirectory)?;
        let open = |path: &Path| {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            rustix::fs::open(path, flags, Mode::empty())
        };
        let Way::Below { directory, names } = &self.way else {
            return Ok((open(self.path.parent().unwrap_or(Path::new("/")))?, name));
        };
        let mut at = open(directory)?;
        for way in &names[..names.len().saturating_sub(1)] {
            at = open_at(&at, way, OFlags::PATH | OFlags::DIRECTORY)?;
        }
        Ok((at, name))
    }

    fn open(&self, flags: OFlags) -> io::Result<File> {
        if let Way::Stream = self.way {
            return Ok(rustix::fs::open(&self.path, flags | OFlags::CLOEXEC, Mode::empty())?.into());
        }
        let (directory, name) = self.place()?;
        open_regular(&directory, name, flags)
    }
}

/// Opening a FIFO that nobody has open would wait, and a device might do anything.
fn open_regular(directory: &OwnedFd, name: &OsStr, flags: OFlags) -> io::Result<File> {
    let flags = flags | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file: File = open_at(directory, name, flags)?.into();
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no regular file")),
    }
}

/// What stands in the file, of which at most one byte more than `most` is read.
pub(super) fn read(path: &Path, workspace: Option<&Path>, most: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let file = Named::of(path, workspace)?.open(OFlags::RDONLY)?;
    file.take(most + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Where `--report` is written.
pub(super) struct Report {
    path: PathBuf,
    /// The directory, as it was before anything ran, and the name there; nothing of a stream.
    place: Option<(OwnedFd, OsString)>,
    file: File,
}

impl Report {
    /// Opened before anything runs: a report that cannot be written must not cost one that was made.
    pub fn create(path: &Path, workspace: Option<&Path>) -> Result<Self, Failure> {
        let opened = Named::of(path, workspace).and_then(|named| {
            let flags = OFlags::WRONLY | OFlags::CREATE;
            let Way::Stream = named.way else {
                let (directory, name) = named.place()?;
                let file = open_regular(&directory, name, flags)?;
                file.set_len(0)?;
                let place = Some((directory, name.to_owned()));
                return Ok(Self { path: path.to_owned(), place, file });
            };
            Ok(Self { path: path.to_owned(), place: None, file: named.open(flags)? })
        });
        opened.map_err(|e| unwritten(path, &e))
    }

    /// Writes it, once the command is over; what that has put in its place is removed. That it cannot be written any
    /// more is a note: it changes nothing of how the command ended.
    pub fn write(mut self, content: &impl Serialize) {
        let written = serde_json::to_vec_pretty(content).map_err(io::Error::from);
        let written = written.and_then(|mut text| {
            text.push(b'\n');
            self.begin()?;
            self.file.write_all(&text)
        });
        if let Err(e) = written {
            unwritten(&self.path, &e).note();
        }
    }

    fn begin(&mut self) -> io::Result<()> {
        let Some((directory, name)) = &self.place else { return Ok(()) };
        let ours = self.file.metadata()?;
        match statat(directory, name.as_os_str(), AtFlags::SYMLINK_NOFOLLOW) {
            Ok(there) if (there.st_dev, there.st_ino) != (ours.dev(), ours.ino()) => {
                unlinkat(directory, name.as_os_str(), AtFlags::empty())?;
            }
            Err(Errno::NOENT) => {}
            // Also where this process may not look any more: it may have become the state's user.
            Ok(_) | Err(_) => {
                self.file.set_len(0)?;
                return self.file.rewind();
            }
        }
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
        self.file = open_at(directory, name, flags)?.into();
        Ok(())
    }
}

fn unwritten(path: &Path, error: &io::Error) -> Failure {
    Failure::new("output", "report_failed", format!("cannot write {}", path.display()))
        .because(error)
        .hint("name a file in a directory that exists and is yours")
}

/// Opens what this name is in the directory, if it is no link.
fn open_at(directory: &OwnedFd, name: &OsStr, flags: OFlags) -> io::Result<OwnedFd> {
    let mode = Mode::RUSR | Mode::WUSR;
    openat(directory, name, flags | OFlags::NOFOLLOW | OFlags::CLOEXEC, mode).map_err(|e| {
        let found = statat(directory, name, AtFlags::SYMLINK_NOFOLLOW);
        match found.map(|found| FileType::from_raw_mode(found.st_mode)) {
            Ok(FileType::Symlink) => io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "{} is a symbolic link, which a command may have left there; name what it leads to",
                    name.to_string_lossy()
                ),
            ),
            _ => e.into(),
        }
    })
}

/// As typed: what follows a link to a directory and `..` is what the words say.
fn without_dots(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for component in path.components() {
        match component {
            Component::ParentDir => drop(plain.pop()),
            Component::CurDir => {}
            other => plain.push(other),
        }
    }
    plain
}

/// `/dev/stdout`, `/dev/null`, `/dev/fd/3`, `/proc/self/fd/3`.
fn is_stream(path: &Path) -> bool {
    let directory = path.parent().unwrap_or(Path::new("/"));
    ["/dev", "/dev/fd", "/proc/self/fd"].iter().any(|kernels| directory == Path::new(kernels))
}

/// The first directory on the way that is, or lies in, one of these, and what follows.
fn below(path: &Path, untrusted: &[&Path]) -> Option<Way> {
    let names: Vec<&OsStr> = path.iter().skip(1).collect();
    let mut directory = PathBuf::from("/");
    for (index, name) in names.iter().enumerate() {
        if untrusted.iter().any(|root| directory.starts_with(root)) {
            let names = names[index..].iter().map(|name| (*name).to_owned()).collect();
            return Some(Way::Below { directory, names });
        }
        // One that is not there is told when it is opened.
        directory = directory.join(name).canonicalize().ok()?;
    }
    None
}
