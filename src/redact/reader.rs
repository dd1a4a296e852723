//! Receives the text from one place on, reads it as one form, and follows how far each value has come
//! (Knuth, Morris, Pratt: a byte of text is looked at a bounded number of times on average, whatever
//! value and text are). Returns the stretches to mask. Keeps places and counts, never bytes.
#![forbid(unsafe_code)]

use super::form::{self, Form, Unit};
use super::patterns::{Pattern, Patterns};
use super::stretches::Stretches;
use super::window::{Place, Text};

/// Bytes of a value that a complete line may end in and still be shown: in base64 and hex at most three
/// characters, which hold this byte and at most six bits of the next.
const OF_A_PASSED_LINE: usize = 1;

/// One way of cutting the text into units, from the place where it was begun.
#[derive(Clone)]
pub(super) struct Reader {
    form: Form,
    lanes: Box<[Lane]>,
    live: bool,
    /// Lanes that are somewhere inside a value.
    busy: usize,
    /// The next unit.
    at: Place,
    /// The byte that the last unit meant, if that unit was an escape of one byte.
    escaped: Option<u8>,
    /// Of digit forms: where the last digit is, how many there were (modulo the group), whether the
    /// line was broken since, and the `=` that may still come.
    last: Option<Place>,
    digits: u8,
    broken: bool,
    padding: u8,
}

/// How far one value has come, if its bytes begin in digit `phase` of the reader's groups.
#[derive(Clone, Copy, Default)]
struct Lane {
    pattern: usize,
    phase: u8,
    /// So many bytes of the value end where the reader is …
    matched: usize,
    /// … of which the text of the first so many is gone …
    gone: usize,
    /// … and the next begins here.
    start: Start,
}

/// Where a byte of the value begins: a unit, and which byte of the unit, or which digit of its group.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Start {
    at: Place,
    nth: u8,
}

/// A byte of the value, and the text that it was read from.
struct Read {
    byte: u8,
    start: Start,
    end: Place,
    escaped: bool,
}

#[derive(PartialEq, Eq)]
enum Step {
    On,
    /// The text ends here.
    Wait,
    /// No value goes on here.
    Stop,
}

impl Reader {
    pub fn new(form: Form, patterns: &Patterns) -> Self {
        let concerned = (0..patterns.len()).filter(|&i| form.concerns(patterns.pattern(i).core));
        let lanes = concerned.flat_map(|pattern| {
            (0..form.phases()).map(move |phase| Lane { pattern, phase, ..Lane::default() })
        });
        Self {
            form,
            lanes: lanes.collect(),
            live: false,
            busy: 0,
            at: 0,
            escaped: None,
            last: None,
            digits: 0,
            broken: false,
            padding: 0,
        }
    }

    /// Whether this form of any value needs to be looked for.
    pub fn has_work(&self) -> bool {
        !self.lanes.is_empty()
    }

    pub fn is_live(&self) -> bool {
        self.live
    }

    /// Whether a value that begins at `place` would be seen, there or a little before.
    pub fn covers(&self, text: &Text<'_>, place: Place) -> bool {
        let begins_here = self.at == place && self.padding == 0;
        // The last letter of an escape that means that very letter, as in `\"`. Without this each of many
        // such escapes in a row would want a reader of its own, for the same bytes.
        let is_its_own_escape = self.at == place + 1
            && self.escaped.is_some_and(|byte| {
                text.get(place) == Some(byte) && !form::begins_escape(self.form, byte)
            });
        self.live && (begins_here || is_its_own_escape)
    }

    pub fn begin(&mut self, at: Place) {
        self.live = true;
        self.at = at;
        self.escaped = None;
        (self.last, self.digits, self.broken, self.padding) = (None, 0, false, 0);
    }

    /// Whether both will read alike from here on, and differ at most in where they began.
    pub fn is_twin_of(&self, other: &Self) -> bool {
        let come = |reader: &Self| {
            (reader.live, reader.at, reader.last, reader.digits, reader.broken, reader.padding)
        };
        let lanes = || self.lanes.iter().zip(&other.lanes);
        come(self) == come(other)
            && lanes().all(|(a, b)| (a.matched, a.gone) == (b.matched, b.gone))
    }

    /// Takes the place of a twin, which stops: what it has matched began where the earlier of the two did.
    pub fn absorb(&mut self, twin: &mut Self) {
        for (own, other) in self.lanes.iter_mut().zip(&twin.lanes) {
            own.start = own.start.min(other.start);
        }
        twin.stop();
    }

    /// Reads up to `until`, as long as a value could go on.
    pub fn run(
        &mut self,
        patterns: &Patterns,
        text: &Text<'_>,
        until: Place,
        found: &mut Stretches,
    ) {
        while self.live && self.at < until {
            found.count_step();
            let step = if self.form.phases() == 1 {
                self.read_unit(patterns, text, found)
            } else {
                self.read_digit(patterns, text, found)
            };
            match step {
                Step::On => {}
                Step::Wait => return,
                Step::Stop => self.stop(),
            }
        }
    }

    fn stop(&mut self) {
        self.live = false;
        if self.busy > 0 {
            self.lanes.iter_mut().for_each(|lane| lane.matched = 0);
            self.busy = 0;
        }
    }

    fn read_unit(&mut self, patterns: &Patterns, text: &Text<'_>, found: &mut Stretches) -> Step {
        let (bytes, count, len) = match form::unit(self.form, text, self.at) {
            Unit::Bytes { bytes, count, len } => (bytes, count, len),
            Unit::CutOff if self.busy > 0 => return Step::Wait,
            Unit::CutOff => {
                let mut cores = self.lanes.iter().map(|lane| patterns.pattern(lane.pattern).core);
                let at = self.at;
                return match cores.any(|core| form::cut_off_could_begin(self.form, text, at, core))
                {
                    true => Step::Wait,
                    false => Step::Stop,
                };
            }
        };
        let end = self.at + Place::from(len);
        for (nth, &byte) in (0..count).zip(&bytes) {
            let read = Read { byte, start: Start { at: self.at, nth }, end, escaped: len > 1 };
            for lane in &mut self.lanes {
                lane.step(&mut self.busy, self.form, patterns, text, &read, found);
            }
        }
        self.at = end;
        self.escaped = (len > 1 && count == 1).then_some(bytes[0]);
        if self.busy > 0 { Step::On } else { Step::Stop }
    }

    fn read_digit(&mut self, patterns: &Patterns, text: &Text<'_>, found: &mut Stretches) -> Step {
        let Some(byte) = text.get(self.at) else { return Step::Wait };
        let Some(digit) = form::digit(self.form, byte) else {
            return self.read_break(byte, patterns, text, found);
        };
        if self.padding > 0 {
            return Step::Stop;
        }
        let end = self.at + 1;
        if let Some((at, last)) = self.last_digit(text) {
            for lane in &mut self.lanes {
                let nth = lane.nth(self.form, self.digits);
                if let Some(byte) = form::join(self.form, nth, last, digit) {
                    let start = Start { at, nth: nth - 1 };
                    let read = Read { byte, start, end, escaped: true };
                    lane.step(&mut self.busy, self.form, patterns, text, &read, found);
                }
            }
        }
        self.last = Some(self.at);
        self.digits = self.digits.wrapping_add(1);
        self.broken = false;
        self.at = end;
        let mut firsts = self.lanes.iter().map(|lane| patterns.pattern(lane.pattern).core[0]);
        if self.busy > 0 || firsts.any(|first| form::digit_could_begin(self.form, digit, first)) {
            Step::On
        } else {
            Step::Stop
        }
    }

    fn last_digit(&self, text: &Text<'_>) -> Option<(Place, u8)> {
        let at = self.last?;
        Some((at, form::digit(self.form, text.get(at)?)?))
    }

    /// What is no digit: one line break between two digits is passed over, `=` behind a value is its end.
    fn read_break(
        &mut self,
        byte: u8,
        patterns: &Patterns,
        text: &Text<'_>,
        found: &mut Stretches,
    ) -> Step {
        let len = match byte {
            b'=' if self.form == Form::Base64 && !self.broken => {
                return self.read_padding(patterns, found);
            }
            _ if self.broken || self.padding > 0 || self.last.is_none() => return Step::Stop,
            b'\n' => 1,
            b'\r' => match text.get(self.at + 1) {
                None => return Step::Wait,
                Some(b'\n') => 2,
                Some(_) => return Step::Stop,
            },
            _ => return Step::Stop,
        };
        self.broken = true;
        self.at += len;
        Step::On
    }

    fn read_padding(&mut self, patterns: &Patterns, found: &mut Stretches) -> Step {
        if self.padding == 0 {
            let due = self.padding_due(patterns);
            self.stop();
            (self.live, self.padding) = (due > 0, due);
        }
        if self.padding == 0 {
            return Step::Stop;
        }
        // The byte before it belongs to a stretch already, which this lengthens.
        found.add(self.at - 1, self.at + 1);
        self.at += 1;
        self.padding -= 1;
        if self.padding > 0 { Step::On } else { Step::Stop }
    }

    /// How many `=` pad a value that ends in the last digit; 0 if none does.
    fn padding_due(&self, patterns: &Patterns) -> u8 {
        let whole = |lane: &&Lane| lane.matched >= patterns.pattern(lane.pattern).core.len();
        let due = |lane: &Lane| match lane.nth(self.form, self.digits) {
            2 => 2,
            3 => 1,
            _ => 0,
        };
        self.lanes.iter().filter(whole).map(due).max().unwrap_or(0)
    }

    /// Where the text begins that could still become part of a value.
    pub fn undecided_from(&self) -> Place {
        if self.padding > 0 {
            return self.at;
        }
        let busy = self.lanes.iter().filter(|lane| lane.matched > 0).map(|lane| lane.start.at);
        match self.busy {
            0 => self.last.unwrap_or(self.at),
            _ => busy.min().unwrap_or(self.at),
        }
    }

    /// Where the text begins that is needed to read on.
    pub fn needs_from(&self) -> Place {
        self.undecided_from().min(self.at).min(self.last.unwrap_or(self.at))
    }

    /// Whether what it holds ends a line, and is next to nothing of a value that the next line may go on with:
    /// little has matched, or a whole value, which is masked. Spelled forms take a line break for a byte of the
    /// value, and never let one pass.
    pub fn lets_line_pass(&self, patterns: &Patterns) -> bool {
        let next_to_nothing = |lane: &Lane| {
            let whole = patterns.pattern(lane.pattern).core.len();
            lane.matched <= OF_A_PASSED_LINE || lane.matched >= whole
        };
        self.broken && self.lanes.iter().all(next_to_nothing)
    }

    /// Reads what is left of a text that goes no further now: a cut-off unit stands for itself. The reader
    /// stays where it is, because the text may go on after all.
    pub fn run_out(&self, patterns: &Patterns, text: Text<'_>, found: &mut Stretches) {
        if self.live && self.form.phases() == 1 && self.at < text.end() {
            self.clone().run(patterns, &text.over(), text.end(), found);
        }
    }

    /// Goes on without the text read so far: what it matched stays matched.
    pub fn forget(&mut self) {
        let next = Start { at: self.at, nth: 0 };
        for lane in self.lanes.iter_mut().filter(|lane| lane.matched > 0) {
            lane.gone = lane.matched;
            lane.start = match self.last {
                Some(at) => {
                    let nth = lane.nth(self.form, self.digits.wrapping_sub(1));
                    if form::begins(self.form, nth) { Start { at, nth } } else { next }
                }
                None => next,
            };
        }
    }
}

impl Lane {
    /// Which of its group the digit is that `before` others precede.
    fn nth(&self, form: Form, before: u8) -> u8 {
        before.wrapping_sub(self.phase) & (form.phases() - 1)
    }

    #[inline]
    fn step(
        &mut self,
        busy: &mut usize,
        form: Form,
        patterns: &Patterns,
        text: &Text<'_>,
        read: &Read,
        found: &mut Stretches,
    ) {
        let pattern = patterns.pattern(self.pattern);
        if self.matched == 0 && pattern.core[0] != read.byte {
            return;
        }
        let before = self.matched;
        let mut kept = before;
        while !goes_on(&pattern, kept, form, read) {
            found.count_step();
            if kept == 0 {
                self.matched = 0;
                *busy -= usize::from(before > 0);
                return;
            }
            kept = pattern.border(kept);
        }
        if kept == 0 {
            (self.start, self.gone) = (read.start, 0);
        } else if kept < before {
            self.drop_front(before - kept, form, text, found);
        }
        self.matched = kept + 1;
        *busy += usize::from(before == 0);
        if self.matched >= pattern.core.len() {
            found.add(self.start.at, read.end);
        }
    }

    fn drop_front(&mut self, bytes: usize, form: Form, text: &Text<'_>, found: &mut Stretches) {
        let without_text = bytes.min(self.gone);
        self.gone -= without_text;
        for _ in without_text..bytes {
            found.count_step();
            self.start = self.start.next(form, text);
        }
    }
}

/// Whether `read` is the byte that follows the first `matched` of the value.
///
/// A newline that ends the value is taken as part of it only if it is encoded: a plain one is layout,
/// which the lines behind it need.
fn goes_on(pattern: &Pattern<'_>, matched: usize, form: Form, read: &Read) -> bool {
    let layout = matched >= pattern.core.len() && (!read.escaped || form == Form::Terminal);
    !layout && pattern.value.get(matched) == Some(&read.byte)
}

impl Start {
    /// Where the byte behind this one begins.
    fn next(self, form: Form, text: &Text<'_>) -> Self {
        let Self { at, nth } = self;
        match form {
            Form::Hex => Self { at: digit_after(text, digit_after(text, at)), nth },
            Form::Base64 if nth == 2 => {
                Self { at: digit_after(text, digit_after(text, at)), nth: 0 }
            }
            Form::Base64 => Self { at: digit_after(text, at), nth: nth + 1 },
            _ => match form::unit(form, text, at) {
                Unit::Bytes { count, .. } if nth + 1 < count => Self { at, nth: nth + 1 },
                Unit::Bytes { len, .. } => Self { at: at + Place::from(len), nth: 0 },
                Unit::CutOff => self,
            },
        }
    }
}

/// The place of the digit behind the one at `at`, over a line break.
fn digit_after(text: &Text<'_>, at: Place) -> Place {
    after_break(text, after_break(text, at) + 1)
}

fn after_break(text: &Text<'_>, at: Place) -> Place {
    match (text.get(at), text.get(at + 1)) {
        (Some(b'\n'), _) => at + 1,
        (Some(b'\r'), Some(b'\n')) => at + 2,
        _ => at,
    }
}
