//! Sources that mint, whatever the kind: what a value is delivered as and masked in, that it ends with its
//! exec however that ends, what is told of it, and that a far side which misbehaves gets nothing delivered
//! and nothing leaked. The far side is a test's own; the real ones are in the other `sources_*` files.
#![forbid(unsafe_code)]

mod support;

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::World;
use support::far::{Asked, Does, Far, json};
use support::world::leasing_profile;

const SECRET: &str = "client-secret-0123456789";
const TOKEN: &str = "minted-token-abcdefghijklmnop-0001";

/// The secret `s` by client credentials of this far side, which it revokes at.
fn oauth(far: &Far, more: &str) -> String {
    format!(
        "[secrets.s]\nsource = \"oauth\"\ntoken_url = \"{}\"\nrevocation_url = \"{}\"\n\
         client_id = \"sublet\"\nclient_secret = \"client\"\nallow = [\"test.use@svc.test\"]\n{more}\n\
         [secrets.client]\nsource = \"vault\"\nallow = []\n",
        far.url("/token"),
        far.url("/revoke"),
    )
}

fn world(config: &str) -> (World, String) {
    let world = World::host();
    world.configure(config);
    world.set_secret("client", SECRET.as_bytes());
    let profile = world.profile("leasing", &leasing_profile("default", ""));
    (world, profile)
}

fn issues(asked: &Asked) -> Does {
    match asked.path.as_str() {
        "/token" => json(
            200,
            json!({"access_token": TOKEN, "token_type": "Bearer", "expires_in": 300,
                "refresh_token": "a-refresh-token-that-nobody-takes"}),
        ),
        "/revoke" => json(200, json!({})),
        _ => json(404, json!({})),
    }
}

/// The trail's events of these types, oldest first.
fn of_mint(world: &World) -> Vec<Value> {
    let is_mint = |event: &Value| event["type"].as_str().unwrap().starts_with("mint.");
    world.trail().into_iter().filter(is_mint).collect()
}

#[test]
fn a_value_is_minted_delivered_masked_and_revoked_with_its_exec() {
    for developer in [false, true] {
        let far = Far::serve(issues);
        let world = if developer { World::developer() } else { World::host() };
        world.configure(&oauth(&far, ""));
        world.set_secret("client", SECRET.as_bytes());
        let profile = world.profile("leasing", &leasing_profile("default", ""));
        let outcome = world.leased_sh(
            &profile,
            &["env"],
            "echo ${#TOKEN}; echo $TOKEN | tr a-z A-Z; echo $TOKEN",
        );
        let outcome = outcome.ok();
        assert!(outcome.out().starts_with(&format!("{}\n", TOKEN.len())), "{outcome}");
        assert!(outcome.out().contains(&TOKEN.to_uppercase()), "{outcome}");
        let outcome = outcome.never_says(TOKEN);

        let asked = far.asked_at("/token");
        assert_eq!(asked.len(), 1);
        assert_eq!(asked[0].fields("grant_type"), ["client_credentials"]);
        let lease = outcome.report()["leases"][0]["lease_id"].as_str().unwrap().to_owned();
        assert_eq!(asked[0].header("x-request-id"), Some(&*lease), "one id joins both logs");
        let revoked = far.asked_at("/revoke");
        assert_eq!(revoked.len(), 1, "{:?}", far.asked());
        assert_eq!(revoked[0].fields("token"), [TOKEN]);

        let told = of_mint(&world);
        let types: Vec<&str> = told.iter().map(|e| e["type"].as_str().unwrap()).collect();
        assert_eq!(types, ["mint.issued", "mint.revoked"], "{told:#?}");
        for event in &told {
            assert_eq!(event["lease_id"], lease.as_str());
            assert_eq!(event["detail"]["issuer"], far.url(""));
            assert_eq!(event["detail"]["issued_to"], "sublet");
            assert!(event["detail"]["expires_at"].is_string());
        }
        world.holds_nowhere(TOKEN.as_bytes());
        world.holds_nowhere(SECRET.as_bytes());
        world.call(&["audit", "verify"]).ok();
    }
}

#[test]
fn it_is_revoked_whatever_the_status() {
    let far = Far::serve(issues);
    let (world, profile) = world(&oauth(&far, ""));
    world.leased_sh(&profile, &["env"], "exit 3").exits(3);
    assert_eq!(far.asked_at("/revoke").len(), 1);
    world.leased_sh(&profile, &["env"], "kill -9 $$").exits(137);
    assert_eq!(far.asked_at("/revoke").len(), 2);
    let lease = "--lease=test.use@svc.test,channel=env";
    world.run(&["--profile", &profile, lease, "--timeout", "1s", "--", "sleep", "60"]).exits(124);
    assert_eq!(far.asked_at("/revoke").len(), 3);
    world.run(&["--profile", &profile, lease, "--", "./not-there"]).exits(127);
    // One that is not started is not resolved, or what was minted for it is revoked.
    assert_eq!(far.asked_at("/token").len(), far.asked_at("/revoke").len());
}

/// A far side that behaves like this: a denial that names the host, its status, and nothing that it said.
#[track_caller]
fn refuses(does: impl Fn(&Asked) -> Does + Send + Sync + 'static, words: &[&str]) -> Far {
    let far = Far::serve(does);
    let (world, profile) = world(&oauth(&far, "timeout = \"3s\""));
    let outcome = world.leased_sh(&profile, &["env"], "echo it ran").exits(125);
    let host = format!("127.0.0.1:{}", far.port);
    for word in words.iter().chain(&["source_unavailable", &host]) {
        assert!(outcome.err().contains(word), "{word} is missing\n{outcome}");
    }
    assert_eq!(outcome.out(), "", "nothing ran");
    for leak in [TOKEN, SECRET, "far-side-words", "evil.test"] {
        assert!(!outcome.err().contains(leak), "{leak}\n{outcome}");
        world.holds_nowhere(leak.as_bytes());
    }
    far
}

#[test]
fn a_far_side_that_misbehaves_gets_nothing_delivered_and_nothing_leaked() {
    let html = "<html>far-side-words</html>";
    refuses(move |_| Does::Answers(200, "text/html", html.into()), &["no JSON", "200"]);
    refuses(move |_| Does::Answers(500, "text/html", html.into()), &["it failed", "500"]);
    refuses(
        |_| json(401, json!({"error": "invalid_client", "error_description": "far-side-words"})),
        &["refused", "401", "invalid_client"],
    );
    refuses(|_| json(400, json!({"error": "far-side-words"})), &["refused", "400"]);
    refuses(
        |_| Does::Says(b"HTTP/1.1 307 X\r\nLocation: http://evil.test/\r\n\r\n".to_vec()),
        &["redirect", "307"],
    );
    refuses(|_| json(200, json!({"token": "far-side-words"})), &["lacks"]);
    refuses(|_| json(200, json!({"access_token": ""})), &["lacks"]);
    refuses(|_| json(200, json!({"access_token": "far-side-words\r\nX: y"})), &["lacks"]);
    refuses(
        |_| Does::Answers(200, "application/json", "[\"far-side-words\"]".into()),
        &["no JSON"],
    );
    let cut = format!("{{\"access_token\": \"{TOKEN}");
    refuses(move |_| Does::Answers(200, "application/json", cut.clone()), &["no JSON"]);
    refuses(|_| json(200, json!({"access_token": "x".repeat(100_000)})), &["larger"]);
    refuses(|_| json(200, json!({"access_token": "x".repeat(1_000_000)})), &["larger"]);
    refuses(|_| Does::Says(Vec::new()), &["without a whole answer"]);
    refuses(|_| Does::Says(b"SSH-2.0-OpenSSH\r\n".to_vec()), &["without a whole answer"]);
    refuses(
        |_| Does::Says(b"HTTP/1.1 200 X\r\nContent-Length: 500\r\n\r\n{\"access_token\":".to_vec()),
        &["without a whole answer"],
    );
    let start = Instant::now();
    refuses(|_| Does::Hangs(Duration::from_secs(60)), &["did not answer in time"]);
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
}

#[test]
fn what_was_issued_and_is_not_taken_is_revoked_at_once() {
    let expired = |asked: &Asked| match asked.path.as_str() {
        "/token" => json(200, json!({"access_token": TOKEN, "expires_in": 0})),
        _ => json(200, json!({})),
    };
    let far = refuses(expired, &["expired already"]);
    assert_eq!(far.asked_at("/revoke").len(), 1);

    let far = Far::serve(|asked: &Asked| match asked.path.as_str() {
        "/token" => json(200, json!({"access_token": TOKEN, "scope": "read write admin"})),
        _ => json(200, json!({})),
    });
    let (world, profile) = world(&oauth(&far, "scope = \"read write\""));
    let outcome = world.leased_sh(&profile, &["env"], "echo it ran").exits(125);
    assert!(outcome.err().contains("can do more than was asked for"), "{outcome}");
    assert_eq!(far.asked_at("/revoke").len(), 1);
}

#[test]
fn nobody_listens_and_the_name_is_unknown() {
    let far = Far::serve(issues);
    let config = oauth(&far, "").replace(&format!(":{}", far.port), ":1");
    let (world, profile) = world(&config);
    let outcome = world.leased_sh(&profile, &["env"], "true").exits(125);
    assert!(outcome.err().contains("127.0.0.1:1: no connection could be made"), "{outcome}");
}

#[test]
fn of_several_leases_one_that_fails_denies_all_and_revokes_the_rest() {
    let far = Far::serve(issues);
    let broken = Far::serve(|_| json(503, json!({})));
    let other = oauth(&broken, "").replace("[secrets.s]", "[secrets.other]");
    let other = other.split("[secrets.client]").next().unwrap().replace("test.use", "other.use");
    let (world, _) = world(&format!("{}{other}", oauth(&far, "")));
    let more = leasing_profile("default", "").replace("extends = \"default\"\n", "");
    let more = more.replace("test.use", "other.use").replace("\"s\"", "\"other\"");
    let more = more.replace("\"TOKEN\"", "\"OTHER\"");
    let profile = world.profile("both", &format!("{}{more}", leasing_profile("default", "")));
    let leases =
        ["--lease=test.use@svc.test,channel=env", "--lease=other.use@svc.test,channel=env"];
    let outcome = world
        .run(&["--profile", &profile, leases[0], leases[1], "--", "echo", "it ran"])
        .denied("source_unavailable");
    assert_eq!(outcome.out(), "");
    assert_eq!(far.asked_at("/revoke").len(), 1, "what the other had minted");
    let told: Vec<Value> = of_mint(&world).iter().map(|e| e["type"].clone()).collect();
    assert_eq!(told, ["mint.issued", "mint.revoked"]);
}

#[test]
fn the_value_ends_before_its_lease_where_its_source_says_so() {
    let far = Far::serve(|asked: &Asked| match asked.path.as_str() {
        "/token" => json(200, json!({"access_token": TOKEN, "expires_in": 2})),
        _ => json(200, json!({})),
    });
    let (world, profile) = world(&oauth(&far, ""));
    let start = Instant::now();
    world.leased_sh(&profile, &["file"], "exec sleep 60").exits(137);
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
}

#[test]
fn a_revocation_that_fails_is_told_and_tried_again_by_the_next() {
    use std::sync::atomic::{AtomicBool, Ordering};
    static IS_UP: AtomicBool = AtomicBool::new(false);
    let far = Far::serve(|asked: &Asked| match asked.path.as_str() {
        "/revoke" if !IS_UP.load(Ordering::SeqCst) => json(503, json!({"error": "far-side-words"})),
        _ => issues(asked),
    });
    let (world, profile) = world(&oauth(&far, ""));
    world.leased_sh(&profile, &["env"], "true").ok();
    let told = of_mint(&world);
    assert_eq!(told.last().unwrap()["type"], "mint.revocation_failed", "{told:#?}");
    assert_eq!(told.last().unwrap()["detail"]["status"], 503);
    world.holds_nowhere(TOKEN.as_bytes());

    IS_UP.store(true, Ordering::SeqCst);
    // Not before its pause is over.
    world.run(&["--profile", &profile, "--", "true"]).ok();
    assert_eq!(far.asked_at("/revoke").len(), 1);
    std::thread::sleep(Duration::from_secs(6));
    world.run(&["--profile", &profile, "--", "true"]).ok();
    let revoked = far.asked_at("/revoke");
    assert_eq!(revoked.len(), 2);
    assert_eq!(revoked[1].fields("token"), [TOKEN]);
    assert_eq!(of_mint(&world).last().unwrap()["type"], "mint.revoked");
}

#[test]
fn after_a_kill_of_everything_the_next_start_revokes() {
    let far = Far::serve(issues);
    let (world, profile) = world(&oauth(&far, ""));
    let lease = "--lease=test.use@svc.test,channel=env";
    let mut running =
        world.spawn(&["--profile", &profile, lease, "--", "sh", "-c", "echo up; sleep 60"]);
    assert_eq!(running.read_line(), "up");
    let launcher = support::host::processes()
        .into_iter()
        .find(|p| p.parent == running.pid() && p.name == "sublet-launch")
        .expect("the launcher lives");
    // The child of a child of this test, found by its parent, and alive as long as that is.
    let pid = rustix::process::Pid::from_raw(launcher.pid.cast_signed()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    running.shoot();
    assert_eq!(far.asked_at("/revoke").len(), 0);
    world.run(&["--profile", &profile, "--", "true"]).ok();
    assert_eq!(far.asked_at("/revoke")[0].fields("token"), [TOKEN]);
    assert_eq!(of_mint(&world).last().unwrap()["type"], "mint.revoked");
    world.holds_nowhere(TOKEN.as_bytes());
}

#[test]
fn a_minter_has_less_than_any_other_process_of_sublet() {
    let far = Far::serve(|_| Does::Hangs(Duration::from_secs(20)));
    let (world, profile) = world(&oauth(&far, "timeout = \"5s\""));
    let lease = "--lease=test.use@svc.test,channel=env";
    let mut running = world.spawn(&["--profile", &profile, lease, "--", "true"]);
    let found = || {
        let launcher = support::host::processes()
            .into_iter()
            .find(|p| p.parent == running.pid() && p.name == "sublet-launch")?;
        let is_minter = |p: &support::host::Process| {
            let line = std::fs::read(format!("/proc/{}/cmdline", p.pid)).unwrap_or_default();
            p.parent == launcher.pid && line == b"sublet\0mint\0"
        };
        support::host::processes().into_iter().find(is_minter)
    };
    let start = Instant::now();
    let minter = loop {
        // It has come as far as its question: all its walls stand.
        match found().filter(|_| !far.asked().is_empty()) {
            Some(minter) => break minter,
            None => assert!(start.elapsed() < Duration::from_secs(4), "no minter"),
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    let of = |file: &str| std::fs::read_to_string(format!("/proc/{}/{file}", minter.pid)).unwrap();
    let status = of("status");
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_once(':').unwrap().1.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
    };
    for name in ["Uid", "Gid"] {
        let ids = field(name);
        let id: u32 = ids[0].parse().unwrap();
        assert!(id >= 0x7000_0000 && ids.iter().all(|i| *i == ids[0]), "{name}: {ids:?}");
    }
    assert_eq!(field("Groups"), [String::new(); 0]);
    for name in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(field(name), ["0000000000000000"], "{name}");
    }
    assert_eq!((field("NoNewPrivs"), field("Seccomp")), (vec!["1".into()], vec!["2".into()]));
    assert_eq!(field("Threads"), ["1"]);
    assert_eq!(field("NSpid").len(), field("NSpid").len().max(2), "a pid namespace of its own");
    assert_eq!(of("environ"), "");
    // Undumpable: its /proc entries are root's.
    use std::os::unix::fs::MetadataExt;
    assert_eq!(std::fs::metadata(format!("/proc/{}/mem", minter.pid)).unwrap().uid(), 0);
    let names: Vec<String> = std::fs::read_dir(format!("/proc/{}/fd", minter.pid))
        .unwrap()
        .flatten()
        .filter_map(|fd| std::fs::read_link(fd.path()).ok())
        .map(|to| to.display().to_string())
        .collect();
    let known = ["/memfd:sublet-", "/dev/null", "socket:", "anon_inode:"];
    assert!(names.iter().all(|n| known.iter().any(|k| n.starts_with(k))), "{names:?}");
    running.finish().denied("source_unavailable");
    assert!(!std::path::Path::new(&format!("/proc/{}", minter.pid)).exists(), "and is gone");
}
