//! The forms in which a value may appear, read one unit at a time: what a few bytes of text stand for,
//! whether a cut-off unit could begin a value, and the ways to write a byte. Holds no state.
#![forbid(unsafe_code)]

use super::window::{Place, Text};

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    Plain,
    /// A terminal's output: `\n` written as `\r\n` (ONLCR, termios(3)).
    Terminal,
    /// RFC 3986 section 2.1.
    Percent,
    /// `application/x-www-form-urlencoded`: as `Percent`, and `+` for a space.
    Query,
    /// The inside of a JSON string, RFC 8259 section 7.
    Json,
    /// RFC 4648 section 8.
    Hex,
    /// RFC 4648 sections 4 and 5, both alphabets at once.
    Base64,
}

impl Form {
    pub const ALL: [Self; 7] = [
        Self::Plain,
        Self::Terminal,
        Self::Percent,
        Self::Query,
        Self::Json,
        Self::Hex,
        Self::Base64,
    ];

    /// Digits that a byte does not start or end on the border of: it may begin at any of so many places
    /// of a group. 1 for the forms that are spelled byte by byte.
    pub fn phases(self) -> u8 {
        match self {
            Self::Plain | Self::Terminal | Self::Percent | Self::Query | Self::Json => 1,
            Self::Hex => 2,
            Self::Base64 => 4,
        }
    }

    /// Whether this form of `value` can differ from every other form of it.
    pub fn concerns(self, value: &[u8]) -> bool {
        match self {
            Self::Terminal => value.contains(&b'\n'),
            Self::Query => value.contains(&b' '),
            Self::Plain | Self::Percent | Self::Json | Self::Hex | Self::Base64 => true,
        }
    }
}

/// What stands at a place of a spelled form.
pub(super) enum Unit {
    /// `count` bytes of value, written in `len` bytes of text.
    Bytes { bytes: [u8; 4], count: u8, len: u8 },
    /// The text ends before it is clear.
    CutOff,
}

impl Unit {
    fn byte(byte: u8, len: u8) -> Self {
        Self::Bytes { bytes: [byte, 0, 0, 0], count: 1, len }
    }

    /// The UTF-8 of a code point; of a lone surrogate what WTF-8 makes of it.
    fn scalar(code: u32, len: u8) -> Self {
        let mut bytes = [0xE0 | (code >> 12) as u8, 0x80 | (code >> 6 & 63) as u8, 0, 0];
        bytes[2] = 0x80 | (code & 63) as u8;
        let count = char::from_u32(code).map_or(3, |char| char.encode_utf8(&mut bytes).len());
        Self::Bytes { bytes, count: count as u8, len }
    }
}

/// Whether `byte` may stand for another, alone or with what follows it.
pub(super) fn begins_escape(form: Form, byte: u8) -> bool {
    match form {
        Form::Plain | Form::Hex | Form::Base64 => false,
        Form::Terminal => byte == b'\r',
        Form::Percent => byte == b'%',
        Form::Query => matches!(byte, b'%' | b'+'),
        Form::Json => byte == b'\\',
    }
}

/// Reads one unit of a spelled form. What is no valid escape stands for itself.
pub(super) fn unit(form: Form, text: &Text<'_>, at: Place) -> Unit {
    let Some(first) = text.get(at) else { return Unit::CutOff };
    match (form, first) {
        (Form::Terminal, b'\r') => match text.ahead(at + 1) {
            None => Unit::CutOff,
            Some(b'\n') => Unit::byte(b'\n', 2),
            Some(_) => Unit::byte(first, 1),
        },
        (Form::Query, b'+') => Unit::byte(b' ', 1),
        (Form::Percent | Form::Query, b'%') => match hex_number(text, at + 1, 2) {
            Number::CutOff => Unit::CutOff,
            Number::Is(byte) => Unit::byte(byte as u8, 3),
            Number::Not => Unit::byte(first, 1),
        },
        (Form::Json, b'\\') => escape(text, at),
        _ => Unit::byte(first, 1),
    }
}

fn escape(text: &Text<'_>, at: Place) -> Unit {
    let Some(letter) = text.ahead(at + 1) else { return Unit::CutOff };
    if let Some(&(byte, _)) = SHORT.iter().find(|(_, short)| *short == letter) {
        return Unit::byte(byte, 2);
    }
    if letter != b'u' {
        return Unit::byte(b'\\', 1);
    }
    let high = match hex_number(text, at + 2, 4) {
        Number::CutOff => return Unit::CutOff,
        Number::Not => return Unit::byte(b'\\', 1),
        Number::Is(code @ 0xD800..0xDC00) => code,
        Number::Is(code) => return Unit::scalar(code, 6),
    };
    for (offset, expected) in [(6, b'\\'), (7, b'u')] {
        match text.ahead(at + offset) {
            None => return Unit::CutOff,
            Some(byte) if byte == expected => {}
            Some(_) => return Unit::scalar(high, 6),
        }
    }
    match hex_number(text, at + 8, 4) {
        Number::CutOff => Unit::CutOff,
        Number::Is(low @ 0xDC00..0xE000) => {
            Unit::scalar(0x10000 + ((high - 0xD800) << 10) + (low - 0xDC00), 12)
        }
        Number::Is(_) | Number::Not => Unit::scalar(high, 6),
    }
}

/// A byte and the letter of its short escape.
const SHORT: [(u8, u8); 8] = [
    (b'"', b'"'),
    (b'\\', b'\\'),
    (b'/', b'/'),
    (8, b'b'),
    (12, b'f'),
    (b'\n', b'n'),
    (b'\r', b'r'),
    (b'\t', b't'),
];

enum Number {
    Is(u32),
    Not,
    CutOff,
}

fn hex_number(text: &Text<'_>, at: Place, digits: Place) -> Number {
    let mut number = 0;
    for place in at..at + digits {
        match text.ahead(place).map(|byte| digit(Form::Hex, byte)) {
            None => return Number::CutOff,
            Some(None) => return Number::Not,
            Some(Some(digit)) => number = number << 4 | u32::from(digit),
        }
    }
    Number::Is(number)
}

/// Whether the cut-off unit at `at`, which ends the text, could begin `value`.
///
/// Exact but for a `\u` before a value that begins outside ASCII: there it says yes.
pub(super) fn cut_off_could_begin(form: Form, text: &Text<'_>, at: Place, value: &[u8]) -> bool {
    let cut = || (at..text.end()).filter_map(|place| text.get(place));
    if cut().zip(value).all(|(a, b)| a == *b) {
        return true;
    }
    let nibbles = [0, 0, value[0] >> 4, value[0] & 15];
    let agrees = |skipped: usize, nibbles: &[u8]| {
        cut().skip(skipped).zip(nibbles).all(|(a, b)| digit(Form::Hex, a) == Some(*b))
    };
    match form {
        Form::Terminal => value[0] == b'\n',
        Form::Percent | Form::Query => agrees(1, &nibbles[2..]),
        Form::Json => value[0] >= 0x80 || agrees(2, &nibbles),
        Form::Plain | Form::Hex | Form::Base64 => false,
    }
}

/// What a character of a digit form counts.
#[inline]
pub(super) fn digit(form: Form, byte: u8) -> Option<u8> {
    Some(match (form, byte) {
        (Form::Hex, b'0'..=b'9') => byte - b'0',
        (Form::Hex, b'a'..=b'f') => byte - b'a' + 10,
        (Form::Hex, b'A'..=b'F') => byte - b'A' + 10,
        (Form::Base64, b'A'..=b'Z') => byte - b'A',
        (Form::Base64, b'a'..=b'z') => byte - b'a' + 26,
        (Form::Base64, b'0'..=b'9') => byte - b'0' + 52,
        (Form::Base64, b'+' | b'-') => 62,
        (Form::Base64, b'/' | b'_') => 63,
        _ => return None,
    })
}

/// The two characters (often one and the same) that count `digit`: the reverse of [`digit`].
pub(super) fn characters(form: Form, digit: u8) -> [u8; 2] {
    match (form, digit) {
        (Form::Base64, 0..26) => [b'A' + digit; 2],
        (Form::Base64, 26..52) => [b'a' + digit - 26; 2],
        (Form::Base64, 52..62) => [b'0' + digit - 52; 2],
        (Form::Base64, 62) => [b'+', b'-'],
        (Form::Base64, _) => [b'/', b'_'],
        (_, 0..10) => [b'0' + digit; 2],
        (_, _) => [b'a' + digit - 10, b'A' + digit - 10],
    }
}

/// The byte that ends in the digit `this`, the `nth` of its group, if one does; it began in `last`.
#[inline]
pub(super) fn join(form: Form, nth: u8, last: u8, this: u8) -> Option<u8> {
    match (form, nth) {
        (Form::Hex, 1) => Some(last << 4 | this),
        (Form::Base64, 1) => Some(last << 2 | this >> 4),
        (Form::Base64, 2) => Some(last << 4 | this >> 2),
        (Form::Base64, 3) => Some(last << 6 | this),
        _ => None,
    }
}

/// Whether a byte begins in the `nth` digit of a group.
pub(super) fn begins(form: Form, nth: u8) -> bool {
    nth + 1 < form.phases()
}

/// Whether `digit`, wherever in its group, could hold the beginning of a value that begins with `first`.
pub(super) fn digit_could_begin(form: Form, digit: u8, first: u8) -> bool {
    match form {
        Form::Hex => digit == first >> 4,
        Form::Base64 => digit == first >> 2 || digit & 15 == first >> 4 || digit & 3 == first >> 6,
        Form::Plain | Form::Terminal | Form::Percent | Form::Query | Form::Json => false,
    }
}

/// Hands `each` the ways in which a spelled form may write `byte`, of `\u` escapes the first 3 bytes.
pub(super) fn spellings(form: Form, byte: u8, each: &mut dyn FnMut(&[u8])) {
    each(&[byte]);
    match form {
        Form::Terminal if byte == b'\n' => each(b"\r\n"),
        Form::Query if byte == b' ' => each(b"+"),
        _ => {}
    }
    match form {
        Form::Percent | Form::Query => {
            for high in characters(Form::Hex, byte >> 4) {
                for low in characters(Form::Hex, byte & 15) {
                    each(&[b'%', high, low]);
                }
            }
        }
        Form::Json => {
            if let Some(&(_, letter)) = SHORT.iter().find(|(of, _)| *of == byte) {
                each(&[b'\\', letter]);
            }
            // Which escape it is depends on the whole character, of which `byte` may be any part.
            for digit in 0..16 {
                for character in characters(Form::Hex, digit) {
                    each(&[b'\\', b'u', character]);
                }
            }
        }
        Form::Plain | Form::Terminal | Form::Hex | Form::Base64 => {}
    }
}
