// `choose_columns` of ops/quantize/grid_error_feedback.py, which documents the steps. A lane holds a row. Several
// vectors of rows are processed together, so that each loaded share serves all of them, and so few
// that all their columns stay in the cache.
//
// Defined besides the constants of pack.h: COLUMNS, the largest number of columns.

const int VECTORS = 2, ROWS = VECTORS * LANES;
// Columns that take up losses together: their sums fill the registers. It divides every group.
const int TILE = 4;

struct Rounder {
    Floats unit, offset, inverted, shift;

    FUNCTION Floats level(Floats value) const {
        return nearest(MINIMUM ? multiply_add(value, inverted, shift) : value * inverted, false);
    }
    FUNCTION Floats value(Floats level) const {
        return MINIMUM ? multiply_add(level, unit, -offset) : level * unit;
    }
};

static FUNCTION Rounder rounder_of(Floats unit, Floats offset) {
    Floats inverted = inverse(unit);
    return {unit, offset, inverted, offset * inverted};
}

// `rows` neighbouring rows of a matrix that has `all_rows`, one row per lane.
struct Part {
    Index all_rows;
    int rows;

    FUNCTION void load(Floats* to, const float* from, int column) const {
        copy((float*)to, from + column * all_rows);
    }
    FUNCTION void store(const Floats* from, float* to, int column) const {
        copy(to + column * all_rows, (const float*)from);
    }
    FUNCTION void copy(float* to, const float* from) const {
        if (rows == ROWS)
            memcpy(to, from, ROWS * sizeof(float));
        else
            memcpy(to, from, rows * sizeof(float));
    }
};

struct Chosen {  // pointers to the first row's numbers
    float *levels, *d, *dmin, *scale, *minimum;
};

typedef Floats Column[VECTORS];

// Adds to columns `first` up to `last` their shares of the losses in the group that starts at
// `from`.
static void take_up(Column* values, const float* shares, int columns, int from, int first,
                    int last) {
    for (int j = first; j < last; j += TILE) {
        Column sums[TILE];
#pragma GCC unroll 4
        for (int t = 0; t < TILE; t++)
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) sums[t][v] = values[j + t][v];
        for (int i = from; i < from + GROUP; i++)
#pragma GCC unroll 4
            for (int t = 0; t < TILE; t++) {
                Floats share = all(shares[(Index)i * columns + j + t]);
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; v++)
                    sums[t][v] = multiply_add(share, values[i][v], sums[t][v]);
            }
#pragma GCC unroll 4
        for (int t = 0; t < TILE; t++)
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) values[j + t][v] = sums[t][v];
    }
}

// Chooses the scales of the group that begins at column `first`, and in a block's first group the
// super-scales.
static void choose_scales(Stored& scales, Blocks<true>& blocks, const Column* values, int vector,
                          const float* weights, int first, int tries, int rounds) {
    int g = first % LENGTH / GROUP;
    bool whole = g == 0;
    for (int i = 0; i < (whole ? LENGTH : GROUP); i++) {
        blocks.values[g * GROUP + i] = values[first + i][vector];
        blocks.weights[g * GROUP + i] = all(weights[first + i]);
    }
    if (whole) blocks.normalise();
    for (int of = g; of < (whole ? GROUPS : g + 1); of++) blocks.prepare(of);
    if (whole)
        blocks.first_scales(scales, tries, rounds), blocks.restore(scales);
    else
        blocks.fit_group(g, scales, tries, rounds);
}

template <bool SEARCHED>
static void choose_rows(float* all_values, const float* shares, const float* weights, Chosen chosen,
                        int columns, Part part, int tries, int rounds) {
    Column values[COLUMNS] = {};
    Stored scales[VECTORS] = {};
    Blocks<true> blocks;
    for (int column = 0; column < columns; column++) part.load(values[column], all_values, column);
    for (int first = 0; first < columns; first += GROUP) {
        int block = first / LENGTH, group = first / GROUP, g = group % GROUPS, stop = first + GROUP;
        Column d = {}, dmin = {}, scale = {}, minimum = {};
        if (SEARCHED) {
            for (int v = 0; v < VECTORS; v++) {
                choose_scales(scales[v], blocks, values, v, weights, first, tries, rounds);
                d[v] = scales[v].d, dmin[v] = scales[v].dmin;
                scale[v] = scales[v].scale[g], minimum[v] = scales[v].minimum[g];
            }
            if (g == 0) part.store(d, chosen.d, block);
            part.store(scale, chosen.scale, group);
            if (MINIMUM && g == 0) part.store(dmin, chosen.dmin, block);
            if (MINIMUM) part.store(minimum, chosen.minimum, group);
        } else {
            part.load(d, chosen.d, block), part.load(scale, chosen.scale, group);
            if (MINIMUM)
                part.load(dmin, chosen.dmin, block), part.load(minimum, chosen.minimum, group);
        }
        Rounder rounder[VECTORS];
        for (int v = 0; v < VECTORS; v++)
            rounder[v] = rounder_of(d[v] * scale[v], dmin[v] * minimum[v]);
        for (int column = first; column < stop; column++) {
            Column level = {};
            if (!SEARCHED) part.load(level, chosen.levels, column);
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) {
                Floats target = values[column][v], before = {};
                if (!SEARCHED) before = rounder[v].value(level[v]), target += before;
                level[v] = rounder[v].level(target);
                Floats value = rounder[v].value(level[v]);
                values[column][v] = SEARCHED ? target - value : value - before;
            }
            part.store(level, chosen.levels, column);
            for (int later = column + 1; later < stop; later++) {
                Floats share = all(shares[(Index)column * columns + later]);
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; v++)
                    values[later][v] = multiply_add(share, values[column][v], values[later][v]);
            }
        }
        take_up(values, shares, columns, first, stop, columns);
    }
    for (int column = 0; column < columns; column++) part.store(values[column], all_values, column);
}

// values, levels: (columns, rows). shares: (columns, columns). weights: (columns,), or null. The
// others are those of `Columns`; dmin and minimum are used only where the grid has a minimum.
extern "C" void pack_columns(float* values, const float* shares, const float* weights,
                             float* levels, float* d, float* dmin, float* scale, float* minimum,
                             int columns, Index rows, int tries, int rounds, int threads) {
    parallel_for(threads, (rows + ROWS - 1) / ROWS, [=](Index group) {
        const Index first = group * ROWS;
        Part part = {rows, (int)(rows - first < ROWS ? rows - first : ROWS)};
        Chosen chosen = {levels + first, d + first, dmin + first, scale + first, minimum + first};
        if (weights)
            choose_rows<true>(values + first, shares, weights, chosen, columns, part, tries,
                              rounds);
        else
            choose_rows<false>(values + first, shares, weights, chosen, columns, part, tries,
                               rounds);
    });
}
