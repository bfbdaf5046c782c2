#include <math.h>

static FUNCTION Floats broadcast(float value) { return Floats{} + value; }

// Polynomials for 2^f, |f| <= 1/2, with the smallest largest error of their degree: 2e-9 and 3e-6.
static const float accurate[] = {1.53458119e-4f, 1.33999312e-3f, 9.61848896e-3f, 5.55032878e-2f,
                                 0.240226469f,    0.693147206f,   1};
static const float fast[] = {9.57010179e-3f, 5.59178603e-2f, 0.240247448f, 0.693121815f,
                             0.999999261f};
static FUNCTION const float (&coefficients_of(const float*))[7] { return accurate; }
static FUNCTION const float (&coefficients_of(const BFloat16*))[5] { return fast; }

// Returns e^x for x <= 0, and 0 below 2^-126: 2^n * 2^f with n an integer and |f| <= 1/2.
static FUNCTION Floats exponential(Floats x) {
    const float to_integer = 12582912;  // 1.5 * 2^23: sums of this size are integers
    const float log2e = 1.44269502f, log2e_rest = 1.92596299e-8f;
    Floats exponent = x * log2e;
    Floats shifted = exponent + to_integer, n = shifted - to_integer;
    Floats f = multiply_add(x, broadcast(log2e_rest), multiply_add(x, broadcast(log2e), -n));
    Floats power = {};
#pragma GCC unroll 8
    for (float coefficient : coefficients_of((const TYPE*)0))
        power = multiply_add(power, f, broadcast(coefficient));
    Words scale = (Words)shifted << 23;  // n in the bits of an exponent
    return exponent < -126 ? broadcast(0) : (Floats)((Words)power + scale);
}

// Replaces each row of scores (rows, columns) by its softmax.
extern "C" void softmax(TYPE* scores, long long rows, int columns, int threads) {
    int whole = columns / LANES, left = columns % LANES;
    parallel_ranges(threads, rows, [=](Index row, Index end) {
        Buffer<Floats> buffer(whole + 1);
        Floats* values = buffer.items;
        for (; row < end; row++) {
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
    });
}
