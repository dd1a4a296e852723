//! Warm sandboxes, through the real launcher: a second exec of a run gets one that stood ready, sees
//! nothing of the first, stands behind the same walls, and gets none that no longer fits.
//!
//! Not under the test harness: the launcher is forked here, which only a process of one thread may do.
#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use sublet::delivery::fill;
use sublet::host::{Places, ProfileRef, Trust};
use sublet::launcher::client::{Launcher, Session};
use sublet::launcher::wire::{
    Ahead, DeliverySpec, Ending, FilledSpec, Notice, Order, Prepare, Spec,
};
use sublet::model::id::{ExecId, RunId};
use sublet::model::name::Channel;
use sublet::sys::clock;

/// With a capability, so that there is a place for file deliveries.
const PROFILE: &str = r#"extends = "default"
[[capability]]
name = "test.use"
channels = ["memfd", "file", "env"]
command = [["**"]]
[[capability.audience]]
protocol = "https"
host = "svc.test"
secret = "s"
variable = "TOKEN"
"#;

/// The workspace's owner, unknown to passwd.
const OWNER: u32 = 12_345;
const PATIENCE: Duration = Duration::from_secs(60);

fn main() {
    if !rustix::process::geteuid().is_root() {
        println!("the launcher is root's: run as root; skipped");
        return;
    }
    let wanted: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let tests: [(&str, fn()); 14] = [
        (
            "the_next_exec_of_a_run_gets_what_stood_ready",
            the_next_exec_of_a_run_gets_what_stood_ready,
        ),
        ("nothing_of_one_exec_is_there_for_the_next", nothing_of_one_exec_is_there_for_the_next),
        ("a_warm_sandbox_has_every_wall", a_warm_sandbox_has_every_wall),
        ("deliveries_reach_a_warm_exec_and_are_wiped", deliveries_reach_a_warm_exec_and_are_wiped),
        ("another_run_gets_none_of_it", another_run_gets_none_of_it),
        ("a_changed_profile_makes_another_sandbox", a_changed_profile_makes_another_sandbox),
        ("a_swapped_workspace_makes_another_sandbox", a_swapped_workspace_makes_another_sandbox),
        ("one_that_died_is_made_anew", one_that_died_is_made_anew),
        ("one_that_is_not_used_leaves_no_trace", one_that_is_not_used_leaves_no_trace),
        (
            "a_user_that_was_ready_owns_the_workspace_of_now",
            a_user_that_was_ready_owns_the_workspace_of_now,
        ),
        (
            "a_child_that_knows_who_it_is_serves_nobody_else",
            a_child_that_knows_who_it_is_serves_nobody_else,
        ),
        ("nothing_is_left_of_a_ground_for_another", nothing_is_left_of_a_ground_for_another),
        ("what_was_built_ahead_is_used_or_given_back", what_was_built_ahead_is_used_or_given_back),
        (
            "what_was_revoked_before_the_start_never_starts",
            what_was_revoked_before_the_start_never_starts,
        ),
    ];
    for (name, test) in tests {
        if wanted.is_empty() || wanted.iter().any(|w| name.contains(w.as_str())) {
            println!("test {name} ...");
            test();
        }
    }
    println!("test result: ok.");
}

struct Place {
    dir: tempfile::TempDir,
    launcher: Option<Launcher>,
    run: RunId,
    next: u32,
}

struct Done {
    stdout: String,
    status: i32,
    /// Children of the launcher while the command ran.
    during: BTreeSet<i32>,
    wiped: Vec<(u64, bool)>,
}

impl Place {
    /// A launcher that keeps up to this many sandboxes warm.
    fn new(warm: usize) -> Self {
        let dir = tempfile::Builder::new().prefix("sublet-warm-").tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        fs::create_dir_all(dir.path().join("etc/profiles")).unwrap();
        let mut place = Self { dir, launcher: None, run: RunId::fresh(), next: 0 };
        place.make_workspace();
        place.profile(PROFILE);
        let config =
            format!("[host]\nworkspaces = [\"{}\"]\nwarm = {warm}\n", place.dir.path().display());
        fs::write(place.dir.path().join("etc/sublet.toml"), config).unwrap();
        let places = Places {
            config: Some(place.dir.path().join("etc/sublet.toml")),
            state_dir: Some(place.dir.path().join("state")),
            runtime_dir: None,
        };
        place.launcher = Some(Launcher::fork(&places, Trust::Host).unwrap());
        place
    }

    fn workspace(&self) -> PathBuf {
        self.dir.path().join("work")
    }

    fn make_workspace(&self) {
        fs::create_dir(self.workspace()).unwrap();
        chown(self.workspace(), Some(OWNER), Some(OWNER)).unwrap();
    }

    fn profile(&self, text: &str) {
        fs::write(self.dir.path().join("etc/profiles/warm.toml"), text).unwrap();
    }

    fn launcher(&self) -> &Launcher {
        self.launcher.as_ref().unwrap()
    }

    fn children(&self) -> BTreeSet<i32> {
        children_of(self.launcher().pid())
    }

    /// The one that stands ready, when it does.
    #[track_caller]
    fn ready(&self) -> i32 {
        assert!(comes_true(|| self.children().len() == 1), "{:?}", self.children());
        *self.children().first().unwrap()
    }

    fn sh(&mut self, script: &str) -> Done {
        self.run(script, &[], &[])
    }

    fn order(&self, script: &str, deliveries: &[DeliverySpec]) -> Prepare {
        Prepare {
            exec: self.next,
            exec_id: ExecId::fresh(),
            run_id: self.run.clone(),
            profile: ProfileRef::Name("warm".into()),
            workspace: self.workspace(),
            argv: ["/bin/sh", "-c", &format!("read go; {script}")]
                .map(|a| a.as_bytes().to_vec())
                .to_vec(),
            program: None,
            environment: Vec::new(),
            without_network: false,
            terminal: None,
            deliveries: deliveries.to_vec(),
            home: None,
            into: sublet::launcher::into::InContainer::default(),
            cpu: u32::MAX,
            agent: false,
        }
    }

    fn run(&mut self, script: &str, deliveries: &[DeliverySpec], values: &[&[u8]]) -> Done {
        self.next += 1;
        let prepare = self.order(script, deliveries);
        self.run_in(self.launcher().root(), prepare, values)
    }

    fn run_in(&self, session: &Session, prepare: Prepare, values: &[&[u8]]) -> Done {
        let exec = prepare.exec;
        session.order(&Order::Prepare(Box::new(prepare))).unwrap();
        let either = |n: &Notice| matches!(n, Notice::Prepared { .. } | Notice::Refused { .. });
        let mut fds = match session.notice_of(either).unwrap() {
            (Notice::Prepared { .. }, fds) => fds,
            (other, _) => panic!("{other:?}"),
        };
        let containers = fds.split_off(3);
        let held: Vec<_> = containers
            .into_iter()
            .zip(values)
            .map(|(fd, value)| fill::write(fd, &[value]).unwrap())
            .collect();
        let stdout = fds.remove(1);
        let mut stdin = File::from(fds.remove(0));
        let expires = clock::boottime() + PATIENCE;
        let deliveries = values
            .iter()
            .map(|v| FilledSpec { bytes: v.len() as u32, expires, kill: false })
            .collect();
        session.order(&Order::Start { exec, deliveries, deadline: None }).unwrap();
        let either = |n: &Notice| matches!(n, Notice::Started { .. } | Notice::Refused { .. });
        match session.notice_of(either).unwrap() {
            (Notice::Started { .. }, _) => {}
            (other, _) => panic!("{other:?}"),
        }
        let during = self.children();
        // It waits until it has been looked at.
        stdin.write_all(b"go\n").unwrap();
        drop(stdin);
        let stdout = read(stdout);
        let either = |n: &Notice| matches!(n, Notice::Ended { .. } | Notice::Refused { .. });
        let (status, wiped) = match session.notice_of(either).unwrap() {
            (Notice::Ended { ending: Ending::Command { wait_status }, deliveries, .. }, _) => {
                (wait_status, deliveries)
            }
            (other, _) => panic!("{other:?}"),
        };
        drop(held);
        Done { stdout, status, during, wiped }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let Some(launcher) = self.launcher.take() else { return };
        let pid = Pid::from_raw(launcher.pid()).unwrap();
        drop(launcher);
        rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty()).ok();
    }
}

fn read(fd: OwnedFd) -> String {
    let mut text = String::new();
    File::from(fd).read_to_string(&mut text).unwrap();
    text
}

/// Every process whose parent is this one.
fn children_of(parent: i32) -> BTreeSet<i32> {
    fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            let fields = stat.rsplit(')').next().unwrap_or("").split_ascii_whitespace();
            fields.clone().nth(1).and_then(|f| f.parse::<i32>().ok()) == Some(parent)
        })
        .collect()
}

fn comes_true(mut condition: impl FnMut() -> bool) -> bool {
    let until = Instant::now() + PATIENCE;
    while Instant::now() < until {
        if condition() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    false
}

fn is_alive(pid: i32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

fn the_next_exec_of_a_run_gets_what_stood_ready() {
    let mut place = Place::new(2);
    let first = place.sh("echo one");
    assert_eq!((first.stdout.as_str(), first.status), ("one\n", 0));
    let ready = place.ready();
    assert!(!first.during.contains(&ready));

    let second = place.sh("echo two; exit 3");
    assert_eq!((second.stdout.as_str(), second.status), ("two\n", 3 << 8));
    assert_eq!(second.during, BTreeSet::from([ready]), "a sandbox was built for it");
    // It was used once; the next one is another.
    assert_ne!(place.ready(), ready);
    assert!(!is_alive(ready));

    // The twin: a launcher that is to keep none has a child ahead that knows of no run, in an empty root, and
    // builds the rest when it is asked for.
    let mut cold = Place::new(0);
    cold.sh("true");
    let seed = cold.ready();
    let holds = |what: &str| fs::read_to_string(format!("/proc/{seed}/{what}")).unwrap();
    assert!(comes_true(|| holds("mountinfo").lines().count() == 1), "{}", holds("mountinfo"));
    assert_eq!(holds("uid_map"), "");
    let second = cold.sh("echo two");
    assert_eq!(second.stdout, "two\n");
    // The next one's is planted meanwhile.
    assert!(second.during.contains(&seed), "{:?}", second.during);
    assert!(!is_alive(seed));
}

fn nothing_of_one_exec_is_there_for_the_next() {
    let mut place = Place::new(1);
    let look = "echo $(ls -A /tmp /dev/shm $HOME | grep -v -e : -e ^$ -e ^home$ -e ^sublet-warm); \
                set -- /proc/[0-9]*; echo $#; cat /proc/self/uid_map | xargs; umask; ulimit -n; hostname";
    let leave = "touch /tmp/a /dev/shm/b $HOME/c; umask 0; ulimit -n 20; (sleep 1000 >&- 2>&-) &";
    let first = place.sh(&format!("{look}; {leave}")).stdout;
    place.ready();
    let second = place.sh(&format!("{look}; {leave}")).stdout;
    place.ready();
    let third = place.sh(look).stdout;
    let [first, second, third] = [&first, &second, &third].map(|t| t.lines().collect::<Vec<_>>());
    for lines in [&first, &second, &third] {
        assert_eq!(lines[0], "", "files were left: {lines:?}");
        assert_eq!(lines[1], first[1], "processes");
        assert_eq!(lines[3..], first[3..]);
    }
    for (one, other) in [(&first, &second), (&second, &third), (&first, &third)] {
        assert_ne!(one[2], other[2], "uids");
    }
}

fn a_warm_sandbox_has_every_wall() {
    let mut place = Place::new(1);
    let look = "grep -E '^(Cap|NoNewPrivs|Seccomp)' /proc/self/status; ls /proc/self/fd | xargs; \
                cat /run/.landlock 2>&1; unshare -U true 2>&1; cat /proc/net/dev | grep -c :; \
                ls /; echo $$; env | sort; touch /etc/x 2>&1; cat /proc/1/environ 2>&1; \
                test -r /proc/1/maps && cat /proc/1/maps 2>&1 | wc -c; tr '\\0' ' ' < /proc/1/cmdline; \
                kill -0 1 2>&1; grep -c . /proc/self/mountinfo; id";
    let cold = place.sh(look);
    let ready = place.ready();
    let warm = place.sh(look);
    assert_eq!(warm.during, BTreeSet::from([ready]));
    assert_eq!((&warm.stdout, warm.status), (&cold.stdout, cold.status));
    assert!(warm.stdout.contains("CapEff:\t0000000000000000"), "{}", warm.stdout);
    assert!(warm.stdout.contains("CapBnd:\t0000000000000000"), "{}", warm.stdout);
    assert!(warm.stdout.contains("NoNewPrivs:\t1"), "{}", warm.stdout);
    assert!(warm.stdout.contains("/run/.landlock: Permission denied"), "{}", warm.stdout);
}

fn deliveries_reach_a_warm_exec_and_are_wiped() {
    let mut place = Place::new(1);
    let spec = |channel, name: &str| DeliverySpec {
        channel,
        variable: name.parse().unwrap(),
        git: None,
        token: None,
        endpoint: false,
    };
    let specs = [spec(Channel::Memfd, "A"), spec(Channel::Env, "B"), spec(Channel::File, "C")];
    let values: [&[u8]; 3] = [b"value-a", b"B=value-b\0", b"value-c"];
    let show =
        "cat /proc/self/fd/$A_FD; echo; echo $B; cat $C_FILE; echo; ls -l /proc/1/fd 2>&1 | wc -l";
    let cold = place.run(show, &specs, &values);
    assert!(cold.stdout.starts_with("value-a\nvalue-b\nvalue-c\n"), "{}", cold.stdout);
    let ready = place.ready();
    let warm = place.run(show, &specs, &values);
    assert_eq!(warm.during, BTreeSet::from([ready]));
    assert_eq!(warm.stdout, cold.stdout);
    assert_eq!(warm.wiped, [(7, true), (10, true), (7, true)]);
    // The next one has none of it.
    place.ready();
    let none = place.sh("echo $A_FD$B$C_FILE; ls /run/sublet/secrets; ls /proc/self/fd | xargs");
    assert_eq!(none.stdout, "\n0 1 2 3\n");
}

fn another_run_gets_none_of_it() {
    let mut place = Place::new(2);
    place.sh("true");
    let ready = place.ready();
    place.run = RunId::fresh();
    let other = place.sh("echo other");
    assert_eq!((other.stdout.as_str(), other.during.len()), ("other\n", 2));
    assert!(other.during.contains(&ready) && is_alive(ready));
}

fn a_changed_profile_makes_another_sandbox() {
    let mut place = Place::new(1);
    assert_eq!(place.sh("echo $WHICH").stdout, "\n");
    let ready = place.ready();
    place.profile("extends = \"default\"\n[environment]\nset = { WHICH = \"new\" }\n");
    let after = place.sh("echo $WHICH");
    assert_eq!(after.stdout, "new\n");
    assert!(!after.during.contains(&ready) && !is_alive(ready));
    // And its like is kept from now on.
    let ready = place.ready();
    assert_eq!(place.sh("echo $WHICH").during, BTreeSet::from([ready]));
}

fn a_swapped_workspace_makes_another_sandbox() {
    let mut place = Place::new(1);
    place.sh("echo old > mark");
    let ready = place.ready();
    fs::rename(place.workspace(), place.dir.path().join("away")).unwrap();
    place.make_workspace();
    let after = place.sh("ls -A; pwd");
    assert_eq!(after.stdout, format!("{}\n", place.workspace().display()));
    assert!(!after.during.contains(&ready) && !is_alive(ready));
}

fn one_that_died_is_made_anew() {
    let mut place = Place::new(1);
    place.sh("true");
    let ready = place.ready();
    kill_process(Pid::from_raw(ready).unwrap(), Signal::KILL).unwrap();
    let stat = || fs::read_to_string(format!("/proc/{ready}/stat")).unwrap();
    assert!(comes_true(|| stat().contains(") Z ")));
    let after = place.sh("echo still");
    assert_eq!(after.stdout, "still\n");
    assert!(!after.during.contains(&ready));
}

fn one_that_is_not_used_leaves_no_trace() {
    for by_force in [false, true] {
        let mut place = Place::new(1);
        place.sh("true");
        let ready = place.ready();
        let cgroup = fs::read_to_string(format!("/proc/{ready}/cgroup")).unwrap();
        let cgroup = cgroup.lines().find_map(|l| l.strip_prefix("0::")).unwrap().to_owned();
        let directories: Vec<PathBuf> = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"]
            .iter()
            .map(|root| PathBuf::from(format!("{root}{cgroup}")))
            .filter(|path| path.exists())
            .collect();
        assert_eq!(directories.len(), 1, "{cgroup}");
        if by_force {
            let launcher = Pid::from_raw(place.launcher().pid()).unwrap();
            kill_process(launcher, Signal::KILL).unwrap();
        }
        drop(place);
        assert!(comes_true(|| !is_alive(ready)), "it outlived its launcher");
        // A launcher that was killed removes nothing; the next one sweeps.
        assert!(by_force || !directories[0].exists());
        if by_force {
            let gone = || fs::remove_dir(&directories[0]).is_ok() || !directories[0].exists();
            assert!(comes_true(gone), "something lives in its cgroup");
        }
    }
}

/// Behind an exec the next one's uid is taken, and root's workspace mapped to it.
fn a_user_that_was_ready_owns_the_workspace_of_now() {
    let mut place = Place::new(0);
    let mut seen = BTreeSet::new();
    for (turn, owner) in [0, 0, OWNER, 0, 7, 7, 0].into_iter().enumerate() {
        chown(place.workspace(), Some(owner), Some(owner)).unwrap();
        let done = place
            .sh(&format!("touch {turn}; stat -c %u {turn}; id -u; tr -s ' ' </proc/self/uid_map"));
        let lines: Vec<&str> = done.stdout.lines().map(str::trim).collect();
        let [inside, own, map] = lines[..] else { panic!("{}", done.stdout) };
        assert_eq!((done.status, inside), (0, own));
        assert_eq!(own == owner.to_string(), owner != 0, "root is nobody inside");
        let file = fs::metadata(place.workspace().join(turn.to_string())).unwrap();
        assert_eq!((file.uid(), file.gid()), (owner, owner));
        let outside = map.split(' ').nth(1).unwrap().to_owned();
        assert!(seen.insert(outside), "{map}: an earlier exec had this uid");
        // The quiet after an exec, in which that is done.
        place.ready();
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Two execs in a row were the same user inside: so will the next be, most likely.
fn a_child_that_knows_who_it_is_serves_nobody_else() {
    let mut place = Place::new(0);
    let is_settled = |child: i32| {
        fs::read_to_string(format!("/proc/{child}/uid_map")).is_ok_and(|map| !map.is_empty())
    };
    place.sh("true");
    let first = place.ready();
    std::thread::sleep(Duration::from_millis(50));
    assert!(!is_settled(first), "after one exec nobody knows the next");
    place.sh("true");
    assert!(comes_true(|| is_settled(place.ready())));
    let ready = place.ready();
    let done = place.sh("id -u");
    assert_eq!((done.stdout, done.during.contains(&ready)), (format!("{OWNER}\n"), true));
    assert!(comes_true(|| is_settled(place.ready())));
    let ready = place.ready();
    chown(place.workspace(), Some(7), Some(7)).unwrap();
    let done = place.sh("id -u; touch mine");
    assert_eq!((done.status, &*done.stdout), (0, "7\n"));
    assert!(!done.during.contains(&ready) && !is_alive(ready));
    assert_eq!(fs::metadata(place.workspace().join("mine")).unwrap().uid(), 7);
}

/// What the next exec sees is what it sees in a launcher that ran nothing before.
fn nothing_is_left_of_a_ground_for_another() {
    const SEEN: &str =
        "find / -xdev -printf '%p %y %m %l\\n' 2>/dev/null | sort; cat /etc/passwd; df -B1 /tmp";
    let other = PROFILE.replace(
        "[[capability]]",
        "[filesystem]\nhome = \"/srv/other\"\ntmp = \"8M\"\nread_only = [\"/usr\", \"-/bin\", \
         \"-/lib\", \"-/lib64\"]\n[[capability]]",
    );
    let mut fresh = Place::new(0);
    fresh.profile(&other);
    let expected = fresh.sh(SEEN);
    let place_of = |place: &Place, text: &str| text.replace(place.dir.path().to_str().unwrap(), "");
    let expected_seen = place_of(&fresh, &expected.stdout);
    assert!(expected_seen.contains("/srv/other d"), "{expected_seen}");
    let mut place = Place::new(0);
    let before = place.sh(SEEN);
    assert_ne!(place_of(&place, &before.stdout), expected_seen);
    // Its ground is there, before anyone asks.
    let ready = place.ready();
    let passwd = PathBuf::from(format!("/proc/{ready}/root/etc/passwd"));
    assert!(comes_true(|| fs::read_to_string(&passwd).is_ok_and(|text| text.contains("agent"))));
    place.profile(&other);
    let after = place.sh(SEEN);
    assert!(after.during.contains(&ready), "the seed is used, and its ground is not");
    assert_eq!(place_of(&place, &after.stdout), expected_seen);
}

/// For an exec that was still being decided on.
fn what_was_built_ahead_is_used_or_given_back() {
    enum Then {
        TheSame,
        Another,
        AnotherProfile,
        Nothing,
    }
    for then in [Then::TheSame, Then::Another, Then::AnotherProfile, Then::Nothing] {
        let mut place = Place::new(0);
        // The seed that it is built on; soon there is another.
        let built = place.ready();
        place.next += 1;
        let mut order = place.order("echo it ran", &[]);
        let session = place.launcher().door().unwrap().open().unwrap();
        let ahead = Ahead { spec: Spec::of(&order), cpu: u32::MAX };
        session.order(&Order::Ahead(Box::new(ahead))).unwrap();
        let bound = PathBuf::from(format!("/proc/{built}/root/usr/bin"));
        assert!(comes_true(|| bound.exists()), "nothing was built");
        match then {
            Then::Nothing => drop(session),
            Then::TheSame => {
                let done = place.run_in(&session, order, &[]);
                assert_eq!((done.status, &*done.stdout), (0, "it ran\n"));
                assert!(done.during.contains(&built));
            }
            Then::Another | Then::AnotherProfile => {
                match then {
                    Then::Another => order.run_id = RunId::fresh(),
                    _ => place.profile(&PROFILE.replacen(
                        "[[cap",
                        "[limits]\nprocesses = 99\n[[cap",
                        1,
                    )),
                }
                let done = place.run_in(&session, order, &[]);
                assert_eq!((done.status, &*done.stdout), (0, "it ran\n"));
                assert!(!done.during.contains(&built));
            }
        }
        assert!(comes_true(|| !is_alive(built)), "it was not given back");
    }
}

/// The broker has filled it, and another of its threads takes the lease back before this one orders the start.
fn what_was_revoked_before_the_start_never_starts() {
    for revoked in [false, true] {
        let mut place = Place::new(0);
        place.next += 1;
        let exec = place.next;
        let memfd = DeliverySpec {
            channel: Channel::Memfd,
            variable: "A".parse().unwrap(),
            git: None,
            token: None,
            endpoint: false,
        };
        let prepare = place.order("touch ran", &[memfd]);
        let session = place.launcher().root();
        session.order(&Order::Prepare(Box::new(prepare))).unwrap();
        let (_, mut fds) = session.notice_of(|n| matches!(n, Notice::Prepared { .. })).unwrap();
        let _held = fill::write(fds.remove(3), &[b"value-a"]).unwrap();
        if revoked {
            session.order(&Order::Revoke { exec, delivery: 0 }).unwrap();
        }
        let expires = clock::boottime() + PATIENCE;
        let deliveries = vec![FilledSpec { bytes: 7, expires, kill: false }];
        session.order(&Order::Start { exec, deliveries, deadline: None }).unwrap();
        File::from(fds.remove(0)).write_all(b"go\n").ok();
        let is_over = |n: &Notice| matches!(n, Notice::Ended { .. } | Notice::Refused { .. });
        let (over, _) = session.notice_of(is_over).unwrap();
        assert_eq!(matches!(over, Notice::Refused { .. }), revoked, "{over:?}");
        assert_eq!(place.workspace().join("ran").exists(), !revoked);
    }
}
