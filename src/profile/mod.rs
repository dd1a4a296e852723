//! What a sandbox may do: filesystem, network, filter, limits, environment, and the capabilities that
//! it declares. TOML texts go in, one [`Profile`] comes out that cannot be wrong; nothing is read,
//! resolved or looked up on the host here.
//!
//! - [`kinds`]: the parts of a profile, as everyone downstream reads them
//! - [`capability`]: capabilities, their audiences, and where each channel puts a value
//! - [`command`]: the patterns that pin a capability to commands
//! - [`path`]: paths as profiles write them (`-` may be missing, `~/` the invoker's home)
//! - [`names`]: environment names that are reserved or refused
//! - `raw`, `layer`: one text as written; `resolve`: `extends`, merging, errors with line and column
#![forbid(unsafe_code)]

pub mod capability;
pub mod command;
pub mod identity;
pub mod kinds;
mod layer;
pub mod names;
pub mod path;
mod raw;
mod resolve;

pub use capability::{
    AWS_ENDPOINT_TOKEN, AWS_ENDPOINT_URI, AWS_VARIABLES, Audience, Capability, Format, OnRevoke,
    Place, Protocol,
};
pub use command::{CommandPattern, PatternElement};
pub use kinds::{
    CpuQuota, Enforcement, Environment, Filesystem, Landlock, Limits, Network, NetworkMode,
    Profile, Seccomp, SeccompFilter, Waiver, WorkspaceAccess,
};
pub use path::{BindEntry, HostPath};
pub use resolve::{LoadError, MAX_DEPTH, ProfileError, resolve};

/// The profiles that come with sublet, by name. They live in `profiles/`.
const BUILTIN: [(&str, &str); 4] = [
    ("default", include_str!("../../profiles/default.toml")),
    ("strict", include_str!("../../profiles/strict.toml")),
    ("build", include_str!("../../profiles/build.toml")),
    ("git-push", include_str!("../../profiles/git-push.toml")),
];

/// The text of a built-in profile.
pub fn builtin(name: &str) -> Option<&'static str> {
    BUILTIN.iter().find(|(n, _)| *n == name).map(|(_, text)| *text)
}

/// The names of the built-in profiles, `default` first.
pub fn builtin_names() -> impl Iterator<Item = &'static str> {
    BUILTIN.iter().map(|(name, _)| *name)
}

/// A loader for [`resolve`] that knows the built-in profiles and nothing else.
pub fn load_builtin(name: &str) -> Result<String, LoadError> {
    builtin(name).map(str::to_owned).ok_or_else(|| LoadError::Unknown {
        name: name.to_owned(),
        known: builtin_names().collect::<Vec<_>>().join(", "),
    })
}

#[cfg(test)]
mod tests;
