//! What machines are booted for, and what came of it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use super::kernel::Kernel;
use super::machine::{Machine, Spec};
use super::options::Options;
use super::tap::{self, Said};
use super::workshop::Workshop;
use super::{Result, faults, isolation, residue, variants};

type Doing = Box<dyn Fn(&Workshop) -> Result<Outcome> + Send + Sync>;

pub struct Job {
    /// `6.1/isolation`.
    pub name: String,
    pub kernel: String,
    pub place: usize,
    run: Doing,
}

/// One thing that was tried.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub struct Check {
    pub name: String,
    pub ok: bool,
}

#[derive(Debug, Default, Clone, serde::Serialize, serde::Deserialize)]
pub struct Outcome {
    pub job: String,
    pub kernel: String,
    pub checks: Vec<Check>,
    pub facts: BTreeMap<String, String>,
    pub comments: Vec<String>,
    pub seconds: u64,
}

impl Outcome {
    pub fn check(&mut self, ok: bool, name: &str) {
        self.checks.push(Check { name: name.to_owned(), ok });
    }

    pub fn fact(&mut self, name: &str, value: impl ToString) {
        self.facts.insert(name.to_owned(), value.to_string());
    }

    /// Where it is kept for a report of a run that leaves this job out.
    fn place(workshop: &Workshop, job: &str) -> PathBuf {
        workshop.dir.join("results").join(format!("{}.json", job.replace('/', "-")))
    }

    /// With what an earlier run found in the suites that this one left out (`--suite`).
    pub fn keep(&self, workshop: &Workshop) -> Result<()> {
        let place = Self::place(workshop, &self.job);
        let suite = |name: &str| {
            let name = name.rsplit('/').next().unwrap_or_default();
            name.split(':').next().unwrap_or_default().to_owned()
        };
        let tried: BTreeSet<String> = self.checks.iter().map(|c| suite(&c.name)).collect();
        let mut whole = self.clone();
        let is_of_suites = self.job.ends_with("/isolation");
        if let Some(before) = Self::kept(workshop, &self.job).filter(|_| is_of_suites) {
            whole
                .checks
                .extend(before.checks.into_iter().filter(|c| !tried.contains(&suite(&c.name))));
            for (name, value) in before.facts {
                let of = name.strip_prefix("left_out.").or(name.strip_prefix("seconds."));
                if of.is_some_and(|of| !tried.contains(&suite(of))) {
                    whole.facts.insert(name, value);
                }
            }
        }
        let text = serde_json::to_string(&whole).map_err(|e| e.to_string())?;
        std::fs::create_dir_all(workshop.dir.join("results"))
            .and_then(|()| std::fs::write(&place, text))
            .map_err(|e| format!("{}: {e}", place.display()))
    }

    /// The last one of this job.
    pub fn kept(workshop: &Workshop, job: &str) -> Option<Self> {
        serde_json::from_slice(&std::fs::read(Self::place(workshop, job)).ok()?).ok()
    }

    pub fn print(&self) {
        println!("vm: {} took {} s", self.job, self.seconds);
        for check in &self.checks {
            println!("test {} ... {}", check.name, if check.ok { "ok" } else { "FAILED" });
        }
        if self.checks.iter().any(|c| !c.ok) {
            println!("---- {} ----", self.job);
            for comment in &self.comments {
                println!("{comment}");
            }
        }
    }
}

/// In the order of the report; the longest first, so that machines end together.
pub fn all(kernels: &[Kernel], options: &Options) -> Vec<Job> {
    let mut jobs: Vec<Job> = Vec::new();
    let mut add = |kernel: &Kernel, name: &str, run: Doing| {
        let place = jobs.len();
        jobs.push(Job {
            name: format!("{}/{name}", kernel.name),
            kernel: kernel.name.clone(),
            place,
            run,
        });
    };
    if let Some(program) = &options.guest {
        for kernel in kernels {
            let (k, program) = (kernel.clone(), program.clone());
            add(kernel, "program", Box::new(move |w| isolation::program(w, &k, &program)));
        }
        return jobs;
    }
    for kernel in kernels {
        let (k, words) = (kernel.clone(), options.suites.clone());
        add(
            kernel,
            "isolation",
            Box::new(move |w| {
                isolation::run(w, &k, &words.iter().map(String::as_str).collect::<Vec<_>>())
            }),
        );
    }
    for kernel in kernels {
        for table in residue::TABLES.iter().filter(|t| options.long || t.always) {
            let k = kernel.clone();
            let name = format!("residue/{}", table.name);
            add(kernel, &name, Box::new(move |w| residue::run(w, &k, table)));
        }
        for fault in faults::FAULTS.iter().filter(|f| options.long || f.always) {
            let k = kernel.clone();
            let name = format!("faults/{}", fault.name);
            add(kernel, &name, Box::new(move |w| faults::run(w, &k, fault)));
        }
        for variant in variants::VARIANTS {
            let k = kernel.clone();
            let name = format!("variant/{}", variant.name);
            add(kernel, &name, Box::new(move |w| variants::run(w, &k, variant)));
        }
    }
    jobs
}

impl Job {
    pub fn run(&self, workshop: &Workshop) -> Outcome {
        let start = Instant::now();
        let mut outcome = (self.run)(workshop).unwrap_or_else(|why| {
            let mut failed = Outcome::default();
            failed.comments.push(why);
            failed.check(false, "came to its end");
            failed
        });
        for check in &mut outcome.checks {
            check.name = format!("{}/{}", self.name, check.name);
        }
        outcome.job.clone_from(&self.name);
        outcome.kernel.clone_from(&self.kernel);
        outcome.seconds = start.elapsed().as_secs();
        outcome
    }
}

/// A job's own files: names below the guest's `/vm`.
#[derive(Debug, Default, Clone)]
pub struct Files {
    pub files: Vec<(String, u32, Vec<u8>)>,
    pub trees: Vec<(String, PathBuf)>,
}

impl Files {
    pub fn add(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.files.push((name.to_owned(), mode, content.to_owned()));
    }

    pub fn tree(&mut self, name: &str, dir: PathBuf) {
        self.trees.push((name.to_owned(), dir));
    }
}

/// A machine for one job.
pub struct Booted<'a> {
    pub kernel: &'a Kernel,
    pub job: String,
    /// Of the kernel's command line.
    pub append: String,
    pub files: Files,
    pub megabytes: u32,
    pub cpus: u32,
    pub cpu_flags: &'a str,
    pub drives: Vec<String>,
    /// QEMU's own words.
    pub more: Vec<String>,
    pub memory: Option<PathBuf>,
    pub patience: Duration,
}

static NUMBER: AtomicU32 = AtomicU32::new(0);

impl<'a> Booted<'a> {
    pub fn on(kernel: &'a Kernel) -> Self {
        Self {
            kernel,
            job: String::new(),
            append: String::new(),
            files: Files::default(),
            megabytes: 1024,
            cpus: 1,
            cpu_flags: "",
            drives: Vec::new(),
            more: Vec::new(),
            memory: None,
            patience: Duration::from_secs(600),
        }
    }

    pub fn boot(&self, workshop: &Workshop) -> Result<Machine> {
        let initramfs = workshop.initramfs(self.kernel, &self.files)?;
        let spec = Spec {
            image: &self.kernel.image,
            initramfs: &initramfs,
            append: format!("{} vm.job={}", self.append, self.job),
            megabytes: self.megabytes,
            cpus: self.cpus,
            cpu_flags: self.cpu_flags,
            root_disk: &workshop.root_disk,
            drives: self.drives.clone(),
            more: self.more.clone(),
            memory: self.memory.clone(),
            patience: self.patience,
        };
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        Machine::boot(&spec, &workshop.dir.join(format!("machines/{number}")))
    }

    /// A machine whose guest has said its first word, which is then the next line. Emulated kernels of
    /// several processors now and then die in their first seconds, long before anything of ours is there:
    /// such a boot is made again.
    fn begun(&self, workshop: &Workshop) -> Result<Machine> {
        for _ in 0..3 {
            let mut machine = self.boot(workshop)?;
            if machine.has_begun()? {
                return Ok(machine);
            }
        }
        self.boot(workshop)
    }

    /// Boots, and takes all that the guest says, to its plan.
    pub fn listen(&self, workshop: &Workshop) -> Result<Outcome> {
        self.attend(workshop, |_, words, _| Err(format!("the guest asks for {words:?}")))
    }

    /// The same, with someone who does what the guest asks for.
    pub fn attend(
        &self,
        workshop: &Workshop,
        mut asked: impl FnMut(&mut Machine, &[String], &mut Outcome) -> Result<String>,
    ) -> Result<Outcome> {
        let mut machine = self.begun(workshop)?;
        let mut outcome = Outcome::default();
        let planned = loop {
            let Some(line) = machine.line()? else { break None };
            match tap::parse(&line) {
                Said::Check { ok, name } => outcome.check(ok, &name),
                Said::Fact(name, value) => outcome.fact(&name, value),
                Said::Comment(text) | Said::Noise(text) => outcome.comments.push(text),
                Said::Ask(words) => {
                    let answer = asked(&mut machine, &words, &mut outcome)?;
                    machine.answer(&answer)?;
                }
                Said::Plan(count) => break Some(count),
            }
        };
        let said = outcome.checks.iter().len();
        if planned.is_none_or(|count| count > said) {
            let console = machine.console();
            let end: Vec<&str> = console.lines().rev().take(40).collect();
            outcome.comments.extend(end.into_iter().rev().map(str::to_owned));
            outcome.check(false, "the guest kept its plan");
        }
        Ok(outcome)
    }
}
