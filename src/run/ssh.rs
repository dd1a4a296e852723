//! `ssh-ca`: the exec's own key pair and certificate, made by the broker when the exec is about to begin, and
//! once more where a lease outlives them.
#![forbid(unsafe_code)]

use std::time::Duration;

use super::entries::Leased;
use super::error::RunError;
use super::ledger::Ledger;
use super::mint::Fresh;
use super::scene::Scene;
use super::sources::unavailable;
use super::value;
use crate::config::SshCa;
use crate::launcher::client::Session;
use crate::model::mint::About;
use crate::model::moment::Moment;
use crate::source::ssh::{CaKey, Identity, Terms};

/// A certificate that is over so soon is made anew for who asks, if the lease lasts longer.
const TOO_OLD: Duration = Duration::from_secs(30);

/// A key pair that this exec logs in with.
pub struct SshIdentity {
    pub identity: Identity,
    /// The servers' keys that it may log in to, where the host names them.
    host_keys: Vec<Vec<u8>>,
    /// `CLOCK_BOOTTIME`; never beyond the lease.
    pub expires: Duration,
}

impl SshIdentity {
    /// Whether another should stand in its place, and can.
    pub fn is_too_old(&self, lease: &Leased, now: Duration) -> bool {
        let is_soon_over = self.expires.saturating_sub(now) < TOO_OLD;
        is_soon_over && lease.record.expires_boot > self.expires + Duration::from_secs(1)
    }

    /// Why a login to this server is not signed.
    pub fn objection(&self, host_key: Option<&[u8]>) -> Option<&'static str> {
        match host_key {
            _ if self.host_keys.is_empty() => None,
            None => Some(
                "the login is not bound to the server's key, which `host_keys` asks for: both sides need \
                 OpenSSH 8.9 or later",
            ),
            Some(key) if self.host_keys.iter().any(|known| known == key) => None,
            Some(_) => Some("the server has another key than `host_keys` names"),
        }
    }
}

/// # Errors
/// As a source that is not available: the CA's key is not there, or is none.
pub fn issue(
    ledger: &Ledger,
    scene: &Scene,
    session: &Session,
    lease: &Leased,
    source: &SshCa,
    now: &Moment,
) -> Result<(SshIdentity, Fresh), RunError> {
    let name = lease.grant.secret();
    let unusable = |why: String| {
        let hint = format!(
            "set it to what `ssh-keygen -t ed25519 -N ''` wrote: `sublet secret set {} < ca`",
            source.ca
        );
        unavailable(name, &format!("its CA's key `{}`: {why}", source.ca), &hint)
    };
    let Some(entry) = scene.host.config.secrets.get(&source.ca) else {
        return Err(unusable("the configuration has no such secret".to_owned()));
    };
    let file = value::credential(ledger, session, &source.ca, &entry.source)?;
    let ca = CaKey::parse(&file).map_err(|e| unusable(e.to_string()))?;
    let expires = (now.boot + source.validity.0).min(lease.record.expires_boot);
    let terms = Terms {
        key_id: lease.record.lease_id.as_str(),
        principals: &source.principals,
        force_command: source.force_command.as_deref(),
        source_address: source.source_address.as_deref(),
        extensions: &source.extensions,
        now: now.wall.as_second().unsigned_abs(),
        life: expires.saturating_sub(now.boot),
    };
    let identity = Identity::issue(&ca, &terms).map_err(|e| unusable(e.to_string()))?;
    let about = About {
        issuer: format!("SSH CA {}", ca.fingerprint()),
        scope: source.force_command.clone(),
        principal: Some(source.principals.join(",")),
        far_id: Some(format!("serial {}", identity.serial)),
        expires_at: Some(identity.valid_before.saturating_mul(1000) as i64),
        renew_at: None,
    };
    let fresh = Fresh::of_ours(&scene.exec_id, lease, about);
    Ok((SshIdentity { identity, host_keys: source.host_keys.clone(), expires }, fresh))
}
