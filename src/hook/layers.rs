//! The trees that a root file system is made of, and which of them were found clean before.
//!
//! Only the lower layers of an overlay are remembered: they are what images share, and no container writes
//! them. What is remembered of one is its summary, and only where nothing in it changed of late; it is
//! looked at again each time, and read again if it is not what it was. Where there is no overlay, or its
//! layers cannot be opened, all is read.
#![forbid(unsafe_code)]

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, StatxFlags};
use sha2::{Digest, Sha256};

use super::tree::{self, Contents, Finding, Summary, TreeError};
use crate::guard::Scanner;
use crate::guard::told::hex;

/// In the directory of the sockets.
const DIRECTORY: &str = "guard";
/// How old the newest change must be: a second one in the same tick of the file system's clock would not show.
const SETTLED: i64 = 2;
const MAX_MOUNTS: u64 = 64 << 20;

/// What was read, and what was known.
#[derive(Debug, Default)]
pub struct Searched {
    pub found: Vec<Finding>,
    pub bytes: u64,
    pub layers: usize,
    pub known: usize,
}

/// Searches a root file system, layer by layer where it is made of such.
pub fn search(
    root: BorrowedFd<'_>,
    rootfs: &Path,
    scanner: &Scanner,
    runtime_dir: &Path,
) -> Result<Searched, TreeError> {
    let mut all = Searched::default();
    let Some(layers) = layers_of(root) else {
        let (_, contents) = tree::walk(root, rootfs, Some(scanner))?;
        all.take(contents);
        return Ok(all);
    };
    // Without one everything is read.
    let cache = Cache::open(runtime_dir, scanner);
    for Layer { path, directory, is_lower } in layers {
        all.layers += 1;
        let known = cache.as_ref().filter(|_| is_lower);
        let before = match known.and_then(|cache| cache.summary_of(&path, &directory)) {
            Some(known) => {
                let (summary, _) = tree::walk(directory.as_fd(), &path, None)?;
                if known == summary.digest {
                    all.known += 1;
                    continue;
                }
                Some(summary)
            }
            None => None,
        };
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime).tv_sec;
        let (read, contents) = tree::walk(directory.as_fd(), &path, Some(scanner))?;
        let is_clean = contents.found.is_empty();
        all.take(contents);
        if let (Some(cache), true) = (known, is_clean)
            && before.is_none_or(|before| before.digest == read.digest)
            && read.newest.0 < now - SETTLED
            // As it was read, so it is.
            && tree::walk(directory.as_fd(), &path, None)?.0 == read
        {
            cache.remember(&path, &directory, read);
        }
    }
    Ok(all)
}

impl Searched {
    fn take(&mut self, contents: Contents) {
        self.found.extend(contents.found);
        self.bytes += contents.bytes;
    }
}

struct Layer {
    path: PathBuf,
    directory: File,
    is_lower: bool,
}

/// The layers of the overlay whose root this is. None where it is none, or one cannot be opened.
fn layers_of(root: BorrowedFd<'_>) -> Option<Vec<Layer>> {
    let found = rustix::fs::statx(root, "", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID).ok()?;
    let mut mounts = String::new();
    let file = File::open("/proc/self/mountinfo").ok()?;
    io::Read::read_to_string(&mut io::Read::take(file, MAX_MOUNTS), &mut mounts).ok()?;
    let line = mounts.lines().find(|line| {
        line.split(' ').next().and_then(|id| id.parse().ok()) == Some(found.stx_mnt_id)
    })?;
    let layers = overlay(line)?;
    let opened = layers.into_iter().map(|(path, is_lower)| {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::openat(CWD, &path, flags, Mode::empty()).ok()?;
        Some(Layer { path, directory: directory.into(), is_lower })
    });
    opened.collect()
}

/// The layers that a line of mountinfo tells, and whether each is a lower one. proc_pid_mountinfo(5).
fn overlay(line: &str) -> Option<Vec<(PathBuf, bool)>> {
    let (mount, system) = line.split_once(" - ")?;
    let mut fields = system.splitn(3, ' ');
    // A part of an overlay is not made of the whole of its layers; which part, they do not tell.
    let is_whole = mount.split(' ').nth(3) == Some("/");
    if fields.next() != Some("overlay") || !is_whole {
        return None;
    }
    let options = unescaped(fields.nth(1)?);
    let mut layers = Vec::new();
    for option in split(&options, b',') {
        let Some(at) = option.iter().position(|b| *b == b'=') else { continue };
        let (key, value) = (&option[..at], &option[at + 1..]);
        match key {
            b"lowerdir" => layers.extend(
                // `::` begins the data-only ones.
                split(value, b':').into_iter().filter(|l| !l.is_empty()).map(|l| (l, true)),
            ),
            b"lowerdir+" | b"datadir+" => layers.push((value.to_vec(), true)),
            b"upperdir" => layers.push((value.to_vec(), false)),
            _ => {}
        }
    }
    let path = |(bytes, is_lower): (Vec<u8>, bool)| {
        let path = PathBuf::from(std::ffi::OsStr::from_bytes(&plain(&bytes)));
        // Relative to where it was mounted from, which no one tells.
        path.is_absolute().then_some((path, is_lower))
    };
    let layers: Option<Vec<_>> = layers.into_iter().map(path).collect();
    layers.filter(|layers| layers.iter().any(|(_, is_lower)| *is_lower))
}

/// The kernel's `\040` and its like.
fn unescaped(text: &str) -> Vec<u8> {
    let bytes = text.as_bytes();
    let mut plain = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        let octal = bytes.get(at + 1..at + 4).filter(|_| bytes[at] == b'\\');
        let octal = octal.and_then(|digits| std::str::from_utf8(digits).ok());
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                plain.push(byte);
                at += 4;
            }
            None => {
                plain.push(bytes[at]);
                at += 1;
            }
        }
    }
    plain
}

/// Splits where `at` is not escaped by a backslash, which overlay does for `:` and `,`.
fn split(text: &[u8], at: u8) -> Vec<Vec<u8>> {
    let mut parts = vec![Vec::new()];
    let mut escaped = false;
    for &byte in text {
        if byte == at && !escaped {
            parts.push(Vec::new());
        } else if let Some(last) = parts.last_mut() {
            last.push(byte);
        }
        escaped = byte == b'\\' && !escaped;
    }
    parts
}

fn plain(escaped: &[u8]) -> Vec<u8> {
    let mut plain = Vec::new();
    let mut bytes = escaped.iter();
    while let Some(&byte) = bytes.next() {
        match byte {
            b'\\' => plain.extend(bytes.next()),
            byte => plain.push(byte),
        }
    }
    plain
}

/// Summaries of layers that were clean, one file each, in a directory for this set of fingerprints. Root's
/// alone: who may write it could say that anything is clean.
struct Cache(PathBuf);

impl Cache {
    fn open(runtime_dir: &Path, scanner: &Scanner) -> Option<Self> {
        let all = runtime_dir.join(DIRECTORY);
        let own = all.join(&hex(&scanner.set_name())[..32]);
        let mut make = DirBuilder::new();
        make.mode(0o700);
        for directory in [&all, &own] {
            match make.create(directory) {
                Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return None,
                _ => {}
            }
            let found = directory.symlink_metadata().ok()?;
            let us = rustix::process::geteuid().as_raw();
            if !found.is_dir() || found.uid() != us || found.mode() & 0o077 != 0 {
                return None;
            }
        }
        // What was clean of other values tells nothing any more.
        for other in std::fs::read_dir(&all).ok()?.flatten().map(|e| e.path()) {
            if other != own {
                drop(std::fs::remove_dir_all(other));
            }
        }
        Some(Self(own))
    }

    fn file_of(&self, path: &Path, directory: &File) -> Option<PathBuf> {
        let found = directory.metadata().ok()?;
        let mut name = Sha256::new();
        name.update(found.dev().to_le_bytes());
        name.update(found.ino().to_le_bytes());
        name.update(path.as_os_str().as_bytes());
        Some(self.0.join(hex(&name.finalize())))
    }

    fn summary_of(&self, path: &Path, directory: &File) -> Option<[u8; 32]> {
        std::fs::read(self.file_of(path, directory)?).ok()?.try_into().ok()
    }

    /// One that cannot be remembered is read again.
    fn remember(&self, path: &Path, directory: &File, summary: Summary) {
        let Some(file) = self.file_of(path, directory) else { return };
        let fresh = file.with_extension(std::process::id().to_string());
        let written = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&fresh)
            .and_then(|mut file| file.write_all(&summary.digest))
            .and_then(|()| std::fs::rename(&fresh, &file));
        if written.is_err() {
            drop(std::fs::remove_file(&fresh));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_read_from_the_kernels_own_words() {
        #[track_caller]
        fn check(options: &str, expected: Option<&[(&str, bool)]>) {
            let line = format!("40 30 0:50 / /m rw,relatime - overlay overlay {options}");
            let expected = expected
                .map(|all| all.iter().map(|(p, l)| (PathBuf::from(p), *l)).collect::<Vec<_>>());
            assert_eq!(overlay(&line), expected, "{options}");
        }
        check(
            "rw,lowerdir=/a:/b,upperdir=/u,workdir=/w,uuid=on",
            Some(&[("/a", true), ("/b", true), ("/u", false)]),
        );
        check("rw,lowerdir+=/a,lowerdir+=/b", Some(&[("/a", true), ("/b", true)]));
        check("rw,lowerdir=/a\\134:x:/b\\040c", Some(&[("/a:x", true), ("/b c", true)]));
        check("ro,lowerdir=/a::/data", Some(&[("/a", true), ("/data", true)]));
        check("rw,lowerdir=l/AB:l/CD,upperdir=/u", None);
        check("rw,upperdir=/u", None);
        assert_eq!(overlay("40 30 0:50 /sub /m rw - overlay overlay rw,lowerdir=/a"), None);
        assert_eq!(overlay("40 30 0:50 / /m rw - ext4 /dev/x rw,lowerdir=/a"), None);
        assert_eq!(overlay(""), None);
    }
}
