//! The host's configuration, which binds every run.
#![forbid(unsafe_code)]

use std::path::Path;

use sublet::config::source::jwt::OWN_CLAIMS;
use sublet::config::{AllowPattern, HostConfig, SecretEntry, SecretSource};
use sublet::model::name::{AudienceName, CapabilityName};

use super::profile::check_place;

pub fn run(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    match HostConfig::parse(text, "sublet.toml") {
        Ok(config) => check(&config),
        Err(at) => {
            assert!(at.to_string().starts_with("sublet.toml:"));
            check_place(&at, text);
        }
    }
}

pub fn check(config: &HostConfig) {
    assert!(config.leases.default_ttl <= config.leases.max_ttl);
    let pool = config.host.uid_pool;
    assert!(pool.first >= 1000 && !pool.contains(0) && !pool.contains(65_534));
    assert!(!pool.contains(u32::MAX));
    // The last one is the broker's, and no exec's.
    assert!(pool.exec_uids() >= 1 && pool.contains(pool.broker_uid()));
    assert!(!pool.contains(pool.broker_uid() + 1));
    assert_eq!(pool.broker_uid() - pool.first, pool.exec_uids());
    assert_ne!(config.host.user.as_deref(), Some("root"));
    let host = &config.host;
    for path in config.state.dir.iter().chain(&host.workspaces).chain(&host.runtime_dir) {
        check_path(path);
    }
    for (name, secret) in &config.secrets {
        // An empty list is for what other secrets alone draw on.
        let is_named =
            |s: &SecretEntry| s.source.credentials().iter().any(|(_, other)| *other == name);
        assert!(
            !secret.allow.is_empty() || config.secrets.values().any(is_named),
            "{name} is for everyone"
        );
        secret.allow.iter().for_each(check_allow);
        match &secret.source {
            SecretSource::Vault => {}
            SecretSource::File { path } => check_path(path),
            SecretSource::Command { command, .. } => {
                assert!(Path::new(&command[0]).is_absolute());
                assert!(command.iter().all(|word| !word.contains('\0')));
            }
            SecretSource::Jwt(jwt) => {
                assert!(jwt.claims.keys().all(|name| !OWN_CLAIMS.contains(&name.as_str())));
            }
            SecretSource::SshCa(ca) => {
                assert!(!ca.principals.is_empty());
                assert!(ca.principals.iter().all(|p| !p.is_empty() && !p.contains(',')));
            }
            SecretSource::Minted(minted) => {
                for url in minted.kind.urls() {
                    assert!(
                        url.tls
                            || url.host == "localhost"
                            || url.host.parse::<std::net::IpAddr>().is_ok_and(|a| a.is_loopback())
                    );
                    assert_eq!(url.to_string().parse().as_ref(), Ok(url));
                }
            }
        }
    }
}

fn check_path(path: &Path) {
    assert!(path.is_absolute() && path.parent().is_some(), "{}", path.display());
    assert!(!path.components().any(|c| c == std::path::Component::ParentDir));
}

/// A pattern says what it says: written out it is the same pattern; without a star it takes one name.
fn check_allow(pattern: &AllowPattern) {
    let text = pattern.to_string();
    assert_eq!(text.parse::<AllowPattern>().as_ref(), Ok(pattern), "{text}");
    let (capability, audience) = text.split_once('@').expect("a pattern has two sides");
    let names = (capability.parse::<CapabilityName>(), audience.parse::<AudienceName>());
    if let (Ok(capability), Ok(audience)) = names {
        assert!(pattern.matches(&capability, &audience), "{text}");
        for other in [format!("x.{audience}"), format!("{audience}.x"), format!("x{audience}")] {
            if let Ok(other) = other.parse() {
                assert!(!pattern.matches(&capability, &other), "{text} takes {other}");
            }
        }
    }
}
