// ggml's first formats. ops/formats/legacy_quants.py documents the layouts of the blocks.

struct Q4_0 {
    static FUNCTION Floats values(Packed block, int first) {
        Ints codes = load_bytes(block + 2 + first % 16) >> first / 16 * 4 & 15;
        return load_half(block) * floats(codes - 8);
    }
};

struct Q4_1 {
    static FUNCTION Floats values(Packed block, int first) {
        Ints codes = load_bytes(block + 4 + first % 16) >> first / 16 * 4 & 15;
        return load_half(block) * floats(codes) + load_half(block + 2);
    }
};

struct Q5_0 {
    static FUNCTION Floats values(Packed block, int first) {
        Ints codes = load_bytes(block + 6 + first % 16) >> first / 16 * 4 & 15;
        return load_half(block) * floats((codes | load_bits(block + 2 + first / 8) << 4) - 16);
    }
};

struct Q5_1 {
    static FUNCTION Floats values(Packed block, int first) {
        Ints codes = load_bytes(block + 8 + first % 16) >> first / 16 * 4 & 15;
        return load_half(block) * floats(codes | load_bits(block + 4 + first / 8) << 4) +
               load_half(block + 2);
    }
};

struct Q8_0 {
    static FUNCTION Floats values(Packed block, int first) {
        return load_half(block) * floats(load_signed_bytes(block + 2 + first));
    }
};
