//! The guard: whether a container's environment, annotations, labels, arguments or image files hold a
//! managed value, or set a name that is refused or reserved. Says where, never what.
#![forbid(unsafe_code)]

use std::os::fd::AsFd;
use std::path::Path;

use serde_json::Value;

use super::bundle::Bundle;
use super::layers::{self, Searched};
use super::tree::{Finding, TreeError};
use crate::guard::Scanner;
use crate::profile::names::{self, NameClass};

/// How many objections are told.
const MOST: usize = 16;

/// Why a container is not started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Objection {
    Name { place: String, why: &'static str },
    Value(Finding),
}

/// All that speaks against a container, and what was searched for that.
pub fn objections(
    bundle: &Bundle,
    scanner: &Scanner,
    runtime_dir: &Path,
) -> Result<(Vec<Objection>, Searched), TreeError> {
    let mut found = in_config(bundle, scanner);
    if !scanner.has_windows() {
        return Ok((found, Searched::default()));
    }
    let mut searched = layers::search(bundle.root.as_fd(), &bundle.rootfs, scanner, runtime_dir)?;
    found.extend(std::mem::take(&mut searched.found).into_iter().map(Objection::Value));
    found.truncate(MOST);
    Ok((found, searched))
}

fn in_config(bundle: &Bundle, scanner: &Scanner) -> Vec<Objection> {
    let mut found = Vec::new();
    for variable in &bundle.env {
        let (name, value) = variable.split_once('=').unwrap_or((variable, ""));
        let shown = if scanner.find(name.as_bytes()).is_none() { name } else { "(its name)" };
        let place = format!("process.env {}", shortened(shown));
        refuse_name(&mut found, &place, name);
        hit(name, "process.env (the name of a variable)", scanner, &mut found);
        if let Some(hit) = scanner.find_in_word(value.as_bytes()) {
            let print = hit.print;
            let (secret, form) = (print.secret.clone(), print.form);
            found.push(Objection::Value(Finding { place, secret, form }));
        }
    }
    for key in bundle.annotations.keys() {
        if scanner.find(key.as_bytes()).is_none() {
            refuse_name(&mut found, &format!("annotations {}", shortened(key)), key);
        }
    }
    if let Some(labels) = bundle.whole.get("labels").and_then(Value::as_object) {
        for key in labels.keys().filter(|key| scanner.find(key.as_bytes()).is_none()) {
            refuse_name(&mut found, &format!("labels {}", shortened(key)), key);
        }
    }
    search(&bundle.whole, &mut String::new(), scanner, &mut found);
    found.truncate(MOST);
    found
}

fn refuse_name(found: &mut Vec<Objection>, place: &str, name: &str) {
    let class = names::class(name);
    let refused = match class {
        NameClass::Reserved | NameClass::Refused | NameClass::OnlyByLease => true,
        // A container's own business: its loader, its home, its git.
        NameClass::Free | NameClass::Loader | NameClass::OfProfile | NameClass::Git => false,
    };
    if let (true, Some(why)) = (refused, names::why(class)) {
        found.push(Objection::Name { place: place.to_owned(), why });
    }
}

/// Every string of the configuration, keys included. The environment was looked at by name.
fn search(value: &Value, at: &mut String, scanner: &Scanner, found: &mut Vec<Objection>) {
    if found.len() >= MOST || at == "process.env" {
        return;
    }
    let length = at.len();
    match value {
        Value::String(text) => hit(text, at, scanner, found),
        Value::Array(items) => {
            for (number, item) in items.iter().enumerate() {
                at.push_str(&format!("[{number}]"));
                search(item, at, scanner, found);
                at.truncate(length);
            }
        }
        Value::Object(members) => {
            for (key, member) in members {
                let before = found.len();
                hit(key, at, scanner, found);
                if found.len() == before {
                    let separator = match (at.as_str(), key.contains('.')) {
                        ("", _) => "",
                        (_, true) => " ",
                        (_, false) => ".",
                    };
                    at.push_str(separator);
                    at.push_str(&shortened(key));
                    search(member, at, scanner, found);
                    at.truncate(length);
                }
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

fn hit(text: &str, at: &str, scanner: &Scanner, found: &mut Vec<Objection>) {
    if let Some(hit) = scanner.find(text.as_bytes()) {
        let place = if at.is_empty() { "a key of config.json" } else { at }.to_owned();
        let (secret, form) = (hit.print.secret.clone(), hit.print.form);
        found.push(Objection::Value(Finding { place, secret, form }));
    }
}

fn shortened(text: &str) -> String {
    match text.char_indices().nth(120) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text.to_owned(),
    }
}

impl std::fmt::Display for Objection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Objection::Name { place, why } => write!(f, "{place} {why}"),
            Objection::Value(Finding { place, secret, form }) => match form.as_str() {
                "plain" => write!(f, "{place} holds the managed secret `{secret}`"),
                form => write!(f, "{place} holds the managed secret `{secret}`, in {form}"),
            },
        }
    }
}
