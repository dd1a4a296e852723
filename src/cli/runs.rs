//! `sublet runs`: the agent runs of a broker, through its control socket.
#![forbid(unsafe_code)]

use std::path::PathBuf;

use clap::Subcommand;

use super::fail::{Answer, Failure, YES};
use super::output::Output;
use super::run::workspace;
use super::{Globals, socket};
use crate::api::client::Client;
use crate::api::wire::{RunBody, RunObject};
use crate::host::ProfileRef;
use crate::model::id::RunId;
use crate::model::name::IdentityName;
use crate::model::run::RunState;

#[derive(Debug, clap::Args)]
#[command(after_long_help = HELP, arg_required_else_help = true)]
pub struct RunsArgs {
    #[command(subcommand)]
    pub action: Action,
}

pub const HELP: &str = "\
Examples:
  sublet runs start --agent agent-7 --principal alice --profile git-push --workspace /srv/agents/7
  sublet runs list
  sublet runs end run_0199…

Exit status:
  0    done
  2    sublet could not do it: no broker answers, no such run, a profile that is not valid";

const START_HELP: &str = "\
Examples:
  sublet runs start --agent agent-7 --principal alice --profile git-push --workspace /srv/agents/7
  read -r run socket < <(sublet runs start --agent ci --principal alice)

Exit status:
  0    started: the run's id and its socket's path are printed
  2    sublet could not do it: no broker answers, a workspace outside of the host's `workspaces`

Notes:
  Bind the socket into the agent's sandbox as /run/sublet/agent.sock, or where SUBLET_SOCKET says.
  What comes in on it belongs to the run.";

const LIST_HELP: &str = "\
Examples:
  sublet runs list
  sublet runs list --json | jq -r 'select(.state == \"active\").run_id'

Exit status:
  0    listed, be it nothing
  2    no broker answers";

const END_HELP: &str = "\
Examples:
  sublet runs end run_0199…

Exit status:
  0    ended: its leases are revoked, its execs killed, its socket is gone
  2    sublet could not do it: no broker answers, no such run";

#[derive(Debug, Subcommand)]
#[command(defer = true)]
pub enum Action {
    /// Start a run and print its id and its socket
    Start(StartArgs),
    /// List runs, those that ended too
    List(ListArgs),
    /// End a run: revoke its leases, kill its execs
    End(EndArgs),
}

#[derive(Debug, clap::Args)]
#[command(after_long_help = START_HELP)]
pub struct StartArgs {
    /// The non-human identity that acts
    #[arg(long, value_name = "NAME")]
    pub agent: IdentityName,
    /// The person or workflow that authorises it
    #[arg(long, value_name = "NAME")]
    pub principal: IdentityName,
    /// What its sandboxes may do: a profile's name. A file must be root's, and lie where the broker may
    /// read: in `profiles/` beside the configuration
    #[arg(long, value_name = "NAME|FILE", default_value = "default")]
    pub profile: String,
    /// The directory to work in, below one of the host's `workspaces` [default: the current directory]
    #[arg(long, value_name = "DIR")]
    pub workspace: Option<PathBuf>,
    /// Its id, of the host's own making [default: a new one]
    #[arg(long = "run", value_name = "ID")]
    pub run_id: Option<RunId>,
    /// The broker's control socket
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
#[command(after_long_help = LIST_HELP)]
pub struct ListArgs {
    /// The broker's control socket
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
#[command(after_long_help = END_HELP)]
pub struct EndArgs {
    /// The run
    #[arg(value_name = "ID")]
    pub run: RunId,
    /// The broker's control socket
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
}

pub fn execute(globals: &Globals, args: &RunsArgs) -> Answer {
    let named = match &args.action {
        Action::Start(args) => &args.socket,
        Action::List(args) => &args.socket,
        Action::End(args) => &args.socket,
    };
    let client = || socket::of_the_host(globals, named.as_deref());
    let mut output = Output::new(globals.json);
    match &args.action {
        Action::Start(args) => start(&mut output, args, client)?,
        Action::List(_) => list(&mut output, &client()?)?,
        Action::End(args) => {
            let run = client()?.end_run(&args.run).map_err(|e| Failure::from(&e))?;
            if output.json {
                output.object(&run)?;
            } else {
                output.line(format_args!("{} has ended", run.run_id))?;
            }
        }
    }
    output.finish()?;
    Ok(YES)
}

fn start(
    output: &mut Output,
    args: &StartArgs,
    client: impl Fn() -> Result<Client, Failure>,
) -> Result<(), Failure> {
    // The broker's own directory is another: what is named from here must be absolute.
    let profile = match ProfileRef::parse(&args.profile) {
        ProfileRef::Name(name) => name,
        ProfileRef::File(path) => absolute_text(path)?,
    };
    let body = RunBody {
        agent: args.agent.clone(),
        principal: args.principal.clone(),
        profile,
        workspace: workspace(args.workspace.as_deref())?,
        run_id: args.run_id.clone(),
    };
    let run = client()?.start_run(&body).map_err(|e| Failure::from(&e))?;
    if output.json {
        return output.object(&run);
    }
    output.line(format_args!("{}  {}", run.run_id, run.socket.display()))
}

fn absolute_text(path: PathBuf) -> Result<String, Failure> {
    let unusable = || {
        let message = format!("the profile {} cannot be named to the broker", path.display());
        Failure::new("profile", "profile_unreadable", message)
    };
    let whole = std::path::absolute(&path).map_err(|e| unusable().because(&e))?;
    whole.into_os_string().into_string().map_err(|_| unusable().why("its path is no UTF-8"))
}

fn list(output: &mut Output, client: &Client) -> Result<(), Failure> {
    let runs = client.runs().map_err(|e| Failure::from(&e))?;
    if output.json {
        return runs.iter().try_for_each(|run| output.object(run));
    }
    let rows: Vec<Vec<String>> = runs.iter().map(row).collect();
    output.table(&["RUN", "STATE", "AGENT", "PRINCIPAL", "PROFILE", "STARTED", "WORKSPACE"], &rows)
}

fn row(run: &RunObject) -> Vec<String> {
    let state = match run.state {
        RunState::Active => "active",
        RunState::Ended => "ended",
    };
    vec![
        run.run_id.to_string(),
        state.to_owned(),
        run.agent.to_string(),
        run.principal.to_string(),
        run.profile.clone(),
        run.started_at.clone(),
        run.workspace.display().to_string(),
    ]
}
