// Computes out = input weight^T + addend for up to TOKENS rows of input, summed in float32 and
// rounded once. A warp takes ROWS rows of the weight: the more, the fewer times it loads the input.
//
// input: (tokens, weight.columns). out: (tokens, rows). addend: (tokens, rows) of these strides, or null.
extern "C" __global__ void linear(const TYPE* input, Weight weight, const TYPE* addend, TYPE* out,
                                  int tokens, int rows, long long addend_token_stride,
                                  long long addend_row_stride) {
    int first_row = (blockIdx.x * blockDim.x + threadIdx.x) / WARP * ROWS, lane = threadIdx.x % WARP;
    if (first_row >= rows) return;
    const int columns = weight.columns, chunks = columns / LANES;
    float sums[TOKENS][ROWS] = {};
    for (int chunk = lane; chunk < chunks; chunk += WARP) {
        Floats weights[ROWS];
#pragma unroll
        for (int row = 0; row < ROWS; row++)
            weights[row] = row_values(weight, min(first_row + row, rows - 1), chunk * LANES);
#pragma unroll
        for (int token = 0; token < TOKENS; token++) {
            if (token >= tokens) break;
            Floats inputs = load_chunk(input + (long long)token * columns + chunk * LANES);
#pragma unroll
            for (int row = 0; row < ROWS; row++)
                for (int i = 0; i < LANES; i++)
                    sums[token][row] = fmaf(inputs.lane[i], weights[row].lane[i], sums[token][row]);
        }
    }
#pragma unroll
    for (int token = 0; token < TOKENS; token++) {
        if (token >= tokens) break;
#pragma unroll
        for (int row = 0; row < ROWS; row++) {
            float sum = sums[token][row];
            for (int distance = WARP / 2; distance; distance /= 2)
                sum += shuffled(sum, distance);
            if (lane == 0 && first_row + row < rows) {
                if (addend)
                    sum += to_float(addend[token * addend_token_stride +
                                           (first_row + row) * addend_row_stride]);
                round_to(sum, out[(long long)token * rows + first_row + row]);
            }
        }
    }
}
