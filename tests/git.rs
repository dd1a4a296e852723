//! A real `git push` over HTTP to a real repository behind a server that demands the token, and what a
//! hostile repository, remote or command line tries in order to get the token elsewhere.
#![forbid(unsafe_code)]

mod support;

use std::fs;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use serial_test::file_serial;
use support::git_server::{GitServer, bare_repository};
use support::leak::{self, Accomplice};
use support::probe::{Bare, bare};
use support::world::vault_secret;
use support::{ORDINARY, Outcome, World, host};

const TOKEN: &str = "ghs-token-that-only-git-may-use-99";
const USER: &str = "x-access-token";

/// A workspace with one commit, a server with an empty repository, and a profile for pushing to it.
struct Forge {
    world: World,
    server: GitServer,
    repositories: std::path::PathBuf,
    profile: String,
}

impl Forge {
    fn new(world: World, more: &str) -> Self {
        Self::with_command(world, r#"[["git", "push", "**"]]"#, more)
    }

    fn with_command(world: World, command: &str, more: &str) -> Self {
        let repositories = world.path("repositories");
        fs::create_dir(&repositories).unwrap();
        for name in ["team/repo.git", "team/other.git"] {
            bare_repository(&repositories.join(name));
        }
        let server = GitServer::start(&repositories, USER, TOKEN);
        world.configure(&vault_secret("bot", &format!("repo.push@{}", server.host())));
        world.set_secret("bot", TOKEN.as_bytes());
        // What an older kernel's landlock lacks on the host's network, as the message there suggests.
        let lacks = |since: u32| sublet::sys::landlock::abi_version() < since;
        let waived = [("network", lacks(4)), ("scope", lacks(6))];
        let waive: Vec<_> =
            waived.iter().filter(|(_, lacks)| *lacks).map(|(name, _)| name).collect();
        let profile = world.profile(
            "push",
            &format!(
                "extends = \"git-push\"\n[landlock]\nwaive = {waive:?}\n[network]\nconnect_ports = [{}]\n[[capability]]\nname = \"repo.push\"\nchannels = [\"git\"]\n\
                 ttl = \"10m\"\nuses = 5\ncommand = {command}\n{more}\n[[capability.audience]]\n\
                 protocol = \"http\"\nhost = \"{}\"\npath = \"team/repo.git\"\nsecret = \"bot\"\n\
                 username = \"{USER}\"\n",
                server.port,
                server.host()
            ),
        );
        let forge = Self { world, server, repositories, profile };
        forge.workspace_git(
            "git init -q -b main . && git config user.name t && git config user.email t@t && \
             echo one >file && git add file && git commit -qm one",
        );
        forge
    }

    /// Ordinary git work of the owner, outside any sandbox.
    fn workspace_git(&self, script: &str) {
        bare(&self.world, Bare::OwnProc, ORDINARY, script).ok();
    }

    fn leased(&self, uses: u32, command: &[&str]) -> Outcome {
        let lease = format!("repo.push@{},uses={uses}", self.server.host());
        let mut args = vec!["--profile", &self.profile, "--lease", &lease, "--timeout", "60", "--"];
        args.extend(command);
        self.world.run(&args)
    }

    fn push(&self, path: &str) -> Outcome {
        self.leased(1, &["git", "push", &self.server.url(path), "main"])
    }

    fn head_of(&self, repository: &str) -> Option<String> {
        fs::read_to_string(self.repositories.join(repository).join("refs/heads/main")).ok()
    }

    #[track_caller]
    fn token_is_nowhere(&self) {
        self.world.holds_nowhere(TOKEN.as_bytes());
        use base64::Engine;
        let encoded = base64::engine::general_purpose::STANDARD.encode(format!("{USER}:{TOKEN}"));
        self.world.holds_nowhere(encoded.as_bytes());
    }
}

#[test]
#[file_serial]
fn a_push_goes_through_and_leaves_the_token_nowhere() {
    for world in World::each() {
        let forge = Forge::new(world, "");
        let seen_elsewhere = AtomicBool::new(false);
        let done = AtomicBool::new(false);
        let outcome = std::thread::scope(|scope| {
            // Looks at every process of the machine as long as the push goes on.
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    if !host::processes_showing(TOKEN.as_bytes(), &[]).is_empty() {
                        seen_elsewhere.store(true, Ordering::Relaxed);
                    }
                }
            });
            let outcome = forge.push("team/repo.git");
            done.store(true, Ordering::Relaxed);
            outcome
        });
        let outcome = outcome.ok().never_says(TOKEN);
        assert!(!seen_elsewhere.load(Ordering::Relaxed), "a process showed the token\n{outcome}");
        assert!(forge.head_of("team/repo.git").is_some(), "nothing arrived\n{outcome}");
        assert!(forge.server.credentials().contains(&format!("{USER}:{TOKEN}")));
        forge.token_is_nowhere();
        let types = forge.world.event_types();
        assert!(types.iter().any(|t| t == "lease.consumed"), "{types:?}");
        // The twin: without the lease the server refuses.
        let url = forge.server.url("team/repo.git");
        forge
            .world
            .run(&["--profile", &forge.profile, "--", "git", "push", &url, "main"])
            .exits(128);
    }
}

#[test]
#[file_serial]
fn a_configured_remote_works_too() {
    let forge = Forge::new(World::host(), "");
    let url = forge.server.url("team/repo.git");
    forge.workspace_git(&format!("git remote add origin {url}"));
    forge.leased(1, &["git", "push", "origin", "main"]).ok();
    assert!(forge.head_of("team/repo.git").is_some());
    let config = fs::read_to_string(forge.world.workspace.join(".git/config")).unwrap();
    assert!(!config.contains("credential") && !config.contains(TOKEN), "{config}");
}

#[test]
#[file_serial]
fn a_pre_push_hook_does_not_run() {
    let forge = Forge::new(World::host(), "");
    let hook = "#!/bin/sh\ntouch hook-ran\nenv >>hook-ran\n";
    forge.world.file(".git/hooks/pre-push", hook, 0o755);
    forge.push("team/repo.git").ok();
    let ran = forge.world.workspace.join("hook-ran");
    assert!(!ran.exists(), "the hook ran under the lease");
    // The control: git by itself runs it.
    forge.workspace_git("git init -q --bare ../work/side.git && git push -q ./side.git main");
    assert!(ran.exists());
}

#[test]
#[file_serial]
fn a_credential_helper_of_the_repository_gets_nothing() {
    let forge = Forge::new(World::host(), "");
    let host = forge.server.host();
    let hostile = format!(
        "git config credential.helper 'store --file=leaked' && \
         git config credential.http://{host}.helper 'store --file=leaked' && \
         git config credential.http://{host}/team/repo.git.helper '!cat >leaked-too; true' && \
         git config core.askPass /bin/false"
    );
    forge.workspace_git(&hostile);
    forge.push("team/repo.git").ok();
    for name in ["leaked", "leaked-too"] {
        let path = forge.world.workspace.join(name);
        assert!(!fs::read_to_string(&path).unwrap_or_default().contains(TOKEN), "{name}");
    }
    forge.token_is_nowhere();
    // The control: git by itself stores what an approved credential was.
    let approve = format!(
        "printf 'protocol=http\\nhost={host}\\npath=team/repo.git\\nusername={USER}\\npassword=control\\n\\n' | git credential approve"
    );
    forge.workspace_git(&approve);
    let leaked = fs::read_to_string(forge.world.workspace.join("leaked")).unwrap();
    assert!(leaked.contains("control"), "{leaked}");
}

#[test]
#[file_serial]
fn another_path_host_or_protocol_gets_no_credential() {
    for world in World::each() {
        let forge = Forge::new(world, "");
        let before = forge.server.credentials().len();
        let outcome = forge.push("team/other.git");
        assert_ne!(outcome.status, Some(0), "{outcome}");
        assert_eq!(forge.head_of("team/other.git"), None);
        // The same server under another name is another host.
        let alias = format!("http://localhost:{}/team/repo.git", forge.server.port);
        assert_ne!(forge.leased(1, &["git", "push", &alias, "main"]).status, Some(0));
        // A user in the URL that is not ours.
        let named = format!("http://someone@{}/team/repo.git", forge.server.host());
        assert_ne!(forge.leased(1, &["git", "push", &named, "main"]).status, Some(0));
        let shown: Vec<String> = forge.server.credentials().split_off(before);
        assert!(!shown.iter().any(|c| c.contains(TOKEN)), "{shown:?}");
        // The allow twin.
        forge.push("team/repo.git").ok();
    }
}

/// Asks the helper as git would, and prints its answer.
fn fill(input: &str) -> String {
    format!("printf '{input}' | git credential fill; echo \"status $?\"")
}

/// Anything that git and the shell may do with the lease; output as it is.
fn open_forge(world: World) -> Forge {
    Forge::with_command(world, r#"[["**"]]"#, "redact = false")
}

#[test]
#[file_serial]
fn one_get_a_use_and_the_next_is_refused_by_name() {
    for world in World::each() {
        let forge = open_forge(world);
        let ask = fill(&format!(
            "protocol=http\\nhost={}\\npath=team/repo.git\\n\\n",
            forge.server.host()
        ));
        let twice = format!("{ask}; {ask}");
        let once = forge.leased(1, &["sh", "-c", &twice]).ok();
        assert_eq!(once.out().matches(&format!("password={TOKEN}")).count(), 1, "{once}");
        assert!(once.out().contains("status 0") && once.out().contains("status 128"), "{once}");
        let told = once.err().to_lowercase();
        assert!(told.contains("sublet") && told.contains("use"), "refused by name\n{once}");
        // The twin: two uses, two answers.
        let both = forge.leased(2, &["sh", "-c", &twice]).ok();
        assert_eq!(both.out().matches(&format!("password={TOKEN}")).count(), 2, "{both}");
        forge.token_is_nowhere();
    }
}

#[test]
#[file_serial]
fn the_helper_checks_protocol_host_path_and_username() {
    let forge = open_forge(World::host());
    let host = forge.server.host();
    #[track_caller]
    fn check(forge: &Forge, input: &str, gets: bool) {
        let outcome = forge.leased(1, &["sh", "-c", &fill(input)]);
        assert_eq!(outcome.out().contains(TOKEN), gets, "{input}\n{outcome}");
    }
    check(&forge, &format!("protocol=http\\nhost={host}\\npath=team/repo.git\\n\\n"), true);
    check(&forge, &format!("url=http://{host}/team/repo.git\\n\\n"), true);
    check(
        &forge,
        &format!("protocol=http\\nhost={host}\\npath=team/repo.git\\nusername={USER}\\n\\n"),
        true,
    );
    for wrong in [
        format!("protocol=https\\nhost={host}\\npath=team/repo.git\\n\\n"),
        "protocol=http\\nhost=evil.test\\npath=team/repo.git\\n\\n".to_owned(),
        format!("protocol=http\\nhost={host}.evil.test\\npath=team/repo.git\\n\\n"),
        format!("protocol=http\\nhost={host}\\npath=team/other.git\\n\\n"),
        format!("protocol=http\\nhost={host}\\npath=team/repo.git/../other.git\\n\\n"),
        format!("protocol=http\\nhost={host}\\npath=team/repo.git\\nusername=root\\n\\n"),
        format!("protocol=http\\nhost={host}\\n\\n"),
    ] {
        check(&forge, &wrong, false);
    }
}

/// The classes of CVE-2020-5260, CVE-2020-11008 and CVE-2024-52006: line ends and blanks smuggled into
/// what the helper reads. Git refuses most itself, so the helper is spoken to directly.
#[test]
#[file_serial]
fn smuggled_line_ends_and_empty_hosts_get_nothing() {
    let forge = open_forge(World::host());
    let host = forge.server.host();
    let ask = |input: &str| {
        let script = format!("printf '{input}' | /run/sublet/bin/sublet git-credential get; true");
        forge.leased(1, &["sh", "-c", &script])
    };
    let good = ask(&format!("protocol=http\\nhost={host}\\npath=team/repo.git\\n\\n")).ok();
    assert!(good.out().contains(TOKEN), "the allow twin\n{good}");
    for smuggled in [
        format!("protocol=http\\nhost=evil.test\\rhost={host}\\npath=team/repo.git\\n\\n"),
        format!("protocol=http\\nhost={host}\\r\\npath=team/repo.git\\r\\n\\n"),
        format!("protocol=http\\nhost={host}\\000\\npath=team/repo.git\\n\\n"),
        "protocol=http\\nhost=\\npath=team/repo.git\\n\\n".to_owned(),
        "protocol=\\nhost=\\n\\n".to_owned(),
        format!("protocol=http\\nhost=evil.test\\nhost={host}\\npath=team/repo.git\\n\\n"),
        format!("host={host}\\npath=team/repo.git\\n\\n"),
        "\\n".to_owned(),
        "protocol".to_owned(),
    ] {
        let outcome = ask(&smuggled);
        assert!(!outcome.out().contains(TOKEN), "{smuggled:?}\n{outcome}");
    }
}

#[test]
#[file_serial]
fn store_and_erase_are_swallowed() {
    let forge = open_forge(World::host());
    let host = forge.server.host();
    let input =
        format!("protocol=http\\nhost={host}\\npath=team/repo.git\\nusername=u\\npassword=p\\n\\n");
    let script = format!(
        "for w in store erase; do printf '{input}' | /run/sublet/bin/sublet git-credential $w || exit 1; done"
    );
    forge.leased(1, &["sh", "-c", &script]).ok().prints("");
}

/// The answer itself, passed out of the exec: nobody writes to it, and it ends with the exec.
#[test]
#[file_serial]
fn what_git_was_given_is_wiped_under_whoever_kept_it() {
    for world in World::each() {
        let accomplice = Accomplice::at(&world, "holder.sock");
        let go = world.workspace.join("go");
        let forge = open_forge(world);
        let script = format!(
            "import os, socket, time\n\
             def to(path):\n    s = socket.socket(socket.AF_UNIX)\n    s.connect(path)\n    return s\n\
             s = to('/run/sublet/git.sock')\n\
             s.send(b'get\\nprotocol=http\\nhost={}\\npath=team/repo.git\\ncapability[]=sublet-memfd\\n\\n')\n\
             said, fds, _, _ = socket.recv_fds(s, 4096, 4)\n\
             print(said)\n\
             try:\n    os.open(f'/proc/self/fd/{{fds[0]}}', os.O_RDWR)\n    print('writable')\n\
             except OSError:\n    pass\n\
             socket.send_fds(to('holder.sock'), [b'x'], fds[:1])\n\
             while not os.path.exists('go'):\n    time.sleep(0.01)",
            forge.server.host()
        );
        std::thread::scope(|scope| {
            let exec = scope.spawn(|| forge.leased(1, &["python3", "-c", &script]));
            let kept = accomplice.take();
            let expected = format!("username={USER}\npassword={TOKEN}\n");
            assert!(leak::shows(&kept, expected.as_bytes()), "while its exec lives");
            fs::write(&go, "").unwrap();
            exec.join().unwrap().ok().prints("b'sublet-memfd\\n'\n");
            assert!(leak::is_wiped(&kept), "after its exec");
        });
    }
}

#[test]
#[file_serial]
fn another_exec_has_no_helper() {
    let forge = open_forge(World::host());
    let ask =
        fill(&format!("protocol=http\\nhost={}\\npath=team/repo.git\\n\\n", forge.server.host()));
    let outcome = forge.world.run(&["--profile", &forge.profile, "--", "sh", "-c", &ask]);
    assert!(!outcome.out().contains(TOKEN), "{outcome}");
    let socket = "test -e /run/sublet/git.sock && echo there; true";
    forge.world.run(&["--profile", &forge.profile, "--", "sh", "-c", socket]).ok().prints("");
}

#[test]
#[file_serial]
fn the_environment_cannot_redirect_git() {
    let forge = Forge::new(World::host(), "");
    let url = forge.server.url("team/repo.git");
    let lease = format!("repo.push@{}", forge.server.host());
    for pair in [
        "GIT_SSL_NO_VERIFY=1",
        "GIT_ASKPASS=/bin/echo",
        "GIT_CONFIG_COUNT=0",
        "GIT_TRACE_CURL=1",
        "https_proxy=http://evil.test",
        "HTTP_PROXY=http://evil.test",
        "ALL_PROXY=socks5://evil.test",
        "SSL_CERT_FILE=/tmp/evil.pem",
        "CURL_CA_BUNDLE=/tmp/evil.pem",
    ] {
        let name = pair.split('=').next().unwrap();
        forge
            .world
            .run(&[
                "--profile",
                &forge.profile,
                "--lease",
                &lease,
                "--env",
                pair,
                "--",
                "git",
                "push",
                &url,
                "main",
            ])
            .fails_naming(&[name]);
    }
}

/// The server itself works with any client that knows the token: the failures above are sublet's doing.
#[test]
#[file_serial]
fn the_control_pushes_with_the_token_in_hand() {
    let forge = Forge::new(World::host(), "");
    let url = format!("http://{USER}:{TOKEN}@{}/team/other.git", forge.server.host());
    let mut push = Command::new("git");
    forge.world.dress(&mut push);
    use std::os::unix::process::CommandExt;
    push.uid(ORDINARY).gid(ORDINARY).args(["push", "-q", &url, "main"]);
    support::world::finish(push, b"", None).ok();
    assert!(forge.head_of("team/other.git").is_some());
}
