// The search of ops/quantize/grid_search.py, over the same scales in the same order; its docstrings document
// the steps. A lane holds a block, so that no step works across lanes. Sums are added in another
// order than torch's.
//
// Defined are LENGTH and GROUP (values of a block and of a group), LEVELS and COUNT (the levels,
// ascending), UNIFORM (levels are neighbouring integers), SIGNED, MINIMUM, INTEGERS (groups have
// integer scales), LOWEST_SCALE, HIGHEST_SCALE, HALF_SCALES.

const int GROUPS = LENGTH / GROUP, GROUP_COLUMNS = GROUP;
static const float levels[COUNT] = {LEVELS};
const float SMALLEST_HALF = 5.9604644775390625e-8f, LARGEST_HALF = 65504;
const float LARGEST_FLOAT = __FLT_MAX__;

// Returns the nearest level, or its index: the number of middles between two levels that `scaled`
// exceeds.
static FUNCTION Floats nearest(Floats scaled, bool index) {
    if (UNIFORM) {
        Floats level = nearest_integer(between(scaled, levels[0], levels[COUNT - 1]));
        return index ? level - levels[0] : level;
    }
    Floats sum = all(index ? 0 : levels[0]);
#pragma GCC unroll 16
    for (int i = 1; i < COUNT; i++) {
        float middle = (levels[i] + levels[i - 1]) / 2,
              step = index ? 1 : levels[i] - levels[i - 1];
        sum += either(scaled > middle, all(step), all(0));
    }
    return sum;
}

static FUNCTION Floats stored(Floats scale, bool to_zero) {
    if (!HALF_SCALES) return between(scale, -LARGEST_FLOAT, LARGEST_FLOAT);
    Floats half = rounded<Half>(between(scale, -LARGEST_HALF, LARGEST_HALF));
    Floats smallest = (Floats)((Ints)all(SMALLEST_HALF) | (Ints)scale & (int)0x80000000);
    return to_zero ? half : either((half == 0) & (scale != 0), smallest, half);
}

static FUNCTION Floats square_root(Floats a) {
#if LANES == 16 && defined(__AVX512F__)
    return (Floats)_mm512_sqrt_ps((__m512)a);
#elif LANES == 8 && defined(__AVX2__)
    return (Floats)_mm256_sqrt_ps((__m256)a);
#else
    for (int i = 0; i < LANES; i++) a[i] = __builtin_sqrtf(a[i]);
    return a;
#endif
}

struct Sums {
    Floats squares, products, total;
};

struct Stored {  // of LANES blocks: super-scales, and the integers of each group
    Floats d, dmin, scale[GROUPS], minimum[GROUPS];
};

template <bool WEIGHTED>
struct Blocks {
    Floats values[LENGTH], weights[WEIGHTED ? LENGTH : 1];
    Floats squares[GROUPS], totals[GROUPS], weight[GROUPS];
    Floats factor, unscale;  // of each block; see `normalise`

    // Multiplies each block by a power of two that brings its peak near 1, see `powers_of_two`.
    // Not inlined, because that takes compilers half as long again.
    __attribute__((noinline)) void normalise() {
        Floats peaks[4] = {}, peak;
        for (int i = 0; i < LENGTH; i += 4)
            for (int j = 0; j < 4; j++) peaks[j] = larger(peaks[j], magnitude(values[i + j]));
        peak = larger(larger(peaks[0], peaks[1]), larger(peaks[2], peaks[3]));
        Ints exponent = (Ints)peak >> 23;
        exponent = exponent < 1 ? 1 - (Ints){} : exponent > 253 ? 253 - (Ints){} : exponent;
        factor = (Floats)(254 - exponent << 23), unscale = (Floats)(exponent << 23);
        for (int i = 0; i < LENGTH; i++) values[i] *= factor;
    }

    // Returns scales of normalised values as the format stores them.
    FUNCTION Floats rounded_scale(Floats scale, bool to_zero) const {
        return stored(scale * unscale, to_zero) * factor;
    }

    void restore(Stored& scales) const { scales.d *= unscale, scales.dmin *= unscale; }

    FUNCTION Floats weighed(int i, Floats a) const {
        return WEIGHTED ? weights[WEIGHTED ? i : 0] * a : a;
    }

    FUNCTION Floats scaled(int i, Floats inverted, Floats shift) const {
        return MINIMUM ? multiply_add(values[i], inverted, shift) : values[i] * inverted;
    }

    // Weights large values more, as `Search.fit` does.
    void emphasise() {
        Floats mean = all(0);
        for (int i = 0; i < LENGTH; i++) mean = multiply_add(values[i], values[i], mean);
        mean *= 1.0f / LENGTH;
        for (int i = 0; i < LENGTH; i++)
            weights[WEIGHTED ? i : 0] *= square_root(multiply_add(values[i], values[i], mean));
    }

    void prepare(int g) {
        Floats square = {}, total = {}, weight_ = {};
        for (int i = g * GROUP; i < (g + 1) * GROUP; i++) {
            Floats weighted = weighed(i, values[i]);
            square += weighted * values[i];
            total += weighted;
            weight_ += weighed(i, all(1));
        }
        squares[g] = square, totals[g] = total, weight[g] = weight_;
    }

    FUNCTION Sums sums(int g, Floats unit, Floats offset) const {
        Sums sums = {};
        Floats inverted = inverse(unit), shift = offset * inverted;
#pragma GCC unroll 4
        for (int i = g * GROUP; i < (g + 1) * GROUP; i++) {
            Floats level = nearest(scaled(i, inverted, shift), false), weighted = weighed(i, level);
            sums.squares = multiply_add(weighted, level, sums.squares);
            sums.products = multiply_add(weighted, values[i], sums.products);
            if (MINIMUM) sums.total += weighted;
        }
        return sums;
    }

    FUNCTION Floats error(int g, Floats unit, Floats offset) const {
        Floats error = {}, inverted = inverse(unit), shift = offset * inverted;
#pragma GCC unroll 4
        for (int i = g * GROUP; i < (g + 1) * GROUP; i++) {
            Floats shifted = MINIMUM ? values[i] + offset : values[i];
            Floats off = multiply_add(nearest(scaled(i, inverted, shift), false), unit, -shifted);
            error = multiply_add(weighed(i, off), off, error);
        }
        return error;
    }

    Floats error(const Stored& scales) const {
        Floats sum = {};
        for (int g = 0; g < GROUPS; g++)
            sum += error(g, scales.d * scales.scale[g], scales.dmin * scales.minimum[g]);
        return sum;
    }

    FUNCTION void least_squares(int g, Sums sums, Floats& unit, Floats& offset,
                                Floats& error) const {
        if (!MINIMUM) {
            unit = sums.products * inverse(sums.squares);
            error = squares[g] - unit * sums.products;
        } else {
            Floats determinant = weight[g] * sums.squares - sums.total * sums.total,
                   inverted = inverse(determinant);
            Ints sound = determinant > 1e-6f * weight[g] * sums.squares;
            unit = either(sound, (weight[g] * sums.products - totals[g] * sums.total) * inverted,
                          all(0));
            offset =
                either(sound, (sums.total * sums.products - sums.squares * totals[g]) * inverted,
                       -totals[g] * inverse(weight[g]));
            if (INTEGERS) {
                unit = either(offset < 0, sums.products * inverse(sums.squares), unit);
                offset = larger(offset, all(0));
            }
            error = squares[g] +
                    unit * (unit * sums.squares - 2 * sums.products - 2 * offset * sums.total) +
                    offset * (offset * weight[g] + 2 * totals[g]);
        }
        if (!SIGNED) error = either(unit >= 0, error, all(__builtin_inff()));
    }

    // Searches the best unit and offset of a group, not yet rounded.
    void start(int g, int tries, int rounds, Floats& best_unit, Floats& best_offset) const {
        Floats low = values[g * GROUP], high = low, best = all(__builtin_inff());
        for (int i = g * GROUP; i < (g + 1) * GROUP; i++)
            low = smaller(low, values[i]), high = larger(high, values[i]);
        if (MINIMUM && INTEGERS) low = smaller(low, all(0));
        Floats peak = either(high > -low, high, low);
        best_unit = best_offset = all(0);
        bool first = true;
        auto keep = [&](Floats from_unit, Floats from_offset) {
            Floats unit, offset = {}, error;
            least_squares(g, sums(g, from_unit, from_offset), unit, offset, error);
            Ints better = error < best;
            if (first) better |= -1;
            first = false;
            best = either(better, error, best);
            best_unit = either(better, unit, best_unit),
            best_offset = either(better, offset, best_offset);
        };
        float from = UNIFORM ? -0.9f : -0.12f, to = UNIFORM ? 0.9f : 0.24f;
        for (int t = 0; t < tries; t++) {
            float stretch = tries > 1 ? from + (to - from) * t / (tries - 1) : from;
            float part = 1 + (UNIFORM ? stretch / levels[COUNT - 1] : stretch);
            if (MINIMUM)
                keep((high - low) / (levels[COUNT - 1] + stretch), -low);
            else if (SIGNED) {
                keep(peak / (levels[0] * part), all(0));
                if (!UNIFORM) keep(peak / (levels[COUNT - 1] * part), all(0));
            } else
                keep(magnitude(peak) / (levels[COUNT - 1] * part), all(0));
        }
        for (int round = 0; round < rounds; round++) keep(best_unit, best_offset);
    }

    void first_scales(Stored& scales, int tries, int rounds) const {
        Floats unit[GROUPS], offset[GROUPS];
        for (int g = 0; g < GROUPS; g++) start(g, tries, rounds, unit[g], offset[g]);
        scales.dmin = all(0);
        if (!INTEGERS) {
            scales.d = rounded_scale(unit[0], false);
            if (MINIMUM) scales.dmin = rounded_scale(offset[0], true);
            scales.scale[0] = scales.minimum[0] = all(1);
            return;
        }
        Floats peak = unit[0], peak_offset = offset[0];
        for (int g = 1; g < GROUPS; g++) {
            peak = either(magnitude(unit[g]) > magnitude(peak), unit[g], peak);
            peak_offset = larger(offset[g], peak_offset);
        }
        scales.d = rounded_scale(
            peak / (LOWEST_SCALE < 0 ? (float)LOWEST_SCALE : (float)HIGHEST_SCALE), false);
        if (MINIMUM) scales.dmin = rounded_scale(peak_offset / (float)HIGHEST_SCALE, false);
        for (int g = 0; g < GROUPS; g++) nearest_integers(g, scales, unit[g], offset[g]);
    }

    void nearest_integers(int g, Stored& scales, Floats unit, Floats offset) const {
        scales.scale[g] =
            nearest_integer(between(unit * inverse(scales.d), LOWEST_SCALE, HIGHEST_SCALE));
        scales.minimum[g] = MINIMUM ? nearest_integer(between(offset * inverse(scales.dmin),
                                                              LOWEST_SCALE, HIGHEST_SCALE))
                                    : all(0);
    }

    void best_integers(int g, Stored& scales) const {
        Floats scale = scales.scale[g], minimum = scales.minimum[g];
        Floats best = error(g, scales.d * scale, scales.dmin * minimum);
        for (int step = -1; step <= 1; step++)
            for (int other = MINIMUM ? -1 : 0; other <= (MINIMUM ? 1 : 0); other++) {
                if (!step && !other) continue;
                Floats tried = between(scale + (float)step, LOWEST_SCALE, HIGHEST_SCALE);
                Floats tried_minimum =
                    MINIMUM ? between(minimum + (float)other, LOWEST_SCALE, HIGHEST_SCALE)
                            : minimum;
                Floats tried_error = error(g, scales.d * tried, scales.dmin * tried_minimum);
                Ints better = tried_error < best;
                best = either(better, tried_error, best);
                scales.scale[g] = either(better, tried, scales.scale[g]);
                scales.minimum[g] = either(better, tried_minimum, scales.minimum[g]);
            }
    }

    // `Search.fit_group`: searches the integers of a group for given super-scales.
    void fit_group(int g, Stored& scales, int tries, int rounds) const {
        Floats unit, offset;
        start(g, tries, rounds, unit, offset);
        nearest_integers(g, scales, unit, offset);
        best_integers(g, scales);
    }

    void best_supers(Stored& scales) const {
        Floats aa = {}, ab = {}, bb = {}, ax = {}, bx = {};
        for (int g = 0; g < GROUPS; g++) {
            Floats a = scales.scale[g], b = scales.minimum[g];
            Sums of_group = sums(g, scales.d * a, scales.dmin * b);
            aa += a * a * of_group.squares, ax += a * of_group.products;
            ab += a * b * of_group.total, bb += b * b * weight[g], bx += b * totals[g];
        }
        if (!MINIMUM) {
            Floats d = ax * inverse(aa);
            scales.d = rounded_scale(SIGNED ? d : larger(d, all(0)), false);
            return;
        }
        Floats determinant = aa * bb - ab * ab, inverted = inverse(determinant);
        Floats d = (ax * bb - ab * bx) * inverted, dmin = (ab * ax - aa * bx) * inverted;
        Ints sound = (determinant > 1e-6f * aa * bb) & (d > 0);
        if (INTEGERS) sound &= dmin >= 0;
        scales.d = either(sound, rounded_scale(d, false), scales.d);
        scales.dmin = either(sound, rounded_scale(dmin, true), scales.dmin);
    }

    void search(Stored& best, int tries, int rounds, int sweeps) const {
        first_scales(best, tries, rounds);
        Floats least_error = error(best);
        auto keep = [&](const Stored& tried) {
            Floats tried_error = error(tried);
            Ints better = tried_error < least_error;
            least_error = either(better, tried_error, least_error);
            best.d = either(better, tried.d, best.d),
            best.dmin = either(better, tried.dmin, best.dmin);
            for (int g = 0; g < GROUPS; g++) {
                best.scale[g] = either(better, tried.scale[g], best.scale[g]);
                best.minimum[g] = either(better, tried.minimum[g], best.minimum[g]);
            }
        };
        for (int sweep = 0; sweep < sweeps; sweep++) {
            Stored tried = best;
            if (INTEGERS)
                for (int g = 0; g < GROUPS; g++) best_integers(g, tried);
            keep(tried);
            best_supers(tried);
            keep(tried);
        }
        Floats all_squares = {};
        for (int g = 0; g < GROUPS; g++) all_squares += squares[g];
        Ints nearer = least_error <= all_squares;  // than zeros
        best.d = either(nearer, best.d, all(0)), best.dmin = either(nearer, best.dmin, all(0));
    }
};
