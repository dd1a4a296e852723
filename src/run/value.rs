//! A value on its way from its source to its delivery, in locked memory or still sealed.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::Deserialize;
use serde_json::value::RawValue;

use super::caller::Caller;
use super::entries::Leased;
use super::error::RunError;
use super::identity::{self, Minted};
use super::ledger::Ledger;
use super::scene::Scene;
use super::ssh::{self, SshIdentity};
use crate::config::SecretSource;
use crate::launcher::client::Session;
use crate::launcher::wire::{Notice, Order, Refusal, RefusalKind};
use crate::model::name::SecretName;
use crate::model::secret::{MAX_VALUE, Secret};
use crate::source::vault::{self, VaultError, VaultKey};
use crate::store::SealedSecret;

/// Between two looks at a caller who says what can wait.
const A_MOMENT: Timespec = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };

/// A value, not yet delivered.
pub enum Value {
    /// Opened where it is delivered, so that no other copy is made.
    Sealed {
        key: VaultKey,
        secret: SealedSecret,
        len: usize,
    },
    Plain(Secret),
    /// Of this host's own issuer, which may be replaced while its exec lives.
    Token(Minted),
    /// Never delivered itself: what is signed with it is.
    Ssh(SshIdentity),
}

impl Value {
    pub fn len(&self) -> usize {
        match self {
            Value::Sealed { len, .. } => *len,
            Value::Plain(secret) => secret.len(),
            Value::Token(minted) => minted.token.len(),
            Value::Ssh(_) => 0,
        }
    }

    /// Writes the value to `out`, which has exactly its length.
    pub fn write_to(&self, out: &mut [u8]) -> Result<(), RunError> {
        match self {
            Value::Sealed { key, secret, .. } => {
                let entry = &secret.entry;
                vault::open_into(key, &entry.name, entry.version, &secret.sealed, out)
                    .map_err(unavailable_vault)
            }
            Value::Plain(plain) => {
                out.copy_from_slice(plain.expose());
                Ok(())
            }
            Value::Token(minted) => {
                out.copy_from_slice(minted.token.expose());
                Ok(())
            }
            Value::Ssh(_) => Err(no_value()),
        }
    }

    /// The value in locked memory of its own, for the `git` channel.
    pub fn into_secret(self) -> Result<Secret, RunError> {
        match self {
            Value::Plain(secret) => Ok(secret),
            Value::Token(minted) => Ok(minted.token),
            Value::Ssh(_) => Err(no_value()),
            sealed @ Value::Sealed { .. } => {
                let mut secret = Secret::zeroed(sealed.len()).map_err(RunError::Delivery)?;
                sealed.write_to(secret.expose_mut())?;
                Ok(secret)
            }
        }
    }
}

pub fn unavailable(name: &SecretName, why: &str, hint: &str) -> RunError {
    RunError::Refused(Refusal {
        kind: RefusalKind::SourceUnavailable,
        message: format!("the source of secret `{name}` is not available: {why}"),
        hint: hint.to_owned(),
    })
}

pub fn unavailable_vault(error: VaultError) -> RunError {
    RunError::Refused(Refusal {
        kind: RefusalKind::SourceUnavailable,
        message: crate::launcher::compile::chain(&error),
        hint: "check the vault's key, or set the secret again with `sublet secret set`".to_owned(),
    })
}

/// Resolves the value of one lease from its source. Where there is a `caller`, they can end the
/// wait for a slow source.
pub fn resolve(
    scene: &Scene,
    ledger: &Ledger,
    session: &Session,
    caller: Option<&Caller>,
    lease: &Leased,
) -> Result<Value, RunError> {
    let grant = &lease.grant;
    let name = grant.secret();
    match grant.source() {
        SecretSource::Jwt(jwt) => {
            let now = crate::host::now().map_err(RunError::Clock)?;
            let minted = identity::mint(scene, lease, jwt, &now)?;
            Ok(Value::Token(minted))
        }
        SecretSource::SshCa(source) => {
            let now = crate::host::now().map_err(RunError::Clock)?;
            ssh::issue(ledger, scene, session, lease, source, &now).map(Value::Ssh)
        }
        SecretSource::Vault => {
            let Some(secret) = ledger.sealed(name)? else {
                let hint = format!("set it: `sublet secret set {name}`");
                return Err(unavailable(name, "no value was ever set", &hint));
            };
            let key = ledger.vault_key().map_err(unavailable_vault)?;
            let len = vault::plaintext_len(name, &secret.sealed).map_err(unavailable_vault)?;
            Ok(Value::Sealed { key, secret, len })
        }
        SecretSource::File { .. } => read(session, caller, name).map(Value::Plain),
        SecretSource::Command { .. } => {
            let printed = read(session, caller, name)?;
            parse(name, printed).map(Value::Plain)
        }
    }
}

/// The decision lets an SSH identity go to an agent's socket alone.
fn no_value() -> RunError {
    RunError::Delivery(io::ErrorKind::Unsupported.into())
}

/// A secret that another source proves itself with: of the vault, or of a file.
pub fn credential(
    ledger: &Ledger,
    session: &Session,
    name: &SecretName,
    source: &SecretSource,
) -> Result<Secret, RunError> {
    match source {
        SecretSource::Vault => {
            let Some(secret) = ledger.sealed(name)? else {
                let hint = format!("set it: `sublet secret set {name}`");
                return Err(unavailable(name, "no value was ever set", &hint));
            };
            let key = ledger.vault_key().map_err(unavailable_vault)?;
            let len = vault::plaintext_len(name, &secret.sealed).map_err(unavailable_vault)?;
            Value::Sealed { key, secret, len }.into_secret()
        }
        SecretSource::File { .. } => read(session, None, name),
        _ => Err(unavailable(name, "its source cannot prove another", "use `vault` or `file`")),
    }
}

/// Asks the launcher for the source, and reads it into locked memory.
fn read(session: &Session, caller: Option<&Caller>, name: &SecretName) -> Result<Secret, RunError> {
    session.order(&Order::OpenSource { secret: name.clone() })?;
    let (notice, mut fds) =
        session.notice_of(|n| matches!(n, Notice::Source { .. } | Notice::SourceRefused { .. }))?;
    let helper = match notice {
        Notice::Source { helper } => helper,
        Notice::SourceRefused { refusal } => return Err(refusal.into()),
        _ => return Err(RunError::LauncherDied),
    };
    let Some(fd) = fds.pop() else { return Err(RunError::LauncherDied) };
    let read = Secret::read_from(Attentive { file: File::from(fd), caller });
    if let Some(why) = caller.map(Caller::interrupted).transpose()?.flatten() {
        return Err(why);
    }
    if helper {
        // Its output counts only if it ended well.
        let (notice, _) = session.notice_of(|n| matches!(n, Notice::SourceEnded { .. }))?;
        if let Notice::SourceEnded { refusal: Some(refusal) } = notice {
            return Err(refusal.into());
        }
    }
    read.map_err(|e| match e.kind() {
        io::ErrorKind::FileTooLarge => unavailable(
            name,
            &format!("it is larger than {MAX_VALUE} bytes"),
            "lease something smaller",
        ),
        _ => unavailable(name, &e.to_string(), "check the source"),
    })
}

/// A source, read with an ear for the caller, who may end the reading.
struct Attentive<'a> {
    file: File,
    caller: Option<&'a Caller>,
}

impl io::Read for Attentive<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while let Some(caller) = self.caller {
            let mut fds = [
                PollFd::new(&self.file, PollFlags::IN),
                PollFd::from_borrowed_fd(caller.interrupt(), PollFlags::IN),
            ];
            poll(&mut fds, None)?;
            let [of_file, of_caller] = fds.map(|fd| !fd.revents().is_empty());
            if of_caller && caller.may_want_the_end() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            if of_file {
                break;
            }
            // What the caller says can wait, and goes on saying so.
            poll(&mut [PollFd::new(&self.file, PollFlags::IN)], Some(&A_MOMENT))?;
        }
        self.file.read(buffer)
    }
}

/// What a `command` source prints.
#[derive(Deserialize)]
struct Printed<'a> {
    #[serde(borrow)]
    value: Option<&'a RawValue>,
    /// Of the AWS `credential_process` format: then all that was printed is the value.
    #[serde(rename = "AccessKeyId")]
    access_key_id: Option<serde::de::IgnoredAny>,
}

/// `{"value", "expires_at"}`, or the AWS `credential_process` object, which is the value as it stands.
fn parse(name: &SecretName, printed: Secret) -> Result<Secret, RunError> {
    let refuse = |why: &str| {
        unavailable(
            name,
            &format!("its command printed {why}"),
            "it must print {\"value\": \"…\"} or the AWS credential_process object",
        )
    };
    // No error of the parser is shown: it may quote the value.
    let parsed: Printed<'_> = serde_json::from_slice(printed.expose())
        .map_err(|_| refuse("what is no JSON object of that form"))?;
    match (parsed.value, parsed.access_key_id) {
        (Some(value), _) => {
            unescape(value.get()).ok_or_else(|| refuse("a value that is no string"))
        }
        (None, Some(_)) => Ok(printed),
        (None, None) => Err(refuse("an object without a value")),
    }
}

/// The bytes of a JSON string, unescaped straight into locked memory.
fn unescape(json: &str) -> Option<Secret> {
    let inner = json.strip_prefix('"')?.strip_suffix('"')?;
    let mut secret = Secret::zeroed(inner.len()).ok()?;
    let mut written = 0;
    let mut put = |bytes: &[u8]| {
        secret.expose_mut()[written..written + bytes.len()].copy_from_slice(bytes);
        written += bytes.len();
    };
    let mut chars = inner.chars();
    let mut utf8 = [0; 4];
    while let Some(c) = chars.next() {
        let plain = if c != '\\' {
            c
        } else {
            match chars.next()? {
                'n' => '\n',
                'r' => '\r',
                't' => '\t',
                'b' => '\u{8}',
                'f' => '\u{c}',
                'u' => {
                    let mut unit = || {
                        let digits = chars.as_str().get(..4)?;
                        let unit = u16::from_str_radix(digits, 16).ok()?;
                        chars = chars.as_str()[4..].chars();
                        Some(unit)
                    };
                    let first = unit()?;
                    if (0xd800..0xdc00).contains(&first) {
                        let rest = chars.as_str().strip_prefix("\\u")?;
                        chars = rest.chars();
                        let digits = chars.as_str().get(..4)?;
                        let second = u16::from_str_radix(digits, 16).ok()?;
                        chars = chars.as_str()[4..].chars();
                        char::decode_utf16([first, second]).next()?.ok()?
                    } else {
                        char::from_u32(first.into())?
                    }
                }
                other @ ('"' | '\\' | '/') => other,
                _ => return None,
            }
        };
        put(plain.encode_utf8(&mut utf8).as_bytes());
    }
    zeroize::Zeroize::zeroize(&mut utf8);
    secret.truncate(written);
    Some(secret)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(printed: &str, expected: Option<&[u8]>) {
        let name = "x".parse().unwrap();
        let got = parse(&name, Secret::copy_of(printed.as_bytes()).unwrap());
        match (got, expected) {
            (Ok(got), Some(expected)) => assert_eq!(got.expose(), expected, "{printed}"),
            (Err(e), None) => assert!(!e.to_string().contains("hunter2"), "{e}"),
            (got, expected) => panic!("{printed}: {:?} {expected:?}", got.is_ok()),
        }
    }

    #[test]
    fn what_commands_print() {
        check(r#"{"value":"hunter2"}"#, Some(b"hunter2"));
        check(
            r#" {"expires_at":"2030-01-01T00:00:00Z","value":"a\n\"b\"\\\/\u00e9\ud83d\ude00"} "#,
            Some("a\n\"b\"\\/é😀".as_bytes()),
        );
        let aws = r#"{"Version":1,"AccessKeyId":"AK","SecretAccessKey":"hunter2"}"#;
        check(aws, Some(aws.as_bytes()));
        for bad in
            ["hunter2", r#"{"value":7}"#, "{}", r#"{"value":"hunter2"#, r#"{"value":"\ud83d"}"#, ""]
        {
            check(bad, None);
        }
    }
}
