//! The files of projected tokens. Their directory is root's hook's making: on a tmpfs, the broker's to write
//! and the container's user's to read, by its default access list. Nothing here follows a link.
#![forbid(unsafe_code)]

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::model::id::RunId;
use crate::model::secret::Secret;
use crate::profile::identity::{IN_CONTAINER, Identity, IdentityKind};

const TOKEN: &str = "token";
/// What a shell sources to tell the clouds' libraries.
const ENVIRONMENT: &str = "environment";

/// A token that stands in its file, and the one before it, which someone may still have open.
pub(super) struct Shown {
    path: PathBuf,
    now: File,
    previous: Option<File>,
}

/// Writes the first version, and the document beside it.
pub(super) fn show(directory: &Path, identity: &Identity, token: &Secret) -> io::Result<Shown> {
    let place = directory.join(identity.kind.directory());
    // Who else may pass and read is in the access list that it inherits, which this mode masks.
    match DirBuilder::new().mode(0o750).create(&place) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
        _ => {}
    }
    if let Some((name, text)) = identity.document_below(Path::new(IN_CONTAINER)) {
        put(&place.join(name), text.as_bytes())?;
    }
    let path = place.join(TOKEN);
    let now = put(&path, token.expose())?;
    Ok(Shown { path, now, previous: None })
}

impl Shown {
    /// In one step: who opens the file has one or the other, whole.
    pub fn replace(
        &mut self,
        directory: &Path,
        kind: IdentityKind,
        token: &Secret,
    ) -> io::Result<()> {
        self.path = directory.join(kind.directory()).join(TOKEN);
        let next = put(&self.path, token.expose())?;
        if let Some(previous) = self.previous.replace(std::mem::replace(&mut self.now, next)) {
            zero(&previous)?;
        }
        Ok(())
    }

    /// Zeroes every version that is left, and removes the name. Once more it does nothing.
    pub fn wipe(&mut self) {
        // Each, whatever became of the others.
        let versions = [Some(&self.now), self.previous.as_ref()].into_iter().flatten();
        let wiped = versions.map(zero).fold(Ok(()), io::Result::and);
        let wiped = wiped.and(gone(std::fs::remove_file(&self.path)));
        if let Err(e) = wiped {
            tracing::error!(path = %self.path.display(), error = %e, "a container's token is not wiped");
        }
    }
}

/// How the libraries of the clouds find the tokens, for `.` of a shell: a container's own environment is
/// given before there is a hook.
pub(super) fn write_environment<'a>(
    directory: &Path,
    identities: impl Iterator<Item = &'a Identity>,
    run_id: &RunId,
) -> io::Result<()> {
    let mut text = String::new();
    for identity in identities {
        for (name, value) in identity.variables_below(Path::new(IN_CONTAINER), run_id.as_str()) {
            let quoted = value.replace('\'', "'\\''");
            text.push_str(&format!("export {name}='{quoted}'\n"));
        }
    }
    put(&directory.join(ENVIRONMENT), text.as_bytes()).map(drop)
}

/// Wipes what stands there, of whoever was before us, and keeps the directory.
pub(super) fn clear(directory: &Path) -> io::Result<()> {
    let found = directory.symlink_metadata()?;
    if !found.is_dir() || found.uid() != rustix::process::geteuid().as_raw() {
        let message = "it is no directory that the hook has made for this service";
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, message));
    }
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        if path.symlink_metadata()?.is_dir() {
            for inner in std::fs::read_dir(&path)? {
                wipe_file(&inner?.path())?;
            }
            std::fs::remove_dir(&path)?;
        } else {
            wipe_file(&path)?;
        }
    }
    Ok(())
}

/// The same, and the directory.
pub(super) fn remove(directory: &Path) -> io::Result<()> {
    match directory.symlink_metadata() {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        _ => {}
    }
    clear(directory)?;
    std::fs::remove_dir(directory)
}

fn wipe_file(path: &Path) -> io::Result<()> {
    let file = OpenOptions::new().write(true).custom_flags(libc::O_NOFOLLOW).open(path);
    if let Ok(file) = file {
        zero(&file)?;
    }
    std::fs::remove_file(path)
}

/// Whole, under another name, then in its place.
fn put(path: &Path, content: &[u8]) -> io::Result<File> {
    let fresh = path.with_extension("next");
    gone(std::fs::remove_file(&fresh))?;
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o640)
        .custom_flags(libc::O_NOFOLLOW)
        .open(&fresh)?;
    let placed = file.write_all(content).and_then(|()| std::fs::rename(&fresh, path));
    if let Err(e) = placed {
        wipe_file(&fresh)?;
        return Err(e);
    }
    Ok(file)
}

fn zero(file: &File) -> io::Result<()> {
    let len = file.metadata()?.len();
    file.write_all_at(&vec![0; len as usize], 0)
}

fn gone(removed: io::Result<()>) -> io::Result<()> {
    match removed {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}
