//! Receives the values, returns what the readers look for: one block of locked memory that holds the
//! filter, each value once, and each value's borders.
#![forbid(unsafe_code)]

use std::io;

use crate::model::secret::Secret;

use super::form::Form;
use super::prefilter;

/// A shorter value is a word that output holds by chance, and easily guessed from what was masked.
pub const SHORTEST: usize = 8;

/// What is looked for. Built once, shared by the redactors of standard output and standard error.
pub struct Patterns {
    memory: Secret,
    patterns: Vec<Layout>,
    unmasked: usize,
}

/// Where in the memory a value is; its borders follow it.
struct Layout {
    at: usize,
    len: usize,
    core: usize,
    /// Bytes of one border.
    width: usize,
}

#[derive(Clone, Copy)]
pub(super) struct Pattern<'a> {
    /// With the newlines at its end.
    pub value: &'a [u8],
    /// Without them: what must be there.
    pub core: &'a [u8],
    borders: &'a [u8],
    width: usize,
}

impl Patterns {
    /// Takes its own copies of `values`. For each byte of a value it locks 2 (values under 256 bytes) to
    /// 4 bytes (values of 64 KiB to 16 MiB), and 16 KiB for all.
    ///
    /// # Errors
    /// Only if the memory cannot be locked (`RLIMIT_MEMLOCK`, getrlimit(2)).
    pub fn new<'a>(values: impl IntoIterator<Item = &'a [u8]>) -> io::Result<Self> {
        let mut unmasked = 0;
        let mut patterns = Vec::new();
        let mut sources = Vec::new();
        let mut size = prefilter::SIZE;
        for value in values {
            let layout = Layout::of(value, size);
            if !Self::take(value) {
                unmasked += 1;
            } else {
                size = layout.end();
                patterns.push(layout);
                sources.push(value);
            }
        }
        let mut memory = Secret::zeroed(size)?;
        let (filter, rest) = memory.expose_mut().split_at_mut(prefilter::SIZE);
        for (layout, value) in patterns.iter().zip(sources) {
            let own = &mut rest[layout.at - prefilter::SIZE..layout.end() - prefilter::SIZE];
            let (copy, borders) = own.split_at_mut(layout.len);
            copy.copy_from_slice(value);
            find_borders(value, borders, layout.width);
            let core = &value[..layout.core];
            Form::ALL
                .into_iter()
                .filter(|form| form.concerns(core))
                .for_each(|form| prefilter::add(filter, form, core));
        }
        Ok(Self { memory, patterns, unmasked })
    }

    /// Whether the value is long enough to be looked for.
    pub(super) fn take(value: &[u8]) -> bool {
        Layout::of(value, 0).core >= SHORTEST
    }

    /// How many values were too short to mask.
    pub fn unmasked(&self) -> usize {
        self.unmasked
    }

    /// Nothing to look for.
    pub fn is_empty(&self) -> bool {
        self.patterns.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.patterns.len()
    }

    pub(super) fn longest(&self) -> usize {
        self.patterns.iter().map(|layout| layout.len).max().unwrap_or(0)
    }

    pub(super) fn filter(&self) -> &[u8] {
        &self.memory.expose()[..prefilter::SIZE]
    }

    #[inline]
    pub(super) fn pattern(&self, nth: usize) -> Pattern<'_> {
        let layout = &self.patterns[nth];
        let own = &self.memory.expose()[layout.at..layout.end()];
        let (value, borders) = own.split_at(layout.len);
        Pattern { value, core: &value[..layout.core], borders, width: layout.width }
    }
}

impl Layout {
    fn of(value: &[u8], at: usize) -> Self {
        let core = value.iter().rposition(|byte| !matches!(byte, b'\r' | b'\n'));
        let bits = usize::BITS - value.len().leading_zeros();
        let width = bits.div_ceil(8).max(1) as usize;
        Self { at, len: value.len(), core: core.map_or(0, |last| last + 1), width }
    }

    fn end(&self) -> usize {
        self.at + self.len + (self.len + 1) * self.width
    }
}

impl Pattern<'_> {
    /// The length of the longest beginning of the value, other than the whole, that ends its first
    /// `matched` bytes.
    #[inline]
    pub fn border(&self, matched: usize) -> usize {
        border(self.borders, self.width, matched)
    }
}

#[inline]
fn border(borders: &[u8], width: usize, matched: usize) -> usize {
    let entry = &borders[matched * width..(matched + 1) * width];
    entry.iter().rev().fold(0, |border, &byte| border << 8 | usize::from(byte))
}

fn find_borders(value: &[u8], borders: &mut [u8], width: usize) {
    let mut longest = 0;
    for matched in 1..value.len() {
        while longest > 0 && value[longest] != value[matched] {
            longest = border(borders, width, longest);
        }
        longest += usize::from(value[longest] == value[matched]);
        let entry = &mut borders[(matched + 1) * width..(matched + 2) * width];
        entry.copy_from_slice(&longest.to_le_bytes()[..width]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn borders_are_those_of_the_definition() {
        for value in [&b"abababca"[..], b"aaaaaaaa", b"abcdefgh", &[7; 700], &b"ab".repeat(300)] {
            let patterns = Patterns::new([value]).unwrap();
            let pattern = patterns.pattern(0);
            for matched in 1..=value.len() {
                let whole = &value[..matched];
                let longest = (0..matched).rev().find(|&n| whole.ends_with(&whole[..n]));
                assert_eq!(pattern.border(matched), longest.unwrap_or(0), "{value:?} {matched}");
            }
        }
    }

    #[test]
    fn a_value_too_short_without_its_newlines_is_counted() {
        #[track_caller]
        fn check(values: &[&[u8]], masked: usize, unmasked: usize) {
            let patterns = Patterns::new(values.iter().copied()).unwrap();
            assert_eq!((patterns.len(), patterns.unmasked()), (masked, unmasked));
            assert_eq!(patterns.is_empty(), masked == 0);
        }
        check(&[], 0, 0);
        check(&[b"", b"\n\n\n\n\n\n\n\n\n", b"1234567", b"1234567\n", b"1234567\r\n"], 0, 5);
        check(&[b"12345678", b"12345678\n", b"short"], 2, 1);
    }

    #[test]
    fn a_value_of_a_mebibyte_locks_four() {
        let value = vec![b'x'; 1 << 20];
        let patterns = Patterns::new([&value[..]]).unwrap();
        assert!(patterns.memory.len() <= (4 << 20) + (16 << 10) + 3);
    }
}
