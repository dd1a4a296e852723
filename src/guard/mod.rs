//! Whether bytes hold a managed value, told by one who holds no value: the broker makes fingerprints, the
//! guard of a container compares with them. Pure.
//!
//! - [`fingerprint`]: what is told of a value, and to whom that is worth what
//! - [`told`]: the same as JSON
//! - [`scan`]: looks for all of them at every place of a text
#![forbid(unsafe_code)]

pub mod fingerprint;
pub mod scan;
pub mod told;

pub use fingerprint::{Fingerprint, Form, GuardKey};
pub use scan::Scanner;
pub use told::Told;
