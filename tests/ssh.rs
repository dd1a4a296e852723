//! The `ssh` channel: certificates of a CA, offered by an agent's socket, against a real sshd: `git push` over
//! SSH, and what the socket does not do.
#![forbid(unsafe_code)]

mod support;

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::Value;
use support::host::eventually;
use support::world::finish;
use support::{ORDINARY, Outcome, World, needs};

fn run(command: &mut Command) -> Outcome {
    let taken = std::mem::replace(command, Command::new("true"));
    finish(taken, b"", None)
}

/// sshd on loopback, with a user `git` and a passwd of its own, in a mount namespace of which nothing comes
/// back. Trusts one CA and nothing else.
struct Sshd {
    child: Child,
    port: u16,
    log: PathBuf,
    host_key: String,
    repository: PathBuf,
}

impl Drop for Sshd {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("sshd said:\n{}", self.log());
        }
        // Ours and not yet reaped.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Sshd {
    fn start(world: &World) -> Self {
        needs("unshare", "util-linux");
        needs("git", "git");
        assert!(
            Path::new("/usr/sbin/sshd").exists(),
            "this test needs: apt-get install openssh-server"
        );
        let at = |name: &str| world.path(name);
        keygen(&at("host_key"));
        keygen(&at("ca"));
        let repository = at("repo.git");
        run(Command::new("git").args(["init", "-q", "--bare", "-b", "main"]).arg(&repository)).ok();
        for path in std::iter::once(repository.clone()).chain(below(&repository)) {
            chown(path, Some(ORDINARY), Some(ORDINARY)).unwrap();
        }
        let passwd = fs::read_to_string("/etc/passwd").unwrap();
        let git =
            format!("git:x:{ORDINARY}:{ORDINARY}::{}:/bin/sh\n", world.path("home").display());
        fs::write(at("passwd"), passwd + &git).unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let config = format!(
            "Port {port}\nListenAddress 127.0.0.1\nHostKey {}\nTrustedUserCAKeys {}\nAuthorizedKeysFile none\n\
             PasswordAuthentication no\nKbdInteractiveAuthentication no\nUsePAM no\nPidFile none\n\
             StrictModes no\nLogLevel VERBOSE\n",
            at("host_key").display(),
            at("ca.pub").display()
        );
        fs::write(at("sshd_config"), config).unwrap();
        let log = at("sshd.log");
        let script = format!(
            "mount -t tmpfs tmpfs /run && mkdir /run/sshd && mount --bind {} /etc/passwd && \
             exec /usr/sbin/sshd -D -e -f {}",
            at("passwd").display(),
            at("sshd_config").display()
        );
        let mut sshd = Command::new("unshare");
        sshd.args(["--mount", "--propagation", "private", "sh", "-ec", &script]);
        let stderr = fs::File::create(&log).unwrap();
        let child = sshd.stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr).spawn().unwrap();
        let host_key = fs::read_to_string(at("host_key.pub")).unwrap();
        let sshd = Self { child, port, log, host_key, repository };
        eventually("sshd listens", || TcpStream::connect(("127.0.0.1", port)).is_ok());
        sshd
    }

    fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    fn head(&self) -> String {
        let mut show = Command::new("git");
        show.args(["-c", "safe.directory=*", "--git-dir"]).arg(&self.repository);
        run(show.args(["log", "--format=%s", "-1", "main"])).line()
    }
}

fn keygen(path: &Path) {
    needs("ssh-keygen", "openssh-client");
    run(Command::new("ssh-keygen")
        .args(["-q", "-t", "ed25519", "-N", "", "-C", "test", "-f"])
        .arg(path))
    .ok();
}

fn below(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).unwrap().flatten() {
        found.push(entry.path());
        if entry.path().is_dir() {
            found.extend(below(&entry.path()));
        }
    }
    found
}

/// The configuration of the CA and of what it signs; `more` goes to the source.
fn configure(world: &World, sshd: &Sshd, more: &str) -> String {
    let force = format!("git-receive-pack '{}'", sshd.repository.display());
    world.configure(&format!(
        "[secrets.ca]\nsource = \"vault\"\nallow = []\n[secrets.s]\nsource = \"ssh-ca\"\nca = \"ca\"\n\
         principals = [\"git\"]\nforce_command = \"{force}\"\nsource_address = \"127.0.0.0/8\"\n\
         allow = [\"test.use@svc.test\"]\n{more}\n"
    ));
    world.set_secret("ca", &fs::read(world.path("ca")).unwrap());
    let ssh = "ssh -F /dev/null -o UserKnownHostsFile=known_hosts -o BatchMode=yes";
    world.file("known_hosts", format!("[127.0.0.1]:{} {}", sshd.port, sshd.host_key), 0o644);
    let profile = format!(
        "extends = \"default\"\n[network]\nmode = \"host\"\n[environment.set]\nGIT_SSH_COMMAND = \"{ssh}\"\n\
         SSH = \"{ssh} -p {port} git@127.0.0.1\"\nURL = \"ssh://git@127.0.0.1:{port}{repo}\"\n\
         GIT_AUTHOR_NAME = \"a\"\nGIT_AUTHOR_EMAIL = \"a@b\"\nGIT_COMMITTER_NAME = \"a\"\n\
         GIT_COMMITTER_EMAIL = \"a@b\"\n\
         [[capability]]\nname = \"test.use\"\nchannels = [\"ssh\", \"env\"]\nttl = \"10m\"\nuses = 5\n\
         command = [[\"**\"]]\n[[capability.audience]]\nhost = \"svc.test\"\nsecret = \"s\"\n\
         variable = \"TOKEN\"\n",
        port = sshd.port,
        repo = sshd.repository.display(),
    );
    world.profile("ssh", &profile)
}

const COMMIT: &str = "git init -q -b main . 2>/dev/null; date +%N > file; git add file; ";

fn push(message: &str) -> String {
    format!("{COMMIT} git commit -qm {message} && git push -q \"$URL\" main")
}

#[test]
fn git_pushes_over_ssh_with_a_certificate_that_nobody_sees_the_key_of() {
    let world = World::host();
    let sshd = Sshd::start(&world);
    let profile = configure(&world, &sshd, "");
    // The control: without a lease the server lets nobody in.
    let refused = world.sh(&profile, &push("control"));
    assert_ne!(refused.status, Some(0), "{refused}");
    let outcome = world.leased_sh(&profile, &["ssh"], &push("one")).ok();
    assert_eq!(sshd.head(), "one");

    // One id joins the lease, the server's log and the trail.
    let lease = outcome.report()["leases"][0]["lease_id"].as_str().unwrap().to_owned();
    assert_eq!(outcome.report()["leases"][0]["delivery"]["variable"], "SSH_AUTH_SOCK");
    let log = sshd.log();
    assert!(log.contains(&format!("ID {lease} (serial ")), "{log}");
    let trail = world.trail();
    let issued = trail.iter().find(|e| e["type"] == "mint.issued" && e["lease_id"] == *lease);
    let issued = issued.unwrap_or_else(|| panic!("{trail:#?}"));
    let serial = issued["detail"]["far_id"].as_str().unwrap().to_owned();
    assert!(log.contains(&format!("({serial})")), "{serial}\n{log}");
    assert_eq!(issued["detail"]["issued_to"], "git");
    assert!(issued["detail"]["expires_at"].is_string());

    // A use is a signature: one login, and not a second one.
    let twice = format!("{} && {}", push("two"), push("three"));
    let outcome = world.leased_sh(&profile, &["ssh"], &twice);
    assert_ne!(outcome.status, Some(0), "{outcome}");
    assert_eq!(sshd.head(), "two");
    let refused: Vec<Value> =
        world.trail().into_iter().filter(|e| e["type"] == "lease.denied").collect();
    assert_eq!(refused.last().unwrap()["reason"], "uses_exhausted");
    let lease = "--lease=test.use@svc.test,channel=ssh,uses=2";
    let twice = format!("{} && {}", push("four"), push("five"));
    world.run(&["--profile", &profile, lease, "--", "sh", "-c", &twice]).ok();
    assert_eq!(sshd.head(), "five");

    // The server runs what the certificate says, whatever is asked for.
    let other = world.leased_sh(&profile, &["ssh"], "echo 0000 | $SSH id");
    other.never_says("uid=");
    let seed = fs::read_to_string(world.path("ca")).unwrap();
    fs::remove_file(world.path("ca")).unwrap();
    world.holds_nowhere(seed.lines().nth(2).unwrap().as_bytes());
}

#[test]
fn the_agent_shows_a_certificate_and_signs_logins_alone() {
    let world = World::host();
    let sshd = Sshd::start(&world);
    let profile = configure(&world, &sshd, "validity = \"2m\"");
    let script = "ssh-add -L > listed.pub && ssh-keygen -L -f listed.pub; stat -c %U:%a $SSH_AUTH_SOCK; \
                  ls -A $(dirname $SSH_AUTH_SOCK)";
    let told = world.leased_sh(&profile, &["ssh"], script).ok();
    let lease = told.report()["leases"][0]["lease_id"].as_str().unwrap();
    for line in [
        "Type: ssh-ed25519-cert-v01@openssh.com user certificate",
        &format!("Key ID: \"{lease}\""),
        "Principals: \n                git\n",
        &format!("force-command git-receive-pack '{}'", sshd.repository.display()),
        "source-address 127.0.0.0/8",
        "Extensions: (none)",
        "agent:600",
    ] {
        assert!(told.out().contains(line), "{line}\n{told}");
    }

    // Not a file, not a commit; nothing is added, removed or locked.
    world.file("message", "signed?", 0o644);
    let sign = "ssh-keygen -Y sign -n file -f listed.pub message 2>/dev/null && echo signed; \
                ssh-add -D 2>/dev/null && echo removed; ssh-keygen -q -t ed25519 -N '' -f fresh; \
                ssh-add fresh 2>/dev/null && echo added; rm -f fresh fresh.pub; \
                ssh-add -L > listed.pub && echo listed";
    let tried =
        world.leased_sh(&profile, &["ssh"], &format!("ssh-add -L > listed.pub; {sign}")).ok();
    assert_eq!(tried.out(), "listed\n", "{tried}");
    // The control: an agent of OpenSSH's own does all of it.
    let control = format!(
        "eval $(ssh-agent) >/dev/null; ssh-keygen -q -t ed25519 -N '' -f one; ssh-add -q one; \
         rm one; cp one.pub listed.pub; {sign}; kill $SSH_AGENT_PID"
    );
    let control = world.sh(&profile, &control);
    for word in ["signed", "removed", "added", "listed"] {
        assert!(control.out().lines().any(|line| line == word), "{word}\n{control}");
    }
    // What is no message ends the connection, and nothing else.
    let noise = "import os, socket\n\
                 for noise in (b'\\xff' * 64, b'\\0\\0\\0\\0', b'\\0\\0\\0\\1', b'\\0' * 70000):\n \
                 s = socket.socket(socket.AF_UNIX); s.connect(os.environ['SSH_AUTH_SOCK'])\n \
                 s.sendall(noise[:40000])\n";
    world.file("noise.py", noise, 0o644);
    let after = "python3 noise.py 2>/dev/null; ssh-add -l >/dev/null && echo still";
    world.leased_sh(&profile, &["ssh"], after).ok().prints("still\n");
}

#[test]
fn with_host_keys_only_a_login_to_that_server_is_signed() {
    let world = World::host();
    let sshd = Sshd::start(&world);
    let bound = format!("host_keys = [\"{}\"]", sshd.host_key.trim());
    let profile = configure(&world, &sshd, &bound);
    world.leased_sh(&profile, &["ssh"], &push("bound")).ok();
    assert_eq!(sshd.head(), "bound");
    // A client that does not bind its login to the server.
    let unbound = "$SSH -o PubkeyAuthentication=unbound id";
    let refused = world.leased_sh(&profile, &["ssh"], unbound);
    assert_eq!(refused.status, Some(255), "{refused}");
    // Another server: here the same one, and another key is named.
    keygen(&world.path("other"));
    let other = fs::read_to_string(world.path("other.pub")).unwrap();
    let profile = configure(&world, &sshd, &format!("host_keys = [\"{}\"]", other.trim()));
    let refused = world.leased_sh(&profile, &["ssh"], &push("elsewhere"));
    assert_ne!(refused.status, Some(0), "{refused}");
    assert_eq!(sshd.head(), "bound");
    let denied: Vec<Value> =
        world.trail().into_iter().filter(|e| e["type"] == "lease.denied").collect();
    assert!(denied.last().unwrap()["detail"]["message"].as_str().unwrap().contains("another key"));
}

#[test]
fn an_ssh_identity_is_for_its_channel_alone_and_needs_a_ca() {
    let world = World::host();
    let sshd = Sshd::start(&world);
    let profile = configure(&world, &sshd, "");
    world.leased_sh(&profile, &["env"], "true").denied("channel_mismatch");
    // The CA's key itself is for no lease, and what is none is refused without a word of it.
    world.set_secret("ca", b"-----BEGIN OPENSSH PRIVATE KEY-----\nhunter2\n");
    let denied = world.leased_sh(&profile, &["ssh"], "true").denied("source_unavailable");
    denied.never_says("hunter2");
    for (bad, at) in [
        ("principals = []", "principals"),
        ("principals = [\"a,b\"]", "principals"),
        ("extensions = [\"root\"]", "extension"),
        ("validity = \"1d\"", "validity"),
        ("host_keys = [\"ssh-ed25519 AAAA\"]", "host_keys"),
        ("url = \"x\"", "url"),
    ] {
        let principals =
            if bad.starts_with("principals") { "" } else { "principals = [\"git\"]\n" };
        world.configure(&format!(
            "[secrets.ca]\nsource = \"vault\"\nallow = []\n[secrets.s]\nsource = \"ssh-ca\"\nca = \"ca\"\n\
             allow = [\"test.use@svc.test\"]\n{principals}{bad}\n"
        ));
        let refused = world.leased_sh(&profile, &["ssh"], "true").exits(125);
        assert!(refused.err().contains(at), "{bad}\n{refused}");
    }
}

#[test]
fn a_developer_pushes_too() {
    // sshd itself needs root, for its user; who leases need not be.
    support::needs_root();
    let world = World::developer();
    let sshd = Sshd::start(&world);
    let profile = configure(&world, &sshd, "");
    let mode = fs::metadata(world.path("ca")).unwrap().permissions().mode();
    assert_eq!(mode & 0o077, 0);
    world.leased_sh(&profile, &["ssh"], &push("mine")).ok();
    assert_eq!(sshd.head(), "mine");
}
