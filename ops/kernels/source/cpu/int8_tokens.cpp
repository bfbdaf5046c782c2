static FUNCTION Floats load_values(const float* from) { return load<Floats>(from); }
static FUNCTION Floats load_values(const Half* from) { return of_halves(load<Shorts>(from)); }
static FUNCTION Floats load_values(const BFloat16* from) {
    return (Floats)(__builtin_convertvector(load<Shorts>(from), Words) << 16);
}

// Codes of `rows` rows of the input and their scales. input, codes: (rows, columns). columns: a multiple of GROUP.
extern "C" void int8_tokens(const TYPE* input, signed char* codes, float* code_scales, long long rows, int columns, int threads) {
#pragma omp parallel num_threads(threads)
    {
        float* values = (float*)malloc(columns * sizeof(float));
#pragma omp for
        for (long long row = 0; row < rows; row++) {
            Ints largest = {};
            for (int column = 0; column < columns; column += GROUP) {
                for (int lane = 0; lane < GROUP; lane += LANES)
                    store(load_values(input + row * columns + column + lane), values + column + lane);
                largest = rotate(values + column, largest);
            }
            code_scales[row] = quantise(values, columns, largest, codes + row * columns);
        }
        free(values);
    }
}
