//! `sublet man`: a manual page of every command, made from the definitions and their help.
//!
//! Writes to standard output, or one file a page into a directory that exists or is made.
#![forbid(unsafe_code)]

use std::io;
use std::path::PathBuf;

use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, roman};

use super::Globals;
use super::fail::{Answer, Failure, YES};
use super::output::Output;

#[derive(Debug, clap::Args)]
#[command(after_long_help = HELP)]
pub struct ManArgs {
    /// The command whose page to print, such as `run` or `secret set` [default: sublet itself]
    #[arg(value_name = "COMMAND", conflicts_with = "out")]
    pub command: Vec<String>,
    /// Write the pages of all commands into this directory
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
}

pub const HELP: &str = "\
Examples:
  sublet man run | man -l -
  sublet man --out /usr/local/share/man/man1

Exit status:
  0    printed or written
  2    bad usage, no such command, or a page could not be written";

/// One page: `sublet-secret-set`, and its roff.
struct Page {
    name: String,
    roff: Vec<u8>,
}

pub fn execute(globals: &Globals, args: &ManArgs) -> Answer {
    let pages = pages().map_err(|e| Failure::stdout(&e))?;
    let Some(dir) = &args.out else {
        let wanted = std::iter::once("sublet").chain(args.command.iter().map(String::as_str));
        let wanted = wanted.collect::<Vec<_>>().join("-");
        let page = pages.iter().find(|page| page.name == wanted).ok_or_else(|| {
            let names: Vec<&str> = pages.iter().map(|page| page.name.as_str()).collect();
            Failure::new("usage", "no_such_page", format!("there is no manual page {wanted}"))
                .hint(format!("the pages are: {}", names.join(", ")))
        })?;
        let mut output = Output::new(globals.json);
        output.bytes(&page.roff)?;
        output.finish()?;
        return Ok(YES);
    };
    let failed = |path: &std::path::Path, e: &io::Error| {
        Failure::new("output", "page_not_written", format!("cannot write {}", path.display()))
            .because(e)
            .hint("name a directory that you may write to with --out")
    };
    std::fs::create_dir_all(dir).map_err(|e| failed(dir, &e))?;
    let mut output = Output::new(globals.json);
    for page in &pages {
        let path = dir.join(&page.name).with_extension("1");
        std::fs::write(&path, &page.roff).map_err(|e| failed(&path, &e))?;
        if globals.json {
            output.object(&serde_json::json!({ "page": page.name, "path": path }))?;
        } else {
            output.line(path.display())?;
        }
    }
    output.finish()?;
    Ok(YES)
}

fn pages() -> io::Result<Vec<Page>> {
    // `help` would add a page for each page.
    let mut top = super::definitions().disable_help_subcommand(true);
    top.build();
    let mut pages = Vec::new();
    collect(&top, "sublet", &mut pages)?;
    Ok(pages)
}

fn collect(command: &clap::Command, name: &str, pages: &mut Vec<Page>) -> io::Result<()> {
    pages.push(Page { name: name.to_owned(), roff: page(command, name)? });
    for sub in command.get_subcommands() {
        collect(sub, &format!("{name}-{}", sub.get_name()), pages)?;
    }
    Ok(())
}

/// The sections of man-pages(7) in their order. Examples, exit statuses, files and environment come from
/// the text that `--help` ends with, so that the two cannot disagree.
fn page(command: &clap::Command, name: &str) -> io::Result<Vec<u8>> {
    let man = Man::new(command.clone())
        .title(name.to_uppercase())
        .section("1")
        .source(concat!("sublet ", env!("CARGO_PKG_VERSION")))
        .manual("sublet manual");
    let mut roff = Vec::new();
    man.render_title(&mut roff)?;
    man.render_name_section(&mut roff)?;
    man.render_synopsis_section(&mut roff)?;
    man.render_description_section(&mut roff)?;
    man.render_options_section(&mut roff)?;
    let has_subcommands = command.get_subcommands().any(|sub| !sub.is_hide_set());
    if has_subcommands {
        man.render_subcommands_section(&mut roff)?;
    }
    let help = command.get_after_long_help().map(ToString::to_string).unwrap_or_default();
    for (title, lines) in sections(&help) {
        let mut section = Roff::new();
        section.control("SH", [title.to_uppercase().as_str()]).control("nf", []);
        for line in lines {
            section.text([roman(line)]);
        }
        section.control("fi", []).to_writer(&mut roff)?;
    }
    if name != "sublet" {
        let mut section = Roff::new();
        section.control("SH", ["SEE ALSO"]).text([bold("sublet"), roman("(1)")]);
        section.to_writer(&mut roff)?;
    }
    Ok(roff)
}

/// `Title:` and the indented lines below it.
fn sections(help: &str) -> Vec<(&str, Vec<&str>)> {
    let mut sections: Vec<(&str, Vec<&str>)> = Vec::new();
    for line in help.lines() {
        match (line.strip_suffix(':'), sections.last_mut()) {
            (Some(title), _) if !line.starts_with(' ') => sections.push((title, Vec::new())),
            (_, Some((_, lines))) if !line.trim().is_empty() => lines.push(line.trim_start()),
            _ => {}
        }
    }
    sections
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_has_examples_and_exit_statuses() {
        fn check(command: &clap::Command, name: &str) {
            let help = command.get_after_long_help().map(ToString::to_string).unwrap_or_default();
            let titles: Vec<&str> = sections(&help).iter().map(|(title, _)| *title).collect();
            assert!(titles.starts_with(&["Examples", "Exit status"]), "{name}: {titles:?}");
            assert!(command.get_about().is_some(), "{name} says not what it does");
            for sub in command.get_subcommands() {
                check(sub, &format!("{name} {}", sub.get_name()));
            }
        }
        let mut top = crate::cli::definitions().disable_help_subcommand(true);
        top.build();
        check(&top, "sublet");
    }

    #[test]
    fn the_definitions_are_sound() {
        crate::cli::definitions().debug_assert();
    }
}
