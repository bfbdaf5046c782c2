// The format of signs. ops/formats/q1_0.py documents the layout of a block.

struct Q1_0 {
    static FUNCTION Floats values(Packed block, int first) {
        return load_half(block) * floats((load_bits(block + 2 + first / 8) << 1) - 1);
    }
};
