// Compilers unroll copies of integers.
template <int BYTES>
struct Integer {
    typedef unsigned short Type;
};
template <>
struct Integer<4> {
    typedef unsigned Type;
};
typedef Integer<sizeof(TYPE)>::Type Bits;

static const int CHANNELS = 32;  // handled together; a multiple of LANES

// Casts `count` neighbouring values.
static FUNCTION void cast(const FROM_TYPE* values, TYPE* out, int count) {
    int first = 0;
    for (; first + LANES <= count; first += LANES) store(load_values(values + first), out + first);
    if (first < count) {
        FROM_TYPE last[LANES] = {};
        TYPE cast_last[LANES];
        memcpy(last, values + first, (count - first) * sizeof(FROM_TYPE));
        store(load_values(last), cast_last);
        memcpy(out + first, cast_last, (count - first) * sizeof(TYPE));
    }
}

// Casts `count` channels of all taps and writes them transposed. Inlined, so that the loops are
// unrolled where the numbers are constant.
static FUNCTION void transpose(const FROM_TYPE* values, Bits* out, int channels, int taps,
                               int count) {
    Bits chunk[CHANNELS * MAX_TAPS];
    cast(values, (TYPE*)chunk, count * taps);
    for (int tap = 0; tap < taps; tap++)
        for (int i = 0; i < count; i++) out[(Index)tap * channels + i] = chunk[i * taps + tap];
}

// values: (rows, channels, taps). out: (rows, taps, channels). taps: at most MAX_TAPS.
extern "C" void channels_last(const FROM_TYPE* values, TYPE* out, long long rows, int channels,
                              int taps, int threads) {
    parallel_for(threads, rows, [=](Index row) {
        const FROM_TYPE* from = values + row * channels * taps;
        Bits* to = (Bits*)out + row * channels * taps;
        if (taps == 1) {
            cast(from, (TYPE*)to, channels);
            return;
        }
        int channel = 0;
        for (; taps == 9 && channel + CHANNELS <= channels; channel += CHANNELS)
            transpose(from + channel * 9, to + channel, channels, 9, CHANNELS);
        for (int count; channel < channels; channel += count) {
            count = channels - channel < CHANNELS ? channels - channel : CHANNELS;
            transpose(from + channel * taps, to + channel, channels, taps, count);
        }
    });
}
