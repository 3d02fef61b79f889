/* Preloaded into a run: counts its operations on files below one folder and strikes at one of them. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { NOTHING, KILL, HALF, TERM, INTERRUPT_TWICE, IO_ERROR, IO_ERRORS, FULL_ONCE, FULL };

static char folder[PATH_MAX];
static size_t folder_length;
static long count, target;
static int mode, journal = -1;

/* From now on operations below `where` are counted; number `at` (from 1) meets `how`; each is noted in `log`. */
void strike_arm(const char *where, long at, int how, const char *log) {
    int (*real_open)(const char *, int, ...) = dlsym(RTLD_NEXT, "open");
    snprintf(folder, sizeof folder, "%s", where);
    folder_length = strlen(folder);
    count = 0, target = at, mode = how;
    journal = real_open(log, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
}

static int below(int at, const char *path, char *whole) {
    if (!folder_length || !path) return 0;
    if (path[0] == '/') {
        snprintf(whole, PATH_MAX, "%s", path);
    } else {
        char base[PATH_MAX / 2] = "", name[64] = "/proc/self/cwd";
        if (at != AT_FDCWD) snprintf(name, sizeof name, "/proc/self/fd/%d", at);
        ssize_t length = readlink(name, base, sizeof base - 1);
        if (length < 0) return 0;
        base[length] = 0;
        snprintf(whole, PATH_MAX, "%s/%.2000s", base, path);
    }
    return !strncmp(whole, folder, folder_length) && (whole[folder_length] == '/' || !whole[folder_length]);
}

static int handle_below(int handle, char *whole) {
    char name[64];
    if (!folder_length) return 0;
    snprintf(name, sizeof name, "/proc/self/fd/%d", handle);
    ssize_t length = readlink(name, whole, PATH_MAX - 1);
    if (length < 0) return 0;
    whole[length] = 0;
    return !strncmp(whole, folder, folder_length) && (whole[folder_length] == '/' || !whole[folder_length]);
}

/* Counts one operation. Returns 0 to go on, an errno to fail with, -1 to do half of it and die. */
static int strike(const char *what, const char *path, int writes) {
    static ssize_t (*real_write)(int, const void *, size_t);
    if (!real_write) real_write = dlsym(RTLD_NEXT, "write");
    long number = __atomic_add_fetch(&count, 1, __ATOMIC_SEQ_CST);
    char line[PATH_MAX + 32];
    int length = snprintf(line, sizeof line, "%s\t%s\n", what, path);
    if (journal >= 0) real_write(journal, line, (size_t)length);
    int later = mode == FULL || mode == IO_ERRORS;
    if (number != target && !(later && target && number > target)) return 0;
    switch (mode) {
        case KILL: kill(getpid(), SIGKILL); pause(); return 0;
        case HALF: return -1;
        case TERM: kill(getpid(), SIGTERM); return 0;
        case INTERRUPT_TWICE: kill(getpid(), SIGINT); kill(getpid(), SIGINT); return 0;
        case IO_ERROR: case IO_ERRORS: return EIO;
        case FULL_ONCE: case FULL: return writes ? ENOSPC : 0;
        default: return 0;
    }
}

#define REAL(type, name, ...) static type (*real)(__VA_ARGS__); if (!real) real = dlsym(RTLD_NEXT, #name)
#define DIE() do { kill(getpid(), SIGKILL); pause(); } while (0)
/* One operation: failed before, or done and then the process killed. */
#define ACT(type, what, path, writes, call) \
    int verdict = strike(what, path, writes); \
    if (verdict > 0) { errno = verdict; return (type)-1; } \
    type result = call; \
    if (verdict < 0) DIE(); \
    return result

#define OPENS(name) \
    int name(const char *path, int flags, ...) { \
        REAL(int, name, const char *, int, ...); \
        va_list rest; va_start(rest, flags); \
        mode_t bits = flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        char whole[PATH_MAX]; \
        if (!(flags & (O_WRONLY | O_RDWR | O_CREAT)) || !below(AT_FDCWD, path, whole)) return real(path, flags, bits); \
        ACT(int, "open", whole, 1, real(path, flags, bits)); \
    }
OPENS(open)
OPENS(open64)

#define OPENS_AT(name) \
    int name(int at, const char *path, int flags, ...) { \
        REAL(int, name, int, const char *, int, ...); \
        va_list rest; va_start(rest, flags); \
        mode_t bits = flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        char whole[PATH_MAX]; \
        if (!(flags & (O_WRONLY | O_RDWR | O_CREAT)) || !below(at, path, whole)) return real(at, path, flags, bits); \
        ACT(int, "open", whole, 1, real(at, path, flags, bits)); \
    }
OPENS_AT(openat)
OPENS_AT(openat64)

ssize_t write(int handle, const void *bytes, size_t size) {
    REAL(ssize_t, write, int, const void *, size_t);
    char whole[PATH_MAX];
    if (!handle_below(handle, whole)) return real(handle, bytes, size);
    ACT(ssize_t, "write", whole, 1, real(handle, bytes, verdict < 0 ? size / 2 : size));
}

ssize_t writev(int handle, const struct iovec *parts, int number) {
    REAL(ssize_t, writev, int, const struct iovec *, int);
    char whole[PATH_MAX];
    if (!handle_below(handle, whole)) return real(handle, parts, number);
    ACT(ssize_t, "write", whole, 1, real(handle, parts, verdict < 0 ? (number + 1) / 2 : number));
}

ssize_t sendfile(int to, int from, off_t *start, size_t size) {
    REAL(ssize_t, sendfile, int, int, off_t *, size_t);
    char whole[PATH_MAX];
    if (!handle_below(to, whole)) return real(to, from, start, size);
    ACT(ssize_t, "write", whole, 1, real(to, from, start, verdict < 0 ? size / 2 : size));
}

#define SYNCS(name) \
    int name(int handle) { \
        REAL(int, name, int); \
        char whole[PATH_MAX]; \
        if (!handle_below(handle, whole)) return real(handle); \
        ACT(int, "sync", whole, 1, real(handle)); \
    }
SYNCS(fsync)
SYNCS(fdatasync)

#define ON_PATH(name, what, writes) \
    int name(const char *path) { \
        REAL(int, name, const char *); \
        char whole[PATH_MAX]; \
        if (!below(AT_FDCWD, path, whole)) return real(path); \
        ACT(int, what, whole, writes, real(path)); \
    }
ON_PATH(unlink, "remove", 0)
ON_PATH(rmdir, "remove", 0)

#define WITH_MODE(name, what, writes) \
    int name(const char *path, mode_t bits) { \
        REAL(int, name, const char *, mode_t); \
        char whole[PATH_MAX]; \
        if (!below(AT_FDCWD, path, whole)) return real(path, bits); \
        ACT(int, what, whole, writes, real(path, bits)); \
    }
WITH_MODE(mkdir, "mkdir", 1)
WITH_MODE(chmod, "chmod", 0)

int unlinkat(int at, const char *path, int flags) {
    REAL(int, unlinkat, int, const char *, int);
    char whole[PATH_MAX];
    if (!below(at, path, whole)) return real(at, path, flags);
    ACT(int, "remove", whole, 0, real(at, path, flags));
}

int rename(const char *from, const char *to) {
    REAL(int, rename, const char *, const char *);
    char whole[PATH_MAX];
    if (!below(AT_FDCWD, to, whole)) return real(from, to);
    ACT(int, "rename", whole, 1, real(from, to));
}

int renameat(int at, const char *from, int to_at, const char *to) {
    REAL(int, renameat, int, const char *, int, const char *);
    char whole[PATH_MAX];
    if (!below(to_at, to, whole)) return real(at, from, to_at, to);
    ACT(int, "rename", whole, 1, real(at, from, to_at, to));
}

int ftruncate(int handle, off_t size) {
    REAL(int, ftruncate, int, off_t);
    char whole[PATH_MAX];
    if (!handle_below(handle, whole)) return real(handle, size);
    ACT(int, "truncate", whole, 1, real(handle, size));
}

int ftruncate64(int handle, off64_t size) {
    REAL(int, ftruncate64, int, off64_t);
    char whole[PATH_MAX];
    if (!handle_below(handle, whole)) return real(handle, size);
    ACT(int, "truncate", whole, 1, real(handle, size));
}
