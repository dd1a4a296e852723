//! A command's environment: who may set which variable, and how the parts make a whole.
//!
//! It starts empty. The profile sets and passes, then flags and files add, then deliveries come on top
//! (elsewhere). Receives names, values and the leases of the exec; returns the variables, or an error
//! that names the variable and never shows a value. Reads no environment: the invoker's is handed in.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::path::Path;

use crate::model::name::{CapabilityName, Channel, VariableName};
use crate::policy::decide::Grant;
use crate::profile::names::{self, NameClass};
use crate::profile::{Capability, Profile};

/// Where a variable comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// `environment.set` of the profile.
    Profile,
    /// `environment.pass` of the profile: the name is the profile's, the value the invoker's.
    ProfilePass,
    /// `--env`.
    Flag,
    /// `--env-file`.
    File,
    /// `--pass-env`.
    Passed,
    /// A request to the broker.
    Request,
}

impl Origin {
    fn is_profile(self) -> bool {
        match self {
            Origin::Profile | Origin::ProfilePass => true,
            Origin::Flag | Origin::File | Origin::Passed | Origin::Request => false,
        }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Origin::Profile => "the profile's `environment.set`",
            Origin::ProfilePass => "the profile's `environment.pass`",
            Origin::Flag => "--env",
            Origin::Request => "the request's `environment`",
            Origin::File => "--env-file",
            Origin::Passed => "--pass-env",
        })
    }
}

/// What an exec's leases mean for its environment.
#[derive(Debug, Clone)]
pub struct Context<'a> {
    profile: &'a Profile,
    /// A lease of the exec is held to command patterns.
    pinned: Option<&'a CapabilityName>,
    /// A lease of the exec goes to git.
    git: Option<&'a CapabilityName>,
}

impl<'a> Context<'a> {
    /// For an exec that carries leases of these capabilities by these channels; none is fine.
    pub fn new(
        profile: &'a Profile,
        leased: impl IntoIterator<Item = (&'a Capability, Channel)>,
    ) -> Self {
        let mut context = Self { profile, pinned: None, git: None };
        for (capability, channel) in leased {
            if !capability.is_any_command() {
                context.pinned = context.pinned.or(Some(&capability.name));
            }
            if channel == Channel::Git {
                context.git = context.git.or(Some(&capability.name));
            }
        }
        context
    }

    pub fn for_grants(profile: &'a Profile, grants: &'a [Grant]) -> Self {
        Self::new(profile, grants.iter().map(|g| (g.capability(), g.channel())))
    }
}

/// A variable may not be set so.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EnvironmentError {
    /// [`names::why`] says the rest.
    #[error("{origin} cannot set `{name}`, which {why}")]
    Class { name: VariableName, origin: Origin, why: &'static str },
    #[error(
        "{origin} cannot set `{name}`, which is reserved: capability `{capability}` of profile `{profile}` \
         delivers it"
    )]
    Delivered { name: VariableName, origin: Origin, capability: CapabilityName, profile: String },
    #[error(
        "{origin} cannot set `{name}`: capability `{capability}` is pinned to commands, so the exec takes \
         its environment from profile `{profile}` and the deliveries alone; add the variable to the \
         profile's [environment], or leave it out"
    )]
    Pinned { name: VariableName, origin: Origin, capability: CapabilityName, profile: String },
    #[error("{place}: expected NAME=VALUE, with a name of letters, digits and `_`, first no digit")]
    Assignment { place: AssignmentPlace },
    #[error("{place}: the value of `{name}` holds a NUL, which no environment can carry")]
    Nul { place: AssignmentPlace, name: VariableName },
}

/// Where an assignment stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AssignmentPlace {
    /// `--env`, counted from 1.
    Flag(usize),
    /// A file, and its line counted from 1.
    Line(String, usize),
}

impl fmt::Display for AssignmentPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            AssignmentPlace::Flag(n) => write!(f, "--env number {n}"),
            AssignmentPlace::Line(file, line) => write!(f, "{file}:{line}"),
        }
    }
}

/// Whether `origin` may set `name` in any exec, or in one that goes to git.
///
/// # Errors
/// If the name is reserved, refused, the loader's or the profile's.
pub fn check_class(
    name: &VariableName,
    origin: Origin,
    goes_to_git: bool,
) -> Result<(), EnvironmentError> {
    let class = names::class(name.as_str());
    let refused = match class {
        NameClass::Free => false,
        NameClass::Git => goes_to_git,
        NameClass::Loader => origin != Origin::Profile,
        NameClass::Reserved
        | NameClass::Refused
        | NameClass::OnlyByLease
        | NameClass::OfProfile => true,
    };
    match names::why(class).filter(|_| refused) {
        Some(why) => Err(EnvironmentError::Class { name: name.clone(), origin, why }),
        None => Ok(()),
    }
}

/// Whether `origin` may set `name` in this exec.
///
/// # Errors
/// If the name is reserved, refused, the loader's or the profile's; if a declared capability delivers
/// it; if it would redirect a git lease; if the exec is pinned and `origin` is not the profile.
pub fn check_name(
    name: &VariableName,
    origin: Origin,
    context: &Context<'_>,
) -> Result<(), EnvironmentError> {
    check_class(name, origin, context.git.is_some())?;
    let profile = context.profile;
    if let Some(by) =
        profile.capabilities.iter().find(|c| c.delivered_variables().any(|v| v == *name))
    {
        return Err(EnvironmentError::Delivered {
            name: name.clone(),
            origin,
            capability: by.name.clone(),
            profile: profile.name.clone(),
        });
    }
    match context.pinned {
        Some(capability) if !origin.is_profile() => Err(EnvironmentError::Pinned {
            name: name.clone(),
            origin,
            capability: capability.clone(),
            profile: profile.name.clone(),
        }),
        Some(_) | None => Ok(()),
    }
}

/// One variable that the invoker gives. No `Debug`: the value may be a secret.
pub struct Given {
    pub name: VariableName,
    pub value: OsString,
    pub origin: Origin,
}

/// The whole environment but for the deliveries. Later wins: `environment.set`, `environment.pass` (as
/// far as `invoker` has it), then `given` in its order; `HOME` and `PATH` from the profile, `~` in them
/// being `home`.
///
/// # Errors
/// The first name that [`check_name`] refuses, the profile's own included.
pub fn compose(
    context: &Context<'_>,
    given: Vec<Given>,
    invoker: impl Fn(&VariableName) -> Option<OsString>,
    home: &Path,
) -> Result<BTreeMap<OsString, OsString>, EnvironmentError> {
    let profile = context.profile;
    let key = |name: &VariableName| OsString::from(name.as_str());
    let mut variables = BTreeMap::new();
    for (name, value) in &profile.environment.set {
        check_name(name, Origin::Profile, context)?;
        variables.insert(key(name), OsString::from(value));
    }
    for name in &profile.environment.pass {
        check_name(name, Origin::ProfilePass, context)?;
        if let Some(value) = invoker(name) {
            variables.insert(key(name), value);
        }
    }
    for Given { name, value, origin } in given {
        check_name(&name, origin, context)?;
        variables.insert(key(&name), value);
    }
    let mut path = OsString::new();
    for directory in &profile.environment.path {
        if !path.is_empty() {
            path.push(":");
        }
        path.push(directory.resolve(home));
    }
    variables.insert("PATH".into(), path);
    variables.insert("HOME".into(), profile.filesystem.home.resolve(home).into_os_string());
    Ok(variables)
}

/// `--env K=V`. `place` says which, for the error, which shows nothing of the text.
pub fn parse_assignment(
    text: &str,
    place: impl Fn() -> AssignmentPlace,
) -> Result<(VariableName, String), EnvironmentError> {
    let (name, value) = text
        .split_once('=')
        .and_then(|(name, value)| Some((name.parse::<VariableName>().ok()?, value)))
        .ok_or_else(|| EnvironmentError::Assignment { place: place() })?;
    if value.contains('\0') {
        return Err(EnvironmentError::Nul { place: place(), name });
    }
    Ok((name, value.to_owned()))
}

/// `--env-file F`, as docker reads it: `KEY=VALUE` lines, the value taken as it stands (quotes are part of
/// it); empty lines and lines that begin with `#` are skipped; a later line wins. A carriage return at a
/// line's end is dropped. Docker's bare `KEY`, which passes the invoker's value, is refused: that is
/// `--pass-env`.
pub fn parse_file(file: &str, text: &str) -> Result<Vec<(VariableName, String)>, EnvironmentError> {
    text.strip_prefix('\u{FEFF}')
        .unwrap_or(text)
        .lines()
        .zip(1..)
        .map(|(line, number)| (line.trim_start(), number))
        .filter(|(line, _)| !line.is_empty() && !line.starts_with('#'))
        .map(|(line, number)| {
            parse_assignment(line, || AssignmentPlace::Line(file.to_owned(), number))
        })
        .collect()
}
