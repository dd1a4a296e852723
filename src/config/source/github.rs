//! `source = "github-app"`: an installation access token of a GitHub App, narrowed to the capability's
//! repositories and to the permissions named here. GitHub Enterprise has another `api_url`.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::ops::Range;

use serde::{Deserialize, Serialize};
use toml::Spanned;

use super::raw::{RawSecret, Words};
use super::url::HttpUrl;
use crate::config::parse::{At, Checked};
use crate::model::name::SecretName;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GithubApp {
    pub api_url: HttpUrl,
    /// The App's id, or its client id.
    pub app_id: String,
    /// PEM.
    pub private_key: SecretName,
    /// Nothing: that of the repository is looked up.
    pub installation_id: Option<String>,
    pub repositories: Repositories,
    /// Never empty: `contents = "write"`.
    pub permissions: BTreeMap<String, String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Repositories {
    /// The capability's `resource`, else its audience's `path`: `owner/name`.
    OfCapability,
    /// `owner/name`, or `name` where the installation is named. Placeholders are filled in.
    These(Vec<String>),
    /// `["*"]`, said explicitly: all that the installation reaches.
    All,
}

impl GithubApp {
    pub(super) fn take(
        at: &At<'_>,
        name: &SecretName,
        raw: &mut RawSecret,
        whole: &Range<usize>,
    ) -> Checked<Self> {
        let api_url = match raw.api_url.take() {
            Some(url) => at.url_of(name, "api_url", url)?,
            None => HttpUrl {
                tls: true,
                host: "api.github.com".to_owned(),
                port: 443,
                path: "/".to_owned(),
            },
        };
        let app_id = at.needed(name, "app_id", raw.app_id.take(), whole)?;
        let app_id = at.plain("app_id", Spanned::new(app_id.span(), app_id.into_inner().into()))?;
        let installation_id = match raw.installation_id.take() {
            None => None,
            Some(id) => {
                let span = id.span();
                let text = String::from(id.into_inner());
                if text.is_empty() || !text.bytes().all(|b| b.is_ascii_digit()) {
                    return Err(at.at(span, "`installation_id` is a number"));
                }
                Some(text)
            }
        };
        let repositories = match raw.repositories.take() {
            None => Repositories::OfCapability,
            Some(given) => {
                let span = given.span();
                let names: Vec<String> = Words::into(given.into_inner());
                match names.as_slice() {
                    [] => return Err(at.at(span, "`repositories` is empty; `[\"*\"]` means all")),
                    [star] if star == "*" && installation_id.is_some() => Repositories::All,
                    [star] if star == "*" => {
                        return Err(at.at(span, "all repositories need an `installation_id`"));
                    }
                    _ => Repositories::These(names),
                }
            }
        };
        let permissions = at.needed(name, "permissions", raw.permissions.take(), whole)?;
        let word = |text: &str| {
            !text.is_empty() && text.bytes().all(|b| b.is_ascii_lowercase() || b == b'_')
        };
        let level = |text: &str| matches!(text, "read" | "write" | "admin");
        let all = permissions.get_ref();
        if all.is_empty() || !all.iter().all(|(name, given)| word(name) && level(given)) {
            let message =
                "`permissions` is a table as { contents = \"write\" }: read, write or admin";
            return Err(at.at(permissions.span(), message));
        }
        Ok(Self {
            api_url,
            app_id,
            private_key: at
                .needed(name, "private_key", raw.private_key.take(), whole)?
                .into_inner(),
            installation_id,
            repositories,
            permissions: permissions.into_inner(),
        })
    }
}
