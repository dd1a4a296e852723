//! An address that a minter may speak to: `https`, or `http` to this machine itself. No user, no fragment.
#![forbid(unsafe_code)]

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HttpUrl {
    pub tls: bool,
    /// Lower case; an IPv6 address without its brackets.
    pub host: String,
    pub port: u16,
    /// Begins with `/`; with the query, if there is one.
    pub path: String,
}

/// The text is no address of that kind. Does not show the text: a URL may carry a password.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("it {0}")]
pub struct InvalidUrl(&'static str);

impl HttpUrl {
    /// This address with `more` after its path. Segments must not need escaping.
    pub fn join(&self, more: &str) -> Self {
        let mut joined = self.clone();
        joined.path =
            format!("{}/{}", self.path.trim_end_matches('/'), more.trim_start_matches('/'));
        joined
    }

    /// `host`, or `host:port` where the port is not the scheme's own: the `Host` header.
    pub fn authority(&self) -> String {
        let host = match self.host.contains(':') {
            true => format!("[{}]", self.host),
            false => self.host.clone(),
        };
        match (self.tls, self.port) {
            (true, 443) | (false, 80) => host,
            (_, port) => format!("{host}:{port}"),
        }
    }

    pub fn is_same_origin(&self, other: &HttpUrl) -> bool {
        (self.tls, &self.host, self.port) == (other.tls, &other.host, other.port)
    }
}

impl FromStr for HttpUrl {
    type Err = InvalidUrl;

    fn from_str(text: &str) -> Result<Self, InvalidUrl> {
        if text.len() > 2048 || !text.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(InvalidUrl("must be plain ASCII without blanks"));
        }
        let (tls, rest) = match (text.strip_prefix("https://"), text.strip_prefix("http://")) {
            (Some(rest), _) => (true, rest),
            (None, Some(rest)) => (false, rest),
            (None, None) => return Err(InvalidUrl("must begin with `https://`")),
        };
        if rest.contains('#') {
            return Err(InvalidUrl("must have no fragment"));
        }
        let end = rest.find(['/', '?']).unwrap_or(rest.len());
        let (authority, path) = rest.split_at(end);
        if authority.contains('@') {
            return Err(InvalidUrl("must hold no user name or password"));
        }
        let (host, port) = match authority.strip_prefix('[').and_then(|a| a.split_once(']')) {
            Some((host, port)) => match host.parse::<std::net::Ipv6Addr>() {
                Ok(_) if port.is_empty() || port.starts_with(':') => (host, port.strip_prefix(':')),
                _ => return Err(InvalidUrl("names no host")),
            },
            None => match authority.split_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (authority, None),
            },
        };
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_' | b':');
        if host.is_empty() || host.len() > 253 || !host.bytes().all(plain) {
            return Err(InvalidUrl("names no host"));
        }
        let port = match port {
            None if tls => 443,
            None => 80,
            Some(port) => match port.parse() {
                Ok(port) if port > 0 => port,
                _ => return Err(InvalidUrl("has a port that is none")),
            },
        };
        let path = match path.chars().next() {
            None => "/".to_owned(),
            Some('?') => format!("/{path}"),
            Some(_) => path.to_owned(),
        };
        let url = Self { tls, host: host.to_ascii_lowercase(), port, path };
        if !tls && !is_loopback(&url.host) {
            return Err(InvalidUrl(
                "must be `https`: plain `http` is for this machine's loopback alone",
            ));
        }
        Ok(url)
    }
}

fn is_loopback(host: &str) -> bool {
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

impl fmt::Display for HttpUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.tls { "https" } else { "http" };
        write!(f, "{scheme}://{}{}", self.authority(), self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        #[track_caller]
        fn check(text: &str, expected: Option<&str>) {
            let found = text.parse::<HttpUrl>();
            assert_eq!(found.map(|url| url.to_string()).ok().as_deref(), expected, "{text}");
        }
        check("https://login.example.com/token", Some("https://login.example.com/token"));
        check("https://Login.Example.com", Some("https://login.example.com/"));
        check("https://h:8443/a?b=c", Some("https://h:8443/a?b=c"));
        check("https://h?b=c", Some("https://h/?b=c"));
        check("https://[2001:db8::1]:8443/", Some("https://[2001:db8::1]:8443/"));
        check("http://127.0.0.1:8080/t", Some("http://127.0.0.1:8080/t"));
        check("http://[::1]/t", Some("http://[::1]/t"));
        check("http://localhost/t", Some("http://localhost/t"));
        for bad in [
            "",
            "login.example.com",
            "http://login.example.com/token",
            "http://localhost.example.com/",
            "http://127.0.0.1.example.com/",
            "ftp://h/",
            "https://",
            "https:///x",
            "https://u:hunter2@h/",
            "https://h:0/",
            "https://h:65536/",
            "https://h:/",
            "https://[::1/",
            "https://[h]/",
            "https://[::1]x/",
            "https://h/#f",
            "https://h/a b",
            "https://h/\n",
            "https://h%0d/",
        ] {
            check(bad, None);
        }
        let url: HttpUrl = "https://ghe.example.com/api/v3/".parse().unwrap();
        assert_eq!(url.join("/app").to_string(), "https://ghe.example.com/api/v3/app");
    }
}
