//! `ssh-ca`: a key pair and a certificate that live as long as one exec's use of them. OpenSSH's
//! PROTOCOL.certkeys; keys and signatures of Ed25519 (RFC 8709).
//!
//! Receives the CA's private key in locked memory; returns an identity whose private half is there too, and
//! which signs. Must never give a private key out.
#![forbid(unsafe_code)]

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};
use ed25519_dalek::{Signer as _, SigningKey};
use sha2::{Digest, Sha256};
use zeroize::Zeroize as _;

use crate::model::secret::Secret;
use crate::model::ssh::{Reader, Writer};

const KEY_TYPE: &[u8] = b"ssh-ed25519";
const CERTIFICATE_TYPE: &[u8] = b"ssh-ed25519-cert-v01@openssh.com";
/// SSH2_CERT_TYPE_USER.
const USER: u32 = 1;
/// What the server's clock may be behind by.
const SKEW: Duration = Duration::from_secs(60);

const BEGIN: &[u8] = b"-----BEGIN OPENSSH PRIVATE KEY-----";
const END: &[u8] = b"-----END OPENSSH PRIVATE KEY-----";
const MAGIC: &[u8] = b"openssh-key-v1\0";
/// The largest file of a private key that is taken.
const MAX_FILE: usize = 16 << 10;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SshError {
    #[error("it is no private key in OpenSSH's format")]
    NotAKey,
    #[error("it is encrypted with a passphrase, which nobody is there to type")]
    Encrypted,
    #[error("it is a key of another kind than Ed25519")]
    OtherKind,
    #[error("could not lock memory for a key")]
    Lock,
    #[error("the kernel gave no random bytes")]
    Random,
}

/// The CA's private half. Has no `Debug`.
pub struct CaKey {
    seed: Secret,
    public: [u8; 32],
}

impl CaKey {
    /// From what `ssh-keygen -t ed25519 -N ''` writes. PROTOCOL.key of OpenSSH.
    pub fn parse(file: &Secret) -> Result<Self, SshError> {
        let text = file.expose();
        if text.len() > MAX_FILE {
            return Err(SshError::NotAKey);
        }
        let start = find(text, BEGIN).ok_or(SshError::NotAKey)? + BEGIN.len();
        let end = find(text, END).filter(|end| *end > start).ok_or(SshError::NotAKey)?;
        // Decoded in locked memory, without the line ends.
        let mut packed = Secret::zeroed(end - start).map_err(|_| SshError::Lock)?;
        let mut len = 0;
        for byte in text[start..end].iter().filter(|b| !b.is_ascii_whitespace()) {
            packed.expose_mut()[len] = *byte;
            len += 1;
        }
        packed.truncate(len);
        let mut blob = Secret::zeroed(len).map_err(|_| SshError::Lock)?;
        let len = STANDARD
            .decode_slice(packed.expose(), blob.expose_mut())
            .map_err(|_| SshError::NotAKey)?;
        blob.truncate(len);
        Self::unpack(blob.expose())
    }

    fn unpack(blob: &[u8]) -> Result<Self, SshError> {
        let mut outer = Reader::new(blob.strip_prefix(MAGIC).ok_or(SshError::NotAKey)?);
        let mut next = || outer.string().ok_or(SshError::NotAKey);
        let (cipher, kdf, _options) = (next()?, next()?, next()?);
        if cipher != b"none" || kdf != b"none" {
            return Err(SshError::Encrypted);
        }
        if outer.u32() != Some(1) {
            return Err(SshError::NotAKey);
        }
        let _public = outer.string().ok_or(SshError::NotAKey)?;
        let mut inner = Reader::new(outer.string().ok_or(SshError::NotAKey)?);
        let checks = (inner.u32(), inner.u32());
        if checks.0.is_none() || checks.0 != checks.1 {
            return Err(SshError::NotAKey);
        }
        if inner.string() != Some(KEY_TYPE) {
            return Err(SshError::OtherKind);
        }
        let public = inner.string().and_then(|p| <[u8; 32]>::try_from(p).ok());
        let both = inner.string().filter(|both| both.len() == 64);
        let (Some(public), Some(both)) = (public, both) else { return Err(SshError::NotAKey) };
        let seed = Secret::copy_of(&both[..32]).map_err(|_| SshError::Lock)?;
        let made = with_seed(&seed, |key| key.verifying_key().to_bytes());
        if made != Some(public) {
            return Err(SshError::NotAKey);
        }
        Ok(Self { seed, public })
    }

    /// `SHA256:…`, as `ssh-keygen -l` shows it and servers log it.
    pub fn fingerprint(&self) -> String {
        format!("SHA256:{}", STANDARD_NO_PAD.encode(Sha256::digest(self.public_blob())))
    }

    /// As `TrustedUserCAKeys` has it, without the base64.
    pub fn public_blob(&self) -> Vec<u8> {
        public_blob(&self.public)
    }
}

/// What a certificate says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Terms<'a> {
    pub key_id: &'a str,
    pub principals: &'a [String],
    /// The one command that the server runs, whatever the client asks for.
    pub force_command: Option<&'a str>,
    /// The addresses that it is good from.
    pub source_address: Option<&'a str>,
    /// `permit-pty` and its kin, without a value.
    pub extensions: &'a [String],
    /// Seconds since 1970.
    pub now: u64,
    /// Never longer than the lease.
    pub life: Duration,
}

/// A fresh key pair with its certificate. Has no `Debug`.
pub struct Identity {
    seed: Secret,
    certificate: Vec<u8>,
    pub serial: u64,
    /// Seconds since 1970.
    pub valid_before: u64,
}

impl Identity {
    pub fn issue(ca: &CaKey, terms: &Terms<'_>) -> Result<Self, SshError> {
        let mut seed = Secret::zeroed(32).map_err(|_| SshError::Lock)?;
        crate::sys::random::fill(seed.expose_mut()).map_err(|_| SshError::Random)?;
        let mut nonce = [0; 32];
        crate::sys::random::fill(&mut nonce).map_err(|_| SshError::Random)?;
        let serial = crate::sys::random::random_u64().map_err(|_| SshError::Random)?;
        let public = with_seed(&seed, |key| key.verifying_key().to_bytes());
        let public = public.ok_or(SshError::NotAKey)?;

        let names = |names: &[String]| {
            names.iter().fold(Writer::default(), |w, name| w.string(name.as_bytes())).done()
        };
        // By name, as it must be: `force-command` comes before `source-address`.
        let mut critical = Writer::default();
        for (name, value) in
            [("force-command", terms.force_command), ("source-address", terms.source_address)]
        {
            if let Some(value) = value {
                let data = Writer::default().string(value.as_bytes()).done();
                critical = critical.string(name.as_bytes()).string(&data);
            }
        }
        let mut sorted: Vec<&String> = terms.extensions.iter().collect();
        sorted.sort();
        sorted.dedup();
        let extensions =
            sorted.iter().fold(Writer::default(), |w, name| w.string(name.as_bytes()).string(b""));

        let valid_before = terms.now.saturating_add(terms.life.as_secs());
        let body = Writer::default()
            .string(CERTIFICATE_TYPE)
            .string(&nonce)
            .string(&public)
            .u64(serial)
            .u32(USER)
            .string(terms.key_id.as_bytes())
            .string(&names(terms.principals))
            .u64(terms.now.saturating_sub(SKEW.as_secs()))
            .u64(valid_before)
            .string(&critical.done())
            .string(&extensions.done())
            .string(b"")
            .string(&ca.public_blob())
            .done();
        let signature = signature(&ca.seed, &body).ok_or(SshError::NotAKey)?;
        let mut certificate = body;
        certificate.extend(Writer::default().string(&signature).done());
        Ok(Self { seed, certificate, serial, valid_before })
    }

    /// What an agent lists and servers are shown.
    pub fn certificate(&self) -> &[u8] {
        &self.certificate
    }

    /// A signature by the pair's private half, with its type.
    pub fn sign(&self, data: &[u8]) -> Option<Vec<u8>> {
        signature(&self.seed, data)
    }
}

fn public_blob(public: &[u8; 32]) -> Vec<u8> {
    Writer::default().string(KEY_TYPE).string(public).done()
}

fn signature(seed: &Secret, data: &[u8]) -> Option<Vec<u8>> {
    let signature = with_seed(seed, |key| key.sign(data).to_bytes())?;
    Some(Writer::default().string(KEY_TYPE).string(&signature).done())
}

fn with_seed<T>(seed: &Secret, act: impl FnOnce(&SigningKey) -> T) -> Option<T> {
    let done = expanded(seed, act);
    burn_stack();
    done
}

/// A frame of its own, so that [`burn_stack`] lies over it. dalek wipes its keys when they are dropped.
#[inline(never)]
fn expanded<T>(seed: &Secret, act: impl FnOnce(&SigningKey) -> T) -> Option<T> {
    let seed: &[u8; 32] = seed.expose().try_into().ok()?;
    Some(act(&SigningKey::from_bytes(seed)))
}

#[inline(never)]
fn burn_stack() {
    let mut used = [0u64; 4096];
    used.zeroize();
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|window| window == needle)
}

#[cfg(test)]
mod tests {
    use ed25519_dalek::{Signature, VerifyingKey};

    use super::*;

    /// As `ssh-keygen` writes one, of this seed.
    fn file(seed: [u8; 32], kind: &[u8], cipher: &[u8]) -> String {
        let public = SigningKey::from_bytes(&seed).verifying_key().to_bytes();
        let inner = Writer::default()
            .u32(7)
            .u32(7)
            .string(kind)
            .string(&public)
            .string(&[seed, public].concat())
            .string(b"comment")
            .done();
        let mut blob = MAGIC.to_vec();
        blob.extend(
            Writer::default()
                .string(cipher)
                .string(cipher)
                .string(b"")
                .u32(1)
                .string(&public_blob(&public))
                .string(&inner)
                .done(),
        );
        let text = STANDARD.encode(blob);
        let lines: Vec<&str> =
            text.as_bytes().chunks(70).map(|line| std::str::from_utf8(line).unwrap()).collect();
        format!(
            "{}\n{}\n{}\n",
            String::from_utf8_lossy(BEGIN),
            lines.join("\n"),
            String::from_utf8_lossy(END)
        )
    }

    fn parse(text: &str) -> Result<CaKey, SshError> {
        CaKey::parse(&Secret::copy_of(text.as_bytes()).unwrap())
    }

    #[test]
    fn only_an_open_key_of_ed25519_is_a_ca() {
        let key = parse(&file([3; 32], KEY_TYPE, b"none")).unwrap();
        assert_eq!(key.seed.expose(), [3; 32]);
        #[track_caller]
        fn check(text: &str, expected: SshError) {
            assert_eq!(parse(text).err(), Some(expected), "{text:.40}");
        }
        check(&file([3; 32], KEY_TYPE, b"aes256-ctr"), SshError::Encrypted);
        check(&file([3; 32], b"ssh-rsa", b"none"), SshError::OtherKind);
        check("", SshError::NotAKey);
        check(
            "-----END OPENSSH PRIVATE KEY----------BEGIN OPENSSH PRIVATE KEY-----",
            SshError::NotAKey,
        );
        let whole = file([3; 32], KEY_TYPE, b"none");
        for cut in [10, 60, 120, 200, 300] {
            let torn = format!("{}\n{}", &whole[..cut], String::from_utf8_lossy(END));
            assert!(parse(&torn).is_err(), "{cut}");
        }
    }

    #[test]
    fn a_certificate_is_signed_by_the_ca_and_its_key_signs() {
        let ca = parse(&file([3; 32], KEY_TYPE, b"none")).unwrap();
        let principals = ["git".to_owned()];
        let terms = Terms {
            key_id: "lse_x",
            principals: &principals,
            force_command: Some("git-receive-pack 'x.git'"),
            source_address: Some("127.0.0.0/8"),
            extensions: &[],
            now: 1_000_000,
            life: Duration::from_secs(300),
        };
        let identity = Identity::issue(&ca, &terms).unwrap();
        let other = Identity::issue(&ca, &terms).unwrap();
        assert_ne!(identity.certificate(), other.certificate());
        assert_ne!(identity.serial, other.serial);
        let mut reader = Reader::new(identity.certificate());
        assert_eq!(reader.string(), Some(CERTIFICATE_TYPE));
        reader.string().unwrap();
        let public: [u8; 32] = reader.string().unwrap().try_into().unwrap();
        reader.bytes(8 + 4).unwrap();
        assert_eq!(reader.string(), Some(&b"lse_x"[..]));
        reader.string().unwrap();
        assert_eq!(reader.bytes(8), Some(&999_940_u64.to_be_bytes()[..]));
        assert_eq!(reader.bytes(8), Some(&1_000_300_u64.to_be_bytes()[..]));
        for _ in 0..3 {
            reader.string().unwrap();
        }
        assert_eq!(reader.string(), Some(&ca.public_blob()[..]));
        let signature = reader.string().unwrap();
        assert!(reader.is_empty());
        let verify = |public: &[u8; 32], data: &[u8], signature: &[u8]| {
            let mut reader = Reader::new(signature);
            assert_eq!(reader.string(), Some(KEY_TYPE));
            let bytes: [u8; 64] = reader.string().unwrap().try_into().unwrap();
            let key = VerifyingKey::from_bytes(public).unwrap();
            key.verify_strict(data, &Signature::from_bytes(&bytes)).is_ok()
        };
        let body = &identity.certificate()[..identity.certificate().len() - signature.len() - 4];
        assert!(verify(&ca.public, body, signature));
        assert!(verify(&public, b"data", &identity.sign(b"data").unwrap()));
        assert!(!verify(&public, b"other", &identity.sign(b"data").unwrap()), "the control");
    }
}
