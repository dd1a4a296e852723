//! What the demo tells: steps, the commands with what they printed, and the promises kept or not.
//!
//! Receives text; writes it to standard output, for people at once, with `--json` one object a step.
#![forbid(unsafe_code)]

use serde_json::json;

use super::act::COMMON;
use super::place::Place;
use crate::cli::fail::{Failure, NOT_RUN, visible};
use crate::cli::output::Output;

/// Characters of an output line that are shown.
const WIDTH: usize = 116;

pub struct Tale {
    json: bool,
    steps: usize,
    kept: usize,
    broken: usize,
}

impl Tale {
    pub fn begin(json: bool, place: &Place) -> Result<Self, Failure> {
        if !json {
            let mut output = Output::new(json);
            output.line(format_args!(
                "In {}, which is removed at the end.\n\
                 Every `sublet` below was called there, with {} before the rest.",
                place.work().display(),
                COMMON.join(" ")
            ))?;
            output.finish()?;
        }
        Ok(Self { json, steps: 0, kept: 0, broken: 0 })
    }

    pub fn step(&mut self, title: &str) -> Result<Step<'_>, Failure> {
        self.steps += 1;
        let number = self.steps;
        let json = self.json;
        let mut step =
            Step { tale: self, output: Output::new(json), number, entry: Entry::default() };
        title.clone_into(&mut step.entry.title);
        let text = format!("\n{number}. {title}");
        step.print("\x1b[1m", &text)?;
        Ok(step)
    }

    pub fn end(self) -> Result<(), Failure> {
        if self.broken > 0 {
            let message = format!("{} of the promises shown were not kept", self.broken);
            return Err(Failure::new("demo", "promise_broken", message)
                .hint("see the lines that say FAILED; sublet doctor says what this machine lacks")
                .exit(NOT_RUN));
        }
        if !self.json {
            let mut output = Output::new(false);
            output.line(format_args!("\n{} of {} promises kept.", self.kept, self.kept))?;
            output.finish()?;
        }
        Ok(())
    }
}

#[derive(Default)]
struct Entry {
    title: String,
    commands: Vec<String>,
    output: Vec<String>,
    checks: Vec<(String, bool)>,
    notes: Vec<String>,
}

pub struct Step<'a> {
    tale: &'a mut Tale,
    output: Output,
    number: usize,
    entry: Entry,
}

impl Step<'_> {
    /// A command as it was called.
    pub fn command(&mut self, text: &str) -> Result<(), Failure> {
        self.entry.commands.push(text.to_owned());
        // A line for each lease, if there is more than one, and for the command.
        let text = match text.matches(" --lease ").count() {
            0 | 1 => text.to_owned(),
            _ => text.replace(" --lease ", " \\\n--lease ").replacen(" -- ", " \\\n-- ", 1),
        };
        let text = text.replace('\n', "\n       ");
        self.print("", &format!("   $ {text}"))
    }

    /// What it printed.
    pub fn printed(&mut self, text: &str) -> Result<(), Failure> {
        for line in text.lines().filter(|line| !line.is_empty()) {
            self.entry.output.push(line.to_owned());
            let cut: String = line.chars().take(WIDTH).collect();
            let rest = if cut.len() < line.len() { "…" } else { "" };
            self.print("\x1b[2m", &format!("     {cut}{rest}"))?;
        }
        Ok(())
    }

    pub fn note(&mut self, text: &str) -> Result<(), Failure> {
        self.entry.notes.push(text.to_owned());
        self.print("", &format!("   note: {text}"))
    }

    /// One promise, and whether it was kept.
    pub fn promise(&mut self, claim: &str, is_kept: bool) -> Result<(), Failure> {
        self.entry.checks.push((claim.to_owned(), is_kept));
        *(if is_kept { &mut self.tale.kept } else { &mut self.tale.broken }) += 1;
        let (paint, word) = if is_kept { ("\x1b[32m", "ok    ") } else { ("\x1b[1;31m", "FAILED") };
        self.print(paint, &format!("   {word} {claim}"))
    }

    pub fn end(self) -> Result<(), Failure> {
        let Self { tale, mut output, number, entry } = self;
        if tale.json {
            let checks: Vec<_> = entry
                .checks
                .iter()
                .map(|(claim, kept)| json!({ "promise": claim, "kept": kept }))
                .collect();
            output.object(&json!({
                "step": number,
                "title": entry.title,
                "commands": entry.commands,
                "output": entry.output,
                "promises": checks,
                "notes": entry.notes,
            }))?;
        }
        output.finish()
    }

    fn print(&mut self, paint: &str, text: &str) -> Result<(), Failure> {
        if self.tale.json {
            return Ok(());
        }
        let (paint, off) = if self.output.colour { (paint, "\x1b[0m") } else { ("", "") };
        self.output.bytes(format!("{paint}{}{off}\n", visible(text)).as_bytes())
    }
}
