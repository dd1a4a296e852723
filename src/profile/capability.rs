//! Capabilities as a profile declares them, and where each channel puts a value.
//!
//! These are made by the profile's parser alone, which has checked that every declared channel can
//! deliver every declared audience.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fmt;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::model::moment::Span;
use crate::model::name::{
    AudienceName, CapabilityName, Channel, InvalidName, Permission, SecretName, VariableName,
};
use crate::profile::command::CommandPattern;
use crate::profile::identity::{Identity, IdentityKind};

/// Where files of the `file` channel are, inside an exec; also `$CREDENTIALS_DIRECTORY`.
pub const SECRETS_DIRECTORY: &str = "/run/sublet/secrets";

/// One `[[capability]]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub struct Capability {
    pub name: CapabilityName,
    /// What the principal must hold; nothing if everyone may ask.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub permission: Option<Permission>,
    /// Never empty, no channel twice. The first is what a request without a channel gets.
    pub channels: Vec<Channel>,
    /// The most that may be asked for, below the host's `leases.max_ttl`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ttl: Option<Span>,
    /// The most that may be asked for.
    pub uses: NonZeroU32,
    pub renewable: bool,
    /// Never empty.
    pub command: Vec<CommandPattern>,
    pub redact: bool,
    pub on_revoke: OnRevoke,
    /// Carried by the envelope, not judged here.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub constraints: BTreeMap<String, String>,
    /// Never empty, no audience twice.
    #[serde(rename = "audience")]
    pub audiences: Vec<Audience>,
}

impl Capability {
    /// Some pattern is `["**"]`: the capability is not pinned to commands.
    pub fn is_any_command(&self) -> bool {
        self.command.iter().any(CommandPattern::is_any)
    }

    pub fn audience(&self, name: &AudienceName) -> Option<&Audience> {
        self.audiences.iter().find(|a| a.host == *name)
    }

    /// Every variable that some channel of this capability sets. Reserved in every exec of the profile.
    pub fn delivered_variables(&self) -> impl Iterator<Item = VariableName> + '_ {
        self.audiences
            .iter()
            .flat_map(move |a| self.channels.iter().filter_map(move |&c| a.place(c)))
            .filter_map(|place| place.variable().cloned())
            .chain(self.aws_variables())
    }

    /// Those beyond the one that stands for the delivery.
    fn aws_variables(&self) -> impl Iterator<Item = VariableName> + use<> {
        let is_aws = |audience: &Audience| audience.format == Some(Format::Aws);
        let on_env = self.channels.contains(&Channel::Env) && self.audiences.iter().any(is_aws);
        let names = AWS_VARIABLES.iter().filter(move |_| on_env).skip(1);
        names.filter_map(|(name, _)| name.parse().ok())
    }
}

/// What happens to an exec whose lease is revoked or expires under it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnRevoke {
    /// The delivery is wiped and the exec killed.
    #[default]
    Kill,
    /// The delivery is wiped, the exec goes on.
    Wipe,
}

/// The one destination that a value is for, and how the value is presented there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Audience {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub protocol: Option<Protocol>,
    pub host: AudienceName,
    /// Git: the repository below the host, without a leading `/`. Nothing: any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<RepositoryPath>,
    pub secret: SecretName,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub username: Option<Username>,
    /// As written. What is delivered under which name is [`Audience::place`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub variable: Option<VariableName>,
    /// Channel `token`: for whose client libraries.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub identity: Option<Identity>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format: Option<Format>,
}

/// The variable by which SSH finds its agent.
pub const SSH_AGENT: &str = "SSH_AUTH_SOCK";

/// What an audience of the `token` channel draws on that names no secret: the issuer itself. No secret of
/// a configuration need have that name.
pub const ISSUER: &str = "sublet.issuer";

/// How a value of several parts is presented.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// An AWS credential: on `env` the three variables that every SDK knows, on `file` the object that
    /// `credential_process` prints.
    Aws,
    /// An AWS credential that the command asks for: at an address of its own loopback, with the token in a file.
    /// On `file` alone.
    #[serde(rename = "aws-endpoint")]
    AwsEndpoint,
}

/// What the container-credentials provider of AWS's SDKs reads.
pub const AWS_ENDPOINT_TOKEN: &str = "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE";
pub const AWS_ENDPOINT_URI: &str = "AWS_CONTAINER_CREDENTIALS_FULL_URI";

/// What an AWS credential is on `env`, and the parts that these variables carry.
pub const AWS_VARIABLES: [(&str, &str); 3] = [
    ("AWS_ACCESS_KEY_ID", "AccessKeyId"),
    ("AWS_SECRET_ACCESS_KEY", "SecretAccessKey"),
    ("AWS_SESSION_TOKEN", "SessionToken"),
];

impl Audience {
    /// Whether it draws on the issuer itself.
    pub fn is_issuers(&self) -> bool {
        self.secret.as_str() == ISSUER
    }

    pub fn identity_kind(&self) -> IdentityKind {
        self.identity.as_ref().map_or_else(IdentityKind::default, |identity| identity.kind)
    }

    /// What the credential helper answers: `username`, else the name that hosts accept with any token.
    pub fn git_username(&self) -> &str {
        self.username.as_ref().map_or("x-access-token", Username::as_str)
    }

    /// `variable`, else the secret's name in upper case with `_` for what no variable may hold.
    pub fn delivery_name(&self) -> Option<VariableName> {
        if let Some(variable) = &self.variable {
            return Some(variable.clone());
        }
        let derived =
            |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' };
        self.secret.as_str().chars().map(derived).collect::<String>().parse().ok()
    }

    /// Where `channel` puts the value. Nothing only if no name can be derived, which no declared
    /// channel of a parsed profile comes to.
    pub fn place(&self, channel: Channel) -> Option<Place> {
        let suffixed = |name: &VariableName, suffix: &str| format!("{name}{suffix}").parse().ok();
        match channel {
            Channel::Env => match self.format {
                None => Some(Place::Env { variable: self.delivery_name()? }),
                Some(Format::AwsEndpoint) => None,
                Some(Format::Aws) => {
                    Some(Place::Env { variable: AWS_VARIABLES[0].0.parse().ok()? })
                }
            },
            Channel::File => {
                let name = self.delivery_name()?;
                Some(Place::File {
                    path: Path::new(SECRETS_DIRECTORY).join(name.as_str()),
                    variable: match self.format {
                        Some(Format::AwsEndpoint) => AWS_ENDPOINT_TOKEN.parse().ok()?,
                        None | Some(Format::Aws) => suffixed(&name, "_FILE")?,
                    },
                    name,
                })
            }
            Channel::Memfd | Channel::Git if self.format == Some(Format::AwsEndpoint) => None,
            Channel::Memfd => {
                Some(Place::Memfd { variable: suffixed(&self.delivery_name()?, "_FD")? })
            }
            Channel::Git => Some(Place::Git),
            Channel::Token => Some(Place::Token { kind: self.identity_kind() }),
            Channel::Ssh => Some(Place::Ssh { variable: SSH_AGENT.parse().ok()? }),
        }
    }
}

/// Where the command finds a value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// The value itself is in `variable`.
    Env { variable: VariableName },
    /// The value is the file `path`, whose last part is `name`; `variable` holds the path.
    File { name: VariableName, path: PathBuf, variable: VariableName },
    /// `variable` holds the number of the descriptor.
    Memfd { variable: VariableName },
    /// Git asks its helper.
    Git,
    /// The workload identity's own file.
    Token { kind: IdentityKind },
    /// An agent's socket, which `variable` names.
    Ssh { variable: VariableName },
}

impl Place {
    /// The variable that the delivery sets.
    pub fn variable(&self) -> Option<&VariableName> {
        match self {
            Place::Env { variable }
            | Place::File { variable, .. }
            | Place::Memfd { variable }
            | Place::Ssh { variable } => Some(variable),
            Place::Git | Place::Token { .. } => None,
        }
    }
}

macro_rules! text {
    ($(#[$doc:meta])* $name:ident, $kind:literal, $expected:literal, $valid:expr) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
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
                if valid(text) {
                    return Ok(Self(text.to_owned()));
                }
                let shown = text.chars().take(80).map(|c| if c.is_control() { '?' } else { c });
                Err(InvalidName { kind: $kind, text: shown.collect(), expected: $expected })
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidName;
            fn try_from(text: String) -> Result<Self, InvalidName> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(text: $name) -> String {
                text.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

text!(
    /// What is spoken to the audience: `https`, `postgresql`. RFC 3986 §3.1, in lower case.
    Protocol,
    "protocol",
    "a scheme in lower case, as `https`",
    |t| t.len() <= 32
        && t.starts_with(|c: char| c.is_ascii_lowercase())
        && t.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'+' | b'-' | b'.'))
);
text!(
    /// A repository below its host: `acme/insights.git`. It crosses git's credential protocol, whose
    /// lines end with LF.
    RepositoryPath,
    "repository path",
    "as in `acme/insights.git`: no leading or trailing `/`, no empty part, no `.`, `..` or control characters",
    |t| !t.is_empty()
        && t.len() <= 1024
        && !t.chars().any(char::is_control)
        && t.split('/').all(|part| !matches!(part, "" | "." | ".."))
);
text!(
    /// The user name that goes with the value. It crosses git's credential protocol.
    Username,
    "user name",
    "1 to 256 characters, none of them a control character",
    |t| !t.is_empty() && t.len() <= 256 && !t.chars().any(char::is_control)
);

impl Protocol {
    /// The two that git's credential helper serves.
    pub fn is_http(&self) -> bool {
        matches!(self.0.as_str(), "https" | "http")
    }
}
