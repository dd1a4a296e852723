//! The command line of `cargo test --test vm`.

use std::path::PathBuf;

pub const USAGE: &str = "\
usage: cargo test --test vm -- [OPTIONS] [WORD…]
  WORD            only jobs whose name holds one of these words
  --list          names only
  --long          everything: each suite, each variant, more power cuts
  --kernel PATH   this kernel image too (its modules: /lib/modules beside it, or built in)
  --jobs N        machines at once (default: 2)
  --report FILE   write the results there (docs/kernels.md); of jobs and suites that this run leaves out, their last
  --guest PROG    boot each kernel for this static program alone; it speaks TAP on standard output
  --suite NAME    of the isolation suite only this test program (repeatable)
  --package NAME  unpack this Debian package, and what it depends on, into the guest's root (repeatable)
SUBLET_VM_KERNEL names a kernel as --kernel does.";

#[derive(Debug)]
pub struct Options {
    pub words: Vec<String>,
    pub list: bool,
    pub long: bool,
    pub kernels: Vec<PathBuf>,
    pub jobs: usize,
    pub report: Option<PathBuf>,
    pub guest: Option<PathBuf>,
    pub packages: Vec<String>,
    pub suites: Vec<String>,
}

impl Options {
    pub fn parse(args: impl Iterator<Item = String>) -> Result<Self, String> {
        let mut options = Self {
            words: Vec::new(),
            list: false,
            long: false,
            kernels: std::env::var_os("SUBLET_VM_KERNEL").map(PathBuf::from).into_iter().collect(),
            jobs: 2,
            report: None,
            guest: None,
            packages: Vec::new(),
            suites: Vec::new(),
        };
        let mut args = args;
        while let Some(arg) = args.next() {
            let mut value = || args.next().ok_or(format!("{arg} wants a value"));
            match arg.as_str() {
                "--list" => options.list = true,
                "--long" => options.long = true,
                "--kernel" => options.kernels.push(value()?.into()),
                "--jobs" => {
                    options.jobs = value()?.parse().map_err(|e| format!("--jobs: {e}"))?;
                }
                "--report" => options.report = Some(value()?.into()),
                "--guest" => options.guest = Some(value()?.into()),
                "--suite" => options.suites.push(value()?),
                "--package" => options.packages.push(value()?),
                // What cargo or a habit adds for libtest.
                "--nocapture" | "-q" | "--quiet" => {}
                word if !word.starts_with('-') => options.words.push(word.to_owned()),
                unknown => return Err(format!("unknown option {unknown}")),
            }
        }
        if options.jobs == 0 {
            return Err("--jobs wants at least 1".to_owned());
        }
        Ok(options)
    }

    pub fn wants(&self, name: &str) -> bool {
        self.words.is_empty() || self.words.iter().any(|word| name.contains(word.as_str()))
    }
}
