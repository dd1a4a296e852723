//! A leased exec that stays: it hands its memfd out of the sandbox over a socket, and waits to be ended.
//!
//! Receives a place; starts `sublet run` in it and holds its end of a pipe: closing it ends the exec in
//! good order. Dropping a `Held` that was not ended kills it.
#![forbid(unsafe_code)]

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, ChildStdin, Stdio};
use std::time::{Duration, Instant};

use super::act::{Sublet, run, shown};
use super::place::Place;
use super::show::Step;
use crate::cli::fail::{Answer, Failure, YES};
use crate::model::secret::Secret;
use crate::sys::{process, socket};

/// `sublet` itself passes the descriptor, since no shell can; a `git` lease brings it into the sandbox.
const COMMAND: &str = r#"/run/sublet/bin/sublet demo --leak out.sock <&"$TOKEN_FD" && cat"#;

/// For what takes milliseconds.
const PATIENCE: Duration = Duration::from_secs(5);
const MOMENT: Duration = Duration::from_millis(2);

pub struct Held {
    child: Child,
    /// Its end is the exec's.
    stdin: Option<ChildStdin>,
    leaked: File,
}

impl Held {
    /// Starts it with `leases`, one of them by memfd and one by git, and returns when the memfd has come
    /// out.
    pub fn start(
        step: &mut Step<'_>,
        sublet: &Sublet<'_>,
        leases: &[&str],
    ) -> Result<Self, Failure> {
        let path = sublet.place.work().join("out.sock");
        let listener =
            listen(sublet.place, &path).map_err(|e| failed("listen for the descriptor", &e))?;
        let args = run(leases, &["sh", "-c", COMMAND]);
        step.command(&format!("{} &", shown(&args)))?;
        let mut child = sublet
            .command(&args)
            .stdin(Stdio::piped())
            .spawn()
            .map_err(|e| failed("start an exec that stays", &e))?;
        let stdin = child.stdin.take();
        match take_leaked(&listener, &mut child) {
            Ok(leaked) => Ok(Self { child, stdin, leaked }),
            Err(e) => {
                let failure = failed("get the descriptor out", &e);
                // Dead or killed; either way its words are what is left to tell.
                drop((stdin, child.kill()));
                let said = child.wait_with_output().map(|ended| ended.stderr).unwrap_or_default();
                Err(failure.why(String::from_utf8_lossy(&said).trim_end().to_owned()))
            }
        }
    }

    /// The `sublet run` that holds it.
    pub fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    /// What the descriptor that came out reads now.
    pub fn leaked(&self, len: usize) -> Result<Secret, Failure> {
        let failed = |e| failed("read the descriptor that came out", &e);
        let mut bytes = Secret::zeroed(len).map_err(failed)?;
        self.leaked.read_exact_at(bytes.expose_mut(), 0).map_err(failed)?;
        Ok(bytes)
    }

    /// Its command sees the end of its input, and ends.
    pub fn end(&mut self) -> Result<(), Failure> {
        drop(self.stdin.take());
        let status = self.child.wait().map_err(|e| failed("wait for the exec", &e))?;
        if status.success() {
            return Ok(());
        }
        Err(Failure::new("demo", "not_held", format!("the exec that should stay ended: {status}")))
    }

    /// kill -9 of `sublet run`.
    pub fn kill(&mut self) -> Result<(), Failure> {
        self.child.kill().map_err(|e| failed("kill sublet", &e))?;
        self.child.wait().map(drop).map_err(|e| failed("wait for sublet", &e))
    }

    /// Whether all that it started is gone. To be asked after `end` or `kill`: what outlives sublet has
    /// become a child of the demo.
    pub fn is_gone(&self) -> bool {
        process::reap_all_within(PATIENCE)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            // Only on the way out of a failure. Its tree dies with it.
            drop(self.child.kill());
            drop(self.child.wait());
        }
    }
}

fn listen(place: &Place, path: &Path) -> io::Result<UnixListener> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    place.give_to_owner(path)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

fn take_leaked(listener: &UnixListener, child: &mut Child) -> io::Result<File> {
    let until = Instant::now() + PATIENCE;
    let stream = loop {
        match listener.accept() {
            Ok((stream, _)) => break stream,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) => return Err(e),
        }
        if child.try_wait()?.is_some() {
            return Err(io::Error::other("the exec ended before it"));
        }
        if Instant::now() >= until {
            return Err(io::ErrorKind::TimedOut.into());
        }
        std::thread::sleep(MOMENT);
    };
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let (mut byte, mut came) = ([0], None::<OwnedFd>);
    socket::receive(&stream, &mut byte, |fd| came = Some(fd))?;
    came.map(File::from).ok_or_else(|| io::Error::other("no descriptor came"))
}

/// Inside the exec: passes standard input's descriptor to `socket`.
pub fn leak(socket: &Path) -> Answer {
    let stream = UnixStream::connect(socket).map_err(|e| failed("connect out of the exec", &e))?;
    socket::send(&stream, b"x", &[rustix::stdio::stdin()])
        .map_err(|e| failed("pass the descriptor", &e.into()))?;
    Ok(YES)
}

fn failed(what: &str, error: &io::Error) -> Failure {
    Failure::new("demo", "not_held", format!("cannot {what}"))
        .because(error)
        .hint("sublet doctor says what this machine lacks")
}
