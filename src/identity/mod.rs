//! The workload identity of this host: an OpenID Connect issuer whose tokens say which profile and which
//! agent asks, so that a cloud or a service trades them for what it has, and nobody keeps a secret.
//!
//! - [`key`]: RSA keys, RS256, JSON Web Keys
//! - [`keys`]: where private keys are read from: the state, or systemd's credentials
//! - [`issuer`]: the address, the keys, which of them signs and which are published; rotation with overlap
//! - [`change`]: what makes an issuer, a further key, and withdraws the others; recorded before it takes effect
//! - [`assertion`]: what a token says, and the token
//! - [`publish`]: the discovery document and the key set as static files
//! - [`serve`]: the same over HTTP, by a process that can read nothing else
//! - [`kubernetes`]: the ServiceAccount for a host that is a pod
//!
//! Touches `STATE/keys/issuer*`. A private key is in memory while it signs and no longer.
#![forbid(unsafe_code)]

pub mod assertion;
pub mod change;
pub mod issuer;
pub mod key;
pub mod keys;
pub mod kubernetes;
pub mod publish;
pub mod serve;

pub use assertion::{Act, Assertion, Subject};
pub use change::Change;
pub use issuer::{Issuer, IssuerError, IssuerUrl};
pub use keys::IssuerKeys;
