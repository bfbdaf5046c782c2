// Computes out = input weight^T for `tokens` rows of input, at most TOKENS, summed in float32. The
// weight is dequantised in registers.
//
// input: (tokens, columns). out: (tokens, rows).
extern "C" void linear(const float* input, Packed packed, Scales scales, float* out, int tokens,
                       int rows, int columns, int threads) {
    int blocks = columns / BLOCK_LENGTH;
#pragma omp parallel for num_threads(threads)
    for (int row = 0; row < rows; row++) {
        Floats sums[TOKENS] = {};
        for (Index block = 0; block < blocks; block++) {
            Index place = (Index)row * blocks + block;
            float scale = SCALES_APART ? scales[place] : 0;
#pragma GCC unroll 32
            for (int first = 0; first < BLOCK_LENGTH; first += LANES) {
                Floats weights = weight_values(packed + place * BLOCK_BYTES, first, scale);
#pragma GCC unroll 8
                for (int token = 0; token < TOKENS; token++) {
                    const float* inputs = input + (Index)(token < tokens ? token : 0) * columns +
                                          block * BLOCK_LENGTH + first;
                    sums[token] = multiply_add(load<Floats>(inputs), weights, sums[token]);
                }
            }
        }
        for (int token = 0; token < tokens; token++) {
            float sum = 0;
            for (int i = 0; i < LANES; i++) sum += sums[token][i];
            out[(Index)token * rows + row] = sum;
        }
    }
}
