//! The value in a leased command's output is masked, and nothing else is touched.
#![forbid(unsafe_code)]

mod support;

use std::io::Read;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use support::world::finish;
use support::{Outcome, World, needs};

const VALUE: &str = "pa55w0rd/with+odd=chars&\"quotes\"";

/// How often a value was masked, as the report counts.
fn masked(outcome: &Outcome) -> u64 {
    outcome.report()["redacted"]
        .as_u64()
        .unwrap_or_else(|| panic!("no count of what was masked\n{outcome}"))
}

#[test]
fn every_spelling_of_the_value_is_masked() {
    for world in World::each() {
        let profile = world.leasing(VALUE.as_bytes());
        let spell = r#"
import base64, json, os, sys, urllib.parse
v = os.environ["TOKEN"].encode()
print("before")
print("plain", v.decode())
print("err", v.decode(), file=sys.stderr)
print("b64", base64.b64encode(v).decode())
print("b64-1", base64.b64encode(b"x" + v).decode())
print("b64-2", base64.b64encode(b"xy" + v + b"z").decode())
print("url64", base64.urlsafe_b64encode(b"xy" + v).decode())
print("hex", v.hex())
print("HEX", v.hex().upper())
print("percent", urllib.parse.quote(v, safe=""))
print("percent-lower", urllib.parse.quote(v, safe="").replace("%2B", "%2b").replace("%3D", "%3d").replace("%2F", "%2f"))
print("json", json.dumps({"token": v.decode()}))
print("after")
"#;
        let outcome = world
            .run(&[
                "--profile",
                &profile,
                "--lease",
                "test.use@svc.test,channel=env",
                "--",
                "python3",
                "-c",
                spell,
            ])
            .ok();
        let out = outcome.out();
        assert!(out.starts_with("before\nplain ") && out.ends_with("\nafter\n"), "{outcome}");
        assert_eq!(out.lines().count(), 12, "{outcome}");
        use base64::Engine;
        let b64 = base64::engine::general_purpose::STANDARD.encode(VALUE);
        let b64_in = base64::engine::general_purpose::STANDARD.encode(format!("xy{VALUE}z"));
        let url64 = base64::engine::general_purpose::URL_SAFE.encode(format!("xy{VALUE}"));
        let hex: String = VALUE.bytes().map(|b| format!("{b:02x}")).collect();
        for (what, spelling) in [
            ("plain", VALUE.to_owned()),
            ("base64", b64[..b64.len() - 4].to_owned()),
            // The edges of an aligned text depend on its neighbours; the middle is the value's alone.
            ("base64, shifted", b64_in[4..b64_in.len() - 8].to_owned()),
            ("base64, URL", url64[4..url64.len() - 8].to_owned()),
            ("hex", hex.clone()),
            ("HEX", hex.to_uppercase()),
            ("percent", "pa55w0rd%2Fwith%2Bodd%3Dchars%26%22quotes%22".to_owned()),
            ("JSON", VALUE.replace('"', "\\\"")),
        ] {
            assert!(!out.contains(&spelling), "{what} came through\n{outcome}");
            assert!(!outcome.err().contains(&spelling), "{what} came through on stderr\n{outcome}");
        }
        assert!(masked(&outcome) > 0, "{outcome}");
        let types = world.event_types();
        assert!(types.iter().any(|t| t == "output.redacted"), "{types:?}");
        world.holds_nowhere(VALUE.as_bytes());
    }
}

#[test]
fn a_value_that_is_written_in_pieces_is_masked() {
    let world = World::host();
    let profile = world.leasing(VALUE.as_bytes());
    // At once, and so slowly that all of it takes much longer than a pause.
    for pause in ["0.002", "0.02"] {
        let pieces = format!(
            "import os, sys, time\n\
             for c in os.environ['TOKEN']:\n    sys.stdout.write(c); sys.stdout.flush(); time.sleep({pause})\n\
             print('.')"
        );
        world
            .run(&[
                "--profile",
                &profile,
                "--lease",
                "test.use@svc.test,channel=env",
                "--",
                "python3",
                "-c",
                &pieces,
            ])
            .ok()
            .never_says(VALUE)
            .never_says("w0rd/with");
    }
}

#[test]
fn bytes_that_are_not_the_value_pass_unchanged() {
    for world in World::each() {
        let profile = world.leasing(VALUE.as_bytes());
        // Noise full of beginnings of the value, larger than any buffer, and not UTF-8.
        let mut noise = Vec::new();
        for n in 0..60_000u32 {
            noise.extend_from_slice(&VALUE.as_bytes()[..(n as usize % (VALUE.len() - 1))]);
            noise.push((n.wrapping_mul(2_654_435_761) >> 24) as u8 | 0x80);
        }
        let outcome = world
            .run_with(&["--profile", &profile, "--lease", "test.use@svc.test", "--", "cat"], &noise)
            .ok();
        assert!(outcome.stdout == noise, "{} of {} bytes", outcome.stdout.len(), noise.len());
        assert_eq!(masked(&outcome), 0, "{outcome}");
    }
}

#[test]
fn colours_pass() {
    let world = World::host();
    let profile = world.leasing(VALUE.as_bytes());
    world
        .leased_sh(
            &profile,
            &["env"],
            "printf '\\033[1;31mred\\033[0m %s \\033[32mgreen\\033[0m' \"$TOKEN\"",
        )
        .ok()
        .says("\u{1b}[1;31mred\u{1b}[0m ")
        .says(" \u{1b}[32mgreen\u{1b}[0m")
        .never_says(VALUE);
}

/// Its containers are wiped before its last words are read: what is masked must be known before it starts.
#[test]
fn a_command_that_ends_at_once_is_masked_however_busy_the_host_is() {
    let world = World::host();
    let profile = world.leasing(VALUE.as_bytes());
    std::thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| {
                world
                    .leased_sh(&profile, &["env"], "echo \"$TOKEN\"")
                    .ok()
                    .says("***")
                    .never_says(VALUE);
            });
        }
    });
}

#[test]
fn a_prompt_without_a_newline_shows_at_once() {
    let world = World::host();
    // The prompt ends as the value begins: the longest tail that may be held.
    let profile = world.leasing(b"Password: really");
    let (mut run, _) = world.prepare(&[
        "--profile",
        &profile,
        "--lease",
        "test.use@svc.test",
        "--",
        "sh",
        "-c",
        "printf 'Password: '; sleep 4",
    ]);
    run.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = run.spawn().unwrap();
    let mut prompt = [0; 10];
    child.stdout.as_mut().unwrap().read_exact(&mut prompt).unwrap();
    assert_eq!(&prompt, b"Password: ");
    // The command lives for four seconds more: so long before its end it cannot have been held.
    let shown = Instant::now();
    child.wait().unwrap();
    assert!(shown.elapsed() > Duration::from_millis(1_500), "{:?} before the end", shown.elapsed());
}

/// Standard output and standard error in one pipe, as `2>&1` and a log have them: nearly every third line ends in
/// what could begin the base64 of the value.
#[test]
fn lines_of_both_streams_in_one_pipe_stay_whole() {
    let world = World::host();
    let profile = world.leasing(b"tok-ABCDEFGH12345");
    let script = "import sys, time, string
for c in string.ascii_letters + string.digits + '+/=':
    for stream, name in (sys.stderr, 'err'), (sys.stdout, 'out'):
        stream.write(name + ' ' + c + '\\n'); stream.flush(); time.sleep(0.005)
";
    let (mut run, _) = world.prepare(&[
        "--profile",
        &profile,
        "--lease",
        "test.use@svc.test",
        "--",
        "python3",
        "-c",
        script,
    ]);
    let (mut reader, writer) = std::io::pipe().unwrap();
    run.stdin(Stdio::null()).stdout(writer.try_clone().unwrap()).stderr(writer);
    let mut child = run.spawn().unwrap();
    drop(run);
    let mut said = String::new();
    reader.read_to_string(&mut said).unwrap();
    assert!(child.wait().unwrap().success(), "{said}");
    let whole =
        |line: &&str| line.len() == 5 && (line.starts_with("err ") || line.starts_with("out "));
    let damaged: Vec<_> = said.lines().filter(|line| !whole(line)).collect();
    assert_eq!((said.lines().count(), damaged), (130, vec![]));
}

#[test]
fn short_values_are_not_masked_and_the_report_says_so() {
    let world = World::host();
    let profile = world.leasing(b"1234567");
    let outcome = world.leased_sh(&profile, &["env"], "echo $TOKEN").ok().prints("1234567\n");
    assert_eq!(outcome.report()["unmasked_values"], 1, "{outcome}");
    // Eight bytes are.
    let profile = world.leasing(b"12345678");
    let outcome = world.leased_sh(&profile, &["env"], "echo $TOKEN").ok().never_says("12345678");
    assert_eq!(outcome.report()["unmasked_values"], 0, "{outcome}");
}

#[test]
fn redact_false_is_obeyed() {
    let world = World::host();
    let profile = world.leasing_with(VALUE.as_bytes(), "default", "redact = false");
    world.leased_sh(&profile, &["env"], "printf %s \"$TOKEN\"").ok().prints(VALUE);
}

#[test]
fn a_command_without_a_lease_is_not_touched() {
    let world = World::host();
    let profile = world.leasing(VALUE.as_bytes());
    let outcome = world.run_with(&["--profile", &profile, "--", "cat"], VALUE.as_bytes()).ok();
    outcome.prints(VALUE);
}

#[test]
fn a_terminal_session_is_masked_too() {
    needs("script", "bsdutils");
    for world in World::each() {
        let profile = world.leasing(VALUE.as_bytes());
        let (command, _) = world.prepare(&["--profile", &profile, "--tty", "--lease"]);
        let line = format!(
            "{} {} test.use@svc.test,channel=env -- sh -c 'printf \"begin %s end\\n\" \"$TOKEN\"; test -t 1 && echo tty'",
            command.get_program().to_string_lossy(),
            command.get_args().map(|a| a.to_string_lossy()).collect::<Vec<_>>().join(" "),
        );
        let mut script = Command::new("script");
        world.dress(&mut script);
        script.args(["-qec", &line, "/dev/null"]);
        finish(script, b"", None).ok().says("begin ").says(" end").says("tty").never_says(VALUE);
    }
}

#[test]
fn both_leases_of_one_exec_are_masked() {
    let world = World::host();
    world.configure(
        &["a", "b"].map(|n| support::world::vault_secret(n, &format!("use.{n}@svc.test"))).concat(),
    );
    let mut toml = "extends = \"default\"\n".to_owned();
    for name in ["a", "b"] {
        world.set_secret(name, format!("long-value-of-{name}").as_bytes());
        toml.push_str(&format!(
            "[[capability]]\nname = \"use.{name}\"\nchannels = [\"env\"]\ncommand = [[\"**\"]]\n\
             [[capability.audience]]\nhost = \"svc.test\"\nsecret = \"{name}\"\nvariable = \"{}\"\n",
            name.to_uppercase()
        ));
    }
    let profile = world.profile("two", &toml);
    world
        .run(&[
            "--profile",
            &profile,
            "--lease",
            "use.a@svc.test",
            "--lease",
            "use.b@svc.test",
            "--",
            "sh",
            "-c",
            "echo $A $B; echo $B >&2",
        ])
        .ok()
        .never_says("long-value-of-a")
        .never_says("long-value-of-b");
}
