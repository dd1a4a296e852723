//! The same kernel with less, or with more: by its command line, its memory, its disks. What is tried in
//! each is in `guest/variants.rs`.

use std::fs;
use std::time::Duration;

use super::job::{Booted, Outcome};
use super::kernel::Kernel;
use super::workshop::{self, Workshop};
use super::{Result, residue, search};

pub struct Variant {
    pub name: &'static str,
    pub what: &'static str,
    append: &'static str,
    megabytes: u32,
}

const fn variant(
    name: &'static str,
    what: &'static str,
    append: &'static str,
    megabytes: u32,
) -> Variant {
    Variant { name, what, append, megabytes }
}

pub const VARIANTS: &[Variant] = &[
    variant(
        "as-it-is",
        "nothing changed: each lack of this kernel is an error under `strict`, and goes with the waiver that the message names",
        "",
        512,
    ),
    variant(
        "landlock-off",
        "Landlock left out of `lsm=`",
        "lsm=lockdown,yama,integrity,apparmor,bpf",
        512,
    ),
    variant("userns-off", "`user.max_user_namespaces=0`", "sysctl.user.max_user_namespaces=0", 512),
    variant("init-on-free", "`init_on_free=1`", "init_on_free=1", 512),
    variant("small-memory", "192 MiB", "", 192),
    variant("core-pattern", "a piped `kernel.core_pattern`", "", 512),
    variant("swap", "a swap partition, and memory under pressure", "", 320),
    variant("yama-0", "`kernel.yama.ptrace_scope=0`", "sysctl.kernel.yama.ptrace_scope=0", 512),
    variant("yama-1", "`kernel.yama.ptrace_scope=1`", "sysctl.kernel.yama.ptrace_scope=1", 512),
    variant("yama-2", "`kernel.yama.ptrace_scope=2`", "sysctl.kernel.yama.ptrace_scope=2", 512),
];

pub fn run(workshop: &Workshop, kernel: &Kernel, variant: &Variant) -> Result<Outcome> {
    let place = workshop.dir.join(format!("variant/{}-{}", kernel.name, variant.name));
    workshop::fresh_dir(&place)?;
    let names = ["one", "two", "three", "control"];
    let (files, values) = residue::sealed(workshop, &place, &names)?;
    let mut booted = Booted {
        job: format!("variant:{}", variant.name),
        append: variant.append.to_owned(),
        files,
        megabytes: variant.megabytes,
        patience: Duration::from_secs(400),
        ..Booted::on(kernel)
    };
    let swap = place.join("swap");
    if variant.name == "swap" {
        let file = fs::File::create(&swap).map_err(|e| format!("{}: {e}", swap.display()))?;
        file.set_len(1 << 30).map_err(|e| format!("{}: {e}", swap.display()))?;
        booted.drives.push(format!("if=virtio,format=raw,cache=unsafe,file={}", swap.display()));
    }
    booted.attend(workshop, |machine, asked, outcome| {
        if asked != ["swapped"] {
            return Err(format!("the guest asks for {asked:?}"));
        }
        machine.stop()?;
        for (name, value) in names.iter().zip(&values) {
            let found = search::search(&swap, value)?;
            outcome.comments.push(format!("{name} in the swap: {}", found.words()));
            let control = *name == "control";
            let what = if control {
                "an ordinary process's copy is found in the swap"
            } else {
                "a delivery is not found in the swap"
            };
            outcome.check((found.count() > 0) == control, &format!("{name}: {what}"));
        }
        machine.resume()?;
        Ok("go".to_owned())
    })
}
