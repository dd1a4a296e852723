//! `source = "postgres-role"` against a real PostgreSQL server: a role that is there for the lease, with what
//! it is granted and no more, and gone with its sessions and its objects afterwards.
#![forbid(unsafe_code)]

mod support;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use support::postgres::Postgres;
use support::world::{finish, leasing_profile};
use support::{Outcome, World, needs};

const PASSWORD: &str = "the-password-of-the-one-who-makes-roles";

/// A server with a role `minter` that may make roles and is no superuser, and a role `readers`.
fn server() -> Postgres {
    needs("psql", "postgresql-client");
    let postgres = Postgres::start("a-database-password");
    postgres
        .psql(&format!(
            "create role minter login createrole password '{PASSWORD}'; create role readers; \
             create role keeper; grant readers, keeper to minter with admin option; \
             create table things (name text); insert into things values ('one'); \
             grant select on things to readers; grant create on schema public to readers, keeper"
        ))
        .ok();
    postgres
}

fn configure(world: &World, postgres: &Postgres, more: &str) -> String {
    world.configure(&format!(
        "[secrets.admin]\nsource = \"vault\"\nallow = []\n[secrets.s]\nsource = \"postgres-role\"\n\
         server = \"127.0.0.1:{}\"\ndatabase = \"postgres\"\nuser = \"minter\"\npassword = \"admin\"\n\
         grants = [\"readers\"]\nallow = [\"test.use@svc.test\"]\n{more}\n",
        postgres.port
    ));
    world.set_secret("admin", PASSWORD.as_bytes());
    let profile = leasing_profile("default", "");
    let net = "[network]\nmode = \"host\"\n[[capability]]\n";
    world.profile("pg", &profile.replacen("[[capability]]\n", net, 1))
}

const CLEAR: &str = "tls = \"disable\"";

fn roles(postgres: &Postgres) -> String {
    postgres.psql("select rolname from pg_roles where rolname like 'sublet%'").ok().line()
}

fn minted(world: &World) -> Vec<Value> {
    let trail = world.trail().into_iter();
    trail.filter(|e| e["type"].as_str().unwrap().starts_with("mint.")).collect()
}

fn leased(world: &World, profile: &str, script: &str) -> Outcome {
    world.leased_sh(profile, &["env"], script)
}

#[test]
fn a_role_lives_as_long_as_its_lease_and_can_what_it_is_granted() {
    let mut postgres = server();
    // Everything that the server is told goes to its log.
    postgres.stop();
    postgres.serve(&["log_statement=all", "log_connections=on", "log_line_prefix=%a "]);
    for world in World::each() {
        let profile = configure(&world, &postgres, CLEAR);
        let script = "psql \"$TOKEN\" -Atc 'select name from things' && \
                      psql \"$TOKEN\" -Atc 'select rolvaliduntil < now() + interval $$6 min$$, rolsuper, \
                      rolcreaterole from pg_roles where rolname = current_user' && \
                      psql \"$TOKEN\" -Atc 'delete from things' 2>/dev/null || echo refused; \
                      printf %s \"$TOKEN\" > uri";
        let outcome = leased(&world, &profile, script).ok();
        assert_eq!(outcome.out(), "one\nt|f|f\nrefused\n", "{outcome}");
        assert_eq!(roles(&postgres), "");

        let uri = fs::read_to_string(world.workspace.join("uri")).unwrap();
        let (role, password) = uri["postgresql://".len()..].split_once(':').unwrap();
        let password = password.split('@').next().unwrap();
        // The lease's id is in the role's name, and in what the server's log calls the session.
        let lease = outcome.report()["leases"][0]["lease_id"].as_str().unwrap();
        assert!(role.starts_with(&format!("sublet_{}", lease.replace('_', ""))), "{role}");
        let log = postgres.log();
        assert!(log.contains(&format!("sublet {lease} ")), "{log}");
        assert!(log.contains("SCRAM-SHA-256$4096:"), "{log}");
        assert!(
            !log.contains(password) && !log.contains(PASSWORD),
            "the server was told a password"
        );
        let events = minted(&world);
        let told = |e: &Value| e["type"].as_str().unwrap().to_owned();
        assert_eq!(events.iter().map(told).collect::<Vec<_>>(), ["mint.issued", "mint.revoked"]);
        for event in &events {
            assert_eq!(
                (&event["lease_id"], &event["detail"]["far_id"]),
                (&lease.into(), &role.into())
            );
        }
        assert_eq!(events[0]["detail"]["scope"], "readers");

        // What was carried out opens nothing any more, and is masked where it is printed, its parts too.
        let mut psql = Command::new("psql");
        psql.args(["-w", &uri, "-c", "select 1"]);
        assert_ne!(finish(psql, b"", None).status, Some(0));
        let printed = leased(
            &world,
            &profile,
            "echo \"$TOKEN\"; echo \"$TOKEN\" | cut -d: -f3 | cut -d@ -f1",
        );
        assert!(!printed.out().contains("postgresql:"), "{printed}");
        assert!(printed.ok().out().lines().nth(1).unwrap().len() != password.len());
    }
}

#[test]
fn sessions_and_objects_end_with_the_role() {
    let world = World::host();
    let postgres = server();
    for (more, expected) in [("", "0"), ("reassign_to = \"keeper\"", "1")] {
        let profile = configure(&world, &postgres, &format!("{CLEAR}\n{more}"));
        // A session outside of the sandbox, which its end does not reach.
        let script = "psql \"$TOKEN\" -qc 'create table made (a int)'; printf %s \"$TOKEN\" > uri; sync; \
                      echo ready; read go";
        let (mut command, _) = world.prepare(&[
            "--profile",
            &profile,
            "--lease=test.use@svc.test,channel=env",
            "--",
            "sh",
            "-c",
            script,
        ]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = [0; 6];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut line).unwrap();
        let uri = fs::read_to_string(world.workspace.join("uri")).unwrap();
        let mut outside = Command::new("psql");
        outside.args(["-w", &uri, "-c", "select 'began'; select pg_sleep(100)"]);
        outside.stdout(Stdio::null()).stderr(Stdio::null());
        let mut outside = outside.spawn().unwrap();
        let sessions = "select count(*) from pg_stat_activity where usename like 'sublet%'";
        support::host::eventually("the control: it is in", || {
            postgres.psql(sessions).line() == "1"
        });
        drop(child.stdin.take());
        let start = Instant::now();
        assert!(child.wait().unwrap().code().is_some());
        assert!(!outside.wait().unwrap().success());
        assert!(start.elapsed() < Duration::from_secs(30), "the session went on");
        assert_eq!(roles(&postgres), "");
        let left = "select count(*) from pg_class where relname = 'made'";
        assert_eq!(postgres.psql(left).ok().line(), expected);
    }
}

#[test]
fn a_role_that_could_not_be_dropped_is_dropped_later() {
    let world = World::host();
    let mut postgres = server();
    let profile = configure(&world, &postgres, CLEAR);
    let script = "echo ready; read go";
    let (mut command, _) = world.prepare(&[
        "--profile",
        &profile,
        "--lease=test.use@svc.test,channel=env",
        "--",
        "sh",
        "-c",
        script,
    ]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = [0; 6];
    std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut line).unwrap();
    assert_ne!(roles(&postgres), "");
    postgres.stop();
    drop(child.stdin.take());
    child.wait().unwrap();
    let last = minted(&world).pop().unwrap();
    assert_eq!(
        (last["type"].as_str(), last["reason"].as_str()),
        (Some("mint.revocation_failed"), Some("unreachable"))
    );
    postgres.serve(&[]);
    assert_ne!(roles(&postgres), "", "the control");
    // Not before the pause is over.
    std::thread::sleep(Duration::from_secs(6));
    world.run(&["--", "true"]).ok();
    assert_eq!(roles(&postgres), "");
    assert_eq!(minted(&world).pop().unwrap()["type"], "mint.revoked");
}

/// A lease that is renewed takes its role along; one that is not ends as it was made to.
#[test]
fn the_role_of_a_renewed_lease_is_valid_for_longer() {
    let postgres = server();
    let each = [(World::host(), true), (World::host(), false), (World::developer(), true)];
    for (world, renewable) in each {
        configure(
            &world,
            &postgres,
            &format!(
                "{CLEAR}\n[leases]\nmax_ttl = \"40s\"\nauto_renew = true\nrenew_before_expiry = \"3s\"\n"
            ),
        );
        let text =
            leasing_profile("default", &format!("renewable = {renewable}\non_revoke = \"wipe\""));
        let text = text.replace("ttl = \"10m\"", "ttl = \"6s\"");
        let net = "[network]\nmode = \"host\"\n[[capability]]\n";
        let profile = world.profile("pg", &text.replacen("[[capability]]\n", net, 1));
        // Each a login of its own, which `VALID UNTIL` lets in or does not.
        let script = "uri=$(cat $TOKEN_FILE); ask() { psql -w \"$uri\" -Atc 'select extract(epoch from \
                      rolvaliduntil)::int from pg_roles where rolname = current_user' 2>&1; }; \
                      ask; sleep 8; ask; wc -c < $TOKEN_FILE; tr -d '\\0' < $TOKEN_FILE | wc -c";
        let outcome = world.leased_sh(&profile, &["file"], script).ok();
        let lines: Vec<String> = outcome.out().lines().map(str::to_owned).collect();
        let events = minted(&world);
        let kinds: Vec<&str> = events.iter().map(|e| e["type"].as_str().unwrap()).collect();
        if renewable {
            let until = |line: &String| line.parse::<i64>().unwrap_or_else(|_| panic!("{outcome}"));
            assert!(until(&lines[1]) >= until(&lines[0]) + 3, "{outcome}");
            assert_ne!(lines[3], "0", "the delivery stays with it\n{outcome}");
            assert_eq!(
                (kinds[0], kinds[1], kinds[kinds.len() - 1]),
                ("mint.issued", "mint.renewed", "mint.revoked")
            );
            assert_eq!(events[1]["outcome"], "renewed", "{events:?}");
            assert!(
                events[1]["detail"]["expires_at"].as_str()
                    > events[0]["detail"]["expires_at"].as_str()
            );
        } else {
            assert!(lines[1].contains("password authentication failed"), "{outcome}");
            assert_eq!(lines.last().unwrap(), "0", "{outcome}");
            assert_eq!(kinds[kinds.len() - 2..], ["mint.issued", "mint.revoked"]);
        }
        assert_eq!(roles(&postgres), "");
    }
}

#[test]
fn without_the_server_or_its_trust_there_is_no_lease_and_no_word_of_a_password() {
    let world = World::host();
    let mut postgres = server();
    let profile = configure(&world, &postgres, CLEAR);
    let denied = |why: &str| {
        let denied = leased(&world, &profile, "echo ran").denied("source_unavailable");
        assert!(denied.err().contains(why), "expected {why}\n{denied}");
        denied.never_says(PASSWORD).never_says("ran");
    };
    leased(&world, &profile, "true").ok();
    // Another password.
    world.set_secret("admin", b"wrong-password");
    denied("28P01");
    world.set_secret("admin", PASSWORD.as_bytes());
    // Asked for it in the clear, it says nothing.
    postgres.file(
        "data/pg_hba.conf",
        b"local all all trust\nhost all minter all password\nhost all all all scram-sha-256\n",
    );
    postgres.psql("select pg_reload_conf()").ok();
    std::thread::sleep(Duration::from_millis(300));
    denied("refused");
    postgres.stop();
    denied("no connection");
    // TLS is spoken unless it is this machine itself, and only with who is trusted.
    postgres.file("data/pg_hba.conf", b"host all all all scram-sha-256\n");
    let (key, certificate) = (world.path("tls.key"), world.path("tls.crt"));
    needs("openssl", "openssl");
    let mut make = Command::new("openssl");
    make.args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]);
    make.args(["-days", "2", "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]);
    make.args(["-addext", "basicConstraints=critical,CA:FALSE"]);
    finish(
        {
            make.arg("-keyout").arg(&key).arg("-out").arg(&certificate);
            make
        },
        b"",
        None,
    )
    .ok();
    postgres.file("server.key", &fs::read(&key).unwrap());
    postgres.file("server.crt", &fs::read(&certificate).unwrap());
    fs::set_permissions(&certificate, fs::Permissions::from_mode(0o644)).unwrap();
    let files =
        ["key", "crt"].map(|end| postgres.path(&format!("server.{end}")).display().to_string());
    let settings = [
        "ssl=on".to_owned(),
        format!("ssl_key_file={}", files[0]),
        format!("ssl_cert_file={}", files[1]),
    ];
    postgres.serve(&settings.each_ref().map(String::as_str));
    configure(&world, &postgres, "");
    denied("not one that this host trusts");
    configure(&world, &postgres, &format!("ca_file = \"{}\"", certificate.display()));
    leased(&world, &profile, "case $TOKEN in *sslmode=verify-full) ;; *) exit 1;; esac").ok();
    postgres.stop();
    postgres.serve(&[]);
    denied("TLS");
    assert_eq!(roles(&postgres), "");
    for (bad, at) in [
        ("grants = []", "grants"),
        ("grants = [\"a\\\"; drop\"]", "grants"),
        ("tls = \"maybe\"", "tls"),
    ] {
        world.configure(&format!(
            "[secrets.admin]\nsource = \"vault\"\nallow = []\n[secrets.s]\nsource = \"postgres-role\"\n\
             server = \"db\"\ndatabase = \"d\"\nuser = \"u\"\npassword = \"admin\"\n\
             allow = [\"test.use@svc.test\"]\n{}{bad}\n",
            if bad.starts_with("grants") { "" } else { "grants = [\"x\"]\n" }
        ));
        let refused = leased(&world, &profile, "true").exits(125);
        assert!(refused.err().contains(at), "{bad}\n{refused}");
    }
}
