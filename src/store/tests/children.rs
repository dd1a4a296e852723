//! What needs other processes: killed ones, unprivileged ones, and many at once. This test binary starts
//! itself again for them.

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use super::*;

/// The lines that a child prints for its parent.
const MARK: &str = "child says: ";

fn child(wrapper: &[&str], role: &str, dir: &Path) -> Command {
    let this = std::env::current_exe().unwrap();
    let mut command = match wrapper {
        [] => Command::new(&this),
        [program, arguments @ ..] => {
            let mut command = Command::new(program);
            command.args(arguments).arg(&this);
            command
        }
    };
    command
        .args(["--exact", "store::tests::children::a_child", "--ignored", "--nocapture"])
        .env("SUBLET_TEST_ROLE", role)
        .env("SUBLET_TEST_DIR", dir)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    command
}

fn said(command: &mut Command) -> Vec<String> {
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let lines: Vec<String> =
        text.lines().filter_map(|l| l.split_once(MARK)).map(|(_, said)| said.to_owned()).collect();
    assert!(!lines.is_empty(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    lines
}

/// Waits until the child has said something; returns what, and the rest of its output.
fn wait_for_word(child: &mut Child) -> (String, BufReader<std::process::ChildStdout>) {
    let mut output = BufReader::new(child.stdout.take().unwrap());
    loop {
        let mut line = String::new();
        assert_ne!(output.read_line(&mut line).unwrap(), 0, "the child ended early");
        if let Some((_, said)) = line.trim_end().split_once(MARK) {
            return (said.to_owned(), output);
        }
    }
}

fn say(word: impl std::fmt::Display) {
    println!("{MARK}{word}");
}

#[test]
#[ignore = "other tests start it as their child"]
fn a_child() {
    let (Ok(role), Some(dir)) =
        (std::env::var("SUBLET_TEST_ROLE"), std::env::var_os("SUBLET_TEST_DIR"))
    else {
        return;
    };
    let dir = Path::new(&dir);
    match role.as_str() {
        "append" => {
            let mut store = Store::open(dir).unwrap();
            for _ in 0..30 {
                write(&mut store, |tx| tx.append(draft(EventType::LeaseGranted)));
                store.tidy().unwrap();
            }
            say("done");
        }
        "hold a lease" => {
            let mut store = Store::open(dir).unwrap();
            let run = run();
            let lease = lease(&run, 1);
            let exec = exec(&run, std::slice::from_ref(&lease.lease_id));
            write(&mut store, |tx| {
                tx.put_lease(&lease)?;
                tx.put_exec(&exec)
            });
            say(lease.lease_id);
            std::thread::sleep(Duration::from_secs(60));
        }
        "append for ever" => {
            let mut store = Store::open(dir).unwrap();
            loop {
                let durability = Durability::Relaxed;
                let (_, head) = store
                    .transaction(durability, |tx| {
                        tx.append(draft(EventType::LeaseGranted))?;
                        tx.append(draft(EventType::LeaseConsumed))
                    })
                    .unwrap();
                store.tidy().unwrap();
                say(head.seq);
            }
        }
        "die within a step" => {
            let mut store = Store::open(dir).unwrap();
            let died = store.transaction(Durability::Durable, |tx| {
                tx.append(draft(EventType::LeaseGranted))?;
                say("within");
                std::thread::sleep(Duration::from_secs(60));
                Ok(())
            });
            died.unwrap();
        }
        "write" => {
            let written = Store::open(dir).and_then(|mut store| {
                store.transaction(Durability::Durable, |tx| tx.append(draft(EventType::RunStarted)))
            });
            say(match written {
                Ok(_) => "written".to_owned(),
                Err(e) => format!("{e:?}"),
            });
        }
        "fill the disk" => {
            let mut store = Store::open(dir).unwrap();
            let mut appended = 0;
            let refused = loop {
                match store.transaction(Durability::Durable, |tx| {
                    tx.append(draft(EventType::LeaseGranted).because("x".repeat(900)))
                }) {
                    Ok((_, head)) => appended = head.seq,
                    Err(e) => break e,
                }
            };
            assert_eq!(whole_trail(&store), appended, "what was granted before is whole");
            say(format!("{appended} {refused:?}"));
            // Room again: the next grant is recorded.
            std::fs::remove_file(dir.join("ballast")).unwrap();
            write(&mut store, |tx| tx.append(draft(EventType::LeaseGranted)));
            assert_eq!(whole_trail(&store), appended + 1);
            say("room again");
        }
        "fill the disk from many threads" => {
            let store = SharedStore::open(dir).unwrap();
            let event = || draft(EventType::LeaseGranted).because("x".repeat(900));
            let append = || store.transaction(Durability::Durable, |tx| tx.append(event()));
            let refused: Vec<String> = std::thread::scope(|scope| {
                let fill = || loop {
                    if let Err(e) = append() {
                        break format!("{:?}", e.cause());
                    }
                };
                let threads: Vec<_> = (0..8).map(|_| scope.spawn(fill)).collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            let vouched = store.heads().unwrap().durable.seq;
            assert_eq!(store.read(|view| view.head()).unwrap().seq, vouched);
            say(format!("{vouched} {}", refused.join(" ")));
            std::fs::remove_file(dir.join("ballast")).unwrap();
            assert_eq!(append().unwrap().0.seq, vouched + 1);
            say("room again");
        }
        "live through a faulty disk" => faulty_disk(dir),
        other => panic!("no role is called {other}"),
    }
}

/// Under `slow_fsync.c`, on whose faults the file `faults` decides.
fn faulty_disk(dir: &Path) {
    let faults = dir.join("faults");
    let store = SharedStore::open(dir).unwrap();
    let append =
        |durability| store.transaction(durability, |tx| tx.append(draft(EventType::LeaseGranted)));
    for (fault, durable) in [("s", true), ("w", true), ("w", false)] {
        append(Durability::Durable).unwrap();
        let before = append(Durability::Relaxed).unwrap().1;
        assert_eq!(store.heads().unwrap().latest, before);
        std::fs::write(&faults, fault).unwrap();
        let durability = if durable { Durability::Durable } else { Durability::Relaxed };
        for _ in 0..3 {
            let refused = append(durability).unwrap_err();
            assert!(matches!(refused.cause(), StoreError::Unwritable { .. }), "{refused:?}");
            assert_eq!(store.heads().unwrap().latest, before, "nothing is vouched for");
        }
        std::fs::remove_file(&faults).unwrap();
        let log = std::fs::metadata(dir.join("db/sublet.db-wal")).unwrap().size();
        let written = bytes_written();
        let after = append(Durability::Durable).unwrap().1;
        assert!(after.seq > before.seq);
        // What the kernel may have forgotten is written again before anything rests on it.
        assert!(bytes_written() - written > log, "{} of {log}", bytes_written() - written);
        let written = bytes_written();
        append(Durability::Durable).unwrap();
        assert!(bytes_written() - written < log / 2, "once");
        let found = store.read(|view| view.head()).unwrap();
        assert_eq!(found, store.heads().unwrap().latest);
    }
    // The same in the connection that moves the log.
    let tidied = || {
        for _ in 0..20 {
            append(Durability::Relaxed).unwrap();
        }
        store.tidy()
    };
    assert!(tidied().unwrap());
    std::fs::write(&faults, "s").unwrap();
    assert!(matches!(tidied().unwrap_err().cause(), StoreError::Unwritable { .. }));
    append(Durability::Relaxed).unwrap_err();
    std::fs::remove_file(&faults).unwrap();
    assert!(tidied().unwrap());
    drop(store);
    say(whole_trail(&Store::open(dir).unwrap()));
}

/// proc_pid_io(5)
fn bytes_written() -> u64 {
    let text = std::fs::read_to_string("/proc/self/io").unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("wchar: ")).unwrap();
    line.parse().unwrap()
}

#[test]
fn a_disk_that_fails_stops_grants_until_it_works_again() {
    let dir = state();
    let tools = tempfile::tempdir().unwrap();
    let shim = tools.path().join("slow_fsync.so");
    let built = Command::new("cc")
        .args(["-shared", "-fPIC", "-O1", "-o"])
        .arg(&shim)
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/benches/slow_fsync.c"))
        .status()
        .expect("cc, which also builds SQLite");
    assert!(built.success());
    let mut command = child(&[], "live through a faulty disk", dir.path());
    command.env("LD_PRELOAD", shim).env("FAULTY_DISK", dir.path().join("faults"));
    assert!(said(&mut command)[0].parse::<u64>().unwrap() >= 50);
}

#[test]
fn processes_at_once_leave_one_gapless_chain() {
    let dir = state();
    let children: Vec<Child> =
        (0..8).map(|_| child(&[], "append", dir.path()).spawn().unwrap()).collect();
    for child in children {
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    }
    assert_eq!(whole_trail(&Store::open(dir.path()).unwrap()), 240);
}

#[test]
fn what_a_killed_process_held_is_an_orphan_once() {
    let dir = state();
    let mut holder = child(&[], "hold a lease", dir.path()).spawn().unwrap();
    let (lease, _output) = wait_for_word(&mut holder);
    let mut store = Store::open(dir.path()).unwrap();
    assert_eq!(write(&mut store, |tx| tx.adopt_orphans()), Orphans::default(), "it lives");
    holder.kill().unwrap();
    holder.wait().unwrap();

    let found = write(&mut store, |tx| {
        let orphans = tx.adopt_orphans()?;
        for lease in &orphans.leases {
            assert!(tx.set_lease_state(&lease.lease_id, LeaseState::Interrupted)?);
        }
        for exec in &orphans.execs {
            assert!(tx.finish_exec(&exec.exec_id, ExecState::Interrupted, None)?);
        }
        Ok(orphans)
    });
    assert_eq!(found.leases[0].lease_id.as_str(), lease);
    assert_eq!(found.execs[0].lease_ids, [found.leases[0].lease_id.clone()]);
    assert_eq!(write(&mut store, |tx| tx.adopt_orphans()), Orphans::default(), "told once");
}

#[test]
fn a_kill_at_any_moment_leaves_whole_steps() {
    let dir = state();
    for round in 0..10 {
        let mut writer = child(&[], "append for ever", dir.path()).spawn().unwrap();
        let (_, output) = wait_for_word(&mut writer);
        std::thread::sleep(Duration::from_micros(1500 * round));
        writer.kill().unwrap();
        writer.wait().unwrap();
        let rest: Vec<String> = output.lines().map_while(Result::ok).collect();
        let said = rest.iter().filter_map(|l| l.split_once(MARK)).next_back();
        let last: u64 = said.and_then(|(_, seq)| seq.parse().ok()).unwrap_or(0);
        let events = whole_trail(&Store::open(dir.path()).unwrap());
        assert!(events >= last, "{last} were committed, {events} are there");
        assert_eq!(events % 2, 0, "a step is there whole or not at all");
    }
}

#[test]
fn a_process_that_dies_within_a_step_blocks_no_one() {
    let dir = state();
    let mut writer = child(&[], "die within a step", dir.path()).spawn().unwrap();
    let (_, _output) = wait_for_word(&mut writer);
    writer.kill().unwrap();
    writer.wait().unwrap();
    let mut store = Store::open(dir.path()).unwrap();
    write(&mut store, |tx| tx.append(draft(EventType::RunStarted)));
    assert_eq!(whole_trail(&store), 1);
}

/// Root may write everywhere, so that another user has to try.
#[test]
fn a_directory_that_cannot_be_written_is_told_from_other_errors() {
    let dir = state();
    drop(Store::open(dir.path()).unwrap());
    let root = rustix::process::geteuid().is_root();
    let paths = ["", "db", "db/sublet.db", "db/sublet.db-wal", "db/sublet.db-shm", "db/owners"];
    let all = paths.map(|p| dir.path().join(p));
    let try_it = |modes: [u32; 6]| {
        let set = |path: &PathBuf, mode| {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
        };
        // Without root, a closed directory has to be opened first and closed last.
        all[..2].iter().for_each(|directory| set(directory, 0o700));
        all.iter().zip(modes).rev().for_each(|(path, mode)| set(path, mode));
        let mut command = child(&[], "write", dir.path());
        if root {
            for path in &all {
                std::os::unix::fs::chown(path, Some(65534), Some(65534)).unwrap();
            }
            command.uid(65534).gid(65534);
        }
        said(&mut command).remove(0)
    };
    let open = [0o700, 0o700, 0o600, 0o600, 0o600, 0o600];
    assert_eq!(try_it(open), "written");
    #[track_caller]
    fn check(said: &str) {
        assert!(said.starts_with("Unwritable"), "{said}");
    }
    check(&try_it([0o700, 0o700, 0o400, 0o400, 0o400, 0o600]));
    check(&try_it([0o700, 0o700, 0o000, 0o600, 0o600, 0o600]));
    check(&try_it([0o700, 0o500, 0o600, 0o600, 0o600, 0o400]));
    check(&try_it([0o700, 0o000, 0o600, 0o600, 0o600, 0o600]));
    assert_eq!(try_it(open), "written");
}

#[test]
fn a_full_disk_grants_nothing_and_loses_nothing() {
    full_disk("fill the disk");
}

#[test]
fn a_full_disk_grants_nothing_to_any_thread_and_loses_nothing() {
    full_disk("fill the disk from many threads");
}

fn full_disk(role: &str) {
    let dir = state();
    let script = format!(
        "mount -t tmpfs -o size=700k,mode=0700 tmpfs {0} && head -c 200k /dev/zero >{0}/ballast && exec \"$0\" \"$@\"",
        dir.path().display()
    );
    let unshare = match rustix::process::geteuid().is_root() {
        true => ["unshare", "--mount", "--propagation=private", "sh", "-c", &script],
        false => ["unshare", "--mount", "--map-root-user", "sh", "-c", &script],
    };
    let said = said(&mut child(&unshare, role, dir.path()));
    let (appended, error) = said[0].split_once(' ').unwrap();
    assert!(appended.parse::<u64>().unwrap() > 10, "{said:?}");
    assert!(error.starts_with("Unwritable"), "{said:?}");
    assert_eq!(said[1], "room again");
}
