//! Faults: a broker under load until the power goes, and what is there at the next boot; a full disk,
//! steps of the clock, no process ids, no descriptors, no entropy.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::residue::{WORK, configure, sublet};
use super::say::Line;
use super::tools::{self, Ended};

const NAMES: [&str; 2] = ["one", "two"];
const DISK: &str = "/mnt/disk";
const STATE: &str = "/mnt/disk/sublet";
const AUDIENCE: &str = "127.0.0.1:8088";
const USES: usize = 3;

pub fn run(line: &mut Line, words: &[&str]) {
    if let Err(why) = configure(&NAMES, "") {
        return line.check_with(false, "the place for it is made", &why);
    }
    match words.first().copied().unwrap_or_default() {
        "load" => load(line, words.get(1).copied().unwrap_or_default()),
        "after" => after(line, words.get(1).copied().unwrap_or_default()),
        "trouble" => {
            full_disk(line);
            clock_steps(line);
            scarce(line, "process ids", &[1, 2, 3, 4, 5, 6, 8, 10, 15, 30], pids);
            scarce(line, "descriptors", &[3, 4, 6, 9, 14, 20, 28, 40, 60, 90, 150], descriptors);
        }
        "entropy" => entropy(line),
        other => line.check(false, &format!("there is a fault {other}")),
    }
}

/// The disk is found whole by the kernel's own journal, and the state is on it.
fn mounted() -> Result<(), String> {
    let script = format!(
        "mkdir -p {DISK} && mount -t ext4 /dev/vdb {DISK} && {{ test -d {STATE} || cp -a /vm/state {STATE}; }} &&
         mkdir -p /vm/profiles && cp /vm/profile.toml /vm/profiles/load.toml && sync"
    );
    let ended = tools::sh(&script);
    if ended.ok() { Ok(()) } else { Err(ended.both()) }
}

fn on_disk(words: &[&str]) -> Ended {
    let mut command = Command::new("/vm/sublet");
    command.args(["--config", "/vm/sublet.toml", "--state-dir", STATE]);
    tools::run(command.args(words))
}

fn broker() -> Result<Child, String> {
    let log = fs::File::create("/run/serve.log").map_err(|e| e.to_string())?;
    let again = log.try_clone().map_err(|e| e.to_string())?;
    let mut serve = Command::new("/vm/sublet");
    serve.args([
        "--config",
        "/vm/sublet.toml",
        "--state-dir",
        STATE,
        "serve",
        "--runtime-dir",
        "/run/sublet",
    ]);
    let child =
        serve.stdin(Stdio::null()).stdout(log).stderr(again).spawn().map_err(|e| e.to_string())?;
    let up = tools::eventually(Duration::from_secs(40), || {
        tools::run(Command::new("/vm/sublet").args(["runs", "list"])).ok()
    });
    if up { Ok(child) } else { Err(tools::read("/run/serve.log")) }
}

fn started_run(name: &str) -> Ended {
    let mut start = Command::new("/vm/sublet");
    start.args(["runs", "start", "--agent", "a", "--principal", "root", "--profile", "load"]);
    tools::run(start.args(["--workspace", WORK, "--run", name]))
}

fn requested(run: &str) -> Ended {
    let mut request = Command::new("/vm/sublet");
    request.args(["lease", "request", "--run", run]);
    tools::run(request.arg(format!("use.one@{AUDIENCE},channel=memfd,uses={USES}")))
}

fn used(run: &str, lease: &str) -> Ended {
    let mut exec = Command::new("/vm/sublet");
    exec.args(["exec", "--run", run, "--lease", lease, "--"]);
    tools::run(exec.args(["sh", "-c", "test $(wc -c <&\"$TOKEN_FD\") = 44"]))
}

/// Until the power goes. What is said here was acknowledged to a client.
fn load(line: &mut Line, round: &str) {
    let begun = mounted().and_then(|()| broker());
    if let Err(why) = &begun {
        return line.check_with(false, "the load begins", why);
    }
    let run = format!("round-{round}");
    let start = started_run(&run);
    line.check_with(start.ok(), "a run is there", &start.both());
    let stop = AtomicBool::new(false);
    let line = Mutex::new(line);
    std::thread::scope(|scope| {
        for worker in 0..3 {
            let (line, stop, run) = (&line, &stop, run.as_str());
            scope.spawn(move || {
                let say = |text: &str| line.lock().expect("a worker panicked").comment(text);
                while !stop.load(Ordering::Relaxed) {
                    let granted = requested(run);
                    let Some(lease) =
                        granted.out.split_whitespace().next().filter(|_| granted.ok())
                    else {
                        // Ceilings of a run, no fault.
                        say(&format!("not granted: {}", granted.err.trim()));
                        std::thread::sleep(Duration::from_millis(200));
                        continue;
                    };
                    say(&format!("did granted {lease}"));
                    for _ in 0..USES {
                        if used(run, lease).ok() {
                            say(&format!("did used {lease}"));
                        }
                    }
                    if worker == 0 {
                        let verified = on_disk(&["audit", "verify"]);
                        if let Some(head) =
                            verified.out.lines().find_map(|l| l.strip_prefix("head: "))
                        {
                            say(&format!("did head {head}"));
                        }
                    }
                }
            });
        }
    });
}

/// The next boot of the same disk.
fn after(line: &mut Line, round: &str) {
    let is = mounted();
    line.check_with(is.is_ok(), "the disk is mounted again", &format!("{is:?}"));
    let mut granted = BTreeMap::new();
    let mut head = None;
    for text in tools::read("/vm/done").lines() {
        match text.split(' ').collect::<Vec<_>>()[..] {
            ["granted", lease, uses] => {
                granted.insert(lease.to_owned(), uses.parse::<usize>().unwrap_or(usize::MAX));
            }
            ["head", text] => head = Some(text.to_owned()),
            _ => {}
        }
    }
    let verified = on_disk(&["audit", "verify"]);
    line.check_with(verified.ok(), "the trail is whole", &verified.both());
    if let Some(head) = &head {
        let verified = on_disk(&["audit", "verify", "--head", head]);
        line.check_with(
            verified.ok(),
            "the last head that was kept elsewhere is in it",
            &verified.both(),
        );
    }
    let trail = on_disk(&["--json", "audit", "list"]).out;
    let count = |kind: &str, lease: &str| {
        trail
            .lines()
            .filter(|l| l.contains(&format!("\"type\":\"{kind}\"")) && l.contains(lease))
            .count()
    };
    let lost: Vec<&String> = granted.keys().filter(|l| count("lease.granted", l) != 1).collect();
    line.check_with(
        lost.is_empty(),
        "every grant that was acknowledged is in the trail once",
        &format!("{lost:?}"),
    );
    let miscounted: Vec<String> = granted
        .iter()
        .map(|(lease, uses)| (lease, *uses, count("lease.consumed", lease)))
        .filter(|(_, acknowledged, recorded)| recorded < acknowledged || *recorded > USES)
        .map(|row| format!("{row:?}"))
        .collect();
    line.check_with(
        miscounted.is_empty(),
        "every use that was acknowledged is counted, and none beyond its lease",
        &miscounted.join(" "),
    );
    let broker = broker();
    if let Err(why) = &broker {
        return line.check_with(false, "the broker serves again", why);
    }
    line.check(true, "the broker serves again");
    let run = format!("round-{round}");
    let taken = granted.keys().filter(|lease| used(&run, lease).ok()).count();
    line.check_with(
        taken == 0 && !granted.is_empty(),
        "no lease of the boot before can be used",
        &format!("{taken} of {}", granted.len()),
    );
    let mut list = Command::new("/vm/sublet");
    let list = tools::run(list.args(["--json", "lease", "list", "--run", &run]));
    let open = list
        .out
        .lines()
        .filter(|l| l.contains("\"state\":\"granted\"") || l.contains("\"state\":\"consumed\""))
        .count();
    line.check_with(list.ok() && open == 0, "none of them is open", &list.both());
    let fresh = started_run(&format!("fresh-{round}"));
    line.check_with(fresh.ok(), "a run can be started", &fresh.both());
    let granted = requested(&format!("fresh-{round}"));
    let lease = granted.out.split_whitespace().next().unwrap_or_default().to_owned();
    let did: Vec<bool> = (0..=USES).map(|_| used(&format!("fresh-{round}"), &lease).ok()).collect();
    line.check_with(
        did == [true, true, true, false],
        "a new lease is good for its uses and no more",
        &format!("{did:?}\n{}", granted.both()),
    );
    let verified = on_disk(&["audit", "verify"]);
    line.check_with(verified.ok(), "the trail goes on", &verified.both());
    if let Ok(mut broker) = broker {
        broker.kill().and_then(|()| broker.wait()).map(|_| ()).unwrap_or_default();
    }
}

/// The state's own file system has no room: nothing is granted, and nothing runs.
fn full_disk(line: &mut Line) {
    let is = mounted();
    line.check_with(is.is_ok(), "a small disk is mounted", &format!("{is:?}"));
    let leased = |marker: &str| {
        let mut command = Command::new("/vm/sublet");
        command.args([
            "--config",
            "/vm/sublet.toml",
            "--state-dir",
            STATE,
            "run",
            "--profile",
            "/vm/profile.toml",
        ]);
        command.args(["--workspace", WORK, "--lease", &format!("use.one@{AUDIENCE}"), "--"]);
        tools::run(command.args([
            "sh",
            "-c",
            &format!("touch {WORK}/{marker}; wc -c <&\"$TOKEN_FD\""),
        ]))
    };
    let before = leased("before");
    line.check_with(before.ok(), "a leased exec runs while there is room", &before.both());
    tools::sh(&format!(
        "dd if=/dev/zero of={DISK}/filler bs=64k; dd if=/dev/zero of={DISK}/filler2 bs=512; sync"
    ));
    // What is left over of the log's own blocks is used up first.
    let mut refused = leased("full");
    for _ in 0..60 {
        if !refused.ok() {
            break;
        }
        fs::remove_file(format!("{WORK}/full")).ok();
        refused = leased("full");
    }
    let nothing = fs::metadata(format!("{WORK}/full")).is_err();
    line.check_with(
        refused.status == Some(125) && nothing,
        "on a full disk it is refused, and nothing ran",
        &refused.both(),
    );
    fs::remove_file(format!("{DISK}/filler")).ok();
    let again = leased("again");
    line.check_with(again.ok(), "with room again it runs", &again.both());
    let verified = on_disk(&["audit", "verify"]);
    line.check_with(verified.ok(), "the trail is whole after a full disk", &verified.both());
}

/// The wall clock is set in mid-exec; a lease lasts six seconds all the same.
fn clock_steps(line: &mut Line) {
    const TTL: Duration = Duration::from_secs(6);
    for (what, step) in
        [("as it is", 0_i64), ("back by a day", -86_400), ("forward by a day", 86_400)]
    {
        let mut command = Command::new("/vm/sublet");
        command.args([
            "--config",
            "/vm/sublet.toml",
            "--state-dir",
            "/vm/state",
            "run",
            "--profile",
            "/vm/profile.toml",
        ]);
        command.args([
            "--workspace",
            WORK,
            "--lease",
            &format!("use.one@{AUDIENCE},channel=memfd,ttl=6s"),
            "--",
        ]);
        command
            .args(["sh", "-c", "echo ready; sleep 60"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        let start = Instant::now();
        let mut exec = match command.spawn() {
            Ok(exec) => exec,
            Err(e) => return line.check_with(false, "an exec is there", &e.to_string()),
        };
        let mut word = [0; 6];
        let ready = exec.stdout.as_mut().is_some_and(|out| out.read_exact(&mut word).is_ok());
        let set = tools::sh(&format!("date -s @$(( $(date +%s) + {step} )) >/dev/null"));
        let status = exec.wait();
        let lasted = start.elapsed();
        let in_time =
            lasted + Duration::from_millis(300) >= TTL && lasted < TTL + Duration::from_secs(8);
        let killed = status.as_ref().is_ok_and(|s| !s.success());
        line.check_with(
            ready && set.ok() && killed && in_time,
            &format!("clock {what}: a lease of 6 s ends after 6 s"),
            &format!("ready {ready}, {status:?} after {lasted:?}, {}", set.both()),
        );
    }
}

/// With less and less of something: sublet does its work or refuses whole, and leaves nothing.
fn scarce(line: &mut Line, what: &str, amounts: &[usize], attempt: fn(usize) -> Ended) {
    let (mut did, mut refused, mut other) = (0, 0, Vec::new());
    for left in amounts {
        let ended = attempt(*left);
        match ended.status {
            Some(0) => did += 1,
            Some(125) if !ended.err.trim().is_empty() => refused += 1,
            _ => other.push(format!("{left}: {}", ended.both())),
        }
    }
    line.comment(&format!("{what}: {did} did their work, {refused} were refused"));
    line.check_with(
        other.is_empty(),
        &format!("few {what}: done or refused, never between"),
        &other.join("\n"),
    );
    line.check(refused > 0 && did > 0, &format!("few {what}: both were seen"));
    let gone = tools::eventually(Duration::from_secs(15), || !tools::sh("pgrep sublet").ok());
    line.check_with(
        gone,
        &format!("few {what}: nothing is left"),
        &tools::sh("ps ax | grep sublet").out,
    );
    let again = tools::run(sublet("one", "memfd", &[]).args(["sh", "-c", "wc -c <&\"$TOKEN_FD\""]));
    line.check_with(
        again.ok() && again.out.trim() == "44",
        &format!("few {what}: afterwards all is well"),
        &again.both(),
    );
}

/// So many pids are free when sublet starts.
fn pids(left: usize) -> Ended {
    let group = format!("/sys/fs/cgroup/few-{left}");
    let made = fs::create_dir_all(&group)
        .and_then(|()| fs::write(format!("{group}/pids.max"), left.to_string()));
    if let Err(e) = made {
        return Ended { status: None, out: String::new(), err: format!("{group}: {e}") };
    }
    // The shell becomes sublet: it counts as one. The exec has a cgroup of its own below.
    let script = format!("echo $$ >{group}/cgroup.procs; exec \"$@\"");
    let mut command = Command::new("sh");
    command.args(["-c", &script, "-"]);
    let run = sublet("two", "memfd", &[]);
    command.arg(run.get_program()).args(run.get_args()).args([
        "sh",
        "-c",
        "test $(wc -c <&\"$TOKEN_FD\") = 44",
    ]);
    tools::run(&mut command)
}

/// So many descriptors may be open.
fn descriptors(left: usize) -> Ended {
    let mut command = Command::new("sh");
    command.args(["-c", &format!("ulimit -n {left}; exec \"$@\""), "-"]);
    let run = sublet("two", "memfd", &[]);
    command.arg(run.get_program()).args(run.get_args()).args([
        "sh",
        "-c",
        "test $(wc -c <&\"$TOKEN_FD\") = 44",
    ]);
    tools::run(&mut command)
}

/// Before the kernel's generator is ready no key is made and nothing is granted: both wait. Then it is
/// given a seed, as a boot loader or a device would.
fn entropy(line: &mut Line) {
    let ready = || tools::sh("dmesg | grep 'crng init done'");
    line.check_with(!ready().ok(), "the kernel has no randomness yet", &ready().out);
    let set = "printf %s a-value-of-some-length | timeout -k 2 8 \
        /vm/sublet --config /vm/sublet.toml --state-dir /run/fresh secret set one";
    let key =
        "find /run/fresh -name vault.key -size +0 -exec sha256sum {} + 2>/dev/null | cut -d' ' -f1";
    // getrandom(2) waits, or has the kernel gather what it lacks: then it is ready before it answers.
    let early = tools::sh(set);
    let none = tools::sh(key).out.trim().is_empty();
    let waited = early.status == Some(124) && none;
    line.check_with(
        waited || early.ok() && ready().ok(),
        "no key is made before the kernel has randomness",
        &early.both(),
    );
    let exec = |marker: &str| {
        let run = sublet("one", "memfd", &[]);
        let mut command = Command::new("timeout");
        command.args(["-k", "2", "20"]).arg(run.get_program()).args(run.get_args());
        tools::run(command.args([
            "sh",
            "-c",
            &format!("touch {WORK}/{marker}; wc -c <&\"$TOKEN_FD\""),
        ]))
    };
    let waits = exec("early");
    let nothing = fs::metadata(format!("{WORK}/early")).is_err();
    line.check_with(
        !waits.ok() && nothing || waits.ok() && ready().ok(),
        "nothing is run under a lease before that",
        &waits.both(),
    );
    // RNDADDENTROPY of random(4).
    let seeded = tools::sh(
        "python3 -c 'import fcntl, struct; s = open(\"/vm/seed\", \"rb\").read()
fcntl.ioctl(open(\"/dev/random\", \"wb\"), 0x40085203, struct.pack(\"ii\", len(s) * 8, len(s)) + s)'",
    );
    line.check_with(seeded.ok() && ready().ok(), "the kernel is given a seed", &seeded.both());
    let made = if waited { tools::sh(set) } else { early };
    line.check_with(made.ok(), "then a key is made", &made.both());
    line.fact("key", tools::sh(key).out.trim());
    let leased = exec("late");
    line.check_with(
        leased.ok() && leased.out.trim() == "44",
        "and a leased exec does its work",
        &leased.both(),
    );
}
