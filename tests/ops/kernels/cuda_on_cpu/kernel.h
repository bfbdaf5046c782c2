// What a kernel of ops/kernels/cuda needs to be a C++ function on a CPU.
#include "../fibers.h"
#include <math.h>
#include <utility>

#define __device__
#define __global__
#define __shared__ static  // blocks run one after the other

struct alignas(16) uint4 { unsigned x, y, z, w; };

static float exchanged[MAX_THREADS];

static int min(int a, int b) { return a < b ? a : b; }

static unsigned __float_as_uint(float value) { unsigned bits; memcpy(&bits, &value, 4); return bits; }
static float __uint_as_float(unsigned bits) { float value; memcpy(&value, &bits, 4); return value; }
static float float_of_half(unsigned short bits) { _Float16 half; memcpy(&half, &bits, 2); return half; }
static unsigned short half_of_float(float value) {
    _Float16 half = value;
    unsigned short bits;
    memcpy(&bits, &half, 2);
    return bits;
}

static void __syncthreads() { wait_at_barrier(); }

static float __shfl_xor_sync(unsigned, float value, int distance) {
    exchanged[thread_number()] = value;
    take_turns();
    float other = exchanged[thread_number() ^ distance];
    take_turns();
    return other;
}

template <class... Arguments, std::size_t... I>
static void call(void (*kernel)(Arguments...), void** arguments, std::index_sequence<I...>) {
    kernel(*(Arguments*)arguments[I]...);
}

// cuLaunchKernel's part: arguments points at each argument of the kernel.
template <class... Arguments>
static bool launch_on_cpu(void (*kernel)(Arguments...), Dimensions grid, Dimensions block, void** arguments) {
    static void (*the_kernel)(Arguments...);
    static void** the_arguments;
    the_kernel = kernel;
    the_arguments = arguments;
    return run_grid([] { call(the_kernel, the_arguments, std::index_sequence_for<Arguments...>()); }, grid, block);
}

#define EXPORT(kernel) \
    extern "C" bool launch_##kernel(const unsigned* grid, const unsigned* block, void** arguments) { \
        return launch_on_cpu(kernel, {grid[0], grid[1]}, {block[0], block[1]}, arguments); \
    }
