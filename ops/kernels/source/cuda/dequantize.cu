// Writes a weight's first `chunks` chunks, in order. Each thread writes one chunk. padding: values that
// are left out behind each row of weight.columns; with any there are fewer than 2^32 chunks.
extern "C" __global__ void dequantize(Weight weight, TYPE* out, long long chunks, int padding) {
    long long chunk = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (chunk >= chunks) return;
    if (padding) out += (long long)((unsigned)chunk / (unsigned)(weight.columns / LANES)) * padding;
    store_chunk(out + chunk * LANES, weight_chunk(weight, chunk));
}
