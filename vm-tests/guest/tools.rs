//! Files, and programs that are run to their end.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Empty where there is no such file: what is read is compared with something.
pub fn read(path: &str) -> String {
    String::from_utf8_lossy(&std::fs::read(path).unwrap_or_default()).into_owned()
}

pub struct Ended {
    pub status: Option<i32>,
    pub out: String,
    pub err: String,
}

impl Ended {
    pub fn ok(&self) -> bool {
        self.status == Some(0)
    }

    pub fn both(&self) -> String {
        format!("status {:?}\n{}{}", self.status, self.out, self.err)
    }
}

/// The command as it is, its output gathered. One that cannot be started has no status.
pub fn run(command: &mut Command) -> Ended {
    match command.stdin(Stdio::null()).output() {
        Ok(output) => Ended {
            status: output.status.code(),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        },
        Err(e) => Ended {
            status: None,
            out: String::new(),
            err: format!("cannot start {command:?}: {e}"),
        },
    }
}

pub fn sh(script: &str) -> Ended {
    run(Command::new("sh").args(["-c", script]))
}

pub fn eventually(most: Duration, mut is: impl FnMut() -> bool) -> bool {
    let start = Instant::now();
    loop {
        if is() {
            return true;
        }
        if start.elapsed() > most {
            return false;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}
