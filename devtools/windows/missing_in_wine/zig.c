// zig.exe: runs Linux's Zig for the target Windows, as Zig for Windows does not run in Wine.
//
// The command goes into a script of the shell: Wine cannot wait for a program of Linux, so the script
// leaves an exit code in a file. Variables: ZIG_LINUX, the program; ZIG_PREFIX, Wine's folder.
#include <stdio.h>
#include <stdlib.h>
#include <wchar.h>
#include <windows.h>

#define LENGTH 8192
#define WAIT_MS 600000

// Writes an argument in quotes, with a path of Windows as Linux has it.
static void put(FILE *script, const wchar_t *argument) {
    char text[LENGTH], *place = text;
    WideCharToMultiByte(CP_UTF8, 0, argument, -1, text, sizeof text, 0, 0);
    fputs(" '", script);
    int drive = text[0] | 32;
    if (drive >= 'a' && drive <= 'z' && text[1] == ':' && text[2] == '\\') {
        if (drive != 'z') fprintf(script, "%s/drive_%c", getenv("ZIG_PREFIX"), drive);
        place += 2;
        for (char *c = place; *c; c++) if (*c == '\\') *c = '/';
    }
    for (; *place; place++)
        if (*place == '\'') fputs("'\\''", script);
        else fputc(*place, script);
    fputc('\'', script);
}

static const wchar_t *with(wchar_t *name, const wchar_t *base, const wchar_t *suffix) {
    wcscpy(name, base);
    return wcscat(name, suffix);
}

// Copies a file to a stream, and deletes it.
static void take(const wchar_t *name, FILE *to) {
    char bytes[4096];
    size_t count;
    FILE *file = _wfopen(name, L"rb");
    if (!file) return;
    while ((count = fread(bytes, 1, sizeof bytes, file)) > 0) fwrite(bytes, 1, count, to);
    fclose(file);
    _wremove(name);
}

int wmain(int count, wchar_t **arguments) {
    wchar_t folder[MAX_PATH], base[MAX_PATH], name[MAX_PATH + 8];
    GetTempPathW(MAX_PATH, folder);
    GetTempFileNameW(folder, L"zig", 0, base);
    FILE *script = _wfopen(base, L"wb");
    fprintf(script, "cd /\nexport HOME=/tmp PATH=/usr/bin:/bin\n"
                    "export ZIG_GLOBAL_CACHE_DIR=%s/zig ZIG_LOCAL_CACHE_DIR=%s/zig\n"
                    "unset TMPDIR TEMP TMP\n'%s'",
            getenv("ZIG_PREFIX"), getenv("ZIG_PREFIX"), getenv("ZIG_LINUX"));
    for (int i = 1; i < count; i++) {
        put(script, arguments[i]);
        if (i == 1 && !wcscmp(arguments[1], L"c++")) fputs(" -target x86_64-windows-gnu", script);
    }
    fputs(" >", script);
    put(script, with(name, base, L".out"));
    fputs(" 2>", script);
    put(script, with(name, base, L".err"));
    fputs("\necho $? >", script);
    put(script, with(name, base, L".part"));
    fputs("\nmv", script);
    put(script, name);
    put(script, with(name, base, L".code"));
    fclose(script);

    char path[LENGTH], command[LENGTH + 64];
    WideCharToMultiByte(CP_UTF8, 0, base, -1, path, sizeof path, 0, 0);
    for (char *c = path; *c; c++) if (*c == '\\') *c = '/';
    snprintf(command, sizeof command, "Z:\\bin\\sh %s/drive_c%s", getenv("ZIG_PREFIX"), path + 2);
    STARTUPINFOA start = {sizeof start};
    PROCESS_INFORMATION process = {0};
    if (!CreateProcessA("Z:\\bin\\sh", command, 0, 0, FALSE, 0, 0, "Z:\\", &start, &process))
        return fprintf(stderr, "cannot run sh: %lu\n", GetLastError()), 97;
    int code = 96;
    for (int waited = 0; waited < WAIT_MS; waited += 50, Sleep(50)) {
        FILE *file = _wfopen(name, L"rb");
        if (!file) continue;
        int is_read = fscanf(file, "%d", &code);
        fclose(file);
        if (is_read == 1) break;
    }
    _wremove(name);
    take(with(name, base, L".out"), stdout);
    take(with(name, base, L".err"), stderr);
    _wremove(base);
    return code;
}
