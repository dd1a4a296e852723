//! `sublet issuer`: the workload identity of this host, made, rotated, published.
//!
//! What is public of it is read as whoever calls; what changes it is done by the user whom the state
//! belongs to.
#![forbid(unsafe_code)]

mod k8s;
mod serve;
mod words;

use std::path::PathBuf;

use clap::Subcommand;
use serde_json::json;

use super::fail::{Answer, Failure, NO, YES};
use super::output::Output;
use super::{Globals, load};
use crate::host::ProfileRef;
use crate::identity::issuer::{DEFAULT_LEAD, KeyState};
use crate::identity::{Change, Issuer, IssuerError, IssuerUrl, Subject, change, publish};
use crate::model::event::{Draft, EventType};
use crate::model::moment::{Span, timestamp_text};
use crate::model::name::IdentityName;
use crate::store::{Durability, Store};
use words::{INIT, LIST, PUBLISH, ROTATE, SHOW};

#[derive(Debug, clap::Args)]
#[command(after_long_help = words::HELP, arg_required_else_help = true)]
pub struct IssuerArgs {
    #[command(subcommand)]
    pub action: Action,
}

#[derive(Debug, Subcommand)]
#[command(defer = true)]
pub enum Action {
    /// Make this host an issuer of identities, with its first key
    Init(InitArgs),
    /// Make the next key: published at once, signing later
    Rotate(RotateArgs),
    /// List the keys, and what each is doing
    List(ListArgs),
    /// Show the issuer, and the subject that a profile and an agent get
    Show(ShowArgs),
    /// Write the discovery document and the key set as static files
    Publish(PublishArgs),
    /// Serve them over HTTP, from a process that can read neither file nor key
    Serve(serve::ServeArgs),
    /// Print the Kubernetes ServiceAccount for a host that is a pod
    K8s(k8s::K8sArgs),
}

#[derive(Debug, clap::Args)]
#[command(after_long_help = INIT)]
pub struct InitArgs {
    /// Where relying parties will find it: https, without a `/` at the end
    #[arg(long, value_name = "URL")]
    pub url: IssuerUrl,
}

#[derive(Debug, clap::Args)]
#[command(after_long_help = ROTATE)]
pub struct RotateArgs {
    /// How long the new key is published before it signs [default: 24h]
    #[arg(long, value_name = "DURATION", conflicts_with = "withdraw")]
    pub lead: Option<Span>,
    /// Publish no other key from now on: for when one has become known
    #[arg(long)]
    pub withdraw: bool,
}

#[derive(Debug, clap::Args)]
#[command(after_long_help = LIST)]
pub struct ListArgs {}

#[derive(Debug, clap::Args)]
#[command(after_long_help = SHOW)]
pub struct ShowArgs {
    /// Also the subject of tokens under this profile: a name, or a file
    #[arg(long, value_name = "NAME|FILE")]
    pub profile: Option<String>,
    /// For this agent [default: as `sublet run` names it]
    #[arg(long, value_name = "NAME", requires = "profile")]
    pub agent: Option<IdentityName>,
}

#[derive(Debug, clap::Args)]
#[command(after_long_help = PUBLISH)]
pub struct PublishArgs {
    /// The directory that is served as the issuer's URL [default: `[issuer] publish`]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
}

pub fn execute(globals: &Globals, args: &IssuerArgs) -> Answer {
    match &args.action {
        Action::Init(args) => init(globals, args),
        Action::Rotate(args) => rotate(globals, args),
        Action::List(_) => list(globals),
        Action::Show(args) => show(globals, args),
        Action::Publish(args) => publish_to(globals, args),
        Action::Serve(args) => serve::execute(globals, args),
        Action::K8s(args) => k8s::execute(globals, args),
    }
}

fn init(globals: &Globals, args: &InitArgs) -> Answer {
    let host = load::host_of_state(globals)?;
    let now = load::now()?.wall;
    // As any first use of a state makes it, with the owner and the mode that it needs.
    let mut store = Store::open(&host.state_dir).map_err(|e| Failure::from(&e))?;
    let change = change::init(&host.state_dir, args.url.clone(), now).map_err(|e| failure(&e))?;
    let issuer = publish_recorded(&mut store, change, EventType::IssuerInitialised)?;
    let mut output = Output::new(globals.json);
    let kids: Vec<String> = issuer.keys(now).map(|(key, _)| key.kid()).collect();
    if output.json {
        output.object(&json!({
            "issuer": issuer.url, "jwks_uri": issuer.jwks_uri(), "kid": kids.first(),
        }))?;
    } else {
        output.line(format!(
            "{} is this host's issuer, with key {}",
            issuer.url,
            kids.join(", ")
        ))?;
        output.line("publish it there before the first lease: sublet issuer publish --out DIR")?;
    }
    output.finish()?;
    Ok(YES)
}

fn rotate(globals: &Globals, args: &RotateArgs) -> Answer {
    let host = load::host_of_state(globals)?;
    let now = load::now()?.wall;
    let lead = args.lead.map_or(DEFAULT_LEAD, |lead| lead.0);
    // Where there is none, none of its state is made either.
    Issuer::get(&host.state_dir).map_err(|e| failure(&e))?;
    let mut store = Store::open(&host.state_dir).map_err(|e| Failure::from(&e))?;
    let (change, kind) = match args.withdraw {
        true => (change::withdraw(&host.state_dir, now), EventType::IssuerWithdrawn),
        false => (change::rotate(&host.state_dir, lead, now), EventType::IssuerRotated),
    };
    let issuer = publish_recorded(&mut store, change.map_err(|e| failure(&e))?, kind)?;
    let mut output = Output::new(globals.json);
    tell_keys(&mut output, &issuer, now)?;
    if !output.json {
        output.line("publish it anew before the new key signs: sublet issuer publish --out DIR")?;
    }
    output.finish()?;
    Ok(YES)
}

/// The event first, on disk: no key is published or signs of which the trail does not know.
fn publish_recorded(store: &mut Store, change: Change, kind: EventType) -> Result<Issuer, Failure> {
    let (key, issuer) = (change.made(), change.issuer());
    let mut draft = Draft::new(kind, key.created_at, &super::audit::hostname())
        .with("issuer", issuer.url.as_str())
        .with("kid", key.kid())
        .with("signs_from", timestamp_text(key.signs_from));
    draft.principal = Some(super::principal::invoking_user());
    if !change.dropped().is_empty() {
        draft = draft.with("published_no_longer", change.dropped().to_vec());
    }
    let failed = draft.clone().outcome("failed");
    record(store, draft)?;
    change.publish().map_err(|error| match record(store, failed) {
        Ok(()) => failure(&error),
        // Then the trail says more than there is, never less.
        Err(untold) => failure(&error).why(format!("{error}; {}", untold.message)),
    })
}

fn record(store: &mut Store, draft: Draft) -> Result<(), Failure> {
    let recorded = store.transaction(Durability::Durable, |tx| tx.append(draft).map(drop));
    recorded.map(drop).map_err(|e| Failure::from(&e))
}

fn list(globals: &Globals) -> Answer {
    let (_, issuer) = public(globals)?;
    let mut output = Output::new(globals.json);
    tell_keys(&mut output, &issuer, load::now()?.wall)?;
    output.finish()?;
    Ok(YES)
}

fn tell_keys(output: &mut Output, issuer: &Issuer, now: jiff::Timestamp) -> Result<(), Failure> {
    let mut rows = Vec::new();
    for (key, state) in issuer.keys(now) {
        let until = issuer.published_until(key).map(timestamp_text);
        let state_text = match state {
            KeyState::Coming => "coming",
            KeyState::Signing => "signing",
            KeyState::Leaving => "leaving",
            KeyState::Over => "over",
        };
        let (created, signs) = (timestamp_text(key.created_at), timestamp_text(key.signs_from));
        if output.json {
            output.object(&json!({
                "kid": key.kid(), "state": state, "created_at": created, "signs_from": signs,
                "published_until": until,
            }))?;
        } else {
            let until = until.unwrap_or_else(|| "-".to_owned());
            rows.push(vec![key.kid(), state_text.to_owned(), signs, until]);
        }
    }
    if output.json {
        return Ok(());
    }
    output.table(&["KEY", "STATE", "SIGNS FROM", "PUBLISHED UNTIL"], &rows)
}

fn show(globals: &Globals, args: &ShowArgs) -> Answer {
    let (host, issuer) = public(globals)?;
    let now = load::now()?.wall;
    let config = &host.config.issuer;
    let signing = issuer.keys(now).find(|(_, state)| *state == KeyState::Signing);
    let kid = signing.map(|(key, _)| key.kid());
    let subject = args.profile.as_ref().map(|profile| {
        let agent = args.agent.clone().unwrap_or_else(super::run::default_agent);
        Subject::new(&ProfileRef::parse(profile).identity(), &agent).to_string()
    });
    let mut output = Output::new(globals.json);
    if output.json {
        output.object(&json!({
            "issuer": issuer.url, "jwks_uri": issuer.jwks_uri(), "kid": kid,
            "audience": config.audience, "token_ttl": config.token_ttl.0.as_secs(),
            "subject": subject,
        }))?;
    } else {
        output.line(format!("issuer     {}", issuer.url))?;
        output.line(format!("key set    {}", issuer.jwks_uri()))?;
        output.line(format!("signs      {}", kid.unwrap_or_else(|| "no key".to_owned())))?;
        output.line(format!("audience   {}", config.audience))?;
        output.line(format!("token ttl  {}", config.token_ttl))?;
        if let Some(subject) = subject {
            output.line(format!("subject    {subject}"))?;
        }
    }
    output.finish()?;
    Ok(YES)
}

fn publish_to(globals: &Globals, args: &PublishArgs) -> Answer {
    let (host, issuer) = public(globals)?;
    let Some(out) = args.out.as_ref().or(host.config.issuer.publish.as_ref()) else {
        return Err(Failure::new("issuer", "not_published", "it is not said where to publish")
            .hint("name a directory with --out, or in the configuration: [issuer] publish"));
    };
    let paths = publish::publish(&issuer, out, load::now()?.wall).map_err(|e| {
        Failure::new("issuer", "not_published", e.to_string())
            .because_of_source(&e)
            .hint("name a directory that you may write to with --out")
    })?;
    let mut output = Output::new(globals.json);
    for path in paths {
        if output.json {
            output.object(&json!({ "path": path }))?;
        } else {
            output.line(path.display())?;
        }
    }
    output.finish()?;
    Ok(YES)
}

/// What is public of the issuer. Nothing of it leads anywhere: it may be read as root, so that what is
/// written with it can be written where root may.
fn public(globals: &Globals) -> Result<(crate::host::Host, Issuer), Failure> {
    let host = load::host(globals)?;
    let issuer = Issuer::get(&host.state_dir).map_err(|e| failure(&e))?;
    Ok((host, issuer))
}

fn failure(error: &IssuerError) -> Failure {
    let (reason, hint, exit) = match error {
        IssuerError::Absent => {
            ("identity_not_configured", "make one: sublet issuer init --url https://…", Some(NO))
        }
        IssuerError::Exists(_) => (
            "issuer_exists",
            "relying parties know it by that address: keep it, or move STATE/keys/issuer* away first",
            Some(NO),
        ),
        IssuerError::TooManyKeys(_) => {
            ("too_many_keys", "wait until some are over: sublet issuer list", None)
        }
        IssuerError::NoKeySigns => {
            ("no_key_signs", "look at the clock, or rotate with --withdraw", None)
        }
        IssuerError::OtherKey { .. } | IssuerError::Damaged { .. } => {
            ("issuer_damaged", "restore STATE/keys from a backup, or make another issuer", None)
        }
        IssuerError::Read { .. } | IssuerError::Write { .. } => {
            ("issuer_unusable", "run as the state's owner, and look at its mode and space", None)
        }
        IssuerError::File(_) | IssuerError::Key(_) => ("key_unusable", "", None),
    };
    let failure =
        Failure::new("issuer", reason, error.to_string()).because_of_source(error).hint(hint);
    match exit {
        Some(status) => failure.exit(status),
        None => failure,
    }
}
