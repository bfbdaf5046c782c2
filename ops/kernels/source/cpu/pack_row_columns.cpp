// `choose_codes` of ops/quantize/row_columns.py, which documents the steps.

struct UnitRounder {
    Floats unit, divisor;

    FUNCTION Floats level(Floats value) const { return nearest(value / divisor); }
    FUNCTION Floats value(Floats level) const { return value_of(level, unit); }
};

struct UnitRounders {
    UnitRounder of[ROW_VECTORS];
    const Column* units;
    Column* levels;

    FUNCTION void begin(int first, const Column*) {
        const Column& unit = units[SCALE_COLUMNS ? first / GROUP_COLUMNS : 0];
        for (int v = 0; v < ROW_VECTORS; v++) of[v] = {unit[v], divisor_of(unit[v])};
    }
    FUNCTION void load_level(Column& level, int column) const {
        memcpy(level, levels[column], sizeof level);
    }
    FUNCTION void store_level(const Column& level, int column) const {
        memcpy(levels[column], level, sizeof level);
    }
};

struct Rows {  // strides are from a row to the next one
    const TYPE* values;
    Byte *codes, *scales;
    const float* row_scales;
    Index value_stride, code_stride, scale_stride;
};

// Writes the codes of levels.
static void write_codes(const Rows& rows, const Column* levels, int columns, int count) {
    const int TOGETHER = 8 / BITS;
    for (int column = 0; column < columns; column += TOGETHER) {
        Byte bytes[ROW_VECTORS][LANES];
        for (int v = 0; v < ROW_VECTORS; v++) {
            Ints codes = {};
            for (int i = 0; i < TOGETHER; i++) {
                int place = ORDER == HIGH_FIRST ? TOGETHER - 1 - i : i;
                codes |= nearest_codes(levels[column + i][v]) << place * BITS;
            }
            store_bytes(codes, bytes[v]);
        }
        for (int r = 0; r < count; r++)
            rows.codes[r * rows.code_stride + column / TOGETHER] = bytes[r / LANES][r % LANES];
    }
}

// Chooses the codes of at most ROWS rows. is_target: values are in the basis of the codes already,
// and divided by the numbers of their rows.
static void choose_rows(Rows rows, const float* shares, const float* steps, int columns,
                        int sweeps, bool is_target, int count) {
    const int groups = SCALE_COLUMNS ? columns / GROUP_COLUMNS : 1;
    Buffer<Column> all_columns(groups + 4 * columns);
    Buffer<float> row(columns + LANES);
    Column *units = all_columns.items, *target = units + groups, *levels = target + columns,
           *values = levels + columns, *errors = values + columns;
    memset((void*)units, 0, (groups + columns) * sizeof(Column));
    for (int r = 0; r < count; r++) {
        const TYPE* from = rows.values + r * rows.value_stride;
        float inverted = 1;
        if (is_target) {
            for (int i = 0; i < columns; i += LANES)
                store(load_lanes(from, i, columns), row.items + i);
        } else {
            read_row(from, row.items, columns);
            if (HAS_ROW_NUMBERS) inverted = 1 / rows.row_scales[r];
        }
        for (int i = 0; i < columns; i++) ((float*)target[i])[r] = row.items[i] * inverted;
        for (int g = 0; g < groups; g++)
            ((float*)units[g])[r] = SCALE::number(rows.scales + r * rows.scale_stride, 0, g);
    }
    UnitRounders rounders = {{}, units, levels};
    memcpy((void*)values, target, columns * sizeof(Column));
    choose_in_order<true>(values, shares, columns, rounders);
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
}

// rows: their first column. shares, steps: (columns, columns). See `choose_rows`.
extern "C" void pack_row_columns(const Rows* of, const float* shares, const float* steps,
                                 int columns, int sweeps, int is_target, Index count,
                                 int threads) {
    const Rows first = *of;
    parallel_for(threads, (count + ROWS - 1) / ROWS, [=](Index number) {
        const Index row = number * ROWS;
        Rows rows = first;
        rows.values += row * rows.value_stride, rows.codes += row * rows.code_stride;
        rows.scales += row * rows.scale_stride, rows.row_scales += row;
        choose_rows(rows, shares, steps, columns, sweeps, is_target,
                    (int)(count - row < ROWS ? count - row : ROWS));
    });
}
