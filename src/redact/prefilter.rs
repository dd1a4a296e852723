//! Where a value could begin, told from three bytes of text. It never misses a beginning; it is wrong
//! about another place once in some thousand. All that output without a value costs is this look.
#![forbid(unsafe_code)]

use super::form::{self, Form};

/// Bytes of memory that a filter needs.
pub(super) const SIZE: usize = 2 * HALF;
/// One of two bitmaps of 2^16 bits, each with a hash of its own.
const HALF: usize = 1 << 13;

/// The bytes of text looked at.
const SPAN: usize = 3;

/// Marks the beginnings of `value` in `form`.
pub(super) fn add(memory: &mut [u8], form: Form, value: &[u8]) {
    let mark = &mut |three: [u8; SPAN]| {
        let (a, b) = bits(u32::from_le_bytes([three[0], three[1], three[2], 0]));
        memory[a >> 3] |= 1 << (a & 7);
        memory[HALF + (b >> 3)] |= 1 << (b & 7);
    };
    match form {
        Form::Plain | Form::Terminal | Form::Percent | Form::Query | Form::Json => {
            spell(form, value, Beginning::default(), mark);
        }
        // A byte begins with the first digit of hex, and with each of the first three of base64; there
        // 0, 2 or 4 bits of the digit are the neighbour's.
        Form::Hex => spell_digits(&Digits { form, width: 4, foreign: 0, value }, mark),
        Form::Base64 => {
            for foreign in [0, 2, 4] {
                spell_digits(&Digits { form, width: 6, foreign, value }, mark);
            }
        }
    }
}

/// The first place at or after `from` where a value could begin. The last two places of `chunk` always
/// could: what follows them is not here yet.
#[inline]
pub(super) fn next(memory: &[u8], chunk: &[u8], from: usize) -> Option<usize> {
    let (first, second) = memory.split_at(HALF);
    let first: &[u8; HALF] = first.try_into().ok()?;
    let second: &[u8; HALF] = second[..HALF].try_into().ok()?;
    let hit = |three: u32| {
        let (a, b) = bits(three & 0xFF_FFFF);
        first[a >> 3] >> (a & 7) & 1 != 0 && second[b >> 3] >> (b & 7) & 1 != 0
    };
    let rest = chunk.get(from..)?;
    if let Some(at) = rest.array_windows().position(|four| hit(u32::from_le_bytes(*four))) {
        return Some(from + at);
    }
    let unseen = from.max(chunk.len().saturating_sub(SPAN));
    let last_three = chunk[unseen..].array_windows().next();
    match last_three {
        Some(&[a, b, c]) if !hit(u32::from_le_bytes([a, b, c, 0])) => Some(unseen + 1),
        _ => (unseen < chunk.len()).then_some(unseen),
    }
}

fn bits(three: u32) -> (usize, usize) {
    let a = three.wrapping_mul(0x9E37_79B1) >> 16;
    let b = three.wrapping_mul(0x85EB_CA6B) >> 16;
    (a as usize, b as usize)
}

/// The text so far, on the stack.
#[derive(Clone, Copy, Default)]
struct Beginning {
    bytes: [u8; SPAN],
    len: usize,
    units: usize,
}

impl Beginning {
    fn then(mut self, more: &[u8]) -> Self {
        for &byte in more.iter().take(SPAN - self.len) {
            self.bytes[self.len] = byte;
            self.len += 1;
        }
        self
    }
}

type Mark<'a> = &'a mut dyn FnMut([u8; SPAN]);

fn spell(form: Form, value: &[u8], so_far: Beginning, mark: Mark<'_>) {
    form::spellings(form, value[so_far.units], &mut |text| {
        let mut longer = so_far.then(text);
        longer.units += 1;
        if longer.len == SPAN {
            mark(longer.bytes);
        } else {
            spell(form, value, longer, mark);
        }
    });
}

/// A value as digits of `width` bits, the first of which begins with `foreign` bits of something else.
struct Digits<'a> {
    form: Form,
    width: usize,
    foreign: usize,
    value: &'a [u8],
}

impl Digits<'_> {
    /// The digit with 0 for foreign bits.
    fn digit(&self, nth: usize) -> u8 {
        (nth * self.width..(nth + 1) * self.width).fold(0, |digit, bit| {
            let own = bit.checked_sub(self.foreign);
            digit << 1 | own.map_or(0, |bit| self.value[bit / 8] >> (7 - bit % 8) & 1)
        })
    }
}

fn spell_digits(digits: &Digits<'_>, mark: Mark<'_>) {
    for foreign in 0..1 << digits.foreign {
        let first = digits.digit(0) | (foreign << (digits.width - digits.foreign)) as u8;
        for character in form::characters(digits.form, first) {
            let mut so_far = Beginning::default().then(&[character]);
            so_far.units = 1;
            spell_more_digits(digits, so_far, mark);
        }
    }
}

fn spell_more_digits(digits: &Digits<'_>, so_far: Beginning, mark: Mark<'_>) {
    for line_break in [&b""[..], b"\n", b"\r\n"] {
        for character in form::characters(digits.form, digits.digit(so_far.units)) {
            let mut longer = so_far.then(line_break).then(&[character]);
            longer.units += 1;
            if longer.len == SPAN {
                mark(longer.bytes);
            } else {
                spell_more_digits(digits, longer, mark);
            }
        }
    }
}
