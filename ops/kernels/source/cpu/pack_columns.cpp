// `choose_columns` of ops/quantize/grid_error_feedback.py, which documents the steps. COLUMNS is defined, the
// largest number of columns.

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
struct RowPart {
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

template <bool IS_SEARCHED>
struct GridRounders {
    Rounder of[ROW_VECTORS];
    Stored scales[ROW_VECTORS];
    Blocks<true> blocks;
    const float* weights;
    Chosen chosen;
    RowPart part;
    int tries, rounds;

    FUNCTION void load_level(Column& level, int column) const {
        part.load(level, chosen.levels, column);
    }
    FUNCTION void store_level(const Column& level, int column) const {
        part.store(level, chosen.levels, column);
    }

    FUNCTION void begin(int first, const Column* values) {
        int block = first / LENGTH, group = first / GROUP, g = group % GROUPS;
        Column d = {}, dmin = {}, scale = {}, minimum = {};
        if (IS_SEARCHED) {
            for (int v = 0; v < ROW_VECTORS; v++) {
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
        for (int v = 0; v < ROW_VECTORS; v++)
            of[v] = rounder_of(d[v] * scale[v], dmin[v] * minimum[v]);
    }
};

template <bool IS_SEARCHED>
static void choose_rows(float* all_values, const float* shares, const float* weights, Chosen chosen,
                        int columns, RowPart part, int tries, int rounds) {
    GridRounders<IS_SEARCHED> rounders;
    memset(&rounders, 0, sizeof rounders);
    rounders.weights = weights, rounders.chosen = chosen, rounders.part = part;
    rounders.tries = tries, rounders.rounds = rounds;
    Column values[COLUMNS] = {};
    for (int column = 0; column < columns; column++) part.load(values[column], all_values, column);
    choose_in_order<IS_SEARCHED>(values, shares, columns, rounders);
    for (int column = 0; column < columns; column++) part.store(values[column], all_values, column);
}

// values, levels: (columns, rows). shares: (columns, columns). weights: (columns,), or null. The
// others are those of `Columns`; dmin and minimum are used only where the grid has a minimum.
extern "C" void pack_columns(float* values, const float* shares, const float* weights,
                             float* levels, float* d, float* dmin, float* scale, float* minimum,
                             int columns, Index rows, int tries, int rounds, int threads) {
    parallel_for(threads, (rows + ROWS - 1) / ROWS, [=](Index group) {
        const Index first = group * ROWS;
        RowPart part = {rows, (int)(rows - first < ROWS ? rows - first : ROWS)};
        Chosen chosen = {levels + first, d + first, dmin + first, scale + first, minimum + first};
        if (weights)
            choose_rows<true>(values + first, shares, weights, chosen, columns, part, tries,
                              rounds);
        else
            choose_rows<false>(values + first, shares, weights, chosen, columns, part, tries,
                               rounds);
    });
}
