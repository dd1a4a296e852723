//! What the annotations of a container ask for. Parsed once; a key of ours that is not known is an error,
//! for it was meant to bind.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use crate::config::HookConfig;
use crate::model::name::IdentityName;

const PREFIX: &str = "dev.sublet.";
/// Who acts where the annotations do not say.
const AGENT: &str = "container";

/// A run for the container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    pub profile: String,
    pub agent: IdentityName,
    pub principal: IdentityName,
    /// Inside the container.
    pub workspace: PathBuf,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AnnotationError {
    #[error(
        "annotation `{key}` is none of sublet's: profile, agent, principal, workspace, each after `{PREFIX}`"
    )]
    Unknown { key: String },
    #[error("annotation `{PREFIX}{key}` {why}")]
    Wrong { key: &'static str, why: String },
    #[error("annotation `{PREFIX}{key}` is missing, and `{PREFIX}profile` needs it")]
    Missing { key: &'static str },
    #[error("`{asked}` is none of the `{list}` of [hook] that containers may name")]
    NotPermitted { asked: String, list: &'static str },
}

/// None where the container asks for no run.
pub fn parse(
    annotations: &BTreeMap<String, String>,
    cwd: &Path,
    config: &HookConfig,
) -> Result<Option<Wanted>, AnnotationError> {
    for (key, _) in annotations.iter().filter(|(key, _)| key.starts_with(PREFIX)) {
        if !["profile", "agent", "principal", "workspace"].contains(&&key[PREFIX.len()..]) {
            return Err(AnnotationError::Unknown { key: key.chars().take(120).collect() });
        }
    }
    let found = |key: &str| annotations.get(&format!("{PREFIX}{key}"));
    let Some(profile) = found("profile") else {
        let stray = ["agent", "principal", "workspace"].into_iter().any(|key| found(key).is_some());
        return if stray { Err(AnnotationError::Missing { key: "profile" }) } else { Ok(None) };
    };
    let identity = |key: &'static str, text: &str| {
        text.parse::<IdentityName>()
            .map_err(|e| AnnotationError::Wrong { key, why: format!("is wrong: {e}") })
    };
    if profile.is_empty() || profile.len() > 4096 || profile.contains(char::is_control) {
        let why = "names no profile".to_owned();
        return Err(AnnotationError::Wrong { key: "profile", why });
    }
    let principal = found("principal").ok_or(AnnotationError::Missing { key: "principal" })?;
    let wanted = Wanted {
        profile: profile.clone(),
        agent: identity("agent", found("agent").map_or(AGENT, String::as_str))?,
        principal: identity("principal", principal)?,
        workspace: workspace(found("workspace").map(String::as_str), cwd)?,
    };
    let permitted = |list: &Option<Vec<String>>, asked: &str| {
        list.as_ref().is_none_or(|list| list.iter().any(|one| one == asked))
    };
    let refuse =
        |asked: &str, list| Err(AnnotationError::NotPermitted { asked: asked.to_owned(), list });
    if !permitted(&config.profiles, &wanted.profile) {
        return refuse(&wanted.profile, "profiles");
    }
    if !permitted(&config.principals, wanted.principal.as_str()) {
        return refuse(wanted.principal.as_str(), "principals");
    }
    Ok(Some(wanted))
}

fn workspace(named: Option<&str>, cwd: &Path) -> Result<PathBuf, AnnotationError> {
    let path = named.map_or_else(|| cwd.to_owned(), PathBuf::from);
    let plain = |part: Component<'_>| matches!(part, Component::RootDir | Component::Normal(_));
    if path.is_absolute() && path.components().all(plain) && path.as_os_str().len() < 4096 {
        return Ok(path.components().collect());
    }
    let why = "is no absolute path in the container without `..` (and neither is process.cwd)";
    Err(AnnotationError::Wrong { key: "workspace", why: why.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(pairs: &[(&str, &str)]) -> Result<Option<Wanted>, AnnotationError> {
        let all = pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        parse(&all, Path::new("/work"), &HookConfig::default())
    }

    #[test]
    fn a_run_is_wanted_by_its_profile_and_for_somebody() {
        assert_eq!(parsed(&[("org.other", "x")]), Ok(None));
        let both = [("dev.sublet.profile", "p"), ("dev.sublet.principal", "alice")];
        let wanted = parsed(&both).unwrap().unwrap();
        assert_eq!(wanted.agent.as_str(), "container");
        assert_eq!(wanted.workspace, Path::new("/work"));
        for wrong in [
            &[("dev.sublet.profile", "p")][..],
            &[("dev.sublet.principal", "alice")],
            &[("dev.sublet.profil", "p")],
            &[("dev.sublet.profile", ""), both[1]],
            &[both[0], ("dev.sublet.principal", "a b")],
            &[both[0], both[1], ("dev.sublet.workspace", "../x")],
            &[both[0], both[1], ("dev.sublet.workspace", "/a/../../x")],
        ] {
            assert!(parsed(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn the_host_may_say_who_and_what_can_be_named() {
        let all: BTreeMap<_, _> = [("dev.sublet.profile", "p"), ("dev.sublet.principal", "alice")]
            .map(|(k, v)| (k.to_owned(), v.to_owned()))
            .into();
        #[track_caller]
        fn check(all: &BTreeMap<String, String>, profiles: &[&str], principals: &[&str], ok: bool) {
            let list = |names: &[&str]| Some(names.iter().map(|n| (*n).to_owned()).collect());
            let config = HookConfig {
                profiles: list(profiles),
                principals: list(principals),
                ..HookConfig::default()
            };
            assert_eq!(parse(all, Path::new("/"), &config).is_ok(), ok);
        }
        check(&all, &["q", "p"], &["alice"], true);
        check(&all, &["q"], &["alice"], false);
        check(&all, &["p"], &["bob"], false);
        check(&all, &[], &["alice"], false);
    }
}
