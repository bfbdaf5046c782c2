// bitsandbytes' 4-bit formats, described in ops/formats/bnb_4bit.py, where CODEBOOK comes from. The scales lie in a tensor of
// their own, and are applied in weight.h.

struct Codebook4Bit {
    static FUNCTION Floats values(Packed block, int first) { return look_up(load_nibble_pairs(block + first / 2)); }
};
