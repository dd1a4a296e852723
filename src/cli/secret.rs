//! `sublet secret`: values go into the vault, and none comes out again.
//!
//! Receives a value from standard input or a terminal, straight into locked memory; hands it sealed to
//! the store, with an event, in one durable transaction. Must never print a value or put one in an error.
#![forbid(unsafe_code)]

use std::io::{self, IsTerminal as _};
use std::path::Path;

use clap::Subcommand;
use serde_json::json;

use super::fail::{Answer, Failure, YES};
use super::output::Output;
use super::prompt::{self, NoValue};
use super::{Globals, load, principal};
use crate::host::Host;
use crate::model::event::{Draft, EventType};
use crate::model::moment::{Moment, timestamp_text};
use crate::model::name::SecretName;
use crate::model::secret::{MAX_VALUE, Secret};
use crate::source::vault::{self, KeySource, VaultError};
use crate::store::{Durability, Reader, Store, StoreError, Tx};

#[derive(Debug, clap::Args)]
#[command(after_long_help = HELP, arg_required_else_help = true)]
pub struct SecretArgs {
    #[command(subcommand)]
    pub action: Action,
}

pub const HELP: &str = "\
Examples:
  sublet secret set github-bot
  printf %s \"$TOKEN\" | sublet secret rotate github-bot
  sublet secret set deploy-key < ~/.ssh/deploy
  sublet secret list --json

Exit status:
  0    done
  2    sublet could not do it; nothing was changed

Values:
  No command and no interface of sublet prints one.";

const SET_HELP: &str = "\
Examples:
  sublet secret set github-bot
  printf %s \"$TOKEN\" | sublet secret set github-bot

Exit status:
  0    the value is kept, and the event that says so is on disk
  2    it is not";

const LIST_HELP: &str = "\
Examples:
  sublet secret list
  sublet secret list --json | jq -r .name

Exit status:
  0    listed
  2    the state or the configuration could not be read";

const RM_HELP: &str = "\
Examples:
  sublet secret rm github-bot

Exit status:
  0    removed, and the event that says so is on disk
  2    there is none of that name, or it could not be removed";

#[derive(Debug, Subcommand)]
#[command(defer = true)]
pub enum Action {
    /// Keep a value under a new name: from standard input, or typed twice without echo
    Set(ValueArgs),
    /// Put a new value in the place of the one that is kept
    Rotate(ValueArgs),
    /// List names, never values
    List(ListArgs),
    /// Remove a value for good
    Rm(NameArgs),
}

#[derive(Debug, clap::Args)]
#[command(after_long_help = SET_HELP)]
pub struct ValueArgs {
    /// The name that the configuration's [secrets.NAME] uses
    pub name: SecretName,
    /// Leave out one line feed at the end of standard input; else every byte is the value's
    #[arg(long)]
    pub trim: bool,
}

#[derive(Debug, clap::Args)]
#[command(after_long_help = LIST_HELP)]
pub struct ListArgs {}

#[derive(Debug, clap::Args)]
#[command(after_long_help = RM_HELP)]
pub struct NameArgs {
    /// The name
    pub name: SecretName,
}

/// What a transaction found instead of what it was to change. Nothing is written then.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error("a secret named {0} is kept already")]
    Exists(SecretName),
    #[error("no secret named {0} is kept")]
    Unknown(SecretName),
    #[error(transparent)]
    Vault(#[from] VaultError),
}

impl From<Refused> for Failure {
    fn from(refused: Refused) -> Self {
        let message = refused.to_string();
        match refused {
            Refused::Exists(name) => Failure::new("vault", "secret_exists", message)
                .hint(format!("give it a new value with: sublet secret rotate {name}")),
            Refused::Unknown(_) => Failure::new("vault", "secret_unknown", message)
                .hint("see the names with: sublet secret list"),
            Refused::Vault(e) => vault_failure(&e),
        }
    }
}

pub fn vault_failure(error: &VaultError) -> Failure {
    Failure::new("vault", "vault_unusable", "the vault cannot be used").because(error)
}

pub fn execute(globals: &Globals, args: &SecretArgs) -> Answer {
    let host = load::host(globals)?;
    let (value, kind) = match &args.action {
        Action::Set(value) => (value, EventType::SecretSet),
        Action::Rotate(value) => (value, EventType::SecretRotated),
        Action::List(ListArgs {}) => {
            load::enter_state(&host)?;
            return list(globals, &host);
        }
        Action::Rm(NameArgs { name }) => {
            load::enter_state(&host)?;
            return remove(globals, &host, name);
        }
    };
    // A service's credentials are root's.
    let keys = KeySource::open(&host.state_dir, load::credentials_directory().as_deref())
        .map_err(|e| vault_failure(&e))?;
    load::enter_state(&host)?;
    put(globals, &host, &keys, value, kind)
}

fn put(
    globals: &Globals,
    host: &Host,
    keys: &KeySource,
    args: &ValueArgs,
    kind: EventType,
) -> Answer {
    let name = &args.name;
    // The store first: no one types a value twice to hear that it cannot be kept.
    let mut store = Store::open(&host.state_dir).map_err(|e| Failure::from(&e))?;
    refuse_early(&store, name, kind)?;
    let key = keys.load_or_create().map_err(|e| vault_failure(&e))?;
    let value = value(name, args.trim)?;
    let now = load::now()?;

    let (recorded, _) = store
        .transaction(Durability::Durable, |tx| {
            let version = tx.next_secret_version(name)?;
            if let Some(refused) = refusal(name, version > 1, kind) {
                return Ok(Err(refused));
            }
            let sealed = match vault::seal(&key, name, version, &value) {
                Ok(sealed) => sealed,
                Err(e) => return Ok(Err(Refused::Vault(e))),
            };
            tx.put_secret(name, version, &sealed, &key.digest(value.expose()), &now)?;
            record(tx, kind, name, version, &now)?;
            Ok(Ok(version))
        })
        .map_err(|e| Failure::from(&e))?;
    let version = recorded?;

    let mut notes = notes(host, name, &value);
    notes.extend(tidy(&mut store));
    let mut output = Output::new(globals.json);
    if globals.json {
        let set_at = timestamp_text(now.wall);
        output.object(&json!({
            "name": name, "version": version, "set_at": set_at, "notes": objects(&notes),
        }))?;
    } else {
        let done = if kind == EventType::SecretSet { "kept" } else { "rotated" };
        output.line(format_args!("{done} {name}, version {version}"))?;
        notes.iter().for_each(Failure::note);
    }
    output.finish()?;
    Ok(YES)
}

fn refusal(name: &SecretName, is_kept: bool, kind: EventType) -> Option<Refused> {
    match (is_kept, kind == EventType::SecretSet) {
        (true, true) => Some(Refused::Exists(name.clone())),
        (false, false) => Some(Refused::Unknown(name.clone())),
        _ => None,
    }
}

/// The transaction looks again: between the two someone types.
fn refuse_early(store: &Store, name: &SecretName, kind: EventType) -> Result<(), Failure> {
    let is_kept =
        store.read(|view| Ok(view.secret(name)?.is_some())).map_err(|e| Failure::from(&e))?;
    refusal(name, is_kept, kind).map_or(Ok(()), |refused| Err(refused.into()))
}

fn value(name: &SecretName, trim: bool) -> Result<Secret, Failure> {
    let failed =
        |reason: &str| Failure::new("vault", reason, format!("no value was taken for {name}"));
    if io::stdin().is_terminal() {
        return prompt::twice(&format!("value of {name} (not shown)")).map_err(|e| match e {
            NoValue::Interrupted => failed("interrupted").why("interrupted").exit(130),
            other => failed("no_value").because(&other),
        });
    }
    // Past std's buffer, which is never wiped.
    let mut value = Secret::read_from(prompt::RawStdin).map_err(|e| {
        if e.kind() == io::ErrorKind::FileTooLarge {
            failed("value_too_large").why(format!("a value is at most {MAX_VALUE} bytes"))
        } else {
            failed("no_value").because(&e)
        }
    })?;
    if trim && value.expose().last() == Some(&b'\n') {
        value.truncate(value.len() - 1);
    }
    Ok(value)
}

fn list(globals: &Globals, host: &Host) -> Answer {
    let kept = match Reader::open(&host.state_dir) {
        Ok(reader) => reader.read(|view| view.secrets()).map_err(|e| Failure::from(&e))?,
        Err(StoreError::NotFound { .. }) => Vec::new(),
        Err(e) => return Err(Failure::from(&e)),
    };
    let mut output = Output::new(globals.json);
    let mut rows = Vec::new();
    for entry in &kept {
        let set_at = timestamp_text(entry.set_at);
        let is_configured = load::draws_on_vault(&host.config, &entry.name);
        if globals.json {
            output.object(&json!({
                "name": entry.name, "version": entry.version, "set_at": set_at,
                "configured": is_configured,
            }))?;
        }
        let configured = if is_configured { "yes" } else { "no" };
        rows.push(vec![
            entry.name.to_string(),
            entry.version.to_string(),
            set_at,
            configured.into(),
        ]);
    }
    if !globals.json && rows.is_empty() {
        // Where, so that a state that was not meant shows.
        let state = host.state_dir.display();
        output.line(format_args!(
            "no secret is kept in {state}; keep one with: sublet secret set NAME"
        ))?;
    } else if !globals.json {
        output.table(&["NAME", "VERSION", "SET", "CONFIGURED"], &rows)?;
    }
    output.finish()?;
    Ok(YES)
}

fn remove(globals: &Globals, host: &Host, name: &SecretName) -> Answer {
    let mut store = open_existing(&host.state_dir, name)?;
    let now = load::now()?;
    let (removed, _) = store
        .transaction(Durability::Durable, |tx| {
            let version = tx.next_secret_version(name)? - 1;
            if !tx.remove_secret(name)? {
                return Ok(Err(Refused::Unknown(name.clone())));
            }
            record(tx, EventType::SecretRemoved, name, version, &now)?;
            Ok(Ok(()))
        })
        .map_err(|e| Failure::from(&e))?;
    removed?;
    let notes = Vec::from_iter(tidy(&mut store));
    let mut output = Output::new(globals.json);
    if globals.json {
        output.object(&json!({ "name": name, "removed": true, "notes": objects(&notes) }))?;
    } else {
        output.line(format_args!("removed {name}"))?;
        notes.iter().for_each(Failure::note);
    }
    output.finish()?;
    Ok(YES)
}

/// Removing from a state that is not there makes none.
fn open_existing(state_dir: &Path, name: &SecretName) -> Result<Store, Failure> {
    match Reader::open(state_dir) {
        Err(StoreError::NotFound { .. }) => Err(Refused::Unknown(name.clone()).into()),
        Err(e) => Err(Failure::from(&e)),
        Ok(_) => Store::open(state_dir).map_err(|e| Failure::from(&e)),
    }
}

fn record(
    tx: &mut Tx<'_>,
    kind: EventType,
    name: &SecretName,
    version: u64,
    now: &Moment,
) -> Result<(), StoreError> {
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let mut draft =
        Draft::new(kind, now.wall, &host).with("secret", name.as_str()).with("version", version);
    draft.principal = Some(principal::invoking_user());
    tx.append(draft)?;
    Ok(())
}

/// The log holds the ciphertext of what was replaced until it begins anew. What was asked for is done
/// by then, so that a failure of this is told beside it.
fn tidy(store: &mut Store) -> Option<Failure> {
    let error = store.tidy().err()?;
    let message =
        "the store's log could not be begun anew: it still holds what was replaced, sealed";
    Some(Failure::new("state", "not_tidied", message).because(&error))
}

fn objects(notes: &[Failure]) -> Vec<serde_json::Value> {
    notes.iter().map(Failure::object).collect()
}

/// What a person would want to know of a value that is kept all the same.
fn notes(host: &Host, name: &SecretName, value: &Secret) -> Vec<Failure> {
    let note = |reason: &str, message: String| Failure::new("vault", reason, message);
    let mut notes = Vec::new();
    if value.is_empty() {
        notes.push(note("value_empty", format!("the value of {name} is empty")));
    }
    if value.expose().last() == Some(&b'\n') {
        notes.push(
            note("value_ends_line", format!("the value of {name} ends with a line feed"))
                .hint("right for a key file; for a token rotate it with --trim, or use printf %s"),
        );
    }
    if !load::draws_on_vault(&host.config, name) {
        notes.push(
            note("not_configured", format!("no lease can draw on {name} yet: it is not configured"))
                .hint(format!(
                    "add to {}:\n[secrets.{name}]\nsource = \"vault\"\nallow = [\"CAPABILITY@AUDIENCE\"]",
                    load::config_file(host).display()
                )),
        );
    }
    notes
}
