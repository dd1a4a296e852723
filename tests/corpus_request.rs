//! Replays the fuzz corpus of the broker's sockets. In a process of its own and without the test harness: it
//! forks a launcher, which it may only while it has no other thread.
#![forbid(unsafe_code)]

#[path = "../fuzz/src/lib.rs"]
#[allow(dead_code)]
mod targets;

use std::fs;
use std::path::Path;

const NAME: &str = "request";

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let given = |name: &str| arguments.iter().any(|argument| argument == name);
    let filter =
        arguments.iter().find(|argument| !argument.starts_with('-') && *argument != "terse");
    if given("--list") {
        // cargo nextest asks so. https://nexte.st/docs/design/custom-test-harnesses
        if !given("--ignored") {
            println!("{NAME}: test");
        }
        return;
    }
    if filter.is_none_or(|filter| NAME.contains(filter.as_str())) {
        replay();
    }
}

fn replay() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(NAME);
    let mut inputs: Vec<_> =
        fs::read_dir(corpus).unwrap().map(|entry| entry.unwrap().path()).collect();
    inputs.sort();
    assert!(!inputs.is_empty());
    for input in &inputs {
        eprintln!("{}", input.display());
        targets::run(NAME, &fs::read(input).unwrap());
    }
    println!("replayed {} inputs: ok", inputs.len());
}
