// `RowEncoder.search` of ops/quantize/row_encoder.py, which documents the steps, and the bytes of its choices:
// the same scales and codes, but where two scales are about equally good. A row is brought into a
// buffer, in the basis of its codes. Where groups have scales, a lane holds a group, so that no
// step works across lanes.

// Values of a row that are read together; the buffer holds zeros up to a multiple of it.
const int PIECE = SCALE_COLUMNS ? SCALE_COLUMNS * LANES : LANES;

static FUNCTION float largest_lane(Floats values) {
    float largest = values[0];
    for (int i = 1; i < LANES; i++) largest = values[i] > largest ? values[i] : largest;
    return largest;
}

#if SCALE_COLUMNS
// Returns the first lanes of `a` and `b` in turn, or the last ones.
template <bool LAST>
static FUNCTION Floats zip(Floats a, Floats b) {
#ifdef __clang__
    Floats lanes;
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) lanes[i] = (i & 1 ? b : a)[i / 2 + LAST * LANES / 2];
    return lanes;
#else
    Ints places;
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) places[i] = i / 2 + LAST * LANES / 2 + (i & 1) * LANES;
    return __builtin_shuffle(a, b, places);
#endif
}

// Transposes LANES vectors: each step moves one bit of the number of a lane to that of its vector.
static FUNCTION void transpose(Floats* vectors) {
#pragma GCC unroll 4
    for (int step = 1; step < LANES; step *= 2) {
        Floats zipped[LANES];
#pragma GCC unroll 8
        for (int i = 0; i < LANES / 2; i++) {
            zipped[2 * i] = zip<false>(vectors[i], vectors[i + LANES / 2]);
            zipped[2 * i + 1] = zip<true>(vectors[i], vectors[i + LANES / 2]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) vectors[i] = zipped[i];
    }
}

// Encodes LANES groups, of which `count` are written.
static FUNCTION void encode_groups(const float* values, float inverted, const float* shares,
                                   int tries, Byte* codes, Byte* scales, int count) {
    const int WORDS = SCALE_COLUMNS * BITS / 32, CODES = 32 / BITS;
    Floats group[SCALE_COLUMNS], peak = {};
    for (int part = 0; part < SCALE_COLUMNS; part += LANES) {
        for (int lane = 0; lane < LANES; lane++)
            group[part + lane] = load<Floats>(values + lane * SCALE_COLUMNS + part);
        transpose(group + part);
    }
    for (int i = 0; i < SCALE_COLUMNS; i++) {
        if (HAS_ROW_NUMBERS) group[i] *= inverted;
        peak = larger(peak, magnitude(group[i]));
    }
    Floats unit = stored(SCALE{}, peak * shares[0]), least = all(__builtin_inff());
    for (int t = 0; t < tries && tries > 1; t++) {
        Floats tried = stored(SCALE{}, peak * shares[t]), divisor = divisor_of(tried), error = {};
#pragma GCC unroll 16
        for (int i = 0; i < SCALE_COLUMNS; i++) {
            Floats off = value_of(nearest(group[i] / divisor), tried) - group[i];
            error = multiply_add(off, off, error);
        }
        Ints better = error < least;
        least = either(better, error, least);
        unit = either(better, tried, unit);
    }
    Floats divisor = divisor_of(unit);
    unsigned words[WORDS][LANES];
    for (int word = 0; word < WORDS; word++) {
        Ints bits = {};
        for (int i = 0; i < CODES; i++) {
            int place = BITS == 4 && ORDER == HIGH_FIRST ? i ^ 1 : i;
            bits |= (nearest_codes(group[word * CODES + i] / divisor) & ((1 << BITS) - 1))
                    << place * BITS;
        }
        memcpy(words[word], &bits, sizeof bits);
    }
    Byte bytes[LANES];
    store_bytes(scale_bits(SCALE{}, unit), bytes);
    memcpy(scales, bytes, count);
    for (int lane = 0; lane < count; lane++)
        for (int word = 0; word < WORDS; word++)
            memcpy(codes + (lane * WORDS + word) * 4, &words[word][lane], 4);
}

static FUNCTION void encode_row(const float* values, float row_number, const float* shares,
                                int tries, Byte* codes, Byte* scales, int columns) {
    const int groups = columns / SCALE_COLUMNS;
    const float inverted = inverse(all(row_number))[0];
    for (int first = 0; first < groups; first += LANES)
        encode_groups(values + first * SCALE_COLUMNS, inverted, shares, tries,
                      codes + first * (SCALE_COLUMNS * BITS / 8), scales + first,
                      groups - first < LANES ? groups - first : LANES);
}
#else
const int SUM_VALUES = 4096;  // of a sum of errors in float32

static FUNCTION double error_of(const float* values, Floats unit, int columns) {
    const Floats divisor = divisor_of(unit);
    double error = 0;
    for (int start = 0; start < columns; start += SUM_VALUES) {
        Floats sum = {};
        for (int i = start; i < columns && i < start + SUM_VALUES; i += LANES) {
            Floats lanes = load<Floats>(values + i);
            Floats off = value_of(nearest(lanes / divisor), unit) - lanes;
            sum = multiply_add(off, off, sum);
        }
        for (int i = 0; i < LANES; i++) error += sum[i];
    }
    return error;
}

// full: the unit whose shares are tried.
static FUNCTION void encode_row(const float* values, float full, const float* shares, int tries,
                                Byte* codes, Byte* scales, int columns) {
    float unit = 0;
    double least = 0;
    for (int t = 0; t < tries; t++) {
        float tried = full * shares[t];
        tried = tried < SMALLEST ? SMALLEST : tried;
        double error = tries > 1 ? error_of(values, all(tried), columns) : 0;
        if (t && !(error < least)) continue;
        unit = tried, least = error;
    }
    memcpy(scales, &unit, sizeof unit);
    const Floats divisor = divisor_of(all(unit));
    for (int start = 0; start < columns; start += LANES) {
        Ints bits = nearest_codes(load<Floats>(values + start) / divisor) & ((1 << BITS) - 1);
        if (BITS == 8 && start + LANES <= columns) {
            store_bytes(bits, codes + start);
            continue;
        }
        Byte some[LANES];
        store_bytes(bits, some);
        const int count = columns - start < LANES ? columns - start : LANES;
        if (BITS == 8)
            memcpy(codes + start, some, count);
        else  // rows of whole bytes
            for (int i = 0; i < count; i += 2)
                codes[(start + i) / 2] = ORDER == HIGH_FIRST ? some[i] << 4 | some[i + 1]
                                                             : some[i] | some[i + 1] << 4;
    }
}
#endif

// values: (rows, columns). shares: of the scales that are tried. of_tensor: the number of the
// tensor, 0: it has none. is_finite: set to 0 where a value is not, or its rotation.
extern "C" void pack_rows(const TYPE* values, Byte* codes, Byte* scales, float* row_scales,
                          int* is_finite, const float* shares, int tries, float of_tensor,
                          Index rows, int columns, int threads) {
    const Index row_bytes = (Index)columns * BITS / 8,
                scale_bytes = SCALE_COLUMNS ? columns / (SCALE_COLUMNS ? SCALE_COLUMNS : 1) : 4;
    parallel_ranges(threads, rows, [=](Index row, Index end) {
        const int width = (columns + PIECE - 1) / PIECE * PIECE;
        Buffer<float> buffer(width);
        for (int i = columns / LANES * LANES; i < width; i++) buffer.items[i] = 0;
        Ints bits = {};
        for (; row < end; row++) {
            Ints largest = read_row(values + row * columns, buffer.items, columns);
            bits = largest > bits ? largest : bits;
            float peak = largest_lane((Floats)largest), number = of_tensor;
            if (IS_REQUANTIZED)
                number = peak / 127 < SMALLEST ? SMALLEST : peak / 127;
            else if (!SCALE_COLUMNS && !number)
                number = peak;
            encode_row(buffer.items, number, shares, tries, codes + row * row_bytes,
                       scales + row * scale_bytes, columns);
            if (HAS_ROW_NUMBERS) row_scales[row] = number;
        }
        for (int i = 0; i < LANES; i++)
            if (bits[i] >= 0x7F800000) __atomic_store_n(is_finite, 0, __ATOMIC_RELAXED);
    });
}
