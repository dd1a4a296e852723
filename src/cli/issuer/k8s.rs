//! `sublet issuer k8s`: the ServiceAccount, and what the host's pods carry.
#![forbid(unsafe_code)]

use serde_json::json;

use super::words;
use crate::cli::Globals;
use crate::cli::fail::{Answer, YES};
use crate::cli::output::Output;
use crate::host::ProfileRef;
use crate::identity::kubernetes::{Account, yaml};
use crate::model::name::IdentityName;

#[derive(Debug, clap::Args)]
#[command(after_long_help = words::K8S)]
pub struct K8sArgs {
    /// The client (application) id that the identity is federated with
    #[arg(long, value_name = "ID", value_parser = id)]
    pub client_id: String,
    /// Its tenant
    #[arg(long, value_name = "ID", value_parser = id)]
    pub tenant_id: String,
    /// The namespace of the pods
    #[arg(long, value_name = "NAME", default_value = "default", value_parser = namespace)]
    pub namespace: String,
    /// The profile that the account is for
    #[arg(long, value_name = "NAME|FILE", default_value = "default")]
    pub profile: String,
    /// The agent [default: as `sublet run` names it]
    #[arg(long, value_name = "NAME")]
    pub agent: Option<IdentityName>,
}

fn id(text: &str) -> Result<String, String> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_');
    if !text.is_empty() && text.len() <= 128 && text.bytes().all(plain) {
        return Ok(text.to_owned());
    }
    Err("an id is of letters, digits, `-`, `.` and `_`".to_owned())
}

fn namespace(text: &str) -> Result<String, String> {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    let edges = text.starts_with('-') || text.ends_with('-');
    if !text.is_empty() && text.len() <= 63 && text.bytes().all(plain) && !edges {
        return Ok(text.to_owned());
    }
    Err("a namespace is 1 to 63 lower-case letters, digits and `-`, no `-` first or last"
        .to_owned())
}

pub(super) fn execute(globals: &Globals, args: &K8sArgs) -> Answer {
    let agent = args.agent.clone().unwrap_or_else(crate::cli::run::default_agent);
    let account = Account {
        profile: &ProfileRef::parse(&args.profile).identity(),
        agent: &agent,
        client_id: &args.client_id,
        tenant_id: &args.tenant_id,
        namespace: &args.namespace,
    };
    let mut output = Output::new(globals.json);
    if output.json {
        output.object(&json!({
            "service_account": account.service_account(), "pod_template": account.pod_template(),
        }))?;
    } else {
        for line in yaml(&account.service_account()).lines() {
            output.line(line)?;
        }
        output.line("# To be merged into the `spec.template` of the host's workload:")?;
        for line in yaml(&account.pod_template()).lines() {
            output.line(format!("#   {line}"))?;
        }
    }
    output.finish()?;
    Ok(YES)
}
