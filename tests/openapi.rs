//! The description of the API is whole and true: every route is described and every description is a
//! route; what it says of bodies is what the parser takes.
#![forbid(unsafe_code)]

mod support;

use std::collections::BTreeSet;

use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use sublet::api::server::routes;
use sublet::api::wire::{
    BatchBody, ExecBody, LeaseBody, RenewBody, RevocationBody, RevokeBody, RunBody,
};
use support::schema::{Description, Judge};

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
