//! Sessions of an IAM role: `AssumeRole`, signed (Signature Version 4), and `AssumeRoleWithWebIdentity`.
//! docs.aws.amazon.com/STS/latest/APIReference. STS cannot end a session: it ends when it expires.
#![forbid(unsafe_code)]

use hmac::{Hmac, KeyInit, Mac};
use hyper::Method;
use hyper::header::{self, HeaderName, HeaderValue};
use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::http::{Answered, Call, Http};
use super::{Minted, Outcome, fill, words};
use crate::config::source::aws::{AwsSts, By};
use crate::model::mint::{About, Facts, Failure, Fault, Operation, Request, Role};

/// What STS takes: less is an error, more depends on the role.
const SECONDS: [u64; 2] = [900, 3600];
/// Of an inline session policy, in characters.
const MAX_POLICY: usize = 2048;

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct AccessKey {
    access_key_id: String,
    secret_access_key: String,
    session_token: Option<String>,
}

pub fn answer(sts: &AwsSts, http: &Http, request: &Request<'_>) -> Result<Outcome, Failure> {
    match request.operation {
        Operation::Mint => mint(sts, http, request).map(Outcome::Minted),
        Operation::Renew | Operation::Revoke => Err(Failure::of(Fault::Minter)),
    }
}

fn mint(sts: &AwsSts, http: &Http, request: &Request<'_>) -> Result<Minted, Failure> {
    let facts = &request.facts;
    let policy = fill::json(&sts.policy, facts)?;
    if policy.len() > MAX_POLICY {
        return Err(Failure::of(Fault::Settings));
    }
    let seconds = facts.ttl_seconds.clamp(SECONDS[0], SECONDS[1]).to_string();
    let mut form = vec![
        ("Version", "2011-06-15"),
        ("RoleArn", &sts.role_arn),
        ("RoleSessionName", &facts.lease_id),
        ("DurationSeconds", &seconds),
        ("Policy", &policy),
    ];
    let bad = || Failure::of(Fault::Credential);
    let mut headers = vec![(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/x-www-form-urlencoded; charset=utf-8"),
    )];
    let body = match &sts.by {
        By::WebIdentityToken(_) => {
            let token = request.credential(Role::WebIdentityToken).ok_or_else(bad)?;
            form.push(("Action", "AssumeRoleWithWebIdentity"));
            form.push(("WebIdentityToken", std::str::from_utf8(token).map_err(|_| bad())?));
            encoded(&form)
        }
        By::AccessKey(_) => {
            let key = request.credential(Role::AccessKey).ok_or_else(bad)?;
            let key: AccessKey = serde_json::from_slice(key).map_err(|_| bad())?;
            form.push(("Action", "AssumeRole"));
            let body = encoded(&form);
            headers.extend(signature(sts, facts, &key, &body)?);
            body
        }
    };
    let call = Call { method: Method::POST, url: &sts.endpoint, headers, body: body.into_bytes() };
    let answered = http.call(call)?;
    if !answered.status.is_success() {
        return Err(refused(&answered));
    }
    let text = std::str::from_utf8(&answered.body).map_err(|_| answered.failure(Fault::NotXml))?;
    if !text.trim_start().starts_with('<') || !text.contains("Response") {
        return Err(answered.failure(Fault::NotXml));
    }
    let lacks = || answered.failure(Fault::Incomplete);
    let credentials = element(text, "Credentials").ok_or_else(lacks)?;
    let of = |name| {
        let plain = |text: &&str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_graphic());
        element(credentials, name).filter(plain).map(str::to_owned).ok_or_else(lacks)
    };
    let (id, secret, token) = (of("AccessKeyId")?, of("SecretAccessKey")?, of("SessionToken")?);
    let expires_at: jiff::Timestamp = of("Expiration")?.parse().map_err(|_| lacks())?;
    let value = serde_json::json!({
        "Version": 1, "AccessKeyId": id, "SecretAccessKey": secret, "SessionToken": token,
        "Expiration": expires_at.to_string(),
    });
    let about = About {
        issuer: words(&format!("https://{}", sts.endpoint.authority())),
        scope: Some(words(&policy)),
        principal: Some(words(
            element(text, "AssumedRoleUser")
                .and_then(|user| element(user, "Arn"))
                .unwrap_or(&sts.role_arn),
        )),
        far_id: element(text, "RequestId").map(words),
        expires_at: Some(expires_at.as_millisecond()),
        renew_at: None,
    };
    let parts = vec![
        ("AccessKeyId", false, id.into_bytes()),
        ("SecretAccessKey", true, secret.into_bytes()),
        ("SessionToken", true, token.into_bytes()),
    ];
    Ok(Minted { value: value.to_string().into_bytes(), parts, about, handle: None })
}

/// The content of the first element of this name: of STS's own answers, which have no attributes there. What
/// it escapes is not in a credential.
fn element<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let (_, rest) = text.split_once(&format!("<{name}>"))?;
    Some(rest.split_once(&format!("</{name}>"))?.0.trim())
}

/// The code, if it is a plain word: `AccessDenied`, `ExpiredTokenException`.
fn refused(answered: &Answered) -> Failure {
    let text = String::from_utf8_lossy(&answered.body);
    let code = element(&text, "Code").filter(|code| CODES.contains(code));
    Failure { code: code.map(str::to_owned), ..answered.refusal() }
}

/// Of the two calls, and common to all: anything else is not told.
const CODES: [&str; 14] = [
    "AccessDenied",
    "ExpiredToken",
    "ExpiredTokenException",
    "IDPCommunicationError",
    "IDPRejectedClaim",
    "IncompleteSignature",
    "InvalidClientTokenId",
    "InvalidIdentityToken",
    "MalformedPolicyDocument",
    "PackedPolicyTooLarge",
    "RegionDisabledException",
    "SignatureDoesNotMatch",
    "Throttling",
    "ValidationError",
];

fn encoded(form: &[(&str, &str)]) -> String {
    let pairs: Vec<String> =
        form.iter().map(|(name, value)| format!("{name}={}", percent(value))).collect();
    pairs.join("&")
}

/// Percent-encoding of all but RFC 3986's unreserved characters, as signatures want it.
fn percent(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for b in text.bytes() {
        match b {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                out.push(char::from(b));
            }
            _ => out.push_str(&format!("%{b:02X}")),
        }
    }
    out
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn hmac(key: &[u8], text: &str) -> Result<Vec<u8>, Failure> {
    let mut mac = <Hmac<Sha256> as KeyInit>::new_from_slice(key)
        .map_err(|_| Failure::of(Fault::Credential))?;
    mac.update(text.as_bytes());
    Ok(mac.finalize().into_bytes().to_vec())
}

/// Signature Version 4 of a POST with this body: the headers that it adds.
fn signature(
    sts: &AwsSts,
    facts: &Facts,
    key: &AccessKey,
    body: &str,
) -> Result<Vec<(HeaderName, HeaderValue)>, Failure> {
    let bad = || Failure::of(Fault::Credential);
    let now = jiff::Timestamp::from_second(facts.now).map_err(|_| bad())?;
    let time = now.strftime("%Y%m%dT%H%M%SZ").to_string();
    let date = &time[..8];
    let mut signed = vec![
        ("content-type", "application/x-www-form-urlencoded; charset=utf-8".to_owned()),
        ("host", sts.endpoint.authority()),
        ("x-amz-date", time.clone()),
    ];
    if let Some(token) = &key.session_token {
        signed.push(("x-amz-security-token", token.clone()));
    }
    let names = signed.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(";");
    let lines: String = signed.iter().map(|(name, value)| format!("{name}:{value}\n")).collect();
    let path = sts.endpoint.path.split('?').next().unwrap_or("/");
    let canonical =
        format!("POST\n{path}\n\n{lines}\n{names}\n{}", hex(&Sha256::digest(body.as_bytes())));
    let scope = format!("{date}/{}/sts/aws4_request", sts.region);
    let to_sign = format!(
        "AWS4-HMAC-SHA256\n{time}\n{scope}\n{}",
        hex(&Sha256::digest(canonical.as_bytes()))
    );
    let mut signing = format!("AWS4{}", key.secret_access_key).into_bytes();
    for part in [date, &sts.region, "sts", "aws4_request"] {
        signing = hmac(&signing, part)?;
    }
    let authorization = format!(
        "AWS4-HMAC-SHA256 Credential={}/{scope}, SignedHeaders={names}, Signature={}",
        key.access_key_id,
        hex(&hmac(&signing, &to_sign)?)
    );
    let value = |text: &str| HeaderValue::from_str(text).map_err(|_| bad());
    let mut headers = vec![
        (header::AUTHORIZATION, value(&authorization)?),
        (HeaderName::from_static("x-amz-date"), value(&time)?),
    ];
    if let Some(token) = &key.session_token {
        headers.push((HeaderName::from_static("x-amz-security-token"), value(token)?));
    }
    Ok(headers)
}
