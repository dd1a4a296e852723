//! `github-app` against a test server that follows GitHub's published API and verifies the App's JWT with an
//! independent library (PyJWT).
#![forbid(unsafe_code)]

mod support;

use std::fs;
use std::process::Command;

use serde_json::Value;
use support::World;
use support::servers::Server;

/// A key pair of openssl's, as GitHub gives one out (PKCS #1) or as others write it (PKCS #8).
fn key(world: &World, traditional: bool) -> (String, String) {
    support::needs("openssl", "openssl");
    let (private, public) = (world.path("app.pem"), world.path("app.pub"));
    let run = |args: &[&str]| {
        let ended = Command::new("openssl").args(args).output().unwrap();
        assert!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stderr));
    };
    let (private, public) = (private.to_str().unwrap(), public.to_str().unwrap());
    let mut args = vec!["genrsa", "-out", private];
    args.extend(traditional.then_some("-traditional"));
    args.push("2048");
    run(&args);
    run(&["rsa", "-in", private, "-pubout", "-out", public]);
    (fs::read_to_string(private).unwrap(), public.to_owned())
}

struct Scene {
    world: World,
    server: Server,
    profile: String,
}

fn scene(behaviour: &str, more: &str, resource: &str, traditional: bool) -> Scene {
    let world = World::host();
    let (private, public) = key(&world, traditional);
    let server = Server::script("github.py", &[&public, "12345", behaviour]);
    world.configure(&format!(
        "[secrets.app]\nsource = \"vault\"\nallow = []\n\
         [secrets.bot]\nsource = \"github-app\"\napi_url = \"{}\"\napp_id = 12345\n\
         private_key = \"app\"\npermissions = {{ contents = \"write\" }}\n\
         allow = [\"repo.push@github.com\"]\n{more}\n",
        server.url("/api/v3"),
    ));
    world.set_secret("app", private.as_bytes());
    let profile = world.profile(
        "github",
        &format!(
            "extends = \"default\"\n[network]\nmode = \"host\"\n[[capability]]\nname = \"repo.push\"\n\
             channels = [\"env\"]\ncommand = [[\"**\"]]\n{resource}\n\
             [[capability.audience]]\nprotocol = \"https\"\nhost = \"github.com\"\nsecret = \"bot\"\n\
             variable = \"GITHUB_TOKEN\"\n"
        ),
    );
    Scene { world, server, profile }
}

const INSIGHTS: &str = "constraints = { resource = \"acme/insights\" }";

impl Scene {
    fn sh(&self, script: &str) -> support::Outcome {
        let lease = "--lease=repo.push@github.com,channel=env";
        self.world.run(&["--profile", &self.profile, lease, "--", "sh", "-c", script])
    }

    fn requests(&self) -> Vec<String> {
        let line = |said: &Value| {
            format!(
                "{} {} {}",
                said["method"].as_str().unwrap(),
                said["path"].as_str().unwrap(),
                said["status"]
            )
        };
        self.server.said().iter().map(line).collect()
    }
}

#[test]
fn a_token_for_the_capabilitys_repository_and_no_other() {
    for traditional in [true, false] {
        let scene = scene("honest", "", INSIGHTS, traditional);
        support::needs("curl", "curl");
        let base = scene.server.url("/api/v3/repos/acme");
        let script = format!(
            "for name in insights secrets; do curl -s -o /dev/null -w '%{{http_code}}\\n' \
             -H \"Authorization: Bearer $GITHUB_TOKEN\" {base}/$name; done; echo $GITHUB_TOKEN"
        );
        let outcome = scene.sh(&script).ok();
        assert!(outcome.out().starts_with("200\n404\n"), "{outcome}");
        // Long and stateless, it is masked all the same.
        assert!(!outcome.out().contains("ghs_"), "{outcome}");
        let lease = outcome.report()["leases"][0]["lease_id"].clone();
        assert!(scene.server.said().iter().filter(|s| s["request_id"] == lease).count() >= 3);
        assert_eq!(
            scene
                .requests()
                .into_iter()
                .filter(|r| !r.contains("repos/acme/insights 200"))
                .collect::<Vec<_>>(),
            [
                "GET /api/v3/repos/acme/insights/installation 200",
                "POST /api/v3/app/installations/4711/access_tokens 201",
                "GET /api/v3/repos/acme/secrets 404",
                "DELETE /api/v3/installation/token 204",
            ]
        );
        let trail = scene.world.trail();
        let issued = trail.iter().find(|e| e["type"] == "mint.issued").unwrap();
        assert_eq!(issued["detail"]["issued_to"], "app 12345 installation 4711");
        let scope = issued["detail"]["scope"].as_str().unwrap();
        assert!(scope.contains("contents:write") && scope.ends_with("acme/insights"), "{scope}");
        assert!(trail.iter().any(|e| e["type"] == "mint.revoked"));
        scene.world.holds_nowhere(b"ghs_");
    }
}

/// No stretch of such a token passes, however the command writes it.
#[test]
fn a_long_stateless_token_is_masked_in_full() {
    let scene = scene("honest", "", INSIGHTS, true);
    let forms = [
        "printf %s \"$GITHUB_TOKEN\"",
        "printf %s \"$GITHUB_TOKEN\" | base64",
        "printf %s \"$GITHUB_TOKEN\" | base64 -w 0",
        "printf %s \"$GITHUB_TOKEN\" | od -An -v -tx1 | tr -d ' \\n'",
        "printf %s \"$GITHUB_TOKEN\" | od -An -v -tx1 | tr -d ' \\n' | sed 's/../%&/g'",
        "for half in 1 2; do printf '{\"token\":\"%s\"}' \"$GITHUB_TOKEN\"; done",
        "printf 'user:%s' \"$GITHUB_TOKEN\" | base64 -w 0",
    ];
    // The control, which the workspace keeps: what the command would have shown.
    let script: String = forms
        .iter()
        .enumerate()
        .map(|(n, form)| format!("({form}) | tee shown.{n}; echo; "))
        .collect();
    let outcome = scene.sh(&format!("{script} printf %s \"$GITHUB_TOKEN\" > token")).ok();
    let token = fs::read_to_string(scene.world.workspace.join("token")).unwrap();
    assert!(token.starts_with("ghs_eyJ") && token.len() > 900, "{}", token.len());
    let lines = outcome.out();
    let lines: Vec<&str> = lines.lines().filter(|line| !line.is_empty()).collect();
    assert_eq!(lines[..5], ["***"; 5], "{outcome}");
    assert_eq!(lines[5], "{\"token\":\"***\"}{\"token\":\"***\"}", "{outcome}");
    assert!(
        lines[6].starts_with("dXNlc") && lines[6].ends_with("***") && lines[6].len() < 12,
        "{outcome}"
    );
    for n in 0..forms.len() {
        let shown = fs::read_to_string(scene.world.workspace.join(format!("shown.{n}"))).unwrap();
        assert!(shown.len() >= token.len(), "the control of form {n}");
    }
}

#[test]
fn what_is_not_narrowed_or_comes_wider_is_not_taken() {
    let nothing = scene("honest", "", "", true);
    let outcome = nothing.sh("echo it ran").denied("source_unavailable");
    assert!(
        outcome.err().contains("nothing says what the value is to be narrowed to"),
        "{outcome}"
    );
    assert_eq!(nothing.requests(), Vec::<String>::new(), "and nothing was asked");

    let wide = scene("wide", "installation_id = 4711", INSIGHTS, true);
    let outcome = wide.sh("echo it ran").denied("source_unavailable");
    assert!(outcome.err().contains("can do more than was asked for"), "{outcome}");
    assert_eq!(wide.requests().last().unwrap(), "DELETE /api/v3/installation/token 204");

    let elsewhere = scene("honest", "", "constraints = { resource = \"acme/../evil\" }", true);
    elsewhere.sh("echo it ran").denied("source_unavailable");
    assert_eq!(elsewhere.requests(), Vec::<String>::new());
}

#[test]
fn a_key_that_is_none_is_refused_and_not_shown() {
    let scene = scene("honest", "", INSIGHTS, true);
    scene.world.set_secret("app", b"-----BEGIN hunter2-----");
    let outcome = scene.sh("true").denied("source_unavailable").never_says("hunter2");
    assert!(outcome.err().contains("not of the form it must have"), "{outcome}");
    // Another key: the far side refuses, and its words are not told.
    let (other, _) = key(&scene.world, true);
    scene.world.set_secret("app", other.as_bytes());
    let outcome = scene.sh("true").denied("source_unavailable").never_says("could not be decoded");
    assert!(outcome.err().contains("HTTP status 401"), "{outcome}");
}
