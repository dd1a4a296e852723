//! `[issuer]`.
#![forbid(unsafe_code)]

use std::path::PathBuf;

use serde::Deserialize;
use toml::Spanned;

use super::{At, Checked};
use crate::config::Issuer;
use crate::config::source::jwt::{token_audience, token_ttl};
use crate::model::moment::Span;

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawIssuer {
    audience: Option<Spanned<String>>,
    token_ttl: Option<Spanned<Span>>,
    #[serde(default)]
    allow: Vec<Spanned<String>>,
    publish: Option<Spanned<PathBuf>>,
}

impl At<'_> {
    pub(super) fn issuer(&self, raw: RawIssuer) -> Checked<Issuer> {
        let default = Issuer::default();
        Ok(Issuer {
            audience: match &raw.audience {
                Some(audience) => token_audience(self, audience.span(), audience.get_ref())?,
                None => default.audience,
            },
            token_ttl: match &raw.token_ttl {
                Some(ttl) => token_ttl(self, ttl, "issuer.token_ttl", *Issuer::TOKEN_TTL.start())?,
                None => default.token_ttl,
            },
            allow: self.allow(&raw.allow)?,
            publish: raw.publish.map(|path| self.absolute(path, "issuer.publish")).transpose()?,
        })
    }
}
