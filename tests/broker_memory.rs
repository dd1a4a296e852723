//! A thousand leased execs with distinct values, and then not one of them in the memory of the broker or of
//! the launcher, also where it was printed and not masked. The scan is shown to find a value while its exec lives,
//! and what was printed while it waits for its reader.
#![forbid(unsafe_code)]

mod support;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::time::Instant;

use serial_test::file_serial;
use sublet::api::client::{Client, ExecStream, Frame};
use sublet::api::wire::{ExecBody, LeaseBody};
use sublet::model::id::LeaseId;
use support::World;
use support::broker::{host, serve};
use support::host::eventually;
use support::world::{leasing_profile, vault_secret};

/// How all values begin; put together at run time, so that no program's text holds it.
fn mark() -> Vec<u8> {
    ["mem", "scan", "value"].join("+").into_bytes()
}

/// The marks in other clothes: as the redactor looks for them.
fn marks() -> Vec<Vec<u8>> {
    let hex: String = mark().iter().map(|b| format!("{b:02x}")).collect();
    // The first twelve of sixteen bytes are four whole groups, at the one alignment of a value's beginning.
    let base64 = base64::Engine::encode(&base64::engine::general_purpose::STANDARD, &mark()[..12]);
    vec![mark(), hex.into_bytes(), base64.into_bytes()]
}

const EXECS: usize = 1000;
const CHANNELS: [&str; 3] = ["memfd", "file", "env"];

#[test]
#[file_serial]
fn no_value_of_a_thousand_is_left_in_memory() {
    support::needs_root();
    let world = World::host();
    // Each run of the command gives another value. Its text holds the pieces only.
    let counter = world.file("counter", "", 0o600);
    let mint = format!(
        "#!/bin/sh\nn=$(od -An -N8 -tx8 /dev/urandom | tr -d ' ')\necho $n >>{0}\n\
         a=mem; b=scan; c=value\n\
         printf '{{\"value\":\"%s+%s+%s-%s-of-this-test\"}}' $a $b $c $n\n",
        counter.display()
    );
    let mint = world.file("mint", mint, 0o700);
    let config = format!(
        "{}[secrets.c]\nsource = \"command\"\ncommand = [{mint:?}]\nallow = [\"test.use@svc.test\"]\n\
         [ceilings]\nrequests_per_minute = 100000\nrequests_per_run = 100000\n",
        vault_secret("s", "vault.use@svc.test")
    );
    let minted = leasing_profile("default", "").replace("secret = \"s\"", "secret = \"c\"");
    let many = |profile: String| profile.replace("uses = 5", "uses = 100000");
    let kept = leasing_profile("default", "").replace("test.use", "vault.use");
    let bare =
        leasing_profile("default", "redact = false").replace("secret = \"s\"", "secret = \"c\"");
    let profiles = [("minted", &*many(minted)), ("kept", &many(kept)), ("bare", &many(bare))];
    host(&world, &config, &profiles);
    let of_the_vault = [&mark()[..], b"-of-the-vault-0123456789"].concat();
    world.set_secret("s", &of_the_vault);

    let broker = serve(&world);
    let (service, launcher) = broker.parts();
    let runs = [("minted", "test.use"), ("kept", "vault.use"), ("bare", "test.use")];
    let agents = runs.map(|(profile, capability)| {
        let run = broker.start_run(profile);
        let agent = Client::connect(&run.socket).unwrap();
        let leases = CHANNELS.map(|channel| lease(&agent, capability, channel));
        (agent, leases)
    });
    let clean = |when: &str| {
        for process in [&service, &launcher] {
            let found = found(process.pid);
            assert_eq!(found, [0; 3], "{} {when}: plain, hex, base64", process.name);
        }
    };
    clean("before");

    // The control: while its exec lives, the broker has the value mapped, and the scan sees it.
    let (agent, [memfd, ..]) = &agents[0];
    let mut sleeper = start(agent, memfd, &["sleep", "60"]);
    wait_for(&mut sleeper, |frame| matches!(frame, Frame::Started(_)));
    assert!(found(service.pid)[0] > 0, "the scan must find the value of a living exec");
    drop(sleeper);
    eventually("the sleeper's value is gone", || found(service.pid)[0] == 0);

    // The control of what is printed as it is: a client that reads nothing leaves it with the broker, far more
    // often than the value itself is mapped.
    let print = |agent: &Client, lease: &LeaseId| {
        start(agent, lease, &["sh", "-c", "yes \"$TOKEN\" | head -c 2000000"])
    };
    let (bare, [.., env]) = &agents[2];
    let silent = print(bare, env);
    eventually("what nobody reads waits in memory", || found(service.pid)[0] > 1_000);
    drop(silent);
    eventually("nothing of it is left", || found(service.pid)[0] == 0);
    let mut heard = print(bare, env);
    let mut shown = 0;
    wait_for(&mut heard, |frame| match frame {
        Frame::Stdout(bytes) => {
            shown += memchr::memmem::find_iter(bytes, &mark()).count();
            false
        }
        frame => matches!(frame, Frame::Exit(_)),
    });
    assert!(shown > 30_000, "{shown} of them were shown");
    drop(heard);

    let began = Instant::now();
    let mut done = 0;
    while done < EXECS {
        // A few at a time, as a busy host has them.
        let mut streams: Vec<ExecStream> = (0..4)
            .map(|turn| {
                let (agent, leases) = &agents[[0, 0, 2, 1][turn]];
                // What is printed is masked, in two of them: the redactor has every form of it.
                let show =
                    "cat /proc/self/fd/3 2>/dev/null; cat \"$TOKEN_FILE\" 2>/dev/null; echo $TOKEN";
                start(agent, &leases[(done + turn) % 3], &["sh", "-c", show])
            })
            .collect();
        done += streams.len();
        for stream in &mut streams {
            wait_for(stream, |frame| match frame {
                Frame::Exit(exit) => exit.exit_status < 125,
                Frame::Failed(error) => panic!("{error:?}"),
                _ => false,
            });
        }
    }
    println!("{done} leased execs in {:.1} s", began.elapsed().as_secs_f64());
    let minted: std::collections::BTreeSet<String> =
        fs::read_to_string(&counter).unwrap().lines().map(str::to_owned).collect();
    assert!(minted.len() >= EXECS * 3 / 4, "{} distinct values", minted.len());
    // Threads of the last execs may still be ending.
    eventually("only the broker's own threads are left", || {
        fs::read_dir(format!("/proc/{}/task", service.pid)).unwrap().count() < 32
    });
    clean("after");
}

fn lease(agent: &Client, capability: &str, channel: &str) -> LeaseId {
    let body: LeaseBody = serde_json::from_value(serde_json::json!({
        "capability": capability, "audience": "svc.test", "channel": channel, "uses": 100_000,
        // A thousand execs take minutes under emulation.
        "ttl": "10m",
    }))
    .unwrap();
    agent.request(&body).unwrap().lease_id
}

fn start(agent: &Client, lease: &LeaseId, command: &[&str]) -> ExecStream {
    let mut body = ExecBody::of(command.iter().copied());
    body.lease_ids = vec![lease.clone()];
    let mut stream = agent.exec(&body).unwrap();
    stream.end_stdin();
    stream.flush().unwrap();
    stream
}

#[track_caller]
fn wait_for(stream: &mut ExecStream, mut wanted: impl FnMut(&Frame<'_>) -> bool) {
    while let Some(frame) = stream.next_frame().unwrap() {
        if wanted(&frame) {
            return;
        }
    }
    panic!("the stream ended before that");
}

/// How often each mark is in a process's memory: all that is mapped, as root reads it.
fn found(pid: u32) -> [usize; 3] {
    let marks = marks();
    let memory = File::open(format!("/proc/{pid}/mem")).unwrap();
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let mut counts = [0; 3];
    let mut chunk = vec![0; 1 << 20];
    for line in maps.lines().filter(|line| line.contains(" r") && !line.ends_with("[vvar]")) {
        let range = line.split_whitespace().next().unwrap().split_once('-').unwrap();
        let [mut at, end] = [range.0, range.1].map(|hex| u64::from_str_radix(hex, 16).unwrap());
        while at < end {
            let wanted = chunk.len().min((end - at) as usize);
            // What cannot be read (a device, a page that went) holds nothing of ours.
            let Ok(read @ 1..) = memory.read_at(&mut chunk[..wanted], at) else { break };
            for (count, mark) in counts.iter_mut().zip(&marks) {
                *count += memchr::memmem::find_iter(&chunk[..read], mark).count();
            }
            // Not to miss one that lies across.
            at += if read < wanted || at + read as u64 >= end { read } else { read - 64 } as u64;
        }
    }
    counts
}
