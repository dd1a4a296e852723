//! The isolation suite on a real kernel: the same integration tests that run on the host, as they are,
//! at their own paths, with the static `sublet` in the place of the one they were built with.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::Result;
use super::job::{Booted, Files, Outcome};
use super::kernel::Kernel;
use super::workshop::{self, Workshop};

/// A test program, and its tests that are not run in the guest, each with its reason: `NAME`, or
/// `NAME<ABI` where Landlock's ABI must be at least that (what sublet does without it, `variants` tries).
pub struct Suite {
    pub name: &'static str,
    /// Also without `--long`.
    pub always: bool,
    left_out: &'static [&'static str],
}

const fn suite(name: &'static str, always: bool, left_out: &'static [&'static str]) -> Suite {
    Suite { name, always, left_out }
}

pub const SUITES: &[Suite] = &[
    suite("siblings", true, &[]),
    suite(
        "sandbox",
        true,
        &[
            "abstract_sockets_of_the_host_are_unreachable_even_on_its_network<6",
            "landlock_holds_ports_on_the_hosts_network<4",
            "the_network_flag_narrows_and_never_widens<6",
        ],
    ),
    suite("scrub", true, &[]),
    // Its ttl of a second is over before an emulated exec begins; `faults` has one of six.
    suite("leases", false, &["an_expired_lease_is_wiped_in_mid_exec"]),
    // No cargo and no node in the guest: whole tool chains.
    suite("seccomp_filters", false, &["cargo_builds_a_crate", "node_runs"]),
    suite("settle", true, &[]),
    suite("warm", true, &[]),
    suite("launcher_trust", true, &[]),
    // What needs cgroup v2 alone: crun and podman, each as it is.
    suite("hook", true, &[]),
    suite("podman", true, &[]),
    suite("into", false, &[]),
    suite("guard", false, &[]),
    suite("projection", false, &[]),
    suite("awkward", false, &[]),
    suite("bad_input", false, &[]),
    suite("git", false, &[]),
    suite("redaction", false, &[]),
    suite("regressions", false, &[]),
    suite("broker_leases", false, &[]),
    suite("broker_memory", false, &[]),
    suite("api_sockets", false, &[]),
    suite("trail", false, &[]),
    // Properties of the pure redactor, thousands of cases each: no kernel's affair, and tens of minutes here.
    suite("lib", false, &["redact::tests::"]),
];

/// What the guest's root holds of the build: (here, there).
#[derive(Default)]
pub struct Built {
    pub files: Vec<(PathBuf, PathBuf)>,
    pub programs: Vec<(String, PathBuf)>,
}

pub fn built(sublet: &Path) -> Result<Built> {
    let targets: Vec<&str> = SUITES.iter().map(|s| s.name).collect();
    let programs = workshop::test_programs(&targets)?;
    let mut files: Vec<(PathBuf, PathBuf)> =
        programs.iter().map(|(_, path)| (path.clone(), path.clone())).collect();
    // The paths that the tests were compiled with.
    files.push((sublet.to_owned(), PathBuf::from(env!("CARGO_BIN_EXE_sublet"))));
    for read in ["seccomp", "docs/oci"] {
        let dir = workshop::checkout().join(read);
        for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
            if entry.path().extension().is_some_and(|e| e == "json") {
                files.push((entry.path(), entry.path()));
            }
        }
    }
    // A test compiles it.
    let shim = workshop::checkout().join("benches/slow_fsync.c");
    files.push((shim.clone(), shim));
    // Their hostile programs, where an earlier run has compiled them; else the guest does.
    let place = Path::new(env!("CARGO_TARGET_TMPDIR"));
    for entry in std::fs::read_dir(place).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let digest = name.strip_prefix("probe-").filter(|digest| digest.len() == 16);
        if digest.is_some_and(|digest| digest.chars().all(|c| c.is_ascii_hexdigit())) {
            files.push((entry.path(), entry.path()));
        }
    }
    Ok(Built { files, programs })
}

pub fn run(workshop: &Workshop, kernel: &Kernel, only: &[&str]) -> Result<Outcome> {
    let mut list = String::new();
    for suite in SUITES.iter().filter(|s| workshop.long || s.always) {
        let program = workshop.programs.iter().find(|(name, _)| name == suite.name);
        let (_, program) = program.ok_or(format!("no test program {}", suite.name))?;
        list.push_str(&format!("{} {}", suite.name, program.display()));
        for test in suite.left_out {
            list.push_str(&format!(" {test}"));
        }
        list.push('\n');
    }
    let mut files = Files::default();
    files.add("suites", 0o644, list.as_bytes());
    let booted = Booted {
        job: format!("isolation:{}", only.join(",")),
        files,
        cpus: 2,
        // Since 6.2 this is off; the tests' controls type into their own terminal.
        append: "sysctl.dev.tty.legacy_tiocsti=1".to_owned(),
        patience: Duration::from_secs(if workshop.long { 5_400 } else { 900 }),
        ..Booted::on(kernel)
    };
    booted.listen(workshop)
}

/// Somebody else's static program.
pub fn program(workshop: &Workshop, kernel: &Kernel, program: &Path) -> Result<Outcome> {
    let bytes = std::fs::read(program).map_err(|e| format!("{}: {e}", program.display()))?;
    let mut files = Files::default();
    files.add("program", 0o755, &bytes);
    Booted { job: "program".to_owned(), files, ..Booted::on(kernel) }.listen(workshop)
}
