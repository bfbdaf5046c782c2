// The rotations of ops/formats/rotation.py, of lanes and of vectors of a row.

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
#endif
