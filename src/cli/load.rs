//! What most commands begin with: the host's configuration, a profile, the clock; and how their errors
//! read.
#![forbid(unsafe_code)]

use std::path::PathBuf;

use super::Globals;
use super::fail::Failure;
use crate::config::{HostConfig, SecretSource};
use crate::host::{Host, HostError, OwnerError, Places, ProfileRef};
use crate::model::moment::Moment;
use crate::model::name::SecretName;
use crate::profile::{LoadError, Profile, ProfileError};
use crate::store::StoreError;

pub fn places(globals: &Globals) -> Places {
    Places {
        config: globals.config.clone(),
        state_dir: globals.state_dir.clone(),
        runtime_dir: None,
    }
}

/// The configuration, and the places that it leads to.
pub fn host(globals: &Globals) -> Result<Host, Failure> {
    Host::load(&places(globals)).map_err(|e| Failure::from(&e))
}

/// As [`host`], for commands that open the state: root becomes the user whom the state belongs to.
pub fn host_of_state(globals: &Globals) -> Result<Host, Failure> {
    let host = host(globals)?;
    enter_state(&host)?;
    Ok(host)
}

/// Root becomes the user whom the state belongs to. Before any of it is opened, and after all else that
/// takes root.
pub fn enter_state(host: &Host) -> Result<(), Failure> {
    // Afterwards it would be the state's owner.
    super::principal::invoking_user();
    host.become_state_owner().map_err(|e| Failure::from(&e))
}

pub fn profile(host: &Host, named: &str) -> Result<Profile, Failure> {
    host.profile(&ProfileRef::parse(named)).map_err(|e| Failure::from(&e))
}

/// Both clocks.
pub fn now() -> Result<Moment, Failure> {
    crate::host::now().map_err(|e| {
        Failure::new("state", "clock_unusable", "cannot read the clock")
            .because(&e)
            .hint("sublet doctor tells what is wrong with it")
    })
}

/// The systemd credentials of this service, if it is one. systemd.exec(5).
pub fn credentials_directory() -> Option<PathBuf> {
    std::env::var_os("CREDENTIALS_DIRECTORY").map(PathBuf::from)
}

/// The configuration's file, or where it would be.
pub fn config_file(host: &Host) -> PathBuf {
    let file = host.config_file.clone().or_else(crate::host::default_config_file);
    file.unwrap_or_else(|| "sublet.toml".into())
}

/// Whether a lease can draw on `name` in the vault, as far as the configuration goes.
pub fn draws_on_vault(config: &HostConfig, name: &SecretName) -> bool {
    config.secrets.get(name).is_some_and(|entry| entry.source == SecretSource::Vault)
}

impl From<&HostError> for Failure {
    fn from(error: &HostError) -> Self {
        match error {
            HostError::Unreadable { .. } => {
                Failure::new("config", "config_unreadable", error.to_string())
                    .because_of_source(error)
                    .hint("correct --config or SUBLET_CONFIG, or write one with sublet init")
            }
            HostError::Config(located) => {
                Failure::new("config", "config_invalid", "the configuration is not valid")
                    .why(located.to_string())
                    .hint("see sublet init --print for all that it may hold")
            }
            HostError::NoStateDirectory => {
                Failure::new("config", "no_state_directory", error.to_string())
                    .hint("set HOME, or name the place with --state-dir")
            }
            HostError::Load(e) => Failure::from(e),
            HostError::Profile(e) => Failure::from(e),
            HostError::Owner(e) => Failure::from(e),
        }
    }
}

impl From<&OwnerError> for Failure {
    fn from(error: &OwnerError) -> Self {
        let reason = match error {
            OwnerError::Foreign { .. } => "state_unsafe",
            OwnerError::Unreadable { .. }
            | OwnerError::Become { .. }
            | OwnerError::Regained { .. } => "state_not_entered",
        };
        let text = error.to_string();
        let (message, hint) = text
            .split_once("; ")
            .unwrap_or((&text, "run as root with CAP_SETUID and CAP_SETGID, or as that user"));
        Failure::new("state", reason, message).because_of_source(error).hint(hint)
    }
}

impl From<&LoadError> for Failure {
    fn from(error: &LoadError) -> Self {
        match error {
            LoadError::Unknown { name, known } => {
                Failure::new("profile", "profile_unknown", format!("there is no profile `{name}`"))
                    .hint(format!(
                        "there are: {known}; a file's name holds a `/` or ends in `.toml`"
                    ))
            }
            LoadError::Unreadable { .. } => {
                Failure::new("profile", "profile_unreadable", error.to_string())
                    .because_of_source(error)
                    .hint("correct the path, or see sublet profile list")
            }
            LoadError::Refused { .. } => {
                Failure::new("profile", "profile_refused", error.to_string())
            }
        }
    }
}

impl From<&ProfileError> for Failure {
    fn from(error: &ProfileError) -> Self {
        Failure::new("profile", "profile_invalid", "the profile is not valid")
            .because(error)
            .hint("correct the line; sublet profile show default is a whole one to compare with")
    }
}

impl From<&StoreError> for Failure {
    fn from(error: &StoreError) -> Self {
        let reason = match error {
            StoreError::Shared(cause) => return cause.as_ref().into(),
            StoreError::NotFound { .. } => "state_not_found",
            StoreError::Unsafe { .. } => "state_unsafe",
            StoreError::Corrupt { .. } => "state_corrupt",
            StoreError::Unwritable { .. } => "state_unwritable",
            StoreError::Busy { .. } => "state_busy",
            StoreError::Lost { .. } => "state_lost",
            StoreError::Newer { .. } => "state_newer",
            StoreError::Missing { .. } => "state_missing",
            StoreError::Failed { .. } => "state_failed",
            StoreError::Random { .. } => "no_random_bytes",
        };
        // The store's messages say what to do in the same breath.
        let text = error.to_string();
        let without = match error {
            StoreError::NotFound { .. } => {
                "look at --state-dir and at [state] dir of the configuration: the first run makes it"
            }
            _ => "",
        };
        let (message, hint) = text.split_once("; ").unwrap_or((&text, without));
        Failure::new("state", reason, message).because_of_source(error).hint(hint)
    }
}
