//! `sublet run --explain`: the verdicts and the sandbox, for people or as one object.
#![forbid(unsafe_code)]

use super::Globals;
use super::fail::{Answer, Failure, NOT_RUN, YES};
use super::output::Output;
use crate::model::report::Status;
use crate::run::Explained;

pub fn print(globals: &Globals, explained: &Explained) -> Answer {
    let mut out = Output::new(globals.json);
    if out.json {
        out.object(explained)?;
    } else {
        text(&mut out, explained)?;
    }
    out.finish()?;
    // As the run would have ended here: a script asks with --explain first.
    Ok(if explained.leases.iter().all(|l| l.granted) { YES } else { NOT_RUN })
}

fn text(out: &mut Output, explained: &Explained) -> Result<(), Failure> {
    let sandbox = &explained.sandbox;
    out.line(format_args!("profile    {}", explained.profile))?;
    out.line(format_args!("workspace  {}", explained.workspace.display()))?;
    out.line(format_args!("command    {}", sandbox.command.join(" ")))?;
    out.line(format_args!(
        "mode       {}: uid {} inside, {} on the host",
        sandbox.mode, sandbox.inside_uid, sandbox.outside_uid
    ))?;
    out.line(format_args!("namespaces {}", sandbox.namespaces.join(" ")))?;
    for lease in &explained.leases {
        if lease.granted {
            out.line(format_args!(
                "lease      {}: granted, channel {}, {} s, {} use(s)",
                lease.asked,
                lease.channel.unwrap_or_default(),
                lease.ttl_seconds.unwrap_or_default(),
                lease.uses.unwrap_or_default()
            ))?;
        } else {
            let reason = lease.reason.map(|r| r.as_str()).unwrap_or_default();
            out.line(format_args!("lease      {}: denied, {reason}", lease.asked))?;
            out.line(format_args!("  why: {}", lease.message.as_deref().unwrap_or_default()))?;
            out.line(format_args!("  try: {}", lease.hint.as_deref().unwrap_or_default()))?;
        }
    }
    let landlock = format!("landlock (ABI {})", sandbox.landlock_abi);
    for (title, lines) in [
        ("mounts", &sandbox.mounts),
        (landlock.as_str(), &sandbox.landlock),
        ("system calls", &sandbox.filter),
        ("limits", &sandbox.limits),
        ("environment", &sandbox.environment),
    ] {
        out.line(title)?;
        for line in lines {
            out.line(format_args!("  {line}"))?;
        }
    }
    out.line("enforced")?;
    for (effect, enforcement) in &sandbox.posture.0 {
        let status = match enforcement.status {
            Status::Full => "full",
            Status::Partial => "partial",
            Status::None => "none",
        };
        let by = enforcement.by.join(", ");
        out.line(format_args!("  {:<20} {status:<8} {by}", effect.as_str()))?;
        for missing in &enforcement.missing {
            out.line(format_args!("  {:<20} missing: {missing}", ""))?;
        }
    }
    Ok(())
}
