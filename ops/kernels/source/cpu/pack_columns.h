// Chooses the codes of columns in order; later columns compensate earlier errors. `choose_in_order` of
// ops/quantize/column_order.py documents the steps. A lane holds a row. Several vectors of rows are
// processed together, so that each loaded share serves all of them, and so few that all their
// columns stay in the cache.
//
// GROUP_COLUMNS, with one scale, are defined before this file.

const int ROW_VECTORS = 2, ROWS = ROW_VECTORS * LANES;
// Columns that take up residuals together: their sums fill the registers.
const int TILE_COLUMNS = 4;

typedef Floats Column[ROW_VECTORS];

// Adds to TOGETHER columns from `column` on their shares of the residuals of columns `first` up to
// `stop`.
template <int TOGETHER>
static FUNCTION void add_to(Column* values, const Column* residuals, const float* shares,
                            int columns, int first, int stop, int column) {
    Column sums[TOGETHER];
#pragma GCC unroll 4
    for (int t = 0; t < TOGETHER; t++)
#pragma GCC unroll 4
        for (int v = 0; v < ROW_VECTORS; v++) sums[t][v] = values[column + t][v];
    for (int i = first; i < stop; i++)
#pragma GCC unroll 4
        for (int t = 0; t < TOGETHER; t++) {
            Floats share = all(shares[(Index)i * columns + column + t]);
#pragma GCC unroll 4
            for (int v = 0; v < ROW_VECTORS; v++)
                sums[t][v] = multiply_add(share, residuals[i][v], sums[t][v]);
        }
#pragma GCC unroll 4
    for (int t = 0; t < TOGETHER; t++)
#pragma GCC unroll 4
        for (int v = 0; v < ROW_VECTORS; v++) values[column + t][v] = sums[t][v];
}

// The same for all columns from `later` on.
static void add_shares(Column* values, const Column* residuals, const float* shares, int columns,
                       int first, int stop, int later) {
    for (; later + TILE_COLUMNS <= columns; later += TILE_COLUMNS)
        add_to<TILE_COLUMNS>(values, residuals, shares, columns, first, stop, later);
    for (; later < columns; later++)
        add_to<1>(values, residuals, shares, columns, first, stop, later);
}

// Chooses the codes of columns, whose values are overwritten by the residuals. shares: (columns,
// columns). rounders: begin gets the columns of a group ready, level and store_level have the
// levels. IS_FIRST: values are rounded; otherwise they are added to the values of the levels.
template <bool IS_FIRST, class Rounders>
static void choose_in_order(Column* values, const float* shares, int columns,
                            Rounders& rounders) {
    for (int first = 0; first < columns; first += GROUP_COLUMNS) {
        int stop = first + GROUP_COLUMNS < columns ? first + GROUP_COLUMNS : columns;
        rounders.begin(first, values);
        for (int column = first; column < stop; column++) {
            Column level = {};
            if (!IS_FIRST) rounders.load_level(level, column);
#pragma GCC unroll 4
            for (int v = 0; v < ROW_VECTORS; v++) {
                Floats target = values[column][v], before = {};
                if (!IS_FIRST) before = rounders.of[v].value(level[v]), target += before;
                level[v] = rounders.of[v].level(target);
                Floats value = rounders.of[v].value(level[v]);
                values[column][v] = IS_FIRST ? target - value : value - before;
            }
            rounders.store_level(level, column);
            for (int later = column + 1; later < stop; later++) {
                Floats share = all(shares[(Index)column * columns + later]);
#pragma GCC unroll 4
                for (int v = 0; v < ROW_VECTORS; v++)
                    values[later][v] = multiply_add(share, values[column][v], values[later][v]);
            }
        }
        add_shares(values, values, shares, columns, first, stop, stop);
    }
}
