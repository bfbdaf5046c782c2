// A weight of one format: FORMAT with BLOCK_LENGTH values in BLOCK_BYTES bytes, the blocks following its flattened values.
// Rows and blocks are multiples of 8 values.

// The values of one chunk, rounded to VALUE_TYPE. scales: a float32 scale per block where a format keeps them apart from its
// codes, or null.
__device__ inline void unpack_chunk(const Byte* packed, const float* scales, long long chunk, float* values) {
    const int chunks_of_block = BLOCK_LENGTH / 8;
    long long block = chunk / chunks_of_block;
    FORMAT::values(packed + block * BLOCK_BYTES, (int)(chunk % chunks_of_block) * 8, values);
    for (int i = 0; i < 8; i++) {
        if (scales) values[i] *= scales[block];
        VALUE_TYPE rounded;
        round_to(values[i], rounded);
        values[i] = to_float(rounded);
    }
}
