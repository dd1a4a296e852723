//! Replays the committed fuzz corpus, every input that once broke something included, through the very
//! functions that the fuzz targets call.
#![forbid(unsafe_code)]

#[path = "../fuzz/src/lib.rs"]
mod targets;

use std::fs;
use std::panic::catch_unwind;
use std::path::PathBuf;

fn corpus(target: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target)
}

#[track_caller]
fn replay(target: &str) {
    let mut inputs: Vec<PathBuf> = fs::read_dir(corpus(target))
        .unwrap_or_else(|e| panic!("fuzz/corpus/{target}: {e}"))
        .map(|entry| entry.unwrap().path())
        .collect();
    inputs.sort();
    assert!(!inputs.is_empty(), "fuzz/corpus/{target} is empty");
    for input in inputs {
        let bytes = fs::read(&input).unwrap();
        let passed = catch_unwind(|| targets::run(target, &bytes));
        assert!(passed.is_ok(), "{target} breaks on {}", input.display());
    }
}

macro_rules! replays {
    ($($target:ident)*) => {
        $(#[test]
        fn $target() {
            replay(stringify!($target));
        })*

        /// A target that is added is replayed too.
        #[test]
        fn every_target_is_replayed() {
            let named = targets::TARGETS.iter().map(|(name, _)| *name);
            // That one has a process of its own: `tests/corpus_request.rs`.
            let named: Vec<_> = named.filter(|name| *name != "request").collect();
            assert_eq!(named, [$(stringify!($target)),*]);
        }
    };
}

replays! { api client config env_file envelope frames git oci policy profile redact seccomp trail vault wire }

/// A message that no longer decodes would be replayed as noise.
#[test]
fn the_corpus_still_speaks_the_launchers_protocol() {
    use sublet::launcher::wire::{Notice, Order, decode};
    let mut seen = 0;
    for entry in fs::read_dir(corpus("wire")).unwrap() {
        let path = entry.unwrap().path();
        let bytes = fs::read(&path).unwrap();
        let name = path.file_name().unwrap().to_str().unwrap();
        let decoded = match name.split_at_checked(5) {
            Some(("order", _)) => decode::<Order>(&bytes[1..]).map(drop),
            Some(("notic", _)) => decode::<Notice>(&bytes[1..]).map(drop),
            _ => continue,
        };
        assert!(decoded.is_ok(), "{}: {decoded:?}", path.display());
        seen += 1;
    }
    assert!(seen > 10, "{seen}");
}

/// The control: a body does fail, and the failure is seen.
#[test]
#[should_panic(expected = "there is no fuzz target")]
fn what_is_no_target_fails() {
    targets::run("nothing", &[]);
}
