//! What is said to the host, line by line.

use std::io::{BufRead, Write};

#[derive(Default)]
pub struct Line {
    said: usize,
}

impl Line {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn check(&mut self, ok: bool, name: &str) {
        self.said += 1;
        let word = if ok { "ok" } else { "not ok" };
        self.print(&format!("{word} {} - {}", self.said, one_line(name)));
    }

    /// A check, and if it failed what there is to say about it.
    pub fn check_with(&mut self, ok: bool, name: &str, why: &str) {
        if !ok {
            self.comment(why);
        }
        self.check(ok, name);
    }

    pub fn fact(&mut self, name: &str, value: &str) {
        self.print(&format!("# fact {name}={}", one_line(value)));
    }

    pub fn comment(&mut self, text: &str) {
        for line in text.lines() {
            self.print(&format!("# {line}"));
        }
    }

    /// Has the host do something, and waits until it has.
    pub fn ask(&mut self, words: &str) -> String {
        self.print(&format!("# ask {words}"));
        let mut answer = String::new();
        // An end of the line is the end of the machine.
        if std::io::stdin().lock().read_line(&mut answer).unwrap_or(0) == 0 {
            std::process::exit(1);
        }
        answer.trim().to_owned()
    }

    pub fn end(&mut self) {
        self.print(&format!("1..{}", self.said));
    }

    fn print(&mut self, line: &str) {
        let mut out = std::io::stdout().lock();
        // Without a line there is no one to tell.
        if writeln!(out, "{line}").and_then(|()| out.flush()).is_err() {
            std::process::exit(1);
        }
    }
}

fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}
