// Encodes `rows` rows of a weight. codes: (rows, columns). columns: a multiple of GROUP and
// BLOCK_LENGTH.
extern "C" void int8_rows(Packed packed, Scales scales, signed char* codes, float* code_scales,
                          long long rows, int columns, int threads) {
    auto values_of = [=](long long row, int column, float* group) {
        Index place = row * columns + column;
        if (GROUP % BLOCK_LENGTH == 0) {
            for (int first = 0; first < GROUP; first += BLOCK_LENGTH) {
                Index block = (place + first) / BLOCK_LENGTH;
                float scale = SCALES_APART ? scales[block] : 0;
#pragma GCC unroll 32
                for (int lane = 0; lane < BLOCK_LENGTH; lane += LANES)
                    store(weight_values(packed + block * BLOCK_BYTES, lane, scale),
                          group + first + lane);
            }
        } else {
            for (int lane = 0; lane < GROUP; lane += LANES)
                store(weight_chunk(packed, scales, (place + lane) / LANES), group + lane);
        }
    };
    encode(values_of, codes, code_scales, rows, columns, threads);
}
