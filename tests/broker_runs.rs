//! What an agent in its long-lived sandbox has of the broker, and what a leased command has not.
#![forbid(unsafe_code)]

mod support;

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::time::Duration;

use serial_test::file_serial;
use support::World;
use support::broker::{Way, leasing_host, serve, serve_as};
use support::world::ORDINARY;

const SUBLET: &str = "/run/sublet/bin/sublet";

#[test]
#[file_serial]
fn an_agent_keeps_its_socket_when_the_broker_starts_anew() {
    support::needs_root();
    let world = World::host();
    let profile = leasing_host(&world, b"a value of this test", "");
    let broker = serve(&world);
    let run = broker.start_run(&profile);
    let ask = format!("{SUBLET} --json lease list >/dev/null");
    let script = format!(
        "{ask} || exit 3; echo first; \
         while [ ! -e go ]; do sleep 0.05; done; {ask} || exit 4; echo second"
    );
    let id = run.id.clone();
    let mut agent = world.spawn(&[
        "--run",
        &id,
        "--agent",
        "bot",
        "--profile",
        &profile,
        "--",
        "sh",
        "-c",
        &script,
    ]);
    assert_eq!(agent.read_line(), "first");
    drop(run);
    broker.terminate();
    let mut broker = broker;
    assert!(broker.ended(Duration::from_secs(10)).success(), "{}", broker.log());
    drop(broker);

    let again = serve(&world);
    fs::write(world.workspace.join("go"), "").unwrap();
    chown(world.workspace.join("go"), Some(ORDINARY), Some(ORDINARY)).unwrap();
    let outcome = agent.finish();
    assert_eq!((outcome.status, &outcome.stdout[..]), (Some(0), &b"second\n"[..]), "{outcome:?}");
    drop(again);
}

/// systemd's directory of credentials is root's: the broker opens the key before it is another user.
#[test]
#[file_serial]
fn a_signing_key_that_is_a_credential_is_the_brokers_and_none_is_made() {
    support::needs_root();
    let world = World::host();
    leasing_host(&world, b"a value of this test", "");
    let credentials = world.path("credentials");
    fs::create_dir(&credentials).unwrap();
    let key = credentials.join("sublet-signing-key");
    fs::write(&key, [7; 32]).unwrap();
    fs::set_permissions(&key, fs::Permissions::from_mode(0o400)).unwrap();
    fs::set_permissions(&credentials, fs::Permissions::from_mode(0o500)).unwrap();
    let made = world.state().join("keys/signing.key");
    let environment = [("CREDENTIALS_DIRECTORY", credentials.to_str().unwrap())];
    drop(serve_as(&world, Way { environment: &environment, ..Way::default() }));
    assert!(!made.exists());
    // The control.
    drop(serve(&world));
    assert!(made.exists());
}

#[test]
#[file_serial]
fn a_leased_command_has_no_socket_and_an_agent_has() {
    support::needs_root();
    let world = World::host();
    let profile = leasing_host(&world, b"a value of this test", "");
    let broker = serve(&world);
    let run = broker.start_run(&profile);
    let look = "echo socket=$SUBLET_SOCKET; ls /run/sublet/agent.sock 2>/dev/null; true";
    let lease = run.lease("");
    let leased = run.exec(&["--lease", &lease, "--", "sh", "-c", look]).ok();
    assert_eq!(leased.stdout, b"socket=\n");
    // The control: without a lease it is an agent's.
    let plain = run.exec(&["--", "sh", "-c", look]).ok();
    assert_eq!(plain.stdout, b"socket=/run/sublet/agent.sock\n/run/sublet/agent.sock\n");
}
