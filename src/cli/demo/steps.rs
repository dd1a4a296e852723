//! The promises, one after the other. Each denial stands beside the same thing permitted.
#![forbid(unsafe_code)]

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::Path;

use rusqlite::Connection;
use sha2::{Digest as _, Sha256};

use super::act::{Sublet, run};
use super::hold::Held;
use super::host;
use super::place::PROFILE;
use super::show::{Step, Tale};
use crate::cli::fail::{Failure, NO, NOT_RUN};

type Act = fn(&mut Tale, &Sublet<'_>) -> Result<(), Failure>;

pub const ALL: [Act; 6] = [keep, deliver, beside, scrub, refuse, trail];

const ENV: &str = "demo.use@api.example,channel=env";
const FILE: &str = "demo.use@api.example,channel=file";
const MEMFD: &str = "demo.use@api.example,channel=memfd";
const GIT: &str = "demo.use@api.example,channel=git";
const ELSEWHERE: &str = "demo.use@elsewhere.example,channel=env";

/// What the steps make, and the trail must hold: leases granted; denied (a second `get`, a command, an
/// audience); leases of the exec whose sublet is killed; and leased execs that ended in good order.
const GRANTED: usize = 3 + 3 + 2 + 2 + 1;
const DENIED: usize = 1 + 2;
const INTERRUPTED: usize = 2;
const SCRUBBED: usize = 4;

/// Hands the value to three readers, and prints it, which is what a careless command does.
const USE: &str = "\
printf %s \"$TOKEN\" | sha256sum
sha256sum <\"$TOKEN_FILE\"
sha256sum <&\"$TOKEN_FD\"
echo \"token: $TOKEN, base64: $(printf %s \"$TOKEN\" | base64)\"
";

/// What git's own helper call would be, twice.
const ASK_TWICE: &str = "\
ask() { printf 'protocol=https\\nhost=api.example\\n\\n' | /run/sublet/bin/sublet git-credential get; }
ask; ask
";

fn keep(tale: &mut Tale, sublet: &Sublet<'_>) -> Result<(), Failure> {
    let mut step = tale.step("The vault: a secret goes in, and nothing gives it back")?;
    step.command("cat ../profiles/demo.toml")?;
    step.printed(PROFILE)?;
    let args = ["secret", "set", "demo-token"];
    let ran = sublet.run_with(&mut step, &args, "value", sublet.place.value.expose())?;
    step.printed(&ran.or_fail("sublet secret set")?.text())?;
    let (files, holders) = sublet.place.search("state")?;
    // The name is there to be found, so the search works.
    let can_find = sublet.place.is_text_below("state", "demo-token")?;
    step.promise(
        &format!("none of the {files} files of the state holds it, plain, in base64 or in hex"),
        holders.is_empty() && can_find,
    )?;
    step.end()
}

fn deliver(tale: &mut Tale, sublet: &Sublet<'_>) -> Result<(), Failure> {
    let mut step =
        tale.step("The delivery: one command has the use of it, by variable, file and memfd")?;
    step.command("cat use")?;
    step.printed(USE)?;
    let args = run(&[ENV, FILE, MEMFD], &["sh", "-s"]);
    let ran = sublet.run_with(&mut step, &args, "use", USE.as_bytes())?.or_fail("a leased exec")?;
    step.printed(&ran.text())?;
    let digest: String =
        Sha256::digest(sublet.place.value.expose()).iter().map(|b| format!("{b:02x}")).collect();
    let is_digest = |line: &str| line.split_ascii_whitespace().next() == Some(&*digest);
    let text = ran.text();
    let right = text.lines().filter(|line| is_digest(line)).count();
    step.promise(
        "the command had it by env, by file and by memfd: each sha256 is the value's",
        right == 3,
    )?;
    let is_masked =
        text.ends_with("token: ***, base64: ***\n") && !sublet.place.is_value_in(&ran.stdout)?;
    step.promise("printed by the command, it reads ***", is_masked)?;
    step.end()
}

fn beside(tale: &mut Tale, sublet: &Sublet<'_>) -> Result<(), Failure> {
    let mut step = tale.step("The sibling: while one exec holds it, nobody else reads it")?;
    let mut held = Held::start(&mut step, sublet, &[ENV, MEMFD, GIT])?;
    let seen = host::holder(sublet.place, held.pid())?;
    let Some(pid) = seen.or(host::descendants(held.pid())?.last().copied()) else {
        return Err(Failure::new("demo", "no_exec", "the exec that should stay has no process"));
    };
    step.command("cat probe    # to open mem takes the right to ptrace")?;
    step.printed(host::PROBE)?;
    let text = pid.to_string();
    let args = run(&[], &["sh", "-s", &text]);
    let ran = sublet.run_with(&mut step, &args, "probe", host::PROBE.as_bytes())?;
    step.printed(&ran.errors())?;
    step.promise(
        "a sibling of the same profile and workspace neither reads nor signals it",
        host::is_refused(sublet.place, &ran)?,
    )?;
    let command = ["sh", "-c", "cat /proc/[0-9]*/environ /run/sublet/secrets/*"];
    let ran = sublet.run(&mut step, &run(&[], &command))?;
    step.printed(&ran.errors())?;
    let has_read = ran.text().contains("LANG=");
    let has_value = sublet.place.is_value_in(&ran.stdout)?;
    step.promise("in all that the sibling can see there is no value", has_read && !has_value)?;
    if let Some(user) = sublet.place.other_user {
        other_user(&mut step, sublet, user, pid)?;
        // The same process, read by one who may: else the refusals would prove nothing.
        let claim = "control: root, against whom nothing is promised, finds it in that environ";
        step.promise(claim, seen.is_some())?;
    } else {
        step.note(
            "run by an ordinary user, whose other processes on the host are trusted: only root \
             can give an exec a user id of its own",
        )?;
    }
    held.end()?;
    step.end()
}

fn other_user(
    step: &mut Step<'_>,
    sublet: &Sublet<'_>,
    user: u32,
    pid: i32,
) -> Result<(), Failure> {
    step.command(&format!(
        "setpriv --reuid {user} --regid {user} --clear-groups sh -s {pid} <probe"
    ))?;
    let ran = host::probe_as(user, pid)?;
    step.printed(&ran.errors())?;
    step.promise(
        "nor does another user of the host, even the one that owns the workspace",
        host::is_refused(sublet.place, &ran)?,
    )
}

fn scrub(tale: &mut Tale, sublet: &Sublet<'_>) -> Result<(), Failure> {
    let mut step =
        tale.step("The scrub: a descriptor that leaked out is worth nothing afterwards")?;
    let leases = [MEMFD, GIT];
    let mut held = Held::start(&mut step, sublet, &leases)?;
    held_then_ended(&mut step, sublet, &mut held, "when its command has ended", Held::end)?;
    let mut held = Held::start(&mut step, sublet, &leases)?;
    step.command(&format!("kill -9 {}    # sublet itself", held.pid()))?;
    held_then_ended(&mut step, sublet, &mut held, "after kill -9 of sublet", Held::kill)?;
    step.end()
}

fn held_then_ended(
    step: &mut Step<'_>,
    sublet: &Sublet<'_>,
    held: &mut Held,
    when: &str,
    end: fn(&mut Held) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let value = sublet.place.value.expose();
    let before = held.leaked(value.len())?;
    step.promise(
        "the memfd that it passed out over a socket reads the value while it runs",
        before.expose() == value,
    )?;
    end(held)?;
    step.promise(&format!("{when}, no process of it is left"), held.is_gone())?;
    let after = held.leaked(value.len())?;
    let is_zero = after.expose().iter().all(|&byte| byte == 0);
    step.promise(&format!("{when}, the same descriptor reads {} zeros", after.len()), is_zero)
}

fn refuse(tale: &mut Tale, sublet: &Sublet<'_>) -> Result<(), Failure> {
    let mut step = tale.step("The refusals: each by its name")?;
    step.command("cat ask-twice")?;
    step.printed(ASK_TWICE)?;
    let args = run(&[GIT], &["sh", "-s"]);
    let ran = sublet.run_with(&mut step, &args, "ask-twice", ASK_TWICE.as_bytes())?;
    step.printed(&ran.text())?;
    step.printed(&ran.errors())?;
    let is_once = ran.text().starts_with("username=demo\npassword=***\n")
        && ran.text().ends_with("\nquit=1\n");
    step.promise(
        "the first use is answered, the second refused: uses_exhausted",
        is_once && ran.errors().contains("uses_exhausted"),
    )?;
    let denials = [
        (ENV, "command_not_permitted", "a command that the capability is not for does not run"),
        (ELSEWHERE, "audience_not_permitted", "an audience that it is not for gets nothing"),
    ];
    for (lease, reason, claim) in denials {
        let ran = sublet.run(&mut step, &run(&[lease], &["env"]))?;
        step.printed(&ran.errors())?;
        let has_not_run = ran.status() == i32::from(NOT_RUN) && ran.stdout.is_empty();
        let is_named = ran.errors().contains(reason);
        step.promise(&format!("{claim}: {reason}"), has_not_run && is_named)?;
    }
    step.end()
}

fn trail(tale: &mut Tale, sublet: &Sublet<'_>) -> Result<(), Failure> {
    let mut step =
        tale.step("The trail: what was granted, denied and wiped, in a chain of hashes")?;
    let kinds = ["lease.granted", "lease.denied", "lease.interrupted", "exec.scrubbed"];
    let mut args = vec!["audit", "list"];
    args.extend(kinds.iter().flat_map(|kind| ["--type", kind]));
    let ran = sublet.run(&mut step, &args)?.or_fail("sublet audit list")?;
    step.printed(&ran.text())?;
    let text = ran.text();
    let counts = kinds.map(|kind| text.lines().filter(|line| line.contains(kind)).count());
    let is_all = counts == [GRANTED, DENIED, INTERRUPTED, SCRUBBED];
    step.promise("every grant, denial, scrub and interruption above is in it", is_all)?;
    let verified = sublet.run(&mut step, &["audit", "verify"])?;
    step.printed(&verified.text())?;
    step.promise("unchanged, it verifies", verified.is_success())?;
    rewrite(&sublet.place.dir).map_err(|e| {
        Failure::new("demo", "not_rewritten", "cannot change a copy of the trail").because(&*e)
    })?;
    let args = ["--state-dir", "../copy", "audit", "verify"];
    let found = sublet.run(&mut step, &args)?;
    step.printed(&found.text())?;
    let is_found = found.status() == i32::from(NO) && found.text().contains("was changed");
    step.promise("a copy in which a denial was made a grant does not: it is named", is_found)?;
    let (files, holders) = sublet.place.search(".")?;
    let claim =
        format!("and still none of all {files} files, the trail's included, holds the value");
    step.promise(&claim, holders.is_empty())?;
    step.end()
}

/// What one who owns the state could do to it: a denial becomes a grant.
fn rewrite(dir: &Path) -> Result<(), Box<dyn std::error::Error>> {
    copy(&dir.join("state"), &dir.join("copy"))?;
    let database = Connection::open(dir.join("copy/db/sublet.db"))?;
    database.execute(
        "UPDATE event SET body = replace(body, 'lease.denied', 'lease.granted') WHERE seq =
         (SELECT min(seq) FROM event WHERE body LIKE '%lease.denied%')",
        [],
    )?;
    Ok(())
}

fn copy(from: &Path, to: &Path) -> io::Result<()> {
    DirBuilder::new().mode(0o700).create(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let to = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy(&entry.path(), &to)?;
        } else {
            fs::copy(entry.path(), to)?;
        }
    }
    Ok(())
}
