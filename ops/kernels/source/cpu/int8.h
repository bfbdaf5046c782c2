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

// Returns sums and differences of the lanes that are DISTANCE, DISTANCE / 2 ... 1 apart.
template <int DISTANCE>
static FUNCTION Floats butterflies(Floats values) {
    Floats signs;
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) signs[i] = i & DISTANCE ? -1 : 1;
    return butterflies<DISTANCE / 2>(multiply_add(signs, values, swapped<DISTANCE>(values)));
}

template <>
FUNCTION Floats butterflies<0>(Floats values) { return values; }

static constexpr int sign_of_side(int i) { return (i & i >> 1 ^ i >> 2 & i >> 3) & 1 ? -1 : 1; }

// Rotates one group in place. Returns the larger of `largest` and the magnitudes, as bits: those of
// NaN are the largest.
static FUNCTION Ints rotate(float* group, Ints largest) {
    Floats vectors[CODE_VECTORS];
#pragma GCC unroll 32
    for (int vector = 0; vector < CODE_VECTORS; vector++) {
        Floats signs;
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) {
            int place = vector * LANES + i;
            signs[i] = sign_of_side(place / 16) * sign_of_side(place % 16) / 16.0f;
        }
        vectors[vector] = butterflies<LANES / 2>(signs * load<Floats>(group + vector * LANES));
    }
#pragma GCC unroll 5
    for (int distance = 1; distance < CODE_VECTORS; distance *= 2) {
#pragma GCC unroll 32
        for (int vector = 0; vector < CODE_VECTORS; vector++) {
            if (vector & distance) continue;
            Floats low = vectors[vector], high = vectors[vector + distance];
            vectors[vector] = low + high;
            vectors[vector + distance] = low - high;
        }
    }
#pragma GCC unroll 32
    for (int vector = 0; vector < CODE_VECTORS; vector++) {
        store(vectors[vector], group + vector * LANES);
        Ints magnitudes = (Ints)vectors[vector] & 0x7FFFFFFF;
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
