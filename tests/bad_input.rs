//! Whatever is wrong with what it is given, sublet says what, exits as documented, and has done nothing
//! by half.
#![forbid(unsafe_code)]

mod support;

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use serial_test::file_serial;
use support::probe::{Bare, bare};
use support::world::{finish, leasing_profile, quoted, vault_secret};
use support::{ORDINARY, World, host};

const VALUE: &[u8] = b"never-released-under-bad-input-1";

#[track_caller]
fn did_not_run(world: &World) {
    assert!(!world.workspace.join("ran").exists(), "the command ran");
}

#[test]
fn commands_that_cannot_be_run() {
    for world in World::each() {
        world.file("text", "just text", 0o644);
        world.file("garbage", b"\x7fELFgarbage", 0o755);
        world.file("orphan", "#!/no/such/interpreter\n", 0o755);
        world.run(&["--", "no-such-command-anywhere"]).exits(127);
        world.run(&["--", "./no-such-file"]).exits(127);
        world.run(&["--", "/usr"]).exits(126);
        world.run(&["--", "./text"]).exits(126);
        world.run(&["--", "./garbage"]).exits(126);
        let orphan = world.run(&["--", "./orphan"]);
        assert!([Some(126), Some(127)].contains(&orphan.status), "{orphan}");
        let outcome = world.run(&["--", "no-such-command-anywhere"]);
        assert!(outcome.err().contains("no-such-command-anywhere"), "{outcome}");
    }
}

#[test]
fn exit_statuses_pass_through() {
    let world = World::host();
    for status in [0, 1, 2, 42, 125, 126, 127, 137, 255] {
        let outcome = world.run(&["--", "sh", "-c", &format!("exit {status}")]).exits(status);
        // The report removes the ambiguity of 124 to 127.
        assert_eq!(outcome.report()["exit_status"], status, "{outcome}");
    }
}

#[test]
fn usage_errors_are_125_and_name_the_word() {
    let world = World::host();
    world.run(&["--no-such-flag", "--", "touch", "ran"]).fails_naming(&["--no-such-flag"]);
    world.run(&["--timeout", "soon", "--", "touch", "ran"]).fails_naming(&["soon"]);
    world.run(&["--timeout", "0", "--", "touch", "ran"]).exits(125);
    world.run(&["--network", "wide", "--", "touch", "ran"]).fails_naming(&["wide"]);
    world.run(&["--run", "a/b", "--", "touch", "ran"]).fails_naming(&["a/b"]);
    world.run(&[]).exits(125);
    world.run(&["--"]).exits(125);
    // Where no command would have run, bad usage is 2, as everywhere.
    let outcome = world.call(&["no-such-subcommand"]).exits(2);
    assert!(outcome.err().contains("no-such-subcommand"), "{outcome}");
    did_not_run(&world);
}

#[test]
fn lease_flags_that_say_nothing() {
    let world = World::host();
    let profile = world.leasing(VALUE);
    for flag in [
        "",
        "test.use",
        "@svc.test",
        "test.use@",
        "test.use@svc.test,",
        "test.use@svc.test,channel",
        "test.use@svc.test,channel=pigeon",
        "test.use@svc.test,ttl=soon",
        "test.use@svc.test,ttl=0",
        "test.use@svc.test,uses=0",
        "test.use@svc.test,uses=-1",
        "test.use@svc.test,uses=99999999999999999999",
        "test.use@svc.test,colour=red",
        "test.use@svc.test,ttl=1s,ttl=2s",
        "Test.Use@svc.test",
        "test.use@https://svc.test/",
        "test.use@svc.test@other.test",
        "test use@svc.test",
    ] {
        let outcome =
            world.run(&["--profile", &profile, "--lease", flag, "--", "touch", "ran"]).exits(125);
        assert!(!outcome.stderr.is_empty(), "no message for {flag:?}");
        did_not_run(&world);
    }
    let types = world.event_types();
    assert!(!types.iter().any(|t| t == "lease.consumed"), "{types:?}");
}

#[test]
fn profiles_that_are_wrong() {
    for world in World::each() {
        world
            .run(&["--profile", "no-such-profile", "--", "touch", "ran"])
            .fails_naming(&["no-such-profile", "default"]);
        let gone = world.path("profiles/gone.toml");
        world
            .run(&["--profile", gone.to_str().unwrap(), "--", "touch", "ran"])
            .fails_naming(&["gone.toml"]);
        // Unknown keys and malformed text are named with line and column.
        for (toml, words) in [
            ("extends = \"default\"\n[limits]\nmemroy = \"1G\"\n", &["memroy", "3"][..]),
            ("extends = \"default\"\n\n  colour = 1\n", &["colour", "3"]),
            ("extends = \"default\n", &["1"]),
            ("extends = \"no-such-base\"\n", &["no-such-base"]),
            ("extends = \"default\"\n[network]\nmode = \"everything\"\n", &["everything", "3"]),
            ("extends = \"default\"\n[limits]\nmemory = \"much\"\n", &["much"]),
            (
                "extends = \"default\"\n[seccomp]\nfilter = \"no-such-filter\"\n",
                &["no-such-filter"],
            ),
            ("extends = \"default\"\n[network]\nmode = \"audience\"\n", &["audience"]),
            ("extends = \"default\"\n[environment]\nset = { SUBLET_X = \"1\" }\n", &["SUBLET_X"]),
            ("extends = \"default\"\n[filesystem]\nread_only = [\"relative\"]\n", &["relative"]),
            // `command` is mandatory for a capability.
            (
                "extends = \"default\"\n[[capability]]\nname = \"a.b\"\nchannels = [\"env\"]\n[[capability.audience]]\nhost = \"h\"\nsecret = \"s\"\nvariable = \"V\"\n",
                &["command"],
            ),
        ] {
            let profile = world.profile("wrong", toml);
            world.run(&["--profile", &profile, "--", "touch", "ran"]).fails_naming(words);
            did_not_run(&world);
        }
        // The allow twin.
        let right = world.profile("right", "extends = \"default\"\n[limits]\nmemory = \"1G\"\n");
        world.run(&["--profile", &right, "--", "true"]).ok();
    }
}

#[test]
fn a_profile_that_extends_itself() {
    let world = World::host();
    let dir = world.path("etc/profiles");
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join("ring.toml"), "extends = \"ring\"\n").unwrap();
    world.run(&["--profile", "ring", "--", "touch", "ran"]).fails_naming(&["ring"]);
    did_not_run(&world);
}

#[test]
fn configurations_that_are_wrong() {
    for world in World::each() {
        for (toml, words) in [
            ("[stat]\ndir = \"/x\"\n", &["stat", "1"][..]),
            ("[leases]\ndefault_ttl = \"eventually\"\n", &["eventually", "2"]),
            ("[secrets.s]\nsource = \"telepathy\"\nallow = []\n", &["telepathy"]),
            ("[secrets.s]\nsource = \"vault\"\n", &["allow"]),
            ("[secrets.s]\nsource = \"vault\"\nallow = []\n", &["allow"]),
            ("[secrets.s]\nsource = \"file\"\nallow = [\"a.b@c\"]\n", &["path"]),
            ("not toml at all", &["1"]),
        ] {
            world.configure(toml);
            world.run(&["--", "touch", "ran"]).fails_naming(words);
            did_not_run(&world);
        }
        world.configure("");
        world.run(&["--", "true"]).ok();
        let mut absent = world.sublet();
        absent.args(["--config", "/nonexistent/sublet.toml", "run", "--", "touch", "ran"]);
        let outcome = finish(absent, b"", None);
        assert_eq!(outcome.status, Some(125), "a named configuration must exist\n{outcome}");
    }
}

#[test]
fn a_secret_that_the_configuration_does_not_know() {
    let world = World::host();
    let profile = world.leasing(VALUE);
    world.configure("");
    let outcome =
        world.run(&["--profile", &profile, "--lease", "test.use@svc.test", "--", "touch", "ran"]);
    let outcome = outcome.exits(125);
    assert!(outcome.err().contains('s'), "{outcome}");
    did_not_run(&world);
}

#[test]
fn workspaces_that_are_refused() {
    for world in World::each() {
        let refused = |dir: &Path| {
            let dir = dir.to_str().unwrap().to_owned();
            world.run(&["--workspace", &dir, "--", "true"]).exits(125)
        };
        refused(Path::new("/"));
        refused(&world.path("home"));
        refused(Path::new("/nonexistent/workspace"));
        refused(&world.file("a-file", "", 0o644));
        // What holds sublet's state or configuration, and what lies in it.
        world.run(&["--", "true"]).ok();
        refused(&world.path(""));
        refused(&world.state());
        refused(&world.path("etc"));
        refused(Path::new("relative/../../.."));
        // The same through a symbolic link.
        let link = world.workspace.join("link");
        symlink(world.state(), &link).unwrap();
        refused(&link);
        // The allow twin: a subdirectory, also by a relative path.
        fs::create_dir(world.workspace.join("sub")).unwrap();
        std::os::unix::fs::chown(world.workspace.join("sub"), Some(ORDINARY), Some(ORDINARY))
            .unwrap();
        let expected = format!("{}/sub\n", fs::canonicalize(&world.workspace).unwrap().display());
        world.run(&["--workspace", "sub", "--", "pwd"]).ok().prints(&expected);
    }
}

#[test]
#[file_serial]
fn a_workspace_behind_a_symlink_swap() {
    // The name points to a good directory when it is checked and to the state when it is used: what
    // was checked must be what is mounted.
    for world in World::each() {
        world.run(&["--", "true"]).ok();
        let (good, bad) = (world.workspace.clone(), world.path("etc"));
        fs::write(bad.join("marker"), "secret configuration").unwrap();
        let name = world.path("swapped");
        let stop = AtomicBool::new(false);
        symlink(&good, &name).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let spare = world.path("spare");
                for target in [&bad, &good].into_iter().cycle() {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    symlink(target, &spare).unwrap();
                    fs::rename(&spare, &name).unwrap();
                }
            });
            for _ in 0..25 {
                let outcome = world.run(&[
                    "--workspace",
                    name.to_str().unwrap(),
                    "--",
                    "sh",
                    "-c",
                    "cat marker */marker; exit 0",
                ]);
                assert!(!outcome.out().contains("secret configuration"), "{outcome}");
            }
            stop.store(true, Ordering::Relaxed);
        });
    }
}

#[test]
fn a_listed_path_below_the_workspace_is_not_followed_out() {
    // Who owns the workspace may put a link where a profile expects a directory.
    let world = World::host();
    let hidden = world.path("hidden");
    fs::create_dir(&hidden).unwrap();
    fs::write(hidden.join("marker"), "secret configuration").unwrap();
    let inner = world.workspace.join("inner");
    let profile = world.profile(
        "inner",
        &format!("extends = \"default\"\n[filesystem]\nread_write = [{inner:?}]\n"),
    );
    symlink(&hidden, &inner).unwrap();
    let outcome = world.sh(&profile, "cat inner/marker; touch inner/planted; exit 0");
    assert!(!outcome.out().contains("secret configuration"), "{outcome}");
    assert!(!hidden.join("planted").exists(), "{outcome}");
}

#[test]
fn reserved_and_refused_names() {
    for world in World::each() {
        for name in [
            "SUBLET_SOCKET",
            "SUBLET_ANYTHING",
            "AZURE_CLIENT_ID",
            "AZURE_TENANT_ID",
            "AZURE_AUTHORITY_HOST",
            "AZURE_FEDERATED_TOKEN_FILE",
            "AZURE_FEDERATED_TOKEN",
            "AZURE_KUBERNETES_TOKEN_PROXY",
            "AWS_ROLE_ARN",
            "AWS_WEB_IDENTITY_TOKEN_FILE",
            "AWS_CONTAINER_CREDENTIALS_FULL_URI",
            "GOOGLE_APPLICATION_CREDENTIALS",
            "CREDENTIALS_DIRECTORY",
            "AZURE_CLIENT_SECRET",
            "AZURE_CLIENT_CERTIFICATE_PATH",
            "AWS_SECRET_ACCESS_KEY",
            "LD_PRELOAD",
            "LD_LIBRARY_PATH",
        ] {
            let pair = format!("{name}=x");
            world.run(&["--env", &pair, "--", "touch", "ran"]).fails_naming(&[name]);
            let mut passed = world.prepare(&["--pass-env", name, "--", "touch", "ran"]).0;
            // For the loader's variables: a place that holds nothing to load.
            passed.env(name, "/nonexistent");
            finish(passed, b"", None).fails_naming(&[name]);
            // Where the invoker does not have it as well.
            world.run(&["--pass-env", name, "--", "touch", "ran"]).fails_naming(&[name]);
            let file = world.path("etc/env-file");
            fs::write(&file, format!("FINE=1\n{pair}\n")).unwrap();
            world
                .run(&["--env-file", file.to_str().unwrap(), "--", "touch", "ran"])
                .fails_naming(&[name]);
            did_not_run(&world);
        }
        world
            .run(&["--env", "AWS_REGION=eu-central-1", "--", "sh", "-c", "echo $AWS_REGION"])
            .ok()
            .prints("eu-central-1\n");
    }
}

#[test]
fn a_delivered_variable_cannot_be_set() {
    let world = World::host();
    let profile = world.leasing(VALUE);
    for name in ["TOKEN", "TOKEN_FILE", "TOKEN_FD"] {
        let pair = format!("{name}=mine");
        world
            .run(&["--profile", &profile, "--env", &pair, "--", "touch", "ran"])
            .fails_naming(&[name]);
    }
    did_not_run(&world);
}

#[test]
fn two_leases_that_would_be_delivered_as_one() {
    let world = World::host();
    let profile = world.leasing(VALUE);
    let both = |one: &str, two: &str| {
        let leases = [one, two].map(|c| format!("--lease=test.use@svc.test,channel={c}"));
        world.run(&["--profile", &profile, &leases[0], &leases[1], "--", "touch", "ran"])
    };
    both("env", "env").denied("delivery_unavailable");
    did_not_run(&world);
    both("env", "file").ok();
}

#[test]
fn malformed_environment() {
    let world = World::host();
    for pair in ["", "=x", "NO-DASH=1", "1X=1", "A B=1", "NOVALUE"] {
        world.run(&["--env", pair, "--", "touch", "ran"]).exits(125);
    }
    world
        .run(&["--env-file", "/nonexistent/env", "--", "touch", "ran"])
        .fails_naming(&["/nonexistent/env"]);
    world.run(&["--pass-env", "NOT_SET_ANYWHERE", "--", "true"]);
    did_not_run(&world);
}

#[test]
fn an_unwritable_state_directory_grants_nothing() {
    let world = World::developer();
    let profile = world.leasing(VALUE);
    set_modes(&world.state(), 0o500, 0o400);
    let leased = ["--profile", &profile, "--lease", "test.use@svc.test", "--", "touch", "ran"];
    world.run(&leased).exits(125);
    did_not_run(&world);
    set_modes(&world.state(), 0o700, 0o600);
    world.run(&leased).ok();
}

/// Gives a tree's directories and files these modes.
fn set_modes(dir: &Path, directories: u32, files: u32) {
    fs::set_permissions(dir, fs::Permissions::from_mode(0o700)).unwrap();
    for entry in fs::read_dir(dir).unwrap().flatten() {
        if entry.file_type().unwrap().is_dir() {
            set_modes(&entry.path(), directories, files);
        } else {
            fs::set_permissions(entry.path(), fs::Permissions::from_mode(files)).unwrap();
        }
    }
    fs::set_permissions(dir, fs::Permissions::from_mode(directories)).unwrap();
}

#[test]
#[file_serial]
fn a_full_disk_grants_nothing() {
    let world = World::host();
    let profile = world.leasing(VALUE);
    let run = |script: &str| {
        world.shell_line(&[
            "--profile",
            &profile,
            "--lease",
            "test.use@svc.test",
            "--",
            "sh",
            "-c",
            script,
        ])
    };
    let state = quoted(world.state().to_str().unwrap());
    // The state moves to a small file system, which is then filled to the last byte.
    let script = format!(
        "cp -a {state} {state}.copy && mount -t tmpfs -o size=2M,mode=700 none {state} && cp -a {state}.copy/. {state}/\n\
         {granted}; echo before $?\n\
         cat /dev/zero >{state}/filler 2>/dev/null\n\
         {denied}; echo full $?\n\
         rm {state}/filler; {again}; echo after $?\n",
        granted = run("true"),
        denied = run("touch ran"),
        again = run("true"),
    );
    let outcome = bare(&world, Bare::OwnProc, 0, &script).ok();
    assert_eq!(outcome.out(), "before 0\nfull 125\nafter 0\n", "{outcome}");
    did_not_run(&world);
    let said = outcome.err().to_lowercase();
    assert!(
        said.contains("space") || said.contains("full") || said.contains("audit_unavailable"),
        "{outcome}"
    );
}

/// The embedded store's file.
fn store(world: &World) -> std::path::PathBuf {
    host::files_holding(&world.state(), b"SQLite format 3")
        .into_iter()
        .find(|path| path.extension().is_some_and(|e| e == "db"))
        .expect("a store")
}

#[test]
fn a_corrupted_store_refuses_and_is_named() {
    let world = World::host();
    let profile = world.leasing(VALUE);
    let leased = ["--profile", &profile, "--lease", "test.use@svc.test", "--", "touch", "ran"];
    let store = store(&world);
    let good = fs::read(&store).unwrap();
    let mut bad = good.clone();
    bad[..512].fill(0xA5);
    for suffix in ["-wal", "-shm"] {
        let _ = fs::remove_file(format!("{}{suffix}", store.display()));
    }
    fs::write(&store, &bad).unwrap();
    let outcome = world.run(&leased).exits(125);
    let name = store.file_name().unwrap().to_str().unwrap();
    assert!(
        outcome.err().contains(name) || outcome.err().contains("audit_unavailable"),
        "{outcome}"
    );
    did_not_run(&world);
    fs::write(&store, &good).unwrap();
}

#[test]
fn a_trail_that_was_changed_is_named() {
    let swap = "UPDATE event SET seq = -3 WHERE seq = 3; UPDATE event SET seq = 3 WHERE seq = 4; \
                UPDATE event SET seq = 4 WHERE seq = -3";
    // What an intruder with the file does, and the first event that is not as it was.
    for (what, sql, first) in [
        (
            "changed",
            "UPDATE event SET body = replace(body, 'lease.requested', 'lease.denied')",
            Some(3),
        ),
        ("removed", "DELETE FROM event WHERE seq = 4", Some(4)),
        ("reordered", swap, Some(3)),
        // Here no event is wrong: the head that is kept outside the database is ahead.
        ("cut off", "DELETE FROM event WHERE seq > (SELECT max(seq) - 2 FROM event)", None),
        ("emptied", "DELETE FROM event", None),
    ] {
        let world = World::host();
        let profile = world.leasing(VALUE);
        let leased = ["--profile", &profile, "--lease", "test.use@svc.test", "--", "true"];
        world.run(&leased).ok();
        let whole = world.call(&["--json", "audit", "verify"]).ok().json();
        assert_eq!(whole["whole"], true, "{what}: {whole}");
        let head = whole["head"].as_str().unwrap().to_owned();

        rusqlite::Connection::open(store(&world)).unwrap().execute_batch(sql).unwrap();
        let verify = world.call(&["--json", "audit", "verify"]).exits(1);
        let told = verify.json();
        assert_eq!(told["whole"], false, "{what}\n{verify}");
        if let Some(first) = first {
            assert_eq!(told["finding"]["seq"], first, "{what}\n{verify}");
        }
        // The same shows against a head that someone kept elsewhere.
        world.call(&["audit", "verify", "--head", &head]).exits(1);
    }
}

#[test]
fn nothing_is_granted_on_a_trail_that_was_cut_off() {
    let world = World::host();
    let profile = world.leasing(VALUE);
    let leased = ["--profile", &profile, "--lease", "test.use@svc.test", "--"];
    world.run(&[&leased[..], &["true"]].concat()).ok();
    let cut = "DELETE FROM event WHERE seq > (SELECT max(seq) - 2 FROM event)";
    rusqlite::Connection::open(store(&world)).unwrap().execute_batch(cut).unwrap();
    world.run(&[&leased[..], &["touch", "ran"]].concat()).fails_naming(&["trail", "cut"]);
    did_not_run(&world);
}

#[test]
fn values_that_cannot_be_stored() {
    let world = World::host();
    world.configure(&vault_secret("s", "test.use@svc.test"));
    let too_large = vec![b'x'; (1 << 20) + 1];
    world.call_with(&["secret", "set", "s"], &too_large).exits(2);
    world.call_with(&["secret", "set", "s"], &too_large[1..]).ok();
    world.call_with(&["secret", "set", "no name"], b"x").exits(2);
    world.call_with(&["secret", "set", "../escape"], b"x").exits(2);
    world.call_with(&["secret", "rm", "never-set"], b"").exits(2);
    world.call_with(&["secret", "rotate", "never-set"], b"x").exits(2);
}

#[test]
fn a_report_that_cannot_be_written_is_said_before_anything_runs() {
    let world = World::host();
    let mut run = world.sublet();
    run.args(["run", "--report", "/nonexistent/dir/report.json", "--", "touch", "ran"]);
    finish(run, b"", None).fails_naming(&["/nonexistent/dir/report.json"]);
    did_not_run(&world);
}

#[test]
fn a_bound_on_files_is_an_error_of_ours_and_the_end_of_the_command() {
    let world = World::host();
    let profile = world.leasing(VALUE);
    let under = |blocks: u32, args: &[&str]| {
        let plain = world.sublet();
        let mut bounded = std::process::Command::new("sh");
        world.dress(&mut bounded);
        bounded.args(["-c", &format!("ulimit -f {blocks}; exec \"$@\""), "sh"]);
        bounded.arg(plain.get_program()).args(plain.get_args()).args(args);
        finish(bounded, b"", None)
    };
    // RLIMIT_FSIZE in blocks of 512 bytes. Not SIGXFSZ: the trail cannot be written, and that is told.
    let leased = ["--json", "run", "--profile", &profile, "--lease", "test.use@svc.test", "--"];
    for blocks in [8, 20] {
        let outcome = under(blocks, &[&leased[..], &["touch", "ran"]].concat()).exits(125);
        assert!(outcome.err().contains("\"audit_unavailable\""), "{outcome}");
        did_not_run(&world);
    }
    under(1 << 16, &[&leased[..], &["touch", "ran"]].concat()).ok();
    assert!(world.workspace.join("ran").exists());
    // The command has the signal's default action, whatever we do with it.
    let writes = ["run", "--", "sh", "-c", "head -c 64M /dev/zero > large; echo $?"];
    under(1 << 16, &writes).ok().prints(&format!("{}\n", 128 + libc::SIGXFSZ));
}

#[test]
fn the_report_of_a_failure_says_that_it_is_one() {
    // Exit status 125 may be the command's own: the report removes the ambiguity.
    let world = World::host();
    let profile = world.leasing(VALUE);
    let own = world.run(&["--", "sh", "-c", "exit 125"]).exits(125);
    assert_eq!(own.report()["exit_status"], 125, "{own}");
    let denied = world
        .run(&["--profile", &profile, "--lease", "test.use@evil.test", "--", "true"])
        .exits(125);
    assert_eq!(denied.report()["error"]["reason"], "audience_not_permitted", "{denied}");
    let failed = world.run(&["--profile", "no-such-profile", "--", "true"]).exits(125);
    assert!(failed.report()["error"]["message"].is_string(), "{failed}");
}

#[test]
fn an_argument_that_is_no_utf8_reaches_the_command() {
    use std::os::unix::ffi::OsStrExt;
    let world = World::host();
    let (mut run, _) = world.prepare(&["--", "printf", "%s"]);
    run.arg(std::ffi::OsStr::from_bytes(b"\xff\xfe"));
    let outcome = finish(run, b"", None).ok();
    assert_eq!(outcome.stdout, b"\xff\xfe", "{outcome}");
}

#[test]
fn closed_standard_streams_are_no_trap() {
    // A file that sublet opens must not become the command's stdout: CVE-2024-21626 is of this family.
    for world in World::each() {
        let line =
            world.shell_line(&["--", "sh", "-c", "echo to-stdout; echo to-stderr >&2; cat; true"]);
        for closing in ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"] {
            bare(&world, Bare::OwnProc, 0, &format!("{line} {closing}; true")).ok();
            world.run(&["--", "true"]).ok();
            world.call(&["audit", "verify"]).ok();
        }
    }
}

#[test]
fn a_working_directory_descriptor_does_not_leak_the_host() {
    // runc CVE-2024-21626: a descriptor of the host's file system used as the working directory.
    let world = World::host();
    for dir in ["/proc/self/fd/3", "/proc/self/fd/7", "/proc/self/cwd", "/proc/1/root"] {
        let outcome =
            world.run(&["--workspace", dir, "--", "sh", "-c", "cat ../../../etc/shadow; pwd"]);
        assert!(!outcome.out().contains("root:"), "{outcome}");
    }
}

#[test]
fn the_running_binary_cannot_be_overwritten_from_inside() {
    // runc CVE-2019-5736: writing through /proc/PID/exe of the one who entered.
    for world in World::each() {
        let before = fs::read(support::world::binary()).unwrap().len();
        let script = "for p in /proc/[0-9]*; do (: >>$p/exe) 2>/dev/null && echo wrote $p; done; \
             (: >>/run/sublet/bin/sublet) 2>/dev/null && echo wrote; exit 0";
        world.run(&["--", "sh", "-c", script]).ok().prints("");
        assert_eq!(fs::read(support::world::binary()).unwrap().len(), before);
    }
}

#[test]
fn two_profiles_of_one_capability_replace_and_do_not_add() {
    let world = World::host();
    world.leasing(VALUE);
    // Profiles beside the configuration go by their names.
    fs::create_dir(world.path("etc/profiles")).unwrap();
    fs::write(world.path("etc/profiles/base.toml"), leasing_profile("default", "")).unwrap();
    let narrow = world.profile(
        "narrow",
            "extends = \"base\"\n[[capability]]\nname = \"test.use\"\nchannels = [\"env\"]\ncommand = [[\"true\"]]\n\
             [[capability.audience]]\nhost = \"svc.test\"\nsecret = \"s\"\nvariable = \"TOKEN\"\n",
    );
    world.run(&["--profile", &narrow, "--lease", "test.use@svc.test", "--", "true"]).ok();
    world
        .run(&["--profile", &narrow, "--lease", "test.use@svc.test", "--", "sh", "-c", "touch ran"])
        .denied("command_not_permitted");
    did_not_run(&world);
}

// ---- files that the invoker names, in a directory that commands write to ------------------------------

/// `sublet run FLAGS -- sh -c SCRIPT`, as root in a workspace of root's: what commands leave there looks like its own.
fn call(world: &World, flags: &[&str], script: &str) -> support::Outcome {
    let mut args = vec!["run"];
    args.extend(flags);
    args.extend(["--", "sh", "-c", script]);
    world.call(&args)
}

#[test]
fn a_report_is_written_through_nothing_that_a_command_left() {
    let world = World::new(0, 0);
    let outside = world.path("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("r.json"), "the owner's").unwrap();
    let (workspace, target) = (world.workspace.clone(), outside.display().to_string());
    let planted = format!(
        "ln -s {target}/r.json link; ln -s {target} way; mkfifo fifo; mkdir directory; mkdir real"
    );
    call(&world, &[], &planted).ok();
    let absolute = workspace.join("way/r.json");
    for name in ["link", "way/r.json", "./way/../way/r.json", absolute.to_str().unwrap()] {
        let outcome = call(&world, &["--report", name], "touch ran");
        outcome.fails_naming(&["symbolic link"]);
        did_not_run(&world);
    }
    for name in ["fifo", "directory"] {
        let outcome = call(&world, &["--report", name], "touch ran");
        outcome.fails_naming(&[name]);
        did_not_run(&world);
    }
    assert_eq!(fs::read_to_string(outside.join("r.json")).unwrap(), "the owner's");
    // The control: what a plain open makes of it.
    fs::write(workspace.join("link"), "followed").unwrap();
    assert_eq!(fs::read_to_string(outside.join("r.json")).unwrap(), "followed");
    // What is no trap is taken: a directory, a file that is there, one beside the workspace, streams.
    fs::write(workspace.join("real/r.json"), "an old and longer one".repeat(1000)).unwrap();
    for name in ["real/r.json", "real/../real/r.json", "../beside.json"] {
        call(&world, &["--report", name], "exit 3").exits(3);
        let text = fs::read_to_string(workspace.join(name)).unwrap();
        let report: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(report["exit_status"], 3, "{name}");
    }
    let told = call(&world, &["--report", "/dev/stdout"], "true").ok();
    assert_eq!(serde_json::from_str::<serde_json::Value>(&told.out()).unwrap()["exit_status"], 0);
    call(&world, &["--report", "/dev/null"], "true").ok();
}

#[test]
fn a_command_does_not_write_its_own_report() {
    for forging in [
        "echo forged >r.json",
        "rm r.json; echo forged >r.json",
        "rm r.json; ln -s /etc/passwd r.json",
        "rm r.json; mkfifo r.json",
        "rm r.json",
        "for i in $(seq 2000); do echo forged; done >>r.json",
        "mv r.json other; echo forged >r.json",
    ] {
        let world = World::host();
        let before = fs::read_to_string("/etc/passwd").unwrap();
        let report = world.workspace.join("r.json");
        fs::write(&report, "").unwrap();
        std::os::unix::fs::chown(&report, Some(ORDINARY), Some(ORDINARY)).unwrap();
        let name = report.to_str().unwrap();
        call(&world, &["--report", name], &format!("{forging}; exit 7")).exits(7);
        let text = fs::read_to_string(&report).unwrap();
        let written: serde_json::Value = serde_json::from_str(&text).expect(forging);
        assert_eq!(written["exit_status"], 7, "{forging}");
        assert_eq!(fs::read_to_string("/etc/passwd").unwrap(), before);
    }
    // Nor does it change by it how it has ended, or whose file is replaced.
    let world = World::new(0, 0);
    let outside = world.path("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("r.json"), "the owner's").unwrap();
    let lost = call(&world, &["--report", "r.json"], "rm r.json; mkdir r.json; exit 7").exits(7);
    assert!(lost.err().contains("cannot write"), "{lost}");
    fs::create_dir(world.workspace.join("way")).unwrap();
    let swap = format!("mv way moved; ln -s {} way; exit 7", outside.display());
    call(&world, &["--report", "way/r.json"], &swap).exits(7);
    assert_eq!(fs::read_to_string(outside.join("r.json")).unwrap(), "the owner's");
    assert!(world.workspace.join("moved/r.json").exists());
}

/// Root becomes the user of the state before it tells how the command ended.
#[test]
fn a_report_is_written_where_only_root_may_look() {
    let world = World::host();
    world.run(&["--", "true"]).ok();
    let owned = std::process::Command::new("chown")
        .args(["-R", "5000:5000"])
        .args([world.state().join("db"), world.state().join("keys")].iter().filter(|p| p.exists()))
        .status();
    assert!(owned.unwrap().success());
    fs::set_permissions(world.state(), fs::Permissions::from_mode(0o711)).unwrap();
    let hidden = world.path("hidden");
    fs::create_dir(&hidden).unwrap();
    fs::set_permissions(&hidden, fs::Permissions::from_mode(0o700)).unwrap();
    let report = hidden.join("r.json");
    call(&world, &["--report", report.to_str().unwrap()], "exit 3").exits(3);
    let text = fs::read_to_string(&report).unwrap();
    assert!(text.contains("\"exit_status\": 3"), "{text}");
}

#[test]
fn an_env_file_is_read_through_nothing_that_a_command_left() {
    let world = World::new(0, 0);
    let outside = world.path("outside.env");
    fs::write(&outside, "STOLEN=yes\n").unwrap();
    call(&world, &[], &format!("ln -s {} link; mkfifo fifo", outside.display())).ok();
    for name in ["link", "fifo"] {
        let outcome = call(&world, &["--env-file", name], "touch ran");
        outcome.fails_naming(&[name]);
        did_not_run(&world);
    }
    let beside = outside.to_str().unwrap();
    call(&world, &["--env-file", beside], "echo $STOLEN").ok().prints("yes\n");
    // As a shell's `<(…)` names it.
    let mut piped = std::process::Command::new("bash");
    world.dress(&mut piped);
    let line = world.shell_line(&["--env-file", "FILE", "--", "sh", "-c", "echo $A"]);
    piped.args(["-c", &line.replace("'FILE'", "<(echo A=b)")]);
    finish(piped, b"", None).ok().prints("b\n");
}
