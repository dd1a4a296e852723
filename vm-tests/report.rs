//! `docs/kernels.md`, from the results of one run.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use super::Result;
use super::faults::FAULTS;
use super::job::Outcome;
use super::residue::{ROWS, TABLES};
use super::variants::VARIANTS;
use super::workshop::Workshop;

const HEAD: &str = "\
# Real kernels

Written by `just vm`, which boots each kernel under QEMU (software emulation) with a statically linked `sublet`, in
pure cgroup v2, and reads what was tried there. How it works: [vm-tests/README.md](../vm-tests/README.md). Every hostile
attempt has a control that succeeds without the protection, and a check that could not be made has failed.

";

const RESIDUE: &str = "\
## Residue

After each exec the machine is stopped and **all of its memory** is searched for the value: as it is, in hex, base64
(three alignments, both alphabets), percent-encoded, in UTF-16, and for pieces of 16 bytes. The value reaches the guest
sealed in a vault, so that nothing is there before, and a control finds it while it is in use. Numbers are whole copies in
any form; `+n` are pieces of a copy that was partly overwritten.

";

const RESIDUE_TAIL: &str = "\
`sublet` keeps no copy: where the command does not make one, or wipes its own, nothing is left, with or without
`init_on_free`. What is left in the other rows lies in freed pages, in no process:

- in the memory of the command and its children: buffers of `cat`, `curl` and `git`, the stack page where the kernel
  puts an environment;
- in the kernel's buffers that the command wrote to: pages of its own pipes (on `git`, that of git's helper), socket
  buffers, and of a long output the pages that its pipe gave back before it ended. What the pipe still has then is written
  over, and git's helper is given a memfd.

`init_on_free=1` has the kernel wipe what it frees; the columns show what that takes away.

";

pub fn write(path: &Path, workshop: &Workshop, outcomes: &[Outcome]) -> Result<()> {
    let mut text = HEAD.to_owned();
    let kernels: Vec<&str> = workshop.kernels.iter().map(|k| k.name.as_str()).collect();
    let of = |kernel: &str, job: &str| outcomes.iter().find(|o| o.job == format!("{kernel}/{job}"));
    kernels_and_lacks(&mut text, workshop, &of);
    isolation(&mut text, &kernels, &of);
    variants(&mut text, &kernels, &of);
    residue(&mut text, &kernels, &of);
    faults(&mut text, &kernels, &of);
    fs::write(path, text).map_err(|e| format!("{}: {e}", path.display()))
}

type Of<'a> = &'a dyn Fn(&str, &str) -> Option<&'a Outcome>;

fn row(text: &mut String, cells: impl IntoIterator<Item = String>) {
    let cells: Vec<String> = cells.into_iter().collect();
    // A String takes what is written to it.
    let _ = writeln!(text, "| {} |", cells.join(" | "));
}

fn table(text: &mut String, first: &str, kernels: &[&str]) {
    row(text, std::iter::once(first.to_owned()).chain(kernels.iter().map(|k| (*k).to_owned())));
    row(text, std::iter::repeat_n("---".to_owned(), kernels.len() + 1));
}

/// `12 of 12`, or what failed.
fn passed(outcome: Option<&Outcome>) -> String {
    let Some(outcome) = outcome else { return "not run".to_owned() };
    let ok = outcome.checks.iter().filter(|c| c.ok).count();
    let failed: Vec<String> = outcome
        .checks
        .iter()
        .filter(|c| !c.ok)
        .map(|c| c.name.rsplit('/').next().unwrap_or_default().to_owned())
        .collect();
    match failed.is_empty() {
        true => format!("all {ok}"),
        false => format!("{ok} of {}; **failed**: {}", outcome.checks.len(), failed.join(", ")),
    }
}

fn kernels_and_lacks(text: &mut String, workshop: &Workshop, of: Of<'_>) {
    text.push_str("## Kernels\n\n| kernel | from | Landlock ABI | what `sublet doctor` warns of there |\n|---|---|---|---|\n");
    for kernel in &workshop.kernels {
        let outcome = of(&kernel.name, "variant/as-it-is");
        let fact =
            |name: &str| outcome.and_then(|o| o.facts.get(name).cloned()).unwrap_or_default();
        let warnings: Vec<String> = outcome
            .into_iter()
            .flat_map(|o| &o.comments)
            .filter_map(|c| c.strip_prefix("doctor warn"))
            .filter_map(|c| c.split_whitespace().next())
            .map(|name| format!("`{name}`"))
            .collect();
        let origin = kernel.origin.rsplit('/').next().unwrap_or_default().to_owned();
        row(text, [fact("kernel"), format!("`{origin}`"), fact("landlock"), warnings.join(", ")]);
    }
    text.push_str(
        "\nWhat a kernel lacks is in every report (`missing`). Where nothing else gives the effect it is an error under\n\
         `enforcement = \"strict\"`, and the waiver that the message names, pasted into the profile, is enough: the variant\n\
         `as-it-is` tries that for `network.mode = \"host\"` (`waive = [\"scope\"]`, before Landlock ABI 6) and for ports\n\
         (`waive = [\"network\"]`, before ABI 4), and that neither is asked for where the kernel has it.\n\n",
    );
}

fn isolation(text: &mut String, kernels: &[&str], of: Of<'_>) {
    text.push_str("## The isolation suite\n\nThe integration tests themselves, at their own paths in the guest.\n\n");
    table(text, "suite", kernels);
    let mut suites: BTreeMap<String, BTreeMap<&str, (usize, usize)>> = BTreeMap::new();
    let mut left_out: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    for kernel in kernels {
        let Some(outcome) = of(kernel, "isolation") else { continue };
        for check in &outcome.checks {
            let name = check.name.rsplit('/').next().unwrap_or_default();
            let Some((suite, _)) = name.split_once("::") else { continue };
            let (tried, ok) =
                suites.entry(suite.to_owned()).or_default().entry(kernel).or_default();
            *tried += 1;
            *ok += usize::from(check.ok);
        }
        for name in outcome.facts.keys().filter_map(|n| n.strip_prefix("left_out.")) {
            left_out.entry(name.to_owned()).or_default().push(kernel);
        }
    }
    for (suite, by_kernel) in &suites {
        let cell = |kernel: &&str| match by_kernel.get(kernel) {
            Some((tried, ok)) if tried == ok => format!("all {ok}"),
            Some((tried, ok)) => format!("**{ok} of {tried}**"),
            None => "not run".to_owned(),
        };
        row(text, std::iter::once(format!("`{suite}`")).chain(kernels.iter().map(cell)));
    }
    text.push_str("\nLeft out, and why:\n\n");
    for (name, kernels) in &left_out {
        let why = match name.rsplit("::").next().unwrap_or_default() {
            "cargo_builds_a_crate" | "node_runs" => {
                "whole tool chains that the guest does not have"
            }
            _ if name.ends_with("redact::tests::") => {
                "properties of pure code, thousands of cases each: no kernel's affair"
            }
            "an_expired_lease_is_wiped_in_mid_exec" => {
                "its second is over before an emulated exec begins; the fault `trouble` has one of six"
            }
            _ => {
                "it is about what this kernel's Landlock lacks; the variant `as-it-is` tries what happens instead"
            }
        };
        let _ = writeln!(text, "- `{name}` ({}): {why}", kernels.join(", "));
    }
    text.push('\n');
}

fn variants(text: &mut String, kernels: &[&str], of: Of<'_>) {
    text.push_str("## Variants\n\nChecks that passed, of one boot each.\n\n");
    table(text, "variant", kernels);
    for variant in VARIANTS {
        let cell = |kernel: &&str| passed(of(kernel, &format!("variant/{}", variant.name)));
        let name = format!("`{}`: {}", variant.name, variant.what);
        row(text, std::iter::once(name).chain(kernels.iter().map(cell)));
    }
    text.push('\n');
}

fn residue(text: &mut String, kernels: &[&str], of: Of<'_>) {
    text.push_str(RESIDUE);
    let columns: Vec<(&str, &str)> =
        kernels.iter().flat_map(|k| TABLES.iter().map(|t| (*k, t.name))).collect();
    let names: Vec<String> = columns
        .iter()
        .map(|(k, t)| format!("{k}, `init_on_free={}`", usize::from(*t == "init_on_free")))
        .collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    table(text, "how, and the command", &names);
    for each in ROWS {
        let cell = |(kernel, name): &(&str, &str)| {
            let outcome = of(kernel, &format!("residue/{name}"));
            let fact =
                |what: &str| outcome.and_then(|o| o.facts.get(&format!("{what}.{}", each.name)));
            match (fact("copies"), fact("pieces").map(String::as_str)) {
                (Some(copies), Some("0")) => copies.clone(),
                (Some(copies), Some(pieces)) => format!("{copies} +{pieces}"),
                _ => "not run".to_owned(),
            }
        };
        row(text, std::iter::once(each.what.to_owned()).chain(columns.iter().map(cell)));
    }
    text.push('\n');
    text.push_str(RESIDUE_TAIL);
}

fn faults(text: &mut String, kernels: &[&str], of: Of<'_>) {
    text.push_str("## Faults\n\n");
    table(text, "fault", kernels);
    for fault in FAULTS {
        let cell = |kernel: &&str| {
            let outcome = of(kernel, &format!("faults/{}", fault.name));
            let fact = |name: &str| outcome.and_then(|o| o.facts.get(name).cloned());
            let load = match (fact("cuts"), fact("granted"), fact("used")) {
                (Some(cuts), Some(granted), Some(used)) => {
                    format!(
                        "; {cuts} cuts, {granted} grants and {used} uses acknowledged before them"
                    )
                }
                _ => String::new(),
            };
            format!("{}{load}", passed(outcome))
        };
        row(
            text,
            std::iter::once(format!("`{}`: {}", fault.name, fault.what))
                .chain(kernels.iter().map(cell)),
        );
    }
    text.push_str(
        "\nAfter each power cut, on the same disk: the trail is whole and holds the last head that was kept elsewhere; every\n\
         grant and every use that was acknowledged is in it, and no lease was used more often than granted; no lease of the\n\
         boot before can be used or is open; new ones can; and the value is nowhere on the disk. `power-cut-lossy` also takes\n\
         back any part of what the guest had written since its last flush (QEMU logs writes and flushes, and the disk is made\n\
         anew from a part of them).\n",
    );
}
