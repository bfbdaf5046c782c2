// Returns a sum as ops/stochastic_rounding.py rounds it.
FUNCTION float dithered(float value, BFloat16) {
    unsigned bits = __float_as_uint(value);
    if ((bits & 0x7FFFFFFF) > 0x7F7F0000) return value;
    return float_of_bits((bits + (bits * MIX >> 16)) & 0xFFFF0000);
}

FUNCTION float dithered(float value, Half) {
    unsigned bits = __float_as_uint(value), hash = bits * MIX, magnitude = bits & 0x7FFFFFFF;
    if (magnitude <= LEAST_NORMAL) return fmaf((float)(int)hash, NOISE, value);
    return magnitude > 0x477FE000 ? value : float_of_bits((bits + (hash >> 19)) & 0xFFFFE000);
}

// Adds `change` to `value`, `count` numbers each. Each thread adds LANES.
extern "C" __global__ void add_rounded(TYPE* value, const TYPE* change, long long count) {
    Index first = ((Index)blockIdx.x * blockDim.x + threadIdx.x) * LANES;
    bool is_aligned = ((unsigned long long)value | (unsigned long long)change) % 16 == 0;
    if (is_aligned && first + LANES <= count) {
        Floats sums = load_chunk(value + first) + load_chunk(change + first);
        for (int i = 0; i < LANES; i++) sums.lane[i] = dithered(sums.lane[i], TYPE{});
        store_chunk(value + first, sums);
        return;
    }
    for (Index i = first; i < first + LANES && i < count; i++)
        round_to(dithered(to_float(value[i]) + to_float(change[i]), TYPE{}), value[i]);
}
