// The formats of points of a ternary grid. ops/formats/iq1.py documents the layouts of the blocks and
// has POINTS: value + 1 of eight neighbouring values, the first four in the low nibbles of a word.

TABLE unsigned points[] = {POINTS};

// Writes 8 * value + 9 of eight values, a byte each.
static FUNCTION void shifted_point(unsigned index, bool is_negative, PRIVATE unsigned* bytes) {
    unsigned point = points[index], shift = is_negative ? 0 : 0x02020202;
    bytes[0] = (point & 0x0F0F0F0F) * 8 + shift;
    bytes[1] = (point >> 4 & 0x0F0F0F0F) * 8 + shift;
}

struct IQ1_S {
    static FUNCTION Floats values(Packed block, int first) {
        unsigned high = load_short(block + 34 + first / 32 * 2);
        float scale = load_half(block) * (float)(2 * (high >> 12 & 7) + 1) * 0.125f;
        unsigned bytes[LANES / 4];
        for (int i = 0; i < LANES / 8; i++) {
            int place = first / 8 + i;
            unsigned index = block[2 + place] | (high >> place % 4 * 3 & 7) << 8;
            shifted_point(index, high >> 15, bytes + 2 * i);
        }
        return scale * floats(bytes_of(bytes) - 9);
    }
};

struct IQ1_M {
    static FUNCTION Floats values(Packed block, int first) {
        unsigned low = load_word(block + 48), high = load_word(block + 52);
        unsigned d = (low >> 12 & 0xF) | (low >> 24 & 0xF0) | (high >> 4 & 0xF00) | (high >> 16 & 0xF000);
        unsigned scales = load_short(block + 48 + first / 64 * 2) >> first % 64 / 16 * 3;
        float scale = float_of_half(d) * (float)(2 * (scales & 7) + 1) * 0.125f;
        unsigned bytes[LANES / 4];
        for (int i = 0; i < LANES / 8; i++) {
            int place = first / 8 + i;
            unsigned bits = block[32 + place / 2] >> place % 2 * 4;
            shifted_point(block[place] | (bits & 7) << 8, bits >> 3 & 1, bytes + 2 * i);
        }
        return scale * floats(bytes_of(bytes) - 9);
    }
};
