// Computes out = input weight^T for `tokens` rows of input, at most TOKENS, summed in float32. The
// weight is dequantised in registers.
//
// input: (tokens, weight.columns). out: (tokens, rows).
extern "C" void linear(const float* input, const Weight* of, float* out, int tokens, int rows,
                       int threads) {
    const Weight weight = *of;
    parallel_for(threads, rows, [=](Index row) {
        const int columns = weight.columns, length = PART_LENGTH ? PART_LENGTH : columns;
        Floats sums[TOKENS] = {};
        for (int column = 0; column < columns; column += length) {
            Part part = part_of(weight, row, column);
#pragma GCC unroll 32
            for (int first = 0; first < length; first += LANES) {
                Floats weights = part_values(weight, part, first);
#pragma GCC unroll 8
                for (int token = 0; token < TOKENS; token++) {
                    const float* inputs = input + (Index)(token < tokens ? token : 0) * columns +
                                          column + first;
                    sums[token] = multiply_add(load<Floats>(inputs), weights, sums[token]);
                }
            }
        }
        for (int token = 0; token < tokens; token++) {
            float sum = 0;
            for (int i = 0; i < LANES; i++) sum += sums[token][i];
            out[(Index)token * rows + row] = sum;
        }
    });
}
