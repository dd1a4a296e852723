//! The integration tests, one program after the other, with libtest's words turned into TAP.

use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::time::Instant;

use super::say::Line;
use super::tools;

/// `/vm/suites` has a line for each: name, program, and the tests to leave out.
pub fn run(line: &mut Line, only: &[&str]) {
    let doctor = tools::run(Command::new("/vm/sublet").arg("doctor"));
    for text in doctor.out.lines() {
        line.comment(&format!("doctor {text}"));
    }
    let abi = landlock_abi(&doctor.out);
    line.fact("landlock", &abi.to_string());
    for suite in tools::read("/vm/suites").lines() {
        let mut words = suite.split(' ');
        let (Some(name), Some(program)) = (words.next(), words.next()) else { continue };
        if only.is_empty() || only.contains(&name) {
            let skipped: Vec<&str> = words
                .filter_map(|word| match word.split_once('<') {
                    Some((test, least)) => (abi < least.parse().unwrap_or(0)).then_some(test),
                    None => Some(word),
                })
                .collect();
            for test in &skipped {
                line.fact(&format!("left_out.{name}::{test}"), "yes");
            }
            one(line, name, program, &skipped);
        }
    }
}

/// As the doctor says it: `Landlock ABI 6`.
pub fn landlock_abi(doctor: &str) -> u32 {
    let after = doctor.split("Landlock ABI ").nth(1).unwrap_or_default();
    after.chars().take_while(char::is_ascii_digit).collect::<String>().parse().unwrap_or(0)
}

fn one(line: &mut Line, name: &str, program: &str, skipped: &[&str]) {
    let start = Instant::now();
    let mut command = Command::new(program);
    command.arg("--test-threads=2");
    for test in skipped {
        command.args(["--skip", test]);
    }
    command.env("RUST_BACKTRACE", "0").stdin(Stdio::null()).stdout(Stdio::piped());
    // The harness shows a failed test's words after all tests, on the same stream; one without a harness
    // writes to the other.
    let aside = format!("/run/said-{name}");
    match std::fs::File::create(&aside) {
        Ok(file) => command.stderr(file),
        Err(e) => {
            return line.check_with(false, &format!("{name}: starts"), &format!("{aside}: {e}"));
        }
    };
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(e) => {
            return line.check_with(false, &format!("{name}: starts"), &format!("{program}: {e}"));
        }
    };
    let (mut tried, mut failed, mut summary) = (0, 0, false);
    let mut words = Vec::new();
    let mut judge = |line: &mut Line, test: &str, ok: bool| {
        tried += 1;
        failed += u32::from(!ok);
        line.check(ok, &format!("{name}::{test}"));
    };
    // One without a harness may say only that it begins: it has passed when the next begins.
    let mut begun: Option<String> = None;
    let stdout = child.stdout.take().into_iter();
    for text in stdout.flat_map(|out| BufReader::new(out).lines()).map_while(Result::ok) {
        let ends = text.starts_with("test result: ");
        summary |= ends;
        if let (true, Some(test)) = (ends || text.starts_with("test "), begun.take()) {
            judge(line, &test, true);
        }
        match judged(&text) {
            Some((test, Some(ok))) => judge(line, test, ok),
            Some((test, None)) => begun = Some(test.to_owned()),
            None => words.push(text),
        }
    }
    if let Some(test) = begun {
        judge(line, &test, false);
    }
    let status = child.wait();
    let ended = match &status {
        Ok(status) => {
            status.code().map_or(format!("signal {:?}", status.signal()), |c| format!("status {c}"))
        }
        Err(e) => e.to_string(),
    };
    let passed = status.is_ok_and(|s| s.success());
    if !passed {
        let said = tools::read(&aside);
        let said: Vec<&str> = said.lines().collect();
        let last = said.len().saturating_sub(100);
        for text in words.iter().take(400).map(String::as_str).chain(said[last..].iter().copied()) {
            line.comment(text);
        }
    }
    // What did not come to its end tried less than it says.
    let whole = tried > 0 && passed == (failed == 0) && (summary || passed);
    line.check_with(whole, &format!("{name}: came to its end"), &format!("{tried} tried, {ended}"));
    line.fact(&format!("seconds.{name}"), &start.elapsed().as_secs().to_string());
}

/// `test NAME ... ok`, `FAILED`, or nothing yet; what is ignored was not tried, and is left out.
fn judged(text: &str) -> Option<(&str, Option<bool>)> {
    let (test, verdict) = text.strip_prefix("test ")?.split_once(" ...")?;
    match verdict.trim() {
        "ok" => Some((test, Some(true))),
        "FAILED" => Some((test, Some(false))),
        "" => Some((test, None)),
        _ => None,
    }
}

/// Somebody else's program, `/vm/program`, which speaks TAP itself: its checks are passed on.
pub fn program(line: &mut Line) {
    let mut command = Command::new("/vm/program");
    command.env("SUBLET", "/vm/sublet").stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(e) => return line.check_with(false, "the program starts", &e.to_string()),
    };
    let mut planned = None;
    let mut said = 0;
    let stdout = child.stdout.take().into_iter();
    for text in stdout.flat_map(|out| BufReader::new(out).lines()).map_while(Result::ok) {
        let (ok, rest) = match text.strip_prefix("not ok ") {
            Some(rest) => (false, rest),
            None => match text.strip_prefix("ok ") {
                Some(rest) => (true, rest),
                None => {
                    planned = planned.or(text.strip_prefix("1..").and_then(|n| n.parse().ok()));
                    line.comment(text.trim_start_matches("# "));
                    continue;
                }
            },
        };
        said += 1;
        line.check(ok, rest.split_once(" - ").map_or(rest, |(_, name)| name));
    }
    let ended = child.wait();
    let whole =
        planned == Some(said) && ended.as_ref().is_ok_and(std::process::ExitStatus::success);
    line.check_with(
        whole,
        "the program kept its plan",
        &format!("{said} of {planned:?}, {ended:?}"),
    );
}
