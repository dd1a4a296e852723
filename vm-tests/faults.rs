//! Faults: the power goes at a random moment under load, and the same disk is booted again; a full disk,
//! steps of the clock, no entropy, no process ids, no descriptors.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use super::job::{Booted, Outcome};
use super::kernel::Kernel;
use super::machine::Machine;
use super::tap::{self, Said};
use super::workshop::{self, Workshop};
use super::writes;
use super::{Result, residue, search};

pub struct Fault {
    pub name: &'static str,
    pub what: &'static str,
    pub always: bool,
    kind: Kind,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// What the guest had handed to the disk is there.
    PowerCut,
    /// The disk's own cache is lost as well: of what was written since its last flush, any part is there.
    PowerCutLossy,
    Trouble,
    NoEntropy,
}

pub const FAULTS: &[Fault] = &[
    Fault {
        name: "power-cut",
        what: "the power goes under load",
        always: true,
        kind: Kind::PowerCut,
    },
    Fault {
        name: "power-cut-lossy",
        what: "the same, and the disk loses any part of what it had not been told to flush",
        always: true,
        kind: Kind::PowerCutLossy,
    },
    Fault {
        name: "trouble",
        what: "a full disk, steps of the clock, no process ids, no descriptors",
        always: true,
        kind: Kind::Trouble,
    },
    Fault {
        name: "no-entropy",
        what: "an early boot without randomness",
        always: true,
        kind: Kind::NoEntropy,
    },
];

const NAMES: [&str; 2] = ["one", "two"];

pub fn run(workshop: &Workshop, kernel: &Kernel, fault: &Fault) -> Result<Outcome> {
    let place = workshop.dir.join(format!("faults/{}-{}", kernel.name, fault.name));
    workshop::fresh_dir(&place)?;
    match fault.kind {
        Kind::PowerCut | Kind::PowerCutLossy => power_cuts(workshop, kernel, &place, fault.kind),
        Kind::Trouble => {
            let (files, _) = residue::sealed(workshop, &place, &NAMES)?;
            let disk = ext4(&place.join("disk"), 24)?;
            let booted = Booted {
                job: "faults:trouble".to_owned(),
                files,
                drives: vec![drive(&disk)],
                megabytes: 512,
                ..Booted::on(kernel)
            };
            booted.listen(workshop)
        }
        Kind::NoEntropy => no_entropy(workshop, kernel, &place),
    }
}

fn drive(disk: &Path) -> String {
    // What the guest has written is in the host's memory at once; the host stays.
    format!("if=virtio,format=raw,cache=writeback,file={}", disk.display())
}

fn ext4(path: &Path, megabytes: u64) -> Result<PathBuf> {
    let failed = |e: std::io::Error| format!("{}: {e}", path.display());
    fs::File::create(path).and_then(|file| file.set_len(megabytes << 20)).map_err(failed)?;
    let mut make = Command::new(workshop::which("mke2fs").unwrap_or("mke2fs".into()));
    workshop::output(make.args(["-q", "-F", "-t", "ext4"]).arg(path))?;
    Ok(path.to_owned())
}

/// What the guest said was done, before the power went.
#[derive(Default)]
struct Done {
    granted: Vec<String>,
    uses: BTreeMap<String, usize>,
    head: Option<String>,
}

impl Done {
    fn hear(&mut self, comment: &str) {
        match comment.split(' ').collect::<Vec<_>>()[..] {
            ["did", "granted", lease] => self.granted.push(lease.to_owned()),
            ["did", "used", lease] => *self.uses.entry(lease.to_owned()).or_default() += 1,
            ["did", "head", head] => self.head = Some(head.to_owned()),
            _ => {}
        }
    }

    fn list(&self) -> String {
        let granted = self
            .granted
            .iter()
            .map(|l| format!("granted {l} {}\n", self.uses.get(l).unwrap_or(&0)));
        let head = self.head.iter().map(|h| format!("head {h}\n"));
        granted.chain(head).collect()
    }
}

fn power_cuts(workshop: &Workshop, kernel: &Kernel, place: &Path, kind: Kind) -> Result<Outcome> {
    let (files, values) = residue::sealed(workshop, place, &NAMES)?;
    let mut disk = ext4(&place.join("disk"), 192)?;
    let seed = std::env::var("SUBLET_TEST_SEED").ok().and_then(|s| s.parse().ok());
    let seed = seed.unwrap_or_else(|| u64::from(std::process::id()) ^ 0x5eed_0000);
    let mut random = Random(seed);
    let mut outcome = Outcome::default();
    outcome.comments.push(format!("SUBLET_TEST_SEED={seed}"));
    let (mut granted, mut used) = (0, 0);
    let rounds = if workshop.long { 12 } else { 2 };
    for round in 0..rounds {
        let log = place.join("log");
        let lossy = kind == Kind::PowerCutLossy;
        let before = place.join("before");
        if lossy {
            fs::copy(&disk, &before).map_err(|e| format!("{}: {e}", before.display()))?;
        }
        let booted = Booted {
            job: format!("faults:load,{round}"),
            files: files.clone(),
            drives: if lossy { Vec::new() } else { vec![drive(&disk)] },
            more: if lossy { writes::logged(&disk, &log)? } else { Vec::new() },
            megabytes: 512,
            ..Booted::on(kernel)
        };
        let after_first = Duration::from_millis(500 + random.below(5_000));
        let done = load_and_cut(&booted, workshop, after_first)?;
        outcome
            .check(!done.granted.is_empty(), &format!("round {round}: the power went under load"));
        granted += done.granted.len();
        used += done.uses.values().sum::<usize>();
        if lossy {
            let (kept, lost) = writes::replay(&before, &log, || random.below(2) == 0)?;
            outcome.comments.push(format!("round {round}: {kept} writes kept, {lost} lost"));
            outcome.fact(&format!("lost.{round}"), lost);
            fs::rename(&before, &disk).map_err(|e| format!("{}: {e}", disk.display()))?;
            disk = place.join("disk");
        }
        for value in &values {
            let found = search::search(&disk, value)?;
            outcome
                .check(found.hits.is_empty(), &format!("round {round}: no value is on the disk"));
        }
        let mut files = files.clone();
        files.add("done", 0o600, done.list().as_bytes());
        let again = Booted {
            job: format!("faults:after,{round}"),
            files,
            drives: vec![drive(&disk)],
            megabytes: 512,
            ..Booted::on(kernel)
        };
        let found = again.listen(workshop)?;
        outcome.comments.extend(found.comments);
        for check in found.checks {
            outcome.check(check.ok, &format!("round {round}: {}", check.name));
        }
    }
    outcome.fact("cuts", rounds);
    outcome.fact("granted", granted);
    outcome.fact("used", used);
    Ok(outcome)
}

/// Listens until the moment comes, then nothing more is heard.
fn load_and_cut(booted: &Booted<'_>, workshop: &Workshop, after_first: Duration) -> Result<Done> {
    let mut machine: Machine = booted.boot(workshop)?;
    let mut done = Done::default();
    let mut cut = None;
    loop {
        let line = match cut {
            None => machine.line()?,
            Some(at) => match machine.line_until(at)? {
                Some(line) => Some(line),
                None => break,
            },
        };
        let Some(line) = line else {
            return Err(format!("the guest ended before the power went\n{}", machine.console()));
        };
        match tap::parse(&line) {
            Said::Comment(text) => done.hear(&text),
            Said::Check { ok: false, name } => {
                return Err(format!("the load did not begin: {name}"));
            }
            _ => {}
        }
        if cut.is_none() && !done.granted.is_empty() {
            cut = Some(Instant::now() + after_first);
        }
    }
    machine.cut_power()?;
    Ok(done)
}

fn no_entropy(workshop: &Workshop, kernel: &Kernel, place: &Path) -> Result<Outcome> {
    let (files, _) = residue::sealed(workshop, place, &NAMES)?;
    let mut outcome = Outcome::default();
    let mut keys = Vec::new();
    for boot in 0..2 {
        let mut files = files.clone();
        files.add("seed", 0o600, &residue::fresh_value()?);
        let booted = Booted {
            job: "faults:entropy".to_owned(),
            append: "random.trust_cpu=off random.trust_bootloader=off".to_owned(),
            cpu_flags: ",-rdrand,-rdseed",
            files,
            megabytes: 512,
            patience: Duration::from_secs(200),
            ..Booted::on(kernel)
        };
        let found = booted.listen(workshop)?;
        keys.push(found.facts.get("key").cloned().unwrap_or_default());
        outcome.comments.extend(found.comments);
        for check in found.checks {
            outcome.check(check.ok, &format!("boot {boot}: {}", check.name));
        }
    }
    outcome.check(keys[0].len() == 64 && keys[0] != keys[1], "two boots make two keys");
    Ok(outcome)
}

/// splitmix64: repeatable from its seed.
struct Random(u64);

impl Random {
    fn below(&mut self, most: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % most
    }
}
