//! The rows of the residue table: each uses one secret in one way, then has the host search all of the
//! machine's memory for it. This program itself must keep no value: what it reads, it wipes.

use std::fs;
use std::hint::black_box;
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, chown};
use std::process::{Command, Stdio};
use std::time::Duration;

use super::say::Line;
use super::server::Server;
use super::tools::{self, Ended};

pub const WORK: &str = "/srv/work";
const USER: u32 = 1000;
const AUDIENCE: &str = "127.0.0.1:8088";

pub fn run(line: &mut Line, _words: &[&str]) {
    let rows: Vec<String> = tools::read("/vm/rows").lines().map(str::to_owned).collect();
    if let Err(why) = prepare(&rows) {
        return line.check_with(false, "the place for it is made", &why);
    }
    let server = match Server::start(8088, "/srv/git") {
        Ok(server) => server,
        Err(e) => return line.check_with(false, "the server starts", &e.to_string()),
    };
    line.fact(
        "init_on_free",
        tools::read("/proc/cmdline").contains("init_on_free=1").to_string().as_str(),
    );
    line.ask("baseline");
    for row in &rows {
        server.expect(masked(row));
        let before = server.admitted();
        let ended = one(line, row);
        let spoke = server.admitted() > before;
        let needs_server = row.ends_with("curl") || row.ends_with("git-push");
        let did = ended.is_ok() && spoke == needs_server;
        let why = match ended {
            Ok(()) => format!("the server admitted it: {spoke}"),
            Err(why) => why,
        };
        // What is over is taken down by the kernel in its own time.
        std::thread::sleep(Duration::from_millis(300));
        let frames = line.ask(&format!("after {row}"));
        line.comment(&format!("{row}: {}", what_frames_are(&frames)));
        line.check_with(did, &format!("{row}: was really done"), &why);
    }
}

fn prepare(rows: &[String]) -> Result<(), String> {
    let names: Vec<&str> = rows.iter().map(String::as_str).collect();
    let network = "network.mode = \"host\"\nlandlock.waive = [\"scope\", \"network\"]\n";
    configure(&names, network)?;
    let made = tools::sh(
        "set -e; git config --global safe.directory '*'; git config --global init.defaultBranch main
         git init -q --bare /srv/git/repo.git; git -C /srv/git/repo.git config http.receivepack true
         git init -q /srv/work/repo; cd /srv/work/repo; echo x >f; git add f
         git -c user.name=n -c user.email=e@example.org commit -q -m m
         mkdir -p /run/bundle/rootfs/bin /run/bundle/rootfs/proc /run/bundle/rootfs/dev /run/bundle/rootfs/sys
         cp /vm/busybox /run/bundle/rootfs/bin/busybox
         for applet in sh; do ln -s busybox /run/bundle/rootfs/bin/$applet; done
         chown -R 1000:1000 /srv/work",
    );
    if !made.ok() {
        return Err(made.both());
    }
    Ok(())
}

/// A workspace with the holder in it, and for each name a secret and a capability `use.NAME` for any
/// command, in a configuration and a profile that begins with `head`.
pub fn configure(names: &[&str], head: &str) -> Result<(), String> {
    let failed = |what: &'static str| move |e: std::io::Error| format!("{what}: {e}");
    fs::create_dir_all(WORK).map_err(failed(WORK))?;
    chown(WORK, Some(USER), Some(USER)).map_err(failed(WORK))?;
    fs::copy("/vm/guest", format!("{WORK}/holder")).map_err(failed("holder"))?;
    let mut config = "[host]\nworkspaces = [\"/srv/work\"]\n".to_owned();
    let mut profile = format!("extends = \"default\"\n{head}");
    for name in names {
        config.push_str(&format!(
            "[secrets.{name}]\nsource = \"vault\"\nallow = [\"use.{name}@{AUDIENCE}\"]\n"
        ));
        let channel = if *name == "git-push" { "git" } else { "memfd\", \"file\", \"env" };
        // The one that is to be denied is not for the command that is run.
        let command = if *name == "denied" { "false" } else { "**" };
        profile.push_str(&format!(
            "[[capability]]\nname = \"use.{name}\"\nchannels = [\"{channel}\"]\ncommand = [[\"{command}\"]]\nuses = 50\n\
             [[capability.audience]]\nprotocol = \"http\"\nhost = \"{AUDIENCE}\"\nsecret = \"{name}\"\n\
             username = \"x\"\nvariable = \"TOKEN\"\n"
        ));
    }
    fs::write("/vm/sublet.toml", config).map_err(failed("configuration"))?;
    fs::write("/vm/profile.toml", profile).map_err(failed("profile"))
}

/// Done as the row says, or why not.
fn one(line: &mut Line, row: &str) -> Result<(), String> {
    let url = format!("http://{AUDIENCE}/header");
    let with_header =
        format!("{{ printf 'Authorization: Bearer '; cat SOURCE; echo; }} | curl -sSf -H @- {url}");
    let by_fd = with_header.replace("SOURCE", "<&\"$TOKEN_FD\"");
    let by_file = with_header.replace("SOURCE", "\"$TOKEN_FILE\"");
    let by_env = format!("printf 'Authorization: Bearer %s\\n' \"$TOKEN\" | curl -sSf -H @- {url}");
    let push = |how: &str| {
        format!(
            "cd {WORK}/repo && git {how} push -q http://x@{AUDIENCE}/repo.git HEAD:refs/heads/{row}"
        )
    };
    let sh = |script: &str| vec!["sh".to_owned(), "-c".to_owned(), script.to_owned()];
    match row {
        "memfd-wiped" => held(line, row, "memfd"),
        "file-wiped" => held(line, row, "file"),
        "memfd-killed" => {
            let ended =
                tools::run(sublet(row, "memfd", &["--timeout", "500ms"]).args(["sleep", "60"]));
            expect(ended, Some(124))
        }
        "file-killed" => killed(row),
        "denied" => {
            let ended = tools::run(sublet(row, "memfd", &[]).arg("true"));
            match ended.err.contains("command_not_permitted") {
                true => expect(ended, Some(125)),
                false => Err(ended.both()),
            }
        }
        "memfd-unread" => expect(tools::run(sublet(row, "memfd", &[]).arg("true")), Some(0)),
        "env-unread" => expect(tools::run(sublet(row, "env", &[]).arg("true")), Some(0)),
        "memfd-cat" => {
            printed(tools::run(sublet(row, "memfd", &[]).args(sh("cat <&\"$TOKEN_FD\""))))
        }
        "file-cat" => printed(tools::run(sublet(row, "file", &[]).args(sh("cat \"$TOKEN_FILE\"")))),
        "env-printenv" => printed(tools::run(sublet(row, "env", &[]).args(["printenv", "TOKEN"]))),
        "memfd-curl" => expect(tools::run(sublet(row, "memfd", &[]).args(sh(&by_fd))), Some(0)),
        "file-curl" => expect(tools::run(sublet(row, "file", &[]).args(sh(&by_file))), Some(0)),
        "git-push" => expect(tools::run(sublet(row, "git", &[]).args(sh(&push("")))), Some(0)),
        "bwrap-true" => expect(bwrap(row, "true"), Some(0)),
        "bwrap-printenv" => expect(bwrap(row, "printenv TOKEN >/dev/null"), Some(0)),
        "bwrap-curl" => expect(bwrap(row, &by_env), Some(0)),
        "bwrap-git-push" => {
            let helper =
                "-c credential.helper='!f() { test \"$1\" = get && echo \"password=$TOKEN\"; }; f'";
            expect(bwrap(row, &push(helper)), Some(0))
        }
        "docker-echo" => expect(runc(row), Some(0)),
        "credential-wiped" => expect(credential(row, &format!("{WORK}/holder hold file")), Some(0)),
        "credential-cat" => expect(credential(row, "cat \"$TOKEN_FILE\" >/dev/null"), Some(0)),
        "credential-curl" => expect(credential(row, &by_file), Some(0)),
        unknown => Err(format!("there is no way to do {unknown}")),
    }
}

fn expect(ended: Ended, status: Option<i32>) -> Result<(), String> {
    if ended.status == status { Ok(()) } else { Err(ended.both()) }
}

/// What it printed was masked: so it was the value.
fn printed(ended: Ended) -> Result<(), String> {
    match ended.out.contains("***") {
        true => expect(ended, Some(0)),
        false => Err(ended.both()),
    }
}

pub fn sublet(row: &str, channel: &str, more: &[&str]) -> Command {
    let mut command = Command::new("/vm/sublet");
    command.args(["--config", "/vm/sublet.toml", "--state-dir", "/vm/state", "run"]);
    command.args(["--profile", "/vm/profile.toml", "--workspace", WORK]).args(more);
    command.arg("--lease").arg(format!("use.{row}@{AUDIENCE},channel={channel}")).arg("--");
    command
}

/// The command holds it, is looked at, wipes its own copy and ends.
fn held(line: &mut Line, row: &str, channel: &str) -> Result<(), String> {
    let mut command = sublet(row, channel, &[]);
    command.args(["./holder", "hold", channel, "wait"]);
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|e| format!("sublet: {e}"))?;
    let mut word = [0; 5];
    let out = child.stdout.as_mut().ok_or("no pipe")?;
    if out.read_exact(&mut word).is_err() || &word != b"held\n" {
        return Err(format!("it did not take it: {:?}", child.wait()));
    }
    line.ask(&format!("held {row}"));
    drop(child.stdin.take());
    let status = child.wait().map_err(|e| e.to_string())?;
    if status.success() { Ok(()) } else { Err(status.to_string()) }
}

fn killed(row: &str) -> Result<(), String> {
    let mut child = sublet(row, "file", &[])
        .args(["sh", "-c", "test -s \"$TOKEN_FILE\" && echo there && exec sleep 60"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|e| format!("sublet: {e}"))?;
    let mut word = [0; 6];
    let out = child.stdout.as_mut().ok_or("no pipe")?;
    let there = out.read_exact(&mut word).is_ok();
    child.kill().and_then(|()| child.wait()).map_err(|e| e.to_string())?;
    // The launcher sees that it has gone, kills and wipes.
    let gone = tools::eventually(Duration::from_secs(10), || !tools::sh("pgrep -x sleep").ok());
    if there && gone { Ok(()) } else { Err(format!("there: {there}, gone: {gone}")) }
}

/// As it is done: the caller takes the value from somewhere, and hands it over in an argument.
fn bwrap(row: &str, script: &str) -> Ended {
    let line = format!(
        "exec bwrap --unshare-pid --unshare-ipc --die-with-parent --bind / / --dev /dev --proc /proc \
         --setenv TOKEN \"$(/vm/guest reveal {row})\" sh -c \"$SCRIPT\""
    );
    tools::run(Command::new("sh").args(["-c", &line]).env("SCRIPT", script))
}

fn runc(row: &str) -> Ended {
    // The bundle lies on a tmpfs, as docker's does.
    let script = format!(
        "cd /run/bundle && rm -f config.json && runc spec && umask 077 &&
         sed -i -e 's/\"terminal\": true/\"terminal\": false/' -e 's/^\\(\\t*\\)\"sh\"$/\\1\"sh\", \"-c\", \"echo $TOKEN\"/' \
            -e \"s|\\\"TERM=xterm\\\"|\\\"TOKEN=$(/vm/guest reveal {row})\\\"|\" config.json &&
         runc run x >/dev/null; status=$?; rm -f config.json; exit $status"
    );
    tools::sh(&script)
}

fn credential(row: &str, script: &str) -> Ended {
    let line = format!(
        "d=/run/credentials/{row}; mkdir -p $d && mount -t ramfs -o mode=755 none $d &&
         /vm/guest reveal {row} >$d/token && chown 1000:1000 $d/token && chmod 400 $d/token &&
         cd {WORK} && TOKEN_FILE=$d/token setpriv --reuid 1000 --regid 1000 --clear-groups sh -c \"$SCRIPT\"
         status=$?; umount $d; exit $status"
    );
    tools::run(Command::new("sh").args(["-c", &line]).env("SCRIPT", script))
}

/// `holder hold memfd|file [wait]`: takes a copy, says so, waits if told to, wipes the copy.
pub fn hold(words: &[String]) -> Result<(), String> {
    let channel = words.first().map_or("", String::as_str);
    let variable = if channel == "memfd" { "TOKEN_FD" } else { "TOKEN_FILE" };
    let place = std::env::var(variable).map_err(|e| format!("{variable}: {e}"))?;
    let place = if channel == "memfd" { format!("/proc/self/fd/{place}") } else { place };
    let mut copy = [0_u8; 44];
    let file = fs::File::open(&place).map_err(|e| format!("{place}: {e}"))?;
    file.read_exact_at(&mut copy, 0).map_err(|e| format!("{place}: {e}"))?;
    black_box(&copy);
    if words.iter().any(|w| w == "wait") {
        println!("held");
        std::io::stdout().flush().map_err(|e| e.to_string())?;
        let mut end = [0];
        // The end of the input is the word to go on.
        while std::io::stdin().read(&mut end).unwrap_or(0) > 0 {}
    }
    wipe(&mut copy);
    Ok(())
}

/// What std can do to make the compiler keep it.
pub fn wipe(bytes: &mut [u8]) {
    bytes.fill(0);
    black_box(bytes);
}

pub fn masked(row: &str) -> Vec<u8> {
    fs::read(format!("/vm/masked/{row}")).unwrap_or_default()
}

/// `guest reveal ROW`: prints the value, and keeps nothing of it.
pub fn reveal(row: &str) -> Result<(), String> {
    let mut value = [0_u8; 44];
    for (byte, masked) in value.iter_mut().zip(masked(row)) {
        *byte = masked ^ 0x5a;
    }
    // Straight to the descriptor: std's own buffer would keep it.
    let out = fs::OpenOptions::new().write(true).open("/proc/self/fd/1");
    let written = out.and_then(|mut out| out.write_all(&value));
    wipe(&mut value);
    written.map_err(|e| e.to_string())
}

/// What the kernel says these page frames are: Documentation/admin-guide/mm/pagemap.rst.
fn what_frames_are(frames: &str) -> String {
    const NAMES: [(u32, &str); 9] = [
        (7, "slab"),
        (10, "buddy"),
        (11, "mapped"),
        (12, "anonymous"),
        (5, "lru"),
        (14, "swap-backed"),
        (26, "page table"),
        (15, "compound"),
        (20, "nopage"),
    ];
    let Ok(flags) = fs::File::open("/proc/kpageflags") else { return "no kpageflags".to_owned() };
    let mut counts = std::collections::BTreeMap::new();
    for frame in frames.split(',').filter_map(|f| f.parse::<u64>().ok()) {
        let mut word = [0; 8];
        let name = match flags.read_exact_at(&mut word, frame * 8) {
            Ok(()) => {
                let word = u64::from_ne_bytes(word);
                let set: Vec<&str> = NAMES
                    .iter()
                    .filter(|(bit, _)| word >> bit & 1 == 1)
                    .map(|(_, name)| *name)
                    .collect();
                if set.is_empty() { "free or the kernel's".to_owned() } else { set.join("+") }
            }
            Err(e) => e.to_string(),
        };
        *counts.entry(name).or_insert(0) += 1;
    }
    counts.iter().map(|(name, n)| format!("{n} {name}")).collect::<Vec<_>>().join(", ")
}
