//! Looks for every fingerprint at every place of a text. One multiplication and a look into a table of
//! 16 KiB for each byte; what that lets through is looked up, and what is found is confirmed by its digest.
#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::io::{self, Read};

use super::fingerprint::{Fingerprint, GuardKey, WINDOW, word_at};

/// Bits of the window's hash that the table is for.
const TABLE_BITS: u32 = 17;
const CHUNK: usize = 1 << 20;

pub struct Scanner {
    key: GuardKey,
    prints: Vec<Fingerprint>,
    table: Box<[u64]>,
    by_window: HashMap<u32, Vec<u32>>,
    longest: usize,
}

/// What was found, and where in the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Found<'a> {
    pub print: &'a Fingerprint,
    pub at: u64,
}

impl Scanner {
    pub fn new(key: GuardKey, prints: Vec<Fingerprint>) -> Self {
        let mut table = vec![0_u64; 1 << (TABLE_BITS - 6)].into_boxed_slice();
        let mut by_window: HashMap<u32, Vec<u32>> = HashMap::new();
        for (number, print) in prints.iter().enumerate() {
            if let Some((_, hash)) = print.window {
                let bit = hash >> (32 - TABLE_BITS);
                table[(bit >> 6) as usize] |= 1 << (bit & 63);
                by_window.entry(hash).or_default().push(number as u32);
            }
        }
        let longest = prints.iter().filter(|p| p.window.is_some()).map(|p| p.span).max();
        Self { key, prints, table, by_window, longest: longest.unwrap_or(0) }
    }

    pub fn key(&self) -> &GuardKey {
        &self.key
    }

    pub fn set_name(&self) -> [u8; 32] {
        self.key.set_name(&self.prints)
    }

    /// Whether a text is to be read at all.
    pub fn has_windows(&self) -> bool {
        !self.by_window.is_empty()
    }

    /// In a short text: anywhere in it, or, of a value that is shorter than a window, the whole of it.
    pub fn find_in_word(&self, text: &[u8]) -> Option<Found<'_>> {
        let short = (1..WINDOW).contains(&text.len());
        let whole = short
            .then(|| self.key.digest(text))
            .and_then(|digest| self.prints.iter().find(|p| p.window.is_none() && p.is_of(&digest)));
        whole.map(|print| Found { print, at: 0 }).or_else(|| self.find(text))
    }

    /// Anywhere in a text that is whole in memory.
    pub fn find(&self, text: &[u8]) -> Option<Found<'_>> {
        if !self.has_windows() {
            return None;
        }
        text.windows(WINDOW).enumerate().find_map(|(at, _)| {
            let hash = self.key.window_hash(word_at(text, at)?);
            let bit = hash >> (32 - TABLE_BITS);
            if self.table[(bit >> 6) as usize] >> (bit & 63) & 1 == 0 {
                return None;
            }
            self.confirm(text, at, hash)
        })
    }

    #[cold]
    fn confirm(&self, text: &[u8], at: usize, hash: u32) -> Option<Found<'_>> {
        self.by_window.get(&hash)?.iter().find_map(|&number| {
            let print = &self.prints[number as usize];
            let start = at.checked_sub(print.window?.0)?;
            let span = text.get(start..start + print.span)?;
            print.is_of(&self.key.digest(span)).then_some(Found { print, at: start as u64 })
        })
    }

    /// In all that a reader gives. `buffer` is taken again for the next one.
    ///
    /// # Errors
    /// Those of the reader.
    pub fn find_in(
        &self,
        mut reader: impl Read,
        buffer: &mut Vec<u8>,
    ) -> io::Result<Option<Found<'_>>> {
        // A value lies whole in one piece: of each, as much is kept as may begin one.
        let kept = self.longest.saturating_sub(1);
        buffer.resize(kept + CHUNK, 0);
        let (mut filled, mut before) = (0, 0_u64);
        loop {
            let read = match reader.read(&mut buffer[filled..]) {
                Ok(read) => read,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(e),
            };
            filled += read;
            if read > 0 && filled < buffer.len() {
                continue;
            }
            if let Some(found) = self.find(&buffer[..filled]) {
                return Ok(Some(Found { at: before + found.at, ..found }));
            }
            if read == 0 {
                return Ok(None);
            }
            let from = filled - kept;
            buffer.copy_within(from..filled, 0);
            before += from as u64;
            filled = kept;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use base64::Engine as _;

    const VALUE: &[u8] = b"ghp_0a1B2c3D4e5F6g7H8i9J";

    fn scanner(values: &[&[u8]]) -> Scanner {
        let key = GuardKey::new([7; 32]);
        let named = values.iter().enumerate().flat_map(|(i, value)| {
            key.fingerprints(&format!("s{i}").parse().unwrap(), value).unwrap()
        });
        let prints = named.collect();
        Scanner::new(key, prints)
    }

    #[test]
    fn a_value_is_found_at_every_place_and_in_every_form() {
        let scanner = scanner(&[b"some-other-value", VALUE]);
        #[track_caller]
        fn check(scanner: &Scanner, text: &[u8], expected: bool) {
            let found = scanner.find(text);
            assert_eq!(found.map(|f| f.print.secret.as_str()), expected.then_some("s1"));
        }
        for before in 0..20 {
            for after in 0..10 {
                let text = [&vec![b'x'; before][..], VALUE, &vec![b'y'; after][..]].concat();
                check(&scanner, &text, true);
                let encoded = base64::engine::general_purpose::STANDARD.encode(&text);
                check(&scanner, encoded.as_bytes(), true);
                let url = base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(&text);
                check(&scanner, url.as_bytes(), true);
                let hex: String = text.iter().map(|b| format!("{b:02x}")).collect();
                check(&scanner, hex.as_bytes(), true);
                check(&scanner, hex.to_uppercase().as_bytes(), true);
                let mut other = text;
                other[before + 5] ^= 1;
                check(&scanner, &other, false);
            }
        }
        check(&scanner, &VALUE[..VALUE.len() - 1], false);
        check(&scanner, b"", false);
    }

    #[test]
    fn a_reader_is_searched_across_its_pieces() {
        let scanner = scanner(&[VALUE]);
        let mut buffer = Vec::new();
        for at in [0, 1, CHUNK - 30, CHUNK - 8, CHUNK, CHUNK + 23, 2 * CHUNK - 1, 3 * CHUNK] {
            let mut text = vec![b'.'; 3 * CHUNK + 100];
            text[at..at + VALUE.len()].copy_from_slice(VALUE);
            /// Gives what it likes.
            struct Slow<'a>(&'a [u8]);
            impl Read for Slow<'_> {
                fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
                    let some = into.len().min(60_001);
                    self.0.read(&mut into[..some])
                }
            }
            let found = scanner.find_in(Slow(&text), &mut buffer).unwrap().unwrap();
            assert_eq!(found.at, at as u64);
            text[at] ^= 1;
            assert_eq!(scanner.find_in(&text[..], &mut buffer).unwrap(), None);
        }
    }

    #[test]
    fn a_long_value_is_known_by_its_beginning_and_a_short_one_as_a_whole() {
        let mut state = 1_u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        };
        let long: Vec<u8> = (0..200_000).map(|_| next()).collect();
        let scanner = scanner(&[&long, b"abc"]);
        assert!(scanner.find(&long[..5000]).is_some());
        assert!(scanner.find(&long[1..]).is_none());
        assert_eq!(scanner.find_in_word(b"abc").unwrap().print.secret.as_str(), "s1");
        assert!(scanner.find_in_word(b"abcd").is_none() && scanner.find(b"xabcx").is_none());
    }

    #[test]
    fn another_key_makes_other_fingerprints() {
        let prints =
            |key: u8| GuardKey::new([key; 32]).fingerprints(&"s".parse().unwrap(), VALUE).unwrap();
        let (one, other) = (prints(1), prints(2));
        assert_eq!(one, prints(1));
        assert_ne!(one[0].digest, other[0].digest);
        assert_ne!(one[0].window, other[0].window);
    }
}
