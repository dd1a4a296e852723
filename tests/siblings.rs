//! The sibling test: while a leased exec sleeps with its secret in every channel, in memory and behind a
//! socket, others try every way to it. Nothing is read. The control runs the same attack on the same
//! victim without `sublet`, and reads it.
//!
//! Each scene is a machine of its own: fresh mount and pid namespaces in which root, the victim and the
//! attackers all live, so that host-wide attacks by pid are tried in earnest and can hit nothing else.
#![forbid(unsafe_code)]

mod support;

use serial_test::file_serial;
use support::probe::{Bare, bare, worked};
use support::world::{leasing_profile, quoted, vault_secret};
use support::{ORDINARY, Outcome, World};

const VALUE: &str = "sibling-must-not-read-this-0815";
/// The same as the probes take it, so that no attacker's argument holds the value.
const MARK: &str = "sibling-must-#not-read-this-0815";
const SOCKET: &str = "sublet-test-sibling";
/// A user who is neither invoker nor owner.
const STRANGER: u32 = 23_456;

const WAYS: [&str; 10] = [
    "environ",
    "cmdline",
    "mem",
    "maps",
    "fd",
    "root",
    "process_vm_readv",
    "pidfd_getfd",
    "ptrace",
    "signal",
];

fn three_secrets(world: &World) -> String {
    let config: String =
        ["env", "file", "memfd"].map(|c| vault_secret(c, &format!("by.{c}@svc.test"))).concat();
    world.configure(&config);
    let mut toml = "extends = \"default\"\n".to_owned();
    for channel in ["env", "file", "memfd"] {
        world.set_secret(channel, VALUE.as_bytes());
        toml.push_str(&format!(
            "[[capability]]\nname = \"by.{channel}\"\nchannels = [\"{channel}\"]\ncommand = [[\"**\"]]\nredact = false\n\
             [[capability.audience]]\nhost = \"svc.test\"\nsecret = \"{channel}\"\nvariable = \"BY_{}\"\n",
            channel.to_uppercase()
        ));
    }
    world.profile("three", &toml)
}

/// Starts `victim` in the background, waits until it is ready, then runs `attack`, in which `$S` is the
/// victim's first process.
fn scene(world: &World, victim: &str, attack: &str) -> Outcome {
    let out = world.path("reports/victim.out");
    let script = format!(
        "rm -f {out}; {victim} >{out} 2>&1 &\nS=$!\n\
         n=0; until grep -sq '^ready ' {out}; do n=$((n+1)); [ $n -lt 200 ] || {{ cat {out}; exit 97; }}; sleep 0.05; done\n\
         {attack}\nkill -0 $S || {{ cat {out}; exit 96; }}\nexit 0\n",
        out = quoted(out.to_str().unwrap()),
    );
    bare(world, Bare::OwnProc, 0, &script).ok()
}

fn as_user(uid: u32, line: &str) -> String {
    format!("setpriv --reuid {uid} --regid {uid} --clear-groups {line}")
}

/// `(member of the family, way) → answer`, from the lines of `spy-family`.
fn findings(outcome: &Outcome) -> Vec<(u32, String, String)> {
    let mut member = 0;
    let mut found = Vec::new();
    for line in outcome.out().lines() {
        match line.split_once(": ") {
            Some(("member", n)) => member = n.parse().unwrap(),
            Some((way, answer)) if WAYS.contains(&way) => {
                found.push((member, way.to_owned(), answer.to_owned()));
            }
            _ => {}
        }
    }
    found
}

fn leased_victim(world: &World) -> String {
    let profile = three_secrets(world);
    world.shell_line(&[
        "--profile",
        &profile,
        "--lease",
        "by.env@svc.test",
        "--lease",
        "by.file@svc.test",
        "--lease",
        "by.memfd@svc.test",
        "--",
        "./probe",
        "victim-env",
        "BY_ENV",
        SOCKET,
    ])
}

#[test]
#[file_serial]
fn another_users_process_on_the_host_reads_nothing() {
    for (world, attackers) in [
        (World::host(), vec![ORDINARY, STRANGER]),
        // Rootless, the user's own processes are trusted and others are not.
        (World::developer(), vec![STRANGER]),
    ] {
        let world = world.with_probe();
        let victim = leased_victim(&world);
        for attacker in attackers {
            let attack = format!(
                "{}\n{}\ngrep -rl {MARK_PATTERN} /run /dev/shm /tmp/.X11-unix 2>/dev/null; mount | grep -c /run/sublet/secrets",
                as_user(attacker, &format!("./probe spy-family $S '{MARK}'")),
                as_user(attacker, &format!("./probe abstract {SOCKET}")),
            );
            let outcome = scene(&world, &victim, &attack);
            let found = findings(&outcome);
            let members = found.iter().map(|(m, ..)| m).max().unwrap_or(&0);
            // sublet, launcher, init, command: the attack has to have met all of them.
            assert!(*members >= 3, "{outcome}");
            // A world's own invoker shows its command line to everyone; it never holds the value.
            for (member, way, answer) in &found {
                assert!(
                    !worked(answer),
                    "uid {attacker}, process {member}, {way}: {answer}\n{outcome}"
                );
            }
            assert!(outcome.out().contains("abstract: ECONNREFUSED"), "{outcome}");
            assert!(outcome.out().ends_with("\n0\n"), "the host's mount table shows it\n{outcome}");
        }
    }
}

/// The value as a pattern that does not match its own text in a command line.
const MARK_PATTERN: &str = "'sibling-must-[n]ot-read-this-0815'";

#[test]
#[file_serial]
fn another_exec_of_the_same_profile_and_workspace_reads_nothing() {
    for world in World::each() {
        let world = world.with_probe();
        let victim = leased_victim(&world);
        let profile = world.path("profiles/three.toml");
        let look = format!(
            "./probe census '{MARK}'; ./probe spy $HOSTPID '{MARK}'; ./probe spy 1 '{MARK}'; \
             ./probe abstract {SOCKET}; \
             cat /run/sublet/secrets/* /dev/shm/* /tmp/* 2>/dev/null | grep -c {MARK_PATTERN}; \
             grep -c {MARK_PATTERN} /proc/[0-9]*/environ; true"
        );
        // The host's pid of the victim's command, found by root, as a sibling might guess it.
        let sibling = world.shell_line(&[
            "--profile",
            profile.to_str().unwrap(),
            "--env",
            "HOSTPID=@PID@",
            "--",
            "sh",
            "-c",
            &look,
        ]);
        let attack = format!(
            "P=$(pgrep -f 'probe victim-env' | tail -1)\n{}",
            sibling.replace("'HOSTPID=@PID@'", "HOSTPID=$P")
        );
        let outcome = scene(&world, &victim, &attack);
        assert!(outcome.out().contains("shown: 0"), "{outcome}");
        assert!(outcome.out().contains("abstract: ECONNREFUSED"), "{outcome}");
        for (_, way, answer) in findings(&outcome) {
            // Signal 0 to its own init is no way to a value.
            assert!(!worked(&answer) || way == "signal", "{way}: {answer}\n{outcome}");
        }
        assert!(!outcome.out().contains(VALUE), "{outcome}");
    }
}

#[test]
#[file_serial]
fn the_control_reads_it_every_way() {
    let world = World::host().with_probe();
    let victim =
        as_user(ORDINARY, &format!("env BY_ENV={VALUE} ./probe victim-env BY_ENV {SOCKET}"));
    let attack = format!(
        "{}\n{}",
        as_user(ORDINARY, &format!("./probe spy-family $S '{MARK}'")),
        as_user(ORDINARY, &format!("./probe abstract {SOCKET}")),
    );
    let outcome = scene(&world, &victim, &attack);
    let found = findings(&outcome);
    for way in WAYS.iter().filter(|w| !["cmdline", "root"].contains(w)) {
        let hit = found.iter().any(|(_, w, answer)| w == way && worked(answer));
        assert!(hit, "the control does not get there by {way}: {outcome}");
    }
    assert!(outcome.out().contains(&format!("abstract: allowed {VALUE}")), "{outcome}");
}

#[test]
#[file_serial]
fn another_process_of_the_same_exec_is_no_boundary_and_we_say_so() {
    // Named in SECURITY.md: whatever the command starts can take the value. The twin that keeps the
    // tests above honest: the value is really there.
    let world = World::host().with_probe();
    world.configure(&vault_secret("s", "test.use@svc.test"));
    world.set_secret("s", VALUE.as_bytes());
    let profile = world.profile("p", &leasing_profile("default", "redact = false"));
    let outcome =
        world.leased_sh(&profile, &["env"], &format!("sleep 0.1 & ./probe census '{MARK}'"));
    assert!(!outcome.ok().out().contains("shown: 0"));
}
