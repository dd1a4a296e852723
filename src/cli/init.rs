//! `sublet init`: a commented starter configuration. Never overwrites; holds no secret.
#![forbid(unsafe_code)]

use std::fs::{DirBuilder, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::Path;

use super::Globals;
use super::fail::{Answer, Failure, YES};
use super::output::Output;
use super::paths::{self, Who};

/// Everything in it is a comment: it changes nothing until edited.
pub const STARTER: &str = include_str!("starter.toml");

#[derive(Debug, clap::Args)]
#[command(after_long_help = HELP)]
pub struct InitArgs {
    /// Print it and write nothing
    #[arg(long)]
    pub print: bool,
}

pub const HELP: &str = "\
Examples:
  sublet init
  sublet init --config ./sublet.toml
  sublet init --print | less

Exit status:
  0    written or printed
  2    the file exists already, or could not be written";

pub fn execute(globals: &Globals, args: &InitArgs) -> Answer {
    let mut output = Output::new(globals.json);
    if args.print {
        output.bytes(STARTER.as_bytes())?;
        output.finish()?;
        return Ok(YES);
    }
    let path = paths::config(globals, &Who::of_this_process())?.path;
    write_new(&path).map_err(|e| match e.kind() {
        io::ErrorKind::AlreadyExists => {
            Failure::new("config", "config_exists", format!("{} exists already", path.display()))
                .hint("edit it, name another file with --config, or see sublet init --print")
        }
        _ => {
            Failure::new("config", "config_not_written", format!("cannot write {}", path.display()))
                .because(&e)
                .hint("name a file that you may write with --config")
        }
    })?;
    if globals.json {
        output.object(&serde_json::json!({ "path": path }))?;
    } else {
        output.line(format_args!("wrote {}", path.display()))?;
        output.line("Everything in it is a comment. Next: edit it, then `sublet doctor`.")?;
    }
    output.finish()?;
    Ok(YES)
}

/// A file that was half written is taken away again: a truncated configuration could permit more than a
/// whole one.
fn write_new(path: &Path) -> io::Result<()> {
    if let Some(parent) = path.parent().filter(|p| !p.as_os_str().is_empty()) {
        DirBuilder::new().recursive(true).mode(0o755).create(parent)?;
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    let written = file.write_all(STARTER.as_bytes()).and_then(|()| file.sync_all());
    if written.is_err() {
        std::fs::remove_file(path)?;
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_starter_changes_nothing_until_edited() {
        assert_eq!(toml::from_str::<toml::Table>(STARTER), Ok(toml::Table::new()));
    }

    #[test]
    fn uncommented_it_shows_every_table() {
        let edited: String = STARTER
            .lines()
            .filter_map(|line| line.strip_prefix('#'))
            .filter(|line| !line.starts_with(' ') && !line.is_empty())
            .map(|line| format!("{line}\n"))
            .collect();
        let table: toml::Table = toml::from_str(&edited).unwrap();
        let names: Vec<&str> = table.keys().map(String::as_str).collect();
        assert_eq!(names, ["ceilings", "host", "leases", "principals", "secrets", "state"]);
    }
}
