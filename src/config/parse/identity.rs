//! `[issuer]`, and secrets of the source `jwt`.
#![forbid(unsafe_code)]

use serde::Deserialize;
use toml::Spanned;

use super::{At, Checked, RawSecret};
use crate::config::{Issuer, JWT_TTL, JwtSource, OWN_CLAIMS, SecretSource};
use crate::model::moment::Span;

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawIssuer {
    audience: Option<Spanned<String>>,
    token_ttl: Option<Spanned<Span>>,
    #[serde(default)]
    allow: Vec<Spanned<String>>,
}

impl At<'_> {
    pub(super) fn issuer(&self, raw: RawIssuer) -> Checked<Issuer> {
        let default = Issuer::default();
        let audience = raw.audience.map(|a| self.token_audience(&a)).transpose()?;
        Ok(Issuer {
            audience: audience.unwrap_or(default.audience),
            token_ttl: match &raw.token_ttl {
                Some(ttl) => self.token_ttl(ttl, "issuer.token_ttl", *Issuer::TOKEN_TTL.start())?,
                None => default.token_ttl,
            },
            allow: self.allow(&raw.allow)?,
        })
    }

    pub(super) fn jwt(&self, raw: &RawSecret) -> Checked<SecretSource> {
        let audience = raw.audience.as_ref().map(|a| self.token_audience(a)).transpose()?;
        let ttl = match &raw.ttl {
            Some(ttl) => self.token_ttl(ttl, "ttl", Span::seconds(1))?,
            None => JWT_TTL,
        };
        let claims = raw.claims.clone().unwrap_or_default();
        for (name, value) in &claims {
            if OWN_CLAIMS.contains(&name.as_str()) {
                let message = format!("claim `{name}` is what sublet itself says; name another");
                return Err(self.error(value, message));
            }
        }
        let claims = claims.into_iter().map(|(name, value)| (name, value.into_inner())).collect();
        Ok(SecretSource::Jwt(JwtSource { audience, ttl, claims }))
    }

    pub(super) fn refuse_keys_of_jwt(&self, raw: &RawSecret) -> Checked<()> {
        let source = raw.source.as_str();
        let stray = |key: &str| format!("`{key}` has no meaning for source `{source}`");
        if let Some(audience) = &raw.audience {
            return Err(self.error(audience, stray("audience")));
        }
        if let Some(ttl) = &raw.ttl {
            return Err(self.error(ttl, stray("ttl")));
        }
        match raw.claims.as_ref().and_then(|claims| claims.iter().next()) {
            Some((_, value)) => Err(self.error(value, stray("claims"))),
            None => Ok(()),
        }
    }

    /// `aud`: any text of some length, without what no URL or name holds.
    fn token_audience(&self, audience: &Spanned<String>) -> Checked<String> {
        let text = audience.get_ref();
        if text.is_empty() || text.len() > 512 || !text.bytes().all(|b| b.is_ascii_graphic()) {
            let message = "an `audience` is 1 to 512 printable ASCII characters without spaces";
            return Err(self.error(audience, message));
        }
        Ok(text.clone())
    }

    fn token_ttl(&self, ttl: &Spanned<Span>, key: &str, least: Span) -> Checked<Span> {
        let most = *Issuer::TOKEN_TTL.end();
        let span = *ttl.get_ref();
        if span < least || span > most {
            return Err(self.error(ttl, format!("`{key}` is {least} to {most}")));
        }
        Ok(span)
    }
}
