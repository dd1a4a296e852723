//! Kernels: Debian's, downloaded and unpacked, never installed; or any by path.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::debian::{self, Suite};
use super::{Result, workshop};

/// What a guest needs before it has a root file system, in the order of their needs. One that a kernel
/// has built in has no file.
const MODULES: [&str; 8] = [
    "virtio_ring",
    "virtio",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "virtio_blk",
    "overlay",
    "vsock",
];

#[derive(Debug, Clone)]
pub struct Kernel {
    /// `6.1`, or the name of the file that was given.
    pub name: String,
    pub image: PathBuf,
    /// In the order in which they are loaded.
    pub modules: Vec<PathBuf>,
    /// The package, or the path.
    pub origin: String,
}

/// Those that are always tried.
const PACKAGED: [(&str, Suite); 2] = [("6.1", Suite::Stable), ("6.12", Suite::Backports)];

/// Their names, without a download.
pub fn named() -> Vec<Kernel> {
    let bare = |name: &str| Kernel {
        name: name.to_owned(),
        image: PathBuf::new(),
        modules: Vec::new(),
        origin: String::new(),
    };
    PACKAGED.iter().map(|(name, _)| bare(name)).collect()
}

pub fn packaged(dir: &Path) -> Result<Vec<Kernel>> {
    PACKAGED.iter().map(|(name, suite)| one_packaged(dir, name, *suite)).collect()
}

fn one_packaged(dir: &Path, name: &str, suite: Suite) -> Result<Kernel> {
    let place = dir.join("kernels").join(name);
    // A kernel stays what it is until `target/vm` is removed: what is compared is compared with one.
    if !place.join("done").exists() {
        workshop::say(&format!("the kernel {name} from Debian"));
        let package = debian::kernel_package(dir, suite)?;
        if !package.starts_with(&format!("linux-image-{name}.")) {
            return Err(format!(
                "this Debian's cloud kernel is {package}, not a {name}: give one with --kernel PATH"
            ));
        }
        workshop::fresh_dir(&place)?;
        debian::unpack(dir, suite, &[package.clone()], &place)?;
        fs::write(place.join("done"), &package).map_err(|e| format!("{}: {e}", place.display()))?;
    }
    let origin = fs::read_to_string(place.join("done")).map_err(|e| e.to_string())?;
    let image = find(&place.join("boot"), |file| file.starts_with("vmlinuz-"))
        .ok_or(format!("{origin} has no boot/vmlinuz-*"))?;
    Ok(Kernel { name: name.to_owned(), image, modules: modules_below(&place)?, origin })
}

/// Any kernel. Its modules are looked for where a package or an install tree has them: `../lib/modules`.
pub fn by_path(image: &Path) -> Result<Kernel> {
    let image = image.canonicalize().map_err(|e| format!("{}: {e}", image.display()))?;
    let tree = image.parent().and_then(Path::parent).unwrap_or(Path::new("/")).to_owned();
    let file = image.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let release = file.trim_start_matches("vmlinuz-").to_owned();
    let of_release = tree.join("lib/modules").join(&release);
    let modules = if of_release.is_dir() { modules_below(&of_release)? } else { Vec::new() };
    let origin = image.display().to_string();
    Ok(Kernel { name: release, image, modules, origin })
}

fn modules_below(tree: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("find")
        .arg(tree)
        .args(["-name", "*.ko", "-o", "-name", "*.ko.xz"])
        .output()
        .map_err(|e| format!("find: {e}"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let plain = |path: &Path| {
        let file = path.file_name().unwrap_or_default().to_string_lossy().replace('-', "_");
        file.trim_end_matches(".xz").trim_end_matches(".ko").to_owned()
    };
    let mut found = Vec::new();
    for name in MODULES {
        let path = text.lines().map(PathBuf::from).find(|p| plain(p) == name.replace('-', "_"));
        match path {
            // The guest's insmod takes them as they are in memory.
            Some(path) if path.extension().is_some_and(|e| e == "xz") => {
                let bare = path.with_extension("");
                if !bare.exists() {
                    workshop::need("xz", "xz-utils")?;
                    workshop::output(
                        Command::new("xz").args(["--decompress", "--keep"]).arg(&path),
                    )?;
                }
                found.push(bare);
            }
            Some(path) => found.push(path),
            None => {}
        }
    }
    Ok(found)
}

fn find(dir: &Path, fits: impl Fn(&str) -> bool) -> Option<PathBuf> {
    let mut files = fs::read_dir(dir).ok()?.flatten();
    files.find(|e| fits(&e.file_name().to_string_lossy())).map(|e| e.path())
}
