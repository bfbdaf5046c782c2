// The first `chunks` chunks of a weight, in order. One thread a chunk.
extern "C" __global__ void dequantize(Packed packed, Scales scales, TYPE* out, long long chunks) {
    long long chunk = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (chunk < chunks) store_chunk(out + chunk * LANES, weight_chunk(packed, scales, chunk));
}
