// What hiprtc has built in and the sources in ops/kernels/source/cuda use, for Clang without ROCm's headers.
#define __device__ __attribute__((device))
#define __global__ __attribute__((global))
#define __shared__ __attribute__((shared))

struct alignas(16) uint4 { unsigned x, y, z, w; };
struct Dimensions { unsigned x, y; };
#define threadIdx Dimensions{__builtin_amdgcn_workitem_id_x(), __builtin_amdgcn_workitem_id_y()}
#define blockIdx Dimensions{__builtin_amdgcn_workgroup_id_x(), __builtin_amdgcn_workgroup_id_y()}
#define blockDim Dimensions{__builtin_amdgcn_workgroup_size_x(), __builtin_amdgcn_workgroup_size_y()}
#define gridDim Dimensions{__builtin_amdgcn_grid_size_x() / blockDim.x, __builtin_amdgcn_grid_size_y() / blockDim.y}

static __device__ inline int min(int a, int b) { return a < b ? a : b; }
static __device__ inline float fmaf(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
static __device__ inline unsigned __float_as_uint(float value) { return __builtin_bit_cast(unsigned, value); }
static __device__ inline float __uint_as_float(unsigned bits) { return __builtin_bit_cast(float, bits); }

static __device__ inline void __syncthreads() {
    __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
    __builtin_amdgcn_s_barrier();
    __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
}

static __device__ inline float __shfl_xor(float value, int distance) {
    int lane = __builtin_amdgcn_mbcnt_hi(~0u, __builtin_amdgcn_mbcnt_lo(~0u, 0)), bits = __builtin_bit_cast(int, value);
    return __builtin_bit_cast(float, __builtin_amdgcn_ds_bpermute((lane ^ distance) * 4, bits));
}
