//! What one call of `sublet` gave. Every claim that fails prints the whole outcome.

use std::fmt;

use serde_json::Value;

#[derive(Debug, Clone)]
pub struct Outcome {
    pub command: String,
    /// `None` if a signal ended sublet itself.
    pub status: Option<i32>,
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    /// What `--report` wrote, if it wrote.
    pub report: Option<Value>,
}

impl Outcome {
    #[track_caller]
    pub fn ok(self) -> Self {
        self.exits(0)
    }

    #[track_caller]
    pub fn exits(self, status: i32) -> Self {
        assert_eq!(self.status, Some(status), "expected exit status {status}\n{self}");
        self
    }

    /// Exit 125 and the reason by its name: nothing ran.
    #[track_caller]
    pub fn denied(self, reason: &str) -> Self {
        let outcome = self.exits(125);
        assert!(outcome.err().contains(reason), "expected the reason `{reason}`\n{outcome}");
        outcome
    }

    /// Exit 125 with a message that names each of `words`.
    #[track_caller]
    pub fn fails_naming(self, words: &[&str]) -> Self {
        let outcome = self.exits(125);
        for word in words {
            assert!(outcome.err().contains(word), "the message must name `{word}`\n{outcome}");
        }
        outcome
    }

    /// The message holds `words`.
    #[track_caller]
    pub fn explains(self, words: &str) -> Self {
        assert!(self.err().contains(words), "expected {words:?} on stderr\n{self}");
        self
    }

    #[track_caller]
    pub fn says(self, text: &str) -> Self {
        assert!(self.out().contains(text), "expected {text:?} on stdout\n{self}");
        self
    }

    #[track_caller]
    pub fn prints(self, text: &str) -> Self {
        assert_eq!(self.out(), text, "expected exactly this on stdout\n{self}");
        self
    }

    #[track_caller]
    pub fn never_says(self, text: &str) -> Self {
        assert!(!self.out().contains(text), "{text:?} must not be on stdout\n{self}");
        assert!(!self.err().contains(text), "{text:?} must not be on stderr\n{self}");
        self
    }

    pub fn out(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    pub fn err(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// Standard output without the line's end.
    pub fn line(&self) -> String {
        self.out().trim_end().to_owned()
    }

    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.stdout)
            .unwrap_or_else(|e| panic!("stdout is not one JSON value: {e}\n{self}"))
    }

    #[track_caller]
    pub fn json_lines(&self) -> Vec<Value> {
        self.out()
            .lines()
            .map(|line| {
                serde_json::from_str(line)
                    .unwrap_or_else(|e| panic!("not a JSON line: {e}: {line}\n{self}"))
            })
            .collect()
    }

    #[track_caller]
    pub fn report(&self) -> &Value {
        self.report.as_ref().unwrap_or_else(|| panic!("no report was written\n{self}"))
    }

    /// The effect's entry under `enforced`.
    #[track_caller]
    pub fn enforced(&self, effect: &str) -> &Value {
        let entry = &self.report()["enforced"][effect];
        assert!(entry.is_object(), "the report does not speak of `{effect}`\n{self}");
        entry
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "command: {}", self.command)?;
        writeln!(f, "status:  {:?}", self.status)?;
        writeln!(f, "stdout:\n{}", self.out())?;
        writeln!(f, "stderr:\n{}", self.err())?;
        if let Some(report) = &self.report {
            writeln!(f, "report:  {report}")?;
        }
        Ok(())
    }
}
