// Encodes `rows` rows of the input. input, codes: (rows, columns). columns: a multiple of CODE_GROUP.
extern "C" void int8_tokens(const TYPE* input, signed char* codes, float* code_scales,
                            long long rows, int columns, int threads) {
    auto values_of = [=](long long row, int column, float* group) {
        for (int lane = 0; lane < CODE_GROUP; lane += LANES)
            store(load_values(input + row * columns + column + lane), group + lane);
    };
    encode(values_of, codes, code_scales, rows, columns, threads);
}
