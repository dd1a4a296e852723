//! `sublet doctor` from outside, also where user namespaces are forbidden.

mod cli_common;

use std::process::Command;

use cli_common::{json, stderr, stdout, sublet};

#[test]
fn the_report_has_the_documented_shape() {
    let dir = tempfile::tempdir().unwrap();
    let output = sublet()
        .args(["doctor", "--json", "--state-dir"])
        .arg(dir.path().join("state"))
        .output()
        .unwrap();
    let report = json(&stdout(&output));
    let checks = report["checks"].as_array().unwrap();
    assert!(checks.len() >= 15, "{}", checks.len());
    let mut failed = 0;
    for check in checks {
        let mut fields: Vec<&str> = check.as_object().unwrap().keys().map(String::as_str).collect();
        fields.sort_unstable();
        assert_eq!(fields, ["found", "means", "mend", "name", "status"]);
        assert!(check.as_object().unwrap().values().all(serde_json::Value::is_string));
        match check["status"].as_str().unwrap() {
            "ok" => assert_eq!(check["mend"], ""),
            "warn" => assert_ne!(check["mend"], ""),
            "fail" => failed += 1,
            other => panic!("{other}"),
        }
    }
    assert_eq!(output.status.code(), Some(i32::from(failed > 0)));
}

#[test]
fn the_state_directory_is_judged_where_it_is_named() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let status_at = |mode: u32| {
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(mode)).unwrap();
        let output =
            sublet().args(["doctor", "--json", "--state-dir"]).arg(dir.path()).output().unwrap();
        let report = json(&stdout(&output));
        let checks = report["checks"].as_array().unwrap();
        let check = checks.iter().find(|check| check["name"] == "state_directory").unwrap();
        (check["status"].as_str().unwrap().to_owned(), output.status.code())
    };
    assert_eq!(status_at(0o777), ("fail".into(), Some(1)));
    assert_eq!(status_at(0o700).0, "ok");
}

/// The directories of hooks are the test's own, in a mount namespace.
#[test]
fn the_files_of_docs_oci_are_judged_by_the_program_and_the_broker_that_they_need() {
    let dir = tempfile::tempdir().unwrap();
    let doctor = |files: &str, program: &str| {
        let script = format!(
            "mkdir -p \"$1/hooks.d\"; rm -f \"$1\"/hooks.d/*; cp {files} \"$1/hooks.d/\"
             sed -i 's|/usr/local/bin/sublet|{program}|' \"$1\"/hooks.d/*
             mount -t tmpfs none /etc; mkdir -p /etc/containers/oci/hooks.d
             mount --bind \"$1/hooks.d\" /etc/containers/oci/hooks.d
             exec \"$0\" doctor --json --state-dir \"$1/state\""
        );
        let output = Command::new("unshare")
            .args(["--user", "--map-root-user", "--mount", "--propagation", "private", "sh", "-ec"])
            .arg(script)
            .arg(env!("CARGO_BIN_EXE_sublet"))
            .arg(dir.path())
            .output()
            .unwrap();
        let report = json(&stdout(&output));
        let checks = report["checks"].as_array().unwrap().clone();
        move |name: &str| {
            let found = checks.iter().find(|check| check["name"] == name);
            found.map(|check| (check["status"].clone(), check["found"].clone()))
        }
    };
    let documents = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/oci/sublet-");
    // Owned by root, as every program that this user namespace maps.
    let all = doctor(&format!("{documents}*.json"), "/bin/true");
    assert_eq!(all("hook_files").unwrap().0, "ok", "{:?}", all("hook_files"));
    assert_eq!(all("hook_binary").unwrap().0, "warn");
    let (status, found) = all("hook_broker").unwrap();
    assert!(status == "fail" && found.as_str().unwrap().contains("control.sock"), "{found}");
    let some =
        doctor(&format!("{documents}createRuntime.json {documents}poststop.json"), "/bin/true");
    let (status, found) = some("hook_files").unwrap();
    assert!(status == "fail" && found.as_str().unwrap().contains("createContainer"), "{found}");
    let gone = doctor(&format!("{documents}*.json"), "/nonexistent/sublet");
    let (status, found) = gone("hook_files").unwrap();
    assert!(status == "fail" && found.as_str().unwrap().contains("/nonexistent/sublet"), "{found}");
}

/// In a user namespace of its own the limit of namespaces is the test's to set: this host's stays.
#[test]
fn forbidden_user_namespaces_are_a_failure_that_names_the_switch() {
    let inside = |before: &str| {
        Command::new("unshare")
            .args(["--user", "--map-root-user", "--mount", "--propagation", "private", "sh", "-c"])
            .arg(format!("{before}exec \"$0\" doctor"))
            .arg(env!("CARGO_BIN_EXE_sublet"))
            .output()
            .unwrap()
    };
    let control = inside("");
    if !stdout(&control).contains("user_namespaces") {
        eprintln!("not tried: this machine permits no user namespaces: {}", stderr(&control));
        return;
    }
    let line = |text: &str| {
        text.lines().find(|line| line.contains("  user_namespaces  ")).unwrap().to_owned()
    };
    assert!(line(&stdout(&control)).starts_with("ok "), "{}", stdout(&control));

    let refused = inside("echo 0 > /proc/sys/user/max_user_namespaces && ");
    let text = stdout(&refused);
    assert!(line(&text).starts_with("fail"), "{text}");
    assert!(line(&text).contains("user.max_user_namespaces = 0"), "{text}");
    assert!(text.contains("mend:  sysctl -w user.max_user_namespaces="), "{text}");
    assert_eq!(refused.status.code(), Some(1));
}

/// A /proc with a covered part, as container runtimes make it, cannot be mounted afresh by a user
/// namespace.
#[test]
fn a_covered_proc_is_told_with_what_covers_it() {
    let inside = |before: &str| {
        Command::new("unshare")
            .args([
                "--user",
                "--map-root-user",
                "--mount",
                "--pid",
                "--fork",
                "--mount-proc",
                "sh",
                "-c",
            ])
            .arg(format!("{before}exec \"$0\" doctor"))
            .arg(env!("CARGO_BIN_EXE_sublet"))
            .output()
            .unwrap()
    };
    let line =
        |text: &str| text.lines().find(|line| line.contains("  own_proc  ")).map(str::to_owned);
    let control = inside("");
    let Some(fine) = line(&stdout(&control)) else {
        eprintln!("not tried: this machine permits no user namespaces: {}", stderr(&control));
        return;
    };
    assert!(fine.starts_with("ok ") && fine.contains("mountable"), "{fine}");
    let covered = line(&stdout(&inside("mount --bind /dev/null /proc/version && "))).unwrap();
    assert!(!covered.starts_with("ok ") && covered.contains("/proc/version"), "{covered}");
}
