//! `sublet doctor`: prints what [`crate::doctor`] finds.
#![forbid(unsafe_code)]

use super::fail::{Answer, NO, YES};
use super::output::Output;
use super::{Globals, load};
use crate::doctor::{Check, Places, Report, Status, examine, hooks};
use crate::host::{Host, HostError, default_config_file};

#[derive(Debug, clap::Args)]
#[command(after_long_help = HELP)]
pub struct DoctorArgs {}

pub const HELP: &str = "\
Examples:
  sublet doctor
  sublet doctor -v
  sublet doctor --json | jq '.checks[] | select(.status != \"ok\")'

Exit status:
  0    sublet can run here; warnings are no failure
  1    a check failed
  2    sublet could not look";

pub fn execute(globals: &Globals, _args: &DoctorArgs) -> Answer {
    let mut places = Places {
        config_is_named: globals.config.is_some(),
        config: globals.config.clone().or_else(default_config_file),
        state_dir: globals.state_dir.clone(),
        // The root stands in where the current directory is gone.
        workspace: std::env::current_dir().unwrap_or_else(|_| "/".into()),
        hook_directories: hooks::DIRECTORIES.map(Into::into).to_vec(),
        ..Places::default()
    };
    match Host::load(&load::places(globals)) {
        Ok(host) => {
            places.broker = Some(host.broker_account().map_err(|e| e.to_string()));
            places.uid_pool = host.config.host.uid_pool;
            places.waive.clone_from(&host.config.host.waive);
            places.hook_binary.clone_from(&host.config.hook.binary);
            places.runtime_dir = Some(host.runtime_dir);
            places.state_dir = Some(host.state_dir);
            places.host_config = Some(host.config);
        }
        Err(HostError::Config(located)) => places.config_error = Some(located.to_string()),
        // A file that cannot be read is found by its own check.
        Err(_) => {}
    }
    let report = examine(&places);
    let mut output = Output::new(globals.json);
    if globals.json {
        output.object(&report)?;
    } else {
        print(&report, globals.verbose > 0, &mut output)?;
    }
    output.finish()?;
    Ok(if report.status() == Status::Fail { NO } else { YES })
}

fn print(
    report: &Report,
    is_verbose: bool,
    output: &mut Output,
) -> Result<(), super::fail::Failure> {
    let width = report.checks.iter().map(|check| check.name.len()).max().unwrap_or(0);
    for Check { name, status, found, means, mend } in &report.checks {
        let mark = match (output.colour, status) {
            (false, _) => format!("{:4}", status.as_str()),
            (true, Status::Ok) => "\x1b[32mok  \x1b[0m".into(),
            (true, Status::Warn) => "\x1b[33mwarn\x1b[0m".into(),
            (true, Status::Fail) => "\x1b[1;31mfail\x1b[0m".into(),
        };
        output.bytes(mark.as_bytes())?;
        output.line(format_args!("  {name:width$}  {found}"))?;
        if is_verbose || *status != Status::Ok {
            paragraph(output, "      means: ", means)?;
        }
        if !mend.is_empty() {
            paragraph(output, "      mend:  ", mend)?;
        }
    }
    let verdict = match report.status() {
        Status::Ok => "sublet can enforce everything here",
        Status::Warn => "sublet can run here; see the warnings for what it gives less of",
        Status::Fail => "sublet cannot keep its promises here until the failures are mended",
    };
    output.line(format_args!(
        "{} ok, {} to heed, {} failed: {verdict}",
        report.count(Status::Ok),
        report.count(Status::Warn),
        report.count(Status::Fail),
    ))
}

/// Words under their label, in lines that fit most terminals.
fn paragraph(output: &mut Output, label: &str, text: &str) -> Result<(), super::fail::Failure> {
    const WIDTH: usize = 96;
    let mut line = label.to_owned();
    for word in text.split(' ') {
        if line.len() > label.len() && line.chars().count() + word.chars().count() >= WIDTH {
            output.line(line.trim_end())?;
            line = " ".repeat(label.len());
        }
        line.push_str(word);
        line.push(' ');
    }
    output.line(line.trim_end())
}
