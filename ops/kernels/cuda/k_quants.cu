// The K-quants. The layouts of the blocks stand in ops/formats/k_quants.py; `first` is a chunk's place in its block.

struct Q2_K {
    static __device__ void values(const Byte* block, int first, float* values) {
        int scales = block[first / 16];
        float scale = load_half(block + 80) * (float)(scales & 15), min = load_half(block + 82) * (float)(scales >> 4);
        Bytes codes(block + 16 + first / 128 * 32 + first % 32);
        for (int i = 0; i < 8; i++) values[i] = scale * (float)(codes[i] >> first % 128 / 32 * 2 & 3) - min;
    }
};

struct Q3_K {
    static __device__ void values(const Byte* block, int first, float* values) {
        int group = first / 16;
        int low = block[96 + group % 8] >> group / 8 * 4 & 15, high = block[104 + group % 4] >> group / 4 * 2 & 3;
        float scale = load_half(block + 108) * (float)((low | high << 4) - 32);
        Bytes third(block + first % 32);
        Bytes codes(block + 32 + first / 128 * 32 + first % 32);
        for (int i = 0; i < 8; i++) {
            int code = codes[i] >> first % 128 / 32 * 2 & 3 | (third[i] >> first / 32 & 1) << 2;
            values[i] = scale * (float)(code - 4);
        }
    }
};

// Scale and min of one group of 32 values in Q4_K and Q5_K, times the super-scales.
__device__ inline void scale_and_min(const Byte* block, int group, float& scale, float& min) {
    const Byte* packed = block + 4 + group % 4;
    int code = packed[0] & 63, min_code = packed[4] & 63;
    if (group >= 4) {
        code = packed[8] & 15 | packed[0] >> 6 << 4;
        min_code = packed[8] >> 4 | packed[4] >> 6 << 4;
    }
    scale = load_half(block) * (float)code;
    min = load_half(block + 2) * (float)min_code;
}

struct Q4_K {
    static __device__ void values(const Byte* block, int first, float* values) {
        int group = first / 32;
        float scale, min;
        scale_and_min(block, group, scale, min);
        Bytes codes(block + 16 + group / 2 * 32 + first % 32);
        for (int i = 0; i < 8; i++) values[i] = scale * (float)(codes[i] >> group % 2 * 4 & 15) - min;
    }
};

struct Q5_K {
    static __device__ void values(const Byte* block, int first, float* values) {
        int group = first / 32;
        float scale, min;
        scale_and_min(block, group, scale, min);
        Bytes fifth(block + 16 + first % 32);
        Bytes codes(block + 48 + group / 2 * 32 + first % 32);
        for (int i = 0; i < 8; i++)
            values[i] = scale * (float)(codes[i] >> group % 2 * 4 & 15 | (fifth[i] >> group & 1) << 4) - min;
    }
};

struct Q6_K {
    static __device__ void values(const Byte* block, int first, float* values) {
        float scale = load_half(block + 208) * (float)(signed char)block[192 + first / 16];
        Bytes codes(block + first / 128 * 64 + first % 64);
        Bytes high(block + 128 + first / 128 * 32 + first % 32);
        for (int i = 0; i < 8; i++) {
            int code = codes[i] >> first % 128 / 64 * 4 & 15 | (high[i] >> first % 128 / 32 * 2 & 3) << 4;
            values[i] = scale * (float)(code - 32);
        }
    }
};
