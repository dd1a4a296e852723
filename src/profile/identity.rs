//! How a workload-identity token is presented to the client library of a cloud: which file, which
//! variables, which audience. What is not said here the library finds out by itself.
#![forbid(unsafe_code)]

use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::json;
use toml::Spanned;

/// Where tokens appear inside, in a directory a kind.
pub const DIRECTORY: &str = "/var/run/secrets/sublet";

/// The same in a container whose hook projects them.
pub const IN_CONTAINER: &str = "/run/sublet/identity";

/// Whose client libraries read the token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum IdentityKind {
    #[default]
    Azure,
    Aws,
    Gcp,
}

impl IdentityKind {
    pub const ALL: [IdentityKind; 3] = [IdentityKind::Azure, IdentityKind::Aws, IdentityKind::Gcp];

    pub fn as_str(self) -> &'static str {
        match self {
            IdentityKind::Azure => "azure",
            IdentityKind::Aws => "aws",
            IdentityKind::Gcp => "gcp",
        }
    }

    /// The directory's name below [`DIRECTORY`].
    pub fn directory(self) -> &'static str {
        match self {
            IdentityKind::Azure => "azure-identity",
            IdentityKind::Aws => "aws-identity",
            IdentityKind::Gcp => "gcp-identity",
        }
    }

    /// The name of the file beside it that says how to use it.
    pub fn document(self) -> Option<&'static str> {
        match self {
            IdentityKind::Azure | IdentityKind::Aws => None,
            IdentityKind::Gcp => Some(GCP_DOCUMENT),
        }
    }

    /// The token as a command finds it.
    pub fn token_path(self) -> PathBuf {
        self.token_below(Path::new(DIRECTORY))
    }

    /// The same below another directory.
    pub fn token_below(self, above: &Path) -> PathBuf {
        above.join(self.directory()).join("token")
    }

    /// Every variable that a token of this kind may set.
    pub fn variables(self) -> &'static [&'static str] {
        match self {
            IdentityKind::Azure => &[
                "AZURE_FEDERATED_TOKEN_FILE",
                "AZURE_CLIENT_ID",
                "AZURE_TENANT_ID",
                "AZURE_AUTHORITY_HOST",
            ],
            IdentityKind::Aws => {
                &["AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_ROLE_ARN", "AWS_ROLE_SESSION_NAME"]
            }
            IdentityKind::Gcp => &["GOOGLE_APPLICATION_CREDENTIALS"],
        }
    }
}

/// `[capability.audience.identity]`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Identity {
    pub kind: IdentityKind,
    /// `aud` of the token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub audience: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub client_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tenant_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub authority_host: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role_arn: Option<String>,
    /// The full resource name of a workload identity pool's provider.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub provider: Option<String>,
    /// The service account to act as.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub service_account: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_url: Option<String>,
}

impl Identity {
    /// What the token is for where nothing says it: what the cloud expects.
    pub fn default_audience(&self) -> Option<String> {
        match self.kind {
            // The issuer's own default, for the whole host.
            IdentityKind::Azure => None,
            IdentityKind::Aws => Some("sts.amazonaws.com".to_owned()),
            IdentityKind::Gcp => self.provider.as_ref().map(|provider| format!("https:{provider}")),
        }
    }

    /// The variables, of [`IdentityKind::variables`]. `session`: what AWS's log calls it.
    pub fn variables(&self, session: &str) -> Vec<(&'static str, String)> {
        self.variables_below(Path::new(DIRECTORY), session)
    }

    /// The same where tokens stand below another directory.
    pub fn variables_below(&self, above: &Path, session: &str) -> Vec<(&'static str, String)> {
        let token = self.kind.token_below(above).display().to_string();
        let given = |name, value: &Option<String>| Some((name, value.clone()?));
        match self.kind {
            IdentityKind::Azure => {
                let authority = self.authority_host.as_deref();
                let authority = authority.unwrap_or("https://login.microsoftonline.com/");
                [
                    Some(("AZURE_FEDERATED_TOKEN_FILE", token)),
                    given("AZURE_CLIENT_ID", &self.client_id),
                    given("AZURE_TENANT_ID", &self.tenant_id),
                    Some(("AZURE_AUTHORITY_HOST", authority.to_owned())),
                ]
                .into_iter()
                .flatten()
                .collect()
            }
            IdentityKind::Aws => [
                Some(("AWS_WEB_IDENTITY_TOKEN_FILE", token)),
                given("AWS_ROLE_ARN", &self.role_arn),
                Some(("AWS_ROLE_SESSION_NAME", session.to_owned())),
            ]
            .into_iter()
            .flatten()
            .collect(),
            IdentityKind::Gcp => {
                let path = above.join(self.kind.directory()).join(GCP_DOCUMENT);
                vec![("GOOGLE_APPLICATION_CREDENTIALS", path.display().to_string())]
            }
        }
    }

    /// A file beside the token that says how to use it; no secret. AIP-4117.
    pub fn document(&self) -> Option<(&'static str, String)> {
        self.document_below(Path::new(DIRECTORY))
    }

    /// The same where tokens stand below another directory.
    pub fn document_below(&self, above: &Path) -> Option<(&'static str, String)> {
        if self.kind != IdentityKind::Gcp {
            return None;
        }
        let mut document = json!({
            "type": "external_account",
            "audience": self.provider,
            "subject_token_type": "urn:ietf:params:oauth:token-type:jwt",
            "token_url": self.token_url.as_deref().unwrap_or("https://sts.googleapis.com/v1/token"),
            "credential_source": { "file": self.kind.token_below(above) },
        });
        if let Some(account) = &self.service_account {
            document["service_account_impersonation_url"] = format!(
                "https://iamcredentials.googleapis.com/v1/projects/-/serviceAccounts/{account}:generateAccessToken"
            )
            .into();
        }
        Some((GCP_DOCUMENT, document.to_string()))
    }
}

/// The name of GCP's document.
const GCP_DOCUMENT: &str = "credentials.json";

#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawIdentity {
    kind: Spanned<IdentityKind>,
    audience: Option<Spanned<String>>,
    client_id: Option<Spanned<String>>,
    tenant_id: Option<Spanned<String>>,
    authority_host: Option<Spanned<String>>,
    role_arn: Option<Spanned<String>>,
    provider: Option<Spanned<String>>,
    service_account: Option<Spanned<String>>,
    token_url: Option<Spanned<String>>,
}

impl RawIdentity {
    /// What is wrong with it, and where.
    pub fn into_identity(self) -> Result<Identity, (Range<usize>, String)> {
        let kind = *self.kind.get_ref();
        let own: &[(&str, &Option<Spanned<String>>, IdentityKind)] = &[
            ("client_id", &self.client_id, IdentityKind::Azure),
            ("tenant_id", &self.tenant_id, IdentityKind::Azure),
            ("authority_host", &self.authority_host, IdentityKind::Azure),
            ("role_arn", &self.role_arn, IdentityKind::Aws),
            ("provider", &self.provider, IdentityKind::Gcp),
            ("service_account", &self.service_account, IdentityKind::Gcp),
            ("token_url", &self.token_url, IdentityKind::Gcp),
        ];
        let every = own.iter().map(|(name, value, _)| (*name, *value));
        for (name, value) in every.chain([("audience", &self.audience)]) {
            let Some(value) = value else { continue };
            let text = value.get_ref();
            if text.is_empty() || text.len() > 512 || !text.bytes().all(|b| b.is_ascii_graphic()) {
                let what = "1 to 512 printable ASCII characters without spaces";
                return Err((value.span(), format!("`{name}` needs {what}")));
            }
        }
        for (name, value, of) in own {
            if let (Some(value), true) = (value, *of != kind) {
                let message = format!("`{name}` has no meaning for kind `{}`", kind.as_str());
                return Err((value.span(), message));
            }
        }
        let lacks = |name: &str| format!("identity of kind `{}` needs `{name}`", kind.as_str());
        let must = match kind {
            IdentityKind::Azure => None,
            IdentityKind::Aws => self.role_arn.is_none().then_some("role_arn"),
            IdentityKind::Gcp => self.provider.is_none().then_some("provider"),
        };
        if let Some(name) = must {
            return Err((self.kind.span(), lacks(name)));
        }
        for url in [&self.authority_host, &self.token_url].into_iter().flatten() {
            let text = url.get_ref();
            let is_local =
                text.starts_with("http://127.0.0.1") || text.starts_with("http://localhost");
            if !text.starts_with("https://") && !is_local {
                return Err((url.span(), "a token is sent there: it needs `https://`".to_owned()));
            }
        }
        if let Some(provider) = &self.provider
            && !provider.get_ref().starts_with("//")
        {
            let form = "`//iam.googleapis.com/projects/N/locations/global/workloadIdentityPools/P/providers/Q`";
            return Err((provider.span(), format!("`provider` is a full resource name, {form}")));
        }
        if let Some(account) = &self.service_account
            && !account.get_ref().bytes().all(|b| b.is_ascii_alphanumeric() || b"-._@".contains(&b))
        {
            return Err((account.span(), "`service_account` is its e-mail address".to_owned()));
        }
        let plain = |value: Option<Spanned<String>>| value.map(Spanned::into_inner);
        Ok(Identity {
            kind,
            audience: plain(self.audience),
            client_id: plain(self.client_id),
            tenant_id: plain(self.tenant_id),
            authority_host: plain(self.authority_host),
            role_arn: plain(self.role_arn),
            provider: plain(self.provider),
            service_account: plain(self.service_account),
            token_url: plain(self.token_url),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profile::names::{NameClass, class};

    /// Where anyone else could set one, they could speak for the identity.
    #[test]
    fn every_variable_of_an_identity_is_reserved() {
        for kind in IdentityKind::ALL {
            for name in kind.variables() {
                assert_eq!(class(name), NameClass::Reserved, "{name}");
            }
            let identity = Identity { kind, role_arn: Some("r".into()), ..Identity::default() };
            for (name, _) in identity.variables("s") {
                assert!(kind.variables().contains(&name), "{name}");
            }
        }
    }
}
