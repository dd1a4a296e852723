//! A JWT signed with RS256 (RFC 7515, 7518 §3.3), by a key as PEM: PKCS #1 or PKCS #8.
#![forbid(unsafe_code)]

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{RSA_PKCS1_SHA256, RsaKeyPair};
use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use rustls::pki_types::PrivateKeyDer;
use rustls::pki_types::pem::PemObject;
use serde_json::Value;

use crate::model::mint::{Failure, Fault};

/// # Errors
/// The key is no RSA key of 2048 bits or more, as PEM. Nothing of it is told.
pub fn rs256(pem: &[u8], claims: &Value) -> Result<String, Failure> {
    let bad = || Failure::of(Fault::Credential);
    let key = match PrivateKeyDer::from_pem_slice(pem).map_err(|_| bad())? {
        PrivateKeyDer::Pkcs1(der) => RsaKeyPair::from_der(der.secret_pkcs1_der()),
        PrivateKeyDer::Pkcs8(der) => RsaKeyPair::from_pkcs8(der.secret_pkcs8_der()),
        _ => return Err(bad()),
    }
    .map_err(|_| bad())?;
    let part = |value: &Value| BASE64_URL_SAFE_NO_PAD.encode(value.to_string());
    let header = serde_json::json!({"alg": "RS256", "typ": "JWT"});
    let mut jwt = format!("{}.{}", part(&header), part(claims));
    let mut signature = vec![0; key.public_modulus_len()];
    key.sign(&RSA_PKCS1_SHA256, &SystemRandom::new(), jwt.as_bytes(), &mut signature)
        .map_err(|_| bad())?;
    jwt.push('.');
    jwt.push_str(&BASE64_URL_SAFE_NO_PAD.encode(signature));
    Ok(jwt)
}
