// Hides instruction sets from every library of a process and of those that it starts: preloaded,
// it has the CPU fault on CPUID and answers in its place. LIMITED_CPU says what is hidden.

#define _GNU_SOURCE
#include <cpuid.h>
#include <dlfcn.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

enum { ARCH_SET_CPUID = 0x1012, CANNOT_LIMIT = 99 };

typedef struct {
    unsigned leaf, subleaf, ebx, ecx, edx, eax;  // hidden bits
} Hidden;

static const Hidden amx_and_fp16[] = {
    {7, 0, 0, 0, 0xF << 22, 0},      // AMX-BF16, AVX512-FP16, AMX-TILE, AMX-INT8
    {7, 1, 0, 0, 1 << 19, 1 << 21},  // AVX10, AMX-FP16
    {0}};
static const Hidden avx512[] = {
    // F, DQ, IFMA, PF, ER, CD, BW, VL; VBMI, VBMI2, GFNI, VAES, VPCLMULQDQ, VNNI, BITALG, VPOPCNTDQ;
    // 4VNNIW, 4FMAPS, VP2INTERSECT and the above
    {7, 0, 0xDC230000, 0x5F42, 0x10C | 0xF << 22, 0},
    // of VEX: AVX-VNNI, AVX512-BF16, AMX-FP16, AVX-IFMA; AVX-VNNI-INT8, -NE-CONVERT, -INT16, AVX10
    {7, 1, 0, 0, 1 << 4 | 1 << 5 | 1 << 10 | 1 << 19, 1 << 4 | 1 << 5 | 1 << 21 | 1 << 23},
    {0}};
static const Hidden* hidden;
static int (*set_action)(int, const struct sigaction*, struct sigaction*);

static void set_cpuid(int allowed) {
    if (syscall(SYS_arch_prctl, ARCH_SET_CPUID, allowed)) _exit(CANNOT_LIMIT);
}

static void answer(int number, siginfo_t* info, void* context) {
    greg_t* registers = ((ucontext_t*)context)->uc_mcontext.gregs;
    if (info->si_code != SI_KERNEL || memcmp((void*)registers[REG_RIP], "\x0F\xA2", 2)) {
        struct sigaction none = {.sa_handler = SIG_DFL};  // another fault: it comes again
        set_action(number, &none, 0);
        return;
    }
    unsigned leaf = registers[REG_RAX], subleaf = registers[REG_RCX], eax, ebx, ecx, edx;
    set_cpuid(1);
    __cpuid_count(leaf, subleaf, eax, ebx, ecx, edx);
    set_cpuid(0);
    for (const Hidden* part = hidden; part->leaf; part++)
        if (part->leaf == leaf && part->subleaf == subleaf) {
            eax &= ~part->eax, ebx &= ~part->ebx, ecx &= ~part->ecx, edx &= ~part->edx;
        }
    registers[REG_RAX] = eax, registers[REG_RBX] = ebx;
    registers[REG_RCX] = ecx, registers[REG_RDX] = edx;
    registers[REG_RIP] += 2;
}

__attribute__((constructor)) static void limit(void) {
    hidden = strcmp(getenv("LIMITED_CPU"), "avx2") ? amx_and_fp16 : avx512;
    struct sigaction action = {.sa_sigaction = answer,
                               .sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK};
    set_action = dlsym(RTLD_NEXT, "sigaction");
    set_action(SIGSEGV, &action, 0);
    set_cpuid(0);
}

// Compilers would take the signal for themselves.
int sigaction(int number, const struct sigaction* action, struct sigaction* before) {
    return set_action(number, number == SIGSEGV ? 0 : action, before);
}

sighandler_t signal(int number, sighandler_t handler) {
    struct sigaction action = {.sa_handler = handler, .sa_flags = SA_RESTART}, before;
    return sigaction(number, &action, &before) ? SIG_ERR : before.sa_handler;
}
