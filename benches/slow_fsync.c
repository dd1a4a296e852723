/* A disk that is slow or fails, for one process: LD_PRELOAD it.
 *
 * SLOW_FSYNC_US=N   every fsync and fdatasync takes N microseconds, or as long as the disk does if that is
 *                   longer.
 * FAULTY_DISK=FILE  while FILE is there and begins with `s`, syncs fail with EIO; with `w`, writes to
 *                   files fail with EROFS too.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static long delay_us;
static const char *faults;

__attribute__((constructor)) static void begin(void)
{
    const char *text = getenv("SLOW_FSYNC_US");
    delay_us = text ? atol(text) : 0;
    faults = getenv("FAULTY_DISK");
}

static int faulty(char kind)
{
    char found = 0;
    int fd, saved = errno;
    if (!faults)
        return 0;
    fd = (int)syscall(SYS_openat, AT_FDCWD, faults, O_RDONLY | O_CLOEXEC);
    if (fd >= 0) {
        if (syscall(SYS_read, fd, &found, 1) != 1)
            found = 0;
        syscall(SYS_close, fd);
    }
    errno = saved;
    return found == kind || (kind == 's' && found == 'w');
}

static int synced(long call, int fd)
{
    struct timespec until;
    int result, saved;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_nsec += delay_us * 1000;
    until.tv_sec += until.tv_nsec / 1000000000;
    until.tv_nsec %= 1000000000;
    result = (int)syscall(call, fd);
    saved = errno;
    if (delay_us)
        clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL);
    errno = saved;
    if (faulty('s')) {
        errno = EIO;
        return -1;
    }
    return result;
}

int fsync(int fd) { return synced(SYS_fsync, fd); }
int fdatasync(int fd) { return synced(SYS_fdatasync, fd); }

static int refused(int fd)
{
    struct stat found;
    if (faults && fd > 2 && fstat(fd, &found) == 0 && S_ISREG(found.st_mode) && faulty('w')) {
        errno = EROFS;
        return 1;
    }
    return 0;
}

ssize_t write(int fd, const void *from, size_t size)
{
    return refused(fd) ? -1 : syscall(SYS_write, fd, from, size);
}

ssize_t pwrite64(int fd, const void *from, size_t size, off64_t at)
{
    return refused(fd) ? -1 : syscall(SYS_pwrite64, fd, from, size, at);
}

ssize_t pwrite(int fd, const void *from, size_t size, off_t at)
{
    return pwrite64(fd, from, size, at);
}
