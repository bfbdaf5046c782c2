// Writes rows of a weight, in order. Each thread writes one chunk of `row_chunk`.
//
// row_scales: any floats where the format has none.
kernel void dequantize_rows(device TYPE* out [[buffer(0)]], const device uchar* packed [[buffer(1)]],
                            const device uchar* scales [[buffer(2)]],
                            const device float* row_scales [[buffer(3)]],
                            uint chunk [[thread_position_in_grid]]) {
    Floats values[CHUNKS];
    row_chunk(packed, scales, row_scales, chunk, values);
    for (int i = 0; i < CHUNKS; i++)
        store(values[i], out + ((Index)chunk * CHUNKS + i) * LANES);
}
