//! Real servers and test servers that are other programs: from PyPI and npm, in directories below `target/`
//! that the first test to need them makes, and `tests/servers/*`.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::Value;

pub(super) fn target() -> PathBuf {
    // Beside the tests' own binaries: target/debug/deps.
    let exe = std::env::current_exe().unwrap();
    exe.ancestors().nth(3).unwrap().to_owned()
}

pub(super) fn made(directory: &Path, stamp: &str, make: impl FnOnce()) {
    fs::create_dir_all(directory).unwrap();
    let lock = fs::File::create(directory.join("lock")).unwrap();
    lock.lock().unwrap();
    let done = directory.join("made");
    if fs::read_to_string(&done).is_ok_and(|text| text == stamp) {
        return;
    }
    make();
    fs::write(done, stamp).unwrap();
}

/// The Python of an environment that has the packages of `tests/servers/requirements.txt`.
pub fn python() -> PathBuf {
    super::needs("python3", "python3");
    let requirements = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/servers/requirements.txt");
    let directory = target().join("test-python");
    let environment = directory.join("venv");
    made(&directory, &fs::read_to_string(requirements).unwrap(), || {
        // Not one of a version manager, which an ordinary user could not execute.
        run(Command::new("/usr/bin/python3").args(["-m", "venv", "--clear"]).arg(&environment));
        let pip = environment.join("bin/pip");
        run(Command::new(pip).args(["install", "--quiet", "-r", requirements]));
    });
    environment.join("bin/python")
}

/// A directory with the packages of `tests/servers/package.json` in `node_modules`.
pub fn node() -> PathBuf {
    super::needs("npm", "npm");
    let package = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/servers/package.json");
    let directory = target().join("test-node");
    made(&directory, &fs::read_to_string(package).unwrap(), || {
        fs::copy(package, directory.join("package.json")).unwrap();
        let mut npm = Command::new("npm");
        npm.args(["install", "--silent", "--no-audit", "--no-fund"]).current_dir(&directory);
        run(&mut npm);
    });
    directory
}

#[track_caller]
pub(super) fn run(command: &mut Command) {
    let ended = command.output().unwrap();
    assert!(ended.status.success(), "{command:?}: {}", String::from_utf8_lossy(&ended.stderr));
}

/// Another program that serves; ended with the test.
pub struct Server {
    child: Child,
    pub port: u16,
    said: Arc<Mutex<Vec<String>>>,
}

impl Server {
    /// One that prints its port first.
    #[track_caller]
    pub fn start(mut command: Command) -> Self {
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap_or_else(|e| panic!("{command:?}: {e}"));
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let first = lines.next().and_then(Result::ok).unwrap_or_default();
        let port = first.trim().parse().unwrap_or_else(|_| panic!("{command:?} said {first:?}"));
        let said = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&said);
        std::thread::spawn(move || {
            lines.map_while(Result::ok).for_each(|line| log.lock().unwrap().push(line));
        });
        Self { child, port, said }
    }

    /// One that is told its port, and says nothing that matters.
    #[track_caller]
    pub fn on_a_free_port(make: impl FnOnce(u16) -> Command) -> Self {
        let port = {
            let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            listener.local_addr().unwrap().port()
        };
        let mut command = make(port);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn().unwrap_or_else(|e| panic!("{command:?}: {e}"));
        let server = Self { child, port, said: Arc::default() };
        let start = Instant::now();
        while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(start.elapsed() < Duration::from_secs(60), "{command:?} does not listen");
            std::thread::sleep(Duration::from_millis(20));
        }
        server
    }

    /// `tests/servers/NAME` in Python.
    #[track_caller]
    pub fn script(name: &str, args: &[&str]) -> Self {
        let mut command = Command::new(python());
        command.arg(format!("{}/tests/servers/{name}", env!("CARGO_MANIFEST_DIR"))).args(args);
        Self::start(command)
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.port)
    }

    /// What it has printed since, a JSON value a line; others are its own talk.
    pub fn said(&self) -> Vec<Value> {
        let said = self.said.lock().unwrap();
        said.iter().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Ours and not yet reaped; that it is gone already is as well.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
