//! What this machine can enforce, what each lack means for sublet, and how to mend it.
//!
//! Receives the places that sublet would use; reads /proc, /sys and those places; changes nothing. Each
//! check is a reading and a pure judgement of it, so that machines other than this one can be tested.
//!
//! - [`kernel`]: version, Landlock, seccomp, the mount API, idmapped mounts
//! - [`namespaces`]: user namespaces and who forbids them, a /proc of one's own, time
//! - [`memory`]: where a value could outlive its exec: swap, cores, freed pages
//! - [`host`]: cgroups, capabilities, ptrace
//! - [`places`]: the state directory and the configuration
//! - [`broker`]: what `sublet serve` would be here
//! - [`issuer`]: the issuer of identities, its keys, and what is published of it
//! - [`sources`]: the files, programs and addresses that values come from
//! - [`hooks`]: what container runtimes call here
#![forbid(unsafe_code)]

pub mod broker;
pub mod hooks;
pub mod host;
pub mod issuer;
pub mod kernel;
pub mod memory;
pub mod namespaces;
pub mod places;
pub mod sources;

use serde::Serialize;

use crate::sandbox::identity::Mode;

pub use places::Places;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Nothing to do.
    Ok,
    /// sublet works, and gives less than it could or gives it another way.
    Warn,
    /// `sublet run` under the default profile does not work, or a promise would not hold.
    Fail,
}

impl Status {
    pub fn as_str(self) -> &'static str {
        match self {
            Status::Ok => "ok",
            Status::Warn => "warn",
            Status::Fail => "fail",
        }
    }
}

/// One finding.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    pub name: &'static str,
    pub status: Status,
    /// What was seen here.
    pub found: String,
    /// What that means for sublet.
    pub means: String,
    /// What to do about it. Empty where nothing is to be done.
    pub mend: String,
}

impl Check {
    pub fn ok(name: &'static str, found: impl Into<String>, means: impl Into<String>) -> Self {
        let (found, means) = (found.into(), means.into());
        Self { name, status: Status::Ok, found, means, mend: String::new() }
    }

    pub fn warn(
        name: &'static str,
        found: impl Into<String>,
        means: impl Into<String>,
        mend: impl Into<String>,
    ) -> Self {
        Self { status: Status::Warn, mend: mend.into(), ..Self::ok(name, found, means) }
    }

    pub fn fail(
        name: &'static str,
        found: impl Into<String>,
        means: impl Into<String>,
        mend: impl Into<String>,
    ) -> Self {
        Self { status: Status::Fail, ..Self::warn(name, found, means, mend) }
    }
}

/// All findings, in the order in which they are shown.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    pub checks: Vec<Check>,
}

impl Report {
    pub fn count(&self, status: Status) -> usize {
        self.checks.iter().filter(|check| check.status == status).count()
    }

    /// The worst of all.
    pub fn status(&self) -> Status {
        self.checks.iter().map(|check| check.status).max().unwrap_or(Status::Ok)
    }
}

/// Looks at everything.
pub fn examine(places: &Places) -> Report {
    let privileges = host::Privileges::of_this_process(places.uid_pool);
    let is_privileged = privileges.mode == Mode::Privileged;
    let checks = [
        kernel::examine(is_privileged, &places.workspace),
        namespaces::examine(is_privileged),
        vec![host::capabilities(&privileges)],
        host::examine(privileges.mode),
        memory::examine(is_privileged),
        places::examine(places),
        broker::examine(places, privileges.mode),
        places.host_config.as_ref().map(sources::examine).unwrap_or_default(),
        issuer::examine(places),
        hooks::examine(places),
    ];
    Report { checks: checks.into_iter().flatten().collect() }
}

/// The trimmed text of a small kernel file; `None` if it is not there or not for us.
fn setting(path: &str) -> Option<String> {
    std::fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_lack_says_what_it_means_and_how_to_mend_it() {
        let workspace = std::env::temp_dir();
        let places = Places { workspace, ..Places::default() };
        let report = examine(&places);
        let mut names: Vec<&str> = report.checks.iter().map(|check| check.name).collect();
        for check in &report.checks {
            assert!(!check.found.is_empty() && !check.means.is_empty(), "{check:?}");
            assert_eq!(check.mend.is_empty(), check.status == Status::Ok, "{check:?}");
        }
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), count, "a name is used twice");
    }
}
