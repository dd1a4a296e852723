//! Where a value comes from, as `[secrets.NAME]` says it: one file a kind of source, each with its keys.
//!
//! - [`url`]: an address that a minter may speak to
//! - `raw`: the table as written; `vault`, `file` and `command` are parsed there
//! - [`jwt`], [`ssh_ca`]: made by the broker itself
//! - [`oauth`], [`github`], [`vault_server`], [`aws`], [`postgres_role`]: sources that mint
#![forbid(unsafe_code)]

pub mod aws;
pub mod github;
pub mod jwt;
pub mod oauth;
pub mod postgres_role;
pub(super) mod raw;
pub mod ssh_ca;
pub mod url;
pub mod vault_server;

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::model::mint::Role;
use crate::model::moment::Span;
use crate::model::name::SecretName;

pub use aws::AwsSts;
pub use github::GithubApp;
pub use jwt::Jwt;
pub use oauth::OAuth;
pub use postgres_role::PostgresRole;
pub use ssh_ca::SshCa;
pub use url::HttpUrl;
pub use vault_server::VaultServer;

/// How long a source may take, unless it says otherwise.
pub const SOURCE_TIMEOUT: Span = Span::seconds(10);
/// The longest that it may say: a lease waits for it.
pub const MAX_TIMEOUT: Span = Span::seconds(120);

/// Where a value comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SecretSource {
    /// Set once with `sublet secret set`.
    Vault,
    /// Absolute.
    File { path: PathBuf },
    /// `command[0]` is an absolute path; no shell is involved.
    Command { command: Vec<String>, timeout: Span },
    /// Minted by this host's own issuer.
    Jwt(Jwt),
    /// A key pair and a certificate for it, made by the broker with a CA's key.
    SshCa(SshCa),
    /// Made afresh for each use by another party, which a minter asks.
    Minted(Box<Minted>),
}

impl SecretSource {
    pub fn as_str(&self) -> &'static str {
        match self {
            SecretSource::Vault => "vault",
            SecretSource::File { .. } => "file",
            SecretSource::Command { .. } => "command",
            SecretSource::Jwt(_) => "jwt",
            SecretSource::SshCa(_) => "ssh-ca",
            SecretSource::Minted(minted) => minted.kind.as_str(),
        }
    }

    /// The other secrets that this source proves itself with.
    pub fn credentials(&self) -> Vec<(Role, &SecretName)> {
        match self {
            SecretSource::Vault
            | SecretSource::File { .. }
            | SecretSource::Command { .. }
            | SecretSource::Jwt(_) => Vec::new(),
            SecretSource::SshCa(ssh_ca) => ssh_ca.credentials(),
            SecretSource::Minted(minted) => minted.kind.credentials(),
        }
    }
}

/// What a minter is told: root's words alone, from the launcher.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    pub source: Minted,
    /// `[host] waive`: this kernel's lack of Landlock is known.
    pub without_landlock: bool,
}

/// A source whose values are minted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Minted {
    /// After it the minter is killed.
    pub timeout: Duration,
    /// PEM: trusted instead of the system's certificates. Absolute.
    pub ca_file: Option<PathBuf>,
    pub kind: MintKind,
}

/// Who mints. A further kind: its keys here, its calls in `minter`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum MintKind {
    OAuth(OAuth),
    PostgresRole(PostgresRole),
    GithubApp(GithubApp),
    VaultServer(VaultServer),
    AwsSts(AwsSts),
}

impl MintKind {
    pub fn as_str(&self) -> &'static str {
        match self {
            MintKind::OAuth(_) => "oauth",
            MintKind::PostgresRole(_) => "postgres-role",
            MintKind::GithubApp(_) => "github-app",
            MintKind::VaultServer(_) => "vault-server",
            MintKind::AwsSts(_) => "aws-sts",
        }
    }

    fn credentials(&self) -> Vec<(Role, &SecretName)> {
        match self {
            MintKind::OAuth(oauth) => oauth.credentials(),
            MintKind::PostgresRole(role) => role.credentials(),
            MintKind::GithubApp(app) => vec![(Role::PrivateKey, &app.private_key)],
            MintKind::VaultServer(server) => server.credentials(),
            MintKind::AwsSts(sts) => sts.credentials(),
        }
    }

    /// Whether what it makes is there until it is taken away, also when nobody can use it any more.
    pub fn must_be_revoked(&self) -> bool {
        match self {
            MintKind::OAuth(_)
            | MintKind::GithubApp(_)
            | MintKind::VaultServer(_)
            | MintKind::AwsSts(_) => false,
            MintKind::PostgresRole(_) => true,
        }
    }

    /// Whether what it makes was made to end with the lease, and so must last longer where the lease does.
    pub fn ends_with_the_lease(&self) -> bool {
        match self {
            MintKind::OAuth(_)
            | MintKind::GithubApp(_)
            | MintKind::VaultServer(_)
            | MintKind::AwsSts(_) => false,
            MintKind::PostgresRole(_) => true,
        }
    }

    /// Every address that the minter of this source may speak to.
    pub fn urls(&self) -> Vec<&HttpUrl> {
        match self {
            MintKind::OAuth(oauth) => oauth.urls(),
            MintKind::PostgresRole(role) => role.urls(),
            MintKind::GithubApp(app) => vec![&app.api_url],
            MintKind::VaultServer(server) => vec![&server.url],
            MintKind::AwsSts(sts) => vec![&sts.endpoint],
        }
    }
}
