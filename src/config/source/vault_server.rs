//! `source = "vault-server"`: a secret of a Vault or OpenBao server, read (KV) or made for us (any dynamic
//! engine) and then renewed while our lease lives and revoked when it ends.
#![forbid(unsafe_code)]

use std::ops::Range;

use serde::{Deserialize, Serialize};
use toml::Spanned;

use super::raw::RawSecret;
use super::url::HttpUrl;
use crate::config::parse::{At, Checked};
use crate::model::mint::Role;
use crate::model::name::SecretName;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VaultServer {
    /// Without `/v1`.
    pub url: HttpUrl,
    pub namespace: Option<String>,
    pub auth: Auth,
    pub engine: Engine,
    pub mount: String,
    /// Below the mount.
    pub path: String,
    /// The one field that is the value. Nothing: all of them, as a JSON object.
    pub field: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Engine {
    Kv1,
    Kv2,
    /// Reading makes a credential with a lease of the server's.
    Dynamic,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Auth {
    Token { token: SecretName },
    AppRole { mount: String, role_id: String, secret_id: SecretName },
    Jwt { mount: String, role: String, jwt: SecretName },
}

impl VaultServer {
    pub(super) fn credentials(&self) -> Vec<(Role, &SecretName)> {
        vec![match &self.auth {
            Auth::Token { token } => (Role::Token, token),
            Auth::AppRole { secret_id, .. } => (Role::SecretId, secret_id),
            Auth::Jwt { jwt, .. } => (Role::Jwt, jwt),
        }]
    }

    pub(super) fn take(
        at: &At<'_>,
        name: &SecretName,
        raw: &mut RawSecret,
        whole: &Range<usize>,
    ) -> Checked<Self> {
        let url = at.url_of(name, "url", at.needed(name, "url", raw.url.take(), whole)?)?;
        let needed =
            |key, value| at.needed(name, key, value, whole).and_then(|value| at.plain(key, value));
        let auth = at.needed(name, "auth", raw.auth.take(), whole)?;
        let mount = |raw: &mut RawSecret, or: &str| match raw.auth_mount.take() {
            Some(given) => at.plain("auth_mount", given),
            None => Ok(or.to_owned()),
        };
        let auth = match auth.get_ref().as_str() {
            "token" => Auth::Token {
                token: at.needed(name, "token", raw.token.take(), whole)?.into_inner(),
            },
            "approle" => Auth::AppRole {
                mount: mount(raw, "approle")?,
                role_id: needed("role_id", raw.role_id.take())?,
                secret_id: at.needed(name, "secret_id", raw.secret_id.take(), whole)?.into_inner(),
            },
            "jwt" => Auth::Jwt {
                mount: mount(raw, "jwt")?,
                role: needed("role", raw.role.take())?,
                jwt: at.needed(name, "jwt", raw.jwt.take(), whole)?.into_inner(),
            },
            _ => return Err(at.at(auth.span(), "`auth` is `token`, `approle` or `jwt`")),
        };
        let engine = at.needed(name, "engine", raw.engine.take(), whole)?;
        let engine = match engine.get_ref().as_str() {
            "kv-v1" => Engine::Kv1,
            "kv-v2" => Engine::Kv2,
            "dynamic" => Engine::Dynamic,
            _ => return Err(at.at(engine.span(), "`engine` is `kv-v1`, `kv-v2` or `dynamic`")),
        };
        Ok(Self {
            url,
            namespace: raw.namespace.take().map(|n| at.plain("namespace", n)).transpose()?,
            auth,
            engine,
            mount: needed("mount", raw.mount.take())?,
            path: needed("path", raw.path.take())?,
            field: raw.field.take().map(Spanned::into_inner),
        })
    }
}
