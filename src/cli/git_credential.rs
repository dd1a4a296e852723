//! `sublet git-credential`: the helper that git calls inside an exec with a `git` lease (gitcredentials(7)).
//!
//! Receives git's request on standard input; passes it to the exec's own socket; writes the answer to
//! standard output. Decides nothing: protocol, host, path and the use count are checked at the other end.
//! The answer holds a value: it lives in locked memory and is never buffered, logged or put in an error.
//!
//! On the socket: git's own lines up to end of file, then as answer either credential lines or a refusal
//! in lines `sublet-reason=`, `sublet-message=`, `sublet-hint=`.
#![forbid(unsafe_code)]

use std::io::{self, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::ValueEnum;

use super::Globals;
use super::fail::{Answer, Failure, NO, YES};
use crate::model::secret::Secret;

/// Where the socket is in every exec with a `git` lease.
pub const SOCKET: &str = "/run/sublet/git.sock";
/// A source may have to mint the value first.
const PATIENCE: Duration = Duration::from_secs(60);
/// What a helper may tell git (git-credential(1)); anything else in an answer is an error.
const ANSWER_KEYS: [&[u8]; 11] = [
    b"protocol",
    b"host",
    b"path",
    b"username",
    b"password",
    b"password_expiry_utc",
    b"authtype",
    b"credential",
    b"ephemeral",
    b"capability[]",
    b"quit",
];

#[derive(Debug, clap::Args)]
#[command(after_long_help = HELP)]
pub struct GitCredentialArgs {
    /// What git wants
    pub operation: Operation,
    /// The exec's socket
    #[arg(long, value_name = "PATH", default_value = SOCKET)]
    pub socket: PathBuf,
}

pub const HELP: &str = "\
Examples:
  git config credential.https://github.com.helper '/run/sublet/bin/sublet git-credential'

Exit status:
  0    answered; store and erase are swallowed, since nothing is kept
  1    refused: git is told to stop asking
  2    there is no lease socket here, or it did not answer";

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Operation {
    Get,
    Store,
    Erase,
}

pub fn execute(_globals: &Globals, args: &GitCredentialArgs) -> Answer {
    crate::sys::memory::set_not_dumpable().map_err(|e| {
        Failure::new("deliver", "helper_unprotected", "cannot make the helper undumpable")
            .because(&e)
    })?;
    // `store` brings the value back to us: read it where it can be wiped, and forget it.
    let request = Secret::read_from(io::stdin().lock()).map_err(|e| {
        Failure::new("deliver", "bad_request", "cannot read git's request").because(&e)
    })?;
    match args.operation {
        Operation::Store | Operation::Erase => Ok(YES),
        Operation::Get => match get(&request, &args.socket) {
            Ok(()) => Ok(YES),
            Err(failure) => {
                // Without this git would go on to prompt for a password. If git is gone, so is the question.
                drop(write_unbuffered(b"quit=1\n"));
                Err(failure)
            }
        },
    }
}

fn get(request: &Secret, socket: &Path) -> Result<(), Failure> {
    if request.expose().iter().any(|b| matches!(b, 0 | b'\r')) {
        return Err(Failure::new("deliver", "bad_request", "git's request is refused")
            .why("it holds a NUL or a carriage return (CVE-2020-5260, CVE-2024-52006)")
            .hint("look at the repository's remote: git remote -v"));
    }
    let answer = ask(request, socket).map_err(|e| {
        Failure::new("deliver", "no_lease_socket", "cannot reach the lease of this exec")
            .why(format!("{}: {e}", socket.display()))
            .hint("run git under a git lease: sublet run --lease CAPABILITY@HOST,channel=git -- git …")
    })?;
    let lines = || answer.expose().split(|&b| b == b'\n').filter(|line| !line.is_empty());
    if let Some(refusal) = refusal(lines()) {
        return Err(refusal);
    }
    let mangled = || {
        Failure::new(
            "deliver",
            "bad_answer",
            "the lease's answer is not in git's credential format",
        )
    };
    if lines().next().is_none() {
        return Err(mangled());
    }
    for line in lines() {
        let key = line.split(|&b| b == b'=').next().unwrap_or_default();
        if key.len() == line.len() || !ANSWER_KEYS.contains(&key) || line.contains(&0) {
            return Err(mangled());
        }
    }
    write_unbuffered(answer.expose()).map_err(|e| Failure::stdout(&e))
}

fn ask(request: &Secret, socket: &Path) -> io::Result<Secret> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.write_all(request.expose())?;
    stream.shutdown(Shutdown::Write)?;
    Secret::read_from(stream)
}

/// A refusal holds no value, so it may become text.
fn refusal<'a>(lines: impl Iterator<Item = &'a [u8]> + Clone) -> Option<Failure> {
    let field = |key: &[u8]| {
        let mut found = lines.clone().filter_map(|line| line.strip_prefix(key));
        found.next().map(|text| String::from_utf8_lossy(text).into_owned())
    };
    let reason = field(b"sublet-reason=")?;
    let failure = Failure::new("decide", &reason, format!("no credential for git: {reason}"))
        .hint(field(b"sublet-hint=").unwrap_or_default())
        .exit(NO);
    Some(match field(b"sublet-message=") {
        Some(message) => failure.why(message),
        None => failure,
    })
}

/// Past std's buffer, which is never wiped.
fn write_unbuffered(mut bytes: &[u8]) -> io::Result<()> {
    let stdout = io::stdout();
    while !bytes.is_empty() {
        match rustix::io::write(&stdout, bytes) {
            Ok(written) => bytes = &bytes[written..],
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_keeps_its_name_and_hint() {
        let lines =
            b"sublet-reason=uses_spent\nsublet-message=the one use is spent\nsublet-hint=ask again";
        let failure = refusal(lines.split(|&b| b == b'\n')).unwrap();
        assert_eq!(
            (
                failure.reason.as_str(),
                failure.causes[0].as_str(),
                failure.hint.as_str(),
                failure.exit
            ),
            ("uses_spent", "the one use is spent", "ask again", NO)
        );
        let credential = b"username=x\npassword=sublet-reason=no";
        assert_eq!(refusal(credential.split(|&b| b == b'\n')), None);
    }
}
