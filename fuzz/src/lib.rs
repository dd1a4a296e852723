//! What the fuzz targets do: one function a target. It takes any bytes, gives them to the code that would
//! meet them, and panics if a promise of that code is broken.
//!
//! Two programs share it, so that they cannot differ: the targets in `fuzz_targets/`, and `tests/corpus*.rs`,
//! which replay the committed corpus in the ordinary test suite. What is written to disk lies in temporary
//! directories.
#![forbid(unsafe_code)]

mod api;
mod client;
mod config;
mod env_file;
mod envelope;
mod feed;
mod frames;
mod git;
mod oci;
mod policy;
mod profile;
mod redact;
mod request;
mod seccomp;
mod trail;
mod vault;
mod wire;

/// A target's name, and what it does.
pub type Target = (&'static str, fn(&[u8]));

/// Every target. `fuzz_targets/NAME.rs` and `corpus/NAME/` belong to it.
pub const TARGETS: &[Target] = &[
    ("api", api::run),
    ("client", client::run),
    ("config", config::run),
    ("env_file", env_file::run),
    ("envelope", envelope::run),
    ("frames", frames::run),
    ("git", git::run),
    ("oci", oci::run),
    ("policy", policy::run),
    ("profile", profile::run),
    ("redact", redact::run),
    ("request", request::run),
    ("seccomp", seccomp::run),
    ("trail", trail::run),
    ("vault", vault::run),
    ("wire", wire::run),
];

/// Runs one target on one input.
///
/// # Panics
/// If the input breaks a promise, which is a finding; or if there is no such target.
pub fn run(name: &str, input: &[u8]) {
    let target = TARGETS.iter().find(|(n, _)| *n == name);
    let (_, body) = target.unwrap_or_else(|| panic!("there is no fuzz target `{name}`"));
    body(input);
}
