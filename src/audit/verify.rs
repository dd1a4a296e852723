//! Whether the trail is whole: each event unchanged and linked to the one before, and its end where it
//! is known to have been.
#![forbid(unsafe_code)]

use crate::model::event::{Head, KeptHead, LinkFault, RecordedEvent};

/// What a trail was found to be.
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use]
pub struct Report {
    /// How many events are proven: all, or those before the finding.
    pub events: u64,
    /// The last proven event.
    pub head: Head,
    /// The first thing that is wrong.
    pub finding: Option<Finding>,
    /// Events that were not yet on disk when the power was cut, as the kept head shows. No finding.
    pub lost_with_power: u64,
}

/// Where a head that contradicts the trail was kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeadOf {
    /// By the launcher, outside the database.
    Launcher,
    /// By whoever asks: `--head`.
    Caller,
}

/// The first thing wrong with a trail.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Finding {
    #[error("event {seq} was changed: its contents do not fit its hash")]
    Changed { seq: u64 },
    #[error("event {seq} was replaced: it is whole in itself, but event {} follows another", seq + 1)]
    Replaced { seq: u64 },
    #[error("{} removed", range(.first, .last))]
    Removed { first: u64, last: u64 },
    #[error("events were reordered: in the place of event {seq} stands event {found}")]
    Reordered { seq: u64, found: u64 },
    #[error("an event numbered {seq} was inserted, where {expected} was to come")]
    Inserted { seq: u64, expected: u64 },
    #[error("{} removed at the end, as {} shows", range(&(.last + 1), .kept), name(*.of))]
    Truncated { last: u64, kept: u64, of: HeadOf },
    #[error("the trail was rewritten up to event {seq} or beyond: its hash is not the one that {} holds", name(*.of))]
    Rewritten { seq: u64, of: HeadOf },
}

impl Finding {
    /// The event that it is about.
    pub fn seq(&self) -> u64 {
        match *self {
            Finding::Changed { seq }
            | Finding::Replaced { seq }
            | Finding::Reordered { seq, .. }
            | Finding::Inserted { seq, .. }
            | Finding::Rewritten { seq, .. } => seq,
            Finding::Removed { first, .. } => first,
            Finding::Truncated { last, .. } => last + 1,
        }
    }
}

fn range(first: &u64, last: &u64) -> String {
    if first >= last {
        format!("event {first} was")
    } else {
        format!("events {first} to {last} were")
    }
}

fn name(of: HeadOf) -> &'static str {
    match of {
        HeadOf::Launcher => "the head that the launcher keeps outside the database",
        HeadOf::Caller => "the head that was given",
    }
}

/// Follows the chain from its first event, then holds its end against the heads that are known.
///
/// `boot_id` is that of now: under the boot in which the launcher wrote its head, nothing that it had
/// seen can be gone by itself.
///
/// # Errors
/// Only those of reading. What is wrong with the trail is in the report.
pub fn verify<E>(
    trail: impl IntoIterator<Item = Result<RecordedEvent, E>>,
    kept: Option<&KeptHead>,
    boot_id: &str,
    given: Option<&Head>,
) -> Result<Report, E> {
    let mut marks = Marks::new(kept, boot_id, given);
    let mut report = Report { events: 0, head: Head::EMPTY, finding: None, lost_with_power: 0 };
    for event in trail {
        let event = event?;
        match event.verify_link(&report.head) {
            Ok(head) => {
                report.head = head;
                report.events += 1;
                marks.pass(&head);
            }
            Err(fault) => {
                report.finding = Some(finding(fault, report.head.seq));
                return Ok(report);
            }
        }
    }
    (report.finding, report.lost_with_power) = marks.held_against(&report.head);
    Ok(report)
}

fn finding(fault: LinkFault, last: u64) -> Finding {
    match fault {
        LinkFault::Altered { seq } => Finding::Changed { seq },
        LinkFault::Moved { seq, found } => Finding::Reordered { seq, found },
        LinkFault::Gap { expected, found } if found > expected => {
            Finding::Removed { first: expected, last: found - 1 }
        }
        LinkFault::Gap { expected, found } => Finding::Inserted { seq: found, expected },
        // Its own hash fits, so it is the one before that is not what it was; the first has none before.
        LinkFault::Unlinked { seq } if last == 0 => Finding::Changed { seq },
        LinkFault::Unlinked { .. } => Finding::Replaced { seq: last },
    }
}

/// The heads that the trail must have passed.
struct Marks {
    marks: Vec<Mark>,
}

struct Mark {
    head: Head,
    of: HeadOf,
    /// May be missing at the end: the power was cut before it was on disk.
    may_be_lost: bool,
    contradicted: bool,
}

impl Marks {
    fn new(kept: Option<&KeptHead>, boot_id: &str, given: Option<&Head>) -> Self {
        let mark = |head: &Head, of, may_be_lost| {
            let contradicted = head.seq == 0 && *head != Head::EMPTY;
            Mark { head: *head, of, may_be_lost, contradicted }
        };
        let mut marks = Vec::new();
        if let Some(kept) = kept {
            marks.push(mark(&kept.durable, HeadOf::Launcher, false));
            marks.push(mark(&kept.latest, HeadOf::Launcher, kept.boot_id != boot_id));
        }
        marks.extend(given.map(|head| mark(head, HeadOf::Caller, false)));
        Self { marks }
    }

    fn pass(&mut self, head: &Head) {
        for mark in &mut self.marks {
            mark.contradicted |= mark.head.seq == head.seq && mark.head.hash != head.hash;
        }
    }

    fn held_against(&self, end: &Head) -> (Option<Finding>, u64) {
        // The events after a power cut take the numbers of those that were lost in it.
        let contradicted = self.marks.iter().filter(|mark| mark.contradicted && !mark.may_be_lost);
        if let Some(mark) = contradicted.min_by_key(|mark| mark.head.seq) {
            return (Some(Finding::Rewritten { seq: mark.head.seq, of: mark.of }), 0);
        }
        let mut lost = 0;
        for mark in self.marks.iter().filter(|mark| mark.head.seq > end.seq) {
            if !mark.may_be_lost {
                let Mark { head, of, .. } = mark;
                return (Some(Finding::Truncated { last: end.seq, kept: head.seq, of: *of }), 0);
            }
            lost = lost.max(mark.head.seq - end.seq);
        }
        (None, lost)
    }
}
