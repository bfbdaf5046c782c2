// Encodes rows of floats as int8 codes of the rotated values, see ops/kernels/int8_codes.py. All functions
// but `encode` work on one row.

const int CODE_GROUP = 256, CODE_VECTORS = CODE_GROUP / LANES;

template <int DISTANCE>
static FUNCTION Floats swapped(Floats values) {
#ifdef __clang__
    Floats lanes;
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) lanes[i] = values[i ^ DISTANCE];
    return lanes;
#else
    Ints lanes;
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) lanes[i] = i ^ DISTANCE;
    return __builtin_shuffle(values, lanes);
#endif
}

// Returns the values of a group that are DISTANCE (in bits: exclusive or) from those of a vector.
template <int DISTANCE>
static FUNCTION Floats partners(const Floats* vectors, int vector) {
    Floats values = vectors[vector ^ DISTANCE / LANES];
    return DISTANCE % LANES ? swapped<DISTANCE % LANES>(values) : values;
}

// Rotates each four values that are STRIDE apart: each becomes the sum of all, less twice the one at
// the other end.
template <int STRIDE>
static FUNCTION void rotate_fours(Floats* vectors) {
    Floats sums[CODE_VECTORS], ends[CODE_VECTORS];
#pragma GCC unroll 64
    for (int i = 0; i < CODE_VECTORS; i++) {
        sums[i] = vectors[i] + partners<STRIDE>(vectors, i);
        ends[i] = partners<3 * STRIDE>(vectors, i);
    }
#pragma GCC unroll 64
    for (int i = 0; i < CODE_VECTORS; i++)
        vectors[i] = sums[i] + partners<2 * STRIDE>(sums, i) - 2 * ends[i];
}

// Rotates one group in place. Returns the larger of `largest` and the magnitudes, as bits: those of
// NaN are the largest.
static FUNCTION Ints rotate(float* group, Ints largest) {
    Floats vectors[CODE_VECTORS];
#pragma GCC unroll 64
    for (int i = 0; i < CODE_VECTORS; i++)
        vectors[i] = load<Floats>(group + i * LANES) * (1 / 16.0f);
    rotate_fours<1>(vectors);
    rotate_fours<4>(vectors);
    rotate_fours<16>(vectors);
    rotate_fours<64>(vectors);
#pragma GCC unroll 64
    for (int i = 0; i < CODE_VECTORS; i++) {
        store(vectors[i], group + i * LANES);
        Ints magnitudes = (Ints)vectors[i] & 0x7FFFFFFF;
        largest = magnitudes > largest ? magnitudes : largest;
    }
    return largest;
}

// Encodes rotated values. largest: what `rotate` returned for all groups. Returns the scale.
static FUNCTION float quantize(const float* values, int columns, Ints largest, signed char* codes) {
    int bits = 0;
    for (int i = 0; i < LANES; i++) bits = largest[i] > bits ? largest[i] : bits;
    float peak = float_of_bits(bits < 0x7F800000 ? bits : 0x7FC00000);
    if (peak < TINY) peak = TINY;
    const float to_integer = 12582912;  // the last bits of a sum with it are the nearest integer
    for (int column = 0; column < columns; column += LANES)
        store_bytes((Ints)(load<Floats>(values + column) * (LARGEST_CODE / peak) + to_integer),
                    codes + column);
    return peak / LARGEST_CODE;
}

// Encodes `rows` rows. values_of(row, column, group) writes the CODE_GROUP values of a row from `column`
// on to `group`.
template <class Values>
static FUNCTION void encode(Values values_of, signed char* codes, float* code_scales,
                            long long rows, int columns, int threads) {
    parallel_ranges(threads, rows, [=](Index row, Index end) {
        Buffer<float> buffer(columns);
        float* values = buffer.items;
        for (; row < end; row++) {
            Ints largest = {};
            for (int column = 0; column < columns; column += CODE_GROUP) {
                values_of(row, column, values + column);
                largest = rotate(values + column, largest);
            }
            code_scales[row] = quantize(values, columns, largest, codes + row * columns);
        }
    });
}
