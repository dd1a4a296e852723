//! Debian's packages: fetched by the machine's own apt from the machine's own mirror, and unpacked.
//! Nothing is installed, and no configuration of the machine is changed.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::{Result, workshop};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Suite {
    /// As the machine has it.
    Stable,
    /// Beside it, with lists of its own.
    Backports,
}

/// The package that `linux-image-cloud-amd64` stands for.
pub fn kernel_package(dir: &Path, suite: Suite) -> Result<String> {
    let mut show = apt(dir, suite, "apt-cache")?;
    show.args(["depends", "linux-image-cloud-amd64"]);
    let text = workshop::output(&mut show)?;
    let found = text.lines().find_map(|l| l.trim().strip_prefix("Depends: "));
    found.map(str::to_owned).ok_or_else(|| {
        "apt knows no linux-image-cloud-amd64: `apt-get update` first, on a Debian for amd64"
            .to_owned()
    })
}

/// Downloads these packages, each once, and unpacks them over `root`.
pub fn unpack(dir: &Path, suite: Suite, packages: &[String], root: &Path) -> Result<()> {
    let debs = dir.join("debs");
    fs::create_dir_all(&debs).map_err(|e| format!("{}: {e}", debs.display()))?;
    for package in packages {
        let deb = match downloaded(&debs, package) {
            Some(deb) => deb,
            None => {
                let mut download = apt(dir, suite, "apt-get")?;
                // As root, apt would hand the file to a user who may not write here.
                download.args(["-q", "-o", "APT::Sandbox::User=root", "download", package]);
                workshop::output(download.current_dir(&debs))?;
                downloaded(&debs, package).ok_or(format!(
                    "apt-get download {package} left no file in {}",
                    debs.display()
                ))?
            }
        };
        lay(&deb, root)?;
    }
    Ok(())
}

/// As `dpkg -x` does, but a link to a directory stays one: `/lib` of a package goes where `/lib` leads.
fn lay(deb: &Path, root: &Path) -> Result<()> {
    let failed = |e: std::io::Error| format!("cannot unpack {}: {e}", deb.display());
    let mut pack = Command::new("dpkg-deb")
        .arg("--fsys-tarfile")
        .arg(deb)
        .stdout(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    let stream = pack.stdout.take().ok_or("dpkg-deb has no pipe")?;
    let mut lay = Command::new("tar");
    lay.args(["-xpf", "-", "--keep-directory-symlink", "-C"]).arg(root).stdin(stream);
    let laid = lay.status().map_err(failed)?;
    let packed = pack.wait().map_err(failed)?;
    if packed.success() && laid.success() {
        return Ok(());
    }
    Err(format!("dpkg-deb: {packed} and tar: {laid}, unpacking {}", deb.display()))
}

fn downloaded(debs: &Path, package: &str) -> Option<PathBuf> {
    let prefix = format!("{package}_");
    let mut files = fs::read_dir(debs).ok()?.flatten();
    files.find(|e| e.file_name().to_string_lossy().starts_with(&prefix)).map(|e| e.path())
}

/// These packages and what they depend on, told apart by whether this machine has them.
pub struct Closure {
    pub installed: Vec<String>,
    pub absent: Vec<String>,
}

pub fn closure(packages: &[String]) -> Result<Closure> {
    let mut ask = Command::new("apt-cache");
    ask.args(["depends", "--recurse", "--no-recommends", "--no-suggests", "--no-conflicts"]);
    ask.args(["--no-breaks", "--no-replaces", "--no-enhances"]).args(packages);
    let text = workshop::output(&mut ask)?;
    let have = workshop::output(Command::new("dpkg-query").args([
        "-W",
        "-f",
        "${db:Status-Abbrev} ${Package}\n",
    ]))?;
    let have: BTreeSet<&str> =
        have.lines().filter_map(|l| l.strip_prefix("ii ")).map(str::trim).collect();
    // What is told holds every alternative of everything: only what is chosen is gone on from.
    let depends = dependencies(&text);
    let mut chosen = BTreeSet::new();
    let mut todo: Vec<&str> = packages.iter().map(String::as_str).collect();
    while let Some(package) = todo.pop() {
        if chosen.insert(package) {
            for alternatives in depends.get(package).into_iter().flatten() {
                let installed = alternatives.iter().find(|a| have.contains(*a));
                todo.extend(installed.or(alternatives.first()));
            }
        }
    }
    let (installed, absent) =
        chosen.into_iter().map(str::to_owned).partition(|name| have.contains(name.as_str()));
    Ok(Closure { installed, absent })
}

/// By package: for each dependency its alternatives, in their order. Of `<…>`, which is virtual, who
/// provides it, in the lines below it.
fn dependencies(text: &str) -> BTreeMap<&str, Vec<Vec<&str>>> {
    let mut all: BTreeMap<&str, Vec<Vec<&str>>> = BTreeMap::new();
    let mut package = "";
    let mut goes_on = false;
    for line in text.lines() {
        if !line.starts_with(' ') {
            package = line;
            goes_on = false;
            continue;
        }
        let of_package = all.entry(package).or_default();
        let (before_another, rest) = match line.strip_prefix(" |") {
            Some(rest) => (true, rest),
            None => (false, line.trim_start()),
        };
        let named = rest.strip_prefix("Depends: ").or(rest.strip_prefix("PreDepends: "));
        if named.is_some() && !goes_on {
            of_package.push(Vec::new());
        }
        if named.is_some() {
            goes_on = before_another;
        }
        let name = named.unwrap_or(rest);
        if let (false, Some(alternatives)) = (name.starts_with('<'), of_package.last_mut()) {
            alternatives.push(name);
        }
    }
    all
}

/// The files of installed packages.
pub fn files_of(packages: &[String]) -> Result<Vec<String>> {
    let text = workshop::output(Command::new("dpkg-query").arg("-L").args(packages))?;
    Ok(text.lines().filter(|l| l.starts_with('/')).map(str::to_owned).collect())
}

/// apt with the lists of that suite. Backports' are fetched once, into `dir`.
fn apt(dir: &Path, suite: Suite, program: &str) -> Result<Command> {
    let mut command = Command::new(program);
    command.env("LC_ALL", "C");
    if suite == Suite::Stable {
        return Ok(command);
    }
    let own = dir.join("apt");
    let list = own.join("sources.list");
    let options = |command: &mut Command| {
        for option in [
            format!("Dir::Etc::sourcelist={}", list.display()),
            "Dir::Etc::sourceparts=/dev/null".to_owned(),
            format!("Dir::State::lists={}", own.join("lists").display()),
            format!("Dir::Cache={}", own.join("cache").display()),
            "APT::Sandbox::User=root".to_owned(),
        ] {
            command.arg("-o").arg(option);
        }
    };
    if !own.join("done").exists() {
        workshop::fresh_dir(&own)?;
        for inner in ["lists/partial", "cache/archives/partial"] {
            let inner = own.join(inner);
            fs::create_dir_all(&inner).map_err(|e| format!("{}: {e}", inner.display()))?;
        }
        fs::write(&list, backports_of_this_machine()?)
            .map_err(|e| format!("{}: {e}", list.display()))?;
        let mut update = Command::new("apt-get");
        options(&mut update);
        workshop::output(update.args(["-q", "update"]))?;
        fs::write(own.join("done"), "").map_err(|e| format!("{}: {e}", own.display()))?;
    }
    options(&mut command);
    Ok(command)
}

/// The machine's own mirror, asked for the backports of its own release.
fn backports_of_this_machine() -> Result<String> {
    let mut ask = Command::new("apt-get");
    ask.args([
        "indextargets",
        "--format",
        "$(REPO_URI) $(CODENAME) $(SUITE)",
        "Created-By: Packages",
    ]);
    let text = workshop::output(&mut ask)?;
    let release = workshop::output(
        Command::new("sh").args(["-c", ". /etc/os-release; echo $VERSION_CODENAME"]),
    )?;
    let release = release.trim();
    let of_release = text.lines().find_map(|line| {
        let mut words = line.split(' ');
        let (uri, codename) = (words.next()?, words.next()?);
        (codename == release).then_some(uri)
    });
    let uri = of_release.ok_or(format!("apt has no source for {release}: is this a Debian?"))?;
    // apt checks its signature with the keys of debian-archive-keyring, wherever the machine keeps them.
    let keys = Path::new("/usr/share/keyrings/debian-archive-keyring.gpg");
    let signed =
        if keys.exists() { format!("[signed-by={}] ", keys.display()) } else { String::new() };
    Ok(format!("deb {signed}{uri} {release}-backports main\n"))
}
