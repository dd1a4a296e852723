//! `sublet lease`: permissions of a broker's runs. Ids, states and places; never a value.
//!
//! Requests go to a run's socket, whose they are. Renewing and revoking belong to the control socket.
#![forbid(unsafe_code)]

use std::path::PathBuf;

use clap::Subcommand;
use clap::builder::{StringValueParser, TypedValueParser};

use super::fail::{Answer, Failure, NO, YES};
use super::output::Output;
use super::verify_envelope::{self, VerifyEnvelopeArgs};
use super::{Globals, run, socket};
use crate::api::client::{Client, ClientError};
use crate::api::wire::{BatchBody, LeaseBody, LeaseObject, RenewBody, RevocationBody, RevokeBody};
use crate::model::id::{LeaseId, RunId};
use crate::model::moment::Span;
use crate::model::name::IdentityName;
use crate::policy::{LeaseFlag, Reason};

#[derive(Debug, clap::Args)]
#[command(after_long_help = HELP, arg_required_else_help = true)]
pub struct LeaseArgs {
    #[command(subcommand)]
    pub action: Action,
}

pub const HELP: &str = "\
Examples:
  sublet lease request repo.push@github.com --reason 'nightly push'
  sublet lease list
  sublet lease revoke lse_0199…

Exit status:
  0    done
  1    the answer is no: denied, with the reason's name; no such lease; an envelope that is not valid
  2    sublet could not do it: no broker answers";

const REQUEST_HELP: &str = "\
Examples:
  sublet lease request repo.push@github.com --reason 'nightly push'
  sublet lease request db.read@db.internal:5432,channel=file,ttl=2m,uses=3 --run ci-1234
  read -r lease _ < <(sublet lease request repo.push@github.com)

Exit status:
  0    granted: each lease is printed, its id first
  1    denied: the reason's name, why, and what would be allowed; of several, none is granted
  2    sublet could not do it: no broker answers, no run is named";

const LIST_HELP: &str = "\
Examples:
  sublet lease list
  sublet lease list --run ci-1234 --json

Exit status:
  0    listed, be it nothing
  2    no broker answers";

const SHOW_HELP: &str = "\
Examples:
  sublet lease show lse_0199…
  sublet lease show lse_0199… --envelope > envelope.json

Exit status:
  0    shown
  1    there is no such lease, or it is another run's
  2    no broker answers";

const RENEW_HELP: &str = "\
Examples:
  sublet lease renew lse_0199…
  sublet lease renew lse_0199… --ttl 10m

Exit status:
  0    renewed
  1    denied, or there is no such lease
  2    sublet could not do it: no broker answers, the lease has ended or is not renewable";

const REVOKE_HELP: &str = "\
Examples:
  sublet lease revoke lse_0199… --reason 'leaked in a log'
  sublet lease revoke --run ci-1234
  sublet lease revoke --principal alice
  sublet lease revoke --all

Exit status:
  0    revoked: what was delivered is wiped; those that were open are printed, and without a lease's ID
       how many they were, be it none
  1    there is no such lease
  2    no broker answers";

#[derive(Debug, Subcommand)]
#[command(defer = true)]
pub enum Action {
    /// Ask for leases; all are granted, or none is
    Request(RequestArgs),
    /// List the leases of this run, or on the host of all
    List(ListArgs),
    /// Show one lease
    Show(ShowArgs),
    /// Prolong a renewable lease
    Renew(RenewArgs),
    /// Take leases back: wipe what they delivered, at once
    Revoke(RevokeArgs),
    /// Check a signed envelope offline
    Verify(VerifyEnvelopeArgs),
}

#[derive(Debug, clap::Args)]
#[command(after_long_help = REQUEST_HELP)]
pub struct RequestArgs {
    /// What to ask for: CAPABILITY@AUDIENCE[,channel=memfd|file|env|git][,ttl=D][,uses=N]
    #[arg(value_name = "LEASE", required = true,
        value_parser = StringValueParser::new().try_map(run::lease))]
    pub lease: Vec<LeaseFlag>,
    /// Why, for the audit trail
    #[arg(long, value_name = "TEXT")]
    pub reason: Option<Reason>,
    /// The run, on the host; in a sandbox its own
    #[arg(long, value_name = "ID")]
    pub run: Option<RunId>,
    /// The run's socket [default: in a sandbox $SUBLET_SOCKET, else /run/sublet/agent.sock]
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
#[command(after_long_help = LIST_HELP)]
pub struct ListArgs {
    /// Only of this run
    #[arg(long, value_name = "ID")]
    pub run: Option<RunId>,
    /// The broker's socket [default: in a sandbox the agent's, else the control socket]
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
#[command(after_long_help = SHOW_HELP)]
pub struct ShowArgs {
    /// The lease
    #[arg(value_name = "ID")]
    pub lease: LeaseId,
    /// Print its signed envelope instead, as JSON
    #[arg(long)]
    pub envelope: bool,
    /// The broker's socket [default: in a sandbox the agent's, else the control socket]
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
#[command(after_long_help = RENEW_HELP)]
pub struct RenewArgs {
    /// The lease
    #[arg(value_name = "ID")]
    pub lease: LeaseId,
    /// For how long from now [default: what a request that names no ttl gets]
    #[arg(long, value_name = "DURATION")]
    pub ttl: Option<Span>,
    /// The broker's control socket
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
#[command(after_long_help = REVOKE_HELP, group = clap::ArgGroup::new("which").required(true))]
pub struct RevokeArgs {
    /// The lease
    #[arg(value_name = "ID", group = "which")]
    pub lease: Option<LeaseId>,
    /// All leases of this run
    #[arg(long, value_name = "ID", group = "which")]
    pub run: Option<RunId>,
    /// All leases of this principal's runs
    #[arg(long, value_name = "NAME", group = "which")]
    pub principal: Option<IdentityName>,
    /// All leases of the host
    #[arg(long, group = "which")]
    pub all: bool,
    /// Why, for the audit trail
    #[arg(long, value_name = "TEXT")]
    pub reason: Option<Reason>,
    /// The broker's control socket
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
}

pub fn execute(globals: &Globals, args: &LeaseArgs) -> Answer {
    let mut output = Output::new(globals.json);
    match &args.action {
        Action::Verify(args) => return verify_envelope::execute(globals, args),
        Action::Request(args) => {
            let client = socket::of_a_run(globals, args.socket.as_deref(), args.run.as_ref())?;
            let granted = request(&client, args).map_err(|e| Failure::from(&e))?;
            granted.iter().try_for_each(|lease| tell(&mut output, lease))?;
        }
        Action::List(args) => {
            let (client, run) =
                socket::of_either(globals, args.socket.as_deref(), args.run.as_ref())?;
            let leases = client.leases(run).map_err(|e| Failure::from(&e))?;
            list(&mut output, &leases)?;
        }
        Action::Show(args) => {
            let (client, _) = socket::of_either(globals, args.socket.as_deref(), None)?;
            if args.envelope {
                output
                    .bytes(client.envelope(&args.lease).map_err(of_one)?.trim_end().as_bytes())?;
                output.bytes(b"\n")?;
            } else {
                show(&mut output, &client.lease(&args.lease).map_err(of_one)?)?;
            }
        }
        Action::Renew(args) => {
            let client = socket::of_the_host(globals, args.socket.as_deref())?;
            let body = RenewBody { ttl: args.ttl };
            tell(&mut output, &client.renew(&args.lease, &body).map_err(of_one)?)?;
        }
        Action::Revoke(args) => {
            let client = socket::of_the_host(globals, args.socket.as_deref())?;
            let revoked = revoke(&client, args)?;
            revoked.iter().try_for_each(|lease| tell(&mut output, lease))?;
            // A run or principal that was mistyped has none. In JSON the lines are counted.
            if args.lease.is_none() && !output.json {
                output.line(format_args!("leases revoked: {}", revoked.len()))?;
            }
        }
    }
    output.finish()?;
    Ok(YES)
}

fn request(client: &Client, args: &RequestArgs) -> Result<Vec<LeaseObject>, ClientError> {
    if let [one] = &args.lease[..] {
        let body = LeaseBody::new(one.clone(), args.reason.clone());
        return client.request(&body).map(|lease| vec![lease]);
    }
    let leases = args.lease.iter().map(|flag| LeaseBody::new(flag.clone(), None)).collect();
    client.request_all(&BatchBody { leases, reason: args.reason.clone() })
}

fn revoke(client: &Client, args: &RevokeArgs) -> Result<Vec<LeaseObject>, Failure> {
    let reason = args.reason.clone();
    if let Some(lease) = &args.lease {
        let revoked = client.revoke(lease, &RevokeBody { reason }).map_err(of_one)?;
        return Ok(vec![revoked]);
    }
    let (run_id, principal, all) = (args.run.clone(), args.principal.clone(), args.all);
    client
        .revoke_all(&RevocationBody { run_id, principal, all, reason })
        .map_err(|e| Failure::from(&e))
}

/// Of a lease that was named: that there is none is an answer.
fn of_one(error: ClientError) -> Failure {
    let failure = Failure::from(&error);
    if matches!(error, ClientError::Refused { status: 404, .. }) {
        failure.exit(NO)
    } else {
        failure
    }
}

/// One line, the id first: for `read`.
fn tell(output: &mut Output, lease: &LeaseObject) -> Result<(), Failure> {
    if output.json {
        return output.object(lease);
    }
    let LeaseObject { lease_id, state, capability, audience, channel, .. } = lease;
    let state = state.as_str();
    let terms = if lease.state.is_open() {
        format!(", for {} s, uses left: {}", lease.expires_in, lease.uses_left)
    } else {
        String::new()
    };
    output.line(format_args!("{lease_id} {state}: {capability}@{audience} by {channel}{terms}"))
}

fn list(output: &mut Output, leases: &[LeaseObject]) -> Result<(), Failure> {
    if output.json {
        return leases.iter().try_for_each(|lease| output.object(lease));
    }
    let rows: Vec<Vec<String>> = leases
        .iter()
        .map(|lease| {
            vec![
                lease.lease_id.to_string(),
                lease.state.as_str().to_owned(),
                lease.channel.to_string(),
                format!("{}/{}", lease.uses_left, lease.uses),
                format!("{}s", lease.expires_in),
                lease.run_id.to_string(),
                format!("{}@{}", lease.capability, lease.audience),
            ]
        })
        .collect();
    output.table(&["LEASE", "STATE", "CHANNEL", "USES", "LEFT", "RUN", "CAPABILITY"], &rows)
}

fn show(output: &mut Output, lease: &LeaseObject) -> Result<(), Failure> {
    if output.json {
        return output.object(lease);
    }
    let delivery = &lease.delivery;
    let at = match (&delivery.variable, &delivery.path) {
        (Some(variable), _) => format!(" in {variable}"),
        (None, Some(path)) => format!(" at {}", path.display()),
        (None, None) => String::new(),
    };
    let expires = match lease.state.is_open() {
        true => format!("{}, in {} s", lease.expires_at, lease.expires_in),
        false => lease.expires_at.clone(),
    };
    for (name, value) in [
        ("lease", lease.lease_id.to_string()),
        ("state", lease.state.as_str().to_owned()),
        ("run", lease.run_id.to_string()),
        ("capability", lease.capability.to_string()),
        ("audience", lease.audience.to_string()),
        ("delivery", format!("{}{at}", delivery.kind)),
        ("issued", lease.issued_at.clone()),
        ("expires", expires),
        ("uses left", format!("{} of {}", lease.uses_left, lease.uses)),
    ] {
        output.line(format_args!("{name:<10}  {value}"))?;
    }
    Ok(())
}
