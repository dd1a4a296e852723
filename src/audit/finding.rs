//! What can be wrong with a trail, in words.
#![forbid(unsafe_code)]

/// Where a head that contradicts the trail was kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeadOf {
    /// By the launcher, outside the database.
    Launcher,
    /// By whoever asks: `--head`.
    Caller,
    /// A signed checkpoint of the trail itself, or of an archive.
    Checkpoint,
    /// A signed checkpoint that whoever asks has kept: `--checkpoint`.
    KeptCheckpoint,
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
    #[error("the checkpoint of event {seq} {fault}")]
    Forged { seq: u64, fault: String },
    #[error(
        "what was given of event {seq} could not be looked at: the trail begins with event {from}; give the archives that hold what is before it"
    )]
    OutOfReach { seq: u64, from: u64 },
    #[error("line {line} of {file} is no event, where event {seq} was to come")]
    NotAnEvent { seq: u64, line: u64, file: String },
    #[error(
        "{file} was cut off or put together: it does not end in the checkpoint of its own events, of which the last is {seq}"
    )]
    CutOff { seq: u64, file: String },
}

impl Finding {
    /// The event that it is about.
    pub fn seq(&self) -> u64 {
        match *self {
            Finding::Changed { seq }
            | Finding::Replaced { seq }
            | Finding::Reordered { seq, .. }
            | Finding::Inserted { seq, .. }
            | Finding::Rewritten { seq, .. }
            | Finding::Forged { seq, .. }
            | Finding::OutOfReach { seq, .. }
            | Finding::NotAnEvent { seq, .. }
            | Finding::CutOff { seq, .. } => seq,
            Finding::Removed { first, .. } => first,
            Finding::Truncated { last, .. } => last + 1,
        }
    }

    /// A name that programs match on.
    pub fn name(&self) -> &'static str {
        match self {
            Finding::Changed { .. } => "changed",
            Finding::Replaced { .. } => "replaced",
            Finding::Removed { .. } => "removed",
            Finding::Reordered { .. } => "reordered",
            Finding::Inserted { .. } => "inserted",
            Finding::Truncated { .. } => "truncated",
            Finding::Rewritten { .. } => "rewritten",
            Finding::Forged { .. } => "forged_checkpoint",
            Finding::OutOfReach { .. } => "out_of_reach",
            Finding::NotAnEvent { .. } => "not_an_event",
            Finding::CutOff { .. } => "cut_off",
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
        HeadOf::Checkpoint => "a signed checkpoint",
        HeadOf::KeptCheckpoint => "the checkpoint that was given",
    }
}
