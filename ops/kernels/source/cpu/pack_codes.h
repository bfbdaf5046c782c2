// Rows in the basis of their codes, and the codes of one value, as `RowEncoder` of ops/quantize/row_encoder.py rounds to them.
//
// Defined besides the constants of rows.h: LOWEST and LARGEST, the numbers of codes; IS_E2M1; MIDDLES,
// between neighbouring numbers of another codebook, which ascends; SCALE_COLUMNS, the columns that
// share a stored scale of one byte, 0: a row has one scale, float32.

const float SMALLEST = 1e-30f;
const bool HAS_ROW_NUMBERS = IS_REQUANTIZED || ROW_SCALE == MULTIPLY;
const int GROUP_COLUMNS = SCALE_COLUMNS ? SCALE_COLUMNS : 32;  // with one unit

// Returns the nearest e4m3 of values of at most 448 in magnitude.
static FUNCTION Floats nearest_e4m3(Floats values) {
    const float to_subnormal = 16384;  // the last bit of a sum with it is 2^-9
    Ints bits = (Ints)magnitude(values);
    Floats normal = (Floats)(bits + 0x7FFFF + (bits >> 20 & 1) & (int)0xFFF00000);
    Floats subnormal = (Floats)bits + to_subnormal - to_subnormal;
    Floats size = either(bits < (121 << 23), subnormal, normal);
    return (Floats)((Ints)size | (Ints)values & (int)0x80000000);
}

// Returns the bits of numbers that e4m3 has.
static FUNCTION Ints e4m3_bits(Floats numbers) {
    Ints bits = (Ints)magnitude(numbers);
    Ints subnormal = __builtin_convertvector((Floats)bits * 512.0f, Ints);
    Ints size = bits < (121 << 23) ? subnormal : (bits >> 20) - (120 << 3);
    return size | ((Ints)numbers >> 24 & 0x80);
}

#if defined(CODEBOOK) && !IS_E2M1
static const float middles[16] = {MIDDLES};

// Returns how many middles are exceeded.
static FUNCTION Ints place_of(Floats scaled) {
    Ints place = {};
#pragma GCC unroll 4
    for (int step = 8; step; step /= 2)
        place += scaled > look_up_16(middles, place + (step - 1)) ? step - (Ints){} : (Ints){};
    return place;
}
#endif

// Returns the numbers of the codes that are nearest to values over their units.
static FUNCTION Floats nearest(Floats scaled) {
#if defined(FLOAT8)
    return nearest_e4m3(between(scaled, LOWEST, LARGEST));
#elif !defined(CODEBOOK)
    return nearest_integer(between(scaled, LOWEST, LARGEST));
#elif IS_E2M1
    scaled = between(scaled, LOWEST, LARGEST);
    // the last bit of a sum with it is the step between two numbers: 0.5, 1 or 2
    const float to_half = 6291456, to_integer = 2 * to_half, to_even = 4 * to_half;
    Floats size = magnitude(scaled),
           rounds = either(size >= 2, either(size >= 4, all(to_even), all(to_integer)),
                           all(to_half));
    return scaled + rounds - rounds;
#else
    return look_up(place_of(scaled));
#endif
}

// Returns the codes that are nearest to values over their units.
static FUNCTION Ints nearest_codes(Floats scaled) {
#if defined(FLOAT8)
    return e4m3_bits(nearest(scaled));
#elif !defined(CODEBOOK)
    return __builtin_convertvector(nearest(scaled), Ints);
#elif IS_E2M1
    Ints number = __builtin_convertvector(2 * nearest(scaled), Ints),  // 0, 1, 2, 3, 4, 6, 8 or 12
         size = number < 0 ? -number : number;
    size -= (size > 4 ? (size - 4) / 2 : (Ints){}) + (size > 8 ? (Ints){} + 1 : (Ints){});
    return size | (number < 0 ? (Ints){} + 8 : (Ints){});
#else
    return place_of(scaled);
#endif
}

// Returns the values of numbers of codes, without what units are multiplied by.
static FUNCTION Floats value_of(Floats number, Floats unit) {
    return IS_REQUANTIZED ? rounded_to_bytes(number * unit) : number * unit;
}

// Returns by what values are divided: units, but for those of zero, whose codes are zeros.
static FUNCTION Floats divisor_of(Floats unit) {
    return either(unit > 0, unit, all(__builtin_inff()));
}

#if SCALE_COLUMNS
// Returns units as they are stored.
static FUNCTION Floats stored(E4M3, Floats units) {
    return nearest_e4m3(smaller(units, all(448)));
}
static FUNCTION Floats stored(E8M0, Floats units) {  // the next power of two
    Ints exponent = (Ints)units + 0x7FFFFF >> 23;
    exponent = exponent < 1 ? Ints{} + 1 : exponent > 254 ? Ints{} + 254 : exponent;
    return either(units > 0, (Floats)(exponent << 23), all(0));
}

static FUNCTION Ints scale_bits(E4M3, Floats units) { return e4m3_bits(units); }
static FUNCTION Ints scale_bits(E8M0, Floats units) { return (Ints)units >> 23; }

#endif

// Returns values of a row from `start` on, and zeros behind its end.
static FUNCTION Floats load_lanes(const TYPE* row, int start, int columns) {
    if (start + LANES <= columns) return load_values(row + start);
    TYPE some[LANES] = {};
    memcpy(some, row + start, (columns - start) * sizeof(TYPE));
    return load_values(some);
}

// Brings a row into the basis of its codes. Returns the largest magnitude of each lane as bits,
// where those of infinite values and NaN are the largest.
static Ints read_row(const TYPE* from, float* values, int columns) {
    Ints largest = {};
#if ROTATION
    for (int start = 0; start < columns; start += TILE) {
        Floats tile[VECTORS];
        for (int i = 0; i < VECTORS; i++) tile[i] = load_values(from + start + i * LANES);
        rotate(tile);
        for (int i = 0; i < VECTORS; i++) {
            tile[i] *= ROTATION_FACTOR;
            Ints bits = (Ints)magnitude(tile[i]);
            largest = bits > largest ? bits : largest;
            store(tile[i], values + start + i * LANES);
        }
    }
#else
    for (int start = 0; start < columns; start += LANES) {
        Floats lanes = load_lanes(from, start, columns);
        Ints bits = (Ints)magnitude(lanes);
        largest = bits > largest ? bits : largest;
        store(lanes, values + start);
    }
#endif
    return largest;
}
