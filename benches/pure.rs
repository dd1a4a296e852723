//! What the pure rooms cost: one decision, and a megabyte of output through the redactor. `just bench`
//! prints this after the side-by-side table.
#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::hint::black_box;
use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, Instant};

use sublet::config::HostConfig;
use sublet::model::id::RequestId;
use sublet::model::run::{Counters, Run, RunState};
use sublet::policy::{LeaseFlag, Policy, ResolvedCommand, decide};
use sublet::profile::{load_builtin, resolve};
use sublet::redact::{Patterns, Redactor};

const CONFIG: &str = "[principals.alice]\npermissions = [\"repo:write\"]\n\
     [secrets.github-bot]\nsource = \"vault\"\nallow = [\"repo.push@github.com\"]\n";

fn main() {
    println!("decide, `repo.push@github.com` of git-push: {} ns (goal <= 5000)", decision());
    let value = b"ghp_0123456789abcdefghijklmnopqrstuvwxyz";
    for (what, text) in [
        ("source code", source_code()),
        ("random bytes", random_bytes()),
        ("a log full of the value's beginning", near_misses(value)),
    ] {
        println!("redaction of {what}: {} MB/s", redaction(value, &text));
    }
}

/// Nanoseconds, the best of ten rounds: what is slower is the machine's doing.
fn decision() -> u128 {
    let config = HostConfig::parse(CONFIG, "bench").expect("a configuration");
    let profile =
        resolve("bench", "extends = \"git-push\"\n", &mut load_builtin).expect("built in");
    let run = Run {
        run_id: "bench".parse().expect("an id"),
        agent: "bench".parse().expect("a name"),
        principal: "alice".parse().expect("a name"),
        permissions: config.permissions_of(&"alice".parse().expect("a name")).to_vec(),
        profile: "git-push".into(),
        workspace: "/w".into(),
        state: RunState::Active,
        started_at: jiff::Timestamp::UNIX_EPOCH,
    };
    let flag: LeaseFlag = "repo.push@github.com".parse().expect("a lease");
    let request = flag.into_request(RequestId::fresh(), run.run_id.clone(), None);
    let argv = ["git", "push", "origin"].map(OsString::from);
    let command = ResolvedCommand {
        argv: &argv,
        program: Path::new("/usr/bin/git"),
        found_on_path: true,
        writable_by_exec: false,
    };
    let policy = Policy { profile: &profile, config: &config, has_issuer: false };
    let rounds = 2_000;
    let once = || {
        let verdict =
            decide(policy, black_box(&request), &run, Counters::default(), Some(&command));
        black_box(verdict.into_result().expect("granted"));
    };
    best_of_ten(|| (0..rounds).for_each(|_| once())).as_nanos() / rounds
}

fn redaction(value: &[u8], text: &[u8]) -> u128 {
    let patterns = Rc::new(Patterns::new([value]).expect("memory for the patterns"));
    let took = best_of_ten(|| {
        let mut redactor = Redactor::new(Rc::clone(&patterns)).expect("memory for the window");
        let mut out = Vec::with_capacity(text.len());
        for chunk in text.chunks(64 << 10) {
            redactor.push(chunk, &mut out);
        }
        redactor.flush(&mut out);
        black_box(out);
    });
    text.len() as u128 * 1_000 / took.as_nanos().max(1)
}

fn best_of_ten(mut work: impl FnMut()) -> Duration {
    let mut best = Duration::MAX;
    for _ in 0..10 {
        let start = Instant::now();
        work();
        best = best.min(start.elapsed());
    }
    best
}

const SIZE: usize = 8 << 20;

fn source_code() -> Vec<u8> {
    include_bytes!("pure.rs").iter().copied().cycle().take(SIZE).collect()
}

fn random_bytes() -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        // xorshift64: no better randomness is needed.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..SIZE).map(|_| next()).collect()
}

fn near_misses(value: &[u8]) -> Vec<u8> {
    let line = [&value[..value.len() - 1], b"!\n"].concat();
    line.into_iter().cycle().take(SIZE).collect()
}
