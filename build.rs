//! Compiles `seccomp/*.json` into BPF, so that starting a sandbox neither parses nor compiles.
//!
//! Receives the filter files, writes `$OUT_DIR/filters.rs`: one static array a file, and a table of
//! (name, text, program). A file that does not compile fails the build with its name and the reason.

use std::error::Error;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::{env, fs};

#[path = "src/sandbox/seccomp/compile.rs"]
#[allow(dead_code)]
mod compile;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=seccomp");
    println!("cargo::rerun-if-changed=src/sandbox/seccomp/compile.rs");
    println!("cargo::rerun-if-changed=src/sandbox/seccomp/program.rs");
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
    Ok(())
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
        writeln!(rows, "    ({name:?}, include_str!({path:?}), &{ident}),")?;
    }
    Ok(format!("{arrays}\nstatic BUILT_IN: &[(&str, &str, &[libc::sock_filter])] = &[\n{rows}];\n"))
}
