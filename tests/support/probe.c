/* Hostile programs, one word each: `probe WORD [ARG…]`.
 *
 * Each tries one thing that a sandboxed command must not be able to do and prints one line:
 *     WORD: allowed [what it got]      the attack worked
 *     WORD: ERRNO                      refused with this error
 *     WORD: SIGNAL                     killed for trying
 * `probe try all` runs every attack that needs no argument. Each runs in a child of its own, so that a
 * filter that kills ends only that one attempt. Harmless where it works: it acts on itself, on files
 * that it made in the current directory, or with arguments that the kernel rejects after the check
 * that we look for. Static and not position-independent, so that `secret` has one address everywhere.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <linux/keyctl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <unistd.h>

#define HIGH (1UL << 32) /* bits that the kernel ignores and a careless filter compares */
#define X32 0x40000000

/* The victim's copy of its value, at the same address in the attacker. */
char secret[64];

static int fail(const char *what) {
	perror(what);
	exit(99);
}

/* ---- attacks without an argument ------------------------------------------------------------- */

static const char *fresh(void) {
	static char name[64];
	static int n;
	snprintf(name, sizeof name, "victim-%d-%d", getpid(), n++);
	return name;
}

static const char *made(void) {
	const char *name = fresh();
	int fd = open(name, O_CREAT | O_WRONLY, 0755);
	if (fd < 0)
		fail(name);
	close(fd);
	return name;
}

/* A call that succeeds without leaving the bit is no attack that worked. */
static long left_bits(const char *name, long result) {
	struct stat st;
	if (result < 0)
		return result;
	if (stat(name, &st) == 0 && (st.st_mode & 06000))
		return 0;
	errno = ENOTSUP;
	return -1;
}

static long su_chmod(void) { const char *n = made(); return left_bits(n, syscall(SYS_chmod, n, 04755)); }
static long sg_chmod(void) { const char *n = made(); return left_bits(n, syscall(SYS_chmod, n, 02755)); }
static long su_chmod_high(void) { const char *n = made(); return left_bits(n, syscall(SYS_chmod, n, 04755 | HIGH)); }
static long su_chmod_sixteen(void) { const char *n = made(); return left_bits(n, syscall(SYS_chmod, n, 04755 | 0x10000)); }
static long su_fchmod(void) { const char *n = made(); int fd = open(n, O_RDONLY); return left_bits(n, syscall(SYS_fchmod, fd, 04755)); }
static long su_fchmodat(void) { const char *n = made(); return left_bits(n, syscall(SYS_fchmodat, AT_FDCWD, n, 04755)); }
static long su_fchmodat2(void) { const char *n = made(); return left_bits(n, syscall(452, AT_FDCWD, n, 04755, 0)); }
static long su_open(void) { const char *n = fresh(); return left_bits(n, syscall(SYS_open, n, O_CREAT | O_WRONLY, 04755)); }
static long su_openat(void) { const char *n = fresh(); return left_bits(n, syscall(SYS_openat, AT_FDCWD, n, O_CREAT | O_WRONLY, 04755)); }
static long su_creat(void) { const char *n = fresh(); return left_bits(n, syscall(SYS_creat, n, 04755)); }
static long su_mknod(void) { const char *n = fresh(); return left_bits(n, syscall(SYS_mknod, n, S_IFREG | 04755, 0)); }
static long su_mknodat(void) { const char *n = fresh(); return left_bits(n, syscall(SYS_mknodat, AT_FDCWD, n, S_IFREG | 04755, 0)); }
static long su_tmpfile(void) {
	const char *n = fresh();
	char path[64];
	int fd = syscall(SYS_openat, AT_FDCWD, ".", O_TMPFILE | O_RDWR, 04755);
	if (fd < 0)
		return -1;
	snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
	return left_bits(n, linkat(AT_FDCWD, path, AT_FDCWD, n, AT_SYMLINK_FOLLOW));
}
static long su_openat2(void) {
	const char *n = fresh();
	uint64_t how[3] = {O_CREAT | O_WRONLY, 04755, 0};
	return left_bits(n, syscall(437, AT_FDCWD, n, how, sizeof how));
}
static long su_x32_chmod(void) { const char *n = made(); return left_bits(n, syscall(X32 + 90, n, 04755)); }
static long file_capability(void) {
	struct vfs_cap_data cap = {.magic_etc = VFS_CAP_REVISION_2 | VFS_CAP_FLAGS_EFFECTIVE, .data = {{.permitted = 1 << CAP_SETUID}}};
	return setxattr(made(), "security.capability", &cap, sizeof cap, 0);
}
static long device_chr(void) { return mknod(fresh(), S_IFCHR | 0666, makedev(1, 3)); }
static long device_blk(void) { return mknod(fresh(), S_IFBLK | 0666, makedev(7, 0)); }

static long ns_unshare_user(void) { return unshare(CLONE_NEWUSER); }
static long ns_unshare_mount(void) { return unshare(CLONE_NEWNS); }
static long ns_unshare_high(void) { return syscall(SYS_unshare, CLONE_NEWUSER | HIGH); }
static long ns_clone_user(void) {
	long pid = syscall(SYS_clone, SIGCHLD | CLONE_NEWUSER, 0, 0, 0, 0);
	if (pid == 0)
		_exit(0);
	return pid;
}
static long ns_clone3(void) {
	uint64_t args[11] = {[0] = CLONE_NEWUSER, [4] = SIGCHLD};
	long pid = syscall(435, args, sizeof args);
	if (pid == 0)
		_exit(0);
	return pid;
}
static long ns_setns(void) {
	int fd = open("/proc/self/ns/uts", O_RDONLY);
	return fd < 0 ? -1 : setns(fd, 0);
}

static long m_mount(void) { return mount("none", "/tmp", "tmpfs", 0, 0); }
static long m_umount(void) { return umount2("/proc", MNT_DETACH); }
static long m_pivot(void) { return syscall(SYS_pivot_root, ".", "."); }
static long m_chroot(void) { return chroot("."); }
static long m_fsopen(void) { return syscall(430, "tmpfs", 0); }
static long m_open_tree(void) { return syscall(428, AT_FDCWD, "/", 1 /* OPEN_TREE_CLONE */); }
static long m_move_mount(void) { return syscall(429, -1, "", AT_FDCWD, "/tmp", 0); }
static long m_setattr(void) {
	uint64_t attr[4] = {0, 1 /* clear RDONLY */, 0, 0};
	return syscall(442, AT_FDCWD, "/", 0, attr, sizeof attr);
}

static long t_traceme(void) { return ptrace(PTRACE_TRACEME, 0, 0, 0); }
static long t_vm_readv(void) {
	char a[4] = "abc", b[4];
	struct iovec l = {b, 4}, r = {a, 4};
	return process_vm_readv(getpid(), &l, 1, &r, 1, 0);
}
static long t_vm_writev(void) {
	char a[4] = "abc", b[4] = "xyz";
	struct iovec l = {b, 4}, r = {a, 4};
	return process_vm_writev(getpid(), &l, 1, &r, 1, 0);
}
static long t_pidfd_getfd(void) {
	int pidfd = syscall(434, getpid(), 0);
	return pidfd < 0 ? -1 : syscall(438, pidfd, 0, 0);
}
static long t_kcmp(void) { return syscall(SYS_kcmp, getpid(), getpid(), 0, 0, 0); }

static long k_io_uring(void) { char p[256] = {0}; return syscall(425, 1, p); }
static long k_bpf(void) { char a[128] = {0}; return syscall(SYS_bpf, 0, a, sizeof a); }
static long k_perf(void) {
	struct { uint32_t type, size; uint64_t config, rest[14]; } a = {1, 128, 0, {0}};
	a.rest[4] = 1 << 5 | 1 << 6; /* exclude_kernel, exclude_hv */
	return syscall(SYS_perf_event_open, &a, 0, -1, -1, 0);
}
static long k_userfaultfd(void) { return syscall(SYS_userfaultfd, 1 /* USER_MODE_ONLY */); }
static long k_open_by_handle(void) { char h[64] = {8}; return syscall(SYS_open_by_handle_at, AT_FDCWD, h, 0); }
static long k_add_key(void) { return syscall(SYS_add_key, "user", "probe", "x", 1, KEY_SPEC_SESSION_KEYRING); }
static long k_request_key(void) { return syscall(SYS_request_key, "user", "probe", 0, 0); }
static long k_keyctl(void) { return syscall(SYS_keyctl, KEYCTL_GET_KEYRING_ID, KEY_SPEC_SESSION_KEYRING, 1); }
static long k_init_module(void) { return syscall(SYS_init_module, 0, 0, ""); }
static long k_finit_module(void) { return syscall(SYS_finit_module, -1, "", 0); }
static long k_delete_module(void) { return syscall(SYS_delete_module, "no-such-module", 0); }
static long k_kexec(void) { return syscall(SYS_kexec_load, 0, 0, 0, ~0UL); }
static long k_kexec_file(void) { return syscall(SYS_kexec_file_load, -1, -1, 0, 0, ~0UL); }
static long k_swapon(void) { return syscall(SYS_swapon, "", 0); }
static long k_swapoff(void) { return syscall(SYS_swapoff, ""); }
static long k_clock_settime(void) { return syscall(SYS_clock_settime, 99, 0); }
static long k_settimeofday(void) { struct timeval t = {-1, -1}; return syscall(SYS_settimeofday, &t, 0); }
static long k_reboot(void) { return syscall(SYS_reboot, 0, 0, 0, 0); }
static long k_acct(void) { return syscall(SYS_acct, "/nonexistent/acct"); }
static long k_syslog(void) { char b[8]; return syscall(SYS_syslog, 3, b, 8); }
static long k_iopl(void) { return syscall(SYS_iopl, 0) ; }
static long k_ioperm(void) { return syscall(SYS_ioperm, 0x80, 1, 1); }
static long k_sethostname(void) { return sethostname("probe", 5); }
static long k_fanotify(void) { return syscall(SYS_fanotify_init, 0, 0); }

static long s_vsock(void) { return socket(AF_VSOCK, SOCK_STREAM, 0); }
static long s_alg(void) { return socket(AF_ALG, SOCK_SEQPACKET, 0); }
static long s_packet(void) { return socket(AF_PACKET, SOCK_RAW, 0); }
static long s_packet_high(void) { return syscall(SYS_socket, AF_PACKET | HIGH, SOCK_RAW, 0); }
static long s_raw(void) { return socket(AF_INET, SOCK_RAW, 1); }
static long s_raw_flags(void) { return socket(AF_INET, SOCK_RAW | SOCK_CLOEXEC, 1); }
static long s_raw6(void) { return socket(AF_INET6, SOCK_RAW, 58); }

/* Both answer with our pid if the other call table is open. */
static long abi_x32(void) { return syscall(X32 + 39); }
static long abi_i386(void) {
#ifdef __x86_64__
	long r;
	__asm__ volatile("int $0x80" : "=a"(r) : "a"(20L) : "memory", "r8", "r9", "r10", "r11");
	if (r < 0 && r > -4096) {
		errno = -r;
		return -1;
	}
	return r;
#else
	errno = ENOSYS;
	return -1;
#endif
}

static long tty_fd(void) { return open("/dev/tty", O_RDWR); }
static long tty_sti(void) { int fd = tty_fd(); return fd < 0 ? -1 : ioctl(fd, TIOCSTI, "\n"); }
static long tty_sti_high(void) { int fd = tty_fd(); return fd < 0 ? -1 : syscall(SYS_ioctl, fd, TIOCSTI | HIGH, "\n"); }
static long tty_linux(void) { char sub = 2; return ioctl(0, 0x541C /* TIOCLINUX */, &sub); }

static const struct { const char *word; long (*attack)(void); } ATTACKS[] = {
	{"su_chmod", su_chmod}, {"sg_chmod", sg_chmod}, {"su_chmod_high", su_chmod_high},
	{"su_chmod_sixteen", su_chmod_sixteen}, {"su_fchmod", su_fchmod}, {"su_fchmodat", su_fchmodat},
	{"su_fchmodat2", su_fchmodat2}, {"su_open", su_open}, {"su_openat", su_openat},
	{"su_creat", su_creat}, {"su_mknod", su_mknod}, {"su_mknodat", su_mknodat},
	{"su_tmpfile", su_tmpfile}, {"su_openat2", su_openat2}, {"su_x32_chmod", su_x32_chmod},
	{"file_capability", file_capability}, {"device_chr", device_chr}, {"device_blk", device_blk},
	{"ns_unshare_user", ns_unshare_user}, {"ns_unshare_mount", ns_unshare_mount},
	{"ns_unshare_high", ns_unshare_high}, {"ns_clone_user", ns_clone_user}, {"ns_clone3", ns_clone3},
	{"ns_setns", ns_setns}, {"m_mount", m_mount}, {"m_umount", m_umount}, {"m_pivot", m_pivot},
	{"m_chroot", m_chroot}, {"m_fsopen", m_fsopen}, {"m_open_tree", m_open_tree},
	{"m_move_mount", m_move_mount}, {"m_setattr", m_setattr}, {"t_traceme", t_traceme},
	{"t_vm_readv", t_vm_readv}, {"t_vm_writev", t_vm_writev}, {"t_pidfd_getfd", t_pidfd_getfd},
	{"t_kcmp", t_kcmp}, {"k_io_uring", k_io_uring}, {"k_bpf", k_bpf}, {"k_perf", k_perf},
	{"k_userfaultfd", k_userfaultfd}, {"k_open_by_handle", k_open_by_handle},
	{"k_add_key", k_add_key}, {"k_request_key", k_request_key}, {"k_keyctl", k_keyctl},
	{"k_init_module", k_init_module}, {"k_finit_module", k_finit_module},
	{"k_delete_module", k_delete_module}, {"k_kexec", k_kexec}, {"k_kexec_file", k_kexec_file},
	{"k_swapon", k_swapon}, {"k_swapoff", k_swapoff}, {"k_clock_settime", k_clock_settime},
	{"k_settimeofday", k_settimeofday}, {"k_reboot", k_reboot}, {"k_acct", k_acct},
	{"k_syslog", k_syslog}, {"k_iopl", k_iopl}, {"k_ioperm", k_ioperm},
	{"k_sethostname", k_sethostname}, {"k_fanotify", k_fanotify}, {"s_vsock", s_vsock},
	{"s_alg", s_alg}, {"s_packet", s_packet}, {"s_packet_high", s_packet_high}, {"s_raw", s_raw},
	{"s_raw_flags", s_raw_flags}, {"s_raw6", s_raw6}, {"abi_x32", abi_x32}, {"abi_i386", abi_i386},
	{"tty_sti", tty_sti}, {"tty_sti_high", tty_sti_high}, {"tty_linux", tty_linux},
};

static void attempt(const char *word, long (*attack)(void)) {
	fflush(stdout);
	pid_t pid = fork();
	if (pid < 0)
		fail("fork");
	if (pid == 0) {
		errno = 0;
		long r = attack();
		if (r >= 0)
			printf("%s: allowed\n", word);
		else
			printf("%s: %s\n", word, strerrorname_np(errno) ? strerrorname_np(errno) : "?");
		fflush(stdout);
		_exit(0);
	}
	int status;
	while (waitpid(pid, &status, __WALL) == pid && WIFSTOPPED(status))
		ptrace(PTRACE_CONT, pid, 0, 0);
	if (WIFSIGNALED(status))
		printf("%s: SIG%s\n", word, sigabbrev_np(WTERMSIG(status)));
}

static int try_attacks(int count, char **words) {
	for (size_t i = 0; i < sizeof ATTACKS / sizeof *ATTACKS; i++)
		for (int w = 0; w < count; w++)
			if (!strcmp(words[w], "all") || !strcmp(words[w], ATTACKS[i].word))
				attempt(ATTACKS[i].word, ATTACKS[i].attack);
	return 0;
}

/* ---- a victim, and what others try on it ------------------------------------------------------ */

/* Holds its value in memory, environment, a file descriptor and, if asked, an abstract socket. */
static int victim(const char *mark, const char *socket_name) {
	int fd = memfd_create("victim", 0);
	snprintf(secret, sizeof secret, "%s", mark);
	if (fd < 0 || write(fd, mark, strlen(mark)) < 0)
		fail("memfd");
	int listener = -1;
	if (socket_name) {
		struct sockaddr_un at = {.sun_family = AF_UNIX};
		strncpy(at.sun_path + 1, socket_name, sizeof at.sun_path - 2);
		listener = socket(AF_UNIX, SOCK_STREAM, 0);
		if (bind(listener, (void *)&at, offsetof(struct sockaddr_un, sun_path) + 1 + strlen(socket_name)) || listen(listener, 8))
			fail("abstract socket");
	}
	printf("ready %d\n", getpid());
	fflush(stdout);
	for (;;) {
		if (listener < 0) {
			pause();
			continue;
		}
		int peer = accept(listener, 0, 0);
		if (peer >= 0 && write(peer, mark, strlen(mark)) > 0)
			close(peer);
	}
}

static void found(const char *word, const char *got) { printf("%s: allowed %s\n", word, got); }
static void refused(const char *word) { printf("%s: %s\n", word, strerrorname_np(errno)); }

/* Prints what follows `mark` in a file, or the error. */
static void search(const char *word, const char *path, off_t at, const char *mark) {
	static char bytes[1 << 20];
	int fd = open(path, O_RDONLY | O_NONBLOCK);
	if (fd < 0)
		return refused(word);
	ssize_t n = at ? pread(fd, bytes, sizeof secret, at) : read(fd, bytes, sizeof bytes);
	int error = errno;
	close(fd);
	errno = error;
	if (n < 0)
		return refused(word);
	if (memmem(bytes, n, mark, strlen(mark)))
		return found(word, mark);
	printf("%s: nothing\n", word);
}

/* Every way from one process to another's value. `mark` is the value that the victim holds. */
static int spy(pid_t pid, const char *mark) {
	char path[64], link[64], buffer[sizeof secret];
	snprintf(path, sizeof path, "/proc/%d/environ", pid);
	search("environ", path, 0, mark);
	snprintf(path, sizeof path, "/proc/%d/cmdline", pid);
	search("cmdline", path, 0, mark);
	snprintf(path, sizeof path, "/proc/%d/mem", pid);
	search("mem", path, (off_t)(uintptr_t)secret, mark);
	snprintf(path, sizeof path, "/proc/%d/maps", pid);
	search("maps", path, 0, "r-xp");

	snprintf(path, sizeof path, "/proc/%d/fd", pid);
	DIR *dir = opendir(path);
	if (!dir) {
		refused("fd");
	} else {
		int hit = 0;
		for (struct dirent *e; (e = readdir(dir));) {
			snprintf(link, sizeof link, "%.40s/%.20s", path, e->d_name);
			int fd = open(link, O_RDONLY | O_NONBLOCK);
			static char bytes[1 << 16];
			if (fd >= 0 && pread(fd, bytes, sizeof bytes, 0) > 0 && memmem(bytes, sizeof bytes, mark, strlen(mark)))
				hit = 1;
			if (fd >= 0)
				close(fd);
		}
		printf(hit ? "fd: allowed %s\n" : "fd: nothing\n", mark);
	}

	snprintf(path, sizeof path, "/proc/%d/root/run/sublet/secrets", pid);
	dir = opendir(path);
	if (!dir) {
		refused("root");
	} else {
		found("root", "");
		closedir(dir);
	}

	struct iovec here = {buffer, sizeof buffer}, there = {secret, sizeof secret};
	if (process_vm_readv(pid, &here, 1, &there, 1, 0) < 0)
		refused("process_vm_readv");
	else
		found("process_vm_readv", memmem(buffer, sizeof buffer, mark, strlen(mark)) ? mark : "");

	int pidfd = syscall(434, pid, 0);
	if (pidfd < 0) {
		refused("pidfd_getfd");
	} else {
		int got = -1;
		for (int n = 0; n < 32 && got < 0; n++)
			got = syscall(438, pidfd, n, 0);
		if (got < 0)
			refused("pidfd_getfd");
		else
			found("pidfd_getfd", "");
	}

	if (ptrace(PTRACE_SEIZE, pid, 0, 0) < 0)
		refused("ptrace");
	else {
		found("ptrace", "");
		ptrace(PTRACE_DETACH, pid, 0, 0);
	}

	if (kill(pid, 0) < 0)
		refused("signal");
	else
		found("signal", "");
	return 0;
}

/* `spy` on each descendant of `root`, the root included: lines start with the pid and its place. */
static int spy_family(pid_t root, const char *mark) {
	pid_t family[64] = {root};
	int count = 1;
	for (int next = 0; next < count; next++) {
		DIR *dir = opendir("/proc");
		for (struct dirent *e; dir && (e = readdir(dir));) {
			char path[64], stat[256] = {0};
			int parent = 0;
			snprintf(path, sizeof path, "/proc/%.20s/stat", e->d_name);
			int fd = open(path, O_RDONLY);
			if (fd < 0)
				continue;
			ssize_t n = read(fd, stat, sizeof stat - 1);
			close(fd);
			char *tail = n > 0 ? strrchr(stat, ')') : 0;
			if (tail && sscanf(tail, ") %*c %d", &parent) == 1 && parent == family[next] && count < 64)
				family[count++] = atoi(e->d_name);
		}
		closedir(dir);
	}
	printf("members: %d\n", count);
	for (int i = 0; i < count; i++) {
		printf("member: %d\n", i);
		spy(family[i], mark);
	}
	return 0;
}

/* Looks for any process at all that shows `mark`; says how many others it sees. */
static int census(const char *mark) {
	char path[64];
	int others = 0, shown = 0;
	static char bytes[1 << 16];
	DIR *dir = opendir("/proc");
	for (struct dirent *e; dir && (e = readdir(dir));) {
		pid_t pid = atoi(e->d_name);
		if (pid <= 0 || pid == getpid())
			continue;
		others++;
		const char *files[] = {"environ", "cmdline"};
		for (int i = 0; i < 2; i++) {
			snprintf(path, sizeof path, "/proc/%d/%s", pid, files[i]);
			int fd = open(path, O_RDONLY);
			ssize_t n = fd < 0 ? 0 : read(fd, bytes, sizeof bytes);
			if (n > 0 && memmem(bytes, n, mark, strlen(mark)))
				shown++;
			close(fd);
		}
	}
	printf("others: %d\nshown: %d\n", others, shown);
	return 0;
}

static int abstract_read(const char *name) {
	struct sockaddr_un at = {.sun_family = AF_UNIX};
	strncpy(at.sun_path + 1, name, sizeof at.sun_path - 2);
	int fd = socket(AF_UNIX, SOCK_STREAM, 0);
	if (connect(fd, (void *)&at, offsetof(struct sockaddr_un, sun_path) + 1 + strlen(name)) < 0) {
		refused("abstract");
		return 1;
	}
	char got[64] = {0};
	if (read(fd, got, sizeof got - 1) < 0)
		got[0] = 0;
	found("abstract", got);
	return 0;
}

/* A key in a session keyring of its own, then another program. */
static int with_key(char **args) {
	if (syscall(SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, 0) < 0)
		fail("join session keyring");
	long key = syscall(SYS_add_key, "user", args[0], args[1], strlen(args[1]), KEY_SPEC_SESSION_KEYRING);
	if (key < 0)
		fail("add_key");
	execvp(args[2], args + 2);
	fail(args[2]);
	return 99;
}

static int find_key(const char *name) {
	char got[64] = {0};
	long key = syscall(SYS_keyctl, KEYCTL_SEARCH, KEY_SPEC_SESSION_KEYRING, "user", name, 0);
	if (key < 0 || syscall(SYS_keyctl, KEYCTL_READ, key, got, sizeof got - 1) < 0) {
		refused("key");
		return 1;
	}
	found("key", got);
	return 0;
}

/* ---- memfd: a descriptor passed out of the sandbox -------------------------------------------- */

static int leak_fd(int fd, const char *socket_path) {
	struct sockaddr_un to = {.sun_family = AF_UNIX};
	strncpy(to.sun_path, socket_path, sizeof to.sun_path - 1);
	int s = socket(AF_UNIX, SOCK_STREAM, 0);
	if (connect(s, (void *)&to, sizeof to) < 0) {
		refused("leak");
		return 1;
	}
	char byte = '!', control[CMSG_SPACE(sizeof(int))] = {0};
	struct iovec io = {&byte, 1};
	struct msghdr message = {.msg_iov = &io, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
	struct cmsghdr *c = CMSG_FIRSTHDR(&message);
	c->cmsg_level = SOL_SOCKET;
	c->cmsg_type = SCM_RIGHTS;
	c->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(c), &fd, sizeof fd);
	if (sendmsg(s, &message, 0) < 0) {
		refused("leak");
		return 1;
	}
	found("leak", "");
	return 0;
}

/* Connects to a socket and says nothing. */
static int hold(const char *path, const char *mark) {
	struct sockaddr_un to = {.sun_family = AF_UNIX};
	strncpy(to.sun_path, path, sizeof to.sun_path - 1);
	int s = socket(AF_UNIX, SOCK_STREAM, 0);
	if (connect(s, (void *)&to, sizeof to) < 0)
		fail(path);
	close(open(mark, O_CREAT | O_WRONLY, 0644));
	char byte;
	return read(s, &byte, 1) < 0;
}

/* What the holder of a delivered memfd can do to it besides reading. */
static int memfd_rights(int fd) {
	char path[64];
	printf("write: %s\n", pwrite(fd, "x", 1, 0) < 0 ? strerrorname_np(errno) : "allowed");
	printf("mmap_write: %s\n", mmap(0, 1, PROT_WRITE, MAP_SHARED, fd, 0) == MAP_FAILED ? strerrorname_np(errno) : "allowed");
	printf("truncate: %s\n", ftruncate(fd, 0) < 0 ? strerrorname_np(errno) : "allowed");
	snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
	int again = open(path, O_RDWR);
	printf("reopen_write: %s\n", again < 0 ? strerrorname_np(errno) : pwrite(again, "x", 1, 0) < 0 ? strerrorname_np(errno) : "allowed");
	printf("chmod: %s\n", fchmod(fd, 0755) < 0 ? strerrorname_np(errno) : "allowed");
	printf("seals: %x\n", fcntl(fd, F_GET_SEALS));
	char *args[] = {path, 0}, *env[] = {0};
	pid_t pid = fork();
	if (pid == 0) {
		execve(path, args, env);
		printf("exec: %s\n", strerrorname_np(errno));
		fflush(stdout);
		_exit(0);
	}
	waitpid(pid, 0, 0);
	return 0;
}

/* ---- small helpers ------------------------------------------------------------------------------ */

static int list_fds(void) {
	DIR *dir = opendir("/proc/self/fd");
	if (!dir)
		fail("/proc/self/fd");
	for (struct dirent *e; (e = readdir(dir));)
		if (e->d_name[0] != '.' && atoi(e->d_name) != dirfd(dir))
			printf("%s\n", e->d_name);
	return 0;
}

/* Nanoseconds at a time that it has asked the scheduler for; sched_getattr(2). */
static int slice(void) {
	struct { unsigned size, policy; unsigned long long flags; int nice; unsigned priority;
		 unsigned long long runtime, deadline, period; } attributes = {0};
	if (syscall(SYS_sched_getattr, 0, &attributes, sizeof attributes, 0) != 0)
		fail("sched_getattr");
	printf("%llu\n", attributes.runtime);
	return 0;
}

/* Ignores the polite signals and waits: only SIGKILL ends it. */
static int stubborn(void) {
	for (int n = 1; n < 32; n++)
		signal(n, SIG_IGN);
	printf("ready\n");
	fflush(stdout);
	for (;;)
		pause();
}

/* A grandchild in a session of its own, with closed streams: what `setsid daemon &` leaves behind. */
static int daemonize(void) {
	if (fork() == 0) {
		setsid();
		if (fork() == 0) {
			for (int n = 0; n < 1024; n++)
				close(n);
			for (;;)
				pause();
		}
		_exit(0);
	}
	wait(0);
	printf("ready\n");
	return 0;
}

/* A mark is given with `#` inside, so that the searcher's own arguments do not hold what it seeks. */
static const char *plain(char *mark) {
	char *to = mark;
	for (char *from = mark; *from; from++)
		if (*from != '#')
			*to++ = *from;
	while (*to)
		*to++ = 0;
	return mark;
}

int main(int argc, char **argv) {
	const char *word = argc > 1 ? argv[1] : "";
	if (!strcmp(word, "try") && argc > 2)
		return try_attacks(argc - 2, argv + 2);
	if (!strcmp(word, "victim") && argc > 2)
		return victim(argv[2], argc > 3 ? argv[3] : 0);
	/* The value from the environment, so that it is not in argv. */
	if (!strcmp(word, "victim-env") && argc > 2)
		return victim(getenv(argv[2]) ? getenv(argv[2]) : "unset", argc > 3 ? argv[3] : 0);
	if (!strcmp(word, "spy") && argc > 3)
		return spy(atoi(argv[2]), plain(argv[3]));
	if (!strcmp(word, "spy-family") && argc > 3)
		return spy_family(atoi(argv[2]), plain(argv[3]));
	if (!strcmp(word, "census") && argc > 2)
		return census(plain(argv[2]));
	if (!strcmp(word, "abstract") && argc > 2)
		return abstract_read(argv[2]);
	if (!strcmp(word, "with-key") && argc > 4)
		return with_key(argv + 2);
	if (!strcmp(word, "find-key") && argc > 2)
		return find_key(argv[2]);
	if (!strcmp(word, "leak-fd") && argc > 3)
		return leak_fd(atoi(argv[2]), argv[3]);
	if (!strcmp(word, "hold") && argc > 3)
		return hold(argv[2], argv[3]);
	if (!strcmp(word, "memfd-rights") && argc > 2)
		return memfd_rights(atoi(argv[2]));
	if (!strcmp(word, "fds"))
		return list_fds();
	if (!strcmp(word, "slice"))
		return slice();
	if (!strcmp(word, "stubborn"))
		return stubborn();
	if (!strcmp(word, "daemonize"))
		return daemonize();
	if (!strcmp(word, "raise") && argc > 2) {
		raise(atoi(argv[2]));
		return 98;
	}
	fprintf(stderr, "probe: unknown word\n");
	return 99;
}
