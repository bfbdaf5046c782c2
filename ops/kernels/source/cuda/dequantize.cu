// Writes a weight's first `chunks` chunks, in order. Each thread writes one chunk.
extern "C" __global__ void dequantize(Weight weight, TYPE* out, long long chunks) {
    long long chunk = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (chunk < chunks) store_chunk(out + chunk * LANES, weight_chunk(weight, chunk));
}
