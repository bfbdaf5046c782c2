// What a kernel of ops/kernels/source/cuda needs to be a C++ function on a CPU.
#include "../fibers.h"
#include <math.h>
#include <utility>

#define __device__
#define __global__
#define __shared__ static  // blocks run one after the other

struct alignas(16) uint4 { unsigned x, y, z, w; };

static float exchanged[MAX_THREADS];
static int warp;  // threads that can exchange

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

static void __syncthreads() { wait_at_barrier(); }

static float __shfl_xor(float value, int distance) {
    if (distance >= warp) __builtin_trap();
    exchanged[thread_number()] = value;
    take_turns();
    float other = exchanged[thread_number() ^ distance];
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
static bool launch_on_cpu(void (*kernel)(Arguments...), Dimensions grid, Dimensions block, void** arguments) {
    static void (*the_kernel)(Arguments...);
    static void** the_arguments;
    the_kernel = kernel;
    the_arguments = arguments;
    return run_grid([] { call(the_kernel, the_arguments, std::index_sequence_for<Arguments...>()); }, grid, block);
}

#define EXPORT(kernel, threads_of_warp) \
    extern "C" bool launch_##kernel(const unsigned* grid, const unsigned* block, void** arguments) { \
        warp = threads_of_warp; \
        return launch_on_cpu(kernel, {grid[0], grid[1]}, {block[0], block[1]}, arguments); \
    }
