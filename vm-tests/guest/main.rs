//! Runs inside a machine of `vm-tests`, as root, with the host on the other end of its standard streams:
//! does the one job that the kernel's command line names, and says in TAP what came of it.
//!
//! Nothing but std, and linked statically. A check is said once it was really tried; what a check rests
//! on and cannot be had is a failed check of its own.
#![forbid(unsafe_code)]

mod faults;
mod isolation;
mod residue;
mod say;
mod server;
mod tools;
mod variants;

use say::Line;

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let called = match words.first().map(String::as_str) {
        Some("hold") => Some(residue::hold(&words[1..])),
        Some("core") => Some(variants::core(words.get(1).map_or("", String::as_str))),
        Some("keep") => Some(variants::keep(words.get(1).map_or("", String::as_str))),
        Some("press") => Some(variants::press(words.get(1).map_or("", String::as_str))),
        Some("reveal") => Some(residue::reveal(words.get(1).map_or("", String::as_str))),
        _ => None,
    };
    if let Some(done) = called {
        if let Err(why) = done {
            eprintln!("{why}");
            std::process::exit(1);
        }
        return;
    }
    let mut line = Line::new();
    let told = std::fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let job = told
        .split_whitespace()
        .find_map(|w| w.strip_prefix("vm.job="))
        .unwrap_or("none")
        .to_owned();
    line.fact("kernel", tools::read("/proc/sys/kernel/osrelease").trim());
    line.fact("lsm", tools::read("/sys/kernel/security/lsm").trim());
    let (name, words) = job.split_once(':').unwrap_or((&job, ""));
    let words: Vec<&str> = words.split(',').filter(|w| !w.is_empty()).collect();
    match name {
        "isolation" => isolation::run(&mut line, &words),
        "variant" => variants::run(&mut line, &words),
        "residue" => residue::run(&mut line, &words),
        "faults" => faults::run(&mut line, &words),
        "program" => isolation::program(&mut line),
        unknown => line.check(false, &format!("there is a job `{unknown}`")),
    }
    line.end();
}
