//! Workload identities: the issuer and its keys, the token inside, and the libraries of three clouds that
//! trade it, against endpoints that verify it with PyJWT by what the issuer publishes.
#![forbid(unsafe_code)]

mod support;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::host::{Process, eventually};
use support::issuer::Issuer;
use support::leak::Accomplice;
use support::world::finish;
use support::{World, broker, needs, venv};

const TOKEN: &str = "/var/run/secrets/sublet/azure-identity/token";
const ISSUER: &str = "https://id.example.com/host-1";

/// A profile whose capability `cloud.use` for `cloud.test` is a token; `more` goes to the audience.
fn profile(world: &World, more: &str) -> String {
    world.profile("cloud", &text("default", "", more))
}

fn text(extends: &str, capability: &str, audience: &str) -> String {
    format!(
        "extends = \"{extends}\"\n[[capability]]\nname = \"cloud.use\"\nchannels = [\"token\"]\n\
         ttl = \"30m\"\nuses = 5\ncommand = [[\"**\"]]\n{capability}\n[[capability.audience]]\n\
         host = \"cloud.test\"\n{audience}\n"
    )
}

fn with_issuer(world: &World, url: &str, more: &str) {
    world.configure(&format!("[issuer]\nallow = [\"cloud.use@cloud.test\"]\n{more}\n"));
    world.call(&["issuer", "init", "--url", url]).ok();
}

/// `sublet run` with the lease, for a shell.
fn leased(world: &World, profile: &str, options: &str, script: &str) -> support::Outcome {
    let lease = format!("--lease=cloud.use@cloud.test{options}");
    world.run(&["--profile", profile, &lease, "--", "sh", "-c", script])
}

/// Has the exec carry its token out, which it may: by its workspace. What it prints is masked, in base64 too.
fn carried_out(world: &World, profile: &str, options: &str) -> (String, support::Outcome) {
    let outcome = leased(world, profile, options, &format!("cat {TOKEN} > token.txt")).ok();
    (fs::read_to_string(world.workspace.join("token.txt")).unwrap(), outcome)
}

/// Header and claims, as PyJWT verifies them by the published key set.
fn verified(world: &World, token: &str, issuer: &str, audience: &str) -> Value {
    let published = world.path("published");
    world.call(&["issuer", "publish", "--out", published.to_str().unwrap()]).ok();
    let mut verify = Command::new(venv::identity().join("bin/python"));
    verify.arg(venv::script("verify.py")).arg(&published).args([issuer, audience]);
    finish(verify, token.as_bytes(), None).ok().json()
}

#[test]
fn without_an_issuer_there_is_no_identity() {
    for world in World::each() {
        world.configure("[issuer]\nallow = [\"cloud.use@cloud.test\"]\n");
        let profile = profile(&world, "");
        let denied = leased(&world, &profile, "", "true").denied("identity_not_configured");
        assert!(denied.err().contains("sublet issuer init"), "{denied}");
        world.call(&["issuer", "list"]).exits(1);
        // The allow twin.
        world.call(&["issuer", "init", "--url", ISSUER]).ok();
        leased(&world, &profile, "", "true").ok();
        world.call(&["issuer", "init", "--url", ISSUER]).exits(1);
    }
}

#[test]
fn the_host_says_who_may_have_a_token() {
    let world = World::developer();
    with_issuer(&world, ISSUER, "");
    let profile = profile(&world, "");
    leased(&world, &profile, "", "true").ok();
    for allow in ["", "allow = [\"cloud.use@other.test\"]"] {
        world.configure(&format!("[issuer]\n{allow}\n"));
        leased(&world, &profile, "", "true").denied("secret_not_allowed");
    }
    // One that names a secret is bound by that secret's list, whatever its source.
    let named = world.profile("named", &text("default", "", "secret = \"s\""));
    leased(&world, &named, "", "true").denied("secret_not_allowed");
    world.configure(&support::world::vault_secret("s", "cloud.use@cloud.test"));
    leased(&world, &named, "", "true").ok();
}

#[test]
fn a_token_says_who_for_whom_and_for_how_long() {
    for world in World::each() {
        with_issuer(&world, ISSUER, "");
        let profile = profile(&world, "");
        let (token, outcome) = carried_out(&world, &profile, ",ttl=30m");
        let told = verified(&world, &token, ISSUER, "api://AzureADTokenExchange");
        let (header, claims) = (&told["header"], &told["claims"]);
        assert_eq!((header["alg"].as_str(), header["typ"].as_str()), (Some("RS256"), Some("JWT")));
        let lease = &outcome.report()["leases"][0];
        assert_eq!(claims["jti"], lease["lease_id"]);
        assert_eq!(claims["sublet"]["exec_id"], outcome.report()["exec_id"]);
        assert_eq!(claims["sublet"]["run_id"], outcome.report()["run_id"]);
        assert_eq!(claims["sub"], format!("sublet:profile:{profile}:agent:sublet-run"));
        assert_eq!(claims["act"]["sub"], "sublet-run");
        let life = claims["exp"].as_i64().unwrap() - claims["iat"].as_i64().unwrap();
        assert_eq!(life, 900);
        // The subject that one registers is the one that comes.
        let show = ["--json", "issuer", "show", "--profile", &profile];
        assert_eq!(world.call(&show).ok().json()["subject"], claims["sub"]);
        // A token does not outlive its lease.
        let (token, _) = carried_out(&world, &profile, ",ttl=2m");
        let claims = &verified(&world, &token, ISSUER, "api://AzureADTokenExchange")["claims"];
        let life = claims["exp"].as_i64().unwrap() - claims["iat"].as_i64().unwrap();
        assert!((118..=120).contains(&life), "{life}");
        assert_eq!(claims["sub"], format!("sublet:profile:{profile}:agent:sublet-run"));
    }
}

#[test]
fn a_token_is_a_file_of_the_one_exec_and_never_a_variable() {
    for world in World::each() {
        with_issuer(&world, ISSUER, "");
        let more = "[capability.audience.identity]\nkind = \"azure\"\nclient_id = \"the-client\"\n\
                    tenant_id = \"the-tenant\"\n";
        let profile = profile(&world, more);
        let script = format!(
            "stat -Lc '%A %U' {TOKEN}; (echo x > {TOKEN}) 2>/dev/null || echo closed; \
             (mv {TOKEN} /tmp/x) 2>/dev/null || echo kept; \
             head=$(cut -c1-40 {TOKEN}); env | grep -qF \"$head\" && echo in the environment; \
             env | grep ^AZURE | sort; cat {TOKEN}"
        );
        let outcome = leased(&world, &profile, "", &script).ok();
        let expected = format!(
            "-r-------- agent\nclosed\nkept\nAZURE_AUTHORITY_HOST=https://login.microsoftonline.com/\n\
             AZURE_CLIENT_ID=the-client\nAZURE_FEDERATED_TOKEN_FILE={TOKEN}\nAZURE_TENANT_ID=the-tenant\n"
        );
        assert!(outcome.out().starts_with(&expected), "{outcome}");
        // It is masked in what is printed.
        assert!(!outcome.out().contains("eyJ"), "{outcome}");
        assert_eq!(outcome.report()["scrubbed"][0]["wiped"], true);
        assert_eq!(outcome.report()["scrubbed"][0]["channel"], "token");
        // Another exec of the same profile finds none, and nobody else sets what points at one.
        world.sh(&profile, &format!("test -e {TOKEN} && echo there; env")).never_says("AZURE");
        for name in ["AZURE_FEDERATED_TOKEN", "AZURE_CLIENT_ID", "AWS_ROLE_SESSION_NAME"] {
            let flag = format!("--env={name}=x");
            world.run(&["--profile", &profile, &flag, "--", "true"]).fails_naming(&[name]);
        }
        world.holds_nowhere(b"eyJhbGciOiJSUzI1NiIs");
    }
}

#[test]
fn a_token_is_replaced_in_one_step_while_its_exec_lives_and_every_version_is_wiped() {
    let world = World::host().with_probe();
    // Half of its life is five seconds.
    with_issuer(&world, ISSUER, "token_ttl = \"10s\"");
    let profile = profile(&world, "");
    let accomplice = Accomplice::at(&world, "sock");
    // Each version passes out of the sandbox. A reader that opens it again and again has one or the other,
    // whole: three parts, and never a zero.
    let script = format!(
        "./probe leak-fd 4 sock 4<{TOKEN} >/dev/null; first=$(cksum < {TOKEN}); end=$(($(date +%s) + 7)); \
         while [ $(date +%s) -lt $end ]; do \
           tr -d '\\0' < {TOKEN} | awk -F. 'NF != 3 || length($3) != 342 {{ print \"torn\" }}'; done; \
         ./probe leak-fd 4 sock 4<{TOKEN} >/dev/null; [ \"$first\" = \"$(cksum < {TOKEN})\" ] || echo another; \
         ls -A $(dirname {TOKEN})"
    );
    let lease = "--lease=cloud.use@cloud.test,ttl=30m";
    let mut running = world.spawn(&["--profile", &profile, lease, "--", "sh", "-c", &script]);
    let (mut versions, start) = (Vec::new(), Instant::now());
    while versions.len() < 2 {
        versions.extend(accomplice.poll());
        assert!(start.elapsed() < Duration::from_secs(60), "no second version");
        std::thread::sleep(Duration::from_millis(5));
    }
    let read = |file: &fs::File| {
        let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    };
    running.finish().ok().prints("another\ntoken\n");
    for version in &versions {
        let bytes = read(version);
        assert!(bytes.len() > 500 && bytes.iter().all(|b| *b == 0), "a version is left");
    }
}

#[test]
fn a_broker_replaces_too_and_a_revocation_wipes_what_stands_there() {
    let world = World::host().with_probe();
    let config = "[issuer]\nallow = [\"cloud.use@cloud.test\"]\ntoken_ttl = \"10s\"\n";
    let wipe = text("default", "on_revoke = \"wipe\"", "");
    broker::host(&world, config, &[("cloud", &wipe)]);
    let broker = broker::serve(&world);
    let run = broker.start_run("cloud");
    let flag = "cloud.use@cloud.test,ttl=30m";
    let request = ["--json", "lease", "request", flag, "--run", &run.id];
    // Off until it is made, also under a broker that serves already.
    let refused = broker.call(&request).exits(1);
    assert!(refused.err().contains("identity_not_configured"), "{refused}");
    broker.call(&["issuer", "init", "--url", ISSUER]).ok();
    let lease = broker.call(&request).ok().json();
    let lease_id = lease["lease_id"].as_str().unwrap().to_owned();
    assert_eq!(lease["delivery"], json!({"kind": "token", "path": TOKEN}));

    let script = format!(
        "first=$(cksum < {TOKEN}); for i in $(seq 100); do sleep 0.1; \
         [ \"$first\" = \"$(cksum < {TOKEN})\" ] || break; done; \
         [ $i -lt 100 ] && echo replaced; exec 4<{TOKEN}; \
         for i in $(seq 100); do [ $(head -c 1 {TOKEN}) = e ] || break; sleep 0.1; done; \
         tr -d '\\0' < {TOKEN} | wc -c; tr -d '\\0' <&4 | wc -c"
    );
    let report = world.path("reports/revoked.json");
    let mut exec = run.prepare(&report, &["--lease", &lease_id, "--", "sh", "-c", &script]);
    let mut child = exec.stdout(Stdio::piped()).spawn().unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    out.read_line(&mut line).unwrap();
    assert_eq!(line, "replaced\n");
    broker.call(&["lease", "revoke", &lease_id, "--reason", "test"]).ok();
    let mut rest = String::new();
    out.read_to_string(&mut rest).unwrap();
    child.wait().unwrap();
    assert_eq!(rest, "0\n0\n");
}

#[test]
fn rotation_overlaps_and_the_old_key_verifies_meanwhile() {
    let world = World::developer();
    with_issuer(&world, ISSUER, "");
    let profile = profile(&world, "");
    let token = |world: &World| carried_out(world, &profile, "").0;
    let aud = "api://AzureADTokenExchange";
    let before = token(&world);
    let keys = world.call(&["--json", "issuer", "rotate", "--lead", "2s"]).ok().json_lines();
    assert_eq!(keys.len(), 2);
    assert_eq!((&keys[0]["state"], &keys[1]["state"]), (&json!("signing"), &json!("coming")));
    let kid = |told: &Value| told["header"]["kid"].as_str().unwrap().to_owned();
    assert_eq!(kid(&verified(&world, &token(&world), ISSUER, aud)), keys[0]["kid"]);
    std::thread::sleep(Duration::from_secs(2));
    let listed = world.call(&["--json", "issuer", "list"]).ok().json_lines();
    assert_eq!((&listed[0]["state"], &listed[1]["state"]), (&json!("leaving"), &json!("signing")));
    assert_eq!(kid(&verified(&world, &token(&world), ISSUER, aud)), keys[1]["kid"]);
    assert_eq!(kid(&verified(&world, &before, ISSUER, aud)), keys[0]["kid"]);

    // Withdrawn, neither is published any more.
    let keys = world.call(&["--json", "issuer", "rotate", "--withdraw"]).ok().json_lines();
    assert_eq!(keys.len(), 1);
    let published: Value =
        serde_json::from_slice(&fs::read(world.path("published/.well-known/jwks.json")).unwrap())
            .unwrap();
    assert_eq!(published["keys"].as_array().unwrap().len(), 2);
    verified(&world, &token(&world), ISSUER, aud);
    let published: Value =
        serde_json::from_slice(&fs::read(world.path("published/.well-known/jwks.json")).unwrap())
            .unwrap();
    let names: Vec<&str> = published["keys"][0].as_object().unwrap().keys().map(|k| &**k).collect();
    assert_eq!(names, ["alg", "e", "kid", "kty", "n", "use"], "and nothing private");
    assert_eq!(published["keys"].as_array().unwrap().len(), 1);
    let discovery: Value = serde_json::from_slice(
        &fs::read(world.path("published/.well-known/openid-configuration")).unwrap(),
    )
    .unwrap();
    assert_eq!(
        discovery,
        json!({
            "issuer": ISSUER,
            "jwks_uri": format!("{ISSUER}/.well-known/jwks.json"),
            "response_types_supported": ["id_token"],
            "subject_types_supported": ["public"],
            "id_token_signing_alg_values_supported": ["RS256"],
        })
    );
}

/// Who made, rotated and withdrew keys is in the trail before it takes effect.
#[test]
fn what_changes_the_issuer_is_recorded_before_it_takes_effect() {
    for world in World::each() {
        let issuer_events = || -> Vec<Value> {
            let is_issuer = |e: &Value| e["type"].as_str().unwrap().starts_with("issuer.");
            world.trail().into_iter().filter(is_issuer).collect()
        };
        let change =
            |args: &[&str]| world.call(&[&["--json", "issuer"], args].concat()).ok().json_lines();
        let kids =
            |keys: &[Value]| -> Vec<Value> { keys.iter().map(|k| k["kid"].clone()).collect() };
        world.call(&["issuer", "rotate"]).exits(1);
        assert!(!world.state().exists(), "what is not there is not made by a refusal");
        let made = change(&["init", "--url", ISSUER]);
        let rotated = change(&["rotate", "--lead", "1h"]);
        let withdrawn = change(&["rotate", "--withdraw"]);
        let told = issuer_events();
        let types: Vec<&str> = told.iter().map(|e| e["type"].as_str().unwrap()).collect();
        assert_eq!(types, ["issuer.initialised", "issuer.rotated", "issuer.withdrawn"]);
        let who =
            if world.invoker == 0 { "root".to_owned() } else { format!("uid:{}", world.invoker) };
        for event in &told {
            assert_eq!(
                (&event["principal"], &event["detail"]["issuer"]),
                (&json!(who), &json!(ISSUER))
            );
        }
        let of = |nth: usize, member: &str| told[nth]["detail"][member].clone();
        assert_eq!(of(0, "kid"), made[0]["kid"]);
        assert_eq!(
            (of(1, "kid"), of(1, "signs_from")),
            (rotated[1]["kid"].clone(), rotated[1]["signs_from"].clone())
        );
        assert_eq!(of(2, "kid"), withdrawn[0]["kid"]);
        assert_eq!(of(2, "published_no_longer"), json!(kids(&rotated)));

        // One that is recorded and cannot take effect is told to have failed, and nothing has changed.
        let keys = world.state().join("keys");
        let private = || {
            fs::read_dir(&keys)
                .unwrap()
                .flatten()
                .filter(|f| f.file_name().to_string_lossy().ends_with(".key"))
                .count()
        };
        let before = private();
        fs::create_dir(keys.join(".issuer.json")).unwrap();
        world.call(&["issuer", "rotate"]).exits(2);
        fs::remove_dir(keys.join(".issuer.json")).unwrap();
        let told = issuer_events();
        assert_eq!(
            (told.len(), &told[4]["type"], &told[4]["outcome"]),
            (5, &json!("issuer.rotated"), &json!("failed"))
        );
        assert_eq!(told[3]["detail"]["kid"], told[4]["detail"]["kid"]);
        assert_eq!(private(), before);
        assert_eq!(kids(&change(&["list"])), kids(&withdrawn));
        world.call(&["audit", "verify"]).ok();
        let exported = world.call(&["audit", "export", "--format", "ocsf"]).ok().out();
        assert!(exported.contains("\"issuer.withdrawn\""), "{exported}");
    }
}

/// systemd's directory of credentials is root's: what the broker's user reads of it was opened before.
#[test]
fn a_key_that_is_a_credential_signs_and_none_lies_in_the_state() {
    use std::os::unix::fs::{PermissionsExt, chown};
    for world in World::each() {
        with_issuer(&world, ISSUER, "");
        let profile = profile(&world, "");
        let kid = world.call(&["--json", "issuer", "show"]).ok().json()["kid"].clone();
        let kid = kid.as_str().unwrap().to_owned();
        let credentials = world.path("credentials");
        fs::create_dir(&credentials).unwrap();
        let given = credentials.join(format!("sublet-issuer-{kid}"));
        fs::rename(world.state().join(format!("keys/issuer-{kid}.key")), &given).unwrap();
        fs::set_permissions(&given, fs::Permissions::from_mode(0o400)).unwrap();
        fs::set_permissions(&credentials, fs::Permissions::from_mode(0o500)).unwrap();
        chown(&credentials, Some(world.invoker), None).unwrap();
        leased(&world, &profile, "", "true").denied("source_unavailable");
        let script = format!("cat {TOKEN} > token.txt");
        let (mut run, report) = world.prepare(&[
            "--profile",
            &profile,
            "--lease=cloud.use@cloud.test",
            "--",
            "sh",
            "-c",
            &script,
        ]);
        run.env("CREDENTIALS_DIRECTORY", &credentials);
        finish(run, b"", Some(&report)).ok();
        let token = fs::read_to_string(world.workspace.join("token.txt")).unwrap();
        let told = verified(&world, &token, ISSUER, "api://AzureADTokenExchange");
        assert_eq!(told["header"]["kid"], kid.as_str());
        let report = world.call(&["doctor", "--json"]).json();
        let checks = report["checks"].as_array().unwrap();
        let keys = checks.iter().find(|check| check["name"] == "issuer_keys").unwrap();
        assert_eq!(keys["status"], "warn", "{keys}");
        if world.invoker != 0 {
            continue;
        }
        broker::host(
            &world,
            "[issuer]\nallow = [\"cloud.use@cloud.test\"]\n",
            &[("cloud", &text("default", "", ""))],
        );
        let environment = [("CREDENTIALS_DIRECTORY", credentials.to_str().unwrap())];
        let way = broker::Way { environment: &environment, ..broker::Way::default() };
        let broker = broker::serve_as(&world, way);
        let run = broker.start_run("cloud");
        let request = ["--json", "lease", "request", "cloud.use@cloud.test", "--run", &run.id];
        let lease = broker.call(&request).ok().json()["lease_id"].as_str().unwrap().to_owned();
        run.exec(&[
            "--lease",
            &lease,
            "--",
            "sh",
            "-c",
            &format!("[ $(wc -c < {TOKEN}) -gt 500 ]"),
        ])
        .ok();
        let file = format!("issuer-{kid}.key");
        assert!(!world.state().join("keys").join(file).exists(), "and none was made");
    }
}

#[test]
fn doctor_judges_the_issuer_its_keys_and_what_is_published_of_it() {
    for world in World::each() {
        let out = world.path("home/www");
        let config = format!(
            "[secrets.s]\nsource = \"jwt\"\nallow = [\"test.use@svc.test\"]\n[issuer]\npublish = \"{}\"\n",
            out.display()
        );
        #[track_caller]
        fn check(world: &World, name: &str, status: Option<&str>, word: &str) {
            let report = world.call(&["doctor", "--json"]).json();
            let check = report["checks"].as_array().unwrap().iter().find(|c| c["name"] == name);
            assert_eq!(check.map(|c| c["status"].as_str().unwrap()), status, "{check:?}");
            assert!(check.is_none_or(|c| c["found"].as_str().unwrap().contains(word)), "{check:?}");
        }
        check(&world, "issuer", None, "");
        world.configure(&config);
        check(&world, "issuer", Some("warn"), "[secrets.s]");
        world.call(&["issuer", "init", "--url", ISSUER]).ok();
        check(&world, "issuer", Some("ok"), ISSUER);
        check(&world, "issuer_keys", Some("ok"), "1 of mode 0600");
        check(&world, "issuer_published", Some("fail"), "No such file");
        world.call(&["issuer", "publish"]).ok();
        check(&world, "issuer_published", Some("ok"), "1 keys");
        world.call(&["issuer", "rotate"]).ok();
        check(&world, "issuer_published", Some("warn"), "not published yet");
        world.call(&["issuer", "publish"]).ok();
        check(&world, "issuer_published", Some("ok"), "2 keys");
        world.call(&["issuer", "rotate", "--withdraw"]).ok();
        check(&world, "issuer_published", Some("fail"), "no key of this issuer any more");
        world.call(&["issuer", "publish"]).ok();
        fs::write(out.join(".well-known/openid-configuration"), "{}").unwrap();
        check(&world, "issuer_published", Some("fail"), "another issuer's");
        world.call(&["issuer", "publish"]).ok();
        check(&world, "issuer_published", Some("ok"), "1 keys");

        // What it says of a key is what a lease meets.
        let profile = world.profile("jwt", &support::world::leasing_profile("default", ""));
        world.leased_sh(&profile, &["env"], "true").ok();
        let kid = world.call(&["--json", "issuer", "show"]).ok().json()["kid"].clone();
        let key = world.state().join(format!("keys/issuer-{}.key", kid.as_str().unwrap()));
        let mode = |mode| {
            let mode = std::os::unix::fs::PermissionsExt::from_mode(mode);
            fs::set_permissions(&key, mode).unwrap();
        };
        mode(0o640);
        check(&world, "issuer_keys", Some("fail"), "mode 0640");
        world.leased_sh(&profile, &["env"], "true").denied("source_unavailable");
        mode(0o600);
        check(&world, "issuer_keys", Some("ok"), "");
        world.configure("");
        world.call(&["issuer", "publish"]).exits(2);
    }
}

#[test]
fn a_jwt_source_says_what_the_lease_is_good_for() {
    for world in World::each() {
        let pair = "test.use@svc.test";
        let config =
            |more: &str| format!("[secrets.s]\nsource = \"jwt\"\nallow = [\"{pair}\"]\n{more}\n");
        world.configure(&config("audience = \"https://svc.test\"\nclaims = { team = \"x\" }"));
        let constraints = "constraints = { action = \"push\", resource = \"acme/insights\", \
                           branch = \"main\", type = \"git\" }";
        let profile =
            world.profile("jwt", &support::world::leasing_profile("default", constraints));
        let script = "printf %s \"$TOKEN\" > token.txt";
        world.leased_sh(&profile, &["env"], script).denied("identity_not_configured");
        world.call(&["issuer", "init", "--url", ISSUER]).ok();
        let outcome = world.leased_sh(&profile, &["env"], script).ok();
        let token = fs::read_to_string(world.workspace.join("token.txt")).unwrap();
        let claims = verified(&world, &token, ISSUER, "https://svc.test")["claims"].clone();
        assert_eq!(claims["jti"], outcome.report()["leases"][0]["lease_id"]);
        assert_eq!(
            (&claims["action"], &claims["resource"]),
            (&json!("push"), &json!("acme/insights"))
        );
        assert_eq!(
            claims["authorization_details"],
            json!([{
                "type": "git", "actions": ["push"], "identifier": "acme/insights",
                "locations": ["svc.test"], "branch": "main",
            }])
        );
        assert_eq!(claims["team"], "x");
        assert_eq!(claims["act"]["sub"], format!("sublet:profile:{profile}:agent:sublet-run"));
        assert_eq!(claims["exp"].as_i64().unwrap() - claims["iat"].as_i64().unwrap(), 60);
        // Masked like any value, and on every channel.
        let printed = world.leased_sh(&profile, &["file"], "cat $TOKEN_FILE").ok();
        assert!(!printed.out().contains("eyJ"), "{printed}");
        // No configuration speaks for sublet.
        for bad in
            ["claims = { sub = \"root\" }", "ttl = \"2h\"", "audience = \"a b\"", "path = \"/x\""]
        {
            world.configure(&config(bad));
            let refused = world.leased_sh(&profile, &["env"], "true").exits(125);
            assert!(refused.err().contains(":4:"), "line and column\n{refused}");
        }
    }
}

/// Seconds from when a minted value ended by itself until the trail said so.
fn told_after(expired: &Value) -> f64 {
    let time = |text: &Value| text.as_str().unwrap().parse::<jiff::Timestamp>().unwrap();
    let late = time(&expired["time"]).duration_since(time(&expired["detail"]["expires_at"]));
    late.as_secs_f64()
}

#[test]
fn the_end_of_a_minted_value_is_told_when_it_ends() {
    let config = "[secrets.s]\nsource = \"jwt\"\nallow = [\"test.use@svc.test\"]\nttl = \"2s\"\n";
    let expired = |trail: &[Value]| {
        let of = |kind: &str| trail.iter().find(|e| e["type"] == kind).cloned();
        of("mint.expired").map(|event| (event, of("exec.exited")))
    };
    for world in World::each() {
        world.configure(config);
        world.call(&["issuer", "init", "--url", ISSUER]).ok();
        let profile = world.profile("jwt", &support::world::leasing_profile("default", ""));
        // While its exec lives.
        world.leased_sh(&profile, &["env"], "sleep 4; [ ${#TOKEN} -gt 500 ]").ok();
        let (event, exited) = expired(&world.trail()).expect("it is told");
        assert!((0.0..1.0).contains(&told_after(&event)), "{event}");
        assert!(event["seq"].as_u64() < exited.unwrap()["seq"].as_u64(), "{event}");
        assert_eq!(world.trail().iter().filter(|e| e["type"] == "mint.expired").count(), 1);
    }
    // Afterwards, by a broker.
    let world = World::host();
    broker::host(&world, config, &[("jwt", &support::world::leasing_profile("default", ""))]);
    world.call(&["issuer", "init", "--url", ISSUER]).ok();
    let broker = broker::serve(&world);
    let run = broker.start_run("jwt");
    run.exec(&["--lease", &run.lease(",channel=env"), "--", "true"]).ok();
    assert!(expired(&broker.events(0)).is_none(), "the control: it has not ended with its exec");
    eventually("its end is told", || expired(&broker.events(0)).is_some());
    let (event, _) = expired(&broker.events(0)).unwrap();
    assert!((0.0..2.5).contains(&told_after(&event)), "{event}");
}

/// A process that ends with the test.
struct Kept(Child);

impl Drop for Kept {
    fn drop(&mut self) {
        // Ours and not yet reaped.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// `sublet issuer serve` for an issuer of its own, whose tokens the lease may have.
fn serving(world: &World, more: &str) -> Issuer {
    world.configure(&format!("[issuer]\nallow = [\"cloud.use@cloud.test\"]\n{more}\n"));
    Issuer::serve(world)
}

/// The endpoints of the clouds, and what they wrote.
struct Endpoint {
    _server: Kept,
    url: String,
    log: PathBuf,
    certificate: PathBuf,
}

fn endpoint(world: &World, issuer: &str, audience: &str) -> Endpoint {
    needs("openssl", "openssl");
    let (certificate, key) = (world.path("tls.crt"), world.path("tls.key"));
    let mut make = Command::new("openssl");
    make.args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]);
    make.args(["-days", "2", "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]);
    make.args(["-addext", "basicConstraints=critical,CA:FALSE"]);
    make.arg("-keyout").arg(&key).arg("-out").arg(&certificate);
    finish(make, b"", None).ok();
    let log = world.path("endpoint.log");
    fs::write(&log, "").unwrap();
    let mut server = Command::new(venv::identity().join("bin/python"));
    server.arg(venv::script("endpoint.py")).args([issuer, audience]).arg(&certificate).arg(&key);
    let mut child = server.arg(&log).stdout(Stdio::piped()).spawn().unwrap();
    let mut port = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut port).unwrap();
    let url = format!("https://127.0.0.1:{}", port.trim());
    Endpoint { _server: Kept(child), url, log, certificate }
}

impl Endpoint {
    /// What it was asked last, with the claims that it verified.
    #[track_caller]
    fn last(&self) -> Value {
        let log = fs::read_to_string(&self.log).unwrap();
        serde_json::from_str(log.lines().last().expect("nothing was asked")).unwrap()
    }
}

/// A client library, leased, on the host's network: it gets its cloud's token; without the lease, and at
/// an endpoint for another audience, it does not.
fn cloud(
    world: &World,
    script: &str,
    audience: &str,
    identity: impl Fn(&str) -> String,
    prints: &str,
) {
    let issuer = serving(world, "");
    for (expected, is_ours) in [(audience, true), ("api://somebody.else", false)] {
        let endpoint = endpoint(world, &issuer.url, expected);
        let (venv, code) = (venv::identity().display(), venv::script(script));
        let crt = endpoint.certificate.display();
        let network = format!(
            "extends = \"default\"\n[filesystem]\nread_only = [\"/usr\", \"-/bin\", \"-/lib\", \"-/lib64\", \
             \"-/etc/alternatives\", \"-/etc/ssl/certs\", \"-/etc/ssl/openssl.cnf\", \"{venv}\", \"{}\", \
             \"{crt}\"]\n[network]\nmode = \"host\"\n[environment.set]\nREQUESTS_CA_BUNDLE = \"{crt}\"\n\
             AWS_CA_BUNDLE = \"{crt}\"\nAWS_ENDPOINT_URL_STS = \"{}\"\nAWS_EC2_METADATA_DISABLED = \"true\"\n",
            code.display(),
            endpoint.url,
        );
        let base = text("default", "", &identity(&endpoint.url));
        let profile = world.profile("net", &base.replace("extends = \"default\"\n", &network));
        let python = format!("{venv}/bin/python");
        let code = code.to_str().unwrap().to_owned();
        let run = |lease: &[&str]| {
            let args =
                [&["--profile", &profile][..], lease, &["--", &python, "-B", &code]].concat();
            world.run(&args)
        };
        let outcome = run(&["--lease=cloud.use@cloud.test"]);
        if !is_ours {
            assert_ne!(outcome.status, Some(0), "another audience\n{outcome}");
            assert!(endpoint.last()["refused"].as_str().unwrap().contains("udience"), "{outcome}");
            continue;
        }
        let outcome = outcome.ok();
        assert_eq!(outcome.line(), prints, "{outcome}");
        let asked = endpoint.last();
        assert_eq!(asked["claims"]["jti"], outcome.report()["leases"][0]["lease_id"], "{asked}");
        if asked["form"]["Action"] == "AssumeRoleWithWebIdentity" {
            assert_eq!(asked["form"]["RoleSessionName"], outcome.report()["leases"][0]["lease_id"]);
        }
        let count = fs::read_to_string(&endpoint.log).unwrap().lines().count();
        let control = run(&[]);
        assert_ne!(control.status, Some(0), "{control}");
        assert_eq!(fs::read_to_string(&endpoint.log).unwrap().lines().count(), count, "{control}");
    }
}

#[test]
fn azure_identity_trades_the_token() {
    for world in World::each() {
        let identity = |url: &str| {
            format!(
                "identity = {{ kind = \"azure\", client_id = \"c-1\", tenant_id = \"t-1\", \
                 authority_host = \"{url}\" }}"
            )
        };
        cloud(
            &world,
            "azure_client.py",
            "api://AzureADTokenExchange",
            identity,
            "cloud-access-token",
        );
    }
}

#[test]
fn boto3_trades_the_token() {
    let world = World::host();
    let identity = |_: &str| {
        "identity = { kind = \"aws\", role_arn = \"arn:aws:iam::123456789012:role/agents\" }"
            .to_owned()
    };
    cloud(&world, "aws_client.py", "sts.amazonaws.com", identity, "ASIAFRESHFRESHFRESH1");
}

#[test]
fn google_auth_trades_the_token() {
    let world = World::host();
    let provider =
        "//iam.googleapis.com/projects/1/locations/global/workloadIdentityPools/p/providers/q";
    let identity = |url: &str| {
        format!(
            "identity = {{ kind = \"gcp\", provider = \"{provider}\", token_url = \"{url}/v1/token\" }}"
        )
    };
    cloud(&world, "gcp_client.py", &format!("https:{provider}"), identity, "cloud-access-token");
}

/// A source that mints is asked with a token of this host's own: nobody keeps a secret for it.
#[test]
fn a_source_is_asked_with_the_hosts_own_identity() {
    for world in World::each() {
        let issuer = serving(&world, "");
        let endpoint = endpoint(&world, &issuer.url, "https://login.test");
        let config = format!(
            "[secrets.me]\nsource = \"jwt\"\naudience = \"https://login.test\"\nallow = []\n\
             [secrets.s]\nsource = \"oauth\"\ntoken_url = \"{}/token\"\nclient_id = \"c\"\n\
             grant = \"token_exchange\"\nsubject_token = \"me\"\n\
             subject_token_type = \"urn:ietf:params:oauth:token-type:jwt\"\nca_file = \"{}\"\n\
             allow = [\"test.use@svc.test\"]\n",
            endpoint.url,
            endpoint.certificate.display()
        );
        world.configure(&config);
        let profile = world.profile("mint", &support::world::leasing_profile("default", ""));
        let check = "[ \"$TOKEN\" = cloud-access-token ] && echo traded";
        let outcome = world.leased_sh(&profile, &["env"], check).ok();
        assert_eq!(outcome.line(), "traded");
        let claims = endpoint.last()["claims"].clone();
        assert_eq!(claims["jti"], outcome.report()["leases"][0]["lease_id"]);
        assert_eq!(claims["sub"], format!("sublet:profile:{profile}:agent:sublet-run"));
        // What proves it is for no lease, and without an issuer there is none.
        let keys = world.state().join("keys");
        fs::rename(keys.join("issuer.json"), keys.join("away")).unwrap();
        world.leased_sh(&profile, &["env"], check).denied("identity_not_configured");
        fs::rename(keys.join("away"), keys.join("issuer.json")).unwrap();
        world.leased_sh(&profile, &["env"], check).ok();
        // A token proves no role but a token's.
        world.configure(
            &config.replace("subject_token =", "client_secret = \"me\"\nsubject_token ="),
        );
        let refused = world.leased_sh(&profile, &["env"], check).exits(125);
        assert!(refused.err().contains("`vault` or `file`"), "{refused}");
    }
}

#[test]
fn a_role_is_assumed_with_the_hosts_own_identity() {
    for world in World::each() {
        let issuer = serving(&world, "");
        let endpoint = endpoint(&world, &issuer.url, "sts.amazonaws.com");
        let config = |audience: &str| {
            format!(
                "[secrets.me]\nsource = \"jwt\"\naudience = \"{audience}\"\nallow = []\n\
                 [secrets.s]\nsource = \"aws-sts\"\nregion = \"eu-west-1\"\nendpoint = \"{}/\"\n\
                 role_arn = \"arn:aws:iam::123456789012:role/agents\"\nweb_identity_token = \"me\"\n\
                 policy = '{{\"Resource\":\"{{resource}}\"}}'\nca_file = \"{}\"\n\
                 allow = [\"test.use@svc.test\"]\n",
                endpoint.url,
                endpoint.certificate.display()
            )
        };
        world.configure(&config("sts.amazonaws.com"));
        let text =
            support::world::leasing_profile("default", "constraints = { resource = \"bucket-1\" }");
        let text = text.replace("variable = \"TOKEN\"", "variable = \"AWS\"\nformat = \"aws\"");
        let profile = world.profile("aws", &text.replace("\"memfd\", ", ""));
        let script =
            "echo $AWS_ACCESS_KEY_ID; echo ${#AWS_SECRET_ACCESS_KEY}; echo $AWS_SESSION_TOKEN";
        let outcome = world.leased_sh(&profile, &["env"], script).ok();
        assert_eq!(outcome.out(), "ASIAFRESHFRESHFRESH1\n34\n***\n", "{outcome}");
        let asked = endpoint.last();
        let lease = &outcome.report()["leases"][0]["lease_id"];
        assert_eq!((&asked["claims"]["jti"], &asked["form"]["RoleSessionName"]), (lease, lease));
        assert_eq!(asked["claims"]["sub"], format!("sublet:profile:{profile}:agent:sublet-run"));
        assert_eq!(asked["form"]["Policy"], "{\"Resource\":\"bucket-1\"}");
        let trail = world.trail();
        let issued = trail.iter().find(|e| e["type"] == "mint.issued").unwrap();
        let arn = format!("arn:aws:iam::123456789012:role/agents/{}", lease.as_str().unwrap());
        assert_eq!((&issued["detail"]["issued_to"], &issued["lease_id"]), (&json!(arn), lease));
        world.configure(&config("somebody.else"));
        world.leased_sh(&profile, &["env"], "true").denied("source_unavailable");
        assert!(endpoint.last()["refused"].as_str().unwrap().contains("udience"));
    }
}

fn get(url: &str, path: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(url.trim_start_matches("http://"))?;
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

#[test]
fn what_serves_the_documents_can_do_nothing_else_and_is_not_held_up() {
    for world in World::each() {
        let serve = serving(&world, "");
        let url = serve.url.clone();
        let jwks = "/.well-known/jwks.json";
        let first = get(&url, jwks).unwrap();
        assert!(first.starts_with("HTTP/1.1 200 OK\r\n"), "{first}");
        assert!(get(&url, "/.well-known/../../etc/passwd").unwrap().starts_with("HTTP/1.1 404"));

        // Who answers is another process, nobody's, without rights.
        let speaker = support::host::processes().into_iter().find(|p| p.parent == serve.pid());
        let speaker: Process = speaker.expect("the process that answers");
        let status = fs::read_to_string(format!("/proc/{}/status", speaker.pid)).unwrap();
        let field = |name: &str| {
            let line = status.lines().find(|line| line.starts_with(name)).unwrap();
            line.split_whitespace().nth(1).unwrap().to_owned()
        };
        let uid = if world.invoker == 0 { 65_534 } else { world.invoker };
        assert_eq!(field("Uid:"), uid.to_string());
        assert_eq!((field("NoNewPrivs:"), field("CapEff:")), ("1".into(), "0".repeat(16)));
        let open = fs::read_dir(format!("/proc/{}/fd", speaker.pid)).unwrap();
        let open = open.flatten().filter_map(|fd| fs::read_link(fd.path()).ok());
        assert!(
            !open.into_iter().any(|to| to.starts_with(world.state())),
            "it holds a file of the state"
        );

        // More idle clients than it serves at once.
        let idle: Vec<TcpStream> = (0..80)
            .map(|_| TcpStream::connect(url.trim_start_matches("http://")).unwrap())
            .collect();
        assert!(get(&url, jwks).unwrap().starts_with("HTTP/1.1 200"));
        drop(idle);

        // A new key is served without a start anew.
        world.call(&["issuer", "rotate"]).ok();
        eventually("the new key is served", || {
            get(&url, jwks).is_ok_and(|answer| answer.matches("\"kid\"").count() == 2)
        });
        drop(serve);
        eventually("both are gone", || {
            TcpStream::connect(url.trim_start_matches("http://")).is_err()
        });
    }
}

#[test]
fn the_service_account_is_one_by_the_api_of_kubernetes() {
    let world = World::developer();
    let args = ["issuer", "k8s", "--client-id", "c-1", "--tenant-id", "t-1", "--profile", "deploy"];
    let yaml = world.call(&args).ok().out();
    let both = world.call(&[&["--json"][..], &args].concat()).ok().json();
    let account = &both["service_account"];
    assert_eq!(account["automountServiceAccountToken"], false);
    let annotations = &account["metadata"]["annotations"];
    assert_eq!(annotations["azure.workload.identity/client-id"], "c-1");
    assert_eq!(annotations["azure.workload.identity/tenant-id"], "t-1");
    assert_eq!(world.call(&args).ok().out(), yaml, "the same each time");
    let name = account["metadata"]["name"].as_str().unwrap();
    assert!(yaml.contains(&format!("\"{name}\"")) && !yaml.contains("RoleBinding"), "{yaml}");
    // A pod made of the template, by the same schema.
    let mut pod = both["pod_template"].clone();
    assert_eq!(pod["metadata"]["labels"]["azure.workload.identity/use"], "true");
    pod["apiVersion"] = "v1".into();
    pod["kind"] = "Pod".into();
    pod["metadata"]["name"] = "host".into();
    pod["spec"]["containers"] = json!([{"name": "sublet", "image": "sublet"}]);
    let check = |text: String| {
        let path = world.path("object.yaml");
        fs::write(&path, text).unwrap();
        let mut validate = Command::new(venv::identity().join("bin/kubernetes-validate"));
        validate.arg("--strict").arg(&path);
        finish(validate, b"", None)
    };
    check(yaml.clone()).ok();
    check(account.to_string()).ok();
    check(pod.to_string()).ok();
    // The control: the schema does refuse.
    let wrong = check(yaml.replace("automountServiceAccountToken: false", "automount: 7"));
    assert_ne!(wrong.status, Some(0), "{wrong}");
}
