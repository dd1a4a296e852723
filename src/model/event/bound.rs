//! What users say, bounded, so that no one can fill the disk with one event.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::ffi::OsStr;

use serde_json::Value;

/// The most bytes of one text that a user gave: a reason, an argument. More is cut, and ends in `…`.
pub const MAX_TEXT: usize = 1024;
/// The most bytes of text in one event's `detail`, keys included.
pub const MAX_DETAIL: usize = 8192;
/// The most arguments of a command that are recorded, and the most bytes of them together.
pub const MAX_ARGUMENTS: usize = 64;
pub const MAX_COMMAND: usize = 4096;

/// A command as it is recorded: at most [`MAX_ARGUMENTS`] arguments of [`MAX_TEXT`] bytes, together
/// [`MAX_COMMAND`]; bytes that are no UTF-8 are replaced; the rest is counted in a last element.
pub fn recorded_command<S: AsRef<OsStr>>(argv: &[S]) -> Vec<String> {
    let mut left = MAX_COMMAND;
    let mut recorded = Vec::new();
    for argument in argv.iter().take(MAX_ARGUMENTS) {
        let argument = bounded(&argument.as_ref().to_string_lossy(), MAX_TEXT);
        match left.checked_sub(argument.len()) {
            Some(rest) => left = rest,
            None => break,
        }
        recorded.push(argument);
    }
    if recorded.len() < argv.len() {
        recorded.push(format!("…and {} more", argv.len() - recorded.len()));
    }
    recorded
}

/// At most `max` bytes of `text`, cut between characters; what was cut ends in `…`.
pub(super) fn bounded(text: &str, max: usize) -> String {
    if text.len() <= max {
        return text.to_owned();
    }
    let end = (0..=max.saturating_sub('…'.len_utf8())).rev().find(|&i| text.is_char_boundary(i));
    format!("{}…", &text[..end.unwrap_or(0)])
}

fn bounded_value(value: Value, budget: &mut usize, depth: u8) -> Value {
    match value {
        Value::Null | Value::Bool(_) => value,
        Value::Number(ref n) if n.is_f64() => Value::String(n.to_string()),
        Value::Number(_) => value,
        Value::String(text) => {
            let text = bounded(&text, MAX_TEXT.min(*budget));
            *budget = budget.saturating_sub(text.len());
            Value::String(text)
        }
        Value::Array(_) | Value::Object(_) if depth == 0 => Value::String("…".to_owned()),
        Value::Array(elements) => {
            let total = elements.len();
            let mut kept = Vec::new();
            for element in elements {
                if *budget < 8 {
                    kept.push(Value::String(format!("…and {} more", total - kept.len())));
                    break;
                }
                *budget -= 8;
                kept.push(bounded_value(element, budget, depth - 1));
            }
            Value::Array(kept)
        }
        Value::Object(members) => {
            let sorted: BTreeMap<String, Value> = members.into_iter().collect();
            Value::Object(bounded_members(sorted, budget, depth - 1).into_iter().collect())
        }
    }
}

pub(super) fn bounded_members(
    members: BTreeMap<String, Value>,
    budget: &mut usize,
    depth: u8,
) -> BTreeMap<String, Value> {
    let mut kept = BTreeMap::new();
    for (key, value) in members {
        let cost = key.len().min(64) + 8;
        if *budget < cost {
            kept.insert("truncated".to_owned(), Value::Bool(true));
            break;
        }
        *budget -= cost;
        kept.insert(bounded(&key, 64), bounded_value(value, budget, depth));
    }
    kept
}
