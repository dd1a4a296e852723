//! The house's order, held: imports go down only, and `unsafe` lives in `src/sys/` alone.
#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// The floors of the house, top first. A room may use what lies on lower floors, and its own room.
/// Rooms on one floor do not know each other.
const FLOORS: [&[&str]; 14] = [
    &["main", "cli", "hook", "mcp"],
    &["api"],
    &["broker", "demo", "doctor", "minter"],
    &["run"],
    &["launcher"],
    &["source", "delivery", "sandbox", "store", "audit", "identity", "relay"],
    &["host"],
    &["lease", "envelope"],
    &["policy"],
    &["profile"],
    &["config"],
    &["redact", "guard"],
    &["model"],
    &["sys"],
];

fn sources() -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut dirs = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("src")];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).unwrap().flatten() {
            let path = entry.path();
            if path.is_dir() {
                dirs.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

/// `src/policy/decide.rs` → `policy`.
fn room(path: &Path) -> String {
    let inside = path.strip_prefix(Path::new(env!("CARGO_MANIFEST_DIR")).join("src")).unwrap();
    let first = inside.components().next().unwrap().as_os_str().to_str().unwrap();
    first.trim_end_matches(".rs").to_owned()
}

/// Files of tests may look around.
fn is_test(path: &Path) -> bool {
    let inside = path.strip_prefix(Path::new(env!("CARGO_MANIFEST_DIR")).join("src")).unwrap();
    inside.components().any(|c| {
        let name = c.as_os_str().to_str().unwrap_or_default().trim_end_matches(".rs");
        name == "tests" || name.ends_with("_tests")
    })
}

fn floor(room: &str) -> Option<usize> {
    FLOORS.iter().position(|rooms| rooms.contains(&room))
}

/// The code without comments and without what stands under `#[cfg(test)]` at the end: tests may look
/// around.
fn code(text: &str) -> String {
    let text = text.split("#[cfg(test)]").next().unwrap_or(text);
    text.lines().map(|line| line.split("//").next().unwrap_or(line)).collect::<Vec<_>>().join("\n")
}

/// The rooms that a file names through `crate::` (in the library) or `sublet::` (in the binary).
fn uses(code: &str) -> BTreeSet<String> {
    let mut rooms = BTreeSet::new();
    for marker in ["crate::", "sublet::"] {
        for (at, _) in code.match_indices(marker) {
            let before = code[..at].chars().next_back();
            if before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == '$' || c == ':') {
                continue;
            }
            let rest = &code[at + marker.len()..];
            if let Some(list) = rest.strip_prefix('{') {
                let list = list.split('}').next().unwrap();
                for item in list.split(',') {
                    let name: String = item.trim().chars().take_while(|c| is_word(*c)).collect();
                    rooms.insert(name);
                }
            } else {
                rooms.insert(rest.chars().take_while(|c| is_word(*c)).collect());
            }
        }
    }
    rooms.remove("");
    rooms
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

#[test]
fn imports_go_down_only() {
    let mut wrong = Vec::new();
    for path in sources().into_iter().filter(|p| !is_test(p)) {
        let from = room(&path);
        if from == "lib" {
            continue;
        }
        let Some(own) = floor(&from) else {
            wrong.push(format!("{}: the room `{from}` is on no floor", path.display()));
            continue;
        };
        for to in uses(&code(&fs::read_to_string(&path).unwrap())) {
            if to == from {
                continue;
            }
            match floor(&to) {
                Some(other) if other > own => {}
                // The edges share the binary's own modules.
                Some(0) if own == 0 => {}
                Some(_) => wrong.push(format!("{}: `{from}` uses `{to}`", path.display())),
                // A macro or a re-export at the root of the crate.
                None => wrong.push(format!("{}: `{to}` is on no floor", path.display())),
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_rule_itself_sees_a_wrong_import() {
    let found = uses(&code(
        "use crate::{model::id, run};\nlet x = crate::sys::clock::now(); // crate::cli",
    ));
    assert_eq!(found.into_iter().collect::<Vec<_>>(), ["model", "run", "sys"]);
    assert!(floor("cli") < floor("run") && floor("policy") < floor("sys"));
    assert_eq!(floor("store"), floor("delivery"));
}

#[test]
fn unsafe_lives_in_sys_alone() {
    let mut wrong = Vec::new();
    for path in sources() {
        let text = fs::read_to_string(&path).unwrap();
        let in_sys = room(&path) == "sys";
        let is_root = room(&path) == "lib";
        if in_sys {
            for (number, line) in text.lines().enumerate() {
                if line.contains("unsafe {") && !justified(&text, number) {
                    wrong.push(format!("{}:{}: unsafe without SAFETY", path.display(), number + 1));
                }
            }
        } else if !is_root && !is_forbidden(&path) {
            wrong.push(format!("{}: does not forbid unsafe code", path.display()));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// The lint's level reaches a module's children: the file says it, or one of the modules above does.
fn is_forbidden(path: &Path) -> bool {
    let says = |file: &Path| {
        fs::read_to_string(file).is_ok_and(|text| text.contains("#![forbid(unsafe_code)]"))
    };
    let above = path.ancestors().skip(1).take_while(|dir| !dir.ends_with("src"));
    says(path)
        || above.into_iter().any(|dir| says(&dir.join("mod.rs")) || says(&dir.with_extension("rs")))
}

/// A SAFETY line within the ten lines above, or on the line.
fn justified(text: &str, number: usize) -> bool {
    text.lines().skip(number.saturating_sub(10)).take(11).any(|line| line.contains("SAFETY"))
}

#[test]
fn tokio_stays_out_of_the_one_shot_path() {
    for path in sources() {
        let from = room(&path);
        let is_service = path.ends_with("cli/serve.rs");
        if is_service || ["api", "broker", "mcp", "hook", "minter"].contains(&from.as_str()) {
            continue;
        }
        let text = code(&fs::read_to_string(&path).unwrap());
        assert!(!text.contains("tokio::"), "{} uses tokio", path.display());
    }
}
