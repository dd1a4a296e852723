//! `[secrets.NAME]` as written. Every key of every kind is known here, so that one that belongs to another
//! kind is told from one that does not exist; each kind takes its own, and what is left is an error.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use toml::Spanned;

use super::url::HttpUrl;
use super::{
    AwsSts, GithubApp, Jwt, MAX_TIMEOUT, MintKind, Minted, OAuth, PostgresRole, SOURCE_TIMEOUT,
    SecretSource, SshCa, VaultServer,
};
use crate::config::parse::{At, Checked};
use crate::model::moment::Span;
use crate::model::name::SecretName;

/// One word, or several.
#[derive(Deserialize)]
#[serde(untagged)]
pub enum Words {
    One(String),
    Several(Vec<String>),
}

impl From<Words> for Vec<String> {
    fn from(words: Words) -> Self {
        match words {
            Words::One(word) => vec![word],
            Words::Several(words) => words,
        }
    }
}

/// A word that may be written as a number.
#[derive(Deserialize)]
#[serde(untagged)]
pub enum Word {
    Text(String),
    Number(u64),
}

impl From<Word> for String {
    fn from(word: Word) -> Self {
        match word {
            Word::Text(text) => text,
            Word::Number(number) => number.to_string(),
        }
    }
}

macro_rules! keys {
    ($($key:ident: $type:ty,)*) => {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        pub(in crate::config) struct RawSecret {
            pub source: RawSource,
            pub allow: Option<Spanned<Vec<Spanned<String>>>>,
            $(pub $key: Option<Spanned<$type>>,)*
        }

        impl RawSecret {
            /// The first key that its kind did not take.
            fn left(&self) -> Option<(&'static str, Range<usize>)> {
                $(if let Some(value) = &self.$key {
                    return Some((stringify!($key), value.span()));
                })*
                None
            }
        }
    };
}

keys! {
    path: String,
    command: Vec<String>,
    timeout: Span,
    ca_file: PathBuf,
    token_url: String,
    revocation_url: String,
    client_id: String,
    client_secret: SecretName,
    client_auth: String,
    grant: String,
    scope: String,
    audience: Words,
    resource: Words,
    authorization_details: String,
    subject_token: SecretName,
    subject_token_type: String,
    actor_token: SecretName,
    actor_token_type: String,
    requested_token_type: String,
    ttl: Span,
    claims: BTreeMap<String, Spanned<String>>,
    ca: SecretName,
    principals: Words,
    force_command: String,
    source_address: String,
    extensions: Words,
    validity: Span,
    host_keys: Words,
    server: String,
    database: String,
    user: String,
    password: SecretName,
    grants: Words,
    tls: String,
    reassign_to: String,
    app_id: Word,
    private_key: SecretName,
    installation_id: Word,
    api_url: String,
    repositories: Words,
    permissions: BTreeMap<String, String>,
    url: String,
    namespace: String,
    engine: String,
    mount: String,
    field: String,
    auth: String,
    auth_mount: String,
    role: String,
    role_id: String,
    secret_id: SecretName,
    token: SecretName,
    jwt: SecretName,
    role_arn: String,
    region: String,
    endpoint: String,
    policy: String,
    access_key: SecretName,
    web_identity_token: SecretName,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(in crate::config) enum RawSource {
    Vault,
    File,
    Command,
    Jwt,
    SshCa,
    PostgresRole,
    #[serde(rename = "oauth")]
    OAuth,
    GithubApp,
    VaultServer,
    AwsSts,
}

impl At<'_> {
    pub(in crate::config) fn source(
        &self,
        name: &SecretName,
        raw: &mut RawSecret,
        whole: &Range<usize>,
    ) -> Checked<SecretSource> {
        let source = match raw.source {
            RawSource::Vault => SecretSource::Vault,
            RawSource::File => {
                let path = self.needed(name, "path", raw.path.take(), whole)?;
                let path = Spanned::new(path.span(), PathBuf::from(path.into_inner()));
                SecretSource::File { path: self.absolute(path, &format!("secrets.{name}.path"))? }
            }
            RawSource::Command => self.command(name, raw, whole)?,
            RawSource::Jwt => SecretSource::Jwt(Jwt::take(self, raw)?),
            RawSource::SshCa => SecretSource::SshCa(SshCa::take(self, name, raw, whole)?),
            RawSource::PostgresRole => {
                let kind = MintKind::PostgresRole(PostgresRole::take(self, name, raw, whole)?);
                self.minted(name, raw, kind)?
            }
            RawSource::OAuth => {
                let kind = MintKind::OAuth(OAuth::take(self, name, raw, whole)?);
                self.minted(name, raw, kind)?
            }
            RawSource::GithubApp => {
                let kind = MintKind::GithubApp(GithubApp::take(self, name, raw, whole)?);
                self.minted(name, raw, kind)?
            }
            RawSource::VaultServer => {
                let kind = MintKind::VaultServer(VaultServer::take(self, name, raw, whole)?);
                self.minted(name, raw, kind)?
            }
            RawSource::AwsSts => {
                let kind = MintKind::AwsSts(AwsSts::take(self, name, raw, whole)?);
                self.minted(name, raw, kind)?
            }
        };
        if let Some((key, span)) = raw.left() {
            let message = format!("`{key}` has no meaning for source `{}`", source.as_str());
            return Err(self.at(span, message));
        }
        Ok(source)
    }

    fn command(
        &self,
        name: &SecretName,
        raw: &mut RawSecret,
        whole: &Range<usize>,
    ) -> Checked<SecretSource> {
        let command = self.needed(name, "command", raw.command.take(), whole)?;
        let words = command.get_ref();
        if !words.first().is_some_and(|program| Path::new(program).is_absolute()) {
            return Err(self.at(
                command.span(),
                format!(
                    "`secrets.{name}.command` must begin with an absolute path; there is no shell"
                ),
            ));
        }
        if words.iter().any(|word| word.contains('\0')) {
            return Err(self.at(command.span(), "an argument cannot hold a NUL"));
        }
        let timeout = self.timeout(raw)?;
        Ok(SecretSource::Command { command: command.into_inner(), timeout })
    }

    /// What all minted sources have in common.
    fn minted(
        &self,
        name: &SecretName,
        raw: &mut RawSecret,
        kind: MintKind,
    ) -> Checked<SecretSource> {
        let timeout = self.timeout(raw)?.0;
        let ca_file = raw
            .ca_file
            .take()
            .map(|path| self.absolute(path, &format!("secrets.{name}.ca_file")))
            .transpose()?;
        Ok(SecretSource::Minted(Box::new(Minted { timeout, ca_file, kind })))
    }

    fn timeout(&self, raw: &mut RawSecret) -> Checked<Span> {
        match raw.timeout.take() {
            None => Ok(SOURCE_TIMEOUT),
            Some(given) if *given.get_ref() > MAX_TIMEOUT => {
                Err(self.at(given.span(), format!("a source has at most {MAX_TIMEOUT}")))
            }
            Some(given) => Ok(given.into_inner()),
        }
    }

    /// # Errors
    /// The key is not there.
    pub(in crate::config) fn needed<T>(
        &self,
        name: &SecretName,
        key: &str,
        value: Option<Spanned<T>>,
        whole: &Range<usize>,
    ) -> Checked<Spanned<T>> {
        let shown = match key {
            "path" => "\"/…\"",
            "command" => "[\"/path/to/program\", …]",
            _ if key.ends_with("url") => "\"https://…\"",
            _ => "\"…\"",
        };
        value.ok_or_else(|| {
            self.at(whole.clone(), format!("secret `{name}` needs `{key} = {shown}`"))
        })
    }

    pub(in crate::config) fn url_of(
        &self,
        name: &SecretName,
        key: &str,
        url: Spanned<String>,
    ) -> Checked<HttpUrl> {
        url.get_ref().parse().map_err(|e| {
            self.hiding(url.span(), format!("`secrets.{name}.{key}` is no address: {e}"))
        })
    }

    /// A word that goes into a path or a header as it stands.
    pub(in crate::config) fn plain(&self, key: &str, word: Spanned<String>) -> Checked<String> {
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b'/');
        let text = word.get_ref();
        let climbs = text.split('/').any(|part| part.is_empty() || part == "." || part == "..");
        if text.len() <= 512 && text.bytes().all(plain) && !climbs {
            return Ok(word.into_inner());
        }
        let message =
            format!("`{key}` may hold letters, digits, `-`, `_`, `.`, and `/` between them");
        Err(self.at(word.span(), message))
    }

    /// A JSON text, as it will be read again by the minter.
    pub(in crate::config) fn json_of(
        &self,
        key: &str,
        text: Option<Spanned<String>>,
    ) -> Checked<Option<String>> {
        let Some(text) = text else { return Ok(None) };
        match serde_json::from_str::<serde_json::Value>(text.get_ref()) {
            Ok(value) if value.is_array() || value.is_object() => Ok(Some(text.into_inner())),
            Ok(_) => Err(self.at(text.span(), format!("`{key}` must be a JSON object or array"))),
            Err(e) => Err(self.at(text.span(), format!("`{key}` is no JSON: {e}"))),
        }
    }
}
