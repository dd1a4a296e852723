//! A corner of the machine for one test: its own state, configuration, profiles and workspace, and the
//! two people who may call `sublet` in it: root, and an ordinary user without a name in passwd.

use std::ffi::OsStr;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::outcome::Outcome;
use super::probe;

/// An ordinary user, deliberately unknown to passwd.
pub const ORDINARY: u32 = 12_345;

/// Longer than any command of these tests takes on a busy machine of two cores.
const PATIENCE: Duration = Duration::from_secs(180);

/// A line of a configuration: the secret `name`, open to `pair` (`capability@audience`).
pub fn vault_secret(name: &str, pair: &str) -> String {
    format!("[secrets.{name}]\nsource = \"vault\"\nallow = [\"{pair}\"]\n")
}

/// A profile with the capability `test.use` for `svc.test` on the three channels that carry plain
/// values, for any command, drawing on the secret `s` and delivered as `TOKEN`, `TOKEN_FILE`, `TOKEN_FD`.
/// `more` is added to the capability's table.
pub fn leasing_profile(extends: &str, more: &str) -> String {
    format!(
        r#"extends = "{extends}"
[[capability]]
name = "test.use"
channels = ["memfd", "file", "env"]
ttl = "10m"
uses = 5
command = [["**"]]
{more}
[[capability.audience]]
protocol = "https"
host = "svc.test"
secret = "s"
variable = "TOKEN"
"#
    )
}

pub struct World {
    base: tempfile::TempDir,
    /// Who calls `sublet`.
    pub invoker: u32,
    pub workspace: PathBuf,
    reports: AtomicU32,
}

impl World {
    /// Root calls, and the workspace is an ordinary user's: the host of agents.
    pub fn host() -> Self {
        super::needs_root();
        Self::new(0, ORDINARY)
    }

    /// An ordinary user in their own directory: the developer.
    pub fn developer() -> Self {
        let me = rustix::process::geteuid();
        if me.is_root() {
            Self::new(ORDINARY, ORDINARY)
        } else {
            Self::new(me.as_raw(), me.as_raw())
        }
    }

    /// Both: what must hold for everyone.
    pub fn each() -> [Self; 2] {
        [Self::host(), Self::developer()]
    }

    pub fn new(invoker: u32, owner: u32) -> Self {
        let base = tempfile::Builder::new().prefix("sublet-test-").tempdir().unwrap();
        fs::set_permissions(base.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let world =
            Self { workspace: base.path().join("work"), base, invoker, reports: AtomicU32::new(0) };
        world.give(world.base.path(), invoker);
        for dir in ["etc", "profiles", "home", "reports"] {
            fs::create_dir(world.path(dir)).unwrap();
            world.give(&world.path(dir), invoker);
        }
        fs::create_dir(&world.workspace).unwrap();
        world.give(&world.workspace, owner);
        world.configure("");
        world
    }

    fn give(&self, path: &Path, uid: u32) {
        if rustix::process::geteuid().is_root() {
            chown(path, Some(uid), Some(uid)).unwrap();
        }
    }

    /// A path in this world, outside the workspace.
    pub fn path(&self, name: &str) -> PathBuf {
        self.base.path().join(name)
    }

    pub fn state(&self) -> PathBuf {
        self.path("state")
    }

    /// A file or program in the workspace, owned as the workspace is.
    pub fn file(&self, name: &str, content: impl AsRef<[u8]>, mode: u32) -> PathBuf {
        use std::os::unix::fs::MetadataExt;
        let path = self.workspace.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        let owner = fs::metadata(&self.workspace).unwrap().uid();
        let mut made = path.clone();
        while made != self.workspace {
            self.give(&made, owner);
            made.pop();
        }
        path
    }

    /// The hostile programs, as `./probe` in the workspace.
    pub fn with_probe(self) -> Self {
        self.file("probe", fs::read(probe::binary()).unwrap(), 0o755);
        self
    }

    /// Replaces the host's configuration.
    pub fn configure(&self, toml: &str) {
        let path = self.path("etc/sublet.toml");
        fs::write(&path, toml).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        self.give(&path, self.invoker);
    }

    /// Writes a profile and returns what `--profile` takes.
    pub fn profile(&self, name: &str, toml: &str) -> String {
        let path = self.path(&format!("profiles/{name}.toml"));
        fs::write(&path, toml).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        self.give(&path, self.invoker);
        path.to_str().unwrap().to_owned()
    }

    /// The secret `s` with this value, and a profile that may lease it: what most lease tests need.
    pub fn leasing(&self, value: &[u8]) -> String {
        self.leasing_with(value, "default", "")
    }

    /// The same on another base profile, with more keys in the capability.
    pub fn leasing_with(&self, value: &[u8], extends: &str, more: &str) -> String {
        self.configure(&vault_secret("s", "test.use@svc.test"));
        self.set_secret("s", value);
        self.profile("leasing", &leasing_profile(extends, more))
    }

    /// Keeps a value, in the place of an earlier one if there is one.
    #[track_caller]
    pub fn set_secret(&self, name: &str, value: &[u8]) {
        let set = self.call_with(&["secret", "set", name], value);
        if set.status != Some(0) && set.err().contains("rotate") {
            self.call_with(&["secret", "rotate", name], value).ok();
        } else {
            set.ok();
        }
    }

    /// `sublet` with this world's state and configuration, as this world's invoker.
    pub fn sublet(&self) -> Command {
        let mut command = Command::new(binary());
        self.dress(&mut command);
        command.arg("--config").arg(self.path("etc/sublet.toml"));
        command.arg("--state-dir").arg(self.state());
        command
    }

    /// Gives any command this world's invoker, directory and environment.
    pub fn dress(&self, command: &mut Command) {
        command
            .env_clear()
            .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
            .env("HOME", self.path("home"))
            .env("LANG", "C.UTF-8")
            .env("RUST_BACKTRACE", "1")
            .current_dir(&self.workspace);
        if rustix::process::geteuid().is_root() && self.invoker != 0 {
            command.uid(self.invoker).gid(self.invoker);
        }
    }

    /// `sublet run ARGS…` as this world's invoker, as one line for a shell that runs as root.
    pub fn shell_line(&self, args: &[&str]) -> String {
        let (command, _) = self.prepare(args);
        let invoker = self.invoker.to_string();
        let mut words: Vec<String> = match self.invoker {
            0 => vec![],
            _ => ["setpriv", "--reuid", &invoker, "--regid", &invoker, "--clear-groups"]
                .map(str::to_owned)
                .into(),
        };
        words.push(command.get_program().to_string_lossy().into_owned());
        words.extend(command.get_args().map(|a| a.to_string_lossy().into_owned()));
        words.iter().map(|w| quoted(w)).collect::<Vec<_>>().join(" ")
    }

    /// Any `sublet …`.
    pub fn call(&self, args: &[&str]) -> Outcome {
        self.call_with(args, b"")
    }

    pub fn call_with(&self, args: &[&str], stdin: &[u8]) -> Outcome {
        let mut command = self.sublet();
        command.args(args);
        finish(command, stdin, None)
    }

    /// `sublet run …` with a report.
    pub fn run(&self, args: &[&str]) -> Outcome {
        self.run_with(args, b"")
    }

    pub fn run_with(&self, args: &[&str], stdin: &[u8]) -> Outcome {
        let (command, report) = self.prepare(args);
        finish(command, stdin, Some(&report))
    }

    /// `sublet run … -- sh -c SCRIPT` under a profile.
    pub fn sh(&self, profile: &str, script: &str) -> Outcome {
        self.run(&["--profile", profile, "--", "sh", "-c", script])
    }

    /// The same with leases of `test.use@svc.test` on these channels.
    pub fn leased_sh(&self, profile: &str, channels: &[&str], script: &str) -> Outcome {
        let leases: Vec<String> =
            channels.iter().map(|c| format!("--lease=test.use@svc.test,channel={c}")).collect();
        let mut args = vec!["--profile", profile];
        args.extend(leases.iter().map(String::as_str));
        args.extend(["--", "sh", "-c", script]);
        self.run(&args)
    }

    /// `sublet run --report FILE …`, not yet started.
    pub fn prepare(&self, args: &[&str]) -> (Command, PathBuf) {
        let number = self.reports.fetch_add(1, Ordering::Relaxed);
        let report = self.path(&format!("reports/{number}.json"));
        let mut command = self.sublet();
        command.arg("run").arg("--report").arg(&report).args(args);
        (command, report)
    }

    /// Starts `sublet run …` and leaves it running.
    pub fn spawn(&self, args: &[&str]) -> Running {
        let (mut command, report) = self.prepare(args);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let line = line_of(&command);
        Running { child: Some(command.spawn().unwrap()), line, report }
    }

    /// The trail, oldest first.
    #[track_caller]
    pub fn trail(&self) -> Vec<Value> {
        self.call(&["--json", "audit", "list"]).ok().json_lines()
    }

    /// The types of the trail's events, oldest first.
    #[track_caller]
    pub fn event_types(&self) -> Vec<String> {
        self.trail().iter().map(|e| e["type"].as_str().unwrap_or("?").to_owned()).collect()
    }

    /// No byte of `value` in the state, the workspace, the profiles, the configuration or the home.
    #[track_caller]
    pub fn holds_nowhere(&self, value: &[u8]) {
        let found = super::host::files_holding(self.base.path(), value);
        assert!(found.is_empty(), "the value lies in {found:?}");
    }
}

/// A `sublet run` that goes on while the test looks at it.
pub struct Running {
    child: Option<Child>,
    line: String,
    report: PathBuf,
}

impl Running {
    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("still running").id()
    }

    /// The next line that the command prints.
    #[track_caller]
    pub fn read_line(&mut self) -> String {
        let out = self.child.as_mut().unwrap().stdout.as_mut().unwrap();
        let mut line = Vec::new();
        let mut byte = [0];
        while out.read(&mut byte).unwrap() == 1 {
            if byte[0] == b'\n' {
                return String::from_utf8(line).unwrap();
            }
            line.push(byte[0]);
        }
        let outcome = self.take_outcome();
        panic!(
            "ended before it printed a line, after {:?}\n{outcome}",
            String::from_utf8_lossy(&line)
        );
    }

    /// Waits for the end. Once.
    pub fn finish(&mut self) -> Outcome {
        self.take_outcome()
    }

    /// Kills sublet itself, whatever it is doing.
    pub fn shoot(&mut self) {
        let mut child = self.child.take().expect("still running");
        child.kill().unwrap();
        child.wait().unwrap();
    }

    fn take_outcome(&mut self) -> Outcome {
        let child = self.child.take().expect("finished once");
        collect(child, self.line.clone(), Some(&self.report))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            // A failed test must not leave its sleeper behind; the child is ours and not yet reaped.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Runs any command of a test to its end.
pub fn finish(mut command: Command, stdin: &[u8], report: Option<&Path>) -> Outcome {
    let line = line_of(&command);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap_or_else(|e| panic!("cannot start {line}: {e}"));
    let mut pipe = child.stdin.take().unwrap();
    let bytes = stdin.to_vec();
    // A command that does not read its input must not fail the test by EPIPE.
    std::thread::spawn(move || pipe.write_all(&bytes).ok());
    collect(child, line, report)
}

fn collect(mut child: Child, command: String, report: Option<&Path>) -> Outcome {
    let out = drain(child.stdout.take().unwrap());
    let err = drain(child.stderr.take().unwrap());
    let status = wait(&mut child, &command);
    let stdout = out.join().unwrap();
    let stderr = err.join().unwrap();
    let report = report
        .and_then(|path| fs::read(path).ok())
        .and_then(|bytes| serde_json::from_slice(&bytes).ok());
    Outcome { command, status: status.code(), stdout, stderr, report }
}

fn drain(mut pipe: impl Read + Send + 'static) -> std::thread::JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        // The pipe breaks when a test kills its holder: what came until then counts.
        let _ = pipe.read_to_end(&mut bytes);
        bytes
    })
}

fn wait(child: &mut Child, command: &str) -> ExitStatus {
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        if start.elapsed() > PATIENCE {
            child.kill().unwrap();
            panic!("still running after {PATIENCE:?}: {command}");
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// One word for `sh`.
pub fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', "'\\''"))
}

fn line_of(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" ")
}

/// The program under test, where an ordinary user can reach it: a checkout under /root is closed to them.
pub fn binary() -> &'static Path {
    static PLACE: OnceLock<PathBuf> = OnceLock::new();
    PLACE.get_or_init(|| {
        let built = PathBuf::from(env!("CARGO_BIN_EXE_sublet"));
        let open =
            |dir: &Path| fs::metadata(dir).is_ok_and(|m| m.permissions().mode() & 0o001 != 0);
        if built.ancestors().skip(1).all(open) {
            return built;
        }
        let place = std::env::temp_dir().join(format!("sublet-test-bin-{}", std::process::id()));
        fs::create_dir_all(&place).unwrap();
        fs::set_permissions(&place, fs::Permissions::from_mode(0o755)).unwrap();
        let copy = place.join("sublet");
        fs::copy(&built, &copy).unwrap();
        copy
    })
}
