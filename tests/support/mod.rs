//! What every acceptance test stands on.
//!
//! - [`world`]: one temporary machine corner (state, configuration, workspace, profiles) and how to call
//!   the real `sublet` in it
//! - [`outcome`]: what a call gave, and what a test may claim about it
//! - [`probe`]: hostile programs, compiled once, and the bare namespace in which each is shown to work
//! - [`host`]: what the machine shows from outside: processes, mounts, cgroups, files
//! - [`http`]: HTTP over a Unix socket, byte by byte
//! - [`issuer`]: this host as an issuer of identities, served
//! - [`schema`]: JSON against the description of the API
//! - [`servers`]: other programs that serve: from PyPI and npm, and `tests/servers`
//! - [`broker`]: `sublet serve` for one test
//! - [`far`]: the far side of a source, which answers as a test wants it
//! - [`bundle`]: containers of a real `runc`
//! - [`leak`]: descriptors that a command passes out of its sandbox, and what they show later
//! - [`postgres`]: a database server of one test
//! - [`rusty_vault`]: a real Vault-compatible server of one test
//! - [`venv`]: Python libraries of the tests
//! - [`git_server`]: `git http-backend` behind a server that demands a token
//!
//! The tests speak to the command line only: what they hold is what a user can see.
#![allow(dead_code)] // each test binary uses its own part
#![forbid(unsafe_code)]

pub mod broker;
pub mod bundle;
pub mod far;
pub mod git_server;
pub mod host;
pub mod http;
pub mod issuer;
pub mod leak;
pub mod outcome;
pub mod postgres;
pub mod probe;
pub mod rusty_vault;
pub mod schema;
pub mod servers;
pub mod venv;
pub mod world;

#[allow(unused_imports)]
pub use outcome::Outcome;
#[allow(unused_imports)]
pub use world::{ORDINARY, World};

/// Fails, naming the package, where a tool is missing: a wall whose test did not run is no wall.
#[track_caller]
pub fn needs(tool: &str, package: &str) {
    assert!(which(tool).is_some(), "this test needs `{tool}`: apt-get install {package}");
}

/// The first executable of that name on the PATH.
pub fn which(tool: &str) -> Option<std::path::PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join(tool)).find(|file| file.is_file())
}

/// Many walls stand between two users, and only root can be both.
#[track_caller]
pub fn needs_root() {
    assert!(
        rustix::process::geteuid().is_root(),
        "this test plays several users: run the tests as root (a container or a VM will do)"
    );
}
