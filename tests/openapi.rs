//! The description of the API is whole and true: every route is described and every description is a
//! route; what it says of bodies is what the parser takes.
#![forbid(unsafe_code)]

mod support;

use std::collections::BTreeSet;
use std::path::Path;

use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use sublet::api::server::routes;
use sublet::api::wire::{
    BatchBody, ExecBody, LeaseBody, RenewBody, RevocationBody, RevokeBody, RunBody,
};
use support::broker::{leasing_host, serve};
use support::schema::{Description, Judge};
use support::{World, http};

#[test]
fn every_route_is_described_and_every_description_is_a_route() {
    let served: BTreeSet<(String, String, Vec<&str>)> = routes::all()
        .into_iter()
        .map(|(method, path, on)| {
            let sockets = [("agent", on.agent()), ("control", on.control())];
            let sockets = sockets.into_iter().filter(|(_, is)| *is).map(|(name, _)| name);
            (method.as_str().to_lowercase(), path.to_owned(), sockets.collect())
        })
        .collect();
    let description = Description::new();
    let mut described = BTreeSet::new();
    for (path, methods) in description.root()["paths"].as_object().unwrap() {
        for (method, operation) in methods.as_object().unwrap() {
            let sockets = operation["x-sublet-sockets"].as_array().expect("sockets");
            let sockets = sockets.iter().map(|s| s.as_str().unwrap()).collect();
            described.insert((method.clone(), path.clone(), sockets));
        }
    }
    assert_eq!(described, served);
}

#[test]
fn the_description_holds_together() {
    let description = Description::new();
    assert!(description.root()["openapi"].as_str().unwrap().starts_with("3.1."));
    let mut named = BTreeSet::new();
    let mut references = Vec::new();
    collect(description.root(), &mut references);
    for reference in references {
        assert!(description.followed(&json!({ "$ref": reference })).is_object(), "{reference}");
        named.insert(reference.rsplit('/').next().unwrap().to_owned());
    }
    for kind in ["schemas", "responses"] {
        for name in description.root()["components"][kind].as_object().unwrap().keys() {
            assert!(named.contains(name), "nothing refers to {name}");
        }
    }
    let mut ids = BTreeSet::new();
    for (path, methods) in description.root()["paths"].as_object().unwrap() {
        for (method, operation) in methods.as_object().unwrap() {
            let id = operation["operationId"].as_str().expect("operationId");
            assert!(ids.insert(id.to_owned()), "{id} is there twice");
            let responses = operation["responses"].as_object().unwrap();
            assert!(responses.contains_key("default"), "{method} {path}");
            let wanted: Vec<&str> = path.split(['{', '}']).skip(1).step_by(2).collect();
            let parameters = operation["parameters"].as_array().into_iter().flatten();
            let in_path = parameters.filter(|p| p["in"] == "path");
            let given: Vec<&str> = in_path.map(|p| p["name"].as_str().unwrap()).collect();
            assert_eq!(given, wanted, "{method} {path}");
        }
    }
}

fn collect(value: &Value, into: &mut Vec<String>) {
    match value {
        Value::Object(members) => {
            into.extend(members.get("$ref").and_then(Value::as_str).map(str::to_owned));
            members.values().for_each(|v| collect(v, into));
        }
        Value::Array(items) => items.iter().for_each(|v| collect(v, into)),
        _ => {}
    }
}

/// The schema and the parser must both say `valid`.
#[track_caller]
fn check<T: DeserializeOwned>(schema: &str, body: Value, valid: bool) {
    let description = Description::new();
    let faults = description.faults(description.schema(schema), &body, Judge::AsWritten);
    assert_eq!(faults.is_empty(), valid, "the description of {schema}, {body}: {faults:?}");
    let parsed = serde_json::from_value::<T>(body.clone()).map(drop);
    assert_eq!(parsed.is_ok(), valid, "the parser, {body}: {parsed:?}");
}

#[test]
fn bodies_are_what_the_description_says() {
    let lease = |more: Value| {
        let mut body = json!({"capability": "repo.push", "audience": "github.com"});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    };
    check::<LeaseBody>("LeaseRequest", lease(json!({})), true);
    let whole = json!({"channel": "git", "ttl": "5m", "uses": 2, "reason": "release"});
    check::<LeaseBody>("LeaseRequest", lease(whole), true);
    check::<LeaseBody>("LeaseRequest", lease(json!({"ttl": 300})), true);
    check::<LeaseBody>("LeaseRequest", lease(json!({"ttl": 0})), false);
    check::<LeaseBody>("LeaseRequest", lease(json!({"ttl": 1.5})), false);
    check::<LeaseBody>("LeaseRequest", lease(json!({"ttl": true})), false);
    check::<LeaseBody>("LeaseRequest", lease(json!({"uses": 0})), false);
    check::<LeaseBody>("LeaseRequest", lease(json!({"uses": 4_294_967_296_u64})), false);
    check::<LeaseBody>("LeaseRequest", lease(json!({"channel": "fax"})), false);
    check::<LeaseBody>("LeaseRequest", lease(json!({"reason": ""})), false);
    check::<LeaseBody>("LeaseRequest", lease(json!({"reason": "x".repeat(501)})), false);
    check::<LeaseBody>("LeaseRequest", lease(json!({"reason": "ä".repeat(500)})), true);
    check::<LeaseBody>("LeaseRequest", lease(json!({"run_id": "another"})), false);
    check::<LeaseBody>("LeaseRequest", json!({"capability": "repo.push"}), false);
    check::<LeaseBody>("LeaseRequest", json!([]), false);
    check::<BatchBody>("LeaseBatch", json!({"leases": [lease(json!({}))], "reason": "r"}), true);
    check::<BatchBody>("LeaseBatch", json!({"leases": [lease(json!({"x": 1}))]}), false);
    check::<BatchBody>("LeaseBatch", json!({}), false);
    let exec = "exe_00000000000000000000000000000000";
    let id = "lse_00000000000000000000000000000000";
    check::<ExecBody>("ExecRequest", json!({"command": ["true"]}), true);
    let whole = json!({
        "command": ["sh", "-c", "x"], "lease_ids": [id], "environment": {"A": "b"}, "timeout": "90s",
        "terminal": {"rows": 24, "columns": 80}, "network": "none", "reason": "because"
    });
    check::<ExecBody>("ExecRequest", whole, true);
    check::<ExecBody>("ExecRequest", json!({"command": "true"}), false);
    check::<ExecBody>("ExecRequest", json!({"command": ["true"], "network": "host"}), false);
    check::<ExecBody>("ExecRequest", json!({"command": ["true"], "environment": {"A": 1}}), false);
    check::<ExecBody>("ExecRequest", json!({"command": ["true"], "terminal": {"rows": 1}}), false);
    let wide = json!({"command": ["true"], "terminal": {"rows": 1, "columns": 65_536}});
    check::<ExecBody>("ExecRequest", wide, false);
    check::<ExecBody>("ExecRequest", json!({"command": ["true"], "exec_id": exec}), false);
    let run = json!({"agent": "a", "principal": "p", "workspace": "/w"});
    check::<RunBody>("RunRequest", run, true);
    let whole = json!({
        "agent": "a", "principal": "p", "workspace": "/w", "profile": "build", "run_id": "ci-1"
    });
    check::<RunBody>("RunRequest", whole, true);
    check::<RunBody>("RunRequest", json!({"agent": "a", "principal": "p"}), false);
    let uid = json!({"agent": "a", "principal": "p", "workspace": "/w", "uid": 0});
    check::<RunBody>("RunRequest", uid, false);
    check::<RenewBody>("RenewRequest", json!({}), true);
    check::<RenewBody>("RenewRequest", json!({"ttl": "10m"}), true);
    check::<RenewBody>("RenewRequest", json!({"uses": 1}), false);
    check::<RevokeBody>("RevokeRequest", json!({"reason": "leaked"}), true);
    check::<RevokeBody>("RevokeRequest", json!({"all": true}), false);
    check::<RevocationBody>("RevocationRequest", json!({"all": true}), true);
    check::<RevocationBody>("RevocationRequest", json!({"run_id": "r", "reason": "x"}), true);
    check::<RevocationBody>("RevocationRequest", json!({"principal": "p"}), true);
    check::<RevocationBody>("RevocationRequest", json!({"principal": 1}), false);
    check::<RevocationBody>("RevocationRequest", json!({"everything": true}), false);
}

#[test]
fn the_validator_itself_finds_faults() {
    #[track_caller]
    fn check(schema: Value, value: Value, faults: usize) {
        let found = Description::new().faults(&schema, &value, Judge::Whole);
        assert_eq!(found.len(), faults, "{schema} {value}: {found:?}");
    }
    check(json!({"type": "integer"}), json!("1"), 1);
    check(json!({"type": ["integer", "null"]}), json!(null), 0);
    check(json!({"enum": ["a"]}), json!("b"), 1);
    check(json!({"items": {"type": "string"}}), json!(["a", 1, 2]), 2);
    check(json!({"required": ["a"], "properties": {"a": {"type": "string"}}}), json!({}), 1);
    check(json!({"properties": {"a": {}}}), json!({"b": 1}), 1);
    check(json!({"additionalProperties": {"type": "string"}}), json!({"b": 1, "c": "d"}), 1);
    check(json!({"oneOf": [{"type": "integer"}, {"type": "string"}]}), json!(true), 1);
    check(json!({"minimum": 1, "maximum": 3}), json!(0), 1);
    check(json!({"$ref": "#/components/schemas/Health"}), json!({"status": "dead"}), 1);
}

/// Asks a live service, and holds each answer against what the description says of it.
struct Examiner {
    description: Description,
    seen: BTreeSet<(String, String)>,
}

impl Examiner {
    /// `path` as the description writes it; `place` as it is asked for.
    #[track_caller]
    fn ask(
        &mut self,
        socket: &Path,
        (method, path, place): (&str, &str, &str),
        body: Option<Value>,
        status: u16,
    ) -> Value {
        let reply = http::ask(socket, method, place, body.as_ref());
        let answer = reply.ok(status);
        let schema = self.description.answer(method, path, status);
        let faults = self.description.faults(schema, &answer, Judge::Whole);
        assert!(faults.is_empty(), "{method} {path}: {faults:?}\n{answer:#}");
        if status < 300 {
            self.seen.insert((method.to_lowercase(), path.to_owned()));
        }
        answer
    }
}

#[test]
fn a_live_service_answers_as_described() {
    let world = World::host();
    let profile = leasing_host(&world, b"described-and-never-shown-1", "renewable = true");
    let broker = serve(&world);
    let control = broker.control.clone();
    let mut examiner = Examiner { description: Description::new(), seen: BTreeSet::new() };
    let same = |path: &'static str| (path, path);

    let workspace = world.workspace.to_str().unwrap();
    let start = json!({
        "agent": "bot", "principal": "root", "profile": profile, "workspace": workspace,
        "run_id": "described"
    });
    let (path, place) = same("/v1/runs");
    let run = examiner.ask(&control, ("POST", path, place), Some(start.clone()), 201);
    examiner.ask(&control, ("POST", path, place), Some(start), 409);
    examiner.ask(&control, ("POST", path, place), Some(json!({})), 400);
    examiner.ask(&control, ("GET", path, place), None, 200);
    let path = "/v1/runs/{run_id}";
    examiner.ask(&control, ("GET", path, "/v1/runs/described"), None, 200);
    examiner.ask(&control, ("GET", path, "/v1/runs/nobody"), None, 404);
    let agent = Path::new(run["socket"].as_str().unwrap()).to_owned();
    examiner.ask(&agent, ("GET", "/v1/run", "/v1/run"), None, 200);

    let want = json!({
        "capability": "test.use", "audience": "svc.test", "channel": "env", "uses": 2,
        "reason": "to be described"
    });
    let (path, place) = same("/v1/leases");
    let lease = examiner.ask(&agent, ("POST", path, place), Some(want.clone()), 201);
    let else_where = json!({"capability": "test.use", "audience": "else.test"});
    examiner.ask(&agent, ("POST", path, place), Some(else_where), 403);
    examiner.ask(&agent, ("GET", path, place), None, 200);
    examiner.ask(&control, ("GET", path, "/v1/leases?run_id=described"), None, 200);
    examiner.ask(&control, ("GET", path, "/v1/leases?run=described"), None, 400);
    examiner.ask(&agent, ("GET", path, "/v1/leases?run_id=described"), None, 400);
    let both = json!({"leases": [
        {"capability": "test.use", "audience": "svc.test", "channel": "file", "ttl": "1m"},
        {"capability": "test.use", "audience": "svc.test", "channel": "memfd", "ttl": 60},
    ], "reason": "both"});
    let (path, place) = same("/v1/leases:batch");
    examiner.ask(&agent, ("POST", path, place), Some(both), 201);
    examiner.ask(&agent, ("POST", path, place), Some(json!({"leases": []})), 400);

    let id = lease["lease_id"].as_str().unwrap();
    let (one, missing) = (format!("/v1/leases/{id}"), "/v1/leases/lse_none");
    let path = "/v1/leases/{lease_id}";
    for socket in [&agent, &control] {
        examiner.ask(socket, ("GET", path, &one), None, 200);
        examiner.ask(socket, ("GET", path, missing), None, 404);
        let path = "/v1/leases/{lease_id}/envelope";
        examiner.ask(socket, ("GET", path, &format!("{one}/envelope")), None, 200);
        let (path, place) = ("/v1/revocations/{lease_id}", format!("/v1/revocations/{id}"));
        let state = examiner.ask(socket, ("GET", path, &place), None, 200);
        assert_eq!((&state["state"], &state["revoked"]), (&json!("granted"), &json!(false)));
        for path in ["/v1/jwks.json", "/v1/openapi.json", "/v1/health"] {
            examiner.ask(socket, ("GET", path, path), None, 200);
        }
        examiner.ask(socket, ("GET", "/v1/health", "/v1/nothing"), None, 404);
        examiner.ask(socket, ("GET", "/v1/health", "/v1/leases:batch/x"), None, 404);
    }

    let script = json!({"command": ["sh", "-c", "echo $TOKEN; exit 3"], "lease_ids": [id]});
    let (path, place) = same("/v1/execs");
    let done = examiner.ask(&agent, ("POST", path, place), Some(script), 200);
    assert_eq!((&done["exit_status"], &done["stdout"]), (&json!(3), &json!("***\n")), "{done:#}");
    examiner.ask(&agent, ("POST", path, place), Some(json!({"command": []})), 400);
    let foreign = json!({"command": ["true"], "lease_ids": ["lse_0"]});
    examiner.ask(&agent, ("POST", path, place), Some(foreign), 400);
    let exec = done["exec_id"].as_str().unwrap();
    for socket in [&agent, &control] {
        examiner.ask(socket, ("GET", path, place), None, 200);
        let path = "/v1/execs/{exec_id}";
        examiner.ask(socket, ("GET", path, &format!("/v1/execs/{exec}")), None, 200);
    }

    let guard = examiner.ask(&control, ("GET", "/v1/guard", "/v1/guard"), None, 200);
    assert!(!guard["fingerprints"].as_array().unwrap().is_empty());
    examiner.ask(&agent, ("GET", "/v1/guard", "/v1/guard"), None, 404);

    let renew = ("POST", "/v1/leases/{lease_id}/renew", &*format!("{one}/renew"));
    examiner.ask(&control, renew, Some(json!({"ttl": "5m"})), 200);
    let revoke = ("POST", "/v1/leases/{lease_id}/revoke", &*format!("{one}/revoke"));
    let revoked = examiner.ask(&control, revoke, Some(json!({"reason": "described"})), 200);
    assert_eq!(revoked["state"], "revoked");
    // Again, without a body: as it was.
    assert_eq!(examiner.ask(&control, revoke, None, 200)["state"], "revoked");
    examiner.ask(&control, renew, None, 409);
    let (path, place) = same("/v1/revocations");
    let of_run = json!({"run_id": "described", "reason": "all of it"});
    let revoked = examiner.ask(&control, ("POST", path, place), Some(of_run), 200);
    assert_eq!(revoked["revoked"].as_array().unwrap().len(), 2, "{revoked}");
    examiner.ask(&control, ("POST", path, place), Some(json!({})), 400);

    let events = http::ask(&control, "GET", "/v1/events?since=1", None);
    assert!(events.head.contains("content-type: application/x-ndjson"), "{}", events.head);
    let lines = String::from_utf8(events.body).unwrap();
    let schema = examiner.description.answer("GET", "/v1/events", 200).clone();
    assert!(lines.lines().count() > 5, "{lines}");
    for line in lines.lines() {
        let event: Value = serde_json::from_str(line).unwrap();
        let faults = examiner.description.faults(&schema, &event, Judge::Whole);
        assert!(faults.is_empty(), "{faults:?}\n{event:#}");
    }
    examiner.seen.insert(("get".to_owned(), "/v1/events".to_owned()));
    let metrics = http::ask(&control, "GET", "/metrics", None);
    assert_eq!(metrics.status, 200);
    assert!(metrics.head.contains("content-type: application/openmetrics-text"), "{metrics}");
    let shown = String::from_utf8(metrics.body).unwrap();
    for line in [
        "sublet_grants_total 3",
        "sublet_denials_total{reason=\"audience_not_permitted\"} 1",
        "sublet_execs_total{outcome=\"exited\"} 1",
        "sublet_execs_live 0",
        "sublet_revocations_total 3",
    ] {
        assert!(shown.lines().any(|l| l == line), "no {line} in\n{shown}");
    }
    examiner.seen.insert(("get".to_owned(), "/metrics".to_owned()));

    // `tests/projection.rs` has a container, and holds its answer against the description.
    let identity = ("POST", "/v1/runs/{run_id}/identity", "/v1/runs/described/identity");
    examiner.ask(&control, identity, None, 409);
    examiner.seen.insert(("post".to_owned(), identity.1.to_owned()));

    let ended = ("DELETE", "/v1/runs/{run_id}", "/v1/runs/described");
    assert_eq!(examiner.ask(&control, ended, None, 200)["state"], "ended");
    let unknown = ("DELETE", "/v1/runs/{run_id}", "/v1/runs/nobody");
    examiner.ask(&control, unknown, None, 404);
    let all = routes::all();
    let unseen: Vec<_> = all
        .iter()
        .map(|(method, path, _)| (method.as_str().to_lowercase(), (*path).to_owned()))
        .filter(|operation| !examiner.seen.contains(operation))
        .collect();
    assert!(unseen.is_empty(), "never answered: {unseen:?}");
}
