//! What a filter costs: to install (once an exec) and on each call. Prints a table; compares with the
//! same lists installed as `seccompiler` makes them.
//!
//! Each measurement runs in a forked child, since a filter cannot be taken off again.

use std::time::Instant;

use sublet::sandbox::seccomp::{self, Filter};
use sublet::sys::seccomp::install;

const ROUNDS: usize = 300;
const CALLS: u32 = 200_000;
const LAST: &str = "the allowing lists";

fn main() {
    println!(
        "{:<34}{:>7}{:>12}{:>9}{:>13}{:>13}{:>13}",
        "filter", "insns", "install p50", "p99", "getppid", "ioctl", "open+close"
    );
    println!("{:<34}{:>7}{:>12}{:>9}{:>13}{:>13}{:>13}", "", "", "µs", "µs", "ns", "ns", "ns");
    row("none", &[]);
    for name in ["default", "build", "strict"] {
        let filter = seccomp::builtin(name).expect("built in");
        row(name, std::slice::from_ref(&filter.as_slice().to_vec()));
        let stack = as_seccompiler_makes_them(name);
        row(&format!("{name}, seccompiler's {} lists", stack.len()), &stack);
    }
    let init = seccomp::builtin("init").expect("built in");
    row("init", std::slice::from_ref(&init.as_slice().to_vec()));
    println!("(init refuses ioctl and open: its columns show what a refusal costs)");
    println!(
        "\ncompile(default.json) at run time: {} µs",
        median((0..20).map(|_| time(|| drop(compiled()))).collect()) / 1000
    );
}

fn compiled() -> Filter {
    seccomp::compile(seccomp::builtin_text("default").expect("built in")).expect("compiles")
}

/// Each list a program of its own, but the allowing ones, which must be one to be meaningful. That one
/// comes last: strict's does not allow seccomp(2) itself.
fn as_seccompiler_makes_them(name: &str) -> Vec<Vec<libc::sock_filter>> {
    let text = seccomp::builtin_text(name).expect("built in");
    let lists: serde_json::Map<String, serde_json::Value> =
        serde_json::from_str(text).expect("JSON");
    let mut merged = serde_json::Map::new();
    let mut allowing = Vec::new();
    for (name, list) in &lists {
        if list["match_action"] == "allow" {
            allowing.extend(list["filter"].as_array().expect("rules").iter().cloned());
        } else {
            merged.insert(name.clone(), list.clone());
        }
    }
    merged.insert(
        LAST.to_owned(),
        serde_json::json!({"mismatch_action": {"errno": 38}, "match_action": "allow", "filter": allowing}),
    );
    let text = serde_json::Value::from(merged).to_string();
    let mut programs =
        seccompiler::compile_from_json(text.as_bytes(), seccompiler::TargetArch::x86_64)
            .expect("compiles");
    let last = programs.remove(LAST);
    programs
        .into_values()
        .chain(last)
        .map(|program| {
            let raw = |i: &seccompiler::sock_filter| libc::sock_filter {
                code: i.code,
                jt: i.jt,
                jf: i.jf,
                k: i.k,
            };
            program.iter().map(raw).collect()
        })
        .collect()
}

fn row(label: &str, stack: &[Vec<libc::sock_filter>]) {
    let mut installs: Vec<u64> = (0..ROUNDS).map(|_| in_child(|| time(|| apply(stack)))).collect();
    installs.sort_unstable();
    let per_call = |call: fn()| {
        median(
            (0..5)
                .map(|_| {
                    in_child(|| {
                        apply(stack);
                        // Tenths of nanoseconds.
                        let start = Instant::now();
                        (0..CALLS).for_each(|_| call());
                        start.elapsed().as_nanos() as u64 * 10 / u64::from(CALLS)
                    })
                })
                .collect(),
        ) as f64
            / 10.0
    };
    println!(
        "{label:<34}{:>7}{:>12}{:>9}{:>13.1}{:>13.1}{:>13.1}",
        stack.iter().map(Vec::len).sum::<usize>(),
        installs[ROUNDS / 2] / 1000,
        installs[ROUNDS * 99 / 100] / 1000,
        per_call(getppid),
        per_call(ioctl),
        per_call(open_close),
    );
}

fn apply(stack: &[Vec<libc::sock_filter>]) {
    rustix::thread::set_no_new_privs(true).expect("no_new_privs");
    for program in stack {
        install(program).expect("install");
    }
}

fn getppid() {
    // SAFETY: getppid(2) has no arguments and cannot fail.
    unsafe { libc::syscall(libc::SYS_getppid) };
}

fn ioctl() {
    // SAFETY: descriptor -1 is never open, so the call fails with EBADF and touches nothing.
    unsafe { libc::syscall(libc::SYS_ioctl, -1, libc::FIONREAD, 0) };
}

fn open_close() {
    // SAFETY: the path is a C string; the descriptor is closed at once and used by nothing else.
    unsafe {
        let fd = libc::open(c"/dev/null".as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC);
        libc::close(fd);
    }
}

fn time(work: impl FnOnce()) -> u64 {
    let start = Instant::now();
    work();
    start.elapsed().as_nanos() as u64
}

fn median(mut of: Vec<u64>) -> u64 {
    of.sort_unstable();
    of[of.len() / 2]
}

/// Runs `measure` in a forked child and returns its number.
fn in_child(measure: impl FnOnce() -> u64) -> u64 {
    let (read, write) = rustix::pipe::pipe().expect("pipe");
    // SAFETY: this program has one thread, so the child may do all that its parent could.
    match unsafe { libc::fork() } {
        0 => {
            let number = measure();
            rustix::io::write(&write, &number.to_ne_bytes()).expect("write");
            // SAFETY: _exit(2) ends the child without running its parent's exit handlers.
            unsafe { libc::_exit(0) }
        }
        child => {
            assert!(child > 0, "fork");
            // Else a child that dies without an answer would never be noticed.
            drop(write);
            let mut number = [0; 8];
            let got = rustix::io::read(&read, &mut number).expect("read");
            assert_eq!(got, 8);
            // SAFETY: reaps the child made above; no status is asked for.
            unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) };
            u64::from_ne_bytes(number)
        }
    }
}
