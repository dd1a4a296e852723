//! What the benches that compare with a bare clone have in common: programs as they are installed, the
//! floor, and percentiles.
#![forbid(unsafe_code)]

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

pub const TRUE: &str = "/bin/true";

/// The smallest value that at least `percent` of the samples do not exceed.
pub fn percentile(times: &[Duration], percent: usize) -> Duration {
    let mut sorted = times.to_vec();
    sorted.sort_unstable();
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted[rank - 1]
}

/// `sublet` as it is installed: a copy in `dir`. A linker writes here and there, which leaves a program in
/// the page cache page by page; then each start maps them one by one, and takes a fifth longer, until the
/// next boot. What was copied lies there in large folios, as the program that it is compared with.
pub fn installed(dir: &Path) -> PathBuf {
    let copy = dir.join("sublet");
    if !copy.exists() {
        std::fs::copy(env!("CARGO_BIN_EXE_sublet"), &copy).expect("copy the program");
    }
    copy
}

/// A bare clone3 with the same namespaces, exec of `/bin/true`, wait: benches/floor.c. Kept running between
/// rounds so that starting the measuring program is not measured.
pub struct Floor {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Floor {
    /// Compiles it to `program`.
    pub fn start(program: &Path) -> Self {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/floor.c");
        let made = Command::new("gcc").args(["-O2", "-o"]).args([program, &source]).status();
        assert!(made.is_ok_and(|s| s.success()), "gcc cannot compile benches/floor.c");
        let mut child = Command::new(program)
            .arg(TRUE)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdin = child.stdin.take().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        Self { child, stdin, stdout }
    }

    pub fn round(&mut self) -> Duration {
        writeln!(self.stdin, "go").unwrap();
        let mut line = String::new();
        self.stdout.read_line(&mut line).unwrap();
        Duration::from_nanos(line.trim().parse().expect("the floor needs user namespaces"))
    }
}

impl Drop for Floor {
    fn drop(&mut self) {
        // The child is ours.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
