// Plain numbers, of which BLOCK_LENGTH count as a block.

struct F16 {
    static FUNCTION Floats values(Packed block, int first) {
        return load_values((const Half*)block + first);
    }
};
