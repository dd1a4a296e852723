//! `sublet run`: one command in a sandbox, no daemon.
//!
//! Receives flags; returns them parsed, with the command's own environment gathered. Reads env files.
//! What may be set and leased is the policy's to say, not this file's.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use clap::builder::{OsStringValueParser, StringValueParser, TypedValueParser};

use super::Globals;
use super::fail::{Answer, Failure};
use crate::model::id::RunId;
use crate::model::moment::Span;
use crate::model::name::{IdentityName, VariableName};

/// The longest `--reason`, in bytes: it is repeated in every event of the lease.
const REASON_MAX: usize = 1024;
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
    #[arg(long, value_name = "LEASE")]
    pub lease: Vec<String>,
    /// Why, for the audit trail
    #[arg(long, value_name = "TEXT", value_parser = StringValueParser::new().try_map(reason))]
    pub reason: Option<String>,
    /// The agent run to attribute this to [default: a new one]
    #[arg(long = "run", value_name = "ID")]
    pub run_id: Option<RunId>,
    /// The non-human identity that acts [default: sublet-run]
    #[arg(long, value_name = "NAME")]
    pub agent: Option<IdentityName>,
    /// Set a variable of the command's environment; may be repeated, and goes before the other two
    #[arg(long, value_name = "NAME=VALUE",
        value_parser = OsStringValueParser::new().try_map(|text| assignment(&text)))]
    pub env: Vec<Assignment>,
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

/// `NAME=VALUE`. The value may be any bytes but NUL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Assignment {
    pub name: VariableName,
    pub value: OsString,
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidArgument {
    #[error("`{0}` has no `=`: write NAME=VALUE, or use --pass-env NAME")]
    NoEquals(String),
    #[error(transparent)]
    Name(#[from] crate::model::name::InvalidName),
    #[error("a reason is at most {REASON_MAX} bytes")]
    LongReason,
    #[error("a reason is one line without control characters")]
    UnprintableReason,
}

fn assignment(text: &OsStr) -> Result<Assignment, InvalidArgument> {
    let bytes = text.as_bytes();
    let at = bytes
        .iter()
        .position(|&b| b == b'=')
        .ok_or_else(|| InvalidArgument::NoEquals(text.to_string_lossy().into_owned()))?;
    let name = String::from_utf8_lossy(&bytes[..at]).parse()?;
    Ok(Assignment { name, value: OsString::from_vec(bytes[at + 1..].to_vec()) })
}

fn reason(text: String) -> Result<String, InvalidArgument> {
    if text.len() > REASON_MAX {
        Err(InvalidArgument::LongReason)
    } else if text.chars().any(char::is_control) {
        Err(InvalidArgument::UnprintableReason)
    } else {
        Ok(text)
    }
}

impl RunArgs {
    /// The environment asked for: env files in their order, then `--pass-env`, then `--env`; the later
    /// wins, as in docker-run(1). `caller` looks up the caller's own variables.
    ///
    /// # Errors
    /// An env file that cannot be read, is too large, or has a line that is no assignment; it is named by
    /// its number, never by its content, which may be a value.
    pub fn environment(
        &self,
        caller: impl Fn(&str) -> Option<OsString>,
    ) -> Result<BTreeMap<VariableName, OsString>, Failure> {
        let mut environment = BTreeMap::new();
        for file in &self.env_file {
            environment.extend(env_file(file)?);
        }
        for name in &self.pass_env {
            if let Some(value) = caller(name.as_str()) {
                environment.insert(name.clone(), value);
            }
        }
        environment.extend(self.env.iter().map(|a| (a.name.clone(), a.value.clone())));
        Ok(environment)
    }
}

fn env_file(path: &Path) -> Result<Vec<(VariableName, OsString)>, Failure> {
    use std::io::Read as _;
    let failed = |reason: &str| {
        Failure::new("environment", reason, format!("cannot use --env-file {}", path.display()))
    };
    let mut text = Vec::new();
    std::fs::File::open(path)
        .and_then(|file| file.take(ENV_FILE_MAX + 1).read_to_end(&mut text))
        .map_err(|e| failed("env_file_unreadable").because(&e))?;
    if text.len() as u64 > ENV_FILE_MAX {
        return Err(failed("env_file_invalid").why("it is larger than 2 MiB"));
    }
    let mut assignments = Vec::new();
    for (index, line) in text.split(|&b| b == b'\n').enumerate() {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        if line.is_empty() || line.starts_with(b"#") {
            continue;
        }
        let parsed =
            if line.contains(&0) { None } else { assignment(OsStr::from_bytes(line)).ok() };
        let Assignment { name, value } = parsed.ok_or_else(|| {
            failed("env_file_invalid")
                .why(format!("line {} is not NAME=VALUE", index + 1))
                .hint("a name is a letter or `_`, then letters, digits or `_`; quotes are part of the value")
        })?;
        assignments.push((name, value));
    }
    Ok(assignments)
}

pub fn execute(_globals: &Globals, args: RunArgs) -> Answer {
    let _environment = args.environment(|name| std::env::var_os(name))?;
    Err(Failure::new("launch", "unavailable", "this build has no launcher"))
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
        check(&["--env", "A"], false);
        check(&["--env", "A-B=c"], false);
        check(&["--pass-env", "TERM"], true);
        check(&["--pass-env", "TERM=x"], false);
        check(&["--reason", "nightly push"], true);
        check(&["--reason", "two\nlines"], false);
        check(&["--reason", "\x1b[2J"], false);
        check(&["--lease", "a@b", "--lease", "c@d,ttl=5m"], true);
        check(&["--into", "1"], false);
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
        let caller = |name: &str| (name != "UNSET").then(|| OsString::from("caller"));
        let environment = args.environment(caller).unwrap();
        let shown: Vec<String> =
            environment.iter().map(|(k, v)| format!("{k}={}", v.to_string_lossy())).collect();
        assert_eq!(shown, ["A=flag", "B=caller", "C=\"quoted\"", "D="]);
    }

    #[test]
    fn a_bad_line_of_an_env_file_is_named_by_number_not_by_content() {
        #[track_caller]
        fn check(content: &[u8], line: &str) {
            let dir = tempfile::tempdir().unwrap();
            let file = dir.path().join("env");
            std::fs::write(&file, content).unwrap();
            let text = env_file(&file).unwrap_err().text(false);
            assert!(text.contains(line), "{text}");
            assert!(!text.contains("hunter2"), "{text}");
        }
        check(b"A=1\nhunter2\n", "line 2");
        check(b"A B=hunter2", "line 1");
        check(b"A=hunter2\0", "line 1");
        assert!(env_file(Path::new("/nonexistent")).is_err());
    }
}
