//! The masking of leased values in output.
//!
//! An input makes one to three values and a text in which they stand in all their forms, whole and cut
//! off. However the text is cut into chunks, the output is the one that [`masked`] gives, which looks for
//! every form of every value at every place of the whole text: it is slow, and says what the redactor's
//! documentation says.
#![forbid(unsafe_code)]

use std::rc::Rc;

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use sublet::redact::{MASK, Patterns, Redactor, SHORTEST};

use super::feed::Feed;

/// The reference takes time in proportion to the text, the values and the forms.
const LONGEST: usize = 2048;

pub fn run(input: &[u8]) {
    let mut feed = Feed::new(input);
    let values: Vec<Vec<u8>> = (0..1 + feed.below(3)).map(|_| value(&mut feed)).collect();
    let flushes = feed.below(4) == 0;
    let sizes: Vec<usize> = (0..feed.below(16)).map(|_| usize::from(feed.byte())).collect();
    let mut text = Vec::new();
    while !feed.is_empty() && text.len() < LONGEST {
        piece(&mut feed, &values, &mut text);
    }
    text.truncate(LONGEST);

    let patterns = Patterns::new(values.iter().map(Vec::as_slice)).expect("memory can be locked");
    let patterns = Rc::new(patterns);
    let short = values.iter().filter(|value| core(value).len() < SHORTEST).count();
    assert_eq!(patterns.unmasked(), short);
    let (expected, count) = masked(&values, &text);
    let stream = |chunks: &mut dyn Iterator<Item = &[u8]>| {
        let mut redactor = Redactor::new(Rc::clone(&patterns)).expect("memory can be locked");
        let mut out = Vec::new();
        for chunk in chunks {
            redactor.push(chunk, &mut out);
        }
        redactor.flush(&mut out);
        assert_eq!(redactor.held(), 0);
        (out, redactor.masked())
    };
    let shown = |bytes: &[u8]| bytes.escape_ascii().to_string();
    let same = |what: &str, chunks: &mut dyn Iterator<Item = &[u8]>| {
        let (out, masks) = stream(chunks);
        assert!(
            out == expected && masks == count,
            "{what}\nvalues {}\ntext   {}\ngot    {}\nwanted {}",
            values.iter().map(|v| shown(v)).collect::<Vec<_>>().join(" | "),
            shown(&text),
            shown(&out),
            shown(&expected),
        );
    };
    same("whole", &mut std::iter::once(&text[..]));
    same("byte by byte", &mut text.chunks(1));
    same("in chunks", &mut chunks(&text, &sizes));
    if flushes {
        flushed(&patterns, &values, &text, &sizes);
    }
}

/// A pause shows what is held, but never a whole value.
fn flushed(patterns: &Rc<Patterns>, values: &[Vec<u8>], text: &[u8], sizes: &[usize]) {
    let mut redactor = Redactor::new(Rc::clone(patterns)).expect("memory can be locked");
    let mut out = Vec::new();
    for chunk in chunks(text, sizes) {
        redactor.push(chunk, &mut out);
        redactor.flush(&mut out);
        assert_eq!(redactor.held(), 0);
    }
    for value in values.iter().map(|v| core(v)).filter(|v| v.len() >= SHORTEST) {
        // A mask is no part of what was written, so a value with its characters could stand by chance.
        if !value.contains(&b'*') {
            let found = out.windows(value.len()).any(|window| window == value);
            assert!(!found, "{} is shown: {}", value.escape_ascii(), out.escape_ascii());
        }
    }
}

fn chunks<'a>(text: &'a [u8], sizes: &[usize]) -> impl Iterator<Item = &'a [u8]> {
    let mut rest = text;
    let mut sizes = sizes.iter().copied();
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let size = sizes.next().unwrap_or(rest.len()).min(rest.len());
        let (chunk, later) = rest.split_at(size);
        rest = later;
        Some(chunk)
    })
}

/// Bytes as they are, or drawn from a few so that the value is full of its own beginnings.
fn value(feed: &mut Feed<'_>) -> Vec<u8> {
    const ALPHABETS: [&[u8]; 6] =
        [b"ab", b"a", b"\\u0041n", b"%41+ ", b"\r\nab", b"\xF0\x9F\x98\x80\xC3\xA9"];
    let kind = feed.below(ALPHABETS.len() + 2);
    let mut value = feed.chunk().to_vec();
    value.truncate(96);
    if let Some(alphabet) = ALPHABETS.get(kind) {
        value.iter_mut().for_each(|b| *b = alphabet[usize::from(*b) % alphabet.len()]);
    }
    value
}

/// One more piece of text: bytes, or a value in some form, perhaps cut off at either end.
fn piece(feed: &mut Feed<'_>, values: &[Vec<u8>], text: &mut Vec<u8>) {
    let kind = feed.below(12);
    if kind < 3 {
        text.extend_from_slice(feed.chunk());
        return;
    }
    if kind == 3 {
        const LAYOUT: [&[u8]; 12] =
            [b"\n", b"\r\n", b"=", b"==", b"%", b"%4", b"\\", b"\\u00", b"+", b"0", b"A", b"\r"];
        text.extend_from_slice(LAYOUT[feed.below(LAYOUT.len())]);
        return;
    }
    let value = &values[feed.below(values.len())];
    let value = if feed.below(3) == 0 { core(value) } else { value };
    let mut form = match kind {
        4 => value.to_vec(),
        5 => hex(value, feed.byte()),
        6 => {
            let whole = [&b"xyz"[..feed.below(4)], value, &b"pq"[..feed.below(3)]].concat();
            STANDARD.encode(whole).into_bytes()
        }
        7 => URL_SAFE_NO_PAD.encode([&b"xyz"[..feed.below(4)], value].concat()).into_bytes(),
        8 => spelled(value, feed, |b| format!("%{b:02x}").into_bytes()),
        9 => spelled(value, feed, |b| match b {
            b' ' => b"+".to_vec(),
            b => format!("%{b:02X}").into_bytes(),
        }),
        10 => spelled(value, feed, |b| match b {
            b'\n' => b"\\n".to_vec(),
            b'"' | b'\\' | b'/' => vec![b'\\', b],
            b => format!("\\u00{b:02x}").into_bytes(),
        }),
        _ => match std::str::from_utf8(value) {
            Ok(value) => value
                .encode_utf16()
                .flat_map(|unit| format!("\\u{unit:04X}").into_bytes())
                .collect(),
            Err(_) => value
                .iter()
                .flat_map(|b| if *b == b'\n' { vec![13, 10] } else { vec![*b] })
                .collect(),
        },
    };
    let break_at = feed.byte();
    if (5..8).contains(&kind) && break_at < 80 {
        let width = usize::from(break_at) + 1;
        let end: &[u8] = if break_at.is_multiple_of(2) { b"\n" } else { b"\r\n" };
        form = form.chunks(width).collect::<Vec<_>>().join(end);
    }
    let cut = feed.byte();
    let (from, to) = match cut % 8 {
        6 => (0, form.len().saturating_sub(usize::from(cut / 8))),
        7 => (usize::from(cut / 8).min(form.len()), form.len()),
        _ => (0, form.len()),
    };
    text.extend_from_slice(&form[from..to]);
}

fn spelled(value: &[u8], feed: &mut Feed<'_>, escape: impl Fn(u8) -> Vec<u8>) -> Vec<u8> {
    let (plain, of) = (feed.byte(), feed.byte() % 7 + 1);
    let each = value.iter().zip(0u8..).flat_map(|(b, nth)| {
        if nth.wrapping_mul(plain).wrapping_add(nth) % of != 0 { vec![*b] } else { escape(*b) }
    });
    each.collect()
}

fn hex(value: &[u8], how: u8) -> Vec<u8> {
    let digits = value.iter().enumerate().flat_map(|(nth, b)| {
        let upper = (nth as u8) & how != 0;
        if upper { format!("{b:02X}").into_bytes() } else { format!("{b:02x}").into_bytes() }
    });
    digits.collect()
}

/// What must be there: the value without the line breaks at its end.
fn core(value: &[u8]) -> &[u8] {
    let end = value.iter().rposition(|b| !matches!(b, b'\r' | b'\n')).map_or(0, |last| last + 1);
    &value[..end]
}

// ---- The reference: every form of every value, looked for at every place.

/// The text with masks, and how many there are.
fn masked(values: &[Vec<u8>], text: &[u8]) -> (Vec<u8>, u64) {
    let mut found = Vec::new();
    for value in values.iter().filter(|value| core(value).len() >= SHORTEST) {
        for at in 0..text.len() {
            for form in [Form::Plain, Form::Terminal, Form::Percent, Form::Query, Form::Json] {
                find_spelled(form, value, text, at, &mut found);
            }
            find_digits(16, 0, value, text, at, &mut found);
            for foreign in [0, 2, 4] {
                find_digits(64, foreign, value, text, at, &mut found);
            }
        }
    }
    found.sort_unstable();
    let (mut out, mut shown, mut count) = (Vec::new(), 0, 0);
    for (from, to) in found {
        // Those that share a byte are one mask.
        if from >= shown {
            out.extend_from_slice(&text[shown..from]);
            out.extend_from_slice(MASK);
            count += 1;
        }
        shown = shown.max(to);
    }
    out.extend_from_slice(&text[shown..]);
    (out, count)
}

#[derive(Clone, Copy, PartialEq)]
enum Form {
    Plain,
    Terminal,
    Percent,
    Query,
    Json,
}

/// What stands at a place: so many bytes of value, in so many bytes of text.
struct Unit {
    bytes: [u8; 4],
    count: usize,
    len: usize,
}

fn one(byte: u8, len: usize) -> Unit {
    Unit { bytes: [byte, 0, 0, 0], count: 1, len }
}

/// UTF-8, of a lone surrogate too.
fn scalar(code: u32, len: usize) -> Unit {
    let mut bytes =
        [0xE0 | (code >> 12) as u8, 0x80 | (code >> 6 & 63) as u8, 0x80 | (code & 63) as u8, 0];
    let count = char::from_u32(code).map_or(3, |c| c.encode_utf8(&mut bytes).len());
    Unit { bytes, count, len }
}

/// An escape that is none, or that the end of the text cuts off, stands for itself.
fn unit(form: Form, text: &[u8]) -> Unit {
    let itself = one(text[0], 1);
    let number = |from: usize, to: usize| {
        let digits = text.get(from..to).filter(|d| d.iter().all(u8::is_ascii_hexdigit))?;
        u32::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
    };
    match (form, text[0]) {
        (Form::Terminal, b'\r') if text.get(1) == Some(&b'\n') => one(b'\n', 2),
        (Form::Query, b'+') => one(b' ', 1),
        (Form::Percent | Form::Query, b'%') => {
            number(1, 3).map_or(itself, |byte| one(byte as u8, 3))
        }
        (Form::Json, b'\\') => match text.get(1) {
            Some(b'b') => one(8, 2),
            Some(b'f') => one(12, 2),
            Some(b'n') => one(b'\n', 2),
            Some(b'r') => one(b'\r', 2),
            Some(b't') => one(b'\t', 2),
            Some(byte @ (b'"' | b'\\' | b'/')) => one(*byte, 2),
            Some(b'u') => match number(2, 6) {
                Some(high @ 0xD800..0xDC00) => {
                    match text[6..].starts_with(b"\\u").then(|| number(8, 12)).flatten() {
                        Some(low @ 0xDC00..0xE000) => {
                            scalar(0x10000 + ((high - 0xD800) << 10) + (low - 0xDC00), 12)
                        }
                        _ => scalar(high, 6),
                    }
                }
                Some(code) => scalar(code, 6),
                None => itself,
            },
            _ => itself,
        },
        _ => itself,
    }
}

type Found = Vec<(usize, usize)>;

/// The value may begin in any byte of the unit at `at`.
fn find_spelled(form: Form, value: &[u8], text: &[u8], at: usize, found: &mut Found) {
    for skipped in 0..unit(form, &text[at..]).count {
        let (mut place, mut matched, mut skip) = (at, 0, skipped);
        'units: while place < text.len() {
            let Unit { bytes, count, len } = unit(form, &text[place..]);
            for byte in &bytes[skip..count] {
                // A line break at the value's end belongs to it only where it is escaped.
                let layout = matched >= core(value).len() && (len == 1 || form == Form::Terminal);
                if layout || value.get(matched) != Some(byte) {
                    break 'units;
                }
                matched += 1;
                if matched >= core(value).len() {
                    found.push((at, place + len));
                }
            }
            skip = 0;
            place += len;
        }
    }
}

fn digit(base: u32, byte: u8) -> Option<u32> {
    match (base, byte) {
        (16, _) => char::from(byte).to_digit(16),
        (_, b'A'..=b'Z') => Some(u32::from(byte - b'A')),
        (_, b'a'..=b'z') => Some(u32::from(byte - b'a') + 26),
        (_, b'0'..=b'9') => Some(u32::from(byte - b'0') + 52),
        (_, b'+' | b'-') => Some(62),
        (_, b'/' | b'_') => Some(63),
        _ => None,
    }
}

/// The value's first digit is at `at`, and its first `foreign` bits are something else's.
fn find_digits(base: u32, foreign: u32, value: &[u8], text: &[u8], at: usize, found: &mut Found) {
    let width = base.ilog2();
    let (mut bits, mut have, mut matched) = (0u32, 0, 0);
    let mut place = at;
    loop {
        let Some(digit) = text.get(place).and_then(|b| digit(base, *b)) else { return };
        let fresh = if place == at { width - foreign } else { width };
        bits = bits << fresh | digit & ((1 << fresh) - 1);
        have += fresh;
        place += 1;
        if have >= 8 {
            have -= 8;
            if value.get(matched) != Some(&((bits >> have) as u8)) {
                return;
            }
            bits &= (1 << have) - 1;
            matched += 1;
            if matched >= core(value).len() {
                // What is left over of a group of 24 bits is padded.
                let padding = match (base, have) {
                    (64, 4) => 2,
                    (64, 2) => 1,
                    _ => 0,
                };
                let padded = text[place..].iter().take(padding).take_while(|b| **b == b'=').count();
                found.push((at, place + padded));
            }
        }
        // One line break may stand between two digits.
        let rest = &text[place..];
        place +=
            if rest.starts_with(b"\n") { 1 } else { 2 * usize::from(rest.starts_with(b"\r\n")) };
    }
}
