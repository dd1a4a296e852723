//! `source = "jwt"`: a token of this host's own issuer, minted by the broker: no network, and nothing to
//! revoke but its end, which is near.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::ops::Range;

use toml::Spanned;

use super::raw::{RawSecret, Words};
use crate::config::Issuer;
use crate::config::parse::{At, Checked};
use crate::model::moment::Span;

/// Claims that sublet sets itself: a configured one would speak for it.
pub const OWN_CLAIMS: [&str; 13] = [
    "iss",
    "sub",
    "aud",
    "exp",
    "nbf",
    "iat",
    "jti",
    "act",
    "action",
    "resource",
    "authorization_details",
    "sublet",
    "cnf",
];

/// How long a token lives, unless the source says otherwise.
const DEFAULT_TTL: Span = Span::seconds(60);

/// What its tokens are like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Jwt {
    /// Nothing: the lease's own audience.
    pub audience: Option<String>,
    pub ttl: Span,
    /// Further claims, all of them texts.
    pub claims: BTreeMap<String, String>,
}

impl Jwt {
    pub(super) fn take(at: &At<'_>, raw: &mut RawSecret) -> Checked<Self> {
        let audience = match raw.audience.take() {
            None => None,
            Some(given) => match (given.span(), given.into_inner()) {
                (span, Words::One(text)) => Some(token_audience(at, span, &text)?),
                (span, Words::Several(_)) => {
                    return Err(at.at(span, "a token of source `jwt` has one `audience`"));
                }
            },
        };
        let ttl = match raw.ttl.take() {
            Some(ttl) => token_ttl(at, &ttl, "ttl", Span::seconds(1))?,
            None => DEFAULT_TTL,
        };
        let claims = raw.claims.take().map(Spanned::into_inner).unwrap_or_default();
        for (name, value) in &claims {
            if OWN_CLAIMS.contains(&name.as_str()) {
                let message = format!("claim `{name}` is what sublet itself says; name another");
                return Err(at.at(value.span(), message));
            }
        }
        let claims = claims.into_iter().map(|(name, value)| (name, value.into_inner())).collect();
        Ok(Self { audience, ttl, claims })
    }
}

/// `aud`: any text of some length, without what no URL or name holds.
pub(in crate::config) fn token_audience(
    at: &At<'_>,
    span: Range<usize>,
    text: &str,
) -> Checked<String> {
    if text.is_empty() || text.len() > 512 || !text.bytes().all(|b| b.is_ascii_graphic()) {
        let message = "an `audience` is 1 to 512 printable ASCII characters without spaces";
        return Err(at.at(span, message));
    }
    Ok(text.to_owned())
}

pub(in crate::config) fn token_ttl(
    at: &At<'_>,
    ttl: &Spanned<Span>,
    key: &str,
    least: Span,
) -> Checked<Span> {
    let most = *Issuer::TOKEN_TTL.end();
    let span = *ttl.get_ref();
    if span < least || span > most {
        return Err(at.at(ttl.span(), format!("`{key}` is {least} to {most}")));
    }
    Ok(span)
}
