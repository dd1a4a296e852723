/* Preloaded into one process: its wall clock is stepped by as many seconds as the file named by
 * SHIM_OFFSET holds (8 bytes, of this machine), now and whenever that changes. The file is mapped once, so
 * that a process which may open nothing any more still sees it.
 *
 * What this can show: everything that asks the C library for the time, which is how Rust's standard
 * library and SQLite do it. These symbols stand before glibc's own, so that it does not matter that glibc
 * takes its time from the vDSO. What it cannot: a program that calls the vDSO or the kernel itself, and
 * timers that the kernel runs by the wall clock. CLOCK_BOOTTIME and CLOCK_MONOTONIC are left alone, as a
 * step of the real clock leaves them.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static const volatile int64_t *offset;
static int (*real)(clockid_t, struct timespec *);

__attribute__((constructor)) static void begin(void) {
	const char *path = getenv("SHIM_OFFSET");
	int fd = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
	void *at = fd < 0 ? MAP_FAILED : mmap(0, sizeof *offset, PROT_READ, MAP_SHARED, fd, 0);
	if (fd >= 0)
		close(fd);
	real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
	if (at == MAP_FAILED || !real)
		abort();
	offset = at;
}

int clock_gettime(clockid_t id, struct timespec *t) {
	if (!real)
		begin();
	int result = real(id, t);
	if (result == 0 && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE))
		t->tv_sec += *offset;
	return result;
}

int gettimeofday(struct timeval *restrict t, void *restrict zone) {
	struct timespec now;
	(void)zone;
	if (clock_gettime(CLOCK_REALTIME, &now) != 0)
		return -1;
	t->tv_sec = now.tv_sec;
	t->tv_usec = now.tv_nsec / 1000;
	return 0;
}

time_t time(time_t *to) {
	struct timespec now;
	clock_gettime(CLOCK_REALTIME, &now);
	if (to)
		*to = now.tv_sec;
	return now.tv_sec;
}
