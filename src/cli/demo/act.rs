//! This binary, called as a user would call it.
#![forbid(unsafe_code)]

use std::io::Write as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};

use super::place::Place;
use super::show::Step;
use crate::cli::fail::Failure;

/// What every command is called with; told once, and not shown again.
pub const COMMON: [&str; 4] = ["--config", "../sublet.toml", "--state-dir", "../state"];

pub struct Sublet<'a> {
    pub place: &'a Place,
    program: PathBuf,
}

/// A command that ended.
pub struct Ran {
    status: ExitStatus,
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
}

impl Ran {
    /// As a shell has it: 128 and its number for a signal.
    pub fn status(&self) -> i32 {
        self.status.code().or(self.status.signal().map(|n| 128 + n)).unwrap_or(-1)
    }

    pub fn is_success(&self) -> bool {
        self.status.success()
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    pub fn errors(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// For a step that cannot go on without it.
    pub fn or_fail(self, what: &str) -> Result<Self, Failure> {
        if self.is_success() {
            return Ok(self);
        }
        let status = self.status();
        Err(Failure::new("demo", "command_failed", format!("{what} ended with status {status}"))
            .why(self.errors().trim_end().to_owned())
            .hint("sublet doctor says what this machine lacks"))
    }
}

impl<'a> Sublet<'a> {
    pub fn new(place: &'a Place) -> Result<Self, Failure> {
        let program = std::env::current_exe().map_err(|e| {
            Failure::new("demo", "no_program", "cannot tell where this program lies").because(&e)
        })?;
        Ok(Self { place, program })
    }

    pub fn command(&self, args: &[&str]) -> Command {
        let names_a_state = args.contains(&"--state-dir");
        let mut command = Command::new(&self.program);
        command
            .args(COMMON.iter().take(if names_a_state { 2 } else { 4 }))
            .args(args)
            .current_dir(self.place.work())
            // The demo shows what it says, whatever the caller's shell sets.
            .env_remove("SUBLET_CONFIG")
            .env_remove("CREDENTIALS_DIRECTORY")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// Runs `sublet` with `args`, shows the command, and returns what came of it.
    pub fn run(&self, step: &mut Step<'_>, args: &[&str]) -> Result<Ran, Failure> {
        step.command(&shown(args))?;
        finish(self.command(args), None)
    }

    /// As [`Sublet::run`], with `input` on standard input from `source`, which is shown in its place.
    pub fn run_with(
        &self,
        step: &mut Step<'_>,
        args: &[&str],
        source: &str,
        input: &[u8],
    ) -> Result<Ran, Failure> {
        step.command(&format!("{} <{source}", shown(args)))?;
        finish(self.command(args), Some(input))
    }
}

/// The words of one `sublet run`.
pub fn run<'a>(leases: &[&'a str], command: &[&'a str]) -> Vec<&'a str> {
    let mut args = vec!["run", "--profile", "demo"];
    args.extend(leases.iter().flat_map(|lease| ["--lease", lease]));
    args.push("--");
    args.extend(command);
    args
}

/// Runs to the end. What it reads is small enough for a pipe to take at once.
pub fn finish(mut command: Command, input: Option<&[u8]>) -> Result<Ran, Failure> {
    let failed =
        |e| Failure::new("demo", "not_started", "cannot run a command of the demo").because(&e);
    if input.is_some() {
        command.stdin(Stdio::piped());
    }
    let mut child =
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().map_err(failed)?;
    if let (Some(input), Some(mut stdin)) = (input, child.stdin.take()) {
        stdin.write_all(input).map_err(failed)?;
    }
    let ended = child.wait_with_output().map_err(failed)?;
    Ok(Ran { status: ended.status, stdout: ended.stdout, stderr: ended.stderr })
}

/// The command as one would type it. The flags that all have in common were told once.
pub fn shown(args: &[&str]) -> String {
    let words = args.iter().map(|word| {
        let is_plain = !word.is_empty()
            && word.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_./=,@:+%".contains(&b));
        if is_plain { (*word).to_owned() } else { format!("'{}'", word.replace('\'', "'\\''")) }
    });
    format!("sublet {}", words.collect::<Vec<_>>().join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_shown_as_a_shell_would_take_it() {
        assert_eq!(shown(&["run", "--", "sh", "-c", "echo $A"]), "sublet run -- sh -c 'echo $A'");
        assert_eq!(shown(&["x", "it's", ""]), r"sublet x 'it'\''s' ''");
    }
}
