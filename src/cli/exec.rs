//! `sublet exec`: one command under leases of a run, on the broker.
//!
//! Receives flags; asks on the run's socket, and relays streams and signals as `sublet run` does until the
//! broker tells the exec's end. Keeps nothing, decides nothing, and holds no value: output is masked
//! where it is read.
#![forbid(unsafe_code)]

mod relay;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;

use clap::ValueEnum;

use super::ending::Ending;
use super::fail::{Answer, Failure};
use super::named::Report;
use super::run::{assignment, not_given};
use super::{Globals, socket};
use crate::api::client::ExecExit;
use crate::api::wire::{ErrorObject, ExecBody, NetworkBody, TerminalBody};
use crate::model::id::{LeaseId, RunId};
use crate::model::moment::Span;
use crate::model::user::ContainerUser;
use crate::policy::Reason;
use crate::policy::environment::{AssignmentPlace, EnvironmentError};
use crate::relay::terminal;
use relay::{Ended, RelayError, Signals};

#[derive(Debug, clap::Args)]
#[command(after_long_help = HELP, override_usage = "sublet exec [OPTIONS] -- COMMAND [ARG]...")]
pub struct ExecArgs {
    /// The run, on the host; in a sandbox its own
    #[arg(long = "run", value_name = "ID")]
    pub run_id: Option<RunId>,
    /// Under this lease; may be repeated
    #[arg(long, value_name = "ID")]
    pub lease: Vec<LeaseId>,
    /// Why, for the audit trail
    #[arg(long, value_name = "TEXT")]
    pub reason: Option<Reason>,
    /// Set a variable of the command's environment; may be repeated
    #[arg(long, value_name = "NAME=VALUE")]
    pub env: Vec<OsString>,
    /// Kill the command and all that it started after this long: 90s, 10m, 2h
    #[arg(long, value_name = "DURATION")]
    pub timeout: Option<Span>,
    /// Give the command a new terminal of its own, relayed with its size
    #[arg(short, long)]
    pub tty: bool,
    /// Write a JSON report: ids, exit status, what was enforced, what was scrubbed, timings
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
    /// In a container: who the command is there, by number [default: the workspace's owner]
    #[arg(short, long, value_name = "UID[:GID]")]
    pub user: Option<ContainerUser>,
    /// In a container: where the command starts [default: the run's workspace]
    #[arg(short, long, value_name = "DIR")]
    pub workdir: Option<PathBuf>,
    /// Narrow the profile's network
    #[arg(long, value_name = "MODE")]
    pub network: Option<ExecNetwork>,
    /// The run's socket [default: in a sandbox $SUBLET_SOCKET, else /run/sublet/agent.sock]
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// The command and its arguments, after `--`
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub command: Vec<OsString>,
}

pub const HELP: &str = "\
Examples:
  sublet exec --lease lse_0199… -- git push
  sublet exec --run ci-1234 --timeout 10m -- make test
  sublet exec -t -- sh

Exit status:
  0-255    the command's own, but for these
  124      --timeout, or the profile's, ran out
  125      sublet failed or denied, and the command did not run; or the broker died under it
  126      the command was found and could not be executed
  127      the command was not found
  128+N    signal N ended the command
  --report and --json tell a command's own 125 from sublet's.

Notes:
  The command ends with this process, however that ends: the broker kills it.";

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ExecNetwork {
    /// Only a loopback of its own
    None,
}

pub fn execute(globals: &Globals, args: ExecArgs) -> Answer {
    let body = body(&args)?;
    let report = args.report.as_deref().map(|path| Report::create(path, None)).transpose()?;
    match exec(globals, &args, &body) {
        Ok(exit) => {
            if let Some(report) = report {
                report.write(&exit.report);
            }
            Ending::of(None, exit.timed_out, exit.signal).tell(globals);
            if exit.unmasked_values > 0 {
                let message = format!(
                    "{} leased value(s) of less than 8 bytes were not masked in the output",
                    exit.unmasked_values
                );
                Failure::new("run", "short_values", message).note();
            }
            Ok(exit.exit_status)
        }
        Err(failure) => {
            if let Some(report) = report {
                report.write(&serde_json::json!({ "error": failure.object() }));
            }
            Err(failure)
        }
    }
}

fn exec(globals: &Globals, args: &ExecArgs, body: &ExecBody) -> Result<Box<ExecExit>, Failure> {
    let signals = Signals::take().map_err(|e| not_relayed(&e))?;
    let client = socket::of_a_run(globals, args.socket.as_deref(), args.run_id.as_ref())?;
    let asked = client.begin_exec(body).map_err(|e| Failure::from(&e))?;
    let ended = relay::accept(asked, &signals)
        .and_then(|stream| relay::relay(stream, &signals, args.tty))
        .map_err(|error| failure(&error))?;
    match ended {
        Ended::Exit(exit) => Ok(exit),
        Ended::Failed(error) => Err(not_run(&error)),
    }
}

fn body(args: &ExecArgs) -> Result<ExecBody, Failure> {
    let words = args.command.iter().map(|word| word.to_str().map(str::to_owned));
    let command = words.collect::<Option<Vec<String>>>().ok_or_else(|| {
        let message =
            "an argument of the command is no UTF-8, and the broker's JSON cannot carry it";
        Failure::new("request", "invalid_request", message)
    })?;
    let mut environment = BTreeMap::new();
    for (text, number) in args.env.iter().zip(1..) {
        let (name, value) = assignment(text)
            .and_then(|(name, value)| Some((name, value.into_string().ok()?)))
            .ok_or_else(|| {
                let place = AssignmentPlace::Flag(number);
                not_given(&EnvironmentError::Assignment { place })
            })?;
        environment.insert(name, value);
    }
    let terminal = args.tty.then(|| {
        use rustix::stdio::{stderr, stdin, stdout};
        let (rows, columns) = terminal::size(&[stdin(), stdout(), stderr()]);
        TerminalBody { rows, columns }
    });
    Ok(ExecBody {
        lease_ids: args.lease.clone(),
        command,
        environment,
        timeout: args.timeout,
        terminal,
        network: args.network.map(|ExecNetwork::None| NetworkBody::None),
        reason: args.reason.clone(),
        user: args.user,
        workdir: args.workdir.clone(),
    })
}

/// The broker's own words, with a shell's statuses for a command that cannot be executed.
fn not_run(error: &ErrorObject) -> Failure {
    let failure = socket::refused(error);
    match error.reason.as_str() {
        "command_not_executable" => failure.exit(126),
        "command_not_found" => failure.exit(127),
        _ => failure,
    }
}

fn failure(error: &RelayError) -> Failure {
    match error {
        RelayError::Client(client) => match client.refusal() {
            Some(refused) => not_run(refused),
            None => Failure::from(client),
        },
        RelayError::Streams(e) => not_relayed(e),
        RelayError::Interrupted(signal) => {
            let status = 128_u8.saturating_add(u8::try_from(*signal).unwrap_or(u8::MAX));
            Failure::new("request", "interrupted", error.to_string()).exit(status)
        }
        RelayError::ReaderGone => Failure::stdout(&std::io::ErrorKind::BrokenPipe.into()),
        RelayError::CallerGone => Failure::new("run", "caller_gone", error.to_string()),
    }
}

fn not_relayed(error: &std::io::Error) -> Failure {
    Failure::new("run", "relay_failed", "could not relay the command's streams").because(error)
}
