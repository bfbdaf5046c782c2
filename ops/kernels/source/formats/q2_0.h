// The formats of a scale and 2-bit codes. ops/formats/q2_0.py documents the layouts of the blocks.

struct Q2_0 {
    static FUNCTION Floats values(Packed block, int first) {
        return load_half(block) * floats(load_bit_pairs(block + 2 + first / 4) - 1);
    }
};

typedef Q2_0 PQ2_0;
