//! A file that others may rely on: whole, on disk, ours alone, and never in the place of another.
#![forbid(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Write as _};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::cli::fail::Failure;

/// Lets `fill` write a file of mode 0600 beside `path`, and gives it that name when it is on disk. If anything
/// fails, or `path` is taken, nothing is left of it.
pub(super) fn write_new<T>(
    path: &Path,
    fill: impl FnOnce(&mut BufWriter<File>) -> Result<T, Failure>,
) -> Result<T, Failure> {
    let directory = match path.parent() {
        Some(parent) if parent != Path::new("") => parent.to_owned(),
        _ => PathBuf::from("."),
    };
    let name = path.file_name().ok_or_else(|| not_written(path).why("it names no file"))?;
    let unique = getrandom::u64().map_err(|e| not_written(path).because(&e))?;
    let partial = directory.join(format!(".{}.{unique:016x}.partial", name.to_string_lossy()));
    let failed = |e: io::Error| not_written(path).because(&e);
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC)
        .open(&partial)
        .map_err(failed)?;
    let mut out = BufWriter::new(file);
    let written = fill(&mut out).and_then(|value| {
        out.flush().and_then(|()| out.get_ref().sync_all()).map_err(failed)?;
        // Unlike rename(2), link(2) fails if the name is taken.
        std::fs::hard_link(&partial, path).map_err(|e| match e.kind() {
            io::ErrorKind::AlreadyExists => exists(path),
            _ => failed(e),
        })?;
        Ok(value)
    });
    let removed = std::fs::remove_file(&partial).map_err(failed);
    let value = written?;
    removed?;
    // The name must be as durable as what it names.
    File::open(&directory).and_then(|d| d.sync_all()).map_err(failed)?;
    Ok(value)
}

pub(super) fn exists(path: &Path) -> Failure {
    Failure::new("audit", "file_exists", format!("{} is there already", path.display()))
        .hint("nothing is ever overwritten: name another file")
}

pub(super) fn not_written(path: &Path) -> Failure {
    Failure::new("audit", "file_not_written", format!("cannot write {}", path.display()))
        .hint("name a file in a directory that you may write to, with space for it")
}
