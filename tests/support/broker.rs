//! `sublet serve` for one test: started with the world's configuration and state, ended with the test.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use sublet::api::client::Client;
use sublet::api::wire::{RunBody, RunObject};

use super::host::Process;
use super::outcome::Outcome;
use super::world::{World, finish, leasing_profile, vault_secret};

/// From start until the control socket listens.
const PATIENCE: Duration = Duration::from_secs(20);

/// A broker. Its service is asked to stop, and then killed, when the test lets go of it.
pub struct Broker<'a> {
    world: &'a World,
    child: Child,
    log: PathBuf,
    pub control: PathBuf,
}

/// What most tests of the broker need: the secret `s`, the profile `leasing` for it, and leave to take
/// workspaces from this world. `more` is added to the capability's table.
pub fn leasing_host(world: &World, value: &[u8], more: &str) -> String {
    let base = world.workspace.parent().unwrap().display().to_string();
    let secret = vault_secret("s", "test.use@svc.test");
    world.configure(&format!("{secret}[host]\nworkspaces = [\"{base}\"]\n"));
    world.set_secret("s", value);
    // Where the broker may look for one: beside its configuration.
    let profiles = world.path("etc/profiles");
    fs::create_dir_all(&profiles).unwrap();
    fs::write(profiles.join("leasing.toml"), leasing_profile("default", more)).unwrap();
    "leasing".to_owned()
}

/// What the broker's hosts have in common, with secrets and profiles of the test's own: `config` is added
/// to the configuration, a profile is known by its name.
pub fn host(world: &World, config: &str, profiles: &[(&str, &str)]) {
    let base = world.workspace.parent().unwrap().display();
    let workspaces = format!("workspaces = [\"{base}\"]\n");
    let config = match config.split_once("[host]\n") {
        Some((before, after)) => format!("{before}[host]\n{workspaces}{after}"),
        None => format!("{config}[host]\n{workspaces}"),
    };
    world.configure(&config);
    let directory = world.path("etc/profiles");
    fs::create_dir_all(&directory).unwrap();
    for (name, toml) in profiles {
        fs::write(directory.join(format!("{name}.toml")), toml).unwrap();
    }
}

/// How `sublet serve` is started, beyond what every test needs.
#[derive(Debug, Clone, Copy, Default)]
pub struct Way<'a> {
    pub flags: &'a [&'a str],
    pub environment: &'a [(&'a str, &'a str)],
    /// `--runtime-dir`.
    pub runtime_dir: Option<&'a Path>,
    /// A line of `sh` that goes before it. Both then have a mount namespace of their own, of which nothing
    /// comes back to the host's.
    pub before: Option<&'a str>,
}

/// Starts `sublet serve` and waits until it listens.
#[track_caller]
pub fn serve(world: &World) -> Broker<'_> {
    serve_as(world, Way::default())
}

#[track_caller]
pub fn serve_as<'a>(world: &'a World, way: Way<'_>) -> Broker<'a> {
    let log = world.path("serve.log");
    let sockets = way.runtime_dir.map_or_else(|| world.state().join("run"), Path::to_owned);
    let control = sockets.join("control.sock");
    let stderr = fs::File::create(&log).unwrap();
    let mut command = command(world, way);
    command.stdin(Stdio::null()).stdout(stderr.try_clone().unwrap()).stderr(stderr);
    let mut broker = Broker { world, child: command.spawn().unwrap(), log, control };
    let start = Instant::now();
    while UnixStream::connect(&broker.control).is_err() {
        let ended = broker.child.try_wait().unwrap();
        assert!(
            ended.is_none() && start.elapsed() < PATIENCE,
            "no broker at {} ({ended:?}):\n{}",
            broker.control.display(),
            broker.log()
        );
        std::thread::sleep(Duration::from_millis(5));
    }
    // It listens before it has taken up its runs, and answers afterwards.
    let health = broker.client().health();
    assert!(health.is_ok(), "{health:?}\n{}", broker.log());
    broker
}

fn command(world: &World, way: Way<'_>) -> Command {
    let mut serve = world.sublet();
    serve.arg("serve").args(way.flags).envs(way.environment.iter().copied());
    if let Some(directory) = way.runtime_dir {
        serve.arg("--runtime-dir").arg(directory);
    }
    let Some(before) = way.before else { return serve };
    super::needs("unshare", "util-linux");
    let mut command = Command::new("unshare");
    world.dress(&mut command);
    // Each executes the next: the pid stays the service's.
    command.args(["--mount", "--propagation", "private", "sh", "-ec"]);
    command.arg(format!("{before}\nexec \"$0\" \"$@\"")).arg(serve.get_program());
    command.args(serve.get_args()).envs(way.environment.iter().copied());
    command
}

impl Broker<'_> {
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it said until now.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// `sublet …` on this world's host.
    pub fn call(&self, args: &[&str]) -> Outcome {
        self.world.call(args)
    }

    /// The same with input.
    pub fn call_with(&self, args: &[&str], stdin: &[u8]) -> Outcome {
        self.world.call_with(args, stdin)
    }

    /// Starts a run in the world's workspace: its object, as `runs start --json` prints it.
    #[track_caller]
    pub fn start_run(&self, profile: &str) -> Run<'_> {
        let workspace = self.world.workspace.to_str().unwrap();
        let args = ["--json", "runs", "start", "--agent", "bot", "--principal", "root"];
        let place = ["--profile", profile, "--workspace", workspace];
        let object = self.call(&[&args[..], &place].concat()).ok().json();
        let id = object["run_id"].as_str().unwrap().to_owned();
        let socket = object["socket"].as_str().unwrap().into();
        Run { broker: self, id, socket, object }
    }

    /// The same through the interface, for this principal.
    #[track_caller]
    pub fn run_of(&self, principal: &str, profile: &str) -> RunObject {
        let body = RunBody {
            agent: "bot".parse().unwrap(),
            principal: principal.parse().unwrap(),
            profile: profile.to_owned(),
            workspace: self.world.workspace.clone(),
            run_id: None,
        };
        self.client().start_run(&body).unwrap()
    }

    /// A client of the control socket.
    #[track_caller]
    pub fn client(&self) -> Client {
        Client::connect(&self.control).unwrap_or_else(|e| panic!("{e:?}\n{}", self.log()))
    }

    /// The trail after this event, by way of the broker.
    #[track_caller]
    pub fn events(&self, since: u64) -> Vec<Value> {
        let events = self.client().events(since, false).unwrap();
        events.map(|line| serde_json::from_str(&line.unwrap()).unwrap()).collect()
    }

    /// The service, and the launcher below it.
    #[track_caller]
    pub fn parts(&self) -> (Process, Process) {
        let broker = Process::of(self.pid()).expect("the broker lives");
        let launcher = super::host::processes()
            .into_iter()
            .find(|p| p.parent == broker.pid && p.name == "sublet-launch");
        (broker, launcher.expect("the launcher lives"))
    }

    /// Runs a line of `sh` as root in the service's mount namespace.
    #[track_caller]
    pub fn inside(&self, script: &str) -> Outcome {
        super::needs("nsenter", "util-linux");
        let mut command = Command::new("nsenter");
        self.world.dress(&mut command);
        command.arg(format!("--mount=/proc/{}/ns/mnt", self.pid())).args(["sh", "-ec", script]);
        finish(command, b"", None)
    }

    /// Kills the service itself, as the kernel would.
    pub fn shoot(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Waits until the service has ended by itself.
    #[track_caller]
    pub fn ended(&mut self, patience: Duration) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(start.elapsed() < patience, "it still serves:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Asks the service to end.
    pub fn terminate(&self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    }
}

impl Drop for Broker<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the broker said:\n{}", self.log());
        }
        if !matches!(self.child.try_wait(), Ok(None)) {
            return;
        }
        // Ours and not yet reaped: the number is still its own. That it is gone shows below.
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).ok();
        let start = Instant::now();
        while let Ok(None) = self.child.try_wait() {
            if start.elapsed() > Duration::from_secs(5) {
                let _ = self.child.kill();
                let _ = self.child.wait();
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// A run of a broker.
pub struct Run<'a> {
    broker: &'a Broker<'a>,
    pub id: String,
    pub socket: PathBuf,
    pub object: Value,
}

impl Run<'_> {
    /// `sublet exec --run ID ARGS…`.
    pub fn exec(&self, args: &[&str]) -> Outcome {
        self.exec_with(args, b"")
    }

    pub fn exec_with(&self, args: &[&str], stdin: &[u8]) -> Outcome {
        let report = self.broker.world.path(&format!("reports/{}.json", self.id));
        drop(fs::remove_file(&report));
        finish(self.prepare(&report, args), stdin, Some(&report))
    }

    /// The same, not yet started.
    pub fn prepare(&self, report: &Path, args: &[&str]) -> Command {
        let mut command = self.broker.world.sublet();
        command.args(["exec", "--run", &self.id, "--report"]).arg(report).args(args);
        command
    }

    /// Asks for `test.use@svc.test` with these options (`,channel=env,uses=2`): the lease's id.
    #[track_caller]
    pub fn lease(&self, options: &str) -> String {
        let flag = format!("test.use@svc.test{options}");
        let args = ["--json", "lease", "request", &flag, "--run", &self.id];
        let lease = self.broker.call(&args).ok().json();
        lease["lease_id"].as_str().unwrap().to_owned()
    }
}
