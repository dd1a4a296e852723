//! `capability@audience` patterns: who may draw on a secret.
//!
//! Each side is a sequence of labels between dots. `*` stands for exactly one whole label, so
//! `deploy.*@*.example.com` takes `deploy.key@eu.example.com`, but neither `deploy@…`, `deploy.a.b@…`,
//! `…@example.com` nor `…@a.b.example.com`. A side that is `*` alone takes anything. The port belongs to
//! the audience: a pattern without one takes only audiences without one, and `:*` takes any port.
#![forbid(unsafe_code)]

use std::fmt;
use std::str::FromStr;

use crate::model::name::{AudienceName, CapabilityName};

/// One entry of a secret's `allow`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AllowPattern {
    capability: String,
    audience: String,
}

/// The text is no allow pattern.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is no allow pattern: {why}")]
pub struct InvalidAllow {
    text: String,
    why: String,
}

impl AllowPattern {
    pub fn matches(&self, capability: &CapabilityName, audience: &AudienceName) -> bool {
        side_matches(&self.capability, capability.as_str())
            && audience_matches(&self.audience, audience.as_str())
    }
}

fn side_matches(pattern: &str, name: &str) -> bool {
    if pattern == "*" {
        return true;
    }
    let (mut pattern, mut name) = (pattern.split('.'), name.split('.'));
    loop {
        match (pattern.next(), name.next()) {
            (None, None) => return true,
            // A name's label may be empty (`a..b` is a capability); `*` is a label that is there.
            (Some("*"), Some(label)) if !label.is_empty() => {}
            (Some(wanted), Some(label)) if wanted == label => {}
            _ => return false,
        }
    }
}

fn audience_matches(pattern: &str, audience: &str) -> bool {
    if pattern == "*" {
        return true;
    }
    let ((wanted, wanted_port), (host, port)) = (split_port(pattern), split_port(audience));
    let port_matches = match (wanted_port, port) {
        (Some("*"), Some(_)) => true,
        (wanted, given) => wanted == given,
    };
    port_matches && side_matches(wanted, host)
}

/// Host and port. The colons of a bracketed IPv6 address are not the port's.
fn split_port(text: &str) -> (&str, Option<&str>) {
    match text.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, Some(port)),
        _ => (text, None),
    }
}

impl FromStr for AllowPattern {
    type Err = InvalidAllow;
    fn from_str(text: &str) -> Result<Self, InvalidAllow> {
        let invalid = |why: &dyn fmt::Display| InvalidAllow {
            text: text.chars().take(400).map(|c| if c.is_control() { '?' } else { c }).collect(),
            why: why.to_string(),
        };
        let (capability, audience) = text
            .split_once('@')
            .ok_or_else(|| invalid(&"expected `capability@audience`, as `repo.push@github.com`"))?;
        let (host, port) = split_port(audience);
        let lone = |side: &str| side.split('.').all(|label| label == "*" || !label.contains('*'));
        if !lone(capability) || !lone(host) || port.is_some_and(|p| p != "*" && p.contains('*')) {
            return Err(invalid(
                &"a `*` must be a whole label between dots, a whole side, or a whole port",
            ));
        }
        // With every `*` filled in, each side must be a name that could be asked for.
        let filled = capability.replace('*', "x");
        filled.parse::<CapabilityName>().map_err(|e| invalid(&e))?;
        let filled = match port {
            Some(port) => format!("{}:{}", host.replace('*', "x"), port.replace('*', "1")),
            None => host.replace('*', "x"),
        };
        filled.parse::<AudienceName>().map_err(|e| invalid(&e))?;
        Ok(Self { capability: capability.to_owned(), audience: audience.to_owned() })
    }
}

impl fmt::Display for AllowPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.capability, self.audience)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_is_one_label_and_a_whole_side_is_anything() {
        #[track_caller]
        fn check(pattern: &str, asked: &str, expected: bool) {
            let (capability, audience) = asked.split_once('@').unwrap();
            let found = pattern
                .parse::<AllowPattern>()
                .unwrap()
                .matches(&capability.parse().unwrap(), &audience.parse().unwrap());
            assert_eq!(found, expected, "{pattern} {asked}");
        }
        check("repo.push@github.com", "repo.push@github.com", true);
        check("repo.push@github.com", "repo.pull@github.com", false);
        check("repo.push@github.com", "repo.push@api.github.com", false);
        check("repo.push@github.com", "repo.push@github.com:443", false);
        check("repo.push@github.com", "repo.push@github.com.evil.org", false);
        check("deploy.*@*.example.com", "deploy.key@eu.example.com", true);
        check("deploy.*@*.example.com", "deploy@eu.example.com", false);
        check("deploy.*@*.example.com", "deploy.a.b@eu.example.com", false);
        check("deploy.*@*.example.com", "deploy.key@example.com", false);
        check("deploy.*@*.example.com", "deploy.key@a.b.example.com", false);
        check("deploy.*@*.example.com", "deploy.key@evilexample.com", false);
        check("deploy.*@*.example.com", "deploy.@eu.example.com", false);
        check("db.read@db.internal:5432", "db.read@db.internal:5432", true);
        check("db.read@db.internal:5432", "db.read@db.internal:5433", false);
        check("db.read@db.internal:5432", "db.read@db.internal", false);
        check("db.read@*.internal:*", "db.read@db.internal:5433", true);
        check("db.read@*.internal:*", "db.read@db.internal", false);
        check("*@github.com", "any.thing@github.com", true);
        check("a@*", "a@db.internal:5432", true);
        check("a@*", "b@db.internal", false);
        check("a@[::1]:80", "a@[::1]:80", true);
        check("a@[::1]", "a@[::1]:80", false);
        check("a@[::1]:*", "a@[::1]:80", true);
        check("a@[::1]", "a@[::1]", true);
    }

    #[test]
    fn what_could_be_misread_is_refused() {
        for bad in [
            "",
            "repo.push",
            "@github.com",
            "repo.push@",
            "repo.*sh@h",
            "a@api-*.example.com",
            "a@**",
            "**@a",
            "a@*.com:8*",
            "a@h:0",
            "A@h",
            "a@H",
            "a@b@c",
            "a@https://h",
            "a b@h",
            "a@h\n",
            "a@*.*x",
        ] {
            assert!(bad.parse::<AllowPattern>().is_err(), "{bad:?}");
        }
    }
}
