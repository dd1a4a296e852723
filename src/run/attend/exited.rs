//! How an exec ended: what the caller, the trail and the report are told of it.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};

use super::outlive_the_launcher;
use crate::launcher::client::Session;
use crate::launcher::wire::{Ending, Notice};
use crate::lease::LeaseView;
use crate::model::id::LeaseId;
use crate::model::lease::LeaseState;
use crate::model::name::Channel;
use crate::model::report::{Posture, Report, ScrubbedDelivery, Timings};
use crate::run::Outcome;
use crate::run::entries::Leased;
use crate::run::error::RunError;
use crate::run::scene::Scene;
use crate::sys::process::WaitStatus;

/// How it ended.
pub struct Exited {
    pub(super) ending: Ending,
    /// The launcher's word: bytes and whether they were wiped.
    pub(super) deliveries: Vec<(u64, bool)>,
    pub(super) posture: Posture,
    pub(super) timed_out: bool,
    pub expired: BTreeSet<u32>,
    pub(super) revoked: BTreeSet<u32>,
    pub redacted: u64,
    pub(super) unmasked: u64,
    pub(super) uses: BTreeMap<u32, u32>,
    /// No process of it is left.
    pub(super) gone: bool,
}

impl Exited {
    /// Waits until no process, mount or cgroup of the exec is left.
    pub fn wait_until_gone(&mut self, scene: &Scene, session: &Session) -> Result<(), RunError> {
        if self.gone {
            return Ok(());
        }
        let is_end = |n: &Notice| matches!(n, Notice::Ended { .. } | Notice::Refused { .. });
        match session.notice_of(is_end) {
            Ok((Notice::Refused { refusal, .. }, _)) => Err(refusal.into()),
            Ok(_) => {
                self.gone = true;
                Ok(())
            }
            Err(e) => {
                outlive_the_launcher(scene);
                Err(e.into())
            }
        }
    }

    /// The command's own, 128 and its signal, or 124 for a timeout.
    pub fn exit_status(&self) -> u8 {
        if self.timed_out {
            return 124;
        }
        match (self.code(), self.signal()) {
            (Some(code), _) => code as u8,
            (None, Some(signal)) => 128 + signal as u8,
            (None, None) => 128 + libc::SIGKILL as u8,
        }
    }

    fn code(&self) -> Option<i32> {
        match self.ending {
            Ending::Command { wait_status } => WaitStatus(wait_status).code(),
            Ending::Killed => None,
        }
    }

    pub fn signal(&self) -> Option<i32> {
        match self.ending {
            Ending::Command { wait_status } => WaitStatus(wait_status).signal(),
            Ending::Killed => Some(libc::SIGKILL),
        }
    }

    pub fn outcome_word(&self) -> &'static str {
        match (self.timed_out, self.code(), self.expired.is_empty()) {
            (true, ..) => "timed_out",
            (_, None, false) => "expired",
            (_, Some(_), _) => "exited",
            (_, None, true) if !self.revoked.is_empty() => "revoked",
            (_, None, true) => "killed",
        }
    }

    /// A revocation may have ended the exec before its mail was read. The lease is the revoker's to close then.
    pub fn note_revoked(&mut self, is_revoked: impl Fn(&LeaseId) -> bool, leased: &[Leased]) {
        let revoked =
            leased.iter().zip(0..).filter(|(lease, _)| is_revoked(&lease.record.lease_id));
        self.revoked.extend(revoked.map(|(_, index)| index));
    }

    /// How the lease of this index ended.
    pub fn state_of(&self, scene: &Scene, lease: &Leased, index: u32) -> LeaseState {
        let is_spent = self.uses_of(lease, index) >= lease.record.uses_left;
        match (self.revoked.contains(&index), self.expired.contains(&index)) {
            (true, _) => LeaseState::Revoked,
            (_, true) => LeaseState::Expired,
            // In one shot a lease ends with its exec; the broker's, when its uses are spent.
            _ if is_spent || scene.is_one_shot() => LeaseState::Completed,
            _ => LeaseState::Consumed,
        }
    }

    /// A use is one start of an exec; on `git` one answered `get`, on `ssh` one signature.
    fn uses_of(&self, lease: &Leased, index: u32) -> u32 {
        match lease.record.channel {
            Channel::Git | Channel::Ssh => self.uses.get(&index).copied().unwrap_or(0),
            Channel::Memfd | Channel::File | Channel::Env | Channel::Token => 1,
        }
    }

    pub fn scrubbed(&self, leased: &[Leased]) -> Vec<ScrubbedDelivery> {
        leased
            .iter()
            .zip(&self.deliveries)
            .map(|(lease, &(bytes, wiped))| ScrubbedDelivery {
                lease_id: lease.record.lease_id.clone(),
                channel: lease.record.channel,
                bytes,
                wiped,
            })
            .collect()
    }

    pub fn outcome(self, scene: &Scene, leased: &[Leased], timings: Timings) -> Outcome {
        let leases = leased
            .iter()
            .zip(0..)
            .map(|(lease, index)| {
                let mut record = lease.record.clone();
                record.state = self.state_of(scene, lease, index);
                record.uses_left = record.uses_left.saturating_sub(self.uses_of(lease, index));
                let view = LeaseView::new(&record, Some(lease.grant.place()), &scene.now);
                serde_json::to_value(view).unwrap_or_default()
            })
            .collect();
        let (exit_status, word) = (self.exit_status(), self.outcome_word());
        let report = Report {
            run_id: scene.run.run_id.clone(),
            exec_id: scene.exec_id.clone(),
            profile: scene.run.profile.clone(),
            workspace: scene.run.workspace.clone(),
            command: scene.command.iter().map(|a| a.to_string_lossy().into_owned()).collect(),
            leases,
            exit_status: exit_status.into(),
            signal: self.signal(),
            timed_out: self.timed_out,
            scrubbed: self.scrubbed(leased),
            enforced: self.posture,
            redacted: self.redacted,
            unmasked_values: self.unmasked,
            timings_us: timings,
        };
        Outcome { report, exit_status, word, unrecorded: None }
    }
}
