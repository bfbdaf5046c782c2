// Computes out = softmax(scale * query key^T + mask) value, summed in float32, in one pass: the
// scores of a few queries with a chunk of the keys never leave the cache of a core. When a later
// chunk has a larger score, the sums of the earlier ones shrink accordingly (Milakov and
// Gimelshein, "Online normalizer calculation for softmax", 2018).
//
// Both products are of units of 32 bits: a float, or two neighbouring numbers in bfloat16 where the
// CPU multiplies and adds such pairs. Their right factors, keys and values, are packed once for
// each head: groups of up to GROUP columns, in each of them one row of columns after the other.

#include <math.h>

typedef unsigned Unit;

static FUNCTION int smaller(int a, int b) { return a < b ? a : b; }
static FUNCTION int larger(int a, int b) { return a > b ? a : b; }
static FUNCTION Index rounded_up(Index a, int multiple) {
    return (a + multiple - 1) / multiple * multiple;
}

static FUNCTION float to_float(float value) { return value; }
static FUNCTION float to_float(Half value) { return float_of_half(value.bits); }
static FUNCTION float to_float(BFloat16 value) { return float_of_bits((unsigned)value.bits << 16); }

static FUNCTION constexpr bool is_bfloat16(const BFloat16*) { return true; }
static FUNCTION constexpr bool is_bfloat16(const void*) { return false; }

#if LANES == 16 && defined(__AVX512BF16__)
const int PAIR = is_bfloat16((const TYPE*)0) ? 2 : 1;  // numbers in a unit
#else
const int PAIR = 1;
#endif

#if LANES == 16 && defined(__AMX_BF16__) && defined(__linux__)
#define HAS_AMX
#include <sys/syscall.h>
#include <unistd.h>

// Asks Linux for the tiles of AMX, which a process may not use before.
static bool get_tiles() {
    const int request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}
static const bool has_tiles = PAIR == 2 && get_tiles();
#else
static const bool has_tiles = false;
#endif

const int VECTORS = LANES == 16 ? 4 : 2, GROUP = VECTORS * LANES;
const int ROWS = 6;                         // their sums with VECTORS fit into the registers
const int TILE_ROWS = 16, TILE_UNITS = 16;  // of AMX
const int MAX_UNITS = 128;                  // that are summed before they join a larger sum
const int BLOCK = 96;                       // queries of a task: whole ROWS and TILE_ROWS
// Keys of a chunk, and the units that these and their values are packed in, for a core's cache.
const int MAX_CHUNK = 256, CHUNK_UNITS = 65536;
const Index PACKED_BYTES = 8 << 20;  // of the heads that are packed at a time, if more than one

// A tensor of four dimensions.
template <class T>
struct Operand {
    T* values;
    Index strides[4];

    FUNCTION T* at(Index batch, Index head, Index token, Index place) const {
        return values + batch * strides[0] + head * strides[1] + token * strides[2] +
               place * strides[3];
    }
};

struct Attention {
    Operand<const TYPE> query, key, value;  // (batches, heads or key_heads, tokens, width)
    Operand<TYPE> out;                      // (batches, heads, queries, value_width)
    Operand<const float> mask;              // (batches, heads, queries, keys), or null
    int batches, heads, key_heads, queries, keys, width, value_width;
    float scale;
};

// Returns a unit of numbers `stride` apart, zero behind the last of `left`.
static FUNCTION Unit unit_of(const TYPE* from, Index stride, int left) {
    Unit unit;
    if (PAIR == 1) {
        float value = to_float(*from);
        memcpy(&unit, &value, sizeof unit);
    } else {
        unsigned short pair[2] = {};
        memcpy(pair, from, sizeof(TYPE));
        if (left > 1) memcpy(pair + 1, from + stride, sizeof(TYPE));
        memcpy(&unit, pair, sizeof unit);
    }
    return unit;
}

// A right factor of a product: units (units, columns), both padded with zeros.
struct Factor {
    int units, columns;
    Unit* values;

    FUNCTION int columns_of(int group) const { return smaller(GROUP, columns - group); }

    // group: its first column
    FUNCTION Unit* row(int group, int unit) const {
        return values + (Index)group * units + (Index)unit * columns_of(group);
    }

    // Packs a group of numbers (count, column_count) of these strides.
    void pack(const TYPE* from, Index stride, Index column_stride, int count, int column_count,
              int group) const {
        from += group * column_stride;
        for (int unit = 0; unit < units; unit++, from += PAIR * stride) {
            int left = count - unit * PAIR;
            int whole = left > 0 ? smaller(columns_of(group), column_count - group) : 0;
            Unit* to = row(group, unit);
            for (int column = 0; column < whole; column++)
                to[column] = unit_of(from + column * column_stride, stride, left);
            for (int column = whole; column < columns_of(group); column++) to[column] = 0;
        }
    }
};

static FUNCTION Floats add_product(Floats sums, Words a, Words b) {
#if LANES == 16 && defined(__AVX512BF16__)
    if (PAIR == 2)
        return (Floats)_mm512_dpbf16_ps((__m512)sums, (__m512bh)(__m512i)a, (__m512bh)(__m512i)b);
#endif
    return multiply_add((Floats)a, (Floats)b, sums);
}

// Adds the product of ROWS rows of units, `stride` apart, with COUNT vectors of each row of `right`
// to rows of sums.
template <int COUNT>
static void multiply(const Unit* left, int stride, const Unit* right, int units, float* sums,
                     int sums_stride) {
    Floats products[ROWS][COUNT] = {};
    for (int unit = 0; unit < units; unit++, right += COUNT * LANES) {
        Words vectors[COUNT];
#pragma GCC unroll 4
        for (int i = 0; i < COUNT; i++) vectors[i] = load<Words>(right + i * LANES);
#pragma GCC unroll 6
        for (int row = 0; row < ROWS; row++) {
            Words factor = Words{} + left[row * stride + unit];
#pragma GCC unroll 4
            for (int i = 0; i < COUNT; i++)
                products[row][i] = add_product(products[row][i], factor, vectors[i]);
        }
    }
#pragma GCC unroll 6
    for (int row = 0; row < ROWS; row++)
#pragma GCC unroll 4
        for (int i = 0; i < COUNT; i++) {
            float* to = sums + row * sums_stride + i * LANES;
            store(load<Floats>(to) + products[row][i], to);
        }
}

#ifdef HAS_AMX
struct TileConfiguration {
    unsigned char palette = 1, start_row = 0, reserved[14] = {};
    unsigned short bytes[16] = {64, 64, 64, 64, 64, 64};
    unsigned char rows[16] = {16, 16, 16, 16, 16, 16};
};

// The same of TILE_ROWS rows by AMX; units: a multiple of TILE_UNITS.
template <int COUNT>
static void multiply_tiles(const Unit* left, int stride, const Unit* right, int units, float* sums,
                           int sums_stride) {
    const int bytes = sizeof(Unit), right_bytes = COUNT * LANES * bytes;
    const int sums_bytes = sums_stride * bytes;
    _tile_loadd(0, sums, sums_bytes);
    if (COUNT > 1) _tile_loadd(1, sums + LANES, sums_bytes);
    if (COUNT > 2) _tile_loadd(2, sums + 2 * LANES, sums_bytes);
    if (COUNT > 3) _tile_loadd(3, sums + 3 * LANES, sums_bytes);
    for (int unit = 0; unit < units; unit += TILE_UNITS, right += TILE_UNITS * COUNT * LANES) {
        _tile_loadd(4, left + unit, stride * bytes);
        _tile_loadd(5, right, right_bytes);
        _tile_dpbf16ps(0, 4, 5);
        if (COUNT > 1) {
            _tile_loadd(5, right + LANES, right_bytes);
            _tile_dpbf16ps(1, 4, 5);
        }
        if (COUNT > 2) {
            _tile_loadd(5, right + 2 * LANES, right_bytes);
            _tile_dpbf16ps(2, 4, 5);
        }
        if (COUNT > 3) {
            _tile_loadd(5, right + 3 * LANES, right_bytes);
            _tile_dpbf16ps(3, 4, 5);
        }
    }
    _tile_stored(0, sums, sums_bytes);
    if (COUNT > 1) _tile_stored(1, sums + LANES, sums_bytes);
    if (COUNT > 2) _tile_stored(2, sums + 2 * LANES, sums_bytes);
    if (COUNT > 3) _tile_stored(3, sums + 3 * LANES, sums_bytes);
}
#endif

typedef void (*Multiply)(const Unit*, int, const Unit*, int, float*, int);
static const Multiply multiply_vectors[] = {0, multiply<1>, multiply<2>, multiply<3>, multiply<4>};
#ifdef HAS_AMX
static const Multiply multiply_in_tiles[] = {0, multiply_tiles<1>, multiply_tiles<2>,
                                             multiply_tiles<3>, multiply_tiles<4>};
#else
static const Multiply* const multiply_in_tiles = multiply_vectors;
#endif

// Adds the product of rows of units with whole groups of `right`, from its row `first` on, to rows
// of sums.
static FUNCTION void multiply_groups(const Unit* left, int stride, Factor right, int first_column,
                                     int last_column, int first, int units, float* sums,
                                     int sums_stride) {
    const Multiply* variants = has_tiles ? multiply_in_tiles : multiply_vectors;
    for (int group = first_column; group < last_column; group += GROUP)
        for (int unit = 0; unit < units; unit += MAX_UNITS)
            variants[right.columns_of(group) / LANES](
                left + unit, stride, right.row(group, first + unit),
                smaller(MAX_UNITS, units - unit), sums + group - first_column, sums_stride);
}

// Polynomials for 2^f, |f| <= 1/2, with the smallest largest error of their degree: 2e-9 and 3e-6.
static const float accurate[] = {1.53458119e-4f, 1.33999312e-3f, 9.61848896e-3f, 5.55032878e-2f,
                                 0.240226469f,    0.693147206f,   1};
static const float fast[] = {9.57010179e-3f, 5.59178603e-2f, 0.240247448f, 0.693121815f,
                             0.999999261f};
static FUNCTION const float (&coefficients_of(const void*))[7] { return accurate; }
static FUNCTION const float (&coefficients_of(const BFloat16*))[5] { return fast; }

// Returns 2^x for x <= 0, and 0 below 2^-126: 2^n * 2^f with n an integer and |f| <= 1/2.
static FUNCTION Floats power_of_two(Floats x) {
    const float to_integer = 12582912;  // 1.5 * 2^23: sums of this size are integers
    Floats shifted = x + to_integer, f = x - (shifted - to_integer), power = {};
#pragma GCC unroll 8
    for (float coefficient : coefficients_of((const TYPE*)0))
        power = multiply_add(power, f, Floats{} + coefficient);
    Words scale = (Words)shifted << 23;  // n in the bits of an exponent
    return x < -126 ? Floats{} : (Floats)((Words)power + scale);
}

static FUNCTION Floats larger(Floats a, Floats b) {
#if LANES == 16 && defined(__AVX512F__)
    return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return a > b ? a : b;
#endif
}

static FUNCTION float largest_of(Floats values) {
#if LANES == 16 && defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)values);
#else
    float largest = values[0];
    for (int lane = 1; lane < LANES; lane++)
        largest = values[lane] > largest ? values[lane] : largest;
    return largest;
#endif
}

// What a query has seen so far: its largest score, and in each lane a sum of powers.
struct Progress {
    float largest = -INFINITY;
    Floats sums = {};
};

// Scales `count` scores and adds a mask.
static void add_mask(float* scores, int count, float scale, const float* mask, Index stride) {
    for (int i = 0; i < count; i++) scores[i] = scores[i] * scale + mask[i * stride];
}

// Replaces a row of `count` scores by units of their powers, relative to the largest of the row so
// far, and by zeros up to `padded`. Returns by how much what was summed before shrinks.
// scale: of the scores, not negative.
static FUNCTION float take_powers(float* scores, int count, int padded, float scale,
                                  Progress& progress) {
    for (int i = count; i < padded; i++) scores[i] = -INFINITY;
    Floats largest = Floats{} - INFINITY, others = largest;
    int first = 0;
    for (; first + 2 * LANES <= padded; first += 2 * LANES) {
        largest = larger(load<Floats>(scores + first), largest);
        others = larger(load<Floats>(scores + first + LANES), others);
    }
    if (first < padded) largest = larger(load<Floats>(scores + first), largest);
    float maximum = largest_of(larger(largest, others));
    maximum = maximum > progress.largest ? maximum : progress.largest;
    const float origin = maximum == -INFINITY ? 0 : maximum;  // all are masked
    const float factor = scale * 1.44269504f;                 // the logarithm of e to base 2
    float shrinkage = 1;
    if (maximum != progress.largest) {
        shrinkage = power_of_two(Floats{} + (progress.largest - origin) * factor)[0];
        progress.sums *= shrinkage;
        progress.largest = maximum;
    }
    for (int i = 0; i < padded; i += LANES) {
        Floats powers = power_of_two((load<Floats>(scores + i) - origin) * factor);
        progress.sums += powers;
        if (PAIR == 2)
            store_rounded(powers, (BFloat16*)scores + i);
        else
            memcpy(scores + i, &powers, sizeof powers);
    }
    return shrinkage;
}

// Computes the attention of a block of a head's queries, from `first` on, with all its keys.
static void attend(const Attention& of, int batch, int head, int first, Factor keys,
                   Factor values) {
    const int rows = has_tiles ? TILE_ROWS : ROWS, queries = smaller(BLOCK, of.queries - first);
    const int padded = rounded_up(queries, rows), key_units = keys.units + values.columns / PAIR;
    const int chunk = smaller(MAX_CHUNK, larger(1, CHUNK_UNITS / GROUP / key_units) * GROUP);
    const Index query_units = padded * keys.units, sum_count = padded * values.columns;
    Buffer<Unit> memory(query_units + sum_count + rows * chunk);
    Unit* left = memory.items;
    float *sums = (float*)(left + query_units), *scores = sums + sum_count;
    Progress progress[BLOCK];
    memset(left, 0, (query_units + sum_count) * sizeof(Unit));
    for (int row = 0; row < queries; row++) {
        const TYPE* query = of.query.at(batch, head, first + row, 0);
        for (int i = 0; i < of.width; i += PAIR)
            left[row * keys.units + i / PAIR] = unit_of(query + i, 1, of.width - i);
    }
#ifdef HAS_AMX
    TileConfiguration configuration;
    if (has_tiles) _tile_loadconfig(&configuration);
#endif
    for (int start = 0; start < of.keys; start += chunk) {
        const int stop = smaller(start + chunk, keys.columns), length = stop - start;
        const int count = smaller(length, of.keys - start);
        for (int row = 0; row < padded; row += rows) {
            memset(scores, 0, rows * chunk * sizeof(float));
            multiply_groups(left + row * keys.units, keys.units, keys, start, stop, 0, keys.units,
                            scores, chunk);
            for (int i = 0; i < rows && row + i < queries; i++) {
                float *of_query = scores + i * chunk, scale = of.scale;
                if (of.mask.values) {
                    const float* mask = of.mask.at(batch, head, first + row + i, start);
                    add_mask(of_query, count, scale, mask, of.mask.strides[3]);
                    scale = 1;
                }
                float shrinkage = take_powers(of_query, count, length, scale, progress[row + i]);
                if (shrinkage != 1)
                    for (int column = 0; column < values.columns; column++)
                        sums[(row + i) * values.columns + column] *= shrinkage;
            }
            multiply_groups((const Unit*)scores, chunk, values, 0, values.columns, start / PAIR,
                            length / PAIR, sums + row * values.columns, values.columns);
        }
    }
#ifdef HAS_AMX
    if (has_tiles) _tile_release();
#endif
    for (int row = 0; row < queries; row++) {
        float sum = 0;
        for (int lane = 0; lane < LANES; lane++) sum += progress[row].sums[lane];
        const float inverse = sum == 0 ? 0 : 1 / sum;  // without an unmasked key: zeros
        TYPE* out = of.out.at(batch, head, first + row, 0);
        for (int column = 0; column < of.value_width; column += LANES) {
            TYPE rounded[LANES];
            store(load<Floats>(sums + row * values.columns + column) * inverse, rounded);
            memcpy(out + column, rounded, smaller(LANES, of.value_width - column) * sizeof(TYPE));
        }
    }
}

extern "C" void attention(const Attention* pointer, int threads) {
    const Attention of = *pointer;
    const int units = has_tiles ? TILE_UNITS : 1;  // at a time
    const int key_units = rounded_up((of.width + PAIR - 1) / PAIR, units);
    const int key_count = rounded_up(of.keys, larger(LANES, units * PAIR));
    const int value_units = key_count / PAIR, value_columns = rounded_up(of.value_width, LANES);
    const Index keys_size = (Index)key_units * key_count;
    const Index size = keys_size + (Index)value_units * value_columns;
    const int all = of.batches * of.key_heads, repeats = of.heads / of.key_heads;
    const int at_once = smaller(all, larger(1, PACKED_BYTES / (size * sizeof(Unit))));
    const int key_groups = (key_count + GROUP - 1) / GROUP;
    const int groups = key_groups + (value_columns + GROUP - 1) / GROUP;
    const int blocks = (of.queries + BLOCK - 1) / BLOCK;
    Buffer<Unit> memory(at_once * size);
    Unit* packed = memory.items;
    auto keys_of = [=](int place) { return Factor{key_units, key_count, packed + place * size}; };
    auto values_of = [=](int place) {
        return Factor{value_units, value_columns, packed + place * size + keys_size};
    };
    for (int first = 0; first < all; first += at_once) {
        const int count = smaller(at_once, all - first);
        parallel_for(threads, count * groups, [=](Index task) {
            int place = task / groups, group = task % groups;
            int batch = (first + place) / of.key_heads, head = (first + place) % of.key_heads;
            if (group < key_groups)
                keys_of(place).pack(of.key.at(batch, head, 0, 0), 1, of.key.strides[2], of.width,
                                    of.keys, group * GROUP);
            else
                values_of(place).pack(of.value.at(batch, head, 0, 0), of.value.strides[2], 1,
                                      of.keys, of.value_width, (group - key_groups) * GROUP);
        });
        Index taken = 0, *turns = &taken;
        parallel(threads, [=](int) {
            for (Index task; (task = take_turn(turns)) < count * repeats * blocks;) {
                int place = task / blocks / repeats, repeat = task / blocks % repeats;
                int batch = (first + place) / of.key_heads, head = (first + place) % of.key_heads;
                attend(of, batch, head * repeats + repeat, task % blocks * BLOCK, keys_of(place),
                       values_of(place));
            }
        });
    }
}
