//! Calls that no filter for a command may let through, and what each would break.
//!
//! Receives a program, returns the protections that it does not give. Touches nothing: the program is
//! followed, not installed. Must never count a call as refused that merely might be.

use super::compile::ARCH;
use super::compile::program::{Insn, Outcome, walk};

const RET_ALLOW: u32 = 0x7fff_0000;
const GARBAGE: u64 = 0xdead_beef_0000_0000;
const CREATE: u64 = (libc::O_CREAT | libc::O_WRONLY) as u64;
/// `__O_TMPFILE`, asm-generic/fcntl.h; libc's `O_TMPFILE` includes `O_DIRECTORY`.
const TMPFILE: u64 = (libc::O_TMPFILE | libc::O_WRONLY) as u64;

struct Attack {
    protection: &'static str,
    call: libc::c_long,
    args: [u64; 6],
}

const fn attack(protection: &'static str, call: libc::c_long, args: [u64; 6]) -> Attack {
    Attack { protection, call, args }
}

const fn clone(flag: libc::c_int) -> Attack {
    attack("no new namespaces", libc::SYS_clone, [flag as u32 as u64 | 17, 0, 0, 0, 0, 0])
}

const fn bits(call: libc::c_long, args: [u64; 6]) -> Attack {
    attack("no set-uid or set-gid bits", call, args)
}

/// `fchmodat2`, Linux 6.6.
const SYS_FCHMODAT2: libc::c_long = 452;

const SUID: u64 = 0o4755;
const SGID: u64 = GARBAGE | 0o2755;

static ATTACKS: &[Attack] = &[
    attack("no new namespaces", libc::SYS_unshare, [libc::CLONE_NEWUSER as u64, 0, 0, 0, 0, 0]),
    attack("no new namespaces", libc::SYS_setns, [3, 0, 0, 0, 0, 0]),
    attack("no new namespaces", libc::SYS_clone3, [4096, 88, 0, 0, 0, 0]),
    clone(libc::CLONE_NEWUSER),
    clone(libc::CLONE_NEWNS),
    clone(libc::CLONE_NEWPID),
    clone(libc::CLONE_NEWNET),
    clone(libc::CLONE_NEWIPC),
    clone(libc::CLONE_NEWUTS),
    clone(libc::CLONE_NEWCGROUP),
    bits(libc::SYS_openat2, [3, 4096, 4096, 24, 0, 0]),
    bits(libc::SYS_chmod, [4096, SUID, 0, 0, 0, 0]),
    bits(libc::SYS_chmod, [4096, SGID, 0, 0, 0, 0]),
    bits(libc::SYS_fchmod, [3, SUID, 0, 0, 0, 0]),
    bits(libc::SYS_fchmod, [3, SGID, 0, 0, 0, 0]),
    bits(libc::SYS_fchmodat, [3, 4096, SUID, 0, 0, 0]),
    bits(libc::SYS_fchmodat, [3, 4096, SGID, 0, 0, 0]),
    bits(SYS_FCHMODAT2, [3, 4096, SUID, 0, 0, 0]),
    bits(SYS_FCHMODAT2, [3, 4096, SGID, 0, 0, 0]),
    bits(libc::SYS_creat, [4096, SUID, 0, 0, 0, 0]),
    bits(libc::SYS_creat, [4096, SGID, 0, 0, 0, 0]),
    bits(libc::SYS_mkdir, [4096, SGID, 0, 0, 0, 0]),
    bits(libc::SYS_mkdirat, [3, 4096, SGID, 0, 0, 0]),
    bits(libc::SYS_mknod, [4096, SUID | 0o100_000, 0, 0, 0, 0]),
    bits(libc::SYS_mknod, [4096, SGID, 0, 0, 0, 0]),
    bits(libc::SYS_mknodat, [3, 4096, SUID, 0, 0, 0]),
    bits(libc::SYS_mknodat, [3, 4096, SGID, 0, 0, 0]),
    bits(libc::SYS_open, [4096, CREATE, SUID, 0, 0, 0]),
    bits(libc::SYS_open, [4096, CREATE, SGID, 0, 0, 0]),
    bits(libc::SYS_open, [4096, TMPFILE, SUID, 0, 0, 0]),
    bits(libc::SYS_open, [4096, TMPFILE, SGID, 0, 0, 0]),
    bits(libc::SYS_openat, [3, 4096, CREATE, SUID, 0, 0]),
    bits(libc::SYS_openat, [3, 4096, CREATE | GARBAGE, SGID, 0, 0]),
    bits(libc::SYS_openat, [3, 4096, TMPFILE, SUID, 0, 0]),
    bits(libc::SYS_openat, [3, 4096, TMPFILE, SGID, 0, 0]),
    bits(libc::SYS_mq_open, [4096, CREATE, SUID, 0, 0, 0]),
    attack("no device nodes", libc::SYS_mknod, [4096, 0o020_666, 0x0103, 0, 0, 0]),
    attack("no device nodes", libc::SYS_mknod, [4096, 0o060_666, 0x0800, 0, 0, 0]),
    attack("no device nodes", libc::SYS_mknodat, [3, 4096, 0o020_666 | GARBAGE, 0x0103, 0, 0]),
    attack("no device nodes", libc::SYS_mknodat, [3, 4096, 0o060_666, 0x0800, 0, 0]),
    attack("no mounts", libc::SYS_mount, [4096; 6]),
    attack("no mounts", libc::SYS_umount2, [4096, 2, 0, 0, 0, 0]),
    attack("no mounts", libc::SYS_pivot_root, [4096; 6]),
    attack("no mounts", libc::SYS_chroot, [4096; 6]),
    attack("no mounts", libc::SYS_open_tree, [3, 4096, 1, 0, 0, 0]),
    attack("no mounts", libc::SYS_move_mount, [3, 4096, 3, 4096, 0, 0]),
    attack("no mounts", libc::SYS_fsopen, [4096, 0, 0, 0, 0, 0]),
    attack("no mounts", libc::SYS_mount_setattr, [3, 4096, 0, 4096, 32, 0]),
    attack("no files by handle", libc::SYS_open_by_handle_at, [3, 4096, 0, 0, 0, 0]),
    attack("no access to other processes", libc::SYS_ptrace, [16, 1, 0, 0, 0, 0]),
    attack("no access to other processes", libc::SYS_process_vm_readv, [1, 4096, 1, 4096, 1, 0]),
    attack("no access to other processes", libc::SYS_process_vm_writev, [1, 4096, 1, 4096, 1, 0]),
    attack("no access to other processes", libc::SYS_pidfd_getfd, [3, 0, 0, 0, 0, 0]),
    attack("no hold on init", libc::SYS_prlimit64, [1 | GARBAGE, 7, 4096, 0, 0, 0]),
    attack("no hold on init", libc::SYS_sched_setaffinity, [1, 8, 4096, 0, 0, 0]),
    attack("no hold on init", libc::SYS_sched_setscheduler, [1 | GARBAGE, 5, 4096, 0, 0, 0]),
    attack("no hold on init", libc::SYS_sched_setparam, [1, 4096, 0, 0, 0, 0]),
    attack("no hold on init", libc::SYS_sched_setattr, [1, 4096, 0, 0, 0, 0]),
    attack("no hold on init", libc::SYS_setpriority, [0, 1 | GARBAGE, 19, 0, 0, 0]),
    attack("no hold on init", libc::SYS_setpriority, [2, 0, 19, 0, 0, 0]),
    attack("no hold on init", libc::SYS_ioprio_set, [1, 1, 0x6000, 0, 0, 0]),
    attack("no hold on init", libc::SYS_ioprio_set, [3, 0, 0x6000, 0, 0, 0]),
    attack("no io_uring", libc::SYS_io_uring_setup, [8, 4096, 0, 0, 0, 0]),
    attack("no io_uring", libc::SYS_io_uring_enter, [3, 1, 0, 0, 0, 0]),
    attack("no bpf, perf or userfaultfd", libc::SYS_bpf, [5, 4096, 120, 0, 0, 0]),
    attack("no bpf, perf or userfaultfd", libc::SYS_perf_event_open, [4096, 0, 0, 0, 0, 0]),
    attack("no bpf, perf or userfaultfd", libc::SYS_userfaultfd, [0; 6]),
    attack("no keyrings", libc::SYS_keyctl, [0; 6]),
    attack("no keyrings", libc::SYS_add_key, [4096; 6]),
    attack("no keyrings", libc::SYS_request_key, [4096; 6]),
    attack("no unusual sockets", libc::SYS_socket, [libc::AF_VSOCK as u64, 1, 0, 0, 0, 0]),
    attack("no unusual sockets", libc::SYS_socket, [libc::AF_ALG as u64 | GARBAGE, 5, 0, 0, 0, 0]),
    attack("no unusual sockets", libc::SYS_socket, [libc::AF_PACKET as u64, 2, 0, 0, 0, 0]),
    attack("no unusual sockets", libc::SYS_socket, [libc::AF_INET as u64, 3, 255, 0, 0, 0]),
    attack("no unusual sockets", libc::SYS_socket, [libc::AF_INET6 as u64, 0x80803, 58, 0, 0, 0]),
    attack("no unusual sockets", libc::SYS_socket, [libc::AF_INET as u64, 10, 0x300, 0, 0, 0]),
    attack("no unusual sockets", libc::SYS_socket, [libc::AF_NETLINK as u64, 3, 12, 0, 0, 0]),
    attack("no typing into the terminal", libc::SYS_ioctl, [0, 0x5412, 4096, 0, 0, 0]),
    attack("no typing into the terminal", libc::SYS_ioctl, [0, 0x5412 | GARBAGE, 4096, 0, 0, 0]),
    attack("no typing into the terminal", libc::SYS_ioctl, [0, 0x541c | GARBAGE, 4096, 0, 0, 0]),
    attack("no kernel modules", libc::SYS_init_module, [4096; 6]),
    attack("no kernel modules", libc::SYS_finit_module, [3, 4096, 0, 0, 0, 0]),
    attack("no kernel modules", libc::SYS_kexec_load, [0; 6]),
    attack("no changes of the machine", libc::SYS_reboot, [0; 6]),
    attack("no changes of the machine", libc::SYS_swapon, [4096, 0, 0, 0, 0, 0]),
    attack("no changes of the machine", libc::SYS_settimeofday, [4096, 0, 0, 0, 0, 0]),
    attack("no changes of the machine", libc::SYS_clock_settime, [0, 4096, 0, 0, 0, 0]),
    attack("no foreign ABIs", libc::SYS_getpid | 0x4000_0000, [0; 6]),
    attack("no foreign ABIs", libc::SYS_execve | 0x4000_0000, [4096; 6]),
];

pub(super) fn gaps(program: &[libc::sock_filter]) -> Vec<&'static str> {
    let program: Vec<Insn> =
        program.iter().map(|i| Insn { code: i.code, jt: i.jt, jf: i.jf, k: i.k }).collect();
    let mut gaps: Vec<&'static str> = Vec::new();
    for attack in ATTACKS {
        let refused = match walk(&program, attack.call as u32, ARCH, Some(&attack.args)) {
            Ok(Outcome::Return(action)) => action != RET_ALLOW,
            // A program that cannot be followed protects from nothing that we know of.
            Ok(Outcome::NeedsArgument(_)) | Err(_) => false,
        };
        if !refused && !gaps.contains(&attack.protection) {
            gaps.push(attack.protection);
        }
    }
    gaps
}
