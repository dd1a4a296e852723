//! The guest's root: files of Debian packages, of those that this machine has as they lie here, of others
//! unpacked; and the integration tests at their own absolute paths. An ext4 image, made without mounting.

use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::debian::{self, Suite};
use super::isolation::Built;
use super::{Result, workshop};

/// What the suites talk to. `.ci/run` installs most of it; what is absent is unpacked.
const PACKAGES: &[&str] = &[
    "bash",
    "coreutils",
    "dash",
    "diffutils",
    "findutils",
    "grep",
    "gzip",
    "hostname",
    "libc-bin",
    "login",
    "mawk",
    "mount",
    "passwd",
    "procps",
    "sed",
    "tar",
    "util-linux",
    "bsdutils",
    "perl-base",
    "debianutils",
    "git",
    "curl",
    "runc",
    "crun",
    "podman",
    "strace",
    "busybox-static",
    "openssl",
    "openssh-client",
    "bubblewrap",
    "e2fsprogs",
    "attr",
    "libc6-dev",
    "gcc",
    "make",
    "python3-minimal",
    "python3",
    "systemd",
    "libcap2-bin",
    "libgcc-s1",
    "libc6",
    "ca-certificates",
];
/// What packages make when they are installed.
const MADE: &[&str] = &[
    "/bin",
    "/sbin",
    "/lib",
    "/lib32",
    "/lib64",
    "/libx32",
    "/etc/alternatives",
    "/etc/ssl/certs",
    "/etc/ld.so.cache",
    "/etc/passwd",
    "/etc/group",
    "/etc/nsswitch.conf",
    "/usr/bin/awk",
    "/usr/bin/cc",
    "/usr/bin/which",
    "/etc/host.conf",
];
/// Nothing reads these.
const LEFT_OUT: [&str; 5] = [
    "/usr/share/doc/",
    "/usr/share/man/",
    "/usr/share/locale/",
    "/usr/share/info/",
    "/usr/share/lintian/",
];

pub fn root(dir: &Path, built: &Built, more: &[String]) -> Result<PathBuf> {
    let stage = tools(dir, more)?;
    workshop::say("the guest's root disk");
    // Root's alone, as everywhere: that others cannot read it is among what is tried.
    let shadow = stage.join("etc/shadow");
    fs::write(&shadow, "root:*:19000:0:99999:7:::\n").map_err(|e| e.to_string())?;
    fs::set_permissions(&shadow, fs::Permissions::from_mode(0o600)).map_err(|e| e.to_string())?;
    for (from, to) in &built.files {
        let inside = stage.join(to.strip_prefix("/").map_err(|e| e.to_string())?);
        put(from, &inside)?;
    }
    let place = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let inside = stage.join(place.strip_prefix("/").map_err(|e| e.to_string())?);
    fs::create_dir_all(&inside).map_err(|e| format!("{}: {e}", inside.display()))?;
    let image = dir.join("root.ext4");
    let failed = |e: std::io::Error| format!("{}: {e}", image.display());
    let file = fs::File::create(&image).map_err(failed)?;
    // Sparse: what is not used is not there.
    file.set_len(6 << 30).map_err(failed)?;
    let mut make = Command::new(workshop::which("mke2fs").unwrap_or("mke2fs".into()));
    make.args(["-q", "-F", "-t", "ext4", "-E", "root_owner=0:0,lazy_itable_init=1", "-d"]);
    workshop::output(make.arg(&stage).arg(&image))?;
    Ok(image)
}

/// The packages' files, laid out once for each set of packages and versions.
fn tools(dir: &Path, more: &[String]) -> Result<PathBuf> {
    let wanted: Vec<String> =
        PACKAGES.iter().map(|p| (*p).to_owned()).chain(more.iter().cloned()).collect();
    let closure = debian::closure(&wanted)?;
    let mut versions = Command::new("dpkg-query");
    versions.args(["-W", "-f", "${Package} ${Version}\n"]).args(&closure.installed);
    let mut hasher = DefaultHasher::new();
    (workshop::output(&mut versions)?, &closure.absent).hash(&mut hasher);
    let stage = dir.join("root");
    let mark = dir.join("root.done");
    let name = format!("{:016x}", hasher.finish());
    if fs::read_to_string(&mark).is_ok_and(|done| done == name) {
        return Ok(stage);
    }
    workshop::say(&format!(
        "the guest's tools: {} packages of this machine, {} unpacked",
        closure.installed.len(),
        closure.absent.len()
    ));
    workshop::fresh_dir(&stage)?;
    let mut files = debian::files_of(&closure.installed)?;
    files.extend(MADE.iter().map(|m| (*m).to_owned()));
    files.retain(|f| f != "/." && !LEFT_OUT.iter().any(|dir| f.starts_with(dir)));
    copy(&files, &stage)?;
    debian::unpack(dir, Suite::Stable, &closure.absent, &stage)?;
    for made in [
        "proc", "sys", "dev", "run", "vm", "tmp", "root", "mnt", "srv", "var/lib", "var/tmp",
        "home",
    ] {
        fs::create_dir_all(stage.join(made)).map_err(|e| format!("{made}: {e}"))?;
    }
    fs::write(stage.join("etc/hostname"), "guest\n").map_err(|e| e.to_string())?;
    fs::write(stage.join("etc/hosts"), "127.0.0.1 localhost guest\n").map_err(|e| e.to_string())?;
    fs::write(&mark, name).map_err(|e| format!("{}: {e}", mark.display()))?;
    Ok(stage)
}

/// With modes, owners and links, as they are here.
fn copy(files: &[String], stage: &Path) -> Result<()> {
    let failed = |e: std::io::Error| format!("cannot copy packages' files: {e}");
    let mut list: Vec<PathBuf> = files
        .iter()
        .filter_map(|file| {
            // A link on the way, /bin → /usr/bin, is copied as a link, and what is behind it by its own name.
            let path = Path::new(file);
            Some(path.parent()?.canonicalize().ok()?.join(path.file_name()?))
        })
        // A package may list what its scripts have removed; that the tools work shows in the guest.
        .filter(|path| path.symlink_metadata().is_ok())
        .collect();
    for dir in ["/etc/ssl/certs", "/etc/alternatives"] {
        list.extend(fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path()));
    }
    list.sort();
    list.dedup();
    let mut pack = Command::new("tar")
        .current_dir("/")
        .args(["--no-recursion", "--null", "-cf", "-", "-T", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    let (Some(mut names), Some(stream)) = (pack.stdin.take(), pack.stdout.take()) else {
        return Err("tar has no pipes".to_owned());
    };
    let mut lay = Command::new("tar")
        .args(["-xpf", "-", "-C"])
        .arg(stage)
        .stdin(stream)
        .spawn()
        .map_err(failed)?;
    for path in list {
        let name = path.to_string_lossy();
        let name = name.trim_start_matches('/');
        names.write_all(name.as_bytes()).and_then(|()| names.write_all(&[0])).map_err(failed)?;
    }
    drop(names);
    let (packed, laid) = (pack.wait().map_err(failed)?, lay.wait().map_err(failed)?);
    if packed.success() && laid.success() {
        return Ok(());
    }
    Err(format!("tar: {packed} and {laid}, copying packages' files to {}", stage.display()))
}

/// Without its symbols: a debug build carries ten times its code.
fn put(from: &Path, to: &Path) -> Result<()> {
    let failed = |e: std::io::Error| format!("{} to {}: {e}", from.display(), to.display());
    if let Some(parent) = to.parent() {
        fs::create_dir_all(parent).map_err(failed)?;
    }
    let newer = |a: &Path, b: &Path| {
        let time = |p: &Path| fs::metadata(p).and_then(|m| m.modified()).ok();
        time(a) > time(b)
    };
    if to.exists() && !newer(from, to) {
        return Ok(());
    }
    if from.extension().is_some_and(|e| e == "json" || e == "c") {
        fs::copy(from, to).map_err(failed)?;
    } else {
        workshop::output(Command::new("strip").args(["-o"]).arg(to).arg(from))?;
    }
    Ok(())
}
