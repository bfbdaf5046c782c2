// Writes rows of a weight whose block is a row. ops/formats/comfyui.py documents the formats.
//
// CODES names how LANES codes become numbers. A scale belongs to GROUP columns; SCALES names how it
// is stored. Where ROTATED is 1, the numbers of GROUP columns are integers and are rotated, and the
// scale belongs to the row. Where LEVEL_GROUP is not 0, an integer is a number times the scale, a
// byte of E4M3, of LEVEL_GROUP columns. MINIMA names the numbers added to the values of GROUP
// columns. Where HAS_ZEROS is 1, minima are integers of ZERO_BITS that are subtracted from the
// numbers of GROUP columns, each row filled up to whole bytes; OFFSET is subtracted from all numbers.
// Where SCALED_COLUMNS is 1, each column has a factor too. Where ROTATED_VALUES is not 0, so many
// values are rotated by a power of a matrix of ROTATION_BASE columns, over its root, in the order of
// sums of ops/formats/rotation.py.

// Codes of BITS are a stream of bits, or packed as by SDNQ where PACKS is 1, see `split_codes` of
// ops/formats/row_layout.py.

#ifndef OFFSET
#define OFFSET 0
#endif

struct SignedBytes {
    static FUNCTION Floats numbers(Packed from) { return floats(load_signed_bytes(from)); }
};

struct UnsignedBytes {
    static FUNCTION Floats numbers(Packed from) { return floats(load_bytes(from)); }
};

struct SignedNibbles {  // the low nibble first
    static FUNCTION Floats numbers(Packed from) {
        return floats(load_low_nibble_pairs(from) << 28 >> 28);
    }
};

struct UnsignedNibbles {
    static FUNCTION Floats numbers(Packed from) { return floats(load_low_nibble_pairs(from)); }
};

struct NibblesLessEight {
    static FUNCTION Floats numbers(Packed from) { return floats(load_low_nibble_pairs(from) - 8); }
};

struct E4M3 {
    static FUNCTION Floats numbers(Packed from) {
        Words bytes = (Words)load_bytes(from), magnitude = bytes & 0x7F;
        // exponent and mantissa at their places in a float, whose exponent is 120 too small
        Floats values = (Floats)(magnitude << 20) * 0x1p120f;
        Words nan = magnitude == 0x7F ? Words{} + 0x7FC00000 : Words{};
        return (Floats)((Words)values | nan | (bytes & 0x80) << 24);
    }
};

struct E5M2 {  // the upper byte of a half
    static FUNCTION Floats numbers(Packed from) {
        return of_halves(low_halves((Words)load_bytes(from) << 8));
    }
};

#ifdef CODEBOOK
struct CodebookNibbles {  // the high nibble first
    static FUNCTION Floats numbers(Packed from) { return look_up(load_nibble_pairs(from)); }
};

struct CodebookLowNibbles {  // the low nibble first
    static FUNCTION Floats numbers(Packed from) { return look_up(load_low_nibble_pairs(from)); }
};
#endif

struct SixBits {  // of eight: four bytes of low nibbles, two of upper bits
    static FUNCTION Floats numbers(Packed from) {
        typedef Vector<unsigned>::Lanes Lanes;
        Lanes low, upper, shifts, pairs;
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) {
            low[i] = load<unsigned>(from + i / 8 * 6);
            upper[i] = load<unsigned short>(from + i / 8 * 6 + 4);
            shifts[i] = i % 8 * 4;
            pairs[i] = i % 8 * 2;
        }
        return floats((Ints)((low >> shifts & 15) | (upper >> pairs & 3) << 4) - 32);
    }
};

// Returns code `i` of a stream of bits, the lowest first.
static FUNCTION int code_of_stream(Packed from, int i) {
    const int shift = i * BITS % 8;
    Packed byte = from + i * BITS / 8;
    int bits = byte[0] >> shift;
    if (shift + BITS > 8) bits |= byte[1] << (8 - shift);
    return bits & ((1 << BITS) - 1);
}

// Returns code `i` of packs: the low bits of bytes, and codes of what is above them.
static FUNCTION int code_of_packs(Packed from, int i) {
    const int codes = BITS == 6 ? 4 : 8, place = i % codes;
    Packed bytes = from + i / codes * (codes * BITS / 8);
    if (BITS == 3) {
        if (place < 6) return bytes[place % 3] >> place / 3 * 3 & 7;
        return place == 6 ? bytes[0] >> 6 | (bytes[2] >> 6 & 1) << 2
                          : bytes[1] >> 6 | bytes[2] >> 7 << 2;
    }
    if (place < codes * BITS / 8) return bytes[place] & ((1 << BITS) - 1);
    if (BITS == 6) return bytes[0] >> 6 << 4 | bytes[1] >> 6 << 2 | bytes[2] >> 6;
    if (BITS == 7) {
        int code = 0;
#pragma GCC unroll 7
        for (int byte = 0; byte < 7; byte++) code |= bytes[byte] >> 7 << (6 - byte);
        return code;
    }
    if (place < 7) return bytes[place - 5] >> 5 | (bytes[place - 2] >> 5 & 3) << 3;
    return bytes[2] >> 5 | bytes[3] >> 7 << 4 | bytes[4] >> 7 << 3;
}

static FUNCTION Ints bit_codes(Packed from) {
#if BITS == 8
    return load_bytes(from);
#elif BITS == 4
    return load_low_nibble_pairs(from);
#else
    Ints codes;
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) codes[i] = PACKS ? code_of_packs(from, i) : code_of_stream(from, i);
    return codes;
#endif
}

struct Integers {
    static FUNCTION Floats numbers(Packed from) { return floats(bit_codes(from) - OFFSET); }
};

#ifdef NUMBERS
static const float numbers_of_codes[] = {NUMBERS};

struct Table {
    static FUNCTION Floats numbers(Packed from) {
        Ints codes = bit_codes(from);
        Floats values;
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) values[i] = numbers_of_codes[codes[i]];
        return values;
    }
};
#endif

static FUNCTION float e4m3(unsigned byte) {
    unsigned magnitude = byte & 0x7F;
    float value = float_of_bits(magnitude << 20) * 0x1p120f;
    if (magnitude == 0x7F) value = float_of_bits(0x7FC00000);
    return byte & 0x80 ? -value : value;
}

struct Float {
    static FUNCTION float number(Packed from, Index index) {
        return load<float>(from + index * sizeof(float));
    }
};

struct BFloat {
    static FUNCTION float number(Packed from, Index index) {
        return float_of_bits((unsigned)load<unsigned short>(from + index * 2) << 16);
    }
};

struct HalfFloat {
    static FUNCTION float number(Packed from, Index index) { return load_half(from + index * 2); }
};

struct None {
    static FUNCTION float number(Packed, Index) { return 0; }
};

template <class Type>
struct NumberScales {
    static FUNCTION float scale(Packed scales, Scales, Index group, Index) {
        return Type::number(scales, group);
    }
};
typedef NumberScales<Float> FloatScales;
typedef NumberScales<BFloat> BFloatScales;
typedef NumberScales<HalfFloat> HalfScales;

template <class Type>
struct ScalesOfGroupsAndRows {
    static FUNCTION float scale(Packed scales, Scales of_rows, Index group, Index row) {
        return Type::number(scales, group) * of_rows[row];
    }
};
typedef ScalesOfGroupsAndRows<BFloat> BFloatRowScales;
typedef ScalesOfGroupsAndRows<HalfFloat> HalfRowScales;

struct Exponents {
    static FUNCTION float scale(Packed scales, Scales, Index group, Index) {
        return float_of_bits((unsigned)scales[group] << 23);
    }
};

struct E4M3Scales {  // times the scale of their row
    static FUNCTION float scale(Packed scales, Scales of_rows, Index group, Index row) {
        return e4m3(scales[group]) * of_rows[row];
    }
};

struct E4M3Quotients {  // over the scale of their row
    static FUNCTION float scale(Packed scales, Scales of_rows, Index group, Index row) {
        return e4m3(scales[group]) / of_rows[row];
    }
};

struct RowScales {
    static FUNCTION float scale(Packed, Scales of_rows, Index, Index row) { return of_rows[row]; }
};

// Rounds numbers below 2^22 to integers of at most 127, ties to even.
static FUNCTION Floats rounded_to_bytes(Floats values) {
    const float ulp_is_one = 0x1.8p23f;
    values = values + ulp_is_one - ulp_is_one;
    values = values > 127.0f ? Floats{} + 127.0f : values;
    return values < -127.0f ? Floats{} - 127.0f : values;
}

// Returns lane `from[i]` of `values` as lane i.
static FUNCTION Floats permuted(Floats values, Ints from) {
#if LANES == 16 && defined(__AVX512F__)
    return (Floats)_mm512_permutexvar_ps((__m512i)from, (__m512)values);
#elif LANES == 8 && defined(__AVX2__)
    return (Floats)_mm256_permutevar8x32_ps((__m256)values, (__m256i)from);
#else
    Floats result;
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) result[i] = values[from[i]];
    return result;
#endif
}

// Rotates numbers, or vectors of them, that are `stride` apart, in the order of sums of
// ops/formats/rotation.py.
template <class Number>
static FUNCTION void rotate_apart(Number* n, int stride) {
    Number a = n[0], b = n[stride], p = a + b, q = a - b;
    if (ROTATION_BASE == 2) {
        n[0] = p;
        n[stride] = q;
        return;
    }
    Number c = n[2 * stride], d = n[3 * stride], r = c + d, s = c - d;
    n[0] = p + s;
    n[stride] = p - s;
    n[2 * stride] = r + q;
    n[3 * stride] = r - q;
}

// The same for the lanes of a vector.
static FUNCTION Floats rotate_lanes(Floats values, int stride) {
    Ints lanes = lane_numbers();
    Floats signs = floats(1 - (((lanes & stride) != 0) & 2));
    values = permuted(values, lanes ^ stride) + values * signs;
    if (ROTATION_BASE == 2) return values;
    return permuted(values, lanes & ~stride)
           + permuted(values, (lanes ^ 2 * stride) | stride) * signs;
}

const int ROTATION = ROTATED ? GROUP : ROTATED_VALUES;

// Multiplies ROTATION numbers by the matrix of signs. The sums of integers are exact.
static FUNCTION void rotate(Floats* values) {
    const int count = ROTATION / LANES;
    int stride = 1;
    for (; stride * ROTATION_BASE <= LANES; stride *= ROTATION_BASE)
        for (int i = 0; i < count; i++) values[i] = rotate_lanes(values[i], stride);
    if (stride < LANES) {  // eight lanes: each four is in two vectors
        float* numbers = (float*)values;
        for (int first = 0; first < ROTATION; first += ROTATION_BASE * stride)
            for (int i = first; i < first + stride; i++) rotate_apart(numbers + i, stride);
        stride *= ROTATION_BASE;
    }
    for (stride /= LANES; stride < count; stride *= ROTATION_BASE)
        for (int first = 0; first < count; first += ROTATION_BASE * stride)
            for (int i = first; i < first + stride; i++) rotate_apart(values + i, stride);
}

// Returns what is added to or, where HAS_ZEROS, subtracted from a group.
static FUNCTION float addend(Packed minima, Index row, int groups, int group) {
#if HAS_ZEROS
    const int zero_bytes = (groups * ZERO_BITS + 7) / 8, bit = group * ZERO_BITS;
    return minima[row * zero_bytes + bit / 8] >> bit % 8 & ((1 << ZERO_BITS) - 1);
#else
    return MINIMA::number(minima, row * groups + group);
#endif
}

static FUNCTION Floats values_of(Packed codes, float scale, float minimum) {
    Floats values = CODES::numbers(codes);
#if HAS_ZEROS
    values = values - minimum;
#endif
    values = values * scale;
#if HAS_MINIMA
    values = values + minimum;
#endif
    return values;
}

// out: (rows, COLUMNS). row_scales, minima, column_scales: null where they are not used.
extern "C" void dequantize_rows(Packed packed, Packed scales, Scales row_scales, Packed minima,
                                Scales column_scales, TYPE* out, long long rows, int threads) {
    const int groups = COLUMNS / GROUP;
#pragma omp parallel for num_threads(threads)
    for (Index row = 0; row < rows; row++) {
#if ROTATED_VALUES
        for (int start = 0; start < COLUMNS; start += ROTATED_VALUES) {
            Floats values[ROTATED_VALUES / LANES];
            for (int i = 0; i < ROTATED_VALUES / LANES; i++) {
                const int column = start + i * LANES, group = column / GROUP;
                const float scale = SCALES::scale(scales, row_scales, row * groups + group, row);
                values[i] = values_of(packed + (row * COLUMNS + column) * BITS / 8, scale,
                                      addend(minima, row, groups, group));
            }
            rotate(values);
            for (int i = 0; i < ROTATED_VALUES / LANES; i++)
                store(values[i] * ROTATION_FACTOR,
                      out + row * COLUMNS + start + i * LANES);
        }
#else
        for (int group = 0; group < groups; group++) {
            Index place = row * COLUMNS + group * GROUP;
            Packed codes = packed + place * BITS / 8;
            float scale = SCALES::scale(scales, row_scales, ROTATED ? row : row * groups + group,
                                        row) / ROOT;
            if (ROTATED) {
                Floats values[GROUP / LANES];
                for (int i = 0; i < GROUP / LANES; i++) {
                    values[i] = CODES::numbers(codes + i * LANES * BITS / 8);
#if LEVEL_GROUP
                    float of_level = e4m3(scales[(place + i * LANES) / LEVEL_GROUP]);
                    values[i] = rounded_to_bytes(values[i] * of_level);
#endif
                }
                rotate(values);
                for (int i = 0; i < GROUP / LANES; i++)
                    store(values[i] * scale, out + place + i * LANES);
            } else {
                const float minimum = addend(minima, row, groups, group);
                for (int first = 0; first < GROUP; first += LANES) {
                    Floats values = values_of(codes + first * BITS / 8, scale, minimum);
#if SCALED_COLUMNS
                    values = values * load<Floats>(column_scales + group * GROUP + first);
#endif
                    store(values, out + place + first);
                }
            }
        }
#endif
    }
}
