//! `sublet policy test`: the verdict on a lease, with nothing recorded, counted or run.
//!
//! Reads configuration, profile and the command's file; the decision itself is [`crate::policy`]'s.
#![forbid(unsafe_code)]

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use clap::Subcommand;
use clap::builder::{StringValueParser, TypedValueParser};
use serde_json::{Value, json};

use super::fail::{Answer, Failure, NO, YES};
use super::output::Output;
use super::{Globals, load, principal, run};
use crate::host::{Host, Program};
use crate::model::id::{RequestId, RunId};
use crate::model::name::IdentityName;
use crate::model::run::{Counters, Run, RunState};
use crate::model::verdict::Denial;
use crate::policy::{Grant, LeaseFlag, Policy, Reason, Request, Verdict, decide, decide_all};
use crate::profile::{Place, Profile};

#[derive(Debug, clap::Args)]
#[command(after_long_help = HELP, arg_required_else_help = true)]
pub struct PolicyArgs {
    #[command(subcommand)]
    pub action: Action,
}

pub const HELP: &str = "\
Examples:
  sublet policy test --profile git-push --lease repo.push@github.com -- git push

Exit status:
  0    every lease would be granted
  1    one would be denied
  2    sublet could not decide: an unknown profile, a configuration that is not valid";

const TEST_HELP: &str = "\
Examples:
  sublet policy test --profile git-push --lease repo.push@github.com -- git push
  sublet policy test --profile ./db.toml --lease db.read@db.internal:5432,ttl=2h --principal alice

Exit status:
  0    every lease would be granted
  1    one would be denied: the reason's name, why, and what would be allowed are shown
  2    sublet could not decide: an unknown profile, a configuration that is not valid

Notes:
  Ceilings are taken as not reached. Without a command its patterns are not judged.";

#[derive(Debug, Subcommand)]
#[command(defer = true)]
pub enum Action {
    /// Say whether leases would be granted, and run nothing
    Test(TestArgs),
}

#[derive(Debug, clap::Args)]
#[command(
    after_long_help = TEST_HELP,
    override_usage = "sublet policy test [OPTIONS] --lease LEASE [-- COMMAND [ARG]...]"
)]
pub struct TestArgs {
    /// The profile that declares the capability: a name, or a file
    #[arg(long, value_name = "NAME|FILE", default_value = "default")]
    pub profile: String,
    /// What to ask for: CAPABILITY@AUDIENCE[,channel=C][,ttl=D][,uses=N]; several are asked together
    #[arg(long, value_name = "LEASE", required = true,
        value_parser = StringValueParser::new().try_map(run::lease))]
    pub lease: Vec<LeaseFlag>,
    /// For whom [default: the invoking user]
    #[arg(long, value_name = "NAME")]
    pub principal: Option<IdentityName>,
    /// The workspace of the exec [default: the current directory]
    #[arg(long, value_name = "DIR")]
    pub workspace: Option<PathBuf>,
    /// The command that is to carry the value, after `--`
    #[arg(last = true, value_name = "COMMAND")]
    pub command: Vec<OsString>,
}

pub fn execute(globals: &Globals, args: &PolicyArgs) -> Answer {
    let Action::Test(args) = &args.action;
    let host = load::host(globals)?;
    let profile = load::profile(&host, &args.profile)?;
    let run = hypothetical_run(&host, &profile, args)?;
    let program = if args.command.is_empty() {
        None
    } else {
        Some(find(&args.command[0], &profile, &run.workspace)?)
    };
    let command = program.as_ref().map(|program| program.as_command(&args.command));

    let policy = Policy { profile: &profile, config: &host.config, has_issuer: host.has_issuer() };
    let request_id = RequestId::fresh();
    let requests: Vec<Request> = args
        .lease
        .iter()
        .map(|flag| {
            flag.clone().into_request(request_id.clone(), run.run_id.clone(), None::<Reason>)
        })
        .collect();

    let mut output = Output::new(globals.json);
    let mut status = YES;
    for request in &requests {
        match decide(policy, request, &run, Counters::default(), command.as_ref()) {
            Verdict::Granted(grant) => granted(&mut output, &grant, command.is_some())?,
            Verdict::Denied(denial) => {
                status = NO;
                denied(&mut output, denial)?;
            }
        }
    }
    // What each may have, all of them together may not: two deliveries to one variable.
    if status == YES
        && let Err(denial) =
            decide_all(policy, &requests, &run, Counters::default(), command.as_ref())
    {
        status = NO;
        denied(&mut output, denial)?;
    }
    output.finish()?;
    Ok(status)
}

/// The run that would ask.
fn hypothetical_run(host: &Host, profile: &Profile, args: &TestArgs) -> Result<Run, Failure> {
    let principal = args.principal.clone().unwrap_or_else(principal::invoking_user);
    let workspace = match &args.workspace {
        Some(named) => std::path::absolute(named),
        None => std::env::current_dir(),
    };
    Ok(Run {
        run_id: RunId::fresh(),
        agent: run::default_agent(),
        permissions: host.config.permissions_of(&principal).to_vec(),
        principal,
        profile: profile.name.clone(),
        workspace: workspace.map_err(|e| {
            Failure::new("usage", "no_workspace", "cannot tell the workspace").because(&e)
        })?,
        state: RunState::Active,
        started_at: load::now()?.wall,
    })
}

fn granted(output: &mut Output, grant: &Grant, has_command: bool) -> Result<(), Failure> {
    let asked = grant.request().asked();
    let (kind, name) = match grant.place() {
        Place::Env { variable } => ("env", variable.to_string()),
        Place::File { path, .. } => ("file", path.display().to_string()),
        Place::Memfd { variable } => ("memfd", variable.to_string()),
        Place::Git => ("git", String::new()),
        Place::Ssh { variable } => ("ssh", variable.to_string()),
        Place::Token { kind } => ("token", kind.token_path().display().to_string()),
    };
    let is_judged = has_command || !grant.is_pinned();
    if output.json {
        return output.object(&json!({
            "asked": asked,
            "verdict": "granted",
            "channel": grant.channel(),
            "delivery": { "kind": kind, "name": if name.is_empty() { Value::Null } else { name.into() } },
            "ttl_seconds": grant.ttl().0.as_secs(),
            "uses": grant.uses(),
            "secret": grant.secret(),
            "command_judged": is_judged,
        }));
    }
    let at = if name.is_empty() { String::new() } else { format!(" at {name}") };
    output.line(format_args!(
        "{asked}: granted, by {kind}{at}, for {}, uses: {}, secret {}",
        grant.ttl(),
        grant.uses(),
        grant.secret()
    ))?;
    if !is_judged {
        output.line("  its commands are limited: name yours after `--` to have it judged")?;
    }
    Ok(())
}

fn denied(output: &mut Output, denial: Denial) -> Result<(), Failure> {
    if output.json {
        let asked = denial.asked.clone();
        let error = Failure::from(denial).object();
        return output.object(&json!({ "asked": asked, "verdict": "denied", "error": error }));
    }
    let line = format!("{}: denied, {}", denial.asked, denial.reason);
    output.line(line)?;
    let details = Failure::from(denial).details(output.colour);
    output.bytes(details.as_bytes())
}

fn find(name: &OsStr, profile: &Profile, workspace: &Path) -> Result<Program, Failure> {
    let home = crate::host::home();
    Program::find(name, profile, workspace, &home).ok_or_else(|| {
        let directories = profile.environment.path.iter();
        let shown: Vec<String> =
            directories.map(|d| d.resolve(&home).display().to_string()).collect();
        let message = format!("there is no program `{}`", name.to_string_lossy());
        Failure::new("policy", "command_not_found", message)
            .why(format!("the profile's PATH is {}", shown.join(":")))
            .hint("name a program that is there, or leave the command out")
    })
}
