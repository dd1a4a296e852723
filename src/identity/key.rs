//! RSA keys for identities: made here, kept as PKCS#8, signing RS256 (RFC 7518 §3.3), named by their
//! RFC 7638 thumbprints. What verifies JWT-SVIDs and cloud federations takes no Ed25519.
//!
//! aws-lc-rs, because it also makes RSA keys and is what TLS is spoken with; it wipes what it frees.
#![forbid(unsafe_code)]

use aws_lc_rs::encoding::{AsDer as _, Pkcs8V1Der};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::{KeyPair, KeySize};
use aws_lc_rs::signature::{KeyPair as _, RSA_PKCS1_SHA256};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::model::secret::Secret;

/// The only algorithm: what every verifier of OpenID Connect must know (OIDC Core §15.1).
pub const ALGORITHM: &str = "RS256";

/// What a PKCS#8 of RSA 4096 fits in.
pub const MAX_PKCS8: usize = 8 << 10;

#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    #[error("could not make an RSA key")]
    Make,
    #[error("it is no RSA key in PKCS#8, or one of less than 2048 bits")]
    NotAKey,
    #[error("the key could not sign")]
    Sign,
    #[error(
        "cannot lock memory for an identity key; raise the limit for locked memory (ulimit -l)"
    )]
    Lock(#[source] std::io::Error),
}

/// The public half, as it is published.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PublicKey {
    /// base64url of the modulus, big-endian, without leading zeros. RFC 7518 §6.3.1.
    n: String,
    /// The same of the exponent.
    e: String,
}

impl PublicKey {
    fn of(pair: &KeyPair) -> Result<Self, KeyError> {
        let (n, e) = numbers(pair.public_key().as_ref()).ok_or(KeyError::NotAKey)?;
        let text = |bytes: &[u8]| {
            let zeros = bytes.iter().take_while(|b| **b == 0).count();
            URL_SAFE_NO_PAD.encode(&bytes[zeros..])
        };
        Ok(Self { n: text(n), e: text(e) })
    }

    /// The RFC 7638 thumbprint, SHA-256, base64url.
    pub fn kid(&self) -> String {
        // §3.2: the required members alone, in this order, without white space.
        let members = format!(r#"{{"e":"{}","kty":"RSA","n":"{}"}}"#, self.e, self.n);
        URL_SAFE_NO_PAD.encode(Sha256::digest(members))
    }

    /// `kty kid use alg n e`. RFC 7517 §4.
    pub fn jwk(&self) -> Value {
        json!({
            "kty": "RSA", "kid": self.kid(), "use": "sig", "alg": ALGORITHM, "n": self.n, "e": self.e,
        })
    }

    /// Whether both are numbers as they are published: what was read is shown to nobody otherwise.
    pub fn is_sound(&self) -> bool {
        let len = |text: &str| URL_SAFE_NO_PAD.decode(text).ok().map(|b| b.len());
        len(&self.n).is_some_and(|n| (256..=1024).contains(&n))
            && len(&self.e).is_some_and(|e| (1..=8).contains(&e))
    }
}

/// Modulus and exponent of an `RSAPublicKey` in DER: a SEQUENCE of two INTEGERs. RFC 8017 §A.1.1.
fn numbers(der: &[u8]) -> Option<(&[u8], &[u8])> {
    fn element(der: &[u8], tag: u8) -> Option<(&[u8], &[u8])> {
        let (&first, rest) = der.split_first()?;
        let (&len, rest) = rest.split_first()?;
        let (len, rest) = match len {
            0..=0x7f => (usize::from(len), rest),
            0x81 => (usize::from(*rest.first()?), rest.get(1..)?),
            0x82 => (usize::from(u16::from_be_bytes(*rest.first_chunk()?)), rest.get(2..)?),
            _ => return None,
        };
        (first == tag && len <= rest.len()).then(|| rest.split_at(len))
    }
    let (inner, []) = element(der, 0x30)? else { return None };
    let (n, rest) = element(inner, 0x02)?;
    let (e, []) = element(rest, 0x02)? else { return None };
    Some((n, e))
}

/// A new key of 2048 bits: its PKCS#8, and its public half.
pub fn generate() -> Result<(Secret, PublicKey), KeyError> {
    let pair = KeyPair::generate(KeySize::Rsa2048).map_err(|_| KeyError::Make)?;
    let der: Pkcs8V1Der<'_> = pair.as_der().map_err(|_| KeyError::Make)?;
    let secret = Secret::copy_of(der.as_ref()).map_err(KeyError::Lock)?;
    Ok((secret, PublicKey::of(&pair)?))
}

/// A key that signs. No `Debug`: it is private.
pub struct SigningKey {
    pair: KeyPair,
    kid: String,
}

impl SigningKey {
    /// # Errors
    /// [`KeyError::NotAKey`].
    pub fn from_pkcs8(der: &Secret) -> Result<Self, KeyError> {
        let pair = KeyPair::from_pkcs8(der.expose()).map_err(|_| KeyError::NotAKey)?;
        if pair.public_modulus_len() < 256 {
            return Err(KeyError::NotAKey);
        }
        let kid = PublicKey::of(&pair)?.kid();
        Ok(Self { pair, kid })
    }

    pub fn kid(&self) -> &str {
        &self.kid
    }

    /// A JSON Web Signature in its compact form (RFC 7515 §7.1), in locked memory.
    pub fn sign(&self, claims: &Value) -> Result<Secret, KeyError> {
        let header = json!({ "alg": ALGORITHM, "typ": "JWT", "kid": self.kid }).to_string();
        let encode = |text: &str| URL_SAFE_NO_PAD.encode(text);
        // What is signed is no secret until the signature stands beside it.
        let signed = format!("{}.{}", encode(&header), encode(&claims.to_string()));
        let mut signature = zeroize::Zeroizing::new(vec![0; self.pair.public_modulus_len()]);
        self.pair
            .sign(&RSA_PKCS1_SHA256, &SystemRandom::new(), signed.as_bytes(), &mut signature)
            .map_err(|_| KeyError::Sign)?;
        let size = signed.len() + 1 + base64::encoded_len(signature.len(), false).unwrap_or(0);
        let mut token = Secret::zeroed(size).map_err(KeyError::Lock)?;
        let (text, rest) = token.expose_mut().split_at_mut(signed.len());
        text.copy_from_slice(signed.as_bytes());
        rest[0] = b'.';
        let written = URL_SAFE_NO_PAD.encode_slice(&*signature, &mut rest[1..]);
        written.map_err(|_| KeyError::Sign)?;
        Ok(token)
    }
}

#[cfg(test)]
mod tests {
    use aws_lc_rs::signature::{RSA_PKCS1_2048_8192_SHA256, RsaPublicKeyComponents};

    use super::*;

    #[test]
    fn a_token_is_three_parts_that_the_published_key_verifies() {
        let (pkcs8, public) = generate().unwrap();
        assert!(public.is_sound() && pkcs8.len() < MAX_PKCS8);
        let key = SigningKey::from_pkcs8(&pkcs8).unwrap();
        assert_eq!(key.kid(), public.kid());
        let token = key.sign(&json!({"sub": "x"})).unwrap();
        let text = std::str::from_utf8(token.expose()).unwrap();
        let parts: Vec<&str> = text.split('.').collect();
        assert_eq!(parts.len(), 3);
        let jwk = public.jwk();
        let number = |name: &str| URL_SAFE_NO_PAD.decode(jwk[name].as_str().unwrap()).unwrap();
        let published = RsaPublicKeyComponents { n: number("n"), e: number("e") };
        let verify = |signed: &str| {
            let signature = URL_SAFE_NO_PAD.decode(parts[2]).unwrap();
            published.verify(&RSA_PKCS1_2048_8192_SHA256, signed.as_bytes(), &signature).is_ok()
        };
        assert!(verify(&format!("{}.{}", parts[0], parts[1])));
        assert!(!verify(&format!("{}.{}x", parts[0], parts[1])), "the control");
    }

    /// RFC 7638 §3.1, the example.
    #[test]
    fn a_key_is_named_by_its_thumbprint() {
        let key = PublicKey {
            n: "0vx7agoebGcQSuuPiLJXZptN9nndrQmbXEps2aiAFbWhM78LhWx4cbbfAAtVT86zwu1RK7aPFFxuhDR1L6tSoc_BJECPebWKRXjBZCiFV4n3oknjhMstn64tZ_2W-5JsGY4Hc5n9yBXArwl93lqt7_RN5w6Cf0h4QyQ5v-65YGjQR0_FDW2QvzqY368QQMicAtaSqzs8KJZgnYb9c7d0zgdAZHzu6qMQvRL5hajrn1n91CbOpbISD08qNLyrdkt-bFTWhAI4vMQFh6WeZu0fM4lFd2NcRwr3XPksINHaQ-G_xBniIqbw0Ls1jF44-csFCur-kEgU8awapJzKnqDKgw".into(),
            e: "AQAB".into(),
        };
        assert_eq!(key.kid(), "NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs");
    }
}
