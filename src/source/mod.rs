//! Where a value comes from, and how it is revoked there.
//!
//! - [`vault`]: values sealed at rest under the host's key
#![forbid(unsafe_code)]

pub mod vault;
