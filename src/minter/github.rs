//! Installation access tokens of a GitHub App: `POST /app/installations/ID/access_tokens` by a JWT of the
//! App's, `DELETE /installation/token` by the token itself. docs.github.com, "REST API endpoints for GitHub Apps".
#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use hyper::header::{self, HeaderName, HeaderValue};
use hyper::{Method, StatusCode};
use serde::Deserialize;
use serde_json::json;

use super::http::{Answered, Call, Http};
use super::{Minted, Outcome, fill, handle, jws, words};
use crate::config::source::github::{GithubApp, Repositories};
use crate::config::source::url::HttpUrl;
use crate::model::mint::{About, Facts, Failure, Fault, Operation, Request, Role};

const API_VERSION: &str = "2022-11-28";
/// Its JWT may live ten minutes; a clock that is a little ahead must not spoil it.
const JWT_SECONDS: i64 = 540;
const JWT_BEFORE: i64 = 60;

pub fn answer(app: &GithubApp, http: &Http, request: &Request<'_>) -> Result<Outcome, Failure> {
    match request.operation {
        Operation::Mint => mint(app, http, request).map(Outcome::Minted),
        Operation::Revoke => revoke(app, http, handle(request)?).map(|()| Outcome::Revoked),
        Operation::Renew => Err(Failure::of(Fault::Minter)),
    }
}

#[derive(Deserialize)]
struct Installation {
    id: u64,
}

#[derive(Deserialize)]
struct Token {
    token: String,
    expires_at: jiff::Timestamp,
    #[serde(default)]
    permissions: BTreeMap<String, String>,
    repositories: Option<Vec<Repository>>,
}

#[derive(Deserialize)]
struct Repository {
    name: String,
    full_name: String,
}

/// What the token shall reach: names without their owner, and the owner.
struct Wanted {
    owner: Option<String>,
    /// Nothing: all of the installation's.
    names: Option<Vec<String>>,
}

fn mint(app: &GithubApp, http: &Http, request: &Request<'_>) -> Result<Minted, Failure> {
    let facts = &request.facts;
    let wanted = wanted(app, facts)?;
    let key = request.credential(Role::PrivateKey).ok_or(Failure::of(Fault::Credential))?;
    let claims = json!({
        "iat": facts.now - JWT_BEFORE, "exp": facts.now + JWT_SECONDS - JWT_BEFORE, "iss": app.app_id,
    });
    let jwt = jws::rs256(key, &claims)?;
    let installation = match (&app.installation_id, &wanted.owner, &wanted.names) {
        (Some(id), ..) => id.clone(),
        (None, Some(owner), Some(names)) => {
            let first = names.first().ok_or(Failure::of(Fault::Unnarrowed))?;
            let url = app.api_url.join(&format!("repos/{owner}/{first}/installation"));
            let answered = call(http, Method::GET, &url, jwt.as_bytes(), Vec::new())?;
            success(&answered)?;
            answered.json::<Installation>()?.id.to_string()
        }
        (None, ..) => return Err(Failure::of(Fault::Unnarrowed)),
    };
    let mut body = json!({ "permissions": app.permissions });
    if let Some(names) = &wanted.names {
        body["repositories"] = json!(names);
    }
    let url = app.api_url.join(&format!("app/installations/{installation}/access_tokens"));
    let answered = call(http, Method::POST, &url, jwt.as_bytes(), body.to_string().into_bytes())?;
    success(&answered)?;
    let token: Token = answered.json()?;
    if token.token.is_empty() || !token.token.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(answered.failure(Fault::Incomplete));
    }
    if is_wider(app, &wanted, &token) {
        // It was issued all the same. That it could not be taken is what is told.
        drop(revoke(app, http, token.token.as_bytes()));
        return Err(answered.failure(Fault::TooWide));
    }
    let permissions: Vec<String> =
        token.permissions.iter().map(|(name, level)| format!("{name}:{level}")).collect();
    let names = match (&wanted.owner, &wanted.names) {
        (_, None) => "*".to_owned(),
        (Some(owner), Some(names)) => {
            names.iter().map(|name| format!("{owner}/{name}")).collect::<Vec<_>>().join(" ")
        }
        (None, Some(names)) => names.join(" "),
    };
    let about = About {
        issuer: words(&format!("https://{}", app.api_url.authority())),
        scope: Some(words(&format!("{} {names}", permissions.join(" ")))),
        principal: Some(words(&format!("app {} installation {installation}", app.app_id))),
        far_id: None,
        expires_at: Some(token.expires_at.as_millisecond()),
        renew_at: None,
    };
    let value = token.token.into_bytes();
    Ok(Minted { handle: Some(value.clone()), value, parts: Vec::new(), about })
}

fn wanted(app: &GithubApp, facts: &Facts) -> Result<Wanted, Failure> {
    let given = match &app.repositories {
        Repositories::All => return Ok(Wanted { owner: None, names: None }),
        Repositories::These(names) => {
            names.iter().map(|name| fill::words(name, facts)).collect::<Result<Vec<_>, _>>()?
        }
        Repositories::OfCapability => {
            let of = facts.constraint("resource").or(facts.path.as_deref());
            vec![of.ok_or(Failure::of(Fault::Unnarrowed))?.to_owned()]
        }
    };
    let (mut owner, mut names) = (None, Vec::new());
    for given in given {
        let given = given.trim_end_matches(".git");
        let (of, name) = match given.split_once('/') {
            Some((of, name)) => (Some(of), name),
            None => (None, given),
        };
        let plain = |text: &str| {
            let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
            !text.is_empty() && text != "." && text != ".." && text.bytes().all(plain)
        };
        let is_same_owner = owner.is_none() || owner.as_deref() == of;
        if !plain(name) || !of.is_none_or(plain) || !is_same_owner {
            return Err(Failure::of(Fault::Unnarrowed));
        }
        owner = owner.or(of.map(str::to_owned));
        names.push(name.to_owned());
    }
    Ok(Wanted { owner, names: Some(names) })
}

/// Whether the token can do what was not asked for. `metadata: read` comes with every other permission.
fn is_wider(app: &GithubApp, wanted: &Wanted, token: &Token) -> bool {
    let level = |level: &str| match level {
        "read" => 1,
        "write" => 2,
        _ => 3,
    };
    let wider = token.permissions.iter().any(|(name, given)| {
        let asked = app.permissions.get(name).map_or(0, |asked| level(asked));
        let comes_along = name == "metadata" && given == "read";
        level(given) > asked && !comes_along
    });
    let elsewhere = match (&wanted.names, &token.repositories) {
        (None, _) => false,
        // Not said: the narrowing would have to be believed.
        (Some(_), None) => true,
        (Some(names), Some(given)) => given.iter().any(|repository| {
            let is_owners = wanted.owner.as_ref().is_none_or(|owner| {
                repository.full_name.eq_ignore_ascii_case(&format!("{owner}/{}", repository.name))
            });
            !is_owners || !names.iter().any(|name| name.eq_ignore_ascii_case(&repository.name))
        }),
    };
    wider || elsewhere
}

fn revoke(app: &GithubApp, http: &Http, token: &[u8]) -> Result<(), Failure> {
    let url = app.api_url.join("installation/token");
    let answered = call(http, Method::DELETE, &url, token, Vec::new())?;
    match answered.status {
        // A token that is no longer good for this is no longer good.
        StatusCode::UNAUTHORIZED => Ok(()),
        _ => success(&answered),
    }
}

fn success(answered: &Answered) -> Result<(), Failure> {
    match answered.status.is_success() {
        true => Ok(()),
        false => Err(answered.refusal()),
    }
}

fn call(
    http: &Http,
    method: Method,
    url: &HttpUrl,
    bearer: &[u8],
    body: Vec<u8>,
) -> Result<Answered, Failure> {
    let bad = |_| Failure::of(Fault::Credential);
    let bearer = HeaderValue::from_bytes(&[b"Bearer ", bearer].concat()).map_err(bad)?;
    let headers = vec![
        (header::AUTHORIZATION, bearer),
        (header::ACCEPT, HeaderValue::from_static("application/vnd.github+json")),
        (header::CONTENT_TYPE, HeaderValue::from_static("application/json")),
        (HeaderName::from_static("x-github-api-version"), HeaderValue::from_static(API_VERSION)),
    ];
    http.call(Call { method, url, headers, body })
}
