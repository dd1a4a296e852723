//! One kernel with less, or with more: what sublet says, what it refuses, and that what it then runs
//! stands all the same.

use std::fs;
use std::hint::black_box;
use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use super::isolation::landlock_abi;
use super::residue::{WORK, configure, masked, sublet};
use super::say::Line;
use super::tools::{self, Ended};

const NAMES: [&str; 4] = ["one", "two", "three", "control"];

pub fn run(line: &mut Line, words: &[&str]) {
    let variant = words.first().copied().unwrap_or_default();
    if let Err(why) = configure(&NAMES, "") {
        return line.check_with(false, "the place for it is made", &why);
    }
    let doctor = tools::run(Command::new("/vm/sublet").arg("doctor"));
    for text in doctor.out.lines() {
        line.comment(&format!("doctor {text}"));
    }
    let abi = landlock_abi(&doctor.out);
    line.fact("landlock", &abi.to_string());
    match variant {
        "as-it-is" => {
            ordinary(line);
            lacks(line, abi);
        }
        "landlock-off" => {
            line.check_with(abi == 0, "this kernel has no Landlock", &doctor.out);
            ordinary(line);
            lacks(line, abi);
            broker_without_landlock(line);
        }
        "userns-off" => without_user_namespaces(line, &doctor),
        "init-on-free" => {
            let said =
                doctor.out.lines().any(|l| l.starts_with("ok") && l.contains("freed_memory"));
            line.check_with(said, "the doctor sees it", &doctor.out);
            ordinary(line);
        }
        "small-memory" => {
            ordinary(line);
            a_hog_dies_alone(line);
        }
        "core-pattern" => cores(line),
        "swap" => swap(line),
        _ => yama(line, variant),
    }
}

/// A leased exec does its work, on each channel that carries plain values.
fn ordinary(line: &mut Line) {
    for (channel, command) in [
        ("memfd", "wc -c <&\"$TOKEN_FD\""),
        ("file", "wc -c <\"$TOKEN_FILE\""),
        ("env", "printf %s \"$TOKEN\" | wc -c"),
    ] {
        let ended = tools::run(sublet("one", channel, &[]).args(["sh", "-c", command]));
        line.check_with(
            ended.ok() && ended.out.trim() == "44",
            &format!("{channel}: delivered whole"),
            &ended.both(),
        );
    }
}

/// What this kernel lacks: an error that names it and a waiver, which pasted into the profile is enough;
/// then the report names the lack. Where it lacks nothing, the same runs and no lack is reported.
fn lacks(line: &mut Line, abi: u32) {
    let ports = "network.mode = \"host\"\nnetwork.connect_ports = [8088]\n";
    for (what, head, effect, needs) in [
        ("scope", "network.mode = \"host\"\n", "abstract_sockets", 6),
        ("network", ports, "network", 4),
    ] {
        let mut head = head.to_owned();
        let mut waived = Vec::new();
        // A profile may lack more than one thing; each message names the next.
        let ended = loop {
            let report = "/vm/report.json";
            if let Err(why) = configure(&NAMES, &head) {
                return line.check_with(false, what, &why);
            }
            let ended = tools::run(sublet("one", "memfd", &["--report", report]).arg("true"));
            let Some(waiver) = named_waiver(&ended.err).filter(|_| ended.status == Some(125))
            else {
                break ended;
            };
            line.comment(&ended.err);
            if waived.contains(&waiver) || waived.len() > 3 {
                break ended;
            }
            waived.push(waiver);
            let list: Vec<String> = waived.iter().map(|w| format!("\"{w}\"")).collect();
            head = format!(
                "{}landlock.waive = [{}]\n",
                head.split("landlock.waive").next().unwrap_or_default(),
                list.join(", ")
            );
        };
        line.check_with(
            ended.ok(),
            &format!("{what}: runs, with what its message says"),
            &ended.both(),
        );
        let refused = waived.iter().any(|w| w == what);
        line.check_with(
            refused == (abi < needs),
            &format!("{what}: an error by name exactly where the kernel lacks it"),
            &format!("Landlock ABI {abi}, waived {waived:?}"),
        );
        let report = tools::read("/vm/report.json");
        let missing = after(&report, &format!("\"{effect}\"")).contains("landlock");
        line.check_with(
            missing == (abi < needs),
            &format!("{what}: the report names the lack exactly then"),
            &report,
        );
    }
    if let Err(why) = configure(&NAMES, "") {
        line.check_with(false, "the profile is set back", &why);
    }
}

/// The `missing` list that follows this word of a report.
fn after(report: &str, word: &str) -> String {
    let rest = report.split(word).nth(1).unwrap_or_default();
    let missing = rest.split("\"missing\"").nth(1).unwrap_or_default();
    missing.split(']').next().unwrap_or_default().to_owned()
}

/// `waive = ["scope"]` in a message.
fn named_waiver(message: &str) -> Option<String> {
    let (_, rest) = message.split_once("waive = [\"")?;
    Some(rest.split('"').next()?.to_owned())
}

fn broker_without_landlock(line: &mut Line) {
    let serve = |more: &str| {
        let config = format!("[host]\nworkspaces = [\"/srv/work\"]\n{more}");
        fs::write("/vm/broker.toml", config).ok();
        let mut command = Command::new("timeout");
        command.args(["-s", "TERM", "8", "/vm/sublet", "--config", "/vm/broker.toml"]);
        tools::run(command.args(["--state-dir", "/var/lib/broker", "serve"]))
    };
    let refused = serve("");
    let named = refused.err.contains("waive = [\"landlock\"]");
    line.check_with(
        named && !refused.ok(),
        "the broker refuses to stand without it, and names the waiver",
        &refused.both(),
    );
    // `timeout` ends one that stands: 124, or the status of one that drained.
    let stood = serve("waive = [\"landlock\"]\n");
    line.check_with(
        !stood.err.contains("has no Landlock") && matches!(stood.status, Some(0 | 124)),
        "with it, it stands",
        &stood.both(),
    );
}

fn without_user_namespaces(line: &mut Line, doctor: &Ended) {
    line.check_with(
        doctor.out.contains("max_user_namespaces"),
        "the doctor names the setting",
        &doctor.out,
    );
    let marker = format!("touch {WORK}/ran");
    let refused = tools::run(sublet("one", "memfd", &[]).args(["sh", "-c", &marker]));
    let nothing = fs::metadata(format!("{WORK}/ran")).is_err();
    let says = refused.err.contains("/proc/sys/user") || refused.err.contains("sublet doctor");
    line.check_with(
        refused.status == Some(125) && says && nothing,
        "an exec is refused, with what to change, and nothing ran",
        &refused.both(),
    );
    let set = fs::write("/proc/sys/user/max_user_namespaces", "1000");
    line.check_with(set.is_ok(), "the setting is changed", &format!("{set:?}"));
    ordinary(line);
}

/// More than its limit, and more than the machine has: the exec is over, sublet and its trail are not.
fn a_hog_dies_alone(line: &mut Line) {
    let hog = format!("{WORK}/holder press 1024");
    for (what, limit) in
        [("its limit", "limits.memory = \"48M\"\n"), ("the machine", "limits.memory = \"none\"\n")]
    {
        if let Err(why) = configure(&NAMES, limit) {
            return line.check_with(false, what, &why);
        }
        let ended = tools::run(sublet("one", "memfd", &[]).args(["sh", "-c", &hog]));
        let died = ended.status == Some(137) || ended.status == Some(125) || ended.status.is_none();
        line.check_with(
            died,
            &format!("a command that takes more than {what} is killed"),
            &ended.both(),
        );
        let verify = tools::run(Command::new("/vm/sublet").args([
            "--config",
            "/vm/sublet.toml",
            "--state-dir",
            "/vm/state",
            "audit",
            "verify",
        ]));
        line.check_with(verify.ok(), &format!("{what}: the trail is whole"), &verify.both());
        let left =
            tools::eventually(Duration::from_secs(10), || !tools::sh("pgrep -x holder").ok());
        line.check(left, &format!("{what}: nothing of it is left"));
    }
    ordinary(line);
}

fn cores(line: &mut Line) {
    let set = fs::create_dir_all("/run/cores")
        .and_then(|()| fs::write("/proc/sys/kernel/core_pattern", "|/vm/guest core %e"));
    line.check_with(set.is_ok(), "the handler is set", &format!("{set:?}"));
    // The control: an ordinary process with the value in its environment.
    let crash = "kill -SEGV $$; sleep 5";
    let control =
        format!("ulimit -c unlimited; TOKEN=\"$(/vm/guest reveal control)\" exec sh -c '{crash}'");
    let ended = Command::new("sh").args(["-c", &control]).status();
    let dumped = ended.as_ref().is_ok_and(|s| s.core_dumped());
    let found = tools::eventually(Duration::from_secs(20), || {
        tools::read("/run/cores/log").contains("control")
    });
    line.check_with(
        dumped && found,
        "the handler gets an ordinary process's core, with the value in it",
        &format!("{ended:?}\n{}", tools::read("/run/cores/log")),
    );
    for (name, channel) in [("one", "env"), ("two", "memfd"), ("three", "file")] {
        let held = format!("{WORK}/holder hold {channel}; {crash}");
        let script = if channel == "env" { crash } else { &held };
        let ended = tools::run(sublet(name, channel, &[]).args(["sh", "-c", script]));
        line.check_with(
            ended.status == Some(128 + 11),
            &format!("{channel}: the command really crashed"),
            &ended.both(),
        );
    }
    // The launcher blocks every signal that would, and init is the first process of its namespace.
    let crashed = crash_the_broker();
    line.check_with(crashed.is_ok(), "sublet's broker really crashed", &format!("{crashed:?}"));
    std::thread::sleep(Duration::from_secs(2));
    let log = tools::read("/run/cores/log");
    line.comment(&log);
    let leaked = NAMES[..3].iter().any(|name| log.lines().any(|l| l.contains(name)));
    line.check_with(!leaked, "no core that the handler got holds a leased value", &log);
    line.check_with(
        !log.contains("sublet"),
        "the handler got no core of sublet's own processes",
        &log,
    );
}

fn crash_the_broker() -> Result<(), String> {
    let mut exec = started("one", "env", &["sleep", "30"])?;
    let killed = tools::sh(&format!("kill -ABRT {}", exec.id()));
    let status = exec.wait().map_err(|e| e.to_string())?;
    if killed.ok() && status.signal() == Some(6) {
        Ok(())
    } else {
        Err(format!("{} {status}", killed.both()))
    }
}

/// A leased exec, when its command runs.
fn started(name: &str, channel: &str, command: &[&str]) -> Result<Child, String> {
    let mut words = vec!["sh", "-c", "echo ready; exec \"$@\"", "-"];
    words.extend(command);
    let mut child = sublet(name, channel, &[])
        .args(words)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|e| format!("sublet: {e}"))?;
    let mut word = [0; 6];
    let out = child.stdout.as_mut().ok_or("no pipe")?;
    out.read_exact(&mut word)
        .map_err(|e| format!("{name} did not begin: {e}, {:?}", child.wait()))?;
    Ok(child)
}

/// Deliveries that no one touches for long, beside an ordinary process with a value, under pressure.
fn swap(line: &mut Line) {
    let on = tools::sh(
        "/vm/busybox mkswap /dev/vdb >/dev/null && /vm/busybox swapon /dev/vdb && echo 100 >/proc/sys/vm/swappiness",
    );
    line.check_with(on.ok(), "swap is on", &on.both());
    let doctor = tools::run(Command::new("/vm/sublet").arg("doctor"));
    line.check_with(
        doctor.out.lines().any(|l| l.starts_with("warn  swap")),
        "the doctor warns of it",
        &doctor.out,
    );
    let execs =
        [started("one", "memfd", &["sleep", "300"]), started("two", "file", &["sleep", "300"])];
    let control = Command::new("/vm/guest").args(["keep", "control"]).spawn();
    let all = execs.iter().all(Result::is_ok) && control.is_ok();
    line.check_with(
        all,
        "two deliveries and an ordinary process hold a value each",
        &format!("{execs:?} {control:?}"),
    );
    // The one whose pages are never wanted is pushed out first; the others would be, if they could.
    let press = tools::run(Command::new("/vm/guest").args(["press", "420"]));
    line.check_with(press.ok(), "more memory is used than there is", &press.both());
    let used = tools::read("/proc/swaps");
    line.comment(&used);
    line.ask("swapped");
    for child in execs.into_iter().flatten().chain(control.ok()) {
        let mut child = child;
        child.kill().and_then(|()| child.wait()).map(|_| ()).unwrap_or_default();
    }
}

fn yama(line: &mut Line, variant: &str) {
    let level = variant.strip_prefix("yama-").unwrap_or_default();
    let now = tools::read("/proc/sys/kernel/yama/ptrace_scope");
    line.check_with(now.trim() == level, "the level is set", &now);
    ordinary(line);
    let exec = match started("one", "env", &["sleep", "60"]) {
        Ok(exec) => exec,
        Err(why) => return line.check_with(false, "an exec is there", &why),
    };
    let found = tools::sh("pgrep -x sleep | tail -1");
    let victim = found.out.trim().to_owned();
    let own = "setpriv --reuid 4242 --regid 4242 --clear-groups";
    let attack = tools::sh(&format!(
        "{own} timeout 5 strace -p {victim} -o /dev/null; echo $?; {own} cat /proc/{victim}/environ"
    ));
    line.check_with(
        !attack.out.contains("TOKEN") && attack.err.contains("attach"),
        "an ordinary user neither traces nor reads the exec",
        &attack.both(),
    );
    // The control: the same user, on a process of their own that is not their child.
    let control = tools::sh(&format!(
        "{own} sleep 60 & sleep 0.5; {own} timeout 5 strace -p $! -o /dev/null 2>&1; kill $!"
    ));
    let attached = control.out.contains("attached");
    line.check_with(
        attached == (level == "0"),
        "the control is traced at level 0, and not above",
        &control.both(),
    );
    let mut exec = exec;
    exec.kill().and_then(|()| exec.wait()).map(|_| ()).unwrap_or_default();
}

/// `guest core NAME`: the handler of a piped core_pattern. Notes which values the core holds.
pub fn core(name: &str) -> Result<(), String> {
    let mut bytes = Vec::new();
    std::io::stdin().read_to_end(&mut bytes).map_err(|e| e.to_string())?;
    let held: Vec<&str> = NAMES.into_iter().filter(|n| holds(&bytes, &masked(n))).collect();
    let note = format!("{name} {} bytes with {held:?}\n", bytes.len());
    let log = fs::OpenOptions::new().append(true).create(true).open("/run/cores/log");
    log.and_then(|mut log| log.write_all(note.as_bytes())).map_err(|e| e.to_string())
}

fn holds(bytes: &[u8], masked: &[u8]) -> bool {
    !masked.is_empty()
        && bytes.windows(masked.len()).any(|w| w.iter().zip(masked).all(|(a, b)| a ^ 0x5a == *b))
}

/// `guest keep NAME`: an ordinary process with the value in ordinary memory.
pub fn keep(name: &str) -> Result<(), String> {
    let mut pages = vec![0_u8; 16 * 4096];
    for page in pages.chunks_mut(4096) {
        for (byte, masked) in page.iter_mut().zip(masked(name)) {
            *byte = masked ^ 0x5a;
        }
    }
    black_box(&pages);
    std::thread::sleep(Duration::from_secs(600));
    black_box(&pages);
    Ok(())
}

/// `guest press MEGABYTES`: touches so much memory, each page with other bytes, twice.
pub fn press(megabytes: &str) -> Result<(), String> {
    let size: usize = megabytes.parse().map_err(|e| format!("{megabytes}: {e}"))?;
    let mut all = Vec::new();
    for round in 0..2_u64 {
        for block in 0..size as u64 {
            if round == 0 {
                all.push(vec![0_u8; 1 << 20]);
            }
            for (place, page) in all[block as usize].chunks_mut(4096).enumerate() {
                let mark =
                    (block << 16 | place as u64 | round << 60).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                page[..8].copy_from_slice(&mark.to_ne_bytes());
            }
        }
    }
    black_box(&all);
    Ok(())
}
