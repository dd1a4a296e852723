//! `sublet run`: one command in a sandbox, no daemon.
//!
//! Receives flags; returns them parsed, with the environment that the invoker gives. Reads env files.
//! What may be set and leased is the policy's to say, not this file's.
#![forbid(unsafe_code)]

use std::error::Error;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use clap::builder::{StringValueParser, TypedValueParser};

use super::ending::Ending;
use super::fail::{Answer, Failure, NOT_RUN};
use super::named::{self, Report};
use super::principal::invoking_user;
use super::{Globals, explained, load};
use crate::host::ProfileRef;
use crate::launcher::into::InContainer;
use crate::model::id::RunId;
use crate::model::moment::Span;
use crate::model::name::{IdentityName, VariableName};
use crate::model::user::ContainerUser;
use crate::policy::environment::{
    AssignmentPlace, EnvironmentError, Given, Origin, check_class, parse_file,
};
use crate::policy::request::InvalidLeaseFlag;
use crate::policy::{LeaseFlag, Reason};
use crate::profile;
use crate::relay::terminal;
use crate::run::{self as story, Asked, Begun, RunError};

/// The largest `--env-file`: what execve(2) takes in all, and more would be a mistake.
const ENV_FILE_MAX: u64 = 2 << 20;

#[derive(Debug, clap::Args)]
#[command(after_long_help = HELP, override_usage = "sublet run [OPTIONS] -- COMMAND [ARG]...")]
pub struct RunArgs {
    /// What the sandbox may do: a profile's name, or a file (holds a `/` or ends in `.toml`)
    #[arg(long, value_name = "NAME|FILE", default_value = "default")]
    pub profile: String,
    /// The directory to work in, seen at its own path [default: the current directory]
    #[arg(long, value_name = "DIR")]
    pub workspace: Option<PathBuf>,
    /// Lease a credential:
    /// CAPABILITY@AUDIENCE[,channel=memfd|file|env|git][,ttl=D][,uses=N]; may be repeated
    #[arg(long, value_name = "LEASE", value_parser = StringValueParser::new().try_map(lease))]
    pub lease: Vec<LeaseFlag>,
    /// Why, for the audit trail
    #[arg(long, value_name = "TEXT")]
    pub reason: Option<Reason>,
    /// The agent run to attribute this to [default: a new one]
    #[arg(long = "run", value_name = "ID")]
    pub run_id: Option<RunId>,
    /// The non-human identity that acts [default: sublet-run]
    #[arg(long, value_name = "NAME")]
    pub agent: Option<IdentityName>,
    /// Set a variable of the command's environment; may be repeated, and goes before the other two
    #[arg(long, value_name = "NAME=VALUE")]
    pub env: Vec<OsString>,
    /// Read NAME=VALUE lines; `#` begins a comment line; may be repeated, and the last one wins
    #[arg(long, value_name = "FILE")]
    pub env_file: Vec<PathBuf>,
    /// Pass on a variable of the caller's environment, if it is set; may be repeated
    #[arg(long, value_name = "NAME")]
    pub pass_env: Vec<VariableName>,
    /// Kill the command and all that it started after this long: 90s, 10m, 2h
    #[arg(long, value_name = "DURATION")]
    pub timeout: Option<Span>,
    /// Give the command a new terminal of its own, relayed with its size
    #[arg(short, long)]
    pub tty: bool,
    /// Write a JSON report: ids, exit status, what was enforced, what was scrubbed, timings
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
    /// Run nothing: print the verdicts, mounts, rules, filter, and what this kernel can enforce
    #[arg(long)]
    pub explain: bool,
    /// Narrow the profile's network; widening it is an error
    #[arg(long, value_name = "MODE")]
    pub network: Option<NetworkMode>,
    /// Run in the container of this process: its file system and network, under mount, pid and ipc
    /// namespaces of the command's own; --workspace is then a directory in there [default: where PID is]
    #[arg(long, value_name = "PID")]
    pub into: Option<i32>,
    /// In a container: who the command is there, by number [default: the workspace's owner]
    #[arg(short, long, value_name = "UID[:GID]", requires = "into")]
    pub user: Option<ContainerUser>,
    /// In a container: where the command starts [default: the workspace]
    #[arg(short, long, value_name = "DIR", requires = "into")]
    pub workdir: Option<PathBuf>,
    /// The command and its arguments, after `--`
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub command: Vec<OsString>,
}

pub const HELP: &str = "\
Examples:
  sublet run -- make test
  sublet run --profile build --timeout 10m -- cargo build
  sublet run --profile git-push --lease repo.push@github.com -- git push
  sublet run --profile ./db.toml --lease db.read@db.internal:5432,channel=file,ttl=2m -- psql -f q.sql
  sublet run --explain --profile strict -- true

Exit status:
  0-255    the command's own, but for these
  124      --timeout, or the profile's, ran out
  125      sublet failed, or a lease was denied: the command did not run
  126      the command was found and could not be executed
  127      the command was not found
  128+N    signal N ended the command
  --report and --json tell a command's own 125 from sublet's.";

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum NetworkMode {
    /// Only a loopback of its own
    None,
    /// Only the audiences of the leases
    Audience,
    /// The host's
    Host,
}

impl From<NetworkMode> for profile::NetworkMode {
    fn from(mode: NetworkMode) -> Self {
        match mode {
            NetworkMode::None => profile::NetworkMode::None,
            NetworkMode::Audience => profile::NetworkMode::Audience,
            NetworkMode::Host => profile::NetworkMode::Host,
        }
    }
}

/// Who acts when `--agent` does not say.
pub fn default_agent() -> IdentityName {
    "sublet-run".parse().expect("letters and a dash are an identity")
}

/// A flag that is no lease, with the part that is wrong: clap shows an error without its source.
#[derive(Debug, thiserror::Error)]
#[error("{}", chain(.0))]
pub struct WrongLease(InvalidLeaseFlag);

fn chain(error: &InvalidLeaseFlag) -> String {
    let source = error.source().map(|source| format!(": {source}"));
    format!("{error}{}", source.unwrap_or_default())
}

/// Parses `--lease`.
///
/// # Errors
/// [`WrongLease`].
pub fn lease(text: String) -> Result<LeaseFlag, WrongLease> {
    text.parse().map_err(WrongLease)
}

impl RunArgs {
    /// What the invoker gives: env files in their order, then `--pass-env`, then `--env`; the later wins,
    /// as in docker-run(1). `invoker` looks up the invoker's own variables.
    ///
    /// # Errors
    /// An env file that cannot be read or is too large; what is no assignment, named by its place and
    /// never by its text, which may be a value.
    pub fn given(
        &self,
        invoker: impl Fn(&VariableName) -> Option<OsString>,
    ) -> Result<Vec<Given>, Failure> {
        let mut given = Vec::new();
        // That of a container is not this host's.
        let workspace = match self.into {
            None if !self.env_file.is_empty() => Some(workspace(self.workspace.as_deref())?),
            _ => None,
        };
        for file in &self.env_file {
            let text = env_file(file, workspace.as_deref())?;
            for (name, value) in
                parse_file(&file.display().to_string(), &text).map_err(|e| not_given(&e))?
            {
                given.push(Given { name, value: value.into(), origin: Origin::File });
            }
        }
        for name in &self.pass_env {
            match invoker(name) {
                Some(value) => {
                    given.push(Given { name: name.clone(), value, origin: Origin::Passed });
                }
                // The same error on every host, whether it has the variable or not.
                None => {
                    check_class(name, Origin::Passed, false)
                        .map_err(|e| Failure::from(&RunError::Environment(e)))?;
                }
            }
        }
        for (text, number) in self.env.iter().zip(1..) {
            let (name, value) = assignment(text).ok_or_else(|| {
                not_given(&EnvironmentError::Assignment { place: AssignmentPlace::Flag(number) })
            })?;
            given.push(Given { name, value, origin: Origin::Flag });
        }
        Ok(given)
    }
}

pub(super) fn not_given(error: &EnvironmentError) -> Failure {
    Failure::new("environment", "environment_invalid", "cannot make the command's environment")
        .because(error)
        .hint("a variable of the invoker's own is passed with --pass-env NAME")
}

/// A value may be any bytes: it comes from an argument, which cannot hold a NUL.
pub(super) fn assignment(text: &OsStr) -> Option<(VariableName, OsString)> {
    let bytes = text.as_bytes();
    let at = bytes.iter().position(|&b| b == b'=')?;
    let name = std::str::from_utf8(&bytes[..at]).ok()?.parse().ok()?;
    Some((name, OsString::from_vec(bytes[at + 1..].to_vec())))
}

fn env_file(path: &Path, workspace: Option<&Path>) -> Result<String, Failure> {
    let failed = || {
        let message = format!("cannot use --env-file {}", path.display());
        Failure::new("environment", "env_file_unusable", message)
            .hint("name a file of NAME=VALUE lines that you may read")
    };
    let bytes = named::read(path, workspace, ENV_FILE_MAX).map_err(|e| failed().because(&e))?;
    if bytes.len() as u64 > ENV_FILE_MAX {
        return Err(failed().why("it is larger than 2 MiB"));
    }
    String::from_utf8(bytes).map_err(|_| failed().why("it is not UTF-8"))
}

/// `begun`: what was begun already, when the command line had only been looked at.
pub fn execute(globals: &Globals, args: RunArgs, begun: Option<Result<Begun, RunError>>) -> Answer {
    let report = args.report.clone();
    let explain = args.explain;
    let asked = asked(globals, args)?;
    if explain {
        let explained = story::explain(asked).map_err(|e| Failure::from(&e))?;
        return explained::print(globals, &explained);
    }
    let report = report.map(|path| Report::create(&path, Some(&asked.workspace))).transpose()?;
    let begun = begun.unwrap_or_else(story::begin);
    let outcome = match begun.and_then(|begun| story::run(begun, asked)) {
        Ok(outcome) => outcome,
        Err(error) => {
            let failure = Failure::from(&error);
            if let Some(report) = report {
                report.write(&serde_json::json!({ "error": failure.object() }));
            }
            return Err(failure);
        }
    };
    if let Some(report) = report {
        report.write(&outcome.report);
    }
    let told = &outcome.report;
    Ending::of(Some(outcome.word), told.timed_out, told.signal).tell(globals);
    if let Some(error) = &outcome.unrecorded {
        let message = "the command ran, and its end could not be recorded";
        let failure = Failure::new("record", error.reason(), message).because_of_source(error);
        failure.hint("its leases are over; the next run records it as interrupted").note();
    }
    if outcome.report.unmasked_values > 0 {
        let message = format!(
            "{} leased value(s) of less than 8 bytes were not masked in the output",
            outcome.report.unmasked_values
        );
        Failure::new("run", "short_values", message).note();
    }
    Ok(outcome.exit_status)
}

/// Flags as the story takes them.
fn asked(globals: &Globals, args: RunArgs) -> Result<Asked, Failure> {
    let environment = args.given(|name| std::env::var_os(name.as_str()))?;
    let terminal = args.tty.then(|| {
        use rustix::stdio::{stderr, stdin, stdout};
        terminal::size(&[stdin(), stdout(), stderr()])
    });
    Ok(Asked {
        places: load::places(globals),
        profile: ProfileRef::parse(&args.profile),
        workspace: match args.into {
            None => workspace(args.workspace.as_deref())?,
            Some(pid) => workspace_of(pid, args.workspace)?,
        },
        into: InContainer {
            pid: args.into,
            user: args.user.map(|user| (user.uid, user.gid)),
            directory: args.workdir,
        },
        leases: args.lease,
        reason: args.reason,
        run_id: args.run_id,
        agent: args.agent.unwrap_or_else(default_agent),
        principal: invoking_user(),
        environment,
        timeout: args.timeout,
        terminal,
        network: args.network.map(Into::into),
        command: args.command,
    })
}

/// A directory of a container: as it is named, or where the process itself is. The launcher opens it.
fn workspace_of(pid: i32, named: Option<PathBuf>) -> Result<PathBuf, Failure> {
    if let Some(named) = named {
        return Ok(named);
    }
    std::fs::read_link(format!("/proc/{pid}/cwd")).map_err(|e| {
        let message = format!("process {pid}, of the container, cannot be looked at");
        Failure::new("request", "container_unusable", message)
            .because(&e)
            .hint("name a running process of a container with --into, as root")
    })
}

/// Absolute, with every link resolved: where the command will start.
pub(super) fn workspace(named: Option<&Path>) -> Result<PathBuf, Failure> {
    let path = named.unwrap_or(Path::new("."));
    let failed = |e: std::io::Error| {
        let message = format!("{} cannot be the workspace", path.display());
        Failure::new("request", "workspace_unusable", message)
            .because(&e)
            .hint("name a directory that exists with --workspace")
    };
    let real = path.canonicalize().map_err(failed)?;
    if real.is_dir() { Ok(real) } else { Err(failed(std::io::ErrorKind::NotADirectory.into())) }
}

impl From<&RunError> for Failure {
    fn from(error: &RunError) -> Self {
        let failure = match error {
            RunError::Host(host) => Failure::from(host),
            RunError::Denied(denial) => Failure::from(denial.clone()),
            other => {
                let message = match other {
                    // A name that people look up, even where no lease was asked for.
                    RunError::Refused(_) if other.exit_status() == NOT_RUN => {
                        format!("{}: {other}", other.reason())
                    }
                    RunError::Trail(_)
                    | RunError::TrailCut { .. }
                    | RunError::TrailRewritten { .. }
                    | RunError::Head { .. } => format!("{}: {other}", other.reason()),
                    _ => other.to_string(),
                };
                let mut failure = Failure::new(other.stage(), other.reason(), message);
                if let Some(source) = other.source()
                    && !failure.message.ends_with(&source.to_string())
                {
                    failure = failure.because(source);
                }
                failure.hint(other.hint())
            }
        };
        failure.exit(error.exit_status())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Command, parse};

    fn run_args(flags: &[&str]) -> Result<RunArgs, clap::Error> {
        let words = ["sublet", "run"].iter().chain(flags).chain(&["--", "true"]);
        match parse(&words.map(OsString::from).collect::<Vec<_>>())?.command {
            Command::Run(args) => Ok(args),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn flags_are_parsed_into_what_cannot_be_wrong() {
        #[track_caller]
        fn check(flags: &[&str], valid: bool) {
            assert_eq!(run_args(flags).is_ok(), valid, "{flags:?}");
        }
        check(&["--timeout", "90s"], true);
        check(&["--timeout", "0"], false);
        check(&["--timeout", "soon"], false);
        check(&["--run", "ci-1234"], true);
        check(&["--run", "../x"], false);
        check(&["--agent", "bot@example"], true);
        check(&["--agent", "a b"], false);
        check(&["--network", "none"], true);
        check(&["--network", "bridge"], false);
        check(&["--env", "A=b=c"], true);
        check(&["--pass-env", "TERM"], true);
        check(&["--pass-env", "TERM=x"], false);
        check(&["--reason", "nightly push"], true);
        check(&["--reason", "two\nlines"], false);
        check(&["--reason", "\x1b[2J"], false);
        check(&["--lease", "a@b", "--lease", "c@d,ttl=5m"], true);
        check(&["--lease", "a"], false);
        check(&["--lease", "a@b,ttl=soon"], false);
        check(&["--into", "7", "-u", "1000:100", "--workdir", "/w"], true);
        check(&["--into", "x"], false);
        check(&["--user", "1000"], false);
        check(&["--timeout", "1s", "--timeout", "2s"], false);
    }

    #[test]
    fn the_command_is_what_follows_the_dashes_and_is_mandatory() {
        let parse = |words: &[&str]| {
            parse(&words.iter().map(OsString::from).collect::<Vec<_>>()).map(|c| c.command)
        };
        let Ok(Command::Run(args)) = parse(&["sublet", "run", "--", "ls", "--json", "--", "-x"])
        else {
            panic!("not run")
        };
        assert_eq!(args.command, ["ls", "--json", "--", "-x"]);
        assert!(parse(&["sublet", "run"]).is_err());
        assert!(parse(&["sublet", "run", "--"]).is_err());
        assert!(parse(&["sublet", "run", "ls"]).is_err());
    }

    #[test]
    fn the_later_of_file_passed_and_set_wins() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("env");
        std::fs::write(&file, "# comment\nA=file\r\nB=file\n\nC=\"quoted\"\nD=\n").unwrap();
        let args = run_args(&[
            "--env-file",
            file.to_str().unwrap(),
            "--pass-env=B",
            "--pass-env=UNSET",
            "--env=A=flag",
        ])
        .unwrap();
        let invoker =
            |name: &VariableName| (name.as_str() != "UNSET").then(|| OsString::from("invoker"));
        let given = args.given(invoker).unwrap();
        let shown: Vec<String> =
            given.iter().map(|g| format!("{}={}", g.name, g.value.to_string_lossy())).collect();
        assert_eq!(shown, ["A=file", "B=file", "C=\"quoted\"", "D=", "B=invoker", "A=flag"]);
    }

    #[test]
    fn what_is_no_assignment_is_named_by_place_not_by_content() {
        #[track_caller]
        fn check(content: &[u8], place: &str) {
            let dir = tempfile::tempdir().unwrap();
            let file = dir.path().join("env");
            std::fs::write(&file, content).unwrap();
            let args = run_args(&["--env-file", file.to_str().unwrap()]).unwrap();
            let text = args.given(|_| None).err().unwrap().text(false);
            assert!(text.contains(place), "{text}");
            assert!(!text.contains("hunter2"), "{text}");
        }
        check(b"A=1\nhunter2\n", "env:2");
        check(b"A B=hunter2", "env:1");
        check(b"A=hunter2\0", "env:1");
        check(b"A=hunter2\xff", "not UTF-8");
        for flag in ["hunter2", "A-B=hunter2", "=hunter2"] {
            let args = run_args(&["--env", "A=1", "--env", flag]).unwrap();
            let text = args.given(|_| None).err().unwrap().text(false);
            assert!(text.contains("--env number 2") && !text.contains("hunter2"), "{text}");
        }
        let missing = run_args(&["--env-file", "/nonexistent"]).unwrap();
        assert!(missing.given(|_| None).is_err());
    }
}
