//! `sublet lease verify`: a capability envelope, checked offline.
//!
//! Reads the envelope and keys; asks no one. Must never print a word of an envelope that is not proven.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde_json::json;

use super::fail::{Answer, Failure, NO, YES};
use super::output::Output;
use super::{Globals, load};
use crate::audit::key;
use crate::envelope::{self, Envelope, EnvelopeError, Jwks, MAX_ENVELOPE};
use crate::model::moment::timestamp_text;

#[derive(Debug, clap::Args)]
#[command(after_long_help = HELP)]
pub struct VerifyEnvelopeArgs {
    /// The envelope; `-` is standard input
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// The keys that its issuer publishes [default: this host's own key]
    #[arg(long, value_name = "FILE")]
    pub jwks: Option<PathBuf>,
    /// Who must have issued it
    #[arg(long, value_name = "NAME")]
    pub issuer: Option<String>,
}

pub const HELP: &str = "\
Examples:
  sublet lease verify envelope.json
  sublet lease verify --jwks jwks.json --issuer build-7 - < envelope.json

Exit status:
  0    valid: signed by a known key, unchanged, in its time
  1    not valid, and why
  2    the envelope or the keys could not be read

Revocation:
  Nothing is asked over a network. Whether the lease was revoked since tells its revocation_url.";

/// The largest key set that is read.
const MAX_JWKS: u64 = 1 << 20;

pub fn execute(globals: &Globals, args: &VerifyEnvelopeArgs) -> Answer {
    // One byte more than an envelope can have is enough to refuse it. Read first: root becomes the state's
    // user before it looks for the key there.
    let bytes = read(&args.file, MAX_ENVELOPE as u64 + 1)?;
    let keys = keys(globals, args.jwks.as_deref())?;
    let now = jiff::Timestamp::now();
    let checked = envelope::verify(&bytes, &keys, now, None).and_then(|envelope| {
        args.issuer.as_deref().map_or(Ok(()), |name| envelope.must_be_from(name))?;
        Ok(envelope)
    });
    tell(globals, &checked)
}

fn tell(globals: &Globals, checked: &Result<Envelope, EnvelopeError>) -> Answer {
    let mut output = Output::new(globals.json);
    match checked {
        Ok(envelope) if globals.json => {
            output.object(&json!({ "valid": true, "envelope": envelope }))?;
        }
        Err(e) if globals.json => output.object(&json!({
            "valid": false, "reason": e.name(), "message": e.to_string(),
        }))?,
        Ok(envelope) => {
            output.line("the envelope is valid")?;
            for (label, value) in words(envelope) {
                output.line(format_args!("{label:<15} {value}"))?;
            }
        }
        Err(e) => output.line(format_args!("the envelope is not valid: {}: {e}", e.name()))?,
    }
    output.finish()?;
    Ok(if checked.is_ok() { YES } else { NO })
}

fn words(envelope: &Envelope) -> Vec<(&'static str, String)> {
    let constraints: Vec<String> =
        envelope.constraints.iter().map(|(key, value)| format!("{key}={value}")).collect();
    vec![
        ("agent_nhi", envelope.agent_nhi.to_string()),
        ("run_id", envelope.run_id.to_string()),
        ("principal", envelope.principal.to_string()),
        ("action", envelope.action.to_string()),
        ("resource", envelope.resource.to_string()),
        ("constraints", constraints.join(" ").replace('\n', " ")),
        ("issued_at", timestamp_text(envelope.issued_at)),
        ("expires_at", timestamp_text(envelope.expires_at)),
        ("lease_id", envelope.lease_id.to_string()),
        ("issuer", envelope.issuer.to_string()),
        ("revocation_url", envelope.revocation_url.to_string()),
        ("audit_emit", envelope.audit_emit.to_string()),
    ]
}

fn keys(globals: &Globals, jwks: Option<&Path>) -> Result<Jwks, Failure> {
    let unusable = |what: &str| Failure::new("envelope", "keys_unusable", what);
    if let Some(path) = jwks {
        let bytes = read(path, MAX_JWKS + 1)?;
        return Jwks::parse(&bytes)
            .map_err(|e| unusable(&format!("{} cannot be used", path.display())).because(&e));
    }
    let host = load::host_of_state(globals)?;
    let hint = "give the issuer's published keys with --jwks";
    let key = key::load(&host.state_dir, load::credentials_directory().as_deref())
        .map_err(|e| {
            unusable("the signing key of this host cannot be used").because(&e).hint(hint)
        })?
        .ok_or_else(|| unusable("this host has signed nothing yet, and has no key").hint(hint))?;
    Ok(Jwks::of([key.public().clone()]))
}

fn read(path: &Path, most: u64) -> Result<Vec<u8>, Failure> {
    let mut bytes = Vec::new();
    let read = if path == Path::new("-") {
        io::stdin().lock().take(most).read_to_end(&mut bytes)
    } else {
        File::open(path).and_then(|file| file.take(most).read_to_end(&mut bytes))
    };
    read.map_err(|e| {
        let message = format!("cannot read {}", path.display());
        Failure::new("envelope", "file_unreadable", message).because(&e)
    })?;
    Ok(bytes)
}
