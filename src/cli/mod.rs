//! The command line: one file per command, each with its flags and one `execute`.
//!
//! - [`fail`]: a failure as people and programs see it; exit statuses
//! - [`output`], [`prompt`]: standard output; a value typed at a terminal
//! - [`load`], [`principal`]: the configuration and what it leads to; who asks
//! - [`run`], [`demo`]: one command in a sandbox
//! - [`runs`], [`lease`], [`exec`]: clients of the broker; [`socket`]: which one
//! - [`secret`], [`profile`], [`policy`], [`audit`]: what the host holds, permits and has recorded
//! - [`doctor`], [`init`]: what this machine can enforce; a first configuration
//! - [`verify_envelope`]: `lease verify`
//! - [`issuer`]: the workload identity of this host
//! - [`git_credential`]: what git calls inside an exec; [`hook`]: what a container runtime calls
//! - [`mint`]: what the launcher calls for sources that mint
//! - [`completions`], [`man`]: made from the definitions here
#![forbid(unsafe_code)]

pub mod audit;
pub mod completions;
pub mod demo;
pub mod doctor;
mod ending;
pub mod exec;
pub mod explained;
pub mod fail;
pub mod git_credential;
pub mod hook;
pub mod init;
pub mod issuer;
pub mod lease;
pub mod load;
pub mod man;
pub mod mint;
mod named;
pub mod output;
pub mod policy;
pub mod principal;
pub mod profile;
pub mod prompt;
pub mod run;
pub mod runs;
pub mod secret;
pub mod serve;
pub mod socket;
pub mod verify_envelope;

use std::ffi::OsString;
use std::io::Write as _;
use std::path::PathBuf;

use clap::{Args as _, CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::run::{Begun, RunError};
use fail::{Answer, Failure, NOT_RUN, TROUBLE, YES};

/// Runs one command in a sandbox and lets it use a credential for exactly that long.
///
/// An agent never holds a key: it asks for the use of one. sublet decides, records, takes the value from
/// its source, hands it to one command in fresh namespaces, and wipes it when the last process of that
/// command is gone.
#[derive(Debug, Parser)]
#[command(name = "sublet", version, after_long_help = TOP, arg_required_else_help = true)]
pub struct Cli {
    #[command(flatten)]
    pub globals: Globals,
    #[command(subcommand)]
    pub command: Command,
}

/// Flags of every command.
#[derive(Debug, Clone, Default, PartialEq, Eq, clap::Args)]
#[command(next_help_heading = "Global options")]
pub struct Globals {
    /// The host's configuration [default: /etc/sublet/sublet.toml, for a user
    /// $XDG_CONFIG_HOME/sublet/sublet.toml]
    #[arg(long, global = true, value_name = "FILE", env = "SUBLET_CONFIG", hide_env_values = true)]
    pub config: Option<PathBuf>,
    /// Where leases, secrets and the trail are kept [default: [state] dir of the configuration, else
    /// /var/lib/sublet, for a user $XDG_STATE_HOME/sublet]
    #[arg(long, global = true, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// Print JSON: one object, or for listings one object a line; errors are one object on standard error
    #[arg(long, global = true)]
    pub json: bool,
    /// Say more; repeat for still more
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
}

// `defer`: the flags and the help of a command are built only when it is the one that was named. What the
// list of commands needs stands here.
#[derive(Debug, Subcommand)]
#[command(defer = true)]
#[allow(clippy::large_enum_variant, reason = "there is one in the life of a process")]
pub enum Command {
    /// Run one command in a sandbox, with the leases that it asks for
    Run(run::RunArgs),
    /// Run one command under leases of a run of the broker
    Exec(exec::ExecArgs),
    /// Start, list and end the runs of the broker
    Runs(runs::RunsArgs),
    /// Serve many runs: the broker, its launcher, and their sockets
    Serve(serve::ServeArgs),
    /// Ask the broker for leases; list, show, renew and revoke them
    Lease(lease::LeaseArgs),
    /// Show a leased exec end to end, with a demonstration secret in a temporary state directory
    Demo(demo::DemoArgs),
    /// Write a commented starter configuration
    Init(init::InitArgs),
    /// Keep, rotate, list and remove the values of the vault; none is ever printed
    Secret(secret::SecretArgs),
    /// List, show and check profiles
    Profile(profile::ProfileArgs),
    /// Say whether leases would be granted, and run nothing
    Policy(policy::PolicyArgs),
    /// List the audit trail, tell the life of a lease, verify that nothing was changed
    Audit(audit::AuditArgs),
    /// Make, rotate and publish the workload identity of this host
    Issuer(issuer::IssuerArgs),
    /// Show what this machine can enforce, what each lack means, and how to mend it
    Doctor(doctor::DoctorArgs),
    /// Be called by a container runtime: guard a container, start and end its run
    Hook(hook::HookArgs),
    /// Answer git inside an exec with a git lease (git calls this itself)
    #[command(hide = true)]
    GitCredential(git_credential::GitCredentialArgs),
    /// Ask a source for a fresh value (the launcher calls this itself)
    #[command(hide = true)]
    Mint(mint::MintArgs),
    /// Print a completion script for a shell
    Completions(completions::CompletionsArgs),
    /// Print a manual page, or write all of them
    Man(man::ManArgs),
}

const TOP: &str = "\
Examples:
  sublet demo
  sublet run -- make test
  sublet run --profile git-push --lease repo.push@github.com -- git push
  sublet doctor

Exit status:
  0    done; the answer is yes
  1    the answer is no: a denied verdict, a broken trail, a failed check
  2    sublet could not do it: bad usage, a missing file, a store that does not open
  run, exec and demo answer with the command's own status, and 125 where sublet failed: sublet run --help

Files:
  /etc/sublet/sublet.toml                  the host's configuration
  $XDG_CONFIG_HOME/sublet/sublet.toml      the same for a user
  /var/lib/sublet, $XDG_STATE_HOME/sublet  state: leases, secrets (encrypted), the trail
  /run/sublet, $XDG_RUNTIME_DIR/sublet     the broker's sockets; elsewhere with another state directory

Environment:
  SUBLET_CONFIG    the configuration, where --config does not name one
  SUBLET_SOCKET    in a sandbox: the agent's socket, where it is not /run/sublet/agent.sock
  NO_COLOR         set to anything: no colours";

/// The definitions, for completions and manual pages.
pub fn definitions() -> clap::Command {
    Cli::command()
}

/// Parses, dispatches, reports. Returns the exit status.
pub fn main(args: impl IntoIterator<Item = OsString>) -> u8 {
    let args: Vec<OsString> = args.into_iter().collect();
    let begun = is_to_run(&args).then(crate::run::begin);
    let cli = match parse(&args) {
        Ok(cli) => cli,
        Err(error) => return usage(&error, &args),
    };
    let json = cli.globals.json;
    match dispatch(cli, begun) {
        Ok(status) => status,
        Err(failure) => failure.report(json),
    }
}

/// # Errors
/// Bad usage, and `--help` and `--version`, which clap answers as errors.
pub fn parse(args: &[OsString]) -> Result<Cli, clap::Error> {
    // The hot paths build the one command that they need. Whatever it cannot parse is parsed anew below,
    // so that help, errors and their suggestions know every command.
    if let Some(alone) = first_word(args).and_then(alone)
        && let Ok(matches) = alone.try_get_matches_from(args)
        && let Ok(cli) = Cli::from_arg_matches(&matches)
    {
        return Ok(cli);
    }
    let mut definitions = Cli::command();
    let matches = definitions.try_get_matches_from_mut(args)?;
    Cli::from_arg_matches(&matches).map_err(|e| e.format(&mut definitions))
}

/// The command's name, as far as it can be seen without parsing.
fn first_word(args: &[OsString]) -> Option<&str> {
    let mut args = args.iter().skip(1).map(|arg| arg.to_str());
    loop {
        match args.next()?? {
            // Those of [`Globals`] that have their value behind them.
            "--config" | "--state-dir" => drop(args.next()),
            flag if flag.starts_with('-') => {}
            word => return Some(word),
        }
    }
}

/// Whether a sandbox will be wanted, by all looks. If not, what was begun for it ends by itself.
fn is_to_run(args: &[OsString]) -> bool {
    let flags = || args.iter().take_while(|arg| *arg != "--");
    let runs_nothing = |arg: &OsString| arg == "--explain" || arg == "--help" || arg == "-h";
    first_word(args) == Some("run") && flags().count() < args.len() && !flags().any(runs_nothing)
}

fn alone(word: &str) -> Option<clap::Command> {
    let command = match word {
        "run" => clap::Command::new("run").defer(run::RunArgs::augment_args),
        "exec" => clap::Command::new("exec").defer(exec::ExecArgs::augment_args),
        _ => return None,
    };
    let top = clap::Command::new("sublet").disable_help_subcommand(true);
    Some(Globals::augment_args(top).subcommand(command))
}

fn dispatch(cli: Cli, begun: Option<Result<Begun, RunError>>) -> Answer {
    let globals = &cli.globals;
    match cli.command {
        Command::Run(args) => run::execute(globals, args, begun).map_err(Failure::beside_a_command),
        Command::Exec(args) => exec::execute(globals, args).map_err(Failure::beside_a_command),
        Command::Demo(args) => demo::execute(globals, args).map_err(Failure::beside_a_command),
        Command::Runs(args) => runs::execute(globals, &args),
        Command::Serve(args) => serve::execute(globals, args),
        Command::Lease(args) => lease::execute(globals, &args),
        Command::Init(args) => init::execute(globals, &args),
        Command::Secret(args) => secret::execute(globals, &args),
        Command::Profile(args) => profile::execute(globals, &args),
        Command::Policy(args) => policy::execute(globals, &args),
        Command::Audit(args) => audit::execute(globals, &args),
        Command::Issuer(args) => issuer::execute(globals, &args),
        Command::Doctor(args) => doctor::execute(globals, &args),
        Command::Hook(args) => hook::execute(globals, &args),
        Command::GitCredential(args) => git_credential::execute(globals, &args),
        Command::Mint(args) => mint::execute(&args),
        Command::Completions(args) => completions::execute(globals, &args),
        Command::Man(args) => man::execute(globals, &args),
    }
}

/// Help and version go to standard output and are no error. Bad usage is 125 where a command would have
/// run (its statuses below are its own, as docker-run(1) has it), else 2.
fn usage(error: &clap::Error, args: &[OsString]) -> u8 {
    if !error.use_stderr() {
        return match error.print() {
            Ok(()) => YES,
            Err(e) => Failure::stdout(&e).report(false),
        };
    }
    if takes_a_value(args) && names_what_was_typed(error) {
        // Not a word of it: it may be the value.
        let json = args.iter().any(|a| *a == "--json");
        return Failure::new("usage", "bad_usage", "a value is not taken from the command line")
            .why("there is an argument behind the secret's name, or a flag that is none of this command")
            .hint(
                "pipe the value in, or let yourself be asked for it: printf %s \"$TOKEN\" | sublet secret set \
                 NAME. One that was typed here is in the shell's history by now",
            )
            .report(json);
    }
    let beside = names_a_command_to_run(args);
    let status = if beside.is_some() { NOT_RUN } else { TROUBLE };
    let ours: Vec<&OsString> = args.iter().take_while(|a| *a != "--").collect();
    let has_no_dashes = ours.len() == args.len();
    let hint = match beside {
        Some("exec") if has_no_dashes => {
            "put the command after `--`: sublet exec [OPTIONS] -- COMMAND [ARG…]"
        }
        Some(_) if has_no_dashes => {
            "put the command after `--`: sublet run [OPTIONS] -- COMMAND [ARG…]"
        }
        _ => "see `--help` of the command",
    };
    if ours.iter().any(|a| *a == "--json") {
        let whole = error.render().to_string();
        let told = whole.split("\n\n").next().unwrap_or_default();
        return Failure::new("usage", "bad_usage", told.trim_start_matches("error: "))
            .hint(hint)
            .exit(status)
            .report(true);
    }
    // clap's own text already ends with where to find help. That standard error is gone cannot be told.
    drop(error.print());
    if status == NOT_RUN && has_no_dashes {
        drop(writeln!(std::io::stderr(), "{hint}"));
    }
    status
}

/// Whether clap's text holds an argument that it has no place for.
fn names_what_was_typed(error: &clap::Error) -> bool {
    use clap::error::ErrorKind::{InvalidSubcommand, TooManyValues, UnknownArgument};
    matches!(error.kind(), UnknownArgument | TooManyValues | InvalidSubcommand)
}

/// `secret set` and `secret rotate`, where one may think that the value is typed.
fn takes_a_value(args: &[OsString]) -> bool {
    let mut words = args.iter().skip_while(|word| *word != "secret").skip(1);
    first_word(args) == Some("secret") && words.any(|word| word == "set" || word == "rotate")
}

fn names_a_command_to_run(args: &[OsString]) -> Option<&'static str> {
    let mut words = args.iter().skip(1).map(|word| word.to_string_lossy());
    while let Some(word) = words.next() {
        match &*word {
            "--config" | "--state-dir" => drop(words.next()),
            "run" => return Some("run"),
            "exec" => return Some("exec"),
            "demo" => return Some("demo"),
            _ if word.starts_with('-') => {}
            _ => return None,
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_short_way_parses_as_the_long_one() {
        #[track_caller]
        fn check(line: &str, is_valid: bool) {
            let args: Vec<OsString> = line.split(' ').map(OsString::from).collect();
            let told = |definitions: clap::Command| {
                let matches = definitions.try_get_matches_from(&args).ok()?;
                Some(format!("{:?}", Cli::from_arg_matches(&matches).ok()?))
            };
            let (short, long) =
                (told(alone(args[1].to_str().unwrap()).unwrap()), told(Cli::command()));
            assert_eq!(short, long, "{line}");
            assert_eq!(short.is_some(), is_valid, "{line}");
        }
        check("sublet run -- true", true);
        check("sublet run --json --config c --state-dir s -vv -t -- true --json", true);
        check("sublet run --profile p --lease a@b,ttl=5m --lease c@d --env A=1 -- x", true);
        check("sublet run --network none --timeout 5s --run r --agent a --explain -- x", true);
        check("sublet run --network bridge -- x", false);
        check("sublet run -- ", true);
        check("sublet run", false);
        check("sublet run --help", false);
        check("sublet run --nope -- x", false);
        check("sublet exec -- true", true);
        check("sublet exec --json --run r --socket s --env A=1 --timeout 5s -t -- x -y", true);
        check("sublet exec --network host -- x", false);
        check("sublet exec", false);
    }

    #[test]
    fn the_command_to_run_is_found_behind_global_flags() {
        #[track_caller]
        fn check(line: &str, expected: Option<&str>) {
            let args: Vec<OsString> = line.split(' ').map(OsString::from).collect();
            assert_eq!(names_a_command_to_run(&args), expected, "{line}");
        }
        check("sublet run", Some("run"));
        check("sublet -v --json --config run exec", Some("exec"));
        check("sublet --state-dir=run demo", Some("demo"));
        check("sublet --config run doctor", None);
        check("sublet doctor run", None);
    }
}
