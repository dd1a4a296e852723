//! Events in the words of the Open Cybersecurity Schema Framework 1.8.0 (schema.ocsf.io): leases as Authorize
//! Session (class 3003), all else as API Activity (class 6003).
//!
//! Receives an event; returns one JSON object. Pure. What the schema has no place for is in `unmapped`, hash
//! and predecessor included, so that nothing of an event is lost.
#![forbid(unsafe_code)]

use serde_json::{Map, Value, json};

use crate::model::event::{Event, EventType};
use crate::model::moment::timestamp_text;
use crate::model::name::AudienceName;

/// Of the schema.
pub const VERSION: &str = "1.8.0";

/// `*_id` and its caption.
type Coded = (u64, &'static str);

const INFORMATIONAL: Coded = (1, "Informational");
const LOW: Coded = (2, "Low");
const MEDIUM: Coded = (3, "Medium");
const HIGH: Coded = (4, "High");
const UNKNOWN: Coded = (0, "Unknown");
const SUCCESS: Coded = (1, "Success");
const FAILURE: Coded = (2, "Failure");
const OTHER: u64 = 99;

/// The event as one object.
pub fn event(event: &Event) -> Value {
    let is_lease = matches!(
        event.kind,
        EventType::LeaseRequested
            | EventType::LeaseGranted
            | EventType::LeaseDenied
            | EventType::LeaseConsumed
            | EventType::LeaseRenewed
            | EventType::LeaseCompleted
            | EventType::LeaseExpired
            | EventType::LeaseRevoked
            | EventType::LeaseInterrupted
    );
    let (category, class) = match is_lease {
        true => ((3, "Identity & Access Management"), (3003, "Authorize Session")),
        false => ((6, "Application Activity"), (6003, "API Activity")),
    };
    let (activity_id, activity) = activity(event.kind);
    let (severity, status) = (severity(event), status(event));
    let mut whole = object(json!({
        "category_uid": category.0, "category_name": category.1,
        "class_uid": class.0, "class_name": class.1,
        "activity_id": activity_id, "activity_name": activity,
        "type_uid": class.0 * 100 + activity_id, "type_name": format!("{}: {activity}", class.1),
        "severity_id": severity.0, "severity": severity.1,
        "status_id": status.0, "status": status.1,
        "time": event.time.as_millisecond(),
        "message": message(event),
        "metadata": metadata(event),
        "actor": actor(event),
        "src_endpoint": { "hostname": event.host },
        "unmapped": unmapped(event),
    }));
    put(&mut whole, "status_code", event.outcome.clone());
    put(&mut whole, "status_detail", event.reason.clone());
    if is_lease {
        whole.extend(authorize_session(event));
    } else {
        whole.extend(api_activity(event));
    }
    Value::Object(whole)
}

/// Number and caption within the class; 99 takes the event's own word.
fn activity(kind: EventType) -> Coded {
    let own = (OTHER, kind.as_str());
    match kind {
        EventType::LeaseGranted | EventType::LeaseDenied | EventType::LeaseRenewed => {
            (1, "Assign Privileges")
        }
        EventType::LeaseRequested
        | EventType::LeaseConsumed
        | EventType::LeaseCompleted
        | EventType::LeaseExpired
        | EventType::LeaseRevoked
        | EventType::LeaseInterrupted => own,
        EventType::RunStarted
        | EventType::ExecStarted
        | EventType::SecretSet
        | EventType::IssuerInitialised
        | EventType::MintIssued => (1, "Create"),
        EventType::OutputRedacted
        | EventType::SecretRotated
        | EventType::IssuerRotated
        | EventType::MintRenewed => (3, "Update"),
        EventType::ExecScrubbed
        | EventType::SecretRemoved
        | EventType::TrailRotated
        | EventType::IssuerWithdrawn
        | EventType::MintRevoked => (4, "Delete"),
        EventType::MintExpired | EventType::MintRevocationFailed => own,
        EventType::RunEnded
        | EventType::ExecExited
        | EventType::BrokerStarted
        | EventType::BrokerStopped => own,
    }
}

fn status(event: &Event) -> Coded {
    let is_outcome =
        |good: &str| if event.outcome.as_deref() == Some(good) { SUCCESS } else { FAILURE };
    match event.kind {
        // Whether it is granted is the next event.
        EventType::LeaseRequested => UNKNOWN,
        EventType::LeaseDenied | EventType::LeaseInterrupted | EventType::MintRevocationFailed => {
            FAILURE
        }
        EventType::ExecExited if event.detail.get("exit_status") == Some(&json!(0)) => {
            is_outcome("exited")
        }
        EventType::ExecExited => FAILURE,
        EventType::ExecScrubbed => is_outcome("wiped"),
        EventType::IssuerInitialised | EventType::IssuerRotated | EventType::IssuerWithdrawn
            if event.outcome.as_deref() == Some("failed") =>
        {
            FAILURE
        }
        EventType::RunStarted
        | EventType::RunEnded
        | EventType::LeaseGranted
        | EventType::LeaseConsumed
        | EventType::LeaseRenewed
        | EventType::LeaseCompleted
        | EventType::LeaseExpired
        | EventType::LeaseRevoked
        | EventType::ExecStarted
        | EventType::OutputRedacted
        | EventType::MintIssued
        | EventType::MintRenewed
        | EventType::MintRevoked
        | EventType::MintExpired
        | EventType::SecretSet
        | EventType::SecretRotated
        | EventType::SecretRemoved
        | EventType::IssuerInitialised
        | EventType::IssuerRotated
        | EventType::IssuerWithdrawn
        | EventType::BrokerStarted
        | EventType::BrokerStopped
        | EventType::TrailRotated => SUCCESS,
    }
}

/// How much it asks of whoever reads it.
fn severity(event: &Event) -> Coded {
    match event.kind {
        // A value may be left somewhere.
        EventType::ExecScrubbed if event.outcome.as_deref() != Some("wiped") => HIGH,
        EventType::LeaseDenied | EventType::LeaseInterrupted | EventType::MintRevocationFailed => {
            MEDIUM
        }
        EventType::ExecExited if event.outcome.as_deref() == Some("interrupted") => MEDIUM,
        EventType::LeaseRevoked
        | EventType::SecretRemoved
        | EventType::IssuerWithdrawn
        | EventType::TrailRotated => LOW,
        _ => INFORMATIONAL,
    }
}

fn message(event: &Event) -> String {
    let mut words = event.kind.as_str().to_owned();
    if let Some(asked) = privilege(event) {
        words += &format!(" {asked}");
    }
    for (label, text) in [("", &event.outcome), ("because ", &event.reason)] {
        if let Some(text) = text {
            words += &format!(", {label}{text}");
        }
    }
    words
}

fn metadata(event: &Event) -> Value {
    let mut metadata = object(json!({
        "version": VERSION,
        "product": {
            "name": "sublet", "vendor_name": "sublet", "version": env!("CARGO_PKG_VERSION"),
        },
        "uid": event.id.as_str(),
        "sequence": event.seq,
        "event_code": event.kind.as_str(),
        "log_name": "sublet.audit",
        "original_time": timestamp_text(event.time),
    }));
    put(&mut metadata, "correlation_uid", request_id(event));
    Value::Object(metadata)
}

/// The principal, who authorised; the agent as the application that acts in their name.
fn actor(event: &Event) -> Value {
    let mut actor = Map::new();
    if let Some(principal) = &event.principal {
        let principal = principal.as_str();
        // A person or a workflow: which, the trail does not say.
        actor.insert(
            "user".to_owned(),
            json!({ "name": principal, "uid": principal, "type_id": 0 }),
        );
    }
    let app = event.agent.as_ref().map_or("sublet", |agent| agent.as_str());
    actor.insert("app_name".to_owned(), app.into());
    if let Some(run) = &event.run_id {
        actor.insert("session".to_owned(), json!({ "uid": run.as_str() }));
    }
    Value::Object(actor)
}

/// Class 3003: which agent was to have which privilege, and where.
fn authorize_session(event: &Event) -> Map<String, Value> {
    let agent = event.agent.as_ref().map_or("unknown", |agent| agent.as_str());
    let mut user = object(json!({ "name": agent, "uid": agent, "type_id": 4, "type": "Service" }));
    put(&mut user, "credential_uid", event.lease_id.as_ref().map(ToString::to_string));
    let mut session = Map::new();
    put(&mut session, "uid", event.run_id.as_ref().map(ToString::to_string));
    put(&mut session, "issuer", Some(event.host.clone()));
    let mut members = object(json!({
        "user": user,
        "session": session,
        // Required: a `get` that no lease was found for names none.
        "privileges": [privilege(event).unwrap_or_else(|| "unknown".to_owned())],
    }));
    if let Some(audience) = &event.audience {
        members.insert("dst_endpoint".to_owned(), endpoint(audience));
    }
    members
}

/// Class 6003: which operation, on what.
fn api_activity(event: &Event) -> Map<String, Value> {
    let mut api = object(json!({
        "operation": event.kind.as_str(),
        "service": { "name": "sublet", "version": env!("CARGO_PKG_VERSION") },
    }));
    if let Some(request) = request_id(event) {
        api.insert("request".to_owned(), json!({ "uid": request }));
    }
    let of = |kind: &str, uid: &str| json!({ "type": kind, "uid": uid, "name": uid });
    let mut resources = Vec::new();
    resources.extend(event.exec_id.as_ref().map(|exec| of("exec", exec.as_str())));
    let held = event.detail.get("lease_ids").and_then(Value::as_array).into_iter().flatten();
    resources.extend(held.filter_map(Value::as_str).map(|lease| of("lease", lease)));
    let secret = event.detail.get("secret").and_then(Value::as_str);
    resources.extend(secret.map(|name| of("secret", name)));
    if matches!(event.kind, EventType::RunStarted | EventType::RunEnded) {
        resources.extend(event.run_id.as_ref().map(|run| of("run", run.as_str())));
    }
    let mut members = object(json!({ "api": api }));
    if !resources.is_empty() {
        members.insert("resources".to_owned(), resources.into());
    }
    members
}

/// The event as it is recorded, without what has its own place above.
fn unmapped(event: &Event) -> Value {
    let Ok(Value::Object(mut whole)) = serde_json::to_value(event) else { return json!({}) };
    for mapped in ["seq", "id", "time", "type", "host", "outcome", "reason", "principal", "agent"] {
        whole.remove(mapped);
    }
    Value::Object(whole)
}

fn privilege(event: &Event) -> Option<String> {
    let capability = event.capability.as_ref()?;
    Some(match &event.audience {
        Some(audience) => format!("{capability}@{audience}"),
        None => capability.to_string(),
    })
}

fn endpoint(audience: &AudienceName) -> Value {
    let text = audience.as_str();
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) => match port.parse::<u16>() {
            Ok(port) => (host, Some(port)),
            Err(_) => (text, None),
        },
        None => (text, None),
    };
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let key = if host.parse::<std::net::IpAddr>().is_ok() { "ip" } else { "hostname" };
    let mut endpoint = object(json!({ key: host }));
    if let Some(port) = port {
        endpoint.insert("port".to_owned(), port.into());
    }
    Value::Object(endpoint)
}

fn request_id(event: &Event) -> Option<String> {
    event.detail.get("request_id").and_then(Value::as_str).map(str::to_owned)
}

fn put(object: &mut Map<String, Value>, key: &str, value: Option<String>) {
    object.extend(value.map(|value| (key.to_owned(), Value::String(value))));
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(members) => members,
        _ => Map::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::event::{Draft, Head};
    use crate::model::id::{ExecId, LeaseId, RequestId};

    fn sample(kind: EventType) -> Event {
        let mut draft = Draft::new(kind, "2026-11-22T10:00:00.123Z".parse().unwrap(), "host-1")
            .of_exec(&ExecId::fresh(), &[LeaseId::fresh()])
            .of_request(&RequestId::fresh());
        draft.run_id = Some("run-1".parse().unwrap());
        draft.agent = Some("agent".parse().unwrap());
        draft.principal = Some("alice".parse().unwrap());
        draft.capability = Some("db.read".parse().unwrap());
        draft.audience = Some("db.internal:5432".parse().unwrap());
        draft.seal(&Head::EMPTY)
    }

    /// What the published schema requires of the two classes, with its constraints.
    #[test]
    fn every_type_has_what_its_class_requires() {
        for &kind in EventType::ALL {
            let whole = event(&sample(kind));
            let number = |key: &str| whole[key].as_u64().unwrap_or_else(|| panic!("{kind} {key}"));
            let is_lease = kind.as_str().starts_with("lease.");
            let class = if is_lease { 3003 } else { 6003 };
            assert_eq!((number("class_uid"), number("category_uid")), (class, class / 1000));
            assert_eq!(number("type_uid"), class * 100 + number("activity_id"), "{kind}");
            assert!([1, 2, 3, 4, 99].contains(&number("activity_id")), "{kind}");
            assert!(!is_lease || [1, 99].contains(&number("activity_id")), "{kind}");
            assert!(number("severity_id") >= 1 && number("status_id") <= 2, "{kind}");
            assert_eq!(number("time"), 1_795_341_600_123);
            assert_eq!(whole["metadata"]["version"], "1.8.0");
            assert_eq!(whole["metadata"]["product"]["name"], "sublet");
            assert!(whole["metadata"]["product"]["version"].is_string());
            assert!(whole["actor"]["user"]["name"].is_string());
            assert_eq!(whole["src_endpoint"]["hostname"], "host-1", "required by 6003");
            assert_eq!(whole["unmapped"]["hash"].as_str().unwrap().len(), 64);
            if is_lease {
                assert!(whole["user"]["uid"].is_string());
                assert_eq!(whole["privileges"], json!(["db.read@db.internal:5432"]));
                assert!(whole.get("group").is_none(), "just one of privileges and group");
                assert_eq!(whole["dst_endpoint"], json!({"hostname": "db.internal", "port": 5432}));
            } else {
                assert_eq!(whole["api"]["operation"], kind.as_str());
                assert!(whole["api"]["request"]["uid"].is_string());
                assert!(!whole["resources"].as_array().unwrap().is_empty());
            }
        }
    }

    #[test]
    fn what_went_wrong_is_told_from_what_went_well() {
        #[track_caller]
        fn check(kind: EventType, change: impl Fn(&mut Event), status: u64, severity: u64) {
            let mut sample = sample(kind);
            change(&mut sample);
            let whole = event(&sample);
            assert_eq!(
                (whole["status_id"].as_u64(), whole["severity_id"].as_u64()),
                (Some(status), Some(severity))
            );
        }
        let outcome = |text: &'static str| move |e: &mut Event| e.outcome = Some(text.to_owned());
        check(EventType::LeaseGranted, outcome("granted"), 1, 1);
        check(EventType::LeaseRequested, |_| {}, 0, 1);
        check(EventType::LeaseDenied, outcome("denied"), 2, 3);
        check(EventType::ExecScrubbed, outcome("wiped"), 1, 1);
        check(EventType::ExecScrubbed, outcome("not_wiped"), 2, 4);
        let exited = |status: i32| {
            move |e: &mut Event| {
                e.outcome = Some("exited".to_owned());
                e.detail.insert("exit_status".to_owned(), status.into());
            }
        };
        check(EventType::ExecExited, exited(0), 1, 1);
        check(EventType::ExecExited, exited(1), 2, 1);
        check(EventType::ExecExited, outcome("killed"), 2, 1);
    }

    #[test]
    fn audiences_are_hosts_or_addresses() {
        #[track_caller]
        fn check(audience: &str, expected: Value) {
            assert_eq!(endpoint(&audience.parse().unwrap()), expected);
        }
        check("github.com", json!({ "hostname": "github.com" }));
        check("10.0.0.1:443", json!({ "ip": "10.0.0.1", "port": 443 }));
        check("[::1]", json!({ "ip": "::1" }));
        check("[::1]:8", json!({ "ip": "::1", "port": 8 }));
    }
}
