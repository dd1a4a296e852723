//! The state that a runtime gives a hook on standard input (runtime-spec, `runtime.md`, State). Bytes in, a
//! typed state out; what a hook cannot do without is never made up.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::path::{Component, PathBuf};

use serde::Deserialize;

use super::Stage;

/// More than any runtime gives: annotations are most of it.
pub const MAX_STATE: usize = 4 << 20;
/// runc takes ids of 1024 bytes.
const MAX_ID: usize = 1024;

/// What is not mentioned here is not needed, and new keys may appear.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Raw {
    oci_version: String,
    id: String,
    status: Option<String>,
    pid: Option<i64>,
    bundle: PathBuf,
    #[serde(default)]
    annotations: Option<BTreeMap<String, String>>,
}

/// A container, as its runtime tells of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct State {
    pub id: String,
    /// None once the container has stopped, and where it is not needed and not known.
    pub pid: Option<i32>,
    pub bundle: PathBuf,
    pub annotations: BTreeMap<String, String>,
}

#[derive(Debug, thiserror::Error)]
pub enum StateError {
    #[error("the state on standard input has more than {MAX_STATE} bytes")]
    TooLarge,
    #[error("the state on standard input is no state of a container")]
    Malformed(#[source] serde_json::Error),
    #[error("the state's `{key}` {why}")]
    Unusable { key: &'static str, why: &'static str },
}

/// # Errors
/// [`StateError`]: nothing is done for a container of which so little is known.
pub fn parse(bytes: &[u8], stage: Stage) -> Result<State, StateError> {
    if bytes.len() > MAX_STATE {
        return Err(StateError::TooLarge);
    }
    let raw: Raw = serde_json::from_slice(bytes).map_err(StateError::Malformed)?;
    let unusable = |key, why| Err(StateError::Unusable { key, why });
    if raw.oci_version.is_empty() || !raw.oci_version.starts_with(|c: char| c.is_ascii_digit()) {
        return unusable("ociVersion", "is no version");
    }
    if raw.id.is_empty() || raw.id.len() > MAX_ID {
        return unusable("id", "is empty or longer than 1024 bytes");
    }
    if raw.id.contains(|c: char| c.is_control() || c == '/') {
        return unusable("id", "holds a control character or a slash");
    }
    if raw.status.is_some_and(|status| status.is_empty() || status.len() > 64) {
        return unusable("status", "is no status");
    }
    let plain = |part: Component<'_>| matches!(part, Component::RootDir | Component::Normal(_));
    if !raw.bundle.is_absolute() || !raw.bundle.components().all(plain) {
        return unusable("bundle", "is no absolute path without `..`");
    }
    let pid = match raw.pid {
        Some(pid @ 1..=0x7fff_ffff) => Some(pid as i32),
        // Its process is gone; some runtimes say 0, some say nothing.
        Some(0) | None if stage == Stage::Poststop => None,
        Some(_) if stage == Stage::Poststop => None,
        // Inside the container's own namespaces crun knows no number for it.
        Some(0) if matches!(stage, Stage::CreateContainer | Stage::StartContainer) => None,
        Some(_) => return unusable("pid", "is no process"),
        None => return unusable("pid", "is missing"),
    };
    Ok(State {
        id: raw.id,
        pid,
        bundle: raw.bundle,
        annotations: raw.annotations.unwrap_or_default(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_hook_cannot_do_without_is_not_made_up() {
        #[track_caller]
        fn check(text: &str, stage: Stage, expected: bool) {
            let parsed = parse(text.as_bytes(), stage);
            assert_eq!(parsed.is_ok(), expected, "{text}: {parsed:?}");
        }
        let whole = |pid: &str| {
            format!(r#"{{"ociVersion":"1.0.2","id":"c","status":"creating"{pid},"bundle":"/b"}}"#)
        };
        check(&whole(r#","pid":7"#), Stage::CreateRuntime, true);
        check(&whole(""), Stage::CreateRuntime, false);
        check(&whole(r#","pid":0"#), Stage::CreateRuntime, false);
        check(&whole(r#","pid":0"#), Stage::CreateContainer, true);
        check(&whole(""), Stage::CreateContainer, false);
        check(&whole(r#","pid":-1"#), Stage::Poststart, false);
        check(&whole(r#","pid":4294967303"#), Stage::CreateRuntime, false);
        check(&whole(""), Stage::Poststop, true);
        check(&whole(r#","pid":0"#), Stage::Poststop, true);
        for (from, to) in [
            (r#""ociVersion":"1.0.2","#, ""),
            (r#""ociVersion":"1.0.2","#, r#""ociVersion":"","#),
            (r#""id":"c","#, ""),
            (r#""id":"c","#, r#""id":"","#),
            (r#""id":"c","#, r#""id":"a/b","#),
            (r#""id":"c","#, r#""id":"a\u0000b","#),
            (r#""id":"c","#, r#""id":"c","id":"d","#),
            (r#","bundle":"/b""#, ""),
            (r#""/b""#, r#""b""#),
            (r#""/b""#, r#""/a/../b""#),
        ] {
            check(&whole(r#","pid":7"#).replace(from, to), Stage::CreateRuntime, false);
        }
        check("", Stage::CreateRuntime, false);
        check("[]", Stage::CreateRuntime, false);
        assert!(parse(b"{\"id\":\"\xff\"}", Stage::CreateRuntime).is_err());
        assert!(matches!(
            parse(&vec![b' '; MAX_STATE + 1], Stage::Poststop),
            Err(StateError::TooLarge)
        ));
    }
}
