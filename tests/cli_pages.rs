//! Completions, manual pages and the starter configuration, as packagers make them.

mod cli_common;

use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use cli_common::{json, stderr, stdout, sublet};

#[test]
fn completions_are_made_for_every_shell_and_bash_takes_them() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let output = sublet().args(["completions", shell]).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{shell}");
        assert!(stdout(&output).contains("workspace"), "{shell}");
    }
    let dir = tempfile::tempdir().unwrap();
    let script = dir.path().join("sublet.bash");
    let output = sublet().args(["completions", "bash"]).output().unwrap();
    std::fs::write(&script, output.stdout).unwrap();
    let probe = "source \"$1\"; COMP_WORDS=(sublet do); COMP_CWORD=1; _sublet sublet do sublet; \
                 echo \"${COMPREPLY[*]}\"";
    let completed =
        Command::new("bash").args(["-c", probe, "probe"]).arg(&script).output().unwrap();
    assert_eq!(stdout(&completed).trim(), "doctor", "{}", stderr(&completed));
}

#[test]
fn every_command_has_a_page_with_examples_and_exit_statuses() {
    let dir = tempfile::tempdir().unwrap();
    let output = sublet().args(["man", "--out"]).arg(dir.path()).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let names: Vec<String> = stdout(&output).lines().map(str::to_owned).collect();
    for name in ["sublet.1", "sublet-run.1", "sublet-doctor.1", "sublet-git-credential.1"] {
        assert!(names.iter().any(|path| path.ends_with(name)), "{names:?}");
    }
    for path in &names {
        let page = std::fs::read_to_string(path).unwrap();
        for section in [".TH", ".SH NAME", ".SH SYNOPSIS", ".SH EXAMPLES", ".SH \"EXIT STATUS\""] {
            assert!(page.contains(section), "{path} lacks {section}");
        }
    }
}

#[test]
fn one_page_is_printed_by_its_command() {
    let output = sublet().args(["man", "run"]).output().unwrap();
    let page = stdout(&output);
    assert!(page.contains("sublet\\-run") && page.contains("\\-\\-lease"), "{page}");
}

#[test]
fn init_writes_once_and_never_overwrites() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("a/b/sublet.toml");
    let init = || sublet().args(["init", "--json", "--config"]).arg(&config).output().unwrap();
    let first = init();
    assert_eq!(first.status.code(), Some(0), "{}", stderr(&first));
    assert_eq!(json(&stdout(&first))["path"], config.to_str().unwrap());
    assert_eq!(config.metadata().unwrap().permissions().mode() & 0o777, 0o600);

    std::fs::write(&config, "mine = true").unwrap();
    let second = init();
    assert_eq!(second.status.code(), Some(2));
    assert_eq!(json(&stderr(&second))["error"]["reason"], "config_exists");
    assert_eq!(std::fs::read_to_string(&config).unwrap(), "mine = true");
}

#[test]
fn init_goes_where_the_environment_says_and_prints_without_writing() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("named.toml");
    let printed =
        sublet().args(["init", "--print"]).env("SUBLET_CONFIG", &config).output().unwrap();
    assert!(stdout(&printed).contains("#[secrets.github-bot]"));
    assert!(!config.exists());
    let written = sublet().arg("init").env("SUBLET_CONFIG", &config).output().unwrap();
    assert_eq!(written.status.code(), Some(0));
    assert_eq!(std::fs::read_to_string(&config).unwrap(), stdout(&printed));
}

#[test]
fn init_says_where_it_could_not_write() {
    let output = sublet().args(["init", "--config", "/proc/nowhere/sublet.toml"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    let text = stderr(&output);
    assert!(
        text.contains("cannot write /proc/nowhere/sublet.toml") && text.contains("try:"),
        "{text}"
    );
}
