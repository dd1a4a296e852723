//! A failure as a person and as a program see it: what failed, on what, why, what to try.
//!
//! Receives text that may come from hostile files; writes it to standard error with every control
//! character made visible. Must never receive a value: messages carry names and paths only.
//!
//! Failures go to standard error also with `--json`: standard output belongs to the command, or to the
//! answer.
#![forbid(unsafe_code)]

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write as _};

use crate::model::verdict::Denial;

/// What every command returns: its exit status, or why sublet could not do it.
pub type Answer = Result<u8, Failure>;

/// Done, or the answer is yes.
pub const YES: u8 = 0;
/// The answer is no: a denied verdict, a broken trail, a failed check.
pub const NO: u8 = 1;
/// sublet could not do it: bad usage, a missing file, a store that does not open.
pub const TROUBLE: u8 = 2;
/// `run`, `exec` and `demo`: sublet failed or denied, and the command did not run (as docker-run(1)).
pub const NOT_RUN: u8 = 125;
/// What a shell reports of a program that SIGPIPE ended: 128 + 13.
const READER_GONE: u8 = 141;

/// Why sublet could not do what was asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// The part of the story that failed: `usage`, `config`, `decide`, …; a broker's is its own word.
    pub stage: Box<str>,
    /// A name that programs match on; for a denial the deny reason.
    pub reason: String,
    /// What failed, on what: one line.
    pub message: String,
    /// Why, outermost first. May be empty where the message says it all.
    pub causes: Vec<String>,
    /// What to try. May be empty.
    pub hint: String,
    pub exit: u8,
}

impl Failure {
    pub fn new(stage: impl Into<Box<str>>, reason: &str, message: impl Into<String>) -> Self {
        Self {
            stage: stage.into(),
            reason: reason.to_owned(),
            message: message.into(),
            causes: Vec::new(),
            hint: String::new(),
            exit: TROUBLE,
        }
    }

    /// Adds an error and its sources as causes.
    #[must_use]
    pub fn because(mut self, error: &dyn std::error::Error) -> Self {
        let mut next = Some(error);
        while let Some(e) = next {
            let text = e.to_string();
            // Many errors repeat their source's text in their own: say it once.
            if !self.causes.last().is_some_and(|last| last.ends_with(&text)) {
                self.causes.push(text);
            }
            next = e.source();
        }
        self
    }

    /// As [`Failure::because`], where the message already tells the error itself.
    #[must_use]
    pub fn because_of_source(self, error: &dyn std::error::Error) -> Self {
        match error.source() {
            Some(source) => self.because(source),
            None => self,
        }
    }

    #[must_use]
    pub fn why(mut self, cause: impl Into<String>) -> Self {
        self.causes.push(cause.into());
        self
    }

    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = hint.into();
        self
    }

    #[must_use]
    pub fn exit(mut self, status: u8) -> Self {
        self.exit = status;
        self
    }

    /// In `run`, statuses below 125 belong to the command.
    #[must_use]
    pub fn beside_a_command(mut self) -> Self {
        self.exit = self.exit.max(NOT_RUN);
        self
    }

    /// Standard output could not be written. A reader that went away (`| head`) is no one's fault and is
    /// not reported.
    pub fn stdout(error: &io::Error) -> Self {
        let failure = Self::new("output", "stdout_failed", "cannot write to standard output")
            .because(error)
            .hint("look for a full disk where standard output leads");
        if error.kind() == io::ErrorKind::BrokenPipe {
            Self { exit: READER_GONE, ..failure }
        } else {
            failure
        }
    }

    /// Writes the failure to standard error and returns the exit status.
    pub fn report(&self, json: bool) -> u8 {
        if self.exit != READER_GONE {
            let text = if json { self.json() } else { self.text(colour_on(&io::stderr())) };
            // Nowhere is left to report that standard error is gone; the exit status still tells.
            drop(io::stderr().lock().write_all(text.as_bytes()));
        }
        self.exit
    }

    /// Tells it as a note beside an answer that was given all the same. People only: with `--json` notes
    /// are part of the answer.
    pub fn note(&self) {
        let text = self.lines("sublet: note:", "\x1b[1m", colour_on(&io::stderr()));
        // As in `report`.
        drop(io::stderr().lock().write_all(text.as_bytes()));
    }

    /// `sublet: what` / `  why: …` / `  try: …`.
    pub fn text(&self, colour: bool) -> String {
        self.lines("sublet:", "\x1b[1;31m", colour)
    }

    fn lines(&self, label: &str, bold: &str, colour: bool) -> String {
        let (bold, off) = if colour { (bold, "\x1b[0m") } else { ("", "") };
        format!("{bold}{label}{off} {}\n{}", visible(&self.message), self.details(colour))
    }

    /// The lines below the first: why and what to try.
    pub fn details(&self, colour: bool) -> String {
        let (dim, off) = if colour { ("\x1b[2m", "\x1b[0m") } else { ("", "") };
        let mut text = String::new();
        let whys = self.causes.iter().map(|cause| ("why", cause));
        let tries = Some(&self.hint).filter(|h| !h.is_empty()).map(|hint| ("try", hint));
        for (label, what) in whys.chain(tries) {
            // Further lines of one text (a TOML excerpt) keep the column of its first.
            let what = visible(what).replace('\n', "\n       ");
            writeln!(text, "  {dim}{label}:{off} {what}").expect("a String takes all text");
        }
        text
    }

    /// `{"error":{"stage","reason","message","hint"}}` and a newline.
    pub fn json(&self) -> String {
        format!("{}\n", serde_json::json!({ "error": self.object() }))
    }

    /// `{"stage","reason","message","hint"}`.
    pub fn object(&self) -> serde_json::Value {
        let whole: Vec<&str> =
            std::iter::once(&self.message).chain(&self.causes).map(String::as_str).collect();
        serde_json::json!({
            "stage": self.stage,
            "reason": self.reason,
            "message": whole.join(": "),
            "hint": self.hint,
        })
    }
}

impl From<Denial> for Failure {
    fn from(denial: Denial) -> Self {
        Self::new(
            "decide",
            denial.reason.as_str(),
            format!("{} is denied: {}", denial.asked, denial.reason),
        )
        .why(denial.message)
        .hint(denial.hint)
    }
}

/// Text whose control characters are shown and not obeyed: a path or a reason may carry an escape
/// sequence that would repaint the terminal (CVE-2003-0063 and its kin). Newlines stay.
pub fn visible(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        let is_bidi = matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        if (c.is_control() && c != '\n') || is_bidi {
            shown.extend(c.escape_default());
        } else {
            shown.push(c);
        }
    }
    shown
}

/// Colour only for a terminal, and not where <https://no-color.org> or a dumb terminal says no.
pub fn colour_on(stream: &impl IsTerminal) -> bool {
    let wanted = std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())
        && std::env::var_os("TERM").is_none_or(|t| t != "dumb");
    wanted && stream.is_terminal()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::verdict::DenyReason;

    fn denial() -> Denial {
        Denial {
            asked: "repo.push@github.com".into(),
            reason: DenyReason::AudienceNotPermitted,
            message: "profile `p` permits repo.push only for `gitlab.com`".into(),
            hint: "ask for repo.push@gitlab.com".into(),
        }
    }

    #[test]
    fn a_denial_says_what_why_and_what_to_try() {
        assert_eq!(
            Failure::from(denial()).text(false),
            "sublet: repo.push@github.com is denied: audience_not_permitted\n  \
             why: profile `p` permits repo.push only for `gitlab.com`\n  \
             try: ask for repo.push@gitlab.com\n"
        );
    }

    #[test]
    fn json_is_one_line_with_exactly_the_four_fields() {
        let text = Failure::from(denial()).json();
        assert_eq!(text.matches('\n').count(), 1);
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        let error = value["error"].as_object().unwrap();
        assert_eq!(error.keys().collect::<Vec<_>>(), ["hint", "message", "reason", "stage"]);
        assert_eq!(error["reason"], "audience_not_permitted");
        assert!(error["message"].as_str().unwrap().contains("permits repo.push only"));
    }

    #[test]
    fn control_characters_are_shown_not_obeyed() {
        #[track_caller]
        fn check(text: &str, shown: &str) {
            assert_eq!(visible(text), shown);
        }
        check("\x1b]0;owned\x07", "\\u{1b}]0;owned\\u{7}");
        check("a\rb", "a\\rb");
        check("\u{202e}txt", "\\u{202e}txt");
        check("zwei\nZeilen, größer", "zwei\nZeilen, größer");
    }

    #[test]
    fn a_cause_that_its_error_already_told_is_said_once() {
        #[derive(Debug, thiserror::Error)]
        #[error("cannot open /x: {0}")]
        struct Outer(#[source] io::Error);
        let outer = Outer(io::Error::other("no luck"));
        let failure = Failure::new("state", "x", "m").because(&outer);
        assert_eq!(failure.causes, ["cannot open /x: no luck"]);
    }

    #[test]
    fn a_reader_that_went_away_is_not_reported() {
        let broken = Failure::stdout(&io::ErrorKind::BrokenPipe.into());
        assert_eq!(broken.exit, READER_GONE);
        let full = Failure::stdout(&io::ErrorKind::StorageFull.into());
        assert_eq!(full.exit, TROUBLE);
        assert_eq!(full.beside_a_command().exit, NOT_RUN);
    }
}
