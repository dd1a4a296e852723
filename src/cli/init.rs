//! `sublet init`: a commented starter configuration. Never overwrites; holds no secret.
#![forbid(unsafe_code)]

use std::fs::{DirBuilder, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use super::Globals;
use super::fail::{Answer, Failure, YES};
use super::output::Output;
use crate::config::STARTER;

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
    let path = globals.config.clone().or_else(own_file).ok_or_else(|| {
        Failure::new("config", "no_home", "cannot tell where this user's configuration is")
            .hint("set HOME, or name the file with --config")
    })?;
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

/// The invoker's own configuration: a user may fall back on the system's, and cannot write that one.
fn own_file() -> Option<PathBuf> {
    if rustix::process::geteuid().is_root() {
        return Some("/etc/sublet/sublet.toml".into());
    }
    let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
    let base = absolute("XDG_CONFIG_HOME").or_else(|| Some(absolute("HOME")?.join(".config")))?;
    Some(base.join("sublet/sublet.toml"))
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
