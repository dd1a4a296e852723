//! `oauth` against a real authorization server, `oidc-provider`, also with a token exchange that is registered
//! there; and what an exchange sends, field by field, as RFC 8693 and RFC 9396 write it.
#![forbid(unsafe_code)]

mod support;

use std::process::Command;

use serde_json::{Value, json};
use support::far::{self, Far};
use support::issuer::Issuer;
use support::servers::{self, Server};
use support::world::leasing_profile;
use support::{World, needs};

fn provider() -> Server {
    node("oidc.mjs", &[])
}

fn node(script: &str, args: &[&str]) -> Server {
    let mut command = Command::new("node");
    // A module is resolved from where it lies.
    let place = servers::node().join(script);
    let source = format!("{}/tests/servers/{script}", env!("CARGO_MANIFEST_DIR"));
    std::fs::copy(source, &place).unwrap();
    command.arg(place).args(args).stderr(std::process::Stdio::null());
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

/// The exchange at a real server: this host proves by its own identity who acts and for whom, the server
/// checks that by the published keys, and the token that comes back says so to who asks the server.
#[test]
fn a_real_server_exchanges_the_hosts_own_identity() {
    needs("curl", "curl");
    for world in World::each() {
        let issuer = Issuer::serve(&world);
        let server = node("exchange.mjs", &[&issuer.url]);
        let config = |audience: &str, resource: &str| {
            format!(
                "[secrets.client]\nsource = \"vault\"\nallow = []\n\
                 [secrets.me]\nsource = \"jwt\"\naudience = \"{audience}\"\nallow = []\n\
                 [secrets.runner]\nsource = \"jwt\"\naudience = \"{audience}\"\nclaims = {{ part = \"actor\" }}\n\
                 allow = []\n\
                 [secrets.s]\nsource = \"oauth\"\ntoken_url = \"{}\"\nrevocation_url = \"{}\"\n\
                 client_id = \"sublet\"\nclient_secret = \"client\"\ngrant = \"token_exchange\"\n\
                 subject_token = \"me\"\nsubject_token_type = \"urn:ietf:params:oauth:token-type:jwt\"\n\
                 actor_token = \"runner\"\nscope = \"invoices:{{action}}\"\n\
                 audience = [\"urn:acme:billing\", \"{{audience}}\"]\nresource = \"{resource}\"\n\
                 authorization_details = '[{{\"type\":\"invoice\",\"actions\":[\"{{action}}\"],\"identifier\":\"{{resource}}\"}}]'\n\
                 allow = [\"test.use@svc.test\"]\n",
                server.url("/token"),
                server.url("/token/revocation"),
            )
        };
        let resource = "https://billing.test/{resource}";
        world.configure(&config(&server.url(""), resource));
        world.set_secret("client", b"client-secret-0123456789");
        let profile = |action: &str| {
            let constraints =
                format!("constraints = {{ resource = \"acme/2026-11\", action = \"{action}\" }}");
            let text = leasing_profile("default", &constraints);
            let net = "[network]\nmode = \"host\"\n[[capability]]\n";
            world.profile(action, &text.replacen("[[capability]]\n", net, 1))
        };
        let read = profile("read");

        // Who serves the resource asks the server what the token is good for: while the exec lives, and after.
        let introspect = format!(
            "curl -sS -u api:client-secret-0123456789 --data-urlencode token=\"$TOKEN\" {}",
            server.url("/token/introspection")
        );
        let script = format!("{introspect}; printf %s \"$TOKEN\" > token");
        let outcome = world.leased_sh(&read, &["env"], &script).ok();
        let details =
            json!([{"type": "invoice", "actions": ["read"], "identifier": "acme/2026-11"}]);
        let workload = format!("sublet:profile:{read}:agent:sublet-run");
        let told = outcome.json();
        assert_eq!(told["active"], true, "{outcome}");
        assert_eq!(told["sub"], workload.as_str());
        assert_eq!(told["act"], json!({"sub": workload, "iss": issuer.url}));
        assert_eq!(told["aud"], "https://billing.test/acme/2026-11");
        assert_eq!(told["scope"], "invoices:read");
        assert_eq!(told["authorization_details"], details);
        let token = std::fs::read_to_string(world.workspace.join("token")).unwrap();
        let mut after = Command::new("sh");
        after.args(["-c", &introspect]).env("TOKEN", &token);
        let after = support::world::finish(after, b"", None).ok().json();
        assert_eq!(after, json!({"active": false}), "it is revoked");

        let said = server.said();
        let lease = &outcome.report()["leases"][0]["lease_id"];
        let exchanged = said.iter().find(|s| s["exchanged"].is_string()).unwrap();
        assert_eq!(exchanged["client"], "sublet");
        for party in ["subject", "actor"] {
            let claims = &exchanged[party];
            assert_eq!((&claims["jti"], &claims["iss"]), (lease, &json!(issuer.url)), "{claims}");
            assert_eq!(claims["sublet"]["exec_id"], outcome.report()["exec_id"]);
        }
        assert_eq!(exchanged["actor"]["part"], "actor");
        assert_eq!(exchanged["audience"], json!(["urn:acme:billing", "svc.test"]));
        assert_eq!((&exchanged["details"], &exchanged["request_id"]), (&details, lease));
        let revoked: Vec<&Value> = said.iter().filter(|s| s["revoked"].is_string()).collect();
        assert_eq!(revoked.len(), 1, "{said:?}");
        assert_eq!(revoked[0]["revoked"], exchanged["exchanged"]);
        let kinds = world.event_types();
        let kinds: Vec<&String> = kinds.iter().filter(|kind| kind.starts_with("mint.")).collect();
        assert_eq!(kinds, ["mint.issued", "mint.revoked"]);

        // The server's own refusals: an action that it does not grant, a resource that is not its, an assertion
        // for somebody else.
        let denied = |profile: &str, code: &str| {
            let outcome = world.leased_sh(profile, &["env"], "echo it ran");
            let outcome = outcome.denied("source_unavailable").never_says("it ran");
            assert!(outcome.err().contains(code), "expected {code}\n{outcome}");
        };
        denied(&profile("delete"), "`invalid_authorization_details`");
        world.configure(&config(&server.url(""), "https://elsewhere.test/{resource}"));
        denied(&read, "`invalid_target`");
        world.configure(&config("https://somebody.else", resource));
        denied(&read, "`invalid_grant`");
        world.configure(&config(&server.url(""), resource));
        world.leased_sh(&read, &["env"], "true").ok();
    }
}
