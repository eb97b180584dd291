/* A disk that fails, preloaded into a training process: write() and fsync() of files under $FAILING_DISK_UNDER return
 * EIO while the file $FAILING_DISK_FLAG.write or $FAILING_DISK_FLAG.fsync exists.
 *
 *     cc -shared -fPIC -O1 -o failing_disk.so failing_disk.c -ldl
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/uio.h>
#include <unistd.h>

static int fails(int file, const char *call) {
    const char *under = getenv("FAILING_DISK_UNDER"), *flag = getenv("FAILING_DISK_FLAG");
    char name[PATH_MAX], path[PATH_MAX];
    ssize_t length;
    int before = errno, failing = 0;
    if (under && flag) {
        snprintf(name, sizeof name, "%s.%s", flag, call);
        if (access(name, F_OK) == 0) {
            snprintf(name, sizeof name, "/proc/self/fd/%d", file);
            length = readlink(name, path, sizeof path - 1);
            failing = length > 0 && (path[length] = 0, strncmp(path, under, strlen(under)) == 0);
        }
    }
    errno = failing ? EIO : before;
    return failing;
}

#define FAILING(type, name, kind, parameters, ...)                               \
    type name parameters {                                                       \
        static type (*real) parameters;                                          \
        if (!real) real = (type(*) parameters)dlsym(RTLD_NEXT, #name);           \
        return fails(file, kind) ? -1 : real(__VA_ARGS__);                       \
    }

FAILING(ssize_t, write, "write", (int file, const void *bytes, size_t n), file, bytes, n)
FAILING(ssize_t, writev, "write", (int file, const struct iovec *parts, int n), file, parts, n)
FAILING(ssize_t, pwrite64, "write", (int file, const void *bytes, size_t n, off64_t at), file, bytes, n, at)
FAILING(ssize_t, sendfile, "write", (int file, int from, off_t *at, size_t n), file, from, at, n)
FAILING(ssize_t, sendfile64, "write", (int file, int from, off64_t *at, size_t n), file, from, at, n)
FAILING(int, fsync, "fsync", (int file), file)
FAILING(int, fdatasync, "fsync", (int file), file)
