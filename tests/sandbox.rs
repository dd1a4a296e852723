//! Each wall of the sandbox, tried from inside through the real `sublet run`, with a control in a bare
//! namespace that shows that the attempt works where the wall is not.
#![forbid(unsafe_code)]

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{SocketAddr, UnixListener};
use std::process::Command;

use serial_test::file_serial;
use support::Outcome;
use support::probe::{Bare, answers, bare, bare_command, worked};
use support::world::{binary, finish, quoted};
use support::{ORDINARY, World, host, needs};

/// What a filter may answer. Anything else was the kernel's own judgement: the call got through.
const REFUSALS: [&str; 4] = ["EPERM", "ENOSYS", "EACCES", "SIGSYS"];

fn try_inside(world: &World, words: &str) -> BTreeMap<String, String> {
    answers(&world.run(&["--", "sh", "-c", &format!("./probe try {words}")]).ok())
}

/// Every attack of `words` is refused inside and gets through to the kernel outside.
fn refused_inside(words: &str) {
    for world in World::each() {
        let world = world.with_probe();
        let inside = try_inside(&world, words);
        let outside =
            answers(&bare(&world, Bare::OwnProc, 0, &format!("./probe try {words}")).ok());
        assert_eq!(inside.len(), outside.len(), "{inside:?}\n{outside:?}");
        assert!(!inside.is_empty());
        for (word, answer) in &inside {
            let refused = REFUSALS.contains(&answer.as_str())
                || (word.starts_with("s_") && answer == "EAFNOSUPPORT");
            assert!(refused, "{word} inside, for uid {}: {answer}", world.invoker);
            let control = &outside[word];
            // A kernel built without the call has nothing to show: x32, modules, kexec, AF_ALG.
            let reaches = !["EPERM", "EACCES", "SIGSYS"].contains(&control.as_str());
            assert!(reaches, "the control of {word} proves nothing: {control}");
        }
    }
}

#[test]
#[file_serial]
fn set_id_bits_are_refused_in_every_call_that_carries_a_mode() {
    refused_inside(
        "su_chmod sg_chmod su_chmod_high su_chmod_sixteen su_fchmod su_fchmodat su_fchmodat2 su_open \
         su_openat su_creat su_mknod su_mknodat su_tmpfile su_openat2 su_x32_chmod file_capability",
    );
}

#[test]
#[file_serial]
fn a_root_owned_workspace_keeps_no_set_id_file_either() {
    let world = World::new(0, 0).with_probe();
    let _ = try_inside(&world, "all");
    let marked: Vec<_> = fs::read_dir(&world.workspace)
        .unwrap()
        .flatten()
        .filter(|e| e.metadata().unwrap().mode() & 0o6000 != 0)
        .map(|e| e.path())
        .collect();
    assert!(marked.is_empty(), "set-id files on the host: {marked:?}");
    // The control leaves them: the attack works where nothing stops it.
    let control = World::new(0, 0).with_probe();
    bare(&control, Bare::OwnProc, 0, "./probe try su_chmod su_open").ok();
    let marked = fs::read_dir(&control.workspace)
        .unwrap()
        .flatten()
        .filter(|e| e.metadata().unwrap().mode() & 0o4000 != 0)
        .count();
    assert_eq!(marked, 2);
}

#[test]
fn ordinary_modes_still_work() {
    for world in World::each() {
        world
            .run(&[
                "--",
                "sh",
                "-ec",
                "umask 022; touch f; chmod 0755 f; chmod u=rw,go= f; mkdir -m 1777 d; mkfifo p; \
                 install -m 0640 f g; stat -c %a f d g",
            ])
            .ok()
            .prints("600\n1777\n640\n");
    }
}

#[test]
#[file_serial]
fn devices_cannot_be_made() {
    refused_inside("device_chr device_blk");
}

#[test]
#[file_serial]
fn no_new_namespaces_and_no_mounts() {
    refused_inside(
        "ns_unshare_user ns_unshare_mount ns_unshare_high ns_clone_user ns_clone3 ns_setns m_mount \
         m_umount m_pivot m_chroot m_fsopen m_open_tree m_move_mount m_setattr",
    );
}

#[test]
#[file_serial]
fn no_tracing_even_of_oneself() {
    refused_inside("t_traceme t_vm_readv t_vm_writev t_pidfd_getfd t_kcmp");
}

#[test]
#[file_serial]
fn the_kernels_risky_doors_are_shut() {
    refused_inside(
        "k_io_uring k_bpf k_perf k_userfaultfd k_open_by_handle k_add_key k_request_key k_keyctl \
         k_init_module k_finit_module k_delete_module k_kexec k_kexec_file k_swapon k_swapoff \
         k_clock_settime k_settimeofday k_reboot k_acct k_syslog k_iopl k_ioperm k_sethostname \
         k_fanotify",
    );
}

#[test]
#[file_serial]
fn sockets_that_no_command_needs_are_refused() {
    refused_inside("s_vsock s_alg s_packet s_packet_high s_raw s_raw_flags s_raw6");
}

#[test]
#[file_serial]
fn the_other_call_tables_are_shut() {
    refused_inside("abi_x32 abi_i386");
}

#[test]
fn clone3_answers_that_it_does_not_exist_so_that_libc_falls_back() {
    let world = World::host().with_probe();
    let inside = try_inside(&world, "ns_clone3 su_openat2");
    assert_eq!(inside["ns_clone3"], "ENOSYS");
    assert_eq!(inside["su_openat2"], "ENOSYS");
    world
        .run(&[
            "--",
            "python3",
            "-c",
            "import threading,subprocess\n\
             t=[threading.Thread(target=lambda:subprocess.run(['true'],check=True)) for _ in range(8)]\n\
             [x.start() for x in t];[x.join() for x in t];print('threads')",
        ])
        .ok()
        .prints("threads\n");
}

#[test]
#[file_serial]
fn no_other_process_is_visible() {
    for world in World::each() {
        let world = world.with_probe();
        // The one to be seen: an environment with a mark, as the workspace's owner.
        let mut victim = Command::new("sleep");
        world.dress(&mut victim);
        let mut victim = victim.arg("60").env("MARK", "seen-from-inside").spawn().unwrap();
        let inside = world.run(&["--", "./probe", "census", "seen-from-inside"]).ok();
        let outside =
            bare(&world, Bare::HostProc, ORDINARY, "./probe census seen-from-inside").ok();
        victim.kill().unwrap();
        victim.wait().unwrap();
        let (inside, outside) = (answers(&inside), answers(&outside));
        assert_eq!(inside["shown"], "0");
        // Only its own init.
        assert_eq!(inside["others"], "1", "{inside:?}");
        assert_ne!(outside["shown"], "0", "the control sees nothing: {outside:?}");
    }
}

#[test]
fn init_cannot_be_killed_or_read_from_inside() {
    for world in World::each() {
        let world = world.with_probe();
        let outcome = world
            .run(&["--", "sh", "-c", "kill -9 1; ./probe spy 1 whatever; echo still here"])
            .ok()
            .says("still here");
        let answers = answers(&outcome);
        for way in ["environ", "mem", "maps", "fd", "process_vm_readv", "pidfd_getfd", "ptrace"] {
            assert!(!worked(&answers[way]), "{way} of init: {}", answers[way]);
        }
    }
}

/// Its own limits and its turn on the CPU are asked for by number, and the kernel asks for no more than the same ids: an
/// init that may have no descriptors cannot watch, and its end would look as if the command had never run.
#[test]
fn init_cannot_be_hampered_from_inside() {
    const WAYS: &str = r#"
import ctypes, os, resource
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
    if libc.syscall(number, *arguments) < 0:
        raise OSError(ctypes.get_errno(), 'refused')
def attr():
    return ctypes.create_string_buffer(bytes([48, 0, 0, 0, 3]) + bytes(11) + b'\5' + bytes(31), 48)
nofile = resource.RLIMIT_NOFILE
ways = lambda who: {
    'prlimit64': lambda: resource.prlimit(who, nofile, (200, 200)),
    'setpriority': lambda: os.setpriority(os.PRIO_PROCESS, who, 5),
    'sched_setaffinity': lambda: os.sched_setaffinity(who, {0}),
    'sched_setscheduler': lambda: os.sched_setscheduler(who, os.SCHED_BATCH, os.sched_param(0)),
    'sched_setparam': lambda: os.sched_setparam(who, os.sched_param(0)),
    'sched_setattr': lambda: call(314, who, attr(), 0),
    'ioprio_set': lambda: call(251, 1, who, 2 << 13 | 7),
}
of_all = {
    'setpriority of a user': lambda: os.setpriority(os.PRIO_USER, 0, 5),
    'ioprio_set of a user': lambda: call(251, 3, os.getuid(), 2 << 13 | 7),
}
def tried(ways):
    worked = []
    for name, way in ways.items():
        try:
            way()
            worked.append(name)
        except OSError:
            pass
    return ', '.join(worked)
print('reads:', len(resource.prlimit(1, nofile)))
print('init:', tried(ways(1) | of_all))
print('itself:', tried(ways(0)))
"#;
    let itself = "prlimit64, setpriority, sched_setaffinity, sched_setscheduler, sched_setparam, \
                  sched_setattr, ioprio_set";
    for world in World::each() {
        for profile in ["default", "build"] {
            let outcome = world.run(&["--profile", profile, "--", "python3", "-c", WAYS]);
            outcome.ok().prints(&format!("reads: 2\ninit: \nitself: {itself}\n"));
        }
    }
    let world = World::host();
    let strict = world.run(&["--profile", "strict", "--", "python3", "-c", WAYS]).ok();
    strict.prints("reads: 2\ninit: \nitself: prlimit64, setpriority\n");
    // The control's first process is a shell of the same user.
    let script = format!("python3 -c {}; true", quoted(WAYS));
    let control = bare(&world, Bare::OwnProc, ORDINARY, &script).ok();
    let all = format!("{itself}, setpriority of a user, ioprio_set of a user");
    control.prints(&format!("reads: 2\ninit: {all}\nitself: {itself}\n"));
}

#[test]
fn init_shows_no_arguments_and_no_environment() {
    let world = World::host();
    world
        .run(&[
            "--",
            "sh",
            "-c",
            "tr -d '\\0 ' </proc/1/cmdline | wc -c; cat /proc/1/environ | wc -c",
        ])
        .exits(0)
        .prints("0\n0\n");
}

#[test]
fn no_descriptor_of_the_caller_is_inherited() {
    for world in World::each() {
        let world = world.with_probe();
        world.file("outside-secret", "not for you", 0o600);
        let (command, _) = world.prepare(&["--", "./probe", "fds"]);
        let words: Vec<_> =
            std::iter::once(command.get_program()).chain(command.get_args()).collect();
        let mut through_shell = Command::new("bash");
        world.dress(&mut through_shell);
        // Descriptors that a careless caller leaves open: a file, a directory, one far above.
        through_shell.args([
            "-c",
            "exec 7<outside-secret 9</ 200</etc/passwd; exec \"$@\"",
            "bash",
        ]);
        finish(copy_of(through_shell, &words), b"", None).ok().prints("0\n1\n2\n");
        // The control: what a plain exec hands on.
        let control = "exec 7<outside-secret 9</; exec ./probe fds";
        let seen = bare(&world, Bare::OwnProc, ORDINARY, control).ok();
        assert!(seen.out().contains("7\n9\n"), "{seen}");
    }
}

/// The launcher and its children ask for short slices, so that they are let run at once. A command that
/// kept that would be switched out twenty times as often as without sublet.
#[test]
fn the_command_has_the_callers_slice_of_cpu_time() {
    for world in World::each() {
        let world = world.with_probe();
        let plain = bare(&world, Bare::OwnProc, ORDINARY, "./probe slice").ok();
        world.run(&["--", "./probe", "slice"]).ok().prints(&plain.out());
    }
}

/// While it is built a sandbox is kept off the launcher's CPU. Neither its command nor its init stays so.
#[test]
fn the_command_may_run_on_the_callers_cpus() {
    // Its init may be a moment behind.
    const LOOK: &str = "look() { grep Cpus_allowed_list: /proc/$1/status; }; look self; \
        for i in $(seq 500); do [ \"$(look 1)\" = \"$(look self)\" ] && break; sleep 0.01; done; look 1";
    for world in World::each() {
        let cpus = |outcome: &Outcome| -> Vec<String> {
            outcome.out().lines().map(|l| l.split_once('\t').unwrap().1.to_owned()).collect()
        };
        let plain = cpus(&bare(&world, Bare::OwnProc, ORDINARY, LOOK).ok());
        let inside = cpus(&world.run(&["--", "sh", "-c", LOOK]).ok());
        assert_eq!(inside, [&plain[0], &plain[0]].map(String::as_str));
        // One that is bound by its caller stays bound.
        let (command, _) = world.prepare(&["--", "sh", "-c", LOOK]);
        let words: Vec<_> =
            std::iter::once(command.get_program()).chain(command.get_args()).collect();
        let first = plain[0].split(['-', ',']).next().unwrap();
        let mut bound = Command::new("taskset");
        world.dress(&mut bound);
        bound.args(["-c", first]);
        let bound = finish(copy_of(bound, &words), b"", None).ok();
        assert_eq!(cpus(&bound), [first, first], "{bound}");
    }
}

fn copy_of(mut command: Command, more: &[&std::ffi::OsStr]) -> Command {
    command.args(more);
    command
}

#[test]
fn capabilities_are_empty_and_privileges_cannot_be_gained() {
    for world in World::each() {
        let outcome = world.run(&["--", "cat", "/proc/self/status"]).ok();
        let status = outcome.out();
        let field = |name: &str| {
            let line = status.lines().find(|l| l.starts_with(&format!("{name}:")));
            line.unwrap_or_else(|| panic!("no {name}\n{outcome}")).split_once(":\t").unwrap().1
        };
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(field(set), "0000000000000000", "{set}\n{outcome}");
        }
        assert_eq!(field("NoNewPrivs"), "1");
        assert_eq!(field("Seccomp"), "2");
        // 32 and 33 are the C library's own, and posix_spawn(3) of the test's leaves them ignored.
        let ignored = u64::from_str_radix(field("SigIgn"), 16).unwrap() & !(3 << 31);
        assert_eq!(ignored, 0, "ignored signals are inherited\n{outcome}");
        assert_eq!(field("SigBlk"), "0000000000000000", "blocked signals are inherited");
        let own = field("Gid").split('\t').next().unwrap_or("");
        assert!(field("Groups").split_whitespace().all(|g| g == own), "groups came in\n{outcome}");
    }
}

#[test]
fn a_set_uid_program_of_the_host_gives_nothing() {
    let world = World::host();
    let owner = ORDINARY.to_string();
    world
        .run(&["--", "sh", "-c", "ls -l /usr/bin/su | cut -c4; su -c id root; id -u"])
        .says(&format!("{owner}\n"))
        .never_says("uid=0");
}

#[test]
fn the_host_is_read_only_and_what_is_not_listed_is_not_there() {
    for world in World::each() {
        fs::write(world.path("home/private"), "not for you").unwrap();
        let home = world.path("home");
        let script = format!(
            "touch /usr/x /etc/x /x /bin/x /run/x 2>/dev/null && echo wrote; \
             cat {home}/private /etc/shadow /root/.bashrc 2>/dev/null && echo read; \
             ls {state} {etc} 2>/dev/null && echo listed; \
             mkdir /newdir 2>/dev/null && echo made; touch here && echo workspace; \
             touch /tmp/x && echo tmp",
            home = home.display(),
            state = world.state().display(),
            etc = world.path("etc").display(),
        );
        world.run(&["--", "sh", "-c", &script]).ok().prints("workspace\ntmp\n");
        let control = format!("cat {}/private && touch /tmp/x.$$ && rm /tmp/x.$$", home.display());
        bare(&world, Bare::OwnProc, ORDINARY, &control).ok().prints("not for you");
    }
}

#[test]
fn landlock_stands_behind_the_mounts() {
    for world in World::each() {
        let outcome = world.run(&["--", "true"]).ok();
        let by_landlock = outcome.report()["enforced"]
            .as_object()
            .unwrap()
            .values()
            .filter(|e| e["by"].to_string().contains("landlock"))
            .count();
        assert!(by_landlock > 0, "no effect is enforced by landlock\n{outcome}");
    }
}

#[test]
fn landlock_holds_ports_on_the_hosts_network() {
    for world in World::each() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        std::thread::spawn(move || {
            for mut peer in listener.incoming().flatten() {
                let _ = peer.write_all(b"host service");
            }
        });
        let script = format!("exec 3<>/dev/tcp/127.0.0.1/{port} && cat <&3");
        for (ports, status) in [(vec![port], 0), (vec![1], 1), (vec![], 1)] {
            let profile = world.profile(
                "ports",
                &format!(
                    "extends = \"default\"\n[network]\nmode = \"host\"\nconnect_ports = {ports:?}\n"
                ),
            );
            let outcome =
                world.run(&["--profile", &profile, "--", "bash", "-c", &script]).exits(status);
            assert_eq!(outcome.out() == "host service", status == 0, "{outcome}");
        }
    }
}

#[test]
fn the_device_directory_is_minimal() {
    for world in World::each() {
        let outcome = world.run(&["--", "ls", "/dev"]).ok();
        for name in outcome.out().split_whitespace() {
            let known = [
                "console", "fd", "full", "mqueue", "null", "ptmx", "pts", "random", "shm",
                "stderr", "stdin", "stdout", "tty", "urandom", "zero",
            ];
            assert!(known.contains(&name), "/dev/{name}\n{outcome}");
        }
        world
            .run(&[
                "--",
                "sh",
                "-c",
                "echo x >/dev/null; head -c 4 /dev/urandom | wc -c; echo y | tee /dev/shm/z",
            ])
            .ok()
            .prints("4\ny\n");
    }
}

#[test]
fn the_hostname_is_not_the_hosts() {
    let world = World::host();
    let outside = fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    let inside = world.run(&["--", "uname", "-n"]).ok();
    assert_ne!(inside.line(), outside.trim(), "{inside}");
}

#[test]
fn no_core_is_ever_written() {
    for world in World::each() {
        let world = world.with_probe();
        world
            .run(&["--", "sh", "-c", "ulimit -Hc; cat /proc/self/coredump_filter"])
            .ok()
            .prints("0\n00000000\n");
        world.run(&["--", "./probe", "raise", "11"]).exits(128 + 11);
        let names: Vec<_> =
            fs::read_dir(&world.workspace).unwrap().flatten().map(|e| e.file_name()).collect();
        assert_eq!(names, ["probe"], "a core was left");
    }
}

#[test]
fn a_server_and_a_client_meet_on_the_own_loopback() {
    for world in World::each() {
        world.run(&["--", "python3", "-c", LOOPBACK]).ok().prints("hello over loopback\n");
    }
}

const LOOPBACK: &str = r#"
import socket, threading
server = socket.create_server(("127.0.0.1", 0))
def serve():
    peer, _ = server.accept()
    peer.sendall(b"hello over loopback")
    peer.close()
threading.Thread(target=serve).start()
print(socket.create_connection(server.getsockname()).recv(99).decode())
"#;

#[test]
fn without_a_network_nothing_of_the_hosts_is_reachable() {
    for world in World::each() {
        let world = world.with_probe();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        std::thread::spawn(move || {
            for mut peer in listener.incoming().flatten() {
                let _ = peer.write_all(b"host service");
            }
        });
        let script = format!(
            "exec 3<>/dev/tcp/127.0.0.1/{port} && cat <&3; tail -n +2 /proc/net/route | wc -l"
        );
        let inside = world.run(&["--", "bash", "-c", &script]).ok();
        assert_eq!(inside.line(), "0", "{inside}");
        let outside = bare(&world, Bare::OwnProc, ORDINARY, &format!("bash -c '{script}'")).ok();
        assert!(outside.out().starts_with("host service"), "{outside}");
    }
}

/// A host service on an abstract socket: reachable by anyone in the same network namespace.
fn abstract_service(name: &str) {
    let address = SocketAddr::from_abstract_name(name).unwrap();
    let listener = UnixListener::bind_addr(&address).unwrap();
    std::thread::spawn(move || {
        for mut peer in listener.incoming().flatten() {
            let _ = peer.write_all(b"abstract value");
        }
    });
}

#[test]
fn abstract_sockets_of_the_host_are_unreachable_even_on_its_network() {
    for world in World::each() {
        let world = world.with_probe();
        let name = format!("sublet-test-{}-{}", std::process::id(), world.invoker);
        abstract_service(&name);
        let on_host_network =
            world.profile("hostnet", "extends = \"default\"\n[network]\nmode = \"host\"\n");
        for profile in ["default", &on_host_network] {
            let outcome = world.run(&["--profile", profile, "--", "./probe", "abstract", &name]);
            outcome.exits(1).never_says("abstract value");
        }
        bare(&world, Bare::OwnProc, ORDINARY, &format!("./probe abstract {name}"))
            .ok()
            .says("allowed abstract value");
    }
}

#[test]
fn signals_do_not_leave() {
    let world = World::developer().with_probe();
    // The same host user owns both: only the namespace stands between.
    let mut victim = Command::new("sleep");
    world.dress(&mut victim);
    let mut victim = victim.arg("60").spawn().unwrap();
    let script = format!("kill -TERM {0} || echo refused; kill -TERM -1; exit 0", victim.id());
    world.run(&["--", "sh", "-c", &script]).says("refused");
    assert!(victim.try_wait().unwrap().is_none(), "the sleeper outside was killed");
    let control = format!("kill -0 {}", victim.id());
    // In a control with the host's pids the same user may signal: no pid namespace, fresh mounts.
    let mut plain = Command::new("unshare");
    world.dress(&mut plain);
    use std::os::unix::process::CommandExt;
    plain.uid(0).gid(0).args(["--mount", "--propagation", "private", "setpriv"]);
    plain.args(["--reuid", &ORDINARY.to_string(), "--clear-groups", "sh", "-c", &control]);
    finish(plain, b"", None).ok();
    victim.kill().unwrap();
    victim.wait().unwrap();
}

#[test]
#[file_serial]
fn no_keyring_crosses() {
    for world in World::each() {
        let world = world.with_probe();
        let (command, _) = world.prepare(&["--", "sh", "-c", "./probe find-key sublet-probe"]);
        let words: Vec<_> =
            std::iter::once(command.get_program()).chain(command.get_args()).collect();
        let mut holder = Command::new(world.workspace.join("probe"));
        world.dress(&mut holder);
        holder.args(["with-key", "sublet-probe", "key-value"]);
        finish(copy_of(holder, &words), b"", None).exits(1).never_says("key-value");
        let control = "./probe with-key sublet-probe key-value ./probe find-key sublet-probe";
        bare(&world, Bare::OwnProc, ORDINARY, control).ok().says("allowed key-value");
    }
}

#[test]
#[file_serial]
fn nothing_is_typed_into_the_callers_terminal() {
    needs("script", "bsdutils");
    for world in World::each() {
        let world = world.with_probe();
        for flag in ["--tty", ""] {
            let (command, _) = world.prepare(&[]);
            let inner = format!(
                "{} {} {flag} -- ./probe try tty_sti tty_sti_high tty_linux",
                command.get_program().to_string_lossy(),
                command.get_args().map(|a| a.to_string_lossy()).collect::<Vec<_>>().join(" "),
            );
            let inside = answers(&in_terminal(&world, &inner).ok());
            assert_eq!(inside.len(), 3, "{inside:?}");
            for (word, answer) in inside {
                let answer = answer.trim_end();
                assert!(!worked(answer), "{word} with `{flag}`: {answer}");
                if !flag.is_empty() {
                    assert!(["EPERM", "ENOSYS"].contains(&answer), "{word} with a tty: {answer}");
                }
            }
        }
        // The control types into its own terminal, made by script(1).
        let control = bare_command(
            &world,
            Bare::OwnProc,
            ORDINARY,
            "script -qec './probe try tty_sti tty_sti_high' /dev/null",
        );
        let control = answers(&finish(control, b"", None).ok());
        assert!(worked(control["tty_sti"].trim_end()), "{control:?}");
    }
}

/// Runs a command line on a pseudo-terminal of its own, as the world's invoker.
fn in_terminal(world: &World, line: &str) -> support::Outcome {
    let mut script = Command::new("script");
    world.dress(&mut script);
    script.args(["-qec", line, "/dev/null"]);
    finish(script, b"", None)
}

#[test]
fn a_tty_session_is_a_terminal_with_the_callers_size() {
    needs("script", "bsdutils");
    for world in World::each() {
        let (command, _) = world.prepare(&[]);
        let line = format!(
            "stty rows 33 cols 77; {} {} --tty -- sh -c 'test -t 0 && test -t 1 && test -t 2 && tty && stty size'",
            command.get_program().to_string_lossy(),
            command.get_args().map(|a| a.to_string_lossy()).collect::<Vec<_>>().join(" "),
        );
        let outcome = in_terminal(&world, &line).ok();
        assert!(outcome.out().contains("/dev/pts/"), "{outcome}");
        assert!(outcome.out().contains("33 77"), "{outcome}");
    }
}

#[test]
fn without_a_tty_there_is_no_terminal() {
    let world = World::host();
    world
        .run(&["--", "sh", "-c", "test -t 0 || test -t 1 || echo none; tty"])
        .says("none\nnot a tty");
}

#[test]
fn stdin_stdout_and_stderr_pass_exactly() {
    for world in World::each() {
        let bytes: Vec<u8> =
            (0..300_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        let outcome = world.run_with(&["--", "sh", "-c", "tee /dev/stderr"], &bytes).ok();
        assert!(outcome.stdout == bytes, "stdout differs: {} bytes", outcome.stdout.len());
        assert!(outcome.stderr == bytes, "stderr differs: {} bytes", outcome.stderr.len());
    }
}

#[test]
fn files_made_inside_belong_to_the_workspaces_owner() {
    for world in World::each() {
        let owner = fs::metadata(&world.workspace).unwrap().uid();
        world
            .run(&["--", "sh", "-c", "id -u; touch made; mkdir dir; stat -c %u made dir ."])
            .ok()
            .prints(&format!("{owner}\n{owner}\n{owner}\n{owner}\n"));
        for name in ["made", "dir"] {
            let meta = fs::metadata(world.workspace.join(name)).unwrap();
            assert_eq!(meta.uid(), owner, "{name} on the host");
        }
    }
}

#[test]
fn each_exec_has_a_host_uid_of_its_own() {
    let world = World::host();
    let mut uids = Vec::new();
    let mut running: Vec<_> =
        (0..2).map(|_| world.spawn(&["--", "sh", "-c", "echo up; sleep 60"])).collect();
    for exec in &mut running {
        assert_eq!(exec.read_line(), "up");
        let command = host::Parts::of(exec.pid()).command;
        let status = fs::read_to_string(format!("/proc/{}/status", command.pid)).unwrap();
        let uid = status.lines().find_map(|l| l.strip_prefix("Uid:\t")).unwrap();
        uids.push(uid.split('\t').next().unwrap().parse::<u32>().unwrap());
    }
    assert_ne!(uids[0], uids[1]);
    for uid in uids {
        assert!(uid != 0 && uid != ORDINARY, "the exec runs as the host's {uid}");
    }
}

#[test]
fn limits_bind() {
    for world in World::each() {
        let tight = world.profile(
            "tight",
            "extends = \"default\"\n[limits]\nopen_files = 64\nprocesses = 20\nmemory = \"128M\"\n",
        );
        world.sh(&tight, "ulimit -n").ok().prints("64\n");
        let forks =
            "n=0; while [ $n -lt 60 ]; do sleep 5 & n=$((n+1)); done 2>/dev/null; jobs | wc -l";
        let bomb = world.run(&["--profile", &tight, "--timeout", "20s", "--", "bash", "-c", forks]);
        assert!(
            bomb.line().parse::<u32>().is_ok_and(|n| n < 25) || bomb.status != Some(0),
            "{bomb}"
        );
        let hog = "b = bytearray(512 << 20); print(len(b))";
        let outcome = world.run(&["--profile", &tight, "--", "python3", "-c", hog]);
        assert_ne!(outcome.status, Some(0), "512 MiB were had under a limit of 128M\n{outcome}");
        // The allow twin: the same within the limit.
        world.run(&["--profile", &tight, "--", "python3", "-c", "b = bytearray(16 << 20)"]).ok();
    }
}

#[test]
fn orphans_are_reaped_and_die_with_the_command() {
    for world in World::each() {
        let world = world.with_probe();
        let mut exec =
            world.spawn(&["--", "sh", "-c", "./probe daemonize; (sleep 0.01 &); sleep 0.2; cat /proc/[0-9]*/stat | grep -c ' Z '; sleep 0.2; echo; exit 7"]);
        assert_eq!(exec.read_line(), "ready");
        let family = host::family(exec.pid());
        assert_eq!(exec.read_line(), "0", "zombies are left to init");
        exec.finish().exits(7);
        // The launcher itself goes when it sees that the broker has.
        host::eventually("all of it has ended", || family.iter().all(|p| !p.is_alive()));
    }
}

#[test]
fn the_workspace_can_be_read_only_or_absent() {
    for world in World::each() {
        world.file("there", "content", 0o644);
        for (mode, script, expected) in [
            ("ro", "cat there; touch x 2>/dev/null || echo refused", "contentrefused\n"),
            ("none", "cat there 2>/dev/null || echo absent", "absent\n"),
            ("rw", "cat there; touch x && echo written", "contentwritten\n"),
        ] {
            let profile = world.profile(
                mode,
                &format!("extends = \"default\"\n[filesystem]\nworkspace = \"{mode}\"\n"),
            );
            world.sh(&profile, script).ok().prints(expected);
        }
    }
}

#[test]
fn the_network_flag_narrows_and_never_widens() {
    let world = World::host();
    let hostnet = world.profile("hostnet", "extends = \"default\"\n[network]\nmode = \"host\"\n");
    let interfaces = "ls /sys/class/net 2>/dev/null || tail -n +3 /proc/net/dev | wc -l";
    let wide = world.run(&["--profile", &hostnet, "--", "sh", "-c", interfaces]).ok();
    let narrow =
        world.run(&["--profile", &hostnet, "--network", "none", "--", "sh", "-c", interfaces]).ok();
    let _ = (wide, narrow);
    world
        .run(&[
            "--profile",
            &hostnet,
            "--network",
            "none",
            "--",
            "sh",
            "-c",
            "wc -l </proc/net/route",
        ])
        .ok()
        .prints("1\n");
    world.run(&["--network", "host", "--", "true"]).fails_naming(&["network"]);
}

#[test]
fn the_report_says_what_was_enforced_by_what() {
    for world in World::each() {
        let outcome = world.run(&["--", "sh", "-c", "exit 3"]).exits(3);
        let report = outcome.report();
        assert_eq!(report["exit_status"], 3);
        assert_eq!(report["timed_out"], false);
        assert!(report["run_id"].as_str().is_some_and(|id| id.starts_with("run_")), "{outcome}");
        assert!(report["exec_id"].as_str().is_some_and(|id| id.starts_with("exe_")), "{outcome}");
        let enforced = report["enforced"].as_object().unwrap();
        assert!(enforced.len() >= 5, "{outcome}");
        for (effect, entry) in enforced {
            let status = entry["status"].as_str().unwrap_or("");
            assert!(["full", "partial", "none"].contains(&status), "{effect}: {entry}");
            if status == "full" {
                assert!(!entry["by"].as_array().unwrap().is_empty(), "{effect} by nothing");
            } else {
                assert!(!entry["missing"].as_array().unwrap().is_empty(), "{effect}: {entry}");
            }
        }
        for stage in ["launch", "run"] {
            assert!(report["timings_us"][stage].is_u64(), "no timing of {stage}\n{outcome}");
        }
    }
}

#[test]
fn environment_starts_empty_but_for_the_profiles() {
    for world in World::each() {
        let mut command =
            world.prepare(&["--env", "GIVEN=1", "--pass-env", "PASSED", "--", "env"]).0;
        command.env("PASSED", "2").env("NOT_PASSED", "3").env("SSH_AUTH_SOCK", "/tmp/agent");
        let outcome = finish(command, b"", None).ok().says("GIVEN=1\n").says("PASSED=2\n");
        let names: Vec<String> = outcome
            .out()
            .lines()
            .filter_map(|l| l.split_once('=').map(|(n, _)| n.to_owned()))
            .collect();
        for name in ["NOT_PASSED", "SSH_AUTH_SOCK", "RUST_BACKTRACE"] {
            assert!(!names.iter().any(|n| n == name), "{name} came in\n{outcome}");
        }
    }
}

#[test]
fn an_env_file_is_read_and_later_flags_win() {
    let world = World::host();
    let file = world.path("etc/env");
    fs::write(&file, "# comment\nA=from file\nB=two\n\n").unwrap();
    world
        .run(&[
            "--env-file",
            file.to_str().unwrap(),
            "--env",
            "B=flag",
            "--",
            "sh",
            "-c",
            "echo $A,$B",
        ])
        .ok()
        .prints("from file,flag\n");
}

#[test]
fn explain_runs_nothing() {
    for world in World::each() {
        let outcome = world.run(&["--explain", "--", "touch", "ran"]).ok();
        assert!(!world.workspace.join("ran").exists());
        let text = outcome.out().to_lowercase();
        for word in ["landlock", "seccomp", "mount"] {
            assert!(text.contains(word), "--explain does not speak of {word}\n{outcome}");
        }
    }
}

#[test]
fn doctor_names_what_is_found_means_and_mends() {
    for world in World::each() {
        let outcome = world.call(&["--json", "doctor"]);
        let checks = outcome.json()["checks"].as_array().unwrap().clone();
        assert!(checks.len() >= 8, "{outcome}");
        for check in checks {
            let status = check["status"].as_str().unwrap();
            assert!(["ok", "warn", "fail"].contains(&status), "{check}");
            assert!(!check["name"].as_str().unwrap().is_empty());
            if status != "ok" {
                assert!(check["mend"].as_str().is_some_and(|m| !m.is_empty()), "{check}");
            }
        }
    }
}

/// A small root of its own: a static busybox, and nothing of the host.
fn image(world: &World) -> std::path::PathBuf {
    needs("busybox", "busybox-static");
    let image = world.path("image");
    for dir in ["bin", "etc", "tmp", "usr", "run"] {
        fs::create_dir_all(image.join(dir)).unwrap();
    }
    let busybox = support::which("busybox").unwrap();
    fs::copy(busybox, image.join("bin/busybox")).unwrap();
    std::os::unix::fs::symlink("busybox", image.join("bin/sh")).unwrap();
    fs::write(image.join("etc/image-release"), "of the image\n").unwrap();
    image
}

#[test]
fn an_image_can_be_the_root() {
    for world in World::each() {
        let image = image(&world);
        let profile = world.profile(
            "image",
            &format!("extends = \"default\"\n[filesystem]\nread_only = []\nroot = {image:?}\n"),
        );
        world
            .sh(&profile, "busybox cat /etc/image-release; busybox ls /usr; busybox touch here /etc/x 2>/dev/null || busybox ls")
            .ok()
            .prints("of the image\nhere\n");
        assert!(!image.join("etc/x").exists());
    }
}

/// The family of runc's CVE-2025-31133, 52565 and 52881: what is mounted or masked is chosen by links
/// that the image brought along.
#[test]
#[file_serial]
fn links_of_an_image_do_not_choose_what_is_mounted_where() {
    for world in World::each() {
        let image = image(&world);
        let outside = world.path("outside");
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("marker"), "of the host\n").unwrap();
        for name in ["proc", "dev", "sys"] {
            std::os::unix::fs::symlink(&outside, image.join(name)).unwrap();
        }
        let before = host::Traces::now();
        let profile = world.profile(
            "image",
            &format!("extends = \"default\"\n[filesystem]\nread_only = []\nroot = {image:?}\n"),
        );
        let script = "busybox cat /proc/marker /dev/marker /dev/null; echo x >/dev/null; \
             echo core >/proc/sys/kernel/core_pattern; busybox ls /proc/1 >/dev/null && echo proc";
        let outcome = world.sh(&profile, script);
        assert!(!outcome.out().contains("of the host"), "{outcome}");
        if outcome.status == Some(0) {
            assert!(outcome.out().contains("proc"), "{outcome}");
        }
        assert_eq!(host::Traces::now(), before);
        let names: Vec<_> =
            fs::read_dir(&outside).unwrap().flatten().map(|e| e.file_name()).collect();
        assert_eq!(names, ["marker"], "the host's directory was written to");
    }
}

#[test]
fn kernel_settings_cannot_be_written() {
    for world in World::each() {
        let world = world.with_probe();
        let script = "for f in /proc/sys/kernel/core_pattern /proc/sys/kernel/hostname /proc/sysrq-trigger \
             /proc/sys/vm/drop_caches /proc/sys/fs/binfmt_misc/register /sys/kernel/mm/transparent_hugepage/enabled; \
             do (echo 0 >$f) 2>/dev/null && echo wrote $f; done; \
             cat /proc/kcore /proc/kmsg 2>/dev/null | head -c 1 | wc -c";
        world.run(&["--", "sh", "-c", script]).ok().prints("0\n");
    }
}

/// Whoever owns a directory on the way to what a profile shows must not lead root to what only root may read.
#[test]
fn a_strangers_link_on_the_way_shows_nothing() {
    let world = World::host();
    let (shared, hidden) = (world.path("shared"), world.path("hidden"));
    fs::create_dir_all(shared.join("project/lib")).unwrap();
    fs::create_dir_all(hidden.join("lib")).unwrap();
    fs::write(shared.join("project/lib/text"), "shown\n").unwrap();
    fs::write(hidden.join("lib/text"), "root's alone\n").unwrap();
    fs::set_permissions(&hidden, fs::Permissions::from_mode(0o700)).unwrap();
    std::os::unix::fs::chown(&shared, Some(ORDINARY), None).unwrap();
    let text = shared.join("project/lib/text").display().to_string();
    let list = shared.join("project/lib").display().to_string();
    let profile = world.profile(
        "shows",
        &format!("extends = \"default\"\n[filesystem]\nread_only = [\"/usr\", \"/bin\", \"/lib\", \"/lib64\", {list:?}]\n"),
    );
    let show = || world.run(&["--profile", &profile, "--", "cat", &text]);
    show().ok().prints("shown\n");
    fs::rename(shared.join("project"), shared.join("moved")).unwrap();
    std::os::unix::fs::symlink(&hidden, shared.join("project")).unwrap();
    // The control: where the link leads root.
    assert_eq!(fs::read_to_string(&text).unwrap(), "root's alone\n");
    show().fails_naming(&["a link that a stranger may have made", &shared.display().to_string()]);
    // One that only root could make is followed.
    std::os::unix::fs::chown(&shared, Some(0), None).unwrap();
    show().ok().prints("root's alone\n");
}

/// Whoever has the host root's uid may change the kernel's settings, without one capability and in any user namespace.
#[test]
fn the_hosts_root_is_never_an_execs_uid() {
    let world = World::host();
    // Opens, and writes nothing.
    let opens = "(exec 3>>/proc/sys/kernel/core_pattern) && echo could";
    let in_bare = |world: &World, script: &str| bare(world, Bare::OwnProc, 0, script);
    in_bare(&world, &format!("unshare --user --map-user=1000 sh -c {}", quoted(opens)))
        .ok()
        .prints("could\n");
    let line = world.shell_line(&["--", "sh", "-c", opens]);
    for lacking in [
        "setpriv --bounding-set -sys_admin --inh-caps -sys_admin",
        "setpriv --bounding-set -kill --inh-caps -kill",
        "setpriv --bounding-set -all --inh-caps -all",
        "unshare --user --map-root-user",
        "unshare --user --map-user=1000",
    ] {
        let outcome = in_bare(&world, &format!("{lacking} {line}")).exits(125);
        assert!(outcome.err().contains("host's root"), "{lacking}: {outcome}");
        assert_eq!(outcome.out(), "", "{lacking}");
    }
    // Who is root in a namespace alone.
    let world = World::developer();
    let line = world.shell_line(&["--", "sh", "-c", &format!("{opens}; echo ran")]);
    let program = quoted(binary().to_str().unwrap());
    let line = line.replacen(&program, &format!("unshare --user --map-root-user {program}"), 1);
    in_bare(&world, &line).ok().prints("ran\n");
}

/// Guards the controls themselves: the bare namespace is one, and leaves the host as it was.
#[test]
#[file_serial]
fn controls_stay_inside_their_namespace() {
    let world = World::host().with_probe();
    let before = host::Traces::now();
    let name = fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    bare(&world, Bare::OwnProc, 0, "./probe try all; mount -t tmpfs none /tmp").ok();
    assert_eq!(host::Traces::now(), before);
    assert_eq!(fs::read_to_string("/proc/sys/kernel/hostname").unwrap(), name);
    let mut rest = String::new();
    fs::File::open("/proc/self/mountinfo").unwrap().read_to_string(&mut rest).unwrap();
    assert!(!rest.contains(world.workspace.to_str().unwrap()));
}
