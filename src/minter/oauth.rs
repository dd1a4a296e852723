//! Access tokens of an authorization server: client credentials (RFC 6749 §4.4), token exchange (RFC 8693)
//! with an actor, resource indicators (RFC 8707), rich authorization requests (RFC 9396); revocation
//! (RFC 7009).
#![forbid(unsafe_code)]

use std::borrow::Cow;

use base64::Engine;
use base64::prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD};
use hyper::Method;
use hyper::header::{self, HeaderName, HeaderValue};
use serde::Deserialize;

use super::http::{Answered, Call, Http};
use super::{Minted, Outcome, fill, handle, seconds_from, words};
use crate::config::source::HttpUrl;
use crate::config::source::oauth::{ClientAuth, Grant, OAuth};
use crate::model::mint::{About, Facts, Failure, Fault, Operation, Request, Role};

/// The longest token that is taken.
const MOST: usize = 64 << 10;

/// Error codes of RFC 6749 §5.2, 7009 §2.2.1, 8693 §2.2.2, 8707 §2 and 9396 §5: anything else is not told.
const CODES: [&str; 11] = [
    "invalid_request",
    "invalid_client",
    "invalid_grant",
    "unauthorized_client",
    "unsupported_grant_type",
    "invalid_scope",
    "unsupported_token_type",
    "invalid_target",
    "invalid_authorization_details",
    "temporarily_unavailable",
    "server_error",
];

pub fn answer(oauth: &OAuth, http: &Http, request: &Request<'_>) -> Result<Outcome, Failure> {
    match request.operation {
        Operation::Mint => mint(oauth, http, request),
        Operation::Revoke => {
            revoke(oauth, http, request, handle(request)?).map(|()| Outcome::Revoked)
        }
        Operation::Renew => Err(Failure::of(Fault::Minter)),
    }
}

/// Section 5.1 of RFC 6749, 2.2.1 of RFC 8693. A refresh token would outlive the lease: it is not taken.
#[derive(Deserialize)]
struct Token<'a> {
    #[serde(borrow)]
    access_token: Cow<'a, str>,
    expires_in: Option<serde_json::Number>,
    #[serde(borrow)]
    scope: Option<Cow<'a, str>>,
}

#[derive(Deserialize)]
struct Refusal<'a> {
    #[serde(borrow)]
    error: Cow<'a, str>,
}

fn mint(oauth: &OAuth, http: &Http, request: &Request<'_>) -> Result<Outcome, Failure> {
    let facts = &request.facts;
    let mut form = Form::default();
    match &oauth.grant {
        Grant::ClientCredentials => form.put("grant_type", b"client_credentials"),
        Grant::TokenExchange(exchange) => {
            form.put("grant_type", b"urn:ietf:params:oauth:grant-type:token-exchange");
            form.put("subject_token", credential(request, Role::SubjectToken)?);
            form.put("subject_token_type", exchange.subject_token_type.as_bytes());
            if exchange.actor_token.is_some() {
                form.put("actor_token", credential(request, Role::ActorToken)?);
                form.put("actor_token_type", exchange.actor_token_type.as_bytes());
            }
            if let Some(wanted) = &exchange.requested_token_type {
                form.put("requested_token_type", wanted.as_bytes());
            }
        }
    }
    let scope = oauth.scope.as_deref().map(|scope| fill::words(scope, facts)).transpose()?;
    if let Some(scope) = &scope {
        form.put("scope", scope.as_bytes());
    }
    for audience in &oauth.audience {
        form.put("audience", fill::words(audience, facts)?.as_bytes());
    }
    for resource in &oauth.resource {
        form.put("resource", fill::words(resource, facts)?.as_bytes());
    }
    if let Some(details) = &oauth.authorization_details {
        form.put("authorization_details", fill::json(details, facts)?.as_bytes());
    }
    let answered = post(oauth, http, request, &oauth.token_url, form)?;
    if !answered.status.is_success() {
        return Err(refused(&answered));
    }
    let token: Token<'_> = answered.json()?;
    let value = token.access_token.as_bytes();
    if value.len() > MOST {
        return Err(answered.failure(Fault::TooLarge));
    }
    // What a header can carry: RFC 6750 §2.1.
    if value.is_empty() || !value.iter().all(u8::is_ascii_graphic) {
        return Err(answered.failure(Fault::Incomplete));
    }
    let minted = accept(oauth, facts, &answered, scope.as_deref(), &token);
    if minted.is_err() && oauth.revocation_url.is_some() {
        // It was issued all the same. That it could not be taken is what is told.
        drop(revoke(oauth, http, request, value));
    }
    minted.map(Outcome::Minted)
}

fn accept(
    oauth: &OAuth,
    facts: &Facts,
    answered: &Answered,
    asked: Option<&str>,
    token: &Token<'_>,
) -> Result<Minted, Failure> {
    let seconds = match &token.expires_in {
        None => None,
        Some(number) => Some(
            number
                .as_i64()
                .or_else(|| number.as_f64().map(|seconds| seconds as i64))
                .ok_or_else(|| answered.failure(Fault::Incomplete))?,
        ),
    };
    if seconds.is_some_and(|seconds| seconds <= 0) {
        return Err(answered.failure(Fault::Expired));
    }
    if let (Some(given), Some(asked)) = (&token.scope, asked) {
        let asked: Vec<&str> = asked.split(' ').collect();
        if !given.split(' ').filter(|scope| !scope.is_empty()).all(|scope| asked.contains(&scope)) {
            return Err(answered.failure(Fault::TooWide));
        }
    }
    let claims = claims(&token.access_token);
    let claim = |name: &str| claims.as_ref()?.get(name)?.as_str().map(words);
    let url = &oauth.token_url;
    let scheme = if url.tls { "https" } else { "http" };
    let about = About {
        issuer: words(&format!("{scheme}://{}", url.authority())),
        scope: token.scope.as_deref().or(asked).map(words),
        principal: Some(claim("sub").unwrap_or_else(|| words(&oauth.client_id))),
        far_id: claim("jti"),
        expires_at: seconds.map(|seconds| seconds_from(facts, seconds)),
        renew_at: None,
    };
    let value = token.access_token.as_bytes().to_vec();
    let handle = oauth.revocation_url.as_ref().map(|_| value.clone());
    Ok(Minted { value, parts: Vec::new(), about, handle })
}

fn revoke(oauth: &OAuth, http: &Http, request: &Request<'_>, token: &[u8]) -> Result<(), Failure> {
    let Some(url) = &oauth.revocation_url else { return Err(Failure::of(Fault::Settings)) };
    let mut form = Form::default();
    form.put("token", token);
    form.put("token_type_hint", b"access_token");
    let answered = post(oauth, http, request, url, form)?;
    match answered.status.is_success() {
        true => Ok(()),
        false => Err(refused(&answered)),
    }
}

/// A form, with the client's proof in the header or in the body.
fn post(
    oauth: &OAuth,
    http: &Http,
    request: &Request<'_>,
    url: &HttpUrl,
    mut form: Form,
) -> Result<Answered, Failure> {
    let mut headers: Vec<(HeaderName, HeaderValue)> =
        vec![(header::CONTENT_TYPE, HeaderValue::from_static("application/x-www-form-urlencoded"))];
    match oauth.client_auth {
        ClientAuth::Basic => {
            // Both are form-encoded first: RFC 6749 §2.3.1.
            let mut pair = Vec::new();
            encode(oauth.client_id.as_bytes(), &mut pair);
            pair.push(b':');
            encode(credential(request, Role::ClientSecret)?, &mut pair);
            let proof = format!("Basic {}", BASE64_STANDARD.encode(pair));
            let proof =
                HeaderValue::from_str(&proof).map_err(|_| Failure::of(Fault::Credential))?;
            headers.push((header::AUTHORIZATION, proof));
        }
        ClientAuth::Post => {
            form.put("client_id", oauth.client_id.as_bytes());
            form.put("client_secret", credential(request, Role::ClientSecret)?);
        }
        ClientAuth::None => form.put("client_id", oauth.client_id.as_bytes()),
    }
    http.call(Call { method: Method::POST, url, headers, body: form.0 })
}

fn credential<'a>(request: &'a Request<'_>, role: Role) -> Result<&'a [u8], Failure> {
    request.credential(role).filter(|c| !c.is_empty()).ok_or(Failure::of(Fault::Credential))
}

/// The status, and the code if it is one that the protocol has.
fn refused(answered: &Answered) -> Failure {
    let code = answered.json::<Refusal<'_>>().ok().and_then(|refusal| {
        CODES.iter().find(|code| **code == refusal.error).map(|code| (*code).to_owned())
    });
    Failure { code, ..answered.refusal() }
}

/// The claims of a token that is a JWT, unverified: only for the trail's words.
fn claims(token: &str) -> Option<serde_json::Value> {
    let mut parts = token.split('.');
    let (_, claims, _, None) = (parts.next()?, parts.next()?, parts.next()?, parts.next()) else {
        return None;
    };
    serde_json::from_slice(&BASE64_URL_SAFE_NO_PAD.decode(claims).ok()?).ok()
}

/// application/x-www-form-urlencoded.
#[derive(Default)]
struct Form(Vec<u8>);

impl Form {
    fn put(&mut self, name: &str, value: &[u8]) {
        if !self.0.is_empty() {
            self.0.push(b'&');
        }
        self.0.extend_from_slice(name.as_bytes());
        self.0.push(b'=');
        encode(value, &mut self.0);
    }
}

fn encode(text: &[u8], out: &mut Vec<u8>) {
    const HEX: &[u8; 16] = b"0123456789ABCDEF";
    for &b in text {
        match b {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'*' => out.push(b),
            b' ' => out.push(b'+'),
            _ => out.extend_from_slice(&[b'%', HEX[usize::from(b >> 4)], HEX[usize::from(b & 15)]]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms_are_encoded() {
        let mut form = Form::default();
        form.put("a", b"x y&z=/~*");
        form.put("b", "é".as_bytes());
        assert_eq!(form.0, b"a=x+y%26z%3D%2F%7E*&b=%C3%A9");
    }

    #[test]
    fn only_what_looks_like_a_jwt_has_claims() {
        let claims_of = BASE64_URL_SAFE_NO_PAD.encode(br#"{"jti":"7"}"#);
        assert_eq!(claims(&format!("h.{claims_of}.s")).unwrap()["jti"], "7");
        for none in ["", "a", "a.b", "a.b.c", "a.b.c.d"] {
            assert!(claims(none).is_none(), "{none}");
        }
    }
}
