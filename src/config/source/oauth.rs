//! `source = "oauth"`: an access token of an authorization server, by client credentials (RFC 6749 §4.4)
//! or token exchange (RFC 8693).
#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};

use super::raw::{RawSecret, Words};
use super::url::HttpUrl;
use crate::config::parse::{At, Checked};
use crate::model::mint::Role;
use crate::model::name::SecretName;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OAuth {
    pub token_url: HttpUrl,
    /// RFC 7009. Nothing: a token ends when it expires.
    pub revocation_url: Option<HttpUrl>,
    pub client_id: String,
    pub client_secret: Option<SecretName>,
    pub client_auth: ClientAuth,
    pub grant: Grant,
    pub scope: Option<String>,
    /// Each is sent as a parameter of its own.
    pub audience: Vec<String>,
    /// RFC 8707.
    pub resource: Vec<String>,
    /// JSON, RFC 9396; `{action}` and its kin are filled in.
    pub authorization_details: Option<String>,
}

/// How the client proves itself: RFC 6749 §2.3.1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ClientAuth {
    /// The `Authorization` header.
    Basic,
    /// In the body.
    Post,
    /// A public client, or one that the subject's token stands for.
    None,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Grant {
    ClientCredentials,
    TokenExchange(Exchange),
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exchange {
    pub subject_token: SecretName,
    pub subject_token_type: String,
    /// Who acts for the subject: the issuer puts it into `act`.
    pub actor_token: Option<SecretName>,
    pub actor_token_type: String,
    pub requested_token_type: Option<String>,
}

const ACCESS_TOKEN: &str = "urn:ietf:params:oauth:token-type:access_token";
const JWT: &str = "urn:ietf:params:oauth:token-type:jwt";

impl OAuth {
    pub(super) fn credentials(&self) -> Vec<(Role, &SecretName)> {
        let mut found: Vec<_> =
            self.client_secret.iter().map(|name| (Role::ClientSecret, name)).collect();
        if let Grant::TokenExchange(exchange) = &self.grant {
            found.push((Role::SubjectToken, &exchange.subject_token));
            found.extend(exchange.actor_token.iter().map(|name| (Role::ActorToken, name)));
        }
        found
    }

    pub(super) fn urls(&self) -> Vec<&HttpUrl> {
        std::iter::once(&self.token_url).chain(&self.revocation_url).collect()
    }

    pub(super) fn take(
        at: &At<'_>,
        name: &SecretName,
        raw: &mut RawSecret,
        whole: &std::ops::Range<usize>,
    ) -> Checked<Self> {
        let token_url = at.url_of(
            name,
            "token_url",
            at.needed(name, "token_url", raw.token_url.take(), whole)?,
        )?;
        let revocation_url = raw
            .revocation_url
            .take()
            .map(|url| at.url_of(name, "revocation_url", url))
            .transpose()?;
        let client_id = at.needed(name, "client_id", raw.client_id.take(), whole)?.into_inner();
        let client_secret = raw.client_secret.take().map(toml::Spanned::into_inner);
        let client_auth = match raw.client_auth.take() {
            None if client_secret.is_some() => ClientAuth::Basic,
            None => ClientAuth::None,
            Some(given) => match (given.get_ref().as_str(), client_secret.is_some()) {
                ("basic", true) => ClientAuth::Basic,
                ("post", true) => ClientAuth::Post,
                ("none", false) => ClientAuth::None,
                ("basic" | "post", false) => {
                    return Err(
                        at.at(given.span(), "it needs `client_secret`, the name of a secret")
                    );
                }
                _ => {
                    return Err(at.at(
                        given.span(),
                        "`client_auth` is `basic`, `post`, or without a `client_secret` `none`",
                    ));
                }
            },
        };
        let exchange = |raw: &mut RawSecret| -> Checked<Exchange> {
            let subject = at.needed(name, "subject_token", raw.subject_token.take(), whole)?;
            let word = |given: Option<toml::Spanned<String>>, or: &str| {
                given.map_or_else(|| or.to_owned(), toml::Spanned::into_inner)
            };
            Ok(Exchange {
                subject_token: subject.into_inner(),
                subject_token_type: word(raw.subject_token_type.take(), ACCESS_TOKEN),
                actor_token: raw.actor_token.take().map(toml::Spanned::into_inner),
                actor_token_type: word(raw.actor_token_type.take(), JWT),
                requested_token_type: raw
                    .requested_token_type
                    .take()
                    .map(toml::Spanned::into_inner),
            })
        };
        let grant = match raw.grant.take() {
            None => Grant::ClientCredentials,
            Some(given) => match given.get_ref().as_str() {
                "client_credentials" => Grant::ClientCredentials,
                "token_exchange" => Grant::TokenExchange(exchange(raw)?),
                _ => {
                    return Err(
                        at.at(given.span(), "`grant` is `client_credentials` or `token_exchange`")
                    );
                }
            },
        };
        if grant == Grant::ClientCredentials && client_auth == ClientAuth::None {
            return Err(at.at(
                whole.clone(),
                "client credentials need `client_secret`, the name of a secret",
            ));
        }
        Ok(Self {
            token_url,
            revocation_url,
            client_id,
            client_secret,
            client_auth,
            grant,
            scope: raw.scope.take().map(toml::Spanned::into_inner),
            audience: raw
                .audience
                .take()
                .map(toml::Spanned::into_inner)
                .map_or_else(Vec::new, Words::into),
            resource: raw
                .resource
                .take()
                .map(toml::Spanned::into_inner)
                .map_or_else(Vec::new, Words::into),
            authorization_details: at
                .json_of("authorization_details", raw.authorization_details.take())?,
        })
    }
}
