//! `source = "aws-sts"`: a session of an IAM role, with an inline session policy that narrows it to the
//! capability. Its name is the lease's id.
#![forbid(unsafe_code)]

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::raw::RawSecret;
use super::url::HttpUrl;
use crate::config::parse::{At, Checked};
use crate::model::mint::Role;
use crate::model::name::SecretName;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AwsSts {
    pub endpoint: HttpUrl,
    pub region: String,
    pub role_arn: String,
    /// JSON; `{resource}` and its kin are filled in.
    pub policy: String,
    pub by: By,
}

/// What the call proves itself with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum By {
    /// AssumeRole, signed: the secret is a `credential_process` object.
    AccessKey(SecretName),
    /// AssumeRoleWithWebIdentity.
    WebIdentityToken(SecretName),
}

impl AwsSts {
    pub(super) fn credentials(&self) -> Vec<(Role, &SecretName)> {
        vec![match &self.by {
            By::AccessKey(name) => (Role::AccessKey, name),
            By::WebIdentityToken(name) => (Role::WebIdentityToken, name),
        }]
    }

    pub(super) fn take(
        at: &At<'_>,
        name: &SecretName,
        raw: &mut RawSecret,
        whole: &Range<usize>,
    ) -> Checked<Self> {
        let region = at.needed(name, "region", raw.region.take(), whole)?;
        let region = at.plain("region", region)?;
        let endpoint = match raw.endpoint.take() {
            Some(url) => at.url_of(name, "endpoint", url)?,
            None => HttpUrl {
                tls: true,
                host: format!("sts.{region}.amazonaws.com"),
                port: 443,
                path: "/".to_owned(),
            },
        };
        let by = match (raw.access_key.take(), raw.web_identity_token.take()) {
            (Some(key), None) => By::AccessKey(key.into_inner()),
            (None, Some(token)) => By::WebIdentityToken(token.into_inner()),
            (Some(_), Some(token)) => {
                return Err(at.at(token.span(), "`access_key` is given already: one of the two"));
            }
            (None, None) => {
                let message = format!(
                    "secret `{name}` needs `access_key` or `web_identity_token`, the name of a secret"
                );
                return Err(at.at(whole.clone(), message));
            }
        };
        let role_arn = at.needed(name, "role_arn", raw.role_arn.take(), whole)?;
        let plain = |b: u8| b.is_ascii_graphic();
        if !role_arn.get_ref().starts_with("arn:") || !role_arn.get_ref().bytes().all(plain) {
            return Err(at.at(role_arn.span(), "`role_arn` begins with `arn:`"));
        }
        let policy = at.needed(name, "policy", raw.policy.take(), whole)?;
        let policy = at.json_of("policy", Some(policy))?.unwrap_or_default();
        Ok(Self { endpoint, region, role_arn: role_arn.into_inner(), policy, by })
    }
}
