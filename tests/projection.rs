//! Identity tokens in a container itself: where the host permits it, the container's user, and nobody else in
//! it, finds the tokens of its profile as files, each under a lease of its own, replaced while it lives, and
//! wiped by revocation and by its end. And the channel `token` of an exec in a container.
#![forbid(unsafe_code)]

mod support;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::Command;

use base64::Engine as _;
use serde_json::{Value, json};
use serial_test::file_serial;
use support::broker::{self, Broker, Way, serve_as};
use support::bundle::{Bundle, Container, Runtime};
use support::host::eventually;
use support::http;
use support::schema::{Description, Judge};
use support::world::World;

const SLEEP: &str = "while :; do sleep 1; done";
const INSIDE: &str = "/run/sublet/identity/azure-identity/token";

fn profile(command: &str) -> String {
    format!(
        "extends = \"default\"\n[[capability]]\nname = \"cloud.use\"\nchannels = [\"token\"]\n\
         ttl = \"30m\"\nuses = 5\ncommand = [[\"{command}\"]]\n[[capability.audience]]\n\
         host = \"cloud.test\"\nidentity = {{ kind = \"azure\", client_id = \"it's\" }}\n"
    )
}

/// A host whose sockets are on a tmpfs, with the profiles `cloud` and `pinned`.
struct Place {
    world: World,
    runtime: tempfile::TempDir,
}

impl Place {
    fn new(more: &str) -> Self {
        let world = World::host();
        let runtime = tempfile::Builder::new().prefix("projected-").tempdir_in("/dev/shm").unwrap();
        let place = Self { world, runtime };
        place.configure("project_token = true", more);
        place.world.call(&["issuer", "init", "--url", "https://id.test/host"]).ok();
        place
    }

    fn configure(&self, hook: &str, more: &str) {
        let config = format!(
            "{more}\n[issuer]\nallow = [\"cloud.use@cloud.test\"]\ntoken_ttl = \"10s\"\n\
             [hook]\n{hook}\n[host]\nruntime_dir = \"{}\"\n",
            self.runtime.path().display()
        );
        let profiles = [("cloud", profile("**")), ("pinned", profile("az"))];
        let profiles: Vec<(&str, &str)> = profiles.iter().map(|(n, t)| (*n, t.as_str())).collect();
        broker::host(&self.world, &config, &profiles);
    }

    fn serve(&self) -> Broker<'_> {
        serve_as(&self.world, Way { runtime_dir: Some(self.runtime.path()), ..Way::default() })
    }

    /// What the host has of the one run that is there.
    fn directory(&self) -> PathBuf {
        let mut runs = fs::read_dir(self.runtime.path().join("runs")).unwrap().flatten();
        runs.next().expect("a run").path().join("identity")
    }

    fn is_bare(&self) -> bool {
        let count =
            |name: &str| fs::read_dir(self.runtime.path().join(name)).map_or(0, Iterator::count);
        (count("runs"), count("containers")) == (0, 0)
    }

    fn bundle(&self, script: &str) -> Bundle<'_> {
        Bundle::new(&self.world, script).annotated("cloud").guarded()
    }
}

fn of_user(mut bundle: Bundle<'_>, uid: u32) -> Bundle<'_> {
    bundle.config["process"]["user"] = json!({ "uid": uid, "gid": uid });
    bundle
}

fn token(container: &Container<'_>, user: &str) -> String {
    container.exec_as(user, &format!("cat {INSIDE}")).ok().out()
}

fn claims(token: &str) -> Value {
    let payload = token.split('.').nth(1).unwrap();
    let bytes = base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(payload).unwrap();
    serde_json::from_slice(&bytes).unwrap()
}

fn lease(broker: &Broker<'_>) -> Value {
    let leases = broker.call(&["--json", "lease", "list"]).ok().json_lines();
    let open = |lease: &&Value| lease["state"] == "consumed";
    leases.iter().find(open).cloned().unwrap_or_else(|| panic!("{leases:?}"))
}

#[test]
#[file_serial(runc)]
fn a_container_has_its_profiles_token_and_its_user_alone_reads_it() {
    life(Runtime::Runc, false);
}

#[test]
#[file_serial(runc)]
fn crun_and_a_user_namespace_have_it_alike() {
    life(Runtime::Crun, false);
    life(Runtime::Runc, true);
}

#[track_caller]
fn life(runtime: Runtime, has_user_namespace: bool) {
    const USER: &str = "1000:1000";
    let place = Place::new("");
    let broker = place.serve();
    let mut bundle = of_user(place.bundle(SLEEP), 1000).by(runtime);
    if has_user_namespace {
        let map = json!([{ "containerID": 0, "hostID": 300_000, "size": 65_536 }]);
        bundle.config["linux"]["uidMappings"] = map.clone();
        bundle.config["linux"]["gidMappings"] = map;
        let namespaces = bundle.config["linux"]["namespaces"].as_array_mut().unwrap();
        namespaces.push(json!({ "type": "user" }));
        let chown =
            Command::new("chown").args(["-R", "300000:300000"]).arg(bundle.root("")).status();
        assert!(chown.unwrap().success());
    }
    let container = bundle.start();
    let first = token(&container, USER);
    let lease = lease(&broker);
    let claims = claims(&first);
    assert_eq!(claims["jti"], lease["lease_id"]);
    assert_eq!(claims["sub"], "sublet:profile:cloud:agent:reviewer");
    assert_eq!(claims["aud"], "api://AzureADTokenExchange");
    assert_eq!(
        (&claims["sublet"]["principal"], &lease["channel"]),
        (&json!("root"), &json!("token"))
    );

    // Asked for once more, they are what they are.
    let path = "/v1/runs/{run_id}/identity";
    let run = claims["sublet"]["run_id"].as_str().unwrap();
    let told = http::ask(&broker.control, "POST", &path.replace("{run_id}", run), None).ok(200);
    let description = Description::new();
    let schema = description.answer("POST", path, 200);
    assert_eq!(description.faults(schema, &told, Judge::Whole), Vec::<String>::new(), "{told:#}");
    assert_eq!(told["tokens"][0]["lease_id"], lease["lease_id"]);
    assert_eq!(told["tokens"][0]["path"], INSIDE);

    // Read, and nothing else; by its user, and nobody else.
    let script = format!(
        "echo x >{INSIDE}; echo \"write: $?\"; rm {INSIDE}; echo \"remove: $?\"; \
         touch /run/sublet/identity/x; echo \"beside: $?\"; \
         . /run/sublet/identity/environment; env | grep ^AZURE | sort"
    );
    let seen = container.exec_as(USER, &script).ok();
    for refused in ["write: 1", "remove: 1", "beside: 1"] {
        assert!(seen.out().contains(refused), "{seen}");
    }
    let variables = format!(
        "AZURE_AUTHORITY_HOST=https://login.microsoftonline.com/\nAZURE_CLIENT_ID=it's\n\
         AZURE_FEDERATED_TOKEN_FILE={INSIDE}\n"
    );
    assert!(seen.out().contains(&variables), "{seen}");
    let look = format!("cat {INSIDE} /run/sublet/agent/identity/*/*; ls /run/sublet/identity/");
    let other = container.exec_as("1001:1000", &look).never_says("eyJ");
    assert!(other.status != Some(0) && other.out().is_empty(), "{other}");
    container.exec_as("1000:1001", &format!("cat {INSIDE}")).ok();

    // Replaced in one step: what was open reads zeros once the one after it has come.
    let open = fs::File::open(place.directory().join("azure-identity/token")).unwrap();
    eventually("another token", || token(&container, USER) != first);
    let second = token(&container, USER);
    assert!(second.split('.').count() == 3 && second.len() > 500, "{second}");
    eventually("the first is zeros", || {
        let mut bytes = vec![1; first.len()];
        open.read_exact_at(&mut bytes, 0).unwrap();
        bytes.iter().all(|b| *b == 0)
    });

    // Taken back, it is gone at once, and no other comes.
    let open = fs::File::open(place.directory().join("azure-identity/token")).unwrap();
    let id = lease["lease_id"].as_str().unwrap();
    broker.call(&["lease", "revoke", id]).ok();
    assert!(!place.directory().join("azure-identity/token").exists());
    let mut bytes = vec![1; first.len()];
    open.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes.iter().all(|b| *b == 0));
    std::thread::sleep(std::time::Duration::from_secs(7));
    assert_ne!(container.exec_as(USER, &format!("cat {INSIDE}")).status, Some(0));

    container.delete();
    assert!(place.is_bare());
    let events = broker.events(0);
    for (wanted, reason) in [
        ("lease.requested", json!("projected into its container")),
        ("lease.granted", Value::Null),
        ("lease.consumed", Value::Null),
        ("mint.issued", Value::Null),
        ("lease.revoked", json!("control")),
        ("run.ended", Value::Null),
    ] {
        let found = events
            .iter()
            .any(|e| e["type"] == wanted && (reason.is_null() || e["reason"] == reason));
        assert!(found, "{wanted}: {events:#?}");
    }
    place.world.holds_nowhere(first.as_bytes());
    place.world.holds_nowhere(second.as_bytes());
}

#[test]
#[file_serial(runc)]
fn it_is_the_hosts_to_permit_and_a_pinned_capability_is_no_containers() {
    let place = Place::new("");
    let look = "ls /run/sublet/identity /run/sublet/agent/identity && echo there; test -S /run/sublet/agent.sock && echo socket";
    // The control: with both it is there.
    let broker = place.serve();
    place.bundle(look).run().ok().says("there");
    place.bundle(look).annotated("pinned").run().ok().never_says("there").says("socket");
    drop(broker);
    place.configure("", "");
    let _broker = place.serve();
    place.bundle(look).run().ok().never_says("there").says("socket");
    assert!(place.is_bare());
}

#[test]
#[file_serial(runc)]
fn what_cannot_be_projected_starts_no_container_and_leaves_nothing() {
    let place = Place::new("");
    let keys = place.world.state().join("keys");
    fs::rename(keys.join("issuer.json"), keys.join("aside")).unwrap();
    let broker = place.serve();
    let refused = place.bundle("echo ran-inside").run().never_says("ran-inside");
    assert!(
        refused.status != Some(0) && refused.err().contains("identity_not_configured"),
        "{refused}"
    );
    assert!(place.is_bare());
    fs::rename(keys.join("aside"), keys.join("issuer.json")).unwrap();
    place.bundle("echo ran-inside").run().ok().says("ran-inside");
    drop(broker);
    // Nor is a token written to a disk.
    let disk = tempfile::tempdir().unwrap();
    let toml = fs::read_to_string(place.world.path("etc/sublet.toml")).unwrap();
    let there = place.runtime.path().display().to_string();
    place.world.configure(&toml.replace(&there, &disk.path().display().to_string()));
    let way = Way { runtime_dir: Some(disk.path()), ..Way::default() };
    let _broker = serve_as(&place.world, way);
    let refused = place.bundle("echo ran-inside").run().never_says("ran-inside");
    assert!(refused.status != Some(0) && refused.err().contains("on a disk"), "{refused}");
}

#[test]
#[file_serial(runc)]
fn a_run_of_few_requests_keeps_its_token_for_as_long_as_it_lives() {
    // Each lease ends before its token could be replaced under it, so each token has its own.
    let place = Place::new("[ceilings]\nrequests_per_run = 1\n[leases]\nmax_ttl = \"11s\"");
    let broker = place.serve();
    let bundle = place.bundle(SLEEP);
    let container = bundle.start();
    let mut leases = std::collections::BTreeSet::new();
    eventually("a second lease", || {
        std::thread::sleep(std::time::Duration::from_millis(300));
        leases.insert(claims(&token(&container, "0:0"))["jti"].as_str().unwrap().to_owned());
        leases.len() == 2
    });
    let told = broker.events(0);
    let completed = told.iter().filter(|e| e["type"] == "lease.completed").count();
    assert!(completed >= 1, "{told:#?}");
}

#[test]
#[file_serial(runc)]
fn a_broker_that_dies_leaves_a_token_to_the_next_or_to_poststop() {
    let place = Place::new("");
    let mut broker = place.serve();
    let bundle = place.bundle(SLEEP);
    let container = bundle.start();
    let before = token(&container, "0:0");
    let open = fs::File::open(place.directory().join("azure-identity/token")).unwrap();
    let is_zero = |file: &fs::File| {
        let mut bytes = vec![1; before.len()];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes.iter().all(|b| *b == 0)
    };
    broker.shoot();
    assert!(!is_zero(&open), "the control: nobody is there to wipe it");
    drop(broker);
    let mut broker = place.serve();
    assert!(is_zero(&open));
    let after = token(&container, "0:0");
    assert_ne!(claims(&after)["jti"], claims(&before)["jti"]);
    let open = fs::File::open(place.directory().join("azure-identity/token")).unwrap();
    broker.shoot();
    let identity = place.directory();
    container.delete();
    assert!(is_zero(&open) && !identity.exists());
}

#[test]
#[file_serial(runc)]
fn an_exec_in_a_container_has_a_token_of_its_own_and_the_container_none() {
    let place = Place::new("");
    place.configure("", "");
    let broker = place.serve();
    let bundle = place.bundle(SLEEP);
    let container = bundle.start();
    let runs = broker.call(&["--json", "runs", "list"]).ok().json_lines();
    let run = runs.iter().find(|run| run["state"] == "active").unwrap();
    let id = run["run_id"].as_str().unwrap();
    let request = ["--json", "lease", "request", "cloud.use@cloud.test", "--run", id];
    let lease = broker.call(&request).ok().json();
    let (lease, path) = (&lease["lease_id"], &lease["delivery"]["path"]);
    let (lease, path) = (lease.as_str().unwrap(), path.as_str().unwrap());
    assert_eq!(path, "/var/run/secrets/sublet/azure-identity/token");
    let script = "test \"$(head -c 3 $AZURE_FEDERATED_TOKEN_FILE)\" = eyJ && echo delivered; \
                  echo $AZURE_FEDERATED_TOKEN_FILE; cat $AZURE_FEDERATED_TOKEN_FILE";
    let exec = ["exec", "--run", id, "--lease", lease, "--", "sh", "-c", script];
    let seen = broker.call(&exec).ok().never_says("eyJ");
    assert!(seen.out().starts_with(&format!("delivered\n{path}\n")), "{seen}");
    let look = "find / -name azure-identity; cat /proc/[0-9]*/mountinfo";
    container.exec(look).never_says("azure-identity");
    container.delete();

    // And of `--into`, where no broker knows the container.
    let profile = place.world.profile("one", &profile("**"));
    let bundle = Bundle::new(&place.world, SLEEP);
    let container = bundle.start();
    let pid = container.pid.to_string();
    let lease = "--lease=cloud.use@cloud.test";
    let args = ["--into", &pid, "--profile", &profile, lease, "--", "sh", "-c", script];
    let seen = place.world.run(&args).ok().never_says("eyJ");
    assert!(seen.out().starts_with(&format!("delivered\n{path}\n")), "{seen}");
    assert_eq!(seen.report()["scrubbed"][0]["wiped"], true);
}
