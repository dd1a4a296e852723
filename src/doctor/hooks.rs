//! What container runtimes would call here, and what containers would get: the files of `hooks.d`, the
//! program that they name, the broker that it needs. Where no file names sublet, there is nothing to judge.
#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::{Check, Places};

/// Where podman and CRI-O look: oci-hooks(5).
pub const DIRECTORIES: [&str; 2] =
    ["/etc/containers/oci/hooks.d", "/usr/share/containers/oci/hooks.d"];

/// Without these there is no guard, no run, or no end of it.
const NEEDED: [&str; 3] = ["createRuntime", "createContainer", "poststop"];

/// oci-hooks(5), as far as it says what is called when.
#[derive(Deserialize)]
struct HookFile {
    hook: Called,
    #[serde(default)]
    stages: Vec<String>,
}

#[derive(Deserialize)]
struct Called {
    path: PathBuf,
    #[serde(default)]
    args: Vec<String>,
}

impl HookFile {
    /// The stage, if it is sublet that it calls.
    fn stage(&self) -> Option<&str> {
        let is_ours = |name: &str| name.contains("sublet");
        let named = self.hook.path.file_name().is_some_and(|n| is_ours(&n.to_string_lossy()))
            || self.hook.args.first().is_some_and(|first| is_ours(first));
        match self.hook.args.as_slice() {
            [.., hook, stage] if hook == "hook" && named => Some(stage),
            _ => None,
        }
    }
}

/// What the directories say of sublet.
#[derive(Debug, Default, PartialEq, Eq)]
struct Found {
    stages: BTreeSet<String>,
    programs: BTreeSet<PathBuf>,
    /// What is wrong with a file, and which.
    wrong: Option<String>,
}

pub fn examine(places: &Places) -> Vec<Check> {
    let found = look(&places.hook_directories);
    if found == Found::default() && places.hook_binary.is_none() {
        return vec![Check::ok(
            "hook_files",
            "none of sublet's",
            "fine: no container runtime calls sublet here (docs/oci.md)",
        )];
    }
    let mut checks = vec![files(&found, places.config.as_deref())];
    let given = places.hook_binary.as_ref().or(found.programs.first());
    checks.extend(given.map(|path| binary(path)));
    if !found.stages.is_empty() {
        checks.extend(places.runtime_dir.as_deref().map(broker));
    }
    checks
}

fn look(directories: &[PathBuf]) -> Found {
    let mut found = Found::default();
    for directory in directories {
        let Ok(entries) = std::fs::read_dir(directory) else { continue };
        let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
        paths.retain(|path| path.extension().is_some_and(|e| e == "json"));
        paths.sort();
        for path in paths {
            let place = path.display();
            let file = std::fs::read(&path).map_err(|e| e.to_string()).and_then(|text| {
                serde_json::from_slice::<HookFile>(&text).map_err(|e| e.to_string())
            });
            let file = match file {
                Ok(file) => file,
                Err(e) => {
                    found.wrong.get_or_insert(format!("{place}: {e}"));
                    continue;
                }
            };
            let Some(stage) = file.stage() else { continue };
            if file.stages != [stage] {
                let when = file.stages.join(", ");
                found.wrong.get_or_insert(format!("{place} calls `hook {stage}` at `{when}`"));
            }
            if let Err(e) = program(&file.hook.path) {
                let program = file.hook.path.display();
                found.wrong.get_or_insert(format!("{place} names {program}: {e}"));
            }
            found.stages.insert(stage.to_owned());
            found.programs.insert(file.hook.path);
        }
    }
    found
}

/// Root executes it at each container's start.
fn program(path: &Path) -> io::Result<()> {
    let meta = std::fs::metadata(path)?;
    if !path.is_absolute() || !meta.is_file() || meta.mode() & 0o111 == 0 {
        return Err(io::Error::other("no program"));
    }
    if meta.uid() != 0 || meta.mode() & 0o022 != 0 {
        return Err(io::Error::other("others than root may write it, and root executes it"));
    }
    Ok(())
}

fn files(found: &Found, config: Option<&Path>) -> Check {
    const NAME: &str = "hook_files";
    if let Some(wrong) = &found.wrong {
        return Check::fail(
            NAME,
            wrong.clone(),
            "the runtime starts no container at all, or one without what sublet is there for",
            "correct it: docs/oci/sublet-*.json are such files",
        );
    }
    if found.stages.is_empty() {
        return Check::ok(
            NAME,
            "none of sublet's",
            "fine: no container runtime calls sublet here (docs/oci.md)",
        );
    }
    let stages: Vec<&str> = found.stages.iter().map(String::as_str).collect();
    let missing: Vec<&str> =
        NEEDED.into_iter().filter(|stage| !found.stages.contains(*stage)).collect();
    if !missing.is_empty() {
        return Check::fail(
            NAME,
            format!("{}, and not {}", stages.join(", "), missing.join(", ")),
            "a container is not guarded, has no socket, or leaves its run behind",
            "copy all of docs/oci/sublet-*.json",
        );
    }
    let is_closed =
        config.and_then(|path| path.metadata().ok()).is_some_and(|meta| meta.mode() & 0o004 == 0);
    if let (true, Some(path)) = (is_closed, config) {
        return Check::warn(
            NAME,
            format!("{}; {} is closed to others", stages.join(", "), path.display()),
            "in a container with a user namespace createContainer cannot read it, and the container does \
             not start",
            format!("chmod 0644 {}: it holds no secret", path.display()),
        );
    }
    Check::ok(NAME, stages.join(", "), "podman and CRI-O call sublet for each container")
}

/// What containers get as `/run/sublet/bin/sublet`.
fn binary(path: &Path) -> Check {
    const NAME: &str = "hook_binary";
    let place = path.display();
    let judged = program(path).and_then(|()| is_static(path));
    match judged {
        Ok(true) => Check::ok(NAME, format!("{place}: static"), "it runs in every image"),
        Ok(false) => Check::warn(
            NAME,
            format!("{place}: linked dynamically"),
            "in an image without this machine's C library the agent has no sublet to call",
            "build one with -C target-feature=+crt-static, and name it: [hook] binary",
        ),
        Err(e) => Check::fail(
            NAME,
            format!("{place}: {e}"),
            "no container that asks for a run starts",
            "correct [hook] binary: an absolute path of a program that root alone may write",
        ),
    }
}

/// Whether it asks for no interpreter. elf(5): the program headers of a 64-bit file.
fn is_static(path: &Path) -> io::Result<bool> {
    const PT_INTERP: u32 = 3;
    let file = File::open(path)?;
    let mut header = [0; 64];
    file.read_exact_at(&mut header, 0)?;
    if &header[..5] != b"\x7fELF\x02" {
        return Err(io::Error::new(ErrorKind::InvalidData, "no 64-bit ELF file"));
    }
    let half = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
    let mut offset = [0; 8];
    offset.copy_from_slice(&header[32..40]);
    let (mut at, size, count) = (u64::from_le_bytes(offset), half(54), half(56));
    for _ in 0..count {
        let mut kind = [0; 4];
        file.read_exact_at(&mut kind, at)?;
        if u32::from_le_bytes(kind) == PT_INTERP {
            return Ok(false);
        }
        at = at.saturating_add(size.into());
    }
    Ok(true)
}

fn broker(runtime_dir: &Path) -> Check {
    const NAME: &str = "hook_broker";
    let socket = runtime_dir.join("control.sock");
    match UnixStream::connect(&socket) {
        Ok(_) => Check::ok(
            NAME,
            format!("listens at {}", socket.display()),
            "containers are guarded, and get their runs",
        ),
        Err(e) => Check::fail(
            NAME,
            format!("{}: {e}", socket.display()),
            "no container starts on this host: the hooks refuse without a broker",
            "start the service (systemctl start sublet), or take the files out of hooks.d",
        ),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixListener;

    use serde_json::json;

    use super::*;
    use crate::doctor::Status;

    fn write(directory: &Path, stage: &str, at: &str, program: &Path) {
        let file = json!({
            "version": "1.0.0", "stages": [at], "when": { "always": true },
            "hook": { "path": program, "args": ["sublet", "hook", stage] },
        });
        std::fs::write(directory.join(format!("{stage}.json")), file.to_string()).unwrap();
    }

    fn status(checks: &[Check], name: &str) -> Option<Status> {
        checks.iter().find(|check| check.name == name).map(|check| check.status)
    }

    /// One of root's, and it is no script.
    fn a_program() -> PathBuf {
        std::fs::canonicalize("/bin/true").unwrap()
    }

    #[test]
    fn files_are_judged_where_there_are_some() {
        let dir = tempfile::tempdir().unwrap();
        let places = || Places {
            hook_directories: vec![dir.path().join("none"), dir.path().to_owned()],
            ..Places::default()
        };
        let files = || status(&examine(&places()), "hook_files");
        assert_eq!(examine(&places()).len(), 1);
        // Another's is none of ours.
        let other = json!({ "hook": { "path": "/usr/bin/other" }, "stages": ["prestart"] });
        std::fs::write(dir.path().join("other.json"), other.to_string()).unwrap();
        assert_eq!((files(), examine(&places()).len()), (Some(Status::Ok), 1));
        for stage in NEEDED {
            write(dir.path(), stage, stage, &a_program());
            let last = stage == NEEDED[2];
            assert_eq!(files() == Some(Status::Ok), last, "{stage}");
        }
        // At another stage; a program that is not there, or that others may write; no JSON.
        write(dir.path(), "poststop", "poststart", &a_program());
        assert_eq!(files(), Some(Status::Fail));
        write(dir.path(), "poststop", "poststop", Path::new("/nonexistent/sublet"));
        assert_eq!(files(), Some(Status::Fail));
        let open = dir.path().join("sublet");
        std::fs::copy(a_program(), &open).unwrap();
        std::fs::set_permissions(&open, std::fs::Permissions::from_mode(0o777)).unwrap();
        write(dir.path(), "poststop", "poststop", &open);
        assert_eq!(files(), Some(Status::Fail));
        write(dir.path(), "poststop", "poststop", &a_program());
        assert_eq!(files(), Some(Status::Ok));
        let config = dir.path().join("sublet.toml");
        std::fs::write(&config, "").unwrap();
        for (mode, expected) in [(0o600, Status::Warn), (0o644, Status::Ok)] {
            std::fs::set_permissions(&config, std::fs::Permissions::from_mode(mode)).unwrap();
            let places = Places { config: Some(config.clone()), ..places() };
            assert_eq!(status(&examine(&places), "hook_files"), Some(expected), "{mode:o}");
        }
        std::fs::write(dir.path().join("x.json"), "{").unwrap();
        assert_eq!(files(), Some(Status::Fail));
    }

    #[test]
    fn the_broker_must_listen_where_hooks_need_it() {
        let dir = tempfile::tempdir().unwrap();
        for stage in NEEDED {
            write(dir.path(), stage, stage, &a_program());
        }
        let places = Places {
            hook_directories: vec![dir.path().to_owned()],
            runtime_dir: Some(dir.path().to_owned()),
            ..Places::default()
        };
        let broker = || status(&examine(&places), "hook_broker");
        assert_eq!(broker(), Some(Status::Fail));
        let listener = UnixListener::bind(dir.path().join("control.sock")).unwrap();
        assert_eq!(broker(), Some(Status::Ok));
        drop(listener);
        assert_eq!(broker(), Some(Status::Fail), "a socket that nobody listens on");
    }

    #[test]
    fn a_binary_is_static_dynamic_or_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("program");
        let check = |content: &[u8], expected: Status| {
            std::fs::write(&path, content).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
            let places = Places { hook_binary: Some(path.clone()), ..Places::default() };
            assert_eq!(status(&examine(&places), "hook_binary"), Some(expected));
        };
        check(&std::fs::read(a_program()).unwrap(), Status::Warn);
        let elf = |kind: u32| {
            let mut elf = vec![0; 64 + 56];
            elf[..5].copy_from_slice(b"\x7fELF\x02");
            (elf[32], elf[54], elf[56]) = (64, 56, 1);
            elf[64..68].copy_from_slice(&kind.to_le_bytes());
            elf
        };
        check(&elf(1), Status::Ok);
        check(&elf(3), Status::Warn);
        check(b"#!/bin/sh\n", Status::Fail);
        check(&elf(1)[..60], Status::Fail);
    }
}
