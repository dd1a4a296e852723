//! A compromised broker, and what the launcher does for it: this test speaks the launcher's protocol as the
//! broker would, with orders that an honest broker never gives. Each refusal has a twin that is obeyed.
//!
//! It forks the launcher, which wants a process of one thread: it has a `main` of its own.
#![forbid(unsafe_code)]

mod support;

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::time::Duration;

use sublet::host::{Places, ProfileRef, Trust};
use sublet::launcher::client::{Launcher, Session};
use sublet::launcher::wire::{Notice, Order, Prepare};
use sublet::model::id::{ExecId, RunId};
use support::World;

fn main() -> std::process::ExitCode {
    let names: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let name = "what_a_compromised_broker_orders_is_refused";
    if std::env::args().any(|a| a == "--list") {
        println!("{name}: test");
        return std::process::ExitCode::SUCCESS;
    }
    if !names.is_empty() && !names.iter().any(|n| name.contains(n.as_str())) {
        println!("\ntest result: ok. 0 passed; 0 failed; 0 ignored; 0 measured; 1 filtered out");
        return std::process::ExitCode::SUCCESS;
    }
    println!("\nrunning 1 test");
    what_a_compromised_broker_orders_is_refused();
    println!("test {name} ... ok");
    println!("\ntest result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out");
    std::process::ExitCode::SUCCESS
}

fn what_a_compromised_broker_orders_is_refused() {
    support::needs_root();
    let world = World::host();
    let base = world.workspace.parent().unwrap().to_owned();
    let roots = base.join("roots");
    let [inside, outside] = [roots.join("a"), base.join("elsewhere")];
    for directory in [&inside, &outside] {
        fs::create_dir_all(directory).unwrap();
    }
    world.configure(&format!("[host]\nworkspaces = [{roots:?}]\n"));
    let write = |path: &Path, mode: u32, owner: u32| -> PathBuf {
        fs::write(path, "extends = \"default\"\n").unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        chown(path, Some(owner), None).unwrap();
        path.to_owned()
    };
    let roots_own = write(&base.join("own.toml"), 0o644, 0);
    let strangers = write(&base.join("strangers.toml"), 0o644, 12345);
    let writable = write(&base.join("writable.toml"), 0o666, 0);

    let places = Places {
        config: Some(world.path("etc/sublet.toml")),
        state_dir: Some(world.state()),
        runtime_dir: None,
    };
    fs::create_dir_all(world.state()).unwrap();
    let launcher = Launcher::fork(&places, Trust::Host).unwrap();
    let door = launcher.door().unwrap();
    let order = |profile: &ProfileRef, workspace: &Path| Prepare {
        exec: 1,
        exec_id: ExecId::fresh(),
        run_id: RunId::fresh(),
        profile: profile.clone(),
        workspace: workspace.to_owned(),
        argv: vec![b"true".to_vec()],
        program: None,
        environment: Vec::new(),
        without_network: false,
        terminal: None,
        deliveries: Vec::new(),
        agent: false,
        home: Some("/root".into()),
        into: sublet::launcher::into::InContainer::default(),
        cpu: u32::MAX,
    };
    let ask = |profile: &ProfileRef, workspace: &Path| {
        let session = door.open().unwrap();
        session.order(&Order::Prepare(Box::new(order(profile, workspace)))).unwrap();
        verdict(&session)
    };
    let builtin = ProfileRef::Name("default".into());
    let check = |profile: &ProfileRef, workspace: &Path, refused: Option<&str>| {
        let said = ask(profile, workspace);
        match (said, refused) {
            (Ok(()), None) => {}
            (Err(why), Some(part)) if why.contains(part) => {}
            (said, expected) => {
                panic!("{profile} {}: {said:?}, not {expected:?}", workspace.display())
            }
        }
    };
    check(&builtin, &inside, None);
    check(&ProfileRef::File(roots_own), &inside, None);
    check(&ProfileRef::File(strangers), &inside, Some("belongs to uid 12345"));
    check(&ProfileRef::File(writable), &inside, Some("others may write"));
    check(&builtin, &outside, Some("none of the `workspaces`"));
    check(&builtin, &roots.join("a/../../elsewhere"), Some("cannot be a workspace"));
    check(&builtin, Path::new("/"), Some("cannot be a workspace"));
    check(&ProfileRef::Name("../own".into()), &inside, Some("profile"));
    // A link in the workspace's path, put there after the run was started.
    std::os::unix::fs::symlink(&outside, roots.join("link")).unwrap();
    check(&builtin, &roots.join("link"), Some("symbolic link"));

    // Variables that change whom a program is, or what it loads.
    let setting = |name: &str, value: &str| {
        let session = door.open().unwrap();
        let mut prepare = order(&builtin, &inside);
        prepare.environment.push((name.parse().unwrap(), value.as_bytes().to_vec()));
        session.order(&Order::Prepare(Box::new(prepare))).unwrap();
        verdict(&session)
    };
    assert_eq!(setting("FREE", "x"), Ok(()));
    assert_eq!(setting("PATH", "/roots/a"), Ok(()), "passed over");
    for name in ["LD_PRELOAD", "SUBLET_SOCKET", "AWS_SECRET_ACCESS_KEY", "AZURE_CLIENT_SECRET"] {
        let said = setting(name, "x").unwrap_err();
        assert!(said.contains("the broker cannot set") && said.contains(name), "{said}");
    }

    // What belongs to the root session ends any other, and nothing else.
    let session = door.open().unwrap();
    session.order(&Order::KeepHead { head: b"forged".to_vec() }).unwrap();
    assert!(session.notice().is_err(), "the session ends");
    assert!(!world.state().join("trail.head").exists(), "no head was kept for it");
    // Bytes that are no order end their session.
    let session = door.open().unwrap();
    rustix::net::send(session.socket(), &[0, 250, 1, 2], rustix::net::SendFlags::empty()).unwrap();
    assert!(session.notice().is_err(), "the session ends");
    check(&builtin, &inside, None);

    // An exec of a session that ends is killed, and its launcher goes on.
    drop(door.open().unwrap());
    check(&builtin, &inside, None);
    drop(launcher);
    std::thread::sleep(Duration::from_millis(300));
}

/// Whether the sandbox was prepared, or why not.
fn verdict(session: &Session) -> Result<(), String> {
    loop {
        match session.notice().expect("the launcher lives").0 {
            Notice::Prepared { .. } => return Ok(()),
            Notice::Refused { refusal, .. } => return Err(refusal.message),
            _ => {}
        }
    }
}
