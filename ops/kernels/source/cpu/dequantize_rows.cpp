// Writes rows of a weight whose block is a row.

#if ROTATION
// Returns lane `from[i]` of `values` as lane i.
static FUNCTION Floats permuted(Floats values, Ints from) {
#if LANES == 16 && defined(__AVX512F__)
    return (Floats)_mm512_permutexvar_ps((__m512i)from, (__m512)values);
#elif LANES == 8 && defined(__AVX2__)
    return (Floats)_mm256_permutevar8x32_ps((__m256)values, (__m256i)from);
#else
    Floats result;
    UNROLLED for (int i = 0; i < LANES; i++) result[i] = values[from[i]];
    return result;
#endif
}

// Rotates numbers in lanes that are `stride` apart, in the order of sums of ops/formats/rotation.py.
static FUNCTION Floats rotate_lanes(Floats values, int stride) {
    Ints lanes = lane_numbers();
    Floats signs = floats(1 - (((lanes & stride) != 0) & 2));
    values = permuted(values, lanes ^ stride) + values * signs;
    if (ROTATION_BASE == 2) return values;
    return permuted(values, lanes & ~stride)
           + permuted(values, (lanes ^ 2 * stride) | stride) * signs;
}

const int TILE = ROTATION > LANES ? ROTATION : LANES, VECTORS = TILE / LANES;

// Rotates the numbers of TILE columns.
static FUNCTION void rotate(Floats* values) {
    int stride = 1;
    for (; stride < ROTATION && stride * ROTATION_BASE <= LANES; stride *= ROTATION_BASE)
        for (int i = 0; i < VECTORS; i++) values[i] = rotate_lanes(values[i], stride);
    if (stride < ROTATION && stride < LANES) {  // eight lanes: each four is in two vectors
        float* numbers = (float*)values;
        for (int first = 0; first < ROTATION; first += ROTATION_BASE * stride)
            for (int i = first; i < first + stride; i++) rotate_apart(numbers + i, stride);
        stride *= ROTATION_BASE;
    }
    for (stride /= LANES; stride && stride < VECTORS; stride *= ROTATION_BASE)
        for (int first = 0; first < VECTORS; first += ROTATION_BASE * stride)
            for (int i = first; i < first + stride; i++) rotate_apart(values + i, stride);
}

static FUNCTION void write_row(Weight weight, Index row, TYPE* out) {
    const float scale = rotated_scale(weight, row);
    for (int start = 0; start < weight.columns; start += TILE) {
        Floats values[VECTORS];
        for (int i = 0; i < VECTORS; i++) values[i] = row_values(weight, row, start + i * LANES);
        rotate(values);
#if HAS_MINIMUM && ROTATES_CODES
        Floats minima[VECTORS];
        for (int i = 0; i < VECTORS; i++) minima[i] = row_minima(weight, row, start + i * LANES);
        rotate(minima);
        for (int i = 0; i < VECTORS; i++)
            store(values[i] * scale + minima[i] / ROOT, out + start + i * LANES);
#else
        for (int i = 0; i < VECTORS; i++) store(values[i] * scale, out + start + i * LANES);
#endif
    }
}
#else
static FUNCTION void write_row(Weight weight, Index row, TYPE* out) {
    const int length = PART_LENGTH ? PART_LENGTH : weight.columns;
    for (int start = 0; start < weight.columns; start += length) {
        Part part = part_of(weight, row, start);
#pragma GCC unroll 4
        for (int first = 0; first < length; first += LANES)
            store(part_values(weight, part, first), out + start + first);
    }
}
#endif

// out: (rows, weight.columns).
extern "C" void dequantize_rows(const Weight* of, TYPE* out, long long rows, int threads) {
    const Weight weight = *of;
    parallel_for(threads, rows,
                 [=](Index row) { write_row(weight, row, out + row * weight.columns); });
}
