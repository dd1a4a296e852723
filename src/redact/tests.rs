use base64::Engine;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD, URL_SAFE, URL_SAFE_NO_PAD};
use proptest::prelude::*;

use super::*;

/// Every byte has another high and low nibble, the first bytes are no common text.
const KEY: &[u8] = b"k9$T/ q+Zw~7\xC3\xA9\"\\x";

fn redactor(values: &[&[u8]]) -> Redactor {
    Redactor::new(Rc::new(Patterns::new(values.iter().copied()).unwrap())).unwrap()
}

fn redact<'a>(values: &[&[u8]], chunks: impl IntoIterator<Item = &'a [u8]>) -> Vec<u8> {
    let mut redactor = redactor(values);
    let mut out = Vec::new();
    for chunk in chunks {
        let (before, most) = (out.len(), redactor.most_shown(chunk.len()));
        redactor.push(chunk, &mut out);
        assert!(out.len() <= before + most);
    }
    let most = out.len() + redactor.most_shown(0);
    redactor.flush(&mut out);
    assert!(out.len() <= most);
    assert_eq!(redactor.held(), 0);
    out
}

/// As the relay does it with what is read at once.
fn redact_lines<'a>(values: &[&[u8]], chunks: impl IntoIterator<Item = &'a [u8]>) -> Vec<u8> {
    let mut redactor = redactor(values);
    let mut out = Vec::new();
    for chunk in chunks {
        let most = out.len() + redactor.most_shown(chunk.len());
        redactor.push(chunk, &mut out);
        redactor.pass_line(&mut out);
        assert!(out.len() <= most);
    }
    redactor.flush(&mut out);
    out
}

fn show(bytes: &[u8]) -> String {
    bytes.escape_ascii().to_string()
}

/// Whole, byte by byte, and cut in two at every place.
#[track_caller]
fn check_all(values: &[&[u8]], text: &[u8], expected: &[u8]) {
    assert_eq!(show(&redact(values, [text])), show(expected), "whole: {}", show(text));
    let bytes = redact(values, text.chunks(1));
    assert_eq!(show(&bytes), show(expected), "byte by byte: {}", show(text));
    for at in 0..=text.len().min(400) {
        let (a, b) = text.split_at(at);
        assert_eq!(show(&redact(values, [a, b])), show(expected), "at {at}: {}", show(text));
    }
}

/// `encoded` is masked between neighbours that belong to no digit, and without any.
#[track_caller]
fn check(value: &[u8], encoded: impl AsRef<[u8]>) {
    let encoded = encoded.as_ref();
    check_all(&[value], encoded, b"***");
    check_all(&[value], &[b"(", encoded, b")"].concat(), b"(***)");
    check_all(&[value], &[b"\n", encoded, b"\n\n"].concat(), b"\n***\n\n");
    let half = &encoded[..encoded.len() / 2];
    check_all(&[value], &[half, b"!", encoded, b"!"].concat(), &[half, b"!***!"].concat());
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn wrap(text: &str, width: usize, line_break: &str) -> String {
    let lines: Vec<_> = text.as_bytes().chunks(width).map(String::from_utf8_lossy).collect();
    lines.join(line_break)
}

/// `text` in base64 stands between `before` and `after`: which digits hold bits of it?
fn base64_mask(before: usize, value: usize, all: &str) -> (usize, usize) {
    let from = before * 8 / 6;
    let to = ((before + value) * 8).div_ceil(6);
    let ends = all.trim_end_matches('=').len() == to;
    (from, if ends { all.len() } else { to })
}

#[test]
fn plain_values() {
    check(KEY, KEY);
    let (a, b, ab) = (&b"alpha-alpha"[..], &b"beta-beta"[..], &b"alpha-alphabeta-beta+"[..]);
    check_all(&[a, b], b"alpha-alphabeta-beta alpha-alph", b"****** alpha-alph");
    check_all(&[a, b, ab], b"<alpha-alphabeta-beta+>", b"<***>");
    check_all(&[a, b, ab], b"<alpha-alphabeta-beta->", b"<******->");
    check_all(&[b"0123456789abcdef", b"456789ab"], b"0123456789abcde!", b"0123***cde!");
    check_all(&[b"overlapping", b"pinging-on"], b"(overlappinging-on)", b"(***)");
    check_all(&[b"zzzzzzzz"], b"zzzzzzzzzzz zzzzzzz zzzzzzzz", b"*** zzzzzzz ***");
    check_all(&[b"zzzzzzzzy"], b"zzzzzzzzzzzzzy-", b"zzzzz***-");
    check_all(&[b"\0\0\0\0\0\0\0\0\0\0\x01"], &[0; 40], &[0; 40]);
    check_all(&[b"short", b""], b"short", b"short");
    check_all(&[], b"anything", b"anything");
}

#[test]
fn base64_at_every_alignment_in_every_alphabet() {
    let values = [KEY, b"12345678", b"\xFB\xEF\xBE\xFF\xFF\xFE\xFB\xFF\xBF", b"sk-live-0123456789"];
    for value in values {
        for engine in [&STANDARD, &STANDARD_NO_PAD, &URL_SAFE, &URL_SAFE_NO_PAD] {
            check(value, engine.encode(value));
            for (before, after) in (0..7).flat_map(|before| (0..5).map(move |a| (before, a))) {
                let whole = [&b"\xD7user:"[..before], value, &b"#\x00\xFFx"[..after]].concat();
                let text = engine.encode(&whole);
                let (from, to) = base64_mask(before, value.len(), &text);
                let expected = format!("{}***{}", &text[..from], &text[to..]);
                check_all(&[value], text.as_bytes(), expected.as_bytes());
                // Digits in front that are of no base64 shift the groups.
                let (text, expected) = (format!("x/{text}"), format!("x/{expected}"));
                check_all(&[value], text.as_bytes(), expected.as_bytes());
            }
        }
    }
}

#[test]
fn base64_twice_shares_a_digit() {
    let twice = [KEY, KEY].concat();
    check_all(&[KEY], STANDARD.encode(&twice).as_bytes(), b"***");
    let text = format!("{},{}", STANDARD.encode(KEY), URL_SAFE_NO_PAD.encode(KEY));
    check_all(&[KEY], text.as_bytes(), b"***,***");
}

#[test]
fn padding_only_where_it_is_due() {
    check_all(&[b"123456789"], b"MTIzNDU2Nzg5==", b"***==");
    check_all(&[b"1234567890"], b"MTIzNDU2Nzg5MA===", b"***=");
    check_all(&[b"12345678"], b"MTIzNDU2Nzg==", b"***=");
    check_all(&[b"1234567890"], b"MTIzNDU2Nzg5MA=MTIzNDU2Nzg5MA", b"******");
}

#[test]
fn broken_lines() {
    let value: Vec<u8> = (0..150u8).map(|i| i.wrapping_mul(89) ^ 0x5A).collect();
    for line_break in ["\n", "\r\n"] {
        for width in [76, 64, 60, 7, 1] {
            check(&value, wrap(&hex(&value), width, line_break));
            for before in 0..4 {
                let whole = [&b"abc"[..before.min(3)], &value, b"\xFF\xFF\xFF"].concat();
                let text = STANDARD.encode(whole);
                let (from, to) = base64_mask(before.min(3), value.len(), &text);
                let wrapped = wrap(&text, width, line_break);
                let place = |nth: usize| nth + nth / width * line_break.len();
                // The break in front of the first digit is no part of the value, nor is the last.
                let (head, tail) = (&wrapped[..place(from)], &wrapped[place(to - 1) + 1..]);
                check_all(&[&value], wrapped.as_bytes(), format!("{head}***{tail}").as_bytes());
            }
        }
    }
    // An empty line ends it.
    let text = hex(KEY).replacen('2', "2\n\n", 1);
    check_all(&[KEY], text.as_bytes(), text.as_bytes());
}

#[test]
fn hex_in_either_case() {
    check(KEY, hex(KEY));
    check(KEY, hex(KEY).to_uppercase());
    let mixed = |(i, c): (usize, char)| if i % 3 == 0 { c.to_ascii_uppercase() } else { c };
    check(KEY, hex(KEY).chars().enumerate().map(mixed).collect::<String>());
    check_all(&[KEY], format!("0x{}", hex(KEY)).as_bytes(), b"0x***");
    check_all(&[KEY], format!("5{}5", hex(KEY)).as_bytes(), b"5***5");
    check_all(&[KEY], format!("ab{}{}cd", hex(KEY), hex(KEY)).as_bytes(), b"ab******cd");
}

#[test]
fn percent_encoding_of_any_bytes() {
    let escape = |byte: u8| format!("%{byte:02X}").into_bytes();
    for which in 0..8 {
        let text: Vec<_> = KEY
            .iter()
            .enumerate()
            .map(|(i, &byte)| match (which, byte) {
                (0, _) => escape(byte),
                (1, _) => format!("%{byte:02x}").into_bytes(),
                (2, b' ') => b"+".to_vec(),
                (3..8, _) if i % which > 1 && byte != b'%' => vec![byte],
                (_, b'a'..=b'z' | b'0'..=b'9') => vec![byte],
                _ => escape(byte),
            })
            .collect();
        check(KEY, text.concat());
    }
    check(b"100%41 of+it", "100%2541%20of%2Bit");
    check(b"100%41 of+it", "100%2541+of%2bit");
    check(b"100%41 of+it", "100%2541%20of+it");
    check(b"%4%zz%%4", "%4%zz%%4");
    // What looks like the end of an escape is where the value begins.
    check_all(&[b"41 bcdef"], b"100%41%20bcdef", b"100%***");
    check_all(&[b"token\"with"], br#"C:\token\"with"#, br"C:\***");
}

#[test]
fn json_escapes() {
    check(KEY.strip_suffix(b"x").unwrap(), &KEY[..KEY.len() - 1]);
    let value = "a/b\\c\"d\ne\tf\u{8}g\u{c}h\ri\u{1}é€😀z";
    let text = serde_json::to_string(value).unwrap();
    check(value.as_bytes(), text.trim_matches('"'));
    check(value.as_bytes(), text.trim_matches('"').replace('/', "\\/"));
    for every in 1..5 {
        for upper in [false, true] {
            let escaped = |(i, c): (usize, char)| {
                let mut units = [0; 2];
                let whole = c.encode_utf16(&mut units).iter().map(|unit| match upper {
                    false => format!("\\u{unit:04x}"),
                    true => format!("\\u{unit:04X}"),
                });
                match i % every == 0 || c < ' ' || c == '"' || c == '\\' {
                    true => whole.collect(),
                    false => c.to_string(),
                }
            };
            check(value.as_bytes(), value.chars().enumerate().map(escaped).collect::<String>());
        }
    }
    check_all(
        &["😀😀😀".as_bytes()],
        br"\ud83d\ud83d\ude00\ud83d\ude00\ud83d\ude00",
        br"\ud83d***",
    );
    check_all(
        &["é23456789".as_bytes()],
        br#"{"k":"\u00e923456789","l":1}"#,
        br#"{"k":"***","l":1}"#,
    );
}

#[test]
fn a_terminal_returns_the_carriage() {
    let value = b"-----BEGIN KEY-----\nMIIB\r\n\nabc\n-----END KEY-----\n";
    let text = String::from_utf8_lossy(value).replace('\n', "\r\n");
    check_all(&[value], text.as_bytes(), b"***\r\n");
    check_all(&[value], value, b"***\n");
    check(b"\n2345678", b"\r\n2345678");
    check_all(&[b"\n2345678"], b"\r\r\n2345678\r", b"\r***\r");
}

#[test]
fn newlines_at_the_end_need_not_be_there() {
    for value in [&b"top-secret-1\n"[..], b"top-secret-1\n\n", b"top-secret-1\r\n"] {
        check_all(&[value], b"[top-secret-1]", b"[***]");
        check_all(&[value], b"top-secret-1\n\n", b"***\n\n");
        check(value, STANDARD.encode("top-secret-1"));
        check(value, STANDARD.encode(value));
        check(value, URL_SAFE_NO_PAD.encode(value));
        check(value, hex(value));
        check(
            value,
            serde_json::to_string(std::str::from_utf8(value).unwrap()).unwrap().trim_matches('"'),
        );
        let percent: String = value.iter().map(|byte| format!("%{byte:02x}")).collect();
        check(value, percent);
        check_all(&[value], format!("{}0z", hex(b"top-secret-1")).as_bytes(), b"***0z");
    }
}

#[test]
fn only_what_could_begin_a_value_is_held() {
    #[track_caller]
    fn check(value: &[u8], text: &str, held: usize) {
        let mut redactor = redactor(&[value]);
        let mut out = Vec::new();
        redactor.push(text.as_bytes(), &mut out);
        assert_eq!(redactor.held(), held, "{text:?}");
        assert_eq!(out, &text.as_bytes()[..text.len() - held]);
    }
    check(b"Tok3n-of-9", "Password:", 0);
    check(b"Tok3n-of-9", "Password: ", 0);
    check(b"Tok3n-of-9", "user@host:~$ ", 0);
    check(b"Tok3n-of-9", "T", 1);
    check(b"Tok3n-of-9", "xTok3n", 5);
    check(b"Tok3n-of-9", "Tok3n-of-8", 0);
    check(b"Tok3n-of-9", "5", 1);
    check(b"Tok3n-of-9", "546", 3);
    check(b"Tok3n-of-9", "%", 1);
    check(b"Tok3n-of-9", "%4", 0);
    check(b"Tok3n-of-9", "%5", 2);
    check(b"Tok3n-of-9", "%54", 3);
    check(b"Tok3n-of-9", "\\u0", 3);
    check(b"Tok3n-of-9", "\\u1!", 0);
    check(b"Tok3n-of-9", "\\u0054\\u006", 11);
    check(b"aaaaaaab", "aaaaaaaaaaaa", 7);
    // A base64 digit may end in the first two bits of the value.
    check(b"Tok3n-of-9", "!B", 1);
    check(b"Tok3n-of-9", "!C", 0);
}

#[test]
fn what_may_lengthen_a_mask_is_held_behind_it() {
    let mut redactor = redactor(&[b"Tok3n-of-9\n"]);
    let mut out = Vec::new();
    redactor.push(b"546f6b336e2d6f662d390", &mut out);
    assert_eq!((show(&out).as_str(), redactor.held()), ("***", 1));
    redactor.push(b"a", &mut out);
    assert_eq!((show(&out).as_str(), redactor.held()), ("***", 0));
    redactor.push(b"!", &mut out);
    assert_eq!((show(&out).as_str(), redactor.masked()), ("***!", 1));
}

#[test]
fn a_flush_shows_what_is_held_and_the_rest_is_still_found() {
    let json: String = String::from_utf8_lossy(&KEY[..12])
        .chars()
        .map(|c| format!("\\u{:04x}", c as u32))
        .collect();
    let percent: String = KEY[..12].iter().map(|byte| format!("%{byte:02X}")).collect();
    let texts = [
        String::from_utf8_lossy(&KEY[..12]).into_owned(),
        hex(&KEY[..12]),
        wrap(&hex(&KEY[..12]), 8, "\r\n"),
        STANDARD.encode(&KEY[..12]),
        wrap(&STANDARD.encode(&KEY[..12]), 3, "\n"),
        percent,
        json,
    ];
    for text in texts {
        for first in 1..text.len() {
            for second in first..text.len() {
                let mut redactor = redactor(&[&KEY[..12]]);
                let mut out = Vec::new();
                for part in [&text[..first], &text[first..second]] {
                    redactor.push(part.as_bytes(), &mut out);
                    redactor.flush(&mut out);
                    assert_eq!(redactor.held(), 0);
                }
                redactor.push(&text.as_bytes()[second..], &mut out);
                assert_eq!(redactor.held(), 0);
                redactor.push(b".", &mut out);
                let expected = format!("{}***.", &text[..second]);
                assert_eq!(show(&out), show(expected.as_bytes()), "{first} {second}");
            }
        }
    }
    // The allow twin: what goes on differently is shown.
    let mut redactor = redactor(&[&KEY[..12]]);
    let mut out = Vec::new();
    redactor.push(&KEY[..6], &mut out);
    redactor.flush(&mut out);
    redactor.push(&KEY[6..11], &mut out);
    assert_eq!((redactor.held(), out.len()), (5, 6));
    redactor.push(b"_", &mut out);
    assert_eq!(show(&out), show(&[&KEY[..11], b"_"].concat()));
}

#[test]
fn a_complete_line_passes_at_once() {
    #[track_caller]
    fn check(value: &[u8], line: &str, held: usize) {
        let mut redactor = redactor(&[value]);
        let mut out = Vec::new();
        redactor.push(line.as_bytes(), &mut out);
        redactor.pass_line(&mut out);
        assert_eq!(redactor.held(), held, "{line:?}");
    }
    // Each of them is held without that, as the other half of these lines is.
    for line in ["err B", "err 5", "err 54", "err 546", "err VG", "err xUb"] {
        check(b"Tok3n-of-9", &format!("{line}\n"), 0);
        check(b"Tok3n-of-9", &format!("{line}\r\n"), 0);
        check(b"Tok3n-of-9", line, line.len() - 4);
    }
    // A whole value is masked; the line break behind it is its line's.
    for whole in ["Tok3n-of-9", "Tok3n-of", "Tok3n-of-"] {
        for text in [hex(whole.as_bytes()), STANDARD.encode(whole), URL_SAFE_NO_PAD.encode(whole)] {
            check(whole.as_bytes(), &format!("err {text}\n"), 0);
            check(format!("{whole}\n").as_bytes(), &format!("err {text}\n"), 0);
        }
    }
    // What is more than next to nothing waits, and so does any beginning of the plain value.
    check(b"Tok3n-of-9", "err 546f\n", 5);
    check(b"Tok3n-of-9", "err VG9\n", 4);
    check(b"Tok3n-of-9", "err FRv\n", 4);
    check(b"\nok3n-of-9", "err\n", 1);
    check(b"T\nk3n-of-9", "err T\n", 2);
    check(b"T\n\n3n-of-9", "err %54%0a\n", 7);
    check(b"T\nk3n-of-9", "err T\r\n", 3);
}

/// However the lines of an encoded value are flushed, no more than three characters of it are shown.
#[test]
fn a_value_whose_lines_are_flushed_is_masked_but_for_three_characters() {
    const MOST: usize = 3;
    #[track_caller]
    fn check(value: &[u8], before: &str, digits: &str, breaks: &[usize], line_break: &str) {
        let mut lines: Vec<String> = Vec::new();
        let mut from = 0;
        for &at in breaks {
            lines.push(format!("{}{line_break}", &digits[from..at]));
            from = at;
        }
        lines.push(format!("{}.\n", &digits[from..]));
        lines[0].insert_str(0, before);
        let out = show(&redact_lines(&[value], lines.iter().map(String::as_bytes)));
        let text = show(lines.concat().as_bytes());
        let (head, tail) = out.split_once("***").unwrap_or_else(|| panic!("unmasked: {out}"));
        assert_eq!(tail, ".\\n", "{text}");
        let shown = head.strip_prefix(before).unwrap_or_else(|| panic!("{out} {text}"));
        assert!(text.starts_with(head), "{out} {text}");
        let shown = shown.replace(&show(line_break.as_bytes()), "");
        assert!(shown.len() <= MOST, "{shown}: {out} {text}");
        // Without a line break so early nothing of it is.
        assert!(shown.is_empty() || breaks[0] <= MOST, "{shown}: {out} {text}");
    }
    let mut texts = vec![(String::new(), hex(KEY)), (String::new(), hex(KEY).to_uppercase())];
    for engine in [&STANDARD, &URL_SAFE, &URL_SAFE_NO_PAD] {
        for neighbours in 0..3 {
            let text = engine.encode([&b"\xD7:"[..neighbours], KEY].concat());
            let (from, _) = base64_mask(neighbours, KEY.len(), &text);
            texts.push((text[..from].to_owned(), text[from..].to_owned()));
        }
    }
    for (before, digits) in texts {
        let end = digits.trim_end_matches('=').len();
        for line_break in ["\n", "\r\n"] {
            for first in 1..end {
                check(KEY, &before, &digits, &[first], line_break);
                for second in first + 1..end {
                    check(KEY, &before, &digits, &[first, second], line_break);
                }
            }
            for width in 1..end {
                let breaks: Vec<_> = (width..end).step_by(width).collect();
                check(KEY, &before, &digits, &breaks, line_break);
            }
        }
    }
    // Nothing of a value that has lines itself.
    let key = b"-\n-----BEGIN KEY-----\nMIIB\nabc\n-----END KEY-----\n";
    let json = serde_json::to_string(std::str::from_utf8(key).unwrap()).unwrap();
    for text in [&key[..key.len() - 1], json.trim_matches('"').trim_end_matches("\\n").as_bytes()] {
        let lines = text.split_inclusive(|byte| *byte == b'\n');
        assert_eq!(show(&redact_lines(&[key], lines)), "***");
    }
}

#[test]
fn an_escape_that_the_end_cuts_off_stands_for_itself() {
    for (value, text) in [
        (&b"per cent 4%"[..], "per%20cent%204%"),
        (b"per cent %4", "per%20cent+%4"),
        (b"a/b/c/d/e\\", r"a\/b\/c/d/e\"),
        (b"a/b/c/d/e\\u00e", r"a\/b\/c/d/e\u00e"),
        ("a/b/c/d/é\\ud83".as_bytes(), r"a\/b/c/d/\u00e9\ud83"),
    ] {
        check_all(&[value], text.as_bytes(), b"***");
        // The text goes on after the pause as an escape of something else: what was shown is masked.
        let mut redactor = redactor(&[value]);
        let mut out = Vec::new();
        redactor.push(text.as_bytes(), &mut out);
        redactor.flush(&mut out);
        redactor.push(b"41 and more", &mut out);
        redactor.flush(&mut out);
        assert!(out.starts_with(b"***") && out.ends_with(b"41 and more"), "{}", show(&out));
    }
    // The allow twins: the escape is another character, or the value is not whole.
    check_all(&[b"per cent 4%"], b"per%20cent%204%41", b"per%20cent%204%41");
    check_all(&[b"per cent 4%%"], b"per%20cent%204%", b"per%20cent%204%");
}

#[test]
fn escapes_that_end_in_what_they_mean_want_no_reader_each() {
    #[track_caller]
    fn check(value: &[u8], text: &[u8], expected: &[u8], readers: usize) {
        check_all(&[value], text, expected);
        let mut redactor = redactor(&[value]);
        redactor.push(text, &mut Vec::new());
        let most = redactor.groups.iter().map(|group| group.readers.len()).max();
        assert!(most.is_some_and(|most| most <= readers), "{most:?}: {}", show(text));
    }
    let quotes = [&[b'"'; 16], &b"end\\"[..]].concat();
    let escaped = [&b"\\\"".repeat(16)[..], b"end\\\\"].concat();
    check(&quotes, &escaped, b"***", 3);
    check(&quotes, &[&escaped[..], b" ", &escaped, &quotes].concat(), b"*** ***", 3);
    // The end of the one shares a backslash with the beginning of the other: from there on two ways of
    // reading go on side by side, and agree.
    let joined = [&quotes[..], &escaped].concat();
    check(&quotes, &joined, b"***", 3);
    check(&quotes, &joined.repeat(20), b"***", MOST_READERS);
    check(b"////////////secret", &[&b"\\/".repeat(12)[..], b"secret"].concat(), b"***", 2);
    check(b"\n\n\n\n\n\n\n\n\n\nx", &[&b"\r\n".repeat(10)[..], b"x"].concat(), b"***", 2);
    check(b"5555555555", &b"%35".repeat(10), b"***", 2);
}

#[test]
fn a_border_survives_a_flush() {
    let value = b"abcabcabcabX";
    let mut redactor = redactor(&[value]);
    let mut out = Vec::new();
    redactor.push(b"abcabcab", &mut out);
    redactor.flush(&mut out);
    redactor.push(b"cabcabcabXabcabcabcabX", &mut out);
    assert_eq!(show(&out), "abcabcab******");
}

#[test]
fn what_outgrows_the_memory_is_masked() {
    let value: Vec<u8> =
        (0..40_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let mut texts = vec![value.clone(), hex(&value).into(), STANDARD.encode(&value).into()];
    texts.push(value.iter().flat_map(|byte| format!("%{byte:02x}").into_bytes()).collect());
    for text in texts {
        for size in [1, 1000, 1 << 20] {
            let mut redactor = redactor(&[&value]);
            redactor.window = Window::new(4096).unwrap();
            redactor.window.most = Some(10_000);
            let mut out = Vec::new();
            redactor.push(b"see: ", &mut out);
            text.chunks(size).for_each(|chunk| redactor.push(chunk, &mut out));
            redactor.push(b" :end", &mut out);
            redactor.flush(&mut out);
            let inner = show(&out);
            let inner = inner.strip_prefix("see: ").unwrap().strip_suffix(" :end").unwrap();
            assert!(inner.len() < 300 && inner.chars().all(|c| c == '*'), "{inner}");
        }
    }
}

#[test]
fn the_work_for_a_byte_is_bounded() {
    const LEN: usize = if cfg!(debug_assertions) { 1 << 12 } else { 1 << 16 };
    fn value(period: &[u8], last: u8) -> Vec<u8> {
        let mut value: Vec<u8> = period.iter().copied().cycle().take(LEN).collect();
        value[LEN - 1] = last;
        value
    }
    fn fibonacci() -> Vec<u8> {
        let (mut a, mut b) = (vec![b'a'], b"ab".to_vec());
        while b.len() < LEN {
            (a, b) = (b.clone(), [b, a].concat());
        }
        b
    }
    let all_a = value(b"a", b'a');
    let nearly = |text: &[u8]| [&text[..LEN - 1], b"?"].concat().repeat(3);
    let cases: Vec<(&str, Vec<u8>, Vec<u8>)> = vec![
        ("a…ab in a…a", value(b"a", b'b'), all_a.repeat(4)),
        ("a…a nearly", all_a.clone(), nearly(&all_a)),
        ("a…a in a…a", all_a.clone(), all_a.repeat(4)),
        (
            "a in the middle",
            {
                let mut v = all_a.clone();
                v[LEN / 2] = b'b';
                v
            },
            all_a.repeat(4),
        ),
        ("(ab)…", value(b"ab", b'!'), value(b"ab", b'b').repeat(4)),
        ("fibonacci", fibonacci(), nearly(&fibonacci())),
        ("hex of zeros", value(b"\0", 1), vec![b'0'; LEN * 4]),
        ("hex of 0x00 0x0a", value(b"\0", 1), b"0000000\n".repeat(LEN)),
        ("base64 of zeros", value(b"\0", 1), vec![b'A'; LEN * 4]),
        ("escapes in escapes", [b"41", &all_a[..]].concat(), b"%41%61".repeat(LEN)),
        ("own escapes", [b"61", &all_a[..]].concat(), b"%61".repeat(LEN)),
        ("backslashes", value(b"\\", b'x'), vec![b'\\'; LEN * 4]),
        ("\\u0061", value(b"a", b'b'), b"\\u0061".repeat(LEN)),
        ("carriage returns", value(b"\n", b'x'), b"\r\n".repeat(LEN)),
        ("line breaks", value(b"ab", b'x'), b"\r\n\n\r".repeat(LEN)),
        ("percents", value(b"%", b'x'), b"%".repeat(LEN * 4)),
    ];
    for (name, value, text) in cases {
        for size in [1, 4093, usize::MAX] {
            let mut redactor = redactor(&[&value]);
            let mut out = Vec::new();
            text.chunks(size.min(text.len())).for_each(|chunk| {
                redactor.push(chunk, &mut out);
                out.clear();
            });
            let per_byte = redactor.found.steps as f64 / text.len() as f64;
            println!("{name} in chunks of {size}: {per_byte:.1} steps a byte");
            assert!(per_byte < 100.0, "{name}: {per_byte}");
        }
    }
}

/// `cargo test --release --lib redact::tests::speed -- --nocapture`
#[test]
fn speed() {
    let lease = (0..40u32).map(|i| b'!' + (i.wrapping_mul(2_654_435_761) >> 24) as u8 % 90);
    let values: Vec<Vec<u8>> =
        vec![lease.collect(), b"ghp_0123456789abcdefABCDEF0123456789abcd".into()];
    let random = |n: usize| {
        let mut state = 88_172_645_463_325_252u64;
        std::iter::repeat_with(move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 24) as u8
        })
        .take(n)
        .collect::<Vec<u8>>()
    };
    let size = if cfg!(debug_assertions) { 1 << 18 } else { 1 << 26 };
    let log = b"2026-11-03T12:00:00Z INFO  build: compiling crate 17 of 227 (target/debug/deps)\n";
    let big = random(1 << 20);
    let texts = [
        ("log lines", log.repeat(size / log.len())),
        ("random bytes", random(size)),
        ("base64", STANDARD.encode(random(size * 3 / 4)).into_bytes()),
        ("hex", hex(&random(size / 2)).into_bytes()),
        ("zeros", vec![0; size]),
    ];
    let measure = |what: &str, values: &[&[u8]], text: &[u8]| {
        let mut redactor = redactor(values);
        let mut out = Vec::with_capacity(1 << 17);
        let start = std::time::Instant::now();
        for chunk in text.chunks(1 << 16) {
            redactor.push(chunk, &mut out);
            out.clear();
        }
        let rate = text.len() as f64 / 1e6 / start.elapsed().as_secs_f64();
        println!("{what:40} {rate:7.0} MB/s");
    };
    for (name, text) in &texts {
        for count in 1..=2 {
            let values: Vec<_> = values[..count].iter().map(Vec::as_slice).collect();
            measure(&format!("{name}, {count} values"), &values, text);
        }
    }
    measure("1 MiB value, plain", &[&big], &big);
    measure("1 MiB value, base64", &[&big], STANDARD.encode(&big).as_bytes());
    measure("a…ab in a…a", &[b"aaaaaaaaaaaaaaaaaaaab"], &vec![b'a'; size / 16]);
}

/// All occurrences by looking everywhere, for values that only occur plain.
fn by_hand(values: &[Vec<u8>], text: &[u8]) -> Vec<u8> {
    let mut found: Vec<(usize, usize)> = values
        .iter()
        .flat_map(|value| {
            (0..text.len())
                .filter(|&at| text[at..].starts_with(value))
                .map(|at| (at, at + value.len()))
        })
        .collect();
    found.sort_unstable();
    let (mut out, mut shown) = (Vec::new(), 0);
    for (from, to) in found {
        if from >= shown {
            out.extend_from_slice(&text[shown..from]);
            out.extend_from_slice(MASK);
        }
        shown = shown.max(to);
    }
    out.extend_from_slice(&text[shown..]);
    out
}

fn cut<'a>(text: &'a [u8], sizes: &[usize]) -> Vec<&'a [u8]> {
    let mut rest = text;
    let mut chunks = Vec::new();
    for &size in sizes {
        let (a, b) = rest.split_at(size.min(rest.len()));
        chunks.push(a);
        rest = b;
    }
    chunks.push(rest);
    chunks
}

fn sizes() -> impl Strategy<Value = Vec<usize>> {
    prop::collection::vec(prop_oneof![0usize..4, 0usize..40], 0..40)
}

/// Text that is full of beginnings of every form.
fn noise() -> impl Strategy<Value = Vec<u8>> {
    let piece = prop_oneof![
        any::<u8>().prop_map(|byte| vec![byte]),
        "[ -~]{1,6}".prop_map(String::into_bytes),
        "(\\\\u00[0-9a-f]{0,2}|\\\\[nrt\"u/]?|%[0-9A-F]{0,2}|\r?\n|[+=/_-]){1,3}"
            .prop_map(String::into_bytes),
    ];
    prop::collection::vec(piece, 0..12).prop_map(|pieces| pieces.concat())
}

fn value() -> impl Strategy<Value = Vec<u8>> {
    let bytes = prop_oneof![
        prop::collection::vec(any::<u8>(), 12..40),
        "[a-z0-9 +%\\\\\"/\n]{12,40}".prop_map(String::into_bytes),
        "(é|€|😀|n|u|\\\\|4|1| ){12,20}".prop_map(String::into_bytes),
    ];
    bytes.prop_filter("a newline at the end is no part of the mask", |value| {
        !matches!(value.last(), Some(b'\r' | b'\n'))
    })
}

/// `value` in one of the forms, by `how` and the `dice`.
fn encode(value: &[u8], how: u8, dice: &[u8]) -> Vec<u8> {
    let die = |i: usize| dice[i % dice.len()];
    let each = |unit: &dyn Fn(u8, u8) -> String, plain: &dyn Fn(u8) -> bool| -> Vec<u8> {
        let units =
            value.iter().enumerate().map(|(i, &byte)| match die(i) % 2 == 0 && plain(byte) {
                true => vec![byte],
                false => unit(byte, die(i)).into_bytes(),
            });
        units.collect::<Vec<_>>().concat()
    };
    let percent = |byte: u8, die: u8| match die & 2 {
        0 => format!("%{byte:02x}"),
        _ => format!("%{byte:02X}"),
    };
    match how % 8 {
        0 => value.to_vec(),
        1 => each(
            &|byte, die| if die & 4 == 0 { format!("{byte:02x}") } else { format!("{byte:02X}") },
            &|_| false,
        ),
        2 => each(&percent, &|byte| byte != b'%' && byte != b'+'),
        3 => {
            each(&|byte, die| if byte == b' ' { "+".into() } else { percent(byte, die) }, &|byte| {
                !b"%+ ".contains(&byte)
            })
        }
        4 => STANDARD.encode(value).into(),
        5 => URL_SAFE_NO_PAD.encode(value).into(),
        6 => wrap(&STANDARD.encode(value), 4 + usize::from(die(0) % 19) * 4, "\n").into(),
        _ => match std::str::from_utf8(value) {
            Err(_) => wrap(&hex(value), 1 + usize::from(die(0) % 76), "\r\n").into(),
            Ok(value) => value
                .chars()
                .enumerate()
                .map(|(i, c)| {
                    let mut units = [0; 2];
                    match die(i) % 2 == 0 && c >= ' ' && c != '"' && c != '\\' {
                        true => c.to_string(),
                        false => c
                            .encode_utf16(&mut units)
                            .iter()
                            .map(|unit| format!("\\u{unit:04x}"))
                            .collect(),
                    }
                })
                .collect::<String>()
                .into(),
        },
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(debug_assertions) { 200 } else { 20_000 }))]

    #[test]
    fn text_without_a_value_passes_unchanged(
        text in noise(), value in prop::collection::vec(any::<u8>(), 16..40), how: u8,
        dice in prop::collection::vec(any::<u8>(), 1..9), sizes in sizes(), after in noise(),
    ) {
        let encoded = encode(&value, how, &dice);
        let text = [&text, &encoded[..encoded.len() / 2], b"\x0B", &after].concat();
        let values: [&[u8]; 1] = [&value];
        prop_assert_eq!(&redact(&values, cut(&text, &sizes)), &text);
        prop_assert_eq!(&redact_lines(&values, cut(&text, &sizes)), &text);
    }

    #[test]
    fn a_value_is_masked_wherever_it_is(
        before in noise(), value in value(), how: u8, dice in prop::collection::vec(any::<u8>(), 1..9),
        after in noise(), sizes in sizes(),
    ) {
        let encoded = encode(&value, how, &dice);
        let text = [&before[..], &encoded, &after].concat();
        let values: [&[u8]; 1] = [&value];
        let out = redact(&values, cut(&text, &sizes));
        prop_assert_eq!(show(&redact(&values, [&text[..]])), show(&out), "chunks matter");
        prop_assert_eq!(show(&redact(&values, text.chunks(1))), show(&out), "chunks matter");
        // What stands beside it can be its padding, or together with its first or last character be an
        // escape that means the same character: before `4` a `\u003`, behind `%` a `25`.
        let joined_before = |text: &[u8]| matches!(text.first(), Some(b'\\' | b'%' | b'\r'));
        let joined_after = |text: &[u8]| match value.last() {
            _ if text.iter().all(|byte| *byte == b'=') => text.len() <= 2,
            last => matches!(last, Some(b'\\' | b'%')),
        };
        let matches = (0..=before.len().min(5)).any(|b| (0..=after.len().min(5)).any(|a| {
            let (before, head) = before.split_at(before.len() - b);
            let (tail, after) = after.split_at(a);
            (b == 0 || joined_before(head)) && (a == 0 || joined_after(tail))
                && out == [before, MASK, after].concat()
        }));
        prop_assert!(matches, "{} {}", show(&out), show(&text));
    }

    #[test]
    fn plain_values_are_masked_as_by_hand(
        values in prop::collection::vec("[xyz]{8,12}|[xy]{8,9}|x{8,10}".prop_map(String::into_bytes), 1..4),
        text in "(x{1,9}|[xy]{1,9}|[xyz]{1,9}){0,40}", take in prop::collection::vec((0usize..4, 0usize..200), 0..5),
        sizes in sizes(),
    ) {
        let mut text = text.into_bytes();
        for (nth, at) in take {
            let at = at.min(text.len());
            text.splice(at..at, values[nth % values.len()].iter().copied());
        }
        let borrowed: Vec<_> = values.iter().map(Vec::as_slice).collect();
        let expected = by_hand(&values, &text);
        prop_assert_eq!(show(&redact(&borrowed, cut(&text, &sizes))), show(&expected));
    }
}

/// As GitHub's stateless installation tokens are: a prefix, and a JWT of any length.
#[test]
fn a_long_token_is_masked_in_full_in_every_form() {
    let digits = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    for length in [520, 541, 1_021, 4_100, 20_000] {
        let mut state = length as u32;
        let mut digit = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            digits[(state >> 26) as usize]
        };
        let mut token = b"ghs_eyJhbGciOiJSUzI1NiJ9.".to_vec();
        token.resize_with(length, &mut digit);
        token[length / 2] = b'.';
        let percent: String = token.iter().map(|byte| format!("%{byte:02X}")).collect();
        let json: String = token.iter().map(|byte| format!("\\u00{byte:02x}")).collect();
        let mut forms = vec![
            String::from_utf8(token.clone()).unwrap(),
            hex(&token),
            hex(&token).to_uppercase(),
            wrap(&hex(&token), 60, "\n"),
            percent,
            json,
        ];
        for engine in [&STANDARD, &URL_SAFE_NO_PAD] {
            let text = engine.encode(&token);
            forms.extend([wrap(&text, 76, "\n"), wrap(&text, 64, "\r\n"), text]);
        }
        for form in forms {
            let text = format!("token: {form} .");
            for size in [1, 7, 100, 512, 4_096, 65_536] {
                let out = redact(&[&token], text.as_bytes().chunks(size));
                assert_eq!(show(&out), "token: *** .", "{length} in chunks of {size}");
            }
        }
        // Inside something longer, as `Authorization: Basic` has it.
        for before in 0..4 {
            let whole = [&b"x-access-token:"[before..], &token].concat();
            let text = STANDARD.encode(&whole);
            let (from, to) = base64_mask(15 - before, length, &text);
            let out = redact(&[&token], text.as_bytes().chunks(1_000));
            assert_eq!(show(&out), format!("{}***{}", &text[..from], &text[to..]), "{length}");
        }
    }
}
