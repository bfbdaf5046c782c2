// The formats of grid points of eight magnitudes. ops/formats/iq2.py documents the layouts of the
// blocks.

static FUNCTION void point(unsigned index, PRIVATE unsigned* bytes) {
    bytes[0] = points[2 * index];
    bytes[1] = points[2 * index + 1];
}

// Returns the scale of 16 values in IQ2_XS and IQ2_S. scales: two a byte.
static FUNCTION float scale_of_16(Packed block, Packed scales, int first) {
    int scale = scales[first / 32] >> first % 32 / 16 * 4 & 15;
    return load_half(block) * ((float)scale + 0.5f) * 0.25f;
}

struct IQ2_XXS {
    static FUNCTION Floats values(Packed block, int first) {
        Packed codes = block + 2 + first / 32 * 8;
        unsigned word = load_word(codes + 4), bytes[LANES / 4], signs = 0;
        float scale = load_half(block) * ((float)(word >> 28) + 0.5f) * 0.25f;
        for (int i = 0; i < LANES / 8; i++) {
            int place = first % 32 / 8 + i;
            point(codes[place], bytes + 2 * i);
            signs |= even_signs(word >> place * 7 & 127) << 8 * i;
        }
        return scale * floats(negated(bytes_of(bytes), signs));
    }
};

struct IQ2_XS {
    static FUNCTION Floats values(Packed block, int first) {
        unsigned bytes[LANES / 4], signs = 0;
        for (int i = 0; i < LANES / 8; i++) {
            unsigned code = load_short(block + 2 + (first / 8 + i) * 2);
            point(code & 511, bytes + 2 * i);
            signs |= even_signs(code >> 9) << 8 * i;
        }
        return scale_of_16(block, block + 66, first) * floats(negated(bytes_of(bytes), signs));
    }
};

struct IQ2_S {
    static FUNCTION Floats values(Packed block, int first) {
        unsigned bytes[LANES / 4], signs = 0;
        for (int i = 0; i < LANES / 8; i++) {
            int place = first / 8 + i;
            point(block[2 + place] | (block[66 + place / 4] >> place % 4 * 2 & 3) << 8,
                  bytes + 2 * i);
            signs |= (unsigned)block[34 + place] << 8 * i;
        }
        return scale_of_16(block, block + 74, first) * floats(negated(bytes_of(bytes), signs));
    }
};
