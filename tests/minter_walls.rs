//! What code that took a minter over could still do: each attempt works before the walls stand, and fails
//! behind them. Every case is this program again, in a process of one thread, in pid and mount namespaces of
//! its own, as a minter is when the launcher starts it. No harness: libtest's processes have two threads.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io;
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::process::{Command, ExitCode};
use std::time::Duration;

use sublet::config::source::oauth::{ClientAuth, Grant, OAuth};
use sublet::config::{MintKind, Minted, Settings};
use sublet::minter::walls;
use sublet::sys::{ids, memory, process};

/// A uid that nothing else on the machine has.
const UID: u32 = 1_900_000_555;

fn settings(port: u16) -> Settings {
    let oauth = OAuth {
        token_url: format!("http://127.0.0.1:{port}/token").parse().unwrap(),
        revocation_url: None,
        client_id: "a".into(),
        client_secret: None,
        client_auth: ClientAuth::None,
        grant: Grant::ClientCredentials,
        scope: None,
        audience: vec![],
        resource: vec![],
        authorization_details: None,
    };
    let timeout = Duration::from_secs(10);
    let source = Minted { timeout, ca_file: None, kind: MintKind::OAuth(oauth) };
    Settings { source, without_landlock: false }
}

/// What hostile code would try, by name.
type Attempt<'a> = (&'static str, Box<dyn Fn() -> io::Result<()> + 'a>);

struct Outside {
    own: u16,
    other: u16,
    abstract_name: SocketAddr,
    socket: std::path::PathBuf,
    secret: std::path::PathBuf,
}

fn attempts(outside: &Outside) -> Vec<Attempt<'_>> {
    fn boxed<'a, T>(name: &'static str, act: impl Fn() -> io::Result<T> + 'a) -> Attempt<'a> {
        (name, Box::new(move || act().map(drop)))
    }
    vec![
        boxed("read a file of the host that everyone may", || File::open("/etc/passwd")),
        boxed("read a file of its own user's", || File::open(&outside.secret)),
        boxed("list a directory", || std::fs::read_dir("/etc")),
        boxed("write a file", || File::create(outside.secret.with_extension("new"))),
        boxed("read its environment's file", || File::open("/proc/self/environ")),
        boxed("connect to another TCP port", || TcpStream::connect(("127.0.0.1", outside.other))),
        boxed("listen on TCP", || TcpListener::bind("127.0.0.1:0")),
        boxed("bind a datagram socket", || UdpSocket::bind("127.0.0.1:0")),
        boxed("reach a Unix socket", || UnixStream::connect(&outside.socket)),
        boxed("reach an abstract socket", || UnixStream::connect_addr(&outside.abstract_name)),
        boxed("start a program", || Command::new("/bin/true").status()),
        boxed("start a thread", || std::thread::Builder::new().spawn(|| {})),
        boxed("signal a process", || {
            Ok(rustix::process::test_kill_process(rustix::process::getpid())?)
        }),
        boxed("enter a namespace of its own", || Ok(process::unshare(CLONE_NEWUTS)?)),
    ]
}

/// clone(2).
const CLONE_NEWUTS: u64 = 0x0400_0000;

/// This program, as a minter: `before` the walls all must work, `behind` them nothing.
fn probe(behind: bool, own: u16, other: u16, socket: &str, name: &str, secret: &str) -> ExitCode {
    let outside = Outside {
        own,
        other,
        abstract_name: SocketAddr::from_abstract_name(name).unwrap(),
        socket: socket.into(),
        secret: secret.into(),
    };
    if behind {
        ids::become_user(UID, UID, true).unwrap();
        ids::drop_bounding_set().unwrap();
        ids::drop_all_capabilities().unwrap();
        process::set_no_new_privileges().unwrap();
        memory::set_dumpable(false).unwrap();
        if let Err(failure) = walls::raise(&settings(outside.own)) {
            eprintln!("the walls do not stand: {failure}");
            return ExitCode::FAILURE;
        }
    }
    let mut wrong = 0;
    for (name, attempt) in attempts(&outside) {
        let outcome = attempt();
        if outcome.is_ok() == behind {
            wrong += 1;
            eprintln!("{}: {name}: {outcome:?}", if behind { "behind" } else { "before" });
        }
    }
    // Its own work it can do, before and behind.
    if let Err(e) = TcpStream::connect(("127.0.0.1", outside.own)) {
        wrong += 1;
        eprintln!("it cannot reach its source: {e}");
    }
    if let Err(e) = File::open("/etc/hosts").and_then(|mut f| io::copy(&mut f, &mut io::sink())) {
        wrong += 1;
        eprintln!("it cannot resolve names: {e}");
    }
    if wrong == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().collect();
    match args.get(1).map(String::as_str) {
        Some(which @ ("--before" | "--behind")) => {
            let port = |index: usize| args[index].parse().unwrap();
            return probe(which == "--behind", port(2), port(3), &args[4], &args[5], &args[6]);
        }
        // `cargo test -- --list` and filters: there is one test.
        Some("--list") => {
            println!("minter_walls: test");
            return ExitCode::SUCCESS;
        }
        _ => {}
    }
    assert!(rustix::process::geteuid().is_root(), "run the tests as root");
    let place = tempfile::Builder::new().prefix("sublet-minter-").tempdir().unwrap();
    let mode = |path: &std::path::Path, mode| {
        std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap();
    };
    mode(place.path(), 0o777);
    let secret = place.path().join("secret");
    std::fs::write(&secret, "x").unwrap();
    std::os::unix::fs::chown(&secret, Some(UID), Some(UID)).unwrap();
    let socket = place.path().join("socket");
    let _unix = UnixListener::bind(&socket).unwrap();
    mode(&socket, 0o777);
    let name = format!("sublet-minter-test-{}", std::process::id());
    let _named = UnixListener::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
    let (own, other) =
        (TcpListener::bind("127.0.0.1:0").unwrap(), TcpListener::bind("127.0.0.1:0").unwrap());
    let port = |listener: &TcpListener| listener.local_addr().unwrap().port().to_string();
    println!("running 2 tests");
    let mut failed = 0;
    for which in ["--before", "--behind"] {
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "--propagation", "private", "--pid", "--fork", "--mount-proc"])
            .arg(std::env::current_exe().unwrap())
            .args([which, &port(&own), &port(&other)])
            .args([&socket, &std::path::PathBuf::from(&name), &secret]);
        let ended = command.output().unwrap();
        let ok = ended.status.success();
        println!("test {which} ... {}", if ok { "ok" } else { "FAILED" });
        if !ok {
            failed += 1;
            println!("{}", String::from_utf8_lossy(&ended.stderr));
        }
    }
    let result = if failed == 0 { "ok" } else { "FAILED" };
    println!("test result: {result}. {} passed; {failed} failed", 2 - failed);
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
