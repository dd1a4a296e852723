//! The issuer: its address, its keys, and when each does what.
//!
//! A key is published as soon as it is made, signs from `signs_from` on, until the next one does, and stays
//! published until the last token that it signed has expired. So a relying party that reads the key set now
//! and then knows every key before it meets its first token.
//!
//! What is public stands in `STATE/keys/issuer.json`, replaced whole; each private key in a file of its own.
#![forbid(unsafe_code)]

use std::fs::OpenOptions;
use std::io::{self, Read as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::key::{self, KeyError, PublicKey, SigningKey};
use super::keys::IssuerKeys;
use crate::host::issuer_file;
use crate::host::keyfile::{self, KeyFileError};

/// The longest that a token lives, whatever is configured: so long a key stays published after its last.
pub const MAX_TOKEN_TTL: Duration = Duration::from_secs(3600);
/// What clocks of relying parties may be wrong by.
const SKEW: Duration = Duration::from_secs(300);
/// How long a new key is published before it signs, unless `rotate --lead` says otherwise: as long as
/// relying parties keep a key set at most.
pub const DEFAULT_LEAD: Duration = Duration::from_secs(24 * 3600);
/// Keys at once: more is a rotation that runs wild.
pub(super) const MOST_KEYS: usize = 16;
/// The largest `issuer.json`.
const MAX_FILE: u64 = 256 << 10;

pub(super) const IF_UNSAFE: &str = "take it to be known to others: `sublet issuer rotate --withdraw` makes another \
                         and publishes this one no longer";

#[derive(Debug, thiserror::Error)]
pub enum IssuerError {
    #[error("this host has no identity issuer")]
    Absent,
    #[error("this host has an issuer already: {0}")]
    Exists(String),
    #[error("cannot read the issuer {path}")]
    Read { path: PathBuf, source: io::Error },
    #[error("the issuer {path} is not one: {why}")]
    Damaged { path: PathBuf, why: String },
    #[error("cannot write the issuer {path}")]
    Write { path: PathBuf, source: io::Error },
    #[error("the issuer has {0} keys already, and the oldest is still published")]
    TooManyKeys(usize),
    #[error("no key of the issuer signs at this time: the clock may stand wrong")]
    NoKeySigns,
    #[error("the key {kid} is not the one that is published under that name")]
    OtherKey { kid: String },
    #[error(transparent)]
    File(#[from] KeyFileError),
    #[error(transparent)]
    Key(#[from] KeyError),
}

/// Where relying parties find the issuer: `iss` of every token. OpenID Connect Discovery §3.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct IssuerUrl(String);

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "an issuer is `https://HOST[:PORT][/PATH]` without a `/` at its end, user, query or fragment; \
     `http` for a loopback address alone"
)]
pub struct InvalidUrl;

impl FromStr for IssuerUrl {
    type Err = InvalidUrl;

    fn from_str(text: &str) -> Result<Self, InvalidUrl> {
        let (scheme, rest) = text.split_once("://").ok_or(InvalidUrl)?;
        let (host, path) = rest.split_once('/').map_or((rest, None), |(h, p)| (h, Some(p)));
        let audience = host.parse::<crate::model::name::AudienceName>().map_err(|_| InvalidUrl)?;
        let name = audience.as_str();
        let name = match name.rsplit_once(':') {
            Some((name, port)) if !port.ends_with(']') => name,
            _ => name,
        };
        let is_loopback = matches!(name, "localhost" | "127.0.0.1" | "[::1]");
        let plain = |part: &str| {
            !matches!(part, "" | "." | "..")
                && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._~@+".contains(&b))
        };
        let is_sound = match scheme {
            "https" => true,
            "http" => is_loopback,
            _ => false,
        } && path.is_none_or(|path| path.split('/').all(plain))
            && text.len() <= 512;
        if is_sound { Ok(Self(text.to_owned())) } else { Err(InvalidUrl) }
    }
}

impl TryFrom<String> for IssuerUrl {
    type Error = InvalidUrl;
    fn try_from(text: String) -> Result<Self, InvalidUrl> {
        text.parse()
    }
}

impl From<IssuerUrl> for String {
    fn from(url: IssuerUrl) -> String {
        url.0
    }
}

impl std::fmt::Display for IssuerUrl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl IssuerUrl {
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// What lies below the host: empty, or `/PATH`.
    pub fn path(&self) -> &str {
        let after = self.0.find("://").map_or(0, |at| at + 3);
        self.0[after..].find('/').map_or("", |at| &self.0[after + at..])
    }
}

/// One key, without its private half.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IssuerKey {
    pub(super) public: PublicKey,
    pub created_at: Timestamp,
    pub signs_from: Timestamp,
}

impl IssuerKey {
    pub fn kid(&self) -> String {
        self.public.kid()
    }
}

/// What a key is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum KeyState {
    /// Published, and not signing yet.
    Coming,
    Signing,
    /// Published, and signing no more.
    Leaving,
    /// Neither.
    Over,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Issuer {
    pub(super) version: u32,
    pub url: IssuerUrl,
    /// By `signs_from`.
    pub(super) keys: Vec<IssuerKey>,
}

impl Issuer {
    /// The issuer of this state, if it has one.
    ///
    /// Holds nothing secret, and takes nothing that another kind of file at its place could lead to: root
    /// may read it where the state is another user's.
    pub fn load(state_dir: &Path) -> Result<Option<Self>, IssuerError> {
        let path = issuer_file(state_dir);
        let unreadable = |source| IssuerError::Read { path: path.clone(), source };
        let damaged = |why: &str| IssuerError::Damaged { path: path.clone(), why: why.to_owned() };
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_CLOEXEC;
        let file = match OpenOptions::new().read(true).custom_flags(flags).open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(unreadable(source)),
        };
        if !file.metadata().map_err(unreadable)?.is_file() {
            return Err(damaged("it is no regular file"));
        }
        let mut text = Vec::new();
        file.take(MAX_FILE + 1).read_to_end(&mut text).map_err(unreadable)?;
        if text.len() as u64 > MAX_FILE {
            return Err(damaged("it is too large"));
        }
        // No error of the parser is shown: it would quote what lies there.
        let issuer: Self =
            serde_json::from_slice(&text).map_err(|_| damaged("it does not parse"))?;
        if issuer.version != 1 {
            return Err(damaged("another version of sublet wrote it"));
        }
        if issuer.keys.is_empty() || !issuer.keys.iter().all(|key| key.public.is_sound()) {
            return Err(damaged("it has no key, or one that is no RSA key of 2048 bits and more"));
        }
        Ok(Some(issuer))
    }

    /// As [`Issuer::load`], where there must be one.
    pub fn get(state_dir: &Path) -> Result<Self, IssuerError> {
        Self::load(state_dir)?.ok_or(IssuerError::Absent)
    }

    /// Every key with what it is doing, oldest first.
    pub fn keys(&self, now: Timestamp) -> impl Iterator<Item = (&IssuerKey, KeyState)> {
        self.keys.iter().map(move |key| (key, self.state_of(key, now)))
    }

    /// When a key is published no longer, if that is known.
    pub fn published_until(&self, key: &IssuerKey) -> Option<Timestamp> {
        self.next_of(key).map(|next| after(next.signs_from, MAX_TOKEN_TTL + SKEW))
    }

    fn next_of(&self, key: &IssuerKey) -> Option<&IssuerKey> {
        self.keys.iter().skip_while(|k| *k != key).nth(1)
    }

    pub(super) fn state_of(&self, key: &IssuerKey, now: Timestamp) -> KeyState {
        let replaced = self.next_of(key).is_some_and(|next| next.signs_from <= now);
        match self.published_until(key) {
            _ if key.signs_from > now => KeyState::Coming,
            Some(until) if replaced && until <= now => KeyState::Over,
            _ if replaced => KeyState::Leaving,
            _ => KeyState::Signing,
        }
    }

    /// The key that signs now, loaded; it must be the one that is published under its name.
    pub fn signing_key(
        &self,
        keys: &IssuerKeys,
        now: Timestamp,
    ) -> Result<SigningKey, IssuerError> {
        let (key, _) = self
            .keys(now)
            .find(|(_, state)| *state == KeyState::Signing)
            .ok_or(IssuerError::NoKeySigns)?;
        let kid = key.kid();
        let signing = SigningKey::from_pkcs8(&keys.load(&kid)?)?;
        if signing.kid() != kid {
            return Err(IssuerError::OtherKey { kid });
        }
        Ok(signing)
    }

    pub fn jwks_uri(&self) -> String {
        format!("{}{}", self.url, super::publish::JWKS)
    }

    /// OpenID Connect Discovery §3, the required members that an issuer without logins has.
    pub fn discovery(&self) -> Value {
        json!({
            "issuer": self.url,
            "jwks_uri": self.jwks_uri(),
            "response_types_supported": ["id_token"],
            "subject_types_supported": ["public"],
            "id_token_signing_alg_values_supported": [key::ALGORITHM],
        })
    }

    /// The keys that tokens may be verified with now. RFC 7517 §5.
    pub fn jwks(&self, now: Timestamp) -> Value {
        let published = self.keys(now).filter(|(_, state)| *state != KeyState::Over);
        json!({ "keys": published.map(|(key, _)| key.public.jwk()).collect::<Vec<_>>() })
    }
}

pub(super) fn after(time: Timestamp, span: Duration) -> Timestamp {
    let span = SignedDuration::try_from(span).unwrap_or(SignedDuration::MAX);
    time.checked_add(span).unwrap_or(Timestamp::MAX)
}

/// Where the private half of a key lies.
pub fn key_file(state_dir: &Path, kid: &str) -> PathBuf {
    state_dir.join(keyfile::DIRECTORY).join(file_name(kid))
}

pub(super) fn file_name(kid: &str) -> String {
    format!("issuer-{kid}.key")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::change;

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    fn kids(jwks: &Value) -> Vec<String> {
        let keys = jwks["keys"].as_array().unwrap();
        keys.iter().map(|k| k["kid"].as_str().unwrap().to_owned()).collect()
    }

    #[test]
    fn issuers_are_https_and_have_no_trailing_slash() {
        #[track_caller]
        fn check(text: &str, path: Option<&str>) {
            let parsed = text.parse::<IssuerUrl>().ok();
            assert_eq!(parsed.as_ref().map(IssuerUrl::path), path, "{text}");
        }
        check("https://id.example.com", Some(""));
        check("https://id.example.com:8443/hosts/one", Some("/hosts/one"));
        check("http://127.0.0.1:8080", Some(""));
        check("http://localhost/x", Some("/x"));
        for bad in [
            "http://id.example.com",
            "https://id.example.com/",
            "https://id.example.com/a//b",
            "https://id.example.com/a/../b",
            "https://id.example.com?x",
            "https://id.example.com/#x",
            "https://me@id.example.com",
            "https://ID.example.com",
            "ftp://id.example.com",
            "id.example.com",
            "https://",
            "https://a b",
        ] {
            check(bad, None);
        }
    }

    #[test]
    fn a_new_key_is_published_before_it_signs_and_the_old_one_until_its_tokens_are_over() {
        let dir = tempfile::tempdir().unwrap();
        let start = at("2026-11-27T00:00:00Z");
        let url = "https://id.example.com".parse::<IssuerUrl>().unwrap();
        let issuer = change::init(dir.path(), url.clone(), start).unwrap().publish().unwrap();
        let first = kids(&issuer.jwks(start))[0].clone();
        assert!(matches!(change::init(dir.path(), url, start), Err(IssuerError::Exists(_))));

        let lead = Duration::from_secs(24 * 3600);
        let issuer = change::rotate(dir.path(), lead, start).unwrap().publish().unwrap();
        let signs = |issuer: &Issuer, now: &str| {
            issuer
                .signing_key(&IssuerKeys::open(dir.path(), None).unwrap(), at(now))
                .unwrap()
                .kid()
                .to_owned()
        };
        let published = kids(&issuer.jwks(start));
        assert_eq!(published.len(), 2);
        let second = published.iter().find(|kid| **kid != first).unwrap().clone();
        assert_eq!(signs(&issuer, "2026-11-27T23:59:59Z"), first);
        assert_eq!(signs(&issuer, "2026-11-28T00:00:00Z"), second);
        // Tokens of the first may live for an hour from then, and clocks be wrong by five minutes.
        assert_eq!(kids(&issuer.jwks(at("2026-11-28T01:04:59Z"))).len(), 2);
        assert_eq!(kids(&issuer.jwks(at("2026-11-28T01:05:00Z"))), std::slice::from_ref(&second));

        // What is over is gone for good at the next rotation, its private half too.
        let file = |kid: &str| dir.path().join("keys").join(file_name(kid));
        assert!(file(&first).exists());
        let issuer = change::rotate(dir.path(), lead, at("2026-11-29T00:00:00Z"))
            .unwrap()
            .publish()
            .unwrap();
        assert!(!file(&first).exists() && file(&second).exists());
        assert_eq!(issuer.keys.len(), 2);

        let issuer =
            change::withdraw(dir.path(), at("2026-11-29T00:00:01Z")).unwrap().publish().unwrap();
        let now = at("2026-11-29T00:00:01Z");
        assert_eq!(kids(&issuer.jwks(now)).len(), 1);
        assert!(!file(&second).exists());
        assert_eq!(signs(&issuer, "2026-11-29T00:00:01Z"), kids(&issuer.jwks(now))[0]);
    }

    #[test]
    fn a_key_that_others_could_read_or_that_is_another_does_not_sign() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let now = at("2026-11-27T00:00:00Z");
        let issuer = change::init(dir.path(), "https://id.example.com".parse().unwrap(), now)
            .unwrap()
            .publish()
            .unwrap();
        let path = dir.path().join("keys").join(file_name(&kids(&issuer.jwks(now))[0]));
        issuer.signing_key(&IssuerKeys::open(dir.path(), None).unwrap(), now).unwrap();
        let mode = |mode| std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode));
        mode(0o640).unwrap();
        assert!(matches!(
            issuer.signing_key(&IssuerKeys::open(dir.path(), None).unwrap(), now),
            Err(IssuerError::File(KeyFileError::Unsafe { .. }))
        ));
        mode(0o600).unwrap();
        let (other, _) = key::generate().unwrap();
        std::fs::write(&path, other.expose()).unwrap();
        assert!(matches!(
            issuer.signing_key(&IssuerKeys::open(dir.path(), None).unwrap(), now),
            Err(IssuerError::OtherKey { .. })
        ));
        std::fs::write(&path, b"no key").unwrap();
        assert!(matches!(
            issuer.signing_key(&IssuerKeys::open(dir.path(), None).unwrap(), now),
            Err(IssuerError::Key(_))
        ));
    }

    #[test]
    fn a_key_may_be_a_credential_of_systemd_and_then_needs_no_file() {
        use std::os::unix::fs::PermissionsExt as _;
        let (dir, credentials) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let now = at("2026-11-27T00:00:00Z");
        let url = "https://id.example.com".parse().unwrap();
        let issuer = change::init(dir.path(), url, now).unwrap().publish().unwrap();
        let kid = kids(&issuer.jwks(now))[0].clone();
        let given = credentials.path().join(format!("{}{kid}", crate::identity::keys::CREDENTIAL));
        std::fs::rename(key_file(dir.path(), &kid), &given).unwrap();
        let mode = |mode| {
            std::fs::set_permissions(&given, std::fs::Permissions::from_mode(mode)).unwrap();
        };
        let open = || IssuerKeys::open(dir.path(), Some(credentials.path()));
        mode(0o400);
        assert_eq!(issuer.signing_key(&open().unwrap(), now).unwrap().kid(), kid);
        // It stays open where its directory can no longer be reached.
        let (keys, away) = (open().unwrap(), dir.path().join("away"));
        std::fs::rename(&given, &away).unwrap();
        issuer.signing_key(&keys, now).unwrap();
        std::fs::rename(&away, &given).unwrap();
        let none = IssuerKeys::open(dir.path(), None).unwrap();
        assert!(matches!(
            issuer.signing_key(&none, now),
            Err(IssuerError::File(KeyFileError::Absent { .. } | KeyFileError::Read { .. }))
        ));
        mode(0o404);
        assert!(matches!(open(), Err(KeyFileError::Unsafe { .. })));
        mode(0o400);
        let (other, _) = key::generate().unwrap();
        mode(0o600);
        std::fs::write(&given, other.expose()).unwrap();
        assert!(matches!(
            issuer.signing_key(&open().unwrap(), now),
            Err(IssuerError::OtherKey { .. })
        ));
    }

    #[test]
    fn what_is_no_issuer_is_refused_and_not_quoted() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Issuer::load(dir.path()).unwrap().is_none());
        std::fs::create_dir(dir.path().join("keys")).unwrap();
        let path = issuer_file(dir.path());
        #[track_caller]
        fn check(dir: &Path) {
            let error = Issuer::load(dir).unwrap_err();
            assert!(!error.to_string().contains("hunter2"), "{error}");
        }
        std::fs::write(&path, r#"{"version":1,"url":"https://x","keys":[],"hunter2":1}"#).unwrap();
        check(dir.path());
        std::fs::write(&path, r#"{"version":1,"url":"https://x","keys":[]}"#).unwrap();
        check(dir.path());
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", &path).unwrap();
        check(dir.path());
    }
}
