//! Whether a command may carry a capability's value.
//!
//! Matching words is not enough: argv\[0\] is what the caller writes, the program is what the kernel
//! runs. So the caller says which file argv\[0\] resolved to, where that file lies, and whether the exec
//! could write it; a program that it could write would be whatever the exec wants.
#![forbid(unsafe_code)]

use std::ffi::{OsStr, OsString};
use std::path::Path;

use crate::model::verdict::Denial;
use crate::policy::denial;
use crate::profile::{Capability, CommandPattern, PatternElement};

/// A command, with what the launcher knows of its program.
#[derive(Debug, Clone, Copy)]
pub struct ResolvedCommand<'a> {
    /// As given, argv\[0\] included.
    pub argv: &'a [OsString],
    /// The absolute file inside the exec that argv\[0\] names: found on the profile's PATH where
    /// argv\[0\] has no `/`. Before symbolic links are followed.
    pub program: &'a Path,
    /// `program`'s directory is one of the profile's PATH, and no earlier one there has the same name.
    pub found_on_path: bool,
    /// The exec could change what `program` runs: it lies in a place that is writable inside (workspace,
    /// tmp, home, `read_write`), or passes through one by a symbolic link.
    pub writable_by_exec: bool,
}

/// Whether `command` may carry the value of `capability`. `asked` and `profile` are for the message.
///
/// # Errors
/// `command_not_permitted`, with the patterns that would be.
pub fn check_command(
    capability: &Capability,
    asked: &str,
    profile: &str,
    command: &ResolvedCommand<'_>,
) -> Result<(), Denial> {
    if capability.is_any_command() {
        return Ok(());
    }
    if !capability.command.iter().any(|pattern| matches(pattern, command)) {
        return Err(denial::command(capability, asked, profile, command));
    }
    if command.writable_by_exec {
        return Err(denial::writable_program(capability, asked, profile, command));
    }
    Ok(())
}

fn matches(pattern: &CommandPattern, command: &ResolvedCommand<'_>) -> bool {
    let Some((given, arguments)) = command.argv.split_first() else { return false };
    let program = match pattern.program() {
        PatternElement::Literal(name) => names_program(name, given, command),
        PatternElement::One | PatternElement::Rest => true,
    };
    program && pattern.permits_arguments(arguments)
}

/// A bare name means the file of that name on PATH, however the caller spells it; an absolute path means
/// that very file.
fn names_program(wanted: &str, given: &OsStr, command: &ResolvedCommand<'_>) -> bool {
    let program = command.program;
    let called_so = |path: &Path| given == path.as_os_str();
    if wanted.contains('/') {
        let wanted = Path::new(wanted);
        let by_name = command.found_on_path && wanted.file_name() == Some(given);
        program == wanted && (called_so(wanted) || by_name)
    } else {
        program.is_absolute()
            && program.file_name() == Some(OsStr::new(wanted))
            && command.found_on_path
            && (given == OsStr::new(wanted) || called_so(program))
    }
}
