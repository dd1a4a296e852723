//! What a container runtime gives a hook: the first line chooses the stage, the next part is a state, the one
//! behind `%%` a `config.json`.
#![forbid(unsafe_code)]

use std::path::{Component, Path};

use sublet::config::HookConfig;
use sublet::hook::{Stage, annotations, bundle, state};
use sublet::host::container;
use sublet::model::id::RunId;

const STAGES: [Stage; 5] = [
    Stage::CreateRuntime,
    Stage::CreateContainer,
    Stage::StartContainer,
    Stage::Poststart,
    Stage::Poststop,
];

pub fn run(input: &[u8]) {
    let (first, rest) = input.split_at(input.len().min(1));
    let stage = STAGES[usize::from(first.first().copied().unwrap_or(0)) % STAGES.len()];
    let cut = rest.windows(4).position(|bytes| bytes == b"\n%%\n");
    let (told, config) = match cut {
        Some(at) => (&rest[..at], &rest[at + 4..]),
        None => (rest, &[][..]),
    };
    // Any bytes may be a configuration; what is one is whole.
    if bundle::is_one(config) {
        let value: serde_json::Value = serde_json::from_slice(config).unwrap();
        assert!(value["process"].is_object() && value["root"]["path"].is_string());
    }
    let Ok(state) = state::parse(told, stage) else { return };
    assert_eq!(state, state::parse(told, stage).unwrap(), "it means one thing");
    assert!(!state.id.is_empty() && !state.id.contains('/') && state.id.len() <= 1024);
    let is_needed = matches!(stage, Stage::CreateRuntime | Stage::Poststart);
    assert!(!is_needed || state.pid.is_some());
    assert!(state.pid.is_none_or(|pid| pid > 0));
    plain(&state.bundle);
    // Whatever a container is called, its run can be.
    let run = format!("{}0123abcd", container::prefix(&state.id, &[0x5a; 32]));
    let run: RunId = run.parse().unwrap();
    assert!(container::is_of_a_container(&run));
    let wanted = annotations::parse(&state.annotations, Path::new("/w"), &HookConfig::default());
    if let Ok(Some(wanted)) = wanted {
        plain(&wanted.workspace);
        assert!(!wanted.profile.is_empty());
        let none = HookConfig { profiles: Some(vec![]), ..HookConfig::default() };
        assert!(annotations::parse(&state.annotations, Path::new("/w"), &none).is_err());
    }
}

fn plain(path: &Path) {
    let fine = |part: Component<'_>| matches!(part, Component::RootDir | Component::Normal(_));
    assert!(path.is_absolute() && path.components().all(fine), "{path:?}");
}
