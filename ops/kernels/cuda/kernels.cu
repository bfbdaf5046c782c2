// The kernels of one format, FORMAT with BLOCK_LENGTH values in BLOCK_BYTES bytes, for activations of one TYPE.
//
// A weight is (rows, columns) in blocks along its flattened values; columns and BLOCK_LENGTH are multiples of 8. `scales` holds
// a float32 scale per block where a format keeps them apart from its codes, or is null.

// The values of one chunk of a weight, rounded to another type first where `through` says so.
__device__ inline void unpack_chunk(const Byte* packed, const float* scales, long long chunk, int through, float* values) {
    const int chunks_of_block = BLOCK_LENGTH / 8;
    long long block = chunk / chunks_of_block;
    FORMAT::values(packed + block * BLOCK_BYTES, (int)(chunk % chunks_of_block) * 8, values);
    if (scales)
        for (int i = 0; i < 8; i++) values[i] *= scales[block];
    round_values(values, through);
}

// The first `chunks` chunks of a weight, in order. One thread a chunk.
extern "C" __global__ void unpack(const Byte* packed, const float* scales, TYPE* out, long long chunks, int through) {
    long long chunk = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (chunk >= chunks) return;
    float values[8];
    unpack_chunk(packed, scales, chunk, through, values);
    store_chunk(out + chunk * 8, values);
}

// out = input weight^T + addend for up to TOKENS rows of input, sums in float32, rounded once. One warp for ROWS rows of the
// weight, so that the inputs of a chunk are loaded once for all of them.
//
// input: (tokens, columns). out: (tokens, rows). addend: (tokens, rows) of the strides given, or null.
template <int TOKENS, int ROWS>
__device__ void linear(const TYPE* input, const Byte* packed, const float* scales, const TYPE* addend, TYPE* out, int tokens,
                       int rows, int columns, int addend_token_stride, int addend_row_stride, int through) {
    int first_row = (blockIdx.x * blockDim.x + threadIdx.x) / 32 * ROWS, lane = threadIdx.x % 32;
    if (first_row >= rows) return;
    int chunks = columns / 8;
    float sums[TOKENS][ROWS] = {};
    for (int chunk = lane; chunk < chunks; chunk += 32) {
        float weights[ROWS][8];
#pragma unroll
        for (int row = 0; row < ROWS; row++)
            unpack_chunk(packed, scales, (long long)min(first_row + row, rows - 1) * chunks + chunk, through, weights[row]);
#pragma unroll
        for (int token = 0; token < TOKENS; token++) {
            if (token >= tokens) break;
            float inputs[8];
            load_chunk(input + (long long)token * columns + chunk * 8, inputs);
#pragma unroll
            for (int row = 0; row < ROWS; row++)
                for (int i = 0; i < 8; i++) sums[token][row] = fmaf(inputs[i], weights[row][i], sums[token][row]);
        }
    }
#pragma unroll
    for (int token = 0; token < TOKENS; token++) {
#pragma unroll
        for (int row = 0; row < ROWS; row++) {
            float sum = sums[token][row];
            for (int distance = 16; distance; distance /= 2) sum += __shfl_xor_sync(0xFFFFFFFF, sum, distance);
            if (lane == 0 && token < tokens && first_row + row < rows) {
                if (addend) sum += to_float(addend[(long long)token * addend_token_stride + (long long)(first_row + row) * addend_row_stride]);
                round_to(sum, out[(long long)token * rows + first_row + row]);
            }
        }
    }
}

#define LINEAR(TOKENS, ROWS) \
    extern "C" __global__ void linear_##TOKENS( \
        const TYPE* input, const Byte* packed, const float* scales, const TYPE* addend, TYPE* out, int tokens, int rows, \
        int columns, int addend_token_stride, int addend_row_stride, int through) { \
        linear<TOKENS, ROWS>(input, packed, scales, addend, out, tokens, rows, columns, addend_token_stride, addend_row_stride, through); \
    }

LINEAR(1, 1)
LINEAR(4, 2)
LINEAR(16, 4)
