// Writes a weight's first `count` values, a multiple of LANES, in order.
extern "C" void dequantize(Packed packed, Scales scales, TYPE* out, long long count, int threads) {
    long long blocks = count / BLOCK_LENGTH;
#pragma omp parallel for num_threads(threads)
    for (long long block = 0; block < blocks; block++) {
        float scale = SCALES_APART ? scales[block] : 0;
#pragma GCC unroll 32
        for (int first = 0; first < BLOCK_LENGTH; first += LANES)
            store(weight_values(packed + block * BLOCK_BYTES, first, scale),
                  out + block * BLOCK_LENGTH + first);
    }
    for (Index first = blocks * BLOCK_LENGTH; first < count; first += LANES)
        store(weight_chunk(packed, scales, first / LANES), out + first);
}
