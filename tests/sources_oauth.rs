//! `oauth` against a real authorization server, `oidc-provider`; and token exchange, which that one does not
//! have, by what is sent, as RFC 8693 and RFC 9396 write it.
#![forbid(unsafe_code)]

mod support;

use std::process::Command;

use serde_json::{Value, json};
use support::World;
use support::far::{self, Far};
use support::servers::{self, Server};
use support::world::leasing_profile;

fn provider() -> Server {
    let mut command = Command::new("node");
    // A module is resolved from where it lies.
    let place = servers::node().join("oidc.mjs");
    std::fs::copy(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/servers/oidc.mjs"), &place).unwrap();
    command.arg(place).stderr(std::process::Stdio::null());
    Server::start(command)
}

fn world(server: &Server, more: &str) -> (World, String) {
    let world = World::host();
    world.configure(&format!(
        "[secrets.client]\nsource = \"vault\"\nallow = []\n\
         [secrets.s]\nsource = \"oauth\"\ntoken_url = \"{}\"\nrevocation_url = \"{}\"\n\
         client_secret = \"client\"\nallow = [\"test.use@svc.test\"]\n{more}\n",
        server.url("/token"),
        server.url("/token/revocation"),
    ));
    world.set_secret("client", b"client-secret-0123456789");
    let constraints = "constraints = { resource = \"acme/insights\", action = \"push\" }";
    let profile = world.profile("leasing", &leasing_profile("default", constraints));
    (world, profile)
}

#[test]
fn a_real_server_issues_and_revokes() {
    let server = provider();
    for (client, auth, resource) in
        [("sublet", "basic", "urn:acme:opaque"), ("poster", "post", "urn:acme:opaque")]
    {
        let more = format!(
            "client_id = \"{client}\"\nclient_auth = \"{auth}\"\nscope = \"read\"\nresource = \"{resource}\""
        );
        let (world, profile) = world(&server, &more);
        let outcome = world.leased_sh(&profile, &["env"], "echo ${#TOKEN}; echo $TOKEN").ok();
        let length: usize = outcome.out().lines().next().unwrap().parse().unwrap();
        assert!(length > 20, "{outcome}");
        assert_eq!(outcome.out().lines().nth(1), Some("***"), "{outcome}");
        let said = server.said();
        let issued = said.iter().rev().find(|s| s["issued"].is_string()).unwrap();
        assert_eq!((&issued["scope"], &issued["aud"]), (&json!("read"), &json!(resource)));
        let revoked = said.iter().rev().find(|s| s["revoked"].is_string()).unwrap();
        assert_eq!(revoked["revoked"], issued["issued"], "{said:?}");
        let ends: Vec<Value> = world
            .trail()
            .iter()
            .map(|e| e["type"].clone())
            .filter(|kind| kind.as_str().unwrap().starts_with("mint."))
            .collect();
        assert_eq!(ends, ["mint.issued", "mint.revoked"]);
    }
}

#[test]
fn a_real_server_refuses_by_name() {
    let server = provider();
    let (world, profile) = world(&server, "client_id = \"sublet\"\nscope = \"read\"");
    world.set_secret("client", b"another-secret-0123456789");
    let outcome = world.leased_sh(&profile, &["env"], "true").denied("source_unavailable");
    assert!(outcome.err().contains("HTTP status 401, `invalid_client`"), "{outcome}");
    outcome.never_says("another-secret");
    world.set_secret("client", b"client-secret-0123456789");
    let wrong = "client_id = \"sublet\"\nresource = \"not-a-uri\"";
    let (world, profile) = self::world(&server, wrong);
    let outcome = world.leased_sh(&profile, &["env"], "true").denied("source_unavailable");
    assert!(outcome.err().contains("HTTP status 400"), "{outcome}");
}

#[test]
fn an_exchange_carries_subject_actor_and_what_it_is_for() {
    let far = Far::serve(|_| {
        far::json(
            200,
            json!({"access_token": "exchanged-token-0123456789", "token_type": "Bearer",
                "issued_token_type": "urn:ietf:params:oauth:token-type:access_token", "expires_in": 60}),
        )
    });
    let world = World::host();
    let subject = world.path("etc/subject");
    std::fs::write(&subject, "subject-token-0123456789\n").unwrap();
    std::fs::set_permissions(&subject, std::os::unix::fs::PermissionsExt::from_mode(0o600))
        .unwrap();
    world.configure(&format!(
        "[secrets.subject]\nsource = \"file\"\npath = \"{}\"\nallow = []\n\
         [secrets.actor]\nsource = \"vault\"\nallow = []\n\
         [secrets.s]\nsource = \"oauth\"\ntoken_url = \"{}\"\nclient_id = \"sublet\"\n\
         grant = \"token_exchange\"\nsubject_token = \"subject\"\nactor_token = \"actor\"\n\
         audience = [\"https://a.test\", \"{{audience}}\"]\nresource = \"https://{{audience}}/{{resource}}\"\n\
         authorization_details = '[{{\"type\":\"repo\",\"actions\":[\"{{action}}\"],\"locations\":[\"{{resource}}\"]}}]'\n\
         allow = [\"test.use@svc.test\"]\n",
        subject.display(),
        far.url("/token"),
    ));
    world.set_secret("actor", b"actor-token-0123456789");
    let constraints = "constraints = { resource = \"acme/insights\", action = \"push\" }";
    let profile = world.profile("leasing", &leasing_profile("default", constraints));
    world.leased_sh(&profile, &["file"], "cat $TOKEN_FILE").ok().prints("***");
    let asked = &far.asked()[0];
    let one = |name: &str| {
        let fields = asked.fields(name);
        assert_eq!(fields.len(), 1, "{name}: {fields:?}");
        fields[0].clone()
    };
    assert_eq!(one("grant_type"), "urn:ietf:params:oauth:grant-type:token-exchange");
    assert_eq!(one("subject_token"), "subject-token-0123456789");
    assert_eq!(one("subject_token_type"), "urn:ietf:params:oauth:token-type:access_token");
    assert_eq!(one("actor_token"), "actor-token-0123456789");
    assert_eq!(one("actor_token_type"), "urn:ietf:params:oauth:token-type:jwt");
    assert_eq!(asked.fields("audience"), ["https://a.test", "svc.test"]);
    assert_eq!(one("resource"), "https://svc.test/acme/insights");
    let details: Value = serde_json::from_str(&one("authorization_details")).unwrap();
    assert_eq!(
        details,
        json!([{"type": "repo", "actions": ["push"], "locations": ["acme/insights"]}])
    );
    // It cannot be revoked there: it is told to end when it expires, by whoever comes then.
    let kinds: Vec<Value> = world.trail().iter().map(|e| e["type"].clone()).collect();
    assert!(kinds.contains(&json!("mint.issued")) && !kinds.contains(&json!("mint.revoked")));
}
