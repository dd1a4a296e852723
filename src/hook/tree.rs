//! Every file of a directory tree, told without following a link or leaving its mount: read for managed
//! values, or only looked at for a summary by which a tree that was read before is known again.
#![forbid(unsafe_code)]

use std::collections::HashSet;
use std::ffi::CStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, Dir, FileType, Mode, OFlags, SeekFrom, Statx, StatxFlags, openat, readlinkat, seek,
    statx,
};
use rustix::io::Errno;
use sha2::{Digest, Sha256};

use crate::guard::{Form, Scanner};
use crate::model::name::SecretName;

/// Images have fewer; what has more is refused rather than half read.
const MAX_FILES: u64 = 10_000_000;
const MAX_BYTES: u64 = 256 << 30;
const MAX_DEPTH: usize = 200;
/// How many findings are told.
const MAX_FOUND: usize = 16;
/// Names and links are read so far.
const NAMES: usize = 4096;

/// A managed value in a tree: where, and whose.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    pub place: String,
    pub secret: SecretName,
    pub form: Form,
}

/// What a tree looks like: a digest of every entry's name, inode, size and times. A changed file has another
/// change time, which no one but root can set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Summary {
    pub digest: [u8; 32],
    /// The newest change, in seconds and nanoseconds of the wall clock.
    pub newest: (i64, u32),
}

/// What a tree held.
#[derive(Debug, Default)]
pub struct Contents {
    pub found: Vec<Finding>,
    pub files: u64,
    pub bytes: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum TreeError {
    #[error("could not read {path}")]
    Unreadable { path: PathBuf, source: io::Error },
    #[error("{path} lies deeper than {MAX_DEPTH} directories")]
    TooDeep { path: PathBuf },
    #[error("{path} has more than {MAX_FILES} files or {MAX_BYTES} bytes")]
    TooLarge { path: PathBuf },
}

/// Looks at every entry of the tree, and with a scanner reads every file.
pub fn walk(
    root: BorrowedFd<'_>,
    path: &Path,
    scanner: Option<&Scanner>,
) -> Result<(Summary, Contents), TreeError> {
    let failed = |e: Errno| TreeError::Unreadable { path: path.to_owned(), source: e.into() };
    let directory = open_directory(root, c".").map_err(failed)?;
    let own = look(&directory, c"").map_err(failed)?;
    let mut walk = Walk {
        top: path,
        mount: own.stx_mnt_id,
        scanner,
        hash: Sha256::new(),
        newest: (i64::MIN, 0),
        linked: HashSet::new(),
        buffer: Vec::new(),
        read: Contents::default(),
    };
    walk.note(b".", &own);
    walk.directory(directory, &mut PathBuf::new(), 0)?;
    let digest = walk.hash.finalize().into();
    Ok((Summary { digest, newest: walk.newest }, walk.read))
}

struct Walk<'a> {
    top: &'a Path,
    mount: u64,
    scanner: Option<&'a Scanner>,
    hash: Sha256,
    newest: (i64, u32),
    /// Files with several names, by device and inode.
    linked: HashSet<(u32, u32, u64)>,
    buffer: Vec<u8>,
    read: Contents,
}

impl Walk<'_> {
    fn directory(
        &mut self,
        directory: OwnedFd,
        at: &mut PathBuf,
        depth: usize,
    ) -> Result<(), TreeError> {
        if depth > MAX_DEPTH {
            return Err(TreeError::TooDeep { path: self.top.join(&*at) });
        }
        let failed =
            |path: PathBuf| move |e: Errno| TreeError::Unreadable { path, source: e.into() };
        let here = self.top.join(&*at);
        let mut names = Vec::new();
        for entry in Dir::read_from(&directory).map_err(failed(here.clone()))? {
            let entry = entry.map_err(failed(here.clone()))?;
            if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
                names.push(entry.file_name().to_owned());
            }
        }
        // In whatever order the file system has them, a tree looks the same.
        names.sort();
        for name in names {
            at.push(std::ffi::OsStr::from_bytes(name.to_bytes()));
            let shown = self.top.join(&*at);
            let found = look(&directory, &name).map_err(failed(shown.clone()))?;
            self.note(at.as_os_str().as_bytes(), &found);
            self.search_name(&shown, name.to_bytes());
            match FileType::from_raw_mode(u32::from(found.stx_mode)) {
                FileType::Directory => {
                    let inner =
                        open_directory(directory.as_fd(), &name).map_err(failed(shown.clone()))?;
                    let opened = look(&inner, c"").map_err(failed(shown.clone()))?;
                    // What is mounted there is no part of the image.
                    if opened.stx_mnt_id == self.mount {
                        self.directory(inner, at, depth + 1)?;
                    }
                }
                FileType::Symlink => {
                    let target =
                        readlinkat(&directory, &name, Vec::new()).map_err(failed(shown.clone()))?;
                    self.search_name(&shown, target.to_bytes());
                }
                FileType::RegularFile => self.file(directory.as_fd(), &name, &found, &shown)?,
                _ => {}
            }
            at.pop();
        }
        Ok(())
    }

    /// What makes an entry another.
    fn note(&mut self, at: &[u8], found: &Statx) {
        self.hash.update((at.len() as u64).to_le_bytes());
        self.hash.update(at);
        let (m, c) = (found.stx_mtime, found.stx_ctime);
        for number in [
            u64::from(found.stx_mode),
            u64::from(found.stx_dev_major) << 32 | u64::from(found.stx_dev_minor),
            found.stx_ino,
            found.stx_size,
            m.tv_sec as u64,
            u64::from(m.tv_nsec),
            c.tv_sec as u64,
            u64::from(c.tv_nsec),
        ] {
            self.hash.update(number.to_le_bytes());
        }
        self.newest = self.newest.max((c.tv_sec, c.tv_nsec));
    }

    fn search_name(&mut self, shown: &Path, name: &[u8]) {
        let Some(scanner) = self.scanner else { return };
        if let Some(found) = scanner.find(&name[..name.len().min(NAMES)]) {
            // The path would show it.
            let place = format!("the name of a file in {}", self.shown_parent(shown).display());
            let print = found.print;
            self.tell(place, print.secret.clone(), print.form);
        }
    }

    /// The nearest directory whose own path holds nothing.
    fn shown_parent<'p>(&self, shown: &'p Path) -> &'p Path {
        let clean = |path: &&Path| {
            self.scanner.is_none_or(|scanner| scanner.find(path.as_os_str().as_bytes()).is_none())
        };
        shown.ancestors().skip(1).find(clean).unwrap_or(Path::new("/"))
    }

    fn tell(&mut self, place: String, secret: SecretName, form: Form) {
        if self.read.found.len() < MAX_FOUND {
            self.read.found.push(Finding { place, secret, form });
        }
    }

    fn file(
        &mut self,
        directory: BorrowedFd<'_>,
        name: &CStr,
        found: &Statx,
        shown: &Path,
    ) -> Result<(), TreeError> {
        let Some(scanner) = self.scanner.filter(|scanner| scanner.has_windows()) else {
            return Ok(());
        };
        self.read.files += 1;
        let identity = (found.stx_dev_major, found.stx_dev_minor, found.stx_ino);
        if found.stx_size == 0 || found.stx_nlink > 1 && !self.linked.insert(identity) {
            return Ok(());
        }
        self.read.bytes += found.stx_size.min(found.stx_blocks.saturating_mul(512));
        if self.read.files > MAX_FILES || self.read.bytes > MAX_BYTES {
            return Err(TreeError::TooLarge { path: self.top.to_owned() });
        }
        let failed = |source| TreeError::Unreadable { path: shown.to_owned(), source };
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = openat(directory, name, flags, Mode::empty()).map_err(|e| failed(e.into()))?;
        // Another file by now, perhaps a pipe: then this tree is being changed under us.
        let opened = look(&file, c"").map_err(|e| failed(e.into()))?;
        if opened.stx_ino != found.stx_ino
            || FileType::from_raw_mode(u32::from(opened.stx_mode)) != FileType::RegularFile
        {
            return Err(failed(io::Error::other("it was replaced while it was looked at")));
        }
        let is_sparse = found.stx_blocks.saturating_mul(512) < found.stx_size / 2;
        let file = File::from(file);
        let found = match is_sparse {
            true => scanner.find_in(Data::of(&file), &mut self.buffer),
            false => scanner.find_in(&file, &mut self.buffer),
        }
        .map_err(failed)?
        .map(|found| (found.print.secret.clone(), found.print.form));
        if let Some((secret, form)) = found {
            let clean = scanner.find(shown.as_os_str().as_bytes()).is_none();
            let place = if clean { shown } else { self.shown_parent(shown) };
            let place = place.display().to_string();
            self.tell(place, secret, form);
        }
        Ok(())
    }
}

/// A sparse file without its holes. lseek(2), `SEEK_DATA`.
struct Data<'a> {
    file: &'a File,
    left: u64,
    at: u64,
}

impl<'a> Data<'a> {
    fn of(file: &'a File) -> Self {
        Self { file, left: 0, at: 0 }
    }
}

impl Read for Data<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if self.left == 0 {
            let from = match seek(self.file, SeekFrom::Data(self.at)) {
                Ok(from) => from,
                Err(Errno::NXIO) => return Ok(0),
                Err(e) => return Err(e.into()),
            };
            let to = seek(self.file, SeekFrom::Hole(from))?;
            seek(self.file, SeekFrom::Start(from))?;
            (self.at, self.left) = (from, to - from);
        }
        let most = into.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let mut file = self.file;
        let read = file.read(&mut into[..most])?;
        if read == 0 {
            return Ok(0);
        }
        (self.at, self.left) = (self.at + read as u64, self.left - read as u64);
        Ok(read)
    }
}

fn look(at: impl AsFd, name: &CStr) -> Result<Statx, Errno> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::EMPTY_PATH | AtFlags::NO_AUTOMOUNT;
    statx(at, name, flags, StatxFlags::BASIC_STATS | StatxFlags::MNT_ID)
}

fn open_directory(at: BorrowedFd<'_>, name: &CStr) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat(at, name, flags, Mode::empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guard::GuardKey;
    use std::os::unix::fs::symlink;

    const VALUE: &[u8] = b"ghp_0a1B2c3D4e5F6g7H8i9J";

    fn scanner() -> Scanner {
        let key = GuardKey::new([9; 32]);
        let prints = key.fingerprints(&"bot".parse().unwrap(), VALUE).unwrap();
        Scanner::new(key, prints)
    }

    #[track_caller]
    fn read(dir: &Path) -> Contents {
        walk(File::open(dir).unwrap().as_fd(), dir, Some(&scanner())).unwrap().1
    }

    #[test]
    fn a_value_is_found_wherever_it_lies_and_its_place_is_told_and_nothing_of_it() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::create_dir_all(at("a/b")).unwrap();
        std::fs::write(at("a/clean"), b"ghp_0a1B2c3D4e5F6g7H8i9K").unwrap();
        assert_eq!(read(dir.path()).found, []);
        std::fs::write(at("a/b/deep"), [b"x=", VALUE, b"\n"].concat()).unwrap();
        let found = read(dir.path()).found;
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].place, at("a/b/deep").display().to_string());
        // Between holes of a terabyte.
        let sparse = File::create(at("sparse")).unwrap();
        sparse.set_len(1 << 40).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&sparse, VALUE, 1 << 39).unwrap();
        // In a name, and in what a link says; a link itself is not followed.
        std::fs::write(at(std::str::from_utf8(VALUE).unwrap()), b"").unwrap();
        symlink(std::str::from_utf8(VALUE).unwrap(), at("link")).unwrap();
        symlink(at("a/b/deep"), at("other-link")).unwrap();
        let found = read(dir.path()).found;
        assert_eq!(found.len(), 4, "{found:?}");
        for finding in &found {
            assert!(!finding.place.contains("ghp_"), "{finding:?}");
        }
    }

    #[test]
    fn a_summary_changes_with_whatever_changes() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let summary = || walk(File::open(dir.path()).unwrap().as_fd(), dir.path(), None).unwrap().0;
        std::fs::write(at("one"), b"12345678").unwrap();
        std::fs::create_dir(at("two")).unwrap();
        let mut before = summary();
        assert_eq!(before, summary());
        let mut check = |change: &dyn Fn()| {
            // Past the clock's grain.
            std::thread::sleep(std::time::Duration::from_millis(20));
            change();
            let after = summary();
            assert_ne!(before.digest, after.digest);
            assert!(after.newest >= before.newest);
            before = after;
        };
        check(&|| std::fs::write(at("one"), b"12345679").unwrap());
        // The old time does not hide it: the change time is the kernel's.
        check(&|| {
            let file = File::options().write(true).open(at("one")).unwrap();
            let modified = file.metadata().unwrap().modified().unwrap();
            std::os::unix::fs::FileExt::write_all_at(&file, b"9", 0).unwrap();
            file.set_modified(modified).unwrap();
        });
        check(&|| std::fs::write(at("two/three"), b"").unwrap());
        check(&|| std::fs::rename(at("two/three"), at("two/four")).unwrap());
        check(&|| std::fs::remove_file(at("two/four")).unwrap());
    }

    #[test]
    fn what_is_too_deep_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let mut at = dir.path().to_owned();
        for _ in 0..=MAX_DEPTH + 1 {
            at.push("d");
        }
        std::fs::create_dir_all(&at).unwrap();
        let walked = walk(File::open(dir.path()).unwrap().as_fd(), dir.path(), None);
        assert!(matches!(walked, Err(TreeError::TooDeep { .. })));
    }
}
