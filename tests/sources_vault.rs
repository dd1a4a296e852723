//! `vault-server` against a real `rusty_vault`: AppRole and KV v1; and against a test server written from
//! OpenBao's published API, for what that one lacks: KV v2, a dynamic engine with leases that are renewed and
//! revoked, JWT logins.
#![forbid(unsafe_code)]

mod support;

use serde_json::{Value, json};
use support::issuer::Issuer;
use support::rusty_vault::RustyVault;
use support::servers::Server;
use support::world::leasing_profile;
use support::{World, broker};

const APPROLE: &str = "auth = \"approle\"\nrole_id = \"role-1\"\nsecret_id = \"proof\"";
const TOKEN: &str = "auth = \"token\"\ntoken = \"proof\"";
const JWT: &str = "auth = \"jwt\"\nrole = \"ci\"\njwt = \"proof\"";

const KV: &str = "engine = \"kv-v2\"\nmount = \"secret\"\npath = \"app/key\"\nfield = \"password\"";
const DYNAMIC: &str =
    "engine = \"dynamic\"\nmount = \"database\"\npath = \"creds/app\"\nfield = \"password\"";

struct Scene {
    world: World,
    bao: Server,
    profile: String,
}

fn scene(seconds: &str, auth: &str, engine: &str) -> Scene {
    let world = World::host();
    let bao = Server::script("bao.py", &[seconds]);
    world.configure(&format!(
        "[secrets.proof]\nsource = \"vault\"\nallow = []\n\
         [secrets.s]\nsource = \"vault-server\"\nurl = \"{}\"\nallow = [\"test.use@svc.test\"]\n{auth}\n{engine}\n",
        bao.url(""),
    ));
    let proof = match auth {
        APPROLE => "secret-id-0123456789",
        TOKEN => "root-token-0123456789",
        _ => "header.claims.signature",
    };
    world.set_secret("proof", proof.as_bytes());
    let profile = world.profile("leasing", &leasing_profile("default", ""));
    Scene { world, bao, profile }
}

impl Scene {
    fn sh(&self, script: &str) -> support::Outcome {
        self.world.leased_sh(&self.profile, &["env"], script)
    }

    /// What the server says happened, a word each.
    fn did(&self) -> Vec<String> {
        let word = |said: &Value| match said {
            s if s["made"] == true => "made".to_owned(),
            s if s["renewed"] == true => "renewed".to_owned(),
            s if s["ended"].is_string() => s["ended"].as_str().unwrap().to_owned(),
            s if s["token"].is_string() => "token ended".to_owned(),
            s => s["login"].as_str().unwrap().to_owned(),
        };
        self.bao.said().iter().map(word).collect()
    }

    fn mints(&self) -> Vec<String> {
        let trail = self.world.trail();
        let types = trail.iter().map(|e| e["type"].as_str().unwrap().to_owned());
        types.filter(|kind| kind.starts_with("mint.")).collect()
    }
}

#[test]
fn a_kv_secret_is_read_by_each_way_to_log_in_which_is_ended_again() {
    for (auth, did) in [
        (APPROLE, vec!["auth/approle/login", "token ended"]),
        (JWT, vec!["auth/jwt/login", "token ended"]),
        (TOKEN, vec![]),
    ] {
        let scene = scene("60", auth, KV);
        scene
            .sh("echo ${#TOKEN}; echo $TOKEN")
            .ok()
            .says("20\n")
            .never_says("kv-two-password-0123");
        assert_eq!(scene.did(), did);
        assert_eq!(scene.mints(), Vec::<String>::new(), "what was only read has no end of ours");
    }
}

#[test]
fn a_dynamic_secret_ends_with_its_exec() {
    for (auth, did) in [
        (APPROLE, vec!["auth/approle/login", "made", "revoked", "token ended"]),
        (TOKEN, vec!["made", "revoked"]),
    ] {
        let scene = scene("60", auth, DYNAMIC);
        scene.sh("echo ${#TOKEN}; echo $TOKEN").ok().says("32\n").never_says("dynamic-");
        assert_eq!(scene.did(), did);
        assert_eq!(scene.mints(), ["mint.issued", "mint.revoked"]);
        let issued = scene.world.trail().into_iter().find(|e| e["type"] == "mint.issued").unwrap();
        let lease = scene.bao.said().iter().find(|s| s["made"] == true).unwrap()["lease"].clone();
        assert_eq!(issued["detail"]["far_id"], lease, "what the far side calls it");
    }
}

#[test]
fn its_lease_is_renewed_while_ours_lives() {
    let scene = scene("3", APPROLE, DYNAMIC);
    // More than twice as long as the server's lease.
    scene.sh("sleep 8").ok();
    let did = scene.did();
    let renewed = did.iter().filter(|word| *word == "renewed").count();
    assert!((2..=5).contains(&renewed), "{did:?}");
    assert_eq!(did.last().unwrap(), "token ended");
    assert!(!did.contains(&"expired".to_owned()), "{did:?}");
    let mints = scene.mints();
    assert_eq!(mints.iter().filter(|kind| *kind == "mint.renewed").count(), renewed);
    assert_eq!(mints.last().unwrap(), "mint.revoked");
}

#[test]
fn a_login_by_the_hosts_own_identity_is_for_the_one_workload_that_the_role_names() {
    for world in World::each() {
        let issuer = Issuer::serve(&world);
        let profile = world.profile("leasing", &leasing_profile("default", ""));
        let subject = format!("sublet:profile:{profile}:agent:sublet-run");
        let bao = Server::script("bao.py", &["60", &issuer.url, "https://bao.test", &subject]);
        let configure = |audience: &str| {
            world.configure(&format!(
                "[secrets.proof]\nsource = \"jwt\"\naudience = \"{audience}\"\nallow = []\n\
                 [secrets.s]\nsource = \"vault-server\"\nurl = \"{}\"\nallow = [\"test.use@svc.test\"]\n{JWT}\n{DYNAMIC}\n",
                bao.url(""),
            ));
        };
        configure("https://bao.test");
        let outcome = world.leased_sh(&profile, &["env"], "echo ${#TOKEN}").ok();
        outcome.says("32\n");
        let said = bao.said();
        let lease =
            world.trail().iter().find(|e| e["type"] == "mint.issued").unwrap()["lease_id"].clone();
        let claims = &said[0]["claims"];
        assert_eq!((&claims["jti"], &claims["sub"]), (&lease, &json!(subject)), "{said:?}");
        assert_eq!(said.last().unwrap()["token"], "ended");
        // Another profile is another workload, another audience another far side.
        let refused = |profile: &str, why: &str| {
            let outcome = world.leased_sh(profile, &["env"], "true").denied("source_unavailable");
            assert!(outcome.err().contains("HTTP status 400"), "{outcome}");
            assert_eq!(bao.said().last().unwrap()["why"], why, "{outcome}");
        };
        refused(&world.profile("other", &leasing_profile("default", "")), "sub");
        configure("https://other.test");
        refused(&profile, "InvalidAudienceError");
    }
}

#[test]
fn what_is_not_there_or_refused_is_named() {
    let gone = KV.replace("app/key", "app/gone");
    scene("60", APPROLE, &gone).sh("true").denied("HTTP status 404");
    let scene = scene("60", APPROLE, KV);
    scene.world.set_secret("proof", b"another-secret-id");
    let outcome = scene.sh("true").denied("HTTP status 400");
    assert!(outcome.err().contains("source_unavailable"), "{outcome}");
    let missing = KV.replace("\"password\"", "\"nothing\"");
    let scene = self::scene("60", APPROLE, &missing);
    scene.sh("true").denied("lacks what a credential needs");
    assert_eq!(scene.did().last().unwrap(), "token ended", "it is ended all the same");
}

const VALUE: &str = "kv-one-password-0123456789";

/// A real server with the secret `secret/app/key`, and this host's configuration for it.
fn real(world: &World, vault: &RustyVault, path: &str) -> String {
    vault.call("POST", "secret/app/key", Some(json!({"password": VALUE, "user": "app"})));
    world.configure(&format!(
        "[secrets.proof]\nsource = \"vault\"\nallow = []\n\
         [secrets.s]\nsource = \"vault-server\"\nurl = \"{}\"\nca_file = \"{}\"\n\
         auth = \"approle\"\nrole_id = \"{}\"\nsecret_id = \"proof\"\nengine = \"kv-v1\"\n\
         mount = \"secret\"\npath = \"{path}\"\nfield = \"password\"\nallow = [\"test.use@svc.test\"]\n",
        vault.url(),
        vault.certificate().display(),
        vault.role_id(),
    ));
    world.profile("leasing", &leasing_profile("default", ""))
}

#[test]
fn a_real_server_gives_a_kv_v1_secret_for_an_approle_login_that_is_ended() {
    let vault = RustyVault::start();
    for world in World::each() {
        let profile = real(&world, &vault, "app/key");
        let secret_id = vault.secret_id(0);
        world.set_secret("proof", secret_id.as_bytes());
        let before = vault.tokens();
        let script = "[ \"$TOKEN\" = \"$(cat want)\" ] && echo as it is kept; echo $TOKEN";
        world.file("want", VALUE, 0o644);
        let outcome = world.leased_sh(&profile, &["env"], script).ok();
        outcome.prints("as it is kept\n***\n");
        assert_eq!(vault.tokens(), before, "the login's token is ended");
        vault.log_in();
        assert_eq!(vault.tokens(), before + 1, "the control: a token that nobody ends");
        // Read at each use.
        let another = json!({"password": "kv-one-rotated-0123", "user": "app"});
        vault.call("POST", "secret/app/key", Some(another));
        world.leased_sh(&profile, &["file"], "wc -c < $TOKEN_FILE").ok().prints("19\n");
        let is_mint = |e: &Value| e["type"].as_str().unwrap().starts_with("mint.");
        assert!(!world.trail().iter().any(is_mint), "what was only read has no end of ours");
        std::fs::remove_file(world.workspace.join("want")).unwrap();
        for value in [VALUE, &secret_id] {
            world.holds_nowhere(value.as_bytes());
        }
    }
}

#[test]
fn a_real_server_is_asked_through_a_broker_too() {
    let vault = RustyVault::start();
    let world = World::host();
    real(&world, &vault, "app/key");
    let config = std::fs::read_to_string(world.path("etc/sublet.toml")).unwrap();
    broker::host(&world, &config, &[("leasing", &leasing_profile("default", ""))]);
    // Good for two logins, and the exec is one.
    world.set_secret("proof", vault.secret_id(2).as_bytes());
    let broker = broker::serve(&world);
    let run = broker.start_run("leasing");
    let before = vault.tokens();
    let exec = || {
        let lease = run.lease(",channel=env");
        run.exec(&["--lease", &lease, "--", "sh", "-c", "echo ${#TOKEN} $TOKEN"])
    };
    exec().ok().prints(&format!("{} ***\n", VALUE.len()));
    exec().ok();
    // The server itself counts them.
    let outcome = exec().denied("source_unavailable");
    assert!(outcome.err().contains("HTTP status 400"), "{outcome}");
    assert_eq!(vault.tokens(), before);
}

#[test]
fn a_real_server_refuses_by_name() {
    let vault = RustyVault::start();
    let world = World::host();
    let profile = real(&world, &vault, "app/gone");
    world.set_secret("proof", vault.secret_id(0).as_bytes());
    let before = vault.tokens();
    let denied = |why: &str| {
        let outcome = world.leased_sh(&profile, &["env"], "echo it ran");
        let outcome = outcome.denied("source_unavailable").never_says("it ran");
        assert!(outcome.err().contains(why), "expected {why}\n{outcome}");
    };
    denied("HTTP status 404");
    assert_eq!(vault.tokens(), before, "the token is ended all the same");
    world.set_secret("proof", b"another-secret-id");
    denied("HTTP status 400");
    real(&world, &vault, "app/key");
    denied("HTTP status 400");
    world.set_secret("proof", vault.secret_id(0).as_bytes());
    vault.call("PUT", "sys/seal", None);
    denied("HTTP status 503");
    vault.unseal();
    // The allow twin.
    world.leased_sh(&profile, &["env"], "true").ok();
}
