//! The trail, read: which events, the whole life of a lease, and whether anything was changed; and as others
//! take it: archives, OCSF.
//!
//! Receives events in the order of their rows, from wherever they are kept; returns what matches, or
//! what was found. Touches nothing but the signing key's file. Must never believe an event only because it
//! lies there: that is what [`verify`] is for.
//!
//! - here: [`list`], [`show`]
//! - [`verify`], [`Finding`]: whether it is whole, and what is not
//! - [`archive`]: events as lines of a file
//! - [`ocsf`]: events in the words of the Open Cybersecurity Schema Framework
//! - [`key`]: the key that signs checkpoints and envelopes
#![forbid(unsafe_code)]

pub mod archive;
mod finding;
pub mod key;
pub mod ocsf;
mod verify;

use std::collections::HashSet;

use serde_json::Value;

use crate::model::event::{Event, EventType, RecordedEvent};
use crate::model::id::{ExecId, LeaseId, RunId};

pub use finding::{Finding, HeadOf};
pub use verify::{Item, Known, Report, verify};

/// Why the trail cannot be shown; `E` is the keeper's own error.
#[derive(Debug, thiserror::Error)]
pub enum AuditError<E: std::error::Error + 'static> {
    #[error("cannot read the trail")]
    Read(#[source] E),
    #[error(
        "event {seq} is no event that this version of sublet knows: it was changed, or written by a later one; `sublet audit verify` tells which"
    )]
    Unknown { seq: u64, source: serde_json::Error },
}

/// Which events to list. All that is given must fit; the default fits every event.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    pub run: Option<RunId>,
    /// The events of the lease, and those of the execs that held it.
    pub lease: Option<LeaseId>,
    pub exec: Option<ExecId>,
    /// Any of these; none stands for all.
    pub types: Vec<EventType>,
    /// At this time or later, by the wall clock.
    pub since: Option<jiff::Timestamp>,
}

impl Filter {
    pub fn fits(&self, event: &Event) -> bool {
        let Filter { run, lease, exec, types, since } = self;
        (run.is_none() || event.run_id == *run)
            && (exec.is_none() || event.exec_id == *exec)
            && (types.is_empty() || types.contains(&event.kind))
            && since.is_none_or(|since| event.time >= since)
            && lease
                .as_ref()
                .is_none_or(|id| event.lease_id.as_ref() == Some(id) || holds(event, id))
    }
}

/// The events that fit, in order, each as soon as it is read.
pub fn list<E: std::error::Error + 'static>(
    trail: impl IntoIterator<Item = Result<RecordedEvent, E>>,
    filter: &Filter,
) -> impl Iterator<Item = Result<Event, AuditError<E>>> {
    trail
        .into_iter()
        .map(understood)
        .filter(|event| event.as_ref().map_or(true, |e| filter.fits(e)))
}

/// The whole life of a lease, in order: its request, verdict, uses, and end, and the execs that held it
/// with their scrub and redaction. Empty if the trail does not know it.
///
/// `trail` is read twice: what was requested is known to belong to the lease only by its grant.
///
/// # Errors
/// [`AuditError`].
pub fn show<E, I>(
    mut trail: impl FnMut() -> I,
    lease: &LeaseId,
) -> Result<Vec<Event>, AuditError<E>>
where
    E: std::error::Error + 'static,
    I: IntoIterator<Item = Result<RecordedEvent, E>>,
{
    let mut requests = HashSet::new();
    let mut execs = HashSet::new();
    let mut purpose = None;
    for event in trail() {
        let event = understood(event)?;
        let of_lease = event.lease_id.as_ref() == Some(lease);
        if of_lease {
            requests.extend(request_of(&event).map(str::to_owned));
            if purpose.is_none() && event.capability.is_some() {
                purpose = Some((event.capability.clone(), event.audience.clone()));
            }
        }
        if of_lease || holds(&event, lease) {
            execs.extend(event.exec_id);
        }
    }
    let mut life = Vec::new();
    for event in trail() {
        let event = understood(event)?;
        let belongs = match &event.lease_id {
            Some(id) => id == lease,
            None => {
                let asked = request_of(&event).is_some_and(|r| requests.contains(r));
                // Several leases may be asked for at once: those of another purpose are not this one's.
                let purpose_fits = event.capability.is_none()
                    || purpose == Some((event.capability.clone(), event.audience.clone()));
                let held = event.exec_id.as_ref().is_some_and(|e| execs.contains(e));
                holds(&event, lease) || held || (asked && purpose_fits)
            }
        };
        if belongs {
            life.push(event);
        }
    }
    Ok(life)
}

fn understood<E: std::error::Error + 'static>(
    event: Result<RecordedEvent, E>,
) -> Result<Event, AuditError<E>> {
    let event = event.map_err(AuditError::Read)?;
    event.event().map_err(|source| AuditError::Unknown { seq: event.seq, source })
}

/// Whether the event is of an exec that holds the lease.
fn holds(event: &Event, lease: &LeaseId) -> bool {
    let ids = event.detail.get("lease_ids").and_then(Value::as_array);
    ids.is_some_and(|ids| ids.iter().any(|id| id.as_str() == Some(lease.as_str())))
}

fn request_of(event: &Event) -> Option<&str> {
    event.detail.get("request_id").and_then(Value::as_str)
}

#[cfg(test)]
mod tests;
