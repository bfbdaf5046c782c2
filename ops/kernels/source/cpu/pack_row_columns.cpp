// `choose_codes` of ops/quantize/row_columns.py, which documents the steps.

struct UnitRounder {
    Floats unit, divisor;

    FUNCTION Floats level(Floats value) const { return nearest(value / divisor); }
    FUNCTION Floats value(Floats level) const { return value_of(level, unit); }
};

struct UnitRounders {
    UnitRounder of[ROW_VECTORS];
    Column *units, *levels;
    const float *weights, *tried_shares;
    int tries;  // of scales of groups, 0: they are kept

    FUNCTION void begin(int first, const Column* values) {
        Column& unit = units[SCALE_COLUMNS ? first / GROUP_COLUMNS : 0];
#if SCALE_COLUMNS
        for (int v = 0; v < ROW_VECTORS && tries; v++) unit[v] = best_unit(first, values, v);
#endif
        for (int v = 0; v < ROW_VECTORS; v++) of[v] = {unit[v], divisor_of(unit[v])};
    }
#if SCALE_COLUMNS
    FUNCTION Floats best_unit(int first, const Column* values, int vector) const {
        Floats peak = {}, least = all(__builtin_inff());
        for (int i = first; i < first + GROUP_COLUMNS; i++)
            peak = larger(peak, magnitude(values[i][vector]));
        Floats unit = stored(SCALE{}, peak * tried_shares[0]);
        for (int t = 0; t < tries; t++) {
            Floats tried = stored(SCALE{}, peak * tried_shares[t]), divisor = divisor_of(tried),
                   error = {};
            for (int i = first; i < first + GROUP_COLUMNS; i++) {
                Floats value = values[i][vector],
                       off = value_of(nearest(value / divisor), tried) - value;
                error = multiply_add(off * weights[i], off, error);
            }
            Ints better = error < least;
            least = either(better, error, least);
            unit = either(better, tried, unit);
        }
        return unit;
    }
#endif
    FUNCTION void load_level(Column& level, int column) const {
        memcpy(level, levels[column], sizeof level);
    }
    FUNCTION void store_level(const Column& level, int column) const {
        memcpy(levels[column], level, sizeof level);
    }
};

struct Rows {  // scales of groups are overwritten; strides are from a row to the next one
    const TYPE* values;
    Byte *codes, *scales;
    const float* row_scales;
    Index value_stride, code_stride, scale_stride;
};

// Writes the codes of levels, those of 32 bits at a time.
static void write_codes(const Rows& rows, const Column* levels, int columns, int count) {
    const int TOGETHER = 32 / BITS;
    for (int column = 0; column < columns; column += TOGETHER) {
        int words[ROW_VECTORS][LANES];
        const int some = columns - column < TOGETHER ? columns - column : TOGETHER;
        for (int v = 0; v < ROW_VECTORS; v++) {
            Ints word = {};
            for (int i = 0; i < some; i++) {
                int place = BITS == 4 && ORDER == HIGH_FIRST ? i ^ 1 : i;
                word |= (nearest_codes(levels[column + i][v]) & ((1 << BITS) - 1))
                        << place * BITS;
            }
            memcpy(words[v], &word, sizeof word);
        }
        Byte* to = rows.codes + column * BITS / 8;
        if (some == TOGETHER)
            for (int r = 0; r < count; r++)
                memcpy(to + r * rows.code_stride, &words[r / LANES][r % LANES], 4);
        else
            for (int r = 0; r < count; r++)
                memcpy(to + r * rows.code_stride, &words[r / LANES][r % LANES], some * BITS / 8);
    }
}

#if SCALE_COLUMNS
static void write_scales(const Rows& rows, const Column* units, int groups, int count) {
    for (int g = 0; g < groups; g++) {
        Byte bytes[ROW_VECTORS][LANES];
        for (int v = 0; v < ROW_VECTORS; v++) store_bytes(scale_bits(SCALE{}, units[g][v]), bytes[v]);
        for (int r = 0; r < count; r++)
            rows.scales[r * rows.scale_stride + g] = bytes[r / LANES][r % LANES];
    }
}
#endif

// Chooses the codes of at most ROWS rows.
static void choose_rows(Rows rows, const float* shares, const float* steps,
                        const float* weights, const float* tried_shares, int tries, int columns,
                        int sweeps, int count) {
    const int groups = SCALE_COLUMNS ? columns / GROUP_COLUMNS : 1;
    Buffer<Column> all_columns(groups + 4 * columns);
    Buffer<float> row(columns + LANES);
    Column *units = all_columns.items, *target = units + groups, *levels = target + columns,
           *values = levels + columns, *errors = values + columns;
    memset((void*)units, 0, (groups + columns) * sizeof(Column));
    for (int r = 0; r < count; r++) {
        const TYPE* from = rows.values + r * rows.value_stride;
        read_row(from, row.items, columns);
        const float inverted = HAS_ROW_NUMBERS ? 1 / rows.row_scales[r] : 1;
        for (int i = 0; i < columns; i++) ((float*)target[i])[r] = row.items[i] * inverted;
        for (int g = 0; g < groups; g++)
            ((float*)units[g])[r] = SCALE::number(rows.scales + r * rows.scale_stride, 0, g);
    }
    UnitRounders rounders = {{}, units, levels, weights, tried_shares, SCALE_COLUMNS ? tries : 0};
    memcpy((void*)values, target, columns * sizeof(Column));
    choose_in_order<true>(values, shares, columns, rounders);
    rounders.tries = 0;
    for (int sweep = 0; sweep < sweeps; sweep++) {
        for (int i = 0; i < columns; i++) {
            if (i % GROUP_COLUMNS == 0) rounders.begin(i, values);
            for (int v = 0; v < ROW_VECTORS; v++)
                errors[i][v] = rounders.of[v].value(levels[i][v]) - target[i][v];
        }
        memset((void*)values, 0, columns * sizeof(Column));
        add_shares(values, errors, steps, columns, 0, columns, 0);
        choose_in_order<false>(values, steps, columns, rounders);
    }
    write_codes(rows, levels, columns, count);
#if SCALE_COLUMNS
    write_scales(rows, units, groups, count);
#endif
}

// rows: their first column. shares, steps: (columns, columns). weights: of squared errors of the
// columns, tried_shares: of the scales that are tried, for scales of groups. See `choose_rows`.
extern "C" void pack_row_columns(const Rows* of, const float* shares, const float* steps,
                                 const float* weights, const float* tried_shares, int tries,
                                 int columns, int sweeps, Index count, int threads) {
    const Rows first = *of;
    parallel_for(threads, (count + ROWS - 1) / ROWS, [=](Index number) {
        const Index row = number * ROWS;
        Rows rows = first;
        rows.values += row * rows.value_stride, rows.codes += row * rows.code_stride;
        rows.scales += row * rows.scale_stride, rows.row_scales += row;
        choose_rows(rows, shares, steps, weights, tried_shares, tries, columns, sweeps,
                    (int)(count - row < ROWS ? count - row : ROWS));
    });
}
