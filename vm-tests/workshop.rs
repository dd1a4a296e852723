//! What is made before a machine boots: kernels, the static `sublet`, the guest's program, its root disk.
//! All of it below `target/vm`, and kept there.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::Result;
use super::cpio::Archive;
use super::disk;
use super::isolation::{self, Built};
use super::job::Files;
use super::kernel::{self, Kernel};
use super::options::Options;

const TARGET: &str = "x86_64-unknown-linux-gnu";

pub struct Workshop {
    /// `target/vm`.
    pub dir: PathBuf,
    pub kernels: Vec<Kernel>,
    /// Linked statically, with glibc.
    pub sublet: PathBuf,
    pub guest: PathBuf,
    /// ext4: the real tools, and the integration tests at their own paths. Never written: each machine
    /// writes to a snapshot of it.
    pub root_disk: PathBuf,
    /// The integration tests, at their paths here and there.
    pub programs: Vec<(String, PathBuf)>,
    pub long: bool,
}

impl Workshop {
    /// `isolated`: with the integration tests, which take long to build.
    pub fn open(options: &Options, isolated: bool) -> Result<Self> {
        need("qemu-system-x86_64", "qemu-system-x86")?;
        need("busybox", "busybox-static")?;
        need("mke2fs", "e2fsprogs")?;
        need("apt-get", "apt: the kernels are Debian's packages")?;
        need("tar", "tar")?;
        let dir = checkout().join("target/vm");
        fs::create_dir_all(&dir).map_err(|e| format!("{}: {e}", dir.display()))?;
        let mut kernels = kernel::packaged(&dir)?;
        for path in &options.kernels {
            kernels.push(kernel::by_path(path)?);
        }
        let sublet = static_sublet(&dir)?;
        let guest = guest_program(&dir)?;
        let built = if isolated { isolation::built(&sublet)? } else { Built::default() };
        let root_disk = disk::root(&dir, &built, &options.packages)?;
        let programs = built.programs;
        Ok(Self { dir, kernels, sublet, guest, root_disk, programs, long: options.long })
    }

    /// The first root of a machine: enough to find the disk and go on there, and this job's own files,
    /// which stand in the guest at `/vm`.
    pub fn initramfs(&self, kernel: &Kernel, job: &Files) -> Result<Vec<u8>> {
        let read = |path: &Path| fs::read(path).map_err(|e| format!("{}: {e}", path.display()));
        let mut archive = Archive::default();
        for dir in ["bin", "dev", "proc", "sys", "root", "modules", "vm"] {
            archive.directory(dir);
        }
        archive.character("dev/console", 5, 1);
        archive.file("bin/busybox", 0o755, &read(&which("busybox").unwrap_or_default())?);
        archive.file("init", 0o755, include_bytes!("guest/init.sh"));
        archive.file("vm/guest", 0o755, &read(&self.guest)?);
        archive.file("vm/sublet", 0o755, &read(&self.sublet)?);
        for (place, module) in kernel.modules.iter().enumerate() {
            archive.file(&format!("modules/{place:02}.ko"), 0o644, &read(module)?);
        }
        let mut made = std::collections::BTreeSet::new();
        for (name, mode, content) in &job.files {
            if let Some((dir, _)) = name.rsplit_once('/')
                && made.insert(dir)
            {
                archive.directory(&format!("vm/{dir}"));
            }
            archive.file(&format!("vm/{name}"), *mode, content);
        }
        for (name, dir) in &job.trees {
            archive.tree(&format!("vm/{name}"), dir)?;
        }
        Ok(archive.finish())
    }
}

pub fn checkout() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn cargo() -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()));
    cargo.current_dir(checkout());
    cargo
}

/// The profile `vm` is the release's code, built sooner.
fn static_sublet(dir: &Path) -> Result<PathBuf> {
    say("the static sublet");
    let target_dir = dir.join("build");
    let mut build = cargo();
    build
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .args(["build", "--locked", "--quiet", "--profile", "vm", "--bin", "sublet"])
        .args(["--target", TARGET, "--target-dir"])
        .arg(&target_dir);
    output(&mut build)?;
    Ok(target_dir.join(TARGET).join("vm/sublet"))
}

/// Test programs as cargo built them: the name of each and where it lies.
pub fn test_programs(targets: &[&str]) -> Result<Vec<(String, PathBuf)>> {
    say("the integration tests");
    let mut build = cargo();
    build.args(["test", "--no-run", "--locked", "--message-format=json"]);
    for target in targets {
        match *target {
            "lib" => build.arg("--lib"),
            test => build.args(["--test", test]),
        };
    }
    let text = output(&mut build)?;
    let mut found = Vec::new();
    for line in text.lines() {
        let message: serde_json::Value = serde_json::from_str(line).map_err(|e| e.to_string())?;
        let (target, program) = (&message["target"], message["executable"].as_str());
        let is_test = message["profile"]["test"] == true;
        if let (Some(program), true) = (program, is_test) {
            let is_lib = target["kind"][0] == "lib";
            let name = if is_lib { "lib" } else { target["name"].as_str().unwrap_or_default() };
            found.push((name.to_owned(), PathBuf::from(program)));
        }
    }
    for target in targets {
        if !found.iter().any(|(name, _)| name == target) {
            return Err(format!("cargo built no test program for `{target}`"));
        }
    }
    Ok(found)
}

/// Compiled by itself: it needs nothing but std, and cargo would link it to the whole crate.
fn guest_program(dir: &Path) -> Result<PathBuf> {
    let program = dir.join("guest");
    let mut build = Command::new(std::env::var_os("RUSTC").unwrap_or("rustc".into()));
    build
        .args(["--edition", "2024", "-C", "target-feature=+crt-static", "-C", "opt-level=1"])
        .args(["-C", "strip=symbols", "--target", TARGET, "--crate-name", "guest", "-o"])
        .arg(&program)
        .arg(checkout().join("vm-tests/guest/main.rs"));
    output(&mut build)?;
    Ok(program)
}

pub fn need(tool: &str, package: &str) -> Result<()> {
    which(tool).map(|_| ()).ok_or(format!("this test needs `{tool}`: apt-get install {package}"))
}

pub fn which(tool: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let more = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(more).map(|d| d.join(tool)).find(|file| file.is_file())
}

pub fn fresh_dir(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            return Err(format!("cannot remove {}: {e}", dir.display()));
        }
        _ => {}
    }
    fs::create_dir_all(dir).map_err(|e| format!("cannot make {}: {e}", dir.display()))
}

pub fn say(what: &str) {
    println!("vm: {what}");
}

/// Runs a command to its end; what it printed, or the whole failure.
pub fn output(command: &mut Command) -> Result<String> {
    let line = format!("{command:?}");
    let output = command.output().map_err(|e| format!("cannot start {line}: {e}"))?;
    if !output.status.success() {
        let err = String::from_utf8_lossy(&output.stderr);
        return Err(format!("{line}: {}\n{err}", output.status));
    }
    String::from_utf8(output.stdout).map_err(|e| format!("{line}: {e}"))
}
