//! `sublet audit checkpoint` and `key`: what to keep elsewhere, so that no one who may write here can set the
//! trail back unseen.
#![forbid(unsafe_code)]

use serde_json::json;

use crate::cli::fail::{Answer, Failure, NO, YES};
use crate::cli::output::Output;
use crate::cli::{Globals, load};
use crate::envelope::Checkpoint;
use crate::host::Host;
use crate::store::{Durability, Store};

#[derive(Debug, clap::Args)]
#[command(after_long_help = CHECKPOINT_HELP)]
pub struct CheckpointArgs {}

#[derive(Debug, clap::Args)]
#[command(after_long_help = KEY_HELP)]
pub struct KeyArgs {
    /// Print it as a JSON Web Key Set, as envelopes are verified with
    #[arg(long)]
    pub jwks: bool,
}

const CHECKPOINT_HELP: &str = "\
Examples:
  sublet audit checkpoint > /mnt/elsewhere/checkpoint
  sublet audit verify --checkpoint /mnt/elsewhere/checkpoint

Exit status:
  0    the trail's head is signed, and on disk; the checkpoint is printed
  1    nothing is recorded yet
  2    it could not be signed: the trail was changed, or the state or the key cannot be used";

const KEY_HELP: &str = "\
Examples:
  sublet audit key > /mnt/elsewhere/sublet.key
  sublet audit verify --key \"$(cat /mnt/elsewhere/sublet.key)\"
  sublet audit key --jwks > jwks.json
  sublet lease verify --jwks jwks.json envelope.json

Exit status:
  0    printed
  1    this host has no key yet: nothing was signed
  2    the key cannot be used";

/// Signs what is new, and prints the last checkpoint.
pub(super) fn execute(globals: &Globals, host: &Host, _: &CheckpointArgs) -> Answer {
    let nothing =
        || Failure::new("audit", "nothing_recorded", "there is no event to sign yet").exit(NO);
    // Looking first: signing a state that is not there makes none.
    if super::reader(host)?.is_none() {
        return Err(nothing());
    }
    let mut store = Store::open(&host.state_dir).map_err(|e| Failure::from(&e))?;
    let key = super::signing_key_or_new(host)?;
    let now = load::now()?;
    // Durably: what is kept elsewhere must not be lost here in a power cut.
    store
        .checkpoint(1, Durability::Durable, &key, &super::hostname(), now.wall)
        .map_err(|e| Failure::from(&e))?;
    let latest = store.read(|view| view.latest_checkpoint()).map_err(|e| Failure::from(&e))?;
    let note = latest.ok_or_else(nothing)?.note;
    let signed = Checkpoint::open(&note, &[key.public().trail_key()]).map_err(|e| {
        Failure::new("audit", "checkpoint_unusable", format!("the last checkpoint {e}"))
            .hint("sublet audit verify tells more")
    })?;
    let mut output = Output::new(globals.json);
    if globals.json {
        let Checkpoint { head, time, host, .. } = signed.checkpoint();
        output.object(&json!({
            "seq": head.seq, "hash": head.hash, "time": crate::model::moment::timestamp_text(*time),
            "host": host, "key": key.public().trail_key().to_string(), "note": note,
        }))?;
    } else {
        output.bytes(note.as_bytes())?;
    }
    output.finish()?;
    Ok(YES)
}

pub(super) fn key(globals: &Globals, host: &Host, args: &KeyArgs) -> Answer {
    let key = super::signing_key(host)?.ok_or_else(|| {
        Failure::new("audit", "no_signing_key", "this host has signed nothing yet, and has no key")
            .hint("sublet audit checkpoint makes one")
            .exit(NO)
    })?;
    let public = key.public();
    let mut output = Output::new(globals.json);
    if args.jwks {
        output.object(&public.jwks())?;
    } else if globals.json {
        output.object(&json!({
            "kid": public.kid(), "verifier_key": public.trail_key().to_string(), "jwk": public.jwk(),
        }))?;
    } else {
        output.line(public.trail_key())?;
    }
    output.finish()?;
    Ok(YES)
}
