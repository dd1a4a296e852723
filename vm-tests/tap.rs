//! What a guest says on its line: TAP (`ok 1 - name`, `not ok …`, `1..N`), and in comments what it found
//! and what it wants the host to do.

/// One line, understood.
#[derive(Debug, PartialEq, Eq)]
pub enum Said {
    Check {
        ok: bool,
        name: String,
    },
    /// `# fact NAME=VALUE`
    Fact(String, String),
    /// `# ask WORD…`: it waits until the host has done it.
    Ask(Vec<String>),
    /// `1..N`: it has said all.
    Plan(usize),
    Comment(String),
    /// Not of the protocol.
    Noise(String),
}

pub fn parse(line: &str) -> Said {
    let line = line.trim_end();
    if let Some(comment) = line.strip_prefix("# ") {
        if let Some((name, value)) = comment.strip_prefix("fact ").and_then(|f| f.split_once('=')) {
            return Said::Fact(name.to_owned(), value.to_owned());
        }
        if let Some(words) = comment.strip_prefix("ask ") {
            return Said::Ask(words.split(' ').map(str::to_owned).collect());
        }
        return Said::Comment(comment.to_owned());
    }
    if let Some(count) = line.strip_prefix("1..").and_then(|n| n.parse().ok()) {
        return Said::Plan(count);
    }
    let (ok, rest) = match line.strip_prefix("not ok ") {
        Some(rest) => (false, rest),
        None => match line.strip_prefix("ok ") {
            Some(rest) => (true, rest),
            None => return Said::Noise(line.to_owned()),
        },
    };
    match rest.split_once(" - ") {
        Some((number, name)) if number.parse::<u32>().is_ok() => {
            Said::Check { ok, name: name.to_owned() }
        }
        _ => Said::Noise(line.to_owned()),
    }
}
