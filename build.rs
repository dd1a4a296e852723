//! Compiles `seccomp/*.json` into BPF, so that starting a sandbox neither parses nor compiles, and has the
//! program linked without shared libraries, its functions in the order of `.cargo/hot.ld`.
//!
//! Receives the filter files, writes `$OUT_DIR/filters.rs`: one static array a file, and a table of
//! (name, text, program). A file that does not compile fails the build with its name and the reason.

use std::error::Error;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

#[path = "src/sandbox/seccomp/compile.rs"]
#[allow(dead_code)]
mod compile;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=seccomp");
    println!("cargo::rerun-if-changed=src/sandbox/seccomp/compile.rs");
    println!("cargo::rerun-if-changed=src/sandbox/seccomp/program.rs");
    println!("cargo::rerun-if-env-changed=CC");
    let arch = env::var("CARGO_CFG_TARGET_ARCH")?;
    if arch != "x86_64" {
        // The filters carry x86_64 numbers and argument positions; a wrong filter is worse than none.
        println!(
            "cargo::error=unsupported architecture {arch}: sublet's filters exist for x86_64 only"
        );
        return Ok(());
    }
    let out = PathBuf::from(env::var("OUT_DIR")?).join("filters.rs");
    let root = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?);
    fs::write(out, table(&root.join("seccomp"))?)?;
    link_statically()?;
    link_in_order(&root)
}

/// Links the program as a static PIE: the same address-space randomisation, without the dynamic loader, its
/// symbol look-ups and three libraries at each of the starts that an exec is made of; and it runs in any
/// container. `-C target-feature=+crt-static` says the same, but needs `--target`, which moves the
/// program's place.
///
/// rustc names the C libraries after switching to shared ones; a directory of ours, looked into first, has
/// the archives under those names. Where a C library has no archives (Fedora without glibc-static), or
/// with `SUBLET_LINK=dynamic`, the link stays dynamic, and all is the same but slower. So it does in debug
/// builds: a test turns the clock by a preloaded library.
fn link_statically() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-env-changed=SUBLET_LINK");
    let is_glibc = env::var("CARGO_CFG_TARGET_ENV")? == "gnu";
    let is_asked_otherwise = env::var("SUBLET_LINK").is_ok_and(|how| how == "dynamic");
    // Then rustc does it all by itself.
    let is_static = env::var("CARGO_CFG_TARGET_FEATURE").is_ok_and(|f| f.contains("crt-static"));
    let is_debug = env::var("PROFILE")? == "debug";
    if !is_glibc || is_asked_otherwise || is_static || is_debug {
        return Ok(());
    }
    // Static names under which rustc asks for the shared libraries: libgcc_s has no archive, its parts do.
    let archives = [
        ("libc.a", "libc.a"),
        ("libm.a", "libm.a"),
        ("libdl.a", "libdl.a"),
        ("librt.a", "librt.a"),
        ("libutil.a", "libutil.a"),
        ("libpthread.a", "libpthread.a"),
        ("libgcc_s.a", "libgcc_eh.a"),
    ];
    let dir = PathBuf::from(env::var("OUT_DIR")?).join("archives");
    fs::create_dir_all(&dir)?;
    // GNU's linker looks into an archive once, where it is named: libc's own needs of libgcc come after it.
    let needed = ["libgcc_eh.a", "libgcc.a"];
    for (name, archive) in archives {
        let mut group = String::new();
        for part in [&[archive], needed.as_slice()].concat() {
            let Some(found) = archive_of_compiler(part) else { return Ok(()) };
            write!(group, " {}", found.display())?;
        }
        fs::write(dir.join(name), format!("GROUP({group})\n"))?;
    }
    for argument in [&format!("-L{}", dir.display()), "-static-pie", "-Wl,-z,pack-relative-relocs"]
    {
        println!("cargo::rustc-link-arg-bins={argument}");
    }
    Ok(())
}

/// Puts the functions that each start runs next to each other (`just order`). Only GNU's linker and LLD are
/// known to insert a section where the rest of their layout stays; with any other the order is the compiler's,
/// and all is the same but slower.
fn link_in_order(root: &Path) -> Result<(), Box<dyn Error>> {
    // The directory: the file may come and go.
    println!("cargo::rerun-if-changed=.cargo");
    println!("cargo::rerun-if-env-changed=RUSTC_LINKER");
    let order = root.join(".cargo/hot.ld");
    let is_gnu = env::var("CARGO_CFG_TARGET_ENV")? == "gnu";
    let is_debug = env::var("PROFILE")? == "debug";
    let flags = env::var("CARGO_ENCODED_RUSTFLAGS").unwrap_or_default();
    let is_chosen = env::var_os("RUSTC_LINKER").is_some()
        || ["fuse-ld", "linker="].iter().any(|flag| flags.contains(flag));
    if is_gnu && !is_debug && !is_chosen && order.is_file() && is_linker_known() {
        // `-Wl,` would split a path at its commas.
        println!("cargo::rustc-link-arg-bins=-T{}", order.display());
    }
    Ok(())
}

/// Whether what links where rustc does not bring its own LLD is one of the two.
fn is_linker_known() -> bool {
    let Ok(asked) = compiler().args(["-nostdlib", "-Wl,--version"]).output() else { return false };
    let name = String::from_utf8_lossy(&asked.stdout);
    name.starts_with("GNU ld") || name.contains("LLD")
}

/// Where the C compiler, which links, has this archive.
fn archive_of_compiler(name: &str) -> Option<PathBuf> {
    let output = compiler().arg(format!("-print-file-name={name}")).output().ok()?;
    let path = PathBuf::from(String::from_utf8(output.stdout).ok()?.trim());
    // It answers with the bare name where it has none.
    (path.is_absolute() && path.exists()).then_some(path)
}

fn compiler() -> Command {
    Command::new(env::var("CC").unwrap_or_else(|_| "cc".to_owned()))
}

fn table(dir: &Path) -> Result<String, Box<dyn Error>> {
    let mut files: Vec<PathBuf> =
        fs::read_dir(dir)?.map(|entry| Ok(entry?.path())).collect::<std::io::Result<_>>()?;
    files.retain(|path| path.extension().is_some_and(|e| e == "json"));
    files.sort();
    let mut arrays = String::new();
    let mut rows = String::new();
    for path in files {
        let name =
            path.file_stem().and_then(|s| s.to_str()).ok_or("a filter's name is not UTF-8")?;
        let text = fs::read_to_string(&path)?;
        let program = compile::compile(&text).map_err(|e| format!("seccomp/{name}.json: {e}"))?;
        let ident = name.to_uppercase().replace(|c: char| !c.is_ascii_alphanumeric(), "_");
        writeln!(arrays, "static {ident}: [libc::sock_filter; {}] = [", program.len())?;
        for i in &program {
            writeln!(arrays, "    insn({:#x}, {}, {}, {:#x}),", i.code, i.jt, i.jf, i.k)?;
        }
        writeln!(arrays, "];")?;
        // The text itself: a target directory may serve another checkout next.
        writeln!(rows, "    ({name:?}, {text:?}, &{ident}),")?;
    }
    Ok(format!("{arrays}\nstatic BUILT_IN: &[(&str, &str, &[libc::sock_filter])] = &[\n{rows}];\n"))
}
