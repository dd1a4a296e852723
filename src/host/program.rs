//! Which file a command's first word names, as far as the host's files tell; the launcher executes that
//! file and no other where a capability is pinned to it.
#![forbid(unsafe_code)]

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::policy::ResolvedCommand;
use crate::profile::{Profile, WorkspaceAccess};

/// argv[0] as a file.
#[derive(Debug, Clone)]
pub struct Program {
    /// Inside, before symbolic links are followed.
    pub path: PathBuf,
    found_on_path: bool,
    writable_by_exec: bool,
}

impl Program {
    /// Finds argv[0] as the exec will: on the profile's PATH, or in the workspace.
    pub fn find(name: &OsStr, profile: &Profile, workspace: &Path, home: &Path) -> Option<Self> {
        let image = profile.filesystem.root.as_ref().map(|r| r.resolve(home));
        let on_host = |inside: &Path| match &image {
            Some(image) => image.join(inside.strip_prefix("/").unwrap_or(inside)),
            None => inside.to_owned(),
        };
        let is_program = |inside: &Path| {
            std::fs::metadata(on_host(inside))
                .is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
        };
        let path: Vec<_> = profile.environment.path.iter().map(|d| d.resolve(home)).collect();
        let first_on_path =
            |name: &OsStr| path.iter().map(|d| d.join(name)).find(|p| is_program(p));
        let (program, found_on_path) = if name.as_bytes().contains(&b'/') {
            let program = workspace.join(name);
            let first = program.file_name().and_then(first_on_path);
            let found = first.is_some_and(|first| first == program);
            (program, found)
        } else {
            (first_on_path(name)?, true)
        };
        let mut writable = vec![PathBuf::from("/tmp"), PathBuf::from("/dev/shm")];
        writable.push(profile.filesystem.home.resolve(home));
        writable.extend(profile.filesystem.read_write.iter().map(|e| e.path.resolve(home)));
        if profile.filesystem.workspace == WorkspaceAccess::Rw {
            writable.push(workspace.to_owned());
        }
        let read_only: Vec<_> =
            profile.filesystem.read_only.iter().map(|e| e.path.resolve(home)).collect();
        // The innermost place that holds it decides: a read-only cache may lie in a writable home.
        let is_writable = |path: &Path| {
            path.ancestors().find_map(|above| {
                let writable = writable.iter().any(|w| w == above);
                let fixed = read_only.iter().any(|r| r == above);
                (writable || fixed).then_some(writable)
            }) == Some(true)
        };
        let real = on_host(&program).canonicalize().unwrap_or_else(|_| program.clone());
        let writable_by_exec = is_writable(&program) || is_writable(&real);
        Some(Self { path: program, found_on_path, writable_by_exec })
    }

    /// As the launcher found it in a container, where only it may look.
    pub fn in_container(path: PathBuf, found_on_path: bool, writable_by_exec: bool) -> Self {
        Self { path, found_on_path, writable_by_exec }
    }

    /// With its arguments, as the policy judges it.
    pub fn as_command<'a>(&'a self, argv: &'a [OsString]) -> ResolvedCommand<'a> {
        ResolvedCommand {
            argv,
            program: &self.path,
            found_on_path: self.found_on_path,
            writable_by_exec: self.writable_by_exec,
        }
    }
}
