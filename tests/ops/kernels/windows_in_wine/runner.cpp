// Calls functions of DLLs, as tests/support/kernels_in_wine.py asks for them on the standard input.
// All numbers have 64 bits.
#include <fcntl.h>
#include <io.h>
#include <stdio.h>
#include <stdlib.h>
#include <windows.h>

typedef long long Number;

static void read(void* to, size_t size) {
    if (fread(to, 1, size, stdin) != size) exit(0);  // the test has ended
}

static Number number() {
    Number value;
    read(&value, sizeof value);
    return value;
}

static char* text() {
    Number size = number();
    char* characters = (char*)malloc(size + 1);
    read(characters, size);
    characters[size] = 0;
    return characters;
}

int main() {
    _setmode(_fileno(stdin), _O_BINARY);
    _setmode(_fileno(stdout), _O_BINARY);
    for (;;) {
        char *path = text(), *name = text();
        Number count = number();
        char* buffers[64];
        Number sizes[64];
        for (int i = 0; i < count; i++) {
            sizes[i] = number();
            buffers[i] = (char*)malloc(sizes[i]);
            read(buffers[i], sizes[i]);
        }
        for (Number pointers = number(); pointers; pointers--) {
            char** at = (char**)(buffers[number()] + number());
            *at = buffers[number()];
            *at += number();
        }
        Number arguments[16] = {}, argument_count = number();
        for (int i = 0; i < argument_count; i++) {
            Number buffer = number(), value = number();
            arguments[i] = buffer < 0 ? value : (Number)(buffers[buffer] + value);
        }
        HMODULE library = LoadLibraryA(path);
        auto function = library ? (Number(*)(...))GetProcAddress(library, name) : 0;
        if (!function) {
            fprintf(stderr, "%s of %s: error %lu\n", name, path, GetLastError());
            return 1;
        }
        const Number* a = arguments;
        function(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12],
                 a[13], a[14], a[15]);
        for (int i = 0; i < count; i++) {
            fwrite(buffers[i], 1, sizes[i], stdout);
            free(buffers[i]);
        }
        fflush(stdout);
        free(path);
        free(name);
    }
}
