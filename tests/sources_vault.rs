//! `vault-server` against a test server written from OpenBao's published API: KV v2, a dynamic engine
//! with leases that are renewed and revoked, AppRole, JWT and token logins.
#![forbid(unsafe_code)]

mod support;

use serde_json::Value;
use support::World;
use support::servers::Server;
use support::world::leasing_profile;

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
