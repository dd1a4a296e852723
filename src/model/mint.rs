//! What a minter is asked for and what it answers: one message each way, in memory that the broker made
//! and wipes. Values are borrowed from there, so that reading a message makes no further copy.
//!
//! In memory: the length of the message, four bytes little-endian, then the message in postcard.
#![forbid(unsafe_code)]

use std::fmt;

use serde::{Deserialize, Serialize};

/// Room for a request: facts, and credentials of 1 MiB in all.
pub const MAX_REQUEST: usize = (1 << 20) + (64 << 10);
/// Room for an answer: a value, its parts, and what revokes it.
pub const MAX_REPLY: usize = 256 << 10;
/// The longest of what is told about a value: issuer, scope, principal, the far side's id.
pub const MAX_WORDS: usize = 512;

/// What shall be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Operation {
    /// Make a fresh value.
    Mint,
    /// Let the value of this handle live longer.
    Renew,
    /// End it.
    Revoke,
}

/// What another secret proves. The source's configuration says which secret has which role.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Role {
    ClientSecret,
    SubjectToken,
    ActorToken,
    CaKey,
    Password,
    PrivateKey,
    Token,
    SecretId,
    Jwt,
    AccessKey,
    WebIdentityToken,
}

impl Role {
    /// Whether what proves it may be a token of this host's own issuer.
    pub fn is_token(self) -> bool {
        matches!(self, Role::SubjectToken | Role::ActorToken | Role::Jwt | Role::WebIdentityToken)
    }

    /// The key of the configuration that names the secret.
    pub fn as_str(self) -> &'static str {
        match self {
            Role::ClientSecret => "client_secret",
            Role::SubjectToken => "subject_token",
            Role::ActorToken => "actor_token",
            Role::CaKey => "ca",
            Role::Password => "password",
            Role::PrivateKey => "private_key",
            Role::Token => "token",
            Role::SecretId => "secret_id",
            Role::Jwt => "jwt",
            Role::AccessKey => "access_key",
            Role::WebIdentityToken => "web_identity_token",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}`", self.as_str())
    }
}

/// Who asks, and what for: what narrows the value, and what the far side's own log is told.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Facts {
    /// The one id that joins grant, exec, `jti`, session name and the far side's log.
    pub lease_id: String,
    pub run_id: String,
    pub exec_id: String,
    pub agent: String,
    pub principal: String,
    pub capability: String,
    pub audience: String,
    /// The repository below the audience, where the profile names one.
    pub path: Option<String>,
    /// The capability's `constraints`: `action`, `resource` and the profile's own.
    pub constraints: Vec<(String, String)>,
    /// What is left of the lease.
    pub ttl_seconds: u64,
    /// The wall clock, as seconds since 1970.
    pub now: i64,
}

impl Facts {
    pub fn constraint(&self, name: &str) -> Option<&str> {
        self.constraints.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// What a placeholder `{name}` of the configuration stands for.
    pub fn word(&self, name: &str) -> Option<&str> {
        match name {
            "lease_id" => Some(&self.lease_id),
            "run_id" => Some(&self.run_id),
            "exec_id" => Some(&self.exec_id),
            "agent" => Some(&self.agent),
            "principal" => Some(&self.principal),
            "capability" => Some(&self.capability),
            "audience" => Some(&self.audience),
            // As an envelope has them.
            "action" => Some(self.constraint(name).unwrap_or(&self.capability)),
            "resource" => Some(self.constraint(name).unwrap_or(&self.audience)),
            _ => self.constraint(name),
        }
    }
}

#[derive(Serialize, Deserialize)]
pub struct Credential<'a> {
    pub role: Role,
    pub value: &'a [u8],
}

/// To the minter. Has no `Debug`: it holds credentials.
#[derive(Serialize, Deserialize)]
pub struct Request<'a> {
    pub operation: Operation,
    pub facts: Facts,
    #[serde(borrow)]
    pub credentials: Vec<Credential<'a>>,
    /// Of an earlier `Mint`, for `Renew` and `Revoke`.
    pub handle: Option<&'a [u8]>,
}

impl Request<'_> {
    pub fn credential(&self, role: Role) -> Option<&[u8]> {
        self.credentials.iter().find(|c| c.role == role).map(|c| c.value)
    }
}

/// A piece of the value under a name of its own.
#[derive(Serialize, Deserialize)]
pub struct Part<'a> {
    pub name: String,
    /// It is masked in the command's output.
    pub is_secret: bool,
    pub value: &'a [u8],
}

/// What the far side said of the value, without the value.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct About {
    pub issuer: String,
    pub scope: Option<String>,
    pub principal: Option<String>,
    /// What the far side's own log calls it.
    pub far_id: Option<String>,
    /// Milliseconds since 1970. Nothing: it was not said.
    pub expires_at: Option<i64>,
    /// Milliseconds since 1970 at which it is to be renewed, where it must be to live as long as said.
    pub renew_at: Option<i64>,
}

/// Has no `Debug`: it holds the value.
#[derive(Serialize, Deserialize)]
pub struct Fresh<'a> {
    pub value: &'a [u8],
    #[serde(borrow)]
    pub parts: Vec<Part<'a>>,
    pub about: About,
    /// What revokes it. Nothing: the far side cannot.
    pub handle: Option<&'a [u8]>,
}

/// From the minter.
#[derive(Serialize, Deserialize)]
pub enum Reply<'a> {
    #[serde(borrow)]
    Minted(Fresh<'a>),
    Renewed(About),
    Revoked,
    Failed(Failure),
}

/// Why there is nothing. Never holds what the far side said, but words of ours and its numbers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    pub fault: Fault,
    /// Whom it was about: the host, with its port where that is not the scheme's.
    pub host: Option<String>,
    pub status: Option<u16>,
    /// An error code of the protocol, if it is one that the protocol defines.
    pub code: Option<String>,
}

macro_rules! faults {
    ($($(#[$doc:meta])* $name:ident = $text:literal, $words:literal;)*) => {
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
        pub enum Fault {
            $($(#[$doc])* $name,)*
        }

        impl Fault {
            /// The name in the trail: part of the interface.
            pub fn as_str(self) -> &'static str {
                match self { $(Fault::$name => $text,)* }
            }

            fn words(self) -> &'static str {
                match self { $(Fault::$name => $words,)* }
            }
        }
    };
}

faults! {
    Unresolved = "host_unknown", "its host name has no address";
    Unreachable = "unreachable", "no connection could be made";
    Untrusted = "tls_untrusted", "its certificate is not one that this host trusts";
    Tls = "tls_failed", "no TLS session could be made";
    NoAnswer = "no_answer", "it ended the connection without a whole answer";
    TooSlow = "timed_out", "it did not answer in time";
    TooLarge = "too_large", "its answer is larger than is taken";
    Redirected = "redirected", "it answered with a redirect, which is not followed";
    Refused = "refused", "it refused";
    Broken = "server_error", "it failed";
    NotJson = "not_json", "its answer is no JSON object";
    NotXml = "not_xml", "its answer is not of the form that it must have";
    Incomplete = "incomplete", "its answer lacks what a credential needs";
    Expired = "expired", "what it issued has expired already";
    TooWide = "too_wide", "what it issued can do more than was asked for";
    Unnarrowed = "not_narrowed", "nothing says what the value is to be narrowed to";
    Credential = "bad_credential", "the secret that it is asked with is not of the form it must have";
    Settings = "bad_settings", "the configuration of the source cannot be used";
    CaFile = "ca_unreadable", "the certificates to trust could not be read";
    Walls = "unprotected", "a wall of the minter does not stand on this kernel";
    Minter = "minter_failed", "the minter failed";
}

impl Failure {
    pub fn of(fault: Fault) -> Self {
        Self { fault, host: None, status: None, code: None }
    }

    /// Whether another try, later, may end otherwise.
    pub fn may_pass(&self) -> bool {
        self.status.is_none_or(|status| status == 429 || status >= 500)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(host) = &self.host {
            write!(f, "{host}: ")?;
        }
        f.write_str(self.fault.words())?;
        match (self.status, &self.code) {
            (Some(status), Some(code)) => write!(f, " (HTTP status {status}, `{code}`)"),
            (Some(status), None) => write!(f, " (HTTP status {status})"),
            (None, Some(code)) => write!(f, " (`{code}`)"),
            (None, None) => Ok(()),
        }
    }
}

/// A message could not be laid out or read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("it is no message of this version, or does not fit")]
pub struct Malformed;

/// Lays a message into `room`.
///
/// # Errors
/// It does not fit. What was written until then is still there.
pub fn lay<T: Serialize>(message: &T, room: &mut [u8]) -> Result<(), Malformed> {
    let (head, body) = room.split_at_mut_checked(4).ok_or(Malformed)?;
    let written = postcard::to_slice(message, body).map_err(|_| Malformed)?.len();
    head.copy_from_slice(&u32::try_from(written).map_err(|_| Malformed)?.to_le_bytes());
    Ok(())
}

/// Reads the message that lies in `room`.
///
/// # Errors
/// There is none, or something follows it.
pub fn read<'a, T: Deserialize<'a>>(room: &'a [u8]) -> Result<T, Malformed> {
    let (head, body) = room.split_first_chunk::<4>().ok_or(Malformed)?;
    let len = usize::try_from(u32::from_le_bytes(*head)).map_err(|_| Malformed)?;
    match postcard::take_from_bytes(body.get(..len).ok_or(Malformed)?) {
        Ok((message, [])) => Ok(message),
        _ => Err(Malformed),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_laid_out_and_read_again() {
        let mut room = vec![0; 4096];
        assert!(read::<Reply<'_>>(&room).is_err(), "nothing was written");
        let about = About { issuer: "https://a".into(), expires_at: Some(7), ..About::default() };
        let parts = vec![Part { name: "P".into(), is_secret: true, value: b"part" }];
        let fresh = Fresh { value: b"the value", parts, about, handle: Some(b"handle") };
        lay(&Reply::Minted(fresh), &mut room).unwrap();
        let Ok(Reply::Minted(fresh)) = read(&room) else { panic!() };
        assert_eq!((fresh.value, fresh.parts[0].value), (&b"the value"[..], &b"part"[..]));
        assert_eq!((fresh.handle, fresh.about.expires_at), (Some(&b"handle"[..]), Some(7)));

        assert!(lay(&vec![0_u8; 5000], &mut room).is_err());
        for len in [0, 3, 4] {
            assert!(lay(&Reply::Revoked, &mut room[..len]).is_err(), "{len}");
        }
        room.fill(0xff);
        assert!(read::<Reply<'_>>(&room).is_err(), "longer than its room");
        lay(&Reply::Revoked, &mut room).unwrap();
        room[0] += 1;
        assert!(read::<Reply<'_>>(&room).is_err(), "something follows it");
    }

    #[test]
    fn a_failure_is_told_in_words_of_ours() {
        let failure = Failure {
            fault: Fault::Refused,
            host: Some("login.test:8443".into()),
            status: Some(401),
            code: Some("invalid_client".into()),
        };
        assert_eq!(
            failure.to_string(),
            "login.test:8443: it refused (HTTP status 401, `invalid_client`)"
        );
        assert!(!failure.may_pass() && Failure::of(Fault::Unreachable).may_pass());
    }
}
