//! The files, programs and addresses that values come from: there, and nobody else's to change. Opens no value,
//! runs no program, speaks to no address.
#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::{Check, Status};
use crate::config::{HostConfig, Minted, SecretSource};
use crate::host::trusted;
use crate::model::name::SecretName;

/// What is wrong with one source.
struct Fault {
    status: Status,
    found: String,
    mend: String,
}

impl Fault {
    fn fail(found: String, mend: impl Into<String>) -> Self {
        Self { status: Status::Fail, found, mend: mend.into() }
    }

    fn warn(found: String, mend: impl Into<String>) -> Self {
        Self { status: Status::Warn, found, mend: mend.into() }
    }
}

pub fn examine(config: &HostConfig) -> Vec<Check> {
    let (mut files, mut commands, mut addresses) = (Vec::new(), Vec::new(), Vec::new());
    let mut hosts = BTreeSet::new();
    for (name, entry) in &config.secrets {
        match &entry.source {
            SecretSource::File { path } => files.push(file(name, path)),
            SecretSource::Command { command, .. } => {
                commands
                    .extend(command.first().map(|program| program_of(name, Path::new(program))));
            }
            SecretSource::Minted(minted) => {
                files.extend(minted.ca_file.as_deref().map(|path| authorities(name, path)));
                addresses.push(address(name, minted));
                hosts.extend(minted.kind.urls().iter().map(|url| url.authority()));
            }
            SecretSource::Vault | SecretSource::Jwt(_) | SecretSource::SshCa(_) => {}
        }
    }
    let spoken_to = Vec::from_iter(hosts).join(", ");
    [
        judged(
            "secret_files",
            &files,
            "there, and nobody else's to read or change",
            "leases of these secrets are denied, or their value is known to others or someone else's",
        ),
        judged(
            "secret_commands",
            &commands,
            "there, and nobody else can change what is run",
            "leases of these secrets are denied, or others say what runs as the launcher's user",
        ),
        judged(
            "secret_addresses",
            &addresses,
            &format!("spoken to over TLS: {spoken_to}"),
            "what proves this host to a source, and the value itself, pass to whoever answers there",
        ),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// One check of all sources of a kind; none where there is no such source.
fn judged(name: &'static str, sources: &[Option<Fault>], fine: &str, means: &str) -> Option<Check> {
    if sources.is_empty() {
        return None;
    }
    let faults: Vec<&Fault> = sources.iter().flatten().collect();
    let Some(worst) = faults.iter().map(|fault| fault.status).max() else {
        return Some(Check::ok(
            name,
            format!("{}, {fine}", sources.len()),
            "their leases can be served",
        ));
    };
    let all = |of: fn(&Fault) -> &str| {
        faults.iter().map(|fault| of(fault)).collect::<Vec<_>>().join("; ")
    };
    let check = Check::fail(name, all(|fault| &fault.found), means, all(|fault| &fault.mend));
    Some(Check { status: worst, ..check })
}

/// As the launcher opens it.
fn file(name: &SecretName, path: &Path) -> Option<Fault> {
    let shown = path.display();
    let found = match std::fs::metadata(path) {
        Ok(found) => found,
        Err(e) => {
            let mend = format!("put it there, or correct `path` of [secrets.{name}]");
            return Some(Fault::fail(format!("{name}: {shown}: {e}"), mend));
        }
    };
    let mode = found.mode() & 0o7777;
    if !found.is_file() {
        return Some(Fault::fail(format!("{name}: {shown} is no regular file"), "name a file"));
    }
    if mode & 0o007 != 0 {
        let found = format!("{name}: {shown} is open to every user (mode {mode:04o})");
        return Some(Fault::fail(found, format!("chmod o= {shown}")));
    }
    foreign(path)
        .map(|why| Fault::warn(format!("{name}: {why}"), format!("chown and chmod {shown}")))
}

fn program_of(name: &SecretName, path: &Path) -> Option<Fault> {
    let shown = path.display();
    let correct = format!("put it there, or correct `command` of [secrets.{name}]");
    match std::fs::metadata(path) {
        Err(e) => Some(Fault::fail(format!("{name}: {shown}: {e}"), correct)),
        Ok(found) if !found.is_file() || found.mode() & 0o111 == 0 => {
            Some(Fault::fail(format!("{name}: {shown} is no program"), correct))
        }
        Ok(_) => foreign(path).map(|why| {
            let mend =
                format!("give {shown} and what it lies in to root alone (chown, chmod go-w)");
            Fault::fail(format!("{name}: {why}"), mend)
        }),
    }
}

/// Who can write it says which server is the right one.
fn authorities(name: &SecretName, path: &Path) -> Option<Fault> {
    let shown = path.display();
    match std::fs::metadata(path) {
        Err(e) => {
            let mend = format!("put it there, or correct `ca_file` of [secrets.{name}]");
            Some(Fault::fail(format!("{name}: {shown}: {e}"), mend))
        }
        Ok(_) => foreign(path).map(|why| {
            let mend =
                format!("give {shown} and what it lies in to root alone (chown, chmod go-w)");
            Fault::fail(format!("{name}: {why}"), mend)
        }),
    }
}

/// Plain text is for this machine alone, as the configuration holds it: who has the port has all.
fn address(name: &SecretName, minted: &Minted) -> Option<Fault> {
    let plain = minted.kind.urls().into_iter().find(|url| !url.tls)?;
    let found = format!("{name}: {} is spoken to in plain text", plain.authority());
    Some(Fault::warn(found, "for tests; otherwise name an address with TLS"))
}

/// Why someone other than root and this user could change it, or put another in its place.
fn foreign(path: &Path) -> Option<String> {
    let why = trusted::refuse_foreign(path).err()?.to_string();
    Some(why.split(';').next().unwrap_or_default().to_owned())
}

#[cfg(test)]
mod tests {
    use std::fs::{Permissions, set_permissions, write};
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn secrets(text: &str) -> Vec<Check> {
        examine(&HostConfig::parse(text, "sublet.toml").unwrap())
    }

    #[test]
    fn what_is_not_configured_is_not_judged() {
        assert_eq!(secrets(""), []);
        assert_eq!(secrets("[secrets.a]\nsource = \"vault\"\nallow = [\"a.b@c.test\"]\n"), []);
    }

    #[test]
    fn files_and_programs_are_there_and_nobody_elses() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("it");
        let mode = |mode| set_permissions(&path, Permissions::from_mode(mode)).unwrap();
        let place = path.display();
        let file = format!(
            "[secrets.a]\nsource = \"file\"\npath = \"{place}\"\nallow = [\"a.b@c.test\"]\n"
        );
        let command = format!(
            "[secrets.a]\nsource = \"command\"\ncommand = [\"{place}\"]\nallow = [\"a.b@c.test\"]\n"
        );
        #[track_caller]
        fn check(text: &str, name: &str, status: Status, word: &str) {
            let checks = secrets(text);
            assert_eq!(checks.len(), 1, "{checks:?}");
            assert_eq!((checks[0].name, checks[0].status), (name, status), "{checks:?}");
            assert!(checks[0].found.contains(word), "{checks:?}");
            assert_eq!(checks[0].mend.is_empty(), status == Status::Ok, "{checks:?}");
        }
        check(&file, "secret_files", Status::Fail, "No such file");
        check(&command, "secret_commands", Status::Fail, "No such file");
        write(&path, "x").unwrap();
        mode(0o600);
        check(&file, "secret_files", Status::Ok, "1, ");
        check(&command, "secret_commands", Status::Fail, "no program");
        mode(0o644);
        check(&file, "secret_files", Status::Fail, "open to every user");
        mode(0o660);
        check(&file, "secret_files", Status::Warn, "others may write it");
        mode(0o755);
        check(&command, "secret_commands", Status::Ok, "1, ");
        mode(0o775);
        check(&command, "secret_commands", Status::Fail, "others may write it");
        mode(0o755);
        set_permissions(dir.path(), Permissions::from_mode(0o777)).unwrap();
        check(&command, "secret_commands", Status::Fail, "others may write it");
    }

    #[test]
    fn addresses_in_plain_text_are_told() {
        let of = |url: &str| {
            format!(
                "[secrets.b]\nsource = \"vault\"\nallow = []\n[secrets.a]\nsource = \"oauth\"\n\
                 token_url = \"{url}\"\nclient_id = \"c\"\nclient_secret = \"b\"\nallow = [\"a.b@c.test\"]\n"
            )
        };
        let fine = &secrets(&of("https://login.test/token"))[0];
        assert_eq!((fine.name, fine.status), ("secret_addresses", Status::Ok));
        assert!(fine.found.contains("login.test"), "{fine:?}");
        assert_eq!(secrets(&of("http://127.0.0.1:8080/token"))[0].status, Status::Warn);
    }
}
