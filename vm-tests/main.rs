//! Real kernels: boots each under QEMU with a static `sublet`, and reads what was tried there from the
//! serial line. `just vm` and `.ci/run` call it; the ordinary `cargo test` does not.
//!
//! - [`options`]: the command line
//! - [`workshop`]: everything that is made before a machine boots: [`kernel`], [`debian`], [`disk`], [`cpio`]
//! - [`machine`]: one QEMU, its serial line, its memory; [`tap`]: what comes over the line
//! - [`job`]: what is booted for, and how it is judged: [`isolation`], [`variants`], [`residue`], [`faults`]
//! - [`report`], which writes `docs/kernels.md`
//! - `guest/`: the program that runs inside
#![forbid(unsafe_code)]

mod cpio;
mod debian;
mod disk;
mod faults;
mod isolation;
mod job;
mod kernel;
mod machine;
mod options;
mod report;
mod residue;
mod search;
mod tap;
mod variants;
mod workshop;
mod writes;

use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use job::{Job, Outcome};
use options::Options;
use workshop::Workshop;

/// What could not be done, on what, and why.
pub type Result<T> = std::result::Result<T, String>;

fn main() -> ExitCode {
    let options = match Options::parse(std::env::args().skip(1)) {
        Ok(options) => options,
        Err(why) => {
            eprintln!("vm: {why}\n\n{}", options::USAGE);
            return ExitCode::from(2);
        }
    };
    let start = Instant::now();
    match tell(&options) {
        Ok(failed) => {
            println!("vm: {} s in all", start.elapsed().as_secs());
            if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(why) => {
            eprintln!("vm: {why}");
            ExitCode::FAILURE
        }
    }
}

fn tell(options: &Options) -> Result<usize> {
    let jobs_of = |kernels: &[kernel::Kernel]| -> Vec<Job> {
        job::all(kernels, options).into_iter().filter(|j| options.wants(&j.name)).collect()
    };
    if options.list {
        for job in jobs_of(&kernel::named()) {
            println!("{}: test", job.name);
        }
        return Ok(0);
    }
    let isolated = jobs_of(&kernel::named()).iter().any(|job| job.name.ends_with("/isolation"));
    let workshop = Workshop::open(options, isolated)?;
    let jobs = jobs_of(&workshop.kernels);
    let outcomes = run_all(&workshop, &jobs, options.jobs);
    let failed = tally(&outcomes)?;
    if let Some(path) = &options.report {
        // Of suites that this run left out, their last, too.
        let kept = |o: Outcome| Outcome::kept(&workshop, &o.job).unwrap_or(o);
        let mut all: Vec<Outcome> = outcomes.into_iter().map(kept).collect();
        for job in job::all(&workshop.kernels, options) {
            if !all.iter().any(|o| o.job == job.name) {
                all.extend(Outcome::kept(&workshop, &job.name));
            }
        }
        report::write(path, &workshop, &all)?;
        println!("vm: wrote {}", path.display());
    }
    Ok(failed)
}

/// As many machines at once as asked for; each job's lines are printed together.
fn run_all(workshop: &Workshop, jobs: &[Job], at_once: usize) -> Vec<Outcome> {
    let next = AtomicUsize::new(0);
    let done = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..at_once.min(jobs.len()) {
            scope.spawn(|| {
                while let Some(job) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let outcome = job.run(workshop);
                    let mut done = done.lock().expect("a job's thread panicked");
                    outcome.print();
                    if let Err(why) = outcome.keep(workshop) {
                        println!("vm: the result is not kept: {why}");
                    }
                    done.push((job.place, outcome));
                }
            });
        }
    });
    let mut done = done.into_inner().expect("a job's thread panicked");
    done.sort_by_key(|(place, _)| *place);
    done.into_iter().map(|(_, outcome)| outcome).collect()
}

/// The summary in the words of the ordinary harness. Nothing tried is nothing proven.
fn tally(outcomes: &[Outcome]) -> Result<usize> {
    let checks = || outcomes.iter().flat_map(|o| &o.checks);
    let failed: Vec<String> =
        checks().filter(|c| !c.ok).map(|c| format!("    {}\n", c.name)).collect();
    let passed = checks().count() - failed.len();
    if passed + failed.len() == 0 {
        return Err("no check was made: is there a job of that name? (--list)".to_owned());
    }
    if !failed.is_empty() {
        println!("\nfailures:\n{}", failed.concat());
    }
    let word = if failed.is_empty() { "ok" } else { "FAILED" };
    println!(
        "\ntest result: {word}. {passed} passed; {} failed; 0 ignored; 0 measured; 0 filtered out",
        failed.len()
    );
    Ok(failed.len())
}
