// Rows of a weight whose block is a row, on GPUs. ops/formats/comfyui.py documents the formats; the
// definitions are those of cpu/dequantize_rows.cpp. A thread writes CHUNKS * LANES neighbouring
// values of a row, LANES = 8.

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

struct SignedBytes {
    static FUNCTION Floats numbers(Packed from) { return floats(load_signed_bytes(from)); }
};

struct SignedNibbles {  // the low nibble first
    static FUNCTION Floats numbers(Packed from) {
        return floats(load_low_nibble_pairs(from) << 28 >> 28);
    }
};

struct E4M3 {
    static FUNCTION Floats numbers(Packed from) {
        Ints bytes = load_bytes(from);
        Floats values;
        for (int i = 0; i < LANES; i++) values.lane[i] = e4m3(bytes.lane[i]);
        return values;
    }
};

struct E5M2 {
    static FUNCTION Floats numbers(Packed from) {
        Ints bytes = load_bytes(from);
        Floats values;
        for (int i = 0; i < LANES; i++) values.lane[i] = e5m2(bytes.lane[i]);
        return values;
    }
};

struct SixBits {  // four bytes of low nibbles, two of upper bits
    static FUNCTION Floats numbers(Packed from) {
        Floats values;
        for (int i = 0; i < LANES; i++) {
            int low = from[i / 2] >> i % 2 * 4 & 15, upper = from[4 + i / 4] >> i % 4 * 2 & 3;
            values.lane[i] = (float)((upper << 4 | low) - 32);
        }
        return values;
    }
};

#ifdef CODEBOOK
struct CodebookNibbles {  // the high nibble first
    static FUNCTION Floats numbers(Packed from) { return look_up(load_nibble_pairs(from)); }
};

struct CodebookLowNibbles {
    static FUNCTION Floats numbers(Packed from) { return look_up(load_low_nibble_pairs(from)); }
};
#endif

struct FloatScales {
    static FUNCTION float scale(Packed scales, Scales, Index group, Index) {
        return ((Scales)scales)[group];
    }
};

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

struct RowScales {
    static FUNCTION float scale(Packed, Scales of_rows, Index, Index row) { return of_rows[row]; }
};

// Returns the numbers of LANES columns; of levels the integers.
static FUNCTION Floats row_numbers(Packed packed, Packed scales, Index place) {
    Floats numbers = CODES::numbers(packed + place / 8 * BITS);
#if LEVEL_GROUP
    float scale = e4m3(scales[place / LEVEL_GROUP]);
    for (int i = 0; i < LANES; i++) {
        float number = numbers.lane[i] * scale + 0x1.8p23f - 0x1.8p23f;  // ties to even
        number = number > 127.0f ? 127.0f : number;
        numbers.lane[i] = number < -127.0f ? -127.0f : number;
    }
#endif
    return numbers;
}

static FUNCTION Floats scaled(Floats numbers, float scale) {
    for (int i = 0; i < LANES; i++) numbers.lane[i] = numbers.lane[i] * scale;
    return numbers;
}

#if ROTATED
const int CHUNKS = 2;

// Returns an element of the power of H4 whose numbers of row and column differ in `difference`.
static FUNCTION float sign_of(int difference) {
    int ends = difference & difference >> 1 & 0x55555555;
    int odd = 0;
    for (; ends; ends &= ends - 1) odd ^= 1;
    return odd ? -1.0f : 1.0f;
}

// Multiplies numbers at a distance by H4: their sum less twice the one at the other end.
static FUNCTION void rotate_four(PRIVATE float* values, int distance) {
    float a = values[0], b = values[distance], c = values[2 * distance], d = values[3 * distance];
    float sum = a + b + (c + d);
    values[0] = sum - (d + d);
    values[distance] = sum - (c + c);
    values[2 * distance] = sum - (b + b);
    values[3 * distance] = sum - (a + a);
}

// A thread sums the sixteens of a group with their signs, and rotates the sum; all is exact.
static FUNCTION void row_chunk(Packed packed, Packed scales, Scales row_scales, Index chunk,
                               PRIVATE Floats* values) {
    const int sixteens = GROUP / 16;
    Index first = chunk / sixteens * GROUP;
    int own = (int)(chunk % sixteens);
    float sums[16];
    for (int i = 0; i < 16; i++) sums[i] = 0;
    for (int other = 0; other < sixteens; other++) {
        float sign = sign_of(own ^ other);
        for (int half = 0; half < 2; half++) {
            Floats numbers = row_numbers(packed, scales, first + other * 16 + half * LANES);
            for (int i = 0; i < LANES; i++) sums[half * LANES + i] += sign * numbers.lane[i];
        }
    }
    for (int i = 0; i < 16; i += 4) rotate_four(sums + i, 1);
    for (int i = 0; i < 4; i++) rotate_four(sums + i, 4);
    float scale = SCALES::scale(scales, row_scales, first / COLUMNS, first / COLUMNS) / ROOT;
    for (int half = 0; half < 2; half++) {
        for (int i = 0; i < LANES; i++) values[half].lane[i] = sums[half * LANES + i];
        values[half] = scaled(values[half], scale);
    }
}
#else
const int CHUNKS = 1;

static FUNCTION void row_chunk(Packed packed, Packed scales, Scales row_scales, Index chunk,
                               PRIVATE Floats* values) {
    Index place = chunk * LANES;
    float scale = SCALES::scale(scales, row_scales, place / GROUP, place / COLUMNS);
    values[0] = scaled(row_numbers(packed, scales, place), scale);
}
#endif
