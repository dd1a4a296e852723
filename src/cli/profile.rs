//! `sublet profile`: which profiles there are, what one says with `extends` resolved, whether it is valid.
#![forbid(unsafe_code)]

use clap::Subcommand;
use serde_json::json;

use super::fail::{Answer, Failure, NO, YES};
use super::output::Output;
use super::{Globals, load};
use crate::host::{Host, HostError, ProfileRef};

#[derive(Debug, clap::Args)]
#[command(after_long_help = HELP, arg_required_else_help = true)]
pub struct ProfileArgs {
    #[command(subcommand)]
    pub action: Action,
}

pub const HELP: &str = "\
Examples:
  sublet profile list
  sublet profile show git-push
  sublet profile check ./agent.toml

Exit status:
  0    shown; every profile is valid
  1    a profile is not valid
  2    sublet could not read it

Files:
  PROFILES/NAME.toml beside the configuration goes before a built-in profile of the same name.";

const LIST_HELP: &str = "\
Examples:
  sublet profile list
  sublet profile list --json

Exit status:
  0    listed, valid or not
  2    the configuration could not be read";

const SHOW_HELP: &str = "\
Examples:
  sublet profile show default
  sublet profile show git-push > agent.toml

Exit status:
  0    shown
  2    there is no such profile, or it is not valid";

const CHECK_HELP: &str = "\
Examples:
  sublet profile check ./agent.toml
  sublet profile check *.toml

Exit status:
  0    all are valid
  1    one is not; the line and column are shown
  2    the configuration could not be read";

#[derive(Debug, Subcommand)]
#[command(defer = true)]
pub enum Action {
    /// List the profiles that have a name
    List(ListArgs),
    /// Print a profile whole, with what it extends merged in
    Show(ShowArgs),
    /// Check profiles, and show what is wrong with line and column
    Check(CheckArgs),
}

#[derive(Debug, clap::Args)]
#[command(after_long_help = LIST_HELP)]
pub struct ListArgs {}

#[derive(Debug, clap::Args)]
#[command(after_long_help = SHOW_HELP)]
pub struct ShowArgs {
    /// A profile's name, or a file (holds a `/` or ends in `.toml`)
    #[arg(value_name = "NAME|FILE")]
    pub profile: String,
}

#[derive(Debug, clap::Args)]
#[command(after_long_help = CHECK_HELP)]
pub struct CheckArgs {
    /// Profiles' names, or files (hold a `/` or end in `.toml`)
    #[arg(value_name = "NAME|FILE", required = true)]
    pub profiles: Vec<String>,
}

pub fn execute(globals: &Globals, args: &ProfileArgs) -> Answer {
    let host = load::host(globals)?;
    let mut output = Output::new(globals.json);
    let status = match &args.action {
        Action::List(ListArgs {}) => list(&host, &mut output)?,
        Action::Show(ShowArgs { profile }) => show(&host, profile, &mut output)?,
        Action::Check(CheckArgs { profiles }) => check(&host, profiles, &mut output)?,
    };
    output.finish()?;
    Ok(status)
}

fn list(host: &Host, output: &mut Output) -> Answer {
    let mut rows = Vec::new();
    for (name, path) in host.profile_names() {
        let profile = host.profile(&ProfileRef::Name(name.clone()));
        let description = match &profile {
            Ok(profile) => profile.description.clone().unwrap_or_default(),
            Err(_) => format!("not valid: sublet profile check {name}"),
        };
        if output.json {
            output.object(&json!({
                "name": name, "path": path, "description": description, "valid": profile.is_ok(),
            }))?;
        }
        let from = path.map_or("built in".to_owned(), |path| path.display().to_string());
        rows.push(vec![name, from, description]);
    }
    if !output.json {
        output.table(&["NAME", "FROM", "DESCRIPTION"], &rows)?;
    }
    Ok(YES)
}

fn show(host: &Host, named: &str, output: &mut Output) -> Answer {
    let profile = load::profile(host, named)?;
    if output.json {
        output.object(&profile)?;
        return Ok(YES);
    }
    let text = toml::to_string(&profile).map_err(|e| {
        Failure::new("profile", "profile_not_shown", "the profile cannot be written as TOML")
            .because(&e)
            .hint("try --json")
    })?;
    output.line(format_args!("# {}, with what it extends merged in", profile.name))?;
    output.bytes(text.as_bytes())?;
    Ok(YES)
}

/// All of them: one that is not valid hides no other.
fn check(host: &Host, profiles: &[String], output: &mut Output) -> Answer {
    let mut status = YES;
    for named in profiles {
        let found = match host.profile(&ProfileRef::parse(named)) {
            Ok(_) => None,
            Err(e @ (HostError::Profile(_) | HostError::Load(_))) => Some(Failure::from(&e)),
            Err(e) => return Err(Failure::from(&e)),
        };
        status = status.max(if found.is_some() { NO } else { YES });
        if output.json {
            let error = found.as_ref().map(Failure::object);
            output
                .object(&json!({ "profile": named, "valid": found.is_none(), "error": error }))?;
            continue;
        }
        match found {
            None => output.line(format_args!("{named}: valid"))?,
            Some(failure) => {
                output.line(format_args!("{named}: {}", failure.message))?;
                output.bytes(failure.details(output.colour).as_bytes())?;
            }
        }
    }
    Ok(status)
}
