//! What a token of this issuer says: for whom it stands, whom it is for, how long, and for which lease.
#![forbid(unsafe_code)]

use std::fmt;

use jiff::Timestamp;
use serde_json::{Map, Value, json};

use super::issuer::{Issuer, IssuerError};
use super::keys::IssuerKeys;
use crate::model::id::LeaseId;
use crate::model::name::IdentityName;
use crate::model::secret::Secret;

/// `sublet:profile:PROFILE:agent:AGENT`: the same for every exec of one agent under one profile, and for
/// nothing else, so that a relying party can be told it once. What is not unreserved in a URL (RFC 3986
/// §2.3) or `/`, `@`, `+` is percent-encoded: a name cannot hold the separator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subject(String);

impl Subject {
    /// `profile`: its name, or for a file its absolute path.
    pub fn new(profile: &str, agent: &IdentityName) -> Self {
        Self(format!("sublet:profile:{}:agent:{}", encoded(profile), encoded(agent.as_str())))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn encoded(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~/@+".contains(&byte) {
            out.push(byte.into());
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

/// The acting party, RFC 8693 §4.1.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Act<'a>(pub &'a str);

/// One token, before it is signed.
#[derive(Debug, Clone)]
pub struct Assertion<'a> {
    pub subject: &'a str,
    pub audience: &'a str,
    pub actor: Act<'a>,
    pub lease_id: &'a LeaseId,
    pub issued_at: Timestamp,
    pub expires_at: Timestamp,
    /// What else it says; of [`crate::config::source::jwt::OWN_CLAIMS`] those alone that are not set here.
    pub more: Map<String, Value>,
}

impl Assertion<'_> {
    fn claims(&self, issuer: &Issuer) -> Value {
        let mut claims = self.more.clone();
        let mut set = |name: &str, value: Value| claims.insert(name.to_owned(), value);
        set("iss", json!(issuer.url));
        set("sub", self.subject.into());
        set("aud", self.audience.into());
        set("iat", self.issued_at.as_second().into());
        set("nbf", self.issued_at.as_second().into());
        set("exp", self.expires_at.as_second().into());
        set("jti", self.lease_id.as_str().into());
        set("act", json!({ "sub": self.actor.0 }));
        Value::Object(claims)
    }

    /// Signs with the key that signs now. It is read for this, and forgotten.
    pub fn sign(&self, issuer: &Issuer, keys: &IssuerKeys) -> Result<Secret, IssuerError> {
        let key = issuer.signing_key(keys, self.issued_at)?;
        Ok(key.sign(&self.claims(issuer))?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_subject_is_told_apart_from_every_other() {
        #[track_caller]
        fn check(profile: &str, agent: &str, expected: &str) {
            assert_eq!(Subject::new(profile, &agent.parse().unwrap()).as_str(), expected);
        }
        check("deploy", "ci", "sublet:profile:deploy:agent:ci");
        check("/srv/p/x.toml", "bot@x", "sublet:profile:/srv/p/x.toml:agent:bot@x");
        // With the separator as it stands these two would be one.
        check("a", "b:agent:c", "sublet:profile:a:agent:b%3Aagent%3Ac");
        check("a:agent:b", "c", "sublet:profile:a%3Aagent%3Ab:agent:c");
        check("50%", "x", "sublet:profile:50%25:agent:x");
    }
}
