//! The host's signing key, and the keys that a verifier knows: Ed25519 (RFC 8032), named by their RFC 7638
//! thumbprints, published as a JWKS (RFC 7517, RFC 8037) or as a signed note's verifier key.
//!
//! The private half lives in a [`Secret`]; what a signature needs of it is made anew for each, wiped by
//! its crate, and the stack overwritten.
#![forbid(unsafe_code)]

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ed25519_dalek::{Signature, Signer as _, VerifyingKey};
use serde::Deserialize;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use zeroize::Zeroize as _;

use crate::envelope::note::NoteKey;
use crate::model::secret::Secret;

/// Bytes of the seed, and of the public key.
pub const KEY_SIZE: usize = 32;

/// The largest key set that is read, in bytes.
const MAX_JWKS: usize = 1 << 20;

/// Why a key cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    #[error("a signing key has {KEY_SIZE} bytes, and this has {0}")]
    Size(usize),
    #[error("it is no public key of Ed25519, or one that would fit any signature")]
    NotAKey,
    #[error("it is no set of keys (RFC 7517): {0}")]
    NotASet(String),
    #[error("it holds a private key: publish the public half alone, and count that key as known")]
    Private,
    #[error("two keys in it are named {0}")]
    Ambiguous(String),
    #[error("no key in it is of Ed25519 (`\"kty\":\"OKP\",\"crv\":\"Ed25519\"`)")]
    Empty,
}

/// The private half. No `Debug`, `Clone` or `Serialize`, as its [`Secret`].
pub struct SigningKey {
    seed: Secret,
    public: PublicKey,
}

impl SigningKey {
    /// From the 32 bytes of RFC 8032's private key.
    ///
    /// # Errors
    /// [`KeyError::Size`].
    pub fn from_seed(seed: Secret) -> Result<Self, KeyError> {
        let public = with_seed(&seed, |key| key.verifying_key())
            .ok_or(KeyError::Size(seed.len()))
            .map(PublicKey::new)?;
        Ok(Self { seed, public })
    }

    pub fn public(&self) -> &PublicKey {
        &self.public
    }

    /// Whoever calls this has told `message` apart from all else that the key signs.
    pub(super) fn sign(&self, message: &[u8]) -> [u8; 64] {
        // The length was checked when the key was made; no signature of zeros verifies.
        with_seed(&self.seed, |key| key.sign(message).to_bytes()).unwrap_or([0; 64])
    }
}

fn with_seed<T>(seed: &Secret, act: impl FnOnce(&ed25519_dalek::SigningKey) -> T) -> Option<T> {
    let done = expanded(seed, act);
    burn_stack();
    done
}

/// A frame of its own, so that [`burn_stack`] lies over it. dalek wipes its keys when they are dropped.
#[inline(never)]
fn expanded<T>(seed: &Secret, act: impl FnOnce(&ed25519_dalek::SigningKey) -> T) -> Option<T> {
    let seed: &[u8; KEY_SIZE] = seed.expose().try_into().ok()?;
    Some(act(&ed25519_dalek::SigningKey::from_bytes(seed)))
}

/// Overwrites the stack that the hash and the curve have just used.
#[inline(never)]
fn burn_stack() {
    let mut used = [0u64; 4096];
    used.zeroize();
}

/// The public half, and its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublicKey {
    key: VerifyingKey,
    kid: String,
}

impl PublicKey {
    /// # Errors
    /// [`KeyError::NotAKey`], also for the few points of small order, which fit signatures of anyone.
    pub fn from_bytes(bytes: &[u8; KEY_SIZE]) -> Result<Self, KeyError> {
        match VerifyingKey::from_bytes(bytes) {
            Ok(key) if !key.is_weak() => Ok(Self::new(key)),
            _ => Err(KeyError::NotAKey),
        }
    }

    fn new(key: VerifyingKey) -> Self {
        let x = URL_SAFE_NO_PAD.encode(key.as_bytes());
        // RFC 7638 §3.2: the required members alone, in this order, without white space.
        let members = format!(r#"{{"crv":"Ed25519","kty":"OKP","x":"{x}"}}"#);
        Self { key, kid: URL_SAFE_NO_PAD.encode(Sha256::digest(members)) }
    }

    pub fn as_bytes(&self) -> &[u8; KEY_SIZE] {
        self.key.as_bytes()
    }

    /// The RFC 7638 thumbprint, SHA-256, base64url.
    pub fn kid(&self) -> &str {
        &self.kid
    }

    /// `{"kty":"OKP","crv":"Ed25519","x","kid","alg":"EdDSA","use":"sig"}`. RFC 8037 §2.
    pub fn jwk(&self) -> Value {
        json!({
            "kty": "OKP", "crv": "Ed25519", "x": URL_SAFE_NO_PAD.encode(self.as_bytes()),
            "kid": self.kid, "alg": "EdDSA", "use": "sig",
        })
    }

    /// A set of this key alone: what `/v1/jwks.json` answers.
    pub fn jwks(&self) -> Value {
        json!({ "keys": [self.jwk()] })
    }

    /// As it signs this host's trail: named `sublet/trail/KID`, which stays when the host is renamed.
    pub fn trail_key(&self) -> NoteKey {
        NoteKey::named(format!("sublet/trail/{}", self.kid), self.clone())
    }

    /// RFC 8032 with the checks that leave a message one signature (`verify_strict`).
    pub(super) fn verifies(&self, message: &[u8], signature: &[u8; 64]) -> bool {
        self.key.verify_strict(message, &Signature::from_bytes(signature)).is_ok()
    }
}

/// The keys that a verifier knows, by the names under which they were published.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Jwks {
    keys: Vec<(String, PublicKey)>,
}

impl Jwks {
    /// Of our own making: each key under its thumbprint.
    pub fn of(keys: impl IntoIterator<Item = PublicKey>) -> Self {
        Self { keys: keys.into_iter().map(|key| (key.kid().to_owned(), key)).collect() }
    }

    /// Reads a published set. Keys of other kinds are passed over, and so are members that are not known
    /// (RFC 7517 §5).
    ///
    /// # Errors
    /// [`KeyError`]: no set, none of Ed25519 in it, or one that must not be trusted.
    pub fn parse(bytes: &[u8]) -> Result<Self, KeyError> {
        #[derive(Deserialize)]
        struct Set {
            keys: Vec<Jwk>,
        }
        #[derive(Deserialize)]
        struct Jwk {
            kty: String,
            crv: Option<String>,
            x: Option<String>,
            kid: Option<String>,
            #[serde(rename = "use")]
            used_for: Option<String>,
            d: Option<serde::de::IgnoredAny>,
        }
        if bytes.len() > MAX_JWKS {
            return Err(KeyError::NotASet(format!("it has more than {MAX_JWKS} bytes")));
        }
        let set: Set =
            serde_json::from_slice(bytes).map_err(|e| KeyError::NotASet(e.to_string()))?;
        let mut keys: Vec<(String, PublicKey)> = Vec::new();
        for jwk in set.keys {
            if jwk.d.is_some() {
                return Err(KeyError::Private);
            }
            let is_ours = jwk.kty == "OKP"
                && jwk.crv.as_deref() == Some("Ed25519")
                && jwk.used_for.as_deref().is_none_or(|used_for| used_for == "sig");
            if !is_ours {
                continue;
            }
            let x = jwk.x.and_then(|x| URL_SAFE_NO_PAD.decode(x).ok()?.try_into().ok());
            let key = PublicKey::from_bytes(&x.ok_or(KeyError::NotAKey)?)?;
            let kid = jwk.kid.unwrap_or_else(|| key.kid().to_owned());
            if keys.iter().any(|(known, _)| *known == kid) {
                return Err(KeyError::Ambiguous(kid.chars().take(80).collect()));
            }
            keys.push((kid, key));
        }
        if keys.is_empty() { Err(KeyError::Empty) } else { Ok(Self { keys }) }
    }

    pub fn key(&self, kid: &str) -> Option<&PublicKey> {
        self.keys.iter().find(|(known, _)| known == kid).map(|(_, key)| key)
    }
}
