//! Vault and OpenBao: log in (AppRole, JWT, or a token that is there), read a KV secret or have a dynamic
//! engine make one, renew and revoke what it made. developer.hashicorp.com/vault/api-docs, openbao.org/api-docs.
//!
//! A token that we logged in for is ended again: at once after a KV read, with the lease that hangs on it
//! otherwise. It is what revokes: no policy for `sys/leases/revoke` is needed then.
#![forbid(unsafe_code)]

use hyper::Method;
use hyper::header::{self, HeaderName, HeaderValue};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::http::{Answered, Call, Http};
use super::{Minted, Outcome, handle, seconds_from, words};
use crate::config::source::vault_server::{Auth, Engine, VaultServer};
use crate::model::mint::{About, Failure, Fault, Operation, Request, Role};

/// What a lease of the server's is renewed and ended by.
#[derive(Serialize, Deserialize)]
struct Handle {
    lease_id: String,
    /// The token that it hangs on, where we logged in for it.
    token: Option<String>,
}

#[derive(Deserialize)]
struct Login {
    auth: LoginAuth,
}

#[derive(Deserialize)]
struct LoginAuth {
    client_token: String,
    /// `display_name` is not everywhere; the entity is what the server's own log knows.
    entity_id: Option<String>,
}

#[derive(Deserialize)]
struct Secret {
    #[serde(default)]
    lease_id: String,
    #[serde(default)]
    lease_duration: i64,
    #[serde(default)]
    renewable: bool,
    data: Option<Map<String, Value>>,
    request_id: Option<String>,
}

struct Server<'a> {
    config: &'a VaultServer,
    http: &'a Http,
}

/// A token, and whether it was made for this.
struct Session {
    token: String,
    is_ours: bool,
    entity: Option<String>,
}

pub fn answer(
    config: &VaultServer,
    http: &Http,
    request: &Request<'_>,
) -> Result<Outcome, Failure> {
    let server = Server { config, http };
    let of = |handle: &[u8]| {
        serde_json::from_slice::<Handle>(handle).map_err(|_| Failure::of(Fault::Minter))
    };
    match request.operation {
        Operation::Mint => server.mint(request),
        Operation::Revoke => {
            server.revoke(request, of(handle(request)?)?).map(|()| Outcome::Revoked)
        }
        Operation::Renew => server.renew(request, of(handle(request)?)?).map(Outcome::Renewed),
    }
}

impl Server<'_> {
    fn mint(&self, request: &Request<'_>) -> Result<Outcome, Failure> {
        let session = self.log_in(request)?;
        let read = self.read(request, &session);
        // A dynamic secret's lease hangs on the token; all else that we logged in for is over.
        let keeps = read.as_ref().is_ok_and(|minted| minted.handle.is_some());
        if session.is_ours && !keeps {
            let ended = self.end_token(&session.token);
            if read.is_ok() {
                ended?;
            }
        }
        read.map(Outcome::Minted)
    }

    fn log_in(&self, request: &Request<'_>) -> Result<Session, Failure> {
        let credential = |role| {
            request
                .credential(role)
                .and_then(|bytes| std::str::from_utf8(bytes).ok())
                .filter(|text| !text.is_empty())
                .ok_or(Failure::of(Fault::Credential))
        };
        let (mount, body) = match &self.config.auth {
            Auth::Token { .. } => {
                let token = credential(Role::Token)?.to_owned();
                return Ok(Session { token, is_ours: false, entity: None });
            }
            Auth::AppRole { mount, role_id, .. } => {
                (mount, json!({"role_id": role_id, "secret_id": credential(Role::SecretId)?}))
            }
            Auth::Jwt { mount, role, .. } => {
                (mount, json!({"role": role, "jwt": credential(Role::Jwt)?}))
            }
        };
        let answered = self.call(Method::POST, &format!("auth/{mount}/login"), None, Some(body))?;
        success(&answered)?;
        let login: Login = answered.json()?;
        if login.auth.client_token.is_empty() {
            return Err(answered.failure(Fault::Incomplete));
        }
        Ok(Session {
            token: login.auth.client_token,
            is_ours: true,
            entity: login.auth.entity_id.filter(|id| !id.is_empty()),
        })
    }

    fn read(&self, request: &Request<'_>, session: &Session) -> Result<Minted, Failure> {
        let VaultServer { mount, path, engine, .. } = self.config;
        let path = match engine {
            Engine::Kv2 => format!("{mount}/data/{path}"),
            Engine::Kv1 | Engine::Dynamic => format!("{mount}/{path}"),
        };
        let answered = self.call(Method::GET, &path, Some(&session.token), None)?;
        success(&answered)?;
        let secret: Secret = answered.json()?;
        let lacks = || answered.failure(Fault::Incomplete);
        let mut data = secret.data.ok_or_else(lacks)?;
        if *engine == Engine::Kv2 {
            data = match data.remove("data") {
                Some(Value::Object(data)) => data,
                // A version that was deleted has none.
                _ => return Err(lacks()),
            };
        }
        let value = match &self.config.field {
            None => Value::Object(data.clone()).to_string(),
            Some(field) => match data.get(field) {
                Some(Value::String(text)) => text.clone(),
                Some(other) if !other.is_null() => other.to_string(),
                _ => return Err(lacks()),
            },
        };
        // Whole, a document is masked as such; its parts are what a command would print.
        let parts = data.values().filter_map(Value::as_str);
        let parts = parts.map(|text| ("field", true, text.as_bytes().to_vec())).collect();
        let mut about = About {
            issuer: words(&format!("https://{}", self.config.url.authority())),
            scope: Some(words(&path)),
            principal: session.entity.as_deref().map(words),
            far_id: secret.request_id.as_deref().map(words),
            ..About::default()
        };
        let is_leased = *engine == Engine::Dynamic && !secret.lease_id.is_empty();
        if *engine == Engine::Dynamic && !is_leased {
            return Err(lacks());
        }
        let mut handle = None;
        if is_leased {
            let seconds = secret.lease_duration.max(0);
            about.far_id = Some(words(&secret.lease_id));
            about.expires_at = Some(seconds_from(&request.facts, seconds));
            // Left a third of its time, for more than one try.
            about.renew_at =
                secret.renewable.then(|| seconds_from(&request.facts, seconds * 2 / 3));
            let token = session.is_ours.then(|| session.token.clone());
            let kept = Handle { lease_id: secret.lease_id, token };
            handle = Some(serde_json::to_vec(&kept).map_err(|_| lacks())?);
        }
        Ok(Minted { value: value.into_bytes(), parts, about, handle })
    }

    fn renew(&self, request: &Request<'_>, handle: Handle) -> Result<About, Failure> {
        let token = match &handle.token {
            Some(token) => token.clone(),
            None => self.log_in(request)?.token,
        };
        let increment = request.facts.ttl_seconds;
        if handle.token.is_some() {
            // The lease lives no longer than the token that it hangs on.
            let body = json!({ "increment": format!("{increment}s") });
            let path = "auth/token/renew-self";
            success(&self.call(Method::POST, path, Some(&token), Some(body))?)?;
        }
        let body = json!({ "lease_id": handle.lease_id, "increment": increment });
        let answered = self.call(Method::PUT, "sys/leases/renew", Some(&token), Some(body))?;
        success(&answered)?;
        let renewed: Secret = answered.json()?;
        let seconds = renewed.lease_duration.max(0);
        Ok(About {
            expires_at: Some(seconds_from(&request.facts, seconds)),
            renew_at: renewed.renewable.then(|| seconds_from(&request.facts, seconds * 2 / 3)),
            ..About::default()
        })
    }

    fn revoke(&self, request: &Request<'_>, handle: Handle) -> Result<(), Failure> {
        if let Some(token) = &handle.token {
            return self.end_token(token);
        }
        let session = self.log_in(request)?;
        let body = json!({ "lease_id": handle.lease_id, "sync": true });
        let revoked =
            self.call(Method::PUT, "sys/leases/revoke", Some(&session.token), Some(body))?;
        success(&revoked)
    }

    /// Ends the token, and all leases that hang on it.
    fn end_token(&self, token: &str) -> Result<(), Failure> {
        let end = |path: &str| self.call(Method::POST, path, Some(token), None);
        let mut answered = end("auth/token/revoke-self")?;
        // RustyVault has that path alone which names the token. No other server is told it so: there it would
        // stand in logs, perhaps of a token that lives on.
        if !answered.status.is_success() && is_rusty_vault(&answered) && is_plain(token) {
            answered = end(&format!("auth/token/revoke/{token}"))?;
        }
        match answered.status.as_u16() {
            // The server no longer knows it: then what hung on it is gone as well.
            403 => Ok(()),
            _ => success(&answered),
        }
    }

    fn call(
        &self,
        method: Method,
        path: &str,
        token: Option<&str>,
        body: Option<Value>,
    ) -> Result<Answered, Failure> {
        let value =
            |text: &str| HeaderValue::from_str(text).map_err(|_| Failure::of(Fault::Credential));
        let mut headers = vec![
            (header::CONTENT_TYPE, HeaderValue::from_static("application/json")),
            (HeaderName::from_static("x-vault-request"), HeaderValue::from_static("true")),
        ];
        if let Some(token) = token {
            headers.push((HeaderName::from_static("x-vault-token"), value(token)?));
        }
        if let Some(namespace) = &self.config.namespace {
            headers.push((HeaderName::from_static("x-vault-namespace"), value(namespace)?));
        }
        let url = self.config.url.join(&format!("v1/{path}"));
        let body = body.map(|body| body.to_string().into_bytes()).unwrap_or_default();
        self.http.call(Call { method, url: &url, headers, body })
    }
}

/// Whether a refusal is RustyVault's: `{"error": TEXT}`, where Vault and OpenBao have `{"errors": [TEXT]}`.
fn is_rusty_vault(answered: &Answered) -> bool {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Refusal {
        #[serde(rename = "error")]
        _error: String,
    }
    answered.json::<Refusal>().is_ok()
}

/// Whether a token can stand in a path as it is.
fn is_plain(token: &str) -> bool {
    token.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b)) && !token.contains("..")
}

fn success(answered: &Answered) -> Result<(), Failure> {
    match answered.status.is_success() {
        true => Ok(()),
        false => Err(answered.refusal()),
    }
}
