//! Where configuration and state are, when nothing says otherwise.
//!
//! Receives flags and the environment; returns paths; touches nothing.
#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::Globals;
use super::fail::Failure;

/// Where the configuration is, and whether someone named it: a named file must exist.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigPath {
    pub path: PathBuf,
    pub named: bool,
}

/// Who asks: the superuser's places are the host's, a user's are in the user's home.
#[derive(Debug, Clone)]
pub struct Who {
    pub is_root: bool,
    pub home: Option<OsString>,
    pub xdg_config: Option<OsString>,
    pub xdg_state: Option<OsString>,
}

impl Who {
    pub fn of_this_process() -> Self {
        Self {
            is_root: rustix::process::geteuid().is_root(),
            home: std::env::var_os("HOME"),
            xdg_config: std::env::var_os("XDG_CONFIG_HOME"),
            xdg_state: std::env::var_os("XDG_STATE_HOME"),
        }
    }

    /// The XDG Base Directory Specification: relative values are to be ignored.
    fn base(&self, xdg: Option<&OsString>, fallback: &str) -> Result<PathBuf, Failure> {
        let absolute = |text: &OsString| Some(PathBuf::from(text)).filter(|p| p.is_absolute());
        xdg.and_then(absolute)
            .or_else(|| self.home.as_ref().and_then(absolute).map(|home| home.join(fallback)))
            .ok_or_else(|| {
                Failure::new("config", "no_home", "cannot tell where this user's files are")
                    .why("HOME is not set to an absolute path")
                    .hint("set HOME, or name the places with --config and --state-dir")
            })
    }
}

/// `--config`, else `SUBLET_CONFIG` (clap reads it), else `/etc/sublet/sublet.toml` for the superuser and
/// `$XDG_CONFIG_HOME/sublet/sublet.toml` for anyone else.
pub fn config(globals: &Globals, who: &Who) -> Result<ConfigPath, Failure> {
    if let Some(path) = &globals.config {
        return Ok(ConfigPath { path: path.clone(), named: true });
    }
    let path = if who.is_root {
        PathBuf::from("/etc/sublet/sublet.toml")
    } else {
        who.base(who.xdg_config.as_ref(), ".config")?.join("sublet/sublet.toml")
    };
    Ok(ConfigPath { path, named: false })
}

/// `--state-dir`, else the configuration's `[state] dir`, else `/var/lib/sublet` for the superuser and
/// `$XDG_STATE_HOME/sublet` for anyone else.
pub fn state_dir(
    globals: &Globals,
    configured: Option<&Path>,
    who: &Who,
) -> Result<PathBuf, Failure> {
    match (&globals.state_dir, configured) {
        (Some(named), _) => Ok(named.clone()),
        (None, Some(configured)) => Ok(configured.to_owned()),
        (None, None) if who.is_root => Ok(PathBuf::from("/var/lib/sublet")),
        (None, None) => Ok(who.base(who.xdg_state.as_ref(), ".local/state")?.join("sublet")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn who(is_root: bool, home: &str, xdg: &str) -> Who {
        let set = |text: &str| Some(text).filter(|t| !t.is_empty()).map(OsString::from);
        Who { is_root, home: set(home), xdg_config: set(xdg), xdg_state: set(xdg) }
    }

    #[track_caller]
    fn check(who: &Who, expected: Option<(&str, &str)>) {
        let globals = Globals::default();
        let found =
            config(&globals, who).and_then(|c| Ok((c.path, state_dir(&globals, None, who)?))).ok();
        assert_eq!(found, expected.map(|(c, s)| (PathBuf::from(c), PathBuf::from(s))));
    }

    #[test]
    fn the_superusers_places_are_the_hosts_and_a_users_are_at_home() {
        check(&who(true, "/root", "/x"), Some(("/etc/sublet/sublet.toml", "/var/lib/sublet")));
        check(
            &who(false, "/home/a", ""),
            Some(("/home/a/.config/sublet/sublet.toml", "/home/a/.local/state/sublet")),
        );
        check(&who(false, "/home/a", "/x"), Some(("/x/sublet/sublet.toml", "/x/sublet")));
        check(
            &who(false, "/home/a", "relative"),
            Some(("/home/a/.config/sublet/sublet.toml", "/home/a/.local/state/sublet")),
        );
        check(&who(false, "", ""), None);
    }

    #[test]
    fn a_flag_goes_before_the_configuration_which_goes_before_the_default() {
        let named = Globals { state_dir: Some("/flag".into()), ..Globals::default() };
        let root = who(true, "", "");
        let configured = Some(Path::new("/configured"));
        assert_eq!(state_dir(&named, configured, &root).unwrap(), Path::new("/flag"));
        let bare = Globals::default();
        assert_eq!(state_dir(&bare, configured, &root).unwrap(), Path::new("/configured"));
    }
}
