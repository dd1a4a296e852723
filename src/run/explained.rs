//! `--explain`: the verdict for each lease and the sandbox as it would be. Runs nothing, records nothing.
#![forbid(unsafe_code)]

use serde::Serialize;

use super::error::RunError;
use super::scene::{self, Asked};
use crate::host::Trust;
use crate::launcher::client::Launcher;
use crate::launcher::wire::{Explanation, Notice, Order};
use crate::model::id::ExecId;
use crate::model::run::Counters;
use crate::model::verdict::DenyReason;
use crate::policy::{self, Policy, Verdict};
use crate::store::{Reader, StoreError};

/// What would become of one lease.
#[derive(Debug, Serialize)]
pub struct LeaseVerdict {
    /// `capability@audience`.
    pub asked: String,
    pub granted: bool,
    pub channel: Option<&'static str>,
    pub ttl_seconds: Option<u64>,
    pub uses: Option<u32>,
    pub reason: Option<DenyReason>,
    pub message: Option<String>,
    pub hint: Option<String>,
}

#[derive(Debug, Serialize)]
pub struct Explained {
    pub profile: String,
    #[serde(serialize_with = "crate::model::path_bytes::words")]
    pub workspace: std::path::PathBuf,
    pub leases: Vec<LeaseVerdict>,
    pub sandbox: Explanation,
}

pub fn explain(asked: Asked) -> Result<Explained, RunError> {
    let launcher = Launcher::fork(&asked.places, Trust::Invoker)?;
    let session = launcher.root();
    let scene = scene::set(asked, ExecId::fresh(), session)?;
    session.order(&Order::Explain(Box::new(scene.prepare())))?;
    scene.host.become_state_owner()?;

    let counters = match Reader::open(&scene.host.state_dir) {
        Ok(reader) => reader
            .read(|view| view.requests_counted(&scene.run.run_id, &scene.now))
            .map_err(RunError::Trail)?,
        // Nothing was ever recorded here.
        Err(StoreError::NotFound { .. }) => Counters::default(),
        Err(e) => return Err(RunError::Trail(e)),
    };
    let policy = Policy {
        profile: &scene.profile,
        config: &scene.host.config,
        has_issuer: scene.host.has_issuer(),
    };
    let resolved = scene.resolved();
    let leases = scene
        .requests
        .iter()
        .map(|request| {
            let asked = request.asked();
            match policy::decide(policy, request, &scene.run, counters, resolved.as_ref()) {
                Verdict::Granted(grant) => LeaseVerdict {
                    asked,
                    granted: true,
                    channel: Some(grant.channel().as_str()),
                    ttl_seconds: Some(grant.ttl().0.as_secs()),
                    uses: Some(grant.uses().get()),
                    reason: None,
                    message: None,
                    hint: None,
                },
                Verdict::Denied(denial) => LeaseVerdict {
                    asked,
                    granted: false,
                    channel: None,
                    ttl_seconds: None,
                    uses: None,
                    reason: Some(denial.reason),
                    message: Some(denial.message),
                    hint: Some(denial.hint),
                },
            }
        })
        .collect();
    let (notice, _) = session.notice_of(|n| matches!(n, Notice::Explained { .. }))?;
    match notice {
        Notice::Explained { explanation } => Ok(Explained {
            profile: scene.run.profile.clone(),
            workspace: scene.run.workspace.clone(),
            leases,
            sandbox: explanation?,
        }),
        _ => Err(RunError::LauncherDied),
    }
}
