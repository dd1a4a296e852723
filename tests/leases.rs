//! Leases in one shot: what is asked, what is granted or denied and why, what arrives, what is counted
//! and what the trail says. Every deny test has its allow twin.
#![forbid(unsafe_code)]

mod support;

use std::fs;
use std::process::Command;

use serde_json::Value;
use support::world::{finish, leasing_profile, vault_secret};
use support::{Outcome, World, host};

const VALUE: &[u8] = b"correct-horse-battery-staple-4711";

fn value() -> &'static str {
    std::str::from_utf8(VALUE).unwrap()
}

/// Prints what `channel` delivered, exactly.
fn read_back(channel: &str) -> &'static str {
    match channel {
        "env" => "printf %s \"$TOKEN\"",
        "file" => "cat \"$TOKEN_FILE\"",
        "memfd" => "cat /proc/self/fd/$TOKEN_FD",
        other => panic!("no such channel: {other}"),
    }
}

const SHOWN: &str = "redact = false";

#[test]
fn each_channel_delivers_the_value_exactly() {
    for world in World::each() {
        let profile = world.leasing_with(VALUE, "default", SHOWN);
        for channel in ["env", "file", "memfd"] {
            world.leased_sh(&profile, &[channel], read_back(channel)).ok().prints(value());
        }
        world.holds_nowhere(VALUE);
    }
}

#[test]
fn an_unnamed_channel_is_the_capabilitys_first() {
    let world = World::host();
    let profile = world.leasing_with(VALUE, "default", SHOWN);
    world
        .run(&[
            "--profile",
            &profile,
            "--lease",
            "test.use@svc.test",
            "--",
            "sh",
            "-c",
            read_back("memfd"),
        ])
        .ok()
        .prints(value());
}

#[test]
fn only_the_leased_channel_carries_it() {
    for world in World::each() {
        let profile = world.leasing_with(VALUE, "default", SHOWN);
        let look = "env | grep -c correct-horse; ls /run/sublet/secrets 2>/dev/null | wc -l; ls -l /proc/self/fd | grep -c memfd";
        world.leased_sh(&profile, &["env"], look).prints("1\n0\n0\n");
        world.leased_sh(&profile, &["file"], look).prints("0\n1\n0\n");
        world.leased_sh(&profile, &["memfd"], look).prints("0\n0\n1\n");
        world.sh(&profile, look).prints("0\n0\n0\n");
    }
}

#[test]
fn several_channels_in_one_exec() {
    for world in World::each() {
        world.configure(
            &["a", "b", "c"].map(|n| vault_secret(n, &format!("use.{n}@svc.test"))).concat(),
        );
        let mut toml = "extends = \"default\"\n".to_owned();
        for (name, channel) in [("a", "env"), ("b", "file"), ("c", "memfd")] {
            world.set_secret(name, format!("value-of-secret-{name}").as_bytes());
            toml.push_str(&format!(
                "[[capability]]\nname = \"use.{name}\"\nchannels = [\"{channel}\"]\ncommand = [[\"**\"]]\nredact = false\n\
                 [[capability.audience]]\nhost = \"svc.test\"\nsecret = \"{name}\"\nvariable = \"{}\"\n",
                name.to_uppercase()
            ));
        }
        let profile = world.profile("three", &toml);
        let outcome = world
            .run(&[
                "--profile",
                &profile,
                "--lease",
                "use.a@svc.test",
                "--lease",
                "use.b@svc.test",
                "--lease",
                "use.c@svc.test",
                "--",
                "sh",
                "-c",
                "echo $A $(cat $B_FILE) $(cat /proc/self/fd/$C_FD)",
            ])
            .ok()
            .prints("value-of-secret-a value-of-secret-b value-of-secret-c\n");
        assert_eq!(outcome.report()["leases"].as_array().unwrap().len(), 3);
        assert_eq!(outcome.report()["scrubbed"].as_array().unwrap().len(), 3);
        // All or nothing: one more that is denied, and none is granted, nothing runs.
        let before = world.trail().len();
        world
            .run(&[
                "--profile",
                &profile,
                "--lease",
                "use.a@svc.test",
                "--lease",
                "use.b@elsewhere.test",
                "--",
                "touch",
                "ran",
            ])
            .denied("audience_not_permitted");
        assert!(!world.workspace.join("ran").exists());
        let after: Vec<Value> = world.trail().split_off(before);
        let types: Vec<&str> = after.iter().map(|e| e["type"].as_str().unwrap()).collect();
        assert!(!types.contains(&"lease.consumed"), "{types:?}");
        assert!(types.contains(&"lease.denied"), "{types:?}");
    }
}

#[test]
fn a_delivered_file_is_the_commands_alone_and_nobodys_to_change() {
    for world in World::each() {
        let profile = world.leasing_with(VALUE, "default", SHOWN);
        let script = "stat -c '%a %u' $TOKEN_FILE; echo $CREDENTIALS_DIRECTORY; \
             (echo x >$TOKEN_FILE) 2>/dev/null && echo wrote; rm -f $TOKEN_FILE 2>/dev/null && echo removed; \
             touch $CREDENTIALS_DIRECTORY/x 2>/dev/null && echo added; \
             cp /bin/true $CREDENTIALS_DIRECTORY/t 2>/dev/null && echo copied; \
             chmod 644 $TOKEN_FILE 2>/dev/null && echo loosened; exit 0";
        let outcome = world.leased_sh(&profile, &["file"], script).ok();
        let uid = world.sh(&profile, "id -u").ok().line();
        outcome.prints(&format!("400 {uid}\n/run/sublet/secrets\n"));
    }
}

#[test]
fn a_delivered_memfd_can_only_be_read() {
    for world in World::each() {
        let world = world.with_probe();
        let profile = world.leasing_with(VALUE, "default", SHOWN);
        let outcome = world.leased_sh(
            &profile,
            &["memfd"],
            "./probe memfd-rights $TOKEN_FD; cat /proc/self/fd/$TOKEN_FD",
        );
        let answers = support::probe::answers(&outcome);
        // Its mode is sealed since Linux 6.3 (`MFD_NOEXEC_SEAL`); before that its owner may change it.
        let mode_is_sealed = sublet::sys::probe::noexec_memfd().is_ok();
        let rights = ["write", "mmap_write", "truncate", "reopen_write", "exec"];
        for right in rights.into_iter().chain(mode_is_sealed.then_some("chmod")) {
            assert_ne!(answers[right], "allowed", "{right}\n{outcome}");
        }
        let seals = u32::from_str_radix(&answers["seals"], 16).unwrap();
        // SEAL 1, SHRINK 2, GROW 4, FUTURE_WRITE 10 (hex): fcntl(2).
        assert_eq!(seals & 0x17, 0x17, "{outcome}");
        // WRITE would forbid the wipe.
        assert_eq!(seals & 0x8, 0, "{outcome}");
        assert!(outcome.out().ends_with(value()), "{outcome}");
    }
}

#[test]
fn values_of_every_size_and_shape_arrive_exactly() {
    let megabyte: Vec<u8> =
        (0..1u32 << 20).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let shapes: [(&str, &[u8]); 6] = [
        ("one byte", b"x"),
        ("only a newline", b"\n"),
        ("newlines at the end", b"line\nline\n\n"),
        ("NULs", b"\0a\0b\0"),
        ("not UTF-8", b"\xff\xfe\x80"),
        ("one MiB", &megabyte),
    ];
    let world = World::host();
    for (what, bytes) in shapes {
        let profile = world.leasing_with(bytes, "default", SHOWN);
        for channel in ["file", "memfd"] {
            let outcome = world.leased_sh(&profile, &[channel], read_back(channel)).ok();
            assert!(
                outcome.stdout == bytes,
                "{what} by {channel}: {} bytes came, {} were set",
                outcome.stdout.len(),
                bytes.len()
            );
        }
    }
}

#[test]
fn env_carries_what_an_environment_can() {
    let world = World::host();
    // 131,072 bytes hold name, `=`, value and the closing NUL: execve(2), MAX_ARG_STRLEN.
    let largest = "v".repeat(131_071 - "TOKEN=".len());
    let profile = world.leasing_with(largest.as_bytes(), "default", SHOWN);
    world
        .leased_sh(&profile, &["env"], "printf %s \"$TOKEN\" | wc -c")
        .ok()
        .prints(&format!("{}\n", largest.len()));
    for (what, bytes) in [("NUL", b"a\0b".to_vec()), ("too large", vec![b'v'; 140_000])] {
        let profile = world.leasing_with(&bytes, "default", SHOWN);
        let outcome =
            world.leased_sh(&profile, &["env"], "touch ran").denied("delivery_unavailable");
        assert!(!world.workspace.join("ran").exists(), "{what}\n{outcome}");
        // The twin: a file carries the same.
        world
            .leased_sh(&profile, &["file"], "cat $TOKEN_FILE | wc -c")
            .ok()
            .prints(&format!("{}\n", bytes.len()));
    }
}

#[test]
fn an_empty_value_is_refused_when_set_or_delivered_empty() {
    let world = World::host();
    world.configure(&vault_secret("s", "test.use@svc.test"));
    let outcome = world.call_with(&["secret", "set", "s"], b"");
    if outcome.status == Some(0) {
        let profile = world.profile("leasing", &leasing_profile("default", SHOWN));
        for channel in ["env", "file", "memfd"] {
            world.leased_sh(&profile, &[channel], read_back(channel)).ok().prints("");
        }
    } else {
        assert!(outcome.exits(2).err().contains("empty"));
    }
}

// ---- denials ---------------------------------------------------------------------------------------

/// One denial and its twin: the same world, once with what is missing and once without.
struct Case<'a> {
    reason: &'a str,
    config: &'a str,
    profile: String,
    lease: &'a str,
    command: &'a [&'a str],
    granted: bool,
}

#[track_caller]
fn check(world: &World, case: &Case) -> Outcome {
    world.configure(case.config);
    let profile = world.profile("case", &case.profile);
    let marker = world.workspace.join("ran");
    let _ = fs::remove_file(&marker);
    let mut args = vec!["--profile", &profile, "--lease", case.lease, "--"];
    args.extend(case.command);
    let outcome = world.run(&args);
    if case.granted {
        let outcome = outcome.ok();
        assert!(marker.exists(), "the twin of {} did not run\n{outcome}", case.reason);
        outcome
    } else {
        assert!(!marker.exists(), "denied and yet it ran\n{outcome}");
        let outcome = outcome.denied(case.reason);
        assert!(
            outcome.err().contains(case.lease.split(',').next().unwrap()),
            "what was asked?\n{outcome}"
        );
        outcome
    }
}

const RUN_IT: &[&str] = &["touch", "ran"];

fn usual() -> String {
    leasing_profile("default", "")
}

#[test]
fn denied_for_what_is_asked() {
    for world in World::each() {
        let config = vault_secret("s", "test.use@svc.test");
        world.configure(&config);
        world.set_secret("s", VALUE);
        let case = |reason, lease, granted| Case {
            reason,
            config: &config,
            profile: usual(),
            lease,
            command: RUN_IT,
            granted,
        };
        check(&world, &case("", "test.use@svc.test", true));
        check(&world, &case("capability_not_declared", "test.other@svc.test", false));
        check(&world, &case("audience_not_permitted", "test.use@other.test", false));
        check(&world, &case("audience_not_permitted", "test.use@svc.test:8443", false));
        check(&world, &case("channel_mismatch", "test.use@svc.test,channel=git", false));
        check(&world, &case("", "test.use@svc.test,channel=env", true));
        check(&world, &case("ttl_exceeds_policy", "test.use@svc.test,ttl=11m", false));
        check(&world, &case("", "test.use@svc.test,ttl=10m", true));
        check(&world, &case("uses_exceed_channel", "test.use@svc.test,uses=6", false));
        check(&world, &case("", "test.use@svc.test,uses=5", true));
        check(
            &world,
            &case("identity_not_configured", "test.use@svc.test,channel=token", false)
                .or_mismatch(),
        );
    }
}

impl Case<'_> {
    /// A channel that the capability does not list is a mismatch before anything else is looked at.
    fn or_mismatch(mut self) -> Self {
        self.reason = "channel_mismatch";
        self
    }
}

#[test]
fn denied_for_a_token_without_an_identity() {
    let world = World::host();
    let config = vault_secret("s", "test.use@svc.test");
    world.configure(&config);
    world.set_secret("s", VALUE);
    let profile = usual().replace(r#"["memfd", "file", "env"]"#, r#"["token", "env"]"#);
    let case = |lease, granted| Case {
        reason: "identity_not_configured",
        config: &config,
        profile: profile.clone(),
        lease,
        command: RUN_IT,
        granted,
    };
    check(&world, &case("test.use@svc.test,channel=token", false));
    check(&world, &case("test.use@svc.test,channel=env", true));
}

#[test]
fn denied_for_the_secrets_allow_list() {
    for world in World::each() {
        let allowed = vault_secret("s", "test.use@svc.test");
        world.configure(&allowed);
        world.set_secret("s", VALUE);
        for (config, granted) in [
            (allowed.clone(), true),
            (vault_secret("s", "test.*@*.test"), true),
            (vault_secret("s", "other.use@svc.test"), false),
            (vault_secret("s", "test.use@other.test"), false),
        ] {
            let case = Case {
                reason: "secret_not_allowed",
                config: &config,
                profile: usual(),
                lease: "test.use@svc.test",
                command: RUN_IT,
                granted,
            };
            check(&world, &case);
        }
    }
}

#[test]
fn denied_for_a_permission() {
    let world = World::host();
    let base = vault_secret("s", "test.use@svc.test");
    world.configure(&base);
    world.set_secret("s", VALUE);
    let profile = leasing_profile("default", "permission = \"test:write\"");
    for (principals, granted) in [
        ("", false),
        ("[principals.root]\npermissions = [\"test:read\"]\n", false),
        ("[principals.alice]\npermissions = [\"test:write\"]\n", false),
        ("[principals.root]\npermissions = [\"test:write\"]\n", true),
    ] {
        let case = Case {
            reason: "permission_missing",
            config: &format!("{base}{principals}"),
            profile: profile.clone(),
            lease: "test.use@svc.test",
            command: RUN_IT,
            granted,
        };
        let outcome = check(&world, &case);
        if !granted {
            assert!(outcome.err().contains("test:write"), "the hint names what to add\n{outcome}");
        }
    }
}

#[test]
fn sudo_user_counts_only_for_root() {
    let config = format!(
        "{}[principals.root]\npermissions = [\"test:write\"]\n",
        vault_secret("s", "test.use@svc.test")
    );
    let world = World::host();
    world.configure(&config);
    world.set_secret("s", VALUE);
    let profile = world.profile("p", &leasing_profile("default", "permission = \"test:write\""));
    let args = ["--profile", &profile, "--lease", "test.use@svc.test", "--", "true"];
    // Root under sudo is the one who called sudo, who holds nothing here.
    let mut as_sudo = world.prepare(&args).0;
    as_sudo.env("SUDO_USER", "nobody");
    finish(as_sudo, b"", None).denied("permission_missing");
    world.run(&args).ok();
    // An ordinary user who sets SUDO_USER is still themselves.
    let world = World::developer();
    world.configure(&config);
    world.set_secret("s", VALUE);
    let profile = world.profile("p", &leasing_profile("default", "permission = \"test:write\""));
    let args = ["--profile", &profile, "--lease", "test.use@svc.test", "--", "true"];
    let mut as_sudo = world.prepare(&args).0;
    as_sudo.env("SUDO_USER", "root");
    finish(as_sudo, b"", None).denied("permission_missing");
}

#[test]
fn denied_for_the_command() {
    for world in World::each() {
        let config = vault_secret("s", "test.use@svc.test");
        world.configure(&config);
        world.set_secret("s", VALUE);
        world.file("touch", "#!/bin/sh\n: >ran\n", 0o755);
        let pinned =
            usual().replace(r#"[["**"]]"#, r#"[["touch", "ran"], ["sh", "-c", "*", "**"]]"#);
        let own = world.workspace.join("touch");
        let commands: [(&[&str], bool); 8] = [
            (&["touch", "ran"], true),
            (&["touch", "ran", "more"], false),
            (&["touch", "other"], false),
            (&["touch"], false),
            (&["sh", "-c", "touch ran", "x", "y"], true),
            (&["sh", "-e", "-c", "touch ran"], false),
            // The same name at a place that the exec can write is another program.
            (&["./touch", "ran"], false),
            (&[own.to_str().unwrap(), "ran"], false),
        ];
        for (command, granted) in commands {
            let case = Case {
                reason: "command_not_permitted",
                config: &config,
                profile: pinned.clone(),
                lease: "test.use@svc.test",
                command,
                granted,
            };
            check(&world, &case);
        }
    }
}

#[test]
fn a_pinned_command_takes_its_environment_only_from_profile_and_delivery() {
    let world = World::host();
    world.leasing(VALUE);
    let pinned = world.profile(
        "pinned",
        &leasing_profile("default", "").replace(r#"[["**"]]"#, r#"[["sh", "-c", "**"]]"#),
    );
    let leased = ["--profile", &pinned, "--lease", "test.use@svc.test"];
    let with = |more: &[&str]| {
        let mut args = leased.to_vec();
        args.extend(more);
        args.extend(["--", "sh", "-c", "true"]);
        world.run(&args)
    };
    with(&["--env", "BASH_ENV=/tmp/evil"]).exits(125);
    with(&[]).ok();
}

#[test]
fn denied_for_a_source_that_gives_nothing() {
    let world = World::host();
    let config = vault_secret("s", "test.use@svc.test");
    let case = |granted| Case {
        reason: "source_unavailable",
        config: &config,
        profile: usual(),
        lease: "test.use@svc.test",
        command: RUN_IT,
        granted,
    };
    check(&world, &case(false));
    world.set_secret("s", VALUE);
    check(&world, &case(true));
    world.call(&["secret", "rm", "s"]).ok();
    check(&world, &case(false));
}

#[test]
fn file_and_command_sources() {
    for world in World::each() {
        let key = world.path("etc/key");
        fs::write(&key, "from-a-file-source\n").unwrap();
        let tool = world.path("etc/mint");
        fs::write(&tool, "#!/bin/sh\necho '{\"value\":\"from-a-command-source\"}'\n").unwrap();
        for (path, mode) in [(&key, 0o600), (&tool, 0o755)] {
            use std::os::unix::fs::PermissionsExt;
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
            std::os::unix::fs::chown(path, Some(world.invoker), Some(world.invoker)).unwrap();
        }
        let pair = "allow = [\"test.use@svc.test\"]";
        let profile = world.profile("p", &leasing_profile("default", SHOWN));
        let sources = [
            (format!("source = \"file\"\npath = {key:?}"), "from-a-file-source\n"),
            (format!("source = \"command\"\ncommand = [{tool:?}]"), "from-a-command-source"),
        ];
        for (source, expected) in sources {
            world.configure(&format!("[secrets.s]\n{source}\n{pair}\n"));
            world.leased_sh(&profile, &["file"], "cat $TOKEN_FILE").ok().prints(expected);
        }
        // The denials: neither an absent file nor a failing command gives a value.
        for source in [
            "source = \"file\"\npath = \"/nonexistent/key\"",
            "source = \"command\"\ncommand = [\"/bin/false\"]",
            "source = \"command\"\ncommand = [\"/nonexistent/mint\"]",
        ] {
            world.configure(&format!("[secrets.s]\n{source}\n{pair}\n"));
            world.leased_sh(&profile, &["file"], "touch ran").denied("source_unavailable");
            assert!(!world.workspace.join("ran").exists());
        }
    }
}

#[test]
fn ceilings_count_a_runs_requests_across_invocations() {
    for world in World::each() {
        let profile = world.leasing(VALUE);
        let ceiling = |text: &str| {
            world.configure(&format!(
                "{}[ceilings]\n{text}\n",
                vault_secret("s", "test.use@svc.test")
            ));
        };
        let ask = |run: &str| {
            world.run(&[
                "--profile",
                &profile,
                "--run",
                run,
                "--lease",
                "test.use@svc.test",
                "--",
                "true",
            ])
        };
        ceiling("requests_per_minute = 3\nrequests_per_run = 100");
        for _ in 0..3 {
            ask("agent-1").ok();
        }
        ask("agent-1").denied("rate_exceeded_minute");
        // Another run has its own count.
        ask("agent-2").ok();
        ceiling("requests_per_minute = 100\nrequests_per_run = 2");
        ask("agent-3").ok();
        ask("agent-3").ok();
        ask("agent-3").denied("rate_exceeded_run");
    }
}

#[test]
fn denials_past_a_ceiling_do_not_fill_the_trail() {
    let world = World::host();
    let profile = world.leasing(VALUE);
    world.configure(&format!(
        "{}[ceilings]\nrequests_per_minute = 2\n",
        vault_secret("s", "test.use@svc.test")
    ));
    let ask = || {
        world.run(&[
            "--profile",
            &profile,
            "--run",
            "noisy",
            "--lease",
            "test.use@svc.test",
            "--",
            "true",
        ])
    };
    for _ in 0..2 {
        ask().ok();
    }
    for _ in 0..12 {
        ask().denied("rate_exceeded_minute");
    }
    let denied = world.event_types().iter().filter(|t| *t == "lease.denied").count();
    assert!((1..12).contains(&denied), "{denied} events for 12 denials");
}

// ---- the record --------------------------------------------------------------------------------------

#[test]
fn the_trail_tells_the_life_of_a_lease_and_holds_no_value() {
    for world in World::each() {
        let profile = world.leasing(VALUE);
        world
            .run(&[
                "--profile",
                &profile,
                "--run",
                "run-of-test",
                "--agent",
                "agent-of-test",
                "--reason",
                "to see the trail",
                "--lease",
                "test.use@svc.test,channel=env,ttl=2m",
                "--",
                "sh",
                "-c",
                "test -n \"$TOKEN\"",
            ])
            .ok();
        let trail = world.trail();
        let types: Vec<&str> = trail.iter().map(|e| e["type"].as_str().unwrap()).collect();
        let order = [
            "secret.set",
            "run.started",
            "lease.requested",
            "lease.granted",
            "lease.consumed",
            "exec.started",
            "exec.exited",
            "exec.scrubbed",
            "lease.completed",
        ];
        let mut rest = types.iter();
        for kind in order {
            assert!(rest.any(|t| *t == kind), "no {kind}, or out of order: {types:?}");
        }
        let granted = trail.iter().find(|e| e["type"] == "lease.granted").unwrap();
        assert_eq!(granted["run_id"], "run-of-test");
        assert_eq!(granted["agent"], "agent-of-test");
        let requested = trail.iter().find(|e| e["type"] == "lease.requested").unwrap();
        assert_eq!(requested["reason"], "to see the trail");
        assert_eq!(requested["detail"]["request_id"], granted["detail"]["request_id"]);
        assert_eq!(granted["capability"], "test.use");
        assert_eq!(granted["audience"], "svc.test");
        assert_eq!(granted["channel"], "env");
        assert_eq!(granted["ttl_seconds"], 120);
        let lease = granted["lease_id"].as_str().unwrap();
        assert!(lease.starts_with("lse_"));
        let started = trail.iter().find(|e| e["type"] == "exec.started").unwrap();
        assert!(started.to_string().contains(lease), "exec events name their leases: {started}");
        for (earlier, later) in trail.iter().zip(trail.iter().skip(1)) {
            assert_eq!(later["prev_hash"], earlier["hash"], "the chain is broken at {later}");
            assert_eq!(later["seq"].as_u64(), earlier["seq"].as_u64().map(|n| n + 1));
        }
        let told = world.call(&["audit", "show", lease]).ok();
        for word in ["granted", "consumed", "completed"] {
            assert!(told.out().contains(word), "`audit show` does not tell `{word}`\n{told}");
        }
        world.call(&["audit", "verify"]).ok();
        world.holds_nowhere(VALUE);
        assert!(!host::contains(world.call(&["--json", "audit", "list"]).stdout.as_slice(), VALUE));
    }
}

#[test]
fn a_denial_is_recorded_and_explained() {
    let world = World::host();
    let profile = world.leasing(VALUE);
    let asked = ["--profile", &profile, "--lease", "test.use@evil.test", "--", "true"];
    let plain = world.run(&asked).denied("audience_not_permitted");
    assert!(plain.err().contains("svc.test"), "what would be allowed\n{plain}");
    let mut json = world.sublet();
    json.args(["--json", "run"]).args(asked);
    let outcome = finish(json, b"", None).exits(125);
    let text = if outcome.stdout.is_empty() { outcome.err() } else { outcome.out() };
    let object: Value =
        serde_json::from_str(text.trim()).unwrap_or_else(|e| panic!("{e}\n{outcome}"));
    let error = &object["error"];
    assert_eq!(error["reason"], "audience_not_permitted");
    for field in ["stage", "message", "hint"] {
        assert!(error[field].as_str().is_some_and(|t| !t.is_empty()), "{field}\n{outcome}");
    }
    assert!(world.event_types().contains(&"lease.denied".to_owned()));
}

#[test]
fn secrets_are_listed_rotated_and_removed_but_never_shown() {
    for world in World::each() {
        let profile = world.leasing_with(VALUE, "default", SHOWN);
        world.call(&["secret", "list"]).ok().says("s").never_says(value());
        // `set` keeps what is there; a new value in its place is said aloud.
        world.call_with(&["secret", "set", "s"], b"the-second-value").exits(2);
        world.call_with(&["secret", "rotate", "s"], b"the-second-value").ok();
        world.leased_sh(&profile, &["env"], read_back("env")).ok().prints("the-second-value");
        world.call(&["secret", "rm", "s"]).ok();
        world.leased_sh(&profile, &["env"], "true").denied("source_unavailable");
        let types = world.event_types();
        for kind in ["secret.set", "secret.rotated", "secret.removed"] {
            assert!(types.iter().any(|t| t == kind), "{types:?}");
        }
        world.holds_nowhere(VALUE);
        world.holds_nowhere(b"the-second-value");
        for word in ["get", "show", "print", "export", "reveal"] {
            assert_ne!(world.call(&["secret", word, "s"]).status, Some(0), "secret {word}");
        }
    }
}

#[test]
fn the_vault_is_encrypted_and_its_key_lies_elsewhere() {
    let world = World::host();
    world.leasing(VALUE);
    world.holds_nowhere(VALUE);
    let state = host::files_holding(&world.state(), b"SQLite format 3");
    assert!(!state.is_empty(), "the embedded store is SQLite");
    use std::os::unix::fs::PermissionsExt;
    let mode = fs::metadata(world.state()).unwrap().permissions().mode() & 0o077;
    assert_eq!(mode, 0, "others may enter the state directory");
}

#[test]
fn the_value_is_in_no_argument_and_no_environment_but_the_execs() {
    // Another test's exec may have the common one in its environment at this moment.
    const OWN: &[u8] = b"in-no-argument-7f20d1c6";
    for world in World::each() {
        let profile = world.leasing(OWN);
        for channel in ["env", "file", "memfd"] {
            let lease = format!("test.use@svc.test,channel={channel}");
            let mut exec = world.spawn(&[
                "--profile",
                &profile,
                "--lease",
                &lease,
                "--",
                "sh",
                "-c",
                "echo up; exec sleep 60",
            ]);
            assert_eq!(exec.read_line(), "up");
            let command = host::Parts::of(exec.pid()).command;
            let shown = host::processes_showing(OWN, &[command.pid]);
            assert!(shown.is_empty(), "{channel}: {shown:?}");
            let own = fs::read(format!("/proc/{}/environ", command.pid)).unwrap();
            assert_eq!(host::contains(&own, OWN), channel == "env", "{channel}");
            let line = fs::read(format!("/proc/{}/cmdline", command.pid)).unwrap();
            assert!(!host::contains(&line, OWN), "{channel}");
        }
    }
}

#[test]
fn a_value_that_sublet_manages_may_not_come_in_by_the_side() {
    let world = World::host();
    let profile = world.leasing(VALUE);
    let pair = format!("SMUGGLED={}", value());
    world
        .run(&["--profile", &profile, "--env", &pair, "--", "true"])
        .exits(125)
        .never_says(value());
    world.run(&["--profile", &profile, "--env", "SMUGGLED=other", "--", "true"]).ok();
    let mut passed =
        world.prepare(&["--profile", &profile, "--pass-env", "SMUGGLED", "--", "true"]).0;
    passed.env("SMUGGLED", value());
    finish(passed, b"", None).exits(125).never_says(value());
}

#[test]
fn an_expired_lease_is_wiped_in_mid_exec() {
    for world in World::each() {
        let profile = world.leasing_with(VALUE, "default", "on_revoke = \"wipe\"\nredact = false");
        let script = "head -c 7 /proc/self/fd/$TOKEN_FD; sleep 3; \
                      tr -d '\\0' </proc/self/fd/$TOKEN_FD | wc -c; tr -d '\\0' <$TOKEN_FILE | wc -c";
        let outcome = world.run(&[
            "--profile",
            &profile,
            "--lease",
            "test.use@svc.test,channel=memfd,ttl=1s",
            "--",
            "sh",
            "-c",
            &script.replace("; tr -d '\\0' <$TOKEN_FILE | wc -c", ""),
        ]);
        outcome.ok().prints("correct0\n");
        let types = world.event_types();
        assert!(types.iter().any(|t| t == "lease.expired"), "{types:?}");
        // The twin: a lease that lasts is whole.
        world
            .run(&[
                "--profile",
                &profile,
                "--lease",
                "test.use@svc.test,channel=memfd,ttl=1m",
                "--",
                "sh",
                "-c",
                "sleep 1.5; cat /proc/self/fd/$TOKEN_FD",
            ])
            .ok()
            .prints(value());
    }
}

#[test]
fn expiry_kills_where_the_capability_says_so() {
    let world = World::host();
    let profile = world.leasing_with(VALUE, "default", "on_revoke = \"kill\"");
    let start = std::time::Instant::now();
    let outcome = world.run(&[
        "--profile",
        &profile,
        "--lease",
        "test.use@svc.test,ttl=1s",
        "--",
        "sleep",
        "30",
    ]);
    assert_ne!(outcome.status, Some(0), "{outcome}");
    assert!(start.elapsed().as_secs() < 15, "{outcome}");
}

#[test]
fn without_a_lease_nothing_is_recorded_as_granted() {
    let world = World::host();
    let profile = world.leasing(VALUE);
    world.sh(&profile, "env | grep TOKEN; ls /run/sublet/secrets; true").ok();
    let types = world.event_types();
    assert!(!types.iter().any(|t| t.starts_with("lease.")), "{types:?}");
}

#[test]
fn two_racing_execs_count_each_request_once() {
    let world = World::host();
    let profile = world.leasing(VALUE);
    world.configure(&format!(
        "{}[ceilings]\nrequests_per_minute = 6\nrequests_per_run = 6\n",
        vault_secret("s", "test.use@svc.test")
    ));
    let results: Vec<Outcome> = std::thread::scope(|scope| {
        let world = &world;
        let commands: Vec<Command> = (0..12)
            .map(|_| {
                world
                    .prepare(&[
                        "--profile",
                        &profile,
                        "--run",
                        "racing",
                        "--lease",
                        "test.use@svc.test",
                        "--",
                        "true",
                    ])
                    .0
            })
            .collect();
        let handles: Vec<_> =
            commands.into_iter().map(|c| scope.spawn(move || finish(c, b"", None))).collect();
        handles.into_iter().map(|h| h.join().unwrap()).collect()
    });
    let granted = results.iter().filter(|o| o.status == Some(0)).count();
    assert_eq!(granted, 6, "{}", results.iter().map(ToString::to_string).collect::<String>());
    world.call(&["audit", "verify"]).ok();
    let consumed = world.event_types().iter().filter(|t| *t == "lease.consumed").count();
    assert_eq!(consumed, 6);
}
