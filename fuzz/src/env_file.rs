//! `--env-file`, and what of it may reach an exec.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::sync::OnceLock;

use sublet::model::name::VariableName;
use sublet::policy::environment::{Context, EnvironmentError, Given, Origin, compose, parse_file};
use sublet::profile::{self, Profile};

/// Declares a pinned capability for git, and one for any command that delivers `TOKEN`, `TOKEN_FILE` and
/// `TOKEN_FD`.
const PROFILE: &str = include_str!("good.profile.toml");

pub fn run(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    let parsed = match parse_file("some.env", text) {
        Ok(parsed) => parsed,
        Err(e) => return check_error(&e, text),
    };
    let mut again = String::new();
    for (name, value) in &parsed {
        assert!(!value.contains(['\0', '\n']), "{name}");
        assert!(text.contains(&format!("{name}={value}")), "{name} was not written so");
        again += &format!("{name}={value}\r\n");
    }
    assert!(parsed.len() <= text.lines().count());
    let again = parse_file("some.env", &again).expect("what was read can be written");
    assert_eq!(again, parsed);
    reaches(&parsed);
}

/// An error names the line and perhaps the variable. It shows nothing else of the file: there may be a
/// secret in it.
fn check_error(error: &EnvironmentError, text: &str) {
    let said = error.to_string();
    let place = said.split(": ").next().unwrap_or_default();
    let number: usize = place
        .strip_prefix("some.env:")
        .and_then(|n| n.parse().ok())
        .unwrap_or_else(|| panic!("{said}"));
    let line =
        text.strip_prefix('\u{FEFF}').unwrap_or(text).lines().nth(number - 1).expect("it is there");
    match error {
        EnvironmentError::Assignment { .. } => {
            assert_eq!(said.len(), place.len() + ASSIGNMENT.len(), "{said}");
        }
        EnvironmentError::Nul { name, .. } => {
            assert!(line.trim_start().starts_with(&format!("{name}=")));
            assert_eq!(said.len(), place.len() + NUL.len() + name.as_str().len(), "{said}");
        }
        other => panic!("a file's text cannot be wrong so: {other}"),
    }
}

const ASSIGNMENT: &str =
    ": expected NAME=VALUE, with a name of letters, digits and `_`, first no digit";
const NUL: &str = ": the value of `` holds a NUL, which no environment can carry";

fn profile() -> &'static Profile {
    static PARSED: OnceLock<Profile> = OnceLock::new();
    PARSED.get_or_init(|| {
        profile::resolve("fuzz", PROFILE, &mut profile::load_builtin).expect("it is good")
    })
}

/// An exec without a lease, with one for any command, and with a git lease.
fn reaches(parsed: &[(VariableName, String)]) {
    let profile = profile();
    let plain = compose_all(Context::new(profile, []), parsed);
    for (name, _) in parsed {
        let name = name.as_str();
        if is_reserved(name) || ["TOKEN", "TOKEN_FILE", "TOKEN_FD"].contains(&name) {
            assert!(plain.is_err(), "{name} came from a file");
        }
    }
    if let Ok(variables) = &plain {
        // A later line wins.
        let last: BTreeMap<_, _> = parsed.iter().map(|(name, value)| (name, value)).collect();
        for (name, value) in last {
            assert_eq!(variables[OsStr::new(name.as_str())], OsString::from(value));
        }
        assert_eq!(variables[OsStr::new("HOME")], OsString::from("/tmp/home"));
        assert!(variables.contains_key(OsStr::new("PATH")));
    }
    for capability in &profile.capabilities {
        let channel = capability.channels[0];
        let leased = compose_all(Context::new(profile, [(&**capability, channel)]), parsed);
        let pinned = !capability.is_any_command();
        assert!(leased.is_err() || !pinned || parsed.is_empty(), "a pinned exec took a variable");
        assert!(leased.is_err() || plain.is_ok());
    }
}

fn compose_all(
    context: Context<'_>,
    parsed: &[(VariableName, String)],
) -> Result<BTreeMap<OsString, OsString>, EnvironmentError> {
    let given = parsed.iter().map(|(name, value)| Given {
        name: name.clone(),
        value: value.into(),
        origin: Origin::File,
    });
    compose(&context, given.collect(), |_| None, Path::new("/home/someone"))
}

/// The names of DESIGN that no file may set.
fn is_reserved(name: &str) -> bool {
    let exact = [
        "HOME",
        "PATH",
        "AZURE_CLIENT_ID",
        "AZURE_TENANT_ID",
        "AZURE_AUTHORITY_HOST",
        "AZURE_FEDERATED_TOKEN_FILE",
        "AZURE_FEDERATED_TOKEN",
        "AZURE_CLIENT_SECRET",
        "AZURE_CLIENT_CERTIFICATE_PATH",
        "AWS_ROLE_ARN",
        "AWS_WEB_IDENTITY_TOKEN_FILE",
        "AWS_SECRET_ACCESS_KEY",
        "GOOGLE_APPLICATION_CREDENTIALS",
        "CREDENTIALS_DIRECTORY",
    ];
    exact.contains(&name)
        || ["SUBLET_", "AZURE_KUBERNETES_", "AWS_CONTAINER_", "LD_"]
            .iter()
            .any(|prefix| name.starts_with(prefix))
}
