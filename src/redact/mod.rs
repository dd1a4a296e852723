//! Receives what a command writes, in chunks; returns it with every leased value replaced by `***`.
//! Touches nothing but its own memory; shows a byte that could still turn out to be a value's only where it is
//! asked to: [`Redactor::flush`], [`Redactor::pass_line`].
//!
//! A value is found plain, in base64 (both alphabets, any alignment inside something longer, padded or
//! not, lines broken), in hex (either case, lines broken), percent-encoded and as the inside of a JSON
//! string (any of its bytes encoded, the others not), and with a terminal's `\r\n` for its `\n`. It is
//! not found encoded twice, in hex with separators, compressed or cut in pieces: this protects against
//! an accident in a log, not against the command.
//!
//! - Newlines at a value's end need not be there. If they are, encoded ones are masked with the value;
//!   plain ones stay, because they are layout that the lines behind need.
//! - A base64 digit that holds bits of the value is masked whole, with the neighbour's bits in it, and
//!   the padding behind a value too.
//! - Where occurrences overlap, what they cover together is one mask: the end of the one that begins
//!   later is as secret as the other. So a value inside another is no mask of its own.
//!
//! How it works: `prefilter` finds the places where a value could begin. From there a `reader` of
//! each form reads on and reports `stretches`. Text is held in a `window` from the first place that
//! is still undecided. What is held back longer than a pause is shown by [`Redactor::flush`]. Encoded lines
//! may be broken, so nearly every third line ends in what could begin a base64 form: [`Redactor::pass_line`].
#![forbid(unsafe_code)]

mod form;
mod masks;
mod patterns;
mod prefilter;
mod reader;
mod stretches;
#[cfg(test)]
mod tests;
mod window;

use std::io;
use std::rc::Rc;

pub use masks::Masks;
pub use patterns::{Patterns, SHORTEST};

use form::Form;
use reader::Reader;
use stretches::Stretches;
use window::{Place, Text, Window};

/// What stands for a value.
pub const MASK: &[u8] = b"***";

/// Ways of cutting one form into units that are followed at the same time. They differ only when a value
/// begins inside an escape of the text before it, and soon die; more of them alive need a value that
/// repeats its own escapes. The bound keeps the work for a byte of output constant.
const MOST_READERS: usize = 8;

/// Held bytes for which memory is locked beforehand.
const BEFOREHAND: usize = 64 << 10;

/// The redactor of one stream.
pub struct Redactor {
    patterns: Rc<Patterns>,
    groups: Vec<Group>,
    window: Window,
    found: Stretches,
    screen: Screen,
}

/// The readers of one form.
struct Group {
    form: Form,
    readers: Vec<Reader>,
}

/// What has been shown of the stream.
#[derive(Default)]
struct Screen {
    /// All before this place is out, plain or masked.
    shown: Place,
    /// Where the last mask ended.
    masked_to: Place,
    masked: u64,
}

impl Redactor {
    /// # Errors
    /// If memory for what is held back cannot be locked (`RLIMIT_MEMLOCK`, getrlimit(2)).
    pub fn new(patterns: Rc<Patterns>) -> io::Result<Self> {
        // A byte of value is at most 6 of text, and a line break may follow each.
        let longest = patterns.longest().saturating_mul(8).min(BEFOREHAND);
        let groups = Form::ALL
            .into_iter()
            .map(|form| Group { form, readers: vec![Reader::new(form, &patterns)] })
            .filter(|group| group.readers[0].has_work())
            .collect();
        let window = Window::new(longest)?;
        let (found, screen) = (Stretches::default(), Screen::default());
        Ok(Self { patterns, groups, window, found, screen })
    }

    /// Takes the next bytes of the stream and appends to `out` what may be shown by now.
    ///
    /// If what must be held back (always the beginning of a value) outgrows the memory that can be
    /// locked, it is masked instead, and what follows of the value as well.
    pub fn push(&mut self, input: &[u8], out: &mut Vec<u8>) {
        if self.patterns.is_empty() {
            out.extend_from_slice(input);
            return;
        }
        let text = self.window.text(input);
        let begin = self.window.end();
        let mut next = 0;
        while let Some(hit) = prefilter::next(self.patterns.filter(), input, next) {
            for group in &mut self.groups {
                group.begin(&self.patterns, &text, begin + hit as Place, &mut self.found);
            }
            next = hit + 1;
        }
        for reader in self.groups.iter_mut().flat_map(|group| &mut group.readers) {
            reader.run(&self.patterns, &text, text.end(), &mut self.found);
        }
        let decided = self.live().map(Reader::undecided_from).fold(text.end(), Place::min);
        self.screen.show(&text, decided, &mut self.found, out);
        let end = text.end();
        if self.window.reserve(self.needed(end), input).is_err() {
            let text = self.window.text(input);
            if self.screen.shown < end {
                self.found.add(self.screen.shown, end);
            }
            self.screen.show(&text, end, &mut self.found, out);
            // Now a few bytes are needed at most.
            self.forget();
        }
        self.window.slide(self.needed(end), input);
    }

    /// Bytes held back now.
    pub fn held(&self) -> usize {
        (self.window.end() - self.screen.shown) as usize
    }

    /// Shows what is held back: after a pause of at most 100 ms, and at the end of the stream.
    ///
    /// A value in what was held is masked. The beginning of one is shown as it is; if the value goes on
    /// after the pause, then the part that comes after it is still found and masked.
    pub fn flush(&mut self, out: &mut Vec<u8>) {
        let text = self.window.text(&[]);
        for reader in self.groups.iter().flat_map(|group| &group.readers) {
            reader.run_out(&self.patterns, text, &mut self.found);
        }
        self.show_all(out);
    }

    /// Shows what is held back of a complete line if it is next to nothing: at most three characters of the
    /// base64 or hex form of a value's beginning, and the line break behind them. A line that waits is torn by
    /// what is written to the same place meanwhile.
    ///
    /// If the value goes on in the next line, the rest of it is still found and masked. What was shown counts:
    /// a second line of the same value is held.
    pub fn pass_line(&mut self, out: &mut Vec<u8>) {
        if self.held() > 0 && self.live().all(|reader| reader.lets_line_pass(&self.patterns)) {
            self.show_all(out);
        }
    }

    /// The most bytes that a push of `input` bytes, and a flush behind it, append: each byte that they show
    /// is itself, or at worst all that a mask stands for.
    pub fn most_shown(&self, input: usize) -> usize {
        (self.held() + input) * MASK.len()
    }

    fn show_all(&mut self, out: &mut Vec<u8>) {
        let text = self.window.text(&[]);
        self.screen.show(&text, text.end(), &mut self.found, out);
        self.forget();
        self.window.slide(self.needed(self.window.end()), &[]);
    }

    /// Masks written so far.
    pub fn masked(&self) -> u64 {
        self.screen.masked
    }

    fn live(&self) -> impl Iterator<Item = &Reader> {
        self.groups.iter().flat_map(|group| &group.readers).filter(|reader| reader.is_live())
    }

    fn needed(&self, end: Place) -> Place {
        let shown = self.screen.shown.min(end);
        self.live().map(Reader::needs_from).fold(shown, Place::min)
    }

    fn forget(&mut self) {
        for group in &mut self.groups {
            group.readers.iter_mut().filter(|reader| reader.is_live()).for_each(Reader::forget);
        }
    }
}

impl Group {
    /// Makes sure that a value beginning at `place` is seen.
    fn begin(&mut self, patterns: &Patterns, text: &Text<'_>, place: Place, found: &mut Stretches) {
        let mut free = None;
        for (nth, reader) in self.readers.iter_mut().enumerate() {
            reader.run(patterns, text, place, found);
            if reader.covers(text, place) {
                return;
            }
            if !reader.is_live() {
                free = Some(nth);
            }
        }
        match free {
            Some(nth) => self.readers[nth].begin(place),
            None if self.readers.len() < MOST_READERS => {
                let mut reader = Reader::new(self.form, patterns);
                reader.begin(place);
                self.readers.push(reader);
            }
            None => {
                if let Some(nth) = self.unite_twins() {
                    self.readers[nth].begin(place);
                }
            }
        }
    }

    /// Makes one of two readers that will read alike from here on, and tells which of them is free now.
    fn unite_twins(&mut self) -> Option<usize> {
        for nth in 1..self.readers.len() {
            let (before, rest) = self.readers.split_at_mut(nth);
            if let Some(twin) = before.iter_mut().find(|reader| reader.is_twin_of(&rest[0])) {
                twin.absorb(&mut rest[0]);
                return Some(nth);
            }
        }
        None
    }
}

impl Screen {
    /// Shows what lies before `decided`. A mask may reach beyond it.
    fn show(&mut self, text: &Text<'_>, decided: Place, found: &mut Stretches, out: &mut Vec<u8>) {
        for (from, to) in found.take_until(decided) {
            if to <= self.shown {
                continue;
            }
            if from > self.shown {
                text.copy(self.shown, from, out);
            }
            // One that overlaps the last mask lengthens it.
            if from >= self.masked_to {
                out.extend_from_slice(MASK);
                self.masked += 1;
            }
            (self.shown, self.masked_to) = (to, to);
        }
        if decided > self.shown {
            text.copy(self.shown, decided, out);
            self.shown = decided;
        }
    }
}
