//! What `--explain` shows: the plan as it would be, of the same compilation, with nothing made or run.
#![forbid(unsafe_code)]

use super::compile::{self, Command, Compiled};
use super::exec::{self, Setting};
use super::into;
use super::posture::{self, Facts};
use super::wire::{Explanation, Prepare, Refusal, Spec};
use crate::sandbox::identity::{Identity, Mode};
use crate::sandbox::landlock;
use crate::sandbox::layout::{Access, Entry};
use crate::sandbox::seccomp;

pub fn explain(prepare: &Prepare, setting: &Setting) -> Result<Explanation, Refusal> {
    let pool = setting.host.config.host.uid_pool;
    let compiled = compile::sandbox(&Spec::of(prepare), &setting.host, setting.here.mode)?;
    let Command { environment, argv, .. } = compile::command(prepare, &compiled)?;
    let Compiled { profile, workspace, layout, .. } = &compiled;
    let mut identity = match setting.here.mode {
        Mode::Privileged => Identity::pooled(compiled.inside, pool.first),
        Mode::Rootless => Identity::of_caller(compiled.inside),
    };
    let ownership = exec::ownership(setting.here.mode, workspace.as_ref(), &mut identity)?;
    let cgroup = setting.here.cgroups.as_ref().map_err(Clone::clone).and_then(|cgroups| {
        let made = cgroups.make(&prepare.exec_id);
        made.and_then(|c| c.bound(compiled.cgroup_limits)).map_err(|e| compile::chain(&e))
    });
    let missing = landlock::missing(setting.here.landlock_abi);
    let limits = exec::limits(profile, cgroup.as_ref().ok().copied().unwrap_or_default());
    let posture = posture::posture(&Facts {
        mode: setting.here.mode,
        profile,
        landlock_missing: &missing,
        landlock_abi: setting.here.landlock_abi,
        cgroup,
        ownership,
        cpus: setting.here.cpus,
        never_swaps: (!prepare.deliveries.is_empty())
            .then_some(setting.here.mode == Mode::Privileged),
        joins: into::joins(compiled.network.as_ref()),
    })?;
    let mounts = layout.entries.iter().map(|(at, entry)| {
        let at = at.display();
        match entry {
            Entry::Directory => format!("{at}  directory"),
            Entry::Scratch { .. } => {
                format!("{at}  tmpfs, writable ({} for all of them)", profile.filesystem.tmp)
            }
            Entry::File { content } => format!("{at}  written by sublet, {} bytes", content.len()),
            Entry::Probe => format!("{at}  must be refused by landlock"),
            Entry::Symlink { target } => format!("{at}  -> {}", target.display()),
            Entry::Device { major, minor } => format!("{at}  device {major}:{minor}"),
            Entry::Bind { source, optional, access } => {
                let skipped = if *optional && !source.exists() {
                    " (the host has none: skipped)"
                } else {
                    ""
                };
                format!("{at}  the host's, {}{skipped}", mode_text(*access))
            }
            Entry::OfContainer { .. } => format!("{at}  the container's, read-only"),
            Entry::Workspace { access } => format!("{at}  workspace, {}", mode_text(*access)),
            Entry::Binary => format!("{at}  this sublet, read-only"),
            Entry::Agent { .. } => format!("{at}  the run's socket of the broker"),
            Entry::Inner => format!("{at}  the exec's own"),
            Entry::Secrets => format!("{at}  file deliveries, read-only"),
        }
    });
    let rules = layout.entries.iter().filter_map(|(at, entry)| {
        let at = at.display();
        match entry {
            Entry::Bind { access: Access::ReadOnly, .. }
            | Entry::OfContainer { .. }
            | Entry::Binary
            | Entry::Agent { .. } => Some(format!("{at}  read, execute")),
            Entry::Bind { .. } | Entry::Scratch { .. } => {
                Some(format!("{at}  read, write, make, execute"))
            }
            Entry::Workspace { access: Access::ReadWrite } => {
                Some(format!("{at}  read, write, make, execute"))
            }
            Entry::Workspace { access: Access::ReadOnly } => Some(format!("{at}  read, execute")),
            Entry::Device { .. } | Entry::Inner => Some(format!("{at}  read, write")),
            Entry::Directory
            | Entry::File { .. }
            | Entry::Probe
            | Entry::Symlink { .. }
            | Entry::Secrets => None,
        }
    });
    let lacking = missing.iter().map(|f| {
        let (abi, kernel) = f.since();
        format!("missing: {} (ABI {abi}, Linux {kernel})", f.as_str())
    });
    let name = profile.seccomp.filter.as_str();
    let filter = match seccomp::builtin_text(name).map(|text| seccomp::describe(name, text)) {
        Some(Ok(described)) => {
            let mut lines = vec![format!(
                "{}: {} calls allowed ({} of them with some arguments only), all others {}",
                described.name, described.allowed, described.conditional, described.default_action
            )];
            for group in described.refused {
                let mut calls: Vec<_> = group.calls.iter().map(|c| c.syscall.as_str()).collect();
                calls.dedup();
                lines.push(format!(
                    "refused with {}: {} ({})",
                    group.action,
                    group.name,
                    calls.join(" ")
                ));
            }
            lines
        }
        Some(Err(e)) => vec![format!("{name}: {e}")],
        None => vec![format!("{name}: not built in")],
    };
    Ok(Explanation {
        mode: match setting.here.mode {
            Mode::Privileged => "privileged".to_owned(),
            Mode::Rootless => "rootless".to_owned(),
        },
        inside_uid: identity.inside_uid,
        inside_gid: identity.inside_gid,
        outside_uid: match setting.here.mode {
            Mode::Privileged if identity.outside_uid == pool.first => {
                format!("a fresh one of {}:{}", pool.first, pool.count)
            }
            _ => identity.outside_uid.to_string(),
        },
        namespaces: exec::namespace_names(profile.network.mode),
        mounts: mounts.collect(),
        landlock_abi: setting.here.landlock_abi,
        landlock: rules.chain(lacking).collect(),
        filter,
        limits: limits
            .iter()
            .map(|l| format!("{} {}", exec::limit_name(l.resource), l.hard))
            .collect(),
        environment: environment.iter().map(|e| e.to_string_lossy().into_owned()).collect(),
        command: argv.iter().map(|a| a.to_string_lossy().into_owned()).collect(),
        posture,
    })
}

fn mode_text(access: Access) -> &'static str {
    match access {
        Access::ReadOnly => "read-only",
        Access::ReadWrite => "read-write",
    }
}
