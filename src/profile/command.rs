//! The patterns that pin a capability to commands: `["git", "push", "**"]`.
//!
//! An argv is matched element by element. What argv\[0\] may be is decided in `policy`, which knows the
//! file that it resolved to; here is only the shape.
#![forbid(unsafe_code)]

use std::ffi::OsStr;
use std::fmt;

use serde::ser::SerializeSeq;
use serde::{Serialize, Serializer};

/// One element of a pattern.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PatternElement {
    /// Exactly this argument. A `*` inside a longer word is a plain character.
    Literal(String),
    /// `*`: any one argument.
    One,
    /// `**`: all that is left, also nothing. Only at the end.
    Rest,
}

impl PatternElement {
    fn as_str(&self) -> &str {
        match self {
            PatternElement::Literal(text) => text,
            PatternElement::One => "*",
            PatternElement::Rest => "**",
        }
    }
}

/// One permitted command. Never empty; `**` stands last or not at all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommandPattern(Vec<PatternElement>);

/// The words are no command pattern.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidPattern {
    #[error("a command pattern must not be empty; `[[\"**\"]]` says \"any command\"")]
    Empty,
    #[error("`**` stands for the rest of a command, so it can only be the last element")]
    RestNotLast,
    #[error(
        "`{0}` cannot be a program: write its name alone, or its absolute path without `.` and `..`"
    )]
    Program(String),
    #[error("an argument cannot hold a NUL")]
    Nul,
}

impl CommandPattern {
    /// # Errors
    /// If there is no element, if `**` is not the last, or if the first can never name a program.
    pub fn new(words: &[String]) -> Result<Self, InvalidPattern> {
        let Some(first) = words.first() else { return Err(InvalidPattern::Empty) };
        if words[..words.len() - 1].iter().any(|w| w == "**") {
            return Err(InvalidPattern::RestNotLast);
        }
        if words.iter().any(|w| w.contains('\0')) {
            return Err(InvalidPattern::Nul);
        }
        let relative = first.contains('/')
            && (!first.starts_with('/')
                || first.split('/').skip(1).any(|p| matches!(p, "" | "." | "..")));
        if first.is_empty() || relative || matches!(first.as_str(), "." | "..") {
            return Err(InvalidPattern::Program(first.clone()));
        }
        let element = |w: &String| match w.as_str() {
            "*" => PatternElement::One,
            "**" => PatternElement::Rest,
            _ => PatternElement::Literal(w.clone()),
        };
        Ok(Self(words.iter().map(element).collect()))
    }

    pub fn elements(&self) -> &[PatternElement] {
        &self.0
    }

    /// The element for argv\[0\].
    pub fn program(&self) -> &PatternElement {
        &self.0[0]
    }

    /// `["**"]`: whatever it is.
    pub fn is_any(&self) -> bool {
        self.0 == [PatternElement::Rest]
    }

    /// Whether the arguments after argv\[0\] match; argv\[0\] itself is the caller's to judge.
    pub fn permits_arguments<S: AsRef<OsStr>>(&self, arguments: &[S]) -> bool {
        let Some((_, mut pattern)) = self.0.split_first() else { return false };
        if self.is_any() {
            return true;
        }
        let mut arguments = arguments.iter();
        loop {
            match (pattern.split_first(), arguments.next()) {
                (Some((PatternElement::Rest, _)), _) | (None, None) => return true,
                (Some((PatternElement::One, rest)), Some(_)) => pattern = rest,
                (Some((PatternElement::Literal(text), rest)), Some(given))
                    if given.as_ref() == OsStr::new(text) =>
                {
                    pattern = rest;
                }
                (Some(_), _) | (None, Some(_)) => return false,
            }
        }
    }
}

impl fmt::Display for CommandPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, element) in self.0.iter().enumerate() {
            let space = if i == 0 { "" } else { " " };
            let text = element.as_str();
            if text.is_empty() || text.contains(|c: char| c.is_whitespace() || c.is_control()) {
                write!(f, "{space}{text:?}")?;
            } else {
                write!(f, "{space}{text}")?;
            }
        }
        Ok(())
    }
}

impl Serialize for CommandPattern {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let mut words = s.serialize_seq(Some(self.0.len()))?;
        for element in &self.0 {
            words.serialize_element(element.as_str())?;
        }
        words.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pattern(words: &[&str]) -> Result<CommandPattern, InvalidPattern> {
        CommandPattern::new(&words.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn arguments_match_one_by_one() {
        #[track_caller]
        fn check(words: &[&str], arguments: &[&str], expected: bool) {
            let found = pattern(words).unwrap().permits_arguments(arguments);
            assert_eq!(found, expected, "{words:?} {arguments:?}");
        }
        check(&["git", "push", "**"], &["push"], true);
        check(&["git", "push", "**"], &["push", "origin", "main"], true);
        check(&["git", "push", "**"], &[], false);
        check(&["git", "push", "**"], &["pull"], false);
        check(&["git", "push", "**"], &["-c", "x=y", "push"], false);
        check(&["git", "push", "*"], &["push", "origin"], true);
        check(&["git", "push", "*"], &["push"], false);
        check(&["git", "push", "*"], &["push", "origin", "main"], false);
        check(&["git"], &[], true);
        check(&["git"], &["push"], false);
        check(&["a", ""], &[""], true);
        check(&["a", "x*"], &["xy"], false);
        check(&["a", "x*"], &["x*"], true);
        check(&["*"], &[], true);
        check(&["**"], &["anything", "at", "all"], true);
        check(&["**"], &[], true);
    }

    #[test]
    fn what_can_never_match_is_refused() {
        for good in [&["git"][..], &["/usr/bin/git", "**"], &["*", "x"], &["**"], &["a", "**"]] {
            assert!(pattern(good).is_ok(), "{good:?}");
        }
        for bad in [
            &[][..],
            &[""],
            &["**", "x"],
            &["a", "**", "b"],
            &["./git"],
            &["bin/git"],
            &["/usr/../git"],
            &["/usr//git"],
            &["/"],
            &[".."],
            &["a", "b\0"],
        ] {
            assert!(pattern(bad).is_err(), "{bad:?}");
        }
    }
}
