//! What the host tells before anything is decided: its configuration, its profiles, its clocks.
//! Broker and launcher each read for themselves. Never reads a value.
//!
//! - [`keyfile`]: keys of the host, for the vault and for signing; the launcher loads none
#![forbid(unsafe_code)]

mod account;
pub mod container;
pub mod keyfile;
mod known;
pub mod limit;
mod owner;
mod program;
pub mod trusted;

pub use account::{Account, AccountError, AccountFrom};
pub use owner::OwnerError;
pub use program::Program;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use serde::{Deserialize, Serialize};

use crate::config::{HostConfig, Located};
use crate::model::id::RunId;
use crate::model::moment::Moment;
use crate::model::path_bytes;
use crate::profile::{self, LoadError, Profile, ProfileError};
use crate::sys::clock;
use known::KnownProfiles;

/// Which profile: by name (built in, or in the configuration's `profiles/`), or a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ProfileRef {
    Name(String),
    File(#[serde(with = "path_bytes")] PathBuf),
}

impl ProfileRef {
    /// What holds a `/` or ends in `.toml` is a file.
    pub fn parse(text: &str) -> Self {
        if text.contains('/') || text.ends_with(".toml") {
            ProfileRef::File(PathBuf::from(text))
        } else {
            ProfileRef::Name(text.to_owned())
        }
    }
}

impl ProfileRef {
    /// What identities call it: its name, or for a file its absolute path.
    pub fn identity(&self) -> String {
        match self {
            ProfileRef::Name(name) => name.clone(),
            ProfileRef::File(path) => {
                std::path::absolute(path).unwrap_or_else(|_| path.clone()).display().to_string()
            }
        }
    }
}

impl std::fmt::Display for ProfileRef {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            ProfileRef::Name(name) => f.write_str(name),
            ProfileRef::File(path) => write!(f, "{}", path.display()),
        }
    }
}

/// Where this host keeps things.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Places {
    /// `--config`, `SUBLET_CONFIG`: must exist. Else the default place, which need not.
    #[serde(with = "path_bytes::option")]
    pub config: Option<PathBuf>,
    /// `--state-dir`; else the configuration's `[state] dir`; else the default place.
    #[serde(with = "path_bytes::option")]
    pub state_dir: Option<PathBuf>,
    /// `serve --runtime-dir`; else the configuration's; else the default place.
    #[serde(with = "path_bytes::option")]
    pub runtime_dir: Option<PathBuf>,
}

/// Whose profiles and workspaces are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trust {
    /// The invoker's: `sublet run` protects against the command, not against who runs it.
    Invoker,
    /// The host's alone: profiles that are built in, or that only root or we could have written;
    /// workspaces below `[host] workspaces`.
    Host,
}

/// The host's configuration with the places that it was read from and leads to.
#[derive(Debug)]
pub struct Host {
    pub config: HostConfig,
    /// The file, if there is one.
    pub config_file: Option<PathBuf>,
    pub state_dir: PathBuf,
    /// Where the sockets of `serve` are.
    pub runtime_dir: PathBuf,
    profiles: Vec<PathBuf>,
    trust: Trust,
    known: KnownProfiles,
}

#[derive(Debug, thiserror::Error)]
pub enum HostError {
    #[error("could not read the configuration {path}")]
    Unreadable { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Config(#[from] Box<Located>),
    #[error("neither --state-dir nor HOME nor XDG_STATE_HOME says where to keep state")]
    NoStateDirectory,
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Profile(#[from] ProfileError),
    #[error(transparent)]
    Owner(#[from] OwnerError),
}

/// Where things are by default: what the invoker and their environment say.
#[derive(Debug, Clone)]
pub struct Defaults {
    config_file: Option<PathBuf>,
    state_dir: Option<PathBuf>,
    runtime_dir: Option<PathBuf>,
    config_directories: Vec<PathBuf>,
}

impl Defaults {
    pub fn of_environment() -> Self {
        Self {
            config_file: default_config_file(),
            state_dir: default_state_dir(),
            runtime_dir: default_runtime_dir(),
            config_directories: default_config_directories(),
        }
    }
}

impl Host {
    pub fn load(places: &Places) -> Result<Self, HostError> {
        Self::load_with(places, Defaults::of_environment())
    }

    /// Looks at no variable of the environment.
    pub fn load_with(places: &Places, defaults: Defaults) -> Result<Self, HostError> {
        let (file, text) = match (&places.config, defaults.config_file) {
            (Some(path), _) => (Some(path.clone()), Some(read(path)?)),
            (None, Some(path)) => match std::fs::read_to_string(&path) {
                Ok(text) => (Some(path), Some(text)),
                Err(e) if is_absent(&e) => (None, None),
                Err(source) => return Err(HostError::Unreadable { path, source }),
            },
            (None, None) => (None, None),
        };
        let config = match (&file, &text) {
            (Some(path), Some(text)) => HostConfig::parse(text, &path.display().to_string())?,
            _ => HostConfig::default(),
        };
        let state_dir = match (&places.state_dir, &config.state.dir, &defaults.state_dir) {
            (Some(chosen), ..) | (None, Some(chosen), _) | (None, None, Some(chosen)) => chosen,
            (None, None, None) => return Err(HostError::NoStateDirectory),
        };
        let state_dir = std::path::absolute(state_dir)
            .map_err(|source| HostError::Unreadable { path: state_dir.clone(), source })?;
        let runtime_dir = match places.runtime_dir.as_ref().or(config.host.runtime_dir.as_ref()) {
            Some(configured) => configured.clone(),
            None => runtime_dir(&state_dir, defaults.state_dir.as_deref(), defaults.runtime_dir),
        };
        let beside = file.as_deref().and_then(Path::parent).map(|d| d.join("profiles"));
        let mut profiles: Vec<PathBuf> = beside.into_iter().collect();
        for directory in defaults.config_directories {
            let directory = directory.join("profiles");
            if !profiles.contains(&directory) {
                profiles.push(directory);
            }
        }
        Ok(Self {
            config,
            config_file: file,
            state_dir,
            runtime_dir,
            profiles,
            trust: Trust::Invoker,
            known: KnownProfiles::default(),
        })
    }

    /// From now on takes only what `trust` allows.
    pub fn trust(&mut self, trust: Trust) {
        self.trust = trust;
    }

    /// What it takes.
    pub fn trusts(&self) -> Trust {
        self.trust
    }

    /// Why a workspace at this path, with every link resolved, is not taken.
    pub fn objection_to_workspace(&self, path: &Path) -> Option<String> {
        // The broker may not be allowed to look; a path without links below one as it is written is below.
        let below = |root: &PathBuf| {
            path.starts_with(root) || root.canonicalize().is_ok_and(|root| path.starts_with(root))
        };
        // Its beginning says nothing of a path that climbs.
        let climbs = path.components().any(|part| part == std::path::Component::ParentDir);
        match self.trust {
            Trust::Invoker => None,
            Trust::Host if !climbs && self.config.host.workspaces.iter().any(below) => None,
            Trust::Host => Some(format!(
                "it lies in none of the `workspaces` of [host] in {}",
                self.config.called()
            )),
        }
    }

    /// The socket that the broker answers a run on.
    pub fn agent_socket(&self, run: &RunId) -> PathBuf {
        agent_socket(&self.runtime_dir, run)
    }

    /// The home that `~/` in profiles means: the invoker's, and for the host no one's.
    pub fn home_for<'a>(&self, invokers: Option<&'a Path>) -> &'a Path {
        match self.trust {
            Trust::Invoker => invokers.unwrap_or(Path::new(NO_HOME)),
            Trust::Host => Path::new(NO_HOME),
        }
    }

    /// A profile's text, if it may be taken.
    fn read_profile(&self, path: &Path) -> Result<String, LoadError> {
        let unreadable = |source| LoadError::Unreadable { path: path.to_owned(), source };
        if self.trust == Trust::Host {
            // Most that are looked for are not there: their way need not be looked at.
            std::fs::symlink_metadata(path).map_err(unreadable)?;
            trusted::refuse_foreign(path).map_err(unreadable)?;
        }
        std::fs::read_to_string(path).map_err(unreadable)
    }

    /// Reads, resolves and checks a profile. A file in a configuration directory overrides a built-in
    /// one of the same name; a profile that extends its own name extends the built-in one.
    ///
    /// One that was asked for lately is read again, with all that it extends, and not resolved again if every
    /// text of it is what it was.
    pub fn profile(&self, which: &ProfileRef) -> Result<Profile, HostError> {
        let (name, text) = match which {
            ProfileRef::Name(name) => (name.clone(), self.profile_text(name)?),
            ProfileRef::File(path) => (path.display().to_string(), self.read_profile(path)?),
        };
        let load = |wanted: &str| self.profile_text(wanted);
        if let Some(profile) = self.known.profile(which, &text, load) {
            return Ok(profile);
        }
        let mut extended = Vec::new();
        let profile = profile::resolve(&name, &text, &mut |wanted| {
            let text = load(wanted)?;
            extended.push((wanted.to_owned(), text.clone()));
            Ok(text)
        })?;
        self.known.keep(which, text, extended, &profile);
        Ok(profile)
    }

    /// Names of all profiles, overriding ones first, with where they are from.
    pub fn profile_names(&self) -> Vec<(String, Option<PathBuf>)> {
        let mut names: Vec<(String, Option<PathBuf>)> = Vec::new();
        for directory in &self.profiles {
            let Ok(entries) = std::fs::read_dir(directory) else { continue };
            for path in entries.flatten().map(|e| e.path()) {
                let Some(stem) = path.file_stem().and_then(|s| s.to_str()) else { continue };
                if path.extension().is_some_and(|e| e == "toml")
                    && !names.iter().any(|(n, _)| n == stem)
                {
                    names.push((stem.to_owned(), Some(path.clone())));
                }
            }
        }
        for builtin in profile::builtin_names() {
            if !names.iter().any(|(n, _)| n == builtin) {
                names.push((builtin.to_owned(), None));
            }
        }
        names.sort();
        names
    }

    /// Where profiles are looked for, overriding ones first.
    pub fn profile_directories(&self) -> &[PathBuf] {
        &self.profiles
    }

    /// Whether this host has an issuer of workload identities: `sublet issuer init` made one.
    pub fn has_issuer(&self) -> bool {
        issuer_file(&self.state_dir).is_file()
    }

    /// The user that a broker of this host runs as where it starts as root.
    ///
    /// # Errors
    /// The configuration names a user that there is none of, or that the broker must not be.
    pub fn broker_account(&self) -> Result<Account, AccountError> {
        account::of_broker(&self.config.host)
    }

    /// Before root touches a state that a broker's user, or another, has: becomes that user for good. Does
    /// nothing for anyone but root, or where the state is root's or not there yet.
    ///
    /// Call it in a process of one thread, before any file of the state is opened, and after whatever
    /// needs root: it cannot be undone.
    ///
    /// # Errors
    /// [`OwnerError`]: then nothing of the state may be touched.
    pub fn become_state_owner(&self) -> Result<(), HostError> {
        owner::become_owner_of(&self.state_dir, false).map_err(HostError::from)
    }

    /// As [`Host::become_state_owner`], for a broker with a launcher that stays root: it writes the trail's
    /// head in the state's directory, which therefore must be root's.
    ///
    /// # Errors
    /// [`OwnerError`].
    pub fn become_state_owner_beside_launcher(&self) -> Result<(), HostError> {
        owner::become_owner_of(&self.state_dir, true).map_err(HostError::from)
    }

    fn profile_text(&self, name: &str) -> Result<String, LoadError> {
        // A name is a file name here: nothing that could climb out of the directory.
        if name.parse::<crate::model::name::ProfileName>().is_ok() {
            for directory in &self.profiles {
                let path = directory.join(format!("{name}.toml"));
                match self.read_profile(&path) {
                    Err(LoadError::Unreadable { source, .. }) if is_absent(&source) => {}
                    other => return other,
                }
            }
        }
        profile::load_builtin(name).map_err(|_| {
            let names: Vec<_> = self.profile_names().into_iter().map(|(name, _)| name).collect();
            LoadError::Unknown { name: name.to_owned(), known: names.join(", ") }
        })
    }
}

/// The socket that a broker answers a run on.
pub fn agent_socket(runtime_dir: &Path, run: &RunId) -> PathBuf {
    runtime_dir.join("runs").join(run.as_str()).join("agent.sock")
}

/// Where a container's run has its projected identity tokens, in the directory that the container sees.
pub fn identity_directory(runtime_dir: &Path, run: &RunId) -> PathBuf {
    agent_socket(runtime_dir, run).with_file_name("identity")
}

/// Where an issuer of workload identities keeps what is public of it, beside its keys.
pub fn issuer_file(state_dir: &Path) -> PathBuf {
    state_dir.join(keyfile::DIRECTORY).join("issuer.json")
}

/// Where nothing is, for `~/` of no one.
const NO_HOME: &str = "/nonexistent";

/// The invoker's home: HOME, where it is a directory's absolute path.
pub fn home() -> PathBuf {
    std::env::var_os("HOME")
        .map(PathBuf::from)
        .filter(|p| p.is_absolute() && p != Path::new("/"))
        .unwrap_or_else(|| PathBuf::from(NO_HOME))
}

/// This moment on both clocks.
///
/// # Errors
/// As [`clock::boot_id`].
pub fn now() -> io::Result<Moment> {
    // Neither a process's boot nor its time namespace changes in its life (time_namespaces(7)), and a
    // broker that has settled may not look any more.
    static BOOT_ID: OnceLock<String> = OnceLock::new();
    let boot_id = match BOOT_ID.get() {
        Some(known) => known.clone(),
        None => {
            let found = clock::boot_id()?;
            BOOT_ID.get_or_init(|| found).clone()
        }
    };
    Ok(Moment { wall: jiff::Timestamp::now(), boot: clock::boottime(), boot_id })
}

fn read(path: &Path) -> Result<String, HostError> {
    std::fs::read_to_string(path)
        .map_err(|source| HostError::Unreadable { path: path.to_owned(), source })
}

fn is_absent(e: &io::Error) -> bool {
    matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

fn home_under(variable: &str, below: &str) -> Option<PathBuf> {
    let set = std::env::var_os(variable).map(PathBuf::from).filter(|p| p.is_absolute());
    set.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(below)))
}

/// Directories that may hold `sublet.toml` and `profiles/`: the user's own before the system's.
fn default_config_directories() -> Vec<PathBuf> {
    let system = PathBuf::from("/etc/sublet");
    if is_root() {
        return vec![system];
    }
    home_under("XDG_CONFIG_HOME", ".config")
        .map(|d| d.join("sublet"))
        .into_iter()
        .chain([system])
        .collect()
}

/// The default configuration file: for root the system's; for a user their own, else the system's.
pub fn default_config_file() -> Option<PathBuf> {
    let candidates: Vec<_> =
        default_config_directories().into_iter().map(|d| d.join("sublet.toml")).collect();
    candidates.iter().find(|p| p.exists()).or(candidates.first()).cloned()
}

fn default_state_dir() -> Option<PathBuf> {
    if is_root() {
        Some(PathBuf::from("/var/lib/sublet"))
    } else {
        home_under("XDG_STATE_HOME", ".local/state").map(|d| d.join("sublet"))
    }
}

/// Sockets of a state that is not the default one lie in it, so that two hosts' worth of them never meet.
fn runtime_dir(
    state_dir: &Path,
    default_state_dir: Option<&Path>,
    default_runtime_dir: Option<PathBuf>,
) -> PathBuf {
    default_runtime_dir
        .filter(|_| Some(state_dir) == default_state_dir)
        .unwrap_or_else(|| state_dir.join("run"))
}

fn default_runtime_dir() -> Option<PathBuf> {
    if is_root() {
        return Some(PathBuf::from("/run/sublet"));
    }
    let set = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    set.filter(|p| p.is_absolute()).map(|d| d.join("sublet"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_default_state_has_its_sockets_in_the_default_place() {
        #[track_caller]
        fn check(state: &str, default_runtime: Option<&str>, expected: &str) {
            let default_state = Some(Path::new("/var/lib/sublet"));
            let found = runtime_dir(state.as_ref(), default_state, default_runtime.map(Into::into));
            assert_eq!(found, Path::new(expected));
        }
        check("/var/lib/sublet", Some("/run/sublet"), "/run/sublet");
        check("/srv/state", Some("/run/sublet"), "/srv/state/run");
        check("/var/lib/sublet", None, "/var/lib/sublet/run");
        assert_eq!(runtime_dir("/s".as_ref(), None, Some("/r".into())), Path::new("/s/run"));
    }

    #[test]
    fn profiles_are_named_or_files() {
        assert_eq!(ProfileRef::parse("build"), ProfileRef::Name("build".into()));
        assert_eq!(ProfileRef::parse("./build"), ProfileRef::File("./build".into()));
        assert_eq!(ProfileRef::parse("a.toml"), ProfileRef::File("a.toml".into()));
    }
}
