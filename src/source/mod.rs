//! Where a value comes from, and how it is revoked there.
//!
//! - [`ssh`]: key pairs and certificates of a CA whose key the vault holds
//! - [`vault`]: values sealed at rest under the host's key
#![forbid(unsafe_code)]

pub mod ssh;
pub mod vault;
