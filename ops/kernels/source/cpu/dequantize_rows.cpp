// Writes rows of a weight whose block is a row.

#if ROTATION
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
