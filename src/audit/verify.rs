//! Whether the trail is whole: each event unchanged and linked to the one before, and every head that is
//! known of it where it is known to have been.
//!
//! Receives what the trail is made of, in order ([`Item`]), and what is known of it from elsewhere
//! ([`Known`]). Returns the first contradiction. Pure.
#![forbid(unsafe_code)]

use crate::audit::finding::{Finding, HeadOf};
use crate::envelope::{Checkpoint, NoteKey, SignedCheckpoint};
use crate::model::event::{EventHash, Head, KeptHead, LinkFault, RecordedEvent};

/// What a trail was found to be.
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use]
pub struct Report {
    /// How many events are proven: all, or those before the finding.
    pub events: u64,
    /// The first event that there should be: 1, or the one after what a rotation moved away.
    pub from: u64,
    /// The last proven event.
    pub head: Head,
    /// How many signed checkpoints the trail was found to agree with.
    pub checkpoints: u64,
    /// The first thing that is wrong.
    pub finding: Option<Finding>,
    /// Events that were not yet on disk when the power was cut, as the kept head shows. No finding.
    pub lost_with_power: u64,
}

/// What a trail is made of, as it lies in a store or stands in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Item {
    Event(RecordedEvent),
    /// A signed note about the event before it.
    Checkpoint(String),
    /// What the reader itself found wrong in this place.
    Fault(Finding),
}

impl From<RecordedEvent> for Item {
    fn from(event: RecordedEvent) -> Self {
        Item::Event(event)
    }
}

/// What is known of a trail before it is read.
#[derive(Debug, Clone)]
pub struct Known<'k> {
    base: Base,
    marks: Vec<Mark>,
    keys: &'k [NoteKey],
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Base {
    /// After this event. [`Head::EMPTY`]: with the first that there ever was.
    At(Head),
    /// Wherever its first line says.
    Anywhere,
}

/// Something that the trail must have passed, at event `seq`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Mark {
    seq: u64,
    what: What,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum What {
    Hash {
        hash: EventHash,
        of: HeadOf,
        /// May be missing at the end: the power was cut before it was on disk.
        may_be_lost: bool,
    },
    /// A checkpoint that proves nothing, and why.
    Forged(String),
}

impl<'k> Known<'k> {
    /// A whole trail, which begins with event 1 or where a rotation cut it. `keys` sign its checkpoints.
    pub fn trail(keys: &'k [NoteKey]) -> Self {
        Self { base: Base::At(Head::EMPTY), marks: Vec::new(), keys }
    }

    /// A part of a trail, which begins wherever its first event says.
    pub fn part(keys: &'k [NoteKey]) -> Self {
        Self { base: Base::Anywhere, ..Self::trail(keys) }
    }

    /// The head that the launcher keeps. `boot_id` is that of now: under the boot in which the launcher
    /// wrote it, nothing that it had seen can be gone by itself.
    pub fn kept(mut self, kept: &KeptHead, boot_id: &str) -> Self {
        self.mark(&kept.durable, HeadOf::Launcher, false);
        self.mark(&kept.latest, HeadOf::Launcher, kept.boot_id != boot_id);
        self
    }

    /// A head that was kept elsewhere.
    pub fn head(mut self, head: &Head) -> Self {
        self.mark(head, HeadOf::Caller, false);
        self
    }

    /// A checkpoint that was kept elsewhere.
    pub fn checkpoint(mut self, kept: &SignedCheckpoint) -> Self {
        self.mark(&kept.checkpoint().head, HeadOf::KeptCheckpoint, false);
        self
    }

    /// One that was kept elsewhere and is not signed as it should be, at event `seq`.
    pub fn forged(mut self, seq: u64, fault: String) -> Self {
        self.marks.push(Mark { seq, what: What::Forged(fault) });
        self
    }

    /// The checkpoints of the store, by the numbers of their rows. If the first says that a rotation moved
    /// older events away, the trail begins there.
    pub fn rows(mut self, rows: impl IntoIterator<Item = (u64, String)>) -> Self {
        for (index, (seq, note)) in rows.into_iter().enumerate() {
            let (checkpoint, fault) = match Checkpoint::open(&note, self.keys) {
                Ok(signed) => (Some(signed.checkpoint().clone()), None),
                Err(e) => (Checkpoint::unproven(&note), Some(e.to_string())),
            };
            let fault = fault.or_else(|| {
                let about = checkpoint.as_ref().map_or(0, |c| c.head.seq);
                (about != seq).then(|| format!("is about event {about}"))
            });
            // One that is not proven is told below, as such and not as the removal of what was before it.
            if let (0, Some(c), Base::At(_)) = (index, &checkpoint, self.base)
                && c.cut.is_some()
            {
                self.base = Base::At(Head { seq, hash: c.head.hash });
            }
            match (fault, checkpoint) {
                (None, Some(c)) => self.mark(&c.head, HeadOf::Checkpoint, false),
                (fault, _) => self.marks.push(Mark {
                    seq,
                    what: What::Forged(fault.unwrap_or_else(|| "says nothing".to_owned())),
                }),
            }
        }
        self
    }

    fn mark(&mut self, head: &Head, of: HeadOf, may_be_lost: bool) {
        let Head { seq, hash } = *head;
        self.marks.push(Mark { seq, what: What::Hash { hash, of, may_be_lost } });
    }
}

/// Follows the chain from its beginning, and holds it against all that is known of it.
///
/// # Errors
/// Only those of reading. What is wrong with the trail is in the report.
pub fn verify<E, I: Into<Item>>(
    trail: impl IntoIterator<Item = Result<I, E>>,
    known: Known<'_>,
) -> Result<Report, E> {
    let mut trail = trail.into_iter();
    let mut walk = Walk::begin(known);
    while let Some(item) = trail.next() {
        let fault = match item?.into() {
            Item::Event(event) => match walk.step(&event) {
                Ok(()) => continue,
                Err(Finding::Removed { first, last }) => {
                    // In a file, what is missing here may stand further down.
                    let found = last + 1;
                    let mut is_later = false;
                    for item in trail.by_ref() {
                        is_later |= matches!(item?.into(), Item::Event(e) if e.seq == first);
                    }
                    match is_later {
                        true => Finding::Reordered { seq: first, found },
                        false => Finding::Removed { first, last },
                    }
                }
                Err(finding) => finding,
            },
            Item::Checkpoint(note) => match walk.vouched(&note) {
                Ok(()) => continue,
                Err(finding) => finding,
            },
            Item::Fault(finding) => finding,
        };
        return Ok(walk.stopped_by(fault));
    }
    Ok(walk.ended())
}

struct Walk<'k> {
    known: Known<'k>,
    /// How many marks lie behind.
    passed: usize,
    report: Report,
    /// Known, but of events before the beginning.
    out_of_reach: Option<u64>,
}

impl<'k> Walk<'k> {
    fn begin(mut known: Known<'k>) -> Self {
        known.marks.sort_by_key(|mark| mark.seq);
        let report = Report {
            events: 0,
            from: 1,
            head: Head::EMPTY,
            checkpoints: 0,
            finding: None,
            lost_with_power: 0,
        };
        let mut walk = Self { known, passed: 0, report, out_of_reach: None };
        if let Base::At(base) = walk.known.base {
            walk.begin_after(base);
        }
        walk
    }

    fn begin_after(&mut self, base: Head) {
        self.report.head = base;
        self.report.from = base.seq + 1;
        self.report.finding = self.pass(&base).err();
    }

    fn step(&mut self, event: &RecordedEvent) -> Result<(), Finding> {
        if self.known.base == Base::Anywhere && self.report.events == 0 {
            let base = event.predecessor().ok_or(Finding::Changed { seq: event.seq })?;
            // Nothing stands before the first: what it says of that is checked, not believed.
            self.begin_after(if base.seq == 0 { Head::EMPTY } else { base });
        }
        if let Some(finding) = self.report.finding.take() {
            return Err(finding);
        }
        let last = self.report.head.seq;
        let head = event.verify_link(&self.report.head).map_err(|f| finding(f, last))?;
        self.pass(&head)?;
        self.report.head = head;
        self.report.events += 1;
        Ok(())
    }

    /// Holds what is known up to `head` against it.
    fn pass(&mut self, head: &Head) -> Result<(), Finding> {
        while let Some(Mark { seq, what }) = self.known.marks.get(self.passed)
            && *seq <= head.seq
        {
            self.passed += 1;
            let seq = *seq;
            match what {
                What::Forged(fault) => return Err(Finding::Forged { seq, fault: fault.clone() }),
                What::Hash { hash, of, .. } if seq == head.seq && *hash == head.hash => {
                    if matches!(of, HeadOf::Checkpoint | HeadOf::KeptCheckpoint) {
                        self.report.checkpoints += 1;
                    }
                }
                What::Hash { of, may_be_lost, .. } if seq == head.seq => {
                    // The events after a power cut take the numbers of those that were lost in it.
                    if !may_be_lost {
                        return Err(Finding::Rewritten { seq, of: *of });
                    }
                }
                // Before the beginning. What we keep ourselves is moved away with the events; who asks
                // about such an event is to know that it was not looked at.
                What::Hash { of: HeadOf::Launcher | HeadOf::Checkpoint, .. } => {}
                What::Hash { of: HeadOf::Caller | HeadOf::KeptCheckpoint, .. } => {
                    self.out_of_reach = self.out_of_reach.or(Some(seq));
                }
            }
        }
        Ok(())
    }

    /// A signed note that stands after the event that it is about.
    fn vouched(&mut self, note: &str) -> Result<(), Finding> {
        let head = self.report.head;
        let forged = |fault: String| Finding::Forged { seq: head.seq, fault };
        let signed = Checkpoint::open(note, self.known.keys).map_err(|e| forged(e.to_string()))?;
        let about = signed.checkpoint().head;
        if about.seq != head.seq {
            return Err(forged(format!("is about event {}", about.seq)));
        }
        if about.hash != head.hash {
            return Err(Finding::Rewritten { seq: head.seq, of: HeadOf::Checkpoint });
        }
        self.report.checkpoints += 1;
        Ok(())
    }

    fn stopped_by(mut self, finding: Finding) -> Report {
        self.report.finding = Some(finding);
        self.report
    }

    fn ended(mut self) -> Report {
        let end = self.report.head.seq;
        if self.report.finding.is_some() {
            return self.report;
        }
        for Mark { seq, what } in &self.known.marks[self.passed..] {
            self.report.finding = match what {
                What::Forged(fault) => Some(Finding::Forged { seq: *seq, fault: fault.clone() }),
                What::Hash { may_be_lost: true, .. } => {
                    self.report.lost_with_power = self.report.lost_with_power.max(seq - end);
                    continue;
                }
                What::Hash { of, .. } => {
                    let (kept, of) = self.furthest().unwrap_or((*seq, *of));
                    Some(Finding::Truncated { last: end, kept, of })
                }
            };
            self.report.lost_with_power = 0;
            return self.report;
        }
        let from = self.report.from;
        self.report.finding = self.out_of_reach.map(|seq| Finding::OutOfReach { seq, from });
        self.report
    }
}

impl Walk<'_> {
    /// The last event that must have been there, and whose head shows it.
    fn furthest(&self) -> Option<(u64, HeadOf)> {
        let ahead = self.known.marks.get(self.passed..)?.iter();
        let sure = ahead.filter_map(|Mark { seq, what }| match what {
            What::Hash { of, may_be_lost: false, .. } => Some((*seq, *of)),
            What::Hash { .. } | What::Forged(_) => None,
        });
        // Of several that are as far, the first.
        sure.reduce(|best, next| if next.0 > best.0 { next } else { best })
    }
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
