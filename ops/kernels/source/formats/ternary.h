// The ternary formats of BitNet. ops/formats/ternary.py documents the layouts of the blocks.

static FUNCTION unsigned power_of_3(int exponent) {
    unsigned power = exponent & 1 ? 3 : 1;
    if (exponent & 2) power *= 9;
    return exponent & 4 ? power * 81 : power;
}

struct TQ1_0 {
    static FUNCTION Floats values(Packed block, int first) {
        unsigned bytes[LANES / 4];
        for (int i = 0; i < LANES / 4; i++) {
            int place = first + 4 * i, from = place % 32, digit = place / 32;
            if (first >= 160) from = 32 + place % 16, digit = (place - 160) / 16;
            if (first >= 240) from = 48, digit = (place - 240) / 4;
            unsigned four = load_word(block + from), power = power_of_3(digit);
            bytes[i] = ((four & 0x00FF00FF) * power & 0x00FF00FF)
                       | (four >> 8 & 0x00FF00FF) * power << 8 & 0xFF00FF00;
        }
        return load_half(block + 52) * floats((bytes_of(bytes) * 3 >> 8) - 1);
    }
};

struct TQ2_0 {
    static FUNCTION Floats values(Packed block, int first) {
        Ints codes = load_bytes(block + first / 128 * 32 + first % 32) >> first % 128 / 32 * 2 & 3;
        return load_half(block + 64) * floats(codes - 1);
    }
};
