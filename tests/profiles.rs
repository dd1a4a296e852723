//! Real toolchains and ordinary scripts under the built-in profiles.
#![forbid(unsafe_code)]

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use support::{Outcome, World, needs, which};

fn build(world: &World, script: &str) -> Outcome {
    world.run(&["--profile", "build", "--timeout", "150", "--", "sh", "-ec", script])
}

#[test]
fn every_built_in_profile_runs_a_command_and_checks_out() {
    for world in World::each() {
        let listed = world.call(&["--json", "profile", "list"]).ok().out();
        for name in ["default", "strict", "build", "git-push"] {
            assert!(listed.contains(name), "{listed}");
            world
                .run(&["--profile", name, "--", "sh", "-c", "echo from $0", name])
                .ok()
                .prints(&format!("from {name}\n"));
            world.call(&["profile", "check", name]).ok();
            world.call(&["profile", "show", name]).ok().says("read_only");
        }
    }
}

#[test]
fn strict_keeps_the_workspace_read_only() {
    for world in World::each() {
        world.file("there", "content\n", 0o644);
        world
            .run(&[
                "--profile",
                "strict",
                "--",
                "sh",
                "-c",
                "cat there; touch x 2>/dev/null || echo refused",
            ])
            .ok()
            .prints("content\nrefused\n");
    }
}

#[test]
fn ordinary_shell_work() {
    for world in World::each() {
        world.file("script", "#!/bin/sh\necho from a relative script $1\n", 0o755);
        world.file("deep/inner", "#!/usr/bin/env python3\nprint('from env')\n", 0o755);
        #[track_caller]
        fn check(world: &World, script: &str, expected: &str) {
            world.run(&["--", "bash", "-c", script]).ok().prints(expected);
        }
        check(&world, "echo x >/dev/stdout", "x\n");
        check(&world, "echo x >/dev/stderr 2>/dev/null; echo y | tee /dev/stdout", "y\ny\n");
        check(&world, "./script with-arg", "from a relative script with-arg\n");
        check(&world, "cd deep && ./inner", "from env\n");
        check(&world, "cat <(echo substitution)", "substitution\n");
        check(&world, "cat <<<here", "here\n");
        check(&world, "mktemp -d >/dev/null && df -k /tmp | tail -1 | wc -l", "1\n");
        check(&world, "echo a | (read x; echo got $x)", "got a\n");
        check(&world, "seq 100000 | sort -rn | head -1", "100000\n");
        check(&world, "test -w . && test -d $HOME && echo home", "home\n");
        check(&world, "yes | head -2", "y\ny\n");
        check(
            &world,
            "set -o pipefail; ps ax >/dev/null 2>&1 || true; echo $$ >/dev/null; pwd | wc -l",
            "1\n",
        );
        check(&world, "flock lock echo locked", "locked\n");
        check(&world, "mkfifo p; (echo through >p &) ; cat p", "through\n");
    }
}

#[test]
fn whoami_and_id_have_answers() {
    for world in World::each() {
        let outcome = world.run(&["--", "sh", "-c", "whoami; id -un; id -gn; id -G"]).ok();
        let lines: Vec<String> = outcome.out().lines().map(str::to_owned).collect();
        assert_eq!(lines.len(), 4, "{outcome}");
        assert_eq!(lines[0], lines[1], "{outcome}");
        assert!(!lines[0].is_empty() && lines[0].parse::<u32>().is_err(), "a name\n{outcome}");
    }
}

#[test]
fn python_with_threads_and_subprocesses() {
    for world in World::each() {
        let script = r#"
import subprocess, threading, multiprocessing, tempfile, os
def square(n): return n * n
if __name__ == "__main__":
    results = []
    threads = [threading.Thread(target=lambda n=n: results.append(int(subprocess.check_output(["expr", str(n), "+", "1"])))) for n in range(8)]
    [t.start() for t in threads]; [t.join() for t in threads]
    print(sorted(results))
    with multiprocessing.Pool(2) as pool: print(pool.map(square, range(4)))
    with tempfile.NamedTemporaryFile() as f: f.write(b"x"); print(os.path.exists(f.name))
"#;
        world.file("work.py", script, 0o644);
        world
            .run(&["--", "python3", "work.py"])
            .ok()
            .prints("[1, 2, 3, 4, 5, 6, 7, 8]\n[0, 1, 4, 9]\nTrue\n");
    }
}

#[test]
fn gcc_and_make_in_parallel() {
    needs("make", "make");
    for world in World::each() {
        let mut makefile = "all: program\nprogram: ".to_owned();
        let parts: Vec<String> = (0..12).map(|n| format!("part{n}.o")).collect();
        makefile.push_str(&format!("main.o {0}\n\tgcc -o $@ main.o {0}\n", parts.join(" ")));
        makefile.push_str("%.o: %.c\n\tgcc -O1 -c -o $@ $<\n");
        world.file("Makefile", makefile, 0o644);
        for n in 0..12 {
            world.file(
                &format!("part{n}.c"),
                format!("int part{n}(void) {{ return {n}; }}\n"),
                0o644,
            );
        }
        world.file("main.c", "#include <stdio.h>\nint part11(void);\nint main(void) { printf(\"built %d\\n\", part11()); }\n", 0o644);
        build(&world, "make -s -j4 && ./program").ok().prints("built 11\n");
    }
}

#[test]
fn git_clone_and_commit() {
    needs("git", "git");
    for world in World::each() {
        let outcome = build(
            &world,
            "git init -q -b main one && cd one && git config user.email t@t && git config user.name t && \
             echo x >f && git add f && git commit -qm first && cd .. && git clone -q one two && \
             cd two && git log --oneline | wc -l && git status --short | wc -l",
        );
        outcome.ok().prints("1\n0\n");
    }
}

#[test]
fn a_python_virtual_environment() {
    needs("python3", "python3 python3-venv");
    for world in World::each() {
        build(&world, "/usr/bin/python3 -m venv env && env/bin/python -c 'import sys; print(sys.prefix != sys.base_prefix)' && env/bin/pip --version | cut -c1-3")
            .ok()
            .prints("True\npip\n");
    }
}

#[test]
fn node_and_npm_test() {
    needs("node", "nodejs");
    needs("npm", "npm");
    for world in World::each() {
        world.file(
            "package.json",
            r#"{"name":"small","version":"1.0.0","scripts":{"test":"node --test"}}"#,
            0o644,
        );
        world.file(
            "small.test.js",
            "const test = require('node:test'); const assert = require('node:assert');\n\
             test('adds', () => assert.equal(1 + 1, 2));\n\
             test('waits', async () => { await new Promise(r => setTimeout(r, 20)); });\n",
            0o644,
        );
        let outcome = build(
            &world,
            "npm test --no-update-notifier && node -e 'console.log(process.version[0])'",
        );
        outcome.ok().says("v\n");
    }
}

fn sysroot() -> PathBuf {
    let printed = Command::new("rustc").args(["--print", "sysroot"]).output().unwrap();
    PathBuf::from(String::from_utf8(printed.stdout).unwrap().trim())
}

/// `build` plus where this machine keeps its Rust, which may be a home directory.
fn with_rust(world: &World) -> (String, String) {
    let cargo = which("cargo").expect("cargo runs this test");
    let sysroot = sysroot();
    let bin = sysroot.join("bin");
    assert!(bin.join("cargo").exists() || cargo.exists());
    let shown = world.call(&["--json", "profile", "show", "build"]).ok().json();
    let mut read_only: Vec<String> = shown["filesystem"]["read_only"]
        .as_array()
        .expect("build lists what it reads")
        .iter()
        .map(|p| p.as_str().unwrap().to_owned())
        .collect();
    let covered = |dir: &Path| read_only.iter().any(|r| dir.starts_with(r));
    if !covered(&sysroot) {
        read_only.push(sysroot.to_str().unwrap().to_owned());
    }
    let profile = world.profile(
        "with-rust",
        &format!("extends = \"build\"\n[filesystem]\nread_only = {read_only:?}\n"),
    );
    (profile, bin.to_str().unwrap().to_owned())
}

#[test]
fn cargo_builds_and_tests_a_small_crate() {
    let closed_to_others = sysroot().ancestors().any(|dir| {
        use std::os::unix::fs::PermissionsExt;
        fs::metadata(dir).unwrap().permissions().mode() & 0o001 == 0
    });
    for world in World::each() {
        // A toolchain in root's home serves root alone.
        if closed_to_others && world.invoker != 0 {
            continue;
        }
        let (profile, bin) = with_rust(&world);
        world.file(
            "Cargo.toml",
            "[package]\nname = \"small\"\nversion = \"0.1.0\"\nedition = \"2021\"\n",
            0o644,
        );
        world.file(
            "src/main.rs",
            "fn main() { println!(\"built by cargo\"); }\n#[test]\nfn adds() { assert_eq!(1 + 1, 2); }\n",
            0o644,
        );
        let script = format!(
            "PATH={bin}:$PATH; export PATH; cargo build -q --offline && ./target/debug/small && cargo test -q --offline"
        );
        let outcome = world
            .run(&["--profile", &profile, "--timeout", "150", "--", "sh", "-ec", &script])
            .ok();
        outcome.says("built by cargo\n").says("1 passed");
    }
}

#[test]
fn programs_left_by_a_build_belong_to_the_owner() {
    use std::os::unix::fs::MetadataExt;
    let world = World::host();
    world.file("a.c", "int main(void) { return 0; }\n", 0o644);
    build(&world, "gcc -o a a.c").ok();
    let owner = fs::metadata(&world.workspace).unwrap().uid();
    assert_eq!(fs::metadata(world.workspace.join("a")).unwrap().uid(), owner);
}
