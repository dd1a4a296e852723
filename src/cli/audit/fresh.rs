//! A file that others may rely on: whole, on disk, its caller's alone, and never in the place of another.
//!
//! Root names the place, and becomes the state's user before it reads the state (`load::host_of_state`). So
//! the file is opened first, and what gives it its name when it is whole is a process of its own, which was
//! forked before: it waits for one word, and does that one thing.
#![forbid(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Read as _, Seek as _, Write as _};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::process::WaitOptions;

use crate::cli::fail::Failure;
use crate::sys::process::{self, Forked};

/// What lies at a place that was named.
pub(super) enum Place {
    /// Nothing yet.
    Free(Fresh),
    /// A regular file, open for reading.
    Taken(File),
}

/// A file without its name. If it is dropped, nothing is left of it.
pub(super) struct Fresh {
    path: PathBuf,
    file: File,
    namer: Namer,
}

impl Place {
    /// Looks at `path` as whoever this process is, before it becomes another.
    pub fn take(path: &Path) -> Result<Self, Failure> {
        match std::fs::symlink_metadata(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Fresh::begin(path).map(Place::Free),
            Ok(found) if found.is_file() => OpenOptions::new()
                .read(true)
                .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_CLOEXEC)
                .open(path)
                .map(Place::Taken)
                .map_err(|e| exists(path).because(&e)),
            Ok(_) => Err(exists(path)),
            Err(e) => Err(not_written(path).because(&e)),
        }
    }
}

impl Fresh {
    /// Opens a file of mode 0600 beside `path`.
    ///
    /// To be called before the process has another thread.
    pub fn begin(path: &Path) -> Result<Self, Failure> {
        let failed = |e: io::Error| not_written(path).because(&e);
        let name = path.file_name().ok_or_else(|| not_written(path).why("it names no file"))?;
        let unique = crate::sys::random::random_u64().map_err(|e| not_written(path).because(&e))?;
        let partial = format!(".{}.{unique:016x}.partial", name.to_string_lossy());
        let partial = path.with_file_name(partial);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC)
            .open(&partial)
            .map_err(failed)?;
        let namer = Namer::start(&partial, path).map_err(failed)?;
        Ok(Self { path: path.to_owned(), file, namer })
    }

    /// Lets `fill` write it, and gives it its name when it is on disk. Returns the file, at its beginning.
    pub fn fill<T>(
        self,
        fill: impl FnOnce(&mut BufWriter<File>) -> Result<T, Failure>,
    ) -> Result<(T, File), Failure> {
        let Self { path, file, mut namer } = self;
        let failed = |e: io::Error| not_written(&path).because(&e);
        let mut out = BufWriter::new(file);
        let value = fill(&mut out)?;
        let mut file = out.into_inner().map_err(|e| failed(e.into_error()))?;
        file.sync_all().and_then(|()| file.rewind()).map_err(failed)?;
        namer.name().map_err(|e| match e.kind() {
            io::ErrorKind::AlreadyExists => exists(&path),
            _ => failed(e),
        })?;
        Ok((value, file))
    }
}

/// The process that names the file.
struct Namer {
    /// Nothing once it has ended.
    socket: Option<UnixStream>,
    pid: i32,
}

impl Namer {
    fn start(partial: &Path, path: &Path) -> io::Result<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        match process::fork()? {
            Forked::Parent { pid } => Ok(Self { socket: Some(ours), pid }),
            Forked::Child => {
                drop(ours);
                // A Ctrl-C is for the command; this one ends with it, and clears up.
                let deaf = process::signalfd(&[libc::SIGINT, libc::SIGTERM, libc::SIGHUP]);
                let done = deaf.and_then(|_| wait_and_name(theirs, partial, path));
                std::process::exit(i32::from(done.is_err()))
            }
        }
    }

    fn name(&mut self) -> io::Result<()> {
        let gone = || io::Error::from(io::ErrorKind::UnexpectedEof);
        let mut socket = self.socket.take().ok_or_else(gone)?;
        socket.write_all(&[1])?;
        let mut answer = [0; 4];
        socket.read_exact(&mut answer)?;
        match i32::from_le_bytes(answer) {
            0 => Ok(()),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }
}

impl Drop for Namer {
    fn drop(&mut self) {
        self.socket = None;
        // It ends by itself, and what it did was told on the socket.
        if let Some(pid) = rustix::process::Pid::from_raw(self.pid)
            && let Err(e) = rustix::process::waitpid(Some(pid), WaitOptions::empty())
        {
            debug_assert_eq!(e, rustix::io::Errno::CHILD);
        }
    }
}

/// The end of the socket is the end of the command: then only the file without a name is removed.
fn wait_and_name(mut socket: UnixStream, partial: &Path, path: &Path) -> io::Result<()> {
    let mut word = [0];
    if socket.read(&mut word)? == 0 {
        return std::fs::remove_file(partial);
    }
    // Unlike rename(2), link(2) fails if the name is taken.
    let named = std::fs::hard_link(partial, path);
    let removed = std::fs::remove_file(partial);
    // The name must be as durable as what it names.
    let named = named.and(removed).and_then(|()| {
        let directory = path.parent().filter(|parent| *parent != Path::new(""));
        File::open(directory.unwrap_or(Path::new("."))).and_then(|d| d.sync_all())
    });
    let errno = named.map_or_else(|e| e.raw_os_error().unwrap_or(libc::EIO), |()| 0);
    socket.write_all(&errno.to_le_bytes())
}

pub(super) fn exists(path: &Path) -> Failure {
    Failure::new("audit", "file_exists", format!("{} is there already", path.display()))
        .hint("nothing is ever overwritten: name another file")
}

pub(super) fn not_written(path: &Path) -> Failure {
    Failure::new("audit", "file_not_written", format!("cannot write {}", path.display()))
        .hint("name a file in a directory that you may write to, with space for it")
}
