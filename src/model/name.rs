//! Names that users write in profiles, configuration and flags. Each is parsed once, here, into a type
//! that cannot be wrong.
#![forbid(unsafe_code)]

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The text is no name of this kind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is no {kind}: {expected}")]
pub struct InvalidName {
    pub kind: &'static str,
    pub text: String,
    pub expected: &'static str,
}

macro_rules! name {
    ($(#[$doc:meta])* $name:ident, $kind:literal, $max:literal, $expected:literal, $valid:expr) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = InvalidName;
            fn from_str(text: &str) -> Result<Self, InvalidName> {
                let valid: fn(&str) -> bool = $valid;
                if !text.is_empty() && text.len() <= $max && valid(text) {
                    Ok(Self(text.to_owned()))
                } else {
                    Err(InvalidName {
                        kind: $kind,
                        text: text.chars().take(80).collect(),
                        expected: $expected,
                    })
                }
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidName;
            fn try_from(text: String) -> Result<Self, InvalidName> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

fn starts_plain(text: &str) -> bool {
    text.as_bytes()[0].is_ascii_alphanumeric()
}

name!(
    /// A narrow purpose: `repo.push`.
    CapabilityName,
    "capability name",
    64,
    "1 to 64 lower-case letters, digits, `.`, `-` or `_`, first a letter or digit",
    |t| starts_plain(t)
        && t.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'-' | b'_'))
);
name!(
    /// The one destination of a credential: `github.com`, `db.internal:5432`. Lower case, as DNS compares.
    AudienceName,
    "audience",
    260,
    "a host in lower case, optionally with `:port`",
    is_host
);
name!(
    /// A named source in the host's configuration: `github-bot`.
    SecretName,
    "secret name",
    64,
    "1 to 64 letters, digits, `.`, `-` or `_`, first a letter or digit",
    |t| starts_plain(t)
        && t.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'))
);
name!(
    /// A profile that is named, not given as a file.
    ProfileName,
    "profile name",
    64,
    "1 to 64 letters, digits, `-` or `_`, first a letter or digit",
    |t| starts_plain(t)
        && t.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
);
name!(
    /// A non-human identity, or the person who authorised it.
    IdentityName,
    "identity",
    128,
    "1 to 128 printable ASCII characters without spaces",
    |t| t.bytes().all(|b| b.is_ascii_graphic())
);
name!(
    /// An environment variable.
    VariableName,
    "variable name",
    128,
    "a letter or `_`, then letters, digits or `_`",
    |t| !t.as_bytes()[0].is_ascii_digit()
        && t.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
);
name!(
    /// What a principal may do: `repo:write`.
    Permission,
    "permission",
    128,
    "1 to 128 printable ASCII characters without spaces",
    |t| t.bytes().all(|b| b.is_ascii_graphic())
);

fn is_host(text: &str) -> bool {
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) if !host.ends_with(':') => (host, Some(port)),
        _ => (text, None),
    };
    let port_ok = port.is_none_or(|p| p.parse::<u16>().is_ok_and(|n| n > 0) && !p.starts_with('0'));
    let label = |l: &str| {
        !l.is_empty()
            && l.len() <= 63
            && l.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_'))
            && !l.starts_with('-')
            && !l.ends_with('-')
    };
    let bracketed = host
        .strip_prefix('[')
        .and_then(|h| h.strip_suffix(']'))
        .is_some_and(|h| h.parse::<std::net::Ipv6Addr>().is_ok());
    port_ok && (bracketed || (host.len() <= 253 && host.split('.').all(label)))
}

/// How a value reaches the command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Channel {
    Memfd,
    File,
    Env,
    Git,
    Token,
    Ssh,
}

impl Channel {
    pub const ALL: [Channel; 6] =
        [Channel::Memfd, Channel::File, Channel::Env, Channel::Git, Channel::Token, Channel::Ssh];

    pub fn as_str(self) -> &'static str {
        match self {
            Channel::Memfd => "memfd",
            Channel::File => "file",
            Channel::Env => "env",
            Channel::Git => "git",
            Channel::Token => "token",
            Channel::Ssh => "ssh",
        }
    }
}

impl fmt::Display for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Channel {
    type Err = InvalidName;
    fn from_str(text: &str) -> Result<Self, InvalidName> {
        Channel::ALL.into_iter().find(|c| c.as_str() == text).ok_or_else(|| InvalidName {
            kind: "channel",
            text: text.to_owned(),
            expected: "one of memfd, file, env, git, token, ssh",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check<T: FromStr>(text: &str, valid: bool) {
        assert_eq!(text.parse::<T>().is_ok(), valid, "{text:?}");
    }

    #[test]
    fn audiences_are_hosts_with_an_optional_port() {
        for good in ["github.com", "db.internal:5432", "localhost:1", "[::1]:80", "127.0.0.1"] {
            check::<AudienceName>(good, true);
        }
        for bad in [
            "",
            "GitHub.com",
            "a b",
            "host:0",
            "host:65536",
            "host:",
            "https://x",
            "x/y",
            "a..b",
            "-a.com",
            "a\n",
            "[::1",
            "user@host",
            "x:080",
        ] {
            check::<AudienceName>(bad, false);
        }
    }

    #[test]
    fn variables_and_capabilities() {
        check::<VariableName>("GITHUB_TOKEN", true);
        for bad in ["1X", "A-B", "A=B", ""] {
            check::<VariableName>(bad, false);
        }
        check::<CapabilityName>("repo.push", true);
        for bad in ["Repo", ".x", "a b", "a@b"] {
            check::<CapabilityName>(bad, false);
        }
    }
}
