// What a kernel of ops/kernels/source/cuda needs to be a C++ function on a CPU. Threads are fibers that take turns at each shuffle,
// by jumps: swapcontext asks the system for the mask of signals each time.
#undef _FORTIFY_SOURCE  // it takes a jump to another stack for a mistake
#include <math.h>
#include <setjmp.h>
#include <string.h>
#include <ucontext.h>
#include <utility>

#define __device__
#define __global__

struct alignas(16) uint4 { unsigned x, y, z, w; };
struct Dimensions { unsigned x; };

const unsigned MAX_THREADS = 256, STACK_BYTES = 1 << 16;

static Dimensions threadIdx, blockIdx, blockDim;
static ucontext_t fibers[MAX_THREADS];
static jmp_buf scheduler, positions[MAX_THREADS];
static char stacks[MAX_THREADS][STACK_BYTES];
static float exchanged[MAX_THREADS];
static int warp;  // threads that can exchange
static bool started[MAX_THREADS], finished[MAX_THREADS];

static int min(int a, int b) { return a < b ? a : b; }

static unsigned __float_as_uint(float value) { unsigned bits; memcpy(&bits, &value, 4); return bits; }
static float __uint_as_float(unsigned bits) { float value; memcpy(&value, &bits, 4); return value; }
// CUDA's, which are PTX. Templates, because HIP has functions of these names.
template <class Bits>
static float float_of_half(Bits bits) { _Float16 half; memcpy(&half, &bits, 2); return half; }
template <class Number>
static unsigned short half_of_float(Number value) {
    _Float16 half = value;
    unsigned short bits;
    memcpy(&bits, &half, 2);
    return bits;
}

static void take_turns() {
    if (!_setjmp(positions[threadIdx.x])) _longjmp(scheduler, 1);
}

// Until the current thread takes turns.
static void resume() {
    if (_setjmp(scheduler)) return;
    if (started[threadIdx.x]) _longjmp(positions[threadIdx.x], 1);
    started[threadIdx.x] = true;
    setcontext(&fibers[threadIdx.x]);
}

static float __shfl_xor(float value, int distance) {
    if (distance >= warp) __builtin_trap();
    exchanged[threadIdx.x] = value;
    take_turns();
    float other = exchanged[threadIdx.x ^ distance];
    take_turns();
    return other;
}

static float __shfl_xor_sync(unsigned lanes, float value, int distance) {
    if (lanes != 0xFFFFFFFF || warp != 32) __builtin_trap();
    return __shfl_xor(value, distance);
}

template <class... Arguments, std::size_t... I>
static void call(void (*kernel)(Arguments...), void** arguments, std::index_sequence<I...>) {
    kernel(*(Arguments*)arguments[I]...);
}

// cuLaunchKernel's part: arguments points at each argument of the kernel.
template <class... Arguments>
static void launch_on_cpu(void (*kernel)(Arguments...), unsigned blocks, unsigned threads, void** arguments) {
    static void (*the_kernel)(Arguments...);
    static void** the_arguments;
    the_kernel = kernel;
    the_arguments = arguments;
    void (*run)() = [] {
        for (;;) {  // once for each block
            call(the_kernel, the_arguments, std::index_sequence_for<Arguments...>());
            finished[threadIdx.x] = true;
            take_turns();
        }
    };
    blockDim.x = threads;
    for (unsigned thread = 0; thread < threads; thread++) {
        started[thread] = false;
        getcontext(&fibers[thread]);
        fibers[thread].uc_stack.ss_sp = stacks[thread];
        fibers[thread].uc_stack.ss_size = STACK_BYTES;
        makecontext(&fibers[thread], run, 0);
    }
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++) {
        memset(finished, 0, sizeof(finished));
        for (unsigned running = threads; running;) {
            running = 0;
            for (threadIdx.x = 0; threadIdx.x < threads; threadIdx.x++) {
                if (finished[threadIdx.x]) continue;
                resume();
                running += !finished[threadIdx.x];
            }
        }
    }
}

#define EXPORT(kernel, threads_of_warp) \
    extern "C" void launch_##kernel(unsigned blocks, unsigned threads, void** arguments) { \
        warp = threads_of_warp; \
        launch_on_cpu(kernel, blocks, threads, arguments); \
    }
