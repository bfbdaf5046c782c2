// Encodes `rows` rows of a weight. codes: (rows, weight.columns). weight.columns: a multiple of
// CODE_GROUP and of the weight's blocks.
extern "C" void int8_rows(const Weight* of, signed char* codes, float* code_scales, long long rows,
                          int threads) {
    const Weight weight = *of;
    auto values_of = [=](long long row, int column, float* group) {
        const int piece = piece_of(PART_LENGTH, CODE_GROUP);
        for (int first = 0; first < CODE_GROUP; first += piece) {
            Part part = part_of(weight, row, column + first);
            const int place = piece == PART_LENGTH ? 0 : place_in_part(column + first);
#pragma GCC unroll 32
            for (int lane = 0; lane < piece; lane += LANES)
                store(part_values(weight, part, place + lane), group + first + lane);
        }
    };
    encode(values_of, codes, code_scales, rows, weight.columns, threads);
}
