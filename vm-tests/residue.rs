//! Residue: after an exec, all of the machine's memory is searched for the value.
//!
//! The machine's memory is a file here. Each row of the table has a secret of its own, made here at
//! random, which reaches the guest sealed in a vault; the rows without `sublet` get it masked with a
//! constant. So it is nowhere before, and what is found afterwards, the row has left behind.

use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use super::job::{Booted, Files, Outcome};
use super::kernel::Kernel;
use super::search;
use super::workshop::{self, Workshop};
use super::{Result, machine::Machine};

pub struct Table {
    pub name: &'static str,
    pub always: bool,
    append: &'static str,
}

pub const TABLES: &[Table] = &[
    Table { name: "plain", always: true, append: "init_on_free=0" },
    Table { name: "init_on_free", always: true, append: "init_on_free=1" },
];

/// What is done with one secret, in the guest's words (`guest/residue.rs`); and whether any copy may stay.
pub struct Row {
    pub name: &'static str,
    pub what: &'static str,
    pub none: bool,
}

const fn row(name: &'static str, what: &'static str, none: bool) -> Row {
    Row { name, what, none }
}

pub const ROWS: &[Row] = &[
    row("memfd-wiped", "`sublet`, memfd; the command reads it and wipes its own copy", true),
    row("file-wiped", "`sublet`, file; the same", true),
    row(
        "memfd-killed",
        "`sublet`, memfd; never read, and the command is killed at its deadline",
        true,
    ),
    row("file-killed", "`sublet`, file; never read, and `sublet` is killed with -9", true),
    row("denied", "`sublet`, a lease that is denied", true),
    row("memfd-unread", "`sublet`, memfd; `true`", true),
    row("env-unread", "`sublet`, env; `true`", false),
    row("memfd-cat", "`sublet`, memfd; `cat`", false),
    row("file-cat", "`sublet`, file; `cat`", false),
    row("env-printenv", "`sublet`, env; `printenv`", false),
    row("memfd-curl", "`sublet`, memfd; `curl` with it in a header", false),
    row("file-curl", "`sublet`, file; `curl` with it in a header", false),
    row("git-push", "`sublet`, git; `git push`", false),
    row("bwrap-true", "`bwrap --setenv`; `true`", false),
    row("bwrap-printenv", "`bwrap --setenv`; `printenv`", false),
    row("bwrap-curl", "`bwrap --setenv`; `curl`", false),
    row("bwrap-git-push", "`bwrap --setenv`; `git push` with a helper that echoes it", false),
    row("docker-echo", "docker-style: `runc run`, `process.env` of its bundle; `echo`", false),
    row("credential-wiped", "systemd-like: a 0400 file on ramfs, unmounted after; wiped", false),
    row("credential-cat", "the same; `cat`", false),
    row("credential-curl", "the same; `curl`", false),
];

pub fn run(workshop: &Workshop, kernel: &Kernel, table: &Table) -> Result<Outcome> {
    let place = workshop.dir.join(format!("residue/{}-{}", kernel.name, table.name));
    workshop::fresh_dir(&place)?;
    search::check_itself(&place)?;
    let names: Vec<&str> = ROWS.iter().map(|row| row.name).collect();
    let (mut files, values) = sealed(workshop, &place, &names)?;
    let list: String = ROWS.iter().map(|row| format!("{}\n", row.name)).collect();
    files.add("rows", 0o644, list.as_bytes());
    let ram = Ram::new(&place)?;
    let booted = Booted {
        job: "residue".to_owned(),
        append: table.append.to_owned(),
        files,
        megabytes: 768,
        memory: Some(ram.0.clone()),
        patience: Duration::from_secs(900),
        ..Booted::on(kernel)
    };
    let mut words = fs::File::create(place.join("hits")).map_err(|e| e.to_string())?;
    booted.attend(workshop, |machine, asked, outcome| {
        let asked: Vec<&str> = asked.iter().map(String::as_str).collect();
        let of = |name: &str| {
            let at = ROWS.iter().position(|row| row.name == name);
            at.map(|at| (&ROWS[at], &values[at])).ok_or(format!("there is no row {name}"))
        };
        match asked[..] {
            ["baseline"] => {
                let mut all = 0;
                for value in &values {
                    all += stopped(machine, &ram.0, value)?.hits.len();
                }
                outcome.check(all == 0, "no value is there before");
                Ok("go".to_owned())
            }
            ["held", name] => {
                let (_, value) = of(name)?;
                let found = stopped(machine, &ram.0, value)?;
                outcome.fact(&format!("held.{name}"), found.count());
                outcome
                    .check(found.count() > 0, &format!("{name}: it is found while it is in use"));
                Ok("go".to_owned())
            }
            ["after", name] => {
                let (row, value) = of(name)?;
                let found = stopped(machine, &ram.0, value)?;
                outcome.fact(&format!("copies.{name}"), found.count());
                outcome.fact(&format!("pieces.{name}"), found.pieces());
                outcome.comments.push(format!("{name}: {}", found.words()));
                for hit in &found.hits {
                    let around = String::from_utf8_lossy(&hit.around).into_owned();
                    writeln!(words, "{name} {} at {:#x}: {around:?}", hit.form, hit.offset)
                        .map_err(|e| e.to_string())?;
                }
                if row.none {
                    outcome.check(
                        found.hits.is_empty(),
                        &format!("{name}: no copy and no piece stays"),
                    );
                }
                let frames: Vec<String> =
                    found.hits.iter().take(60).map(|h| (h.offset / 4096).to_string()).collect();
                Ok(frames.join(","))
            }
            _ => Err(format!("the guest asks for {asked:?}")),
        }
    })
}

fn stopped(machine: &mut Machine, ram: &Path, value: &[u8]) -> Result<search::Found> {
    machine.stop()?;
    let found = search::search(ram, value);
    machine.resume()?;
    found
}

/// The file that is the machine's memory. Gone with it.
struct Ram(PathBuf);

impl Ram {
    fn new(place: &Path) -> Result<Self> {
        // In memory if there is a place for it: a disk would be busy with it all the time.
        let shm = Path::new("/dev/shm");
        // A runner that was killed could not remove its own.
        for entry in fs::read_dir(shm).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let owner = name.strip_prefix("sublet-vm-").and_then(|rest| rest.split('-').next());
            if owner.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
                // Another runner may have been quicker.
                let _ = fs::remove_file(entry.path());
            }
        }
        let name = place.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let ram = match shm.is_dir() {
            true => shm.join(format!("sublet-vm-{}-{name}", std::process::id())),
            false => place.join("ram"),
        };
        match fs::remove_file(&ram) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(format!("{}: {e}", ram.display()))
            }
            _ => Ok(Self(ram)),
        }
    }
}

impl Drop for Ram {
    fn drop(&mut self) {
        // A machine that never booted made none.
        let _ = fs::remove_file(&self.0);
    }
}

/// A fresh value for each name: sealed in a vault, which is `/vm/state` in the guest, and masked in
/// `/vm/masked/NAME`. And the values.
pub fn sealed(workshop: &Workshop, place: &Path, names: &[&str]) -> Result<(Files, Vec<Vec<u8>>)> {
    let config = place.join("sublet.toml");
    let secret = |name: &&str| format!("[secrets.{name}]\nsource = \"vault\"\nallow = [\"*@*\"]\n");
    let text: String = names.iter().map(secret).collect();
    fs::write(&config, text).map_err(|e| format!("{}: {e}", config.display()))?;
    let (mut files, mut values) = (Files::default(), Vec::new());
    for name in names {
        let value = fresh_value()?;
        let mut set = Command::new(&workshop.sublet);
        set.arg("--config").arg(&config).arg("--state-dir").arg(place.join("state"));
        let mut child = set
            .args(["secret", "set", name])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .map_err(|e| format!("sublet: {e}"))?;
        let mut stdin = child.stdin.take().ok_or("no pipe")?;
        stdin.write_all(&value).map_err(|e| format!("sublet secret set: {e}"))?;
        drop(stdin);
        let status = child.wait().map_err(|e| e.to_string())?;
        if !status.success() {
            return Err(format!("sublet secret set {name}: {status}"));
        }
        let masked: Vec<u8> = value.iter().map(|b| b ^ 0x5a).collect();
        files.add(&format!("masked/{name}"), 0o600, &masked);
        values.push(value);
    }
    files.tree("state", place.join("state"));
    Ok((files, values))
}

/// 44 letters, of which some change in every encoding.
pub fn fresh_value() -> Result<Vec<u8>> {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut random = [0; 44];
    fs::File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut random))
        .map_err(|e| format!("/dev/urandom: {e}"))?;
    let mut value: Vec<u8> = random.iter().map(|b| LETTERS[usize::from(b & 63)]).collect();
    value[7] = b'/';
    value[21] = b'+';
    value[33] = b'=';
    Ok(value)
}
