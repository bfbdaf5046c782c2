// Rows of a weight whose block is a row, on GPUs. A block of WIDTH * HEIGHT threads takes HEIGHT
// rows of TILE columns; a thread takes CHUNKS times LANES of these, at its position in the row, WIDTH
// behind that, and so on. Rotated numbers are decoded once, and exchanged in shared memory.

enum {
    TILE = WIDTH * CHUNKS * LANES,
    SHARED_FLOATS = TILE + TILE / LANES,  // of a row
    // Strides from this one on lie in several vectors.
    FIRST_SHARED_STRIDE = ROTATION_BASE == 4 ? 4 : LANES
};

// Returns where number `i` of a row is in shared memory: neighbouring vectors in different banks.
static FUNCTION int shared_place(int i) { return i + i / LANES; }

template <int STRIDE>
static FUNCTION void rotate_lanes(PRIVATE Floats& values) {
    UNROLLED for (int i = 0; i < LANES; i++)
        if (STRIDE < ROTATION && i / STRIDE % ROTATION_BASE == 0)
            rotate_apart(&values[i], STRIDE);
}

// Rotates the numbers of a row of the tile. Every thread of the row calls it.
template <class SharedFloats>
static FUNCTION void rotate_tile(SharedFloats shared, int position, PRIVATE Floats* values) {
    UNROLLED for (int chunk = 0; chunk < CHUNKS; chunk++) {
        rotate_lanes<1>(values[chunk]);
        if (ROTATION_BASE == 2) {
            rotate_lanes<2>(values[chunk]);
            rotate_lanes<4>(values[chunk]);
        }
    }
    if (ROTATION <= FIRST_SHARED_STRIDE) return;
    UNROLLED for (int chunk = 0; chunk < CHUNKS; chunk++) {
        const int first = (position + chunk * WIDTH) * LANES;
        UNROLLED for (int i = 0; i < LANES; i++) shared[shared_place(first + i)] = values[chunk][i];
    }
    UNROLLED for (int stride = FIRST_SHARED_STRIDE; stride < ROTATION; stride *= ROTATION_BASE) {
        wait_for_threads();
        for (int i = position; i < TILE / ROTATION_BASE; i += WIDTH) {
            const int first = i / stride * stride * ROTATION_BASE + i % stride;
            float n[ROTATION_BASE];
            UNROLLED for (int j = 0; j < ROTATION_BASE; j++)
                n[j] = shared[shared_place(first + j * stride)];
            rotate_numbers(n);
            UNROLLED for (int j = 0; j < ROTATION_BASE; j++)
                shared[shared_place(first + j * stride)] = n[j];
        }
    }
    wait_for_threads();
    UNROLLED for (int chunk = 0; chunk < CHUNKS; chunk++) {
        const int first = (position + chunk * WIDTH) * LANES;
        UNROLLED for (int i = 0; i < LANES; i++) values[chunk][i] = shared[shared_place(first + i)];
    }
    wait_for_threads();
}

// Returns the first column of a chunk of a thread. start: the tile's.
static FUNCTION int column_of(int start, int position, int chunk) {
    return start + (position + chunk * WIDTH) * LANES;
}

// Computes the values of a thread's chunks, those within the weight.
//
// is_row: whether there is such a row. shared: SHARED_FLOATS, of the row.
template <class SharedFloats>
static FUNCTION void tile_values(Weight weight, Index row, bool is_row, int start, int position,
                                 SharedFloats shared, PRIVATE Floats* values) {
    UNROLLED for (int chunk = 0; chunk < CHUNKS; chunk++) {
        const int column = column_of(start, position, chunk);
        if (is_row && column < weight.columns) values[chunk] = row_values(weight, row, column);
    }
#if ROTATION
    rotate_tile(shared, position, values);
    const float scale = is_row ? rotated_scale(weight, row) : 0;
    UNROLLED for (int chunk = 0; chunk < CHUNKS; chunk++) values[chunk] = values[chunk] * scale;
#if HAS_MINIMUM && ROTATES_CODES
    Floats minima[CHUNKS];
    UNROLLED for (int chunk = 0; chunk < CHUNKS; chunk++) {
        const int column = column_of(start, position, chunk);
        if (is_row && column < weight.columns) minima[chunk] = row_minima(weight, row, column);
    }
    rotate_tile(shared, position, minima);
    UNROLLED for (int chunk = 0; chunk < CHUNKS; chunk++)
        values[chunk] = values[chunk] + minima[chunk] / ROOT;
#endif
#endif
}
