//! `source = "ssh-ca"`: a key pair and an OpenSSH user certificate for one exec, made by the broker with a
//! CA's key; the channel `ssh` alone delivers it.
#![forbid(unsafe_code)]

use std::ops::Range;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use toml::Spanned;

use super::raw::RawSecret;
use crate::config::parse::{At, Checked};
use crate::model::mint::Role;
use crate::model::moment::Span;
use crate::model::name::SecretName;
use crate::model::ssh::Reader;

/// What its certificates are like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SshCa {
    /// The secret that holds the CA's private key.
    pub ca: SecretName,
    /// Never empty.
    pub principals: Vec<String>,
    pub force_command: Option<String>,
    pub source_address: Option<String>,
    pub extensions: Vec<String>,
    pub validity: Span,
    /// Servers' public keys, decoded: logins to others are not signed. Empty: any server's.
    pub host_keys: Vec<Vec<u8>>,
}

const DEFAULT_VALIDITY: Span = Span::seconds(300);
/// A certificate cannot be taken back: it lives for minutes.
const VALIDITY: std::ops::RangeInclusive<Span> = Span::seconds(10)..=Span::seconds(3600);
/// Of `ssh-keygen -O`, those that grant something.
const EXTENSIONS: [&str; 6] = [
    "no-touch-required",
    "permit-X11-forwarding",
    "permit-agent-forwarding",
    "permit-port-forwarding",
    "permit-pty",
    "permit-user-rc",
];

impl SshCa {
    pub(super) fn credentials(&self) -> Vec<(Role, &SecretName)> {
        vec![(Role::CaKey, &self.ca)]
    }

    pub(super) fn take(
        at: &At<'_>,
        name: &SecretName,
        raw: &mut RawSecret,
        whole: &Range<usize>,
    ) -> Checked<Self> {
        let ca = at.needed(name, "ca", raw.ca.take(), whole)?.into_inner();
        let principals = at.needed(name, "principals", raw.principals.take(), whole)?;
        let span = principals.span();
        let principals: Vec<String> = principals.into_inner().into();
        // A comma ends a principal in files that list them, and an empty one is any in some.
        let plain = |text: &String| {
            !text.is_empty()
                && text.len() <= 256
                && text.bytes().all(|b| b.is_ascii_graphic() && !b",*?!".contains(&b))
        };
        if principals.is_empty() || principals.len() > 32 || !principals.iter().all(plain) {
            let message = "`principals` are 1 to 32 names without spaces, `,`, `*`, `?` and `!`";
            return Err(at.at(span, message));
        }
        let extensions = raw.extensions.take();
        let span = extensions.as_ref().map_or(whole.clone(), Spanned::span);
        let extensions: Vec<String> = extensions.map_or(Vec::new(), |e| e.into_inner().into());
        if let Some(unknown) = extensions.iter().find(|e| !EXTENSIONS.contains(&e.as_str())) {
            let shown: String = unknown.chars().take(40).filter(|c| !c.is_control()).collect();
            let known = EXTENSIONS.join(", ");
            return Err(at.at(span, format!("`{shown}` is no extension: there are {known}")));
        }
        let validity = match raw.validity.take() {
            None => DEFAULT_VALIDITY,
            Some(given) if VALIDITY.contains(given.get_ref()) => given.into_inner(),
            Some(given) => {
                let (least, most) = (VALIDITY.start(), VALIDITY.end());
                return Err(at.at(given.span(), format!("`validity` is {least} to {most}")));
            }
        };
        let host_keys = match raw.host_keys.take() {
            None => Vec::new(),
            Some(given) => {
                let (span, words) = (given.span(), Vec::<String>::from(given.into_inner()));
                let parsed: Option<Vec<_>> = words.iter().map(|line| public_key(line)).collect();
                parsed.ok_or_else(|| {
                    let form = "`ssh-ed25519 AAAA…`, as a `.pub` file has it";
                    at.at(span, format!("`host_keys` are public keys of servers: {form}"))
                })?
            }
        };
        Ok(Self {
            ca,
            principals,
            force_command: text(at, "force_command", raw.force_command.take())?,
            source_address: text(at, "source_address", raw.source_address.take())?,
            extensions,
            validity,
            host_keys,
        })
    }
}

fn text(at: &At<'_>, key: &str, given: Option<Spanned<String>>) -> Checked<Option<String>> {
    let Some(given) = given else { return Ok(None) };
    let plain = |t: &String| !t.is_empty() && t.len() <= 4096 && !t.chars().any(char::is_control);
    if plain(given.get_ref()) {
        return Ok(Some(given.into_inner()));
    }
    Err(at.at(given.span(), format!("`{key}` is a line of at most 4096 bytes")))
}

/// The blob of a line of a `.pub` file, which begins with the type that the line names.
fn public_key(line: &str) -> Option<Vec<u8>> {
    let mut words = line.split_ascii_whitespace();
    let (kind, text) = (words.next()?, words.next()?);
    let blob = STANDARD.decode(text).ok()?;
    (Reader::new(&blob).string()? == kind.as_bytes()).then_some(blob)
}
