// Weights whose block is a row. ops/formats/row_layout.py says what layouts mean; a kernel's
// constants come from `row_definitions` of kernel_source.py:
//
// BITS, ORDER: of codes; LOW_FIRST, HIGH_FIRST, STREAM, PLANES or PACKS.
// CODEBOOK or NUMBERS: the numbers of 16 codes, or of more or fewer. HAS_OWN_NUMBERS: they are the
// weight's. FLOAT8: e4m3 or e5m2. Otherwise codes are integers, IS_SIGNED or less OFFSET.
// GROUP: values that share a scale, 0: those of a row. TAPS: neighbours with scales of their own.
// IS_ORDERED: columns name their groups. LEVELS: of a group, which codes select.
// SCALE, MINIMUM: structures that read stored numbers. ROW_SCALE: MULTIPLY, DIVIDE or 0.
// ZERO_BITS: of the zero of a group. IS_REQUANTIZED, HAS_COLUMN_SCALES: as in `RowLayout`.
// ROTATION, ROTATION_BASE: 0: none. ROTATES_CODES: before they are scaled. ROOT: of ROTATION.
// ROTATION_FACTOR: 1 / ROOT, as float32 has it.
//
// All else is known when a kernel runs. Rows have whole vectors of LANES values.

enum Order { LOW_FIRST, HIGH_FIRST, STREAM, PLANES, PACKS };
enum RowScale { MULTIPLY = 1, DIVIDE };

// The tensors of a weight, those that its layout has.
struct Weight {
    Packed codes, scales, zeros, minima, group_of_column;
    Scales explained_scales, row_scales, explained_minima, numbers, column_scales;
    int columns, groups;  // of a row
};

static FUNCTION float e4m3(int byte) {
    int exponent = byte >> 3 & 15, mantissa = byte & 7;
    float value = exponent ? float_of_bits((unsigned)(exponent + 120) << 23 | mantissa << 20)
                           : (float)mantissa / 512.0f;
    if ((byte & 0x7F) == 0x7F) value = float_of_bits(0x7FC00000);
    return byte & 0x80 ? -value : value;
}

static FUNCTION float e5m2(int byte) {
    int exponent = byte >> 2 & 31, mantissa = byte & 3;
    float value = exponent ? float_of_bits((unsigned)(exponent + 112) << 23 | mantissa << 21)
                           : (float)mantissa / 65536.0f;
    if (exponent == 31) value = float_of_bits(0x7F800000 | mantissa << 21);
    return byte & 0x80 ? -value : value;
}

#ifndef HAS_VECTORS_OF_FLOAT8
static FUNCTION Floats e4m3(Ints bytes) {
    Floats values;
    UNROLLED for (int i = 0; i < LANES; i++) values[i] = e4m3(bytes[i]);
    return values;
}

static FUNCTION Floats e5m2(Ints bytes) {
    Floats values;
    UNROLLED for (int i = 0; i < LANES; i++) values[i] = e5m2(bytes[i]);
    return values;
}
#endif

// --- codes ---

// Returns the codes of 8 values, of at most 24 bits together.
static FUNCTION int bits_of_eight(Packed from) {
    int bits = from[0];
    if (BITS > 1) bits |= from[1] << 8;
    if (BITS > 2) bits |= from[2] << 16;
    return bits;
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
        UNROLLED for (int byte = 0; byte < 7; byte++) code |= bytes[byte] >> 7 << (6 - byte);
        return code;
    }
    if (place < 7) return bytes[place - 5] >> 5 | (bytes[place - 2] >> 5 & 3) << 3;
    return bytes[2] >> 5 | bytes[3] >> 7 << 4 | bytes[4] >> 7 << 3;
}

// Returns code `i` of a stream of more than 4 bits a code, eight of which are whole bytes.
static FUNCTION int code_of_stream(Packed from, int i) {
    const int bit = i % 8 * BITS, shift = bit % 8;
    Packed bytes = from + i / 8 * BITS + bit / 8;
    int code = bytes[0] >> shift;
    if (shift + BITS > 8) code |= bytes[1] << (8 - shift);
    return code & ((1 << BITS) - 1);
}

// Returns LANES neighbouring codes.
static FUNCTION Ints codes_at(Packed from) {
    if (BITS == 8) return load_bytes(from);
    if (BITS == 4)
        return ORDER == HIGH_FIRST ? load_nibble_pairs(from) : load_low_nibble_pairs(from);
    if (ORDER == PACKS) {
        Ints codes;
        UNROLLED for (int i = 0; i < LANES; i++) codes[i] = code_of_packs(from, i);
        return codes;
    }
    if (ORDER == STREAM && BITS > 4) {
        Ints codes;
        UNROLLED for (int i = 0; i < LANES; i++) codes[i] = code_of_stream(from, i);
        return codes;
    }
    const Ints places = lane_numbers() & 7;
    if (ORDER == PLANES) {  // of eight: low nibbles, then two more bits of each
        Ints low = of_eights(load_word(from), load_word(from + (LANES - 8) / 8 * 6)),
             upper = of_eights(load_short(from + 4), load_short(from + 4 + (LANES - 8) / 8 * 6));
        return (low >> (places << 2) & 15) | (upper >> (places << 1) & 3) << 4;
    }
    return of_eights(bits_of_eight(from), bits_of_eight(from + (LANES - 8) / 8 * BITS))
           >> places * BITS & ((1 << BITS) - 1);
}

#ifdef NUMBERS
TABLE float numbers_of_codes[] = {NUMBERS};
#endif

// Returns the numbers of LANES neighbouring codes.
static FUNCTION Floats numbers_at(Weight weight, Packed from) {
    Ints codes = codes_at(from);
#if defined(CODEBOOK)
    return look_up(codes);
#elif defined(NUMBERS) || HAS_OWN_NUMBERS
    Floats values;
    UNROLLED for (int i = 0; i < LANES; i++)
#ifdef NUMBERS
        values[i] = numbers_of_codes[codes[i]];
#else
        values[i] = weight.numbers[codes[i]];
#endif
    return values;
#elif defined(FLOAT8)
    return FLOAT8(codes);
#else
    if (IS_SIGNED) codes = codes << (32 - BITS) >> (32 - BITS);
    return floats(codes - OFFSET);
#endif
}

// --- stored numbers ---

struct Float {
    static FUNCTION float number(Packed stored, Scales, Index index) {
        return float_of_bits(load_word(stored + index * 4));
    }
};

struct BFloat {
    static FUNCTION float number(Packed stored, Scales, Index index) {
        return float_of_bits(load_short(stored + index * 2) << 16);
    }
};

struct HalfFloat {
    static FUNCTION float number(Packed stored, Scales, Index index) {
        return load_half(stored + index * 2);
    }
};

struct E4M3 {
    static FUNCTION float number(Packed stored, Scales, Index index) { return e4m3(stored[index]); }
};

struct E8M0 {
    static FUNCTION float number(Packed stored, Scales, Index index) {
        return float_of_bits((unsigned)stored[index] << 23);
    }
};

struct Bytes256 {  // of a table of the weight
    static FUNCTION float number(Packed stored, Scales table, Index index) {
        return table[stored[index]];
    }
};

template <class Type>
struct TimesFactor {
    static FUNCTION float number(Packed stored, Scales factor, Index index) {
        return Type::number(stored, factor, index) * factor[0];
    }
};
typedef TimesFactor<BFloat> BFloatTimesFactor;
typedef TimesFactor<HalfFloat> HalfFloatTimesFactor;

struct None {
    static FUNCTION float number(Packed, Scales, Index) { return 0; }
};

// Returns which group a column of a row belongs to.
static FUNCTION int group_of(Weight weight, int column) {
    if (IS_ORDERED) return (int)load_short(weight.group_of_column + (Index)column * 2);
    return GROUP ? column / (GROUP ? GROUP : 1) : 0;
}

// Returns which of the scales, zeros or minima of a row is that of a column.
static FUNCTION int place_of(Weight weight, int column) {
    return group_of(weight, column) * TAPS + column % TAPS;
}

struct ScaleOf {
    static FUNCTION float number(Weight weight, Index row, int column) {
        Index index = row * (weight.groups * TAPS) + place_of(weight, column);
        float scale = SCALE::number(weight.scales, weight.explained_scales, index);
        if (ROW_SCALE == MULTIPLY) scale = scale * weight.row_scales[row];
        if (ROW_SCALE == DIVIDE) scale = scale / weight.row_scales[row];
        return scale;
    }
};

struct ZeroOf {
    static FUNCTION float number(Weight weight, Index row, int column) {
        const int row_bytes = (weight.groups * TAPS * ZERO_BITS + 7) / 8;
        int bit = place_of(weight, column) * ZERO_BITS;
        int byte = weight.zeros[row * row_bytes + bit / 8];
        return (float)(byte >> bit % 8 & ((1 << ZERO_BITS) - 1));
    }
};

struct MinimumOf {
    static FUNCTION float number(Weight weight, Index row, int column) {
        Index index = row * (weight.groups * TAPS) + place_of(weight, column);
        return MINIMUM::number(weight.minima, weight.explained_minima, index);
    }
};

static FUNCTION float level_of(Weight weight, Index row, int column, int code) {
    int place = (group_of(weight, column) * LEVELS + code) * TAPS + column % TAPS;
    return SCALE::number(weight.scales, weight.explained_scales,
                         row * ((Index)weight.groups * TAPS * LEVELS) + place);
}

// --- values ---

enum {
    // Whether LANES columns have one scale.
    HAS_UNIFORM_LANES = TAPS == 1 && !IS_ORDERED && GROUP % LANES == 0,
    // Columns that share their scales. 0: the rest of a row.
    PART_LENGTH = HAS_UNIFORM_LANES ? GROUP : LANES,
    // What is done before a rotation.
    SCALES_CODES = !LEVELS && (IS_REQUANTIZED || !ROTATES_CODES),
    ADDS_MINIMUM = HAS_MINIMUM && !ROTATES_CODES
};

template <bool>
struct LanesOr {
    typedef float Number;
};
template <>
struct LanesOr<false> {
    typedef Floats Number;
};
typedef LanesOr<(bool)HAS_UNIFORM_LANES>::Number OfLanes;

template <class Of>
static FUNCTION void read_numbers(Weight weight, Index row, int column, PRIVATE float& number) {
    number = Of::number(weight, row, column);
}

template <class Of>
static FUNCTION void read_numbers(Weight weight, Index row, int column, PRIVATE Floats& numbers) {
    UNROLLED for (int i = 0; i < LANES; i++) numbers[i] = Of::number(weight, row, column + i);
}

// A part may begin with any multiple of LANES.
static FUNCTION int place_in_part(int) { return 0; }

// Returns the bytes of the codes of some columns.
static FUNCTION int code_bytes(int columns) { return columns * BITS / 8; }

struct Part {
    Packed codes;
    Index row;
    int column;
    OfLanes scale, zero, minimum;
};

// Returns the part of a row that begins with `column`, or its columns from there on.
static FUNCTION Part part_of(Weight weight, Index row, int column) {
    Part part;
    part.codes = weight.codes + row * code_bytes(weight.columns) + code_bytes(column);
    part.row = row;
    part.column = column;
    if (SCALES_CODES) read_numbers<ScaleOf>(weight, row, column, part.scale);
    if (ZERO_BITS) read_numbers<ZeroOf>(weight, row, column, part.zero);
    if (ADDS_MINIMUM) read_numbers<MinimumOf>(weight, row, column, part.minimum);
    return part;
}

// Rounds numbers below 2^22 to integers of at most 127, ties to even.
static FUNCTION Floats rounded_to_bytes(Floats values) {
    const float ulp_is_one = 12582912.0f;
    return limited(values + ulp_is_one - ulp_is_one, 127.0f);
}

// Returns LANES values of a part, from number `first` on; where the layout is rotated, before that.
static FUNCTION Floats part_values(Weight weight, Part part, int first) {
    Packed from = part.codes + code_bytes(first);
    if (LEVELS) {
        Ints codes = codes_at(from);
        Floats values;
        UNROLLED for (int i = 0; i < LANES; i++)
            values[i] = level_of(weight, part.row, part.column + first + i, codes[i]);
        return values;
    }
    Floats values = numbers_at(weight, from);
    if (ZERO_BITS) values = values - part.zero;
    if (SCALES_CODES) values = values * part.scale;
    if (IS_REQUANTIZED) values = rounded_to_bytes(values);
    if (ADDS_MINIMUM) values = values + part.minimum;
    if (HAS_COLUMN_SCALES)
        values = values * load_floats(weight.column_scales + part.column + first);
    return values;
}

// Returns LANES values of a row, from `column` on; where the layout is rotated, before that.
static FUNCTION Floats row_values(Weight weight, Index row, int column) {
    return part_values(weight, part_of(weight, row, column), 0);
}

// --- rotations ---

// Rotates 2 or 4 numbers, or vectors of them, in the order of sums of ops/formats/rotation.py.
template <class Number>
static FUNCTION void rotate_numbers(PRIVATE Number* n) {
    Number p = n[0] + n[1], q = n[0] - n[1];
    if (ROTATION_BASE == 2) {
        n[0] = p;
        n[1] = q;
        return;
    }
    Number r = n[2] + n[3], s = n[2] - n[3];
    n[0] = p + s;
    n[1] = p - s;
    n[2] = r + q;
    n[3] = r - q;
}

// The same of numbers that are `stride` apart.
template <class Number>
static FUNCTION void rotate_apart(PRIVATE Number* values, int stride) {
    Number n[ROTATION_BASE];
    UNROLLED for (int i = 0; i < ROTATION_BASE; i++) n[i] = values[i * stride];
    rotate_numbers(n);
    UNROLLED for (int i = 0; i < ROTATION_BASE; i++) values[i * stride] = n[i];
}

// Returns by what rotated numbers of a row are multiplied.
static FUNCTION float rotated_scale(Weight weight, Index row) {
    if (!ROTATES_CODES) return ROTATION_FACTOR;
    return (IS_REQUANTIZED ? weight.row_scales[row] : ScaleOf::number(weight, row, 0)) / ROOT;
}

// Returns what is added to LANES values of a rotated row, before the rotation.
static FUNCTION Floats row_minima(Weight weight, Index row, int column) {
    Floats minima;
    UNROLLED for (int i = 0; i < LANES; i++) minima[i] = MinimumOf::number(weight, row, column + i);
    return minima;
}
