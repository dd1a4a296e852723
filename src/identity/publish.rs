//! The issuer's two documents as static files, for any web server, bucket or page host.
#![forbid(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde_json::Value;

use super::issuer::Issuer;

/// Below the issuer's URL. OpenID Connect Discovery §4.
pub const DISCOVERY: &str = "/.well-known/openid-configuration";
/// Named by the discovery document.
pub const JWKS: &str = "/.well-known/jwks.json";

#[derive(Debug, thiserror::Error)]
#[error("could not publish to {path}")]
pub struct PublishError {
    path: PathBuf,
    source: io::Error,
}

/// Writes both below `out`, which stands for the issuer's URL. The key set comes first: nobody is led to
/// one that is not there. Each is replaced whole.
pub fn publish(issuer: &Issuer, out: &Path, now: Timestamp) -> Result<[PathBuf; 2], PublishError> {
    Ok([write(out, JWKS, &issuer.jwks(now))?, write(out, DISCOVERY, &issuer.discovery())?])
}

fn write(out: &Path, below: &str, document: &Value) -> Result<PathBuf, PublishError> {
    let path = out.join(below.trim_start_matches('/'));
    let failed = |source| PublishError { path: path.clone(), source };
    let directory = path.parent().unwrap_or(out);
    std::fs::DirBuilder::new().recursive(true).mode(0o755).create(directory).map_err(failed)?;
    let unique = crate::sys::random::random_u64().map_err(failed)?;
    let fresh = directory.join(format!(".sublet.{unique:016x}"));
    let mut text = document.to_string();
    text.push('\n');
    let write = || -> io::Result<()> {
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o644)
            .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC)
            .open(&fresh)?;
        file.write_all(text.as_bytes())?;
        // The caller's umask is for what is the caller's; this is for everyone.
        rustix::fs::fchmod(&file, rustix::fs::Mode::from(0o644))?;
        file.sync_all()?;
        std::fs::rename(&fresh, &path)?;
        File::open(directory)?.sync_all()
    };
    write().map_err(|source| {
        // What is left of it is nobody's document.
        drop(std::fs::remove_file(&fresh));
        failed(source)
    })?;
    Ok(path)
}
