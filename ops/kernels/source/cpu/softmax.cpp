#include <math.h>
#include <stdlib.h>

static FUNCTION Floats broadcast(float value) { return Floats{} + value; }

// Returns e^x for x <= 0, with a relative error of 3e-6, and 0 below 2^-126: 2^n * 2^f with n an
// integer and |f| <= 1/2. The polynomial has the smallest largest error of its degree.
static FUNCTION Floats exponential(Floats x) {
    const float to_integer = 12582912;  // 1.5 * 2^23: sums of this size are integers
    const float coefficients[] = {5.591786e-2f, 0.24024744f, 0.6931218f, 0.9999993f};
    Floats exponent = x * 1.44269504f;
    Floats shifted = exponent + to_integer, f = exponent - (shifted - to_integer);
    Floats power = broadcast(9.570101e-3f);
#pragma GCC unroll 4
    for (float coefficient : coefficients) power = multiply_add(power, f, broadcast(coefficient));
    Words n = (Words)shifted << 23;  // in the bits of an exponent
    return exponent < -126 ? broadcast(0) : (Floats)((Words)power + n);
}

// Rounds in one instruction where there is one; it rounds subnormal numbers to zero.
static FUNCTION void store_rounded(Floats values, BFloat16* to) {
#if LANES == 16 && defined(__AVX512BF16__)
    __m256bh bits = _mm512_cvtneps_pbh((__m512)values);
    memcpy(to, &bits, sizeof bits);
#else
    store(values, to);
#endif
}

// Replaces each row of scores (rows, columns) by its softmax.
extern "C" void softmax(TYPE* scores, long long rows, int columns, int threads) {
    int whole = columns / LANES, left = columns % LANES;
#pragma omp parallel num_threads(threads)
    {
        Floats* values = (Floats*)aligned_alloc(sizeof(Floats), (whole + 1) * sizeof(Floats));
#pragma omp for
        for (Index row = 0; row < rows; row++) {
            TYPE *first = scores + row * columns, last[LANES] = {};
            Floats largest = broadcast(-INFINITY), sums = {};
            for (int i = 0; i < whole; i++) {
                values[i] = load_values(first + i * LANES);
                largest = values[i] > largest ? values[i] : largest;
            }
            memcpy(last, first + whole * LANES, left * sizeof(TYPE));
            values[whole] = load_values(last);
            for (int lane = left; lane < LANES; lane++) values[whole][lane] = -INFINITY;
            largest = values[whole] > largest ? values[whole] : largest;
            float maximum = largest[0], sum = 0;
            for (int lane = 1; lane < LANES; lane++)
                maximum = largest[lane] > maximum ? largest[lane] : maximum;
            for (int i = 0; i <= whole; i++) {
                values[i] = exponential(values[i] - maximum);
                sums += values[i];
            }
            for (int lane = 0; lane < LANES; lane++) sum += sums[lane];
            float inverse = 1 / sum;
            for (int i = 0; i < whole; i++) store_rounded(values[i] * inverse, first + i * LANES);
            store_rounded(values[whole] * inverse, last);
            memcpy(first + whole * LANES, last, left * sizeof(TYPE));
        }
        free(values);
    }
}
