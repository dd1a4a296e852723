//! The issuer of identities: its address, the files of its keys, how old they are, and whether what is published
//! is what signs.
#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use jiff::Timestamp;
use serde_json::Value;

use super::{Check, Places};
use crate::config::{HostConfig, SecretSource};
use crate::host::issuer_file;
use crate::identity::issuer::{IssuerKey, KeyState, key_file};
use crate::identity::keys::CREDENTIAL;
use crate::identity::{Issuer, IssuerKeys, publish};

/// A key that has signed for longer is due: nothing is known of it, but more could be.
const OLD: i64 = 365 * 24 * 3600;

pub fn examine(places: &Places) -> Vec<Check> {
    let (Some(config), Some(state_dir)) = (&places.host_config, &places.state_dir) else {
        return Vec::new();
    };
    let now = Timestamp::now();
    let issuer = match Issuer::load(state_dir) {
        Ok(Some(issuer)) => issuer,
        Ok(None) => return absent(config).into_iter().collect(),
        Err(e) => {
            return vec![Check::fail(
                "issuer",
                e.to_string(),
                "leases that need an identity are denied",
                "restore STATE/keys from a backup, or make another: sublet issuer init",
            )];
        }
    };
    let mut checks = vec![itself(&issuer, now), keys(&issuer, state_dir, now)];
    let out = config.issuer.publish.as_deref();
    checks.extend(out.map(|out| published(&issuer, out, now)));
    checks
}

/// A lack only where something needs it.
fn absent(config: &HostConfig) -> Option<Check> {
    let jwt = config.secrets.iter().find(|(_, entry)| matches!(entry.source, SecretSource::Jwt(_)));
    let wanted = match jwt {
        Some((name, _)) => format!("none, and [secrets.{name}] is its"),
        None if !config.issuer.allow.is_empty() => {
            "none, and [issuer] allow permits its".to_owned()
        }
        None => return None,
    };
    Some(Check::warn(
        "issuer",
        format!("{wanted} tokens"),
        "these leases are denied: identity_not_configured",
        "sublet issuer init --url https://…",
    ))
}

fn itself(issuer: &Issuer, now: Timestamp) -> Check {
    const NAME: &str = "issuer";
    let state = |wanted| issuer.keys(now).find(|(_, state)| *state == wanted).map(|(key, _)| key);
    let Some(signing) = state(KeyState::Signing) else {
        return Check::fail(
            NAME,
            format!("{}: no key signs at this time", issuer.url),
            "leases that need an identity are denied",
            "look at the clock, or make a key that signs at once: sublet issuer rotate --withdraw",
        );
    };
    let days = now.duration_since(signing.signs_from).as_secs() / (24 * 3600);
    let found = format!("{}: {} signs since {days} days", issuer.url, signing.kid());
    if issuer.url.as_str().starts_with("http://") {
        return Check::warn(
            NAME,
            found,
            "no relying party but this machine itself can take what it issues",
            "for tests; otherwise make one with an address of https, in another state",
        );
    }
    if days * 24 * 3600 > OLD && state(KeyState::Coming).is_none() {
        return Check::warn(
            NAME,
            found,
            "whoever has copied the key since can issue identities of this host",
            "sublet issuer rotate, then publish",
        );
    }
    Check::ok(NAME, found, "relying parties know this host by that address")
}

/// The files, by their metadata: whoever asks need not be who may read them.
fn keys(issuer: &Issuer, state_dir: &Path, now: Timestamp) -> Check {
    const NAME: &str = "issuer_keys";
    let owner = std::fs::symlink_metadata(issuer_file(state_dir)).map(|found| found.uid());
    let wanted =
        issuer.keys(now).filter(|(_, s)| matches!(s, KeyState::Signing | KeyState::Coming));
    let wanted: Vec<&IssuerKey> = wanted.map(|(key, _)| key).collect();
    let (mut faults, mut elsewhere) = (Vec::<String>::new(), Vec::<String>::new());
    for key in &wanted {
        let path = key_file(state_dir, &key.kid());
        let fault = match (std::fs::symlink_metadata(&path), &owner) {
            (Err(e), _) if e.kind() == io::ErrorKind::NotFound => {
                elsewhere.push(format!("{CREDENTIAL}{}", key.kid()));
                continue;
            }
            (Err(e), _) => e.to_string(),
            (_, Err(e)) => e.to_string(),
            (Ok(found), _) if !found.is_file() => "it is no regular file".to_owned(),
            (Ok(found), _) if found.mode() & 0o077 != 0 => {
                format!("mode {:04o}, so that others may use it", found.mode() & 0o7777)
            }
            (Ok(found), Ok(owner)) if found.uid() != *owner => {
                format!("it belongs to uid {} and the issuer to {owner}", found.uid())
            }
            (Ok(_), Ok(_)) => continue,
        };
        faults.push(format!("{}: {fault}", path.display()));
    }
    let is_owner = owner.is_ok_and(|owner| owner == rustix::process::geteuid().as_raw());
    if faults.is_empty() && is_owner && elsewhere.is_empty() {
        // Only its owner may read it, and it must be the one that is published.
        let keys = IssuerKeys::open(state_dir, None);
        let signing = keys.map_err(Into::into).and_then(|keys| issuer.signing_key(&keys, now));
        faults.extend(signing.err().map(|e| e.to_string()));
    }
    if !faults.is_empty() {
        return Check::fail(
            NAME,
            faults.join("; "),
            "they are not used, and leases that need an identity are denied; what others could read is known",
            "sublet issuer rotate --withdraw, then publish",
        );
    }
    if !elsewhere.is_empty() {
        return Check::warn(
            NAME,
            format!("not in STATE/keys: {}", elsewhere.join(", ")),
            "they sign if they are systemd credentials of these names; else leases that need one are denied",
            "see that the unit has a LoadCredential= for each, or make another: sublet issuer rotate --withdraw",
        );
    }
    let found = format!("{} of mode 0600, of the state's owner", wanted.len());
    Check::ok(NAME, found, "only the broker's user can sign for this host")
}

fn published(issuer: &Issuer, out: &Path, now: Timestamp) -> Check {
    const NAME: &str = "issuer_published";
    let read = |below: &str| -> Result<Value, String> {
        let path = out.join(below.trim_start_matches('/'));
        let text = std::fs::read(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        serde_json::from_slice(&text).map_err(|_| format!("{}: it is no JSON", path.display()))
    };
    let names = |set: &Value| -> BTreeSet<String> {
        let keys = set["keys"].as_array().into_iter().flatten();
        keys.filter_map(|key| key["kid"].as_str()).map(str::to_owned).collect()
    };
    let anew = |found: String, means: &str| {
        Check::fail(NAME, found, means.to_owned(), "sublet issuer publish, there")
    };
    let refused = "relying parties refuse this host's tokens";
    let (discovery, jwks) = match (read(publish::DISCOVERY), read(publish::JWKS)) {
        (Ok(discovery), Ok(jwks)) => (discovery, jwks),
        (Err(fault), _) | (_, Err(fault)) => return anew(fault, refused),
    };
    let place = out.display();
    if discovery != issuer.discovery() {
        return anew(format!("{place}: the discovery document is another issuer's"), refused);
    }
    let (there, right) = (names(&jwks), names(&issuer.jwks(now)));
    let known: BTreeSet<String> = issuer.keys(now).map(|(key, _)| key.kid()).collect();
    if let Some(stranger) = there.difference(&known).next() {
        return anew(
            format!("{place}: {stranger} is published, and is no key of this issuer any more"),
            "a key that was withdrawn can still sign for this host",
        );
    }
    let mut missing = issuer.keys(now).filter(|(key, _)| !there.contains(&key.kid()));
    match missing.find(|(_, state)| *state != KeyState::Over) {
        Some((key, KeyState::Coming)) => Check::warn(
            NAME,
            format!("{place}: {} is not published yet", key.kid()),
            "when it signs, relying parties will refuse this host's tokens",
            "sublet issuer publish, there",
        ),
        Some((key, _)) => anew(format!("{place}: {} is not published", key.kid()), refused),
        None if there != right => Check::warn(
            NAME,
            format!("{place}: a key that is over is still published"),
            "harmless while nobody else has it",
            "sublet issuer publish, there",
        ),
        None => Check::ok(NAME, format!("{place}: {} keys", right.len()), "it is what signs"),
    }
}
