//! What other processes see of a leased exec: a probe for a shell, and the exec's processes on the host.
#![forbid(unsafe_code)]

use std::fs;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use super::act::{Ran, finish};
use super::place::Place;
use crate::cli::fail::Failure;

/// Tries to read one process, `$1`, in every way that a shell has, and to signal it. Says what it got.
/// Opening `mem` takes the same right as ptrace(2) and process_vm_readv(2): PTRACE_MODE_ATTACH.
pub const PROBE: &str = "\
for f in environ maps mem fd/3; do head -c 65536 /proc/$1/$f && echo \"GOT $f\"; done
kill -0 $1 && echo GOT signal
echo tried
";

/// A probe whose five attempts were all refused.
pub fn is_refused(place: &Place, ran: &Ran) -> Result<bool, Failure> {
    let has_tried = ran.text().ends_with("tried\n");
    let has_got = ran.text().contains("GOT");
    let has_value = place.is_value_in(&ran.stdout)? || place.is_value_in(&ran.stderr)?;
    Ok(has_tried && !has_got && !has_value && said(&ran.errors()) == 5)
}

/// Lines that hold anything: dash ends what it says of `kill` with an empty one.
fn said(text: &str) -> usize {
    text.lines().filter(|line| !line.is_empty()).count()
}

/// The probe as another user of this host.
pub fn probe_as(user: u32, pid: i32) -> Result<Ran, Failure> {
    let mut command = Command::new("sh");
    command
        .args(["-s", &pid.to_string()])
        .env("LC_ALL", "C")
        .current_dir("/")
        // Drops the groups of root as well.
        .uid(user)
        .gid(user);
    finish(command, Some(PROBE.as_bytes()))
}

/// The process below `ancestor` whose environment holds the value, as this process can see it.
pub fn holder(place: &Place, ancestor: i32) -> Result<Option<i32>, Failure> {
    for pid in descendants(ancestor)? {
        // A process that ended since, or that may not be read, is not it.
        let Ok(environ) = fs::read(format!("/proc/{pid}/environ")) else { continue };
        if place.is_value_in(&environ)? {
            return Ok(Some(pid));
        }
    }
    Ok(None)
}

/// The processes below `ancestor`, nearest first.
pub fn descendants(ancestor: i32) -> Result<Vec<i32>, Failure> {
    let entries = fs::read_dir("/proc")
        .map_err(|e| Failure::new("demo", "proc_unreadable", "cannot read /proc").because(&e))?;
    let mut pairs = Vec::new();
    for pid in entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()) {
        pairs.extend(parent(pid).map(|parent| (pid, parent)));
    }
    let mut found = vec![ancestor];
    let mut next = 0;
    while let Some(&above) = found.get(next) {
        found.extend(pairs.iter().filter(|(_, parent)| *parent == above).map(|(pid, _)| *pid));
        next += 1;
    }
    found.remove(0);
    Ok(found)
}

/// Field 4 of proc(5) stat, behind the name in parentheses, which may hold anything.
fn parent(pid: i32) -> Option<i32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit(')').next()?.split_ascii_whitespace().nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_is_a_descendant_and_a_stranger_is_not() {
        let mut child = Command::new("sleep").arg("10").spawn().unwrap();
        let pid = child.id().cast_signed();
        let me = std::process::id().cast_signed();
        assert!(descendants(me).unwrap().contains(&pid));
        assert!(!descendants(pid).unwrap().contains(&me));
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn the_probe_reads_what_it_may_and_says_so() {
        let place = Place::make().unwrap();
        let mut shell = Command::new("sh");
        shell.args(["-s", "self"]).env("LC_ALL", "C");
        let ran = finish(shell, Some(PROBE.as_bytes())).unwrap();
        assert!(ran.text().contains("GOT environ"));
        assert!(!is_refused(&place, &ran).unwrap());
    }
}
