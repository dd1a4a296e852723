//! The Kubernetes ServiceAccount for a host that runs as a pod under Azure Workload Identity: a name that
//! follows from profile and agent, the client and the tenant, no token of the cluster, no role.
#![forbid(unsafe_code)]

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::assertion::Subject;
use crate::model::name::IdentityName;

/// A DNS label, RFC 1123 §2.1: what names most objects and what a namespace is.
const MAX_LABEL: usize = 63;

/// What is made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Account<'a> {
    pub profile: &'a str,
    pub agent: &'a IdentityName,
    pub client_id: &'a str,
    pub tenant_id: &'a str,
    pub namespace: &'a str,
}

impl Account<'_> {
    /// `sublet-PROFILE-AGENT-HASH`: readable as far as it may be, told apart by the hash of the subject.
    pub fn name(&self) -> String {
        let subject = Subject::new(self.profile, self.agent);
        let hash = Sha256::digest(subject.as_str());
        let hash: String = hash.iter().take(5).map(|b| format!("{b:02x}")).collect();
        let words = format!("{}-{}", self.profile, self.agent);
        let mut readable = String::new();
        for c in words.chars().map(|c| c.to_ascii_lowercase()) {
            let c = if c.is_ascii_lowercase() || c.is_ascii_digit() { c } else { '-' };
            if c != '-' || !readable.ends_with('-') {
                readable.push(c);
            }
        }
        let room = MAX_LABEL - "sublet--".len() - hash.len();
        let readable: String = readable.trim_matches('-').chars().take(room).collect();
        match readable.trim_matches('-') {
            "" => format!("sublet-{hash}"),
            readable => format!("sublet-{readable}-{hash}"),
        }
    }

    pub fn service_account(&self) -> Value {
        json!({
            "apiVersion": "v1",
            "kind": "ServiceAccount",
            "metadata": {
                "name": self.name(),
                "namespace": self.namespace,
                "labels": { "app.kubernetes.io/managed-by": "sublet" },
                "annotations": {
                    "azure.workload.identity/client-id": self.client_id,
                    "azure.workload.identity/tenant-id": self.tenant_id,
                },
            },
            "automountServiceAccountToken": false,
        })
    }

    /// What the pods of the host carry: to be merged into the workload's `spec.template`.
    pub fn pod_template(&self) -> Value {
        json!({
            "metadata": { "labels": { "azure.workload.identity/use": "true" } },
            "spec": {
                "serviceAccountName": self.name(),
                "automountServiceAccountToken": false,
            },
        })
    }
}

/// YAML of such an object. A JSON text is a YAML scalar, so nothing in it needs another quoting.
pub fn yaml(value: &Value) -> String {
    let mut out = String::new();
    write_yaml(&mut out, value, 0);
    out
}

fn write_yaml(out: &mut String, value: &Value, depth: usize) {
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                out.push_str(&"  ".repeat(depth));
                let plain = |b: u8| b.is_ascii_alphanumeric() || b"-._/".contains(&b);
                if key.bytes().all(plain) {
                    out.push_str(key);
                } else {
                    out.push_str(&Value::from(key.as_str()).to_string());
                }
                out.push(':');
                if value.is_object() {
                    out.push('\n');
                    write_yaml(out, value, depth + 1);
                } else {
                    out.push_str(&format!(" {value}\n"));
                }
            }
        }
        other => out.push_str(&format!("{other}\n")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_labels_and_follow_from_profile_and_agent() {
        let name = |profile: &str, agent: &str| {
            let agent = agent.parse().unwrap();
            let account = Account {
                profile,
                agent: &agent,
                client_id: "c",
                tenant_id: "t",
                namespace: "default",
            };
            let name = account.name();
            let label = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
            assert!(name.len() <= MAX_LABEL && name.bytes().all(label), "{name}");
            assert!(!name.ends_with('-') && !name.contains("--"), "{name}");
            name
        };
        assert_eq!(name("deploy", "ci"), name("deploy", "ci"));
        assert!(name("deploy", "ci").starts_with("sublet-deploy-ci-"));
        assert_ne!(name("deploy-ci", "x"), name("deploy", "ci-x"));
        assert_ne!(name("a/b", "x"), name("a.b", "x"));
        name(&"p".repeat(64), &"a".repeat(128));
        name("///", "!!");
    }
}
