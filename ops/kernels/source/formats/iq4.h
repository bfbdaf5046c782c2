// The 4-bit formats with a codebook of integers. ops/formats/iq4.py documents the layouts of the
// blocks and has CODEBOOK.

struct IQ4_NL {
    static FUNCTION Floats values(Packed block, int first) {
        return load_half(block) *
               look_up(load_bytes(block + 2 + first % 16) >> first / 16 * 4 & 15);
    }
};

struct IQ4_XS {
    static FUNCTION Floats values(Packed block, int first) {
        int group = first / 32;
        int low = block[4 + group / 2] >> group % 2 * 4 & 15,
            high = block[2 + group / 4] >> group % 4 * 2 & 3;
        float scale = load_half(block) * (float)((low | high << 4) - 32);
        return scale *
               look_up(load_bytes(block + 8 + group * 16 + first % 16) >> first % 32 / 16 * 4 & 15);
    }
};
