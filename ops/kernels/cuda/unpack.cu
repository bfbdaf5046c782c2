// The first `chunks` chunks of a weight, in order. One thread a chunk.
extern "C" __global__ void unpack(const Byte* packed, const float* scales, TYPE* out, long long chunks) {
    long long chunk = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (chunk >= chunks) return;
    float values[8];
    unpack_chunk(packed, scales, chunk, values);
    store_chunk(out + chunk * 8, values);
}
