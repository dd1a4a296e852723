//! What a `command` source prints, by its contract: one JSON object, `{"value", "expires_at"}`, or that of
//! the AWS `credential_process`, which is the value as it stands.
#![forbid(unsafe_code)]

use serde::Deserialize;
use serde_json::value::RawValue;

use super::error::RunError;
use super::sources::unavailable;
use super::value::Piece;
use crate::model::name::SecretName;
use crate::model::secret::Secret;

/// A value that was printed, with what was said of it.
pub struct Parsed {
    pub value: Secret,
    pub pieces: Vec<Piece>,
    pub expires_at: Option<jiff::Timestamp>,
}

#[derive(Deserialize)]
struct Printed<'a> {
    #[serde(borrow)]
    value: Option<&'a RawValue>,
    #[serde(borrow)]
    expires_at: Option<&'a RawValue>,
    /// Of the AWS `credential_process` format.
    #[serde(rename = "Version")]
    version: Option<u8>,
    #[serde(borrow, rename = "AccessKeyId")]
    access_key_id: Option<&'a RawValue>,
    #[serde(borrow, rename = "SecretAccessKey")]
    secret_access_key: Option<&'a RawValue>,
    #[serde(borrow, rename = "SessionToken")]
    session_token: Option<&'a RawValue>,
    #[serde(borrow, rename = "Expiration")]
    expiration: Option<&'a RawValue>,
}

/// # Errors
/// It is no such object. Nothing of what was printed is in the message.
pub fn parse(name: &SecretName, printed: Secret) -> Result<Parsed, RunError> {
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
    let text = |json: &RawValue| unescape(json.get());
    let time = |json: Option<&RawValue>, key: &str| match json.filter(|json| json.get() != "null") {
        None => Ok(None),
        Some(json) => text(json)
            .and_then(|text| std::str::from_utf8(text.expose()).ok()?.parse().ok())
            .map(Some)
            .ok_or_else(|| refuse(&format!("an `{key}` that is no time as RFC 3339 writes it"))),
    };
    match (parsed.value, parsed.access_key_id, parsed.secret_access_key) {
        (Some(value), ..) => {
            let expires_at = time(parsed.expires_at, "expires_at")?;
            let value = text(value).ok_or_else(|| refuse("a value that is no string"))?;
            Ok(Parsed { value, pieces: Vec::new(), expires_at })
        }
        (None, Some(id), Some(secret)) => {
            if parsed.version.is_some_and(|version| version != 1) {
                return Err(refuse("an AWS credential whose `Version` is not 1"));
            }
            let expires_at = time(parsed.expiration, "Expiration")?;
            let of = |name: &'static str, is_secret, json: &RawValue| {
                text(json)
                    .map(|value| Piece { name: name.to_owned(), is_secret, value })
                    .ok_or_else(|| refuse("an AWS credential whose parts are no strings"))
            };
            let mut pieces =
                vec![of("AccessKeyId", false, id)?, of("SecretAccessKey", true, secret)?];
            if let Some(token) = parsed.session_token.filter(|token| token.get() != "null") {
                pieces.push(of("SessionToken", true, token)?);
            }
            Ok(Parsed { value: printed, pieces, expires_at })
        }
        (None, Some(_), None) => Err(refuse("an AWS credential without its `SecretAccessKey`")),
        (None, None, _) => Err(refuse("an object without a value")),
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
    fn check(printed: &str, expected: Option<&[u8]>) -> Option<Parsed> {
        let name = "x".parse().unwrap();
        match (parse(&name, Secret::copy_of(printed.as_bytes()).unwrap()), expected) {
            (Ok(got), Some(expected)) => {
                assert_eq!(got.value.expose(), expected, "{printed}");
                Some(got)
            }
            (Err(e), None) => {
                assert!(!e.to_string().contains("hunter2"), "{e}");
                None
            }
            (got, expected) => panic!("{printed}: {:?} {expected:?}", got.is_ok()),
        }
    }

    #[test]
    fn what_commands_print() {
        check(r#"{"value":"hunter2"}"#, Some(b"hunter2"));
        let told = check(
            r#" {"expires_at":"2030-01-01T00:00:00Z","value":"a\n\"b\"\\\/\u00e9\ud83d\ude00"} "#,
            Some("a\n\"b\"\\/é😀".as_bytes()),
        );
        assert_eq!(told.unwrap().expires_at, Some("2030-01-01T00:00:00Z".parse().unwrap()));
        let null = r#"{"value":"hunter2","expires_at":null}"#;
        assert_eq!(check(null, Some(b"hunter2")).unwrap().expires_at, None);
        for bad in [
            "hunter2",
            r#"{"value":7}"#,
            "{}",
            r#"{"value":"hunter2"#,
            r#"{"value":"\ud83d"}"#,
            r#"{"value":"hunter2","expires_at":"soon"}"#,
            r#"{"value":"hunter2","expires_at":1893456000}"#,
            r#"{"AccessKeyId":"hunter2"}"#,
            r#"{"AccessKeyId":"AK","SecretAccessKey":7}"#,
            r#"{"Version":2,"AccessKeyId":"AK","SecretAccessKey":"hunter2"}"#,
            "",
        ] {
            check(bad, None);
        }
    }

    #[test]
    fn an_aws_credential_is_the_value_and_each_of_its_parts_is_known() {
        let aws = r#"{"Version":1,"AccessKeyId":"AK","SecretAccessKey":"hunter2","SessionToken":"to\/ken",
            "Expiration":"2030-01-01T00:00:00+01:00"}"#;
        let told = check(aws, Some(aws.as_bytes())).unwrap();
        let pieces: Vec<(&str, bool, &[u8])> =
            told.pieces.iter().map(|p| (&*p.name, p.is_secret, p.value.expose())).collect();
        assert_eq!(
            pieces,
            [
                ("AccessKeyId", false, &b"AK"[..]),
                ("SecretAccessKey", true, b"hunter2"),
                ("SessionToken", true, b"to/ken")
            ]
        );
        assert_eq!(told.expires_at, Some("2029-12-31T23:00:00Z".parse().unwrap()));
        let aws = r#"{"Version":1,"AccessKeyId":"AK","SecretAccessKey":"hunter2"}"#;
        assert_eq!(check(aws, Some(aws.as_bytes())).unwrap().pieces.len(), 2);
    }
}
