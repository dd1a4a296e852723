//! Standard output: text for people, or JSON lines. A reader that goes away ends the command quietly.
#![forbid(unsafe_code)]

use std::fmt::Display;
use std::io::{self, BufWriter, StdoutLock, Write};

use serde::Serialize;

use super::fail::{Failure, colour_on, visible};

/// What a command prints its answer to. Nothing is lost on an early end: [`Output::finish`] flushes, and
/// a command that does not reach it has failed anyway.
pub struct Output {
    pub json: bool,
    pub colour: bool,
    stream: BufWriter<StdoutLock<'static>>,
}

impl Output {
    pub fn new(json: bool) -> Self {
        let stdout = io::stdout();
        Self { json, colour: colour_on(&stdout), stream: BufWriter::new(stdout.lock()) }
    }

    /// One line. Control characters in it are shown, not obeyed.
    pub fn line(&mut self, text: impl Display) -> Result<(), Failure> {
        let shown = visible(&text.to_string());
        writeln!(self.stream, "{shown}").map_err(|e| Failure::stdout(&e))
    }

    /// One object on one line.
    pub fn object(&mut self, value: &impl Serialize) -> Result<(), Failure> {
        let mut text = serde_json::to_vec(value).map_err(|e| Failure::stdout(&e.into()))?;
        text.push(b'\n');
        self.bytes(&text)
    }

    /// Bytes of our own making, as they are.
    pub fn bytes(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        self.stream.write_all(bytes).map_err(|e| Failure::stdout(&e))
    }

    /// Rows under their headings, in columns as wide as they need; the last one is not padded.
    pub fn table(&mut self, headings: &[&str], rows: &[Vec<String>]) -> Result<(), Failure> {
        let rows: Vec<Vec<String>> =
            std::iter::once(headings.iter().map(ToString::to_string).collect())
                .chain(rows.iter().map(|row| row.iter().map(|cell| one_line(cell)).collect()))
                .collect();
        let width = |column: usize| {
            rows.iter()
                .filter_map(|row| row.get(column))
                .map(|c| c.chars().count())
                .max()
                .unwrap_or(0)
        };
        let widths: Vec<usize> = (0..headings.len()).map(width).collect();
        for row in &rows {
            let cells: Vec<String> =
                row.iter().zip(&widths).map(|(cell, &width)| format!("{cell:width$}")).collect();
            self.bytes(cells.join("  ").trim_end().as_bytes())?;
            self.bytes(b"\n")?;
        }
        Ok(())
    }

    /// Hands over what is buffered.
    pub fn finish(mut self) -> Result<(), Failure> {
        self.stream.flush().map_err(|e| Failure::stdout(&e))
    }
}

/// A cell is one line, whatever a profile's description says.
fn one_line(text: &str) -> String {
    visible(&text.replace('\n', " "))
}
