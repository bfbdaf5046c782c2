// Computes out = input weight^T + addend in bfloat16, summed in float32, by AVX512-BF16.
//
// A thread dequantises a group of the weight's rows, CHUNK columns at a time, into the cache of its
// core. There each tile of TILE_ROWS rows is multiplied by tiles of up to TILE_TOKENS rows of
// input. Both are in the order (step, row of the tile, PAIRS), zeros behind the last column.

const int TILE_ROWS = 4, TILE_TOKENS = 6;  // their products and factors fit into 32 registers
const int PAIRS = 32;                      // numbers in a register
const int MAX_GROUP = 128, CHUNK = 2048;   // half a megabyte
const int ROWS_AHEAD = 2;                  // so early is a row requested from memory

static FUNCTION int smaller(int a, int b) { return a < b ? a : b; }
static FUNCTION int rounded_up(int a, int multiple) { return (a + multiple - 1) / multiple * multiple; }

// Returns the sums of the lanes of four vectors.
static FUNCTION __m128 sums_of(const __m512* vectors) {
    __m512 low = _mm512_add_ps(_mm512_unpacklo_ps(vectors[0], vectors[1]),
                               _mm512_unpackhi_ps(vectors[0], vectors[1]));
    __m512 high = _mm512_add_ps(_mm512_unpacklo_ps(vectors[2], vectors[3]),
                                _mm512_unpackhi_ps(vectors[2], vectors[3]));
    __m512 lanes = _mm512_add_ps((__m512)_mm512_unpacklo_pd((__m512d)low, (__m512d)high),
                                 (__m512)_mm512_unpackhi_pd((__m512d)low, (__m512d)high));
    __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps(lanes, 1));
    return _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
}

static FUNCTION __m512bh load_pairs(const BFloat16* from) {
    return (__m512bh)_mm512_load_si512(from);
}

// Adds the products of two tiles to sums (TOKENS, group).
template <int TOKENS>
static void multiply(const BFloat16* input, const BFloat16* weights, int steps, float* sums,
                     int group) {
    __m512 products[TOKENS][TILE_ROWS] = {};
    for (int step = 0; step < steps; step++, weights += TILE_ROWS * PAIRS) {
        __m512bh values[TILE_ROWS];
#pragma GCC unroll 4
        for (int row = 0; row < TILE_ROWS; row++) values[row] = load_pairs(weights + row * PAIRS);
#pragma GCC unroll 6
        for (int token = 0; token < TOKENS; token++, input += PAIRS) {
            __m512bh inputs = load_pairs(input);
#pragma GCC unroll 4
            for (int row = 0; row < TILE_ROWS; row++)
                products[token][row] = _mm512_dpbf16_ps(products[token][row], inputs, values[row]);
        }
    }
#pragma GCC unroll 6
    for (int token = 0; token < TOKENS; token++, sums += group)
        _mm_storeu_ps(sums, _mm_add_ps(_mm_loadu_ps(sums), sums_of(products[token])));
}

typedef void (*Multiply)(const BFloat16*, const BFloat16*, int, float*, int);
static const Multiply multiply_tokens[] = {0,           multiply<1>, multiply<2>, multiply<3>,
                                           multiply<4>, multiply<5>, multiply<6>};

// Writes `count` rows of `width` columns of input (.., columns) as a tile.
static void copy_tile(const BFloat16* input, int count, int columns, int width, BFloat16* to) {
    for (int first = 0; first < width; first += PAIRS)
        for (int row = 0; row < count; row++, to += PAIRS) {
            int size = smaller(PAIRS, width - first);
            memcpy(to, input + (Index)row * columns + first, size * sizeof(BFloat16));
            memset(to + size, 0, (PAIRS - size) * sizeof(BFloat16));
        }
}

// Writes `width` values of a row of the weight, from column `first` on, as one row of a tile.
// ahead: bytes to what is requested from memory meanwhile.
static FUNCTION void dequantize_row(Weight weight, Index row, int first, int width, Index ahead,
                                    BFloat16* to) {
    const int piece = piece_of(PART_LENGTH, CHUNK);
    for (int column = 0; column < width; column += piece) {
        Part part = part_of(weight, row, first + column);
        const int start = piece == PART_LENGTH ? 0 : place_in_part(first + column);
        BFloat16* step = to + column / PAIRS * PAIRS * TILE_ROWS + column % PAIRS;
        for (int byte = 0; byte < code_bytes(piece); byte += 64)
            __builtin_prefetch(part.codes + code_bytes(start) + byte + ahead);
#pragma GCC unroll 32
        for (int place = 0; place < piece; place += LANES)
            store_rounded(part_values(weight, part, start + place),
                          step + place / PAIRS * PAIRS * TILE_ROWS + place % PAIRS);
    }
}

// input: (tokens, columns). addend: (tokens, rows) with strides, or null. out: (tokens, rows).
extern "C" void linear_bfloat16(const BFloat16* input, const Weight* of, const BFloat16* addend,
                                long long addend_token_stride, long long addend_row_stride,
                                BFloat16* out, int tokens, int rows, int threads) {
    const Weight weight = *of;
    const int columns = weight.columns;
    int tiles = rounded_up(tokens, TILE_TOKENS) / TILE_TOKENS;
    int groups = rounded_up(rounded_up(rows, MAX_GROUP) / MAX_GROUP, threads);
    int group = rounded_up((rows + groups - 1) / groups, LANES);
    Index row_bytes = code_bytes(columns), chunk_bytes = code_bytes(CHUNK);
    auto first_token = [=](int tile) { return tokens * tile / tiles; };
    // of a chunk that begins with column `first`, where input's tiles stand one after the other
    auto inputs_of = [=](BFloat16* inputs, int first, int tile) {
        int width = rounded_up(smaller(CHUNK, columns - first), PAIRS);
        return inputs + (Index)tokens * first + (Index)first_token(tile) * width;
    };
    size_t padded = rounded_up(columns, PAIRS);
    Buffer<BFloat16> all_inputs(tokens * padded);
    BFloat16* inputs = all_inputs.items;
    parallel_for(threads, tiles, [=](Index tile) {
        for (int first = 0; first < columns; first += CHUNK)
            copy_tile(input + (Index)first_token(tile) * columns + first,
                      first_token(tile + 1) - first_token(tile), columns,
                      smaller(CHUNK, columns - first), inputs_of(inputs, first, tile));
    });
    Index taken = 0, *turns = &taken;
    parallel(threads, [=](int) {
        Buffer<BFloat16> group_weights(group * CHUNK);
        Buffer<float> group_sums((size_t)tokens * group);
        BFloat16* weights = group_weights.items;
        float* sums = group_sums.items;
        for (Index turn; (turn = take_turn(turns)) * group < rows;) {
            const int start = turn * group, count = smaller(group, rows - start);
            memset(sums, 0, (size_t)tokens * group * sizeof(float));
            for (int first = 0; first < columns; first += CHUNK) {
                int width = smaller(CHUNK, columns - first);
                int steps = rounded_up(width, PAIRS) / PAIRS;
                if (count < group || width % PAIRS)
                    memset(weights, 0, group * CHUNK * sizeof(BFloat16));
                for (int row = 0; row < count; row++) {
                    int tile = row / TILE_ROWS, next = row + ROWS_AHEAD;
                    Index ahead = next < count ? ROWS_AHEAD * row_bytes
                                               : (ROWS_AHEAD - count) * row_bytes + chunk_bytes;
                    dequantize_row(weight, start + row, first, width, ahead,
                                   weights + (tile * steps * TILE_ROWS + row % TILE_ROWS) * PAIRS);
                }
                for (int tile = 0; tile < tiles; tile++) {
                    int token = first_token(tile);
                    Multiply multiply_tile = multiply_tokens[first_token(tile + 1) - token];
                    for (int row = 0; row < count; row += TILE_ROWS)
                        multiply_tile(inputs_of(inputs, first, tile), weights + row * steps * PAIRS,
                                      steps, sums + token * group + row, group);
                }
            }
            for (int token = 0; token < tokens; token++) {
                float* of_token = sums + token * group;
                if (addend)
                    for (int row = 0; row < count; row++) {
                        Index place = token * addend_token_stride + (start + row) * addend_row_stride;
                        of_token[row] += float_of_bits((unsigned)addend[place].bits << 16);
                    }
                BFloat16 rounded[MAX_GROUP];
                for (int row = 0; row < count; row += LANES)
                    store_rounded(load<Floats>(of_token + row), rounded + row);
                memcpy(out + (Index)token * rows + start, rounded, count * sizeof(BFloat16));
            }
        }
    });
}
