//! The broker's walls, with the real process: this test binary starts itself again, alone in fresh mount
//! and pid namespaces, settles there in a temporary place, and tries what is forbidden, each with its
//! control before settling; then what a broker must still be able to do.
#![forbid(unsafe_code)]

mod support;

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpListener, UdpSocket};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, chown, symlink};
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rustix::net::{AddressFamily, SocketType};
use sublet::broker::settle::{self, Settled, Settlement};
use sublet::config::UidPool;
use sublet::host::{Host, Places};
use support::{World, needs, needs_root};

type Test = (&'static str, fn());

macro_rules! tests {
    ($($name:ident),* $(,)?) => { &[$((stringify!($name), $name as fn())),*] };
}

const TESTS: &[Test] = tests![
    what_roots_broker_could_do_before_it_cannot_do_after,
    what_a_users_broker_could_do_before_it_cannot_do_after,
    a_broker_can_do_its_work_behind_the_walls,
    its_memory_is_closed_to_its_own_user,
    abort_still_aborts,
    one_broker_at_a_time_serves_a_state,
    it_settles_without_threads,
    a_stale_socket_is_replaced_and_anything_else_is_not,
    what_root_could_be_led_by_is_refused,
    the_configuration_names_the_user,
    what_the_broker_must_read_it_can_or_says_so,
    systemd_hands_over_the_socket,
    systemd_is_told,
    a_credential_of_roots_is_the_brokers_key,
    roots_one_shot_state_is_taken_over_with_its_secrets,
    roots_commands_leave_the_state_its_brokers,
    a_planted_link_does_not_lead_root,
    a_state_in_a_strangers_directory_is_not_entered,
];

/// As libtest's, as far as cargo and nextest ask: names to choose by, `--exact`, `--list`. No threads.
fn main() -> std::process::ExitCode {
    if let Ok(role) = std::env::var("SUBLET_TEST_ROLE") {
        a_broker(&role);
        return std::process::ExitCode::SUCCESS;
    }
    let args: Vec<String> = std::env::args().skip(1).collect();
    let has = |flag: &str| args.iter().any(|a| a == flag);
    let wanted: Vec<&String> = args.iter().filter(|a| !a.starts_with('-')).collect();
    let is_wanted = |name: &str| {
        let fits = |w: &&String| {
            if has("--exact") { name == w.as_str() } else { name.contains(w.as_str()) }
        };
        wanted.is_empty() || wanted.iter().any(fits)
    };
    let chosen = TESTS.iter().filter(|(name, _)| is_wanted(name) && !has("--ignored"));
    let mut failed = 0;
    for (name, test) in chosen {
        if has("--list") {
            println!("{name}: test");
            continue;
        }
        let passed = std::panic::catch_unwind(test).is_ok();
        failed += u32::from(!passed);
        println!("test {name} ... {}", if passed { "ok" } else { "FAILED" });
    }
    // A static is never dropped.
    if !has("--list") {
        fs::remove_dir_all(this_program().parent().unwrap()).unwrap();
    }
    std::process::ExitCode::from(u8::from(failed > 0))
}

/// The lines that a child prints for its parent.
const MARK: &str = "settled says: ";

fn say(word: impl std::fmt::Display) {
    println!("{MARK}{word}");
}

/// A place for one broker: state, sockets, configuration, and what lies outside of all walls.
struct Corner {
    base: tempfile::TempDir,
    user: Option<u32>,
    /// Configuration and state, where they are another's.
    world: Option<(PathBuf, PathBuf)>,
}

impl Corner {
    /// For root's broker, or for one of an ordinary user's.
    fn new(user: Option<u32>) -> Self {
        needs_root();
        needs("unshare", "util-linux");
        needs("setpriv", "util-linux");
        let base = tempfile::Builder::new().prefix("sublet-settle-").tempdir().unwrap();
        fs::set_permissions(base.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let corner = Self { base, user, world: None };
        for dir in ["etc", "etc/profiles", "outside"] {
            fs::create_dir(corner.path(dir)).unwrap();
        }
        fs::write(corner.path("etc/sublet.toml"), "").unwrap();
        fs::write(corner.path("etc/profiles/p.toml"), "extends = \"default\"\n").unwrap();
        fs::write(corner.path("outside/file"), "not the broker's").unwrap();
        for path in ["", "etc", "etc/sublet.toml", "outside", "outside/file"] {
            chown(corner.path(path), Some(corner.caller()), Some(corner.caller())).unwrap();
        }
        corner
    }

    fn caller(&self) -> u32 {
        self.user.unwrap_or(0)
    }

    /// The uid that the broker has in the end.
    fn broker(&self) -> u32 {
        self.user.unwrap_or(UidPool::default().broker_uid())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.base.path().join(name)
    }

    fn state(&self) -> PathBuf {
        self.path("state")
    }

    fn configure(&self, toml: &str) {
        fs::write(self.path("etc/sublet.toml"), toml).unwrap();
    }

    /// This binary as the broker, alone in fresh namespaces, whose first process is a shell.
    fn command(&self, role: &str) -> Command {
        let mut command = Command::new("unshare");
        command.args(["--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]);
        command.args(["--propagation", "private", "--", "sh", "-c", "\"$@\"; exit $?", "sh"]);
        if let Some(user) = self.user {
            let (uid, gid) = (format!("--reuid={user}"), format!("--regid={user}"));
            command.args(["setpriv", &uid, &gid, "--clear-groups", "--"]);
        }
        command
            .arg(this_program())
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("SUBLET_TEST_ROLE", role)
            .env("SUBLET_TEST_BASE", self.base.path())
            .env("SUBLET_TEST_CONFIG", self.path("etc/sublet.toml"))
            .env("SUBLET_TEST_STATE", self.state())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        if let Some((config, state)) = &self.world {
            command.env("SUBLET_TEST_CONFIG", config).env("SUBLET_TEST_STATE", state);
        }
        command
    }

    #[track_caller]
    fn run(&self, role: &str) -> Vec<String> {
        let output = self.command(role).output().unwrap();
        let (out, err) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{role}: {:?}\n{out}{err}", output.status);
        out.lines().filter_map(|l| l.split_once(MARK)).map(|(_, said)| said.to_owned()).collect()
    }

    #[track_caller]
    fn start(&self, role: &str) -> Running {
        Running::start(self.command(role))
    }

    /// To be the broker of another test's world.
    fn link_to(&mut self, world: &World) {
        self.world = Some((world.path("etc/sublet.toml"), world.state()));
    }
}

/// Where an ordinary user can reach it.
fn this_program() -> PathBuf {
    use std::sync::OnceLock;
    static PLACE: OnceLock<tempfile::TempDir> = OnceLock::new();
    let dir = PLACE.get_or_init(|| {
        let dir = tempfile::Builder::new().prefix("sublet-settle-bin-").tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        fs::copy(std::env::current_exe().unwrap(), dir.path().join("settle")).unwrap();
        dir
    });
    dir.path().join("settle")
}

/// A child that goes on until its input ends.
struct Running {
    child: Child,
    out: BufReader<std::process::ChildStdout>,
}

impl Running {
    #[track_caller]
    fn start(mut command: Command) -> Self {
        let mut child = command.spawn().unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        Self { child, out }
    }

    #[track_caller]
    fn hear(&mut self) -> String {
        loop {
            let mut line = String::new();
            if self.out.read_line(&mut line).unwrap() == 0 {
                let mut err = String::new();
                self.child.stderr.take().unwrap().read_to_string(&mut err).unwrap();
                panic!("the child ended early: {err}");
            }
            if let Some((_, said)) = line.trim_end().split_once(MARK) {
                return said.to_owned();
            }
        }
    }

    #[track_caller]
    fn end(mut self) {
        drop(self.child.stdin.take());
        assert!(self.child.wait().unwrap().success());
    }
}

fn base() -> PathBuf {
    std::env::var_os("SUBLET_TEST_BASE").unwrap().into()
}

fn host() -> Host {
    let named = |name| std::env::var_os(name).map(PathBuf::from);
    let (config, state_dir) = (named("SUBLET_TEST_CONFIG"), named("SUBLET_TEST_STATE"));
    Host::load(&Places { config, state_dir, runtime_dir: None }).unwrap()
}

fn settled(host: &Host) -> Result<Settled, settle::SettleError> {
    let credentials = std::env::var_os("CREDENTIALS_DIRECTORY").map(PathBuf::from);
    settle::settle(&Settlement {
        host,
        runtime_dir: &host.runtime_dir,
        credentials: credentials.as_deref(),
    })
}

/// What the children do.
fn a_broker(role: &str) {
    match role {
        "try what is forbidden" => {
            fs::create_dir_all(base().join("state")).unwrap();
            fs::write(base().join("state/trail.head"), "").unwrap();
            for (name, attempt) in forbidden() {
                say(format_args!("before {name}: {}", told(attempt())));
            }
            // The control's own marks.
            fs::remove_dir_all(base().join("state")).unwrap();
            fs::create_dir(base().join("state")).unwrap();
            fs::write(base().join("state/trail.head"), "").unwrap();
            let settled = settled(&host()).unwrap();
            say(serde_json::to_string(&settled.posture).unwrap());
            for (name, attempt) in forbidden() {
                say(format_args!("after {name}: {}", told(attempt())));
            }
        }
        "work" => work::everything(),
        "serve" => {
            let settled = settled(&host()).unwrap();
            settled.manager.ready().unwrap();
            say(std::process::id());
            io::stdin().read_to_end(&mut Vec::new()).unwrap();
            settled.manager.stopping().unwrap();
        }
        "settle" => match settled(&host()) {
            Ok(settled) => say(format_args!("settled, {:?}", settled.posture.control_from)),
            Err(e) => say(format_args!("refused: {e}: {:?}", std::error::Error::source(&e))),
        },
        "tell the key" => {
            let settled = settled(&host()).unwrap();
            match settled.keys.vault.load() {
                Ok(_) => say("a key"),
                Err(e) => say(e),
            }
        }
        "settle with a thread" => {
            let (end, ended) = std::sync::mpsc::channel::<()>();
            let thread = std::thread::spawn(move || ended.recv());
            say(settled(&host()).err().unwrap());
            drop(end);
            assert!(thread.join().unwrap().is_err());
        }
        "abort" => {
            let _settled = settled(&host()).unwrap();
            std::process::abort();
        }
        other => panic!("{other}"),
    }
}

fn told(outcome: io::Result<()>) -> String {
    match outcome {
        Ok(()) => "works".to_owned(),
        Err(e) => e.to_string(),
    }
}

type Attempt = Box<dyn Fn() -> io::Result<()>>;

/// Each works for a process of root's, and leaves nothing behind that a second try would trip over.
fn forbidden() -> Vec<(&'static str, Attempt)> {
    let state = base().join("state");
    let outside = base().join("outside");
    let db = state.join("db");
    if !db.exists() {
        // The control's: the broker's own has it by now.
        drop(fs::create_dir(&db));
    }
    let at = |name: &str| outside.join(name);
    let mut list: Vec<(&'static str, Attempt)> = Vec::new();
    let mut add = |name, attempt: Attempt| list.push((name, attempt));

    add("start a program", Box::new(|| Command::new("/bin/true").status().map(drop)));
    add("become a program", {
        // In a form that does not: the empty path gets as far as the kernel.
        Box::new(|| match nix::unistd::execve::<&std::ffi::CStr, &std::ffi::CStr>(c"", &[], &[]) {
            Err(nix::errno::Errno::ENOENT) => Ok(()),
            Err(e) => Err(e.into()),
            Ok(never) => match never {},
        })
    });
    let file = at("file");
    add("read a file outside", Box::new(move || fs::read(&file).map(drop)));
    add("read /etc/shadow", Box::new(|| fs::File::open("/etc/shadow").map(drop)));
    add("read /etc/passwd", Box::new(|| fs::read("/etc/passwd").map(drop)));
    add("list /", Box::new(|| fs::read_dir("/").map(drop)));
    let made = at("made");
    add("write a file outside", {
        Box::new(move || fs::write(&made, "").and_then(|()| fs::remove_file(&made)))
    });
    let file = at("file");
    add("truncate a file outside", {
        Box::new(move || {
            let length = fs::metadata(&file)?.len();
            let file = fs::OpenOptions::new().write(true).open(&file)?;
            file.set_len(length)
        })
    });
    let made = state.join("made");
    add("make a file in the state's own directory", {
        Box::new(move || fs::write(&made, "").and_then(|()| fs::remove_file(&made)))
    });
    let head = state.join("trail.head");
    add("write the trail's head", {
        Box::new(move || fs::OpenOptions::new().write(true).open(&head).map(drop))
    });
    let link = db.join("link");
    add("make a symbolic link in the state", {
        Box::new(move || symlink("/etc/passwd", &link).and_then(|()| fs::remove_file(&link)))
    });
    let fifo = db.join("fifo");
    add("make a fifo in the state", {
        Box::new(move || {
            let mode = nix::sys::stat::Mode::S_IRWXU;
            nix::unistd::mkfifo(&fifo, mode)?;
            fs::remove_file(&fifo)
        })
    });
    let tool = db.join("tool");
    add("make a set-uid file", {
        Box::new(move || {
            fs::write(&tool, "")?;
            let set = fs::set_permissions(&tool, fs::Permissions::from_mode(0o4755));
            fs::remove_file(&tool)?;
            set
        })
    });
    let file = at("file");
    add("give a file away", Box::new(move || chown(&file, Some(54_321), None)));
    add("listen on TCP", Box::new(|| TcpListener::bind("127.0.0.1:0").map(drop)));
    add("make a UDP socket", Box::new(|| UdpSocket::bind("127.0.0.1:0").map(drop)));
    for (name, family, kind) in [
        ("make an IPv6 socket", AddressFamily::INET6, SocketType::STREAM),
        ("make a netlink socket", AddressFamily::NETLINK, SocketType::RAW),
        ("make a packet socket", AddressFamily::PACKET, SocketType::RAW),
        ("make a Unix datagram socket", AddressFamily::UNIX, SocketType::DGRAM),
    ] {
        add(name, {
            Box::new(move || rustix::net::socket(family, kind, None).map(drop).map_err(Into::into))
        });
    }
    let socket = at("socket");
    add("connect to a socket outside", Box::new(move || UnixStream::connect(&socket).map(drop)));
    let name = abstract_name(&base());
    add("connect to an abstract socket", {
        Box::new(move || {
            UnixStream::connect_addr(&SocketAddr::from_abstract_name(&name)?).map(drop)
        })
    });
    add("signal its parent", {
        Box::new(|| Ok(rustix::process::test_kill_process(rustix::process::getppid().unwrap())?))
    });
    add("signal itself", {
        Box::new(|| Ok(rustix::process::test_kill_process(rustix::process::getpid())?))
    });
    let (uid, gid) = (nix::unistd::Uid::from_raw, nix::unistd::Gid::from_raw);
    add("be root", {
        Box::new(move || Ok(nix::unistd::setresuid(uid(u32::MAX), uid(0), uid(u32::MAX))?))
    });
    add("be in root's group", {
        Box::new(move || Ok(nix::unistd::setresgid(gid(u32::MAX), gid(0), gid(u32::MAX))?))
    });
    add("set its groups", Box::new(move || Ok(nix::unistd::setgroups(&[gid(0)])?)));
    add("enter a mount namespace", {
        Box::new(|| Ok(nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS)?))
    });
    let place = outside.clone();
    add("mount", {
        Box::new(move || {
            let flags = nix::mount::MsFlags::empty();
            let (none, tmpfs) = (None::<&str>, Some("tmpfs"));
            nix::mount::mount(tmpfs, &place, tmpfs, flags, none)?;
            Ok(nix::mount::umount(&place)?)
        })
    });
    add("change its root", Box::new(|| Ok(nix::unistd::chroot("/")?)));
    add("raise a limit", {
        use rustix::process::{Resource, Rlimit, setrlimit};
        let all = Rlimit { current: Some(4096), maximum: Some(4096) };
        Box::new(move || Ok(setrlimit(Resource::Core, all)?))
    });
    add("be looked at", {
        use rustix::process::{DumpableBehavior, set_dumpable_behavior};
        Box::new(|| Ok(set_dumpable_behavior(DumpableBehavior::Dumpable)?))
    });
    list
}

fn abstract_name(base: &Path) -> String {
    format!("outside of {}", base.display())
}

/// What works before and not after, by name.
#[track_caller]
fn check_walls(corner: &Corner, not_for_this_user: &[&str]) -> serde_json::Value {
    let _socket = UnixListener::bind(corner.path("outside/socket")).unwrap();
    let everyone = fs::Permissions::from_mode(0o777);
    fs::set_permissions(corner.path("outside/socket"), everyone).unwrap();
    let name = abstract_name(corner.base.path());
    let _abstract =
        UnixListener::bind_addr(&SocketAddr::from_abstract_name(name).unwrap()).unwrap();
    let said = corner.run("try what is forbidden");
    let names: Vec<&str> = said.iter().filter_map(|l| l.strip_prefix("before ")).collect();
    assert!(names.len() > 30, "{said:#?}");
    let mut wrong = Vec::new();
    for (name, before) in names.iter().filter_map(|l| l.rsplit_once(": ")) {
        let prefix = format!("after {name}: ");
        let after = said.iter().find_map(|l| l.strip_prefix(&prefix)).unwrap();
        if after == "works" || (before != "works") != not_for_this_user.contains(&name) {
            wrong.push(format!("{name}: {before}, then {after}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let posture = said.iter().find(|l| l.starts_with('{')).unwrap();
    serde_json::from_str(posture).unwrap()
}

fn what_roots_broker_could_do_before_it_cannot_do_after() {
    let corner = Corner::new(None);
    let posture = check_walls(&corner, &[]);
    assert_eq!((&posture["uid"], &posture["user_from"]), (&corner.broker().into(), &"pool".into()));
    for wall in posture["walls"].as_object().unwrap().values() {
        assert_eq!(wall["status"], "full", "{posture}");
    }
}

fn what_a_users_broker_could_do_before_it_cannot_do_after() {
    let corner = Corner::new(Some(23_456));
    let roots_alone = [
        "read /etc/shadow",
        "give a file away",
        "make a packet socket",
        "be root",
        "be in root's group",
        "set its groups",
        "enter a mount namespace",
        "mount",
        "change its root",
        // The shell is root's.
        "signal its parent",
    ];
    let posture = check_walls(&corner, &roots_alone);
    assert_eq!((&posture["uid"], &posture["user_from"]), (&23_456.into(), &"caller".into()));
    assert_eq!(posture["walls"]["user"]["status"], "partial");
}

/// What a broker does all day, on the crates that it is built from.
mod work {
    use super::*;
    use std::os::fd::AsFd;
    use std::time::Duration;
    use sublet::model::event::{Draft, EventType};
    use sublet::model::secret::Secret;
    use sublet::store::{Durability, Reader, Store};
    use sublet::sys::{memory, process, socket};

    pub fn everything() {
        // As the launcher is: made before, and heard of afterwards.
        let (ours, theirs) = socket::packet_pair().unwrap();
        let child = match process::fork().unwrap() {
            process::Forked::Child => {
                drop(ours);
                let mut buffer = [0; 16];
                let mut fds = Vec::new();
                let heard = socket::receive(&theirs, &mut buffer, |fd| fds.push(fd));
                process::exit_now(if heard == Ok(4) && fds.len() == 2 { 7 } else { 1 })
            }
            process::Forked::Parent { pid } => pid,
        };
        drop(theirs);
        let host = host();
        let settled = settled(&host).unwrap();

        let now = sublet::host::now().unwrap();
        let mut store = Store::open(&host.state_dir).unwrap();
        for _ in 0..40 {
            let draft = Draft::new(EventType::LeaseGranted, now.wall, "h");
            store.transaction(Durability::Durable, |tx| tx.append(draft)).unwrap();
            store.tidy().unwrap();
        }
        say("keeps a trail");
        let threads: Vec<_> = (0..4)
            .map(|_| {
                let state = host.state_dir.clone();
                std::thread::spawn(move || {
                    let reader = Reader::open(&state).unwrap();
                    reader.read(|view| Ok(view.events().count())).unwrap()
                })
            })
            .collect();
        assert!(threads.into_iter().all(|thread| thread.join().unwrap() == 40));
        say("has threads that read it");

        let key = settled.keys.vault.load_or_create().unwrap();
        let again = settled.keys.vault.load().unwrap();
        assert!(key.digest(b"x").0 == again.digest(b"x").0);
        let name = "s".parse().unwrap();
        let value = Secret::copy_of(b"a value").unwrap();
        let sealed = sublet::source::vault::seal(&key, &name, 1, &value).unwrap();
        let mut out = [0; 7];
        sublet::source::vault::open_into(&again, &name, 1, &sealed, &mut out).unwrap();
        assert_eq!(&out, b"a value");
        say("opens the vault");

        let flags = rustix::fs::MemfdFlags::CLOEXEC | rustix::fs::MemfdFlags::ALLOW_SEALING;
        let container = rustix::fs::memfd_create("delivery", flags).unwrap();
        rustix::fs::ftruncate(&container, 9000).unwrap();
        let mut mapping = memory::SharedMapping::new(&container, 9000).unwrap();
        mapping.bytes_mut().fill(7);
        mapping.wipe();
        rustix::fs::fcntl_add_seals(&container, rustix::fs::SealFlags::SHRINK).unwrap();
        say("fills and wipes a delivery");

        let (session, _other) = socket::packet_pair().unwrap();
        socket::send(&ours, b"open", &[session.as_fd(), container.as_fd()]).unwrap();
        let pid = rustix::process::Pid::from_raw(child).unwrap();
        let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).unwrap();
        let mut fds = [rustix::event::PollFd::new(&pidfd, rustix::event::PollFlags::IN)];
        assert_eq!(rustix::event::poll(&mut fds, None), Ok(1));
        assert_eq!(process::wait_for(child).unwrap().code(), Some(7));
        say("speaks to the launcher, and sees its end");

        assert_eq!(
            host.profile(&sublet::host::ProfileRef::Name("p".into())).unwrap().capabilities.len(),
            0
        );
        Host::load(&Places {
            config: host.config_file.clone(),
            state_dir: Some(host.state_dir.clone()),
            runtime_dir: None,
        })
        .unwrap();
        say("reads configuration and profiles");
        say(match fs::read(host.state_dir.join("trail.head")) {
            Ok(_) => "reads the trail's head".to_owned(),
            Err(e) => e.to_string(),
        });

        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(serve(settled, &host));
        drop(runtime);
        say("done");
    }

    async fn serve(settled: Settled, host: &Host) {
        use axum::routing::{get, post};
        let Settled { control, runs_dir, .. } = &settled;
        let control = control.try_clone().unwrap();
        control.set_nonblocking(true).unwrap();
        let control = tokio::net::UnixListener::from_std(control).unwrap();

        let run = runs_dir.join("run_1");
        fs::create_dir(&run).unwrap();
        let path = run.join("agent.sock");
        let agent = tokio::net::UnixListener::bind(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
        // Nobody connects to this one: it is in the way of the next broker.
        drop(UnixListener::bind(run.join("stale.sock")).unwrap());
        say(format_args!("socket {}", path.display()));

        let mut terminated =
            tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()).unwrap();
        let (stop, mut stopped) = tokio::sync::mpsc::channel::<()>(1);
        let state = host.state_dir.clone();
        let app = axum::Router::new()
            .route(
                "/count",
                get(move || async move {
                    tokio::task::spawn_blocking(move || {
                        let reader = Reader::open(&state).unwrap();
                        reader.read(|view| Ok(view.events().count())).unwrap().to_string()
                    })
                    .await
                    .unwrap()
                }),
            )
            .route(
                "/stop",
                post(move || async move {
                    stop.send(()).await.unwrap();
                    "stopping"
                }),
            );
        let both = async {
            let (one, other) = tokio::join!(
                axum::serve(control, app.clone()).into_future(),
                axum::serve(agent, app).into_future(),
            );
            one.and(other)
        };
        tokio::select! {
            ended = both => panic!("{ended:?}"),
            _ = terminated.recv() => panic!("no one sent it"),
            _ = stopped.recv() => {}
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
        say("serves on both sockets");
        fs::remove_file(&path).unwrap();
        fs::remove_file(run.join("stale.sock")).unwrap();
        fs::remove_dir(&run).unwrap();
        say("takes a run's socket away");
    }
}

/// One request, as curl(1) would make it.
fn ask(socket: &Path, request: &str) -> String {
    let mut stream = UnixStream::connect(socket).unwrap();
    let text = format!("{request} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(text.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

fn a_broker_can_do_its_work_behind_the_walls() {
    for user in [None, Some(23_456)] {
        let corner = Corner::new(user);
        let state = corner.state();
        fs::create_dir(&state).unwrap();
        let mut head = fs::OpenOptions::new();
        head.write(true).create(true).mode(0o600).open(state.join("trail.head")).unwrap();
        for path in [state.clone(), state.join("trail.head")] {
            chown(path, Some(corner.caller()), Some(corner.caller())).unwrap();
        }
        let mut running = corner.start("work");
        let mut heard = vec![running.hear()];
        while !heard.last().unwrap().starts_with("socket ") {
            heard.push(running.hear());
        }
        assert!(heard.iter().any(|h| h == "reads the trail's head"), "{heard:?}");
        let agent = PathBuf::from(heard.last().unwrap().strip_prefix("socket ").unwrap());
        let control = state.join("run/control.sock");
        assert_eq!(fs::metadata(&control).unwrap().mode() & 0o7777, 0o600);
        assert!(ask(&control, "GET /count").ends_with("40"));
        assert!(ask(&agent, "GET /count").ends_with("40"));
        assert!(ask(&agent, "POST /stop").ends_with("stopping"));
        for expected in ["serves on both sockets", "takes a run's socket away", "done"] {
            assert_eq!(running.hear(), expected);
        }
        running.end();
        for path in ["keys", "keys/vault.key", "db", "db/sublet.db", "db/sublet.db-wal", "run/runs"]
        {
            let found = fs::symlink_metadata(state.join(path)).unwrap();
            assert_eq!(found.uid(), corner.broker(), "{path}");
            assert_eq!(found.mode() & 0o077, 0, "{path}");
        }
        for path in ["", "run", "run/control.sock", "trail.head"] {
            let found = fs::symlink_metadata(state.join(path)).unwrap();
            assert_eq!(found.uid(), corner.caller(), "{path}");
        }
    }
}

/// What another process of the broker's user may look at, and another program of that user's.
fn its_memory_is_closed_to_its_own_user() {
    let corner = Corner::new(None);
    let mut running = corner.start("serve");
    running.hear();
    let broker = support::host::family(running.child.id());
    let broker = broker.last().unwrap();
    let uid = corner.broker();
    // Ends with this test, as its input does.
    let mut other = Command::new("cat");
    other.stdin(Stdio::piped()).uid(uid).gid(uid);
    let mut other = other.spawn().unwrap();
    let look = |pid: u32, file: &str| {
        let path = format!("/proc/{pid}/{file}");
        let ids = [format!("--reuid={uid}"), format!("--regid={uid}")];
        let head = ["--clear-groups", "--", "head", "-c1", &path];
        Command::new("setpriv").args(ids).args(head).output().unwrap().status.success()
    };
    for file in ["environ", "maps", "auxv"] {
        assert!(look(other.id(), file), "the control: {file}");
        assert!(!look(broker.pid, file), "{file}");
    }
    drop(other.stdin.take());
    other.wait().unwrap();
    running.end();
}

fn abort_still_aborts() {
    let corner = Corner::new(None);
    let output = corner.command("abort").output().unwrap();
    let signalled = output.status.code() == Some(128 + libc::SIGABRT)
        || output.status.signal() == Some(libc::SIGABRT);
    assert!(signalled, "{output:?}");
}

fn one_broker_at_a_time_serves_a_state() {
    for user in [None, Some(23_456)] {
        let corner = Corner::new(user);
        let mut running = corner.start("serve");
        running.hear();
        let [said] = &corner.run("settle")[..] else { panic!() };
        assert!(said.contains("another broker serves"), "{said}");
        running.end();
        assert_eq!(corner.run("settle"), ["settled, Broker"]);
    }
}

fn it_settles_without_threads() {
    let corner = Corner::new(None);
    let [said] = &corner.run("settle with a thread")[..] else { panic!() };
    assert!(said.contains("this one has 2"), "{said}");
}

fn a_stale_socket_is_replaced_and_anything_else_is_not() {
    let corner = Corner::new(None);
    assert_eq!(corner.run("settle"), ["settled, Broker"]);
    let control = corner.state().join("run/control.sock");
    assert!(control.exists());
    assert_eq!(corner.run("settle"), ["settled, Broker"]);
    #[track_caller]
    fn check(corner: &Corner, expected: &str) {
        let [said] = &corner.run("settle")[..] else { panic!() };
        assert!(said.contains(expected), "{said}");
    }
    fs::remove_file(&control).unwrap();
    let listening = UnixListener::bind(&control).unwrap();
    check(&corner, "another broker serves");
    drop(listening);
    chown(&control, Some(54_321), None).unwrap();
    check(&corner, "no socket of this user");
    fs::remove_file(&control).unwrap();
    symlink("/etc/passwd", &control).unwrap();
    check(&corner, "no socket of this user");
    fs::remove_file(&control).unwrap();
    assert_eq!(corner.run("settle"), ["settled, Broker"]);
}

fn what_root_could_be_led_by_is_refused() {
    #[track_caller]
    fn check(expected: &str, spoil: impl FnOnce(&Corner)) {
        let corner = Corner::new(None);
        assert_eq!(corner.run("settle"), ["settled, Broker"]);
        // Back to what a one-shot run of root's leaves behind, and one that a broker had.
        spoil(&corner);
        let [said] = &corner.run("settle")[..] else { panic!() };
        assert!(said.contains(expected), "{said}");
        let victim = fs::metadata(corner.path("outside/file")).unwrap();
        assert_eq!((victim.uid(), victim.mode() & 0o777), (0, 0o644));
    }
    let roots = |corner: &Corner| {
        for dir in ["db", "keys"] {
            chown(corner.state().join(dir), Some(0), Some(0)).unwrap();
        }
    };
    // The control: nothing is wrong with it.
    check("settled", roots);
    check("which sublet did not make", |corner| {
        roots(corner);
        fs::hard_link(corner.path("outside/file"), corner.state().join("db/sublet.db")).unwrap();
    });
    check("which sublet did not make", |corner| {
        roots(corner);
        symlink(corner.path("outside/file"), corner.state().join("keys/vault.key")).unwrap();
    });
    check("which sublet did not make", |corner| {
        roots(corner);
        let file = corner.state().join("db/sublet.db");
        fs::write(&file, "").unwrap();
        chown(&file, Some(54_321), None).unwrap();
    });
    check("which sublet did not make", |corner| {
        symlink(corner.path("outside/file"), corner.state().join("trail.head"))
            .and_then(|()| fs::rename(corner.state().join("trail.head"), corner.path("link")))
            .unwrap();
        fs::hard_link(corner.path("outside/file"), corner.state().join("trail.head")).unwrap();
    });
    check("opened", |corner| {
        symlink(corner.path("outside/file"), corner.state().join("trail.head")).unwrap();
    });
    check("opened", |corner| {
        fs::remove_dir(corner.state().join("db")).unwrap();
        symlink(corner.path("outside"), corner.state().join("db")).unwrap();
    });
    check("opened", |corner| {
        fs::remove_file(corner.state().join("serve.lock")).unwrap();
        symlink(corner.path("outside/file"), corner.state().join("serve.lock")).unwrap();
    });
    check("belongs to uid 54321", |corner| {
        chown(corner.state().join("db"), Some(54_321), None).unwrap();
    });
    check("belongs to uid 54321", |corner| {
        chown(corner.state(), Some(54_321), None).unwrap();
    });
    check("belongs to uid 54321", |corner| {
        chown(corner.state().join("run/runs"), Some(54_321), None).unwrap();
    });
    check("with mode 0770", |corner| {
        fs::set_permissions(corner.state(), fs::Permissions::from_mode(0o770)).unwrap();
    });
    check("with mode 0777", |corner| {
        fs::set_permissions(corner.state().join("run"), fs::Permissions::from_mode(0o777)).unwrap();
    });
    check("where others may replace it", |corner| {
        fs::set_permissions(corner.base.path(), fs::Permissions::from_mode(0o777)).unwrap();
    });
    check("where others may replace it", |corner| {
        chown(corner.base.path(), Some(54_321), None).unwrap();
    });
    // What the broker itself may have planted in what is its own stays as it is.
    check("settled", |corner| {
        symlink(corner.path("outside/file"), corner.state().join("db/sublet.db")).unwrap();
        fs::hard_link(corner.path("outside/file"), corner.state().join("keys/vault.key")).unwrap();
    });
}

fn the_configuration_names_the_user() {
    #[track_caller]
    fn check(toml: &str, expected: Result<u32, &str>) {
        let corner = Corner::new(None);
        corner.configure(toml);
        let [said] = &corner.run("settle")[..] else { panic!() };
        match expected {
            Ok(uid) => {
                assert!(said.starts_with("settled"), "{said}");
                assert_eq!(fs::metadata(corner.state().join("db")).unwrap().uid(), uid);
            }
            Err(text) => assert!(said.contains(text), "{said}"),
        }
    }
    check("", Ok(UidPool::default().broker_uid()));
    check("[host]\nuser = \"4321\"", Ok(4321));
    check("[host]\nuser = \"daemon\"", Ok(1));
    check("[host]\nuid_pool = \"50000:100\"", Ok(50_099));
    check("[host]\nuser = \"no-such-user\"", Err("no such user"));
    check("[host]\nuser = \"nobody\"", Err("nobody in particular"));
    check("[host]\nuser = \"1879048192\"", Err("gives to execs"));
}

fn what_the_broker_must_read_it_can_or_says_so() {
    let corner = Corner::new(None);
    let closed = |path: &Path, mode: u32| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    };
    #[track_caller]
    fn check(corner: &Corner, expected: &str) {
        let [said] = &corner.run("settle")[..] else { panic!() };
        assert!(said.contains(expected), "{said}");
    }
    check(&corner, "settled");
    closed(&corner.path("etc/sublet.toml"), 0o600);
    check(&corner, "policy is no secret");
    closed(&corner.path("etc/sublet.toml"), 0o644);
    closed(&corner.path("etc/profiles"), 0o700);
    check(&corner, "policy is no secret");
    closed(&corner.path("etc/profiles"), 0o755);
    closed(corner.base.path(), 0o700);
    check(&corner, "cannot use");
    closed(corner.base.path(), 0o711);
    check(&corner, "settled");
}

fn systemd_hands_over_the_socket() {
    needs("systemd-socket-activate", "systemd");
    #[track_caller]
    fn check(more: &[&str], expected: &str) {
        let corner = Corner::new(None);
        let socket = corner.path("handed.sock");
        let mut command = Command::new("systemd-socket-activate");
        command.arg("-l").arg(&socket).args(more);
        if expected.starts_with('2') {
            command.arg("-l").arg(corner.path("second.sock"));
        }
        for name in ["SUBLET_TEST_ROLE=settle", "PATH=/usr/bin:/bin"] {
            command.arg("-E").arg(name);
        }
        for (name, path) in [("CONFIG", corner.path("etc/sublet.toml")), ("STATE", corner.state())]
        {
            command.arg("-E").arg(format!("SUBLET_TEST_{name}={}", path.display()));
        }
        // Fresh namespaces as for all; the pid stays the one that systemd names.
        command.args(["unshare", "--mount", "--propagation", "private", "--"]).arg(this_program());
        command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        let command = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        // It is started by whoever connects first.
        support::host::eventually("someone listens", || {
            if more.contains(&"--datagram") {
                let knock = std::os::unix::net::UnixDatagram::unbound().unwrap();
                knock.send_to(b"x", &socket).is_ok()
            } else {
                UnixStream::connect(&socket).is_ok()
            }
        });
        let mut said = String::new();
        child.stdout.take().unwrap().read_to_string(&mut said).unwrap();
        child.wait().unwrap();
        assert!(said.contains(expected), "{said}");
    }
    check(&[], "settled, Manager");
    check(&["--datagram"], "one listening Unix stream socket");
    check(&[], "2 descriptors");
}

fn systemd_is_told() {
    let corner = Corner::new(None);
    let path = corner.path("notify");
    let heard = std::os::unix::net::UnixDatagram::bind(&path).unwrap();
    let mut command = corner.command("serve");
    command.env("NOTIFY_SOCKET", &path);
    let mut running = Running::start(command);
    running.hear();
    let next = || {
        let mut buffer = [0; 64];
        let length = heard.recv(&mut buffer).unwrap();
        String::from_utf8_lossy(&buffer[..length]).into_owned()
    };
    assert_eq!(next(), "READY=1\n");
    running.end();
    assert_eq!(next(), "STOPPING=1\n");
}

/// systemd's directory of credentials is root's.
fn a_credential_of_roots_is_the_brokers_key() {
    let corner = Corner::new(None);
    let credentials = corner.path("credentials");
    fs::create_dir(&credentials).unwrap();
    fs::set_permissions(&credentials, fs::Permissions::from_mode(0o700)).unwrap();
    let key = credentials.join(sublet::source::vault::CREDENTIAL);
    fs::write(&key, [7; 32]).unwrap();
    fs::set_permissions(&key, fs::Permissions::from_mode(0o400)).unwrap();
    let load = |with: bool| {
        let mut command = corner.command("tell the key");
        if with {
            command.env("CREDENTIALS_DIRECTORY", &credentials);
        }
        let output = command.output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        said.split_once(MARK).unwrap_or_else(|| panic!("{output:?}")).1.to_owned()
    };
    assert!(load(false).starts_with("the vault has no key"));
    assert!(load(true).starts_with("a key"));
    assert!(!corner.state().join("keys/vault.key").exists());
    // Root's own command opens it before it becomes the broker's user.
    let mut set = Command::new(support::world::binary());
    set.env_clear().env("CREDENTIALS_DIRECTORY", &credentials).current_dir("/");
    set.arg("--config").arg(corner.path("etc/sublet.toml"));
    set.arg("--state-dir").arg(corner.state()).args(["secret", "set", "s"]);
    support::world::finish(set, b"a value", None).ok();
    assert!(!corner.state().join("keys/vault.key").exists());
    assert_eq!(fs::metadata(corner.state().join("db/sublet.db")).unwrap().uid(), corner.broker());
}

const VALUE: &[u8] = b"correct-horse-battery-staple-4711";

/// Root's world, as a one-shot call leaves it, then served once.
fn served_world() -> (World, Corner, String) {
    let world = World::host();
    let profile = world.leasing_with(VALUE, "default", "redact = false");
    let mut corner = Corner::new(None);
    corner.link_to(&world);
    assert_eq!(corner.run("settle"), ["settled, Broker"]);
    (world, corner, profile)
}

/// Whom each file of the state belongs to, but for what only its owner could have changed.
#[track_caller]
fn check_owners(world: &World, corner: &Corner) {
    for dir in ["db", "keys"] {
        let dir = world.state().join(dir);
        let files: Vec<_> = fs::read_dir(&dir).unwrap().map(|e| e.unwrap().path()).collect();
        assert!(!files.is_empty());
        for path in files.iter().chain([&dir]) {
            assert_eq!(fs::metadata(path).unwrap().uid(), corner.broker(), "{}", path.display());
        }
    }
    assert_eq!(fs::metadata(world.state()).unwrap().uid(), 0);
}

fn roots_one_shot_state_is_taken_over_with_its_secrets() {
    let (world, corner, profile) = served_world();
    check_owners(&world, &corner);
    world
        .leased_sh(&profile, &["env"], "printf %s \"$TOKEN\"")
        .ok()
        .prints("correct-horse-battery-staple-4711");
    world.call(&["audit", "verify"]).ok();
    check_owners(&world, &corner);
    assert_eq!(corner.run("settle"), ["settled, Broker"]);
}

fn roots_commands_leave_the_state_its_brokers() {
    let (world, corner, profile) = served_world();
    world.set_secret("s", b"another value, rotated");
    world.configure(&format!(
        "{}{}",
        support::world::vault_secret("s", "test.use@svc.test"),
        support::world::vault_secret("t", "test.use@svc.test")
    ));
    world.set_secret("t", b"a second one");
    world.call(&["secret", "list"]).ok();
    for channel in ["memfd", "file", "env"] {
        let outcome = world.leased_sh(&profile, &[channel], "true").ok();
        // The report is root's own file, in a directory of root's.
        assert!(outcome.report.is_some());
    }
    world
        .run(&["--explain", "--profile", &profile, "--lease", "test.use@svc.test", "--", "true"])
        .ok();
    world.call(&["secret", "rm", "t"]).ok();
    world.call(&["audit", "list"]).ok();
    world.call(&["audit", "verify"]).ok();
    check_owners(&world, &corner);
    let head = fs::metadata(world.state().join("trail.head")).unwrap();
    assert_eq!((head.uid(), head.mode() & 0o777), (0, 0o644));
}

fn a_planted_link_does_not_lead_root() {
    let (world, corner, profile) = served_world();
    let victim = world.path("victim");
    fs::write(&victim, "root's").unwrap();
    let db = world.state().join("db");
    for planted in ["sublet.db-wal", "sublet.db-shm", "owners"] {
        for hard in [false, true] {
            let (path, aside) = (db.join(planted), db.join("aside"));
            fs::rename(&path, &aside).unwrap();
            match hard {
                true => fs::hard_link(&victim, &path).unwrap(),
                false => symlink(&victim, &path).unwrap(),
            }
            let set = world.call_with(&["secret", "rotate", "s"], b"x");
            let run = world.leased_sh(&profile, &["env"], "true");
            let list = world.call(&["audit", "list"]);
            for outcome in [&set, &run, &list] {
                assert_ne!(outcome.status, Some(0), "{planted}, hard: {hard}\n{outcome}");
            }
            assert_eq!(fs::read(&victim).unwrap(), b"root's");
            assert_eq!(fs::metadata(&victim).unwrap().uid(), 0);
            fs::remove_file(&path).unwrap();
            fs::rename(&aside, &path).unwrap();
        }
    }
    world.call_with(&["secret", "rotate", "s"], b"y").ok();
    check_owners(&world, &corner);
}

fn a_state_in_a_strangers_directory_is_not_entered() {
    let (world, corner, profile) = served_world();
    let list = || world.call(&["audit", "list"]);
    let run = || world.leased_sh(&profile, &["env"], "true");
    #[track_caller]
    fn is_refused(outcome: &support::Outcome) {
        assert_ne!(outcome.status, Some(0));
        assert!(outcome.err().contains("refused to use the state"), "{outcome}");
    }
    chown(world.state(), Some(54_321), None).unwrap();
    is_refused(&list());
    is_refused(&run());
    // All of it an ordinary user's: they may be read by root as that user, and its launcher would write.
    chown(world.state(), Some(corner.broker()), None).unwrap();
    list().ok();
    is_refused(&run());
    chown(world.state(), Some(0), None).unwrap();
    list().ok();
    run().ok();
}
