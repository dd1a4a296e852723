//! `sublet profile` from outside.

mod cli_common;

use cli_common::{json, stderr, stdout, sublet};

#[test]
fn the_built_in_profiles_are_listed_with_what_they_are_for() {
    let output = sublet().args(["profile", "list"]).output().unwrap();
    let text = stdout(&output);
    for name in ["default", "strict", "build", "git-push"] {
        let line = text.lines().find(|line| line.split_whitespace().next() == Some(name));
        assert!(line.is_some_and(|line| line.contains("built in") && line.len() > 30), "{text}");
    }
}

#[test]
fn a_profile_beside_the_configuration_goes_before_the_built_in_one() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("sublet.toml");
    std::fs::write(&config, "").unwrap();
    std::fs::create_dir(dir.path().join("profiles")).unwrap();
    let profile = dir.path().join("profiles/build.toml");
    std::fs::write(&profile, "description = \"ours\"\nextends = \"default\"\n").unwrap();
    let output =
        sublet().args(["profile", "list", "--json", "--config"]).arg(&config).output().unwrap();
    let ours = stdout(&output)
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap())
        .find(|line| line["name"] == "build")
        .unwrap();
    assert_eq!(ours["description"], "ours");
    assert_eq!(ours["path"], profile.to_str().unwrap());
}

#[test]
fn what_is_shown_is_a_whole_and_valid_profile() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("copy.toml");
    for name in ["default", "strict", "build", "git-push"] {
        let shown = sublet().args(["profile", "show", name]).output().unwrap();
        std::fs::write(&file, &shown.stdout).unwrap();
        assert!(!stdout(&shown).contains("extends ="), "{}", stdout(&shown));
        let check = sublet().args(["profile", "check"]).arg(&file).output().unwrap();
        assert_eq!(check.status.code(), Some(0), "{name}: {}", stdout(&check));
        let shown_again = sublet().args(["profile", "show", "--json"]).arg(&file).output().unwrap();
        let first = sublet().args(["profile", "show", "--json", name]).output().unwrap();
        assert_eq!(json(&stdout(&shown_again)), json(&stdout(&first)), "{name}");
    }
}

#[test]
fn one_profile_that_is_not_valid_hides_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let bad = dir.path().join("bad.toml");
    std::fs::write(&bad, "description = \"x\"\nnetwrok = 1\n").unwrap();
    let check = |flags: &[&str]| {
        sublet()
            .args(["profile", "check", "nonesuch"])
            .arg(&bad)
            .arg("default")
            .args(flags)
            .output()
    };
    let output = check(&[]).unwrap();
    assert_eq!(output.status.code(), Some(1));
    let text = stdout(&output);
    assert!(text.contains("bad.toml:2:1"), "{text}");
    assert!(text.contains("netwrok"), "{text}");
    assert!(text.contains("default: valid"), "{text}");
    assert!(text.contains("no profile `nonesuch`"), "{text}");
    let lines: Vec<serde_json::Value> = stdout(&check(&["--json"]).unwrap())
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let valid: Vec<bool> = lines.iter().map(|line| line["valid"].as_bool().unwrap()).collect();
    assert_eq!(valid, [false, false, true]);
}

#[test]
fn a_profile_that_is_not_there_comes_with_those_that_are() {
    let output = sublet().args(["profile", "show", "nonesuch"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("git-push"), "{}", stderr(&output));

    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("sublet.toml");
    std::fs::write(&config, "").unwrap();
    std::fs::create_dir(dir.path().join("profiles")).unwrap();
    std::fs::write(dir.path().join("profiles/weather.toml"), "extends = \"default\"").unwrap();
    let output =
        sublet().args(["profile", "show", "nope", "--config"]).arg(&config).output().unwrap();
    assert!(stderr(&output).contains("strict, weather"), "{}", stderr(&output));
}

#[test]
fn a_sites_default_begins_with_the_built_in_one() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("sublet.toml");
    std::fs::write(&config, "").unwrap();
    std::fs::create_dir(dir.path().join("profiles")).unwrap();
    let ours = "extends = \"default\"\n[limits]\nmemory = \"321M\"\n";
    std::fs::write(dir.path().join("profiles/default.toml"), ours).unwrap();
    // By its name, and below a built-in one that extends it.
    for name in ["default", "git-push"] {
        let output = sublet()
            .args(["profile", "show", name, "--json", "--config"])
            .arg(&config)
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        let shown = json(&stdout(&output));
        assert_eq!(shown["limits"]["memory"], "321M", "{name}: {shown}");
        assert_ne!(shown["filesystem"]["read_only"], serde_json::json!([]), "{name}: {shown}");
    }
}

#[test]
fn a_configuration_that_is_not_valid_is_told_with_its_line() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("sublet.toml");
    std::fs::write(&config, "[ceilings]\nrequests_per_minut = 3\n").unwrap();
    let output =
        sublet().args(["profile", "list", "--json", "--config"]).arg(&config).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    let error = &json(&stderr(&output))["error"];
    assert_eq!(error["reason"], "config_invalid");
    assert!(error["message"].as_str().unwrap().contains("sublet.toml:2:1"), "{error}");
}
