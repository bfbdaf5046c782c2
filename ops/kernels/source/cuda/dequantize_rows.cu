// Writes rows of a weight, in order. Each thread writes one chunk of `row_chunk`.
extern "C" __global__ void dequantize_rows(Packed packed, Packed scales, Scales row_scales,
                                           TYPE* out, long long chunks) {
    long long chunk = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (chunk >= chunks) return;
    Floats values[CHUNKS];
    row_chunk(packed, scales, row_scales, chunk, values);
    for (int i = 0; i < CHUNKS; i++) store_chunk(out + (chunk * CHUNKS + i) * LANES, values[i]);
}
