//! `source = "postgres-role"`: a role of a PostgreSQL server that is made for the lease and dropped with it.
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
pub struct PostgresRole {
    /// Host, port, and whether TLS is spoken; the path means nothing.
    pub server: HttpUrl,
    pub database: String,
    /// Who makes the roles, and the secret that it logs in with.
    pub user: String,
    pub password: SecretName,
    /// The roles that the new one is a member of. Never empty.
    pub grants: Vec<String>,
    /// Whom objects are given to that the role made. Nothing: they are dropped with it.
    pub reassign_to: Option<String>,
}

impl PostgresRole {
    pub(super) fn credentials(&self) -> Vec<(Role, &SecretName)> {
        vec![(Role::Password, &self.password)]
    }

    pub(super) fn urls(&self) -> Vec<&HttpUrl> {
        vec![&self.server]
    }

    pub(super) fn take(
        at: &At<'_>,
        name: &SecretName,
        raw: &mut RawSecret,
        whole: &Range<usize>,
    ) -> Checked<Self> {
        let server = at.needed(name, "server", raw.server.take(), whole)?;
        let tls = match raw.tls.take() {
            None => true,
            Some(given) => match given.get_ref().as_str() {
                "require" => true,
                "disable" => false,
                _ => return Err(at.at(given.span(), "`tls` is `require` or `disable`")),
            },
        };
        let server = address(server.get_ref(), tls).map_err(|why| at.at(server.span(), why))?;
        let database = at.needed(name, "database", raw.database.take(), whole)?;
        let user = at.needed(name, "user", raw.user.take(), whole)?;
        let grants = at.needed(name, "grants", raw.grants.take(), whole)?;
        let span = grants.span();
        let grants: Vec<String> = grants.into_inner().into();
        if grants.is_empty() || grants.len() > 32 || !grants.iter().all(|g| is_name(g)) {
            return Err(at.at(span, format!("`grants` are 1 to 32 roles, each {NAME}")));
        }
        let named = |given: Spanned<String>, key: &str| match is_name(given.get_ref()) {
            true => Ok(given.into_inner()),
            false => Err(at.at(given.span(), format!("`{key}` is {NAME}"))),
        };
        Ok(Self {
            server,
            database: named(database, "database")?,
            user: named(user, "user")?,
            password: at.needed(name, "password", raw.password.take(), whole)?.into_inner(),
            grants,
            reassign_to: raw.reassign_to.take().map(|r| named(r, "reassign_to")).transpose()?,
        })
    }
}

const NAME: &str = "1 to 63 letters, digits, `_`, `-`, `.` and `$`";

/// What needs no escape between quotes, and no care in a URI.
fn is_name(text: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"_-.$".contains(&b);
    (1..=63).contains(&text.len()) && text.bytes().all(plain)
}

fn address(text: &str, tls: bool) -> Result<HttpUrl, String> {
    let scheme = if tls { "https" } else { "http" };
    let is_host = text.parse::<crate::model::name::AudienceName>().is_ok();
    if !is_host {
        return Err("`server` is `host` or `host:port`".to_owned());
    }
    let mut url: HttpUrl = format!("{scheme}://{text}").parse().map_err(|_| match tls {
        true => "`server` is `host` or `host:port`".to_owned(),
        false => "`tls = \"disable\"` is for this machine's loopback alone".to_owned(),
    })?;
    let has_port = text.rsplit_once(':').is_some_and(|(_, port)| !port.ends_with(']'));
    if !has_port {
        url.port = 5432;
    }
    Ok(url)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_are_hosts_with_the_port_of_postgresql() {
        #[track_caller]
        fn check(text: &str, tls: bool, expected: Option<(&str, u16)>) {
            let found = address(text, tls).ok();
            let found = found.as_ref().map(|url| (url.host.as_str(), url.port));
            assert_eq!(found, expected, "{text}");
        }
        check("db.internal", true, Some(("db.internal", 5432)));
        check("db.internal:6432", true, Some(("db.internal", 6432)));
        check("127.0.0.1:5433", false, Some(("127.0.0.1", 5433)));
        check("[::1]", false, Some(("::1", 5432)));
        check("db.internal", false, None);
        check("db.internal/x", true, None);
        check("me@db.internal", true, None);
    }
}
