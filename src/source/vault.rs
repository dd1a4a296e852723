//! The vault: values sealed at rest under the host's key.
//!
//! Receives values and a key in locked memory; returns sealed bytes for the store to keep, and opens
//! such bytes straight into the buffer they are delivered from. Touches the key's file (`host::keyfile`)
//! and nothing else. Must never hold a second plain copy of a value, or give one back.
//!
//! Sealed: one byte of format (1), 8 bytes naming the key, a random nonce of 24, then XChaCha20-Poly1305
//! (draft-irtf-cfrg-xchacha-03) over the value, then the tag of 16. The secret's name and version are
//! authenticated with it, so that no sealed value can stand in for another secret's or an older one's.
//! The sealing key, the digest key and the key's name are derived from the key file by HMAC-SHA256.
#![forbid(unsafe_code)]

use std::io;
use std::path::{Path, PathBuf};

use chacha20poly1305::{AeadInOut, Key, KeyInit, Tag, XChaCha20Poly1305, XNonce};
use hmac::{HmacReset, Mac};
use sha2::Sha256;
use zeroize::Zeroize;

use crate::guard::{Fingerprint, GuardKey};
use crate::host::keyfile::{self, KeyFile, KeyFileError};
use crate::model::digest::ValueDigest;
use crate::model::id::MintId;
use crate::model::name::SecretName;
use crate::model::secret::{MAX_VALUE, Secret};

/// Bytes of the key's file.
pub const KEY_SIZE: usize = keyfile::KEY_SIZE;
/// The systemd credential that holds the key, if there is one. systemd.exec(5), `LoadCredential=`.
pub const CREDENTIAL: &str = "sublet-vault-key";

const FILE: KeyFile = KeyFile {
    name: "vault.key",
    credential: CREDENTIAL,
    if_known: "take it to be known to them: set the secrets anew under a new key, with mode 0600",
    if_torn: "restore it from a backup; without it no secret opens",
};

const FORMAT: u8 = 1;
const KEY_NAME_SIZE: usize = 8;
const NONCE_SIZE: usize = 24;
const TAG_SIZE: usize = 16;
const HEADER: usize = 1 + KEY_NAME_SIZE + NONCE_SIZE;
/// What sealing adds to a value.
pub const OVERHEAD: usize = HEADER + TAG_SIZE;

#[derive(Debug, thiserror::Error)]
pub enum VaultError {
    #[error(
        "the vault has no key at {path}: no secret has been set on this host, or its state was moved without its keys"
    )]
    NoKey { path: PathBuf },
    #[error("the vault's key {path} {fault}; {mend}")]
    UnsafeKey { path: PathBuf, fault: String, mend: &'static str },
    #[error("cannot read the vault's key {path}")]
    ReadKey { path: PathBuf, source: io::Error },
    #[error("cannot create the vault's key {path}")]
    CreateKey { path: PathBuf, source: io::Error },
    #[error(
        "cannot lock memory for the vault's key; raise the limit for locked memory (ulimit -l)"
    )]
    LockMemory { source: io::Error },
    #[error("the kernel gave no random bytes (getrandom(2))")]
    Random { source: std::io::Error },
    #[error("a secret holds at most {MAX_VALUE} bytes, and {name} has {len}")]
    TooLarge { name: SecretName, len: usize },
    #[error(
        "the sealed value of {name} is not one: its format is unknown or it is cut off; set it again with `sublet secret set {name}`"
    )]
    NotSealed { name: SecretName },
    #[error(
        "{name} was sealed under another key than this vault's; bring back the key's file, or set it again with `sublet secret set {name}`"
    )]
    OtherKey { name: SecretName },
    #[error(
        "the sealed value of {name} was changed, or belongs to another secret or version; set it again with `sublet secret set {name}`"
    )]
    Tampered { name: SecretName },
    #[error("the buffer for {name} has {buffer} bytes and its value {value}")]
    WrongBuffer { name: SecretName, buffer: usize, value: usize },
}

impl From<KeyFileError> for VaultError {
    fn from(error: KeyFileError) -> Self {
        match error {
            KeyFileError::Absent { path } => VaultError::NoKey { path },
            KeyFileError::Unsafe { path, fault, mend } => {
                VaultError::UnsafeKey { path, fault, mend }
            }
            KeyFileError::Read { path, source } => VaultError::ReadKey { path, source },
            KeyFileError::Create { path, source } => VaultError::CreateKey { path, source },
            KeyFileError::LockMemory { source } => VaultError::LockMemory { source },
            KeyFileError::Random { source } => VaultError::Random { source },
        }
    }
}

/// The host's key and what is derived from it, in locked memory.
pub struct VaultKey {
    /// The sealing key, then the digest key, then the guard's.
    derived: Secret,
    name: [u8; KEY_NAME_SIZE],
}

/// Where the vault's key is read from. Holds no key.
#[derive(Debug)]
pub struct KeySource(keyfile::KeySource);

impl KeySource {
    /// To be called before a process gives up root's rights: as [`KeyFile::open`].
    ///
    /// # Errors
    /// [`VaultError::UnsafeKey`] or [`VaultError::ReadKey`] if there is a credential that cannot be used.
    pub fn open(state_dir: &Path, credentials: Option<&Path>) -> Result<Self, VaultError> {
        Ok(Self(FILE.open(state_dir, credentials)?))
    }

    /// Of the state that it is the key of.
    pub fn state_dir(&self) -> &Path {
        self.0.state_dir()
    }

    /// The key that is there.
    ///
    /// # Errors
    /// [`VaultError::NoKey`] if there is none, [`VaultError::UnsafeKey`] if others may read or change it,
    /// or it has not 32 bytes.
    pub fn load(&self) -> Result<VaultKey, VaultError> {
        VaultKey::derive(&self.0.load()?)
    }

    /// As [`KeySource::load`], and makes the file on first use.
    ///
    /// # Errors
    /// As [`KeySource::load`]; [`VaultError::CreateKey`].
    pub fn load_or_create(&self) -> Result<VaultKey, VaultError> {
        VaultKey::derive(&self.0.load_or_create()?)
    }
}

impl VaultKey {
    /// The key's file under a state directory, outside the database's.
    pub fn path(state_dir: &Path) -> PathBuf {
        FILE.path(state_dir)
    }

    /// [`KeySource::open`] and [`KeySource::load`] in one.
    ///
    /// # Errors
    /// Theirs.
    pub fn load(state_dir: &Path, credentials: Option<&Path>) -> Result<Self, VaultError> {
        Self::derive(&FILE.load(state_dir, credentials)?)
    }

    /// [`KeySource::open`] and [`KeySource::load_or_create`] in one.
    ///
    /// # Errors
    /// Theirs.
    pub fn load_or_create(
        state_dir: &Path,
        credentials: Option<&Path>,
    ) -> Result<Self, VaultError> {
        Self::derive(&FILE.load_or_create(state_dir, credentials)?)
    }

    fn derive(master: &Secret) -> Result<Self, VaultError> {
        let lock = |source| VaultError::LockMemory { source };
        let mut derived = Secret::zeroed(3 * KEY_SIZE).map_err(lock)?;
        let (seal, rest) = derived.expose_mut().split_at_mut(KEY_SIZE);
        let (digest, guard) = rest.split_at_mut(KEY_SIZE);
        let mut name = [0; KEY_SIZE];
        mac(master.expose(), &[b"sublet.vault.seal.v1"], seal);
        mac(master.expose(), &[b"sublet.vault.digest.v1"], digest);
        mac(master.expose(), &[b"sublet.vault.guard.v1"], guard);
        mac(master.expose(), &[b"sublet.vault.name.v1"], &mut name);
        let mut key = Self { derived, name: [0; KEY_NAME_SIZE] };
        key.name.copy_from_slice(&name[..KEY_NAME_SIZE]);
        burn_stack();
        Ok(key)
    }

    /// The keyed digest by which a managed value is recognised.
    pub fn digest(&self, value: &[u8]) -> ValueDigest {
        let mut digest = [0; 32];
        mac(&self.derived.expose()[KEY_SIZE..2 * KEY_SIZE], &[value], &mut digest);
        burn_stack();
        ValueDigest(digest)
    }

    /// The key of the guard's fingerprints, from which none of the others follows.
    pub fn guard_key(&self) -> GuardKey {
        let mut key = [0; KEY_SIZE];
        key.copy_from_slice(&self.derived.expose()[2 * KEY_SIZE..]);
        GuardKey::new(key)
    }

    fn cipher(&self) -> XChaCha20Poly1305 {
        let mut key = Key::default();
        key.copy_from_slice(&self.derived.expose()[..KEY_SIZE]);
        let cipher = XChaCha20Poly1305::new(&key);
        key.as_mut_slice().zeroize();
        cipher
    }
}

/// Seals `value` as this version of this secret.
///
/// # Errors
/// [`VaultError::TooLarge`], or no randomness.
pub fn seal(
    key: &VaultKey,
    name: &SecretName,
    version: u64,
    value: &Secret,
) -> Result<Vec<u8>, VaultError> {
    seal_bound(key, name, &bound_to(name, version), value)
}

/// Seals what revokes a minted value: bound to the secret whose source minted it, and to its own id. Never
/// interchangeable with a secret's value.
///
/// # Errors
/// As [`seal`].
pub fn seal_handle(
    key: &VaultKey,
    name: &SecretName,
    mint: &MintId,
    handle: &Secret,
) -> Result<Vec<u8>, VaultError> {
    seal_bound(key, name, &bound_to_mint(name, mint), handle)
}

/// Opens what [`seal_handle`] made.
///
/// # Errors
/// As [`open_into`].
pub fn open_handle(
    key: &VaultKey,
    name: &SecretName,
    mint: &MintId,
    sealed: &[u8],
) -> Result<Secret, VaultError> {
    let len = plaintext_len(name, sealed)?;
    let mut handle = Secret::zeroed(len).map_err(|source| VaultError::LockMemory { source })?;
    let opened = try_open_into(key, name, &bound_to_mint(name, mint), sealed, handle.expose_mut());
    burn_stack();
    opened.map(|()| handle)
}

fn seal_bound(
    key: &VaultKey,
    name: &SecretName,
    bound: &[u8],
    value: &Secret,
) -> Result<Vec<u8>, VaultError> {
    let too_large = || VaultError::TooLarge { name: name.clone(), len: value.len() };
    if value.len() > MAX_VALUE {
        return Err(too_large());
    }
    // The value's bytes must never lie here in the clear: encrypted in a locked copy first, and only
    // the ciphertext is copied out.
    let mut text =
        Secret::copy_of(value.expose()).map_err(|source| VaultError::LockMemory { source })?;
    let mut nonce = XNonce::default();
    crate::sys::random::fill(&mut nonce).map_err(|source| VaultError::Random { source })?;
    let tag = key
        .cipher()
        .encrypt_inout_detached(&nonce, bound, text.expose_mut().into())
        .map_err(|_| too_large())?;
    burn_stack();
    let mut sealed = Vec::with_capacity(OVERHEAD + value.len());
    sealed.push(FORMAT);
    sealed.extend_from_slice(&key.name);
    sealed.extend_from_slice(&nonce);
    sealed.extend_from_slice(text.expose());
    sealed.extend_from_slice(&tag);
    Ok(sealed)
}

/// How many bytes the value has: the size of the buffer that [`open_into`] wants.
///
/// # Errors
/// [`VaultError::NotSealed`].
pub fn plaintext_len(name: &SecretName, sealed: &[u8]) -> Result<usize, VaultError> {
    match (sealed.first(), sealed.len().checked_sub(OVERHEAD)) {
        (Some(&FORMAT), Some(len)) if len <= MAX_VALUE => Ok(len),
        _ => Err(VaultError::NotSealed { name: name.clone() }),
    }
}

/// Opens a sealed value in place in `out`, which has exactly its length. No other copy is made.
///
/// # Errors
/// Then `out` is all zeros, and the error says whether the key, the value or the buffer is wrong.
pub fn open_into(
    key: &VaultKey,
    name: &SecretName,
    version: u64,
    sealed: &[u8],
    out: &mut [u8],
) -> Result<(), VaultError> {
    let opened = try_open_into(key, name, &bound_to(name, version), sealed, out);
    burn_stack();
    if opened.is_err() {
        out.zeroize();
    }
    opened
}

/// What the guard recognises a sealed value by. The value is opened in locked memory, and wiped.
///
/// # Errors
/// As [`open_into`]; no locked memory.
pub fn fingerprints(
    key: &VaultKey,
    name: &SecretName,
    version: u64,
    sealed: &[u8],
) -> Result<Vec<Fingerprint>, VaultError> {
    let lock = |source| VaultError::LockMemory { source };
    let mut value = Secret::zeroed(plaintext_len(name, sealed)?).map_err(lock)?;
    open_into(key, name, version, sealed, value.expose_mut())?;
    let prints = key.guard_key().fingerprints(name, value.expose()).map_err(lock);
    burn_stack();
    prints
}

fn try_open_into(
    key: &VaultKey,
    name: &SecretName,
    bound: &[u8],
    sealed: &[u8],
    out: &mut [u8],
) -> Result<(), VaultError> {
    let value = plaintext_len(name, sealed)?;
    if out.len() != value {
        return Err(VaultError::WrongBuffer { name: name.clone(), buffer: out.len(), value });
    }
    let (header, rest) = sealed.split_at(HEADER);
    let (ciphertext, tag_bytes) = rest.split_at(value);
    if header[1..1 + KEY_NAME_SIZE] != key.name {
        return Err(VaultError::OtherKey { name: name.clone() });
    }
    let (mut nonce, mut tag) = (XNonce::default(), Tag::default());
    nonce.copy_from_slice(&header[1 + KEY_NAME_SIZE..]);
    tag.copy_from_slice(tag_bytes);
    out.copy_from_slice(ciphertext);
    key.cipher()
        .decrypt_inout_detached(&nonce, bound, out.into(), &tag)
        .map_err(|_| VaultError::Tampered { name: name.clone() })
}

/// What the tag also covers. A name has at most 64 bytes, so one byte says its length.
fn bound_to(name: &SecretName, version: u64) -> Vec<u8> {
    let mut bytes = b"sublet.vault.v1\n".to_vec();
    bytes.push(name.as_str().len() as u8);
    bytes.extend_from_slice(name.as_str().as_bytes());
    bytes.extend_from_slice(&version.to_be_bytes());
    bytes
}

fn bound_to_mint(name: &SecretName, mint: &MintId) -> Vec<u8> {
    let mut bytes = b"sublet.mint.v1\n".to_vec();
    bytes.push(name.as_str().len() as u8);
    bytes.extend_from_slice(name.as_str().as_bytes());
    bytes.extend_from_slice(mint.as_str().as_bytes());
    bytes
}

/// HMAC-SHA256. Updated and finished in place: `finalize(self)` would leave a moved-from copy of the
/// block buffer, with the end of a value in it, on the stack.
fn mac(key: &[u8], parts: &[&[u8]], out: &mut [u8]) {
    let mut padded = hmac::digest::Key::<HmacReset<Sha256>>::default();
    padded[..key.len()].copy_from_slice(key);
    let mut mac = <HmacReset<Sha256> as hmac::KeyInit>::new(&padded);
    padded.as_mut_slice().zeroize();
    for part in parts {
        Mac::update(&mut mac, part);
    }
    out.copy_from_slice(&mac.finalize_reset().into_bytes());
}

/// Overwrites the stack that the cipher and the hash have just used: they work on whole blocks of 64
/// bytes, and where the compiler keeps one in memory and not in registers, a piece of a value stays
/// there. Their frames lay where this one lies now.
#[inline(never)]
fn burn_stack() {
    let mut used = [0u64; 2048];
    used.zeroize();
}

#[cfg(test)]
#[path = "vault_tests.rs"]
mod tests;
