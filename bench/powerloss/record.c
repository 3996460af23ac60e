/* Records what a process does to the files below POWERLOSS_ROOT, in order, in POWERLOSS_LOG.
 *
 * For LD_PRELOAD, Linux only. A record is a struct record, then its two texts: paths below the
 * root, or the data of a write. It is written once the call has succeeded, and under one lock with
 * the call, so that the log has the order in which the kernel saw the calls. What other calls
 * change (copy_file_range, a writable map, a hard link) is not seen: whoever reads the log has to
 * compare its outcome with the directory.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

struct record {
    char kind; /* see Op in recording.py */
    uint8_t durable; /* a write through O_DSYNC */
    uint16_t none;
    uint32_t lengths[2];
    uint32_t zero;
    uint64_t node; /* inode number */
    uint64_t at; /* offset of a write, size of a truncation */
};

static int log_fd = -1;
static char root[PATH_MAX];
static size_t root_length;
static pthread_mutex_t order = PTHREAD_MUTEX_INITIALIZER;

/* A path below the root without the root, and NULL for every other. */
static const char *below(const char *path) {
    if (log_fd < 0 || strncmp(path, root, root_length)) return NULL;
    if (!path[root_length]) return "";
    return path[root_length] == '/' ? path + root_length + 1 : NULL;
}

static const char *path_of(int fd, char *room) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, room, PATH_MAX - 1);
    room[length < 0 ? 0 : length] = 0;
    return room;
}

static const char *resolve(int folder, const char *path, char *room) {
    if (path[0] == '/') return below(path);
    if (folder != AT_FDCWD) path_of(folder, room);
    else if (!getcwd(room, PATH_MAX)) return NULL;
    size_t length = strlen(room);
    snprintf(room + length, PATH_MAX, "/%s", path);
    return below(room);
}

static int inside(int fd) {
    char room[PATH_MAX];
    return log_fd >= 0 && below(path_of(fd, room)) != NULL;
}

static uint64_t node_of(int fd, const char *path) {
    struct stat found;
    int failed = path ? fstatat(fd, path, &found, AT_SYMLINK_NOFOLLOW) : fstat(fd, &found);
    return failed ? 0 : found.st_ino;
}

static void put(const void *data, size_t length) {
    const char *from = data;
    while (length) {
        ssize_t done = syscall(SYS_write, log_fd, from, length);
        if (done < 0) {
            if (errno == EINTR) continue;
            abort(); /* a log with a hole would be believed */
        }
        from += done;
        length -= done;
    }
}

static void note(char kind, int durable, uint64_t node, uint64_t at, const char *first,
                 size_t length, const char *second) {
    int error = errno;
    size_t more = second ? strlen(second) : 0;
    struct record record = {kind, durable, 0, {length, more}, 0, node, at};
    put(&record, sizeof record);
    put(first, length);
    put(second, more);
    errno = error;
}

__attribute__((constructor)) static void start(void) {
    const char *path = getenv("POWERLOSS_LOG"), *below = getenv("POWERLOSS_ROOT");
    if (!path || !below || !realpath(below, root)) return;
    root_length = strlen(root);
    log_fd = syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
    if (log_fd >= 0) note('d', 0, node_of(AT_FDCWD, root), 0, "", 0, NULL);
}

#define LOCKED(call) \
    pthread_mutex_lock(&order); \
    long result = (call);

#define DONE \
    pthread_mutex_unlock(&order); \
    return result;

/* Opening. */

static int opened(int folder, const char *path, int flags, mode_t mode) {
    char room[2 * PATH_MAX];
    const char *name = flags & (O_CREAT | O_TRUNC) ? resolve(folder, path, room) : NULL;
    if (!name) return syscall(SYS_openat, folder, path, flags, mode);
    pthread_mutex_lock(&order);
    int there = !faccessat(folder, path, F_OK, 0);
    long result = syscall(SYS_openat, folder, path, flags, mode);
    if (result >= 0 && !there) note('c', 0, node_of(result, NULL), 0, name, strlen(name), NULL);
    else if (result >= 0 && flags & O_TRUNC) note('t', 0, node_of(result, NULL), 0, "", 0, NULL);
    DONE
}

static mode_t mode_in(int flags, va_list rest) {
    return flags & O_CREAT || (flags & O_TMPFILE) == O_TMPFILE ? va_arg(rest, int) : 0;
}

int openat(int folder, const char *path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    mode_t mode = mode_in(flags, rest);
    va_end(rest);
    return opened(folder, path, flags, mode);
}

int open(const char *path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    mode_t mode = mode_in(flags, rest);
    va_end(rest);
    return opened(AT_FDCWD, path, flags, mode);
}

int openat64(int, const char *, int, ...) __attribute__((alias("openat")));
int open64(const char *, int, ...) __attribute__((alias("open")));

/* Writing. */

static void wrote(int fd, const struct iovec *parts, int count, off_t at, ssize_t done) {
    int durable = (fcntl(fd, F_GETFL) & O_DSYNC) != 0;
    for (int part = 0; part < count && done > 0; part++) {
        size_t length = parts[part].iov_len < (size_t)done ? parts[part].iov_len : (size_t)done;
        note('w', durable, node_of(fd, NULL), at, parts[part].iov_base, length, NULL);
        at += length;
        done -= length;
    }
}

/* Where a write without an offset has ended is where it began, and what it wrote. */
static off_t began(int fd, ssize_t done) { return lseek(fd, 0, SEEK_CUR) - done; }

ssize_t pwrite(int fd, const void *data, size_t length, off_t at) {
    if (!inside(fd)) return syscall(SYS_pwrite64, fd, data, length, at);
    struct iovec part = {(void *)data, length};
    LOCKED(syscall(SYS_pwrite64, fd, data, length, at))
    wrote(fd, &part, 1, at, result);
    DONE
}

ssize_t write(int fd, const void *data, size_t length) {
    if (!inside(fd)) return syscall(SYS_write, fd, data, length);
    struct iovec part = {(void *)data, length};
    LOCKED(syscall(SYS_write, fd, data, length))
    if (result > 0) wrote(fd, &part, 1, began(fd, result), result);
    DONE
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
    if (!inside(fd)) return syscall(SYS_writev, fd, parts, count);
    LOCKED(syscall(SYS_writev, fd, parts, count))
    if (result > 0) wrote(fd, parts, count, began(fd, result), result);
    DONE
}

ssize_t pwritev2(int fd, const struct iovec *parts, int count, off_t at, int flags) {
    if (!inside(fd)) return syscall(SYS_pwritev2, fd, parts, count, at, 0, flags);
    LOCKED(syscall(SYS_pwritev2, fd, parts, count, at, 0, flags))
    wrote(fd, parts, count, at, result);
    DONE
}

ssize_t pwritev(int fd, const struct iovec *parts, int count, off_t at) {
    return pwritev2(fd, parts, count, at, 0);
}

ssize_t pwrite64(int, const void *, size_t, off64_t) __attribute__((alias("pwrite")));
ssize_t pwritev64(int, const struct iovec *, int, off64_t) __attribute__((alias("pwritev")));
ssize_t pwritev64v2(int, const struct iovec *, int, off64_t, int)
    __attribute__((alias("pwritev2")));

int ftruncate(int fd, off_t size) {
    if (!inside(fd)) return syscall(SYS_ftruncate, fd, size);
    LOCKED(syscall(SYS_ftruncate, fd, size))
    if (!result) note('t', 0, node_of(fd, NULL), size, "", 0, NULL);
    DONE
}

int truncate(const char *path, off_t size) {
    char room[2 * PATH_MAX];
    if (!resolve(AT_FDCWD, path, room)) return syscall(SYS_truncate, path, size);
    LOCKED(syscall(SYS_truncate, path, size))
    if (!result) note('t', 0, node_of(AT_FDCWD, path), size, "", 0, NULL);
    DONE
}

int ftruncate64(int, off64_t) __attribute__((alias("ftruncate")));
int truncate64(const char *, off64_t) __attribute__((alias("truncate")));

/* Syncing: noted when it has ended, for only then is anything sure. */

static int synced(int fd, long number) {
    if (!inside(fd)) return syscall(number, fd);
    LOCKED(syscall(number, fd))
    if (!result) note('s', 0, node_of(fd, NULL), 0, "", 0, NULL);
    DONE
}

int fsync(int fd) { return synced(fd, SYS_fsync); }
int fdatasync(int fd) { return synced(fd, SYS_fdatasync); }

/* Names. */

int mkdirat(int folder, const char *path, mode_t mode) {
    char room[2 * PATH_MAX];
    const char *name = resolve(folder, path, room);
    if (!name) return syscall(SYS_mkdirat, folder, path, mode);
    LOCKED(syscall(SYS_mkdirat, folder, path, mode))
    if (!result) note('d', 0, node_of(folder, path), 0, name, strlen(name), NULL);
    DONE
}

int unlinkat(int folder, const char *path, int flags) {
    char room[2 * PATH_MAX];
    const char *name = resolve(folder, path, room);
    if (!name) return syscall(SYS_unlinkat, folder, path, flags);
    LOCKED(syscall(SYS_unlinkat, folder, path, flags))
    if (!result) note('u', 0, 0, 0, name, strlen(name), NULL);
    DONE
}

int renameat(int folder, const char *from, int other, const char *to) {
    char rooms[2][2 * PATH_MAX];
    const char *old = resolve(folder, from, rooms[0]), *new = resolve(other, to, rooms[1]);
    if (!old && !new) return syscall(SYS_renameat2, folder, from, other, to, 0);
    LOCKED(syscall(SYS_renameat2, folder, from, other, to, 0))
    if (!result) note('r', 0, 0, 0, old ? old : "?", old ? strlen(old) : 1, new ? new : "?");
    DONE
}

int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }
int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }
int rename(const char *from, const char *to) { return renameat(AT_FDCWD, from, AT_FDCWD, to); }
