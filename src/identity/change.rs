//! What changes the issuer: its making, a further key, the withdrawal of all others. In two steps, so that the
//! trail can have it in between: no key is published or signs that was not recorded before.
//!
//! Touches `STATE/keys` alone.
#![forbid(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::Timestamp;

use super::issuer::{
    Issuer, IssuerError, IssuerKey, IssuerUrl, KeyState, MOST_KEYS, after, file_name, key_file,
};
use super::key;
use crate::host::issuer_file;
use crate::host::keyfile;

/// The issuer as it shall be. Its new key lies in a file that nothing names yet, and is removed with it unless
/// it is published. Others who would change the issuer wait.
pub struct Change {
    issuer: Issuer,
    state_dir: PathBuf,
    made: IssuerKey,
    /// Published no longer from then on.
    dropped: Vec<String>,
    is_published: bool,
    _lock: Lock,
}

/// Makes an issuer and its first key, which signs at once.
pub fn init(state_dir: &Path, url: IssuerUrl, now: Timestamp) -> Result<Change, IssuerError> {
    let lock = Lock::take(state_dir)?;
    if let Some(there) = Issuer::load(state_dir)? {
        return Err(IssuerError::Exists(there.url.to_string()));
    }
    let issuer = Issuer { version: 1, url, keys: Vec::new() };
    Change::with_key(lock, state_dir, issuer, Vec::new(), now, now)
}

/// Makes a further key, which signs after `lead`.
pub fn rotate(state_dir: &Path, lead: Duration, now: Timestamp) -> Result<Change, IssuerError> {
    let lock = Lock::take(state_dir)?;
    let mut issuer = Issuer::get(state_dir)?;
    let over = drop_keys(&mut issuer, |issuer, key| issuer.state_of(key, now) == KeyState::Over);
    if issuer.keys.len() >= MOST_KEYS {
        return Err(IssuerError::TooManyKeys(issuer.keys.len()));
    }
    Change::with_key(lock, state_dir, issuer, over, now, after(now, lead))
}

/// Makes a key that signs at once, and publishes no other any more: for when one has become known.
pub fn withdraw(state_dir: &Path, now: Timestamp) -> Result<Change, IssuerError> {
    let lock = Lock::take(state_dir)?;
    let mut issuer = Issuer::get(state_dir)?;
    let all = drop_keys(&mut issuer, |_, _| true);
    Change::with_key(lock, state_dir, issuer, all, now, now)
}

impl Change {
    fn with_key(
        lock: Lock,
        state_dir: &Path,
        mut issuer: Issuer,
        dropped: Vec<String>,
        now: Timestamp,
        signs_from: Timestamp,
    ) -> Result<Self, IssuerError> {
        let (der, public) = key::generate()?;
        let made = IssuerKey { public, created_at: now, signs_from };
        issuer.keys.push(made.clone());
        issuer.keys.sort_by_key(|key| key.signs_from);
        let state_dir = state_dir.to_owned();
        let change = Self { issuer, state_dir, made, dropped, is_published: false, _lock: lock };
        keyfile::store_other(&change.state_dir, &file_name(&change.made.kid()), &der)?;
        Ok(change)
    }

    pub fn issuer(&self) -> &Issuer {
        &self.issuer
    }

    /// The new key.
    pub fn made(&self) -> &IssuerKey {
        &self.made
    }

    /// The names of the keys that are published no longer.
    pub fn dropped(&self) -> &[String] {
        &self.dropped
    }

    /// It takes effect. Private halves of what is published no longer are removed: a crash in between leaves
    /// files that nothing names.
    pub fn publish(mut self) -> Result<Issuer, IssuerError> {
        save(&self.issuer, &self.state_dir)?;
        self.is_published = true;
        for kid in &self.dropped {
            let path = key_file(&self.state_dir, kid);
            remove(&path).map_err(|source| IssuerError::Write { path, source })?;
        }
        Ok(self.issuer.clone())
    }
}

impl Drop for Change {
    fn drop(&mut self) {
        if !self.is_published {
            // Nothing names it: what could not be removed is no one's key.
            drop(remove(&key_file(&self.state_dir, &self.made.kid())));
        }
    }
}

fn drop_keys(issuer: &mut Issuer, is_over: impl Fn(&Issuer, &IssuerKey) -> bool) -> Vec<String> {
    let kept = issuer.keys.iter().filter(|key| !is_over(issuer, key)).cloned().collect();
    let all = std::mem::replace(&mut issuer.keys, kept);
    all.iter().filter(|key| !issuer.keys.contains(key)).map(IssuerKey::kid).collect()
}

fn save(issuer: &Issuer, state_dir: &Path) -> Result<(), IssuerError> {
    let path = issuer_file(state_dir);
    let failed = |source| IssuerError::Write { path: path.clone(), source };
    let directory = keyfile::directory_in(state_dir)?;
    let fresh = directory.join(".issuer.json");
    let text = serde_json::to_vec_pretty(issuer).map_err(|e| failed(e.into()))?;
    // The lock is ours: what lies at that name is of one that was killed.
    let written = remove(&fresh)
        .and_then(|()| {
            let flags = libc::O_NOFOLLOW | libc::O_CLOEXEC;
            let mut file = OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .custom_flags(flags)
                .open(&fresh)?;
            file.write_all(&text)?;
            file.sync_all()
        })
        .and_then(|()| std::fs::rename(&fresh, &path))
        .and_then(|()| File::open(&directory)?.sync_all());
    written.map_err(failed)
}

fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Two that change the issuer do so one after the other.
struct Lock(#[expect(dead_code, reason = "held")] File);

impl Lock {
    fn take(state_dir: &Path) -> Result<Self, IssuerError> {
        let path = keyfile::directory_in(state_dir)?.join("issuer.lock");
        let failed = |source| IssuerError::Write { path: path.clone(), source };
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC)
            .open(&path)
            .map_err(failed)?;
        rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive)
            .map_err(|e| failed(e.into()))?;
        Ok(Self(file))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_published_leaves_no_key_and_no_issuer() {
        let dir = tempfile::tempdir().unwrap();
        let now: Timestamp = "2026-11-27T00:00:00Z".parse().unwrap();
        let url: IssuerUrl = "https://id.example.com".parse().unwrap();
        let keys = || {
            let files = std::fs::read_dir(dir.path().join("keys")).unwrap().flatten();
            files.filter(|f| f.path().extension().is_some_and(|e| e == "key")).count()
        };
        let change = init(dir.path(), url.clone(), now).unwrap();
        assert_eq!(keys(), 1, "the control");
        assert!(Issuer::load(dir.path()).unwrap().is_none(), "and nobody has it yet");
        drop(change);
        assert_eq!(keys(), 0);
        let issuer = init(dir.path(), url, now).unwrap().publish().unwrap();
        drop(withdraw(dir.path(), now).unwrap());
        assert_eq!((keys(), Issuer::get(dir.path()).unwrap()), (1, issuer));
    }
}
