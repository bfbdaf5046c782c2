// The formats of grid points of four magnitudes. ops/formats/iq3.py documents the layouts of the
// blocks.

struct IQ3_XXS {
    static FUNCTION Floats values(Packed block, int first) {
        unsigned word = load_word(block + 66 + first / 32 * 4), bytes[LANES / 4], signs = 0;
        float scale = load_half(block) * ((float)(word >> 28) + 0.5f) * 0.5f;
        for (int i = 0; i < LANES / 4; i++) bytes[i] = points[block[2 + first / 4 + i]];
        for (int i = 0; i < LANES / 8; i++)
            signs |= even_signs(word >> (first % 32 / 8 + i) * 7 & 127) << 8 * i;
        return scale * floats(negated(bytes_of(bytes), signs));
    }
};

struct IQ3_S {
    static FUNCTION Floats values(Packed block, int first) {
        int code = block[106 + first / 64] >> first % 64 / 32 * 4 & 15;
        unsigned bytes[LANES / 4], signs = 0;
        for (int i = 0; i < LANES / 4; i++) {
            int place = first / 4 + i;
            bytes[i] = points[block[2 + place] | (block[66 + place / 8] >> place % 8 & 1) << 8];
        }
        for (int i = 0; i < LANES / 8; i++)
            signs |= (unsigned)block[74 + first / 8 + i] << 8 * i;
        return load_half(block) * (float)(1 + 2 * code) * floats(negated(bytes_of(bytes), signs));
    }
};
