// The K-quants. ops/formats/k_quants.py documents the layouts of the blocks.

struct Q2_K {
    static FUNCTION Floats values(Packed block, int first) {
        int scales = block[first / 16];
        float scale = load_half(block + 80) * (float)(scales & 15),
              min = load_half(block + 82) * (float)(scales >> 4);
        Ints codes =
            load_bytes(block + 16 + first / 128 * 32 + first % 32) >> first % 128 / 32 * 2 & 3;
        return scale * floats(codes) - min;
    }
};

struct Q3_K {
    static FUNCTION Floats values(Packed block, int first) {
        int group = first / 16;
        int low = block[96 + group % 8] >> group / 8 * 4 & 15,
            high = block[104 + group % 4] >> group / 4 * 2 & 3;
        float scale = load_half(block + 108) * (float)((low | high << 4) - 32);
        Ints third = load_bytes(block + first % 32) >> first / 32 & 1;
        Ints codes =
            load_bytes(block + 32 + first / 128 * 32 + first % 32) >> first % 128 / 32 * 2 & 3;
        return scale * floats((codes | third << 2) - 4);
    }
};

// Computes scale and min of one group of 32 values in Q4_K and Q5_K, times the super-scales.
static FUNCTION void scale_and_min(Packed block, int group, PRIVATE float& scale,
                                   PRIVATE float& min) {
    Packed packed = block + 4 + group % 4;
    int code = packed[0] & 63, min_code = packed[4] & 63;
    if (group >= 4) {
        code = (packed[8] & 15) | packed[0] >> 6 << 4;
        min_code = packed[8] >> 4 | packed[4] >> 6 << 4;
    }
    scale = load_half(block) * (float)code;
    min = load_half(block + 2) * (float)min_code;
}

struct Q4_K {
    static FUNCTION Floats values(Packed block, int first) {
        int group = first / 32;
        float scale, min;
        scale_and_min(block, group, scale, min);
        Ints codes = load_bytes(block + 16 + group / 2 * 32 + first % 32) >> group % 2 * 4 & 15;
        return scale * floats(codes) - min;
    }
};

struct Q5_K {
    static FUNCTION Floats values(Packed block, int first) {
        int group = first / 32;
        float scale, min;
        scale_and_min(block, group, scale, min);
        Ints fifth = load_bytes(block + 16 + first % 32) >> group & 1;
        Ints codes = load_bytes(block + 48 + group / 2 * 32 + first % 32) >> group % 2 * 4 & 15;
        return scale * floats(codes | fifth << 4) - min;
    }
};

struct Q6_K {
    static FUNCTION Floats values(Packed block, int first) {
        float scale = load_half(block + 208) * (float)(signed char)block[192 + first / 16];
        Ints codes = load_bytes(block + first / 128 * 64 + first % 64) >> first % 128 / 64 * 4 & 15;
        Ints high =
            load_bytes(block + 128 + first / 128 * 32 + first % 32) >> first % 128 / 32 * 2 & 3;
        return scale * floats((codes | high << 4) - 32);
    }
};

struct Q8_K {
    static FUNCTION Floats values(Packed block, int first) {
        return float_of_bits(load_word(block)) * floats(load_signed_bytes(block + 4 + first));
    }
};
