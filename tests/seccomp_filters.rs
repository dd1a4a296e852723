//! The built-in filters under real calls: each hostile one is made with and without the filter, and
//! ordinary programs run under it.
//!
//! All calls are made by a forked child in mount, pid, IPC, UTS and network namespaces of its own, with
//! private propagation, on a tmpfs of its own. What could act beyond those has arguments with which it
//! cannot act; its control then shows another error than the filter's.

use std::ffi::{CStr, CString, c_long};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::process::Command;

use sublet::sandbox::seccomp::{Filter, builtin, compile};
use sublet::sys::seccomp::{install, see_it_refused};

const ABSENT: i64 = 0x7fff_fff0; // a pid that nothing has
const NOWHERE: i64 = 1; // an address that nothing is mapped at
const NO_FD: i64 = -1;
const HERE: i64 = libc::AT_FDCWD as i64;
const TTY: i64 = 60;
const FILE: i64 = 62;
const GARBAGE: i64 = 0x0bad_cafe_0000_0000;
const X32: c_long = 0x4000_0000;

const CREATE: i64 = (libc::O_CREAT | libc::O_RDWR) as i64;
const TMPFILE: i64 = (libc::O_TMPFILE | libc::O_RDWR) as i64;

const EPERM: i32 = libc::EPERM;
const ENOSYS: i32 = libc::ENOSYS;

#[derive(Clone, Copy, PartialEq)]
enum Expect {
    /// This error, and without the filter something else.
    Refused(i32),
    /// The same, but only root's control gets past the kernel's own check.
    RefusedToRoot(i32),
    /// Succeeds, with the filter as without.
    Works,
    /// Reaches the kernel: the same error with the filter as without.
    Reaches(i32),
}

struct Probe {
    what: &'static str,
    call: c_long,
    args: [i64; 6],
    expect: Expect,
}

fn probe<const N: usize>(
    expect: Expect,
    what: &'static str,
    call: c_long,
    given: [i64; N],
) -> Probe {
    let mut args = [0; 6];
    args[..N].copy_from_slice(&given);
    Probe { what, call, args, expect }
}

fn refused<const N: usize>(what: &'static str, call: c_long, args: [i64; N]) -> Probe {
    probe(Expect::Refused(EPERM), what, call, args)
}

fn root<const N: usize>(what: &'static str, call: c_long, args: [i64; N]) -> Probe {
    probe(Expect::RefusedToRoot(EPERM), what, call, args)
}

fn works<const N: usize>(what: &'static str, call: c_long, args: [i64; N]) -> Probe {
    probe(Expect::Works, what, call, args)
}

fn at(path: &'static CStr) -> i64 {
    path.as_ptr() as i64
}

fn set_id_bits() -> Vec<Probe> {
    use libc::*;
    let target = at(c"target");
    vec![
        refused("chmod u+s", SYS_chmod, [target, 0o4755]),
        refused("chmod g+s", SYS_chmod, [target, 0o2755]),
        refused("chmod ug+s with garbage above", SYS_chmod, [target, GARBAGE | 0o6755]),
        works("chmod", SYS_chmod, [target, 0o755]),
        works("chmod sticky", SYS_chmod, [target, 0o1777]),
        refused("fchmod u+s", SYS_fchmod, [FILE, 0o4755]),
        refused("fchmod g+s", SYS_fchmod, [FILE, 0o2755]),
        works("fchmod", SYS_fchmod, [FILE, 0o700]),
        refused("fchmodat u+s", SYS_fchmodat, [HERE, target, 0o4755]),
        refused("fchmodat g+s", SYS_fchmodat, [HERE, target, 0o2755]),
        works("fchmodat", SYS_fchmodat, [HERE, target, 0o755]),
        refused("mkdir g+s", SYS_mkdir, [at(c"d1"), 0o2755]),
        works("mkdir", SYS_mkdir, [at(c"d2"), 0o1777]),
        refused("mkdirat g+s", SYS_mkdirat, [HERE, at(c"d3"), 0o2755]),
        works("mkdirat", SYS_mkdirat, [HERE, at(c"d4"), 0o755]),
        refused("mknodat file u+s", SYS_mknodat, [HERE, at(c"m4"), 0o104755, 0]),
        refused("mknodat file g+s", SYS_mknodat, [HERE, at(c"m5"), 0o2755, 0]),
        works("mknodat FIFO", SYS_mknodat, [HERE, at(c"m6"), 0o010644, 0]),
        refused("open O_CREAT u+s", SYS_open, [at(c"o1"), CREATE, 0o4755]),
        refused("open O_CREAT g+s", SYS_open, [at(c"o2"), CREATE, 0o2755]),
        works("open O_CREAT", SYS_open, [at(c"o3"), CREATE, 0o644]),
        refused("open O_TMPFILE u+s", SYS_open, [at(c"."), TMPFILE, 0o4755]),
        refused("open O_TMPFILE g+s", SYS_open, [at(c"."), TMPFILE, 0o2755]),
        works("open O_TMPFILE", SYS_open, [at(c"."), TMPFILE, 0o600]),
        works("open, any mode", SYS_open, [target, 0, 0o7777]),
        refused("openat O_CREAT u+s", SYS_openat, [HERE, at(c"o4"), CREATE, 0o4755]),
        refused("openat O_CREAT g+s", SYS_openat, [HERE, at(c"o5"), CREATE, GARBAGE | 0o2755]),
        refused("openat dirty flags", SYS_openat, [HERE, at(c"o6"), GARBAGE | CREATE, 0o4755]),
        works("openat O_CREAT", SYS_openat, [HERE, at(c"o7"), CREATE, 0o644]),
        refused("openat O_TMPFILE u+s", SYS_openat, [HERE, at(c"."), TMPFILE, 0o4755]),
        refused("openat O_TMPFILE g+s", SYS_openat, [HERE, at(c"."), TMPFILE, 0o2755]),
        works("openat O_TMPFILE", SYS_openat, [HERE, at(c"."), TMPFILE, 0o600]),
        works("openat, any mode", SYS_openat, [HERE, target, 0, 0o7777]),
        probe(Expect::Refused(ENOSYS), "openat2", SYS_openat2, [HERE, target, 0, 0]),
        refused("a whiteout", SYS_mknodat, [HERE, at(c"m7"), 0o020644, 0]),
        root("a disk", SYS_mknodat, [HERE, at(c"m8"), 0o060644, 0x700]),
    ]
}

/// Calls that strict answers with ENOSYS, since it allows them in no form.
fn set_id_bits_beyond_strict() -> Vec<Probe> {
    use libc::*;
    const SYS_FCHMODAT2: c_long = 452;
    let target = at(c"target");
    // `struct mq_attr`: queues of the default size would use up the user's share of them.
    static SMALL: [c_long; 8] = [0, 1, 1, 0, 0, 0, 0, 0];
    let small = SMALL.as_ptr() as i64;
    vec![
        refused("fchmodat2 u+s", SYS_FCHMODAT2, [HERE, target, 0o4755, 0]),
        refused("fchmodat2 g+s", SYS_FCHMODAT2, [HERE, target, 0o2755, 0]),
        works("fchmodat2", SYS_FCHMODAT2, [HERE, target, 0o755, 0]),
        refused("creat u+s", SYS_creat, [at(c"c1"), 0o4755]),
        refused("creat g+s", SYS_creat, [at(c"c2"), 0o2755]),
        works("creat", SYS_creat, [at(c"c3"), 0o644]),
        refused("mknod file u+s", SYS_mknod, [at(c"m1"), 0o104755, 0]),
        refused("mknod file g+s", SYS_mknod, [at(c"m2"), 0o102755, 0]),
        refused("mknod whiteout", SYS_mknod, [at(c"m9"), GARBAGE | 0o020644, 0]),
        works("mknod file", SYS_mknod, [at(c"m3"), 0o100644, 0]),
        refused("mq_open u+s", SYS_mq_open, [at(c"q1"), CREATE, 0o4600, small]),
        refused("mq_open g+s", SYS_mq_open, [at(c"q2"), CREATE, 0o2600, small]),
        works("mq_open", SYS_mq_open, [at(c"q3"), CREATE, 0o600, small]),
    ]
}

fn walls() -> Vec<Probe> {
    use libc::*;
    let n = NOWHERE;
    vec![
        // Real ones: in namespaces of the probe's own they would work.
        refused("unshare UTS", SYS_unshare, [i64::from(CLONE_NEWUTS)]),
        refused("unshare mount", SYS_unshare, [i64::from(CLONE_NEWNS)]),
        refused("clone into new UTS", SYS_clone, [CLONE_NEWUTS as i64 | 17]),
        refused("clone into new user", SYS_clone, [CLONE_NEWUSER as i64 | 17]),
        refused("clone into new mount", SYS_clone, [CLONE_NEWNS as i64 | 17]),
        refused("clone into new pid", SYS_clone, [CLONE_NEWPID as i64 | 17]),
        refused("clone into new IPC", SYS_clone, [CLONE_NEWIPC as i64 | 17]),
        refused("clone into new net", SYS_clone, [CLONE_NEWNET as i64 | 17]),
        refused("clone into new cgroup", SYS_clone, [CLONE_NEWCGROUP as i64 | 17]),
        refused("clone, dirty upper half", SYS_clone, [GARBAGE | CLONE_NEWUTS as i64 | 17]),
        works("clone", SYS_clone, [17]),
        refused("setns", SYS_setns, [NO_FD, 0]),
        probe(Expect::Refused(ENOSYS), "clone3", SYS_clone3, [0, 0]),
        refused("mount", SYS_mount, [at(c"t"), at(c"mnt"), at(c"tmpfs"), 0, 0]),
        refused("umount2", SYS_umount2, [at(c"mnt"), i64::from(MNT_DETACH)]),
        refused("pivot_root", SYS_pivot_root, [n, n]),
        refused("chroot", SYS_chroot, [at(c".")]),
        refused("open_tree", SYS_open_tree, [HERE, at(c"."), 1]),
        refused("move_mount", SYS_move_mount, [NO_FD, n, NO_FD, n, 0]),
        refused("fsopen", SYS_fsopen, [at(c"tmpfs"), 0]),
        refused("fsconfig", SYS_fsconfig, [NO_FD, 99, 0, 0, 0]),
        refused("fsmount", SYS_fsmount, [NO_FD, 0, 0]),
        refused("fspick", SYS_fspick, [NO_FD, n, 0]),
        refused("mount_setattr", SYS_mount_setattr, [NO_FD, n, 0, n, 32]),
        refused("open_by_handle_at", SYS_open_by_handle_at, [NO_FD, n, 0]),
        refused("name_to_handle_at", SYS_name_to_handle_at, [NO_FD, n, n, n, 0]),
        refused("ptrace", SYS_ptrace, [i64::from(PTRACE_ATTACH), ABSENT]),
        refused("process_vm_readv", SYS_process_vm_readv, [ABSENT, 0, 0, 0, 0, 0]),
        refused("process_vm_writev", SYS_process_vm_writev, [ABSENT, 0, 0, 0, 0, 0]),
        refused("process_madvise", SYS_process_madvise, [NO_FD, 0, 0, 0, 0]),
        refused("process_mrelease", SYS_process_mrelease, [NO_FD, 0]),
        refused("pidfd_getfd", SYS_pidfd_getfd, [NO_FD, 0, 0]),
        refused("kcmp", SYS_kcmp, [ABSENT, ABSENT, 0, 0, 0]),
        root("userfaultfd", SYS_userfaultfd, [0x7fff_0000]),
        root("io_uring_setup", SYS_io_uring_setup, [0, 0]),
        refused("io_uring_enter", SYS_io_uring_enter, [NO_FD, 0, 0, 0, 0, 0]),
        refused("io_uring_register", SYS_io_uring_register, [NO_FD, 0, 0, 0]),
        root("bpf", SYS_bpf, [999, 0, 0]),
        root("perf_event_open", SYS_perf_event_open, [n, 0, -1, NO_FD, 0]),
        refused("vmsplice", SYS_vmsplice, [NO_FD, 0, 0, 0]),
        root("fanotify_init", SYS_fanotify_init, [0x7fff_0000, 0]),
        refused("fanotify_mark", SYS_fanotify_mark, [NO_FD, 0, 0, NO_FD, 0]),
        refused("modify_ldt", SYS_modify_ldt, [99, 0, 0]),
        refused("add_key", SYS_add_key, [n, n, n, 0, 0]),
        refused("request_key", SYS_request_key, [n, n, n, 0]),
        refused("keyctl", SYS_keyctl, [9999, 0, 0, 0, 0]),
        root("TIOCSTI", SYS_ioctl, [TTY, 0x5412, at(c"x")]),
        root("TIOCSTI, dirty upper half", SYS_ioctl, [TTY, GARBAGE | 0x5412, at(c"x")]),
        refused("TIOCSTI elsewhere", SYS_ioctl, [FILE, 0x5412, at(c"x")]),
        refused("TIOCLINUX", SYS_ioctl, [FILE, 0x541c, n]),
        refused("TIOCLINUX, dirty upper half", SYS_ioctl, [FILE, GARBAGE | 0x541c, n]),
        refused("TIOCSETD", SYS_ioctl, [TTY, 0x5423, n]),
        refused("TIOCCONS", SYS_ioctl, [FILE, 0x541d, n]),
        works("TCGETS", SYS_ioctl, [TTY, 0x5401, at_scratch()]),
        probe(Expect::Reaches(ENOTTY), "TCGETS on a file", SYS_ioctl, [FILE, 0x5401, n]),
        root("init_module", SYS_init_module, [0, 0, n]),
        root("finit_module", SYS_finit_module, [NO_FD, n, 0]),
        root("delete_module", SYS_delete_module, [n, 0]),
        root("kexec_load", SYS_kexec_load, [0, 0, 0, 0x7fff]),
        root("kexec_file_load", SYS_kexec_file_load, [NO_FD, NO_FD, 0, 0, 0x7fff]),
        refused("reboot", SYS_reboot, [0, 0, 0, 0]),
        root("swapon", SYS_swapon, [n, 0]),
        root("swapoff", SYS_swapoff, [n]),
        root("acct", SYS_acct, [n]),
        refused("quotactl", SYS_quotactl, [-1, n, 0, 0]),
        refused("quotactl_fd", SYS_quotactl_fd, [NO_FD, -1, 0, 0]),
        root("iopl", SYS_iopl, [99]),
        root("ioperm", SYS_ioperm, [-1, 1, 1]),
        root("syslog", SYS_syslog, [99, 0, 0]),
        root("vhangup", SYS_vhangup, []),
        root("settimeofday", SYS_settimeofday, [0, 0]),
        refused("clock_settime", SYS_clock_settime, [99, n]),
        refused("clock_adjtime", SYS_clock_adjtime, [99, n]),
        refused("adjtimex", SYS_adjtimex, [n]),
        refused("sethostname", SYS_sethostname, [n, -1]),
        refused("setdomainname", SYS_setdomainname, [n, -1]),
        refused("mbind", SYS_mbind, [n, 1, 99, 0, 0, 0]),
        refused("set_mempolicy", SYS_set_mempolicy, [99, 0, 0]),
        refused("get_mempolicy", SYS_get_mempolicy, [0, 0, 0, 0, 99]),
        refused("migrate_pages", SYS_migrate_pages, [ABSENT, 0, 0, 0]),
        refused("move_pages", SYS_move_pages, [ABSENT, 0, 0, 0, 0, 99]),
    ]
}

/// What default and build narrow and strict does not have at all, or narrows further.
fn walls_beyond_strict() -> Vec<Probe> {
    use libc::*;
    let family = |what, family, kind| {
        probe(Expect::Refused(EAFNOSUPPORT), what, SYS_socket, [i64::from(family), kind, 0])
    };
    let route = i64::from(NETLINK_ROUTE);
    let netlink = i64::from(AF_NETLINK);
    let (inet, inet6) = (i64::from(AF_INET), i64::from(AF_INET6));
    vec![
        refused("READ_IMPLIES_EXEC", SYS_personality, [0x0040_0000]),
        works("personality, asked", SYS_personality, [0xffff_ffff]),
        works("setarch's", SYS_personality, [8]),
        works("back again", SYS_personality, [0]),
        // AF_ALG is not in every kernel; the table of gaps has it.
        family("AF_VSOCK", AF_VSOCK, 1),
        family("AF_PACKET", AF_PACKET, 2),
        family("AF_PACKET raw", AF_PACKET, 3),
        refused("raw IPv4", SYS_socket, [inet, 3, 255]),
        refused("raw ICMP with flags", SYS_socket, [inet, 3 | 0x80800, 1]),
        refused("raw IPv6", SYS_socket, [inet6, 3, 58]),
        refused("raw, dirty upper half", SYS_socket, [GARBAGE | inet, GARBAGE | 3, 255]),
        refused("SOCK_PACKET", SYS_socket, [inet, 10, 0x300]),
        probe(Expect::Refused(EPROTONOSUPPORT), "netlink uevents", SYS_socket, [netlink, 3, 15]),
        probe(Expect::Refused(EPROTONOSUPPORT), "netlink sock_diag", SYS_socket, [netlink, 2, 4]),
        works("netlink route", SYS_socket, [netlink, 3 | 0x80000, route]),
        works("TCP", SYS_socket, [inet, 1 | 0x80800, 0]),
        works("TCP by number", SYS_socket, [inet6, 1, 6]),
        works("UDP", SYS_socket, [inet, 2, 17]),
        works("Unix", SYS_socket, [i64::from(AF_UNIX), 1, 0]),
        works("Unix packets", SYS_socket, [i64::from(AF_UNIX), 5, 0]),
        works("seccomp, asked", SYS_seccomp, [2, 0, at_scratch()]),
        works("landlock's version", SYS_landlock_create_ruleset, [0, 0, 1]),
        works("shmget", SYS_shmget, [0, 4096, 0o600]),
        works("memfd_create", SYS_memfd_create, [at(c"m"), 0]),
    ]
}

/// Room for what a call writes; the value is never looked at.
fn at_scratch() -> i64 {
    static mut SCRATCH: [u64; 64] = [0xffff_ffff_7fff_0000; 64];
    (&raw mut SCRATCH) as i64
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum End {
    Returned(i64),
    Failed(i32),
    Killed(i32),
}

/// Makes the calls in one child in namespaces of its own.
fn attempt_all(filter: Option<&Filter>, probes: &[Probe]) -> Vec<End> {
    let results = in_a_box(filter, probes.len(), |i| {
        let Probe { call, args: [a, b, c, d, e, f], .. } = probes[i];
        // SAFETY: the tables above hold addresses of static strings, of scratch room, or none at all;
        // a call that makes a copy of this process has the copy leave below.
        let result = unsafe { libc::syscall(call, a, b, c, d, e, f) };
        // SAFETY: reads errno, getpid(2) and _exit(2) have no conditions.
        unsafe {
            let failed = *libc::__errno_location();
            let copies = [libc::SYS_clone, libc::SYS_clone3, libc::SYS_fork, libc::SYS_vfork];
            if result == 0 && copies.contains(&call) {
                libc::_exit(0);
            }
            if result < 0 { End::Failed(failed) } else { End::Returned(result) }
        }
    });
    assert_eq!(results.len(), probes.len(), "the child died on the way: {results:?}");
    results
}

/// Runs `make(0..count)` under `filter`; what ends the child early ends the list, as [`End::Killed`].
fn in_a_box(filter: Option<&Filter>, count: usize, make: impl Fn(usize) -> End) -> Vec<End> {
    let dir = tempfile::tempdir().unwrap();
    let dir = CString::new(dir.path().as_os_str().as_bytes()).unwrap();
    let is_root = rustix::process::geteuid().is_root();
    let (ids, groups) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    let uid_map = CString::new(format!("0 {ids} 1")).unwrap();
    let gid_map = CString::new(format!("0 {groups} 1")).unwrap();
    let (read, write) = rustix::pipe::pipe().unwrap();
    // SAFETY: the child makes raw calls only, allocates nothing and leaves by _exit, so that locks that
    // another thread of this process held at the fork do not matter.
    let child = unsafe { libc::fork() };
    assert!(child >= 0);
    if child == 0 {
        // SAFETY: as above. Every pointer is to a C string made before the fork.
        unsafe {
            let spaces = libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWIPC;
            let spaces = spaces | libc::CLONE_NEWUTS | libc::CLONE_NEWNET;
            if is_root {
                need(libc::unshare(spaces));
            } else {
                need(libc::unshare(spaces | libc::CLONE_NEWUSER));
                put(c"/proc/self/setgroups", c"deny");
                put(c"/proc/self/uid_map", &uid_map);
                put(c"/proc/self/gid_map", &gid_map);
            }
            let none = std::ptr::null();
            let private = libc::MS_REC | libc::MS_PRIVATE;
            need(libc::mount(none, c"/".as_ptr(), none, private, none.cast()));
            let tmpfs = c"tmpfs".as_ptr();
            need(libc::mount(tmpfs, dir.as_ptr(), tmpfs, 0, none.cast()));
            need(libc::chdir(dir.as_ptr()));
            need(libc::mkdir(c"mnt".as_ptr(), 0o755));
            need(libc::dup2(
                libc::open(c"target".as_ptr(), libc::O_CREAT | libc::O_RDWR, 0o644),
                FILE as i32,
            ));
            terminal();
            let probing = libc::fork();
            need(probing);
            if probing == 0 {
                need(libc::setsid());
                libc::umask(0);
                need(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL));
                need(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
                if let Some(filter) = filter
                    && install(filter).is_err()
                {
                    libc::_exit(98);
                }
                for i in 0..count {
                    send(&write, make(i));
                }
                libc::_exit(0);
            }
            let mut status = 0;
            libc::waitpid(probing, &mut status, 0);
            if libc::WIFSIGNALED(status) {
                send(&write, End::Killed(libc::WTERMSIG(status)));
            }
            libc::_exit(libc::WEXITSTATUS(status));
        }
    }
    drop(write);
    let mut bytes = Vec::new();
    io::Read::read_to_end(&mut std::fs::File::from(read), &mut bytes).unwrap();
    let mut status = 0;
    // SAFETY: reaps the child made above; `status` is a live integer.
    unsafe { libc::waitpid(child, &mut status, 0) };
    assert_eq!(status, 0, "the box could not be built (97) or the filter not installed (98)");
    let words: Vec<i64> =
        bytes.chunks_exact(8).map(|b| i64::from_ne_bytes(b.try_into().unwrap())).collect();
    words
        .chunks_exact(2)
        .map(|pair| match pair {
            [0, value] => End::Returned(*value),
            [1, errno] => End::Failed(*errno as i32),
            [_, signal] => End::Killed(*signal as i32),
            _ => unreachable!("pairs"),
        })
        .collect()
}

fn need(result: i32) {
    if result < 0 {
        // SAFETY: _exit(2) has no conditions.
        unsafe { libc::_exit(97) }
    }
}

fn put(file: &CStr, text: &CStr) {
    // SAFETY: both are C strings; the descriptor is this function's own.
    unsafe {
        let fd = libc::open(file.as_ptr(), libc::O_WRONLY);
        need(fd);
        need(libc::write(fd, text.as_ptr().cast(), text.to_bytes().len()) as i32);
        libc::close(fd);
    }
}

fn send(to: &impl std::os::fd::AsRawFd, end: End) {
    let pair: [i64; 2] = match end {
        End::Returned(value) => [0, value],
        End::Failed(errno) => [1, i64::from(errno)],
        End::Killed(signal) => [2, i64::from(signal)],
    };
    // SAFETY: writes the 16 bytes of a live array, which a pipe takes whole.
    unsafe { libc::write(to.as_raw_fd(), pair.as_ptr().cast(), 16) };
}

/// A terminal of the box's own, at descriptor [`TTY`].
fn terminal() {
    // SAFETY: the paths are C strings, `unlock` is a live integer, the descriptors are the child's own.
    unsafe {
        let master = libc::open(c"/dev/ptmx".as_ptr(), libc::O_RDWR | libc::O_NOCTTY);
        let unlock = 0i32;
        need(master);
        need(libc::ioctl(master, libc::TIOCSPTLCK, &unlock));
        let flags = libc::O_RDWR | libc::O_NOCTTY;
        need(libc::dup2(libc::ioctl(master, libc::TIOCGPTPEER, flags), TTY as i32));
    }
}

/// Holds each probe to its expectation; `or_unknown`: ENOSYS is as good as the refusal that it names.
#[track_caller]
fn check(name: &str, probes: &[Probe], or_unknown: bool) {
    let is_root = rustix::process::geteuid().is_root();
    let with = attempt_all(builtin(name).as_ref(), probes);
    let without = attempt_all(None, probes);
    let mut wrong = Vec::new();
    for ((probe, with), without) in probes.iter().zip(with).zip(without) {
        let refusal =
            |errno| with == End::Failed(errno) || or_unknown && with == End::Failed(ENOSYS);
        let past = |errno| without != End::Failed(errno);
        // A call that this kernel does not have yet (fchmodat2 before 6.6) opens nothing to refuse, and works
        // with the filter as it does without.
        let is_unknown = |end| end == End::Failed(ENOSYS);
        let right = match probe.expect {
            Expect::Refused(errno) if errno != ENOSYS && is_unknown(without) => {
                refusal(errno) || is_unknown(with)
            }
            Expect::Refused(errno) => refusal(errno) && past(errno),
            Expect::RefusedToRoot(errno) => refusal(errno) && (!is_root || past(errno)),
            Expect::Works if is_unknown(without) => is_unknown(with),
            Expect::Works => {
                matches!((with, without), (End::Returned(_), End::Returned(_)))
            }
            Expect::Reaches(errno) => with == End::Failed(errno) && without == with,
        };
        if !right {
            wrong.push(format!("{}: {with:?}, without the filter {without:?}", probe.what));
        }
    }
    assert!(wrong.is_empty(), "under {name}:\n{}", wrong.join("\n"));
}

#[test]
fn set_uid_and_set_gid_bits_are_refused_in_every_call_that_carries_a_mode() {
    for name in ["default", "build"] {
        check(name, &set_id_bits(), false);
        check(name, &set_id_bits_beyond_strict(), false);
    }
    check("strict", &set_id_bits(), false);
}

#[test]
fn what_reaches_beyond_the_sandbox_is_refused() {
    for name in ["default", "build"] {
        check(name, &walls(), false);
        check(name, &walls_beyond_strict(), false);
    }
    check("strict", &walls(), false);
}

#[test]
fn strict_has_only_unix_sockets_and_no_more_of_other_things() {
    use libc::*;
    let no_family = Expect::Refused(EAFNOSUPPORT);
    let unknown = Expect::Refused(ENOSYS);
    check(
        "strict",
        &[
            probe(no_family, "TCP", SYS_socket, [i64::from(AF_INET), 1, 0]),
            probe(no_family, "UDP", SYS_socket, [i64::from(AF_INET6), 2, 0]),
            probe(no_family, "netlink", SYS_socket, [i64::from(AF_NETLINK), 3, 0]),
            probe(no_family, "AF_VSOCK", SYS_socket, [i64::from(AF_VSOCK), 1, 0]),
            works("Unix", SYS_socket, [i64::from(AF_UNIX), 1, 0]),
            probe(unknown, "shmget", SYS_shmget, [0, 4096, 0o600]),
            probe(unknown, "setuid", SYS_setuid, [0]),
            probe(unknown, "mlock", SYS_mlock, [at_scratch(), 8]),
            probe(unknown, "personality", SYS_personality, [0xffff_ffff]),
            works("getuid", SYS_getuid, []),
        ],
        false,
    );
    let mut beyond = set_id_bits_beyond_strict();
    beyond.retain(|probe| matches!(probe.expect, Expect::Refused(_)));
    check("strict", &beyond, true);
}

#[test]
fn init_may_do_its_work_and_nothing_else() {
    use libc::*;
    check(
        "init",
        &[
            works("poll", SYS_poll, [0, 0, 0]),
            works("clock_gettime", SYS_clock_gettime, [7, at_scratch()]),
            works("rt_sigprocmask", SYS_rt_sigprocmask, [0, 0, at_scratch(), 8]),
            probe(Expect::Reaches(ECHILD), "wait4", SYS_wait4, [-1, 0, 0, 0]),
            probe(Expect::Reaches(ECHILD), "waitid", SYS_waitid, [0, 0, 0, 4, 0]),
            probe(Expect::Reaches(ESRCH), "kill", SYS_kill, [ABSENT, 0]),
            probe(Expect::Reaches(EBADF), "read", SYS_read, [NO_FD, 0, 0]),
            probe(Expect::Reaches(EBADF), "sendmsg", SYS_sendmsg, [NO_FD, 0, 0]),
            probe(Expect::Reaches(EBADF), "recvmsg", SYS_recvmsg, [NO_FD, 0, 0]),
            refused("open", SYS_openat, [HERE, at(c"target"), 0, 0]),
            refused("socket", SYS_socket, [i64::from(AF_UNIX), 1, 0]),
            refused("clone", SYS_clone, [17]),
            refused("execve", SYS_execve, [NOWHERE, 0, 0]),
            refused("mmap", SYS_mmap, [0, 4096, 3, 0x22, -1, 0]),
            refused("getpid", SYS_getpid, []),
            refused("clone3", SYS_clone3, [0, 0]),
            refused("mount", SYS_mount, [NOWHERE, NOWHERE, NOWHERE, 0, 0]),
        ],
        false,
    );
}

#[test]
fn the_broker_may_do_its_work_and_start_signal_connect_and_change_nothing() {
    use libc::*;
    let (unix, stream) = (i64::from(AF_UNIX), i64::from(SOCK_STREAM | SOCK_CLOEXEC));
    let private = i64::from(MAP_PRIVATE | MAP_ANONYMOUS);
    check(
        "broker",
        &[
            works("openat", SYS_openat, [HERE, at(c"target"), i64::from(O_RDONLY), 0]),
            works("mmap", SYS_mmap, [0, 4096, 3, private, -1, 0]),
            works("memfd", SYS_memfd_create, [at(c"x"), 1]),
            works("socket", SYS_socket, [unix, stream, 0]),
            works("socketpair", SYS_socketpair, [unix, i64::from(SOCK_SEQPACKET), 0, at_scratch()]),
            works("epoll", SYS_epoll_create1, [0]),
            works("eventfd", SYS_eventfd2, [0, 0]),
            works("prctl name", SYS_prctl, [15, at(c"x"), 0, 0, 0]),
            works("prlimit of its own", SYS_prlimit64, [0, 7, 0, at_scratch()]),
            works("chmod", SYS_chmod, [at(c"target"), 0o666]),
            probe(Expect::Reaches(ECHILD), "wait4", SYS_wait4, [-1, 0, 0, 0]),
            probe(Expect::Reaches(ESRCH), "abort", SYS_tgkill, [ABSENT, ABSENT, 6]),
            probe(Expect::Reaches(EBADF), "sendto no address", SYS_sendto, [NO_FD, 0, 0, 0, 0, 0]),
            probe(Expect::Reaches(EBADF), "lock", SYS_fcntl, [NO_FD, i64::from(F_SETLK), 0]),
            probe(Expect::Reaches(EBADF), "window size", SYS_ioctl, [NO_FD, 0x5414, 0]),
            refused("execve", SYS_execve, [NOWHERE, 0, 0]),
            refused("execveat", SYS_execveat, [NO_FD, NOWHERE, 0, 0, 0]),
            refused("clone of a process", SYS_clone, [i64::from(SIGCHLD), 0, 0, 0, 0]),
            refused("fork", SYS_fork, []),
            refused("mmap of code", SYS_mmap, [0, 4096, 5, private, -1, 0]),
            refused("mprotect to code", SYS_mprotect, [0, 0, 5]),
            refused("kill", SYS_kill, [ABSENT, 0]),
            refused("tgkill", SYS_tgkill, [ABSENT, ABSENT, 9]),
            refused("tkill", SYS_tkill, [ABSENT, 9]),
            refused("pidfd_send_signal", SYS_pidfd_send_signal, [NO_FD, 9, 0, 0]),
            refused("rt_sigqueueinfo", SYS_rt_sigqueueinfo, [ABSENT, 9, at_scratch()]),
            refused("F_SETOWN", SYS_fcntl, [NO_FD, i64::from(F_SETOWN), 1]),
            refused("connect", SYS_connect, [NO_FD, 0, 0]),
            refused("IPv4", SYS_socket, [i64::from(AF_INET), stream, 0]),
            refused("IPv6", SYS_socket, [i64::from(AF_INET6), stream, 0]),
            refused("netlink", SYS_socket, [i64::from(AF_NETLINK), 3, 0]),
            refused("datagrams", SYS_socket, [unix, i64::from(SOCK_DGRAM), 0]),
            refused("setuid", SYS_setuid, [i64::from(u32::MAX)]),
            refused("setresuid", SYS_setresuid, [-1, -1, -1]),
            refused("setgroups", SYS_setgroups, [-1, 0]),
            refused("chown", SYS_chown, [at(c"target"), -1, -1]),
            refused("fchownat", SYS_fchownat, [HERE, at(c"target"), -1, -1, 0]),
            refused("set-uid", SYS_chmod, [at(c"target"), 0o4755]),
            refused("symlink", SYS_symlink, [at(c"x"), at(c"link")]),
            refused("fifo", SYS_mknod, [at(c"fifo"), 0o010_600, 0]),
            refused("ptrace", SYS_ptrace, [16, ABSENT, 0, 0]),
            refused("process_vm_readv", SYS_process_vm_readv, [ABSENT, 0, 0, 0, 0, 0]),
            refused("pidfd_getfd", SYS_pidfd_getfd, [NO_FD, 0, 0]),
            refused("unshare", SYS_unshare, [0]),
            refused("setns", SYS_setns, [NO_FD, 0]),
            refused("mount", SYS_mount, [NOWHERE, NOWHERE, NOWHERE, 0, 0]),
            refused("bpf", SYS_bpf, [5, NOWHERE, 0]),
            refused("io_uring", SYS_io_uring_setup, [8, NOWHERE]),
            refused("userfaultfd", SYS_userfaultfd, [1]),
            refused("keyctl", SYS_keyctl, [6, 0, 0, 0, 0]),
            refused("clock_settime", SYS_clock_settime, [99, NOWHERE]),
            refused("sendto an address", SYS_sendto, [NO_FD, 0, 0, 0, NOWHERE, 110]),
            refused("others' limits", SYS_prlimit64, [ABSENT, 7, 0, 0]),
            refused("dumpable", SYS_prctl, [4, 1, 0, 0, 0]),
            refused("a filter on a socket", SYS_setsockopt, [NO_FD, 1, 26, NOWHERE, 16]),
            refused("typing", SYS_ioctl, [NO_FD, 0x5412, 0]),
            refused("clone3", SYS_clone3, [0, 0]),
            refused("openat2", SYS_openat2, [HERE, NOWHERE, NOWHERE, 24]),
        ],
        true,
    );
}

#[test]
fn a_set_uid_file_is_really_not_made() {
    let mode_after = |filter: Option<&Filter>| {
        let ends = in_a_box(filter, 1, |_| {
            // SAFETY: C strings and a zeroed structure that stat(2) fills.
            unsafe {
                libc::chmod(c"target".as_ptr(), 0o4755);
                let mut seen: libc::stat = std::mem::zeroed();
                need(libc::stat(c"target".as_ptr(), &mut seen));
                End::Returned(i64::from(seen.st_mode & 0o7777))
            }
        });
        ends[0]
    };
    assert_eq!(mode_after(None), End::Returned(0o4755));
    assert_eq!(mode_after(builtin("default").as_ref()), End::Returned(0o644));
}

#[test]
fn x32_numbers_are_unknown() {
    let probes = [X32 | libc::SYS_getpid, X32 | libc::SYS_mount, X32 | 520]
        .map(|call| probe(Expect::Reaches(ENOSYS), "x32", call, [NOWHERE; 6]));
    for name in ["default", "build", "strict", "init", "broker"] {
        let ends = attempt_all(builtin(name).as_ref(), &probes);
        assert_eq!(ends, [End::Failed(ENOSYS); 3], "{name}");
    }
}

#[test]
#[cfg(target_arch = "x86_64")]
fn the_32_bit_entry_kills() {
    const I386_GETPID: i64 = 20;
    let enter = |_| {
        let mut result = I386_GETPID;
        // SAFETY: getpid has no arguments; the entry clobbers what is named (r8 to r11 on old kernels).
        unsafe {
            std::arch::asm!("int 0x80", inout("rax") result,
                out("r8") _, out("r9") _, out("r10") _, out("r11") _);
        }
        End::Returned(result)
    };
    let control = in_a_box(None, 1, enter);
    for name in ["default", "build", "strict", "init", "broker"] {
        let ends = in_a_box(builtin(name).as_ref(), 1, enter);
        match control[0] {
            // PID 1 of its namespace.
            End::Returned(1) => assert_eq!(ends, [End::Killed(libc::SIGSYS)], "{name}"),
            other => assert!(matches!(ends[..], [End::Killed(_)]), "{name}: {other:?}, {ends:?}"),
        }
    }
}

#[test]
fn the_check_after_installing_tells_a_filter_from_none() {
    let look = |filter: Option<&Filter>| {
        in_a_box(filter, 1, |_| match see_it_refused() {
            Ok(()) => End::Returned(0),
            Err(e) => End::Failed(e.raw_os_error().unwrap_or(0)),
        })[0]
    };
    assert_eq!(look(None), End::Failed(libc::ENOTRECOVERABLE));
    for name in ["default", "build", "strict", "init", "broker"] {
        assert_eq!(look(builtin(name).as_ref()), End::Returned(0), "{name}");
    }
}

#[test]
fn a_faulty_program_is_not_installed() {
    // These return before the kernel sees anything, so no child is needed.
    assert_eq!(install(&[]).unwrap_err().raw_os_error(), Some(libc::EINVAL));
    let nothing = libc::sock_filter { code: 0, jt: 0, jf: 0, k: 0 };
    assert_eq!(install(&[nothing; 4097]).unwrap_err().raw_os_error(), Some(libc::EINVAL));
}

#[test]
fn a_filter_of_the_users_works_like_a_built_in_one() {
    let text =
        std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/seccomp/default.json"))
            .unwrap();
    let own = compile(&text.replace(r#"{"syscall": "uname"},"#, "")).unwrap();
    let probes = [
        probe(Expect::Reaches(ENOSYS), "uname", libc::SYS_uname, [at_scratch()]),
        works("getpid", libc::SYS_getpid, []),
    ];
    let ends = attempt_all(Some(&own), &probes);
    assert!(matches!(ends[..], [End::Failed(ENOSYS), End::Returned(1)]), "{ends:?}");
}

/// Runs a shell script under a filter; says what it printed. `None`: a program it needs is missing.
fn script(filter: &str, needs: &[&str], text: &str) -> Option<String> {
    for program in needs {
        let found = std::env::var_os("PATH")
            .is_some_and(|path| std::env::split_paths(&path).any(|d| d.join(program).exists()));
        if !found {
            eprintln!("skipped: {program} is not installed");
            return None;
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let filter = builtin(filter).unwrap();
    let mut command = Command::new("/bin/sh");
    command.arg("-euc").arg(text).current_dir(dir.path());
    command.env("GIT_CONFIG_GLOBAL", "/dev/null").env("TMPDIR", dir.path());
    // SAFETY: between fork and exec only two calls are made, neither of which allocates or locks.
    unsafe {
        command.pre_exec(move || {
            rustix::thread::set_no_new_privs(true)?;
            install(&filter)?;
            see_it_refused()
        });
    }
    let output = command.output().unwrap();
    let out = String::from_utf8_lossy(&output.stdout).into_owned();
    let err = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {text}\n{out}\n{err}", output.status);
    Some(out)
}

#[track_caller]
fn prints(filters: &[&str], needs: &[&str], text: &str, expected: &str) {
    for filter in filters {
        if let Some(out) = script(filter, needs, text) {
            assert_eq!(out, expected, "under {filter}: {text}");
        }
    }
}

const ALL: &[&str] = &["default", "build", "strict"];
const WIDE: &[&str] = &["default", "build"];

#[test]
fn scripts_run_under_every_filter() {
    let text = r#"
        mkdir -p a/b; printf 'x\ny\n' >a/b/f; cp -a a c; mv c d; ln -s d e; chmod 755 d/b/f
        find d -type f | sort | xargs cat | grep -c . ; ls -la >/dev/null; tar cf t.tar a
        mkdir u; tar xf t.tar -C u; cmp a/b/f u/a/b/f; rm -r a d; (sleep 0.01; echo bg) & wait
        echo x >/dev/stdout; sed s/x/z/ <u/a/b/f | head -1; timeout 5 true; mkfifo p; date >/dev/null
        awk 'BEGIN { print 6 * 7 }'; stat -c %a u/a/b/f; id -u >/dev/null; nproc >/dev/null; df . >/dev/null"#;
    prints(ALL, &["find", "tar", "awk", "timeout"], text, "2\nbg\nx\nz\n42\n644\n");
}

#[test]
fn python_threads_and_subprocesses_run_under_every_filter() {
    let text = r#"python3 -c '
import concurrent.futures, multiprocessing, os, subprocess, tempfile, socket, threading
with concurrent.futures.ThreadPoolExecutor(4) as pool:
    print(sum(pool.map(lambda n: n * n, range(10))))
print(subprocess.run(["echo", "child"], capture_output=True, text=True).stdout.strip())
a, b = socket.socketpair(); a.send(b"hi"); print(b.recv(2).decode())
with tempfile.NamedTemporaryFile() as f: f.write(b"x"); f.flush()
def work(q): q.send(os.getppid() == parent)
parent = os.getpid()
r, w = multiprocessing.Pipe()
p = multiprocessing.Process(target=work, args=(w,)); p.start(); print(r.recv()); p.join()
'"#;
    prints(ALL, &["python3"], text, "285\nchild\nhi\nTrue\n");
}

#[test]
fn python_serves_itself_and_makes_an_environment() {
    let text = r#"python3 -c '
import http.server, threading, urllib.request, socket, multiprocessing
s = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
threading.Thread(target=s.serve_forever, daemon=True).start()
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
print(opener.open("http://127.0.0.1:%d/" % s.server_address[1]).status)
print(len(socket.getaddrinfo("localhost", 80)) > 0)
with multiprocessing.Pool(2) as pool: print(pool.map(abs, [-1, -2]))
try: socket.socket(socket.AF_VSOCK)
except OSError as e: print(e.errno)
' 2>/dev/null; python3 -m venv --without-pip v; v/bin/python -c 'print("venv")'"#;
    prints(WIDE, &["python3"], text, "200\nTrue\n[1, 2]\n97\nvenv\n");
}

#[test]
fn compilers_and_make_run() {
    let text = r#"
        printf '#include <stdio.h>\nint main(){puts(W);}\n' >m.c
        printf 'all: a b c\na b c: m.c\n\t@gcc -DW=\\"$@\\" -o $@ m.c\n' >Makefile
        make -s -j3; ./a; ./b; ./c"#;
    prints(WIDE, &["gcc", "make"], text, "a\nb\nc\n");
}

#[test]
fn cargo_builds_a_crate() {
    let text = r#"
        mkdir src; printf '[package]\nname = "w"\nversion = "0.1.0"\nedition = "2021"\n' >Cargo.toml
        printf 'fn main() { std::thread::spawn(|| println!("built")).join().unwrap() }\n' >src/main.rs
        cargo --version >/dev/null; CARGO_TARGET_DIR=$PWD/t cargo run -q --offline"#;
    prints(&["build"], &["cargo"], text, "built\n");
}

#[test]
fn node_runs() {
    let text = r#"node -e '
const fs = require("fs"), { Worker } = require("worker_threads"), http = require("http");
fs.writeFileSync("f", "x"); fs.chmodSync("f", 0o600);
console.log(require("child_process").execFileSync("echo", ["child"]).toString().trim());
new Worker("require(\"worker_threads\").parentPort.postMessage(42)", { eval: true }).on("message", console.log)
  .on("exit", () => { const s = http.createServer((q, r) => r.end("ok")).listen(0, "127.0.0.1", () =>
    http.get({ port: s.address().port, host: "127.0.0.1" }, r => { console.log(r.statusCode); s.close(); r.resume(); })); });
'"#;
    prints(WIDE, &["node"], text, "child\n42\n200\n");
}

#[test]
fn git_commits_and_clones() {
    let text = r#"
        git init -q -b main r; cd r; echo x >f; git add f
        git -c user.name=n -c user.email=e@example.org commit -q -m m; git gc -q
        cd ..; git clone -q r c 2>/dev/null; git -C c log --format=%s; git -C c status --short"#;
    prints(WIDE, &["git"], text, "m\n");
}

#[test]
fn curl_reads() {
    let text = "echo x >f; curl -s file://$PWD/f; curl --version >/dev/null";
    prints(WIDE, &["curl"], text, "x\n");
}

#[test]
fn a_set_uid_bit_fails_loudly_in_a_script() {
    let text =
        "touch f; chmod 4755 f 2>&1 | grep -o 'not permitted'; stat -c %a f; install -m 755 f g";
    prints(ALL, &["install"], text, "not permitted\n644\n");
}
