//! Which container a run belongs to: a record that root's hook writes beside the sockets, and that broker
//! and launcher each read for themselves. Neither takes anyone's word for a container's process.
#![forbid(unsafe_code)]

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::trusted;
use crate::model::id::RunId;

/// The directory of the records, in the one of the sockets.
pub const DIRECTORY: &str = "containers";
/// A record is small; what is larger is none.
const MAX_RECORD: u64 = 64 << 10;
/// What the id of a container's run begins with.
const PREFIX: &str = "oci-";

/// One running container with a run of the broker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    pub run_id: RunId,
    pub container_id: String,
    /// Its init, as the host numbers it, and when that started: the number may be another's later.
    pub pid: i32,
    pub started: u64,
    pub boot_id: String,
    /// On the host: who the container's process is.
    pub uid: u32,
    pub gid: u32,
    /// Inside.
    pub workspace: PathBuf,
    pub rootfs: PathBuf,
    /// Directories of the root file system that the hook made, outermost first.
    pub made: Vec<PathBuf>,
    /// Of the runtime, in which the container is not.
    pub mount_namespace: String,
}

impl Record {
    /// Whether its process is still the one that it was written of.
    pub fn is_alive(&self, boot_id: &str) -> bool {
        self.boot_id == boot_id && started(self.pid).is_ok_and(|now| now == self.started)
    }
}

/// Whether a run of this name could only be a container's.
pub fn is_of_a_container(run: &RunId) -> bool {
    run.as_str().starts_with(PREFIX)
}

/// What the ids of all runs of a container begin with, the same for the same container id: a readable part
/// of it, and a digest of the whole.
pub fn prefix(container_id: &str, digest: &[u8; 32]) -> String {
    let plain = |c: &char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let shown: String = container_id.chars().filter(plain).take(12).collect();
    let digest: String = digest[..10].iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{PREFIX}{shown}-{digest}-")
}

/// When a process started, in ticks since the boot. proc_pid_stat(5), field 22.
pub fn started(pid: i32) -> io::Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let fields: Vec<&str> = fields.split_ascii_whitespace().collect();
    if matches!(fields.first(), Some(&("Z" | "X"))) {
        return Err(io::Error::from_raw_os_error(libc::ESRCH));
    }
    let started = fields.get(19).and_then(|field| field.parse().ok());
    started.ok_or_else(|| io::Error::other(format!("/proc/{pid}/stat shows no start")))
}

fn path(runtime_dir: &Path, run: &RunId) -> PathBuf {
    runtime_dir.join(DIRECTORY).join(format!("{run}.json"))
}

/// The record of a run, if it belongs to a container. One that another than root could have written is an
/// error, and so is one that does not tell of this run.
pub fn read(runtime_dir: &Path, run: &RunId) -> io::Result<Option<Record>> {
    let path = path(runtime_dir, run);
    match path.symlink_metadata() {
        Ok(_) => {}
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Ok(None);
        }
        Err(e) => return Err(e),
    }
    let record = read_at(&path)?;
    if record.run_id != *run {
        return Err(io::Error::other(format!("{} tells of another run", path.display())));
    }
    Ok(Some(record))
}

fn read_at(path: &Path) -> io::Result<Record> {
    trusted::refuse_foreign(path)?;
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC | libc::O_NONBLOCK)
        .open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other(format!("{} is no file", path.display())));
    }
    let mut text = String::new();
    file.take(MAX_RECORD).read_to_string(&mut text)?;
    serde_json::from_str(&text).map_err(io::Error::other)
}

/// Makes the directory of the records: root's, or of who serves.
pub fn make_directory(runtime_dir: &Path) -> io::Result<PathBuf> {
    let directory = runtime_dir.join(DIRECTORY);
    DirBuilder::new().recursive(true).mode(0o755).create(&directory)?;
    let found = directory.symlink_metadata()?;
    let us = rustix::process::geteuid().as_raw();
    if !found.is_dir() || found.uid() != us || found.mode() & 0o022 != 0 {
        let message = format!("{} is no directory that only we may write", directory.display());
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, message));
    }
    Ok(directory)
}

/// Writes a record whole, or not at all.
pub fn write(runtime_dir: &Path, record: &Record) -> io::Result<()> {
    make_directory(runtime_dir)?;
    let path = path(runtime_dir, &record.run_id);
    let fresh = path.with_extension(format!("{}.new", std::process::id()));
    let written = (|| {
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o644)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&fresh)?;
        // Others read it, whatever the umask of who calls the hook.
        file.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644))?;
        file.write_all(&serde_json::to_vec(record).map_err(io::Error::other)?)?;
        std::fs::rename(&fresh, &path)
    })();
    if written.is_err() {
        drop(std::fs::remove_file(&fresh));
    }
    written
}

/// Removes it, if it is there.
pub fn remove(runtime_dir: &Path, run: &RunId) -> io::Result<()> {
    match std::fs::remove_file(path(runtime_dir, run)) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// All records, or those of one container.
pub fn all(runtime_dir: &Path, prefix: Option<&str>) -> io::Result<Vec<Record>> {
    let directory = runtime_dir.join(DIRECTORY);
    let entries = match std::fs::read_dir(&directory) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(e),
    };
    let mut records = Vec::new();
    for entry in entries {
        let path = entry?.path();
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
        if name.ends_with(".json") && prefix.is_none_or(|prefix| name.starts_with(prefix)) {
            match read_at(&path) {
                Ok(record) => records.push(record),
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return Err(e),
            }
        }
    }
    Ok(records)
}

/// Removes the records of containers that are gone without a word, and what does not read as one. Before
/// the broker takes its runs up again, which then ends those.
pub fn sweep(runtime_dir: &Path, boot_id: &str) -> io::Result<()> {
    let directory = make_directory(runtime_dir)?;
    for entry in std::fs::read_dir(&directory)? {
        let path = entry?.path();
        if !read_at(&path).is_ok_and(|record| record.is_alive(boot_id)) {
            std::fs::remove_file(&path)?;
        }
    }
    // What is renamed here lasts: it is a tmpfs on most hosts, and a start away on the others.
    File::open(&directory)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(run: &str) -> Record {
        let pid = std::process::id() as i32;
        Record {
            run_id: run.parse().unwrap(),
            container_id: "c".into(),
            pid,
            started: started(pid).unwrap(),
            boot_id: "b".into(),
            uid: 0,
            gid: 0,
            workspace: "/w".into(),
            rootfs: "/r".into(),
            made: vec![],
            mount_namespace: String::new(),
        }
    }

    #[test]
    fn a_record_is_what_root_wrote_of_this_run() {
        let dir = tempfile::tempdir().unwrap();
        let one = record("oci-c-1");
        write(dir.path(), &one).unwrap();
        assert_eq!(read(dir.path(), &one.run_id).unwrap(), Some(one.clone()));
        assert_eq!(read(dir.path(), &"oci-c-2".parse().unwrap()).unwrap(), None);
        // One of another's name, a link to one, and one that others may write.
        let at = |name: &str| dir.path().join(DIRECTORY).join(name);
        std::fs::copy(at("oci-c-1.json"), at("oci-c-2.json")).unwrap();
        assert!(read(dir.path(), &"oci-c-2".parse().unwrap()).is_err());
        std::fs::remove_file(at("oci-c-2.json")).unwrap();
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o666);
        std::fs::set_permissions(at("oci-c-1.json"), open).unwrap();
        assert!(read(dir.path(), &one.run_id).is_err());
        remove(dir.path(), &one.run_id).unwrap();
        remove(dir.path(), &one.run_id).unwrap();
    }

    #[test]
    fn records_of_dead_containers_are_swept() {
        let dir = tempfile::tempdir().unwrap();
        let (alive, mut dead) = (record("oci-a-1"), record("oci-b-1"));
        dead.started += 1;
        write(dir.path(), &alive).unwrap();
        write(dir.path(), &dead).unwrap();
        std::fs::write(dir.path().join(DIRECTORY).join("x.json"), "{").unwrap();
        sweep(dir.path(), "b").unwrap();
        assert_eq!(all(dir.path(), None).unwrap(), [alive]);
        sweep(dir.path(), "another boot").unwrap();
        assert_eq!(all(dir.path(), None).unwrap(), []);
    }

    #[test]
    fn a_prefix_is_part_of_a_run_id_whatever_the_container_is_called() {
        for id in ["web", "0123456789abcdef0123456789abcdef", "ä/..", "-x", &"y".repeat(900)] {
            let run = format!("{}0011aabb", prefix(id, &[255; 32]));
            assert!(run.parse::<RunId>().is_ok(), "{run}");
        }
    }
}
