//! `just bench-guard`: how fast the guard of a container reads an image that it never saw, and looks at one
//! that it knows.
//!
//! A tree of SIZE MiB is made in a temporary directory: files of 4 KiB to 16 MiB, half of them text and half
//! random. What is measured comes from the page cache, on one core. Nothing is compared: the goal is a rate.
#![forbid(unsafe_code)]

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

use sublet::guard::{GuardKey, Scanner};
use sublet::hook::tree;

const GOAL: u64 = 300;
const ROUNDS: usize = 3;

fn main() {
    let mut numbers = std::env::args().skip(1).filter_map(|arg| arg.parse().ok());
    let mebibytes: usize = numbers.next().unwrap_or(1024);
    let dir = tempfile::Builder::new().prefix("sublet-bench-guard-").tempdir().expect("a place");
    let files = fill(dir.path(), mebibytes << 20);
    println!("an image of {mebibytes} MiB in {files} files, on one core");
    for secrets in [1, 100, 1000] {
        let scanner = scanner(secrets);
        let took = best(|| {
            let root = File::open(dir.path()).expect("the image");
            let (_, read) = tree::walk(root.as_fd(), dir.path(), Some(&scanner)).expect("read");
            assert!(read.found.is_empty());
        });
        let rate = (mebibytes as u64 * 1000) / took.as_millis().max(1) as u64;
        println!(
            "  searched for {secrets:>4} secrets: {:>6.2} s, {rate:>5} MiB/s (goal >= {GOAL})",
            took.as_secs_f64()
        );
    }
    let took = best(|| {
        let root = File::open(dir.path()).expect("the image");
        tree::walk(root.as_fd(), dir.path(), None).expect("looked at");
    });
    println!("  looked at, a layer that is known: {:>6.1} ms", took.as_secs_f64() * 1e3);
}

fn scanner(secrets: usize) -> Scanner {
    let key = GuardKey::new([5; 32]);
    let prints = (0..secrets).flat_map(|number| {
        let value = format!("ghp_{:032x}", (number as u128 + 1) * 0x9e37_79b9_7f4a_7c15);
        let name = format!("secret-{number}").parse().expect("a name");
        key.fingerprints(&name, value.as_bytes()).expect("memory")
    });
    let prints = prints.collect();
    Scanner::new(key, prints)
}

fn best(mut work: impl FnMut()) -> Duration {
    let mut best = Duration::MAX;
    for _ in 0..ROUNDS {
        let start = Instant::now();
        work();
        best = best.min(start.elapsed());
    }
    best
}

/// As an image is: many small files, most bytes in a few large ones.
fn fill(dir: &Path, size: usize) -> usize {
    let text = include_bytes!("guard.rs");
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let (mut left, mut files) = (size, 0);
    while left > 0 {
        let length = (4_096 << (random() % 13)).min(left);
        let content: Vec<u8> = match files % 2 {
            0 => text.iter().copied().cycle().take(length).collect(),
            _ => {
                (0..length.div_ceil(8)).flat_map(|_| random().to_le_bytes()).take(length).collect()
            }
        };
        let below = dir.join(format!("d{}", files % 100));
        std::fs::create_dir_all(&below).expect("a directory");
        std::fs::write(below.join(format!("f{files}")), content).expect("a file");
        left -= length;
        files += 1;
    }
    files
}
