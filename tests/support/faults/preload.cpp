// Makes the system's calls on files fail, in a process that is started with this as LD_PRELOAD: whoever makes them, Python, torch
// or a library in Rust. arm(part, nth, error): the nth call from now on a file whose path has `part` in it fails with `error`;
// nth 0: none does. counted(): how many such calls there were since.
#include <cerrno>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <dlfcn.h>
#include <fcntl.h>
#include <sys/types.h>
#include <unistd.h>

static char part[4096];
static long nth, count;
static int error_number;

extern "C" void arm(const char* path, long number, int error) {
    strncpy(part, path, sizeof part - 1);
    nth = number, count = 0, error_number = error;
}

extern "C" long counted() { return count; }

static bool fails(const char* path) {
    if (!part[0] || !path || !strstr(path, part) || ++count != nth) return false;
    errno = error_number;
    return true;
}

static bool fails(int descriptor) {
    if (!part[0]) return false;
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return false;
    path[length] = 0;
    return fails(path);
}

#define REAL(name) ((decltype(&name)) dlsym(RTLD_NEXT, #name))
#define ON_PATH(result, name, parameters, arguments, path) \
    extern "C" result name parameters { return fails(path) ? -1 : REAL(name) arguments; }

#define OPEN(name) \
    extern "C" int name(const char* path, int flags, ...) { \
        va_list list; va_start(list, flags); int mode = va_arg(list, int); va_end(list); \
        return fails(path) ? -1 : REAL(name)(path, flags, mode); }
#define OPENAT(name) \
    extern "C" int name(int folder, const char* path, int flags, ...) { \
        va_list list; va_start(list, flags); int mode = va_arg(list, int); va_end(list); \
        return fails(path) ? -1 : REAL(name)(folder, path, flags, mode); }

OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)
ON_PATH(ssize_t, read, (int file, void* data, size_t size), (file, data, size), file)
ON_PATH(ssize_t, pread64, (int file, void* data, size_t size, off64_t at), (file, data, size, at), file)
ON_PATH(ssize_t, write, (int file, const void* data, size_t size), (file, data, size), file)
ON_PATH(ssize_t, pwrite64, (int file, const void* data, size_t size, off64_t at), (file, data, size, at), file)
ON_PATH(int, fsync, (int file), (file), file)
ON_PATH(int, ftruncate64, (int file, off64_t size), (file, size), file)
ON_PATH(int, rename, (const char* from, const char* to), (from, to), to)

extern "C" int posix_fallocate64(int file, off64_t start, off64_t size) {
    return fails(file) ? error_number : REAL(posix_fallocate64)(file, start, size);
}

extern "C" void* mmap(void* at, size_t size, int protection, int flags, int file, off_t offset) noexcept {
    return file >= 0 && fails(file) ? (void*) -1 : REAL(mmap)(at, size, protection, flags, file, offset);
}

extern "C" void* mmap64(void* at, size_t size, int protection, int flags, int file, off64_t offset) noexcept {
    return file >= 0 && fails(file) ? (void*) -1 : REAL(mmap64)(at, size, protection, flags, file, offset);
}
