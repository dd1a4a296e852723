//! The demo's directory: configuration, profile, workspace, state, and the value that is looked for.
//!
//! Makes one directory, 0700, below the temporary one; removes it with all that it holds.
#![forbid(unsafe_code)]

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, chown};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use zeroize::Zeroize as _;

use crate::cli::fail::Failure;
use crate::model::secret::Secret;
use crate::redact::{Patterns, Redactor};

pub const CONFIG: &str = "\
[secrets.demo-token]
source = \"vault\"
allow = [\"demo.use@api.example\"]
";

pub const PROFILE: &str = "\
description = \"The demo's: one capability, one audience, every channel\"
extends = \"default\"
[limits]
timeout = \"10s\"
[[capability]]
name = \"demo.use\"
channels = [\"env\", \"file\", \"memfd\", \"git\"]
ttl = \"1m\"
uses = 1
command = [[\"sh\", \"**\"]]
[[capability.audience]]
protocol = \"https\"
host = \"api.example\"
secret = \"demo-token\"
variable = \"TOKEN\"
username = \"demo\"
";

/// `nobody`.
const OTHER_USER: u32 = 65534;

/// Bytes read of one file at a time.
const CHUNK: usize = 64 << 10;

pub struct Place {
    pub dir: PathBuf,
    pub value: Secret,
    /// Who owns the workspace, and plays the host's other user: where root runs the demo, and not in a
    /// user namespace that has only itself.
    pub other_user: Option<u32>,
    patterns: Rc<Patterns>,
    is_removed: bool,
}

impl Place {
    pub fn make() -> Result<Self, Failure> {
        let value = fresh_value().map_err(|e| not_made(Path::new("a demonstration secret"), &e))?;
        let patterns = Patterns::new([value.expose()])
            .map_err(|e| not_made(Path::new("what looks for the secret"), &e))?;
        let mut suffix = [0; 6];
        random(&mut suffix).map_err(|e| not_made(Path::new("a name"), &e))?;
        let name: String = suffix.iter().map(|byte| format!("{byte:02x}")).collect();
        let dir = std::env::temp_dir().join(format!("sublet-demo-{name}"));
        DirBuilder::new().mode(0o700).create(&dir).map_err(|e| not_made(&dir, &e))?;
        // From here on dropping it removes it.
        let patterns = Rc::new(patterns);
        let mut place = Self { dir, value, other_user: None, patterns, is_removed: false };
        place.fill().map_err(|e| not_made(&place.dir, &e))?;
        Ok(place)
    }

    fn fill(&mut self) -> io::Result<()> {
        fs::write(self.dir.join("sublet.toml"), CONFIG)?;
        fs::create_dir(self.dir.join("profiles"))?;
        fs::write(self.dir.join("profiles/demo.toml"), PROFILE)?;
        let work = self.work();
        DirBuilder::new().mode(0o700).create(&work)?;
        if rustix::process::geteuid().is_root() {
            self.other_user = match chown(&work, Some(OTHER_USER), Some(OTHER_USER)) {
                Ok(()) => Some(OTHER_USER),
                Err(e) if e.kind() == io::ErrorKind::InvalidInput => None,
                Err(e) => return Err(e),
            };
        }
        Ok(())
    }

    /// Gives a file of the workspace to its owner.
    pub fn give_to_owner(&self, path: &Path) -> io::Result<()> {
        chown(path, self.other_user, self.other_user)
    }

    pub fn work(&self) -> PathBuf {
        self.dir.join("work")
    }

    /// Whether the value is in `bytes`: plain, in base64, hex, percent-encoded or in a JSON string.
    pub fn is_value_in(&self, bytes: &[u8]) -> Result<bool, Failure> {
        self.is_value_read(bytes).map_err(|e| not_searched(Path::new("an answer"), &e))
    }

    fn is_value_read(&self, mut reader: impl io::Read) -> io::Result<bool> {
        let mut redactor = Redactor::new(Rc::clone(&self.patterns))?;
        let (mut chunk, mut shown) = (vec![0; CHUNK], Vec::new());
        loop {
            match reader.read(&mut chunk)? {
                0 => break,
                n => redactor.push(chunk.get(..n).unwrap_or_default(), &mut shown),
            }
            shown.clear();
        }
        redactor.flush(&mut shown);
        Ok(redactor.masked() > 0)
    }

    /// How many files below `part` were read through, and those that hold the value.
    pub fn search(&self, part: &str) -> Result<(usize, Vec<PathBuf>), Failure> {
        let mut files = Vec::new();
        let mut dirs = vec![self.dir.join(part)];
        while let Some(dir) = dirs.pop() {
            for entry in fs::read_dir(&dir).map_err(|e| not_searched(&dir, &e))? {
                let entry = entry.map_err(|e| not_searched(&dir, &e))?;
                let kind = entry.file_type().map_err(|e| not_searched(&entry.path(), &e))?;
                if kind.is_dir() {
                    dirs.push(entry.path());
                } else if kind.is_file() {
                    files.push(entry.path());
                }
            }
        }
        let mut holders = Vec::new();
        for path in &files {
            let found = fs::File::open(path).and_then(|file| self.is_value_read(file));
            if found.map_err(|e| not_searched(path, &e))? {
                holders.push(path.clone());
            }
        }
        Ok((files.len(), holders))
    }

    /// Whether some file below `part` holds `text`: shows that a search that finds nothing would find.
    pub fn is_text_below(&self, part: &str, text: &str) -> Result<bool, Failure> {
        let twin = Patterns::new([text.as_bytes()])
            .map_err(|e| not_made(Path::new("what looks for a name"), &e))?;
        let twin = Self {
            dir: self.dir.clone(),
            value: Secret::zeroed(0).map_err(|e| not_made(Path::new("no value"), &e))?,
            other_user: None,
            patterns: Rc::new(twin),
            is_removed: true,
        };
        Ok(!twin.search(part)?.1.is_empty())
    }

    pub fn remove(mut self) -> Result<(), Failure> {
        self.is_removed = true;
        fs::remove_dir_all(&self.dir).map_err(|e| {
            Failure::new("demo", "not_removed", format!("cannot remove {}", self.dir.display()))
                .because(&e)
                .hint("remove it by hand: it holds a demonstration secret only")
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if !self.is_removed {
            // On the way out of another failure, which is the one to tell.
            drop(fs::remove_dir_all(&self.dir));
        }
    }
}

/// 32 hexadecimal digits behind a word, as many tokens look.
fn fresh_value() -> io::Result<Secret> {
    const WORD: &[u8] = b"demo_";
    let mut bytes = [0; 16];
    random(&mut bytes)?;
    let mut value = Secret::zeroed(WORD.len() + 32)?;
    let digits = bytes.iter().flat_map(|byte| [byte >> 4, byte & 15]);
    let digits = digits.map(|digit| b"0123456789abcdef"[usize::from(digit)]);
    for (place, byte) in value.expose_mut().iter_mut().zip(WORD.iter().copied().chain(digits)) {
        *place = byte;
    }
    bytes.zeroize();
    Ok(value)
}

fn random(bytes: &mut [u8]) -> io::Result<()> {
    crate::sys::random::fill(bytes)
}

fn not_made(what: &Path, error: &io::Error) -> Failure {
    Failure::new("demo", "not_prepared", format!("cannot make {}", what.display()))
        .because(error)
        .hint("name a directory that you may write to, with room, in TMPDIR")
}

fn not_searched(what: &Path, error: &io::Error) -> Failure {
    Failure::new("demo", "not_searched", format!("cannot search {}", what.display())).because(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_value_in_files_and_removes_them_in_failure_as_well() {
        let place = Place::make().unwrap();
        fs::write(place.work().join("clean"), "nothing").unwrap();
        assert_eq!(place.search("work").unwrap(), (1, vec![]));
        assert!(place.is_text_below("work", "nothing!").is_ok_and(|found| !found));
        fs::write(place.work().join("clean"), "is nothing!").unwrap();
        assert!(place.is_text_below("work", "nothing!").is_ok_and(|found| found));
        let hidden = place.work().join("hidden");
        let hex: String = place.value.expose().iter().map(|b| format!("{b:02X}")).collect();
        fs::write(&hidden, format!("key={hex};")).unwrap();
        assert_eq!(place.search("work").unwrap(), (2, vec![hidden]));
        let dir = place.dir.clone();
        drop(place);
        assert!(!dir.exists());
    }

    #[test]
    fn no_two_values_are_alike() {
        let (a, b) = (fresh_value().unwrap(), fresh_value().unwrap());
        assert_eq!(a.len(), 37);
        assert!(a.expose() != b.expose());
    }
}
