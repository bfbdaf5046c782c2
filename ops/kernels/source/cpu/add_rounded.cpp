// The bits that float32 has more than TYPE, and the largest number of TYPE as bits of a float32.
template <class T>
struct Bits;
template <>
struct Bits<BFloat16> {
    static const unsigned dropped = 16, largest = 0x7F7F0000;
};
template <>
struct Bits<Half> {
    static const unsigned dropped = 13, largest = 0x477FE000;
};

// Returns what a cast to the nearest number of a type rounds as ops/stochastic_rounding.py
// does.
static FUNCTION Floats dithered(Floats values) {
    Words bits = (Words)values, magnitudes = bits & 0x7FFFFFFF, hashes = bits * MIX;
    Words kept = Words{} - (1u << Bits<TYPE>::dropped);
    Words grid = (bits + (hashes >> (32 - Bits<TYPE>::dropped))) & kept;
    Floats out = magnitudes <= Bits<TYPE>::largest ? (Floats)grid : values;
#if IS_HALF  // subnormal there: in steps of 2^-24
    Floats noise = floats((Ints)hashes), small = values;
    for (int i = 0; i < LANES; i++) small[i] = __builtin_fmaf(noise[i], NOISE, small[i]);
    out = magnitudes <= LEAST_NORMAL ? small : out;
#endif
    return out;
}

static FUNCTION void add(TYPE* value, const TYPE* change) {
    store(dithered(load_values(value) + load_values(change)), value);
}

// Adds `change` to `value`, `count` numbers each.
extern "C" void add_rounded(TYPE* value, const TYPE* change, long long count, int threads) {
    parallel_ranges(threads, count / LANES, [=](Index vector, Index end) {
        for (; vector < end; vector++) add(value + vector * LANES, change + vector * LANES);
    });
    Index first = count / LANES * LANES, rest = count - first;
    if (rest) {
        TYPE sums[LANES] = {}, changes[LANES] = {};
        memcpy(sums, value + first, rest * sizeof(TYPE));
        memcpy(changes, change + first, rest * sizeof(TYPE));
        add(sums, changes);
        memcpy(value + first, sums, rest * sizeof(TYPE));
    }
}
