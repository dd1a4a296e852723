//! Where in a TOML text an error is: `file:line:column`, the reason, and the line itself.
//!
//! Receives a text and a byte range of it; returns a [`Located`]. Touches nothing else.
#![forbid(unsafe_code)]

use std::fmt;
use std::ops::Range;

use serde::de::DeserializeOwned;

/// The longest piece of a line that an error shows, in characters.
const SHOWN: usize = 120;

/// One error in a TOML text, as a person finds it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct Located {
    /// The file, or the name of a built-in text.
    pub origin: String,
    /// From 1.
    pub line: usize,
    /// From 1, in characters.
    pub column: usize,
    pub message: String,
    /// The line, without control characters and at most 120 characters long.
    pub excerpt: String,
    /// How many characters of the excerpt are meant; at least 1.
    width: usize,
}

impl Located {
    /// `range` is in bytes of `text`, as the TOML parser gives it. A range outside points at the end.
    pub fn new(origin: &str, text: &str, range: Range<usize>, message: impl Into<String>) -> Self {
        let start = floor_boundary(text, range.start);
        let before = &text[..start];
        let line_start = before.rfind('\n').map_or(0, |i| i + 1);
        let line_end = text[start..].find('\n').map_or(text.len(), |i| start + i);
        let end = floor_boundary(text, range.end).clamp(start, line_end);
        Self {
            origin: origin.to_owned(),
            line: before.matches('\n').count() + 1,
            column: text[line_start..start].chars().count() + 1,
            message: message.into(),
            excerpt: text[line_start..line_end]
                .chars()
                .take(SHOWN)
                .map(|c| if c.is_control() { ' ' } else { c })
                .collect(),
            width: text[start..end].chars().count().max(1),
        }
    }
}

impl Located {
    /// Under an unknown key may stand what should not be shown: `value = "…"` in a table of secrets.
    fn hide_after_mark(&mut self) {
        let shown = self.column - 1 + self.width;
        if self.excerpt.chars().count() > shown {
            self.excerpt = self.excerpt.chars().take(shown).chain(" …".chars()).collect();
        }
    }
}

fn floor_boundary(text: &str, index: usize) -> usize {
    (0..=index.min(text.len())).rev().find(|&i| text.is_char_boundary(i)).unwrap_or(0)
}

impl fmt::Display for Located {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}:{}:{}: {}", self.origin, self.line, self.column, self.message)?;
        let number = self.line.to_string();
        write!(f, "  {number} | {}", self.excerpt.trim_end())?;
        if self.column <= SHOWN {
            let width = self.width.min(SHOWN + 1 - self.column);
            let (pad, indent) = (number.len(), self.column - 1);
            write!(f, "\n  {:pad$} | {:indent$}{}", "", "", "^".repeat(width))?;
        }
        Ok(())
    }
}

/// Parses a whole TOML text into `T`; an error carries its place.
pub fn parse<T: DeserializeOwned>(origin: &str, text: &str) -> Result<T, Box<Located>> {
    toml::from_str(text).map_err(|e: toml::de::Error| {
        // TOML's own messages may have several lines; the first says it.
        let message = e.message().lines().collect::<Vec<_>>().join("; ");
        let unknown = message.starts_with("unknown field");
        let mut place = Located::new(origin, text, e.span().unwrap_or(0..0), message);
        if unknown {
            place.hide_after_mark();
        }
        Box::new(place)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_shows_its_line_and_points_at_the_words() {
        let text = "a = 1\nbäd = 2\n";
        let at = text.find("= 2").unwrap();
        let e = Located::new("x.toml", text, at..at + 3, "no");
        assert_eq!((e.line, e.column), (2, 5));
        assert_eq!(e.to_string(), "x.toml:2:5: no\n  2 | bäd = 2\n    |     ^^^");
    }

    #[test]
    fn any_range_of_any_text_is_answered() {
        for text in ["", "\n", "ä", "a\n\nb", &"x".repeat(400)] {
            for start in 0..text.len() + 3 {
                for end in [0, start, start + 1, usize::MAX] {
                    let shown = Located::new("o", text, start..end, "m").to_string();
                    assert!(shown.starts_with("o:"), "{shown}");
                }
            }
        }
    }

    #[test]
    fn an_unknown_key_is_named_with_its_place() {
        #[derive(Debug, serde::Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Raw {
            #[allow(dead_code)]
            known: u32,
        }
        let e = parse::<Raw>("x.toml", "known = 1\n  unknwon = 2\n").unwrap_err();
        assert_eq!((e.line, e.column), (2, 3), "{e}");
        assert!(e.message.contains("unknwon") && e.message.contains("known"), "{e}");
        assert!(parse::<Raw>("x.toml", "known = 1\n").is_ok());
        let e = parse::<Raw>("x.toml", "value = \"hunter2\"\n").unwrap_err();
        assert!(!e.to_string().contains("hunter2"), "{e}");
        assert!(e.to_string().contains("value …"), "{e}");
    }
}
