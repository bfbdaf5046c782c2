static const int CHANNELS = 32;  // handled together; a multiple of LANES

// Casts `count` neighbouring values.
static FUNCTION void cast(const VALUE_TYPE* values, TYPE* out, int count) {
    int first = 0;
    for (; first + LANES <= count; first += LANES) store(load_values(values + first), out + first);
    if (first < count) {
        VALUE_TYPE last[LANES] = {};
        TYPE cast_last[LANES];
        memcpy(last, values + first, (count - first) * sizeof(VALUE_TYPE));
        store(load_values(last), cast_last);
        memcpy(out + first, cast_last, (count - first) * sizeof(TYPE));
    }
}

// Casts values of shape (channels, taps) and writes them transposed. TAPS: taps, if it is constant.
template <int TAPS>
static FUNCTION void transpose(const VALUE_TYPE* values, TYPE* out, int channels, int taps) {
    if (TAPS) taps = TAPS;
    TYPE chunk[CHANNELS * MAX_TAPS];
    for (int channel = 0; channel < channels; channel += CHANNELS) {
        int count = channels - channel < CHANNELS ? channels - channel : CHANNELS;
        cast(values + (Index)channel * taps, chunk, count * taps);
        for (int tap = 0; tap < taps; tap++)
            for (int i = 0; i < count; i++)
                out[(Index)tap * channels + channel + i] = chunk[i * taps + tap];
    }
}

// values: (rows, channels, taps). out: (rows, taps, channels). taps: at most MAX_TAPS.
extern "C" void channels_last(const VALUE_TYPE* values, TYPE* out, long long rows, int channels,
                              int taps, int threads) {
#pragma omp parallel for num_threads(threads)
    for (Index row = 0; row < rows; row++) {
        const VALUE_TYPE* from = values + row * channels * taps;
        TYPE* to = out + row * channels * taps;
        if (taps == 1)
            cast(from, to, channels);
        else if (taps == 9)
            transpose<9>(from, to, channels, taps);
        else
            transpose<0>(from, to, channels, taps);
    }
}
